"""Defines every setting, with its default and its rule."""

import itertools
import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from raylora.config.assignment import Schedule
from raylora.config.kinds import corners
from raylora.config.rules import (
    known_attention,
    known_optimizer,
    local_path,
    pattern_with_group,
    share_or_count,
    split_names,
)
from raylora.config.space import SearchSpace, parse_space
from raylora.errors import ConfigError


class Section(BaseModel):
    """Base class of all sections: frozen, strict about types, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class BaseModelSection(Section):
    """The model to fine-tune."""

    name: str
    """Hub id, local directory in transformers' format, or path of a GGUF file."""

    revision: str | None = None
    """Hub branch, tag or commit."""

    quantization: Literal["nf4", "none"] = "nf4"
    """Quantization of the base: `nf4` loads it in 4 bit by bitsandbytes (QLoRA), `none` keeps its precision (LoRA)."""

    double_quant: bool = True
    """True to quantize the block scales too (QLoRA, arXiv:2305.14314, section 3)."""

    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of activations and dequantized weights; `auto` is bfloat16 on a GPU and float32 on a CPU."""

    attn_implementation: Annotated[str, AfterValidator(known_attention)] | None = None
    """Attention by its name in transformers, e.g. `sdpa` or `flash_attention_2`; None is transformers' default."""

    trust_remote_code: bool = False
    """True to run model code from the Hub repository."""


class DataSection(Section):
    """Rows to train on, to validate on and to hold out."""

    train: str
    """Training rows: a JSONL, JSON, CSV, TSV or Parquet file, also compressed; a pattern such as `rows/*.jsonl`; a
    folder; a URL that fsspec opens, such as `s3://bucket/rows.jsonl`; or a Hub data set, `owner/name` or
    `owner/name:split`."""

    validation: str | None = None
    """Validation rows, as `train`; None splits them off `train`. The search minimises the loss on them."""

    heldout: str | None = None
    """Held-out rows, as `train`; None splits them off `train`. Only the final check reads them."""

    subset: str | None = None
    """Configuration name of the Hub data set `train`."""

    revision: str | None = None
    """Hub branch, tag or commit of `train`; the commit that a search started with is in its `config.yaml`."""

    split: str = "train"
    """Split of `train`, if it is a Hub data set or a folder with several."""

    format: Literal["auto", "text", "prompt-completion", "messages", "conversations", "alpaca"] = "auto"
    """Dataset format (TRL's word): the columns of a row. `auto` tells it from the first row."""

    columns: dict[str, str] = {}
    """Columns by other names: name in the dataset format -> name in the file, e.g. `{prompt: question}`."""

    chat_template: str | None = None
    """Chat template: `chatml`, `alpaca`, `tokenizer` (the base's own) or a Jinja file. None is `alpaca` for rows of
    that format, else `tokenizer`."""

    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, e.g. `{reasoning_effort: low}`."""

    bad_rows: Literal["error", "drop"] = "error"
    """Treatment of rows that are not of the format or that the chat template cannot render as they are."""

    completion_only_loss: bool = True
    """True to train on completions (assistant turns) only, in formats that mark them."""

    validation_size: Annotated[float | int, AfterValidator(share_or_count)] = Field(0.1, gt=0)
    """Rows to split off for validation: a share below 1, or a count."""

    heldout_size: Annotated[float | int, AfterValidator(share_or_count)] = Field(0.1, gt=0)
    """Rows to split off as held-out: a share below 1, or a count."""

    max_train_rows: PositiveInt | None = None
    """Largest number of training rows, drawn by `seed`; None uses all."""

    max_validation_rows: PositiveInt | None = None
    """Largest number of validation rows, drawn by `seed`; None uses all."""

    max_heldout_rows: PositiveInt | None = None
    """Largest number of held-out rows, drawn by `seed`; None uses all."""

    max_length: int = Field(1024, ge=8)
    """Longest row in tokens."""

    long_rows: Literal["truncate", "drop"] = "truncate"
    """Treatment of rows over `max_length`."""

    overlap: Literal["error", "drop"] = "error"
    """Treatment of training rows whose prompt is also in the validation or held-out file."""

    seed: int = 0
    """Seed of the split."""


class TrainingSection(Section):
    """Training settings that all trials share. The space may vary those under "also searchable"."""

    max_steps: PositiveInt | None = None
    """Full budget of a trial in optimizer steps; None derives it from `num_train_epochs`."""

    num_train_epochs: float = Field(1.0, gt=0)
    """Full budget of a trial in passes over the training rows, used if `max_steps` is None."""

    optim: Annotated[str, AfterValidator(known_optimizer)] = "adamw_torch"
    """Optimizer by its name in transformers; `paged_adamw_32bit` needs a GPU and falls back to `adamw_torch`."""

    max_grad_norm: float = Field(1.0, ge=0)
    """Largest gradient norm, to which gradients are clipped; 0 turns clipping off."""

    group_by_length: bool = False
    """True to batch rows of similar length together."""

    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """True to recompute activations in the backward pass: a third more compute, far less activation memory. `auto` does
    so only where the memory is too small otherwise."""

    per_device_eval_batch_size: PositiveInt = 8
    """Rows per validation batch. It changes speed and memory, not the loss."""

    # Also searchable: defaults for parameters that the space does not name.

    target_modules: str | list[str] = "all-linear"
    """Modules to adapt: `all-linear`, `attention`, `mlp`, or names."""

    use_rslora: bool = False
    """True to scale by alpha/sqrt(r) instead of alpha/r (rsLoRA, arXiv:2312.03732)."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""

    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the full budget in which the learning rate rises from 0."""

    lr_scheduler_type: Schedule = "constant_with_warmup"
    """Learning rate schedule, by its name in transformers."""

    per_device_train_batch_size: PositiveInt = 4
    """Rows per micro-batch."""

    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step."""

    seed: int = Field(0, ge=0)
    """Seed of adapter initialisation, dropout and row order."""


class SearchSection(Section):
    """Settings of the search: how trials are proposed, stopped and placed on devices."""

    n_trials: PositiveInt | None = None
    """Total number of trials; None is 16, or every point of the space with `sampler: grid`."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """Sampler of assignments: Optuna's TPE, uniform random, or every combination of a space of choices."""

    scheduler: Literal["asha", "halving", "none"] = "asha"
    """Rule that promotes trials past a rung (arXiv:1810.05934). Trials that are not promoted pause.

    `asha` promotes a trial as soon as it is in the best 1 / `reduction_factor` of the trials that have reported at its
    rung. So the sampler soon learns from late rungs. `halving` waits until all trials have reported. `none` trains all
    trials to the full budget.
    """

    grace_period: PositiveInt | None = None
    """First rung in optimizer steps. None picks the rung from which halving leaves one of `n_trials` at the full
    budget, but none before 1/27 of `max_steps`; where that is less than five steps, none before 1/9."""

    reduction_factor: int = Field(3, ge=2)
    """Reduction factor: one of this many trials is promoted at each rung."""

    finalists: PositiveInt = 3
    """Least number of trials promoted to the full budget. A larger one guards against a misleading last rung
    (docs/search.md)."""

    objective: Literal["eval_loss", "merged_eval_loss"] = "eval_loss"
    """Figure that chooses the best finished trial: validation loss, or that after the merge among the five lowest."""

    repeat_best: int = Field(0, ge=0)
    """Number of best assignments to train again to the full budget with other seeds. The mean over seeds chooses."""

    repeats: PositiveInt = 2
    """Number of other seeds for each repeated assignment."""

    seed: int = 0
    """Seed of the sampler."""

    lanes: PositiveInt | None = None
    """Number of GPUs to use; None is all of them. On a CPU, number of processes; None is one. With `device: cuda` on a
    cluster, a search starts with the first GPU that is there and takes the others as they come."""

    forward_env: list[str] = []
    """Names of environment variables that lanes get from the user's environment, such as `HF_TOKEN`. Nothing else of it
    leaves the driver's node, and values are never written to disk or logs."""

    engine: Literal["auto", "packed", "trl"] = "auto"
    """Training engine: `packed` trains several trials at once on one base, `trl` one at a time with TRL and peft.
    `auto` packs if the model and the settings allow it."""

    trials_per_gpu: Literal["auto"] | PositiveInt = "auto"
    """Slots of a GPU: trials that train on it at once. `auto` takes as many as fit and still raise the throughput."""

    fused_kernels: bool = True
    """True to take a pack's norms, rotary embeddings and attention by fewer kernels, and on GPUs of compute capability
    8 and later the products of all adapters by Triton kernels. They are compared with the model itself and with
    torch's products when the base is loaded, and not used where they fail."""

    tokens_per_pass: PositiveInt | None = None
    """Largest number of tokens of a pass through the base, which micro-batches of different trials share. None is 4096
    on a GPU and 512 on a CPU; more do not raise the throughput."""

    max_initial_failures: PositiveInt = 3
    """Number of failures at which the search gives up, if every trial so far has failed."""

    time_budget_minutes: float | None = Field(None, gt=0)
    """Minutes after which no new trial is proposed; None sets no limit."""


class MergeSection(Section):
    """Settings of the merge of the best adapter."""

    formats: list[Literal["nf4", "bf16", "residual"]] = Field(["nf4"], min_length=1)
    """Model directories to write. `nf4` stays 4-bit. `bf16` has four times the size and is exact to rounding.
    `residual` is the base in NF4 beside a small adapter that holds the update."""

    strategy: Literal["auto", "all", "peft", "requantize", "stochastic", "calibrated"] = "auto"
    """Rounding of the merged weights to 4 bit. `auto` tries `calibrated`, and as long as the tolerance is missed
    `requantize` and `stochastic`. `all` tries them all and `peft` too, and writes the model nearest to the adapter's
    predictions among those within the tolerance."""

    tolerance: float = Field(0.02, ge=0)
    """Largest accepted rise of the validation loss over the unmerged adapter's, as a share of it; .001 nats per token
    are accepted whatever share they are, unless it is 0."""

    calibration_tokens: int = Field(4096, ge=64)
    """Largest number of training tokens for the strategy `calibrated`."""

    residual_rank: PositiveInt = 16
    """Rank of the adapter in the format `residual`."""


class EvaluationSection(Section):
    """Settings of the held-out check of base, adapter and merged model."""

    max_new_tokens: PositiveInt = 128
    """Longest answer in tokens."""

    batch_size: Literal["auto"] | PositiveInt = "auto"
    """Prompts per generation batch. `auto` takes as many as fit into the memory, 64 at most."""

    answer_pattern: Annotated[str, AfterValidator(pattern_with_group)] | None = None
    """Regular expression whose first group is the answer to compare as a number, e.g. `#### (.+)` for GSM8K."""

    n_samples: int = Field(5, ge=0)
    """Number of prompts whose answers the report shows side by side."""


class SearchConfig(Section):
    """All settings of one search."""

    base_model: BaseModelSection
    data: DataSection
    training: TrainingSection = TrainingSection()
    space: dict[str, Any]
    """Search space: parameter name -> a value, or one of choice, uniform, loguniform, int, logint (see
    search_spaces/README.md)."""

    starting_points: list[dict[str, Any]] = []
    """Assignments to try first. Parameters that one leaves out are sampled."""

    search: SearchSection = SearchSection()
    merge: MergeSection = MergeSection()
    evaluation: EvaluationSection = EvaluationSection()
    report_to: Annotated[list[Literal["tensorboard", "mlflow", "wandb", "trackio"]], BeforeValidator(split_names)] = []
    """Trackers that receive trials and scores (transformers' word), as a list or comma-separated; see
    docs/trackers.md."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the lanes: `cuda` demands a GPU for each lane, `auto` uses GPUs if there are any."""

    cache_dir: Annotated[str, AfterValidator(local_path)] | None = None
    """Directory of tokens and quantized bases; None is `.cache` beside the run directory."""

    @model_validator(mode="after")
    def _space_is_consistent(self) -> Self:
        """Check the space, the grid and the starting points against each other."""
        space = self.search_space()
        if self.search.sampler == "grid":
            space.grid()
        for number, point in enumerate(self.starting_points, 1):
            space.to_optuna(point, where=f"starting point {number} (`--starting_points []` drops all)")
        return self

    def search_space(self) -> SearchSpace:
        """Return the parsed search space.

        Raises:
            ConfigError: a parameter is unknown, of no known kind, or out of range.
        """
        return parse_space(self.space)

    def extremes(self, name: str) -> list[Any]:
        """Return the extreme values that a parameter can take in this search, or its fixed value."""
        kinds = self.search_space().kinds
        if name in kinds:
            return corners(kinds[name], kinds)
        value = getattr(self.training, name)
        return [",".join(value) if isinstance(value, list) else value]

    def rows_per_step(self) -> tuple[int, int]:
        """Return the fewest and the most training rows that an optimizer step of a trial may take."""
        batches, passes = map(self.extremes, ("per_device_train_batch_size", "gradient_accumulation_steps"))
        return min(batches) * min(passes), max(batches) * max(passes)

    def n_trials(self) -> int:
        """Return the total number of trials."""
        if self.search.n_trials is not None:
            return self.search.n_trials
        return len(self.search_space().grid()) if self.search.sampler == "grid" else 16

    def rungs(self, max_steps: int) -> list[int]:
        """Return the rungs: the optimizer steps at which a trial validates and reports.

        Args:
            max_steps: full budget of a trial in optimizer steps.

        Returns:
            Ascending steps; the last is `max_steps`.

        Raises:
            ConfigError: `search.grace_period` is over `max_steps`.

        Source: the rungs of successive halving, Li et al. 2018, section 3 (arXiv:1810.05934).
        """
        if self.search.scheduler == "none":
            return [max_steps]
        factor = self.search.reduction_factor
        # before 1/27 of the budget, trials are hardly past their warm-up; in fewer than five steps the fastest lead
        n_trials = min(self.n_trials(), 27 if max_steps >= 27 * 5 else 9)
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
    """All settings of the merge of one adapter, without a search."""

    base_model: BaseModelSection
    data: DataSection | None = None
    """Rows to calibrate and measure with; None measures nothing."""

    merge: MergeSection = MergeSection()
    per_device_eval_batch_size: PositiveInt = 8
    """Rows per forward pass of a measurement."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the merge: `cuda` demands a GPU, `auto` uses one if there is one."""

    cache_dir: Annotated[str, AfterValidator(local_path)] | None = None
    """Directory of tokens and quantized bases; None is `.cache` beside the output."""
