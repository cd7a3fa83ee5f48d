"""Finds the best QLoRA fine-tune of a model for somebody's data, and merges it into the 4-bit base."""

import logging

# bitsandbytes 0.50 warns on import that an optional CPU kernel is missing, before any command could turn it down
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
