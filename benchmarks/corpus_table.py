"""Write every kind of the corpus, read it, and print what became of it as a table; exit 1 where the corpus says otherwise.

python benchmarks/corpus_table.py > docs/corpus.md
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first.
from contracts.corpus import write_corpus  # noqa: E402
from contracts.corpus_reader import Reader  # noqa: E402


def main() -> None:
    """Print the table and what it sums up to."""
    folder = Path(tempfile.mkdtemp(prefix="corpus_"))
    folder.chmod(0o755)
    kinds = write_corpus(folder)
    num_wrong = 0
    counts: Counter[str] = Counter()
    lines = []
    try:
        with Reader() as reader:
            for kind in kinds:
                outcome = reader.read(kind.path, 20.0, as_nobody=kind.is_closed_to_others)
                counts[outcome.status] += 1
                num_wrong += outcome.status not in kind.statuses or outcome.reason != kind.reason
                name = kind.name.replace("|", "\\|")
                lines.append(f"| {name} | {outcome.status} | {outcome.reason or ''} |")
    finally:
        for kind in kinds:
            if kind.is_closed_to_others and kind.path.parent.exists() and kind.path.exists():
                kind.path.chmod(0o755)
        shutil.rmtree(folder)
    print("# The corpus, kind by kind\n")
    print("Made by `python benchmarks/corpus_table.py > docs/corpus.md`; clips of eight frames, `short_policy = \"pad\"`. "
          f"{len(kinds)} kinds: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
          + f"; {num_wrong} other than `tests/contracts/corpus*.py` state.\n")  # fmt: skip
    print("| kind | status | reason |\n|---|---|---|")
    print("\n".join(lines))
    sys.exit(1 if num_wrong else 0)


if __name__ == "__main__":
    main()
