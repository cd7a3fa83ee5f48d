"""Defines every setting, with its default and its rule."""

import itertools
import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from raylora.config.space import SearchSpace, parse_space
from raylora.errors import ConfigError


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys fail."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class BaseModelSection(Section):
    """The model to fine-tune."""

    name: str
    """Hub id, local directory in transformers' format, or path of a GGUF file."""

    revision: str | None = None
    """Hub branch, tag or commit."""

    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4` loads the base in 4 bit through bitsandbytes (QLoRA); `none` keeps its own precision (LoRA)."""

    double_quant: bool = True
    """Quantize the block scales too (QLoRA paper, section 3)."""

    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type that 4-bit weights are expanded to; auto is bfloat16 on a GPU and float32 on a CPU."""

    attn_implementation: str | None = None
    """Passed to transformers, e.g. `sdpa` or `flash_attention_2`; None is transformers' choice."""

    trust_remote_code: bool = False
    """Run model code that the Hub repository carries."""


class DataSection(Section):
    """The rows to train, validate and test on."""

    train: str
    """JSONL, JSON, CSV or Parquet file, or a Hub data set id."""

    validation: str | None = None
    """Like `train`; None splits it off `train`. The search minimises the loss on it."""

    heldout: str | None = None
    """Like `train`; None splits it off `train`. Only the final check reads it."""

    subset: str | None = None
    """Configuration name of a Hub data set."""

    split: str = "train"
    """Split of a Hub data set."""

    layout: Literal["auto", "text", "prompt-completion", "messages", "conversations", "alpaca"] = "auto"
    """Column layout; auto tells it from the first row's columns."""

    chat_template: str | None = None
    """`chatml`, or a Jinja file; needed for conversations where the tokenizer has no chat template."""

    completion_only_loss: bool = True
    """Train on completions (assistant turns) only, where the layout tells them apart."""

    validation_size: float | int = Field(0.1, gt=0)
    """Rows to split off for validation: a share below 1, or a count."""

    heldout_size: float | int = Field(0.1, gt=0)
    """Rows to split off as held-out: a share below 1, or a count."""

    max_train_rows: PositiveInt | None = None
    """Use at most so many training rows, drawn by `seed`."""

    max_validation_rows: PositiveInt | None = None
    """Use at most so many validation rows, drawn by `seed`."""

    max_heldout_rows: PositiveInt | None = None
    """Use at most so many held-out rows, drawn by `seed`."""

    max_length: int = Field(1024, ge=8)
    """Longest row in tokens."""

    long_rows: Literal["truncate", "drop"] = "truncate"
    """What happens to rows over `max_length`."""

    overlap: Literal["error", "drop"] = "error"
    """What happens to training rows whose prompt also stands in the validation or held-out file."""

    seed: int = 0
    """Seed of the split."""


class TrainingSection(Section):
    """How each trial trains. The space may vary the values under "also searchable"."""

    max_steps: PositiveInt | None = None
    """Full budget of a trial in optimizer steps; None derives it from `num_train_epochs`."""

    num_train_epochs: float = Field(1.0, gt=0)
    """Full budget in passes over the training rows, where `max_steps` is None."""

    optim: str = "adamw_torch"
    """Optimizer by its name in transformers; `paged_adamw_32bit` needs a GPU and falls back to `adamw_torch`."""

    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping norm; 0 turns it off."""

    group_by_length: bool = False
    """Batch rows of like length together."""

    gradient_checkpointing: bool = False
    """Trade about a third more compute for far less activation memory."""

    per_device_eval_batch_size: PositiveInt = 8
    """Rows per validation batch; changes speed and memory, not the loss."""

    # Also searchable: defaults for parameters that the space does not name.

    target_modules: str | list[str] = "all-linear"
    """Modules to adapt: `all-linear`, `attention`, `mlp`, or names."""

    use_rslora: bool = False
    """Scale by alpha/sqrt(r) instead of alpha/r (arXiv:2312.03732)."""

    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""

    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the full budget spent raising the learning rate from 0."""

    lr_scheduler_type: str = "constant_with_warmup"
    """Learning rate schedule by its name in transformers."""

    per_device_train_batch_size: PositiveInt = 4
    """Rows per forward pass."""

    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step."""

    seed: int = Field(0, ge=0)
    """Seed of adapter initialisation, dropout and row order."""


class SearchSection(Section):
    """How assignments are proposed, stopped and placed."""

    n_trials: PositiveInt | None = None
    """Total number of trials; None is 16, or every point of the space with `sampler: grid`."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """Optuna's TPE, uniform random, or every combination of a space of choices."""

    scheduler: Literal["asha", "halving", "none"] = "asha"
    """Weak trials pause at rungs, and the best go on: as soon as enough have reached a rung (`asha`), so that the
    sampler soon learns from late rungs, or only when all have (`halving`), arXiv:1810.05934; `none` trains all to the
    end."""

    grace_period: PositiveInt | None = None
    """First rung in optimizer steps; None is early enough that the best one of `n_trials` is left at the last rung, but
    no earlier than 1/27 of `max_steps`."""

    reduction_factor: int = Field(3, ge=2)
    """Promote one of so many at each rung."""

    finalists: PositiveInt = 3
    """Promote at least so many to the full budget; more guard against a last rung that misjudges (docs/packed.md)."""

    objective: Literal["eval_loss", "merged_eval_loss"] = "eval_loss"
    """What the best of the finished trials is chosen by: validation loss, or, of the five lowest, that when merged."""

    repeat_best: int = Field(0, ge=0)
    """Train so many of the best assignments again to the full budget, with other seeds, and choose by the mean."""

    repeats: PositiveInt = 2
    """Other seeds for each of them."""

    seed: int = 0
    """Seed of the sampler."""

    lanes: PositiveInt | None = None
    """GPUs to use; None is all there are. On a CPU, processes; None is one."""

    engine: Literal["auto", "packed", "trl"] = "auto"
    """`packed` trains several trials at once on one base; `trl` one at a time with TRL and peft; `auto` packs where
    that can be done."""

    trials_per_gpu: Literal["auto"] | PositiveInt = "auto"
    """Trials on one GPU at once; `auto` is as many as fit and still pay."""

    tokens_per_pass: PositiveInt | None = None
    """Micro-batches of different trials share a pass through the base up to so many tokens; None is 4096 on a GPU, 512
    on a CPU, where more do not pay."""

    max_initial_failures: PositiveInt = 3
    """Give up when the first so many trials all fail."""

    time_budget_minutes: float | None = Field(None, gt=0)
    """Propose no new trial after so many minutes."""


class MergeSection(Section):
    """What the best adapter is merged into."""

    formats: list[Literal["nf4", "bf16", "residual"]] = Field(["nf4"], min_length=1)
    """Model directories to write: `nf4` stays 4-bit; `bf16` is four times the size and exact to rounding; `residual`
    is the base in nf4 with a small adapter beside it that holds the update."""

    strategy: Literal["auto", "all", "peft", "requantize", "stochastic", "calibrated"] = "auto"
    """How weights are rounded to 4 bit; auto tries all but `peft`, `all` that too, for comparison. Of those within the
    tolerance, the one nearest to the adapter's predictions is written."""

    tolerance: float = Field(0.02, ge=0)
    """The merge fails its check where validation loss rises by more than this share over the unmerged adapter's."""

    calibration_tokens: int = Field(4096, ge=64)
    """Training tokens that `calibrated` looks at, at most."""

    residual_rank: PositiveInt = 16
    """Rank of the adapter that `residual` keeps."""


class EvaluationSection(Section):
    """The held-out generation check of base, adapter and merged model."""

    max_new_tokens: PositiveInt = 128
    """Longest answer in tokens."""

    batch_size: PositiveInt = 8
    """Prompts generated at once."""

    answer_pattern: str | None = None
    """Regular expression whose first group is the answer to compare as a number, e.g. `#### (.+)` for GSM8K."""

    n_samples: int = Field(5, ge=0)
    """Answers shown side by side in the report."""


class SearchConfig(Section):
    """Everything that one search needs."""

    base_model: BaseModelSection
    data: DataSection
    training: TrainingSection = TrainingSection()
    space: dict[str, Any]
    """Parameter name -> a value, or one of choice, uniform, loguniform, int, logint (see search_spaces/README.md)."""

    starting_points: list[dict[str, Any]] = []
    """Assignments to try first; parameters left out are sampled."""

    search: SearchSection = SearchSection()
    merge: MergeSection = MergeSection()
    evaluation: EvaluationSection = EvaluationSection()
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`cuda` demands a GPU for each lane; auto uses GPUs where there are any."""

    cache_dir: str | None = None
    """Where tokens and quantized bases are kept; None is `.cache` beside the run directory."""

    @model_validator(mode="after")
    def _space_is_consistent(self) -> Self:
        space = self.search_space()
        if self.search.sampler == "grid":
            space.grid()
        for number, point in enumerate(self.starting_points, 1):
            space.to_optuna(point, where=f"starting point {number} (`--starting_points []` drops all)")
        return self

    def search_space(self) -> SearchSpace:
        """The space with every kind parsed.

        Raises:
            ConfigError: a parameter is unknown, of no known kind, or out of range.
        """
        return parse_space(self.space)

    def n_trials(self) -> int:
        """Total number of trials of the search."""
        if self.search.n_trials is not None:
            return self.search.n_trials
        return len(self.search_space().grid()) if self.search.sampler == "grid" else 16

    def rungs(self, max_steps: int) -> list[int]:
        """Optimizer steps at which a trial evaluates and reports; the last is `max_steps`.

        LayerReader: successive halving's rungs, arXiv:1810.05934, section 3.
        """
        if self.search.scheduler == "none":
            return [max_steps]
        factor = self.search.reduction_factor
        # before 1/27 of the budget, trials are hardly out of their warm-up
        n_trials = min(self.n_trials(), 27)
        earlier = next(level for level in itertools.count() if factor ** (level + 1) > n_trials)
        rung = self.search.grace_period or math.ceil(max_steps / factor**earlier)
        if rung > max_steps:
            raise ConfigError(f"search.grace_period must be at most max_steps = {max_steps}, found {rung}")
        rungs = []
        while rung < max_steps:
            rungs.append(rung)
            rung *= factor
        return [*rungs, max_steps]


class MergeConfig(Section):
    """Everything that the merge of one adapter needs, outside a search."""

    base_model: BaseModelSection
    data: DataSection | None = None
    """Rows to calibrate and measure with; without them nothing is measured."""

    merge: MergeSection = MergeSection()
    per_device_eval_batch_size: PositiveInt = 8
    """Rows per forward pass when measuring."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    cache_dir: str | None = None
    """Where tokens and quantized bases are kept; None is `.cache` beside the output."""
