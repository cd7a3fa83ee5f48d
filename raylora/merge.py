"""Merges an adapter into a 4-bit base so that the fine-tune survives, and measures that it did.

Run as `python -m raylora.merge RUN_DIRECTORY` after a search, or on any LoRA adapter of peft as
`python -m raylora.merge --base MODEL --adapter DIR --output DIR [--data.train FILE]`.

The update is far smaller than a quantization step, so adding it to the dequantized NF4 weight and quantizing again
would round it away. Each strategy is measured on validation rows, and the best is written (docs/merge.md).
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from raylora.base_model import find_checkpoint, load_tokenizer
from raylora.commands import command, console, new_folder, run_command, split_arguments
from raylora.config import BaseModelSection, build_merge_config, change_config
from raylora.data import prepare_data
from raylora.errors import ConfigError, DeviceError, MergeError, RunDirectoryError
from raylora.files import replacing, write_json
from raylora.merging import Job, merge_adapter
from raylora.records import Records, TrialRow
from raylora.run_directory import RunDirectory
from raylora.tables import print_table
from raylora.updates import find_adapter

FINALISTS = 5
"""Trials that are merged where the objective is the loss after merging."""

REPORT = "merge.json"


@command
def merge(
    context: typer.Context,
    run_directory: Annotated[Path | None, typer.Argument(help="Folder of a search.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: Hub id, directory or GGUF file.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter of peft: directory or Hub id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write the merged model to.")] = None,
    merge_tolerance: Annotated[float | None, typer.Option(help="As --merge.tolerance.")] = None,
) -> None:
    """Merge a search's best adapter, or any adapter, and measure what it lost. Any setting: --merge.strategy NAME."""
    run_directory, overrides = split_arguments(run_directory, context.args)
    if merge_tolerance is not None:
        overrides["merge.tolerance"] = str(merge_tolerance)
    if run_directory is not None:
        run = RunDirectory(run_directory)
        save_best_adapter(run)
        result = merge_run(run, overrides)
    elif base is not None and adapter is not None and output is not None:
        output = new_folder(output)
        result = merge_adapter(_job(base, find_adapter(adapter), output, overrides))
        write_json(output / REPORT, result)
    else:
        raise ConfigError("needs the folder of a search, or --base, --adapter and --output")
    show_merge(result, console())
    check_tolerance(result)


def save_best_adapter(run: RunDirectory) -> TrialRow:
    """Copies the best trial's adapter, in peft's format, to `best_adapter`.

    Raises:
        RunDirectoryError: no trial reached the full budget.
    """
    base, best = run.config().base_model, Records.load(run).best()
    if best is None:
        raise RunDirectoryError(f"{run.path} holds no trial that reached the full budget, so none can be called best")
    _save_adapter(run, base, best, run.best_adapter)
    return best


def _save_adapter(run: RunDirectory, base: BaseModelSection, trial: TrialRow, directory: Path) -> None:
    assert trial.checkpoint is not None  # written before its loss was reported
    checkpoint = run.trial(trial.number) / Path(trial.checkpoint).name  # as written, unless the run was moved
    with replacing(directory) as temporary:
        temporary.mkdir()
        shutil.copy(checkpoint / "adapter_model.safetensors", temporary)
        config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(
            temporary / "adapter_config.json",
            {**config, "base_model_name_or_path": base.name, "revision": base.revision},
        )


def merge_run(run: RunDirectory, overrides: dict[str, str] | None = None) -> dict[str, Any]:
    """Merges a search's best adapter, and writes the merged models and `merge.json` into its run directory.

    Where the objective is the loss after merging, finalists are merged first, and `best_adapter` becomes the winner's.

    Returns:
        As of `merge_adapter`, and `trial`, the number, and `finalists`, number -> validation loss after merging.

    Raises:
        MergeError: the merge cannot be made.
        RunDirectoryError: no adapter to merge.
    """
    if not run.best_adapter.is_dir():
        raise RunDirectoryError(f"{run.path} holds no best_adapter")
    config, provenance, records = change_config(run.config(), overrides or {}), run.provenance(), Records.load(run)
    job = Job(
        base=config.base_model,
        adapter=run.best_adapter,
        outputs={form: run.merged(form) for form in config.merge.formats},
        folder=run.path,
        settings=config.merge,
        cache_dir=run.cache(config),
        device=_device("auto" if provenance["on_gpu"] else "cpu"),
        tokens_dir=Path(provenance["tokens_dir"]),
        batch_size=config.training.per_device_eval_batch_size,
    )
    best, finalists = records.best(), {}
    if config.search.objective == "merged_eval_loss":
        finalists = _merge_finalists(run, records, job)
        best = records.trials[min(finalists, key=lambda number: finalists[number])]
        _save_adapter(run, job.base, best, run.best_adapter)
    result = {"trial": best.number if best else None, "finalists": finalists, **merge_adapter(job)}
    write_json(run.merge_file, result)
    return result


def _merge_finalists(run: RunDirectory, records: Records, job: Job) -> dict[int, float]:
    losses = {}
    for trial in records.finished()[:FINALISTS]:
        with tempfile.TemporaryDirectory(prefix=".finalist-", dir=run.path) as folder:
            adapter = Path(folder) / "adapter"
            _save_adapter(run, job.base, trial, adapter)
            result = merge_adapter(replace(job, adapter=adapter, outputs={}))
            losses[trial.number] = result["models"][result["strategy"]]["eval_loss"]
    return losses


def _job(base: str, adapter: Path, output: Path, overrides: dict[str, str]) -> Job:
    config = build_merge_config(base, overrides)
    cache_dir = Path(config.cache_dir).expanduser() if config.cache_dir else output.parent / ".cache"
    tokens_dir = None
    if config.data is not None:
        tokenizer = load_tokenizer(config.base_model, find_checkpoint(config.base_model, cache_dir))
        tokens_dir = prepare_data(config.data, tokenizer, cache_dir).tokens_dir
    forms = config.merge.formats
    return Job(
        base=config.base_model,
        adapter=adapter,
        outputs={form: output if len(forms) == 1 else output / form for form in forms},
        folder=output.parent,
        settings=config.merge,
        cache_dir=cache_dir,
        device=_device(config.device),
        tokens_dir=tokens_dir,
        batch_size=config.per_device_eval_batch_size,
    )


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device is cuda, and this machine has no GPU; `raylora doctor` says what torch sees")
    return "cuda:0" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def merge_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What each model measures, for a table; the written ones as they are after reloading."""
    adapter = result["models"].get("adapter", {}).get("eval_loss")
    written = {f"merged_{form}, reloaded": facts for form, facts in result["forms"].items()}
    rows = []
    for name, facts in {**result["models"], **written}.items():
        loss = facts.get("eval_loss")
        rows.append(
            {
                "model": name,
                "eval_loss": loss,
                "against adapter": None if loss is None else f"{100 * (loss / adapter - 1):+.2f} %",
                "KL to adapter": facts.get("kl_to_adapter"),
                "same token": facts.get("token_agreement"),
                "heldout_loss": facts.get("heldout_loss"),
                "update kept": facts.get("update_kept"),
                "seconds": facts.get("seconds"),
                "peak MiB": facts.get("peak_memory_mib"),
                "MiB on disk": facts.get("size_mib"),
            }
        )
    return rows


def verdict(result: dict[str, Any]) -> str:
    """What came of the merge, in a sentence."""
    if result["passed"] is None:
        return f"merged by {result['strategy']}; no rows were given, so what it lost was not measured"
    return (
        f"merged by {result['strategy']}: validation loss {100 * result['loss_increase']:+.2f} % against the adapter, "
        f"tolerance {100 * result['tolerance']:.0f} %"
    )


def least_kept(result: dict[str, Any], n: int = 3) -> list[dict[str, Any]]:
    """The layers whose weights hold least of the update, for a table."""
    shares = result["update_kept"].get(result["strategy"], {})
    return [{"layer": name, "update kept": shares[name]} for name in sorted(shares, key=lambda name: shares[name])[:n]]


def show_merge(result: dict[str, Any], screen: Console) -> None:
    """Prints the table and the verdict."""
    screen.print("\nthe merge, on validation rows")
    print_table(merge_rows(result), screen)
    for strategy, reason in result["skipped"].items():
        screen.print(f"{strategy} was not tried: {reason}")
    screen.print(verdict(result))


def check_tolerance(result: dict[str, Any]) -> None:
    """The gate.

    Raises:
        MergeError: the best merge lost more than the tolerance.
    """
    if result["passed"] is False:
        raise MergeError(
            f"the merged model's validation loss is {100 * result['loss_increase']:.2f} % above the adapter's, and "
            f"merge.tolerance is {100 * result['tolerance']:.2f} %; keep the adapter unmerged, or write a form that "
            "loses less: --merge.formats '[residual, bf16]'"
        )


if __name__ == "__main__":
    run_command(merge, overrides=True)
