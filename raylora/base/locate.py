"""Finds the base model: turns a Hub id, a local directory or a GGUF file into a checkpoint and a tokenizer."""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from raylora.base.architecture import auto_class, check_complete, check_quantization
from raylora.config.schema import BaseModelSection
from raylora.errors import BaseModelError, first_line
from raylora.run.lock import made_once

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
"""File patterns of weights, as transformers names them."""


def is_gguf(section: BaseModelSection) -> bool:
    """Return True if the base model is a GGUF file."""
    return section.name.lower().endswith(".gguf")


def find_checkpoint(section: BaseModelSection, cache_dir: Path) -> str:
    """Return the directory or Hub id of the base in transformers' format.

    Args:
        section: the base model.
        cache_dir: holds converted bases. A GGUF file is converted once, to bfloat16.

    Raises:
        BaseModelError: the path is missing, holds no weights, or is no readable GGUF file.
    """
    path = Path(section.name).expanduser()
    if is_gguf(section):
        return str(_convert_gguf_once(path, cache_dir))
    if path.is_dir():
        check_directory(path)
        return str(path)
    if not is_hub_id(section.name):
        raise BaseModelError(f"base model not found: {section.name} is no directory, GGUF file or Hub id (owner/name)")
    return section.name


def check_directory(directory: Path) -> None:
    """Check that a directory holds a whole model.

    Raises:
        BaseModelError: its config or some of its weights are missing.
    """
    if not (directory / "config.json").is_file():
        raise BaseModelError(f"{directory} holds no config.json, so it is no model directory of transformers")
    if not any(next(directory.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise BaseModelError(f"{directory} holds no weights: must hold one of {', '.join(WEIGHT_PATTERNS)}")
    for index in directory.glob("*.index.json"):
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(file for file in files if not (directory / file).is_file())
        if missing:
            raise BaseModelError(f"{directory} lacks {len(missing)} of {len(files)} weight files, such as {missing[0]}")


def is_hub_id(name: str) -> bool:
    """Return True if the name has the form of a Hub id, `owner/name`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def load_model_config(section: BaseModelSection, checkpoint: str) -> PretrainedConfig:
    """Load the base's architecture without its weights.

    Args:
        section: the base model.
        checkpoint: from `find_checkpoint`.

    Raises:
        BaseModelError: the config cannot be found or loaded, or the base is of a kind that raylora does not fine-tune.
    """
    with hub_errors_explained(section):
        config = AutoConfig.from_pretrained(checkpoint, **source_options(section))
        auto_class(config)
        check_quantization(config)
        return config


def load_tokenizer(section: BaseModelSection, checkpoint: str) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, with a pad token.

    If the tokenizer has no pad token, EOS becomes the pad token. This is safe: labels and attention masks come from
    row lengths, so no EOS is taken for padding.

    Args:
        section: the base model.
        checkpoint: from `find_checkpoint`.

    Raises:
        BaseModelError: the tokenizer cannot be loaded, or has neither a pad token nor EOS.
    """
    with hub_errors_explained(section):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **source_options(section))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BaseModelError(f"the tokenizer of {section.name} has neither a pad token nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def source_options(section: BaseModelSection) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say where a base comes from: revision and remote code."""
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if section.revision is not None:
        options["revision"] = section.revision
    return options


def _convert_gguf_once(path: Path, cache_dir: Path) -> Path:
    """Return the cached bfloat16 copy of a GGUF file. Convert the file first if the copy is missing."""
    if not path.is_file():
        raise BaseModelError(f"base model not found: {path}")
    return made_once(cache_dir / "gguf" / digest(*file_state(path)), partial(_convert_gguf, path))


def _convert_gguf(path: Path, directory: Path) -> None:
    """Write a GGUF file as a bfloat16 model directory of transformers."""
    try:
        fields = gguf.GGUFReader(path).fields
    except Exception as error:  # the reader passes on whatever numpy raises for a broken file
        raise BaseModelError(f"{path} is not a readable GGUF file: {error}") from error
    n_parts = int(fields["split.count"].contents()) if "split.count" in fields else 1
    if n_parts > 1:
        raise BaseModelError(
            f"{path} is one of {n_parts} parts; join them by `llama-gguf-split --merge FIRST OUTPUT` of llama.cpp, or "
            "name the base's Hub id"
        )
    with contextlib.redirect_stderr(io.StringIO()):  # the loader's progress bar has no switch
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
            raise BaseModelError(
                f"transformers cannot read {path}: {first_line(error)}; name the base's Hub id or a directory instead"
            ) from error
    check_complete(found, str(path))
    # transformers keeps the GGUF quantizer on the dequantized model, and save_pretrained would call it
    del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)


def file_state(path: Path) -> tuple[str, int, int]:
    """Return a file's path, size in bytes and modification time in ns: a cheap key for its content."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def digest(*parts: object) -> str:
    """Return 16 hexadecimal digits that stand for the parts, as the name of a cache directory."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def hub_errors_explained(section: BaseModelSection) -> Iterator[None]:
    """Turn errors of the Hub and of transformers into a `BaseModelError` of one line with the cure."""
    try:
        yield
    except GatedRepoError as error:
        raise BaseModelError(
            f"{section.name} is gated: accept its licence on its Hub page, then `hf auth login` on every node"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BaseModelError(
            f"the Hub has no model {section.name} at revision {section.revision or 'main'} that you may read; "
            "check the spelling, and `hf auth login` for a private one"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, BaseModelError):
            raise
        text = str(error)
        if "gated repo" in text:
            raise BaseModelError(
                f"{section.name} is gated: accept its licence on its Hub page, then `hf auth login`"
            ) from error
        if "couldn't connect" in text or "offline" in text.lower() or "Connection" in text:
            raise BaseModelError(
                f"{section.name} is not in the local Hub cache and the Hub cannot be reached; "
                "check the network, or give a local directory or GGUF file"
            ) from error
        raise BaseModelError(f"{section.name} cannot be loaded: {first_line(error)}") from error
