"""Checks machine, GPU, bitsandbytes, Ray and disk, and says how to mend what is wrong.

Run as `python -m raylora.doctor`.
"""

import importlib.metadata
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import ray
import torch
import typer

from raylora.cli.command import FAILED, command, console, run_command
from raylora.run.provenance import PACKAGES
from raylora.search.plan import Devices
from raylora.search.ray.cluster import local_ray
from raylora.training.memory import MIB

MIN_FREE_GIB = 10
"""Room for a 7B base in NF4 (4 GiB), its merged copy and some checkpoints."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    ok: bool
    text: str
    cure: str = ""


@command
def doctor() -> None:
    """Check what a search needs; exit code 1 if something would keep it from running."""
    screen = console()
    findings = [check() for check in CHECKS]
    for finding in findings:
        screen.print(
            f"{'ok  ' if finding.ok else 'FAIL'} {finding.text}" + (f"\n     -> {finding.cure}" if finding.cure else "")
        )
    if not all(finding.ok for finding in findings):
        raise typer.Exit(FAILED)


def check_python() -> Finding:
    """Python 3.11 or newer."""
    ok = sys.version_info >= (3, 11)
    return Finding(ok, f"Python {sys.version.split()[0]}", "" if ok else "install Python 3.11 or newer")


def check_packages() -> Finding:
    """The packages that were tested together."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return Finding(True, versions)


def check_gpu() -> Finding:
    """A GPU is not needed; one that torch cannot use is worth a word."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{device.name} ({device.total_memory / MIB / 1024:.0f} GiB)" for device in devices)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        cure = "" if bf16 else "no bfloat16 on this GPU: set base_model.compute_dtype to float16"
        return Finding(True, f"GPU: {names}", cure)
    if shutil.which("nvidia-smi"):
        return Finding(
            False, "nvidia-smi is here, but torch sees no GPU", f"torch {torch.__version__} may be a CPU build"
        )
    return Finding(True, "no GPU: trials train on the CPU, one lane by default")


def check_quantization() -> Finding:
    """bitsandbytes quantizes and dequantizes on the device that trains."""
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
    """A local Ray instance starts and runs a task."""
    try:
        with local_ray(Devices(n_gpus=0, n_cpus=1, where="this machine", node_cpus=1)):
            ok = ray.get(ray.remote(_answer).remote(), timeout=60) == 42
    except Exception as failure:  # whatever keeps Ray from starting is the finding
        return Finding(False, f"Ray does not start: {failure}", "see whether a firewall blocks ports on this machine")
    return Finding(ok, f"Ray {ray.__version__} starts and runs a task")


def check_disk() -> Finding:
    """Room for bases, checkpoints and merged models."""
    free = shutil.disk_usage(Path.cwd()).free / MIB / 1024
    ok = free >= MIN_FREE_GIB
    return Finding(ok, f"{free:.0f} GiB free in {Path.cwd()}", "" if ok else f"make at least {MIN_FREE_GIB} GiB free")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_packages,
    check_gpu,
    check_quantization,
    check_ray,
    check_disk,
)


def _answer() -> int:
    return 42


if __name__ == "__main__":
    run_command(doctor)
