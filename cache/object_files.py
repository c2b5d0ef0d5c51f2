"""The file layer on an object store: every object is put whole, a writer's log is a series of objects, the lock is one object.

| object | what |
|---|---|
| `ledger/HOST-PID-RANDOM.jsonl` | a writer's log; it goes on in `HOST-PID-RANDOM.0001.jsonl` when it is full |
| `ledger/alive/HOST-PID-RANDOM` | its heartbeat, put again while the writer lives, removed when it ends |
| `ledger/lock` | the lock: empty while nobody holds it, put again while somebody does |
| `ledger/clock` | put once by each writer to learn the store's time, and that it refuses what it must refuse |
"""

import contextlib
import os
import random
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from cache.cube import canonical_json
from cache.errors import StoreError
from cache.files import LEASE_SECONDS, Log, host_name, log_of
from cache.object_client import ObjectClient, Version

ROLL_BYTES = 1 << 20
"""A log goes on in another object at this size: each commit puts the last object again, so its cost stays bounded."""
LOCK = "ledger/lock"
CLOCK = "ledger/clock"
ALIVE = "ledger/alive"


class ObjectFiles:
    """The objects under one address, `s3://bucket/prefix/S.zarr`."""

    def __init__(self, url: str, lease_seconds: float = LEASE_SECONDS) -> None:
        """`lease_seconds`: how long a writer without a sign of life counts as alive."""
        self.client = ObjectClient(url)
        self.url = self.client.url
        self._lease = timedelta(seconds=lease_seconds)
        self._is_checked = False

    def path_of(self, name: str) -> str:
        """As in the `Files` protocol."""
        return f"{self.url}/{name}"

    def sizes(self, folder: str) -> dict[str, int]:
        """As in the `Files` protocol."""
        return self.client.sizes(folder)

    def read(self, name: str, start: int = 0) -> bytes:
        """As in the `Files` protocol."""
        return self.client.get(name, start)

    def put(self, name: str, data: bytes, replace: bool = True) -> None:
        """As in the `Files` protocol."""
        if replace:
            self.client.put(name, data)
        else:
            self._check_conditions()
            self.client.swap(name, data, None)

    def delete(self, name: str) -> None:
        """As in the `Files` protocol."""
        self.client.delete(name)

    def remove_litter(self) -> None:
        """As in the `Files` protocol: no object is ever half-written, but dead writers leave their heartbeats."""
        for name in self.client.sizes(ALIVE):
            if not self._is_fresh(name):
                self.client.delete(name)

    def new_log(self, folder: str) -> Log:
        """As in the `Files` protocol."""
        self._check_conditions()
        return _ObjectLog(self.client, folder)

    def is_alive(self, log_name: str) -> bool:
        """As in the `Files` protocol: by the age of the heartbeat."""
        return self._is_fresh(_heartbeat_of(log_name))

    def _is_fresh(self, name: str) -> bool:
        try:
            last_beat = self.client.head(name).last_modified
        except FileNotFoundError:
            return False
        return self.now() - last_beat < self._lease

    def now(self) -> datetime:
        """The store's own time for a writer; a reader, who writes nothing, goes by its own clock."""
        if not self._is_checked:
            return datetime.now(UTC)
        self.client.put(CLOCK, b"")
        return self.client.head(CLOCK).last_modified

    def _check_conditions(self) -> None:
        """Refuse a store that takes a put whose condition does not hold: there, two writers would destroy each other's work."""
        if self._is_checked:
            return
        self.client.put(CLOCK, b"")
        for version in (None, {"e_tag": '"0"', "version": "0"}):
            with contextlib.suppress(FileExistsError):
                self.client.swap(CLOCK, b"", version)
                raise StoreError(
                    f"{self.url}: this object store ignores the conditions of a put (If-None-Match, If-Match), without "
                    "which writers cannot share it; extract into a folder and copy that"
                )
        self._is_checked = True

    def cut_log(self, name: str, num_bytes: int) -> None:
        """As in the `Files` protocol: nothing to do, for an object is never torn.

        A torn line came with a folder that was copied here; readers pass over it, and nobody appends to that log.
        """

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """As in the `Files` protocol. A holder that has not renewed it for `lease_seconds` loses it to the next.

        What remains: a holder that sleeps for so long and goes on does not know. All it can still do is put files that
        follow from the plan, as of before, over newer ones; the next opening for writing puts them right. Steps of the
        plan, leases and logs are only ever created or swapped, so that it fails there.
        """
        self._check_conditions()
        held = _HeldLock(self, self._lease)
        held.take()
        try:
            yield
        finally:
            held.free()

    def total_bytes(self) -> int:
        """As in the `Files` protocol."""
        return self.client.total_bytes()


def _heartbeat_of(log_name: str) -> str:
    return f"{ALIVE}/{log_of(log_name).rsplit('/', 1)[-1].removesuffix('.jsonl')}"


class _ObjectLog:
    """Appends by putting the log's last object again, longer, and only over the version that this writer put there.

    So a put that is stuck on the way and arrives late fails instead of undoing the lines after it.
    """

    def __init__(self, client: ObjectClient, folder: str) -> None:
        self.name = f"{folder}/{host_name()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._client = client
        self._object_name = self.name
        self._num_objects = 1
        self._content = b""
        self._is_open = True
        # Held while a heartbeat is on its way, lest one arrives after `close` has removed it.
        self._beating = threading.Lock()
        # The heartbeat comes first: whoever sees the log sees a living writer.
        client.put(_heartbeat_of(self.name), b"")
        self._version: Version | None = client.swap(self.name, b"", None)

    def append(self, data: bytes) -> None:
        if self._content and len(self._content) + len(data) > ROLL_BYTES:
            self._object_name = f"{self.name.removesuffix('.jsonl')}.{self._num_objects:04d}.jsonl"
            self._num_objects += 1
            self._content, self._version = b"", None
        content = self._content + data
        try:
            self._version = self._client.swap(self._object_name, content, self._version)
        except FileExistsError as error:
            raise StoreError(
                f"{self._client.url}/{self._object_name} was changed by somebody else; nobody but its writer may. What was "
                "committed before is kept; run the same command again"
            ) from error
        self._content = content

    def beat(self) -> None:
        # One that fails is made up for by the next; a writer that cannot beat any more is rightly taken for dead.
        with self._beating, contextlib.suppress(StoreError):
            if self._is_open:
                self._client.put(_heartbeat_of(self.name), b"")

    def close(self) -> None:
        # A heartbeat that cannot be removed grows old by itself.
        with self._beating, contextlib.suppress(StoreError):
            self._is_open = False
            self._client.delete(_heartbeat_of(self.name))


class _HeldLock:
    """One holding of the lock: an object that is swapped from empty to our name, renewed, and swapped back."""

    def __init__(self, files: ObjectFiles, lease: timedelta) -> None:
        self._files = files
        self._client = files.client
        self._lease = lease
        self._nonce = secrets.token_hex(8)
        self._num_beats = 0
        self._version: Version | None = None
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)

    def take(self) -> None:
        """Wait for the lock."""
        longest_wait = 0.05
        while not self._try():
            # Random, or writers that began together would ask together for ever.
            time.sleep(random.uniform(0.5, 1.0) * longest_wait)
            longest_wait = min(2 * longest_wait, 1.0)
        self._beats.start()

    def _try(self) -> bool:
        try:
            head = self._client.head(LOCK)
            is_free = head.size == 0 or self._files.now() - head.last_modified > self._lease
            version: Version | None = head.version
        except FileNotFoundError:
            is_free, version = True, None
        if is_free:
            with contextlib.suppress(FileExistsError):
                self._version = self._client.swap(LOCK, self._content(), version)
                return True
        return False

    def _content(self) -> bytes:
        """Never the same twice, so that no two versions are taken for one."""
        self._num_beats += 1
        holder = f"process {os.getpid()} on {host_name()}"
        return canonical_json({"beat": self._num_beats, "holder": holder, "nonce": self._nonce}).encode("ascii")

    def _beat(self) -> None:
        while not self._stop.wait(self._lease.total_seconds() / 4):
            try:
                self._version = self._client.swap(LOCK, self._content(), self._version)
            except FileExistsError:
                return
            except StoreError:
                # The next one may succeed; else the lock goes to somebody else.
                continue

    def free(self) -> None:
        """Give it back, unless it was lost."""
        self._stop.set()
        self._beats.join()
        # What is done is done; a lock that cannot be given back grows old by itself.
        with contextlib.suppress(FileExistsError, StoreError):
            self._client.swap(LOCK, b"", self._version)
