"""Fills a store and says on stdout what it begins and what is committed; the attacks kill it. Loads no torch.

python crash_writer.py PATH KIND    fills one store
python crash_writer.py --nursery    forks a writer for each order that it reads, which saves the second of imports
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first, since this file runs as a process of its own.
import cache.hdf5_format  # noqa: E402
import cache.zarr_format  # noqa: E402, F401
from cache.open import open_disk_store  # noqa: E402
from cache.store import Shard, ShardHeld, StoreError  # noqa: E402
from contracts.attacks import SHARD_ROWS, Order  # noqa: E402
from contracts.store_examples import commit_example, example_spec  # noqa: E402


def say(*words: object) -> None:
    """One line, and one write, so that a reader of the file never sees half a word."""
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def fill_store(order: Order) -> None:
    say("ready")
    with open_disk_store(order.path, order.kind, example_spec(), "a", SHARD_ROWS) as store:
        for video_ids, views in order.steps:
            store.plan(video_ids, views)
            while shards := store.pending():
                num_held = 0
                for shard in shards:
                    if not order.asks_first:
                        num_held += not _commit_carelessly(store, shard)
                        continue
                    claim = store.claim(shard)
                    if claim.state == "held":
                        say("held", shard.index, claim.holder)
                        num_held += 1
                    elif claim.state == "ours":
                        say("begin", shard.index)
                        if shard.index == order.stops_in:
                            os.kill(os.getpid(), signal.SIGSTOP)
                        try:
                            commit_example(store, shard)
                        except StoreError:
                            if not order.tries_again:
                                raise
                            commit_example(store, shard)
                        say("done", shard.index)
                if num_held:
                    time.sleep(0.005)
        say("finished")


def _commit_carelessly(store: object, shard: Shard) -> bool:
    """As a program would that was started twice by mistake and knows nothing of claims."""
    try:
        commit_example(store, shard)  # type: ignore[arg-type]
    except ShardHeld as error:
        say("held", shard.index, error)
        return False
    say("done", shard.index)
    return True


def leave_out_fsync(order: Order) -> None:
    """Break the file layer on purpose: the fsync that is called from these functions, innermost first, does nothing."""
    fsync = os.fsync

    def maybe(fd: Any) -> None:
        frame, names = sys._getframe(1), []
        for _ in order.left_out:
            names.append(frame.f_code.co_name)
            if frame.f_back is not None:
                frame = frame.f_back
        if tuple(names) != order.left_out:
            fsync(fd)

    os.fsync = maybe


def work(order: Order) -> int:
    """Exit status: errors of the store are told in one line, as the command line does it."""
    if order.left_out:
        leave_out_fsync(order)
    try:
        fill_store(order)
    except StoreError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    except Exception:
        traceback.print_exc()
        return 70
    return 0


def nursery() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            order = Order.from_json(request)
            answer = os.fork()
            if answer == 0:
                for name, descriptor in ((order.output, 1), (order.errors, 2)):
                    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
                if order.waits:
                    os.kill(os.getpid(), signal.SIGSTOP)
                # Not `sys.exit`: what the parent has open is not ours to clean up.
                os._exit(work(order))
            if order.waits:
                os.waitpid(answer, os.WUNTRACED)
        print(answer, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--nursery"]:
        nursery()
    else:
        sys.exit(work(Order(path=sys.argv[1], kind=sys.argv[2])))
