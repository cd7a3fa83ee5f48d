"""Makes a Llama of random NF4 weights on a device in seconds, without writing 16-bit weights to disk first."""

from typing import Any

import datasets
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from throughput import LENGTH, RANDOM
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from raylora.base.architecture import Architecture
from raylora.base.load import nf4_config
from raylora.config.schema import BaseModelSection, TrainingSection
from raylora.data.rows import IGNORE
from raylora.training.trl import TrlEngine

SHAPES: dict[str, dict[str, Any]] = {
    **RANDOM,
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 300},
}  # fmt: skip
"""Name -> shape: Llama 3.2 1B, Llama 2 7B, SmolLM2-135M, and one for a dry run."""


def make_base(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Make a frozen base whose linear layers, except the head, are random weights in NF4.

    Args:
        shape: key of `SHAPES`.
        device: `cpu` or `cuda:0`.
        dtype: dtype of activations and of what is not quantized.
    """
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=8192))
    torch.set_default_dtype(default)
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            base.set_submodule(name, _quantized(module, device, dtype))
        for key, parameter in list(module.named_parameters(recurse=False)):
            if name == "lm_head" or not isinstance(module, nn.Linear):  # the others are quantized by now
                values = torch.empty(parameter.shape, device=device, dtype=dtype)
                values = values.normal_(0, 0.02) if parameter.dim() > 1 else values.fill_(1.0)
                setattr(module, key, nn.Parameter(values, requires_grad=False))
    # its angles are buffers, which "meta" has left without values
    base.model.rotary_emb = type(base.model.rotary_emb)(config=base.config).to(device)
    base.tie_weights()
    base.requires_grad_(False).eval()
    base.is_loaded_in_4bit = True  # by which peft and TRL know it
    base.config.quantization_config = nf4_config(BaseModelSection(name=""), dtype)
    return base


def _quantized(linear: nn.Linear, device: str, dtype: torch.dtype) -> Linear4bit:
    """Return a 4-bit layer of random weights."""
    weight = torch.empty(linear.out_features, linear.in_features, device=device, dtype=dtype).normal_(0, 0.02)
    layer = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
    layer.support_avx512bf16_for_cpu = False  # as in raylora.base.load
    return layer


def make_engine(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TrlEngine:
    """Return TRL's engine on a base, with the rows of `throughput.py`; the packed one then uses its base."""
    ids = torch.randint(250, (512, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = IGNORE
    part = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return TrlEngine(
        base, tokenizer, part, part.select(range(8)), TrainingSection(), Architecture.of_config(base.config)
    )
