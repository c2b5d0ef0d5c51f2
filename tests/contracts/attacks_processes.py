"""Writers that are killed at random moments, and writers that get in each other's way. Loads neither pytest nor torch."""

import random
import shutil
import signal
import subprocess
import time
from itertools import count
from pathlib import Path

from cache.open import open_disk_store
from contracts.attacks import Nursery, Order, Said, Tally, look_and_finish, num_commits
from contracts.timed import timed


def kill_many(nursery: Nursery, folder: Path, kind: str, num_kills: int, seed: int) -> Tally:
    """SIGKILL at random moments: a third of the trials with one writer, with two and with four."""
    draws = random.Random(seed)
    with timed(Tally()) as tally:
        num_shards = len(Order("", kind, num_more=40).shards())
        while tally.trials < num_kills:
            num_workers = (1, 2, 4)[tally.trials % 3]
            path = folder / "killed"
            shutil.rmtree(path, ignore_errors=True)
            order = Order(str(path), kind, num_more=40)
            writers = [nursery.start(order) for _ in range(num_workers)]
            for writer in writers:
                # After so many words of this writer, and then some of the milliseconds that a shard takes.
                writer.wait_until_said(draws.randrange(2 * num_shards // num_workers))
                time.sleep(draws.uniform(0, 0.02))
                writer.send(signal.SIGKILL)
            for writer in writers:
                writer.wait()
            said = Said.of(*(writer.output for writer in writers))
            where = f"{kind}, kill {tally.trials} of {num_workers} writers"
            tally.bad += [f"{where}: {writer.errors}" for writer in writers if writer.errors]
            look_and_finish(order, said, tally, where, num_workers)
    return tally


def four_at_once(nursery: Nursery, folder: Path, kind: str, num_trials: int) -> Tally:
    """Four writers, started by mistake on one store, of which two do not even ask who is there."""
    with timed(Tally()) as tally:
        for trial in range(num_trials):
            path, where = folder / "four", f"{kind}, four writers, trial {trial}"
            shutil.rmtree(path, ignore_errors=True)
            orders = [Order(str(path), kind, asks_first=number % 2 == 0) for number in range(4)]
            writers = [nursery.start(order) for order in orders]
            tally.bad += [f"{where}: {writer.errors}" for writer in writers if writer.wait() != 0]
            said = Said.of(*(writer.output for writer in writers))
            commits = num_commits(path)
            if set(commits.values()) != {1}:
                tally.bad.append(f"{where}: commits per shard {dict(commits)}")
            tally.bad += [f"{where}: loser was told {line!r}" for line in said.held if "process " not in line]
            look_and_finish(orders[0], said, tally, where, num_workers=0)
    return tally


def stopped_in_a_shard(nursery: Nursery, folder: Path, kind: str, is_killed: bool) -> list[str]:
    """A writer goes silent while it holds a shard: it keeps it while it lives (SIGSTOP), and loses it when it is killed.

    Returns:
        What went wrong.
    """
    order = Order(str(folder / "stopped"), kind, stops_in=3)
    writer = nursery.start(order)
    writer.wait_until_stopped()
    bad = []
    litter = Path(order.path, "ledger", "x.0123abcd.partial")
    litter.write_bytes(b"half")
    if is_killed:
        writer.send(signal.SIGKILL)
        writer.wait()
    with open_disk_store(order.path, kind, mode="a") as store:
        shard = next(shard for shard in store.pending() if shard.index == order.stops_in)
        claim = store.claim(shard)
        if is_killed and (claim.state != "ours" or litter.exists()):
            bad.append(f"the dead writer still counts: {claim}, litter {litter.exists()}")
        if not is_killed and (claim.state != "held" or f"process {writer.pid} " not in str(claim.holder)):
            bad.append(f"the stopped writer does not count: {claim}")
        if not is_killed and not litter.exists():
            bad.append("what a living writer was writing was taken for litter")
        store.release(shard)
    if not is_killed:
        writer.send(signal.SIGCONT)
        if writer.wait() != 0:
            bad.append(f"the writer could not go on: {writer.errors}")
    tally = Tally()
    look_and_finish(order, Said.of(writer.output), tally, "after the stop")
    # The shard was begun, and nobody but the killed writer's successor makes it again.
    if tally.redone_shards != is_killed:
        bad.append(f"{tally.redone_shards} shards were redone")
    return bad + tally.bad


def fill_disk(nursery: Nursery, folder: Path, kind: str) -> Tally:
    """A file system that is really full: of every size, page by page, until the store fits. Needs the right to mount.

    Raises:
        PermissionError: this process may not mount.
    """
    mount = folder / "full"
    mount.mkdir()
    with timed(Tally()) as tally:
        for num_pages in count(1):
            status, where = -1, f"{kind}, a disk of {4 * num_pages} KiB"
            _mount(mount, f"size={4 * num_pages}k")
            try:
                order = Order(str(mount / "S"), kind)
                writer = nursery.start(order)
                status, message = writer.wait(), writer.errors.strip()
                if status == 0:
                    break
                if status != 1 or "\n" in message or order.path not in message or "No space" not in message:
                    tally.bad.append(f"{where}: exit status {status}, told as {message[-300:]!r}")
                _mount(mount, "remount,size=64m")
                look_and_finish(order, Said.of(writer.output), tally, where)
            finally:
                subprocess.run(["umount", str(mount)], check=True)
    return tally


def _mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise PermissionError(f"cannot mount a small disk: {done.stderr.strip()}; run as root")
