from dataclasses import dataclass
from pathlib import Path

import pytest

from cache.cube import Spec
from cache.open import KINDS, open_store
from cache.store import FeatureStore
from contracts.store_contract import StoreContract, StoreFactory

COMPRESSED = (("zarr", "zstd"), ("zarr", "gzip"), ("hdf5", "gzip"))


@dataclass
class OpenedByKind:
    """Makes stores as `open_store` does."""

    kind: str
    compression: str
    path: Path

    def create(self, spec: Spec, shard_rows: int) -> FeatureStore:
        return open_store(self.path, self.kind, spec, "a", shard_rows, self.compression)

    def reopen(self, store: FeatureStore) -> FeatureStore:
        if self.kind == "memory":
            return store
        store.close()
        return open_store(self.path, self.kind, mode="a")


class TestEveryStore(StoreContract):
    @pytest.fixture(params=[*((kind, "none") for kind in KINDS), *COMPRESSED], ids="-".join)
    def factory(self, request: pytest.FixtureRequest, tmp_path: Path) -> StoreFactory:
        kind, compression = request.param
        return OpenedByKind(kind, compression, tmp_path / "store")
