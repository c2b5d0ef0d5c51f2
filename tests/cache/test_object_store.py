import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import zarr

from cache import leases, object_files
from cache.cube import ArraySpec, Spec
from cache.disk_store import DiskStore
from cache.files import owner_of
from cache.object_files import ObjectFiles
from cache.open import FORMATS, open_disk_store, open_store
from cache.store import FeatureStore, RowKey, ShardHeld, StoreDamaged, StoreError
from contracts.object_server import ObjectServer
from contracts.store_contract import StoreContract, StoreFactory
from contracts.store_examples import (
    CUBE,
    OK,
    VIDEO_IDS,
    commit_example,
    example_row,
    example_spec,
    expected_hash,
    fill,
)

SECRET = "never-to-be-shown"  # the one of conftest.py
VIDEOS_PER_KILL = 30
"""How many videos more each writer plans than the one that was killed before it."""


def make_store(url: str, shard_rows: int = 4) -> DiskStore:
    return open_disk_store(url, "zarr", example_spec(), "a", shard_rows)


def open_with_lease(url: str, lease_seconds: float) -> DiskStore:
    return DiskStore(ObjectFiles(url, lease_seconds), FORMATS["zarr"], "a")


def wait_for(happened: Callable[[], bool]) -> None:
    """The test's own time limit ends a wait in vain."""
    while not happened():
        time.sleep(0.1)


@dataclass
class OnS3:
    url: str

    def create(self, spec: Spec, shard_rows: int) -> FeatureStore:
        return open_store(self.url, spec=spec, mode="a", shard_rows=shard_rows)

    def reopen(self, store: FeatureStore) -> FeatureStore:
        store.close()
        return open_store(self.url, mode="a")


class TestStoreOnS3(StoreContract):
    @pytest.fixture
    def factory(self, url: str) -> StoreFactory:
        return OnS3(url)


def test_plain_zarr_reads_the_store(url: str) -> None:
    with make_store(url) as store:
        fill(store, VIDEO_IDS, [0])
    names: dict[str, Any] = {"url": url}
    snippet = """\
import zarr
from obstore.store import from_url
from zarr.storage import ObjectStore

group = zarr.open_group(ObjectStore(from_url(url, client_options={"allow_http": True}), read_only=True), mode="r")
row = group["video_id"][:].tolist().index("run/2")
cube = group["cube"][row]
"""
    assert len(snippet.splitlines()) <= 10
    exec(snippet, names)
    np.testing.assert_array_equal(names["cube"], example_row(RowKey("run/2", 0), "cube", CUBE))


def test_one_row_is_read_without_the_rest_of_its_shard(server: ObjectServer, url: str) -> None:
    array = ArraySpec("layer4", "none", "float16", None, (64, 4, 7, 7))
    row_bytes, num_rows = 2 * 64 * 4 * 7 * 7, 64
    with open_disk_store(url, "zarr", example_spec(arrays={"cube": array}), "a", num_rows) as store:
        fill(store, [f"video/{i}" for i in range(num_rows)], [0])
    with open_store(url) as reader:
        reader.read(["video/3"], [0])  # opens the array
        server.seen.clear()
        row = reader.read(["video/40"], [0])[0]
    np.testing.assert_array_equal(row, example_row(RowKey("video/40", 0), "cube", array))
    # The shard's index, 16 bytes for each row and a checksum, and the row with its checksum.
    assert sum(request.num_bytes for request in server.seen) == (16 * num_rows + 4) + (row_bytes + 4)
    assert [request.method for request in server.seen] == ["GET", "GET"]


def test_opening_for_reading_puts_and_deletes_nothing(server: ObjectServer, url: str) -> None:
    with make_store(url) as writer:
        fill(writer, VIDEO_IDS, [0])
        writer.plan(["new"], [0])
        writer.claim(writer.pending()[0])
        server.seen.clear()
        with open_disk_store(url, "zarr") as reader:
            reader.read(["last"], [0])
            assert list(reader.holders()) == [3]
            assert {request.method for request in server.seen} == {"GET", "HEAD"}


def test_a_commit_costs_a_bounded_number_of_requests(server: ObjectServer, url: str) -> None:
    def num_requests(shard_index: int) -> int:
        server.seen.clear()
        commit_example(store, store.pending()[0])
        assert store.outcome(f"video/{shard_index}") == OK
        return len(server.seen)

    with make_store(url, shard_rows=1) as store:
        store.plan([f"video/{i}" for i in range(12)], [0])
        counts = [num_requests(index) for index in range(12)]
    # The first one also makes the writer's log.
    assert len(set(counts[1:])) == 1


def test_exactly_one_of_many_threads_makes_an_object(url: str) -> None:
    files = ObjectFiles(url)

    def make(contestant: int) -> bool:
        try:
            files.put(name, b"the same" if is_same else b"%d" % contestant, replace=False)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for trial in range(20):
            name, is_same = f"ledger/trial-{trial}", trial % 2 == 0
            winners = [contestant for contestant, won in enumerate(pool.map(make, range(8))) if won]
            assert len(winners) == 1
            assert files.read(name) == (b"the same" if is_same else b"%d" % winners[0])


def test_put_whose_answer_is_lost_counts_once(server: ObjectServer, url: str) -> None:
    losses: list[str] = []

    def lose_first(method: str, path: str) -> bool:
        # Every object whose put depends on a condition: the store's making, plan, leases, logs and the lock.
        if method == "PUT" and path not in losses and ("ledger/" in path and "clock" not in path):
            losses.append(path)
            return True
        return False

    server.lose_answer = lose_first
    with make_store(url) as store:
        fill(store, VIDEO_IDS, [0])
        assert store.pending() == []
    assert {path.rsplit("/", 1)[-1] for path in losses} >= {
        "spec.json",
        "plan-000000.json",
        "shard-00000000.json",
        "lock",
    }
    with open_store(url) as reader:
        assert reader.content_hash() == expected_hash(reader.spec, reader.rows())


def test_answers_of_a_log_that_are_lost_neither_lose_nor_repeat_a_line(server: ObjectServer, url: str) -> None:
    is_odd = False

    def lose_every_other(method: str, path: str) -> bool:
        nonlocal is_odd
        if method == "PUT" and path.endswith(".jsonl"):
            is_odd = not is_odd
            return is_odd
        return False

    server.lose_answer = lose_every_other
    log = ObjectFiles(url).new_log("ledger")
    lines = [b"line %d\n" % i for i in range(10)]
    for line in lines:
        log.append(line)
    assert ObjectFiles(url).read(log.name) == b"".join(lines)


def test_put_that_arrives_late_does_not_undo_the_lines_after_it(url: str) -> None:
    files = ObjectFiles(url)
    log = files.new_log("ledger")
    log.append(b"one\n")
    stuck = files.client.head(log.name).version
    log.append(b"two\n")
    with pytest.raises(FileExistsError):
        files.client.swap(log.name, b"one\n", stuck)
    assert files.read(log.name) == b"one\ntwo\n"


def test_log_that_somebody_else_changed_is_not_gone_on_with(url: str) -> None:
    files = ObjectFiles(url)
    log = files.new_log("ledger")
    files.put(log.name, b"of somebody else")
    with pytest.raises(StoreError, match="changed by somebody else"):
        log.append(b"line\n")
    assert files.read(log.name) == b"of somebody else"


def test_log_goes_on_in_another_object_when_it_is_full(
    server: ObjectServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_files, "ROLL_BYTES", 1500)
    video_ids = [f"video/{i}" for i in range(12)]
    with make_store(url, shard_rows=1) as store:
        server.seen.clear()
        fill(store, video_ids, [0])
        logs = sorted(store._ledger.logs())
        assert len(logs) >= 4
        assert {owner_of(name) for name in logs} == {owner_of(logs[0])}
        assert all(store._files.is_alive(name) for name in logs)
        # None of them is another writer's.
        assert store._ledger.others_alive() == []
        assert store.pending() == []
    assert max(seen.num_sent for seen in server.seen if seen.path.endswith(".jsonl")) <= 1500
    assert all(seen.num_bytes <= 1500 for seen in server.seen if seen.path.endswith(".jsonl"))
    with open_disk_store(url, "zarr", mode="a") as store:
        assert store._ledger.others_alive() == []
        assert store.pending() == []
        assert store.content_hash() == expected_hash(store.spec, store.rows())


def test_writer_that_comes_by_mistake_is_told_who_has_the_shard(url: str) -> None:
    with make_store(url) as first, make_store(url) as second:
        first.plan(VIDEO_IDS, [0])
        shard, other_shard, _ = first.pending()
        first.claim(shard)
        with pytest.raises(ShardHeld, match=r"shard 0 .*is being made by process \d+ on "):
            commit_example(second, shard)
        assert second.claim(other_shard).state == "ours"
        commit_example(first, shard)
        assert second.claim(shard).state == "done"
        # Writers that end cleanly are gone at once, in spite of their lease.
        first.claim(second.pending()[1])
        first.close()
        fill(second, VIDEO_IDS, [0])
        assert second.content_hash() == expected_hash(second.spec, second.rows())


def test_lease_of_a_dead_writer_goes_to_the_next(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(url).close()
    monkeypatch.setattr(leases, "SECONDS_BETWEEN_BEATS", 0.25)
    with open_with_lease(url, 2.0) as living, open_with_lease(url, 2.0) as dying:
        living.plan(["a", "b", "c", "d", "e"], [0])
        first, second = living.pending()
        assert living.claim(first).state == dying.claim(second).state == "ours"
        # As when its process is killed: no more heartbeats, nothing given back.
        dying._leases._stop.set()
        assert living.claim(second).state == "held"
        wait_for(lambda: living.claim(second).state == "ours")
        with open_with_lease(url, 2.0) as third:
            assert third.claim(first).state == third.claim(second).state == "held"
            fill(living, ["a", "b", "c", "d", "e"], [0])
            assert third.pending() == []


def test_heartbeats_of_dead_writers_are_cleared_away(url: str) -> None:
    make_store(url).close()
    dead = ObjectFiles(url, 2.0).new_log("ledger")
    files = ObjectFiles(url, 2.0)
    assert files.is_alive(dead.name)
    wait_for(lambda: not files.is_alive(dead.name))
    files.remove_litter()
    assert files.sizes("ledger/alive") == {}


def test_beat_that_is_on_its_way_does_not_revive_a_closed_log(url: str) -> None:
    files = ObjectFiles(url)
    log = files.new_log("ledger")
    log.close()
    log.beat()
    assert not files.is_alive(log.name)


def test_lock_has_one_holder_at_a_time(url: str) -> None:
    files = ObjectFiles(url)
    files.put("count", b"0")

    def work(_: int) -> None:
        with ObjectFiles(url).lock():
            files.put("count", b"%d" % (int(files.read("count")) + 1))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(12)))
    assert files.read("count") == b"12"


@pytest.mark.slow
def test_lock_of_a_dead_holder_is_taken_and_that_of_a_living_one_is_not(url: str) -> None:
    holder, waiter = ObjectFiles(url, 2.0), ObjectFiles(url, 2.0)
    got: list[str] = []

    def wait_and_take() -> None:
        with waiter.lock():
            got.append("lock")

    thread = threading.Thread(target=wait_and_take)
    with holder.lock():
        thread.start()
        # Longer than a lease: it is renewed.
        thread.join(3.5)
        assert got == []
    thread.join()
    assert got == ["lock"]
    dead = object_files._HeldLock(holder, timedelta(seconds=2.0))
    dead.take()
    dead._stop.set()
    with waiter.lock():
        # The dead one wakes up, and does not free what is another's now.
        dead.free()
        assert waiter.read("ledger/lock") != b""


def test_object_store_that_ignores_conditions_is_refused(server: ObjectServer, url: str) -> None:
    server.ignore_conditions = True
    with pytest.raises(StoreError, match="ignores the conditions"):
        make_store(url)
    assert set(ObjectFiles(url).sizes("ledger")) == {"ledger/clock"}


def test_errors_are_one_line_that_names_the_store_and_the_way_out(
    server: ObjectServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(url: str, kind: str | None = None) -> str:
        with pytest.raises(StoreError) as caught:
            open_store(url, kind, example_spec(), "a")
        text = str(caught.value)
        assert "\n" not in text
        assert SECRET not in text
        return text

    assert "there is no bucket 'nowhere'; make it" in message("s3://nowhere/S.zarr")
    assert "HDF5 files need a file system" in message(url.replace(".zarr", ".h5"))
    assert "HDF5 files need a file system" in message(url, "hdf5")
    assert "ending '.bin'" in message(url.replace(".zarr", ".bin"))
    assert "addresses begin with s3://, gs://, az://" in message("ftp://host/S.zarr")
    assert "give a bucket and a name in it" in message("s3://bucket.zarr")
    assert "holds no credentials" in message(f"s3://tester:{SECRET}@bucket/S.zarr")
    server.deny = True
    assert "access denied; check AWS_ACCESS_KEY_ID" in message(url)
    server.behave()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert f"{url} could not be reached" in message(url)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    assert "is plain http" in message(url)


def test_missing_store_and_foreign_objects_are_told_apart(url: str) -> None:
    with pytest.raises(StoreError, match="there is no store at s3://"):
        open_store(url)
    files = ObjectFiles(url)
    files.put("notes.txt", b"text")
    with pytest.raises(StoreError, match="not a store"):
        make_store(url)
    files.put("ledger/zarr.json", b"{}")
    with pytest.raises(StoreDamaged, match="has lost"):
        make_store(url)


def test_without_the_extra_the_command_that_installs_it_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for name in ("cache.object_files", "cache.object_client"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(StoreError, match=r"need the extra cloud.*pip install -e '\.\[cloud\]'") as caught:
        open_store(url)
    assert "\n" not in str(caught.value)


def test_credentials_are_never_stored(url: str) -> None:
    with make_store(url) as store:
        fill(store, VIDEO_IDS, [0])
        client = ObjectFiles(url).client
        names = [entry["path"] for chunk in obstore.list(client.store) for entry in chunk]
        assert len(names) > 10
        assert not any(SECRET.encode() in client.get(name) for name in names)
        assert SECRET not in repr(zarr.storage.ObjectStore(client.store))


def run_writer(url: str, num_videos: int, seconds: float | None) -> tuple[list[int], bool]:
    """Let a writer run for so long and kill it, or let it end; the shards it said are committed, and whether it ended."""
    script = Path(__file__).with_name("object_writer.py")
    command = [sys.executable, str(script), url, "2.0", str(num_videos)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        if seconds is not None:
            time.sleep(seconds)
            writer.kill()
        lines = writer.stdout.read().split()
    # It may have ended just before it was to be killed.
    assert writer.returncode in ((0,) if seconds is None else (0, -signal.SIGKILL))
    return [int(line) for line in lines if line != "done"], "done" in lines


def kill_writers(url: str, num_kills: int, seed: int) -> None:
    """Kill writer after writer at random moments; what they said is committed stays so, and the last one ends the work."""
    rng = random.Random(seed)
    make_store(url).close()
    acknowledged: set[int] = set()
    num_killed = 0
    for trial in range(num_kills + 1):
        seconds = rng.uniform(0.0, 1.2) if trial < num_kills else None
        shards, has_ended = run_writer(url, VIDEOS_PER_KILL * (trial + 1), seconds)
        num_killed += not has_ended
        # A second commit of a shard would mean that the first one was lost.
        assert acknowledged.isdisjoint(shards)
        acknowledged |= set(shards)
        with open_store(url) as store:
            assert acknowledged.isdisjoint(shard.index for shard in store.pending())
    assert num_killed >= num_kills // 2
    with open_store(url) as store:
        more = [RowKey(f"more/{i}", 0) for i in range(VIDEOS_PER_KILL * (num_kills + 1))]
        keys = [RowKey(name, view) for name in VIDEO_IDS for view in (0, 1)] + more
        assert store.rows() == keys
        assert store.pending() == []
        assert store.content_hash() == expected_hash(store.spec, keys)
        stored = [key for key in keys if key.video_id != "broken"]
        rows = store.read([key.video_id for key in stored], [key.view for key in stored])
        np.testing.assert_array_equal(rows, np.stack([example_row(key, "cube", CUBE) for key in stored]))


def test_killed_writers_lose_no_acknowledged_row(url: str) -> None:
    kill_writers(url, num_kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_killed_writers_lose_no_acknowledged_row(url: str, seed: int) -> None:
    kill_writers(url, num_kills=12, seed=seed)
