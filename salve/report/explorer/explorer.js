// SPDX-License-Identifier: MIT
"use strict";
// The explorer of a run. Everything that it shows lies in the page itself; names are only ever set as text.
(async () => {
const data = JSON.parse(document.getElementById("data").textContent);
const classes = data.classes, latents = data.latents;
const byId = (id) => document.getElementById(id);

// -- the data

const LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%.()*+-;,=>?@^_`{|}~";
const DIGITS = new Uint8Array(128);
for (let i = 0; i < 85; i++) DIGITS[LETTERS.charCodeAt(i)] = i;

function bytes(text) {  // base 85: five letters for four bytes
  const rest = text.length % 5, whole = Math.ceil(text.length / 5), found = new Uint8Array(4 * whole);
  const view = new DataView(found.buffer), digit = (at) => at < text.length ? DIGITS[text.charCodeAt(at)] : 84;
  for (let i = 0, at = 0; i < whole; i++, at += 5) {
    view.setUint32(4 * i, (((digit(at) * 85 + digit(at + 1)) * 85 + digit(at + 2)) * 85 + digit(at + 3)) * 85 + digit(at + 4));
  }
  return rest ? found.subarray(0, found.length - 5 + rest) : found;
}

async function unpacked(text, type) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new type(await new Response(stream).arrayBuffer());
}

function halves(bits) {  // float16
  return Float32Array.from(bits, (b) => {
    const sign = b & 0x8000 ? -1 : 1, power = (b >> 10) & 31, rest = b & 1023;
    if (power === 31) return rest ? NaN : sign * Infinity;
    return sign * (power ? 2 ** (power - 15) * (1 + rest / 1024) : 2 ** -14 * (rest / 1024));
  });
}

const row = new Map(latents.latent.map((latent, i) => [latent, i]));
const means = latents.means ? halves(await unpacked(latents.means, Uint16Array)) : null;
const counts = latents.counts ? await unpacked(latents.counts, Uint32Array) : null;
const atlas = data.atlas;
const maps = atlas.maps ? await unpacked(atlas.maps, Uint8Array) : null;
const mapped = new Map((atlas.mapped || []).map((latent, i) => [latent, i]));
const suspects = new Map();
for (const one of latents.suspects) {
  if (!suspects.has(one.latent)) suspects.set(one.latent, []);
  suspects.get(one.latent).push(one);
}
const concepts = new Map();
for (const one of latents.concepts) {
  if (!concepts.has(one.latent)) concepts.set(one.latent, []);
  concepts.get(one.latent).push(one);
}

// -- edits behind a linear tail: y = b + Σ_j w_j s_j a_j, as Python has it

class Tail {
  static async read(head, rows) {
    const tail = new Tail();
    const [weight, bias, contributions, planes, low, step] = await Promise.all([
      unpacked(head.weight, Float32Array), unpacked(head.bias, Float32Array),
      unpacked(head.contributions, Float32Array), unpacked(rows.planes, Uint8Array),
      unpacked(rows.low, Float64Array), unpacked(rows.step, Float64Array),
    ]);
    tail.C = bias.length;
    tail.M = low.length;
    tail.N = rows.images.length;
    tail.original = weight;  // [C, M] in the order of the network
    tail.images = rows.images;
    tail.labels = rows.labels;
    const { C, M, N } = tail;
    tail.bias = Float64Array.from(head.order, (k) => bias[k]);
    tail.weight = new Float64Array(C * M);  // [C, M], the data's classes first
    head.order.forEach((k, i) => tail.weight.set(weight.subarray(k * M, (k + 1) * M), i * M));
    tail.rows = new Float64Array(M * N);  // [M, N]
    const size = M * N;
    for (let j = 0; j < M; j++) {
      for (let n = 0, at = j * N; n < N; n++, at++) {
        const level = planes[at] * 65536 + planes[size + at] * 256 + planes[2 * size + at];
        tail.rows[at] = low[j] + step[j] * level;
      }
    }
    tail.contributions = contributions;  // [L, M]
    tail.perLatent = new Map();
    tail.before = tail.logits([]);
    tail.predicted = tail.predictions(tail.before);
    return tail;
  }

  contribution(latent) {
    const i = row.get(latent);
    return this.contributions.subarray(i * this.M, (i + 1) * this.M);
  }

  sizes(latent) {  // |c|, and its channels from the largest on
    if (!this.perLatent.has(latent)) {
      const size = Float64Array.from(this.contribution(latent), Math.abs);
      const order = Array.from(size.keys()).sort((a, b) => size[b] - size[a]);
      this.perLatent.set(latent, { size, order });
    }
    return this.perLatent.get(latent);
  }

  gate(edits) {
    const gate = new Float64Array(this.M).fill(1);
    for (const { latent, mode, alpha } of edits) {
      const { size } = this.sizes(latent);
      for (let j = 0; j < this.M; j++) {
        const push = size[j] > 0 ? alpha * size[j] : 0;
        gate[j] *= mode === "suppress" ? Math.max(0, 1 - push) : 1 + push;
      }
    }
    return gate;
  }

  // Add the channels' parts, times a factor each, to [C, N]; to two of them with factors of their own.
  add(channels, factors, level, slope, slopes) {
    const { C, M, N, rows, weight } = this;
    for (const j of channels) {
      const factor = factors(j), tilt = slope ? slopes(j) : 0;
      if (factor === 0) continue;
      for (let k = 0; k < C; k++) {
        const w = weight[k * M + j] * factor, q = w * tilt;
        if (w === 0) continue;
        let to = k * N, from = j * N;
        const end = from + N;
        if (slope) {
          for (; from < end; from++, to++) { const a = rows[from]; level[to] += w * a; slope[to] += q * a; }
        } else {
          for (; from < end; from++, to++) level[to] += w * rows[from];
        }
      }
    }
  }

  fromBias() {
    const found = new Float64Array(this.C * this.N);
    for (let k = 0; k < this.C; k++) found.fill(this.bias[k], k * this.N, (k + 1) * this.N);
    return found;
  }

  logits(edits) {  // [C, N]
    const gate = this.gate(edits), found = this.fromBias();
    this.add(gate.keys(), (j) => gate[j], found);
    return found;
  }

  predictions(logits) {
    const { C, N } = this, best = new Int32Array(N), top = logits.slice(0, N);
    for (let k = 1; k < C; k++) {
      for (let n = 0, at = k * N; n < N; n++, at++) if (logits[at] > top[n]) { top[n] = logits[at]; best[n] = k; }
    }
    return best;
  }
}

// One latent of an edit whose strength moves while the others stay. Behind a linear tail a logit is P − α Q over the
// channels that are open at α (P + α Q where it enhances). P and Q are kept at every STRIDE-th number of closed channels,
// so that a step of α, however long, costs half as many channels at most.
const STRIDE = 32;

class Moving {
  constructor(tail, edits, at) {
    const { size, order } = tail.sizes(edits[at].latent);
    Object.assign(this, { tail, size, order, mode: edits[at].mode, key: Moving.key(edits, at) });
    this.others = tail.gate(edits.filter((_, i) => i !== at));
    const length = tail.C * tail.N;
    this.found = new Float64Array(length);
    this.level = tail.fromBias();
    this.slope = new Float64Array(length);
    this.kept = new Map();
    this.criticals = new Map();
    const suppress = this.mode === "suppress";
    for (let to = order.length; to > 0;) {  // from the channels that stay open longest
      if (suppress) this.kept.set(to, [this.level.slice(), this.slope.slice()]);
      const from = Math.floor((to - 1) / STRIDE) * STRIDE;
      this.open(order.slice(from, to));
      to = from;
    }
    if (suppress) this.kept.set(0, [this.level.slice(), this.slope.slice()]);
    this.closed = 0;
  }

  open(channels, by = 1) {
    this.tail.add(channels, (j) => by * this.others[j], this.level, this.slope, (j) => this.size[j]);
  }

  static key(edits, at) {
    return JSON.stringify([edits[at].latent, edits[at].mode, edits.filter((_, i) => i !== at).map((e) => [e.latent, e.mode, String(e.alpha)])]);
  }

  closedAt(alpha) {  // how many channels are closed, the largest first
    let low = 0, high = this.order.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (alpha * this.size[this.order[middle]] >= 1) low = middle + 1; else high = middle;
    }
    return low;
  }

  logits(alpha) {
    const { order } = this;
    let by = alpha;
    if (this.mode === "suppress") {
      const closed = this.closedAt(alpha);
      if (closed !== this.closed) {
        const low = Math.floor(closed / STRIDE) * STRIDE, high = Math.min(low + STRIDE, order.length);
        this.closed = closed - low < high - closed ? low : high;
        const [level, slope] = this.kept.get(this.closed);
        this.level.set(level);
        this.slope.set(slope);
        if (closed > this.closed) this.open(order.slice(this.closed, closed), -1);
        else this.open(order.slice(closed, this.closed));
        this.closed = closed;
      }
      by = alpha === Infinity ? 0 : -alpha;  // what is open at ∞ has c = 0
    }
    const { level, slope, found } = this;
    for (let i = 0; i < found.length; i++) found[i] = level[i] + by * slope[i];
    return found;
  }

  // The smallest strength at which an image is no longer predicted as `wanted`; null if it never is, or at none.
  critical(n, wanted) {
    if (!this.criticals.has(n)) this.criticals.set(n, this.crossing(n, wanted));
    return this.criticals.get(n);
  }

  crossing(n, wanted) {
    const { tail, size, others, order, mode } = this, { C, M, N, rows, weight, bias } = tail;
    const level = Float64Array.from(bias), slope = new Float64Array(C), gated = new Float64Array(M);
    for (let j = 0; j < M; j++) {
      const a = gated[j] = others[j] * rows[j * N + n];
      if (a === 0) continue;
      for (let k = 0; k < C; k++) { const w = weight[k * M + j] * a; level[k] += w; slope[k] += w * size[j]; }
    }
    let own = 0;
    for (let k = 1; k < C; k++) if (level[k] > level[own]) own = k;
    if (own !== wanted) return null;
    const first = (from, to) => {
      let best = Infinity;
      for (let k = 0; k < C; k++) {
        if (k === own) continue;
        const lead = level[own] - level[k], fall = (slope[own] - slope[k]) * (mode === "suppress" ? 1 : -1);
        if (fall > 0) best = Math.min(best, Math.max(from, lead / fall));
      }
      return best <= to ? best : null;
    };
    if (mode === "enhance") return first(0, Number.MAX_VALUE);
    let from = 0;
    for (const j of order) {
      if (size[j] === 0) break;
      const to = 1 / size[j], found = first(from, to);
      if (found !== null) return found;
      const a = gated[j];
      for (let k = 0; k < C; k++) { const w = weight[k * M + j] * a; level[k] -= w; slope[k] -= w * size[j]; }
      from = to;
    }
    for (let k = 0; k < C; k++) if (k !== own && level[k] > level[own] + 1e-9) return from;
    return null;
  }
}

// -- the edit file: as salve-edit reads it, with the checksum of the network that it makes

const K = new Uint32Array(64), START = new Uint32Array(8);
(() => {  // the first bits of the roots of the first primes
  let found = 0;
  for (let p = 2; found < 64; p++) {
    let prime = true;
    for (let q = 2; q * q <= p; q++) if (p % q === 0) { prime = false; break; }
    if (!prime) continue;
    const bits = (x) => Math.floor((x - Math.floor(x)) * 2 ** 32);
    if (found < 8) START[found] = bits(Math.sqrt(p));
    K[found++] = bits(Math.cbrt(p));
  }
})();

function sha256(message) {  // hex; the browser's own is not there in every context
  const blocks = Math.ceil((message.length + 9) / 64), padded = new Uint8Array(blocks * 64);
  padded.set(message);
  padded[message.length] = 128;
  const view = new DataView(padded.buffer), h = START.slice(), w = new Uint32Array(64);
  view.setUint32(padded.length - 8, Math.floor(message.length / 2 ** 29));
  view.setUint32(padded.length - 4, message.length << 3);
  const turn = (x, n) => (x >>> n) | (x << (32 - n));
  for (let at = 0; at < padded.length; at += 64) {
    for (let t = 0; t < 16; t++) w[t] = view.getUint32(at + 4 * t);
    for (let t = 16; t < 64; t++) {
      const x = w[t - 15], y = w[t - 2];
      w[t] = w[t - 16] + w[t - 7] + (turn(x, 7) ^ turn(x, 18) ^ (x >>> 3)) + (turn(y, 17) ^ turn(y, 19) ^ (y >>> 10));
    }
    let [a, b, c, d, e, f, g, i] = h;
    for (let t = 0; t < 64; t++) {
      const one = (i + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + K[t] + w[t]) | 0;
      const two = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      i = g; g = f; f = e; e = (d + one) | 0; d = c; c = b; b = a; a = (one + two) | 0;
    }
    [a, b, c, d, e, f, g, i].forEach((value, t) => { h[t] += value; });
  }
  return Array.from(h, (value) => value.toString(16).padStart(8, "0")).join("");
}

const ascii = (text) => Uint8Array.from(text, (letter) => letter.charCodeAt(0));

function quoted(text) {  // as Python's json writes it
  return JSON.stringify(text).replace(/[^ -~]/g, (letter) => "\\u" + letter.charCodeAt(0).toString(16).padStart(4, "0"));
}

function checksum(weights) {
  return sha256(ascii("{" + Object.keys(weights).sort().map((name) => `${quoted(name)}:${quoted(weights[name])}`).join(",") + "}"));
}

function editedWeight(tail, edits) {  // in float32, operation by operation as Python does
  const { C, M } = tail, found = new Float32Array(C * M), round = Math.fround;
  const gates = edits.map(({ latent, mode, alpha }) => {
    const strength = round(alpha);
    return tail.contribution(latent).map((c) => {
      const push = c === 0 ? 0 : round(strength * Math.abs(c));
      return mode === "suppress" ? Math.max(0, round(1 - push)) : round(1 + push);
    });
  });
  for (let j = 0; j < M; j++) {
    const factor = gates.map((gate) => gate[j]).sort((a, b) => a - b).reduce((product, gate) => round(product * gate), 1);
    for (let k = 0; k < C; k++) found[k * M + j] = round(tail.original[k * M + j] * factor);
  }
  return found;
}

function editFile(tail, edits) {
  const { shape, weights, scale, channels, ...file } = data.tail.file;
  const [reader] = Object.keys(file.readers), edited = editedWeight(tail, edits);
  const prefix = ascii(`|torch.float32|(${shape.join(", ")})|`), message = new Uint8Array(prefix.length + edited.byteLength);
  message.set(prefix);
  message.set(new Uint8Array(edited.buffer), prefix.length);
  const after = checksum({ ...weights, [reader]: sha256(message).slice(0, 32) });
  if (after === file.before) return null;
  const text = (vector) => btoa(String.fromCharCode(...new Uint8Array(vector.slice().buffer)));
  return {
    ...file,
    name: named(edits),
    edits: edits.map(({ latent, mode, alpha }) => ({
      latent, alpha: alpha === Infinity ? "inf" : alpha, mode, scale, channels, sign: latents.sign[row.get(latent)],
    })),
    contributions: edits.map(({ latent }) => text(tail.contribution(latent))),
    after,
  };
}

const named = (edits) => edits.map(({ latent, mode, alpha }) => `${latent}${mode[0]}${alpha === Infinity ? "inf" : alpha}`).join(" ");

// -- the state, which the address bar holds

const state = { edits: [], latent: null, find: "", class: "", kind: "", sort: "own" };

function toFragment() {
  const said = new URLSearchParams();
  if (changing().length) said.set("edit", changing().map((e) => `${e.latent}${e.mode[0]}${e.alpha === Infinity ? "inf" : e.alpha}`).join(","));
  said.set("latent", state.latent);
  for (const name of ["find", "class", "kind"]) if (state[name]) said.set(name, state[name]);
  if (state.sort !== "own") said.set("sort", state.sort);
  return "#" + said.toString();
}

function fromFragment() {
  const said = new URLSearchParams(location.hash.slice(1));
  const edits = [];
  for (const text of (said.get("edit") || "").split(",")) {
    const found = /^(\d+)([se])(inf|[\d.]+(?:e[-+]?\d+)?)$/.exec(text);
    if (!found || !row.has(Number(found[1])) || edits.some((e) => e.latent === Number(found[1]))) continue;
    const mode = found[2] === "s" ? "suppress" : "enhance", alpha = found[3] === "inf" ? Infinity : Number(found[3]);
    if (!(alpha >= 0) || (mode === "enhance" && alpha === Infinity)) continue;
    edits.push({ latent: Number(found[1]), mode, alpha });
  }
  state.edits = edits;
  const latent = said.has("latent") ? Number(said.get("latent")) : NaN;
  state.latent = row.has(latent) ? latent : edits.length ? edits[0].latent : sorted("own")[0];
  for (const name of ["find", "class", "kind"]) state[name] = said.get(name) || "";
  state.sort = said.get("sort") || "own";
}

let waiting = 0;
function keep() {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (location.hash === toFragment()) return;
    try { history.replaceState(null, "", toFragment()); } catch { location.replace(toFragment()); }
  }, 120);
}

const changing = () => state.edits.filter((edit) => edit.alpha > 0);

// -- words

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const percent = (share, digits = 0) => Number.isFinite(share) ? (100 * share).toFixed(digits) + "\u00a0%" : "–";
const sig = (value, digits = 3) => value === null || value === undefined ? "–" : value === Infinity ? "∞" : String(Number(value.toPrecision(digits))).replace("-", "−");
const sign = (latent) => latents.sign[row.get(latent)] < 0 ? "−" : "+";
const SHAPES = { "class-defining": "●", "cross-class": "◆", diffuse: "○", dead: "×" };

function describe(latent) {  // who it is, in a few words
  const i = row.get(latent), said = [];
  if (suspects.has(latent)) said.push("suspect of " + suspects.get(latent).map((one) => classes[one.class]).join(", "));
  if (latents.owner[i] >= 0) said.push(classes[latents.owner[i]] + "’s own");
  if (said.length) return said.join("; ");
  if (latents.dead[i]) return "never fires";
  if (latents.kind[i] === "cross-class") return latents.classes[i].map((k) => classes[k]).join(" + ");
  return latents.top[i] >= 0 ? classes[latents.top[i]] : latents.kind[i];
}

// -- latents

function order(sort) {
  const key = {
    number: (i) => latents.latent[i], mean: (i) => -Math.abs(latents.mean[i]), share: (i) => -latents.share[i],
    purity: (i) => -(latents.purity[i] ?? -1), frequency: (i) => -latents.frequency[i],
    own: (i) => {
      const latent = latents.latent[i];
      if (suspects.has(latent)) return -2e6 - suspects.get(latent)[0].score;
      return latents.owner[i] >= 0 ? -1e6 + latents.owner[i] : -Math.abs(latents.mean[i]);
    },
  }[sort] || ((i) => latents.latent[i]);
  return Array.from(latents.latent.keys()).sort((a, b) => key(a) - key(b) || a - b);
}
const sorted = (sort) => order(sort).map((i) => latents.latent[i]);

function fits(i) {
  const latent = latents.latent[i], wanted = state.find.trim().toLowerCase();
  if (state.kind === "own" ? latents.owner[i] < 0 : state.kind === "suspect" ? !suspects.has(latent)
    : state.kind === "dead" ? !latents.dead[i] : state.kind && latents.kind[i] !== state.kind) return false;
  const of = new Set([latents.top[i], latents.owner[i], ...latents.classes[i], ...(suspects.get(latent) || []).map((one) => one.class)]);
  if (state.class && !of.has(classes.indexOf(state.class))) return false;
  if (!wanted) return true;
  const words = [String(latent), latents.kind[i], ...[...of].map((k) => classes[k] || ""), ...(concepts.get(latent) || []).map((one) => one.concept)];
  return words.some((word) => word.toLowerCase().includes(wanted));
}

const entries = latents.latent.map((latent, i) => {
  const button = make("button", { type: "button" },
    make("span", { title: latents.kind[i] }, SHAPES[latents.dead[i] ? "dead" : latents.kind[i]] || "○"),
    make("span", { class: "number" }, String(latent)),
    make("span", { class: latents.dead[i] ? "name dead" : "name", title: describe(latent) }, describe(latent)),
    make("small", { class: "number", title: "largest class mean" }, sig(latents.mean[i], 2)));
  button.setAttribute("aria-label", `Latent ${latent}, ${latents.dead[i] ? "dead" : latents.kind[i]}, ${describe(latent)}`);
  button.addEventListener("click", () => choose(latent));
  return make("li", {}, button);
});

function showList() {
  const shown = order(state.sort).filter(fits);
  byId("list").replaceChildren(...shown.map((i) => entries[i]));
  byId("count").textContent = shown.length === latents.latent.length ? String(shown.length) : `${shown.length} of ${latents.latent.length}`;
  mark();
}

function mark() {
  entries.forEach((entry, i) => {
    if (latents.latent[i] === state.latent) entry.firstChild.setAttribute("aria-current", "true");
    else entry.firstChild.removeAttribute("aria-current");
  });
}

function choose(latent) {
  state.latent = latent;
  mark();
  showLatent();
  showEdits();
  redraw();
  keep();
}

// -- the chosen latent

function button(latent, extra = "") {
  const made = make("button", { type: "button" }, `${latent} (${sign(latent)})${extra}`);
  made.title = describe(latent);
  made.addEventListener("click", () => choose(latent));
  return made;
}

function picture(image, side) {
  const text = atlas.pictures && atlas.pictures[image];
  if (!text) return make("div", { class: "blank" }, String(image));
  return make("img", { src: "data:image/webp;base64," + text, alt: `test image ${image}`, width: side, height: side });
}

function spotlight(image, latent, rank) {  // dark where the latent does not look: no colour is needed
  const canvas = make("canvas", { width: 184, height: 184, role: "img" }), [, height, width] = atlas.shape;
  canvas.setAttribute("aria-label", `where latent ${latent} looks in test image ${image}`);
  const map = maps.subarray((mapped.get(latent) * atlas.shape[0] + rank) * height * width);
  const veil = new ImageData(width, height);
  for (let p = 0; p < height * width; p++) veil.data[4 * p + 3] = 215 * (1 - map[p] / 255);
  const small = make("canvas", { width, height });
  small.getContext("2d").putImageData(veil, 0, 0);
  const loaded = new Image();
  loaded.onload = () => {
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(loaded, 0, 0, 184, 184);
    pen.drawImage(small, 0, 0, 184, 184);
  };
  loaded.src = "data:image/webp;base64," + atlas.pictures[image];
  return canvas;
}

function strips(latent) {
  const top = atlas.top && atlas.top[latent];
  if (atlas.top && !top) return [make("p", { class: "soft" }, "No test image excites it.")];
  if (!top) return [make("p", { class: "soft" }, "No pictures: the stage report makes them where another stage runs, too.")];
  const figure = (shown, image, k, value) => make("figure", {}, shown, make("figcaption", {}, classes[k] || "–", make("br"), sig(value)));
  const found = [make("div", { class: "strip" }, ...top.map(([image, k, value]) => figure(picture(image, 92), image, k, value)))];
  const places = maps && mapped.has(latent) ? top.slice(0, atlas.shape[0]).map((one, rank) => [one[0], rank]).filter(([image]) => atlas.pictures[image]) : [];
  if (places.length) {
    found.push(make("p", { class: "soft" }, data.map.kind === "own" ? "Lit where the latent is large (its own map):" : "Lit where the latent comes from (Grad-FAM):"));
    found.push(make("div", { class: "strip" }, ...places.map(([image, rank]) => make("figure", {}, spotlight(image, latent, rank)))));
  } else if (data.map.why_none) found.push(make("p", { class: "soft" }, "No maps: " + data.map.why_none));
  return found;
}

function classMeans(i) {
  const all = classes.map((name, k) => [name, means[i * classes.length + k]]);
  const large = Math.max(...all.map(([, mean]) => Math.abs(mean) || 0), 1e-12);
  const shown = classes.length > 12 ? all.slice().sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 12) : all;
  const list = make("div", { class: "means" });
  for (const [name, mean] of shown) {
    const bar = make("i", { class: mean < 0 ? "minus" : "" });
    const width = 50 * Math.abs(mean || 0) / large;
    bar.style.width = width + "%";
    bar.style.left = (mean < 0 ? 50 - width : 50) + "%";
    list.append(make("span", { class: "name", title: name }, name), make("span", { class: "bar" }, bar), make("span", { class: "number" }, sig(mean)));
  }
  return list;
}

function histogram(i) {
  const bins = latents.edges.length + 1, own = counts.subarray(i * bins, (i + 1) * bins), most = Math.max(...own, 1);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const add = (tag, attributes, text) => {
    const made = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    svg.append(made);
  };
  svg.setAttribute("viewBox", "0 0 420 84");
  svg.setAttribute("class", "histogram");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Sizes of the latent where it fires, in shares of the activation's length; at most ${most} images in a bin`);
  own.forEach((count, b) => {
    const height = count ? Math.max(1.5, 62 * count / most) : 0;
    add("rect", { x: (420 * b / bins + 0.5).toFixed(1), y: (66 - height).toFixed(1), width: (420 / bins - 1).toFixed(1), height: height.toFixed(1) });
  });
  add("line", { x1: 0, x2: 420, y1: 66.5, y2: 66.5 });
  latents.edges.forEach((edge, b) => {
    const power = Math.log10(edge);
    if (Math.abs(power - Math.round(power)) < 1e-6) add("text", { x: 420 * (b + 1) / bins, y: 80, "text-anchor": b + 1 < bins / 12 ? "start" : b + 1 > bins * 11 / 12 ? "end" : "middle" }, String(Number(edge.toPrecision(1))));
  });
  return svg;
}

function showLatent() {
  const latent = state.latent, i = row.get(latent), parts = [];
  parts.push(make("h2", {}, `Latent ${latent} (${sign(latent)}) `, make("small", {}, describe(latent))));
  const facts = make("ul", { class: "facts" });
  const fact = (name, value, title) => facts.append(make("li", { title: title || "" }, name + " ", make("b", {}, value)));
  fact("kind", (SHAPES[latents.kind[i]] || "") + " " + latents.kind[i]);
  fact("density", percent(latents.frequency[i], 1), "share of the train images for which it fires");
  fact("purity", percent(latents.purity[i]), "share of the images that excite it most that are of one class");
  fact("share of its class", percent(latents.share[i]), "the largest share that one class has of its absolute class means");
  fact("entropy", sig(latents.entropy[i]) + " nats", "of its activation over the classes");
  parts.push(facts);
  for (const one of suspects.get(latent) || []) {
    const said = [`Suspect ${one.rank} of ${classes[one.class]}: effect ${sig(one.effect)}, lift ${sig(one.lift)}×`];
    if (one.separation !== undefined) said.push(`separation ${sig(one.separation)}${one.value ? ` (${one.value})` : ""}`);
    if (one.off_object !== undefined) said.push(`${percent(one.off_object)} of its map off the object`);
    if (one.counterfactual !== undefined) said.push(`undoes ${percent(one.counterfactual)} of what the mark turns`);
    parts.push(make("p", { class: "suspect" }, said.join(", ") + "."));
  }
  if (concepts.has(latent)) {
    parts.push(make("p", {}, "Best detector of " + concepts.get(latent).map((one) => `${one.concept} (AUROC ${sig(one.auroc)})`).join(", ") + "."));
  }
  parts.push(make("h3", {}, "Test images that excite it most"), ...strips(latent));
  if (means) parts.push(make("h3", {}, "Class means ", make("small", {}, classes.length > 12 ? "the 12 largest of " + classes.length + ", of train images" : "of train images")), classMeans(i));
  if (counts) parts.push(make("h3", {}, "Size where it fires ", make("small", {}, "in shares of the activation’s length")), histogram(i));
  if (latents.nearest[i].length) {
    parts.push(make("h3", {}, "Nearest latents ", make("small", {}, "cosine of the decoder’s columns")),
      make("p", { class: "chips" }, ...latents.nearest[i].map(([other, cosine]) => button(other, " " + sig(cosine, 2)))));
  }
  byId("latent").replaceChildren(...parts);
}

// -- what an edit does, behind a linear tail

const tail = data.tail ? await Tail.read(data.tail, data.activations) : null;
const STOPS = 400, strongest = data.strongest || 1;
// Stops get denser towards zero; the last one is ∞, which only suppressing has.
const alphaAt = (stop, mode) => stop >= STOPS && mode === "suppress" ? Infinity : Number((strongest * (Math.min(stop, STOPS - 1) / (STOPS - 1)) ** 2).toPrecision(3));
const stopOf = (alpha) => alpha === Infinity ? STOPS : Math.min(STOPS - 1, Math.round((STOPS - 1) * Math.sqrt(alpha / strongest)));
const place = (alpha) => 100 * Math.min(STOPS, (STOPS - 1) * Math.sqrt(Math.min(alpha, strongest * 2) / strongest)) / STOPS;
let moving = null, active = null;

function rows() {  // the edits, and the chosen latent, which becomes one when it is moved
  return state.edits.some((edit) => edit.latent === state.latent) ? state.edits : [...state.edits, { latent: state.latent, mode: "suppress", alpha: 0 }];
}

function prepare(latent) {  // before the slider moves, so that its first step is as fast as the others
  active = latent;
  const edits = rows().filter((edit) => edit.alpha > 0 || edit.latent === latent), at = edits.findIndex((edit) => edit.latent === latent);
  if (at < 0) return;
  if (!moving || moving.key !== Moving.key(edits, at)) moving = new Moving(tail, edits, at);
}

function change(latent, what) {
  let edit = state.edits.find((one) => one.latent === latent);
  if (!edit) state.edits.push(edit = { latent, mode: "suppress", alpha: 0 });
  Object.assign(edit, what);
  if (edit.mode === "enhance" && edit.alpha === Infinity) edit.alpha = strongest;
  active = latent;
  schedule();
}

let frame = 0;
function schedule() {
  if (!frame) frame = requestAnimationFrame(() => { frame = 0; redraw(); });
  keep();
}

const controls = new Map();
function showEdits() {
  if (!tail) return showTargets();
  const shown = rows().map((edit) => {
    const latent = edit.latent, slider = make("input", { type: "range", min: 0, max: STOPS, step: 1 });
    const number = make("input", { type: "text", inputMode: "decimal", size: 6 });
    const mode = make("select", {}, make("option", {}, "suppress"), make("option", {}, "enhance"));
    slider.setAttribute("aria-label", `Strength of latent ${latent}`);
    number.setAttribute("aria-label", `Strength of latent ${latent}, as a number or inf`);
    mode.setAttribute("aria-label", `What to do with latent ${latent}`);
    for (const event of ["pointerdown", "focus"]) slider.addEventListener(event, () => prepare(latent));
    slider.addEventListener("input", () => change(latent, { alpha: alphaAt(Number(slider.value), mode.value), mode: mode.value }));
    mode.addEventListener("change", () => change(latent, { mode: mode.value }));
    number.addEventListener("change", () => {
      const text = number.value.trim().toLowerCase(), value = /^(inf|∞|infinity)$/.test(text) ? Infinity : Number(text.replace(",", "."));
      if (text !== "" && value >= 0 && (value <= 1e30 || mode.value === "suppress")) change(latent, { alpha: value, mode: mode.value });
      else schedule();
    });
    const remove = make("button", { type: "button", title: "take it out of the edit" }, "×");
    remove.setAttribute("aria-label", `Take latent ${latent} out of the edit`);
    remove.addEventListener("click", () => {
      state.edits = state.edits.filter((one) => one.latent !== latent);
      showEdits();
      redraw();
      keep();
    });
    const name = button(latent);
    name.className = "name";
    controls.set(latent, { slider, number, mode });
    return make("div", { class: "edit" }, mode, name, make("span", { class: "strength" }, "α", number), remove, make("div", { class: "slide" }, slider));
  });
  byId("edits").replaceChildren(...shown);
}

function follow() {
  for (const edit of rows()) {
    const shown = controls.get(edit.latent);
    if (!shown) continue;
    shown.mode.value = edit.mode;
    if (document.activeElement !== shown.slider || Number(shown.slider.value) !== stopOf(edit.alpha)) shown.slider.value = stopOf(edit.alpha);
    shown.number.value = edit.alpha === Infinity ? "inf" : String(edit.alpha);
    shown.slider.setAttribute("aria-valuetext", edit.alpha === Infinity ? "infinite" : String(edit.alpha));
  }
}

const grid = data.grid || {}, measured = grid.matrices || {};
const beyond = tail ? tail.C > classes.length : Object.values(measured).some((cells) => cells.some(([, m]) => m === classes.length));
const names = beyond ? [...classes, "another output"] : classes;
const column = (k) => Math.min(k, names.length - 1);
const MATRIX = 24;
let bars = [], cells = [], before = null;

function tally(predictions) {
  const matrix = names.map(() => new Float64Array(names.length));
  for (let n = 0; n < tail.N; n++) matrix[tail.labels[n]][column(predictions[n])]++;
  return matrix;
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

function build() {
  before = tally(tail.predicted);
  byId("accuracies").replaceChildren(...classes.map((name, k) => {
    const now = make("i"), was = make("b"), text = make("td", { class: "number" }), by = make("td", { class: "number" });
    was.style.left = 100 * before[k][k] / sum(before[k]) + "%";
    bars.push({ now, text, by });
    return make("tr", {}, make("th", { scope: "row", title: name }, name), make("td", { class: "bar" }, make("div", {}, now, was)), text, by);
  }));
  buildMatrix();
}

function buildMatrix() {
  if (classes.length > MATRIX) return;
  const head = make("tr", {}, make("th", { class: "row" }, make("small", {}, "true \\ predicted")), ...names.map((name, k) => make("th", { scope: "col", title: name }, String(k + 1))));
  const body = classes.map((name, k) => make("tr", {}, make("th", { class: "row", scope: "row", title: name }, `${k + 1} ${name}`), ...names.map((other, m) => {
    const text = make("span"), cell = make("td", { class: k === m ? "own" : "", title: `${name}, predicted as ${other}` }, text);
    cells.push({ cell, text, k, m, shown: null });
    return cell;
  })));
  byId("confusion").replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
}

function showAccuracies(matrix) {
  classes.forEach((_, k) => {
    const total = sum(matrix[k]), now = matrix[k][k] / total, was = before[k][k] / total, { now: bar, text, by } = bars[k];
    const scaled = `scaleX(${now.toFixed(4)})`;
    if (bar.style.transform === scaled && text.textContent) return;
    bar.style.transform = scaled;
    text.textContent = percent(now);
    const points = Math.round(100 * (now - was));
    by.textContent = points ? (points < 0 ? `▼ ${-points}` : `▲ ${points}`) : "";
    by.className = points < 0 ? "number down" : "number up";
  });
}

function showConfusion(matrix) {
  for (const one of cells) {
    const count = matrix[one.k][one.m], was = before[one.k][one.m], key = count + "/" + was;
    if (one.shown === key) continue;
    one.shown = key;
    one.text.textContent = count ? String(count) : "";
    one.cell.style.setProperty("--v", count / sum(matrix[one.k]));
    one.cell.classList.toggle("more", count > was);
    one.cell.classList.toggle("less", count < was && count > 0);
  }
  if (classes.length <= MATRIX) return;
  const moved = [];
  matrix.forEach((of, k) => of.forEach((count, m) => { if (count !== before[k][m]) moved.push([k, m, before[k][m], count]); }));
  moved.sort((a, b) => Math.abs(b[3] - b[2]) - Math.abs(a[3] - a[2]));
  const line = ([k, m, was, now]) => make("tr", {}, make("th", { class: "row" }, names[k]), make("td", {}, "→"), make("th", { class: "row" }, names[m]), make("td", { class: "number" }, `${was} → ${now}`));
  byId("confusion").replaceChildren(...moved.slice(0, MATRIX).map(line));
}

const MOST = 24;
let lines = [];
function showChanged(changed) {
  byId("changes").textContent = changed.length ? `${changed.length}${changed.length > MOST ? `, the ${MOST} narrowest` : ", the narrowest first"}; ● where each changes as latent ${active} moves` : "none";
  while (lines.length < Math.min(MOST, changed.length)) {
    const line = { item: make("li"), picture: make("span"), what: make("div", { class: "what" }), track: make("div", { class: "track" }), at: make("i"), dot: make("b"), image: null };
    line.track.append(line.at, line.dot);
    line.item.append(line.picture, make("div", {}, line.what, line.track));
    lines.push(line);
  }
  const edit = rows().find((one) => one.latent === active);
  const shown = changed.slice(0, MOST);
  shown.forEach(({ n, from, to, by }, i) => {
    const line = lines[i], image = tail.images[n];
    if (line.image !== image) {
      line.image = image;
      const one = picture(image, 44);
      line.picture.replaceWith(one);
      line.picture = one;
    }
    const at = moving ? moving.critical(n, from) : null;
    const text = `${names[column(from)]} → ${names[column(to)]} by ${sig(by, 2)}` + (at === null ? "; by the other latents alone" : `; from α = ${sig(at)} on`) + (tail.labels[n] === to ? "; now right" : tail.labels[n] === from ? "" : "; wrong before");
    if (line.what.textContent !== text) line.what.textContent = text;
    line.at.style.left = place(edit ? edit.alpha : 0) + "%";
    line.dot.className = at === null ? "never" : "";
    if (at !== null) line.dot.style.left = place(at) + "%";
  });
  const list = byId("changed");
  while (list.children.length > shown.length) list.lastChild.remove();
  for (let i = list.children.length; i < shown.length; i++) list.append(lines[i].item);
}

function redraw() {
  if (!tail) return redrawTarget();
  const edits = changing();
  if (active === null || !rows().some((edit) => edit.latent === active)) active = edits.length ? edits[edits.length - 1].latent : state.latent;
  if (edits.length) prepare(active);
  else (window.requestIdleCallback || setTimeout)(() => { if (!changing().length) prepare(state.latent); });
  const edit = rows().find((one) => one.latent === active);
  const logits = edits.length && moving && edit ? moving.logits(edit.alpha) : tail.before;
  const predictions = edits.length ? tail.predictions(logits) : tail.predicted, { N } = tail, changed = [];
  for (let n = 0; n < N; n++) {
    const from = tail.predicted[n], to = predictions[n];
    if (from !== to) changed.push({ n, from, to, by: logits[to * N + n] - logits[from * N + n] });
  }
  changed.sort((a, b) => a.by - b.by);
  const matrix = tally(predictions), right = sum(classes.map((_, k) => matrix[k][k])), was = sum(classes.map((_, k) => before[k][k]));
  byId("total").textContent = edits.length
    ? `${percent(right / N, 1)} right instead of ${percent(was / N, 1)}; ${changed.length} of ${N} images change.`
    : `${percent(was / N, 1)} of ${N} test images right. Move the slider to turn the latent down.`;
  byId("save").disabled = !edits.length;
  follow();
  showAccuracies(matrix);
  showConfusion(matrix);
  showChanged(changed);
}

function save() {
  const edits = changing(), file = editFile(tail, edits);
  if (!file) {
    byId("saved").textContent = "This edit changes no weight of the network, so there is nothing to save.";
    return;
  }
  const name = `explorer-${named(edits).replace(/[^0-9a-z.]+/g, "-").slice(0, 80)}.json`;
  const link = make("a", { href: URL.createObjectURL(new Blob([JSON.stringify(file, null, 2) + "\n"], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  byId("saved").replaceChildren("Saved as ", make("code", {}, name), ". Move it into the run’s folder ", make("code", {}, "edits/"), ", beside the weights that it needs, then: ",
    make("code", {}, `salve-edit apply <folder of the run> --edit ${name} --out edited.safetensors`));
}

// -- what was measured, elsewhere

let target = null, stop = 0;
const strength = (one, i) => one.infinite[i] ? Infinity : one.alpha[i];

function showTargets() {
  if (!grid.targets || !grid.targets.length) return byId("edits").replaceChildren();
  const mine = latents.owner[row.get(state.latent)];
  const own = mine >= 0 ? grid.targets.findIndex((one) => one.target === classes[mine]) : -1;
  if (target === null || own >= 0) target = Math.max(own, 0);
  const slider = make("input", { type: "range", min: 0, max: grid.targets[target].alpha.length - 1, step: 1, value: stop });
  slider.setAttribute("aria-label", "Measured strength");
  const choice = make("select", {}, ...grid.targets.map((one, i) => make("option", { value: i }, `${one.mode} ${one.target}`)));
  choice.setAttribute("aria-label", "What was edited");
  choice.value = target;
  stop = Math.min(stop, grid.targets[target].alpha.length - 1);
  choice.addEventListener("change", () => { target = Number(choice.value); slider.max = grid.targets[target].alpha.length - 1; stop = Math.min(stop, slider.max); redraw(); });
  slider.addEventListener("input", () => { stop = Number(slider.value); redraw(); });
  byId("edits").replaceChildren(make("div", { class: "edit" }, choice, make("span"), make("span", { class: "strength", id: "measured" }), make("span"), make("div", { class: "slide" }, slider)));
}

function matrixOf(target) {
  const matrix = names.map(() => new Float64Array(names.length));
  for (const [k, m, count] of measured[target]) matrix[k][m] = count;
  return matrix;
}

function showMeasured(one) {  // the confusion matrix, where there is one: without an edit, and at the strength chosen
  if (!before) return;
  const known = one.chosen !== undefined, shown = stop === 0 || stop === one.chosen;
  byId("confusion").hidden = !shown;
  if (shown) showConfusion(stop === 0 ? before : matrixOf(one.target));
  const jump = (to, text) => {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", () => { stop = to; showTargets(); redraw(); });
    return button;
  };
  const there = known ? [jump(0, "without the edit"), " ", jump(one.chosen, `at α = ${sig(strength(one, one.chosen))}, which was chosen`)] : [jump(0, "without the edit")];
  byId("matrix").replaceChildren("of all test images: ", ...there, known || one.mode !== "suppress" ? "" : "; edit.evaluate says of how many targets it is measured with the edit");
}

function redrawTarget() {
  byId("save").hidden = true;
  if (target === null) return;
  const one = grid.targets[target], alpha = strength(one, stop);
  byId("measured").textContent = `α = ${sig(alpha)}`;
  byId("total").textContent = `${one.target}: ${percent(one.accuracy[stop], 1)} right instead of ${percent(one.accuracy[0], 1)}, measured at α = ${sig(alpha)}.`;
  const line = (name, now, was) => {
    const bar = make("i"), tick = make("b"), points = Math.round(100 * (now - was));
    bar.style.transform = `scaleX(${now})`;
    tick.style.left = 100 * was + "%";
    return make("tr", {}, make("th", { scope: "row", title: name }, name), make("td", { class: "bar" }, make("div", {}, bar, tick)), make("td", { class: "number" }, percent(now)),
      make("td", { class: points < 0 ? "number down" : "number up" }, points ? (points < 0 ? `▼ ${-points}` : `▲ ${points}`) : ""));
  };
  const table = [line(one.target, one.accuracy[stop], one.accuracy[0])];
  for (const [key, name] of [["others_accuracy", "other classes, mean"], ["others_lowest", "the lowest of them"], ["others_highest", "the highest of them"]]) {
    if (one[key] && Number.isFinite(one[key][stop])) table.push(line(name, one[key][stop], one[key][0]));
  }
  byId("accuracies").replaceChildren(...table);
  showMeasured(one);
  const gone = one.mode === "suppress" ? (grid.images[one.target] || []).filter(([, at]) => at <= alpha).sort((a, b) => b[1] - a[1]) : [];
  byId("changes").textContent = gone.length ? `${gone.length} of this class, the narrowest first; ● where each changes` : one.mode === "suppress" ? "none of this class" : "not measured for enhancing";
  const limit = Math.max(...one.alpha, 1e-12), at = (value) => 100 * Math.sqrt(Math.min(value, limit) / limit) + "%";
  byId("changed").replaceChildren(...gone.slice(0, MOST).map(([image, critical]) => {
    const now = make("i"), dot = make("b");
    now.style.left = at(alpha);
    dot.style.left = at(critical);
    return make("li", {}, picture(image, 44), make("div", {}, make("div", { class: "what" }, `image ${image}: from α = ${sig(critical)} on`), make("div", { class: "track" }, now, dot)));
  }));
}

// -- begin

function showState() {
  byId("find").value = state.find;
  byId("class").value = state.class;
  byId("kind").value = state.kind;
  byId("sort").value = state.sort;
  controls.clear();
  showList();
  showLatent();
  showEdits();
  redraw();
}

byId("facts").textContent = [data.backbone, data.site && `site ${data.site}`, `${classes.length} classes`, `${latents.latent.length} latents`, tail && `${tail.N} test images`].filter(Boolean).join(" · ");
byId("verdict").replaceChildren(...data.verdict.map((text) => make("li", {}, text)));
byId("said").hidden = !data.verdict.length;
if (data.notes.length) byId("notes").querySelector("ul").replaceChildren(...data.notes.map((text) => make("li", {}, text)));
else byId("notes").hidden = true;
byId("class").append(...classes.map((name) => make("option", { value: name }, name)));
if (!latents.suspects.length) byId("kind").querySelector("option:nth-last-child(2)").remove();
if (tail) build();
else {
  byId("why").textContent = data.why;
  byId("why").hidden = false;
  byId("reset").hidden = true;
  if (measured[""]) {
    before = matrixOf("");
    buildMatrix();
  } else byId("confusion").closest("div").previousElementSibling.hidden = true;
  byId("accuracies").previousElementSibling.textContent = "Accuracy";
}
for (const [id, event] of [["find", "input"], ["class", "change"], ["kind", "change"], ["sort", "change"]]) {
  byId(id).addEventListener(event, () => { state[id] = byId(id).value; showList(); keep(); });
}
byId("list").addEventListener("keydown", (event) => {  // arrows walk through the list
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key], all = Array.from(byId("list").querySelectorAll("button")), at = all.indexOf(document.activeElement);
  if (!step || at < 0 || !all[at + step]) return;
  event.preventDefault();
  all[at + step].focus();
});
byId("reset").addEventListener("click", () => { state.edits = []; moving = null; active = null; byId("saved").textContent = ""; showEdits(); redraw(); keep(); });
byId("save").addEventListener("click", save);
addEventListener("hashchange", () => { if (location.hash !== toFragment()) { fromFragment(); showState(); } });
fromFragment();
showState();
// For tests and for the browser's console.
window.explorer = { data, state, tail, redraw, editFile: (edits) => editFile(tail, edits), moving: () => moving, Moving, showState };
performance.mark("ready");
document.documentElement.dataset.ready = "true";
})();
