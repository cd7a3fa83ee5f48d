"""Keeps one trial of a pack: adapter, optimizer, schedule, position and checkpoints."""

import math
import shutil
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from raylora.base.modules import is_target, resolve_target_modules
from raylora.config.assignment import Assignment
from raylora.config.schema import TrainingSection
from raylora.data.rows import TokenRows
from raylora.run.atomic import replacing
from raylora.run.metrics import RungMetrics
from raylora.training.memory import peak_memory_mib
from raylora.training.packed.adapter import Adapter, Shapes
from raylora.training.packed.layout import MicroBatch
from raylora.training.row_order import RowOrder

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

    def report(self, eval_loss: float) -> RungMetrics:
        """Saves a checkpoint and says how far the trial has come."""
        began = time.perf_counter()
        checkpoint = self.save()
        self.seconds["other"] += time.perf_counter() - began
        report = RungMetrics(
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
