"""Merges the best adapter of a search, in its run directory, and holds the merge to its tolerance."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raylora.config.load import change_config
from raylora.config.schema import BaseModelSection
from raylora.errors import DeviceError, MergeError, RunDirectoryError
from raylora.merge.select import MergeJob, merge_adapter
from raylora.run.atomic import replacing, write_json
from raylora.run.directory import RunDirectory
from raylora.run.tables import Records, TrialRow

FINALISTS = 5
"""Trials that are merged where the objective is the loss after merging."""


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
    job = MergeJob(
        base=config.base_model,
        adapter=run.best_adapter,
        outputs={form: run.merged(form) for form in config.merge.formats},
        folder=run.path,
        settings=config.merge,
        cache_dir=run.cache(config),
        device=choose_device("auto" if provenance["on_gpu"] else "cpu"),
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


def _merge_finalists(run: RunDirectory, records: Records, job: MergeJob) -> dict[int, float]:
    losses = {}
    for trial in records.finished()[:FINALISTS]:
        with tempfile.TemporaryDirectory(prefix=".finalist-", dir=run.path) as folder:
            adapter = Path(folder) / "adapter"
            _save_adapter(run, job.base, trial, adapter)
            result = merge_adapter(replace(job, adapter=adapter, outputs={}))
            losses[trial.number] = result["models"][result["strategy"]]["eval_loss"]
    return losses


def choose_device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device is cuda, and this machine has no GPU; `raylora doctor` says what torch sees")
    return "cuda:0" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


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
