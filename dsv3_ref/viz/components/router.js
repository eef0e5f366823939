// The page of a router: which experts a trained model chooses, and what biases do to their load.
import { find, make, svg } from "./dom.js";
import { route, topK } from "./model.js";

const data = JSON.parse(find("router").textContent);
const NUM = data.config.n_routed_experts, GROUPS = data.config.n_expert_groups, SIZE = NUM / GROUPS;
const GAMMA = 0.01, LIMIT = 0.6, GOAL = 0.5;
const WIDTH = 800, NAMES = 110, GAP = 10, ROW = 17, LOADS = 90;
const COLUMN = (WIDTH - NAMES - GAP * GROUPS) / NUM;

const page = {
  bias: [...data.bias], topk: data.config.n_activated_experts, open: data.config.n_limited_groups,
  routes: [], load: [], chosen: 0, running: false,
};

// ── The router ──

/** Route every token, with these biases. */
function routeAll(bias) {
  const config = { ...data.config, n_activated_experts: page.topk, n_limited_groups: page.open };
  return data.logits.map((logits) => route(logits, bias, config));
}

/** Count the tokens of every expert. */
function countTokens(routes) {
  const load = Array(NUM).fill(0);
  for (const { chosen } of routes) for (const expert of chosen) load[expert] += 1;
  return load;
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const maxVio = (load) => Math.max(...load) / mean(load) - 1;

/** Raise the biases of idle experts and lower those of busy ones. */
function applyRule() {
  const average = mean(page.load);
  setBias(page.bias.map((b, e) => b + GAMMA * Math.sign(average - page.load[e])));
}

function setBias(bias) {
  page.bias = bias.map((b) => Math.min(LIMIT, Math.max(-LIMIT, b)));
  update();
}

// ── Drawing ──

const center = (expert) => NAMES + GAP * (1 + Math.floor(expert / SIZE)) + COLUMN * (expert + 0.5) - GAP / 2;
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣");

/** Draw what never moves: a row per token, a column per expert; the rest is updated. */
function drawBoard() {
  const height = LOADS + 22 + data.tokens.length * ROW + 4;
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "presentation" });
  drawing.append(svg("text", { x: 4, y: 14 }, "tokens per expert"), svg("g", { id: "loads" }));
  data.tokens.forEach((token, t) => drawing.append(drawToken(token, t)));
  find("tokens").replaceChildren(drawing);
  find("biases").replaceChildren(...page.bias.map((_, e) => make("label", { id: `bias-label-${e}` },
    make("input", {
      type: "range", min: -LIMIT, max: LIMIT, step: GAMMA, id: `bias-${e}`, "aria-label": `bias of expert ${e}`,
      oninput: (event) => setBias(page.bias.map((b, i) => (i === e ? Number(event.target.value) : b))),
    }), make("span", { id: `bias-value-${e}` }))));
  page.bias.forEach((_, e) => { find(`bias-label-${e}`).style.left = `${(center(e) / WIDTH) * 100}%`; });
}

function drawToken(token, t) {
  const top = LOADS + 22 + t * ROW;
  const choose = () => select(t);
  return svg("g", { class: "token", id: `token-${t}`, role: "option", "aria-label": token, onclick: choose },
    svg("rect", { class: "back", x: 1, y: top, width: WIDTH - 2, height: ROW - 1 }),
    svg("text", { class: "name", x: NAMES - 4, y: top + 12 }, visible(token)),
    svg("g", { id: `cells-${t}` }));
}

function drawCells(t) {
  const top = LOADS + 22 + t * ROW, { scores, chosen, weights, open } = page.routes[t];
  const cells = Array.from(scores, (score, e) => svg("rect", {
    class: `cell${open.has(Math.floor(e / SIZE)) ? "" : " shut"}`, x: center(e) - COLUMN / 2 + 0.5, y: top + 0.5,
    width: COLUMN - 1, height: ROW - 2, "fill-opacity": score.toFixed(3),
  }));
  const largest = data.config.route_scale;
  const picks = chosen.map((e, i) => svg("circle", {
    class: "pick", cx: center(e), cy: top + ROW / 2 - 0.5, r: 2.5 + 5 * Math.sqrt(weights[i] / largest),
  }));
  find(`cells-${t}`).replaceChildren(...cells, ...picks);
}

function drawLoads() {
  const even = mean(page.load), most = Math.max(...page.load, 2 * even);
  const y = (count) => LOADS - (count / most) * (LOADS - 22);
  find("loads").replaceChildren(
    ...page.load.flatMap((count, e) => [
      svg("rect", { class: `load${count > even ? " over" : ""}`, x: center(e) - COLUMN * 0.35, width: COLUMN * 0.7, y: y(count), height: LOADS - y(count) }),
      svg("text", { class: "center", x: center(e), y: y(count) - 3 }, String(count)),
      svg("text", { class: "center", x: center(e), y: LOADS + 14 }, `e${e}`),
    ]),
    svg("line", { class: "even", x1: NAMES, x2: WIDTH, y1: y(even), y2: y(even) }));
}

/** Draw affinity and bias of every expert for the chosen token, by group. */
function drawChoice() {
  const { scores, biased, groups, open, chosen, weights } = page.routes[page.chosen];
  const most = 1 + LIMIT, height = 150, y = (value) => height - 18 - (Math.max(0, value) / most) * (height - 40);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${height + 22}`, role: "presentation" });
  groups.forEach((sum, g) => {
    const x = center(g * SIZE) - COLUMN / 2 - 2, isOpen = open.has(g);
    drawing.append(svg("rect", { class: `group${isOpen ? " open" : ""}`, x, y: 18, width: SIZE * COLUMN + 4, height: height - 20, rx: 4 }),
      svg("text", { x: x + 2, y: 12 }, `${isOpen ? "open" : "shut"}: two best ${sum.toFixed(2)}`));
  });
  scores.forEach((score, e) => {
    const bias = page.bias[e], x = center(e) - COLUMN * 0.35, width = COLUMN * 0.7;
    const low = Math.min(score, score + bias), at = chosen.indexOf(e);
    drawing.append(
      svg("rect", { class: "score", x, width, y: y(Math.min(score, Math.max(0, biased[e]))), height: height - 18 - y(Math.min(score, Math.max(0, biased[e]))) }),
      svg("rect", { class: `bias${bias < 0 ? " below" : ""}`, x, width, y: y(low + Math.abs(bias)), height: y(low) - y(low + Math.abs(bias)) }),
      svg("text", { class: "center", x: center(e), y: height - 5 }, `e${e}`),
      svg("text", { class: "center", x: center(e), y: height + 14 }, at < 0 ? "" : weights[at].toFixed(2)));
  });
  find("choice").replaceChildren(drawing);
  find("chosen").textContent = visible(data.tokens[page.chosen]);
  find("weights").textContent = `Chosen: ${chosen.map((e) => `e${e}`).join(", ")}, the highest of affinity (blue) plus bias (orange) in the open groups. Their weights, below the names, are in proportion to the affinities alone and sum to ${data.config.route_scale}.`;
}

function describe() {
  const before = routeAll(Array(NUM).fill(0));
  const moved = page.routes.filter(({ chosen }, t) => chosen.some((e) => !before[t].chosen.includes(e))).length;
  const busiest = topK(page.load, 1)[0], vio = maxVio(page.load);
  const verdict = vio <= GOAL ? " The loads are even enough." : "";
  find("status").textContent = `MaxVio ${vio.toFixed(2)}: expert ${busiest} has ${page.load[busiest]} tokens, ${mean(page.load).toFixed(1)} would be even. Because of the biases, ${moved} of ${data.tokens.length} tokens choose other experts.${verdict}`;
}

function drawChosen() {
  data.tokens.forEach((_, t) => find(`token-${t}`).setAttribute("aria-selected", String(t === page.chosen)));
  find("tokens").setAttribute("aria-activedescendant", `token-${page.chosen}`);
  drawChoice();
}

/** Route again and draw everything that depends on it. */
function update() {
  page.routes = routeAll(page.bias);
  page.load = countTokens(page.routes);
  for (const name of ["topk", "open"]) {
    find(name).value = page[name];
    find(`${name}-value`).textContent = page[name];
  }
  page.bias.forEach((b, e) => {
    find(`bias-${e}`).value = b;
    find(`bias-value-${e}`).textContent = b.toFixed(2);
  });
  data.tokens.forEach((_, t) => drawCells(t));
  drawLoads();
  drawChosen();
  describe();
  find("run").textContent = page.running ? "Stop" : "Run the rule";
}

// ── Input ──

function select(token) {
  page.chosen = Math.min(Math.max(0, token), data.tokens.length - 1);
  drawChosen();
}

function run() {
  page.running = !page.running;
  update();
  if (page.running) requestAnimationFrame(tick);
}

function tick() {
  if (!page.running) return;
  applyRule();
  setTimeout(() => requestAnimationFrame(tick), 60);
}

function stopAnd(act) {
  return () => {
    page.running = false;
    act();
  };
}

for (const name of ["topk", "open"]) {
  find(name).addEventListener("input", (event) => {
    page[name] = Number(event.target.value);
    update();
  });
}
find("open").max = GROUPS;
find("run").addEventListener("click", run);
find("once").addEventListener("click", stopAnd(applyRule));
find("zero").addEventListener("click", stopAnd(() => setBias(Array(NUM).fill(0))));
find("trained").addEventListener("click", stopAnd(() => setBias([...data.bias])));
find("tokens").addEventListener("keydown", (event) => {
  const by = { ArrowUp: -1, ArrowDown: 1, Home: -Infinity, End: Infinity }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  select(page.chosen + by);
});

drawBoard();
setBias(Array(NUM).fill(0));
window.router = { page, data, routeAll, countTokens, setBias, applyRule }; // for the console
