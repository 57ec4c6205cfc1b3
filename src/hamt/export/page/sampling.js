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
  const least = topP < 1 ? threshold(weights, topP) : 0;
  let kept = 0;
  for (const weight of weights) if (weight >= least) kept += weight;
  let rest = random() * kept;
  for (let i = 0; i < weights.length; i++) {
    if (weights[i] < least) continue;
    rest -= weights[i];
    if (rest < 0) return i;
  }
  return best;
}

/** The least of the largest weights that together are `share` of all. */
function threshold(weights, share) {
  const rising = weights.slice().sort();  // numbers of a typed array: far faster than by a function
  const wanted = share * rising.reduce((sum, x) => sum + x, 0);
  let kept = 0, i = rising.length;
  while (i > 0 && kept < wanted) kept += rising[--i];
  return rising[i];
}
