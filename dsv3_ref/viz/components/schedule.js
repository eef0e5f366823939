// Pipeline schedules as data, and when each step runs: `dsv3_ref/dualpipe.py` in JavaScript.
// An action is { kind, stage, microbatch }; a step is one action, or two that overlap.

const action = (kind, stage, microbatch) => ({ kind, stage, microbatch });
const range = (n) => Array.from({ length: Math.max(0, n) }, (_, i) => i);
const repeat = (n, ...steps) => range(n).flatMap(() => steps);

// ── Schedules: the steps of rank r of pp, for m micro-batches ──

function gpipe(pp, r, m) {
  return ["F", "B"].flatMap((kind) => range(m).map((i) => [action(kind, r, i)]));
}

function oneForwardOneBackward(pp, r, m) {
  const warmup = Math.min(pp - 1 - r, m);
  const steps = range(warmup).map((i) => [action("F", r, i)]);
  for (const i of range(m)) {
    if (warmup + i < m) steps.push([action("F", r, warmup + i)]);
    steps.push([action("B", r, i)]);
  }
  return steps;
}

function zb1p(pp, r, m) {
  const steps = [];
  for (const [{ kind, microbatch: i }] of oneForwardOneBackward(pp, r, m)) {
    if (kind === "F") {
      steps.push([action("F", r, i)]);
      continue;
    }
    steps.push([action("I", r, i)]);
    if (i >= r) steps.push([action("W", r, i - r)]);
  }
  for (let i = Math.max(0, m - r); i < m; i++) steps.push([action("W", r, i)]);
  return steps;
}

/** Return the phases of rank i of n with c micro-batches each way; F0 is a kind and a direction. */
function bidirectionalPhases(n, i, c) {
  const ahead = n - 1 - i;
  const pairs = repeat(c - 2 * n + i + 1, ["F0", "B1"], ["F1", "B0"]);
  if (ahead === 0) pairs.splice(0, 1, ["F0"], ["B1"]);
  const backward = repeat(i + 1, ["B1"], ["B0"]), inputsOnly = repeat(i + 1, ["I1"], ["I0"]);
  return [
    repeat(2 * ahead, ["F0"]),
    repeat(i + 1, ["F0"], ["F1"]),
    repeat(ahead, ["I1"], ["W"], ["F1"]),
    pairs,
    repeat(ahead, ["B1"], ["F1", "B0"]),
    [...backward.slice(0, i + 1), ...inputsOnly.slice(i + 1)],
    repeat(ahead, ["W"], ["I0"]),
    repeat(i + 1, ["W"]),
  ];
}

/** Turn names into actions: the k-th F (or B, I) of a direction acts on locate(direction, k). */
function assignMicrobatches(phases, locate) {
  const done = { true: [0, 0], false: [0, 0] }, deferred = [];
  const toAction = (name) => {
    const kind = name[0];
    if (kind === "W") return action("W", ...deferred.shift());
    const direction = Number(name[1]);
    const place = locate(direction, done[kind === "F"][direction]++);
    if (kind === "I") deferred.push(place);
    return action(kind, ...place);
  };
  return phases.map((steps) => steps.map((step) => step.map(toAction)));
}

function dualpipePhases(pp, r, m) {
  const locate = (direction, k) =>
    (direction === 0) === (r < pp / 2) ? [r, k] : [pp - 1 - r, m / 2 + k];
  return assignMicrobatches(bidirectionalPhases(pp / 2, Math.min(r, pp - 1 - r), m / 2), locate);
}

function dualpipeVPhases(pp, r, m) {
  return assignMicrobatches(bidirectionalPhases(pp, r, m), (direction, k) =>
    [direction ? 2 * pp - 1 - r : r, k]);
}

export const SCHEDULES = {
  gpipe: (...args) => [gpipe(...args)],
  "1f1b": (...args) => [oneForwardOneBackward(...args)],
  zb1p: (...args) => [zb1p(...args)],
  dualpipe: dualpipePhases,
  dualpipev: dualpipeVPhases,
};

/** Return the phases of every rank, each a list of steps; DualPipe has eight, the others one. */
export function phases(name, pp, m) {
  return range(pp).map((r) => SCHEDULES[name](pp, r, m));
}

/** Return the steps of every rank. */
export function schedule(name, pp, m) {
  return phases(name, pp, m).map((parts) => parts.flat());
}

/** Return the least number of micro-batches ≥ n that a schedule supports. */
export function minMicrobatches(name, pp, n) {
  if (!name.startsWith("dualpipe")) return n;
  const least = Math.max(n, 2 * pp);
  return name === "dualpipe" ? least + (least % 2) : least;
}

// ── When does each step run? ──

/** Return the duration of a step; a pair hides its all-to-alls, W has none. */
export function duration(step, { f = 1, b = 2, w = 1, pair = 3, comm = 0 }) {
  if (step.length === 2) return Math.max(pair, 2 * comm);
  if (step[0].kind === "W") return w;
  return { F: f, B: b, I: b - w }[step[0].kind] + comm;
}

/** Return a text for the output of an action; I yields the same gradient as B. */
export function keyOf({ kind, stage, microbatch }) {
  return `${kind === "I" ? "B" : kind} ${stage} ${microbatch}`;
}

/** Return the actions that must end before this one starts; `last` is the last stage. */
export function dependencies({ kind, stage, microbatch }, last) {
  if (kind === "W") return [action("B", stage, microbatch)];
  if (kind === "F") return stage > 0 ? [action("F", stage - 1, microbatch)] : [];
  const after = stage < last ? [action("B", stage + 1, microbatch)] : [];
  return [action("F", stage, microbatch), ...after];
}

export function lastStage(steps) {
  return Math.max(...steps.flat(2).map((one) => one.stage));
}

/** Return { spans, blocked }: a span per step that runs, and per waiting rank what it waits for. */
export function simulate(steps, costs = {}) {
  const last = lastStage(steps), end = new Map(), spans = [], blocked = [];
  const free = steps.map(() => 0), position = steps.map(() => 0);
  const missing = (step) =>
    step.flatMap((one) => dependencies(one, last)).find((needed) => !end.has(keyOf(needed)));
  for (let progress = true; progress;) {
    progress = false;
    steps.forEach((own, rank) => {
      while (position[rank] < own.length && !missing(own[position[rank]])) {
        const index = position[rank]++, step = own[index];
        const needed = step.flatMap((one) => dependencies(one, last));
        const start = Math.max(free[rank], ...needed.map((one) => end.get(keyOf(one))));
        free[rank] = start + duration(step, costs);
        for (const one of step) end.set(keyOf(one), free[rank]);
        spans.push({ rank, index, step, start, end: free[rank] });
        progress = true;
      }
    });
  }
  steps.forEach((own, rank) => {
    const step = own[position[rank]];
    if (step) blocked.push({ rank, index: position[rank], step, needs: missing(step) });
  });
  return { spans, blocked };
}

/** Return the blocked ranks that wait for each other in a circle, each with the rank it waits `on`. */
export function deadlockCircle(steps, blocked) {
  const rankOf = (needed) =>
    steps.findIndex((own) => own.flat().some((one) => keyOf(one) === keyOf(needed)));
  const waiting = new Map(blocked.map((one) => [one.rank, { ...one, on: rankOf(one.needs) }]));
  const path = [];
  let at = waiting.get(blocked[0].rank);
  while (!path.includes(at)) {
    path.push(at);
    at = waiting.get(at.on);
  }
  return path.slice(path.indexOf(at));
}

/** Return the most micro-batches that each rank has in flight: from F to the end of B or W. */
export function maxInFlight(steps) {
  return steps.map((own) => {
    let live = 0, peak = 0;
    for (const step of own) {
      live += step.filter((one) => one.kind === "F").length;
      peak = Math.max(peak, live);
      live -= step.filter((one) => "BW".includes(one.kind)).length;
    }
    return peak;
  });
}

/**
 * Return the time of all spans, the share of it in which ranks compute, and, in pp-ths of the
 * model, the most activations and the parameters of a rank.
 */
export function measure(steps, spans, { f = 1, b = 2 } = {}) {
  const time = Math.max(0, ...spans.map((span) => span.end));
  const work = { F: f, B: b, I: b, W: 0 }; // I and W together take b
  const busy = steps.flat(2).reduce((sum, { kind }) => sum + work[kind], 0);
  const size = steps.length / (lastStage(steps) + 1);
  const stages = Math.max(...steps.map((own) => new Set(own.flat().map((one) => one.stage)).size));
  const inFlight = size * Math.max(...maxInFlight(steps));
  return { time, computing: busy / (time * steps.length), inFlight, parameters: size * stages };
}

// ── Changes of one rank's steps: each returns the new steps, or why it is impossible ──

const replaced = (own, index, count, ...steps) =>
  [...own.slice(0, index), ...steps, ...own.slice(index + count)];

/** Exchange a step with the one before (by = −1) or after it (by = 1). */
export function move(own, index, by) {
  if (!own[index + by]) return by < 0 ? "This is the rank's first step." : "This is the rank's last step.";
  const low = Math.min(index, index + by);
  return replaced(own, low, 2, own[low + 1], own[low]);
}

/** Split B into I and W, or join I with its W, wherever that is, to B. */
export function split(own, index) {
  const [one, other] = own[index];
  if (other || !"BIW".includes(one.kind)) return "Only a backward step of its own can be split.";
  const at = (kind) => action(kind, one.stage, one.microbatch);
  if (one.kind === "B") return replaced(own, index, 1, [at("I")], [at("W")]);
  const joined = own.map((step) => step.length === 1 && step[0].kind === "I" && keyOf(step[0]) === keyOf(at("B")) ? [at("B")] : step);
  return joined.filter((step) => step.length !== 1 || keyOf(step[0]) !== keyOf(at("W")));
}

/** Overlap a step with the next one, or take a pair apart. */
export function overlap(own, index) {
  const step = own[index], next = own[index + 1];
  if (step.length === 2) return replaced(own, index, 1, [step[0]], [step[1]]);
  const kinds = [step[0].kind, next?.length === 1 ? next[0].kind : ""].sort().join("");
  if (kinds !== "BF") return "Only a forward and a whole backward step that follow each other overlap.";
  if (step[0].microbatch === next[0].microbatch && step[0].stage === next[0].stage) {
    return "A backward step needs the forward step of its own micro-batch to have ended.";
  }
  return replaced(own, index, 2, [step[0], next[0]]);
}
