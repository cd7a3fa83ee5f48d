"""Merges the best adapter of a search, or any adapter, and checks the merge against its tolerance."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raylora.base.architecture import position_limit
from raylora.base.locate import find_checkpoint, is_gguf, load_model_config
from raylora.base.serving import ServingFiles
from raylora.config.load import build_merge_config, change_config
from raylora.data.of_run import data_of_run
from raylora.data.prepare import prepare_data
from raylora.errors import DeviceError, RunDirectoryError
from raylora.merge.adapter_update import find_adapter
from raylora.merge.job import MergeJob
from raylora.merge.resize import resized_base
from raylora.merge.same_base import check_same_base, write_base_file
from raylora.merge.select import merge_adapter
from raylora.run.atomic import PREFIX, read_json, replacing, write_json
from raylora.run.directory import RunDirectory
from raylora.run.state import SearchState
from raylora.run.trial_row import TrialRow

MERGED_CANDIDATES = 5
"""Trials that are merged if the objective is the loss after the merge. Our choice: a merge takes a minute or more."""

REPORT = "merge.json"
"""File with the result of a merge without a search, in the output folder."""


def save_best_adapter(run: RunDirectory) -> TrialRow:
    """Copy the best trial's adapter, in peft's format, to `best_adapter`, with what serves it.

    Raises:
        RunDirectoryError: no trial reached the full budget.
    """
    best = SearchState.load(run).best()
    if best is None:
        raise RunDirectoryError(
            f"{run.location} holds no trial that reached the full budget, so none can be called best"
        )
    try:
        checkpoint = _checkpoint(run, best)
    except RunDirectoryError:
        merged = read_json(run.merge_file)["trial"] if run.merge_file.is_file() else None
        if merged != best.number or not run.best_adapter.is_dir():
            raise
        return best  # its adapter is there already
    _save_adapter(run, checkpoint, run.best_adapter)
    return best


def _checkpoint(run: RunDirectory, trial: TrialRow) -> Path:
    """Return the folder of a trial's checkpoint.

    Raises:
        RunDirectoryError: it is not there any more.
    """
    assert trial.checkpoint is not None  # written before its loss was reported
    run.pull_checkpoint(trial.checkpoint)
    checkpoint = run.path / trial.checkpoint
    if not checkpoint.is_dir():
        raise RunDirectoryError(f"{run.location} has lost {trial.checkpoint}, the checkpoint of trial {trial.number}")
    return checkpoint


def _save_adapter(run: RunDirectory, checkpoint: Path, directory: Path) -> None:
    """Copy the adapter of a checkpoint to a directory. Add base's name, tokenizer and generation settings."""
    config = run.config()
    base, data = config.base_model, data_of_run(run, config)
    base_checkpoint = find_checkpoint(base, run.cache(config))
    tokenizer = data.tokenizer(trust_remote_code=base.trust_remote_code)
    serving = ServingFiles.of_training(tokenizer, base, base_checkpoint, data.stop_token_ids)
    with replacing(directory) as temporary:
        temporary.mkdir()
        shutil.copy(checkpoint / "adapter_model.safetensors", temporary)
        adapter_config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        # peft and vLLM load the base by this name, for which a GGUF file's is of no use
        loadable = base_checkpoint if is_gguf(base) else base.name
        named = {"base_model_name_or_path": loadable, "revision": base.revision}
        write_json(temporary / "adapter_config.json", {**adapter_config, **named})
        write_base_file(temporary, base, base_checkpoint)
        serving.save(temporary)


def merge_run(run: RunDirectory, overrides: dict[str, str] | None = None) -> dict[str, Any]:
    """Merge a search's best adapter. Write the merged models and `merge.json` into its run directory.

    If the objective is the loss after the merge, the leaders are merged first. `best_adapter` then becomes the adapter
    of the one with the lowest loss.

    Args:
        run: run directory with `best_adapter`.
        overrides: dotted key -> value as typed on the command line.

    Returns:
        The result of `merge_adapter`; `trial`, the number of the merged trial; `finished`, the numbers of the trials
        that it was chosen from, best first; and `merged_candidates`, number -> validation loss after the merge, in
        nats per token.

    Raises:
        MergeError: the merge cannot be made.
        RunDirectoryError: there is no adapter to merge.
    """
    if not run.best_adapter.is_dir():
        raise RunDirectoryError(f"{run.location} holds no best_adapter")
    config, provenance, state = change_config(run.config(), overrides or {}), run.provenance(), SearchState.load(run)
    check_same_base(run.best_adapter, config.base_model, find_checkpoint(config.base_model, run.cache(config)))
    job = MergeJob(
        base=config.base_model,
        adapter=run.best_adapter,
        outputs={form: run.merged(form) for form in config.merge.formats},
        folder=run.path,
        settings=config.merge,
        cache_dir=run.cache(config),
        device=choose_device("auto" if provenance["on_gpu"] else "cpu"),
        tokens_dir=data_of_run(run, config).tokens_dir,
        batch_size=config.training.per_device_eval_batch_size,
    )
    best, candidates = state.best(), {}
    if config.search.objective == "merged_eval_loss":
        candidates = _merge_leaders(run, state, job)
        best = state.trials[min(candidates, key=lambda number: candidates[number])]
        _save_adapter(run, _checkpoint(run, best), run.best_adapter)
    result = {
        "trial": best.number if best else None,
        "finished": [trial.number for trial in state.finished()],
        "merged_candidates": candidates,
        **merge_adapter(job),
    }
    _remove_outdated(run, result)
    write_json(run.merge_file, result)
    return result


def _remove_outdated(run: RunDirectory, result: dict[str, Any]) -> None:
    """Remove models of other trials, and the held-out check of an earlier merge if that made other models.

    Args:
        run: the run directory.
        result: of this merge.
    """
    before = read_json(run.merge_file) if run.merge_file.is_file() else {"trial": None, "forms": {}}
    hashes = [{form: one.get("logits_sha256") for form, one in merge["forms"].items()} for merge in (before, result)]
    is_same_trial = before["trial"] == result["trial"]
    if not is_same_trial or any(hashes[0][form] != hashes[1][form] for form in hashes[0].keys() & hashes[1].keys()):
        run.evaluation_file.unlink(missing_ok=True)
        run.answers_file.unlink(missing_ok=True)
    for form in before["forms"].keys() - result["forms"].keys():
        if not is_same_trial:
            shutil.rmtree(run.merged(form), ignore_errors=True)


def _merge_leaders(run: RunDirectory, state: SearchState, job: MergeJob) -> dict[int, float]:
    """Merge the finished trials of lowest validation loss, without writing models.

    Returns:
        Number of the trial -> validation loss after the merge, in nats per token.
    """
    losses = {}
    for trial in state.finished()[:MERGED_CANDIDATES]:
        with tempfile.TemporaryDirectory(prefix=f"{PREFIX}merged-", dir=run.path) as folder:
            adapter = Path(folder) / "adapter"
            _save_adapter(run, _checkpoint(run, trial), adapter)
            result = merge_adapter(replace(job, adapter=adapter, outputs={}))
            losses[trial.number] = result["models"][result["strategy"]]["eval_loss"]
    return losses


def merge_without_search(base: str, adapter: str, output: Path, overrides: dict[str, str]) -> dict[str, Any]:
    """Merge any LoRA adapter of peft. Write the merged models and `merge.json` into a folder.

    Args:
        base: Hub id, directory or GGUF file.
        adapter: directory or Hub id.
        output: folder to write, as an absolute path. Several formats get a folder each inside it.
        overrides: dotted key -> value as typed on the command line.

    Returns:
        The result of `merge_adapter`.

    Raises:
        ConfigError: a setting breaks a rule, or no adapter of peft is there.
        MergeError: the merge cannot be made.
    """
    result = merge_adapter(_make_job(base, find_adapter(adapter), output, overrides))
    write_json(output / REPORT, result)
    return result


def _make_job(base: str, adapter: Path, output: Path, overrides: dict[str, str]) -> MergeJob:
    """Return the job of a merge without a search. Tokenise its rows if there are any."""
    config = build_merge_config(base, overrides)
    cache_dir = Path(config.cache_dir).expanduser() if config.cache_dir else output.parent / ".cache"
    check_same_base(adapter, config.base_model, find_checkpoint(config.base_model, cache_dir))
    base_model = resized_base(config.base_model, adapter, cache_dir)
    tokens_dir = None
    if config.data is not None:
        checkpoint = find_checkpoint(base_model, cache_dir)
        serving = ServingFiles.of_adapter(adapter, base_model, checkpoint)
        prepared = prepare_data(config.data, serving.tokenizer, cache_dir)
        prepared.check_positions(config.data, position_limit(load_model_config(base_model, checkpoint)))
        tokens_dir = prepared.tokens_dir
    forms = config.merge.formats
    return MergeJob(
        base=base_model,
        adapter=adapter,
        outputs={form: output if len(forms) == 1 else output / form for form in forms},
        folder=output.parent,
        settings=config.merge,
        cache_dir=cache_dir,
        device=choose_device(config.device),
        tokens_dir=tokens_dir,
        batch_size=config.per_device_eval_batch_size,
        measures_heldout=True,
    )


def choose_device(device: str) -> str:
    """Return `cpu` or `cuda:0` for the setting `device`.

    Args:
        device: `auto`, `cuda` or `cpu`.

    Raises:
        DeviceError: the setting is `cuda`, and torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device is cuda, and this machine has no GPU; `raylora doctor` says what torch sees")
    return "cuda:0" if device != "cpu" and torch.cuda.is_available() else "cpu"
