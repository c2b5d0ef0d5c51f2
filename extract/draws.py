"""Random draws that are the same on every machine and with every version of numpy.

Only Philox's 64-bit words come from numpy: they are a published function of the key (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011, https://doi.org/10.1145/2063384.2063405). What is made of the words is written out here,
because numpy keeps the right to change the streams of `Generator`, and the clips of a store must not move.
"""

import hashlib
import json

import numpy as np

_NUM_WORDS = 1 << 64


class ViewDraws:
    """The draws of one view of one video, in order."""

    def __init__(self, seed: int, video_id: str, view: int) -> None:
        # JSON keeps the parts apart and can write ids that are not valid Unicode.
        digest = hashlib.sha256(json.dumps([seed, video_id, view]).encode()).digest()
        self._philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))

    def _word(self) -> int:
        return int(self._philox.random_raw())

    def integers(self, low: int, high: int) -> int:
        """A whole number of [low, high), each exactly as likely as the others."""
        if high <= low:
            raise ValueError(f"a draw from [{low}, {high}), which is empty; high must be larger than low")
        count = high - low
        # Words of the incomplete last round of `count` would favour small remainders.
        complete = _NUM_WORDS - _NUM_WORDS % count
        word = self._word()
        while word >= complete:
            word = self._word()
        return low + word % count

    def random(self) -> float:
        """A multiple of 2**-53 in [0, 1), each equally likely."""
        return (self._word() >> 11) * 2.0**-53
