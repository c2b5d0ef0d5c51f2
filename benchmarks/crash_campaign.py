"""Attack stores while they are written, as often as you like, and count what is lost. The quick forms run as tests.

    python benchmarks/crash_campaign.py kills --trials 200       SIGKILL at random moments, 1, 2 or 4 writers at once
    python benchmarks/crash_campaign.py syscalls                 SIGKILL at every call that changes the disk (strace)
    python benchmarks/crash_campaign.py faults                   ENOSPC, EIO, EACCES, EDQUOT at each of them (strace)
    python benchmarks/crash_campaign.py full                     a disk that is really full, of every size (needs root)
    python benchmarks/crash_campaign.py power --trials 1000      power cuts on a disk that forgets what was not forced to it
    python benchmarks/crash_campaign.py writers --trials 50      four writers on one store, by mistake

Prints one line of a table for each attack and backend; exit status 1 if anything went wrong, with what on stderr.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first, since the benchmarks are no package.
from cache.open import FORMATS  # noqa: E402
from contracts.attacks import Nursery, Tally  # noqa: E402
from contracts.attacks_power import cut_power  # noqa: E402
from contracts.attacks_processes import fill_disk, four_at_once, kill_many  # noqa: E402
from contracts.attacks_strace import ERRORS, attack_calls  # noqa: E402

USUAL_TRIALS = {"kills": 200, "power": 1000, "writers": 50}
ATTACKS = ("kills", "syscalls", "faults", "full", "power", "writers")
COLUMNS = ("attack", "backend", "trials", "acknowledged", "lost", "wrong", "redone", "bad", "seconds")
SHOWN = 40


def run_attack(
    attack: str, kind: str, nursery: Nursery, folder: Path, trials: int, every: int, seed: int
) -> Iterator[tuple[str, Tally]]:
    """Name and outcome of each part of an attack."""
    if attack == "kills":
        yield "kills", kill_many(nursery, folder, kind, trials, seed)
    elif attack == "writers":
        yield "writers", four_at_once(nursery, folder, kind, trials)
    elif attack == "power":
        yield "power", cut_power(nursery, folder, kind, trials, seed)
    elif attack == "full":
        yield "full", fill_disk(nursery, folder, kind)
    else:
        errors = ERRORS if attack == "faults" else ()
        for is_resuming in (False, True):
            name = f"{attack}{', resuming' if is_resuming else ''}"
            yield name, attack_calls(nursery, folder, kind, errors, every, seed, is_resuming)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("--kind", choices=tuple(FORMATS), action="append", help="backend; all of them if not given")
    parser.add_argument("--trials", type=int, help="of kills, power and writers")
    parser.add_argument("--every", type=int, default=1, help="syscalls and faults: take one point of so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the stores are made; a temporary folder if not given")
    options = parser.parse_args()
    trials = options.trials or USUAL_TRIALS.get(options.attack, 0)
    print(" ".join(f"{column:>18}" if column == "attack" else f"{column:>12}" for column in COLUMNS), flush=True)
    num_bad = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, Nursery(Path(folder, "said")) as nursery:
        for kind in options.kind or FORMATS:
            Path(folder, kind).mkdir()
            attacks = run_attack(options.attack, kind, nursery, Path(folder, kind), trials, options.every, options.seed)
            for name, tally in attacks:
                rows = (tally.acknowledged_rows, tally.lost_rows, tally.wrong_rows)
                numbers = (tally.trials, *rows, tally.redone_shards, len(tally.bad), round(tally.seconds))
                print(f"{name:>18} {kind:>12}", *(f"{number:>12}" for number in numbers), flush=True)
                print(*tally.bad[:SHOWN], sep="\n", end="\n" * bool(tally.bad), file=sys.stderr, flush=True)
                num_bad += len(tally.bad)
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
