// How the next token is chosen, with the meanings that `hamt generate` gives its options.
"use strict";

/**
 * @param logits a number for each token
 * @param temperature 0 takes the likeliest, higher is more varied
 * @param topP only the likeliest tokens that hold this much probability are drawn from
 * @param random gives a number in [0, 1)
 */
export function choose(logits, temperature, topP = 0.95, random = Math.random) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!(temperature > 0)) return best;
  const weights = Float64Array.from(logits, (x) => Math.exp((x - logits[best]) / temperature));
  const total = weights.reduce((sum, x) => sum + x, 0);
  const order = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]);
  let kept = 0, count = 0;
  while (count < order.length && kept < topP * total) kept += weights[order[count++]];
  let rest = random() * kept;
  for (let i = 0; i < count; i++) {
    rest -= weights[order[i]];
    if (rest < 0) return order[i];
  }
  return best;
}
