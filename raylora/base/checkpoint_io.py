"""Reads and writes model checkpoints tensor by tensor, so that at most one shard is in memory."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from raylora.base.names import TensorNames, is_state, without_state
from raylora.errors import MergeError
from raylora.run.atomic import write_json

SHARD_BYTES = 2 * 2**30
"""Largest shard to write, in bytes. Our choice: a merge keeps one shard in memory."""

N_SAMPLED, N_ROWS = 16, 8
"""Tensors of a file, and rows of each, that a fingerprint hashes. Our choice: milliseconds, and no two bases alike."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
"""File patterns of weights and their indexes, as transformers names them."""

UNUSED = ("original/*", "consolidated*", "*.gguf", "*.onnx", "*.onnx_data", "*.pth", "*.h5", "*.msgpack", "*.tflite")
"""File patterns of a Hub repository that transformers does not load: other formats of the same weights."""


class Checkpoint:
    """A model directory whose tensors are read one at a time, under their names in the model."""

    def __init__(self, directory: Path, names: TensorNames) -> None:
        """Open a directory without reading its tensors.

        Args:
            directory: holds *.safetensors or pytorch_model*.bin.
            names: translates names in the checkpoint to names in the model.

        Raises:
            MergeError: the directory holds no weights.
        """
        self.directory = directory
        self._readers: dict[str, Callable[[], torch.Tensor]] = {}
        self._stored: dict[str, str] = {}
        for file in sorted(directory.glob("*.safetensors")):
            reader = safe_open(str(file), framework="pt")
            self._add(reader.keys(), reader.get_tensor, names)
        if not self._readers:
            for file in sorted(directory.glob("pytorch_model*.bin")):
                tensors = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
                self._add(tensors, tensors.__getitem__, names)
        if not self._readers:
            raise MergeError(f"{directory} holds no weights: neither *.safetensors nor pytorch_model*.bin")

    def _add(self, stored: Iterable[str], read: Callable[[str], torch.Tensor], names: TensorNames) -> None:
        """Map each stored name to the parameter's name in the model."""
        for name in stored:
            in_model = names.to_model(name)
            self._readers[in_model] = partial(read, name)
            self._stored[in_model] = name

    def stored_name(self, name: str) -> str:
        """Return the name under which the checkpoint stores a tensor; the name itself if it stores none."""
        weight = without_state(name)
        return self._stored.get(weight, weight) + name[len(weight) :]

    def weights(self) -> list[str]:
        """Return the names of all parameters in file order, without the scales of quantized weights."""
        return [name for name in self._readers if not is_state(name)]

    def is_quantized(self, name: str) -> bool:
        """Return True if the parameter is quantized, so that scales are stored beside it."""
        return f"{name}.absmax" in self._readers

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read one parameter and, if it is quantized, its scales.

        Returns:
            Stored name -> tensor, on the CPU.

        Raises:
            MergeError: no parameter has that name.
        """
        if name not in self._readers:
            raise MergeError(f"{self.directory} has no tensor {name}, which the adapter updates: is this its base?")
        state = [other for other in self._readers if other.startswith(f"{name}.")]
        return {one: self._readers[one]() for one in (name, *state)}

    def tensor(self, name: str) -> torch.Tensor:
        """Read one unquantized parameter, on the CPU.

        Raises:
            MergeError: no parameter has that name.
        """
        return self.tensors(name)[name]

    def has(self, name: str) -> bool:
        """Return True if the checkpoint stores a parameter of that name."""
        return name in self._readers

    def size(self) -> int:
        """Return the size of the weights on disk, in bytes."""
        return sum(file.stat().st_size for pattern in WEIGHTS for file in self.directory.glob(pattern))

    def copy_rest(self, directory: Path) -> None:
        """Copy every file except the weights: config, tokenizer, generation settings, licence."""
        weights = {file for pattern in WEIGHTS for file in self.directory.glob(pattern)}
        for file in sorted(self.directory.iterdir()):
            if file.is_file() and file not in weights and not file.name.startswith("."):
                shutil.copy(file, directory)


def local_directory(checkpoint: str, revision: str | None) -> Path:
    """Return the local directory of a checkpoint. Take a Hub id from the Hub cache, or download it."""
    path = Path(checkpoint)
    return (
        path if path.is_dir() else Path(snapshot_download(checkpoint, revision=revision, ignore_patterns=list(UNUSED)))
    )


def fingerprint(checkpoint: str, revision: str | None) -> str:
    """Return 16 hexadecimal digits that stand for the weights of a base: a hash of a few rows of some tensors.

    Args:
        checkpoint: directory or Hub id.
        revision: Hub branch, tag or commit.
    """
    digest = hashlib.sha256()
    for file in sorted(local_directory(checkpoint, revision).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            names = sorted(tensors.keys())
            for name in names[:: max(1, len(names) // N_SAMPLED)]:
                part = tensors.get_slice(name)
                rows = part[:N_ROWS] if part.get_shape() else tensors.get_tensor(name)
                digest.update(name.encode() + rows.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class ShardWriter:
    """Writer of safetensors shards of bounded size and of the index that transformers reads."""

    def __init__(self, directory: Path, name: Callable[[str], str] = str, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Set up for a new checkpoint.

        Args:
            directory: empty folder.
            name: turns the name of a tensor into that under which it is stored.
            shard_bytes: largest size of a shard in bytes.
        """
        self._directory, self._name, self._shard_bytes = directory, name, shard_bytes
        self._shard: dict[str, torch.Tensor] = {}
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Add tensors that must share a shard, such as a quantized weight and its scales."""
        new = sum(tensor.nbytes for tensor in tensors.values())
        if self._shard and sum(tensor.nbytes for tensor in self._shard.values()) + new > self._shard_bytes:
            self._flush()
        self._shard |= {self._name(name): tensor.contiguous().cpu() for name, tensor in tensors.items()}
        self._total_bytes += new

    def close(self) -> None:
        """Write the last shard, give the shards their final names, and write the index of several shards."""
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
        """Write the current shard under a temporary name."""
        if self._shard:
            self._written.append(list(self._shard))
            save_file(self._shard, self._file(len(self._written)), metadata={"format": "pt"})
            self._shard = {}

    def _file(self, number: int) -> Path:
        """Return the temporary name of a shard, since the final one holds the number of shards."""
        return self._directory / f"shard-{number}.tmp"


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of a model's `config.json`, also in its text model's part. Remove a key whose value is None."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config", {})):
        part.update({key: value for key, value in changes.items() if key in part or part is config})
    removed = {key for key, value in changes.items() if value is None}
    write_json(directory / "config.json", {key: value for key, value in config.items() if key not in removed})
