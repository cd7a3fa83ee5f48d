"""Finds search space files: the user's own, or one that ships with raylora."""

import sysconfig
from pathlib import Path

DEFAULT = "qlora.yaml"


def find_space(space: Path | None) -> Path:
    """Return a search space file.

    Args:
        space: path of a file; or the name of one that ships with raylora, also in `search_spaces/`. None is
            `qlora.yaml`.
    """
    if space is not None and (space.exists() or space.parent not in (Path(), Path("search_spaces"))):
        return space
    name = DEFAULT if space is None else space.name
    shipped = next((folder / name for folder in _folders() if (folder / name).is_file()), None)
    return shipped or space or Path(name)


def _folders() -> tuple[Path, Path]:
    """Return the folders that hold shipped files: of a checkout, and of an installed wheel."""
    return Path(__file__).parents[2] / "search_spaces", Path(sysconfig.get_path("data"), "share/raylora/search_spaces")
