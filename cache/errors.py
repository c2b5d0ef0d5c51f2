"""What can go wrong with a store; each text says what is the case and what to do."""


class StoreError(Exception):
    """A store cannot do what was asked."""


class SpecMismatch(StoreError):
    """The store holds cubes of another spec."""


class RowNotReady(StoreError):
    """The row is planned but not extracted yet."""


class RowRejected(StoreError):
    """The row's video could not be used; the reason is in the ledger."""


class RowDamaged(StoreError):
    """The row was committed, but its data is missing or damaged now."""


class ShardHeld(StoreError):
    """Another writer, which is alive, has claimed the shard."""


class StoreDamaged(StoreError):
    """A file that the store needs to be opened is missing or damaged."""
