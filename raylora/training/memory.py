"""Estimates the memory of a pack from the base's shapes, before anything is loaded.

Activations count as the inputs and outputs of every linear layer, and the dropout masks of their inputs. With gradient
checkpointing, they count as one hidden state per layer, and the activations of the one layer that is computed again.
`benchmarks/memory.py` shows the estimate beside the measured peak.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from transformers import PretrainedConfig

from raylora.base.architecture import Architecture
from raylora.config.schema import SearchSection
from raylora.machine import free_memory

MIB = 2**20
"""Bytes of a MiB."""


NF4_BITS = 4.127
"""Bits per weight in NF4 with double quantization: 4 + 8/64 + 32/(64 * 256) (QLoRA, arXiv:2305.14314, section 3)."""


NF4_BITS_SINGLE = 4.5
"""Bits per weight in NF4 without double quantization: 4 + 32/64 (QLoRA, arXiv:2305.14314, section 3)."""

ADAPTER_BYTES = 16
"""Bytes per trained parameter: weight, gradient and Adam's two moments, in float32."""

STACK_BYTES = 10
"""Bytes per trained parameter that grouped products add for a pass: a stack and its gradients in float32, and a copy of
the stack in bfloat16."""

CHECKPOINT_BYTES = 24
"""Bytes of this machine's memory per trained parameter while a checkpoint is written.

Adam's moments in float32, as copies and as the file's content, are 16. Measured are 16 to 27, by what the allocator
keeps.
"""

CHUNK = 512
"""Positions whose logits are in memory at once. With a vocabulary of 50,000, these are 98 MiB in float32."""

BESIDE_LINEAR = 1.6
"""All activations over those of linear layers. Norms, rotary embeddings, attention and dropout are the rest.

Measured, see benchmarks/memory.json. Another machine of two cores gave 1.15. The larger one stands, since too low an
estimate ends a process.
"""

TOKENS_PER_PASS = {"gpu": 4096, "cpu": 512}
"""Tokens of a pass at which arithmetic becomes the limit, so that more tokens do not raise the throughput."""

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""Errors of a device, or of this machine, that lacks memory."""

Result = TypeVar("Result")


def with_less_memory(run: Callable[[int], Result], size: int) -> Result:
    """Call `run(size)`; where memory runs out, again with half the size, down to 1.

    Args:
        run: takes a number of rows, prompts or tokens, on which its memory depends.
        size: first size.

    Raises:
        torch.OutOfMemoryError: a size of 1 needs too much.
    """
    while True:
        try:
            return run(size)
        except OUT_OF_MEMORY:
            if size == 1:
                raise
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def tokens_per_pass(section: SearchSection, *, on_gpu: bool) -> int:
    """Return the largest number of tokens of a pass: as set, or `TOKENS_PER_PASS` of the device."""
    return section.tokens_per_pass or TOKENS_PER_PASS["gpu" if on_gpu else "cpu"]


USABLE = 0.9
"""Share of the free memory that a pack may take. The rest is for what the estimate does not know."""


@dataclass(frozen=True)
class Fit:
    """Pack that fits into a device's memory."""

    slots: int
    """Trials at once, at least 1."""

    tokens: int
    """Tokens per pass, at least one micro-batch."""

    checkpointing: bool
    """True to recompute activations."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a pack by its parts, on the device that trains."""

    base_mib: float
    """Base model in MiB."""

    trial_mib: float
    """Largest adapter with its gradients, optimizer state and copies for a pass, in MiB."""

    token_mib: float
    """Activations per token of a pass through the base, in MiB."""

    checkpointed_token_mib: float
    """The same with gradient checkpointing."""

    logits_mib: float
    """Logits per position that is in memory, in MiB: themselves, their log-softmax and their gradient."""

    micro_batch_tokens: int
    """Tokens of the largest micro-batch. A micro-batch is never divided between passes."""

    checkpoint_mib: float = 0.0
    """Checkpoint while it is written, in MiB; 0 where trials are on a GPU, since the host's memory takes it."""

    def total_mib(self, fit: Fit) -> float:
        """Return the memory of a pack in MiB."""
        return self.base_mib + fit.slots * self.trial_mib + self._passing_mib(fit.tokens, fit.checkpointing)

    def fit(self, free_mib: float, *, slots: int, tokens: int, checkpointing: bool | Literal["auto"]) -> Fit:
        """Return the pack that fits into the free memory.

        Of the memory, `USABLE` is used. A pass gets half of the rest at most.

        Args:
            free_mib: memory that is free beside the base, in MiB.
            slots: largest number of trials at once.
            tokens: largest number of tokens per pass.
            checkpointing: `training.gradient_checkpointing`. `auto` recomputes activations only if less than half of
                the trials, or of the tokens, would fit without it: a recomputed step takes a third longer.
        """
        if checkpointing != "auto":
            return self._fit(free_mib, slots, tokens, checkpointing)
        plain = self._fit(free_mib, slots, tokens, False)
        fits = self._fits(plain, free_mib)
        if fits and 2 * plain.slots >= slots and 2 * plain.tokens >= tokens:
            return plain
        recomputed = self._fit(free_mib, slots, tokens, True)
        gains = recomputed.slots > plain.slots or recomputed.tokens > plain.tokens
        return recomputed if gains or not fits else plain

    def _fit(self, free_mib: float, slots: int, tokens: int, checkpointing: bool) -> Fit:
        usable, per_token = USABLE * free_mib, self.checkpointed_token_mib if checkpointing else self.token_mib
        # half of it, with the logits of all positions or of a chunk
        fitting = max(usable / 2 / (per_token + self.logits_mib), (usable / 2 - CHUNK * self.logits_mib) / per_token)
        tokens = max(self.micro_batch_tokens, min(tokens, int(fitting)))
        left = usable - self._passing_mib(tokens, checkpointing)
        return Fit(max(1, min(slots, int(left / self.trial_mib))), tokens, checkpointing)

    def _fits(self, fit: Fit, free_mib: float) -> bool:
        """Return True if a pack fits, which one of a single trial and micro-batch may not."""
        return self.total_mib(fit) - self.base_mib <= USABLE * free_mib

    def _passing_mib(self, tokens: int, checkpointing: bool) -> float:
        """Return the most memory that is taken for a while: by a pass, or between two by a checkpoint, in MiB."""
        tokens = max(tokens, self.micro_batch_tokens)
        per_token = self.checkpointed_token_mib if checkpointing else self.token_mib
        return max(tokens * per_token + min(CHUNK, tokens) * self.logits_mib, self.checkpoint_mib)


def free_memory_mib(device: str) -> float:
    """Return the free memory in MiB: of the GPU, or for `cpu` what this process may still take."""
    if device != "cpu":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + kept_by_torch) / MIB
    return free_memory() / MIB


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
    on_gpu: bool = False,
    stacked: bool = False,
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
        on_gpu: True if trials train on a GPU.
        stacked: True if the products of adapters may be grouped, which takes stacks. Fused kernels need none.
    """
    text = config.get_text_config()
    bits = (NF4_BITS if double_quant else NF4_BITS_SINGLE) if nf4 else 8 * dtype_bytes
    base = architecture.n_linear * bits / 8 + architecture.n_rest * dtype_bytes
    inputs = sum(in_features for in_features, _ in architecture.shapes.values())
    outputs = sum(out_features for _, out_features in architecture.shapes.values())
    per_token = BESIDE_LINEAR * (inputs + outputs) * dtype_bytes + inputs  # a dropout mask has a byte per entry
    hidden_states = text.num_hidden_layers * text.hidden_size * dtype_bytes
    trial_bytes = ADAPTER_BYTES + (STACK_BYTES if stacked else 0)
    return MemoryEstimate(
        base_mib=base / MIB,
        trial_mib=trial_bytes * n_adapter_parameters / MIB,
        token_mib=per_token / MIB,
        checkpointed_token_mib=(hidden_states + per_token / text.num_hidden_layers) / MIB,
        logits_mib=3 * 4 * text.vocab_size / MIB,
        micro_batch_tokens=rows * length,
        checkpoint_mib=0.0 if on_gpu else CHECKPOINT_BYTES * n_adapter_parameters / MIB,
    )


def reset_peak_memory() -> None:
    """Start a new measurement of `peak_memory_mib`, and of the peak of resident memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # if the kernel forbids it, the peak since the process began stands
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present size, proc(5)


def peak_memory_mib() -> float:
    """Return the peak since the last reset in MiB: allocated GPU memory, or this process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    return resident_mib("VmHWM")


def resident_mib(field: Literal["VmRSS", "VmHWM"] = "VmRSS") -> float:
    """Return the resident memory of this process in MiB: now, or at its peak (`VmHWM`); NaN if unknown. See proc(5)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return math.nan
