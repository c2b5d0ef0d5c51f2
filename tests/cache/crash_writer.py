"""Fills a store and prints each committed shard; the crash test kills it. Loads no torch.

python crash_writer.py PATH
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first, since this file runs as a process of its own.
from cache.zarr_store import ZarrStore  # noqa: E402
from contracts.store_examples import VIDEO_IDS, commit_example, example_spec  # noqa: E402


def main() -> None:
    print("ready", flush=True)
    with ZarrStore.create(Path(sys.argv[1]), example_spec(), 4) as store:
        for video_ids, views in ((VIDEO_IDS, [0, 1, 2]), ([f"more/{i}" for i in range(60)], [0])):
            store.plan(video_ids, views)
            for shard in store.pending():
                commit_example(store, shard)
                print(shard.index, flush=True)


if __name__ == "__main__":
    main()
