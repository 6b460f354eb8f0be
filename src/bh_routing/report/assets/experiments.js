"use strict";
// The table of experiments: sort, filter, page through, and compare two texts.
(() => {
  const table = document.getElementById("experiment-table");
  if (!table) return;
  const { configs, baseline, prompts, categories, columns, rows } = page.data.experiments;
  const filters = document.getElementById("experiment-filters");
  const ROWS = 15;
  const state = { column: null, direction: 1, start: 0 };
  const fixed = ["configuration", "category", "prompt"];

  page.options(filters.elements.config, configs);
  const kinds = [...new Set(categories)];
  page.options(filters.elements.category, kinds.map((kind) => kind || "(none)"), kinds);

  const value = (row, column) =>
    column < 3 ? [configs[row[0]], categories[row[1]], prompts[row[1]]][column]
      : row[2][column - 3];

  function compare(a, b) {
    const [x, y] = [value(a, state.column), value(b, state.column)];
    if (x === null || y === null) return (x === null) - (y === null);
    return state.direction * (typeof x === "string" ? x.localeCompare(y) : x - y);
  }

  function matching() {
    const config = filters.elements.config.value, category = filters.elements.category.value;
    const text = filters.elements.text.value.toLowerCase();
    const found = rows.filter((row) =>
      (config === "" || row[0] === Number(config)) &&
      (category === "" || categories[row[1]] === category) &&
      (text === "" || (prompts[row[1]] + "\n" + row[3]).toLowerCase().includes(text)));
    return state.column === null ? found : found.sort(compare);
  }

  const short = (text, most) => {
    const letters = [...text];
    return letters.length > most ? letters.slice(0, most).join("") + "…" : text;
  };

  function header() {
    const cells = [...fixed, ...columns].map((label, column) => {
      const button = page.element("button", { type: "button", textContent: label });
      button.addEventListener("click", () => {
        state.direction = state.column === column ? -state.direction : 1;
        state.column = column;
        state.start = 0;
        show();
      });
      const cell = page.element("th", { scope: "col", className: column < 3 ? "" : "number" }, button);
      cell.dataset.column = column;
      return cell;
    });
    table.append(page.element("thead", {}, page.element("tr", {}, ...cells)), page.element("tbody"));
  }

  function line(row) {
    const open = page.element("button", {
      type: "button", className: "link", textContent: short(prompts[row[1]], 90) || "(empty)",
    });
    open.title = "Show the generated text next to the baseline's";
    open.addEventListener("click", () => texts(row));
    return page.element("tr", {},
      page.element("th", { scope: "row", textContent: short(configs[row[0]], 40) }),
      page.element("td", { textContent: categories[row[1]] }),
      page.element("td", { className: "text" }, open),
      ...row[2].map((number) => page.element("td", {
        className: "number",
        textContent: number === null ? "–" : Number(number.toPrecision(4)).toString(),
      })));
  }

  function show() {
    const found = matching();
    state.start = Math.max(0, Math.min(state.start, found.length - 1));
    const end = Math.min(state.start + ROWS, found.length);
    table.tBodies[0].replaceChildren(...found.slice(state.start, end).map(line));
    table.querySelectorAll("thead th[data-column]").forEach((cell) => {
      const own = Number(cell.dataset.column) === state.column;
      cell.setAttribute("aria-sort",
        own ? (state.direction > 0 ? "ascending" : "descending") : "none");
    });
    document.getElementById("experiment-count").textContent = found.length === 0
      ? "no experiment matches"
      : `${state.start + 1} to ${end} of ${found.length} experiments`;
    document.getElementById("fewer-rows").disabled = state.start === 0;
    document.getElementById("more-rows").disabled = end >= found.length;
  }

  // Longest common subsequence of words; texts of a thousand words take a million steps.
  function common(a, b) {
    const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1
          : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    const inA = new Set(), inB = new Set();
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
      if (a[i] === b[j]) { inA.add(i++); inB.add(j++); }
      else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
      else j++;
    }
    return [inA, inB];
  }

  function marked(words, same) {
    const box = page.element("pre");
    words.forEach((word, i) => box.append(
      same.has(i) || /^\s*$/.test(word) ? word : page.element("mark", { textContent: word })));
    return box;
  }

  function texts(row) {
    const dialog = document.getElementById("texts");
    const other = rows.find((r) => r[1] === row[1] && configs[r[0]] === baseline);
    const split = (text) => text.split(/(\s+)/).slice(0, 2000);
    const [a, b] = [split(other ? other[3] : ""), split(row[3])];
    const [inA, inB] = common(a, b);
    document.getElementById("texts-title").textContent =
      `${configs[row[0]]} compared with ${baseline ?? "no baseline"}`;
    dialog.querySelector(".prompt").textContent = prompts[row[1]];
    dialog.querySelector(".pair").replaceChildren(
      page.element("div", {}, page.element("h4", { textContent: baseline ?? "–" }), marked(a, inA)),
      page.element("div", {}, page.element("h4", { textContent: configs[row[0]] }), marked(b, inB)));
    dialog.showModal();
  }

  filters.addEventListener("input", () => { state.start = 0; show(); });
  filters.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("fewer-rows").addEventListener("click", () => { state.start -= ROWS; show(); });
  document.getElementById("more-rows").addEventListener("click", () => { state.start += ROWS; show(); });
  header();
  show();
})();
