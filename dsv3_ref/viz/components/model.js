// The forward pass of DeepSeek-V3 for one token after another, in plain JavaScript.
// It follows chapters 01 to 06; Python is the reference (tests/viz/test_explainer.py).

// ── Arithmetic ──

/** Compute y_o = Σ_i W_oi x_i; rows of W begin at number `start`. */
export function linear(weight, x, rows, start = 0) {
  const width = x.length, y = new Float32Array(rows);
  for (let o = 0, w = start * width; o < rows; o++, w += width) {
    let sum = 0;
    for (let i = 0; i < width; i++) sum += weight[w + i] * x[i];
    y[o] = sum;
  }
  return y;
}

/** Scale a vector to a root mean square of 1, then each number by its weight. */
export function rmsNorm(x, weight, eps) {
  let sum = 0;
  for (const value of x) sum += value * value;
  const scale = 1 / Math.sqrt(sum / x.length + eps);
  return x.map((value, i) => value * scale * weight[i]);
}

export const sigmoid = (x) => 1 / (1 + Math.exp(-x));

export function softmax(scores) {
  const largest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const exps = scores.map((score) => Math.exp(score - largest));
  const sum = exps.reduce((a, b) => a + b, 0);
  return exps.map((value) => value / sum);
}

/** Compute W₂ (silu(W₁ x) · W₃ x) of the expert that begins at these rows. */
function swigluFFN({ w1, w2, w3 }, x, width, expert = 0) {
  const gate = linear(w1, x, width, expert * width);
  const up = linear(w3, x, width, expert * width);
  const hidden = gate.map((value, i) => value * sigmoid(value) * up[i]);
  return linear(w2, hidden, x.length, expert * x.length);
}

const add = (x, y) => x.map((value, i) => value + y[i]);

/** Rotate the pairs of x by their angles at a position (RoPE). */
export function rotate(x, position, freqs) {
  const y = new Float32Array(x.length);
  freqs.forEach((freq, j) => {
    const cos = Math.cos(position * freq), sin = Math.sin(position * freq);
    y[2 * j] = x[2 * j] * cos - x[2 * j + 1] * sin;
    y[2 * j + 1] = x[2 * j] * sin + x[2 * j + 1] * cos;
  });
  return y;
}

/** Return the numbers of the n largest values, largest first; of equal ones the first. */
export function topK(values, n) {
  const best = [];
  values.forEach((value, i) => {
    if (best.length === n && !(value > values[best[n - 1]])) return;
    const at = best.findIndex((j) => value > values[j]);
    best.splice(at < 0 ? best.length : at, 0, i);
    best.length = Math.min(best.length, n);
  });
  return best;
}

// ── The router (eq. 12–16 and the groups of §2.1.2) ──

/** Choose the experts of a token; `off` holds experts that may not be chosen. */
export function route(logits, bias, config, off = new Set()) {
  const isSigmoid = config.score_func === "sigmoid";
  const scores = isSigmoid ? logits.map(sigmoid) : softmax(logits);
  const biased = Array.from(scores, (s, e) => (off.has(e) ? -Infinity : s + (bias ? bias[e] : 0)));
  const size = config.n_routed_experts / config.n_expert_groups;
  const best = Math.min(isSigmoid ? 2 : 1, size);
  const groups = Array.from({ length: config.n_expert_groups }, (_, g) => {
    const inside = biased.slice(g * size, (g + 1) * size);
    return topK(inside, best).reduce((sum, e) => sum + inside[e], 0);
  });
  const open = new Set(topK(groups, config.n_limited_groups));
  const allowed = biased.map((s, e) => (open.has(Math.floor(e / size)) ? s : -Infinity));
  const chosen = topK(allowed, config.n_activated_experts).filter((e) => allowed[e] > -Infinity);
  const sum = isSigmoid ? chosen.reduce((a, e) => a + scores[e], 0) + 1e-20 : 1;
  const weights = chosen.map((e) => (scores[e] / sum) * config.route_scale);
  return { scores, biased, groups, open, chosen, weights };
}

// ── One block ──

class Block {
  constructor(tensors, prefix, config) {
    Object.assign(this, { tensors, prefix, config, cache: [] });
    this.isMoE = tensors.has(`${prefix}ffn.gate.weight`);
  }

  get(name) {
    return this.tensors.get(this.prefix + name);
  }

  ffnWeights(name) {
    const end = this.tensors.has(`${this.prefix}${name}.w1`) ? "" : ".weight";
    return Object.fromEntries(["w1", "w2", "w3"].map((w) => [w, this.get(`${name}.${w}${end}`)]));
  }

  /** Compute the queries of every head, [q; q^R], the latter rotated (eq. 6–8). */
  queries(x, position) {
    const c = this.config, width = c.qk_nope_head_dim + c.qk_rope_head_dim;
    const down = this.get("attn.wq_a.weight");
    const latent = down &&
      rmsNorm(linear(down, x, c.q_lora_rank), this.get("attn.q_norm.weight"), c.latent_norm_eps);
    const up = this.get(down ? "attn.wq_b.weight" : "attn.wq.weight");
    const q = linear(up, latent ?? x, c.n_heads * width);
    return Array.from({ length: c.n_heads }, (_, h) => {
      const nope = q.subarray(h * width, h * width + c.qk_nope_head_dim);
      const rope = q.subarray(h * width + c.qk_nope_head_dim, (h + 1) * width);
      return { nope, rope: rotate(rope, position, c.freqs) };
    });
  }

  /** Compute what the cache keeps of a token: its latent and its rotated key (eq. 1 and 3). */
  compress(x, position) {
    const c = this.config, width = c.kv_lora_rank;
    const both = linear(this.get("attn.wkv_a.weight"), x, width + c.qk_rope_head_dim);
    const norm = this.get("attn.kv_norm.weight");
    const latent = rmsNorm(both.subarray(0, width), norm, c.latent_norm_eps);
    return { latent, key: rotate(both.subarray(width), position, c.freqs) };
  }

  /** Attend inside the latent: W^UK acts on the query, W^UV on the result (absorbed). */
  attend(x, position) {
    const c = this.config, width = c.kv_lora_rank;
    const up = this.get("attn.wkv_b.weight"), rows = c.qk_nope_head_dim + c.v_head_dim;
    this.cache.push(this.compress(x, position));
    const output = new Float32Array(c.n_heads * c.v_head_dim);
    const probs = this.queries(x, position).map((q, h) => {
      const absorbed = new Float32Array(width);
      for (let i = 0; i < c.qk_nope_head_dim; i++) {
        const row = (h * rows + i) * width;
        for (let j = 0; j < width; j++) absorbed[j] += q.nope[i] * up[row + j];
      }
      const p = softmax(this.cache.map(({ latent, key }) =>
        c.softmax_scale * (dot(absorbed, latent) + dot(q.rope, key))));
      const mixed = new Float32Array(width);
      this.cache.forEach(({ latent }, t) => {
        for (let j = 0; j < width; j++) mixed[j] += p[t] * latent[j];
      });
      const values = linear(up, mixed, c.v_head_dim, h * rows + c.qk_nope_head_dim);
      output.set(values, h * c.v_head_dim);
      return p;
    });
    return { probs, y: linear(this.get("attn.wo.weight"), output, c.dim) };
  }

  feedForward(x, off) {
    const c = this.config;
    if (!this.isMoE) return { y: swigluFFN(this.ffnWeights("ffn"), x, c.inter_dim) };
    const logits = linear(this.get("ffn.gate.weight"), x, c.n_routed_experts);
    const routing = route(logits, this.get("ffn.gate.bias"), c, off);
    const shared = c.n_shared_experts * c.moe_inter_dim;
    let y = shared ? swigluFFN(this.ffnWeights("ffn.shared_experts"), x, shared) : new Float32Array(c.dim);
    const experts = this.ffnWeights("ffn.experts");
    routing.chosen.forEach((expert, k) => {
      const part = swigluFFN(experts, x, c.moe_inter_dim, expert);
      y = y.map((value, i) => value + routing.weights[k] * part[i]);
    });
    return { y, routing };
  }

  /** Return the residual stream after the block, and what happened inside. */
  step(x, position, off) {
    const eps = this.config.norm_eps;
    const attention = this.attend(rmsNorm(x, this.get("attn_norm.weight"), eps), position);
    const middle = add(x, attention.y);
    const ffn = this.feedForward(rmsNorm(middle, this.get("ffn_norm.weight"), eps), off);
    return {
      x: add(middle, ffn.y), cached: this.cache.at(-1), probs: attention.probs,
      attended: attention.y, fed: ffn.y, routing: ffn.routing,
    };
  }
}

function dot(x, y) {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] * y[i];
  return sum;
}

// ── The model ──

export class Model {
  /** config: fields of Config, freqs and softmax_scale. tensors: Map of name → Float32Array. */
  constructor(config, tensors) {
    Object.assign(this, { config, tensors });
    this.off = new Map(); // name of a MoE layer → Set of experts that may not be chosen
    this.reset();
  }

  reset() {
    const { config, tensors } = this;
    const block = (prefix) => new Block(tensors, prefix, config);
    this.layers = Array.from({ length: config.n_layers }, (_, i) => block(`layers.${i}.`));
    this.mtp = config.n_mtp_layers ? block("mtp.0.block.") : null;
    this.last = null; // the trace of the last token
    this.length = 0;
  }

  embed(token) {
    const { dim } = this.config;
    return this.tensors.get("embed.weight").slice(token * dim, (token + 1) * dim);
  }

  head(hidden) {
    return linear(this.tensors.get("head.weight"), hidden, this.config.vocab_size);
  }

  /** Read one token; return its trace: embedding, layers, logits of the next token, the draft. */
  step(token) {
    const draft = this.last && this.mtp ? this.predictAhead(this.last.hidden, token) : null;
    const position = this.length++, embedding = this.embed(token);
    let x = embedding;
    const layers = this.layers.map((layer) => {
      const trace = layer.step(x, position, this.off.get(layer.prefix));
      x = trace.x;
      return trace;
    });
    const hidden = rmsNorm(x, this.tensors.get("norm.weight"), this.config.norm_eps);
    this.last = { token, position, embedding, layers, hidden, logits: this.head(hidden), draft };
    return this.last;
  }

  /** Predict the token after `token` from the hidden state before it (eq. 21–23). */
  predictAhead(hidden, token) {
    const { config, tensors } = this, get = (name) => tensors.get(`mtp.0.${name}`);
    const pair = new Float32Array(2 * config.dim);
    pair.set(rmsNorm(this.embed(token), get("enorm.weight"), config.norm_eps));
    pair.set(rmsNorm(hidden, get("hnorm.weight"), config.norm_eps), config.dim);
    const x = linear(get("eh_proj.weight"), pair, config.dim);
    const trace = this.mtp.step(x, this.length - 1, this.off.get(this.mtp.prefix));
    const normed = rmsNorm(trace.x, get("norm.weight"), config.norm_eps);
    return { ...trace, logits: this.head(normed) };
  }
}

// ── Sampling ──

/** Return a generator of uniform numbers in [0, 1) with a seed (mulberry32). */
export function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** Return the distribution at a temperature; at 0 all of it lies on the largest logit. */
export function distribution(logits, temperature) {
  if (temperature > 0) return softmax(Array.from(logits, (x) => x / temperature));
  const best = topK(logits, 1)[0];
  return Array.from(logits, (_, token) => (token === best ? 1 : 0));
}

export function sample(probs, random) {
  const total = probs.reduce((a, b) => a + b, 0);
  let rest = random() * total;
  for (let token = 0; token < probs.length; token++) {
    rest -= probs[token];
    if (rest < 0) return token;
  }
  return probs.findLastIndex((p) => p > 0);
}

/** Choose the next token from p, given a draft from q: accept it with probability min(1, p/q). */
export function verifyDraft(draft, q, p, random) {
  if (random() * q[draft] < p[draft]) return { token: draft, accepted: true };
  return { token: sample(p.map((value, i) => Math.max(value - q[i], 0)), random), accepted: false };
}
