"""Estimates the memory of a pack from the base's shapes, before anything is loaded.

NF4 with double quantization costs 4.127 bits a weight (QLoRA, arXiv:2305.14314, section 3). Activations are counted
as the inputs and outputs of every linear layer, or one hidden state per layer with gradient checkpointing;
`benchmarks/memory.py` shows the estimate beside the measured peak.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from raylora.base.modules import is_target
from raylora.config.schema import SearchSection

MIB = 2**20


NF4_BITS = 4.127


NF4_BITS_SINGLE = 4.5


ADAPTER_BYTES = 16
"""Per trained parameter in float32: weight, gradient, Adam's two moments."""


CHUNK = 512
"""Positions whose logits exist at once."""


BESIDE_LINEAR = 1.6
"""Activations of norms, rotary embeddings, attention and dropout come on top; measured, see benchmarks/memory.json. On
another machine of two cores it was 1.15: the larger one, since too low an estimate ends a process."""


TOKENS_PER_PASS = {"gpu": 4096, "cpu": 512}
"""Tokens from which on a pass through the base is limited by arithmetic, so that more at once do not pay."""


def tokens_per_pass(section: SearchSection, *, on_gpu: bool) -> int:
    """As set, or by the kind of device."""
    return section.tokens_per_pass or TOKENS_PER_PASS["gpu" if on_gpu else "cpu"]


@dataclass(frozen=True)
class MemoryEstimate:
    """MiB on the device that trains."""

    base_mib: float
    trial_mib: float
    """Of the largest adapter with its gradients and optimizer."""

    token_mib: float
    """Activations of each token of a pass through the base."""

    logits_mib: float
    """Logits of one chunk of positions."""

    micro_batch_tokens: int
    """Of the largest micro-batch, which is never cut."""

    def total_mib(self, slots: int, tokens: int) -> float:
        """With so many trials and tokens a pass."""
        activations = max(tokens, self.micro_batch_tokens) * self.token_mib
        return self.base_mib + slots * self.trial_mib + activations + self.logits_mib

    def fit(self, free_mib: float, *, slots: int, tokens: int) -> tuple[int, int]:
        """As many trials and tokens a pass as fit into what is free beside the base, and at least one trial.

        Activations get half of it at most. A tenth stays free, for what no estimate knows.
        """
        usable = 0.9 * free_mib - self.logits_mib
        tokens = max(self.micro_batch_tokens, min(tokens, int(usable / 2 / self.token_mib)))
        return max(1, min(slots, int((usable - tokens * self.token_mib) / self.trial_mib))), tokens


def free_memory_mib(device: str) -> float:
    """What a GPU has free, or what this machine could give."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0] / MIB
    return psutil.virtual_memory().available / MIB


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
    """What base, trials and tokens take.

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
    per_token = text.num_hidden_layers * text.hidden_size if gradient_checkpointing else BESIDE_LINEAR * widths
    # logits, their log-softmax and their gradient, in float32
    logits = 3 * 4 * text.vocab_size * min(CHUNK, rows * length)
    return MemoryEstimate(
        base_mib=base / MIB,
        trial_mib=ADAPTER_BYTES * n_adapter_parameters / MIB,
        token_mib=per_token * dtype_bytes / MIB,
        logits_mib=logits / MIB,
        micro_batch_tokens=rows * length,
    )


def reset_peak_memory() -> None:
    """Starts a new measurement of `peak_memory_mib`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # where the kernel does not allow it, the process's peak so far stands
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size, proc(5)


def peak_memory_mib() -> float:
    """Peak since the last reset in MiB: GPU memory allocated, or on a CPU this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return math.nan
