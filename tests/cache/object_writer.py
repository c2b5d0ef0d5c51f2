"""Fills a store on an object store and prints each committed shard; the crash test kills it. Loads no torch.

python object_writer.py URL LEASE_SECONDS NUM_VIDEOS
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first, since this file runs as a process of its own.
import cache.leases  # noqa: E402
from cache.disk_store import DiskStore  # noqa: E402
from cache.object_files import ObjectFiles  # noqa: E402
from cache.open import FORMATS  # noqa: E402
from contracts.store_examples import VIDEO_IDS, commit_example  # noqa: E402


def main() -> None:
    url, lease_seconds, num_videos = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    cache.leases.SECONDS_BETWEEN_BEATS = lease_seconds / 8
    print("ready", flush=True)
    with DiskStore(ObjectFiles(url, lease_seconds), FORMATS["zarr"], "a") as store:
        store.plan(VIDEO_IDS, [0, 1])
        store.plan([f"more/{i}" for i in range(num_videos)], [0])
        while shards := store.pending():
            for shard in shards:
                if store.claim(shard).state == "ours":
                    commit_example(store, shard)
                    print(shard.index, flush=True)
                else:
                    time.sleep(0.05)
    print("done", flush=True)


if __name__ == "__main__":
    main()
