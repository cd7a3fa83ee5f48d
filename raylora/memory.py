"""Estimates the memory of one trial from the base's shapes, before anything is loaded.

NF4 with double quantization costs 4.127 bits a weight (QLoRA, arXiv:2305.14314, section 3). Activations are counted
as the inputs and outputs of every linear layer, or one hidden state per layer with gradient checkpointing, plus the
logits; a run's table shows the measured peak beside it.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from raylora.base_model import is_target
from raylora.config import SearchSection

MIB = 2**20
NF4_BITS = 4.127
NF4_BITS_SINGLE = 4.5
ADAPTER_BYTES = 16
"""Per trained parameter in float32: weight, gradient, Adam's two moments."""


TOKENS_PER_PASS = {"gpu": 4096, "cpu": 512}
"""Tokens from which on a pass through the base is limited by arithmetic, so that more at once do not pay."""


def tokens_per_pass(section: SearchSection, *, on_gpu: bool) -> int:
    """As set, or by the kind of device."""
    return section.tokens_per_pass or TOKENS_PER_PASS["gpu" if on_gpu else "cpu"]


@dataclass(frozen=True)
class MemoryEstimate:
    """MiB on the device that trains."""

    base_mib: float
    adapter_mib: float
    activations_mib: float

    @property
    def total_mib(self) -> float:
        return self.base_mib + self.adapter_mib + self.activations_mib


def adapter_parameters(shapes: dict[str, tuple[int, int]], targets: list[str], r: int) -> int:
    """Trainable parameters: r * (in + out) for each adapted layer (LoRA, arXiv:2106.09685, section 4.1)."""
    adapted = [shape for name, shape in shapes.items() if is_target(name, targets)]
    return sum(r * (in_features + out_features) for in_features, out_features in adapted)


def estimate_memory(
    config: PretrainedConfig,
    shapes: dict[str, tuple[int, int]],
    *,
    n_adapter_parameters: int,
    rows: int,
    length: int,
    dtype_bytes: int,
    nf4: bool,
    double_quant: bool,
    gradient_checkpointing: bool,
) -> MemoryEstimate:
    """Peak memory of one trial in MiB.

    Args:
        config: the base's architecture.
        shapes: from `linear_shapes`.
        n_adapter_parameters: from `adapter_parameters`.
        rows: rows per forward pass.
        length: tokens per row.
        dtype_bytes: bytes of the compute type.
        nf4: whether linear layers are 4-bit.
        double_quant: whether their scales are quantized too.
        gradient_checkpointing: whether activations are recomputed.
    """
    text = config.get_text_config()
    n_linear = sum(in_features * out_features for in_features, out_features in shapes.values())
    n_embedding = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    bits = (NF4_BITS if double_quant else NF4_BITS_SINGLE) if nf4 else 8 * dtype_bytes
    base = n_linear * bits / 8 + n_embedding * dtype_bytes
    widths = sum(in_features + out_features for in_features, out_features in shapes.values())
    per_token = (
        text.num_hidden_layers * text.hidden_size * dtype_bytes if gradient_checkpointing else widths * dtype_bytes
    )
    # logits, their gradient and log-softmax in float32, for all positions
    logits = 3 * 4 * text.vocab_size
    return MemoryEstimate(
        base / MIB, ADAPTER_BYTES * n_adapter_parameters / MIB, rows * length * (per_token + logits) / MIB
    )
