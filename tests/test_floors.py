"""Imports run downwards only, and the light doors stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "extract": set(),
    "cache": set(),
    "episodes": set(),
    "configs": {"extract", "cache", "episodes"},
    "pipeline": {"extract", "cache", "episodes", "configs"},
    "cli": {"extract", "cache", "episodes", "configs", "pipeline"},
}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names & set(MAY_IMPORT)


def files_of(room: str) -> list[Path]:
    return [ROOT / "cli.py"] if room == "cli" else sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_imports_only_what_lies_below(room: str) -> None:
    files = files_of(room)
    assert files, f"room {room} has no files"
    wrong = {
        str(file.relative_to(ROOT)): found
        for file in files
        if (found := imported_rooms(file) - {room} - MAY_IMPORT[room])
    }
    assert not wrong


def test_cache_room_never_imports_torch() -> None:
    for file in files_of("cache"):
        assert "torch" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }, file


def test_room_inits_are_empty() -> None:
    for room in ("extract", "extract/backbones", "cache", "episodes", "episodes/heads", "configs", "pipeline"):
        assert (ROOT / room / "__init__.py").read_text() == ""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["dataset", "scan", "--help"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys, cli\n"
        f"sys.argv = ['mastaf', *{arguments!r}]\n"
        "try:\n    cli.main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'torchvision', 'transformers', 'zarr', 'av', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: mastaf" in done.stdout


def test_every_package_is_listed_in_the_project_file() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        str(init.parent.relative_to(ROOT)).replace("/", ".")
        for room in MAY_IMPORT
        if room != "cli"
        for init in (ROOT / room).rglob("__init__.py")
    }
    assert listed == found


def test_git_ignores_nothing_of_the_cache_room() -> None:
    done = subprocess.run(
        ["git", "check-ignore", "cache/store.py", "cache/new_store.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
