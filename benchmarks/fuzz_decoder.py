"""Read thousands of damaged videos in a child process and count what became of them.

    python benchmarks/fuzz_decoder.py --mutants 2100 --seed 0

Exits with 1 if the reading process died, a file took longer than four times SLOW_SECONDS, or a file that gives fewer frames than its
container declares was called "ok".
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from contracts.corpus_reader import Outcome, Reader  # noqa: E402  found by the line above
from contracts.corpus_writers import FASTSTART, FRAGMENTS, Clip, write_clip  # noqa: E402

SLOW_SECONDS = 3.0
HANG_SECONDS = 4 * SLOW_SECONDS
"""Twice for two passes of decoding, twice for a machine that is shared."""

X265 = {"preset": "ultrafast", "x265-params": "log-level=none"}
FORMS: dict[str, Clip] = {
    "index_behind.mp4": Clip(),
    "index_in_front.mp4": Clip(container_options=FASTSTART, options={"preset": "veryfast", "bf": "2"}),
    "fragments.mp4": Clip(container_options={**FRAGMENTS, "frag_duration": "200000"}),
    "with_sound.mp4": Clip(with_sound=True),
    "hevc.mp4": Clip(codec="libx265", options=X265),
    "matroska.mkv": Clip(options={"preset": "veryfast", "bf": "2"}),
    "live.mkv": Clip(container_options={"live": "1"}),
    "vp8.webm": Clip(codec="libvpx", options={"cpu-used": "8"}),
    "vp9.webm": Clip(codec="libvpx-vp9", options={"cpu-used": "8"}),
    "xvid.avi": Clip(codec="mpeg4"),
    "mjpeg.avi": Clip(codec="mjpeg", pixel_format="yuvj420p"),
    "flash.flv": Clip(codec="flv"),
    "windows.wmv": Clip(codec="wmv2"),
    "transport.ts": Clip(),
    "program.mpg": Clip(codec="mpeg2video"),
    "prores.mov": Clip(codec="prores_ks", pixel_format="yuv422p10le"),
    "animated.gif": Clip(codec="gif", pixel_format="rgb8"),
    "raw.h264": Clip(),
}
"""The videos that are damaged: 24 frames of 64 x 48 pixels each."""


def _flip(content: bytearray, draws: np.random.Generator) -> None:
    for place in draws.integers(0, len(content), draws.integers(1, 65)):
        content[place] ^= int(draws.integers(1, 256))


def _zero(content: bytearray, draws: np.random.Generator) -> None:
    start, length = _block(content, draws)
    content[start : start + length] = bytes(len(content[start : start + length]))


def _cut(content: bytearray, draws: np.random.Generator) -> None:
    del content[int(draws.integers(1, len(content))) :]


def _insert(content: bytearray, draws: np.random.Generator) -> None:
    start, length = _block(content, draws)
    content[start:start] = draws.bytes(length)


def _remove(content: bytearray, draws: np.random.Generator) -> None:
    start, length = _block(content, draws)
    del content[start : start + length]


def _header(content: bytearray, draws: np.random.Generator) -> None:
    """Indices are at the beginning or at the end."""
    length = min(1500, len(content))
    offset = 0 if draws.integers(2) else len(content) - length
    for place in draws.integers(0, length, draws.integers(1, 9)):
        content[offset + place] = int(draws.integers(256))


def _largest(content: bytearray, draws: np.random.Generator) -> None:
    """Four bytes of a header become the largest number."""
    length = min(1500, len(content))
    offset = int(draws.integers(length - 4)) + (0 if draws.integers(2) else len(content) - length)
    content[offset : offset + 4] = b"\xff" * 4


def _block(content: bytearray, draws: np.random.Generator) -> tuple[int, int]:
    return int(draws.integers(len(content))), int(draws.integers(1, max(2, len(content) // 8)))


MUTATIONS: dict[str, Callable[[bytearray, np.random.Generator], None]] = {
    "flip": _flip,
    "zero": _zero,
    "cut": _cut,
    "insert": _insert,
    "remove": _remove,
    "header": _header,
    "largest": _largest,
}


@dataclass(frozen=True)
class Mutant:
    """One damaged file."""

    number: int
    form: str
    mutation: str
    content: bytes


def write_forms(folder: Path, names: Iterable[str] = FORMS) -> dict[str, bytes]:
    """The undamaged videos by their names."""
    return {name: write_clip(folder / name, FORMS[name]).read_bytes() for name in names}


def mutants(originals: dict[str, bytes], num_mutants: int, seed: int) -> Iterator[Mutant]:
    """Each depends on the seed and its number alone; forms and mutations come in turns."""
    forms, mutations = list(originals), list(MUTATIONS)
    for number in range(num_mutants):
        draws = np.random.default_rng([seed, number])
        form, mutation = forms[number % len(forms)], mutations[number // len(forms) % len(mutations)]
        content = bytearray(originals[form])
        MUTATIONS[mutation](content, draws)
        yield Mutant(number, form, mutation, bytes(content))


def run(num_mutants: int, seed: int) -> list[tuple[Mutant, Outcome]]:
    """Read so many mutants."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        originals = write_forms(Path(folder))
        with Reader() as reader:
            for mutant in mutants(originals, num_mutants, seed):
                path = Path(folder) / f"mutant_{mutant.number}{Path(mutant.form).suffix}"
                path.write_bytes(mutant.content)
                results.append((mutant, reader.read(path, HANG_SECONDS)))
                path.unlink()
    return results


def is_failure(outcome: Outcome) -> bool:
    """What must never happen."""
    return outcome.status in ("crash", "hang") or (outcome.status == "ok" and outcome.num_lacking > 0)


def report(results: list[tuple[Mutant, Outcome]]) -> int:
    """Print the table; gives the exit status."""
    counts = Counter((outcome.status, outcome.reason or "") for _, outcome in results)
    print(f"{'status':<10}{'reason':<24}{'files':>6}")
    for (status, reason), count in sorted(counts.items()):
        print(f"{status:<10}{reason:<24}{count:>6}")
    memory = np.array([outcome.rss_bytes for _, outcome in results if outcome.rss_bytes]) / 2**20
    if len(memory) > 1:
        half = memory[len(memory) // 2 :]  # behind the libraries' own growth at the start
        slope = np.polyfit(np.arange(len(half)), half, 1)[0] * 1000
        print(f"memory: at most {memory.max():.0f} MiB, {slope:+.1f} MiB per 1,000 files in the second half")
    slowest, outcome = max(results, key=lambda result: result[1].seconds)
    print(f"slowest: {outcome.seconds:.2f} s, mutant {slowest.number} ({slowest.form}, {slowest.mutation})")
    num_frames = next(iter(FORMS.values())).num_frames
    fewer = [(m, o) for m, o in results if o.status == "ok" and o.num_frames < num_frames]
    print(f"ok with fewer frames than before the damage, none of them declared: {len(fewer)}")
    for (form, mutation), count in sorted(Counter((m.form, m.mutation) for m, _ in fewer).items()):
        print(f"  {form:<22}{mutation:<10}{count:>4}")
    failures = [(m, o) for m, o in results if is_failure(o)]
    for mutant, outcome in failures:
        print(f"FAILED: mutant {mutant.number} ({mutant.form}, {mutant.mutation}): {outcome}")
    print(f"{len(results)} files, {len(failures)} failures")
    return 1 if failures else 0


def main() -> int:
    """Read the command line, run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=2100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    status = report(run(arguments.mutants, arguments.seed))
    print(f"{time.monotonic() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
