"""Measures trial-steps per second of a pack against the same trials one after the other with TRL and peft.

Run as `python benchmarks/throughput.py OUTPUT.json --model MODEL [--packs 1 2 4 8] [--tokens 128 256 512]
[--steps 8]`, with nothing else running. MODEL is a model directory, a GGUF file, a Hub id, `tiny`, `1b` or `7b`; the
last three are random weights. Rows are of 64 random tokens, half of which bear loss: no padding on either side, from
which TRL would suffer.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raylora.base.architecture import Architecture
from raylora.base.load import compute_dtype, load_base_model
from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.config.assignment import Assignment
from raylora.config.schema import BaseModelSection, SearchSection, TrainingSection
from raylora.data.rows import IGNORE, TokenRows
from raylora.quiet import quiet_libraries
from raylora.run.metrics import RungMetrics
from raylora.testing import make_tiny_model
from raylora.training.memory import tokens_per_pass
from raylora.training.packed.engine import PackedEngine
from raylora.training.packed.fused import has_fused_products
from raylora.training.packed.group import has_grouped_products
from raylora.training.trl import TrlEngine

LENGTH = 64


class Steps(NamedTuple):
    """Steps of an engine: those before the clock starts, and those that are timed."""

    warm_up: int = 2
    timed: int = 8


RANDOM = {
    # Llama 3.2 1B and Llama 2 7B in shape
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip


def main() -> None:
    parser = model_parser()
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--steps", type=int, default=Steps().timed)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    on_gpu = torch.cuda.is_available()
    steps = Steps(timed=arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        engine = load(arguments.model, Path(folder), "cuda:0" if on_gpu else "cpu")
        rows = [measure(engine, tokens, arguments.packs, Path(folder), steps) for tokens in arguments.tokens]
    result = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores",
        "model": arguments.model,
        "r": TRIAL.r,
        "timed_steps": steps.timed,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def model_parser() -> argparse.ArgumentParser:
    """`OUTPUT.json --model MODEL`, which every script on one model takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", required=True)
    return parser


def base_section(model: str, folder: Path) -> BaseModelSection:
    """The base that `--model` names; random weights are made in a folder."""
    if model in RANDOM:
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(LlamaConfig(**RANDOM[model])).save_pretrained(folder / "model")
        torch.set_default_dtype(torch.float32)
        AutoTokenizer.from_pretrained(make_tiny_model(folder / "tiny")).save_pretrained(folder / "model")
        name = str(folder / "model")
    else:
        name = str(make_tiny_model(folder / "model")) if model == "tiny" else model
    return BaseModelSection(name=name)


def load(model: str, folder: Path, device: str) -> TrlEngine:
    """TRL's engine on random rows; the packed one then uses its base."""
    section = base_section(model, folder)
    base = load_base_model(section, folder / "cache", device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(250, (512, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, : LENGTH // 2] = IGNORE
    part = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    tokenizer = load_tokenizer(section, find_checkpoint(section, folder / "cache"))
    return TrlEngine(
        base, tokenizer, part, part.select(range(1)), TrainingSection(), Architecture.of_config(base.config)
    )


TRIAL = Assignment(
    r=16,
    lora_alpha=16,
    lora_dropout=0.05,
    learning_rate=1e-4,
    target_modules="all-linear",
    use_rslora=False,
    weight_decay=0.0,
    warmup_ratio=0.0,
    lr_scheduler_type="constant",
    per_device_train_batch_size=1,
    gradient_accumulation_steps=1,
    seed=0,
)


def measure(engine: TrlEngine, tokens: int, packs: list[int], folder: Path, steps: Steps) -> dict[str, Any]:
    trial = TRIAL.model_copy(update={"per_device_train_batch_size": tokens // LENGTH})
    alone = trl_seconds(engine, trial, folder / f"trl-{tokens}", steps)
    row: dict[str, Any] = {"tokens_per_micro_batch": tokens, "trl_seconds_per_step": alone, "speedup": {}}
    for n in packs:
        seconds, mib = packed_seconds(engine, trial, n, folder, steps)
        row["speedup"][n] = round(n * alone / seconds, 2)
        row[f"packed_seconds_per_step_of_{n}"] = seconds
        row[f"peak_memory_mib_of_{n}"] = mib
        print(
            f"{tokens} tokens, {n} trials: TRL {alone:.3f} s a step, packed {seconds / n:.3f} s a trial's step",
            flush=True,
        )
    return row


def trl_seconds(engine: TrlEngine, trial: Assignment, folder: Path, steps: Steps) -> float:
    """Return the seconds of one step, when the first ones are over."""
    reports: list[RungMetrics] = []
    rungs = [steps.warm_up, steps.warm_up + steps.timed]
    engine.fit(trial, rungs=rungs, directory=folder, report=lambda report: bool(reports.append(report)))
    return reports[-1].train_seconds / steps.timed


def packed(
    engine: TrlEngine,
    tokens: int | None = None,
    *,
    fused: bool = True,
    fused_layers: bool = True,
    dense: bool = False,
) -> PackedEngine:
    """Return a packed engine on another engine's base and data.

    Args:
        engine: gives base and data.
        tokens: tokens of a pass; None takes as many as a search does.
        fused: True for the fused kernels, where the device has them.
        fused_layers: True to take norms, rotary embeddings and attention by fewer kernels.
        dense: True for a base that is kept dequantized.
    """
    device = engine.model.device
    on_gpu = device.type != "cpu"
    dtype = compute_dtype(BaseModelSection(name=""), str(device))
    return PackedEngine(
        engine.model,
        engine.architecture,
        TokenRows(engine.train),
        TokenRows(engine.validation),
        engine.training,
        tokens_per_pass=tokens or tokens_per_pass(SearchSection(), on_gpu=on_gpu),
        autocast=dtype if dtype != torch.float32 else None,
        grouped=dtype == torch.bfloat16 and has_grouped_products(device),
        fused=fused and has_fused_products(device, dtype),
        fused_layers=fused_layers,
        dense=dense and on_gpu,
    )


def packed_seconds(
    engine: TrlEngine,
    trial: Assignment,
    n: int,
    folder: Path,
    steps: Steps,
    ranks: list[int] | None = None,
    **options: bool,
) -> tuple[float, float]:
    """Return the seconds of one step of n trials, and the peak memory in MiB. `ranks` gives each trial its rank."""
    with closing(packed(engine, **options)) as pack:
        for number in range(n):
            r = ranks[number] if ranks else trial.r
            changes = {"seed": number, "r": r, "lora_alpha": r if ranks else trial.lora_alpha}
            pack.add(number, trial.model_copy(update=changes), rungs=[10**6], directory=folder)
        for _ in range(steps.warm_up):
            pack.step()
        _synchronize()
        began = time.perf_counter()
        for _ in range(steps.timed):
            pack.step()
        _synchronize()
        seconds = (time.perf_counter() - began) / steps.timed
    mib = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return seconds, mib


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
