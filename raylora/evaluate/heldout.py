"""Checks base, adapter and merged model on the held-out rows, which no earlier step has seen."""

from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from raylora.base.load import compute_dtype, load_base_model
from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.data.rows import load_part
from raylora.errors import RunDirectoryError
from raylora.evaluate.generate import Answers, generate
from raylora.evaluate.scores import agreement, bleu_p_value, score
from raylora.merge.write import load_merged
from raylora.run.atomic import write_json
from raylora.run.directory import RunDirectory
from raylora.training.losses import eval_loss


def evaluate_run(run: RunDirectory) -> dict[str, Any]:
    """Scores every model of the run and writes `evaluation.json`.

    Returns:
        `n_rows`, `n_prompts`, `models` (name -> heldout_loss, scores, tokens_per_second), `agreement_with_adapter`
        (merged model -> shares, and `bleu_p_value`), `samples`.

    Raises:
        RunDirectoryError: there is no adapter or merged model yet.
    """
    config, provenance = run.config(), run.provenance()
    merged_forms = [form for form in config.merge.formats if run.merged(form).is_dir()]
    if not run.best_adapter.is_dir() or not merged_forms:
        raise RunDirectoryError(f"{run.path} holds no merged model yet; run `python -m raylora.merge {run.path}` first")
    device = "cuda:0" if provenance["on_gpu"] and torch.cuda.is_available() else "cpu"
    section, cache_dir = config.base_model, run.cache(config)
    tokenizer = load_tokenizer(section, find_checkpoint(section, cache_dir))
    heldout = load_part(Path(provenance["tokens_dir"]), "heldout")
    asked = heldout.filter(lambda row: len(row["prompt_ids"]) > 0, keep_in_memory=True)
    answers: dict[str, Answers] = {}
    models: dict[str, dict[str, float]] = {}

    def check(name: str, model: PreTrainedModel) -> None:
        batch_size = config.training.per_device_eval_batch_size
        loss = eval_loss(model, heldout, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id)
        models[name] = {"heldout_loss": loss}
        if len(asked):
            answers[name] = generate(
                model,
                tokenizer,
                list(asked["prompt_ids"]),
                max_new_tokens=config.evaluation.max_new_tokens,
                batch_size=config.evaluation.batch_size,
            )
            scores = score(answers[name].texts, list(asked["references"]), config.evaluation.answer_pattern)
            models[name] |= {**scores, "tokens_per_second": answers[name].tokens_per_second}

    base = load_base_model(section, cache_dir, device)
    check("base", base)
    check("adapter", PeftModel.from_pretrained(base, str(run.best_adapter)))
    del base
    for form in merged_forms:
        check(f"merged_{form}", load_merged(run.merged(form), device, compute_dtype(section, device)))
    result = {
        "n_rows": len(heldout),
        "n_prompts": len(asked),
        "models": models,
        "agreement_with_adapter": {
            name: {
                **agreement(answers["adapter"], mine),
                "bleu_p_value": bleu_p_value(answers["adapter"], mine, list(asked["references"])),
            }
            for name, mine in answers.items()
            if name.startswith("merged")
        },
        "samples": _samples(
            asked, tokenizer.batch_decode(list(asked["prompt_ids"])), answers, config.evaluation.n_samples
        ),
    }
    write_json(run.evaluation_file, result)
    return result


def _samples(asked: datasets.Dataset, prompts: list[str], answers: dict[str, Answers], n: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": prompts[index],
            "reference": asked[index]["references"][0],
            **{name: mine.texts[index] for name, mine in answers.items()},
        }
        for index in range(min(n, len(asked)))
    ]
