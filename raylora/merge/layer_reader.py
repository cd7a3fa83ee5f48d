"""Reads an NF4 base and the updates of an adapter, one layer at a time."""

from pathlib import Path

import torch
from bitsandbytes.nn import Params4bit
from transformers import PretrainedConfig

from raylora.base import nf4
from raylora.base.checkpoint_io import Checkpoint
from raylora.errors import MergeError
from raylora.merge.adapter_update import AdapterUpdate


class LayerReader:
    """Reader of an NF4 base, of its 16-bit original if there is one, and of an adapter."""

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
        """Open the files without reading a weight.

        Args:
            checkpoint: directory of the base in NF4.
            original: directory of the base in 16 or 32 bit; None if the base exists only in NF4.
            adapter: directory that peft wrote.
            config: config of the base.
            quantized: True if the adapter was trained on the NF4 base (QLoRA), False if on the original (LoRA).
            device: device of the weights that are read, `cpu` or `cuda:0`.
            trust_remote_code: run model code that the base carries.

        Raises:
            MergeError: the adapter does not fit the base.
        """
        self.updates = AdapterUpdate(adapter, config, trust_remote_code=trust_remote_code)
        self.checkpoint = Checkpoint(checkpoint, self.updates.names)
        self.original = Checkpoint(original, self.updates.names) if original else None
        self._quantized, self._device = quantized, device
        self._tied = bool(config.get_text_config().tie_word_embeddings)
        self.layers = [name for name in self.updates.layers() if self.checkpoint.is_quantized(f"{name}.weight")]
        """Names of the adapted layers that the base stores in 4 bit."""

        for name in self.updates.replaced_parameters():
            if self.checkpoint.is_quantized(name):
                raise MergeError(f"the adapter replaces {name} (modules_to_save), which the base stores in 4 bit")

    def nf4_weight(self, name: str) -> Params4bit:
        """Return a layer's NF4 weight without the update.

        Raises:
            MergeError: the weight is not quantized to NF4.
        """
        return nf4.from_tensors(name, self.checkpoint.tensors(f"{name}.weight"), self._device)

    def base_weight(self, name: str) -> torch.Tensor:
        """Return the weight that the adapter was trained on: dequantized NF4, or the original.

        Args:
            name: any layer that the base stores in 4 bit.

        Returns:
            (out_features, in_features), float32.
        """
        return nf4.dequantize(self.nf4_weight(name)) if self._quantized else self._original(name).float()

    def target(self, name: str, base_weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight and bias of a layer with the adapter on, which the merge should come near to.

        Args:
            name: one of `layers`.
            base_weight: `base_weight(name)` if the caller has it; None reads it.

        Returns:
            (out_features, in_features) and (out_features,), float32. The bias is None if the layer has none.
        """
        return self.updates.apply(
            name, self.base_weight(name) if base_weight is None else base_weight, self._bias(name)
        )

    def original_target(self, name: str) -> torch.Tensor:
        """Return the original weight plus the update, (out_features, in_features), float32.

        Raises:
            MergeError: the base exists only in NF4.
        """
        return self.updates.apply(name, self._original(name), self._bias(name))[0]

    def other_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters that the adapter changes besides the NF4 weights.

        If the adapter changes embeddings that the base ties to the output head, both are returned.

        Returns:
            Name in the base -> value, in the dtype of the base's embeddings.
        """
        changed = dict(self.updates.replaced_parameters())
        for name in self.updates.layers():
            if name not in self.layers:
                weight, bias = self._plain_layer(name)
                changed |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
            elif self.updates.adds_bias(name):
                changed[f"{name}.bias"] = self.target(name)[1]
        for name, (token_ids, rows) in self.updates.trained_tokens().items():
            stored = self.checkpoint.tensor(name) if self.checkpoint.has(name) else self._embeddings()
            changed[name] = changed.get(name, stored).float().clone()
            changed[name][token_ids] = rows.float()
        if self._tied and changed.keys() & set(self.updates.embeddings()):
            for name in self.updates.embeddings():
                changed.setdefault(name, self._embeddings())
        return {name: tensor.to(self._embeddings().dtype) for name, tensor in changed.items()}

    def unties_embeddings(self, plain: dict[str, torch.Tensor]) -> bool:
        """Return True if the adapter unties the tied input embeddings and output head.

        Args:
            plain: from `other_parameters`.
        """
        inputs, outputs = self.updates.embeddings()
        return self._tied and inputs in plain and not torch.equal(plain[inputs], plain[outputs])

    def _plain_layer(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return updated weight and bias of an adapted layer that is not quantized, as the base stores them."""
        stored = f"{name}.weight"
        is_tied_head = self._tied and stored == self.updates.embeddings()[1] and not self.checkpoint.has(stored)
        weight = self._embeddings() if is_tied_head else self.checkpoint.tensor(stored)
        transposed = self.updates.is_transposed(name)
        new, bias = self.updates.apply(name, weight.T if transposed else weight, self._bias(name))
        return new.T.contiguous() if transposed else new, bias

    def _embeddings(self) -> torch.Tensor:
        """Return the weight of the input embeddings."""
        return self.checkpoint.tensor(self.updates.embeddings()[0])

    def _original(self, name: str) -> torch.Tensor:
        """Return a layer's original weight, (out_features, in_features)."""
        if self.original is None:
            raise MergeError("the base exists only in NF4, and this strategy needs its original weights")
        weight = self.original.tensor(f"{name}.weight").to(self._device)
        return weight.T if self.updates.is_transposed(name) else weight

    def _bias(self, name: str) -> torch.Tensor | None:
        """Return a layer's bias in the base, (out_features,), or None."""
        stored = f"{name}.bias"
        return self.checkpoint.tensor(stored).to(self._device) if self.checkpoint.has(stored) else None
