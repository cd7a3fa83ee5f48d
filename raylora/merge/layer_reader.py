"""Reads what is merged, an NF4 base and the adapter's updates, one layer at a time."""

from pathlib import Path

import torch
from bitsandbytes.nn import Params4bit
from transformers import PretrainedConfig

from raylora.base import nf4
from raylora.base.checkpoint_io import Checkpoint
from raylora.errors import MergeError
from raylora.merge.adapter_update import AdapterUpdate


class LayerReader:
    """An NF4 base, its original where there is one, and an adapter."""

    def __init__(
        self,
        checkpoint: Path,
        original: Path | None,
        adapter: Path,
        config: PretrainedConfig,
        *,
        quantized: bool,
        device: str,
        trust_remote_code: bool = False,
    ) -> None:
        """Opens the files; no weight is read.

        Args:
            checkpoint: directory of the base in NF4.
            original: directory of the base in 16 or 32 bits; None where it exists only as NF4.
            adapter: directory that peft wrote.
            config: of the base.
            quantized: whether the adapter was trained on the NF4 base, as QLoRA does, or on the original.
            device: where layers are computed, `cpu` or `cuda:0`.
            trust_remote_code: run model code that the base carries.

        Raises:
            MergeError: the adapter does not fit the base.
        """
        self.updates = AdapterUpdate(adapter, config, trust_remote_code=trust_remote_code)
        names, prefix = self.updates.names, self.updates.prefix
        self.checkpoint = Checkpoint(checkpoint, names, prefix)
        self.original = Checkpoint(original, names, prefix) if original else None
        self._quantized, self._device = quantized, device
        self._tied = bool(config.tie_word_embeddings)
        self.layers = [name for name in self.updates.layers() if self.checkpoint.is_quantized(f"{name}.weight")]
        """Adapted layers that the base holds in 4 bit."""

        for name in self.updates.whole():
            if self.checkpoint.is_quantized(name):
                raise MergeError(f"the adapter replaces {name} (modules_to_save), and the base holds it in 4 bit")

    def nf4_weight(self, name: str) -> Params4bit:
        """A layer's weight before the update.

        Raises:
            MergeError: it is quantized otherwise than in NF4.
        """
        return nf4.from_tensors(name, self.checkpoint.tensors(f"{name}.weight"), self._device)

    def base_weight(self, name: str) -> torch.Tensor:
        """The weight that the adapter was trained on, (out_features, in_features), float32; of any quantized layer."""
        return nf4.dequantize(self.nf4_weight(name)) if self._quantized else self._original(name).float()

    def target(self, name: str, before: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias that a layer has with the adapter on, float32: what the merge is to come near to.

        Args:
            name: of the layer.
            before: what `before` says of it, where that is at hand; it is read otherwise.
        """
        return self.updates.apply(name, self.base_weight(name) if before is None else before, self._bias(name))

    def original_target(self, name: str) -> torch.Tensor:
        """The update added to the original weight instead, (out_features, in_features), float32.

        Raises:
            MergeError: the base exists only as NF4.
        """
        return self.updates.apply(name, self._original(name), self._bias(name))[0]

    def other_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters outside the NF4 weights that the adapter changes, by name, in the base's own types.

        Where embeddings and output head are one in the base and the adapter parts them, both are here.
        """
        changed = dict(self.updates.whole())
        for name in self.updates.layers():
            if name not in self.layers:
                weight, bias = self._plain_layer(name)
                changed |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
            elif self.updates.adds_bias(name):
                changed[f"{name}.bias"] = self.target(name)[1]
        if self._tied and changed.keys() & set(self.updates.embeddings()):
            for name in self.updates.embeddings():
                changed.setdefault(name, self._embeddings())
        return {name: tensor.to(self._embeddings().dtype) for name, tensor in changed.items()}

    def unties_embeddings(self, plain: dict[str, torch.Tensor]) -> bool:
        """Whether embeddings and output head, one in the base, are two with these parameters."""
        first, last = self.updates.embeddings()
        return self._tied and first in plain and not torch.equal(plain[first], plain[last])

    def _plain_layer(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        stored = f"{name}.weight"
        weight = self.checkpoint.tensor(stored) if self.checkpoint.has(stored) else self._embeddings()
        transposed = self.updates.is_transposed(name)
        new, bias = self.updates.apply(name, weight.T if transposed else weight, self._bias(name))
        return new.T.contiguous() if transposed else new, bias

    def _embeddings(self) -> torch.Tensor:
        return self.checkpoint.tensor(self.updates.embeddings()[0])

    def _original(self, name: str) -> torch.Tensor:
        if self.original is None:
            raise MergeError("the base exists only as NF4, without the original weights that this strategy needs")
        weight = self.original.tensor(f"{name}.weight").to(self._device)
        return weight.T if self.updates.is_transposed(name) else weight

    def _bias(self, name: str) -> torch.Tensor | None:
        stored = f"{name}.bias"
        return self.checkpoint.tensor(stored).to(self._device) if self.checkpoint.has(stored) else None
