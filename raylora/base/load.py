"""Loads the frozen base model onto a device, quantized to NF4 once and cached."""

import gc
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from raylora.base.architecture import auto_class, check_complete
from raylora.base.locate import (
    digest,
    file_state,
    find_checkpoint,
    hub_errors_explained,
    load_model_config,
    source_options,
)
from raylora.config.schema import BaseModelSection
from raylora.run.lock import made_once

NF4_VERSION = 2
"""Version of the NF4 copies in the cache. Raise it when their form changes."""


def compute_dtype(section: BaseModelSection, device: str) -> torch.dtype:
    """Return the dtype of activations and dequantized weights.

    Returns:
        The dtype that the config sets; for `auto`, bfloat16 on a GPU, float16 on a GPU that only emulates bfloat16 (T4,
        V100), and float32 on a CPU. A head without a GPU takes its cluster's for one with bfloat16.
    """
    if section.compute_dtype != "auto":
        return getattr(torch, section.compute_dtype)
    if device == "cpu":
        return torch.float32
    emulates = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if emulates else torch.bfloat16


def load_base_model(section: BaseModelSection, cache_dir: Path, device: str) -> PreTrainedModel:
    """Load the frozen base onto one device, in NF4 or unquantized as the config says.

    Args:
        section: the base model, its quantization and its dtype.
        cache_dir: holds converted and quantized bases. An NF4 base that is missing there is quantized first.
        device: `cpu` or `cuda:0`.

    Raises:
        BaseModelError: the base cannot be found or loaded.
    """
    dtype = compute_dtype(section, device)
    checkpoint = find_checkpoint(section, cache_dir)
    options = source_options(section)
    with hub_errors_explained(section):
        if section.quantization == "nf4":
            nf4 = nf4_checkpoint(section, cache_dir, device)
            if nf4 != checkpoint:
                options.pop("revision", None)
            checkpoint = nf4
        model = load_plain(checkpoint, device, dtype, attn_implementation=section.attn_implementation, **options)
    model.requires_grad_(False)
    return model


def nf4_checkpoint(section: BaseModelSection, cache_dir: Path, device: str) -> str:
    """Return the directory or Hub id of the base in NF4.

    Returns:
        The base itself if its checkpoint is quantized; else its NF4 copy in the cache, which is made if it is missing.

    Raises:
        BaseModelError: the base cannot be found or loaded.
    """
    checkpoint = find_checkpoint(section, cache_dir)
    with hub_errors_explained(section):
        if is_quantized(load_model_config(section, checkpoint)):
            return checkpoint
        return str(_quantize_once(section, checkpoint, cache_dir, device))


def load_plain(checkpoint: str, device: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Load a checkpoint by `from_pretrained`, as any user of transformers would, in evaluation mode.

    Models that nothing uses any more are freed first.

    Args:
        checkpoint: directory or Hub id.
        device: `cpu` or `cuda:0`.
        dtype: dtype of the unquantized parameters, and of the products of 4-bit layers.
        options: further arguments of `from_pretrained`.

    Raises:
        BaseModelError: the checkpoint lacks weights, which transformers would draw at random.
    """
    free_unused()
    source = {key: value for key, value in options.items() if key in ("trust_remote_code", "revision")}
    kind = auto_class(AutoConfig.from_pretrained(checkpoint, **source))
    model, found = kind.from_pretrained(
        checkpoint, dtype=dtype, device_map={"": device}, output_loading_info=True, **options
    )
    check_complete(found, checkpoint)
    model.eval()
    for parameter in model.parameters():
        # the codes of a 4-bit weight may be stored as if they were bfloat16, for FSDP
        if parameter.dtype in (torch.bfloat16, torch.float16) and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)  # transformers 5.23 leaves parts of a quantized base as stored
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weight at the first forward in evaluation mode.
            # The repacked weight needs a bfloat16 kernel that has no backward pass, so training would get no gradient
            # through the layer. See docs/design.md, "The CPU kernel that stops training".
            module.support_avx512bf16_for_cpu = False
            # a checkpoint that is already quantized brings a compute dtype of its own, float32 if it names none
            module.compute_dtype, module.compute_type_is_set = dtype, True
    return model


def free_unused() -> None:
    """Free models that nothing uses any more, and the memory that torch keeps of them.

    A 4-bit layer and its weight refer to each other (bitsandbytes 0.50), so that a model outlives its last name until
    Python collects garbage. Python does so by the number of objects, and a model has few.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_quantized(config: PretrainedConfig) -> bool:
    """Return True if the checkpoint itself is quantized, so that no 16-bit original exists."""
    return getattr(config, "quantization_config", None) is not None


def nf4_config(section: BaseModelSection, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return QLoRA's 4-bit settings for transformers.

    Source: Dettmers et al. 2023, "QLoRA", sections 2 and 3 (arXiv:2305.14314).
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _narrow(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Store the unquantized parameters in the base's own dtype, where that loses nothing."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            narrow = parameter.data.to(dtype)
            if torch.equal(narrow.float(), parameter.data):
                parameter.data = narrow


def _quantize_once(section: BaseModelSection, checkpoint: str, cache_dir: Path, device: str) -> Path:
    """Return the cached NF4 copy of a base. Quantize it first if it is missing."""
    dtype = compute_dtype(section, device)
    config = load_model_config(section, checkpoint)
    own_dtype = config.get_text_config().dtype or config.dtype
    commit = getattr(config, "_commit_hash", None) or section.revision
    files = sorted(Path(checkpoint).glob("*")) if Path(checkpoint).is_dir() else []
    states = [state for file in files if file.is_file() for state in file_state(file)]
    directory = cache_dir / "nf4" / digest(NF4_VERSION, checkpoint, commit, section.double_quant, dtype, *states)

    def quantize(temporary: Path) -> None:
        quantization = nf4_config(section, dtype)
        model = load_plain(checkpoint, device, dtype, quantization_config=quantization, **source_options(section))
        if own_dtype in (torch.bfloat16, torch.float16):
            _narrow(model, own_dtype)
        model.save_pretrained(temporary)

    return made_once(directory, quantize)
