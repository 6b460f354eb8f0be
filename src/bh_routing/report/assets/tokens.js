"use strict";
// The token view, and which experts are kept together; both unpack a trace when it is asked for.
(() => {
  if (!document.getElementById("token-view")) return;
  const traces = page.data.traces;
  const { configs, prompts } = page.data.experiments;
  if (traces.length === 0) {
    document.getElementById("token-view").hidden = true;
    document.getElementById("no-traces").hidden = false;
    document.getElementById("coactivation-figure").hidden = true;
    return;
  }
  const UNKNOWN = 65535;

  async function unpack(trace) {
    if (trace.unpacked) return trace.unpacked;
    const bytes = Uint8Array.from(atob(trace.planes), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const raw = await new Response(stream).arrayBuffer();
    const size = raw.byteLength / 6;
    return trace.unpacked = {
      tokens: size / (trace.layers * trace.slots),
      expert: new Int16Array(raw, 0, size),
      weight: new Uint16Array(raw, 2 * size, size),
      p: new Uint16Array(raw, 4 * size, size),
    };
  }

  const unique = (key) => [...new Set(traces.map((trace) => trace[key]))].sort((a, b) => a - b);
  const layers = Array.from({ length: traces[0].layers }, (_, layer) => layer);
  const shorten = (text) => text.length > 60 ? text.slice(0, 60) + "…" : text;

  // --- token view ---
  const choice = document.getElementById("token-choice").elements;
  const text = document.getElementById("token-text");
  const detail = document.getElementById("token-detail");
  page.options(choice.config, unique("config").map((i) => configs[i]), unique("config"));
  page.options(choice.prompt, unique("prompt").map((i) => shorten(prompts[i])), unique("prompt"));
  page.options(choice.layer, ["mean of all", ...layers], ["", ...layers]);
  const varied = traces.find((t) => configs[t.config] !== page.data.experiments.baseline);
  if (varied) choice.config.value = varied.config;
  let current = null, selected = 0;

  function counts(trace, layer) {
    const { tokens, expert } = trace.unpacked;
    const from = layer === "" ? 0 : Number(layer), to = layer === "" ? trace.layers : from + 1;
    return Array.from({ length: tokens }, (_, token) => {
      let kept = 0;
      for (let l = from; l < to; l++)
        for (let s = 0; s < trace.slots; s++)
          kept += expert[(token * trace.layers + l) * trace.slots + s] >= 0;
      return kept / (to - from);
    });
  }

  // At most 60 % of the colour: the letters stay readable on it in both themes.
  const shade = (count, most) => `rgba(${page.color("--shade")}, ${(0.6 * count / most).toFixed(3)})`;

  async function showTokens() {
    const trace = traces.find((t) =>
      t.config === Number(choice.config.value) && t.prompt === Number(choice.prompt.value));
    current = trace ?? null;
    if (!trace) {
      text.textContent = "No trace of this configuration on this prompt fits on the page.";
      detail.replaceChildren();
      return;
    }
    await unpack(trace);
    const kept = counts(trace, choice.layer.value);
    const most = Math.max(trace.slots, trace.topK);
    text.replaceChildren(...kept.map((count, i) => {
      const token = page.element("span", { id: `token-${i}`, textContent: trace.tokens[i] });
      token.setAttribute("role", "option");
      token.setAttribute("aria-selected", "false");
      token.setAttribute("aria-label", `${trace.tokens[i].trim() || "space"}, ${count.toFixed(1)} experts`);
      token.style.background = shade(count, most);
      if (i < trace.promptTokens) token.classList.add("from-prompt");
      return token;
    }));
    document.getElementById("token-scale").replaceChildren(
      ...[1, Math.round(most / 2), most].map((count) => {
        const box = page.element("span", { textContent: count });
        box.style.background = shade(count, most);
        return box;
      }));
    select(Math.min(selected, kept.length - 1));
  }

  function slot(trace, index, position) {
    const { expert, weight, p } = trace.unpacked;
    const e = expert[index], kept = e >= 0;
    const label = `${kept ? e : -1 - e} (${(weight[index] / UNKNOWN).toFixed(3)}` +
      (p[index] === UNKNOWN ? ")" : `, p ${(10 ** (-p[index] / 1000)).toPrecision(2)})`) +
      (position >= trace.topK ? " beyond top-k" : "");
    return kept ? page.element("strong", { textContent: label })
      : page.element("s", { className: "dropped", textContent: label });
  }

  function select(token) {
    const trace = current;
    if (!trace || token < 0 || token >= trace.unpacked.tokens) return;
    text.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    selected = token;
    const element = document.getElementById(`token-${token}`);
    element.setAttribute("aria-selected", "true");
    text.setAttribute("aria-activedescendant", element.id);
    const shown = choice.layer.value === "" ? layers : [Number(choice.layer.value)];
    const body = page.element("tbody", {}, ...shown.map((layer) => {
      const cell = page.element("td");
      let kept = 0;
      for (let s = 0; s < trace.slots; s++) {
        const index = (token * trace.layers + layer) * trace.slots + s;
        kept += trace.unpacked.expert[index] >= 0;
        cell.append(slot(trace, index, s), s + 1 < trace.slots ? ", " : "");
      }
      return page.element("tr", {},
        page.element("th", { scope: "row", textContent: `layer ${layer}` }),
        page.element("td", { className: "number", textContent: `${kept} of ${trace.topK}` }), cell);
    }));
    const head = page.element("tr", {}, ...["layer", "kept", "expert (fraction of the weight, p-value); struck out: only Top-K uses it"]
      .map((label) => page.element("th", { scope: "col", textContent: label })));
    const table = page.element("table", {}, page.element("thead", {}, head), body);
    const box = page.element("div", { className: "scroll", tabIndex: 0 }, table);
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Experts of the token");
    detail.replaceChildren(
      page.element("p", { textContent: `Token ${token + 1}: “${trace.tokens[token]}”` }), box);
  }

  text.addEventListener("mouseover", (event) => {
    const token = event.target.closest('[role="option"]');
    if (token) select(Number(token.id.slice("token-".length)));
  });
  text.addEventListener("click", (event) => event.target.dispatchEvent(new MouseEvent("mouseover", { bubbles: true })));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (!step) return;
    event.preventDefault();
    select(Math.max(0, Math.min(current.unpacked.tokens - 1, selected + step)));
  });
  document.getElementById("token-choice").addEventListener("change", showTokens);

  // --- experts kept together ---
  const pairChoice = document.getElementById("coactivation-choice").elements;
  page.options(pairChoice.config, unique("config").map((i) => configs[i]), unique("config"));
  page.options(pairChoice.layer, layers.map((layer) => `layer ${layer}`), layers);
  const numExperts = page.data.numExperts;

  async function showPairs() {
    const layer = Number(pairChoice.layer.value);
    const mine = traces.filter((t) => t.config === Number(pairChoice.config.value));
    const both = Array.from({ length: numExperts }, () => new Float64Array(numExperts));
    let tokens = 0;
    for (const trace of mine) {
      const { tokens: count, expert } = await unpack(trace);
      tokens += count;
      for (let token = 0; token < count; token++) {
        const start = (token * trace.layers + layer) * trace.slots;
        const kept = expert.subarray(start, start + trace.slots).filter((e) => e >= 0);
        for (const a of kept) for (const b of kept) both[a][b] += 1;
      }
    }
    let best = { lift: 0 };
    const lifts = both.map((row, a) => Array.from(row, (together, b) => {
      const expected = both[a][a] * both[b][b] / tokens;
      if (a === b || expected === 0) return null;
      const lift = together / expected;
      if (expected >= 5 && lift > best.lift) best = { lift, a, b };
      return Number(lift.toPrecision(3));
    }));
    document.getElementById("coactivation-finding").textContent = best.lift === 0 ? ""
      : `Of pairs expected in five tokens or more, ${best.a} and ${best.b} go together most: ` +
        `${best.lift.toFixed(1)} times as often.`;
    paint(lifts);
  }

  // Red below chance, blue above, on a log scale from a quarter to four times.
  const canvas = document.getElementById("coactivation");
  function shadeOf(lift) {
    const share = Math.max(-1, Math.min(1, Math.log2(lift || 1e-9) / 2));
    const [from, to] = [[247, 247, 247], share < 0 ? [178, 24, 43] : [33, 102, 172]];
    return from.map((c, i) => Math.round(c + Math.abs(share) * (to[i] - c)));
  }
  function paint(lifts) {
    canvas.width = canvas.height = numExperts;
    const image = new ImageData(numExperts, numExperts);
    lifts.flat().forEach((lift, i) => {
      if (lift !== null) image.data.set([...shadeOf(lift), 255], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    const show = (event) => {
      const box = canvas.getBoundingClientRect();
      const at = (from, size) => Math.max(0, Math.min(numExperts - 1, Math.floor(from / size * numExperts)));
      const a = at(event.clientY - box.top, box.height), b = at(event.clientX - box.left, box.width);
      page.tip(event, lifts[a][b] === null ? "" : `experts ${a} and ${b}: ${lifts[a][b]} × chance`);
    };
    canvas.onpointermove = canvas.onpointerdown = show;
    canvas.onpointerleave = (event) => page.tip(event, "");
  }
  document.getElementById("coactivation-scale").replaceChildren(
    ...[["¼ or less", 0.25], ["½", 0.5], ["chance", 1], ["2 ×", 2], ["4 × or more", 4]].map(([label, lift]) => {
      const box = page.element("span", { textContent: label });
      const dark = Math.abs(Math.log2(lift)) > 1.5;
      box.style.cssText = `background: rgb(${shadeOf(lift)}); color: ${dark ? "#fff" : "#000"}`;
      return box;
    }));
  document.getElementById("coactivation-choice").addEventListener("change", showPairs);

  document.addEventListener("theme", showTokens);
  showTokens();
  showPairs();
})();
