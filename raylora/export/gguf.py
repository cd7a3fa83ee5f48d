"""Converts a merged bf16 model to GGUF with llama.cpp's own script."""

import os
import subprocess
import sys
from pathlib import Path

from raylora.errors import ConfigError, MergeError

CONVERTER = "convert_hf_to_gguf.py"
"""llama.cpp's own script, which knows every architecture's GGUF names and tokenizers."""


def find_converter(llama_cpp: Path | None) -> Path:
    if llama_cpp is None or not (llama_cpp / CONVERTER).is_file():
        raise ConfigError(f"gguf needs --llama-cpp, a checkout of llama.cpp that holds {CONVERTER}, found {llama_cpp}")
    return llama_cpp / CONVERTER


def convert(converter: Path, model: Path, output: Path) -> None:
    command = [sys.executable, str(converter), str(model), "--outfile", str(output), "--outtype", "bf16"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    if ended.returncode or not output.is_file():
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise MergeError(f"{converter} ended with {ended.returncode}: {last}; what it needs is in its requirements.txt")
