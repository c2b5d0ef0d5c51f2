"""Attack runs while they train, as often as you like, and hold each against a run in peace, to the bit. The quick forms run as tests.

    python benchmarks/training_kills.py                          all of it, for every mode
    python benchmarks/training_kills.py kills --trials 100       SIGKILL at random instants, one to five times in a run
    python benchmarks/training_kills.py calls                    SIGKILL at every call that changes the run's folder (strace)
    python benchmarks/training_kills.py damage --trials 30       the last checkpoint damaged, the logs torn, and killed again
    python benchmarks/training_kills.py stops --trials 30        SIGINT, SIGTERM and SIGUSR1 at random instants
    python benchmarks/training_kills.py second                   a second process on the same folder

Prints one line of a table for each attack and mode: where kills fell (before the first checkpoint, between validations, in one,
after the last one, after the end), how many left a file half written, damaged checkpoints that were passed over, and what is
different in the end (`bad`, with what on stderr; then the exit status is 1).
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first, since the benchmarks are no package.
from contracts.attacks_training import PLACES, Tally, Trainers, make_recipes  # noqa: E402
from contracts.attacks_training_calls import STARTS, kill_at_calls  # noqa: E402
from contracts.attacks_training_kills import (  # noqa: E402
    damage_many,
    evaluate_both,
    kill_many,
    refuse_second,
    stop_many,
)
from contracts.timed import timed  # noqa: E402
from contracts.training_recipes import MODES, Recipe  # noqa: E402

USUAL_TRIALS = {"kills": 100, "damage": 30, "stops": 30}
ATTACKS = ("kills", "calls", "damage", "stops", "second")
COLUMNS = ("trials", "kills", *PLACES, "in a write", "passed over", "bad", "seconds")
SHOWN = 40


def run_attack(
    attack: str, trainers: Trainers, recipe: Recipe, folder: Path, trials: int, every: int, seed: int
) -> Iterator[tuple[str, Tally]]:
    """Name and outcome of each part of an attack."""
    trials = trials or USUAL_TRIALS.get(attack, 0)
    if attack == "kills":
        tally = kill_many(trainers, recipe, folder, trials, seed)
        tally.bad += evaluate_both(trainers, recipe, folder / "killed" / "run")
        yield attack, tally
    elif attack == "damage":
        yield attack, damage_many(trainers, recipe, folder, trials, seed)
    elif attack == "stops":
        yield attack, stop_many(trainers, recipe, folder, trials, seed)
    elif attack == "second":
        with timed(Tally(trials=1)) as tally:
            tally.bad += refuse_second(trainers, recipe, folder)
        yield attack, tally
    else:
        for start in STARTS:
            yield f"calls, {start}", kill_at_calls(trainers, recipe, folder, start, every, seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attack", nargs="*", help=f"of {', '.join(ATTACKS)}; all of them if not given")
    parser.add_argument("--mode", choices=tuple(MODES), action="append", help="all of them if not given")
    parser.add_argument("--trials", type=int, default=0, help="of kills, damage and stops")
    parser.add_argument("--every", type=int, default=1, help="calls: take one of so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are made; a temporary folder if not given")
    options = parser.parse_args()
    if unknown := set(options.attack) - set(ATTACKS):
        parser.error(f"no attack {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}")
    print(f"{'attack':>16} {'mode':>11}", *(f"{column:>8}" for column in COLUMNS), flush=True)
    num_bad = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, Trainers(Path(folder, "said")) as trainers:
        recipes = make_recipes(trainers, Path(folder), options.mode or tuple(MODES))
        for attack in options.attack or ATTACKS:
            for mode, recipe in recipes.items():
                parts = run_attack(
                    attack, trainers, recipe, Path(folder, mode), options.trials, options.every, options.seed
                )
                for name, tally in parts:
                    places = [tally.places[place] for place in PLACES]
                    counts = (tally.trials, tally.kills, *places, tally.in_a_write, tally.passed_over, len(tally.bad))
                    numbers = (
                        f"{number:>{max(8, len(column))}}" for number, column in zip(counts, COLUMNS, strict=False)
                    )
                    print(f"{name:>16} {mode:>11}", *numbers, f"{tally.seconds:>8.0f}", flush=True)
                    print(*tally.bad[:SHOWN], sep="\n", end="\n" * bool(tally.bad), file=sys.stderr, flush=True)
                    num_bad += len(tally.bad)
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
