"""Merges an adapter into a 4-bit base so that the fine-tune survives, and measures that it did.

Run as `python -m raylora.merge RUN_DIRECTORY` after a search, or on any LoRA adapter of peft as
`python -m raylora.merge --base MODEL --adapter DIR --output DIR [--data.train FILE]`.

The update is far smaller than a quantization step, so adding it to the dequantized NF4 weight and quantizing again
would round it away. Each strategy is measured on validation rows, and the best is written (docs/merge.md).
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylora.base_model import (
    compute_dtype,
    find_checkpoint,
    is_quantized,
    load_base_model,
    load_model_config,
    load_tokenizer,
    nf4_checkpoint,
)
from raylora.calibrate import calibrate
from raylora.checkpoints import local_directory
from raylora.commands import command, console, run_command, split_arguments
from raylora.compare import Reference
from raylora.config import BaseModelSection, MergeSection, build_merge_config, change_config
from raylora.data import PARTS, load_part, prepare_data
from raylora.errors import ConfigError, DeviceError, MergeError, RunDirectoryError
from raylora.files import replacing, write_json
from raylora.losses import eval_loss
from raylora.memory import MIB
from raylora.records import Records, TrialRow
from raylora.run_directory import RunDirectory
from raylora.rung import peak_memory_mib, reset_peak_memory
from raylora.source import Source
from raylora.strategies import LAYER_BY_LAYER, Rounded, Save, round_layers, update_kept
from raylora.tables import print_table
from raylora.write_model import load_merged, put, write_bf16, write_nf4, write_residual

FINALISTS = 5
"""Trials that are merged where the objective is the loss after merging."""

REPORT = "merge.json"


@dataclass(frozen=True)
class Job:
    """One adapter to merge."""

    base: BaseModelSection
    adapter: Path
    outputs: dict[str, Path]
    """Form -> directory to write."""

    folder: Path
    """Holds rounded weights while strategies are compared."""

    settings: MergeSection
    cache_dir: Path
    device: str
    tokens_dir: Path | None
    """Tokenised train, validation and held-out rows; without them nothing is measured."""

    batch_size: int
    """Rows per forward pass when measuring."""


@dataclass(frozen=True)
class Candidate:
    """One strategy's model."""

    strategy: str
    rounded: Rounded
    facts: dict[str, Any]

    def eval_loss(self) -> float:
        """Validation loss, or zero where nothing is measured."""
        return self.facts.get("eval_loss", 0.0)


@command
def merge(
    context: typer.Context,
    run_directory: Annotated[Path | None, typer.Argument(help="Folder of a search.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: Hub id, directory or GGUF file.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter in peft's format.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write the merged model to.")] = None,
) -> None:
    """Merge a search's best adapter, or any adapter, and measure what it lost. Any setting: --merge.strategy NAME."""
    run_directory, overrides = split_arguments(run_directory, context.args)
    if run_directory is not None:
        run = RunDirectory(run_directory)
        save_best_adapter(run)
        result = merge_run(run, overrides)
    elif base is not None and adapter is not None and output is not None:
        result = merge_adapter(_job(base, adapter, output, overrides))
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
    best = Records.load(run).best()
    if best is None:
        raise RunDirectoryError(f"{run.path} holds no trial that reached the full budget, so none can be called best")
    _save_adapter(run, best, run.best_adapter)
    return best


def _save_adapter(run: RunDirectory, trial: TrialRow, directory: Path) -> None:
    assert trial.checkpoint is not None  # written before its loss was reported
    base = run.config().base_model
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
        _save_adapter(run, best, run.best_adapter)
    result = {"trial": best.number if best else None, "finalists": finalists, **merge_adapter(job)}
    write_json(run.merge_file, result)
    return result


def _merge_finalists(run: RunDirectory, records: Records, job: Job) -> dict[int, float]:
    losses = {}
    for trial in records.finished()[:FINALISTS]:
        with tempfile.TemporaryDirectory(prefix=".finalist-", dir=run.path) as folder:
            adapter = Path(folder) / "adapter"
            _save_adapter(run, trial, adapter)
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


def merge_adapter(job: Job, judge: "Judge | None" = None) -> dict[str, Any]:
    """Rounds by each strategy, measures, and writes the best in every form asked for.

    Args:
        job: what to merge.
        judge: measures the models; None is the usual one.

    Returns:
        `strategy`, the chosen one; `models`, name -> eval_loss, heldout_loss (nats per token), kl_to_adapter,
        token_agreement, update_kept, seconds, peak_memory_mib; `forms`, form -> directory, size_mib, seconds, and what
        the reloaded model measures; `update_kept`, strategy -> layer -> share; `loss_increase` over the unmerged
        adapter, `tolerance` and `passed`, None where nothing is measured.

    Raises:
        MergeError: adapter and base do not fit, the disk is too small, or a form cannot be made from this base.
    """
    tokenizer = load_tokenizer(job.base, find_checkpoint(job.base, job.cache_dir))
    source = open_source(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    _check_disk(job, source)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=job.folder) as folder:
        judge = judge or Judge(job, tokenizer)
        best = _best(job, source, judge, Path(folder))
        forms = {form: _write(form, job, source, best, judge, tokenizer) for form in job.outputs}
    increase = best.eval_loss() / judge.models["adapter"]["eval_loss"] - 1 if judge.models else None
    return {
        "strategy": best.strategy,
        "base_has_original": source.original is not None,
        "loss_increase": increase,
        "tolerance": job.settings.tolerance,
        "passed": None if increase is None else increase <= job.settings.tolerance,
        "models": judge.models,
        "forms": forms,
        "update_kept": judge.update_kept,
    }


class Judge:
    """Measures models beside the unmerged adapter, and nothing where there are no rows."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        """Name -> what it measures."""

        self.update_kept: dict[str, dict[str, float]] = {}
        """Strategy -> layer -> share of the update."""

        self.pad_token_id = tokenizer.pad_token_id
        self._batches = {"batch_size": job.batch_size, "pad_token_id": tokenizer.pad_token_id}
        self._parts = {name: load_part(job.tokens_dir, name) for name in PARTS} if job.tokens_dir else {}
        self._reference: Reference | None = None

    def learn(self, adapter: PeftModel) -> None:
        """Takes the adapter as the model that others are measured by, and measures the base."""
        self._reference = Reference(adapter, self._parts["validation"], **self._batches)
        self.models["adapter"] = self.measure(adapter)
        with adapter.disable_adapter():
            self.models["base"] = self.measure(adapter)

    def measure(self, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
        """Validation and held-out loss, and how near the model is to the adapter."""
        if self._reference is None:
            return {}
        heldout_loss = eval_loss(model, self._parts["heldout"], **self._batches)
        return asdict(self._reference.compare(model)) | {"heldout_loss": heldout_loss}

    def calibration_rows(self, n_tokens: int) -> list[list[int]]:
        """Training rows, shuffled, of at most so many tokens together."""
        rows: list[list[int]] = []
        for row in self._parts["train"].shuffle(seed=0):
            n_tokens -= len(row["input_ids"])
            if rows and n_tokens < 0:
                break
            rows.append(row["input_ids"])
        return rows


def _best(job: Job, source: Source, judge: Judge, folder: Path) -> Candidate:
    """The candidate of lowest validation loss; the others are measured and dropped."""
    best: Candidate | None = None
    model = None
    for candidate in _candidates(job, source, judge, folder):
        shares = update_kept(source, candidate.rounded, job.device)
        candidate.facts["update_kept"] = sum(shares.values()) / max(1, len(shares))
        if judge.models:
            model = model or _load(job, source.checkpoint.directory)
            put(model, source, candidate.rounded)
            candidate.facts.update(judge.measure(model))
        shown = judge.models.get(candidate.strategy)
        if judge.models and (shown is None or candidate.eval_loss() < shown["eval_loss"]):
            judge.models[candidate.strategy] = candidate.facts
            judge.update_kept[candidate.strategy] = shares
        worse = candidate if best and best.eval_loss() <= candidate.eval_loss() else best
        best = best if worse is candidate else candidate
        if worse:
            worse.rounded.discard()
    assert best is not None
    return best


def _candidates(job: Job, source: Source, judge: Judge, folder: Path) -> Iterator[Candidate]:
    """Each strategy's model in turn; the adapter is loaded only while something is learnt from it."""
    names = _strategies(job, source)
    if job.tokens_dir:
        adapter = PeftModel.from_pretrained(load_base_model(job.base, job.cache_dir, job.device), str(job.adapter))
        judge.learn(adapter.eval())
        calibrated = None
        if "calibrated" in names:
            rows = judge.calibration_rows(job.settings.calibration_tokens)
            rounding = partial(calibrate, adapter, rows, source, pad_token_id=judge.pad_token_id)
            calibrated = _candidate("calibrated", rounding, folder)
            del rounding
        del adapter
        if calibrated:
            yield calibrated
    for name in names:
        strategies = LAYER_BY_LAYER.get(name, [])
        several = (
            job.tokens_dir and job.settings.strategy == name
        )  # several draws, where there is something to choose by
        for strategy in strategies if several else strategies[:1]:
            yield _candidate(name, partial(round_layers, strategy, source), folder)


def _strategies(job: Job, source: Source) -> list[str]:
    wanted = job.settings.strategy
    if wanted == "calibrated" and not job.tokens_dir:
        raise MergeError("merge.strategy calibrated needs training rows; name them by --data.train FILE")
    if wanted not in ("auto", "all"):
        return [wanted]
    possible = ["requantize", "stochastic"] if source.original else ["stochastic"]
    if not job.tokens_dir:
        return possible[:1]
    return ["calibrated", *possible, *(["peft"] if wanted == "all" else [])]


def _candidate(strategy: str, rounding: Callable[[Save], None], folder: Path) -> Candidate:
    rounded = Rounded(Path(tempfile.mkdtemp(dir=folder)))
    reset_peak_memory()
    began = time.perf_counter()
    rounding(rounded.save)
    seconds = time.perf_counter() - began
    return Candidate(strategy, rounded, {"seconds": seconds, "peak_memory_mib": peak_memory_mib()})


def _write(
    form: str, job: Job, source: Source, best: Candidate, judge: Judge, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Writes one form, loads it as any user would, and measures that."""
    began, directory = time.perf_counter(), job.outputs[form]
    if form == "nf4":
        write_nf4(source, best.rounded, directory, tokenizer)
    elif form == "bf16":
        write_bf16(source, directory, tokenizer)
    else:
        write_residual(source, best.rounded, directory, tokenizer, r=job.settings.residual_rank, device=job.device)
    measured = judge.measure(_load(job, directory)) if judge.models else {}
    if form == "nf4" and measured.get("logits_sha256") != best.facts.get("logits_sha256"):
        raise MergeError(f"the model reloaded from {directory} answers otherwise than the one that was saved there")
    size = sum(file.stat().st_size for file in directory.rglob("*"))
    return {"directory": str(directory), "size_mib": size / MIB, "seconds": time.perf_counter() - began, **measured}


def open_source(job: Job) -> Source:
    """What a job merges, read layer by layer.

    Raises:
        MergeError: the adapter does not fit the base.
    """
    base = job.base
    checkpoint = find_checkpoint(base, job.cache_dir)
    config = load_model_config(base, checkpoint)
    has_original = not is_quantized(config)
    return Source(
        local_directory(nf4_checkpoint(base, job.cache_dir, job.device), base.revision),
        local_directory(checkpoint, base.revision) if has_original else None,
        job.adapter,
        config,
        quantized=base.quantization == "nf4" or not has_original,
        device=job.device,
        trust_remote_code=base.trust_remote_code,
    )


def _check_disk(job: Job, source: Source) -> None:
    """That there is room for the best and the next candidate, and for each form: bf16 takes four times NF4's."""
    nf4_bytes = source.checkpoint.size()
    needed = nf4_bytes * (2 + sum(4 if form == "bf16" else 1 for form in job.outputs))
    free = shutil.disk_usage(job.folder).free
    if free < needed:
        raise MergeError(f"the merge needs {needed / 2**30:.1f} GiB free in {job.folder}, found {free / 2**30:.1f}")


def _load(job: Job, directory: Path) -> PreTrainedModel | PeftModel:
    return load_merged(directory, job.device, compute_dtype(job.base, job.device))


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
    """What came of the merge, in a sentence or two."""
    if result["passed"] is None:
        return f"merged by {result['strategy']}; no rows were given, so what it lost was not measured"
    kept = result["update_kept"][result["strategy"]]
    worst = sorted(kept, key=lambda name: kept[name])[:3]
    layers = ", ".join(f"{name} {100 * kept[name]:.0f} %" for name in worst)
    loss = f"validation loss {100 * result['loss_increase']:+.2f} % against the adapter"
    return f"merged by {result['strategy']}: {loss}, tolerance {100 * result['tolerance']:.0f} %; least kept: {layers}"


def show_merge(result: dict[str, Any], screen: Console) -> None:
    """Prints the table and the verdict."""
    screen.print("\nthe merge, on validation rows")
    print_table(merge_rows(result), screen)
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
