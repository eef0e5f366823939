// The page of chapter 03: the size of the cache under four kinds of attention.
import { find, make, svg } from "./dom.js";

const data = JSON.parse(find("shapes").textContent);
const SLIDERS = { // name: [label, lowest, highest, step, value → number that is meant, its text]
  heads: ["heads", 8, 128, 8, (x) => x, String],
  groups: ["groups of GQA", 1, 16, 1, (x) => x, String],
  latent: ["latent", 64, 1024, 64, (x) => x, String],
  layers: ["layers", 4, 61, 1, (x) => x, String],
  bytes: ["bytes per number", 1, 2, 1, (x) => x, String],
  context: ["tokens of context", 10, 17, 1, (x) => 2 ** x, (x) => `${2 ** x / 1024}K`],
  memory: ["memory for it", 4, 80, 4, (x) => x * 1e9, (x) => `${x} GB`],
};
const WIDTH = 800, NAMES = 150, ROW = 30, SQUARE = 64, SIDE = 7, PER_LINE = 80;
const page = { ...data.models[0], bytes: 2, context: 15, memory: 40, groups: 8 };

const meant = (name) => SLIDERS[name][4](page[name]);

/** Return the numbers that each kind of attention keeps of a token in one layer. */
function cachedNumbers({ heads, groups, latent, head_dim, rope }) {
  const both = 2 * head_dim;
  return { MHA: heads * both, [`GQA, ${groups} groups`]: groups * both, MQA: both, MLA: latent + rope };
}

/** Return bytes per token in all layers, by kind of attention. */
function bytesPerToken() {
  const entries = Object.entries(cachedNumbers(page));
  return Object.fromEntries(entries.map(([kind, count]) => [kind, count * page.layers * page.bytes]));
}

// ── Drawing ──

const gigabytes = (bytes) => `${(bytes / 1e9).toLocaleString("en-US", { maximumSignificantDigits: 3 })} GB`;

function drawBars() {
  const sizes = Object.entries(bytesPerToken()).map(([kind, bytes]) => [kind, bytes * meant("context")]);
  const low = Math.log10(Math.min(...sizes.map(([, size]) => size), meant("memory")) / 3);
  const high = Math.log10(Math.max(...sizes.map(([, size]) => size), meant("memory")) * 8);
  const x = (size) => NAMES + ((Math.log10(size) - low) / (high - low)) * (WIDTH - NAMES);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${sizes.length * ROW + 20}`, role: "presentation" });
  sizes.forEach(([kind, size], i) => drawing.append(
    svg("text", { x: 4, y: i * ROW + 20 }, kind),
    svg("rect", { class: `bar${kind === "MLA" ? " mla" : ""}`, x: NAMES, y: i * ROW + 4, width: x(size) - NAMES, height: ROW - 8 }),
    svg("text", { x: x(size) + 6, y: i * ROW + 20 }, gigabytes(size))));
  const limit = x(meant("memory"));
  drawing.append(svg("line", { class: "limit", x1: limit, x2: limit, y1: 0, y2: sizes.length * ROW }),
    svg("text", { x: limit - 40, y: sizes.length * ROW + 14 }, "memory"));
  find("bars").replaceChildren(drawing);
}

function describe() {
  const fit = Object.entries(bytesPerToken()).map(([kind, bytes]) =>
    `${kind} ${Math.floor(meant("memory") / (bytes * meant("context"))).toLocaleString("en-US")}`);
  const { MHA: mha, MLA: mla } = cachedNumbers(page);
  const same = mla / (2 * page.head_dim);
  find("verdict").textContent = `Bars (on a logarithmic scale): one sequence of ${SLIDERS.context[5](page.context)} tokens. In ${SLIDERS.memory[5](page.memory)} there is room for so many: ${fit.join(", ")}. MLA keeps ${mla} numbers per token and layer, ${(mha / mla).toFixed(1)} times fewer than MHA; GQA would have to do with ${same.toFixed(2)} groups to keep as few.`;
}

/** Draw the numbers of one token in one layer as squares of 64. */
function drawNumbers() {
  const kinds = Object.entries(cachedNumbers(page)), drawing = svg("svg", { role: "presentation" });
  let top = 0;
  for (const [kind, count] of kinds) {
    const squares = Math.ceil(count / SQUARE);
    drawing.append(svg("text", { x: 4, y: top + 10 }, kind));
    for (let i = 0; i < squares; i++) {
      const role = kind === "MLA" ? "latent" : i < squares / 2 ? "key" : "value";
      drawing.append(svg("rect", {
        class: role, x: NAMES + (i % PER_LINE) * (SIDE + 1), y: top + Math.floor(i / PER_LINE) * (SIDE + 1), width: SIDE, height: SIDE,
      }));
    }
    top += Math.max(18, Math.ceil(squares / PER_LINE) * (SIDE + 1) + 8);
  }
  drawing.setAttribute("viewBox", `0 0 ${WIDTH} ${top}`);
  find("numbers").replaceChildren(drawing);
}

function update() {
  for (const [name, slider] of Object.entries(SLIDERS)) {
    find(name).value = page[name];
    find(`${name}-value`).textContent = slider[5](page[name]);
  }
  drawBars();
  drawNumbers();
  describe();
}

// ── Input ──

find("models").replaceChildren(...data.models.map((model) =>
  make("button", { onclick: () => { Object.assign(page, model); update(); } }, model.name)));
find("shape").replaceChildren(...Object.entries(SLIDERS).map(([name, [label, min, max, step]]) =>
  make("label", {}, make("span", {}, label), make("input", {
    type: "range", id: name, min, max, step,
    oninput: (event) => { page[name] = Number(event.target.value); update(); },
  }), make("output", { id: `${name}-value` }))));
update();
window.cache = { page, cachedNumbers, bytesPerToken, update }; // for the console
