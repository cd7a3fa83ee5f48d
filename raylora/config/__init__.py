"""Turns YAML files and the command line into one frozen set of settings."""

from raylora.config.schema import BaseModelSection, DataSection, SearchConfig

__all__ = ["BaseModelSection", "DataSection", "SearchConfig"]
