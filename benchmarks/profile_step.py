"""Shows where a packed step's time goes, and how far it is from its two floors: arithmetic and bytes moved.

Run as `python benchmarks/profile_step.py OUTPUT.json --model MODEL [--trials 1] [--tokens 256] [--dropout 0.0]`; MODEL
as for `throughput.py`.
"""

import argparse
import json
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from throughput import LENGTH, TRIAL, load, model_parser, packed
from torch.profiler import ProfilerActivity, profile

from raylora.base.load import compute_dtype
from raylora.base.onednn import fast_products
from raylora.config.schema import BaseModelSection
from raylora.quiet import quiet_libraries
from raylora.search.ray.cluster import local_devices
from raylora.training.memory import NF4_BITS
from raylora.training.trl import TrlEngine

N_STEPS = 3


def main() -> None:
    parser = model_parser()
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="of each trial's micro-batch")
    parser.add_argument("--dropout", type=float, default=0.0)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(local_devices().n_cpus)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(BaseModelSection(name=""), str(device))
    with tempfile.TemporaryDirectory() as folder:
        engine = load(arguments.model, Path(folder), str(device))
        seconds, events = _profile(engine, arguments)
    n_linear = sum(
        engine.model.get_submodule(name).in_features * engine.model.get_submodule(name).out_features
        for name in engine.architecture.shapes
    )
    head = engine.model.get_output_embeddings().weight.numel()
    tokens = arguments.trials * arguments.tokens
    # forward and backward, without gradients of the base's weights; half of the tokens bear loss
    flop = 2 * 2 * (n_linear * tokens + head * tokens / 2)
    # the base is read once in each direction
    moved = 2 * (n_linear * NF4_BITS / 8 + head * dtype.itemsize)
    peak_flops, peak_bytes = _peaks(device, dtype)
    total = sum(events.values())
    result = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        **{key: value for key, value in vars(arguments).items() if key != "output"},
        "seconds_per_step": seconds,
        "floor_seconds_arithmetic": flop / peak_flops,
        "floor_seconds_bytes": moved / peak_bytes,
        "matrix_product_gflops_measured": peak_flops / 1e9,
        "memory_gb_per_second_measured": peak_bytes / 1e9,
        "share_of_time": {name: round(value / total, 3) for name, value in list(events.items())[:12]},
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _profile(engine: TrlEngine, arguments: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Seconds of a step; and each operation's own time, largest first."""
    on_gpu = engine.model.device.type == "cuda"
    pack = packed(engine)
    changes = {"per_device_train_batch_size": arguments.tokens // LENGTH, "lora_dropout": arguments.dropout}
    for number in range(arguments.trials):
        trial = TRIAL.model_copy(update={**changes, "seed": number})
        pack.add(number, trial, rungs=[10**6], directory=Path("/nowhere"))
    pack.step()
    seconds = _seconds(pack.step, N_STEPS, on_gpu)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        for _ in range(N_STEPS):
            pack.step()
    which = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = {event.key: getattr(event, which) for event in profiler.key_averages()}
    return seconds, dict(sorted(events.items(), key=lambda item: -item[1]))


def _peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured FLOP/s of a large matrix product, and bytes/s of a large copy, read and written."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    with fast_products(device):
        flops = 2 * n**3 / _seconds(lambda: a @ a, 20, on_gpu)
    big = torch.empty(2**28, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    return flops, 2 * big.numel() / _seconds(lambda: other.copy_(big), 5, on_gpu)


def _seconds(call, n: int, on_gpu: bool) -> float:  # type: ignore[no-untyped-def]
    call()
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(n):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / n


if __name__ == "__main__":
    main()
