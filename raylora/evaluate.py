"""Checks base, adapter and merged model on the held-out rows, which nothing before has seen.

Run as `python -m raylora.evaluate RUN_DIRECTORY`.
"""

from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import typer
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from raylora.base_model import compute_dtype, find_checkpoint, load_base_model, load_tokenizer
from raylora.commands import command, console, run_command
from raylora.data import load_part
from raylora.errors import RunDirectoryError
from raylora.files import write_json
from raylora.generate import Answers, agreement, bleu_p_value, generate, score
from raylora.losses import eval_loss
from raylora.run_directory import RunDirectory
from raylora.tables import print_table
from raylora.write_model import load_merged

SIGNIFICANCE = 0.05
"""A difference that chance alone makes as large less often than this is shown as a real one."""


@command
def evaluate(run_directory: Annotated[Path, typer.Argument(help="Folder of a search, merged.")]) -> None:
    """Generate on the held-out prompts with base, adapter and merged model, and score the answers."""
    show_evaluation(evaluate_run(RunDirectory(run_directory)), console())


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


def evaluation_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Scores of each model, for a table."""
    return [{"model": name, **scores} for name, scores in result["models"].items()]


def show_evaluation(result: dict[str, Any], screen: Console) -> None:
    """Prints the table."""
    screen.print(f"\nheld-out check, {result['n_rows']} rows, {result['n_prompts']} prompts answered greedily")
    print_table(evaluation_rows(result), screen)
    if not result["n_prompts"]:
        screen.print("no row has a prompt that generation could start from, so there is a loss only")
    for name, shares in result["agreement_with_adapter"].items():
        p = shares["bleu_p_value"]
        difference = result["models"][name]["bleu"] - result["models"]["adapter"]["bleu"]
        chance = "which may be chance" if p >= SIGNIFICANCE else "more than by chance"
        bleu = f"its BLEU differs by {difference:+.2f}, {chance} (p = {p:.2f})"
        screen.print(
            f"{name} agrees with adapter in {100 * shares['tokens']:.1f} % of tokens; "
            + ("every answer is the same" if shares["answers"] == 1 else bleu)
        )


if __name__ == "__main__":
    run_command(evaluate)
