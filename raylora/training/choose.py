"""Chooses the engine of a lane: the packed engine if it can train this model, else TRL, one trial at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from raylora.base.architecture import Architecture
from raylora.base.load import compute_dtype, load_base_model
from raylora.config.schema import SearchConfig
from raylora.data.rows import IGNORE, TokenRows, load_part
from raylora.errors import PackingError
from raylora.training.memory import MemoryEstimate, free_memory_mib, tokens_per_pass
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.engine import PackedEngine
from raylora.training.packed.layout import MicroBatch
from raylora.training.trl import TrlEngine

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit")
"""Names in transformers of AdamW with 32-bit states, the optimizer of the packed engine."""


def load_engine(
    config: SearchConfig, *, tokens_dir: Path, cache_dir: Path, device: str, slots: int, memory: MemoryEstimate
) -> PackedEngine | TrlEngine:
    """Load base and data into the engine that fits the config and the model.

    Args:
        config: resolved config. `search.engine` may demand one engine.
        tokens_dir: token cache.
        cache_dir: holds converted and quantized bases.
        device: `cpu` or `cuda:0`.
        slots: largest number of trials at once.
        memory: estimate for the pack. The engine gets fewer slots if the device has less memory.

    Returns:
        The engine. A TRL engine that replaces a packed one says why in `reason`.

    Raises:
        PackingError: the config demands the packed engine, which cannot train this model.
        BaseModelError: the base cannot be found or loaded.
    """
    options: dict[str, Any] = {"tokens_dir": tokens_dir, "cache_dir": cache_dir, "device": device}
    if config.search.engine == "trl":
        return TrlEngine.load(config, **options)
    try:
        return load_packed(config, **options, slots=slots, memory=memory)
    except PackingError as error:
        if config.search.engine == "packed":
            raise
        return replace(TrlEngine.load(config, **options), reason=str(error))


def load_packed(
    config: SearchConfig,
    *,
    tokens_dir: Path,
    cache_dir: Path,
    device: str,
    slots: int,
    memory: MemoryEstimate | None = None,
) -> PackedEngine:
    """Load the packed engine, and check that its loss on two rows equals that of the model itself.

    Args:
        config: resolved config.
        tokens_dir: token cache.
        cache_dir: holds converted and quantized bases.
        device: `cpu` or `cuda:0`.
        slots: largest number of trials at once.
        memory: estimate for the pack; None takes `slots` as given.

    Raises:
        PackingError: the optimizer or the model is not supported, or the losses differ.
        BaseModelError: the base cannot be found or loaded.
    """
    if config.training.optim not in OPTIMIZERS:
        raise PackingError(f"training.optim is {config.training.optim}, which only TRL's trainer has")
    base = config.base_model
    model = load_base_model(base, cache_dir, device)
    rows = _two_rows(model)
    expected = _plain_nll(model, rows)
    dtype = compute_dtype(base, device)
    on_gpu = device != "cpu"
    tokens = tokens_per_pass(config.search, on_gpu=on_gpu)
    if memory is not None:
        free = free_memory_mib(device) / (1 if on_gpu else config.search.lanes or 1)
        slots, tokens = memory.fit(free, slots=slots, tokens=tokens)
    engine = PackedEngine(
        model,
        Architecture.of_config(model.config, trust_remote_code=base.trust_remote_code),
        TokenRows(load_part(tokens_dir, "train")),
        TokenRows(load_part(tokens_dir, "validation")),
        config.training,
        tokens_per_pass=tokens,
        slots=slots,
        autocast=dtype if dtype != torch.float32 else None,
        grouped=on_gpu,
    )
    try:
        found = engine.pack.nll([MicroBatch(_no_adapter(device), rows, rows)]).item()
    except Exception as error:  # whatever a model's code raises for rows laid end to end
        engine.pack.close()
        raise PackingError(f"the model cannot be packed: {type(error).__name__}: {error}") from error
    if not _rows_stay_apart(engine, rows, device):
        engine.pack.close()
        raise PackingError("packed, a row's loss depends on its neighbour, by layers beside attention that mix tokens")
    # bfloat16 has 8 significant bits, and the pack sums in another order
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    if not abs(found - expected) <= tolerance * expected:
        engine.pack.close()
        raise PackingError(f"packed, the model's loss on two rows is {found:.6f}, must be {expected:.6f}")
    return engine


def _two_rows(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return random token ids of two rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(model.config.get_text_config().vocab_size, (n,), generator=generator) for n in (9, 14)]


def _rows_stay_apart(engine: PackedEngine, rows: list[torch.Tensor], device: str) -> bool:
    """Return True if the loss of a row is the same to the bit whatever stands before it in the pack.

    Layers of linear attention or state spaces pass on what they have read, over the border of two rows.
    """
    first, second = rows
    labels = [torch.full_like(first, IGNORE), second]
    losses = {
        engine.pack.nll([MicroBatch(_no_adapter(device), [other, second], labels)]).item()
        for other in (first, first.flip(0))
    }
    return len(losses) == 1


@torch.no_grad()
def _plain_nll(model: PreTrainedModel, rows: list[torch.Tensor]) -> float:
    """Return the negative log-likelihood of rows by the model's own forward pass, in nats."""
    logits = [model(input_ids=row[None].to(model.device), use_cache=False).logits[0, :-1].float() for row in rows]
    pairs = zip(logits, rows, strict=True)
    return sum(float(cross_entropy(scores, row[1:].to(scores.device), reduction="sum")) for scores, row in pairs)


def _no_adapter(device: str) -> Adapter:
    """Return an adapter of no layers."""
    return Adapter({}, r=1, scaling=0.0, dropout=0.0, seed=0, device=device)
