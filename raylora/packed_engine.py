"""Trains the trials of one lane together, step by step, on a resident base. Knows nothing of Ray.

Each trial keeps its own rank, scaling, dropout, learning rate, schedule, weight decay, clipping, accumulation, seed,
row order and batch size; `raylora.packed` lets them share the passes through the base.
"""

import math
import shutil
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, get_scheduler

from raylora.adapters import Adapter, Shapes
from raylora.base_model import is_target, resolve_target_modules
from raylora.batches import RowOrder, TokenRows
from raylora.config import TrainingSection
from raylora.errors import TrialError
from raylora.files import replacing
from raylora.layout import MicroBatch
from raylora.packed import Pack
from raylora.rung import Report, peak_memory_mib, reset_peak_memory, validated_rows
from raylora.space import Assignment

N_CHECKPOINTS = 2
"""Checkpoints kept of each trial: the last, and the one before in case that the last is cut short."""


class PackedTrial:
    """One trial on its way through a pack: adapter, optimizer, schedule and position.

    Args:
        assignment: hyperparameters.
        training: settings that all trials share.
        shapes: the base's layers that may be adapted.
        lengths: tokens of each training row.
        rungs: optimizer steps at which to validate, save and report, ascending; the last is the budget.
        directory: receives checkpoints.
        device: where the adapter lives.
        dtype: of the adapter.
        rank_multiple: see `Adapter`.
    """

    def __init__(
        self,
        assignment: Assignment,
        training: TrainingSection,
        shapes: Shapes,
        lengths: list[int],
        *,
        rungs: list[int],
        directory: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rank_multiple: int = 1,
    ) -> None:
        self.assignment, self.rungs, self.directory = assignment, rungs, directory
        self._max_grad_norm = training.max_grad_norm
        targets = resolve_target_modules(assignment.target_modules, list(shapes))
        r, alpha = assignment.r, assignment.lora_alpha
        self.peft_config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=assignment.lora_dropout,
            target_modules=targets,
            use_rslora=assignment.use_rslora,
            task_type="CAUSAL_LM",
        )
        self.adapter = Adapter(
            {name: shape for name, shape in shapes.items() if is_target(name, targets)},
            r=r,
            scaling=alpha / (math.sqrt(r) if assignment.use_rslora else r),
            dropout=assignment.lora_dropout,
            seed=assignment.seed,
            device=device,
            dtype=dtype,
            rank_multiple=rank_multiple,
        )
        self._optimizer = torch.optim.AdamW(
            self.adapter.parameters, lr=assignment.learning_rate, weight_decay=assignment.weight_decay, fused=True
        )
        for parameter in self.adapter.parameters:
            # Adam's moments now and not in the first step: the memory is taken when the trial joins
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._scheduler = get_scheduler(
            assignment.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=math.ceil(assignment.warmup_ratio * rungs[-1]),
            num_training_steps=rungs[-1],
        )
        self.order = RowOrder(
            lengths,
            batch_size=assignment.per_device_train_batch_size,
            accumulation_steps=assignment.gradient_accumulation_steps,
            seed=assignment.seed,
            group_by_length=training.group_by_length,
        )
        self.step = self.tokens_seen = 0
        self.losses: list[Tensor] = []
        self._reported = 0
        self.seconds = {"train": 0.0, "eval": 0.0, "other": 0.0}
        """Since the last report."""

    def micro_batches(self, rows: TokenRows) -> list[MicroBatch]:
        """Those of the next optimizer step."""
        batches = self.order.step(self.step)
        n_predicted = sum(rows.n_predicted(row) for batch in batches for row in batch)
        first = self.step * self.assignment.gradient_accumulation_steps
        return [
            MicroBatch(
                self.adapter,
                [rows.input_ids(row) for row in batch],
                [rows.labels(row) for row in batch],
                weight=1 / max(1, n_predicted),
                key=first + index,
            )
            for index, batch in enumerate(batches)
        ]

    def update(self) -> None:
        """One step of the optimizer on the gradients that have come together."""
        if self._max_grad_norm > 0:
            clip_grad_norm_(self.adapter.parameters, self._max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        self.adapter.zero_grad()
        self.step += 1

    @property
    def at_rung(self) -> bool:
        return self.step in self.rungs

    def report(self, eval_loss: float) -> Report:
        """Saves a checkpoint and says how far the trial has come."""
        began = time.perf_counter()
        checkpoint = self.save()
        self.seconds["other"] += time.perf_counter() - began
        report = Report(
            step=self.step,
            epoch=self.step / self.order.steps_per_epoch,
            eval_loss=eval_loss,
            train_loss=float(torch.stack(self.losses).sum()) / (self.step - self._reported),
            tokens_seen=self.tokens_seen,
            train_seconds=self.seconds["train"],
            eval_seconds=self.seconds["eval"],
            other_seconds=self.seconds["other"],
            peak_memory_mib=peak_memory_mib(),
            trainable_parameters=self.adapter.n_parameters,
            checkpoint=str(checkpoint),
        )
        self.losses, self.seconds, self._reported = [], dict.fromkeys(self.seconds, 0.0), self.step
        return report

    def save(self) -> Path:
        """Writes a checkpoint: the adapter in peft's format, and what training needs to go on from it."""
        directory = self.directory / f"checkpoint-{self.step}"
        with replacing(directory) as temporary:
            temporary.mkdir()
            self.peft_config.save_pretrained(temporary)
            tensors = {name: tensor.contiguous() for name, tensor in self.adapter.state_dict().items()}
            save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
            state = {
                "step": self.step,
                "tokens_seen": self.tokens_seen,
                "optimizer": self._optimizer.state_dict(),
                "scheduler": self._scheduler.state_dict(),
            }
            torch.save(state, temporary / "trial_state.pt")
        saved = sorted(self.directory.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
        for old in saved[:-N_CHECKPOINTS]:
            shutil.rmtree(old)
        return directory

    def load(self, checkpoint: Path) -> None:
        """Goes on where a checkpoint was written: the rest is a function of the step."""
        saved = load_file(checkpoint / "adapter_model.safetensors")
        for name, view in self.adapter.state_dict().items():
            view.copy_(saved[name])
        state = torch.load(checkpoint / "trial_state.pt", weights_only=True)
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self._reported = self.step
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])


class PackedEngine:
    """A resident base, its data, and the trials that are on it now.

    Args:
        model: frozen base.
        names: its linear layers.
        train: training rows.
        validation: validation rows.
        training: settings that all trials share.
        places: trials at once; whoever adds them keeps to it.
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
        places: int = 1,
        autocast: torch.dtype | None = None,
        grouped: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.places = places
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
        self.places = len(self.trials)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return checkpoints

    def step(self) -> dict[int, Report | TrialError]:
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

    def _reports(self, numbers: list[int]) -> dict[int, Report | TrialError]:
        self._waiting.update(numbers)
        reports: dict[int, Report | TrialError] = {}
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
