"""Converts a merged bf16 model to GGUF by llama.cpp's own script, and quantizes it by llama.cpp's own library."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from raylora.errors import ConfigError, MergeError, first_line
from raylora.machine import n_cpus
from raylora.run.lock import made_once

CONVERTER = "convert_hf_to_gguf.py"
"""Script of llama.cpp that knows the GGUF tensor names and tokenizers of all its architectures."""

SOURCES = "llama-cpp-python==0.3.36"
"""Source package that holds llama.cpp, with the converter and what it imports. Wheels leave them out."""

PARTS = (CONVERTER, "conversion", "gguf-py")
"""Parts of llama.cpp that the converter needs."""

FILE_TYPES = {"q8_0": 7, "q4_k_m": 15}
"""Quantization -> its number in llama.cpp (`enum llama_ftype` of llama.h)."""


def find_converter(llama_cpp: Path | None, cache_dir: Path) -> Path:
    """Return the path of llama.cpp's converter.

    Args:
        llama_cpp: checkout of llama.cpp; None takes it from the source package of llama-cpp-python, once.
        cache_dir: keeps what was taken.

    Raises:
        ConfigError: the checkout does not hold the converter, or the package cannot be downloaded.
    """
    if llama_cpp is None:
        llama_cpp = made_once(cache_dir / f"llama.cpp-{SOURCES.partition('==')[2]}", _download)
    if not (llama_cpp / CONVERTER).is_file():
        raise ConfigError(f"--llama-cpp must be a checkout of llama.cpp that holds {CONVERTER}, found {llama_cpp}")
    if importlib.util.find_spec("sentencepiece") is None:
        raise ConfigError("llama.cpp's converter needs sentencepiece; `pip install sentencepiece`")
    return llama_cpp / CONVERTER


def _download(directory: Path) -> None:
    """Take the converter out of the source package of llama-cpp-python."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "pip", "download", SOURCES, "--no-deps", "--no-binary", "llama-cpp-python", "-d", folder]
        ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        archive = next(Path(folder).glob("*.tar.gz"), None)
        if archive is None:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"{SOURCES} cannot be downloaded: {last}; name a checkout of llama.cpp by --llama-cpp")
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        source = next(Path(folder).glob("*/vendor/llama.cpp"))
        directory.mkdir()
        for part in PARTS:
            shutil.move(source / part, directory / part)


def check_quantizer(file_type: str, llama_cpp: Path | None) -> None:
    """Check that a quantization can be made.

    Args:
        file_type: `bf16`, which needs nothing, or a key of `FILE_TYPES`.
        llama_cpp: checkout of llama.cpp, if there is one.

    Raises:
        ConfigError: neither llama-cpp-python nor llama-quantize is here.
    """
    if file_type in FILE_TYPES and importlib.util.find_spec("llama_cpp") is None and _program(llama_cpp) is None:
        raise ConfigError(
            f"{file_type} needs llama.cpp: `pip install llama-cpp-python`, or llama-quantize on the PATH or in "
            "--llama-cpp"
        )


def convert(converter: Path, model: Path, output: Path) -> None:
    """Convert a model directory to a GGUF file in bfloat16.

    Args:
        converter: from `find_converter`.
        model: directory of the merged model in bf16.
        output: file to write.

    Raises:
        MergeError: the converter failed.
    """
    command = [sys.executable, "-B", str(converter), str(model), "--outfile", str(output), "--outtype", "bf16"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    if ended.returncode or not output.is_file():
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise MergeError(f"{converter} ended with {ended.returncode}: {last}; its packages are in its requirements.txt")


def quantize(source: Path, output: Path, file_type: str, llama_cpp: Path | None) -> None:
    """Quantize a GGUF file.

    Args:
        source: file in bfloat16.
        output: file to write.
        file_type: key of `FILE_TYPES`.
        llama_cpp: checkout of llama.cpp, whose llama-quantize is used if llama-cpp-python is not installed.

    Raises:
        MergeError: llama.cpp failed.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        program = _program(llama_cpp)
        assert program is not None  # `check_quantizer`
        ended = subprocess.run([program, source, output, file_type], capture_output=True, text=True, check=False)
        failed = first_line(MergeError(ended.stderr)) if ended.returncode else None
    else:
        failed = _quantize_in_process(source, output, file_type)
    if failed or not output.is_file():
        raise MergeError(f"llama.cpp could not quantize {source} to {file_type}: {failed}")


def _quantize_in_process(source: Path, output: Path, file_type: str) -> str | None:
    """Quantize by the library of llama-cpp-python. Return what failed, or None."""
    import llama_cpp  # noqa: PLC0415  # not among the packages that raylora needs

    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[file_type], n_cpus()
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(settings))
    return f"code {code}" if code else None


def _program(llama_cpp: Path | None) -> str | None:
    """Return the path of llama-quantize: on the PATH, or in the build folder of a checkout."""
    return shutil.which("llama-quantize") or (
        shutil.which("llama-quantize", path=str(llama_cpp / "build" / "bin")) if llama_cpp else None
    )
