"""Attacks by strace: SIGKILL or an error of the system at the n-th call of the commit path, for every n.

Loads neither pytest nor torch.
"""

import random
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from contracts.attacks import Nursery, Order, Said, Tally, look_and_finish
from contracts.timed import timed

EFFECTS = (
    *("write", "pwrite64", "writev", "pwritev", "pwritev2", "ftruncate", "truncate", "fallocate", "copy_file_range"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat"),
    *("mkdir", "mkdirat", "rmdir", "fsync", "fdatasync", "sendfile", "splice", "mknod", "mknodat"),
)
"""Calls that change what is on disk, or force it there; `openat` comes on top, where it creates."""
OPENS = ("openat", "open", "creat", "openat2")
ERRORS = ("ENOSPC", "EIO", "EACCES", "EDQUOT")
_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|\?)(?:<[^>]*>)?(?: (E\w+).*)?")
_UNFINISHED = re.compile(r"(\d+) +(.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)")
_TEXT = re.compile(r'(?:"|(\d+)<)((?:\\x[0-9a-f]{2})*)["<>]')


@dataclass(frozen=True, slots=True)
class Call:
    """One system call of a writer."""

    thread: int
    name: str
    number: int
    """How many calls of this name the thread had made, this one included."""
    texts: tuple[bytes, ...]
    """Paths and data among the arguments, in order; the path of a descriptor counts as one."""
    arguments: tuple[str, ...]
    """All arguments as strace writes them."""
    result: int
    """-1 after an error, or when the thread was killed."""

    @property
    def path(self) -> str:
        """The file that the call is about; of a rename or a link, the one that it makes."""
        is_move = self.name.startswith(("rename", "link"))
        return self.texts[-1 if is_move else 0].decode() if self.texts else ""


@dataclass(frozen=True, slots=True)
class Traced:
    """A writer that ran under strace."""

    status: int
    said: Said
    errors: str
    calls: tuple[Call, ...]


class Attacked(Protocol):
    """A process that the attack may signal and wait for."""

    @property
    def pid(self) -> int:
        """Of the system."""

    def send(self, signal_number: int) -> None:
        """Signal it."""

    def wait(self) -> int:
        """Exit status, when it has ended."""


def run_traced(nursery: Nursery, order: Order, log: Path, calls: Sequence[str], attack: str = "") -> Traced:
    """Run a writer under strace, from after its imports to its end.

    Args:
        calls: names to trace; threads of the writer are traced as well.
        attack: strace's `inject` expression.
    """
    writer = nursery.start(Order(**{**order.__dict__, "waits": True}))
    status = trace(writer, log, calls, attack)
    return Traced(status, Said.of(writer.output), writer.errors, tuple(read_trace(log)))


def trace(process: Attacked, log: Path, calls: Sequence[str], attack: str = "", num_bytes: int = 10_000_000) -> int:
    """Let a process that has stopped itself run to its end under strace; its exit status. The calls are in `log`.

    Args:
        calls: names to trace, of all threads; a name that this machine lacks is fine.
        attack: strace's `inject` expression.
        num_bytes: at which the texts among the arguments are cut.
    """
    # -xx: all texts in hex, so that no quote or bracket within can confuse.
    command = ["strace", "-f", "-y", "-xx", "-s", str(num_bytes), "-p", str(process.pid), "-o", str(log)]
    command += ["-e", "trace=" + ",".join(f"?{name}" for name in calls)]
    command += ["-e", f"inject={attack}"] if attack else []
    try:
        strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise RuntimeError("these attacks need strace: apt-get install strace") from None
    with strace:
        assert strace.stderr is not None
        first_line = strace.stderr.readline()
        process.send(signal.SIGCONT)
        status = process.wait()
        rest = strace.stderr.read()
    if "attached" not in first_line:
        raise RuntimeError(f"strace could not attach to the process: {first_line}{rest}")
    return status


def read_trace(log: Path) -> list[Call]:
    """The calls of a trace, in the order in which they returned."""
    begun: dict[str, str] = {}
    numbers: Counter[tuple[str, str]] = Counter()
    calls = []
    for line in log.read_text().splitlines():
        if unfinished := _UNFINISHED.fullmatch(line):
            begun[unfinished[1]] = unfinished[0].removesuffix(" <unfinished ...>")
            continue
        resumed = _RESUMED.fullmatch(line)
        match = _LINE.fullmatch(begun.pop(resumed[1]) + resumed[2] if resumed else line)
        if match is None:
            continue  # signals, and the ends of threads
        thread, name, arguments, result, _ = match.groups()
        numbers[thread, name] += 1
        texts = tuple(
            bytes.fromhex(text[2].replace("\\x", ""))
            for text in _TEXT.finditer(re.sub(r"AT_FDCWD<[^>]*>, ", "", arguments))
        )
        parts = tuple(arguments.split(", "))
        number = -1 if result == "?" else int(result)
        calls.append(Call(int(thread), name, numbers[thread, name], texts, parts, number))
    return calls


def points(calls: Iterable[Call | None], path: str) -> list[Call]:
    """The calls that change something within a store."""
    return [
        call
        for call in calls
        if call is not None
        and (call.path == path or call.path.startswith(f"{path}/") or call.path == str(Path(path).parent))
        and (call.name in EFFECTS or (call.name in OPENS and re.search("O_CREAT|O_DIRECTORY", str(call.arguments))))
        and "O_NONBLOCK" not in str(call.arguments)
    ]


def small_order(path: Path, kind: str) -> Order:
    """Four shards, in two steps of the plan."""
    return Order(str(path), kind, num_views=1, num_more=4)


def leave_half_done(nursery: Nursery, folder: Path, kind: str) -> Path:
    """A store whose writer was killed in its third shard, with all that one can leave behind."""
    order = small_order(folder / "half", kind)
    shutil.rmtree(order.path, ignore_errors=True)
    writer = nursery.start(Order(**{**order.__dict__, "stops_in": 2}))
    writer.wait_until_stopped()
    writer.send(signal.SIGKILL)
    writer.wait()
    path = Path(order.path)
    log = next((path / "ledger").glob("*.jsonl"))
    log.write_bytes(log.read_bytes() + b'{"crc32":"0123')
    (path / "ledger" / "plan-000001.json.0123abcd.partial").write_bytes(b'{"docu')
    return path


def attack_calls(
    nursery: Nursery, folder: Path, kind: str, errors: Sequence[str], every: int, seed: int, is_resuming: bool
) -> Tally:
    """One trial for each call of the commit path: the writer is killed there, or the call fails.

    Args:
        errors: names of errors, each a trial of its own; empty to kill.
        every: take one of so many points, from a random first one.
        is_resuming: attack a writer that goes on where one was killed, instead of the first.
    """
    order, log = small_order(folder / "S", kind), folder / "trace.txt"
    half = leave_half_done(nursery, folder, kind) if is_resuming else None

    def fresh() -> None:
        shutil.rmtree(order.path, ignore_errors=True)
        if half is not None:
            shutil.copytree(half, order.path)

    with timed(Tally()) as tally:
        fresh()
        whole = run_traced(nursery, order, log, (*EFFECTS, *OPENS))
        if whole.status != 0 or not whole.said.is_finished:
            raise RuntimeError(f"the traced writer failed: {whole.errors}")
        targets = [
            (call, error)
            for call in points(whole.calls, order.path)
            for error in (errors or ("",))
            if error or call.name not in OPENS
        ]
        for call, error in targets[random.Random(seed).randrange(every) :: every]:
            fresh()
            how = f"error={error}" if error else "signal=KILL"
            traced = run_traced(nursery, order, log, [call.name], f"{call.name}:{how}:when={call.number}")
            name = call.path.removeprefix(order.path)
            where = f"{kind}, {how} at {call.name} {call.number} ({name or '/'}){', resuming' if is_resuming else ''}"
            tally.bad += [f"{where}: {what}" for what in _wrong_end(traced, call, error)]
            look_and_finish(order, traced.said, tally, where)
    return tally


def _wrong_end(traced: Traced, call: Call, error: str) -> list[str]:
    if not error:
        return [] if traced.status == -signal.SIGKILL else [f"not reached, exit status {traced.status}"]
    if traced.status == 0:
        return ["the error went unnoticed"]
    message = traced.errors.strip()
    if traced.status != 1 or "\n" in message or str(Path(call.path).parent) not in message:
        return [f"exit status {traced.status}, told as {message[-300:]!r}"]
    return []
