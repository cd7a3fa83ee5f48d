"""Loads the frozen base model onto a device, quantized to NF4 once and cached."""

from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from raylora.base.locate import (
    digest,
    file_state,
    find_checkpoint,
    hub_errors_explained,
    load_model_config,
    lock_file,
    source_options,
)
from raylora.config.schema import BaseModelSection
from raylora.run.atomic import replacing


def compute_dtype(section: BaseModelSection, device: str) -> torch.dtype:
    """Type of activations and of expanded weights: as set, else bfloat16 on a GPU and float32 on a CPU."""
    if section.compute_dtype != "auto":
        return getattr(torch, section.compute_dtype)
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def load_base_model(section: BaseModelSection, cache_dir: Path, device: str) -> PreTrainedModel:
    """The frozen base on one device: NF4 from the cache (quantized first if need be), or unquantized.

    Args:
        section: which model, and how.
        cache_dir: holds converted and quantized bases.
        device: `cpu` or `cuda:0`.

    Raises:
        BaseModelError: it cannot be found or loaded.
    """
    dtype = compute_dtype(section, device)
    checkpoint = find_checkpoint(section, cache_dir)
    options = source_options(section)
    with hub_errors_explained(section):
        if section.quantization == "nf4":
            nf4 = nf4_checkpoint(section, cache_dir, device)
            checkpoint, options = nf4, options if nf4 == checkpoint else {}
        model = load_plain(checkpoint, device, dtype, attn_implementation=section.attn_implementation, **options)
    model.requires_grad_(False)
    return model


def nf4_checkpoint(section: BaseModelSection, cache_dir: Path, device: str) -> str:
    """Directory or Hub id of the base in NF4: as it is where it is quantized already, else from the cache."""
    checkpoint = find_checkpoint(section, cache_dir)
    with hub_errors_explained(section):
        if is_quantized(load_model_config(section, checkpoint)):
            return checkpoint
        return str(_quantized(section, checkpoint, cache_dir, device))


def load_plain(checkpoint: str, device: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """What any user of transformers would do: `from_pretrained` on one device, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map={"": device}, **options).eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weight at the first forward in evaluation mode,
            # for a bfloat16 kernel without a backward pass: from then on training gets no gradient through the layer.
            # See docs/design.md, "The CPU kernel that stops training".
            module.support_avx512bf16_for_cpu = False
    return model


def is_quantized(config: PretrainedConfig) -> bool:
    """Whether the checkpoint is quantized already, so that no 16-bit original is at hand."""
    return getattr(config, "quantization_config", None) is not None


def nf4_config(section: BaseModelSection, dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's 4-bit settings (arXiv:2305.14314, sections 2 and 3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _quantized(section: BaseModelSection, checkpoint: str, cache_dir: Path, device: str) -> Path:
    dtype = compute_dtype(section, device)
    config = load_model_config(section, checkpoint)
    commit = getattr(config, "_commit_hash", None) or section.revision
    files = sorted(Path(checkpoint).glob("*")) if Path(checkpoint).is_dir() else []
    states = [state for file in files if file.is_file() for state in file_state(file)]
    directory = cache_dir / "nf4" / digest(checkpoint, commit, section.double_quant, dtype, *states)
    with FileLock(lock_file(directory)):
        if not directory.is_dir():
            model = load_plain(
                checkpoint, device, dtype, quantization_config=nf4_config(section, dtype), **source_options(section)
            )
            with replacing(directory) as temporary:
                model.save_pretrained(temporary)
    return directory
