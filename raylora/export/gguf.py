"""Converts a merged bf16 model to GGUF with llama.cpp's own script."""

import os
import subprocess
import sys
from pathlib import Path

from raylora.errors import ConfigError, MergeError

CONVERTER = "convert_hf_to_gguf.py"
"""Script of llama.cpp that knows the GGUF tensor names and tokenizers of all its architectures."""


def find_converter(llama_cpp: Path | None) -> Path:
    """Return the path of llama.cpp's converter.

    Args:
        llama_cpp: checkout of llama.cpp; None if the user gave none.

    Raises:
        ConfigError: the checkout is missing or does not hold the converter.
    """
    if llama_cpp is None or not (llama_cpp / CONVERTER).is_file():
        raise ConfigError(f"gguf needs --llama-cpp, a checkout of llama.cpp that holds {CONVERTER}, found {llama_cpp}")
    return llama_cpp / CONVERTER


def convert(converter: Path, model: Path, output: Path) -> None:
    """Convert a model directory to a GGUF file in bfloat16.

    Args:
        converter: from `find_converter`.
        model: directory of the merged model in bf16.
        output: file to write.

    Raises:
        MergeError: the converter failed.
    """
    command = [sys.executable, str(converter), str(model), "--outfile", str(output), "--outtype", "bf16"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    if ended.returncode or not output.is_file():
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise MergeError(f"{converter} ended with {ended.returncode}: {last}; its packages are in its requirements.txt")
