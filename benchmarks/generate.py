"""Measures greedy generation of the held-out check: over 4-bit weights or dense copies, in small batches or large ones.

Run as `python benchmarks/generate.py OUTPUT.json RUN_DIRECTORY`, with nothing else running. The adapter is the best one
of that search.
"""

import json
import os
import platform
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel

from raylora.base.load import load_base_model
from raylora.data.of_run import data_of_run
from raylora.data.rows import load_part
from raylora.evaluate import generate as generation
from raylora.quiet import quiet_libraries
from raylora.run.directory import RunDirectory
from raylora.search.ray.cluster import local_devices


def main() -> None:
    output, run = Path(sys.argv[1]), RunDirectory(Path(sys.argv[2]))
    quiet_libraries()
    torch.set_num_threads(local_devices().node_cpus)
    on_gpu = torch.cuda.is_available()
    config = run.config()
    data = data_of_run(run, config)
    prompts = [ids for ids in load_part(data.tokens_dir, "heldout")["prompt_ids"] if ids]
    base = load_base_model(config.base_model, run.cache(config), "cuda:0" if on_gpu else "cpu")
    model, tokenizer = PeftModel.from_pretrained(base, str(run.best_adapter)), data.tokenizer()
    answers, rows = [], []
    for batch_size in (8, 16, 48, "auto"):
        for dense in (False, True):
            options: dict[str, Any] = {"max_new_tokens": config.evaluation.max_new_tokens, "batch_size": batch_size}
            without = patch.object(generation, "dense_copies", lambda _: nullcontext())
            began = time.perf_counter()
            with nullcontext() if dense else without:
                found = generation.generate(model, tokenizer, prompts, stop_token_ids=data.stop_token_ids, **options)
            seconds = time.perf_counter() - began
            answers.append(found.token_ids)
            # an end token takes a step too, hence the 1
            n_tokens = sum(min(len(ids) + 1, config.evaluation.max_new_tokens) for ids in found.token_ids)
            rows.append({"batch_size": batch_size, "dense": dense, "tokens_per_second": n_tokens / seconds})
            print(rows[-1], flush=True)
    result = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores",
        "base": config.base_model.name,
        "prompts": len(prompts),
        "same_answers": all(one == answers[0] for one in answers),
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
