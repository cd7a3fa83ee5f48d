"""Works out what a search will do before it starts: data, budget, lanes and memory."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from raylora.base.architecture import Architecture, position_limit
from raylora.base.load import compute_dtype, is_quantized
from raylora.base.locate import check_directory, find_checkpoint, is_hub_id, load_model_config, load_tokenizer
from raylora.config.schema import BaseModelSection, SearchConfig
from raylora.data.prepare import PreparedData, prepare_data
from raylora.data.read import check_sources, hub_commit
from raylora.errors import BaseModelError, ConfigError, DeviceError
from raylora.run.directory import RunDirectory
from raylora.search.warnings import warnings
from raylora.training.memory import MemoryEstimate, adapter_parameters, estimate_memory, tokens_per_pass
from raylora.training.packable import check_settings
from raylora.training.packed.engine import RANK_MULTIPLE


@dataclass(frozen=True)
class Devices:
    """Devices of the machine or cluster, or those that it can grow to."""

    n_gpus: int
    n_cpus: int
    where: str
    node_cpus: int
    """CPU cores of the largest node; no process can have more."""

    may_grow: bool = False
    """True if GPUs may come later, as on a cluster."""

    memory_mib: float | None = None
    """Memory of this machine in MiB; None if lanes may be elsewhere."""

    gpu_memory_mib: float | None = None
    """Memory of the smallest GPU in MiB; None if there is none, or if it is not known before a lane starts."""


@dataclass(frozen=True)
class Plan:
    """A search ready to start."""

    config: SearchConfig
    """Settings, with the Hub commits that the search uses from now on."""

    data: PreparedData
    rungs: list[int]
    on_gpu: bool
    n_lanes: int
    slots: int
    """Trials at once on each lane, at most."""

    tokens_per_pass: int
    threads: int
    """CPU threads of each lane."""

    node_cpus: int
    """CPU threads of the merge and the held-out check."""

    memory: MemoryEstimate
    """Memory of the largest trials that the space allows."""

    hidden_size: int
    model_type: str
    """transformers' name of the base's architecture."""

    needed: tuple[Path, ...]
    """Files and folders that lanes need: tokens, and the base if it lies in this machine's files."""

    notes: list[str]
    """Sentences on what is not adapted, and on what will disappoint."""


def make_plan(config: SearchConfig, run: RunDirectory, devices: Devices) -> Plan:
    """Check model, data, modules and devices, and prepare the token cache.

    Raises:
        RayloraError: something would keep the search from running.
    """
    on_gpu, n_lanes = plan_lanes(config, devices)
    forwarded(config.search.forward_env)
    if config.search.engine == "packed":
        check_settings(config)
    check_sources(config.data)  # the Hub, which may be asked next, can keep one waiting
    cache_dir = run.cache(config)
    checkpoint = find_checkpoint(config.base_model, cache_dir)
    model_config = load_model_config(config.base_model, checkpoint)
    # before the rows are read, so that these are the rows of that commit
    config = pinned(
        config,
        base_commit=getattr(model_config, "_commit_hash", None),
        data_commit=hub_commit(config.data.train, config.data.revision),
    )
    trust = config.base_model.trust_remote_code
    architecture = Architecture.of_config(model_config, trust_remote_code=trust)
    adapted = [architecture.adapted(setting) for setting in config.extremes("target_modules")]
    tokenizer = load_tokenizer(config.base_model, checkpoint)
    data = prepare_data(config.data, tokenizer, cache_dir)
    data.check_positions(config.data, position_limit(model_config))
    device = "cuda:0" if on_gpu else "cpu"
    r = max(config.extremes("r"))
    r = RANK_MULTIPLE * math.ceil(r / RANK_MULTIPLE) if on_gpu else r
    memory = estimate_memory(
        model_config,
        architecture,
        n_adapter_parameters=max(adapter_parameters(shapes, r) for shapes in adapted),
        rows=max(config.extremes("per_device_train_batch_size")),
        length=data.longest(config.data),
        dtype_bytes=compute_dtype(config.base_model, device).itemsize,
        nf4=config.base_model.quantization == "nf4" or is_quantized(model_config),
        double_quant=config.base_model.double_quant,
        on_gpu=on_gpu,
        stacked=on_gpu and not config.search.fused_kernels,
    )
    _check_memory(memory, architecture, devices, on_gpu=on_gpu)
    # a resumed search keeps its rungs, whatever its number of trials is now
    rungs = run.provenance()["rungs"] if run.provenance_file.is_file() else config.rungs(max_steps(config, data))
    text = model_config.get_text_config()
    expectations = warnings(
        config,
        data,
        rungs,
        n_adapter_parameters=max(adapter_parameters(shapes, max(config.extremes("r"))) for shapes in adapted),
        hidden_size=text.hidden_size,
        model_type=text.model_type,
        n_positions=getattr(text, "max_position_embeddings", None),
    )
    return Plan(
        config=config,
        data=data,
        rungs=rungs,
        on_gpu=on_gpu,
        n_lanes=n_lanes,
        slots=plan_slots(config, data, on_gpu=on_gpu, n_lanes=n_lanes),
        tokens_per_pass=tokens_per_pass(config.search, on_gpu=on_gpu),
        threads=plan_threads(devices, n_lanes),
        node_cpus=devices.node_cpus,
        memory=memory,
        hidden_size=text.hidden_size,
        model_type=text.model_type,
        needed=_needed(config.base_model, data.tokens_dir),
        notes=architecture.notes() + expectations,
    )


def _needed(section: BaseModelSection, tokens_dir: Path) -> tuple[Path, ...]:
    """Return what lanes need and may not see on their nodes: tokens, and the base if it is in the files of this one.

    A base of the Hub that was not downloaded here is left out: each node downloads it for itself.

    Args:
        section: the base model, at a commit.
        tokens_dir: folder of tokenized rows.
    """
    if not is_hub_id(section.name) or Path(section.name).exists():
        return tokens_dir, Path(os.path.abspath(Path(section.name).expanduser()))
    try:
        snapshot = Path(snapshot_download(section.name, revision=section.revision, local_files_only=True))
        check_directory(snapshot)
    except (LocalEntryNotFoundError, BaseModelError):
        return (tokens_dir,)
    return tokens_dir, snapshot


def forwarded(names: list[str]) -> dict[str, str]:
    """Return variables of this process's environment.

    Raises:
        ConfigError: one is not set.
    """
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f"search.forward_env names {', '.join(missing)}, which is not set here; export it first")
    return {name: os.environ[name] for name in names}


def _check_memory(memory: MemoryEstimate, architecture: Architecture, devices: Devices, *, on_gpu: bool) -> None:
    """Check that the base fits where a lane runs."""
    available = devices.gpu_memory_mib if on_gpu else devices.memory_mib
    if available is not None and memory.base_mib > available:
        share = architecture.n_experts / (architecture.n_linear + architecture.n_rest)
        experts = f", with {share:.0%} of its weights in experts, which stay in 16 bit" if share else ""
        raise DeviceError(
            f"the base needs about {memory.base_mib / 1024:.0f} GiB{experts}, and {devices.where} has "
            f"{available / 1024:.0f}; name a smaller base"
        )


def pinned(config: SearchConfig, *, base_commit: str | None, data_commit: str | None) -> SearchConfig:
    """Return settings that name Hub commits, so that every later step loads the same base and rows.

    Args:
        config: settings, maybe with branches or tags.
        base_commit: commit of the base; None if it does not come from the Hub.
        data_commit: commit of the data set, likewise.
    """
    base, data = config.base_model, config.data
    return config.model_copy(
        update={
            "base_model": base.model_copy(update={"revision": base_commit or base.revision}),
            "data": data.model_copy(update={"revision": data_commit or data.revision}),
        }
    )


def plan_lanes(config: SearchConfig, devices: Devices) -> tuple[bool, int]:
    """Return whether lanes use GPUs, and how many lanes there are.

    On a cluster, which may grow, lanes that are demanded on a named device may be more than there is room for now.

    Raises:
        DeviceError: a GPU is demanded and there is none, or more lanes are demanded than there are devices.
    """
    wanted = config.search.lanes
    may_wait = devices.may_grow and config.device != "auto" and wanted is not None
    if devices.may_grow and config.device != "cpu" and not devices.n_gpus and not may_wait:
        raise DeviceError(
            f"{devices.where} has no GPU now; `--device cuda --search.lanes N` waits for N of them, and `--device cpu` "
            "trains without"
        )
    if config.device == "cuda" and not devices.n_gpus and not may_wait:
        raise DeviceError(f"device is cuda, and {devices.where} has no GPU; `raylora doctor` says what torch sees")
    on_gpu = config.device == "cuda" or (config.device == "auto" and devices.n_gpus > 0)
    kind, available = ("GPU", devices.n_gpus) if on_gpu else ("CPU core", devices.n_cpus)
    if wanted is not None and wanted > available and not may_wait:
        raise DeviceError(f"search.lanes must be at most the {available} {kind}s of {devices.where}, found {wanted}")
    default = devices.n_gpus if on_gpu else 1
    return on_gpu, min(wanted or default, config.n_trials())


def plan_slots(config: SearchConfig, data: PreparedData, *, on_gpu: bool, n_lanes: int) -> int:
    """Return the trials at once on each lane: as set, or as many as fill a pass through the base, and one more.

    More would not make a pass cheaper. The one more keeps passes full when a trial leaves. A lane takes fewer where its
    memory is too small.
    """
    share = math.ceil(config.n_trials() / n_lanes)
    if config.search.engine == "trl":
        return 1
    if config.search.trials_per_gpu != "auto":
        return min(config.search.trials_per_gpu, share)
    train = data.summaries["train"]
    smallest = min(config.extremes("per_device_train_batch_size")) * train.tokens / train.rows
    fill = int(tokens_per_pass(config.search, on_gpu=on_gpu) / smallest) + 1
    return min(fill, share)


def plan_threads(devices: Devices, n_lanes: int) -> int:
    """Return the CPU threads of each lane: a share of all cores, and no more than a node has."""
    return max(1, min(devices.n_cpus // n_lanes, devices.node_cpus))


def max_steps(config: SearchConfig, data: PreparedData) -> int:
    """Return the full budget of a trial in optimizer steps.

    `num_train_epochs` are those of a trial with the largest steps, if the space varies their rows.
    """
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    return math.ceil(training.num_train_epochs * data.summaries["train"].rows / config.rows_per_step()[1])
