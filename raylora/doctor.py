"""Checks machine, GPU, bitsandbytes, Ray and disk, and says how to fix what is wrong.

Run as `python -m raylora.doctor`. Each check imports the packages that it needs, so that `raylora --help` waits for
none of them.
"""

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import FAILED, command, console, run_command
from raylora.machine import cpu_limit, free_memory, memory_limit
from raylora.run.provenance import PACKAGES

GIB = 2**30
"""Bytes of a GiB."""

MIN_FREE_GIB = 10
"""Least free disk space: a 7B base in NF4 (4 GiB), its merged copy and some checkpoints."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    ok: bool
    """False if the finding keeps a search from running."""

    text: str
    """Finding in one line."""

    cure: str = ""
    """Way to fix it; empty if there is nothing to fix."""


@command
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")] = False,
) -> None:
    """Check what a search needs, and say what this machine can train. Exit code 1: something keeps it from running."""
    screen = console()
    findings, sizes = [check() for check in CHECKS], trainable()
    if as_json:
        found = {"findings": [asdict(finding) for finding in findings], "trainable": [asdict(size) for size in sizes]}
        print(json.dumps(found, indent=2))
    else:
        for finding in findings:
            screen.print(
                f"{'ok  ' if finding.ok else 'FAIL'} {finding.text}"
                + (f"\n     -> {finding.cure}" if finding.cure else "")
            )
        screen.print(f"\nby estimate, of r {R} and rows of {LENGTH} tokens, this machine trains at once, a device:")
        for size in sizes:
            n = f"{size.trials} trials" if size.trials > 1 else "one trial" if size.trials else "nothing"
            again = ", activations recomputed" if size.trials and size.gradient_checkpointing else ""
            screen.print(f"  {size.base:4} {n}{again}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class Trainable:
    """Estimate for one size of base on a device of this machine."""

    base: str
    """Size in billions of parameters, such as `7B`."""

    trials: int
    """Trials at once, by estimate; 0 if the base does not fit."""

    gradient_checkpointing: bool
    """True if activations are recomputed for it."""


SHAPES = {"0.1B": (576, 1536, 30, 49152), "1B": (2048, 8192, 16, 128256), "3B": (3072, 8192, 28, 128256)}
SHAPES |= {"8B": (4096, 14336, 32, 128256), "14B": (5120, 17408, 40, 151936), "32B": (5120, 25600, 64, 151936)}
SHAPES |= {"70B": (8192, 28672, 80, 128256)}
"""Size -> hidden size, intermediate size, layers and vocabulary, of SmolLM2, Llama 3 and Qwen3."""

R, LENGTH, MAX_TRIALS = 16, 1024, 16


def trainable() -> list[Trainable]:
    """Return what the smallest device of this machine can train of each size, by the estimate of a search."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig  # noqa: PLC0415

    from raylora.base.architecture import Architecture  # noqa: PLC0415
    from raylora.search.ray.cluster import local_devices  # noqa: PLC0415
    from raylora.training.memory import TOKENS_PER_PASS, adapter_parameters, estimate_memory  # noqa: PLC0415

    on_gpu, devices = torch.cuda.is_available(), local_devices()
    memory_mib = (devices.gpu_memory_mib if on_gpu else devices.memory_mib) or 0.0
    found = []
    for name, (hidden, intermediate, layers, vocabulary) in SHAPES.items():
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            vocab_size=vocabulary,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 64 // 4),
            tie_word_embeddings=hidden < 4096,
        )
        architecture = Architecture.of_config(config)
        memory = estimate_memory(
            config,
            architecture,
            n_adapter_parameters=adapter_parameters(architecture.shapes, R),
            rows=1,
            length=LENGTH,
            dtype_bytes=2 if on_gpu else 4,
            nf4=True,
            double_quant=True,
            on_gpu=on_gpu,
        )
        tokens = TOKENS_PER_PASS["gpu" if on_gpu else "cpu"]
        fit = memory.fit(memory_mib - memory.base_mib, slots=MAX_TRIALS, tokens=tokens, checkpointing="auto")
        fits = memory.total_mib(fit) <= memory_mib
        found.append(Trainable(name, fit.slots if fits else 0, fit.checkpointing))
    return found


def check_python() -> Finding:
    """Check that Python is 3.11 or newer."""
    ok = sys.version_info >= (3, 11)
    return Finding(ok, f"Python {sys.version.split()[0]}", "" if ok else "install Python 3.11 or newer")


def check_packages() -> Finding:
    """List the versions of the packages that a search depends on."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return Finding(True, versions)


def check_gpu() -> Finding:
    """Check that torch can use the GPU, if there is one. A search needs none."""
    import torch  # noqa: PLC0415

    from raylora.training.packed.fused import has_fused_products  # noqa: PLC0415
    from raylora.training.packed.group import has_grouped_products  # noqa: PLC0415

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices)
        dtype = (
            "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16 (it has no bfloat16)"
        )
        device = torch.device("cuda")
        products = "in groups" if has_grouped_products(device) else "trial by trial"
        if has_fused_products(device, torch.bfloat16 if dtype == "bfloat16" else torch.float16):
            products = "by fused kernels"
        return Finding(True, f"GPU: {names}; trains in {dtype}, adapters multiply {products}")
    if shutil.which("nvidia-smi"):
        return Finding(
            False, "nvidia-smi is here, but torch sees no GPU", f"torch {torch.__version__} may be a CPU build"
        )
    return Finding(True, "no GPU: trials train on the CPU, one lane by default")


def check_limits() -> Finding:
    """Say what memory and CPUs this process may use, and which control group says so."""
    memory, cpus = memory_limit(), cpu_limit()
    return Finding(
        True,
        f"memory {memory.amount / GIB:.1f} GiB, of which {free_memory() / GIB:.1f} are free (by {memory.source}); "
        f"CPUs {cpus.amount:g} (by {cpus.source})",
    )


def check_quantization() -> Finding:
    """Check that bitsandbytes quantizes to NF4 and back on the device that trains."""
    import bitsandbytes  # noqa: PLC0415
    import torch  # noqa: PLC0415

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    try:
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        error = float((bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().max())
    except (RuntimeError, OSError, AttributeError) as failure:
        return Finding(False, f"bitsandbytes fails on {device}: {failure}", "`python -m bitsandbytes` says more")
    # the widest gap between two NF4 levels is 0.304 (QLoRA, appendix E), so half of it bounds the rounding error
    return Finding(error < 0.16, f"bitsandbytes NF4 on {device}, largest rounding error {error:.3f} of 1")


def check_ray() -> Finding:
    """Check that a local Ray instance starts and runs a task."""
    import ray  # noqa: PLC0415

    from raylora.search.plan import Devices  # noqa: PLC0415
    from raylora.search.ray.cluster import local_ray  # noqa: PLC0415

    try:
        with local_ray(Devices(n_gpus=0, n_cpus=1, where="this machine", node_cpus=1)):
            ok = ray.get(ray.remote(_answer).remote(), timeout=60) == 42
    except Exception as failure:  # whatever keeps Ray from starting is the finding
        return Finding(False, f"Ray does not start: {failure}", "see whether a firewall blocks ports on this machine")
    return Finding(ok, f"Ray {ray.__version__} starts and runs a task")


def check_disk() -> Finding:
    """Check the free disk space for bases, checkpoints and merged models."""
    free = shutil.disk_usage(Path.cwd()).free / GIB
    ok = free >= MIN_FREE_GIB
    return Finding(ok, f"{free:.0f} GiB free in {Path.cwd()}", "" if ok else f"make at least {MIN_FREE_GIB} GiB free")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_packages,
    check_limits,
    check_gpu,
    check_quantization,
    check_ray,
    check_disk,
)
"""Checks in the order of the output."""


def _answer() -> int:
    """Return the result of the task that Ray runs."""
    return 42


if __name__ == "__main__":
    run_command(doctor)
