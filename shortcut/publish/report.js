"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { view, columns, samples, trials, how } = data;
const page = document.getElementById("page");
const SVG = "http://www.w3.org/2000/svg";

// Text goes into the page as text, never as markup.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const range = (end) => Array.from({ length: end }, (_, number) => number);
function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}
function section(title, ...children) {
  const id = title.toLowerCase().replace(/\W+/g, "-");
  page.append(make("section", { "aria-labelledby": id }, make("h2", { id }, title), ...children));
}

const ACTIONS = {
  keep: "kept", drop: "deleted", "attention-only": "attention only: its MLP is deleted",
  "mlp-only": "MLP only: its attention is deleted", "last-token": "of a prompt, only the last token goes through",
  "freeze-visual": "leaves the tokens of images as they are",
};
const depth = view.actions.length, panels = view.panels;
const ranks = panels.map(({ values }) => values.map((value) => 1 + values.filter((other) => other < value).length));

/* The head: what was done, why, and figures at a glance. */

function showHead() {
  const toggle = make("button", { id: "theme", type: "button", onclick: () => theme(isDark() ? "light" : "dark") });
  const theme = (name) => {
    if (name) document.documentElement.dataset.theme = name;
    toggle.textContent = isDark() ? "Light" : "Dark";
    toggle.setAttribute("aria-label", `Show the page in ${isDark() ? "light" : "dark"} colours`);
  };
  const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark";
  theme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme());
  const names = Object.keys(columns);
  const figures = view.glance.map((row) => make("div", {}, make("dt", {}, row.name),
    make("dd", {}, row.texts.at(-1), make("small", {}, `${names[0]} ${row.texts[0]}${row.change ? `, ${row.change}` : ""}`))));
  page.append(make("header", {}, make("div", { class: "kicker" }, make("span", {}, `shortcut report, ${how.made.date}`), toggle),
    make("h1", {}, view.title), make("p", { class: "lead" }, view.lead),
    how.changes.map((line) => make("p", {}, line)), make("dl", { class: "glance" }, figures)));
}

/* The block map, with the bars of one metric under it: the same columns, one readout for both. */

const parts = (action, tag, attributes) => make(tag, { class: `block ${action}`, ...attributes },
  make("i", { class: "attention" }), make("i", { class: "mlp" }));
const describe = (block) => [`block ${block}, ${ACTIONS[view.actions[block]]}`, ...panels.map((panel, place) =>
  `${panel.name} ${short(panel.values[block])}, rank ${ranks[place][block]} of ${depth}`)].join("; ");

function showBlocks() {
  const used = Object.keys(ACTIONS).filter((action) => view.actions.includes(action));
  const legend = make("ul", { class: "legend" }, used.map((action) =>
    make("li", {}, parts(action, "span", { "aria-hidden": "true" }), `${ACTIONS[action]} (${view.actions.filter((own) => own === action).length})`)));
  const cells = view.actions.map((action, block) => parts(action, "button", {
    type: "button", tabindex: block ? -1 : 0, "data-block": block, "aria-label": describe(block), onmouseenter: () => select(block),
    onfocus: () => select(block), onclick: (event) => event.currentTarget.focus(), onkeydown: move }));
  const numbers = range(depth).map(() => make("span", {}));
  const strip = make("div", { class: "strip", role: "group", "aria-label": `The ${depth} blocks, the first on the left; arrow keys go from one to the next` }, cells);
  const readout = make("div", { class: "readout", id: "readout" });
  const bars = make("div", { class: "bars", role: "img" }), axis = make("div", { class: "axis", "aria-hidden": "true" });
  const blocks = make("div", { class: "chart" }, strip, make("div", { class: "numbers", "aria-hidden": "true" }, numbers));

  function select(block) {
    for (const list of [cells, numbers, bars.querySelectorAll(".bar")])
      list.forEach((node, place) => node.classList.toggle("on", place === block));
    cells.forEach((cell, place) => cell.setAttribute("tabindex", place === block ? 0 : -1));
    readout.replaceChildren(make("span", {}, make("b", {}, `Block ${block}`), ` ${ACTIONS[view.actions[block]]}`),
      ...panels.map((panel, place) => make("span", {}, `${panel.name} `, make("b", {}, short(panel.values[block])), ` rank ${ranks[place][block]} of ${depth}`)));
  }
  function move(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -depth, End: depth };
    if (!(event.key in steps)) return;
    event.preventDefault();
    cells[Math.min(depth - 1, Math.max(0, cells.indexOf(event.currentTarget) + steps[event.key]))].focus();
  }
  function fit() {
    const width = strip.clientWidth / depth, step = [1, 2, 5, 10, 20, 50].find((each) => each * width >= 19) || 100;
    [blocks, chart].forEach((node) => node.classList.toggle("dense", width < 14));
    numbers.forEach((node, block) => { node.textContent = block % step ? "" : block; });
  }
  const chart = make("div", { class: "chart" }, axis, bars);
  const hint = make("p", { class: "note screen" }, "Point at a block, tap it, or go there with Tab and the arrow keys, to read what was done to it and what it scores.");
  section("Blocks", legend, blocks, hint, readout, ...(panels.length ? [showScores(bars, axis, chart, select)] : []), scoresTable());
  new ResizeObserver(fit).observe(strip);
  fit();
  select(Math.max(0, view.actions.findIndex((action) => action !== "keep")));
}

function showScores(bars, axis, chart, select) {
  const caption = make("figcaption", { id: "formula" });
  const chosen = make("select", { id: "metric", onchange: () => show(panels[chosen.value]) },
    panels.map((panel, place) => make("option", { value: place }, panel.name)));
  function show(panel) {
    const { height, ticks, log } = scale(panel.values);
    bars.replaceChildren(...ticks.map((tick) => make("div", { class: "grid", style: `bottom: ${height(tick)}%` })),
      ...panel.values.map((value, block) => make("div", { class: panel.marked.includes(block) ? "bar marked" : "bar",
        "data-block": block, "data-value": value, onmouseenter: () => select(block), onclick: () => select(block) }, make("i", { style: `height: ${height(value)}%` }))));
    axis.replaceChildren(...ticks.map((tick) => make("span", { style: `bottom: ${height(tick)}%` }, short(tick))));
    bars.setAttribute("aria-label", `Bars of ${panel.name} for every block; the numbers are in the table below`);
    caption.replaceChildren(panel.formula ? `Importance of single blocks: ${panel.formula}. ` : "",
      `Higher is more important${log ? " (log scale)" : ""}.${panel.marked.length ? " Hatched: what the plan takes." : ""}`);
  }
  show(panels[0]);
  const pick = make("div", { class: "pick" }, panels.length > 1 ? make("label", { for: "metric" }, "Score of single blocks by") : `Score of single blocks by ${panels[0].name}`, panels.length > 1 ? chosen : null);
  return make("figure", {}, pick, caption, chart);
}

function scale(values) {
  const positive = values.filter((value) => value > 0);
  const highest = Math.max(...values, 0) || 1, lowest = Math.min(...positive, highest);
  if (highest / lowest < 10) {
    const step = [1, 2, 2.5, 5, 10].map((each) => each * 10 ** Math.floor(Math.log10(highest / 4))).find((each) => highest / each <= 5);
    const ticks = range(Math.floor(highest / step) + 1).map((count) => Number((count * step).toPrecision(6)));
    return { height: (value) => Math.max(0, value) / highest * 97, ticks, log: false };
  }
  const bottom = Math.log(lowest / 1.5), top = Math.log(highest * 1.05), factors = highest / lowest < 1000 ? [1, 2, 5] : [1];
  const powers = range(Math.ceil(Math.log10(highest / lowest)) + 2).map((count) => 10 ** (Math.floor(Math.log10(lowest)) + count));
  let ticks = powers.flatMap((power) => factors.map((factor) => Number((factor * power).toPrecision(3)))).filter((tick) => tick >= lowest / 1.5 && tick <= highest * 1.05);
  ticks = ticks.filter((_, place) => place % Math.ceil(ticks.length / 7) === 0);
  return { height: (value) => value <= 0 ? 0 : (Math.log(value) - bottom) / (top - bottom) * 100, ticks, log: true };
}

function scoresTable() {
  const rows = view.actions.map((action, block) => [block, ACTIONS[action].split(":")[0], ...panels.map(({ values }) => short(values[block]))]);
  return make("details", {}, make("summary", {}, "All of this as a table"), table(["block", "what was done", ...panels.map(({ name }) => name)], rows, 2));
}

function table(head, rows, words = 1) {
  const cell = (tag, text, place) => make(tag, { class: place < words ? "words" : null, scope: tag === "th" ? "col" : null }, text);
  return make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": head.join(", ") }, make("table", {},
    make("thead", {}, make("tr", {}, head.map((text, place) => cell("th", String(text), place)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((text, place) => cell("td", text instanceof Node ? text : String(text), place)))))));
}

/* Heat maps of spans: every row is of one length, coloured from its lowest score to its highest. */

const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function colour(share) {
  const place = Math.min(share, 0.9999) * (RAMP.length - 1), low = Math.floor(place);
  return `rgb(${RAMP[low].map((from, channel) => Math.round(from + (place - low) * (RAMP[low + 1][channel] - from)))})`;
}

function showMaps() {
  const found = panels.filter(({ spans }) => spans);
  if (!found.length) return;
  section("Spans", make("p", { class: "note" }, "Score of every span by its first block and its length, within its row: lowest ",
    make("span", { class: "ramp", "aria-hidden": "true" }), " highest, on a square-root scale. A dot marks the lowest of a row, a frame the spans that went.",
    make("span", { class: "screen" }, " Arrow keys move a cursor.")),
  make("div", { class: "maps" }, found.map(showMap)));
}

function showMap(panel) {
  const left = 34, top = 34, side = 400 / depth, right = left + 400, went = panel.marked.filter((block) => !panel.marked.includes(block - 1));
  const x = (first) => left + first * side, y = (length) => top + (length - 1) * side;
  const cells = [], dots = [];
  panel.spans.forEach((row, place) => {
    const low = Math.min(...row), high = Math.max(...row);
    row.forEach((value, first) => cells.push(draw("rect", { x: x(first), y: y(place + 1), width: side + 0.3, height: side + 0.3, fill: colour(Math.sqrt((value - low) / (high - low || 1))) })));
    dots.push(draw("circle", { class: "lowest", cx: x(row.indexOf(low)) + side / 2, cy: y(place + 1) + side / 2, r: Math.min(2.4, side / 3.2) }));
  });
  const frames = went.map((first) => {
    const length = range(depth).find((count) => !panel.marked.includes(first + count)) ?? depth - first;
    return draw("rect", { class: "went", x: x(first) - 1, y: y(length) - 1, width: side + 2, height: side + 2 });
  });
  const step = [1, 2, 5, 10, 20, 50].find((each) => each * side >= 22) || 100;
  const labels = range(depth).filter((block) => block % step === 0).map((block) => draw("text", { x: x(block) + side / 2, y: top - 5, "text-anchor": "middle" }, block))
    .concat(range(depth).filter((place) => (place + 1) % step === 0 || !place).map((place) => draw("text", { x: left - 5, y: y(place + 1) + side / 2 + 4, "text-anchor": "end" }, place + 1)))
    .concat([draw("text", { x: left, y: 12 }, "first block"), draw("text", { x: 10, y: y(1) + 150, transform: `rotate(-90 10 ${y(1) + 150})`, "text-anchor": "middle" }, "blocks in the span")]);
  const cursor = draw("rect", { class: "cursor", width: side, height: side, visibility: "hidden" });
  const says = make("p", { class: "note screen", role: "status" }, "Point at a span to read its score.");
  let [first, length] = [went[0] ?? 0, 1];
  function show(newFirst, newLength) {
    length = Math.min(depth, Math.max(1, newLength));
    first = Math.min(depth - length, Math.max(0, newFirst));
    fill(cursor, { x: x(first), y: y(length), visibility: "visible" }, []);
    const last = first + length - 1;
    says.textContent = `${length === 1 ? `Block ${first}` : `Blocks ${first}-${last}`}: ${short(panel.spans[length - 1][first])}`;
  }
  const map = draw("svg", { class: "map", viewBox: `0 0 ${right + 4} ${top + 404}`, role: "img", tabindex: 0,
    "aria-label": `Heat map of ${panel.name} for every span of blocks`,
    onfocus: () => show(first, length),
    onpointermove: (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
      const [block, row] = [Math.floor((at.x - left) / side), Math.floor((at.y - top) / side) + 1];
      if (row >= 1 && row <= depth && block >= 0 && block <= depth - row) show(block, row);
    },
    onkeydown: (event) => {
      const [right, down] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key] || [];
      if (right === undefined) return;
      event.preventDefault();
      show(first + right, length + down);
    } }, cells, dots, frames, labels, cursor);
  return make("figure", {}, make("figcaption", {}, make("b", {}, panel.name)), map, says);
}

/* Plans that were tried, on a common scale of perplexity. */

function showTrials() {
  if (!trials) return;
  const prices = trials.trials.map(({ perplexity }) => perplexity), base = trials.perplexity, low = Math.min(base, ...prices);
  const sound = prices.filter((price) => price <= 20 * base); // the others are ruined, and would press these together
  const high = sound.length ? Math.max(...sound, base * 1.01) * (sound.length < prices.length ? 1.2 : 1) : 20 * base, [whole, ...rows] = view.trials.rows;
  const dot = (value) => make("i", { class: value > high ? "beyond" : null, style: `width: ${Math.min(1, Math.log(value / low) / Math.log(high / low)) * 92 + 2}%` });
  const line = ([select, metric, dropped, parameters, price], value, best) => make("tr", { class: best ? "best" : null },
    make("td", { class: "words" }, select), make("td", { class: "words" }, metric), make("td", { class: "words" }, dropped),
    make("td", {}, parameters), make("td", {}, price, best ? make("span", { class: "hidden" }, " (carried out)") : null), make("td", { class: "dots", "aria-hidden": "true" }, dot(value)));
  section("Plans that were tried", make("p", { class: "note" }, `Perplexity on ${trials.text}, set aside from what the blocks were scored on. ▸ is the plan that was carried out; dots are on a log scale, up to ${short(high)}.`),
    make("div", { class: "wide trials", tabindex: 0, role: "region", "aria-label": "Plans that were tried" }, make("table", {},
      make("thead", {}, make("tr", {}, ["rule", "metric", "what goes", "parameters", "perplexity", ""].map((text, place) => make("th", { class: place < 3 ? "words" : null, scope: "col" }, text)))),
      make("tbody", {}, line(whole, base, false), rows.map((row, place) => line(row, prices[place], place === view.trials.best))))));
}

/* What it is worth: numbers, and words. */

function showTable() {
  const names = Object.keys(columns);
  section("Before and after", make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Before and after" }, make("table", {},
    make("thead", {}, make("tr", {}, ["", ...names, "change"].map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, view.table.map((row) => make("tr", {}, make("th", { scope: "row" }, row.name, row.note ? make("small", {}, row.note) : null),
      row.texts.map((text) => make("td", {}, text)), make("td", { class: "change" }, row.change)))))),
  make("p", { class: "note" }, `Measured on ${how.text}.`));
}

function parted(text, base) {
  let same = 0;
  while (same < text.length && text[same] === base[same]) same += 1;
  if (same === text.length && same === base.length) return [text];
  while (same && /\S/.test(text[same - 1])) same -= 1; // back to the beginning of the word
  return [text.slice(0, same), make("mark", {}, text.slice(same))];
}

function showSamples() {
  if (!samples.length) return;
  if (samples[0].images.length) {
    section("Answers", make("p", { class: "note" }, "A few of the questions, first those that are not answered alike."), make("div", { class: "questions" }, samples.map((sample) =>
      make("div", { class: "question" }, sample.images.slice(0, 1).map((src) => make("img", { src, alt: "the image that the question is about", onload: ({ target }) => target.classList.toggle("tiny", target.naturalWidth < 96) })),
        make("div", {}, make("p", { class: "prompt" }, sample.prompt), make("dl", {}, Object.entries({ ...sample.written, ...(sample.right === null ? {} : { "right answer": sample.right }) })
          .flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text || "(nothing)")])))))));
    return;
  }
  section("What they write", make("p", { class: "note" }, "Greedy, at most 40 tokens. What differs from the base is marked from there on."), samples.map((sample) =>
    make("div", { class: "sample" }, make("p", { class: "prompt" }, sample.prompt), make("div", { class: "texts" }, Object.entries(sample.written).map(([name, text]) =>
      make("div", {}, make("h3", {}, text === sample.written.base && name !== "base" ? `${name}: the same` : name), make("p", {}, text ? parted(text, sample.written.base) : "(nothing)")))))));
}

/* How it is loaded, and how it was made. */

function source(text) {
  const button = make("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch { getSelection().selectAllChildren(code); button.textContent = "Selected"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  const code = make("pre", { tabindex: 0 }, text);
  return make("div", { class: "source" }, code, button);
}

function showHow() {
  section("Load it", source(how.code));
  section("Make it again", how.command ? source(how.command) : null, make("p", { class: "note" }, "The records beside this page: ",
    view.links.flatMap((name, place) => [place ? ", " : "", make("a", { href: name }, name)]), "."),
  make("details", {}, make("summary", {}, "plan.yaml"), source(view.yaml)),
  make("dl", { class: "facts" }, Object.entries(how.made).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])));
}

showHead();
showBlocks();
showMaps();
showTrials();
showTable();
showSamples();
showHow();
