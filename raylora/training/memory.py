"""Estimates the memory of a pack from the base's shapes, before anything is loaded.

Activations count as the inputs and outputs of every linear layer. With gradient checkpointing, they count as one hidden
state per layer. `benchmarks/memory.py` shows the estimate beside the measured peak.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from raylora.base.architecture import Architecture
from raylora.config.schema import SearchSection

MIB = 2**20
"""Bytes of a MiB."""


NF4_BITS = 4.127
"""Bits per weight in NF4 with double quantization: 4 + 8/64 + 32/(64 * 256) (QLoRA, arXiv:2305.14314, section 3)."""


NF4_BITS_SINGLE = 4.5
"""Bits per weight in NF4 without double quantization: 4 + 32/64 (QLoRA, arXiv:2305.14314, section 3)."""

ADAPTER_BYTES = 16
"""Bytes per trained parameter: weight, gradient and Adam's two moments, in float32."""

CHUNK = 512
"""Positions whose logits are in memory at once. With a vocabulary of 50,000, these are 98 MiB in float32."""

BESIDE_LINEAR = 1.6
"""All activations over those of linear layers. Norms, rotary embeddings, attention and dropout are the rest.

Measured, see benchmarks/memory.json. Another machine of two cores gave 1.15. The larger one stands, since too low an
estimate ends a process.
"""

TOKENS_PER_PASS = {"gpu": 4096, "cpu": 512}
"""Tokens of a pass at which arithmetic becomes the limit, so that more tokens do not raise the throughput."""


def tokens_per_pass(section: SearchSection, *, on_gpu: bool) -> int:
    """Return the largest number of tokens of a pass: as set, or `TOKENS_PER_PASS` of the device."""
    return section.tokens_per_pass or TOKENS_PER_PASS["gpu" if on_gpu else "cpu"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a pack by its parts, on the device that trains."""

    base_mib: float
    """Base model in MiB."""

    trial_mib: float
    """Largest adapter with its gradients and optimizer state, in MiB."""

    token_mib: float
    """Activations per token of a pass through the base, in MiB."""

    logits_mib: float
    """Logits of one chunk of positions, in MiB."""

    micro_batch_tokens: int
    """Tokens of the largest micro-batch. A micro-batch is never divided between passes."""

    def total_mib(self, slots: int, tokens: int) -> float:
        """Return the memory in MiB for this many slots (trials at once) and tokens per pass."""
        activations = max(tokens, self.micro_batch_tokens) * self.token_mib
        return self.base_mib + slots * self.trial_mib + activations + self.logits_mib

    def fit(self, free_mib: float, *, slots: int, tokens: int) -> tuple[int, int]:
        """Return the slots and tokens per pass that fit into the free memory.

        A tenth stays free, for what the estimate does not know. Activations get half of the rest at most.

        Args:
            free_mib: memory that is free beside the base, in MiB.
            slots: largest number of trials at once.
            tokens: largest number of tokens per pass.

        Returns:
            Slots, at least 1; and tokens per pass, at least one micro-batch.
        """
        usable = 0.9 * free_mib - self.logits_mib
        tokens = max(self.micro_batch_tokens, min(tokens, int(usable / 2 / self.token_mib)))
        return max(1, min(slots, int((usable - tokens * self.token_mib) / self.trial_mib))), tokens


def free_memory_mib(device: str) -> float:
    """Return the free memory in MiB: of the GPU, or of this machine for `cpu`."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0] / MIB
    return psutil.virtual_memory().available / MIB


def adapter_parameters(shapes: dict[str, tuple[int, int]], r: int) -> int:
    """Return the number of trainable parameters of an adapter: r * (in + out) in each adapted layer.

    Args:
        shapes: adapted layer -> (in_features, out_features).
        r: adapter rank.

    Source: Hu et al. 2021, "LoRA", section 4.1 (arXiv:2106.09685).
    """
    return sum(r * (in_features + out_features) for in_features, out_features in shapes.values())


def estimate_memory(
    config: PretrainedConfig,
    architecture: Architecture,
    *,
    n_adapter_parameters: int,
    rows: int,
    length: int,
    dtype_bytes: int,
    nf4: bool,
    double_quant: bool,
    gradient_checkpointing: bool,
) -> MemoryEstimate:
    """Estimate the memory of base, trials and tokens.

    Args:
        config: config of the base.
        architecture: linear layers and size of the base.
        n_adapter_parameters: from `adapter_parameters`.
        rows: rows of the largest micro-batch.
        length: tokens of its rows.
        dtype_bytes: bytes of the compute dtype.
        nf4: True if linear layers are in NF4.
        double_quant: True if their scales are quantized too.
        gradient_checkpointing: True if activations are recomputed.
    """
    text = config.get_text_config()
    bits = (NF4_BITS if double_quant else NF4_BITS_SINGLE) if nf4 else 8 * dtype_bytes
    base = architecture.n_linear * bits / 8 + architecture.n_rest * dtype_bytes
    widths = sum(in_features + out_features for in_features, out_features in architecture.shapes.values())
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
    """Start a new measurement of `peak_memory_mib`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # if the kernel forbids it, the peak since the process began stands
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size, proc(5)


def peak_memory_mib() -> float:
    """Return the peak since the last reset in MiB: allocated GPU memory, or this process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return math.nan
