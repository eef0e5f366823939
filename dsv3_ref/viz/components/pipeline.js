// The page of pipeline schedules: a timeline to play, and to change.
import { find, make, radios, svg } from "./dom.js";
import { SCHEDULES, deadlockCircle, dependencies, keyOf, lastStage, maxInFlight, measure, minMicrobatches, move, overlap, phases, schedule, simulate, split } from "./schedule.js";

const NAMES = { gpipe: "GPipe", "1f1b": "1F1B", zb1p: "ZB1P", dualpipe: "DualPipe", dualpipev: "DualPipeV" };
const KINDS = { F: "forward", B: "backward", I: "backward, inputs", W: "backward, weights" };
const RANKS = [2, 3, 4, 6, 8];
const CHALLENGES = [
  { name: "Hold fewer activations: from GPipe to 1F1B", from: "gpipe", to: "1f1b", pp: 3, m: 4, comm: 0 },
  { name: "Shrink the bubble: from 1F1B to ZB1P", from: "1f1b", to: "zb1p", pp: 3, m: 4, comm: 0 },
  { name: "Hide the all-to-alls: pair the steps of DualPipe", from: "unpaired", to: "dualpipe", pp: 2, m: 8, comm: 1 },
];
const ROW = 34, BAR = 26, LEFT = 116, RIGHT = 8, TOP = 18, WIDTH = 1000;
const SPEED = 3; // units of time per second
const FLIGHT = 0.7; // units of time that a micro-batch is drawn between two GPUs
const STILL = matchMedia("(prefers-reduced-motion: reduce)");

const page = {
  name: "dualpipe", pp: 8, m: 20, comm: 0, challenge: null, solved: new Set(),
  steps: [], history: [], spans: [], blocked: [], sent: [], time: 0, end: 1,
  chosen: { rank: 0, index: 0 }, playing: false, last: 0,
};

// ── State ──

/** Return durations of steps in units of a forward pass through a pp-th part of the model. */
function costsOf(steps) {
  const size = steps.length / (lastStage(steps) + 1); // of a stage: DualPipeV's are half as large
  return { f: size, b: 2 * size, w: size, pair: 3 * size, comm: page.comm * size };
}

/** Return the steps of a schedule; "unpaired" is DualPipe with every pair taken apart. */
function stepsOf(name, pp, m) {
  if (name !== "unpaired") return schedule(name, pp, m);
  return schedule("dualpipe", pp, m).map((own) => own.flatMap((step) => step.map((one) => [one])));
}

/** Begin with a schedule as published, or with a challenge. */
function begin(name, challenge = null) {
  page.name = name;
  page.challenge = challenge;
  if (challenge) Object.assign(page, { pp: challenge.pp, m: challenge.m, comm: challenge.comm });
  if (name === "dualpipe" && page.pp % 2) page.pp += 1;
  if (!challenge) page.m = minMicrobatches(name, page.pp, page.m);
  page.history = [];
  page.chosen = { rank: 0, index: 0 };
  setSteps(stepsOf(name, page.pp, page.m), challenge ? Infinity : 0);
}

/** Show these steps at a time, or at their end. */
function setSteps(steps, time = Infinity) {
  page.steps = steps;
  const { spans, blocked } = simulate(steps, costsOf(steps));
  page.spans = spans;
  page.blocked = blocked;
  page.end = Math.max(1, ...spans.map((span) => span.end));
  page.sent = messages();
  page.time = Math.min(time, page.end);
  drawAll();
}

/** Apply a change of the chosen rank's steps, which `index` follows; show why it is impossible. */
function change(edit, index) {
  const { rank, index: at } = page.chosen, own = edit(page.steps[rank], at);
  if (typeof own === "string") return describe(own);
  page.history.push({ steps: page.steps, chosen: page.chosen });
  page.chosen = { rank, index: Math.min(index, own.length - 1) };
  setSteps(page.steps.map((steps, r) => (r === rank ? own : steps)));
}

function undo() {
  const before = page.history.pop();
  if (!before) return;
  page.chosen = before.chosen;
  setSteps(before.steps);
}

const isEdited = () => page.history.length > 0;

/** Return what travels between GPUs: from, to, the time it leaves, and its action. */
function messages() {
  const last = lastStage(page.steps), end = new Map(), sent = [];
  for (const span of page.spans) for (const one of span.step) end.set(keyOf(one), span);
  for (const span of page.spans) {
    for (const one of span.step) {
      for (const needed of dependencies(one, last)) {
        const from = end.get(keyOf(needed));
        if (from.rank !== span.rank) sent.push({ from: from.rank, to: span.rank, at: from.end, one: needed });
      }
    }
  }
  return sent;
}

// ── The timeline ──

const x = (time) => LEFT + (time / page.end) * (WIDTH - LEFT - RIGHT);
const y = (rank) => TOP + rank * ROW;
const label = ({ kind, microbatch }) => `${kind}${microbatch}`;
const isSecond = ({ stage, microbatch }) =>
  page.steps.length <= lastStage(page.steps) ? stage >= page.steps.length : usesBothEnds() && microbatch >= page.m / 2;
const usesBothEnds = () => page.steps[0].flat().some((one) => one.stage !== 0);

function drawBoard() {
  const height = TOP + page.steps.length * ROW + 16;
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "presentation" });
  page.steps.forEach((_, rank) => drawing.append(
    svg("rect", { class: "gpu", id: `gpu-${rank}`, x: 1, y: y(rank), width: LEFT - 24, height: BAR, rx: 4 }),
    svg("text", { x: 8, y: y(rank) + 17, id: `does-${rank}` }),
  ));
  for (const span of page.spans) drawing.append(drawStep(span));
  drawPhases(drawing);
  drawing.append(
    svg("rect", { class: "future", id: "future", y: 0, height }),
    svg("line", { class: "now", id: "now", y1: TOP - 6, y2: height - 14 }),
    svg("g", { id: "tokens" }), svg("g", { id: "needs" }),
    svg("text", { x: LEFT, y: height - 2 }, "time →"),
  );
  find("board").replaceChildren(drawing);
}

/** Draw a step, a pair as two bars; micro-batches of the second direction are paler. */
function drawStep({ rank, index, step, start, end }) {
  const height = BAR / step.length, width = x(end) - x(start);
  const bars = step.map((one, i) => svg("g", { class: `${one.kind}${isSecond(one) ? " second" : ""}` },
    svg("rect", { x: x(start), y: y(rank) + i * height, width, height, rx: 2 }),
    ...(width > 9 ? [svg("text", {
      x: x(start) + width / 2, y: y(rank) + (i + 0.5) * height + 3.5,
    }, width > 20 ? label(one) : String(one.microbatch))] : [])));
  const choose = () => select(rank, index);
  return svg("g", { class: "step", id: `step-${rank}-${index}`, onclick: choose }, ...bars);
}

const showsPhases = () => !isEdited() && !page.challenge && page.name.startsWith("dualpipe");

/** Number the eight phases of DualPipe at the beginning of each, on the chosen rank. */
function drawPhases(drawing) {
  if (!showsPhases()) return;
  let index = 0;
  phases(page.name, page.pp, page.m)[page.chosen.rank].forEach((steps, i) => {
    const span = page.spans.find((one) => one.rank === page.chosen.rank && one.index === index);
    if (steps.length) {
      const at = x(span.start), top = y(page.chosen.rank);
      drawing.append(svg("line", { class: "phase", x1: at, x2: at, y1: top - 4, y2: top + BAR }),
        svg("text", { x: at + 2, y: top - 2 }, String(i + 1)));
    }
    index += steps.length;
  });
}

/** Show the moment `page.time`: what has begun, what each GPU does, and what travels. */
function drawTime() {
  const time = page.time;
  const future = find("future");
  future.setAttribute("x", x(time));
  future.setAttribute("width", Math.max(0, WIDTH - x(time)));
  for (const name of ["x1", "x2"]) find("now").setAttribute(name, x(time));
  page.steps.forEach((_, rank) => {
    const span = page.spans.find((one) => one.rank === rank && one.start <= time && time < one.end);
    find(`does-${rank}`).textContent = `GPU ${rank} ${span ? span.step.map(label).join(" ") : "–"}`;
    find(`gpu-${rank}`).classList.toggle("busy", Boolean(span));
  });
  find("tokens").replaceChildren(...page.sent.filter(({ at }) => at <= time && time < at + FLIGHT).map(drawToken));
  find("time").value = time;
  find("time-value").textContent = time.toFixed(1);
  find("play").textContent = page.playing ? "Pause" : "Play";
}

function drawToken({ from, to, at, one }) {
  const share = (page.time - at) / FLIGHT;
  const cy = y(from) + BAR / 2 + share * (y(to) - y(from));
  return svg("g", {}, svg("circle", { class: `token ${one.kind}`, cx: LEFT - 12, cy, r: 7 }),
    svg("text", { x: LEFT - 12, y: cy + 3.5, class: "on-token" }, String(one.microbatch)));
}

// ── Selection ──

const chosenStep = () => page.steps[page.chosen.rank][page.chosen.index];
const words = (one) => `${KINDS[one.kind]} of micro-batch ${one.microbatch} in stage ${one.stage}`;

function select(rank, index) {
  const changesRank = rank !== page.chosen.rank;
  page.chosen = { rank, index };
  if (changesRank) { // the numbers of the phases move to it
    drawBoard();
    drawTime();
  }
  drawChosen();
}

/** Mark the chosen step and what it needs; say both. */
function drawChosen() {
  const { rank, index } = page.chosen, last = lastStage(page.steps);
  for (const old of document.querySelectorAll(".chosen")) old.classList.remove("chosen");
  find(`step-${rank}-${index}`)?.classList.add("chosen");
  const span = page.spans.find((one) => one.rank === rank && one.index === index);
  const needed = chosenStep().flatMap((one) => dependencies(one, last)).map((one) =>
    page.spans.find((other) => other.step.some((each) => keyOf(each) === keyOf(one))));
  find("needs").replaceChildren(...(span ? needed.filter(Boolean).map((from) => arrow(from, span)) : []));
  describe();
}

function arrow(from, to) {
  const x1 = x(from.end), y1 = y(from.rank) + BAR / 2, x2 = x(to.start), y2 = y(to.rank) + BAR / 2;
  return svg("path", { class: "needs", d: `M${x1} ${y1} C${x1 + 12} ${y1} ${x2 - 12} ${y2} ${x2} ${y2}` });
}

/** Say what the chosen step is and when it runs, or why a change was impossible. */
function describe(problem = "") {
  const { rank, index } = page.chosen, step = chosenStep();
  const span = page.spans.find((one) => one.rank === rank && one.index === index);
  const when = span ? `runs from ${span.start} to ${span.end}` : "never runs";
  const name = step.map(words).join(", overlapped with the ");
  find("selection").textContent = problem || `GPU ${rank}, step ${index + 1} of ${page.steps[rank].length}: ${name}; ${when}.`;
  const isWhole = step.length === 1;
  find("split").textContent = isWhole && "IW".includes(step[0].kind) ? "Join I and W" : "Split B";
  find("split").disabled = !isWhole || step[0].kind === "F";
  find("overlap").textContent = isWhole ? "Overlap with next" : "Take the pair apart";
  find("undo").disabled = !isEdited();
}

// ── Deadlocks, measures, challenges ──

function drawDeadlock() {
  const circle = page.blocked.length ? deadlockCircle(page.steps, page.blocked) : [];
  const parts = circle.map(({ rank, step, needs, on }) => {
    const where = on === rank ? "which comes later in its own row" : `which GPU ${on} has not begun`;
    return `GPU ${rank} cannot begin ${step.map(label).join(" & ")} before the ${words(needs)}, ${where}`;
  });
  find("deadlock").textContent = parts.length ? `Deadlock: ${parts.join("; ")}. Move one of these steps, or undo.` : "";
}

function measureAll(steps) {
  const costs = costsOf(steps);
  return measure(steps, simulate(steps, costs).spans, costs);
}

function row(name, values, isCurrent) {
  const share = `${(values.computing * 100).toFixed(0)}%`;
  const cells = [Number(values.time.toFixed(2)), share, values.inFlight, `${values.parameters}×`];
  return make("tr", { class: isCurrent ? "current" : null }, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, String(cell))));
}

function drawCompare() {
  const rows = [];
  for (const name of Object.keys(SCHEDULES)) {
    if (minMicrobatches(name, page.pp, page.m) !== page.m || (name === "dualpipe" && page.pp % 2)) continue;
    const steps = schedule(name, page.pp, page.m);
    rows.push(row(NAMES[name], measureAll(steps), name === page.name && !isEdited() && !page.challenge));
  }
  if (isEdited() || page.challenge) {
    rows.push(page.blocked.length ? make("tr", { class: "current" }, make("th", { scope: "row" }, "yours"), make("td", { colspan: 4 }, "deadlock"))
      : row("yours", measureAll(page.steps), true));
  }
  find("compare").replaceChildren(...rows);
}

/** Return the worst rank's activations above the target's, and the time above it. */
function distance({ to, pp, m }) {
  const steps = schedule(to, pp, m), target = simulate(steps, costsOf(steps));
  const most = maxInFlight(steps), own = maxInFlight(page.steps);
  return {
    time: page.end - Math.max(...target.spans.map((span) => span.end)),
    inFlight: Math.max(...own.map((count, rank) => count - most[rank])),
  };
}

function drawChallenges() {
  find("goal").textContent = page.challenge ? goal(page.challenge) : "";
  find("challenges").replaceChildren(...CHALLENGES.map((one) => make("li", { class: page.solved.has(one) ? "solved" : null },
    make("button", { onclick: () => begin(one.from, one), "aria-pressed": String(page.challenge === one) }, one.name))));
}

/** Say how far the steps are from the challenge's target; keep a challenge that is solved. */
function goal(challenge) {
  if (page.blocked.length) return "This schedule never ends.";
  const { time, inFlight } = distance(challenge), moves = page.history.length;
  if (time <= 1e-9 && inFlight <= 0) {
    page.solved.add(challenge);
    return `Done in ${moves} changes: as fast as ${NAMES[challenge.to]}, and no GPU holds more.`;
  }
  const late = time > 1e-9 ? [`${Number(time.toFixed(2))} units of time`] : [];
  const more = inFlight > 0 ? [`${inFlight} micro-batch${inFlight > 1 ? "es" : ""} in flight`] : [];
  return `Changes so far: ${moves}. More than ${NAMES[challenge.to]}: ${[...late, ...more].join(", ")}.`;
}

// ── Drawing everything ──

function drawControls() {
  const chosen = page.challenge ? null : NAMES[page.name];
  radios("schedules", Object.values(NAMES), (title) => title === chosen, (title) =>
    begin(Object.keys(NAMES).find((name) => NAMES[name] === title)));
  find("ranks").value = page.pp;
  for (const name of ["microbatches", "comm"]) {
    find(name).value = { microbatches: page.m, comm: page.comm }[name];
    find(`${name}-value`).textContent = find(name).value;
  }
  find("time").max = page.end;
  const kinds = [...new Set(page.steps.flat(2).map((one) => one.kind))];
  const second = { dualpipe: "from the other end", unpaired: "from the other end", dualpipev: "second half of the model" }[page.name];
  find("legend").replaceChildren(...["F", "B", "I", "W"].filter((kind) => kinds.includes(kind)).flatMap((kind) => [
    make("span", { class: `key ${kind}` }), `${kind} ${KINDS[kind]}`]),
    ...(second ? [make("span", { class: "key second" }), `paler: ${second}`] : []),
    ...(showsPhases() ? [make("span", { class: "phases" }, "1–8: the phases of the chosen GPU")] : []));
}

function drawAll() {
  drawControls();
  drawBoard();
  drawTime();
  drawChosen();
  drawDeadlock();
  drawCompare();
  drawChallenges();
}

// ── Time ──

function setTime(time) {
  page.time = Math.min(Math.max(0, time), page.end);
  drawTime();
}

/** Go to the next (or the last) time at which a step begins or ends. */
function jump(by) {
  pause();
  const times = [...new Set(page.spans.flatMap(({ start, end }) => [start, end]))].sort((a, b) => by * (a - b));
  setTime(times.find((time) => by * (time - page.time) > 1e-9) ?? page.time);
}

function pause() {
  page.playing = false;
  drawTime();
}

function toggle() {
  if (page.playing) return pause();
  if (page.time >= page.end) page.time = 0;
  page.playing = true;
  page.last = performance.now();
  drawTime();
  requestAnimationFrame(tick);
}

function tick(now) {
  if (!page.playing) return;
  const step = STILL.matches ? Math.floor((now - page.last) / 1000) : (now - page.last) / 1000;
  if (step > 0) {
    page.last = now;
    setTime(page.time + SPEED * Math.min(step, 1));
  }
  if (page.time >= page.end) return pause();
  requestAnimationFrame(tick);
}

// ── Input ──

const clamp = (value, high) => Math.min(Math.max(0, value), high);

function choose(rank, index) {
  const to = clamp(rank, page.steps.length - 1);
  select(to, clamp(index, page.steps[to].length - 1));
}

const EDITS = {
  earlier: () => change((own, at) => move(own, at, -1), page.chosen.index - 1),
  later: () => change((own, at) => move(own, at, 1), page.chosen.index + 1),
  split: () => change(split, page.chosen.index),
  overlap: () => change(overlap, page.chosen.index),
  undo,
  reset: () => begin(page.challenge ? page.challenge.from : page.name, page.challenge),
};
const KEYS = {
  ArrowLeft: () => choose(page.chosen.rank, page.chosen.index - 1),
  ArrowRight: () => choose(page.chosen.rank, page.chosen.index + 1),
  ArrowUp: () => choose(page.chosen.rank - 1, page.chosen.index),
  ArrowDown: () => choose(page.chosen.rank + 1, page.chosen.index),
  "Shift+ArrowLeft": EDITS.earlier, "Shift+ArrowRight": EDITS.later,
  s: EDITS.split, o: EDITS.overlap, u: EDITS.undo, " ": toggle,
};

for (const [id, act] of Object.entries(EDITS)) find(id).addEventListener("click", act);
find("ranks").append(...RANKS.map((pp) => make("option", { value: pp }, String(pp))));
find("ranks").addEventListener("change", (event) => {
  page.pp = Number(event.target.value);
  begin(page.challenge ? page.challenge.to : page.name);
});
find("microbatches").addEventListener("input", (event) => {
  page.m = Number(event.target.value);
  begin(page.challenge ? page.challenge.to : page.name);
});
find("comm").addEventListener("input", (event) => {
  page.comm = Number(event.target.value);
  setSteps(page.steps);
});
find("time").addEventListener("input", (event) => {
  page.playing = false;
  setTime(Number(event.target.value));
});
find("play").addEventListener("click", toggle);
find("back").addEventListener("click", () => jump(-1));
find("next").addEventListener("click", () => jump(1));
find("board").addEventListener("keydown", (event) => {
  const act = KEYS[(event.shiftKey ? "Shift+" : "") + event.key];
  if (!act || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  act();
});

begin("dualpipe");
page.time = page.end;
drawTime();
window.pipeline = { page, schedule, simulate, maxInFlight, deadlockCircle, setTime }; // for the console
