"""The folder that a command is told to write into, looked at before any work."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from pipeline.settings import SetupError


def check_output_folder(folder: Path) -> None:
    """Make a folder, write a file into it, and take both away again: a command that fails later leaves nothing behind.

    Raises:
        SetupError: it is a file, or nothing can be written there.
    """
    made: list[Path] = []
    try:
        if folder.is_file():
            raise SetupError(f"--out {folder} is a file; give a folder.")
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SetupError(f"nothing can be written into {folder} ({reason}); give another folder with --out.") from error
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()
