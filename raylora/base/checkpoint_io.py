"""Reads and writes model checkpoints tensor by tensor, so that no more than one shard is ever in memory."""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from raylora.errors import MergeError
from raylora.run.atomic import write_json

SHARD_BYTES = 2 * 2**30
"""Size of a shard that is written."""


WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


_STATE = re.compile(r"(?<=\.weight)\..+")
"""What bitsandbytes appends to the name of a quantized weight: `.absmax`, `.quant_map` and the like."""


class Checkpoint:
    """A model directory whose tensors are read one at a time, by the names that they have in the model."""

    def __init__(self, directory: Path, names: Collection[str], prefix: str) -> None:
        """Opens a directory.

        Args:
            directory: holds safetensors or pytorch_model*.bin.
            names: of the model's parameters.
            prefix: the model's `base_model_prefix`, which some checkpoints leave out.

        Raises:
            MergeError: it holds no weights.
        """
        self.directory = directory
        self._readers: dict[str, Callable[[], torch.Tensor]] = {}
        for file in sorted(directory.glob("*.safetensors")):
            reader = safe_open(str(file), framework="pt")
            self._add(reader.keys(), reader.get_tensor, names, prefix)
        if not self._readers:
            for file in sorted(directory.glob("pytorch_model*.bin")):
                tensors = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
                self._add(tensors, tensors.__getitem__, names, prefix)
        if not self._readers:
            raise MergeError(f"{directory} holds no weights: neither *.safetensors nor pytorch_model*.bin")

    def _add(
        self, stored: Iterable[str], read: Callable[[str], torch.Tensor], names: Collection[str], prefix: str
    ) -> None:
        for name in stored:
            possible = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
            in_model = next((one for one in possible if _STATE.sub("", one) in names), name)
            self._readers[in_model] = partial(read, name)

    def weights(self) -> list[str]:
        """All parameters, in the order of the files; a quantized weight's scales belong to it and are not named."""
        return [name for name in self._readers if not _STATE.search(name)]

    def is_quantized(self, name: str) -> bool:
        """Whether a parameter has scales of its own."""
        return f"{name}.absmax" in self._readers

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """A parameter and, if it is quantized, the scales that belong to it, on the CPU.

        Raises:
            MergeError: there is none of that name.
        """
        if name not in self._readers:
            raise MergeError(f"{self.directory} has no tensor {name}, which the adapter updates: is this its base?")
        state = [other for other in self._readers if other.startswith(f"{name}.")]
        return {one: self._readers[one]() for one in (name, *state)}

    def tensor(self, name: str) -> torch.Tensor:
        """One parameter that is not quantized, on the CPU."""
        return self.tensors(name)[name]

    def has(self, name: str) -> bool:
        """Whether there is a parameter of that name."""
        return name in self._readers

    def size(self) -> int:
        """Bytes of the weights on disk."""
        return sum(file.stat().st_size for pattern in WEIGHTS for file in self.directory.glob(pattern))

    def copy_rest(self, directory: Path) -> None:
        """Copies every file but the weights: config, tokenizer, generation settings, licence."""
        weights = {file for pattern in WEIGHTS for file in self.directory.glob(pattern)}
        for file in sorted(self.directory.iterdir()):
            if file.is_file() and file not in weights and not file.name.startswith("."):
                shutil.copy(file, directory)


def local_directory(checkpoint: str, revision: str | None) -> Path:
    """A checkpoint's files on this machine; a Hub id is looked up in the Hub cache, and downloaded if need be."""
    path = Path(checkpoint)
    return path if path.is_dir() else Path(snapshot_download(checkpoint, revision=revision))


class ShardWriter:
    """Writes safetensors shards of bounded size and their index, as transformers reads them."""

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory, self._shard_bytes = directory, shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Adds tensors that belong together, and so go into one shard."""
        new = sum(tensor.nbytes for tensor in tensors.values())
        if self._shard and sum(tensor.nbytes for tensor in self._shard.values()) + new > self._shard_bytes:
            self._flush()
        self._shard |= {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        self._total_bytes += new

    def close(self) -> None:
        """Writes what is left, names the shards and, if they are several, writes the index."""
        self._flush()
        n = len(self._written)
        if n == 1:
            self._file(1).rename(self._directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written, 1):
            file = f"model-{number:05}-of-{n:05}.safetensors"
            self._file(number).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self._directory / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        if self._shard:
            self._written.append(list(self._shard))
            save_file(self._shard, self._file(len(self._written)), metadata={"format": "pt"})
            self._shard = {}

    def _file(self, number: int) -> Path:
        return self._directory / f"shard-{number}.tmp"


def edit_config(directory: Path, **changes: Any) -> None:
    """Changes keys of a model's `config.json`; a key set to None is removed."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")) | changes
    removed = {key for key, value in changes.items() if value is None}
    write_json(directory / "config.json", {key: value for key, value in config.items() if key not in removed})
