"""Measures what each added trial, each added token of a pass and a checkpoint take, beside the estimate.

Run as `python benchmarks/memory.py OUTPUT.json --model MODEL`; MODEL as for `throughput.py`.
"""

import ctypes
import gc
import json
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from throughput import LENGTH, TRIAL, load, model_parser, packed

from raylora.base.architecture import Architecture
from raylora.base.load import compute_dtype
from raylora.config.schema import BaseModelSection
from raylora.quiet import quiet_libraries
from raylora.training.memory import (
    MIB,
    Fit,
    adapter_parameters,
    estimate_memory,
    peak_memory_mib,
    reset_peak_memory,
    resident_mib,
)
from raylora.training.trl import TrlEngine

TOKENS = (128, 256, 512)
TRIALS = (1, 2, 4, 8)
R = 32


def main() -> None:
    arguments = model_parser().parse_args()
    quiet_libraries()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        engine = load(arguments.model, Path(folder), device)
        by_tokens = [peak(engine, n_trials=1, tokens=tokens) for tokens in TOKENS]
        recomputed = [peak(engine, n_trials=1, tokens=tokens, checkpointing=True) for tokens in TOKENS]
        by_trials = [peak(engine, n_trials=n, tokens=LENGTH) for n in TRIALS]
        checkpoint = peak_of_a_checkpoint(engine, Path(folder))
        architecture = Architecture.of_config(engine.model.config)
    dtype = compute_dtype(BaseModelSection(name=""), device)
    parameters = adapter_parameters(architecture.shapes, R)
    estimate = estimate_memory(
        engine.model.config,
        architecture,
        n_adapter_parameters=parameters,
        rows=1,
        length=LENGTH,
        dtype_bytes=dtype.itemsize,
        nf4=True,
        double_quant=True,
    )
    passing = replace(estimate, checkpoint_mib=0.0)
    per_trial = (by_trials[-1] - by_trials[0]) / (TRIALS[-1] - TRIALS[0])
    result = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "model": arguments.model,
        "r": R,
        "peak_mib_by_tokens_per_pass": dict(zip(TOKENS, by_tokens, strict=True)),
        "peak_mib_by_trials": dict(zip(TRIALS, by_trials, strict=True)),
        "mib_of_added_tokens": {
            name: {
                "tokens": TOKENS[-1] - TOKENS[0],
                "measured": peaks[-1] - peaks[0],
                "estimated": passing.total_mib(Fit(1, TOKENS[-1], checkpointing))
                - passing.total_mib(Fit(1, TOKENS[0], checkpointing)),
            }
            for name, peaks, checkpointing in (("kept", by_tokens, False), ("recomputed", recomputed, True))
        },
        "mib_of_a_checkpoint": {"measured": checkpoint, "estimated": estimate.checkpoint_mib},
        "mib_per_added_trial": per_trial,
        "mib_per_added_trial_floor": 16 * parameters / MIB,
        "added_trial_over_floor": per_trial / (16 * parameters / MIB),
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def peak(engine: TrlEngine, *, n_trials: int, tokens: int, checkpointing: bool = False) -> float:
    """MiB at most in two steps of so many trials, each with a pass of its own of so many tokens."""
    forget()
    training = engine.training.model_copy(update={"gradient_checkpointing": checkpointing})
    pack = packed(replace(engine, training=training), tokens=1)
    reset_peak_memory()
    trial = TRIAL.model_copy(update={"r": R, "per_device_train_batch_size": tokens // LENGTH})
    for number in range(n_trials):
        pack.add(number, trial.model_copy(update={"seed": number}), rungs=[10**6], directory=Path("/nowhere"))
    pack.step()
    pack.step()
    pack.close()
    return peak_memory_mib()


def peak_of_a_checkpoint(engine: TrlEngine, folder: Path) -> float:
    """MiB of this process that writing a checkpoint adds."""
    pack = packed(engine, tokens=1)
    pack.add(0, TRIAL.model_copy(update={"r": R}), rungs=[10**6], directory=folder / "trial")
    pack.step()
    pack.trials[0].save()  # loads what it imports
    forget()
    before = resident_mib()
    reset_peak_memory()
    pack.trials[0].save()
    highest = resident_mib("VmHWM")
    pack.close()
    return highest - before


def forget() -> None:
    """Give back what is free: resident memory would count what glibc keeps of the measurement before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
