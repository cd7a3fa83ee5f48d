"""Trains one adapter on a resident base with TRL's SFTTrainer and peft, and reports at rungs, without Ray."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from raylora.base.architecture import Architecture
from raylora.base.load import free_unused, load_base_model
from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.config.assignment import Assignment
from raylora.config.schema import SearchConfig, TrainingSection
from raylora.data.rows import load_part
from raylora.errors import TrialError
from raylora.run.metrics import RungMetrics
from raylora.training.adapted import adapted
from raylora.training.losses import eval_loss, validated_rows
from raylora.training.memory import peak_memory_mib, reset_peak_memory


@dataclass(frozen=True)
class TrlEngine:
    """A resident base and its data, on which trials train one at a time. Each trial leaves the base unchanged."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset
    validation: datasets.Dataset
    training: TrainingSection
    architecture: Architecture
    """Linear layers of the base."""

    reason: str | None = None
    """Reason that trials are not packed; None if the config asks for this engine."""

    @classmethod
    def load(cls, config: SearchConfig, *, tokens_dir: Path, cache_dir: Path, device: str) -> "TrlEngine":
        """Load the base, and put it to use as `on` does.

        Args:
            config: resolved config of the search.
            tokens_dir: token cache.
            cache_dir: holds converted and quantized bases.
            device: `cpu` or `cuda:0`.

        Raises:
            BaseModelError: the base cannot be found or loaded.
        """
        model = load_base_model(config.base_model, cache_dir, device)
        return cls.on(model, config, tokens_dir=tokens_dir, cache_dir=cache_dir)

    @classmethod
    def on(
        cls,
        model: PreTrainedModel,
        config: SearchConfig,
        *,
        tokens_dir: Path,
        cache_dir: Path,
        reason: str | None = None,
    ) -> "TrlEngine":
        """Put a loaded base to use, and open the token cache.

        Args:
            model: the frozen base.
            config: resolved config of the search.
            tokens_dir: token cache.
            cache_dir: holds converted and quantized bases.
            reason: reason that trials are not packed.
        """
        base = config.base_model
        return cls(
            model=model,
            tokenizer=load_tokenizer(base, find_checkpoint(base, cache_dir)),
            train=load_part(tokens_dir, "train"),
            validation=load_part(tokens_dir, "validation"),
            training=config.training,
            architecture=Architecture.of_config(model.config, trust_remote_code=base.trust_remote_code),
            reason=reason,
        )

    def fit(
        self,
        assignment: Assignment,
        *,
        rungs: list[int],
        directory: Path,
        report: Callable[[RungMetrics], bool],
        resume_from: str | None = None,
        stepped: Callable[[int, int], None] | None = None,
    ) -> None:
        """Train one assignment to the last rung, or until `report` asks to stop.

        Args:
            assignment: the trial's hyperparameters.
            rungs: optimizer steps at which to validate, save and report, ascending; the last is the budget.
            directory: folder for checkpoints.
            report: takes the metrics of each rung. It returns True to stop the trial.
            resume_from: checkpoint of an earlier report to continue from.
            stepped: takes the number of each optimizer step and its tokens.

        Raises:
            TrialError: the loss is not finite.
        """
        arrived = time.perf_counter()
        set_seed(assignment.seed)
        with self._adapted(assignment) as model:
            trainer = SFTTrainer(
                model=model,
                args=_sft_config(assignment, self.training, rungs[-1], directory, model),
                train_dataset=self.train.select_columns(["input_ids", "labels"]),
                processing_class=self.tokenizer,
                callbacks=[_RungCallback(self, model, rungs, report, stepped, arrived)],
            )
            trainer.remove_callback(PrinterCallback)
            _keep_adapter_in_float32(model, assignment, resume_from)
            trainer.train(resume_from_checkpoint=resume_from)

    @contextmanager
    def _adapted(self, assignment: Assignment) -> Iterator[PeftModel]:
        """Free what earlier trials have left, and yield the base with a fresh adapter. Then restore the bare base."""
        free_unused()
        config = LoraConfig(
            r=assignment.r,
            lora_alpha=assignment.lora_alpha,
            lora_dropout=assignment.lora_dropout,
            target_modules=self.architecture.targets(assignment.target_modules),
            use_rslora=assignment.use_rslora,
            task_type="CAUSAL_LM",
        )
        try:
            with adapted(self.model, config) as model:
                # With a name here, each checkpoint asks the Hub for that model's config (peft 0.21).
                # `raylora.merge.run` writes the name into the best adapter.
                model.peft_config["default"].base_model_name_or_path = ""
                yield model
        finally:
            # SFTTrainer wraps the base's forward (TRL 1.16, add_fused_lm_head). Each trial would add a wrapper.
            self.model.__dict__.pop("forward", None)
            self.model.gradient_checkpointing_disable()


def _keep_adapter_in_float32(model: PeftModel, assignment: Assignment, resume_from: str | None) -> None:
    """Undo SFTTrainer's cast of a 4-bit model's adapter to bfloat16 (TRL 1.16), which would lose Adam's small steps.

    The cast has rounded the initial A, so A is drawn again as peft drew it.
    """
    set_seed(assignment.seed)
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            for factor in (module.lora_A["default"], module.lora_B["default"]):
                factor.to(torch.float32)
            if resume_from is None:
                module.reset_lora_parameters("default", init_lora_weights=True)


def _sft_config(
    assignment: Assignment, training: TrainingSection, max_steps: int, directory: Path, model: PeftModel
) -> SFTConfig:
    """Return TRL's settings of one trial."""
    on_gpu = model.device.type == "cuda"
    paged = training.optim.startswith("paged_")
    return SFTConfig(
        output_dir=str(directory),
        max_steps=max_steps,
        learning_rate=assignment.learning_rate,
        lr_scheduler_type=assignment.lr_scheduler_type,
        warmup_steps=math.ceil(assignment.warmup_ratio * max_steps),
        weight_decay=assignment.weight_decay,
        per_device_train_batch_size=assignment.per_device_train_batch_size,
        gradient_accumulation_steps=assignment.gradient_accumulation_steps,
        seed=assignment.seed,
        data_seed=assignment.seed,
        optim="adamw_torch" if paged and not on_gpu else training.optim,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=training.gradient_checkpointing is True,
        train_sampling_strategy="group_by_length" if training.group_by_length else "random",
        bf16=on_gpu and model.dtype == torch.bfloat16,
        fp16=on_gpu and model.dtype == torch.float16,
        use_cpu=not on_gpu,
        max_length=None,
        # rungs are not evenly spaced, so _RungCallback evaluates and saves
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
    )


class _RungCallback(TrainerCallback):
    """Callback that validates, saves and reports at rungs, and stops the trainer if the report asks for it."""

    def __init__(
        self,
        engine: TrlEngine,
        model: PeftModel,
        rungs: list[int],
        report: Callable[[RungMetrics], bool],
        stepped: Callable[[int, int], None] | None,
        arrived: float,
    ) -> None:
        self._engine, self._model, self._rungs, self._report = engine, model, rungs, report
        self._stepped, self._epoch = stepped, 0.0
        self._losses: list[float] = []
        self._learning_rates: list[float] = []
        self._eval_loss = math.nan
        self._train_seconds = self._eval_seconds = 0.0
        self._last_report = arrived
        self._tokens_per_epoch = sum(len(ids) for ids in engine.train["input_ids"])
        self._validation_lengths = [len(ids) for ids in engine.validation["input_ids"]]
        self._trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        reset_peak_memory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a training step."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop the clock. At a rung, validate and ask the trainer to save."""
        self._train_seconds += time.perf_counter() - self._step_began
        control.should_log = True
        if self._stepped is not None:
            self._stepped(state.global_step, round((state.epoch - self._epoch) * self._tokens_per_epoch))
        self._epoch = state.epoch
        if state.global_step in self._rungs:
            began = time.perf_counter()
            rows = validated_rows(self._validation_lengths, state.global_step, self._rungs, self._engine.training)
            self._eval_loss = eval_loss(
                self._model,
                self._engine.validation.select(rows),
                batch_size=self._engine.training.per_device_eval_batch_size,
                pad_token_id=self._engine.tokenizer.pad_token_id,
            )
            self._eval_seconds += time.perf_counter() - began
            control.should_save = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Collect the training loss and the learning rate of a step."""
        if logs and "loss" in logs:
            self._losses.append(logs["loss"])
            self._learning_rates.append(logs["learning_rate"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Report the rung. Trainer calls this once the checkpoint is complete, so no report names a partial one.

        Raises:
            TrialError: the validation loss is not finite.
        """
        if not math.isfinite(self._eval_loss):
            raise TrialError(f"diverged: eval_loss is {self._eval_loss} at step {state.global_step}")
        now = time.perf_counter()
        report = RungMetrics(
            step=state.global_step,
            epoch=state.epoch,
            eval_loss=self._eval_loss,
            train_loss=sum(self._losses) / max(1, len(self._losses)),
            tokens_seen=round(state.epoch * self._tokens_per_epoch),
            train_seconds=self._train_seconds,
            eval_seconds=self._eval_seconds,
            other_seconds=now - self._last_report - self._train_seconds - self._eval_seconds,
            peak_memory_mib=peak_memory_mib(),
            trainable_parameters=self._trainable,
            checkpoint=str(Path(args.output_dir) / f"checkpoint-{state.global_step}"),
            step_losses=self._losses,
            step_learning_rates=self._learning_rates,
        )
        control.should_training_stop = self._report(report) or state.global_step >= self._rungs[-1]
        self._losses, self._learning_rates = [], []
        self._train_seconds = self._eval_seconds = 0.0
        self._last_report = time.perf_counter()
        return control
