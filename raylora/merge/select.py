"""Merges one adapter: rounds by one strategy or several, measures each model, writes the best one and reloads it."""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from raylora.base.checkpoint_io import local_directory
from raylora.base.load import compute_dtype, is_quantized, load_base_model, nf4_checkpoint
from raylora.base.locate import find_checkpoint, load_model_config
from raylora.base.serving import ServingFiles
from raylora.errors import MergeError
from raylora.merge.calibrate import calibrate
from raylora.merge.evaluator import MergeEvaluator
from raylora.merge.job import MergeJob
from raylora.merge.layer_reader import LayerReader
from raylora.merge.strategies import LAYER_BY_LAYER, RoundedWeights, SaveWeight, round_layers, update_kept
from raylora.merge.write import load_into, load_merged, write_bf16, write_nf4, write_residual
from raylora.run.atomic import PREFIX
from raylora.training.memory import MIB, OUT_OF_MEMORY, peak_memory_mib, reset_peak_memory, with_less_memory

LEAST_RISE = 0.001
"""Rise of the validation loss in nats per token that is always accepted: a tenth of a percent of perplexity.

Shares of a loss near zero are chance. Three merges of one adapter of loss .0173, whose roundings differ in float32's
last bits, ended at -5.5, -4.9 and +1.9 % (benchmarks/merge.md, "Shares of a small loss").
"""

RELOADED_TOLERANCE = 1e-3
"""Share of the loss by which a reloaded NF4 model may differ on a GPU. Our choice.

Where memory is short, batches are smaller there, and sums are rounded otherwise. On a CPU, logits must be equal to the
bit.
"""


@dataclass(frozen=True)
class RoundedModel:
    """Merged model of one strategy, with its weights on disk."""

    strategy: str
    weights: RoundedWeights
    costs: dict[str, float]
    """`seconds` and `peak_memory_mib` of the rounding."""

    measured: dict[str, Any] = field(default_factory=dict)
    """From `MergeEvaluator.measure`."""

    def eval_loss(self) -> float:
        """Return the validation loss in nats per token: infinity for NaN, 0 if nothing is measured."""
        return _comparable(self.measured.get("eval_loss", 0.0))


def _comparable(loss: float) -> float:
    """Return a loss: infinity for NaN."""
    return math.inf if math.isnan(loss) else loss


def merge_adapter(job: MergeJob, evaluator: MergeEvaluator | None = None) -> dict[str, Any]:
    """Round by the strategies of the job, measure each model, and write the best one in every format of the job.

    Args:
        job: inputs and outputs of the merge.
        evaluator: measures the models; None makes a `MergeEvaluator` of the job.

    Returns:
        strategy: the chosen strategy.
        base_has_original: True if 16-bit weights of the base exist.
        loss_increase: largest validation loss of the models written, over that of the unmerged adapter, less 1; None if
            nothing is measured.
        tolerance: largest accepted `loss_increase`, from `accepted_increase`.
        passed: True if `loss_increase` is within the tolerance; None if nothing is measured.
        models: `base`, `adapter` or strategy -> eval_loss (nats per token), kl_to_adapter (nats), token_agreement,
            logits_sha256, update_kept, seconds, peak_memory_mib; heldout_loss (nats per token) if the job asks for it.
        skipped: strategy -> reason.
        forms: format -> directory, size_mib, seconds, and the measurements of the reloaded model.
        update_kept: strategy -> layer -> share of the update in the merged weight.

    Raises:
        MergeError: adapter and base do not fit, the disk is too small, or a format cannot be made from this base.
    """
    checkpoint = find_checkpoint(job.base, job.cache_dir)
    serving = ServingFiles.of_adapter(job.adapter, job.base, checkpoint)
    reader = open_reader(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    _check_disk(job, reader)
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}merge-", dir=job.folder) as folder:
        evaluator = evaluator or MergeEvaluator(job, serving.tokenizer)
        best = _choose_best(job, reader, evaluator, Path(folder))
        forms = {form: _write(form, job, reader, best, evaluator, serving) for form in job.outputs}
    increase = None
    if evaluator.models:
        written = [_comparable(form["eval_loss"]) for form in forms.values() if "eval_loss" in form]
        increase = max(written or [best.eval_loss()]) / evaluator.models["adapter"]["eval_loss"] - 1
    tolerance = accepted_increase(job.settings.tolerance, evaluator)
    return {
        "strategy": best.strategy,
        "base_has_original": reader.original is not None,
        "loss_increase": increase,
        "tolerance": tolerance,
        "passed": None if increase is None else increase <= tolerance,
        "models": evaluator.models,
        "skipped": evaluator.skipped,
        "forms": forms,
        "update_kept": evaluator.update_kept,
    }


def accepted_increase(tolerance: float, evaluator: MergeEvaluator) -> float:
    """Return the largest accepted rise of the validation loss over the adapter's, as a share of it.

    It is the tolerance, but at least `LEAST_RISE`. A tolerance of 0 stands as it is.
    """
    if tolerance <= 0 or not evaluator.models:
        return tolerance
    return max(tolerance, LEAST_RISE / max(evaluator.models["adapter"]["eval_loss"], LEAST_RISE))


def _choose_best(job: MergeJob, reader: LayerReader, evaluator: MergeEvaluator, folder: Path) -> RoundedModel:
    """Return the model nearest to the adapter among those within the tolerance, else that of lowest validation loss.

    Nearest is by KL divergence, since a loss below the adapter's is luck. The strategy `auto` takes the first model
    within the tolerance. The other models are measured and deleted.
    """

    def missed(rounded_model: RoundedModel) -> bool:
        limit = 1 + accepted_increase(job.settings.tolerance, evaluator)
        return bool(evaluator.models) and rounded_model.eval_loss() > evaluator.models["adapter"]["eval_loss"] * limit

    def rank(rounded_model: RoundedModel) -> tuple[bool, float]:
        if missed(rounded_model):
            return True, rounded_model.eval_loss()
        return False, rounded_model.measured.get("kl_to_adapter", 0.0)

    best: RoundedModel | None = None
    best_of_strategy: dict[str, RoundedModel] = {}
    model = None
    for rounded_model in _round_by_each_strategy(job, reader, evaluator, folder):
        if evaluator.models:
            model = model or _load(job, reader.checkpoint.directory)
            load_into(model, reader, rounded_model.weights)
            rounded_model.measured.update(evaluator.measure(model))
        rival = best_of_strategy.get(rounded_model.strategy)
        if evaluator.models and (rival is None or rank(rounded_model) < rank(rival)):
            best_of_strategy[rounded_model.strategy] = rounded_model
            shares = update_kept(reader, rounded_model.weights, job.device)
            mean_share = {"update_kept": sum(shares.values()) / max(1, len(shares))}
            evaluator.models[rounded_model.strategy] = rounded_model.measured | mean_share | rounded_model.costs
            evaluator.update_kept[rounded_model.strategy] = shares
        worse = rounded_model if best and rank(best) <= rank(rounded_model) else best
        best = best if worse is rounded_model else rounded_model
        if worse:
            worse.weights.discard()
        if job.settings.strategy == "auto" and not missed(rounded_model):
            break
    if best is None:
        raise MergeError(f"no strategy could be tried: {evaluator.skipped}")
    return best


def _round_by_each_strategy(
    job: MergeJob, reader: LayerReader, evaluator: MergeEvaluator, folder: Path
) -> Iterator[RoundedModel]:
    """Yield the model of each strategy in turn. Keep the unmerged adapter in memory only as long as it is needed."""
    names = _strategies(job, reader)
    if job.tokens_dir:
        adapter = PeftModel.from_pretrained(load_base_model(job.base, job.cache_dir, job.device), str(job.adapter))
        evaluator.set_reference(adapter.eval())
        calibrated = None
        if "calibrated" in names:
            try:
                calibrated = with_less_memory(
                    partial(_calibrate, adapter, reader, evaluator, folder), job.settings.calibration_tokens
                )
            except OUT_OF_MEMORY:
                evaluator.skipped["calibrated"] = "out of memory, even for a single row"
        del adapter
        if calibrated:
            yield calibrated
    for name in names:
        strategies = LAYER_BY_LAYER.get(name, [])
        several_draws = job.tokens_dir is not None and job.settings.strategy == name
        for strategy in strategies if several_draws else strategies[:1]:
            yield _round_model(name, partial(round_layers, strategy, reader), folder)


def _calibrate(
    adapter: PeftModel, reader: LayerReader, evaluator: MergeEvaluator, folder: Path, n_tokens: int
) -> RoundedModel:
    """Round by the strategy `calibrated`, with at most `n_tokens` training tokens."""
    rows = evaluator.calibration_rows(n_tokens)
    return _round_model(
        "calibrated", partial(calibrate, adapter, rows, reader, pad_token_id=evaluator.pad_token_id), folder
    )


def _strategies(job: MergeJob, reader: LayerReader) -> list[str]:
    """Return the names of the strategies to try."""
    strategy = job.settings.strategy
    if strategy == "calibrated" and not job.tokens_dir:
        raise MergeError("merge.strategy calibrated needs training rows; name them by --data.train FILE")
    if strategy not in ("auto", "all"):
        return [strategy]
    possible = ["requantize", "stochastic"] if reader.original else ["stochastic"]
    if not job.tokens_dir:
        return possible[:1]
    return ["calibrated", *possible, *(["peft"] if strategy == "all" else [])]


def _round_model(strategy: str, rounding: Callable[[SaveWeight], None], folder: Path) -> RoundedModel:
    """Round all layers into a new folder. Measure seconds and peak memory."""
    weights = RoundedWeights(Path(tempfile.mkdtemp(dir=folder)))
    reset_peak_memory()
    began = time.perf_counter()
    rounding(weights.save)
    seconds = time.perf_counter() - began
    return RoundedModel(strategy, weights, {"seconds": seconds, "peak_memory_mib": peak_memory_mib()})


def _write(
    form: str,
    job: MergeJob,
    reader: LayerReader,
    best: RoundedModel,
    evaluator: MergeEvaluator,
    serving: ServingFiles,
) -> dict[str, Any]:
    """Write one format, load it as any user would, and measure the loaded model."""
    began, directory = time.perf_counter(), job.outputs[form]
    if form == "nf4":
        write_nf4(reader, best.weights, directory, serving)
    elif form == "bf16":
        write_bf16(reader, directory, serving)
    else:
        write_residual(reader, directory, serving, r=job.settings.residual_rank)
    measured = _measure_written(form, job, best, evaluator) if evaluator.models else {}
    size = sum(file.stat().st_size for file in directory.rglob("*"))
    return {"directory": str(directory), "size_mib": size / MIB, "seconds": time.perf_counter() - began, **measured}


def _measure_written(form: str, job: MergeJob, best: RoundedModel, evaluator: MergeEvaluator) -> dict[str, Any]:
    """Load a written model as any user would, and measure it. In NF4 it must be the model that was measured before."""
    directory = job.outputs[form]
    model = _load(job, directory)
    if form != "nf4":
        return evaluator.measure(model)
    if evaluator.logits_sha256(model) == best.measured["logits_sha256"]:
        return best.measured
    measured = evaluator.measure(model)
    if job.device == "cpu" or not math.isclose(measured["eval_loss"], best.eval_loss(), rel_tol=RELOADED_TOLERANCE):
        raise MergeError(f"the model reloaded from {directory} gives other logits than the one that was saved there")
    return measured


def open_reader(job: MergeJob) -> LayerReader:
    """Open base and adapter of a job, to read them layer by layer.

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
    """Check the free disk space for two rounded models, the best and the next, and for each format.

    A model in bf16 takes four times the space of NF4.
    """
    nf4_bytes = reader.checkpoint.size()
    needed = nf4_bytes * (2 + sum(4 if form == "bf16" else 1 for form in job.outputs))
    free = shutil.disk_usage(job.folder).free
    if free < needed:
        raise MergeError(f"the merge needs {needed / 2**30:.1f} GiB free in {job.folder}, found {free / 2**30:.1f}")


def _load(job: MergeJob, directory: Path) -> PreTrainedModel | PeftModel:
    """Load a written model onto the device of the job."""
    dtype, trust = compute_dtype(job.base, job.device), job.base.trust_remote_code
    return load_merged(directory, job.device, dtype, trust_remote_code=trust)
