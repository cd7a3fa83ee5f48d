"""Compares base, adapter and merged model on the held-out rows, and writes `evaluation.json`."""

from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from raylora.base.load import compute_dtype, load_base_model
from raylora.base.serving import end_tokens
from raylora.data.answers import AnswerReader
from raylora.data.of_run import data_of_run
from raylora.data.rows import load_part
from raylora.errors import RunDirectoryError
from raylora.evaluate.generate import Answers, generate
from raylora.evaluate.scores import agreement, bleu_p_value, score, score_calls
from raylora.merge.write import load_merged
from raylora.run.atomic import write_json
from raylora.run.directory import RunDirectory
from raylora.training.losses import eval_loss


def evaluate_run(run: RunDirectory) -> dict[str, Any]:
    """Measure base, adapter and merged models on the held-out rows, and write `evaluation.json`.

    Args:
        run: run directory with an adapter and a merged model.

    Returns:
        n_rows: number of held-out rows.
        n_prompts: number of these with a prompt to generate from.
        models: name -> heldout_loss (nats per token), the scores of `score` and `score_calls`, tokens_per_second.
        agreement_with_adapter: merged model -> the shares of `agreement`, and bleu_p_value.
        samples: prompts, references and all answers, as text.

    Raises:
        RunDirectoryError: there is no adapter or merged model yet.
    """
    config, provenance = run.config(), run.provenance()
    merged_forms = [form for form in config.merge.formats if run.merged(form).is_dir()]
    if not run.best_adapter.is_dir() or not merged_forms:
        raise RunDirectoryError(f"{run.path} holds no merged model yet; run `python -m raylora.merge {run.path}` first")
    device = "cuda:0" if provenance["on_gpu"] and torch.cuda.is_available() else "cpu"
    section, cache_dir = config.base_model, run.cache(config)
    data = data_of_run(run, config)
    tokenizer = data.tokenizer(trust_remote_code=section.trust_remote_code)
    reader = AnswerReader(tokenizer, is_chat=data.summaries["heldout"].conversations > 0)
    heldout = load_part(data.tokens_dir, "heldout")
    prompts = heldout.filter(lambda row: len(row["prompt_ids"]) > 0, keep_in_memory=True)
    answers: dict[str, Answers] = {}
    models: dict[str, dict[str, float]] = {}

    def measure(name: str, model: PreTrainedModel) -> None:
        """Measure a model's loss, and its answers if there are prompts."""
        batch_size = config.training.per_device_eval_batch_size
        loss = eval_loss(model, heldout, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id)
        models[name] = {"heldout_loss": loss}
        if len(prompts):
            answers[name] = generate(
                model,
                tokenizer,
                list(prompts["prompt_ids"]),
                stop_token_ids=sorted({*data.stop_token_ids, *end_tokens(model.generation_config)}),
                max_new_tokens=config.evaluation.max_new_tokens,
                batch_size=config.evaluation.batch_size,
                read=reader.text,
            )
            scores = score(answers[name].texts, list(prompts["references"]), config.evaluation.answer_pattern)
            scores |= score_calls(list(map(reader.calls, answers[name].token_ids)), list(prompts["calls"]))
            models[name] |= {**scores, "tokens_per_second": answers[name].tokens_per_second}

    base = load_base_model(section, cache_dir, device)
    measure("base", base)
    measure("adapter", PeftModel.from_pretrained(base, str(run.best_adapter)))
    del base
    for form in merged_forms:
        dtype, trust = compute_dtype(section, device), section.trust_remote_code
        measure(f"merged_{form}", load_merged(run.merged(form), device, dtype, trust_remote_code=trust))
    result = {
        "n_rows": len(heldout),
        "n_prompts": len(prompts),
        "models": models,
        "agreement_with_adapter": {
            name: {
                **agreement(answers["adapter"], merged),
                "bleu_p_value": bleu_p_value(answers["adapter"], merged, list(prompts["references"])),
            }
            for name, merged in answers.items()
            if name.startswith("merged")
        },
        "samples": _samples(
            prompts, tokenizer.batch_decode(list(prompts["prompt_ids"])), answers, config.evaluation.n_samples
        ),
    }
    write_json(run.evaluation_file, result)
    return result


def _samples(rows: datasets.Dataset, prompts: list[str], answers: dict[str, Answers], n: int) -> list[dict[str, str]]:
    """Return the first n prompts, with reference and all answers of each."""
    return [
        {
            "prompt": prompts[index],
            "reference": rows[index]["references"][0],
            **{name: of_model.texts[index] for name, of_model in answers.items()},
        }
        for index in range(min(n, len(rows)))
    ]
