"""Chooses the engine of a lane: the packed engine if it can train this model, else TRL, one trial at a time."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from raylora.base.architecture import Architecture
from raylora.base.load import compute_dtype, free_unused, load_base_model
from raylora.config.schema import SearchConfig
from raylora.data.rows import TokenRows, load_part
from raylora.errors import DeviceError, PackingError
from raylora.training.memory import MIB, USABLE, Fit, MemoryEstimate, free_memory_mib, tokens_per_pass
from raylora.training.packable import check_settings
from raylora.training.packed.engine import RANK_MULTIPLE, PackedEngine
from raylora.training.packed.forward import Pack
from raylora.training.packed.fused import MAX_RANK, has_fused_products
from raylora.training.packed.group import has_grouped_products
from raylora.training.packed.verify import RANKS, Reference, check_kernels, check_pack, measure_reference
from raylora.training.trl import TrlEngine


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
    options: dict[str, Any] = {"tokens_dir": tokens_dir, "slots": slots, "memory": memory}
    if config.search.engine == "packed":
        return load_packed(config, cache_dir=cache_dir, device=device, **options)
    model = load_base_model(config.base_model, cache_dir, device)
    reason = None
    if config.search.engine == "auto":
        try:
            check_settings(config)
            return _pack(config, model, **options)
        except PackingError as error:
            reason = str(error)
        free_unused()
    fit = _fit(config, model.device, memory, slots=1, tokens=memory.micro_batch_tokens)
    training = config.training.model_copy(update={"gradient_checkpointing": fit.checkpointing})
    config = config.model_copy(update={"training": training})
    return TrlEngine.on(model, config, tokens_dir=tokens_dir, cache_dir=cache_dir, reason=reason)


def load_packed(
    config: SearchConfig,
    *,
    tokens_dir: Path,
    cache_dir: Path,
    device: str,
    slots: int,
    memory: MemoryEstimate | None = None,
) -> PackedEngine:
    """Load the packed engine, as `load_engine` does; it can be asked for more slots than there is memory for.

    Args:
        config: resolved config.
        tokens_dir: token cache.
        cache_dir: holds converted and quantized bases.
        device: `cpu` or `cuda:0`.
        slots: largest number of trials at once.
        memory: estimate for the pack; None takes `slots` as given.

    Raises:
        PackingError: the settings or the model cannot be packed.
        BaseModelError: the base cannot be found or loaded.
    """
    check_settings(config)
    model = load_base_model(config.base_model, cache_dir, device)
    return _pack(config, model, tokens_dir=tokens_dir, slots=slots, memory=memory)


def _pack(
    config: SearchConfig, model: PreTrainedModel, *, tokens_dir: Path, slots: int, memory: MemoryEstimate | None
) -> PackedEngine:
    """Return the packed engine on a loaded base, checked against the model itself and against peft.

    Raises:
        PackingError: the model cannot be packed. It is left as it was.
    """
    train, validation = (TokenRows(load_part(tokens_dir, part)) for part in ("train", "validation"))
    device, on_gpu = model.device, model.device.type != "cpu"
    dtype = compute_dtype(config.base_model, str(device))
    autocast = dtype if dtype != torch.float32 else None
    grouped = dtype == torch.bfloat16 and has_grouped_products(device)
    tokens = tokens_per_pass(config.search, on_gpu=on_gpu)
    fit = _fit(config, device, memory, slots=slots, tokens=tokens)
    fused = config.search.fused_kernels and has_fused_products(device, dtype)
    # kernels take more of a processor's memory for a larger rank
    largest = (min(MAX_RANK, max(config.extremes("r"))),) if fused else ()
    architecture = Architecture.of_config(model.config, trust_remote_code=config.base_model.trust_remote_code)
    reference = measure_reference(
        model,
        architecture,
        train,
        autocast=autocast,
        rank_multiple=RANK_MULTIPLE if grouped else 1,
        ranks=RANKS + largest,
    )
    engine = PackedEngine(
        model,
        architecture,
        train,
        validation,
        config.training.model_copy(update={"gradient_checkpointing": fit.checkpointing}),
        tokens_per_pass=fit.tokens,
        slots=fit.slots,
        autocast=autocast,
        grouped=grouped,
        dense=on_gpu and autocast is not None and _has_room(architecture, device, memory, fit, dtype),
        fused=fused,
        fused_layers=config.search.fused_kernels,
    )
    try:
        _check(engine, reference, dtype)
    except PackingError:
        engine.close()
        raise
    return engine


def _check(engine: PackedEngine, reference: Reference, dtype: torch.dtype) -> None:
    """Check an engine's pack. Where fused kernels or layers fail, it goes on without them, and says so.

    Raises:
        PackingError: the pack fails without them too.
    """
    pack = engine.pack
    wanted = pack.fused, pack.fused_layers
    with_all = _error(pack, reference, dtype)
    if with_all is None:
        return
    pack.fused = pack.fused_layers = False
    without = _error(pack, reference, dtype) if any(wanted) else with_all
    if without is not None:
        raise PackingError(without)
    # it works without both, so each by itself may work
    for alone in ((False, True), (True, False)) if all(wanted) else ():
        pack.fused, pack.fused_layers = alone
        if _error(pack, reference, dtype) is None:
            break
    else:
        pack.fused = pack.fused_layers = False
    for name, was, is_on in zip(("kernels", "layers"), wanted, (pack.fused, pack.fused_layers), strict=True):
        if was and not is_on:
            engine.notes.append(f"fused {name} are not used: {with_all}")


def _error(pack: Pack, reference: Reference, dtype: torch.dtype) -> str | None:
    """Return how a pack differs from the model itself; None if it does not.

    The error itself would keep the tensors of the failed pass.

    Raises:
        DeviceError: the GPU cannot be used by this process any more.
    """
    try:
        check_pack(pack, reference, dtype)
        if pack.fused:
            check_kernels(pack, reference, dtype)
    except PackingError as error:
        reason = str(error)
    else:
        return None
    try:
        if pack.model.device.type == "cuda":
            torch.cuda.synchronize()
    except torch.AcceleratorError as lost:
        off = "--search.fused_kernels false" if pack.fused or pack.fused_layers else "--search.engine trl"
        raise DeviceError(
            f"a check has ended this process's use of the GPU: {reason}; start again with {off}"
        ) from lost
    return reason


def _fit(config: SearchConfig, device: torch.device, memory: MemoryEstimate | None, *, slots: int, tokens: int) -> Fit:
    """Return the pack that fits into the memory that is free now; without an estimate, the one that is asked for."""
    checkpointing = config.training.gradient_checkpointing
    if memory is None:
        return Fit(slots, tokens, checkpointing is True)
    free = free_memory_mib(str(device)) / (1 if device.type != "cpu" else config.search.lanes or 1)
    return memory.fit(free, slots=slots, tokens=tokens, checkpointing=checkpointing)


def _has_room(
    architecture: Architecture, device: torch.device, memory: MemoryEstimate | None, fit: Fit, dtype: torch.dtype
) -> bool:
    """Return True if the base's linear layers fit into the free memory dequantized, beside the pack."""
    if memory is None:
        return False
    dense_mib = sum(a * b for a, b in architecture.shapes.values()) * dtype.itemsize / MIB
    return memory.total_mib(fit) - memory.base_mib + dense_mib <= USABLE * free_memory_mib(str(device))
