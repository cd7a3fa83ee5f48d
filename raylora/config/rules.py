"""Checks values of settings by rules that a type cannot say. Each raises a ValueError that states the rule."""

import re
from typing import Any

from raylora.config.assignment import hint
from raylora.config.optimizers import OPTIMIZERS

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attention by its names in transformers 5.23."""


def known_attention(name: str) -> str:
    """Return the name of an attention of transformers, or of a kernel of the Hub, `owner/name`."""
    if name not in ATTENTION and "/" not in name:
        raise ValueError(f"unknown attention {name}{hint(name, ATTENTION)}")
    return name


def known_optimizer(name: str) -> str:
    """Return the name of an optimizer of transformers."""
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name}{hint(name, OPTIMIZERS)}")
    return name


def share_or_count(size: float) -> float:
    """Return a share below 1, or a whole number of rows."""
    if size >= 1 and not float(size).is_integer():
        raise ValueError(f"must be a share below 1, or a whole number of rows, found {size}")
    return size


def pattern_with_group(pattern: str) -> str:
    """Return a regular expression that has a group."""
    try:
        n_groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    if not n_groups:
        raise ValueError("must have a group (...), which is the answer")
    return pattern


def split_names(names: Any) -> Any:
    """Return comma-separated names as a list; `none` names nothing. Other values are checked by their type."""
    if not isinstance(names, str):
        return names
    return [] if names == "none" else [name.strip() for name in names.split(",")]


def local_path(path: str) -> str:
    """Return a path that is no URL."""
    if "://" in path:
        raise ValueError(f"must be a local path, found {path}")
    return path
