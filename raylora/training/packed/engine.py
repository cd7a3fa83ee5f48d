"""Trains the trials of one lane together, step by step, on a resident base. Knows nothing of Ray.

Each trial keeps its own rank, scaling, dropout, learning rate, schedule, weight decay, clipping, accumulation, seed,
row order and batch size; `raylora.packed` lets them share the passes through the base.
"""

import math
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from raylora.config.assignment import Assignment
from raylora.config.schema import TrainingSection
from raylora.data.rows import TokenRows
from raylora.errors import TrialError
from raylora.run.metrics import RungMetrics
from raylora.training.losses import validated_rows
from raylora.training.memory import reset_peak_memory
from raylora.training.packed.forward import Pack
from raylora.training.packed.layout import MicroBatch
from raylora.training.packed.trial import PackedTrial


class PackedEngine:
    """A resident base, its data, and the trials that are on it now.

    Args:
        model: frozen base.
        names: its linear layers.
        train: training rows.
        validation: validation rows.
        training: settings that all trials share.
        slots: trials at once; whoever adds them keeps to it.
        tokens_per_pass: a pass through the base takes micro-batches up to so many tokens, and at least one.
        autocast: type of activations where it is not the parameters' own.
        grouped: see `Pack`; ranks are then filled up to a multiple of 8, which the kernels ask for.
        dtype: of the adapters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: list[str],
        train: TokenRows,
        validation: TokenRows,
        training: TrainingSection,
        *,
        tokens_per_pass: int,
        slots: int = 1,
        autocast: torch.dtype | None = None,
        grouped: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.slots = slots
        self.pack = Pack(model, names, autocast=autocast, grouped=grouped)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._on_gpu = model.device.type == "cuda"
        self._adapter_options = {"device": model.device, "dtype": dtype, "rank_multiple": 8 if grouped else 1}
        self._train, self._validation = train, validation
        self._training, self.tokens_per_pass = training, tokens_per_pass
        self.trials: dict[int, PackedTrial] = {}
        self._waiting: set[int] = set()
        reset_peak_memory()

    def close(self) -> None:
        """Gives the base back as it was found."""
        self.pack.close()
        self.pack.model.gradient_checkpointing_disable()

    @property
    def training(self) -> list[int]:
        """Numbers of the trials that the next step trains."""
        return [number for number in self.trials if number not in self._waiting]

    def add(
        self, number: int, assignment: Assignment, *, rungs: list[int], directory: Path, resume_from: str | None = None
    ) -> None:
        """Puts a trial into the pack, from its start or from a checkpoint."""
        began = time.perf_counter()
        trial = PackedTrial(
            assignment,
            self._training,
            self.pack.shapes,
            self._train.lengths,
            rungs=rungs,
            directory=directory,
            **self._adapter_options,
        )
        if resume_from is not None:
            trial.load(Path(resume_from))
        trial.seconds["other"] += time.perf_counter() - began
        self.trials[number] = trial

    def go_on(self, number: int) -> None:
        """Lets a trial train that waits at a rung."""
        self._waiting.discard(number)

    def remove(self, number: int) -> PackedTrial:
        """Takes a trial out of the pack, at a step boundary as everything here."""
        self._waiting.discard(number)
        return self.trials.pop(number)

    def shrink(self) -> dict[int, str | None]:
        """Takes the younger half of the pack out, for want of memory.

        Returns:
            Number -> checkpoint to go on from, None where the trial has not begun.
        """
        checkpoints: dict[int, str | None] = {}
        for number in list(self.trials)[math.ceil(len(self.trials) / 2) :]:
            trial = self.remove(number)
            checkpoints[number] = str(trial.save()) if trial.step else None
        self.slots = len(self.trials)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return checkpoints

    def step(self) -> dict[int, RungMetrics | TrialError]:
        """One optimizer step of every trial that does not wait; those that reach a rung by it report, and wait.

        Raises:
            torch.OutOfMemoryError: the pack is too large. Every trial is as it was before the step.
        """
        trials = [self.trials[number] for number in self.training]
        owners, batches = [], []
        for trial in trials:
            for batch in trial.micro_batches(self._train):
                owners.append(trial)
                batches.append(batch)
        began = time.perf_counter()
        try:
            losses = torch.cat([self.pack.backward(part) for part in cut(batches, self.tokens_per_pass)])
        except (torch.OutOfMemoryError, MemoryError):
            for trial in trials:
                trial.adapter.zero_grad()
            raise
        for trial in trials:
            trial.update()
        if self._on_gpu and any(trial.at_rung for trial in trials):
            torch.cuda.synchronize()  # what is still under way belongs to training, not to validation
        seconds = time.perf_counter() - began
        n_tokens = sum(batch.n_tokens for batch in batches)
        for trial, batch, loss in zip(owners, batches, losses, strict=True):
            trial.losses.append(loss)
            trial.tokens_seen += batch.n_tokens
            # passes are shared, and so is their time: by tokens
            trial.seconds["train"] += seconds * batch.n_tokens / n_tokens
        return self._reports([number for number in self.training if self.trials[number].at_rung])

    def _reports(self, numbers: list[int]) -> dict[int, RungMetrics | TrialError]:
        self._waiting.update(numbers)
        reports: dict[int, RungMetrics | TrialError] = {}
        for number, eval_loss in self._validate(numbers).items():
            trial = self.trials[number]
            if math.isfinite(eval_loss):
                reports[number] = trial.report(eval_loss)
            else:
                reports[number] = TrialError(f"diverged: eval_loss is {eval_loss} at step {trial.step}")
        return reports

    def _validate(self, numbers: list[int]) -> dict[int, float]:
        """Mean loss per token of each trial on its rung's validation rows, in the same passes."""
        if not numbers:
            return {}
        began = time.perf_counter()
        data, size = self._validation, self._training.per_device_eval_batch_size
        owners, batches, n_predicted = [], [], {}
        for number in numbers:
            trial = self.trials[number]
            rows = validated_rows(data.lengths, trial.step, trial.rungs, self._training)
            n_predicted[number] = sum(data.n_predicted(row) for row in rows)
            for part in (rows[start : start + size] for start in range(0, len(rows), size)):
                ids, labels = [data.input_ids(row) for row in part], [data.labels(row) for row in part]
                owners.append(number)
                batches.append(MicroBatch(trial.adapter, ids, labels))
        losses = torch.cat([self.pack.nll(part) for part in cut(batches, self.tokens_per_pass)]).tolist()
        total = dict.fromkeys(numbers, 0.0)
        for number, loss in zip(owners, losses, strict=True):
            total[number] += loss
        for number in numbers:
            self.trials[number].seconds["eval"] += (time.perf_counter() - began) / len(numbers)
        return {number: total[number] / max(1, n_predicted[number]) for number in numbers}


def cut(batches: list[MicroBatch], tokens_per_pass: int) -> list[list[MicroBatch]]:
    """Cuts micro-batches into passes of about equal size, none over the limit unless it is a single micro-batch."""
    total = sum(batch.n_tokens for batch in batches)
    target = total / math.ceil(total / tokens_per_pass)
    passes: list[list[MicroBatch]] = [[]]
    size = 0
    for batch in batches:
        if passes[-1] and (size + batch.n_tokens > tokens_per_pass or size + batch.n_tokens / 2 > target):
            passes.append([])
            size = 0
        passes[-1].append(batch)
        size += batch.n_tokens
    return passes
