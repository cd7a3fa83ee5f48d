"""Measures what each merge strategy keeps: adapters of three strengths, each merged in every way.

Run as `python benchmarks/merge.py OUTPUT.json SPACE.yaml [--section.key value ...] [--unrelated ROWS.jsonl]`, with
nothing else running. Trains the space's first three starting points on one base, together; merges each by every
strategy; and has each model answer the held-out prompts. With `--unrelated`, the loss on other text says whether the
merge harms what the base knew.
"""

import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.base.serving import end_tokens
from raylora.config.load import load_config
from raylora.config.schema import SearchConfig
from raylora.data.prepare import prepare_data
from raylora.data.rows import load_part
from raylora.evaluate.generate import Answers, generate
from raylora.evaluate.scores import agreement, bleu_p_value, score
from raylora.merge.evaluator import MergeEvaluator
from raylora.merge.job import MergeJob
from raylora.merge.layer_reader import LayerReader
from raylora.merge.select import merge_adapter, open_reader
from raylora.quiet import quiet_libraries
from raylora.run.directory import RunDirectory
from raylora.run.events import Proposed
from raylora.run.metrics import RungMetrics
from raylora.run.state import SearchState
from raylora.search.plan import Plan, make_plan
from raylora.search.ray.cluster import local_devices
from raylora.search.sampler import Sampler
from raylora.training.choose import load_packed
from raylora.training.losses import eval_loss


def main() -> None:
    output, space, *settings = sys.argv[1:]
    options = dict(zip(settings[::2], settings[1::2], strict=True))
    unrelated = options.pop("--unrelated", None)
    quiet_libraries()
    config = load_config(space, {key.removeprefix("--"): value for key, value in options.items()})
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        plan = make_plan(config, run, local_devices())
        torch.set_num_threads(plan.threads)
        bench = Bench(config, plan, run, unrelated)
        result: dict[str, Any] = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_device_name(plan)}",
            "space": space,
            "settings": [text for pair in options.items() for text in pair],
            "adapters": [],
        }
        for adapter in bench.train(3):
            result["adapters"].append(bench.merge(*adapter))
            Path(output).write_text(json.dumps(result, indent=2) + "\n")
    for adapter in result["adapters"]:
        print(f"\n|dW|/|W| {100 * adapter['update']:.2f} %, r {adapter['r']}, learning rate {adapter['learning_rate']}")
        for name, facts in adapter["models"].items():
            print(name.ljust(12), *(f"{key} {value:.4g}" for key, value in facts.items() if isinstance(value, float)))


class Bench:
    """One task: its data, base and trained adapters."""

    def __init__(self, config: SearchConfig, plan: Plan, run: RunDirectory, unrelated: str | None) -> None:
        self.config, self.plan, self.run = config, plan, run
        self.cache_dir = run.cache(config)
        self.device = "cuda:0" if plan.on_gpu else "cpu"
        self.tokenizer = load_tokenizer(config.base_model, find_checkpoint(config.base_model, self.cache_dir))
        self.unrelated = None
        if unrelated:
            other = {"train": unrelated, "validation": None, "heldout": None, "heldout_size": 1}
            section = config.data.model_copy(update={**other, "max_validation_rows": 16, "max_length": 256})
            tokens_dir = prepare_data(section, self.tokenizer, self.cache_dir).tokens_dir
            self.unrelated = load_part(tokens_dir, "validation")

    def train(self, n: int) -> list[tuple[Path, dict[str, Any]]]:
        """Trains the first n starting points to the end; returns adapter and assignment of each."""
        engine = load_packed(
            self.config, tokens_dir=self.plan.data.tokens_dir, cache_dir=self.cache_dir, device=self.device, slots=n
        )
        state, assignments, adapters = SearchState(), {}, {}
        sampler = Sampler(self.config, state)
        for number in range(n):
            assignments[number], params = sampler.propose(number)
            state.apply(Proposed(number, assignments[number].model_dump(), params, self.plan.rungs[-1]))
            directory = self.run.trial(number)
            engine.add(number, assignments[number], rungs=self.plan.rungs[-1:], directory=directory)
        while engine.trials:
            for number, report in engine.step().items():
                assert isinstance(report, RungMetrics), report
                adapters[number] = Path(report.checkpoint)
                engine.remove(number)
        engine.close()
        return [(adapters[number], assignments[number].model_dump()) for number in range(n)]

    def merge(self, adapter: Path, assignment: dict[str, Any]) -> dict[str, Any]:
        """Merges one adapter in every way."""
        job = MergeJob(
            base=self.config.base_model,
            adapter=adapter,
            outputs={"nf4": self.run.path / "merged"},
            folder=self.run.path,
            settings=self.config.merge.model_copy(update={"strategy": "all"}),
            cache_dir=self.cache_dir,
            device=self.device,
            tokens_dir=self.plan.data.tokens_dir,
            batch_size=self.config.training.per_device_eval_batch_size,
            measures_heldout=True,
        )
        update = _strength(open_reader(job))
        result = merge_adapter(job, Examiner(job, self))
        best = result["models"][result["strategy"]]
        return {
            **assignment,
            "update": update,
            **{key: result[key] for key in ("strategy", "loss_increase", "passed")},
            "reloaded_bit_for_bit": best["logits_sha256"] == result["forms"]["nf4"]["logits_sha256"],
            "nf4_mib": result["forms"]["nf4"]["size_mib"],
            "models": result["models"],
        }


class Examiner(MergeEvaluator):
    """Has each model answer the held-out prompts too, and measures its loss on other text."""

    def __init__(self, job: MergeJob, bench: Bench) -> None:
        super().__init__(job, bench.tokenizer)
        self._bench = bench
        self._heldout = load_part(bench.plan.data.tokens_dir, "heldout")
        self._adapters: Answers | None = None

    def measure(self, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
        """Measure a model as `MergeEvaluator` does, and score its answers."""
        section, tokenizer = self._bench.config.evaluation, self._bench.tokenizer
        answers = generate(
            model,
            tokenizer,
            list(self._heldout["prompt_ids"]),
            stop_token_ids=sorted({*self._bench.plan.data.stop_token_ids, *end_tokens(model.generation_config)}),
            max_new_tokens=section.max_new_tokens,
            batch_size=section.batch_size,
        )
        self._adapters = self._adapters or answers
        facts: dict[str, Any] = score(answers.texts, list(self._heldout["references"]), section.answer_pattern)
        if self._bench.unrelated is not None:
            facts["unrelated_loss"] = eval_loss(
                model, self._bench.unrelated, batch_size=8, pad_token_id=tokenizer.pad_token_id
            )
        same = agreement(self._adapters, answers)
        facts["bleu_p_value"] = bleu_p_value(self._adapters, answers, list(self._heldout["references"]))
        return {**super().measure(model), **facts, "same_answers": same["answers"], "same_tokens": same["tokens"]}


def _strength(reader: LayerReader) -> float:
    """|dW| / |W| over all adapted layers."""
    update = sum(float((reader.target(name)[0] - reader.base_weight(name)).square().sum()) for name in reader.layers)
    weight = sum(float(reader.base_weight(name).square().sum()) for name in reader.layers)
    return (update / weight) ** 0.5


def _device_name(plan: Plan) -> str:
    return torch.cuda.get_device_name() if plan.on_gpu else "cpu"


if __name__ == "__main__":
    main()
