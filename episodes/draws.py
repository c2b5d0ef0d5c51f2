"""Random draws that are the same on every machine and with every version of numpy.

Only Philox's 64-bit words come from numpy: that generator is a published function of its key and counter (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011, https://doi.org/10.1145/2063384.2063405). What is made of the words is
written out here, because numpy keeps the right to change `permutation` and `choice`, and the episode hashes must not move.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Key = tuple[int, int]

_NUM_WORDS = 1 << 64


@functools.lru_cache(maxsize=1024)
def key_of(*identity: str | int) -> Key:
    """The two 64-bit words of a Philox key that belongs to these names and numbers alone."""
    digest = hashlib.sha256(json.dumps(identity).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


class Draws:
    """A stream of draws, given whole by a key and an index."""

    def __init__(self, key: Key, index: int = 0) -> None:
        """Start at the beginning of stream `index` of this key; the streams of two indices never meet."""
        if not 0 <= index < _NUM_WORDS:
            raise ValueError(f"index {index} of a stream of draws; it must lie in 0 .. 2**64 - 1")
        # The index is the counter's highest word: each stream has the 2**192 values of the lower words for itself.
        counter = np.array([0, 0, 0, index], dtype=np.uint64)
        self._philox = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter)
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:
            words: list[int] = self._philox.random_raw(64).tolist()
            self._words = words[::-1]
        return self._words.pop()

    def below(self, bound: int) -> int:
        """A whole number in 0 .. bound - 1, each exactly as likely as the others."""
        # Words of the incomplete last round of `bound` would favour small remainders.
        complete = _NUM_WORDS - _NUM_WORDS % bound
        word = self._word()
        while word >= complete:
            word = self._word()
        return word % bound

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different positions of `items`, in random order: the first steps of a Fisher-Yates shuffle."""
        if count > len(items):
            raise ValueError(f"{count} draws without replacement, but there are {len(items)} items")
        moved: dict[int, int] = {}
        drawn = []
        for place in range(count):
            chosen = place + self.below(len(items) - place)
            drawn.append(items[moved.get(chosen, chosen)])
            # What lay at `place` is still to be had; from now on it lies where the drawn one was.
            moved[chosen] = moved.get(place, place)
        return drawn

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """All items in random order."""
        return self.sample(items, len(items))
