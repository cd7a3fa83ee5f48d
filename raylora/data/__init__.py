"""Turns files or Hub data sets into tokenised, disjoint train, validation and held-out parts."""

from raylora.data.prepare import PreparedData, load_prepared, prepare_data
from raylora.data.split import PARTS
from raylora.data.tokens import load_part

__all__ = ["PARTS", "PreparedData", "load_part", "load_prepared", "prepare_data"]
