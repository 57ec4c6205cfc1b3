"""Unigram and bigram models: a language model that is not better has learnt nothing of use."""

import numpy as np


def ngram_losses(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """The losses of a unigram and of a bigram model, in nats per token.

    The unigram model adds one to every count. The bigram model is interpolated Kneser-Ney (Chen and
    Goodman 1999, equations 24-26), with the discount n1 / (n1 + 2 n2).

    Both are estimated on the token ids ``train`` (tokens,), and measured on all but the first of
    ``held_out`` (tokens,).
    """
    tokens, targets = train.astype(np.int64), held_out.astype(np.int64)
    counts = np.bincount(tokens, minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)

    pairs, pair_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    first, second = pairs // vocab_size, pairs % vocab_size
    once, twice = (pair_counts == 1).sum(), (pair_counts == 2).sum()
    discount = once / max(once + 2 * twice, 1)
    # How many different tokens precede each; smoothed, since the held-out text may have tokens that
    # never occur in the other.
    continuation = (np.bincount(second, minlength=vocab_size) + 1) / (len(pairs) + vocab_size)
    total = np.bincount(first, weights=pair_counts, minlength=vocab_size)
    followers = np.bincount(first, minlength=vocab_size)

    context, target = targets[:-1], targets[1:]
    wanted = context * vocab_size + target
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, pair_counts[place], 0)
    known = np.maximum(total[context], 1)
    # A context that was never seen leaves all of its probability to the continuation.
    reserved = np.where(total[context] > 0, discount * followers[context] / known, 1.0)
    bigram = np.maximum(seen - discount, 0) / known + reserved * continuation[target]
    return float(-np.log(unigram[target]).mean()), float(-np.log(bigram).mean())
