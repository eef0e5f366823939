// The page: text in, and what every part of the model does with one of its tokens.
import { find, make } from "./dom.js";
import { Model, distribution, randomNumbers, sample, topK, verifyDraft } from "./model.js";
import { Tokenizer } from "./tokenizer.js";

const data = JSON.parse(find("model").textContent);
const PROMPTS = data.prompts;
const MAX_GUESSES = 5;
const FRAME_MS = 30; // tokens are written for this long before the page is drawn again

// ── Weights: rows of 8-bit numbers, each row with its scale ──

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function readTensors(entries, buffer) {
  return new Map(entries.map(({ name, shape, values, scales }) => {
    const size = shape.reduce((a, b) => a * b, 1), width = shape.at(-1);
    if (scales === undefined) return [name, new Float32Array(buffer, values, size)];
    const quantized = new Int8Array(buffer, values, size);
    const scale = new Float32Array(buffer, scales, size / width);
    return [name, Float32Array.from(quantized, (q, i) => q * scale[Math.floor(i / width)])];
  }));
}

const tensors = readTensors(data.tensors, bytesOf(find("weights").textContent.trim()).buffer);
const model = new Model(data.config, tensors);
const tokenizer = new Tokenizer(data.tokenizer);
const shapes = new Map(data.tensors.map(({ name, shape }) => [name, shape]));

// ── State ──

const page = { steps: [], chosen: 0, about: "router", running: false, random: randomNumbers(1) };
const panel = { // kept here, since drawing the path may take it out of the document
  root: find("about"), where: find("about-where"), text: find("about-text"), values: find("about-values"),
  code: document.querySelector("#about-code pre"),
};
const NARROW = matchMedia("(max-width: 60rem)"), DARK = matchMedia("(prefers-color-scheme: dark)");

/** Read a token after the others; `origin` says where it came from. */
function read(token, origin) {
  page.steps.push({ origin, trace: model.step(token) });
}

/** Read the prompt, or all tokens so far, from the beginning. */
function readAgain(tokens, origins = []) {
  model.reset();
  page.steps = [];
  tokens.forEach((token, i) => read(token, origins[i] ?? "prompt"));
}

function readPrompt() {
  const tokens = [data.tokenizer.bos, ...tokenizer.encode(find("prompt").value)];
  const limit = data.config.max_seq_len - 1;
  readAgain(tokens.slice(0, limit));
  page.random = randomNumbers(1);
  page.chosen = page.steps.length - 1;
  say(tokens.length > limit ? `Only the first ${limit} tokens are read.` : "");
  draw();
}

/** Choose the next token, with a draft by MTP if there is one, and read it. */
function writeToken() {
  const { logits, draft } = model.last, temperature = Number(find("temperature").value);
  const p = distribution(logits, temperature);
  if (!draft || !find("drafts").checked) return read(sample(p, page.random), "written");
  const q = distribution(draft.logits, temperature);
  const { token, accepted } = verifyDraft(sample(q, page.random), q, p, page.random);
  return read(token, accepted ? "accepted" : "rejected");
}

const isFull = () => page.steps.length >= data.config.max_seq_len;
const hasEnded = () => page.steps.length > 1 && model.last.token === data.tokenizer.eos;

async function write() {
  page.running = !page.running;
  find("write").textContent = page.running ? "Stop" : "Write";
  const start = performance.now(), before = page.steps.length;
  while (page.running && !isFull() && !hasEnded()) {
    const frame = performance.now();
    do writeToken(); while (performance.now() < frame + FRAME_MS && !isFull() && !hasEnded());
    page.chosen = page.steps.length - 1;
    draw();
    report(page.steps.length - before, performance.now() - start);
    await new Promise((next) => setTimeout(next));
  }
  page.running = false;
  find("write").textContent = "Write";
}

function report(count, milliseconds) {
  const origins = page.steps.map(({ origin }) => origin);
  const accepted = origins.filter((origin) => origin === "accepted").length;
  const drafts = accepted + origins.filter((origin) => origin === "rejected").length;
  const share = accepted / drafts;
  const speed = `${count} tokens, ${Math.round((count * 1000) / milliseconds)} per second`;
  const saved = drafts
    ? `; ${accepted} of ${drafts} drafts accepted (${Math.round(100 * share)} %): ` +
      `${(1 + share).toFixed(2)} tokens per step of the main model`
    : "";
  say(speed + saved + (isFull() ? ". The context is full." : ""));
}

const say = (text) => { find("status").textContent = text; };

// ── Drawing ──

function tokenText(id) {
  if (id === data.tokenizer.bos) return "⟨start⟩";
  if (id === data.tokenizer.eos) return "⟨end⟩";
  const text = tokenizer.decode([id]);
  return text.includes("\ufffd")
    ? `⟨${tokenizer.tokenBytes(id).map((b) => b.toString(16)).join(" ")}⟩`
    : text;
}

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "·");

/** Return a color of the stylesheet, which depends on the reader's scheme, as [red, green, blue]. */
function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).split(",").map(Number);
}

const colors = {};
function readColors() {
  Object.assign(colors, { plus: color("--plus"), minus: color("--minus") });
}

/** Draw numbers as cells: orange above zero, blue below, strength by size. */
function strip(values, label) {
  const canvas = make("canvas", { width: values.length, height: 1, role: "img", "aria-label": label });
  const image = new ImageData(values.length, 1);
  const largest = values.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-9);
  values.forEach((value, i) => {
    image.data.set([...(value > 0 ? colors.plus : colors.minus), (255 * Math.abs(value)) / largest], 4 * i);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Name a box and its layer: “Cached: 160 numbers, layer 1”. */
function where(title, layer = "") {
  const number = /^layers\.(\d+)/.exec(layer)?.[1];
  return number === undefined ? title : `${title}, layer ${number}`;
}

/** Make a box of the path, whose title shows in the panel what happens there. */
function box(about, title, ...children) {
  const current = page.about === about.key && page.layer === about.layer;
  const show = () => {
    Object.assign(page, { about: about.key, layer: about.layer, asked: true });
    draw();
    document.querySelector(".box.current .title").focus();
  };
  return make("div", { class: `box${current ? " current" : ""}`, "data-about": about.key, "data-where": where(title, about.layer) },
    make("button", { class: "title", onclick: show, "aria-pressed": String(current) }, title), ...children);
}

function drawTokens() {
  const options = page.steps.map(({ origin, trace }, i) =>
    make("span", {
      role: "option", class: origin, id: `token-${i}`, "aria-selected": String(i === page.chosen),
      title: `token ${trace.token}, ${origin}`, onclick: () => choose(i),
    }, i ? tokenText(trace.token).replaceAll("\n", "⏎\n") : "⟨start⟩"));
  find("tokens").replaceChildren(...options);
  find("tokens").setAttribute("aria-activedescendant", `token-${page.chosen}`);
}

/** Scroll the list of tokens, not the page, to the chosen one. */
function scrollToChosen() {
  const list = find("tokens").getBoundingClientRect();
  const token = find(`token-${page.chosen}`).getBoundingClientRect();
  if (token.bottom > list.bottom) find("tokens").scrollTop += token.bottom - list.bottom;
  if (token.top < list.top) find("tokens").scrollTop += token.top - list.top;
}

function choose(i) {
  page.chosen = Math.max(0, Math.min(i, page.steps.length - 1));
  draw();
}

/** Shade the tokens of the text by the probabilities of a head; null removes the shade. */
function shade(probs) {
  page.steps.forEach((_, i) => {
    const strength = probs && i < probs.length ? probs[i] / Math.max(...probs) : 0;
    find(`token-${i}`).style.background = strength ? `rgba(${colors.plus}, ${strength * 0.7})` : "";
  });
}

function drawAttention(trace, layer) {
  const rows = trace.probs.map((probs, h) =>
    make("div", {
      class: "head", tabindex: 0, onmouseenter: () => shade(probs), onmouseleave: () => shade(null),
      onfocus: () => shade(probs), onblur: () => shade(null), role: "group",
      "aria-label": `head ${h}: most to ${visible(tokenText(page.steps[topK(probs, 1)[0]].trace.token))}`,
    }, `head ${h}`, strip(probs, `probabilities of head ${h} over ${probs.length} tokens`)));
  return box({ key: "attention", layer }, "Attention: which tokens it reads", ...rows);
}

function drawLatent({ cached }, layer) {
  const { n_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim } = data.config;
  const width = cached.latent.length + cached.key.length;
  const heads = n_heads * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim);
  return box({ key: "latent", layer }, `Cached: ${width} numbers`,
    strip([...cached.latent, ...cached.key], `latent and rotary key, ${width} numbers`),
    make("p", { class: "soft" }, `Keys and values of ${n_heads} heads would be ${heads} numbers.`));
}

function drawRouter({ routing }, layer) {
  const size = data.config.n_routed_experts / data.config.n_expert_groups;
  const off = model.off.get(layer) ?? new Set();
  const expert = (e) => {
    const k = routing.chosen.indexOf(e), isOff = off.has(e);
    const state = isOff ? "off" : k >= 0 ? `chosen, weight ${routing.weights[k].toFixed(2)}` : "not chosen";
    const button = make("button", {
      class: `expert${k >= 0 ? " chosen" : ""}${isOff ? " off" : ""}`, "data-expert": e,
      "aria-pressed": String(!isOff), onclick: () => toggle(layer, e),
      "aria-label": `expert ${e}: affinity ${routing.scores[e].toFixed(2)}, ${state}`,
    }, make("b", {}, String(e)), k >= 0 ? `×${routing.weights[k].toFixed(2)}` : routing.scores[e].toFixed(2));
    if (k < 0 && !isOff) button.style.background = `rgba(${colors.minus}, ${routing.scores[e] * 0.35})`;
    return button;
  };
  const groups = Array.from({ length: data.config.n_expert_groups }, (_, g) =>
    make("div", {
      class: `group${routing.open.has(g) ? " open" : ""}`, role: "group",
      "aria-label": `group ${g}, ${routing.open.has(g) ? "open" : "closed"}`,
    }, ...Array.from({ length: size }, (_, i) => expert(g * size + i))));
  return box({ key: "router", layer }, "Router: which experts it visits",
    make("div", { class: "groups" }, ...groups),
    make("p", { class: "soft" }, `${routing.chosen.length} of ${data.config.n_routed_experts} experts, and the shared expert. Solid frames are open groups.`));
}

/** Switch an expert off or on, and read the text again. */
function toggle(layer, expert) {
  const off = model.off.get(layer) ?? new Set();
  if (!off.delete(expert)) off.add(expert);
  model.off.set(layer, off);
  readAgain(page.steps.map(({ trace }) => trace.token), page.steps.map(({ origin }) => origin));
  Object.assign(page, { about: "router", layer });
  draw();
  document.querySelector(`[data-layer="${layer}"] [data-expert="${expert}"]`)?.focus();
}

function drawLayer(trace, block, name) {
  const layer = block.prefix;
  const ffn = trace.routing
    ? drawRouter(trace, layer)
    : box({ key: "dense", layer }, "Feed-forward network", strip(trace.fed, "what it adds to the stream"));
  return make("div", { class: "layer", "data-layer": layer }, make("h3", {}, name),
    drawAttention(trace, layer), drawLatent(trace, layer), ffn);
}

/** Draw the most likely tokens; `next` is the one that the text has there. */
function drawGuesses(logits, next) {
  const probs = distribution(logits, 1), best = topK(probs, MAX_GUESSES);
  const shown = next === undefined || best.includes(next) ? best : [...best, next];
  return shown.map((token) => {
    const bar = make("div", { class: "bar" });
    bar.style.width = `${100 * probs[token]}%`;
    return make("div", { class: `guess${token === next ? " came" : ""}`, "data-token": token },
      make("code", {}, visible(tokenText(token))), make("div", {}, bar),
      make("span", {}, `${(100 * probs[token]).toFixed(1)} %`));
  });
}

function drawPath() {
  const { trace } = page.steps[page.chosen], next = page.steps[page.chosen + 1]?.trace.token;
  const layers = trace.layers.map((t, i) => drawLayer(t, model.layers[i], `Layer ${i}`));
  const legend = make("p", { class: "soft" }, next === undefined
    ? "Nothing follows yet." : `Green: the token that follows in the text.`);
  const draft = trace.draft
    ? [box({ key: "mtp", layer: "mtp.0." }, "MTP: guess made without the main model", ...drawGuesses(trace.draft.logits, next))]
    : [];
  find("path").replaceChildren(
    box({ key: "embedding" }, "Embedding", strip(trace.embedding, `${trace.embedding.length} numbers`)),
    ...layers, box({ key: "logits" }, "Most likely next tokens", ...drawGuesses(trace.logits, next), legend), ...draft);
  find("chosen").textContent = `“${visible(tokenText(trace.token))}”`;
}

// ── The panel: equation, tensor, code ──

const TENSORS = {
  embedding: () => ["embed.weight"], logits: () => ["norm.weight", "head.weight"],
  attention: (layer) => ["attn.wq_a.weight", "attn.wq_b.weight", "attn.wkv_b.weight", "attn.wo.weight"].map((n) => layer + n),
  latent: (layer) => [`${layer}attn.wkv_a.weight`, `${layer}attn.kv_norm.weight`],
  dense: (layer) => ["ffn.w1.weight", "ffn.w3.weight", "ffn.w2.weight"].map((n) => layer + n),
  router: (layer) => ["ffn.gate.weight", "ffn.gate.bias", "ffn.experts.w1", "ffn.experts.w2", "ffn.experts.w3"].map((n) => layer + n),
  mtp: (layer) => [`${layer}eh_proj.weight`, `${layer}norm.weight`],
};

/** Return the numbers behind a box for the chosen token: label → vector. */
function vectors() {
  const { trace } = page.steps[page.chosen];
  const index = model.layers.findIndex(({ prefix }) => prefix === page.layer), t = trace.layers[index];
  if (page.about === "embedding") return { "embedding": trace.embedding };
  if (page.about === "logits") return { "hidden state after the last norm": trace.hidden };
  if (page.about === "mtp" || !t) return trace.draft ? { "state of the MTP module": trace.draft.x } : {};
  if (page.about === "latent") return { "latent": t.cached.latent, "rotary key": t.cached.key };
  if (page.about === "attention") return { "what attention adds to the stream": t.attended };
  if (page.about === "router") return { "affinities": t.routing.scores, "what the experts add": t.fed };
  return { "what the network adds to the stream": t.fed };
}

/** Put the panel beside the path or, on a narrow screen, below the box that was asked about. */
function placePanel() {
  const box = document.querySelector(".box.current");
  if (NARROW.matches && page.asked && box) box.after(panel.root);
  else document.querySelector(".columns").append(panel.root);
}

function drawAbout() {
  placePanel();
  panel.where.textContent = document.querySelector(".box.current")?.dataset.where ?? "";
  panel.text.replaceChildren(find(`about-${page.about}`).content.cloneNode(true));
  const names = TENSORS[page.about](page.layer).filter((name) => shapes.has(name));
  const list = names.map((name) => make("li", {}, make("code", {}, name), ` ${shapes.get(name).join(" × ")}`));
  const strips = Object.entries(vectors()).flatMap(([label, values]) => [
    make("p", { class: "soft" }, `${label}: ${values.length} numbers, ${Array.from(values.slice(0, 4), (v) => v.toFixed(2)).join(", ")} …`),
    strip(values, label)]);
  panel.values.replaceChildren(...strips, make("h3", {}, "Weights"), make("ul", {}, ...list));
  panel.code.textContent = data.sources[page.about];
}

function draw() {
  drawTokens();
  drawPath();
  drawAbout();
  scrollToChosen();
}

// ── Controls ──

function onKey(event) {
  const to = { ArrowLeft: page.chosen - 1, ArrowRight: page.chosen + 1, Home: 0, End: Infinity }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(to);
}

function start() {
  find("size").textContent = `with ${(data.parameters / 1e6).toFixed(1)} million parameters`;
  find("prompts").append(...PROMPTS.map((text) => make("button", {
    onclick: () => { page.running = false; find("prompt").value = text; readPrompt(); },
  }, text.length > 30 ? `${text.slice(0, 30)}…` : text.trim())));
  find("prompt").value = PROMPTS[0];
  find("prompt").addEventListener("input", () => { page.running = false; readPrompt(); });
  find("write").addEventListener("click", write);
  find("one").addEventListener("click", () => {
    if (!isFull()) { writeToken(); choose(Infinity); }
  });
  find("clear").addEventListener("click", () => { page.running = false; readPrompt(); });
  find("temperature").addEventListener("input", ({ target }) => { find("temperature-value").textContent = target.value; });
  find("tokens").addEventListener("keydown", onKey);
  NARROW.addEventListener("change", draw);
  DARK.addEventListener("change", () => { readColors(); draw(); });
  readColors();
  page.layer = model.layers.find((layer) => layer.isMoE)?.prefix ?? model.layers[0].prefix;
  if (!model.layers.some((layer) => layer.isMoE)) page.about = "dense";
  readPrompt();
}

start();
window.explainer = { model, tokenizer, page, randomNumbers, sample, verifyDraft }; // for the console
