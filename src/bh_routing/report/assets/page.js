"use strict";
// Theme, views of charts and the text at the pointer. The other scripts share `page`.
const page = {
  data: JSON.parse(document.getElementById("data").textContent),

  element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  },

  // Every text that came from a file is set as text, never as markup.
  options(select, labels, values = labels.map((_, i) => i)) {
    labels.forEach((label, i) =>
      select.append(page.element("option", { value: values[i], textContent: label })));
  },

  color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  },

  // Show a text near the pointer; none hides it.
  tip(event, text) {
    const box = document.getElementById("tip");
    box.hidden = !text;
    if (!text) return;
    box.textContent = text;
    const room = document.documentElement.clientWidth - box.offsetWidth - 8;
    box.style.left = `${Math.max(8, Math.min(event.clientX + 14, room))}px`;
    box.style.top = `${Math.max(8, event.clientY - box.offsetHeight - 12)}px`;
  },
};

(() => {
  document.querySelectorAll("select[data-chart]").forEach((select) =>
    select.addEventListener("change", () =>
      document.getElementById(select.dataset.chart).querySelectorAll(".view").forEach((view, i) => {
        view.hidden = i !== select.selectedIndex;
      })));

  // The nearest tip of a chart within this many pixels; a tap does as well as a pointer.
  const REACH = 26;
  document.querySelectorAll(".chart svg").forEach((svg) => {
    const tips = JSON.parse(svg.dataset.tips);
    const show = (event) => {
      const box = svg.getBoundingClientRect();
      let best = REACH, text = "";
      for (const [x, y, shown] of tips) {
        const far = Math.hypot(box.left + x * box.width / 1000 - event.clientX,
          box.top + y * box.height / 1000 - event.clientY);
        if (far < best) [best, text] = [far, shown];
      }
      page.tip(event, text);
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", (event) => page.tip(event, ""));
  });
  addEventListener("scroll", (event) => page.tip(event, ""), { passive: true });

  const button = document.getElementById("theme");
  function apply(theme) {
    document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
    document.dispatchEvent(new Event("theme"));
  }
  apply(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  button.addEventListener("click", () =>
    apply(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  let before;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    apply("light");
  });
  addEventListener("afterprint", () => apply(before));
  document.body.dataset.ready = "yes";
})();
