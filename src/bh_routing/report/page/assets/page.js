"use strict";
// Charts and theme. `page` is what the other scripts share.
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

  printWidth: undefined,  // pixels; a chart doesn't follow the paper's width by itself

  color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  },

  draw(id, figure, height) {
    const ink = page.color("--ink"), line = page.color("--line");
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
    const narrow = window.innerWidth < 700;
    const layout = {
      ...figure.layout,
      height,
      width: page.printWidth,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: narrow ? 11 : 13, family: "inherit" },
      margin: { l: 50, r: 12, t: 12, b: 46 },
      legend: { orientation: "h", y: -0.22 },
      xaxis: { ...axis, ...figure.layout.xaxis },
      yaxis: { ...axis, ...figure.layout.yaxis },
    };
    const element = document.getElementById(id);
    // The baseline's grey is dark, made for paper.
    const data = JSON.parse(JSON.stringify(figure.data).replaceAll("#4d4d4d", page.color("--baseline")));
    Plotly.react(element, data, layout, { responsive: true, displayModeBar: false });
    element.dataset.drawn = "yes";
  },
};

(() => {
  const charts = page.data.charts;
  const chosen = {};

  function redraw(key) {
    const { variants, height } = charts[key];
    page.draw(key, variants[chosen[key] ?? Object.keys(variants)[0]], height);
  }

  document.querySelectorAll("select[data-chart]").forEach((select) =>
    select.addEventListener("change", () => {
      chosen[select.dataset.chart] = select.value;
      redraw(select.dataset.chart);
    }));

  // One chart a turn, so that the page answers while it draws, and is whole when printed.
  const waiting = Object.keys(charts);
  function next() {
    const key = waiting.shift();
    if (key === undefined) return document.body.dataset.ready = "yes";
    redraw(key);
    setTimeout(next);
  }
  setTimeout(next);

  const button = document.getElementById("theme");
  function apply(theme) {
    document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
    Object.keys(charts).filter((key) => !waiting.includes(key)).forEach(redraw);
    document.dispatchEvent(new Event("theme"));
  }
  document.documentElement.dataset.theme =
    window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  button.setAttribute("aria-pressed", String(document.documentElement.dataset.theme === "dark"));
  button.addEventListener("click", () =>
    apply(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  let before;
  window.addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    page.printWidth = 680;
    apply("light");
  });
  window.addEventListener("afterprint", () => {
    page.printWidth = undefined;
    apply(before);
  });
})();
