// losses.py in JavaScript: a port that golden/check.py compares like any other (tests/test_docs.py runs it).
// One pair at a time, float64. Names are those of losses.py; g = beta sigma(-h), h the argument of log sigma.
"use strict";

const sum = values => values.reduce((a, b) => a + b, 0);
const sigma = h => 1 / (1 + Math.exp(-h));
const logSigmoid = h => Math.min(h, 0) - Math.log1p(Math.exp(-Math.abs(h)));

function logSoftmax(z) {
  const top = Math.max(...z), log = Math.log(sum(z.map(x => Math.exp(x - top))));
  return z.map(x => x - top - log);
}

// KL(pi_ref || pi) at one position, over the full vocabulary
function tokenKl(refLogits, logits) {
  const q = logSoftmax(refLogits), s = logSoftmax(logits);
  return sum(q.map((x, v) => Math.exp(x) > 0 ? Math.exp(x) * (x - s[v]) : 0));
}

// Segments from the lowest value to the highest. Sorted values with a gap of at most 1e-5 are equal and keep
// the order of the text.
function ascending(values, mask) {
  const order = values.map((_, k) => k).filter(k => mask[k]).sort((a, b) => values[a] - values[b]), rank = [];
  order.forEach((k, i) => { rank[k] = i ? rank[order[i - 1]] + (values[k] - values[order[i - 1]] > 1e-5) : 0; });
  return order.sort((a, b) => rank[a] - rank[b] || a - b);
}

// Eq. 6 of 2D-DPO: [[i_w, i_l], ...], the k-th best chosen segment and the k-th worst rejected one.
function selectSegments(t) {
  const best = ascending(t.chosen_rewards.map(r => -r), t.chosen_mask);
  const worst = ascending(t.rejected_rewards, t.rejected_mask);
  return best.slice(0, worst.length).map((i, k) => [i, worst[k]]);
}

const ratios = (t, side) => t[`${side}_logps`].map((x, k) => t[`${side}_mask`][k] ? x - t[`ref_${side}_logps`][k] : 0);
const rewards = (t, side) => t[`${side}_rewards`].map((r, k) => t[`${side}_mask`][k] ? r : 0);

// Each takes the terms of one pair and the knobs. It returns the loss, h, the gradient in each term in closed
// form, and the value of every statement of the function in losses.py, in the same order.
const LOSSES = {
  "sft": t => ({loss: -t.chosen_logps, grad: {chosen_logps: -1}}),

  "dpo": (t, {beta}) => {
    const chosen = t.chosen_logps - t.ref_chosen_logps, rejected = t.rejected_logps - t.ref_rejected_logps;
    const h = beta * chosen - beta * rejected, g = beta * sigma(-h), loss = -logSigmoid(h);
    return {loss, h: [h], grad: {chosen_logps: -g, rejected_logps: g}, lines: [chosen, rejected, loss]};
  },

  "dpop": (t, {beta, lam}) => {
    const chosen = t.chosen_logps - t.ref_chosen_logps, rejected = t.rejected_logps - t.ref_rejected_logps;
    const penalty = Math.max(0, -chosen);
    const h = beta * (chosen - rejected - lam * penalty), g = beta * sigma(-h), loss = -logSigmoid(h);
    return {loss, h: [h], grad: {chosen_logps: -g * (1 + (chosen < 0 ? lam : 0)), rejected_logps: g},
            lines: [chosen, rejected, penalty, lam * penalty, loss]};
  },

  "tdpo1": (t, {beta}) => {
    const chosen = t.chosen_logps - t.ref_chosen_logps, rejected = t.rejected_logps - t.ref_rejected_logps;
    const u = beta * chosen - beta * rejected, delta = beta * t.rejected_seq_kl - beta * t.chosen_seq_kl;
    const h = u - delta, g = beta * sigma(-h), loss = -logSigmoid(h);
    return {loss, h: [h], grad: {chosen_logps: -g, rejected_logps: g, chosen_seq_kl: -g, rejected_seq_kl: g},
            lines: [chosen, rejected, u, delta, loss]};
  },

  "tdpo2": (t, {beta, alpha}) => {
    const chosen = t.chosen_logps - t.ref_chosen_logps, rejected = t.rejected_logps - t.ref_rejected_logps;
    const u = beta * chosen - beta * rejected, delta2 = beta * t.rejected_seq_kl - beta * t.chosen_seq_kl;
    const h = u - alpha * delta2, g = beta * sigma(-h), loss = -logSigmoid(h);
    return {loss, h: [h], grad: {chosen_logps: -g, rejected_logps: g, chosen_seq_kl: 0, rejected_seq_kl: alpha * g},
            lines: [chosen, rejected, u, delta2, loss]};
  },

  "2d-dpo-vanilla": (t, {beta}) => {
    const chosen = ratios(t, "chosen"), rejected = ratios(t, "rejected");
    const r_w = rewards(t, "chosen"), r_l = rewards(t, "rejected");
    const h = beta * sum(r_w.map((r, k) => r * chosen[k])) - beta * sum(r_l.map((r, k) => r * rejected[k]));
    const g = beta * sigma(-h), loss = -logSigmoid(h);
    return {loss, h: [h], grad: {chosen_logps: r_w.map(r => -g * r), rejected_logps: r_l.map(r => g * r)},
            lines: [chosen, rejected, r_w, r_l, loss]};
  },

  "2d-dpo": (t, {beta}) => {
    const pairs = selectSegments(t);
    const chosen = pairs.map(([i]) => t.chosen_logps[i] - t.ref_chosen_logps[i]);
    const rejected = pairs.map(([, i]) => t.rejected_logps[i] - t.ref_rejected_logps[i]);
    const r_w = pairs.map(([i]) => t.chosen_rewards[i]), r_l = pairs.map(([, i]) => t.rejected_rewards[i]);
    const h = pairs.map((_, k) => beta * r_w[k] * chosen[k] - beta * r_l[k] * rejected[k]);
    const grad = {chosen_logps: t.chosen_logps.map(() => 0), rejected_logps: t.rejected_logps.map(() => 0)};
    pairs.forEach(([i, j], k) => {
      grad.chosen_logps[i] = -beta * sigma(-h[k]) * r_w[k];
      grad.rejected_logps[j] = beta * sigma(-h[k]) * r_l[k];
    });
    const each = h.map(x => -logSigmoid(x)), loss = sum(each);
    return {loss, h, grad, pairs, lines: [pairs, chosen, rejected, r_w, r_l, each, loss]};
  },
};

// What the losses take of one response. tokens: [{logits, refLogits, target, segment}], logits that predict the
// token; rewards: one for each segment.
function quantities(tokens, rewards) {
  const logps = tokens.map(t => logSoftmax(t.logits)[t.target]);
  const refLogps = tokens.map(t => logSoftmax(t.refLogits)[t.target]);
  const kl = tokens.map(t => tokenKl(t.refLogits, t.logits));
  const bySegment = values => rewards.map((_, k) => sum(values.filter((_, i) => tokens[i].segment === k)));
  return {token_logps: logps, ref_token_logps: refLogps, token_kl: kl,
          logps: sum(logps), ref_logps: sum(refLogps), seq_kl: sum(kl),
          segment_logps: bySegment(logps), ref_segment_logps: bySegment(refLogps),
          rewards, mask: rewards.map((_, k) => tokens.some(t => t.segment === k))};
}

// The terms of a loss by losses.py's names, from the quantities of both responses
function pairTerms(name, chosen, rejected) {
  const terms = {}, part = name.startsWith("2d") ? "segment_" : "";
  for (const [side, q] of [["chosen", chosen], ["rejected", rejected]]) {
    terms[`${side}_logps`] = q[`${part}logps`];
    terms[`ref_${side}_logps`] = q[`ref_${part}logps`];
    terms[`${side}_seq_kl`] = q.seq_kl;
    terms[`${side}_rewards`] = q.rewards;
    terms[`${side}_mask`] = q.mask;
  }
  return terms;
}

// dL/d log pi(y_t) of one token: that of its sum, the response's or its segment's (no segment: 0)
function tokenGradient(grad, side, token) {
  const whole = grad[`${side}_logps`] ?? 0;
  return Array.isArray(whole) ? whole[token.segment] ?? 0 : whole;
}

// dL/dz of the logits that predict one token: dL/d log pi (e - s) + dL/dK (s - q)
function logitGradient(grad, side, token) {
  const s = logSoftmax(token.logits).map(Math.exp), q = logSoftmax(token.refLogits).map(Math.exp);
  const push = tokenGradient(grad, side, token), pull = grad[`${side}_seq_kl`] ?? 0;
  return s.map((p, v) => push * ((v === token.target) - p) + pull * (p - q[v]));
}
