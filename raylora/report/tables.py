"""Shows rows as tables: Markdown for files, aligned columns for the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(rows: list[dict[str, Any]], screen: Console) -> None:
    """Print rows with aligned columns.

    Args:
        rows: column -> value. All rows have the columns of the first.
        screen: terminal to print to.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, value in (rows[0] if rows else {}).items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    screen.print(table)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a GitHub table.

    Args:
        rows: column -> value. All rows have the columns of the first.
    """
    if not rows:
        return "(no rows)\n"
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(cell(value) for value in row.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def cell(value: Any) -> str:
    """Return a value as a table shows it: None as a dash, numbers to four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
