"""Merges one adapter: rounds by each strategy, measures beside the unmerged adapter, writes the best and reloads it."""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylora.base.checkpoint_io import local_directory
from raylora.base.load import compute_dtype, is_quantized, load_base_model, nf4_checkpoint
from raylora.base.locate import find_checkpoint, load_model_config, load_tokenizer
from raylora.config.schema import BaseModelSection, MergeSection
from raylora.data.rows import load_part
from raylora.data.split import PARTS
from raylora.errors import MergeError
from raylora.merge.calibrate import calibrate
from raylora.merge.compare import Reference
from raylora.merge.layer_reader import LayerReader
from raylora.merge.strategies import LAYER_BY_LAYER, RoundedWeights, Save, round_layers, update_kept
from raylora.merge.write import load_merged, put, write_bf16, write_nf4, write_residual
from raylora.training.losses import eval_loss
from raylora.training.memory import MIB, peak_memory_mib, reset_peak_memory


@dataclass(frozen=True)
class MergeJob:
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
class RoundedModel:
    """One strategy's model."""

    strategy: str
    rounded: RoundedWeights
    facts: dict[str, Any]

    def eval_loss(self) -> float:
        """Validation loss, infinite if it is no number, or zero where nothing is measured."""
        loss = self.facts.get("eval_loss", 0.0)
        return math.inf if math.isnan(loss) else loss


def merge_adapter(job: MergeJob, judge: "MergeEvaluator | None" = None) -> dict[str, Any]:
    """Rounds by each strategy, measures, and writes the best in every form asked for.

    Args:
        job: what to merge.
        judge: measures the models; None is the usual one.

    Returns:
        `strategy`, the chosen one; `models`, name -> eval_loss, heldout_loss (nats per token), kl_to_adapter,
        token_agreement, update_kept, seconds, peak_memory_mib; `skipped`, strategy -> why; `forms`, form -> directory,
        size_mib, seconds, and what the reloaded model measures; `update_kept`, strategy -> layer -> share;
        `loss_increase` over the unmerged adapter, `tolerance` and `passed`, None where nothing is measured.

    Raises:
        MergeError: adapter and base do not fit, the disk is too small, or a form cannot be made from this base.
    """
    tokenizer = load_tokenizer(job.base, find_checkpoint(job.base, job.cache_dir))
    reader = open_layers(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    _check_disk(job, reader)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=job.folder) as folder:
        judge = judge or MergeEvaluator(job, tokenizer)
        best = _best(job, reader, judge, Path(folder))
        forms = {form: _write(form, job, reader, best, judge, tokenizer) for form in job.outputs}
    increase = best.eval_loss() / judge.models["adapter"]["eval_loss"] - 1 if judge.models else None
    return {
        "strategy": best.strategy,
        "base_has_original": reader.original is not None,
        "loss_increase": increase,
        "tolerance": job.settings.tolerance,
        "passed": None if increase is None else increase <= job.settings.tolerance,
        "models": judge.models,
        "skipped": judge.skipped,
        "forms": forms,
        "update_kept": judge.update_kept,
    }


class MergeEvaluator:
    """Measures models beside the unmerged adapter, and nothing where there are no rows."""

    def __init__(self, job: MergeJob, tokenizer: PreTrainedTokenizerBase) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        """Name -> what it measures."""

        self.update_kept: dict[str, dict[str, float]] = {}
        """Strategy -> layer -> share of the update."""

        self.skipped: dict[str, str] = {}
        """Strategy -> why it was not tried to the end."""

        self.pad_token_id = tokenizer.pad_token_id
        self._batches = {"batch_size": job.batch_size, "pad_token_id": tokenizer.pad_token_id}
        self._parts = {name: load_part(job.tokens_dir, name) for name in PARTS} if job.tokens_dir else {}
        self._reference = Reference(self._parts["validation"], **self._batches) if self._parts else None

    def learn(self, adapter: PeftModel) -> None:
        """Takes the adapter as the model that others are compared with, and measures the base."""
        self.models["adapter"] = self.measure(adapter)
        with adapter.disable_adapter():
            self.models["base"] = self.measure(adapter)

    def measure(self, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
        """Validation and held-out loss, and how near the model is to the adapter."""
        if self._reference is None:
            return {}
        heldout_loss = eval_loss(model, self._parts["heldout"], **self._batches)
        return asdict(self._reference.compare(model)) | {"heldout_loss": heldout_loss}

    def calibration_rows(self, n_tokens: int) -> datasets.Dataset:
        """Training rows, shuffled, of at most so many tokens together, and one at least."""
        rows = self._parts["train"].shuffle(seed=0)
        for number, row in enumerate(rows):
            n_tokens -= len(row["input_ids"])
            if number and n_tokens < 0:
                return rows.select(range(number))
        return rows


def _best(job: MergeJob, reader: LayerReader, judge: MergeEvaluator, folder: Path) -> RoundedModel:
    """The candidate nearest to the adapter of those within the tolerance, else that of lowest validation loss.

    The others are measured and dropped. Nearest is by divergence: a loss lower than the adapter's is luck.
    """

    def rank(candidate: RoundedModel) -> tuple[bool, float]:
        loss = candidate.eval_loss()
        missed = bool(judge.models) and loss > judge.models["adapter"]["eval_loss"] * (1 + job.settings.tolerance)
        return missed, loss if missed else candidate.facts.get("kl_to_adapter", 0.0)

    best: RoundedModel | None = None
    of_strategy: dict[str, RoundedModel] = {}
    model = None
    for candidate in _candidates(job, reader, judge, folder):
        shares = update_kept(reader, candidate.rounded, job.device)
        candidate.facts["update_kept"] = sum(shares.values()) / max(1, len(shares))
        if judge.models:
            model = model or _load(job, reader.checkpoint.directory)
            put(model, reader, candidate.rounded)
            candidate.facts.update(judge.measure(model))
        rival = of_strategy.get(candidate.strategy)
        if judge.models and (rival is None or rank(candidate) < rank(rival)):
            of_strategy[candidate.strategy] = candidate
            judge.models[candidate.strategy] = candidate.facts
            judge.update_kept[candidate.strategy] = shares
        worse = candidate if best and rank(best) <= rank(candidate) else best
        best = best if worse is candidate else candidate
        if worse:
            worse.rounded.discard()
    if best is None:
        raise MergeError(f"no strategy could be tried: {judge.skipped}")
    return best


def _candidates(job: MergeJob, reader: LayerReader, judge: MergeEvaluator, folder: Path) -> Iterator[RoundedModel]:
    """Each strategy's model in turn; the adapter is loaded only while something is learnt from it."""
    names = _strategies(job, reader)
    if job.tokens_dir:
        adapter = PeftModel.from_pretrained(load_base_model(job.base, job.cache_dir, job.device), str(job.adapter))
        judge.learn(adapter.eval())
        calibrated = None
        if "calibrated" in names:
            rows = judge.calibration_rows(job.settings.calibration_tokens)
            rounding = partial(calibrate, adapter, rows, reader, pad_token_id=judge.pad_token_id)
            try:
                calibrated = _candidate("calibrated", rounding, folder)
            except torch.OutOfMemoryError:
                judge.skipped["calibrated"] = "out of GPU memory; fewer merge.calibration_tokens take less"
            del rounding
        del adapter
        if calibrated:
            yield calibrated
    for name in names:
        strategies = LAYER_BY_LAYER.get(name, [])
        several_draws = job.tokens_dir is not None and job.settings.strategy == name
        for strategy in strategies if several_draws else strategies[:1]:
            yield _candidate(name, partial(round_layers, strategy, reader), folder)


def _strategies(job: MergeJob, reader: LayerReader) -> list[str]:
    wanted = job.settings.strategy
    if wanted == "calibrated" and not job.tokens_dir:
        raise MergeError("merge.strategy calibrated needs training rows; name them by --data.train FILE")
    if wanted not in ("auto", "all"):
        return [wanted]
    possible = ["requantize", "stochastic"] if reader.original else ["stochastic"]
    if not job.tokens_dir:
        return possible[:1]
    return ["calibrated", *possible, *(["peft"] if wanted == "all" else [])]


def _candidate(strategy: str, rounding: Callable[[Save], None], folder: Path) -> RoundedModel:
    rounded = RoundedWeights(Path(tempfile.mkdtemp(dir=folder)))
    reset_peak_memory()
    began = time.perf_counter()
    rounding(rounded.save)
    seconds = time.perf_counter() - began
    return RoundedModel(strategy, rounded, {"seconds": seconds, "peak_memory_mib": peak_memory_mib()})


def _write(
    form: str,
    job: MergeJob,
    reader: LayerReader,
    best: RoundedModel,
    judge: MergeEvaluator,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Writes one form, loads it as any user would, and measures that."""
    began, directory = time.perf_counter(), job.outputs[form]
    if form == "nf4":
        write_nf4(reader, best.rounded, directory, tokenizer)
    elif form == "bf16":
        write_bf16(reader, directory, tokenizer)
    else:
        write_residual(reader, directory, tokenizer, r=job.settings.residual_rank)
    measured = judge.measure(_load(job, directory)) if judge.models else {}
    if form == "nf4" and measured.get("logits_sha256") != best.facts.get("logits_sha256"):
        raise MergeError(f"the model reloaded from {directory} answers otherwise than the one that was saved there")
    size = sum(file.stat().st_size for file in directory.rglob("*"))
    return {"directory": str(directory), "size_mib": size / MIB, "seconds": time.perf_counter() - began, **measured}


def open_layers(job: MergeJob) -> LayerReader:
    """What a job merges, read layer by layer.

    Raises:
        MergeError: the adapter does not fit the base.
    """
    base = job.base
    checkpoint = find_checkpoint(base, job.cache_dir)
    config = load_model_config(base, checkpoint)
    has_original = not is_quantized(config)
    return LayerReader(
        local_directory(nf4_checkpoint(base, job.cache_dir, job.device), base.revision),
        local_directory(checkpoint, base.revision) if has_original else None,
        job.adapter,
        config,
        quantized=base.quantization == "nf4" or not has_original,
        device=job.device,
        trust_remote_code=base.trust_remote_code,
    )


def _check_disk(job: MergeJob, reader: LayerReader) -> None:
    """That there is room for the best and the next candidate, and for each form: bf16 takes four times NF4's."""
    nf4_bytes = reader.checkpoint.size()
    needed = nf4_bytes * (2 + sum(4 if form == "bf16" else 1 for form in job.outputs))
    free = shutil.disk_usage(job.folder).free
    if free < needed:
        raise MergeError(f"the merge needs {needed / 2**30:.1f} GiB free in {job.folder}, found {free / 2**30:.1f}")


def _load(job: MergeJob, directory: Path) -> PreTrainedModel | PeftModel:
    return load_merged(directory, job.device, compute_dtype(job.base, job.device))
