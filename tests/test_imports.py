"""A folder imports only from folders above it, and Ray, torch and the terminal stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "raylora"

ORDER = (
    "config",
    "run",
    "base",
    "data",
    "training",
    "search",
    "merge",
    "evaluate",
    "report",
    "trackers",
    "export",
    "cli",
)
"""Folders from the first stage to the last."""

ENTRY_POINTS = {"compare", "doctor", "init", "status", "testing", "trial"}
"""Top-level modules that are commands; they and `__main__.py` files may import anything, and nobody imports them."""

FOUNDATIONS = {"errors", "machine", "quiet"}
"""Top-level modules that every folder may import."""

HEAVY = ("torch", "ray", "transformers", "peft", "trl", "datasets", "bitsandbytes", "optuna")


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[tuple[str, ...]]:
    """Parts of the names, below `raylora`, of our own modules that a file imports."""
    names = (name.split(".") for name in imported(path))
    return {tuple(parts[1:]) for parts in names if parts[0] == "raylora" and len(parts) > 1}


def is_entry_point(path: Path) -> bool:
    return path.name == "__main__.py" or path.relative_to(PACKAGE).with_suffix("").name in ENTRY_POINTS


def test_every_folder_has_its_place() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ORDER)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *ENTRY_POINTS, *FOUNDATIONS}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_folder_imports_only_from_folders_above_it(path: Path) -> None:
    if is_entry_point(path) or path == PACKAGE / "cli" / "app.py":
        return
    parts = path.relative_to(PACKAGE).parts
    for name in own(path):
        if name[0] in FOUNDATIONS or name[0] == "__version__":
            continue
        assert name[0] not in ENTRY_POINTS and "__main__" not in name, f"{path} imports the command {name}"
        assert len(parts) > 1, f"{path} is a foundation and imports {name}"
        assert ORDER.index(name[0]) <= ORDER.index(parts[0]), f"{path} imports {name}, which stands below it"


def test_nothing_imports_in_a_circle() -> None:
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): {
            candidate
            for name in own(path)
            for candidate in (".".join(name), ".".join(name[:-1]))
            if (PACKAGE / Path(*candidate.split("."))).with_suffix(".py").is_file()
        }
        for path in modules()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"{' -> '.join([*way, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_and_the_terminal_stay_where_they_belong(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    packages = {name.split(".")[0] for name in imported(path)}
    if "ray" in packages:
        assert path.parent == PACKAGE / "search" / "ray" or is_entry_point(path)
    if packages & {"rich", "typer"}:
        assert folder in ("report", "cli") or is_entry_point(path)


@pytest.mark.parametrize(
    "module",
    [
        "raylora.cli.app",
        "raylora.report.page",
        "raylora.report.comparison",
        "raylora.trackers.follow",
        *sorted(
            f"raylora.{folder}.{path.stem}"
            for folder in ("config", "run")
            for path in (PACKAGE / folder).glob("[a-z]*.py")
        ),
    ],
)
def test_what_must_answer_at_once_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
