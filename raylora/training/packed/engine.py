"""Trains the trials of one lane together, step by step, on a resident base, without Ray.

Each trial keeps its own rank, scaling, dropout, learning rate, schedule, weight decay, clipping, accumulation, seed,
row order and batch size; `raylora.training.packed.forward` lets them share the passes through the base.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel

from raylora.base.architecture import Architecture
from raylora.config.assignment import Assignment
from raylora.config.schema import TrainingSection
from raylora.data.rows import TokenRows
from raylora.errors import TrialError
from raylora.run.metrics import RungMetrics
from raylora.run.outage import PATIENCE_SECONDS
from raylora.training.losses import validated_rows
from raylora.training.memory import reset_peak_memory, with_less_memory
from raylora.training.packed.forward import Pack
from raylora.training.packed.layout import MicroBatch
from raylora.training.packed.trial import PackedTrial

MAX_PADDING = 4
"""Largest number of tokens that attention sees, with the padding of its rows, over the tokens of a pass. Our choice.

It holds for attention without padding too, so that passes are the same on all devices.
"""

RANK_MULTIPLE = 8
"""Multiple to which ranks are padded for grouped products: their kernel wants rows of 16 bytes, 8 in bfloat16."""


class PackedEngine:
    """A resident base, its data, and the trials that train on it now.

    Args:
        model: frozen base.
        architecture: linear layers of the base.
        train: training rows.
        validation: validation rows.
        training: settings that all trials share.
        slots: number of trials at once; the caller of `add` keeps to it.
        tokens_per_pass: most tokens of a pass through the base, unless a single micro-batch has more.
        autocast: type of activations, if it is not the parameters' own.
        grouped: as in `Pack`; ranks are then padded to `RANK_MULTIPLE`.
        fused: as in `Pack`.
        fused_layers: as in `Pack`.
        dense: as in `Pack`.
        dtype: type of the adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        train: TokenRows,
        validation: TokenRows,
        training: TrainingSection,
        *,
        tokens_per_pass: int,
        slots: int = 1,
        autocast: torch.dtype | None = None,
        grouped: bool = False,
        fused: bool = False,
        fused_layers: bool = False,
        dense: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.slots, self._architecture = slots, architecture
        self.pack = Pack(
            model,
            list(architecture.shapes),
            autocast=autocast,
            grouped=grouped,
            fused=fused,
            fused_layers=fused_layers,
            dense=dense,
        )
        if training.gradient_checkpointing is True:
            # a layer draws no random numbers: dropout masks are functions of seed, micro-batch and layer
            model.gradient_checkpointing_enable(
                {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
            )
        self.notes: list[str] = []
        """Sentences on what this engine does otherwise than expected."""

        self._on_gpu = model.device.type == "cuda"
        self._adapter_options = {
            "device": model.device,
            "dtype": dtype,
            "rank_multiple": RANK_MULTIPLE if grouped else 1,
            "skips_overflow": autocast == torch.float16,
        }
        self._train_rows, self._validation_rows = train, validation
        self._training, self.tokens_per_pass = training, tokens_per_pass
        self.trials: dict[int, PackedTrial] = {}
        self.tokens_of_step = 0
        """Tokens that the last step trained on, of all trials together."""

        reset_peak_memory()

    def close(self) -> None:
        """Give the base back as it was found."""
        self.pack.close()
        self.pack.model.gradient_checkpointing_disable()

    def add(
        self, number: int, assignment: Assignment, *, rungs: list[int], directory: Path, resume_from: str | None = None
    ) -> None:
        """Put a trial into the pack, from its start or from a checkpoint."""
        began = time.perf_counter()
        trial = PackedTrial(
            assignment,
            self._training,
            self._architecture,
            self._train_rows.lengths,
            rungs=rungs,
            directory=directory,
            **self._adapter_options,
        )
        if resume_from is not None:
            trial.load(Path(resume_from))
        trial.seconds["other"] += time.perf_counter() - began
        self.trials[number] = trial

    def remove(self, number: int) -> PackedTrial:
        """Take a trial out of the pack, between two steps."""
        return self.trials.pop(number)

    def shrink(self) -> dict[int, str | None]:
        """Take the younger half of the pack out, and the dense copy of the base, for want of memory.

        A single trial stays.

        Returns:
            Number -> checkpoint saved now; None if the trial has not begun or cannot be saved.
        """
        checkpoints: dict[int, str | None] = {}
        for number in list(self.trials)[math.ceil(len(self.trials) / 2) :]:
            trial, checkpoints[number] = self.remove(number), None
            with suppress(OSError):
                checkpoints[number] = str(trial.save(patience=0.0)) if trial.step else None
        self.slots = len(self.trials)
        self.pack.forget_dense()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return checkpoints

    def step(self, stepped: Callable[[], None] = lambda: None) -> dict[int, RungMetrics | TrialError | OSError]:
        """Train every trial for one optimizer step, then validate and save those that have reached a rung.

        Trials that stand at a rung unreported, as after a step that ran out of memory while validating, report first.

        Args:
            stepped: called after training, before validation.

        Returns:
            Number -> metrics of each trial at a rung, or why it cannot go on.

        Raises:
            torch.OutOfMemoryError: the pack is too large. No trial has lost anything.
            Exception: whatever a pass raises for another reason. No trial has lost anything; `faults` tells whose rows
                or factors are the cause.
        """
        self.tokens_of_step = 0
        if not self._due():
            self._train()
            stepped()
        return self._report(self._due())

    def faults(self) -> dict[int, Exception]:
        """Run the next passes of each trial by itself, without an update, and return the errors.

        Returns:
            Number -> error of each trial that fails by itself.
        """
        errors: dict[int, Exception] = {}
        for number, trial in self.trials.items():
            try:
                if trial.is_due:
                    self._validate([number])
                else:
                    for batch in trial.micro_batches(self._train_rows):
                        self.pack.backward([batch])
            except Exception as error:  # whatever the model's code raises is what is asked for
                errors[number] = error
            trial.adapter.zero_grad()
        return errors

    def _due(self) -> list[int]:
        return [number for number, trial in self.trials.items() if trial.is_due]

    def _train(self) -> None:
        trials = list(self.trials.values())
        owners, batches = [], []
        for trial in trials:
            for batch in trial.micro_batches(self._train_rows):
                owners.append(trial)
                batches.append(batch)
        began = time.perf_counter()
        try:
            losses = torch.cat([self.pack.backward(part) for part in cut(batches, self.tokens_per_pass)]).unbind()
            for trial in trials:
                trial.update([loss for owner, loss in zip(owners, losses, strict=True) if owner is trial])
        except Exception:
            for trial in trials:
                trial.adapter.zero_grad()
            raise
        if self._on_gpu and self._due():
            torch.cuda.synchronize()  # what is still under way belongs to training, not to validation
        seconds = time.perf_counter() - began
        self.tokens_of_step = n_tokens = sum(batch.n_tokens for batch in batches)
        for trial, batch in zip(owners, batches, strict=True):
            trial.tokens_seen += batch.n_tokens
            # passes are shared, and so is their time: by tokens
            trial.seconds["train"] += seconds * batch.n_tokens / n_tokens

    def _report(self, numbers: list[int]) -> dict[int, RungMetrics | TrialError | OSError]:
        reports: dict[int, RungMetrics | TrialError | OSError] = {}
        patience = PATIENCE_SECONDS
        for number, eval_loss in self._validate(numbers).items():
            trial = self.trials[number]
            if not math.isfinite(eval_loss):
                reports[number] = TrialError(f"diverged: eval_loss is {eval_loss} at step {trial.step}")
                continue
            try:
                reports[number] = trial.report(eval_loss, patience)
            except OSError as error:
                reports[number] = error
                patience = 0.0  # one wait is enough for all
        return reports

    def _validate(self, numbers: list[int]) -> dict[int, float]:
        """Return the mean loss per token of each trial on its rung's validation rows, in the same passes.

        Where memory runs short, passes are made smaller down to one row each.
        """
        if not numbers:
            return {}
        began, most = time.perf_counter(), self._training.per_device_eval_batch_size
        losses = with_less_memory(
            lambda rows: self._eval_losses(
                numbers, rows_per_batch=rows, tokens_per_pass=self.tokens_per_pass * rows // most
            ),
            most,
        )
        for number in numbers:
            self.trials[number].seconds["eval"] += (time.perf_counter() - began) / len(numbers)
        return losses

    def _eval_losses(self, numbers: list[int], *, rows_per_batch: int, tokens_per_pass: int) -> dict[int, float]:
        data = self._validation_rows
        owners, batches, n_predicted = [], [], {}
        for number in numbers:
            trial = self.trials[number]
            rows = validated_rows(data.lengths, trial.step, trial.rungs, self._training)
            n_predicted[number] = sum(data.n_predicted(row) for row in rows)
            for part in (rows[start : start + rows_per_batch] for start in range(0, len(rows), rows_per_batch)):
                ids, labels = [data.input_ids(row) for row in part], [data.labels(row) for row in part]
                owners.append(number)
                batches.append(MicroBatch(trial.adapter, ids, labels))
        losses = torch.cat([self.pack.nll(part) for part in cut(batches, max(1, tokens_per_pass))]).tolist()
        total = dict.fromkeys(numbers, 0.0)
        for number, loss in zip(owners, losses, strict=True):
            total[number] += loss
        return {number: total[number] / max(1, n_predicted[number]) for number in numbers}


def cut(batches: list[MicroBatch], tokens_per_pass: int) -> list[list[MicroBatch]]:
    """Cut micro-batches into passes of about equal size, none over the limit unless it is a single micro-batch.

    The padding of attention, which the memory estimate leaves out, is held to `MAX_PADDING` times the limit.
    """
    total = sum(batch.n_tokens for batch in batches)
    target = total / math.ceil(total / tokens_per_pass)
    passes: list[list[MicroBatch]] = [[]]
    size = rows = longest = 0
    for batch in batches:
        n_rows, length = rows + len(batch.input_ids), max(longest, *map(len, batch.input_ids))
        is_full = size + batch.n_tokens > tokens_per_pass or size + batch.n_tokens / 2 > target
        if passes[-1] and (is_full or n_rows * length > MAX_PADDING * tokens_per_pass):
            passes.append([])
            size, n_rows, length = 0, len(batch.input_ids), max(map(len, batch.input_ids))
        passes[-1].append(batch)
        size, rows, longest = size + batch.n_tokens, n_rows, length
    return passes
