"""When the packets and frames of a video are shown, kept small: eight bytes a frame, in whole ticks and so without rounding."""

from array import array
from dataclasses import dataclass, field
from fractions import Fraction
from math import inf

import numpy as np

from extract.clips import Seconds

EXACT_IN_FLOAT = 2**53
"""Whole numbers below this are exact in float64, so that a quotient of two of them is rounded once, as Fraction does."""


@dataclass(slots=True)
class FrameTimes:
    """Presentation times in whole ticks of one clock, in the order in which they were met."""

    clock: Fraction | None = None
    """Seconds per tick; None before the first time."""
    num_unknown: int = 0
    """Frames that carry no time."""
    _ticks: "array[int]" = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self._ticks) + self.num_unknown

    def add(self, tick: int | None, clock: Fraction | None) -> None:
        """Note the time of one frame; None where the file gives none."""
        if tick is None or clock is None:
            self.num_unknown += 1
            return
        if clock != self.clock:
            if self.clock is not None:
                raise ValueError(f"a frame at {clock} s per tick after others at {self.clock}")
            self.clock = clock
        self._ticks.append(tick)

    def seconds(self, rate: Fraction) -> Seconds:
        """(n,) float64 ascending, 0 at the first frame; frame numbers over `rate` (per second) if any time is unknown."""
        if self.num_unknown or self.clock is None:
            return np.arange(len(self), dtype=np.float64) / float(rate)
        ticks = np.sort(np.frombuffer(self._ticks, dtype=np.int64))
        first, last = int(ticks[0]), int(ticks[-1])
        # Exact until the end: 1.8 - 1.4 in floating point would miss a segment that begins at 0.4.
        numerator, denominator = self.clock.numerator, self.clock.denominator
        if max((last - first) * numerator, denominator) < EXACT_IN_FLOAT:
            return np.asarray((ticks - first) * numerator / float(denominator), dtype=np.float64)
        return np.array([(tick - first) * numerator / denominator for tick in ticks.tolist()], dtype=np.float64)


@dataclass(slots=True)
class Span:
    """What the packets of one stream cover, in whole ticks."""

    clock: Fraction
    """Seconds per tick."""
    _first_decode: int | None = None
    _last_decode_end: int = 0
    _last_end: int = 0

    def add(self, pts: int | None, dts: int | None, duration: int) -> None:
        """Take in one packet: when it is shown, when it is decoded, and for how long it lasts, in ticks."""
        start = dts if pts is None else pts
        if start is not None:
            self._last_end = max(self._last_end, start + duration)
        if dts is None:
            return
        if self._first_decode is None:
            self._first_decode, self._last_decode_end = dts, dts + duration
        self._first_decode = min(self._first_decode, dts)
        self._last_decode_end = max(self._last_decode_end, dts + duration)

    def shown_until(self) -> float:
        """Seconds; 0 at the earliest."""
        return float(self._last_end * self.clock)

    def decoded_from(self) -> float:
        """Seconds; inf where no packet says."""
        return inf if self._first_decode is None else float(self._first_decode * self.clock)

    def decoded_until(self) -> float:
        """Seconds; -inf where no packet says."""
        return -inf if self._first_decode is None else float(self._last_decode_end * self.clock)
