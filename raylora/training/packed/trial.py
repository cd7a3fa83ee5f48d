"""Keeps one trial of a pack: adapter, optimizer, schedule, position and checkpoints."""

import math
import shutil
import time
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from raylora.base.architecture import Architecture
from raylora.config.assignment import Assignment
from raylora.config.schema import TrainingSection
from raylora.data.rows import TokenRows
from raylora.run.activity import tell
from raylora.run.atomic import replacing
from raylora.run.metrics import RungMetrics
from raylora.run.outage import PATIENCE_SECONDS, wait_out
from raylora.training.memory import peak_memory_mib
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.layout import MicroBatch
from raylora.training.row_order import RowOrder

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments under their names in torch's optimizer state."""


class PackedTrial:
    """One trial in a pack: adapter, optimizer, schedule and position.

    Args:
        assignment: hyperparameters.
        training: settings that all trials share.
        architecture: linear layers of the base.
        lengths: tokens of each training row.
        rungs: optimizer steps at which to validate, save and report, ascending; the last is the budget.
        directory: folder that receives checkpoints.
        device: device of the adapter.
        dtype: type of the adapter.
        rank_multiple: as in `Adapter`.
        skips_overflow: True to leave out a step whose gradient is infinite or NaN, as a loss scaler does in float16.
    """

    def __init__(
        self,
        assignment: Assignment,
        training: TrainingSection,
        architecture: Architecture,
        lengths: list[int],
        *,
        rungs: list[int],
        directory: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rank_multiple: int = 1,
        skips_overflow: bool = False,
    ) -> None:
        self.assignment, self.rungs, self.directory = assignment, rungs, directory
        self._max_grad_norm, self._skips_overflow = training.max_grad_norm, skips_overflow
        r, alpha = assignment.r, assignment.lora_alpha
        self.peft_config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=assignment.lora_dropout,
            target_modules=architecture.targets(assignment.target_modules),
            use_rslora=assignment.use_rslora,
            task_type="CAUSAL_LM",
        )
        self.adapter = Adapter(
            architecture.adapted(assignment.target_modules),
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
        self._reported_step = 0
        self._losses: list[float] = []
        """Training loss of each step since the last report, but for those in `_recent`, nats per token."""

        self._recent: list[list[Tensor]] = []
        """Training losses of the newest steps, one scalar a micro-batch, still on the device."""

        self._learning_rates: list[float] = []
        """Learning rate of each step since the last report."""

        self.seconds = dict.fromkeys(("train", "eval", "other"), 0.0)
        """Time since the last report."""

        self._save_seconds = 0.0
        """Time that the last checkpoint took, without a wait for the disk."""

        self._reported_checkpoint: Path | None = None
        """Checkpoint of the last report."""

    def micro_batches(self, rows: TokenRows) -> list[MicroBatch]:
        """Return the micro-batches of the next optimizer step."""
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

    def update(self, losses: list[Tensor]) -> None:
        """Take one optimizer step with the gradients that the micro-batches have added up.

        Args:
            losses: a scalar of each micro-batch, nats per token of the step.
        """
        learning_rate = float(self._optimizer.param_groups[0]["lr"])
        if self._max_grad_norm > 0 or self._skips_overflow:
            norm = clip_grad_norm_(self.adapter.parameters, self._max_grad_norm or math.inf)
            if self._skips_overflow:
                # torch's GradScaler tells a fused optimizer in this way, and nobody waits for the device
                self._optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._scheduler.step()
        self.adapter.zero_grad()
        self._recent.append(losses)
        self._learning_rates.append(learning_rate)
        self.step += 1

    @property
    def is_due(self) -> bool:
        """True if the trial stands at a rung that it has not reported."""
        return self.step in self.rungs and self.step > self._reported_step

    def report(self, eval_loss: float, patience: float = PATIENCE_SECONDS) -> RungMetrics:
        """Save a checkpoint and return the metrics of the rung.

        Args:
            eval_loss: validation loss in nats per token.
            patience: as for `save`.

        Raises:
            OSError: the checkpoint cannot be written.
        """
        seconds, reported = self.seconds, self._reported_checkpoint
        losses, learning_rates = self._step_losses(), self._learning_rates
        self._losses, self._learning_rates = [], []
        self.seconds, self._reported_step = dict.fromkeys(seconds, 0.0), self.step
        checkpoint = self.save(patience)
        seconds["other"] += self._save_seconds
        assert reported is None or reported.is_dir()  # the log still names it
        return RungMetrics(
            step=self.step,
            epoch=self.step / self.order.steps_per_epoch,
            eval_loss=eval_loss,
            train_loss=sum(losses) / len(losses),
            tokens_seen=self.tokens_seen,
            train_seconds=seconds["train"],
            eval_seconds=seconds["eval"],
            other_seconds=seconds["other"],
            peak_memory_mib=peak_memory_mib(),
            trainable_parameters=self.adapter.n_parameters,
            checkpoint=str(checkpoint),
            step_losses=losses,
            step_learning_rates=learning_rates,
        )

    def _step_losses(self) -> list[float]:
        """Return the training loss of each step since the last report; waits for the device."""
        if self._recent:
            on_host = iter(torch.stack([loss for losses in self._recent for loss in losses]).tolist())
            self._losses += [sum(next(on_host) for _ in losses) for losses in self._recent]
            self._recent = []
        return self._losses

    def save(self, patience: float = PATIENCE_SECONDS) -> Path:
        """Write a checkpoint: the adapter in peft's format, and what training needs to go on from it.

        Older ones are removed, but for the one of the last report, which tables and the event log name.

        Args:
            patience: seconds for which a disk that takes nothing is waited for.

        Raises:
            OSError: it took nothing for so long.
        """
        directory = self.directory / f"checkpoint-{self.step}"
        wait_out(partial(self._write, directory), lambda text: tell(text, 0, 1), patience)
        kept = {directory, self._reported_checkpoint}
        for old in set(self.directory.glob("checkpoint-*")) - kept:
            shutil.rmtree(old, ignore_errors=True)
        if self._reported_step == self.step:
            self._reported_checkpoint = directory
        return directory

    def _write(self, directory: Path) -> None:
        """Write a checkpoint's folder at once.

        Files are made in memory, since on a full disk neither safetensors nor torch raises an OSError.
        """
        began = time.perf_counter()
        with replacing(directory) as temporary:
            temporary.mkdir()
            self.peft_config.save_pretrained(temporary)
            tensors = {name: tensor.contiguous() for name, tensor in self.adapter.state_dict().items()}
            adapter_file = temporary / "adapter_model.safetensors"
            adapter_file.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
            state = BytesIO()
            torch.save(self._state(), state)
            (temporary / "trial_state.pt").write_bytes(state.getbuffer())
        self._save_seconds = time.perf_counter() - began

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the adapter, independent of device and of rank padding."""
        return {
            "step": self.step,
            "adam_step": int(self._optimizer.state[self.adapter.parameters[0]]["step"]),
            "tokens_seen": self.tokens_seen,
            "reported_step": self._reported_step,
            "seconds": self.seconds,
            "step_losses": self._step_losses(),
            "step_learning_rates": self._learning_rates,
            "moments": {key: {n: t.cpu().clone() for n, t in self._moment(key).items()} for key in MOMENTS},
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "scheduler": self._scheduler.state_dict(),
        }

    def load(self, checkpoint: Path) -> None:
        """Go on where a checkpoint was written, on any device; all else is a function of the step."""
        saved = load_file(checkpoint / "adapter_model.safetensors")
        for name, view in self.adapter.state_dict().items():
            view.copy_(saved[name])
        state = torch.load(checkpoint / "trial_state.pt", weights_only=True, map_location="cpu")
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self.seconds, self._reported_step = state["seconds"], state["reported_step"]
        self._losses, self._learning_rates = state["step_losses"], state["step_learning_rates"]
        if self._reported_step:
            self._reported_checkpoint = self.directory / f"checkpoint-{self._reported_step}"
        for key in MOMENTS:
            for name, view in self._moment(key).items():
                view.copy_(state["moments"][key][name])
        for parameter in self.adapter.parameters:
            self._optimizer.state[parameter]["step"].fill_(state["adam_step"])
        self._optimizer.param_groups[0]["lr"] = state["learning_rate"]
        self._scheduler.load_state_dict(state["scheduler"])

    def _moment(self, key: str) -> dict[str, Tensor]:
        """Return one of Adam's moments as a view for each factor of each layer."""
        return self.adapter.factors([self._optimizer.state[parameter][key] for parameter in self.adapter.parameters])
