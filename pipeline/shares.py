"""Which shards of a store are this process's work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache.store import Shard


@dataclass(frozen=True, slots=True)
class Share:
    """One of `count` equal shares. The leases of the store keep two processes off one shard whatever the shares are."""

    index: int = 0
    count: int = 1
    helps: bool = False
    """Whether to go on with the shards of the others that nobody has claimed, once the own ones are done."""
    group: int | None = None
    """With `helps`: shares 0 .. group - 1 help each other, so do the next `group`, and so on. None: all help all."""

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"share {self.index}/{self.count}: count from 0, as in 0/4 to 3/4")
        if self.group is not None and (self.group < 1 or self.count % self.group):
            raise ValueError(f"{self.count} shares cannot be split into groups of {self.group}")

    def pick(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards to work on, in order: the own ones, then those to help with."""
        by_share: dict[int, list[Shard]] = {}
        for shard in shards:
            by_share.setdefault(shard.index % self.count, []).append(shard)
        size = (self.group or self.count) if self.helps else 1
        first = self.index // size * size
        # Each helper begins elsewhere, so that helpers seldom meet.
        order = [first + (self.index - first + step) % size for step in range(size)]
        return [shard for share in order for shard in by_share.get(share, [])]
