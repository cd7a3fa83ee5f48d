"""Compares base, adapter and merged model on the held-out rows, and writes `evaluation.json` and `answers.jsonl`."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from raylora.base.load import compute_dtype, load_base_model
from raylora.base.serving import end_tokens
from raylora.config.schema import SearchConfig
from raylora.data.answers import AnswerReader
from raylora.data.of_run import data_of_run
from raylora.data.prepare import PreparedData
from raylora.data.rows import load_part
from raylora.errors import RunDirectoryError
from raylora.evaluate.bootstrap import N_DRAWS, mean_interval, score_intervals
from raylora.evaluate.generate import Answers, generate
from raylora.evaluate.scores import agreement, bleu_p_value, score, score_calls, score_rows
from raylora.merge.write import load_merged
from raylora.run.atomic import write_json, write_text
from raylora.run.directory import RunDirectory
from raylora.run.state import SearchState
from raylora.training.losses import row_losses


def evaluate_run(run: RunDirectory) -> dict[str, Any]:
    """Measure base, adapter and merged models on the held-out rows; write `evaluation.json` and `answers.jsonl`.

    Args:
        run: run directory with an adapter and a merged model.

    Returns:
        n_rows: number of held-out rows.
        n_prompts: number of these with a prompt to generate from.
        models: name -> heldout_loss (nats per token), the scores of `score`, tool_call_match.
        intervals: name -> score -> 95 % interval by bootstrap over rows, [low, high].
        n_draws: draws of each interval.
        agreement_with_adapter: merged model -> the shares of `agreement`, and bleu_p_value.
        samples: prompts, references and all answers, as text.

    Raises:
        RunDirectoryError: there is no adapter or merged model yet.
    """
    config, provenance = run.config(), run.provenance()
    merge = SearchState.load(run).merge_of(run)
    merged_forms = [form for form in merge["forms"] if run.merged(form).is_dir()] if merge else []
    if merge is None and run.merge_file.is_file():
        raise RunDirectoryError(
            f"{run.location} was merged before all of its trials had finished; run `python -m raylora.merge "
            f"{run.location}` first"
        )
    if not run.best_adapter.is_dir() or not merged_forms:
        raise RunDirectoryError(
            f"{run.location} holds no merged model yet; run `python -m raylora.merge {run.location}` first"
        )
    device = "cuda:0" if provenance["on_gpu"] and torch.cuda.is_available() else "cpu"
    section = config.base_model
    check = _Check(config, data_of_run(run, config))
    base = load_base_model(section, run.cache(config), device)
    check.measure("base", base)
    check.measure("adapter", PeftModel.from_pretrained(base, str(run.best_adapter)))
    del base
    for form in merged_forms:
        dtype, trust = compute_dtype(section, device), section.trust_remote_code
        merged = load_merged(run.merged(form), device, dtype, trust_remote_code=trust)
        check.measure(f"merged_{form}", merged, like="adapter")
    lines = check.lines()
    write_text(run.answers_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result = {
        "n_rows": len(check.heldout),
        "n_prompts": len(check.prompts),
        "models": check.models,
        "intervals": check.intervals,
        "n_draws": N_DRAWS,
        "agreement_with_adapter": check.agreements(),
        "samples": [_sample(line) for line in lines[: config.evaluation.n_samples]],
    }
    write_json(run.evaluation_file, result)
    return result


@dataclass
class _Check:
    """The held-out rows, and what each model does with them."""

    config: SearchConfig
    data: PreparedData
    models: dict[str, dict[str, float]] = field(default_factory=dict)
    """Model -> scores."""

    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Model -> score -> 95 % interval."""

    answers: dict[str, Answers] = field(default_factory=dict)
    """Model -> answers to the prompts."""

    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Model -> scores of each answer by itself."""

    def __post_init__(self) -> None:
        self.tokenizer = self.data.tokenizer(trust_remote_code=self.config.base_model.trust_remote_code)
        self.reader = AnswerReader(self.tokenizer, is_chat=self.data.summaries["heldout"].conversations > 0)
        self.heldout = load_part(self.data.tokens_dir, "heldout")
        self.prompts = self.heldout.filter(_has_prompt, keep_in_memory=True)

    def measure(self, name: str, model: PreTrainedModel, like: str | None = None) -> None:
        """Measure a model's loss, and its answers if there are prompts.

        Args:
            name: key of the results.
            model: on any device.
            like: name of a model measured before, whose answers are similar.
        """
        batch_size, pad_token_id = self.config.training.per_device_eval_batch_size, self.tokenizer.pad_token_id
        losses = row_losses(model, self.heldout, batch_size=batch_size, pad_token_id=pad_token_id)
        n_tokens = sum(count for _, count in losses)
        self.models[name] = {"heldout_loss": sum(loss for loss, _ in losses) / max(1, n_tokens)}
        means, weights = [loss / max(1, count) for loss, count in losses], [float(count) for _, count in losses]
        self.intervals[name] = {"heldout_loss": mean_interval(means, weights)}
        if len(self.prompts):
            self._ask(name, model, like)

    def _ask(self, name: str, model: PreTrainedModel, like: str | None) -> None:
        """Generate a model's answers and score them."""
        section, references = self.config.evaluation, list(self.prompts["references"])
        answers = self.answers[name] = generate(
            model,
            self.tokenizer,
            list(self.prompts["prompt_ids"]),
            stop_token_ids=sorted({*self.data.stop_token_ids, *end_tokens(model.generation_config)}),
            max_new_tokens=section.max_new_tokens,
            batch_size=section.batch_size,
            read=self.reader.text,
            drafts=self.answers[like].token_ids if like else None,
        )
        calls = score_calls(list(map(self.reader.calls, answers.token_ids)), list(self.prompts["calls"]))
        rows = score_rows(answers.texts, references, section.answer_pattern)
        self.rows[name] = [row | call for row, call in zip(rows, calls, strict=True)]
        matches = [call["tool_call_match"] for call in calls if call]
        self.models[name] |= score(answers.texts, references, section.answer_pattern)
        self.models[name] |= {"tool_call_match": sum(matches) / len(matches)} if matches else {}
        self.intervals[name] |= score_intervals(answers.texts, references, self.rows[name])

    def agreements(self) -> dict[str, dict[str, float]]:
        """Return merged model -> agreement with the adapter's answers."""
        references = list(self.prompts["references"])
        return {
            name: {
                **agreement(self.answers["adapter"], merged),
                "bleu_p_value": bleu_p_value(self.answers["adapter"], merged, references),
            }
            for name, merged in self.answers.items()
            if name.startswith("merged")
        }

    def lines(self) -> list[dict[str, Any]]:
        """Return each prompt with its references, all answers and their scores."""
        texts = self.tokenizer.batch_decode(list(self.prompts["prompt_ids"]))
        return [
            {
                "prompt": text,
                "references": self.prompts[index]["references"],
                "answers": {
                    name: {"text": answers.texts[index], **self.rows[name][index]}
                    for name, answers in self.answers.items()
                },
            }
            for index, text in enumerate(texts)
        ]


def _has_prompt(row: dict[str, Any]) -> bool:
    """Return True if generation can start from a row."""
    return len(row["prompt_ids"]) > 0


def _sample(line: dict[str, Any]) -> dict[str, str]:
    """Return a prompt with its first reference and all answers, as text."""
    answers = {name: answer["text"] for name, answer in line["answers"].items()}
    return {"prompt": line["prompt"], "reference": line["references"][0], **answers}
