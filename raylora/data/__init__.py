"""Turns data files and Hub data sets into tokenised, disjoint parts."""

from raylora.data.chat_template import stop_token_ids
from raylora.data.prepare import PreparedData, prepare_data
from raylora.data.rows import load_part

__all__ = ["PreparedData", "load_part", "prepare_data", "stop_token_ids"]
