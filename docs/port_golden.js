// Golden's results of one regime from its inputs, by port.js. inputs: {name: nested lists}, hyper: {loss: knobs}.
"use strict";

function goldenResults(inputs, hyper) {
  const results = {};
  const put = (name, row) => (results[name] ??= []).push(row);
  const columns = inputs.chosen_ids[0].length, width = inputs.chosen_logits[0][0].length;
  const wide = Math.min(inputs.chosen_scores[0].length, inputs.rejected_scores[0].length);
  inputs.chosen_ids.forEach((_, b) => {
    const tokens = {}, where = {}, q = {};
    for (const side of ["chosen", "rejected"]) {
      const of = name => inputs[name.replace("{side}", side)][b];
      where[side] = of("{side}_ids").map((_, t) => t).filter(t => of("{side}_response_mask")[t]);
      tokens[side] = where[side].map(t => ({            // column t - 1 predicts token t
        logits: of("{side}_logits")[t - 1], refLogits: of("ref_{side}_logits")[t - 1],
        target: of("{side}_ids")[t], segment: of("{side}_segments")[t]}));
      q[side] = quantities(tokens[side], of("{side}_scores").map(scores =>
        sum(scores.map((x, a) => x / inputs.aspect_max[a] * inputs.aspect_weights[a]))));
    }
    const grid = (side, values) => {
      const row = Array(columns).fill(0);
      where[side].forEach((t, i) => { row[t] = values[i]; });
      return row;
    };
    for (const side of ["chosen", "rejected"]) {
      for (const name of ["token_logps", "logps", "segment_logps"])
        for (const ref of ["", "ref_"]) {
          const value = q[side][`${ref}${name}`];
          put(`${ref}${side}_${name}`, name === "token_logps" ? grid(side, value) : value);
        }
      put(`${side}_token_kl`, grid(side, q[side].token_kl));
      put(`${side}_seq_kl`, q[side].seq_kl);
      put(`${side}_rewards`, q[side].rewards);
      const pairs = selectSegments(pairTerms("2d-dpo", q.chosen, q.rejected));
      put(`${side}_selected`, Array.from({length: wide}, (_, k) => pairs[k]?.[side === "chosen" ? 0 : 1] ?? -1));
    }
    for (const [name, loss] of Object.entries(LOSSES)) {
      const {loss: value, grad} = loss(pairTerms(name, q.chosen, q.rejected), hyper[name]);
      put(`${name}/loss`, value);
      for (const [term, gradient] of Object.entries(grad)) put(`${name}/grad_${term}`, gradient);
      for (const side of name === "sft" ? ["chosen"] : ["chosen", "rejected"]) {
        const rows = tokens[side].map(token => logitGradient(grad, side, token));
        const shifted = Array.from({length: columns}, () => Array(width).fill(0));
        where[side].forEach((t, i) => { shifted[t - 1] = rows[i]; });
        put(`${name}/grad_${side}_logits`, shifted);
        if (name !== "sft" && !name.startsWith("2d"))
          put(`${name}/${side}_reward`, hyper[name].beta * (q[side].logps - q[side].ref_logps));
      }
    }
  });
  return results;
}
