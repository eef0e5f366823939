// The page of chapter 09: one number in eight bits, and one outlier among many.
import { find, make, radios, svg } from "./dom.js";
import { FORMATS, decode, encode, fields, quantize } from "./float.js";

const values = JSON.parse(find("activations").textContent);
const OUTLIER = 200; // its place among the values
const TILES = { "one scale for all": 512, "a scale per 128": 128 };
const WIDTH = 800, HEIGHT = 170, LINE = 64;

const page = { format: "E4M3", exact: 0.3, byte: 0, power: 0, tile: 512 };
const format = () => FORMATS[page.format];

// ── One number ──

function setNumber(value) {
  page.exact = value;
  page.byte = encode(value, format());
  drawNumber();
}

function setByte(byte) {
  page.byte = byte;
  page.exact = decode(byte, format());
  drawNumber();
}

/** Return the finite values of the format in order, each once. */
function allValues() {
  const all = Array.from({ length: 256 }, (_, byte) => decode(byte, format()));
  return [...new Set(all.filter(Number.isFinite).map((value) => value + 0))].sort((a, b) => a - b);
}

/** Go to the neighbor of the stored value. */
function step(by) {
  const all = allValues(), at = all.indexOf(decode(page.byte, format()) + 0);
  setNumber(all[Math.min(Math.max(0, at + by), all.length - 1)]);
}

function drawBits() {
  const { exponentBits } = format();
  find("bits").replaceChildren(...Array.from({ length: 8 }, (_, i) => {
    const role = i === 0 ? "sign" : i <= exponentBits ? "exponent" : "mantissa", bit = (page.byte >> (7 - i)) & 1;
    return make("button", {
      class: `bit ${role}`, id: `bit-${i}`, "aria-pressed": String(bit === 1), "aria-label": `${role} bit ${i}`,
      onclick: () => flip(i),
    }, String(bit));
  }));
}

function flip(i) {
  setByte(page.byte ^ (1 << (7 - i)));
  find(`bit-${i}`).focus();
}

const superscript = (n) => String(n).replace(/[-\d]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);

/** Write the value as a product of its parts. */
function formula() {
  const { sign, exponent, mantissa } = fields(page.byte, format()), { bias, mantissaBits } = format();
  const value = decode(page.byte, format());
  if (!Number.isFinite(value)) return `This pattern stands for ${Number.isNaN(value) ? "no number (NaN)" : "infinity"}.`;
  const leading = exponent === 0 ? 0 : 1, power = Math.max(exponent, 1) - bias;
  const parts = `${sign ? "−" : ""}2${superscript(power)} × (${leading} + ${mantissa}/${1 << mantissaBits}) = ${value}`;
  const error = page.exact ? Math.abs(value / page.exact - 1) * 100 : 0;
  const kind = exponent === 0 ? " Exponent bits of zero: a subnormal number, without a leading 1." : "";
  return error ? `${page.exact} is stored as ${parts}: ${error.toPrecision(2)} % off.${kind}` : `${parts}.${kind}`;
}

/** Draw the values of the format near the number, and both. */
function drawLine() {
  const stored = decode(page.byte, format()), all = allValues();
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${LINE}`, role: "presentation" });
  if (Number.isFinite(stored)) {
    const at = all.indexOf(stored + 0), near = all.slice(Math.max(0, at - 8), at + 9);
    const low = near[0], span = near.at(-1) - low;
    const x = (value) => 30 + Math.min(1, Math.max(0, (value - low) / span)) * (WIDTH - 60);
    drawing.append(svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: 40, y2: 40 }),
      ...near.map((value) => svg("line", { class: "tick", x1: x(value), x2: x(value), y1: 26, y2: 40 })),
      svg("line", { class: "stored", x1: x(stored), x2: x(stored), y1: 14, y2: 40 }),
      svg("line", { class: "exact", x1: x(page.exact), x2: x(page.exact), y1: 6, y2: 44 }),
      svg("text", { x: 30, y: 58, class: "center" }, String(low)),
      svg("text", { x: WIDTH - 30, y: 58, class: "center" }, String(near.at(-1))));
  }
  find("line").replaceChildren(drawing);
}

function drawNumber() {
  drawBits();
  find("formula").textContent = formula();
  find("number").value = Number.isFinite(page.exact) ? page.exact : "";
  drawLine();
}

// ── One outlier ──

/** Return the activations, with the outlier 2^power times the standard deviation. */
function withOutlier() {
  return values.map((value, i) => (i === OUTLIER ? Math.fround(2 ** page.power) : value));
}

/** Return the values after quantization in tiles. */
function stored(exact, tile) {
  const { bytes, scales } = quantize(exact, tile);
  return bytes.map((byte, i) => decode(byte, FORMATS.E4M3) * scales[Math.floor(i / tile)]);
}

/** Return the relative error of all values but the outlier, and how many became zero. */
function errors(exact, after) {
  const others = exact.map((_, i) => i).filter((i) => i !== OUTLIER);
  const square = (x) => x * x, sum = (f) => others.reduce((total, i) => total + f(i), 0);
  const error = Math.sqrt(sum((i) => square(after[i] - exact[i])) / sum((i) => square(exact[i])));
  return { error, zeros: others.filter((i) => after[i] === 0 && exact[i] !== 0).length };
}

function drawOutlier() {
  const exact = withOutlier(), after = stored(exact, page.tile), { error, zeros } = errors(exact, after);
  const x = (i) => 8 + (i / values.length) * (WIDTH - 16), y = (value) => HEIGHT / 2 - Math.max(-1, Math.min(1, value / 3)) * (HEIGHT / 2 - 8);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "presentation" },
    svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: y(0), y2: y(0) }));
  for (let edge = page.tile; edge < values.length; edge += page.tile) {
    drawing.append(svg("line", { class: "edge", x1: x(edge), x2: x(edge), y1: 0, y2: HEIGHT }));
  }
  exact.forEach((value, i) => {
    const isLost = after[i] === 0 && value !== 0;
    drawing.append(svg("circle", { class: isLost ? "lost" : "after", cx: x(i), cy: y(after[i]), r: isLost ? 2.5 : 2 }));
  });
  find("values").replaceChildren(drawing);
  find("outlier-value").textContent = `${(2 ** page.power).toLocaleString("en-US")} standard deviation${page.power ? "s" : ""}`;
  find("errors").textContent = `Error of the other 511 values: ${(error * 100).toPrecision(2)} % of their size; ${zeros} of them became zero.`;
}

// ── Input ──

function drawRadios() {
  radios("formats", Object.keys(FORMATS), (name) => name === page.format, (name) => {
    page.format = name;
    drawRadios();
    setNumber(Number.isFinite(page.exact) ? page.exact : 1);
  });
  radios("tiles", Object.keys(TILES), (name) => TILES[name] === page.tile, (name) => {
    page.tile = TILES[name];
    drawRadios();
    drawOutlier();
  });
}

find("number").addEventListener("change", (event) => setNumber(Number(event.target.value) || 0));
find("lower").addEventListener("click", () => step(-1));
find("higher").addEventListener("click", () => step(1));
find("outlier").addEventListener("input", (event) => {
  page.power = Number(event.target.value);
  drawOutlier();
});

drawRadios();
setNumber(page.exact);
drawOutlier();
window.fp8 = { page, FORMATS, decode, encode, quantize, withOutlier, stored, errors }; // for the console
