// The pair that can be moved, and the highlighting of a term and its line of code. The mathematics is port.js.
"use strict";

// Two responses that share two tokens and part at the third. Tokens in one context share its logits.
const CONTEXTS = [[0], [1], [2, 5], [3], [4], [6], [7]];           // tokens by number, context by context
const SEGMENTS = {chosen: [[0, 1], [2], [3, 4]], rejected: [[0, 1], [5, 6, 7]]};
const START = {texts: ["It", "is", "56", "sure", "‹end›", "54", "sure", "‹end›"],
               ref: [0.6, 0.8, 0.3, 0.4, 0.8, 0.4, 0.4, 0.8], policy: null, view: "logps",
               chosen: [0.5, 1, 0.3], rejected: [0.5, 0.2], beta: 0.5, lam: 5, alpha: 0.5};
const PRESETS = {
  "at-the-start": {},
  "chosen-fell-too": {policy: [0.5, 0.7, 0.22, 0.35, 0.75, 0.06, 0.3, 0.7]},
  "one-token-differs": {policy: [0.45, 0.65, 0.33, 0.3, 0.75, 0.25, 0.4, 0.75], view: "logits",
                        chosen: [0.6, 1, 0.3], rejected: [0.4, 0.2]},
  "reward-0": {policy: [0.62, 0.82, 0.4, 0.4, 0.8, 0.25, 0.4, 0.8], rejected: [0.5, 0]},
  "which-beta": {policy: [0.6, 0.8, 0.6, 0.5, 0.85, 0.03, 0.3, 0.7], beta: 1},
  "noisy-label": {texts: ["It", "is", "54", "sure", "‹end›", "56", "sure", "‹end›"],
                  policy: [0.6, 0.8, 0.05, 0.3, 0.8, 0.9, 0.45, 0.85], ref: [0.6, 0.8, 0.4, 0.4, 0.8, 0.3, 0.4, 0.8]},
};
const KNOBS = {beta: ["β", 0.05, 2, 0.05], lam: ["λ (DPOP)", 0, 50, 0.5], alpha: ["α (TDPO2)", 0, 1, 0.05]};
const LOWEST = -5, HIGHEST = -0.05;                                 // of a log-probability slider

const $ = id => document.getElementById(id);
const text = (x, digits = 2) => Math.abs(x) < 0.5 * 10 ** -digits ? "0" :
  (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const plain = (x, digits = 3) => text(x, digits).replace("+", "");
let state = {}, texts = [];

// ---- Sliders: state[id] is the value of the slider with that id ----

function slider(id, name, spoken, [least, most, step], side = "") {
  return `<div class="slider ${side}"><label for="${id}">${name}</label><span class="track">
    <input type="range" id="${id}" min="${least}" max="${most}" step="${step}" aria-label="${spoken}"></span>
    <output for="${id}" id="${id}-out"></output></div>`;
}

function buildSliders() {
  const range = [LOWEST, HIGHEST, 0.01], side = i => i < 2 ? "" : i < 5 ? "chosen" : "rejected";
  const where = i => side(i) || "both responses";
  const rows = (kind, spoken) => [[0, 2], [2, 5], [5, 8]].map(([from, to]) => `<fieldset><legend class="${side(from)}">
    ${side(from) || "shared by both"}</legend>` + START.texts.slice(from, to).map((_, k) => slider(`${kind}${from + k}`,
    `<b data-token="${from + k}"></b>`, `${spoken} of token ${from + k + 1}, ${where(from + k)}`, range, side(from + k)))
    .join("") + "</fieldset>").join("");
  $("policy").innerHTML = rows("p", "log pi");
  $("reference").innerHTML = rows("q", "log pi ref");
  $("rewards").innerHTML = Object.entries(SEGMENTS).map(([side, segments]) => segments.map((tokens, k) =>
    slider(`${side}${k}`, tokens.map(i => `<b data-token="${i}"></b>`).join(" "),
           `reward of segment ${k + 1}, ${side}`, [0, 1, 0.05], side)).join("")).join("");
  $("knobs").innerHTML = Object.entries(KNOBS).map(([id, [name, ...range]]) => slider(id, name, id, range)).join("");
}

// Two tokens of one context compete: if both would have more than 99 %, the one that was not moved gives way.
function makeRoom(kind, moved) {
  for (const [a, b] of [[2, 5], [5, 2]])
    if (moved === `${kind}${a}` && Math.exp(state[kind + a]) + Math.exp(state[kind + b]) > 0.99)
      state[kind + b] = Math.max(LOWEST, Math.floor(100 * Math.log(0.99 - Math.exp(state[kind + a]))) / 100);
}

function choose(name) {
  const preset = {...START, ...PRESETS[name]};
  texts = preset.texts;
  preset.texts.forEach((_, i) => {
    state[`q${i}`] = Math.round(100 * Math.log(preset.ref[i])) / 100;
    state[`p${i}`] = preset.policy ? Math.round(100 * Math.log(preset.policy[i])) / 100 : state[`q${i}`];
  });
  for (const side of ["chosen", "rejected"]) preset[side].forEach((r, k) => { state[side + k] = r; });
  for (const id in KNOBS) state[id] = preset[id];
  $(`view-${preset.view}`).checked = true;
  for (const button of document.querySelectorAll("[data-preset]"))
    button.setAttribute("aria-pressed", button.dataset.preset === name);
  for (const p of document.querySelectorAll(".lesson")) p.hidden = p.id !== `lesson-${name}`;
  for (const b of document.querySelectorAll("[data-token]")) b.textContent = texts[b.dataset.token];
  render();
}

// ---- From the sliders to the losses ----

// The logits of a context: its tokens, and all others together in the reference's proportions. Their KL is
// then that of these few outcomes.
function contextLogits(kind, context) {
  const logps = CONTEXTS[context].map(i => state[kind + i]);
  return [...logps, Math.log1p(-sum(logps.map(Math.exp)))];
}

function responseTokens(side) {
  return SEGMENTS[side].flatMap((tokens, segment) => tokens.map(i => {
    const context = CONTEXTS.findIndex(tokens => tokens.includes(i));
    return {logits: contextLogits("p", context), refLogits: contextLogits("q", context), context,
            target: CONTEXTS[context].indexOf(i), segment};
  }));
}

// The pushes on the tokens of both responses, side by side: -dL/d log pi, or -dL/dz of the token's own logit,
// to which both responses add where they share the context.
function pushes(grad, tokens, view) {
  const all = Object.entries(tokens).flatMap(([side, list]) => list.map(token => ({side, token})));
  if (view === "logps") return all.map(({side, token}) => -tokenGradient(grad, side, token));
  return all.map(({token: {context, target}}) => -sum(all.filter(x => x.token.context === context)
    .map(({side, token}) => logitGradient(grad, side, token)[target])));
}

function render() {
  const tokens = {chosen: responseTokens("chosen"), rejected: responseTokens("rejected")}, q = {};
  for (const side in tokens) q[side] = quantities(tokens[side], SEGMENTS[side].map((_, k) => state[side + k]));
  const view = $("view-logits").checked ? "logits" : "logps", marks = [];
  for (const [name, loss] of Object.entries(LOSSES)) {
    const row = $(`row-${name}`);
    if (!row) continue;                                             // sft has one response
    const result = loss(pairTerms(name, q.chosen, q.rejected), state);
    row.querySelector(".h").textContent = result.h.map(x => text(x)).join(", ");
    row.querySelector(".l").textContent = plain(result.loss);
    const push = pushes(result.grad, tokens, view);
    row.querySelectorAll(".push").forEach((cell, i) => {
      cell.style.setProperty("--push", Math.sign(push[i]) * Math.min(1, Math.sqrt(Math.abs(push[i]) / 2)));
      cell.querySelector("span").textContent = text(push[i], Math.abs(push[i]) < 9.995 ? 2 : 1);
      cell.dataset.value = push[i];
    });
    document.querySelectorAll(`#${CSS.escape(name)} .value`).forEach((out, i) => {
      out.textContent = JSON.stringify(result.lines[i], (_, x) => Array.isArray(x) ? x : +x.toFixed(3) || 0)
        .replaceAll(",", ", ").replaceAll("-", "−");
    });
    for (const h of result.h) marks.push([name, h]);
  }
  for (const side in q) {
    const ratio = q[side].logps - q[side].ref_logps;
    const cells = [q[side].logps, q[side].ref_logps, ratio, state.beta * ratio, q[side].seq_kl];
    $(`sum-${side}`).querySelectorAll("td").forEach((td, i) => {
      td.textContent = i === 4 ? plain(cells[i]) : text(cells[i], 3);
    });
  }
  drawCurve(marks);
  for (const input of document.querySelectorAll("#pair input[type=range]")) showSlider(input);
}

function showSlider(input) {
  const id = input.id, value = state[id], at = x => (Math.max(LOWEST, x) - LOWEST) / (HIGHEST - LOWEST);
  input.value = value;
  if (/^[pq]/.test(id)) {
    const ref = at(state["q" + id.slice(1)]), mine = at(value), track = input.parentElement.style;
    track.setProperty("--ref", ref);
    track.setProperty("--from", Math.min(ref, mine));
    track.setProperty("--to", Math.max(ref, mine));
    const ratio = id[0] === "p" ? ` <i>${text(value - state["q" + id.slice(1)])}</i>` : "";
    $(`${id}-out`).innerHTML = `<b>${text(value)}</b>${ratio}`;
  } else $(`${id}-out`).textContent = plain(value, 2);
}

// -log sigma(h), with one mark for every h of every loss
function drawCurve(marks) {
  const inside = h => Math.max(-5.8, Math.min(5.8, h));
  const x = h => 300 + 50 * inside(h), y = h => 142 + 21 * logSigmoid(inside(h));
  const path = Array.from({length: 59}, (_, i) => `${x(i / 5 - 5.8)},${y(i / 5 - 5.8)}`).join(" ");
  const below = i => marks.filter(([, h], k) => k < i && Math.abs(h - marks[i][1]) < 0.24).length;   // stacked
  const dots = marks.map(([name, h], i) =>
    `<circle cx="${x(h)}" cy="${y(h) - 12 * below(i)}" r="6" class="loss-${name}"/>`).join("");
  const ticks = [-4, -2, 0, 2, 4].map(h => `<text x="${x(h)}" y="162">${plain(h, 0)}</text>`).join("");
  $("curve").innerHTML = `<path d="M0 142.5H600M300 10V142" class="axis"/><polyline points="${path}"/>${dots}${ticks}
    <text x="596" y="162" class="end">h</text><text x="172" y="66" class="name">−log σ(h)</text>
    <text x="308" y="20" class="name">log 2 at h = 0</text>`;
}

// ---- Events ----

function light(event) {
  const term = event.target.closest?.("[data-t]")?.dataset.t;
  for (const on of document.querySelectorAll(".on")) on.classList.remove("on");
  if (term) for (const same of document.querySelectorAll(`[data-t="${term}"]`)) same.classList.add("on");
}

buildSliders();
$("pair").addEventListener("input", ({target: {id, type, value}}) => {
  if (type === "range") {
    state[id] = Number(value);
    makeRoom(id[0], id);
  }
  render();
});
for (const button of document.querySelectorAll("[data-preset]"))
  button.addEventListener("click", () => {
    choose(button.dataset.preset);
    history.replaceState(null, "", `#pair=${button.dataset.preset}`);   // a link to this preset
  });
for (const kind of ["pointerover", "focusin", "click"]) document.addEventListener(kind, light);
const asked = location.hash.replace("#pair=", "");
choose(asked in PRESETS ? asked : "at-the-start");
if (asked in PRESETS) $("move").scrollIntoView();
