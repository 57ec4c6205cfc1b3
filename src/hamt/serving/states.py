"""What a model has read before, by the tokens it has read: so that nothing is read twice.

A state has a fixed size, whatever was read. Found again is a state whose tokens are the first ones
of a prompt: that of a conversation, when its next turn comes, or that before an answer, when it is
asked for again. A prompt that begins with what was read is read from there on, which gives what
reading all of it would give.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

from hamt.cache import HAMTCache

Key = tuple[int, bytes]  # how many tokens, and a digest of them


class StateStore:
    """States by what they have read, of which the ones not used for longest make room.

    Args:
        max_bytes: what all states may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._states: OrderedDict[Key, HAMTCache] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        """How many states there are."""
        return len(self._states)

    def keep(self, ids: Sequence[int], state: HAMTCache) -> None:
        """Keep the state (of one row) that has read ``ids``, unless it alone is too large."""
        if not ids or state.nbytes > self.max_bytes:
            return
        ((key),) = _keys(ids, [len(ids)])
        self._drop(key)
        while self._states and self.nbytes + state.nbytes > self.max_bytes:
            self._drop(next(iter(self._states)))
        self._states[key] = state
        self._lengths[len(ids)] += 1
        self.nbytes += state.nbytes

    def find(self, ids: Sequence[int]) -> tuple[int, HAMTCache | None]:
        """How many of ``ids`` the state with the most of them has read, and a fork of it.

        It has not read them all: the last token is left, after which the model goes on.
        """
        lengths = sorted(length for length in self._lengths if length < len(ids))
        for key in reversed(_keys(ids, lengths)):
            if key in self._states:
                self._states.move_to_end(key)
                return key[0], self._states[key].fork()
        return 0, None

    def _drop(self, key: Key) -> None:
        if key in self._states:
            self.nbytes -= self._states.pop(key).nbytes
            self._lengths[key[0]] -= 1
            if not self._lengths[key[0]]:
                del self._lengths[key[0]]


def _keys(ids: Sequence[int], lengths: Sequence[int]) -> list[Key]:
    """The keys of the first tokens, of each of these ascending lengths."""
    data, digest, begin, found = np.asarray(ids, np.int64), hashlib.blake2b(), 0, []
    for length in lengths:
        digest.update(data[begin:length].tobytes())
        found.append((length, digest.digest()))
        begin = length
    return found
