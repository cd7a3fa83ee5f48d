"""Says what a base is made of without loading its weights: class, linear layers, and which of them an adapter targets.

Bases that raylora cannot fine-tune are refused here, with the reason and a way on.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import bitsandbytes
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from raylora.errors import BaseModelError, ConfigError

MAMBA_TYPES, MAMBA_REFUSED = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}, {"out_proj", "conv1d"}
"""Model types in which peft refuses to adapt some layers, whose weights fused kernels read (peft 0.21,
`_check_lora_target_modules_mamba` in peft/tuners/tuners_utils.py)."""

MOE_REFUSED = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Names of layers that peft takes for those of the experts, which are one parameter in transformers 5, so that it would
adapt the experts instead (peft 0.21, `_MOE_TARGET_MODULE_MAPPING` in peft/utils/transformers_weight_conversion.py)."""

EXPERT_DIMENSIONS = 3
"""Dimensions of a parameter that holds the weights of several experts: (n_experts, out, in)."""


def dense_weight(layer: torch.nn.Module) -> torch.Tensor:
    """Return the weight of a linear layer as a dense matrix.

    Args:
        layer: `Linear`, bitsandbytes' `Linear4bit` (dequantized here), or GPT-2's `Conv1D` (transposed here).

    Returns:
        (out_features, in_features), in the layer's dtype.
    """
    weight = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.t() if isinstance(layer, Conv1D) else weight


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads a base: for text, or for text with images.

    A model that reads images too is trained on text alone, and stays whole.

    Args:
        config: config of the base.

    Raises:
        BaseModelError: the base writes no text, token after token.
    """
    kind = type(config)
    if config.is_encoder_decoder:
        raise BaseModelError(
            f"{kind.model_type} is an encoder-decoder, and raylora fine-tunes causal language models; name one, such "
            "as Llama or Qwen"
        )
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForCausalLM
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise BaseModelError(f"{kind.model_type} is no causal language model; name one that generates text")


def position_limit(config: PretrainedConfig) -> int | None:
    """Return the number of positions that a base has an embedding for; None if it rotates embeddings, or has none."""
    text = config.get_text_config()
    return None if getattr(text, "rope_parameters", None) else getattr(text, "max_position_embeddings", None)


def check_quantization(config: PretrainedConfig) -> None:
    """Check that a base is in 16 or 32 bit, or in bitsandbytes' NF4.

    Raises:
        BaseModelError: it is quantized in another way, whose weights raylora can neither train on nor merge into.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = values.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in values else "unknown")
    if method == "bitsandbytes" and values.get("load_in_8bit"):
        method = "bitsandbytes in 8 bit"
    elif method == "bitsandbytes":
        if values.get("bnb_4bit_quant_type") == "nf4":
            return
        method = f"bitsandbytes in {values.get('bnb_4bit_quant_type')}"
    raise BaseModelError(
        f"the base is quantized by {method}, and raylora trains on 16-bit bases, which it quantizes itself, and on "
        "bitsandbytes' NF4; name the 16-bit original (often the same Hub id without FP8, GPTQ, AWQ or 8bit)"
    )


def check_complete(found: dict[str, Any], checkpoint: str) -> None:
    """Check what `from_pretrained` says of the weights that it found.

    Args:
        found: its `output_loading_info`.
        checkpoint: name of the base, for the message.

    Raises:
        BaseModelError: weights are missing.
    """
    missing = sorted(found["missing_keys"])
    if missing:
        raise BaseModelError(
            f"{checkpoint} lacks {len(missing)} weights, such as {missing[0]}, which would be random; "
            "download it again, and all its parts"
        )


def without_weights(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the base as a model whose parameters have no memory.

    Args:
        config: config of the base.
        trust_remote_code: run model code that the base carries.
    """
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Architecture:
    """Linear layers and size of a base."""

    shapes: dict[str, tuple[int, int]]
    """Linear layer that an adapter may adapt -> (in_features, out_features): those of the language model, except the
    output head, in the model's order."""

    others: frozenset[str]
    """Names of linear layers that are never adapted: of a vision tower, or those that peft cannot adapt."""

    n_linear: int
    """Weights of all these layers, which QLoRA stores in 4 bit."""

    n_rest: int
    """Other parameters, which stay in 16 bit: embeddings, output head, norms and experts."""

    n_experts: int
    """Weights of experts that share one parameter, a part of `n_rest`. bitsandbytes does not quantize them."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Architecture":
        """Return the architecture of a model, with or without weights."""
        head, decoder = model.get_output_embeddings(), model.get_decoder()
        inside = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
        sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
        experts = [name for name, shape in sizes.items() if "expert" in name and len(shape) == EXPERT_DIMENSIONS]
        refused = MOE_REFUSED if experts else MAMBA_REFUSED if model.config.model_type in MAMBA_TYPES else set()
        shapes, others, n_linear = {}, set(), 0
        for name, module in model.named_modules():
            if module is head or not isinstance(module, torch.nn.Linear | Conv1D):
                continue
            shape = (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
            n_linear += shape[0] * shape[1]
            if name.startswith(inside) and _leaf(name) not in refused:
                shapes[name] = shape
            else:
                others.add(name)
        linear = {*shapes, *others}
        return cls(
            shapes=shapes,
            others=frozenset(others),
            n_linear=n_linear,
            n_rest=sum(shape.numel() for name, shape in sizes.items() if name.removesuffix(".weight") not in linear),
            n_experts=sum(sizes[name].numel() for name in experts),
        )

    @classmethod
    def of_config(cls, config: PretrainedConfig, *, trust_remote_code: bool = False) -> "Architecture":
        """Return the architecture of a base by its config; no weights are needed."""
        return cls.of(without_weights(config, trust_remote_code=trust_remote_code))

    def targets(self, setting: str) -> list[str]:
        """Return the module names for peft's `target_modules`.

        Args:
            setting: `all-linear`, `attention`, `mlp`, or module names joined by commas.

        Returns:
            The last part of each name if that selects exactly the chosen layers, else full names.

        Raises:
            ConfigError: no layer has one of the given names.
        """
        if setting == "all-linear":
            chosen = list(self.shapes)
        elif setting in ("attention", "mlp"):
            chosen = [name for name in self.shapes if _is_attention(name) == (setting == "attention")]
        else:
            given = setting.split(",")
            unknown = [one for one in given if not any(is_target(name, [one]) for name in self.shapes)]
            if unknown:
                raise ConfigError(
                    f"target_modules: no module is named {', '.join(unknown)}; the model has {', '.join(self._leaves)}"
                )
            chosen = [name for name in self.shapes if is_target(name, given)]
        short = sorted({_leaf(name) for name in chosen})
        rest = (self.shapes.keys() | self.others) - set(chosen)
        return chosen if {_leaf(name) for name in rest} & set(short) else short

    def adapted(self, setting: str) -> dict[str, tuple[int, int]]:
        """Return the shapes of the layers that a setting of `target_modules` adapts."""
        targets = self.targets(setting)
        return {name: shape for name, shape in self.shapes.items() if is_target(name, targets)}

    def notes(self) -> list[str]:
        """Return a sentence on each part of the base that is not adapted."""
        found = []
        if self.n_experts:
            found.append(
                f"note: {self.n_experts:,} weights of experts stay in 16 bit and are not adapted; what is adapted: "
                f"{', '.join(self._leaves)}"
            )
        if self.others:
            names = sorted({_leaf(name) for name in self.others})
            found.append(f"note: {len(self.others)} linear layers are not adapted, such as {', '.join(names[:4])}")
        return found

    @cached_property
    def _leaves(self) -> list[str]:
        return sorted({_leaf(name) for name in self.shapes})


def is_target(name: str, targets: list[str]) -> bool:
    """Return True if the module is among `targets`.

    Args:
        name: full name of a module.
        targets: from `Architecture.targets`.

    Source: the name matching of peft 0.21, `check_target_module_exists` in peft/tuners/tuners_utils.py.
    """
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_attention(name: str) -> bool:
    """Return True if a layer belongs to attention by its name."""
    return "attn" in name or "attention" in name


def _leaf(name: str) -> str:
    """Return the last part of a name."""
    return name.rpartition(".")[2]
