"""Measures seconds and memory of a merge into a large base, with random weights and a random adapter.

Run as `python benchmarks/merge_size.py OUTPUT.json --model MODEL`, with nothing else running; MODEL as for
`throughput.py`. What random weights keep means nothing: `merge.py` measures that.
"""

import json
import os
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from throughput import base_section, model_parser

from raylora.base.load import load_base_model
from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.config.schema import DataSection, MergeSection
from raylora.data.prepare import prepare_data
from raylora.merge.job import MergeJob
from raylora.merge.select import merge_adapter
from raylora.quiet import quiet_libraries
from raylora.testing import make_rows
from raylora.training.memory import peak_memory_mib, reset_peak_memory

ROWS = 500
R, LORA_ALPHA = 16, 0.25
"""With peft's random factors and transformers' random weights, an update of about half a percent of the weight."""


def main() -> None:
    arguments = model_parser().parse_args()
    quiet_libraries()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    on_gpu = torch.cuda.is_available()
    device = "cuda:0" if on_gpu else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        section = base_section(arguments.model, folder)
        cache_dir = folder / "cache"
        reset_peak_memory()
        began = time.perf_counter()
        base = load_base_model(section, cache_dir, device)
        quantized = {"seconds": time.perf_counter() - began, "peak_memory_mib": peak_memory_mib()}
        lora = LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(base, lora).save_pretrained(folder / "adapter")
        del base
        tokenizer = load_tokenizer(section, find_checkpoint(section, cache_dir))
        data = DataSection(train=str(make_rows(folder / "rows.jsonl", ROWS)), validation_size=8, heldout_size=8)
        began = time.perf_counter()
        result = merge_adapter(
            MergeJob(
                base=section,
                adapter=folder / "adapter",
                outputs={"nf4": folder / "merged"},
                folder=folder,
                settings=MergeSection(),
                cache_dir=cache_dir,
                device=device,
                tokens_dir=prepare_data(data, tokenizer, cache_dir).tokens_dir,
                batch_size=8,
            )
        )
        seconds = time.perf_counter() - began
    keys = ("seconds", "peak_memory_mib", "kl_to_adapter", "update_kept")
    report = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores",
        "model": arguments.model,
        "calibration_tokens": MergeSection().calibration_tokens,
        "quantizing_the_base": quantized,
        "whole_merge_seconds": seconds,
        "nf4_mib": result["forms"]["nf4"]["size_mib"],
        "strategies": {
            name: {key: facts[key] for key in keys} for name, facts in result["models"].items() if "seconds" in facts
        },
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
