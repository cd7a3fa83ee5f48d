"""Shows rows as tables of at most 100 columns: Markdown for files, aligned columns for the terminal."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 100
"""Longest line in characters. Wider tables are split, and each part repeats the first column."""


def print_table(rows: list[dict[str, Any]], screen: Console) -> None:
    """Print rows with aligned columns.

    Args:
        rows: column -> value. All rows have the columns of the first.
        screen: terminal to print to.
    """
    for part in fitting(rows):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, value in part[0].items():
            table.add_column(name, justify="left" if isinstance(value, str) else "right")
        for row in part:
            table.add_row(*(cell(value) for value in row.values()))
        screen.print(table)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Return rows as GitHub tables, one below the other where one would be too wide.

    Args:
        rows: column -> value. All rows have the columns of the first.
    """
    parts = []
    for part in fitting(rows):
        lines = [" | ".join(part[0]), " | ".join("---" for _ in part[0])]
        lines += [" | ".join(_escaped(cell(value)) for value in row.values()) for row in part]
        parts.append("".join(f"| {line} |\n" for line in lines))
    return "\n".join(parts) or "(no rows)\n"


def fitting(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows with as many columns at a time as fit, the first column always."""
    if not rows:
        return
    first, *others = rows[0]
    widths = {name: 3 + max(len(name), *(len(_escaped(cell(row[name]))) for row in rows)) for name in rows[0]}
    names, width = [first], widths[first] + 1
    for name in others:
        if width + widths[name] > WIDTH and len(names) > 1:
            yield [{name: row[name] for name in names} for row in rows]
            names, width = [first], widths[first] + 1
        names.append(name)
        width += widths[name]
    yield [{name: row[name] for name in names} for row in rows]


def text_block(pairs: list[tuple[str, str]]) -> str:
    """Return named texts as a fenced block of Markdown, in which nothing is read as Markdown or HTML."""
    margin = max(len(name) for name, _ in pairs) + 2
    lines = []
    for name, text in pairs:
        wrapped = [line for part in text.split("\n") for line in textwrap.wrap(part, WIDTH - margin) or [""]]
        lines += [f"{name if number == 0 else '':{margin}}{line}".rstrip() for number, line in enumerate(wrapped)]
    ticks = max((len(found) for _, text in pairs for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}text\n" + "\n".join(lines) + f"\n{fence}\n"


def cell(value: Any) -> str:
    """Return a value as a table shows it: None as a dash, numbers to four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("\n", " ")


def _escaped(text: str) -> str:
    """Return a cell's text so that Markdown reads neither a column nor an HTML tag in it."""
    return text.replace("|", "\\|").replace("<", "&lt;")
