"""Turns the `space` section of a search space file into Optuna suggestions and checked assignments.

Kinds: a plain value (fixed), `choice`, `uniform`, `loguniform`, `int` and `logint` (both ends included).
`times: other` multiplies the value by another parameter's; `depends_on: other` with `cases` picks a kind by
another parameter's value.
"""

import difflib
import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from raylora.errors import ConfigError

Value = bool | int | float | str


class Assignment(BaseModel):
    """The values one trial is allowed to vary. Names follow peft and transformers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    r: Annotated[int, Field(ge=1, strict=True)]
    """Adapter rank, >= 1."""

    lora_alpha: Annotated[float, Field(gt=0)]
    """Numerator of the adapter's scaling, > 0."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Drop probability on the adapter input, in [0, 1)."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """Peak learning rate of AdamW, in (0, 1]."""

    target_modules: str
    """`all-linear`, `attention`, `mlp`, or module names joined by commas."""

    use_rslora: bool
    """Scale by alpha/sqrt(r) instead of alpha/r."""

    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's decoupled weight decay."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of the budget spent raising the learning rate from 0."""

    lr_scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ]
    """Schedule by its name in transformers."""

    per_device_train_batch_size: PositiveInt
    """Rows per forward pass."""

    gradient_accumulation_steps: PositiveInt
    """Forward passes per optimizer step."""

    seed: Annotated[int, Field(ge=0)]
    """Seed of adapter initialisation, dropout and row order."""


REQUIRED = ("r", "lora_alpha", "lora_dropout", "learning_rate")
"""Parameters that every space names."""


class Suggester(Protocol):
    """What `optuna.Trial` offers, so that this module needs no Optuna."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class Fixed:
    """One value for all trials."""

    value: Value
    times: str | None = None

    def suggest(self, trial: Suggester, name: str) -> Value:
        return self.value

    def corners(self) -> list[Value]:
        return [self.value]

    def contains(self, value: Value) -> bool:
        return _equal(value, self.value)

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Choice:
    """One of several values, without order."""

    values: tuple[Value, ...]
    times: str | None = None

    def suggest(self, trial: Suggester, name: str) -> Value:
        return trial.suggest_categorical(name, self.values)

    def corners(self) -> list[Value]:
        return list(self.values)

    def contains(self, value: Value) -> bool:
        return any(_equal(value, choice) for choice in self.values)

    def __str__(self) -> str:
        return f"one of {list(self.values)}"


@dataclass(frozen=True)
class Range:
    """A number between `low` and `high`, both included; `log` samples its logarithm uniformly."""

    low: float
    high: float
    log: bool
    integer: bool
    times: str | None = None

    def suggest(self, trial: Suggester, name: str) -> Value:
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def corners(self) -> list[Value]:
        return [int(self.low), int(self.high)] if self.integer else [self.low, self.high]

    def contains(self, value: Value) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"within [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Cases:
    """A kind picked by the value of another parameter."""

    depends_on: str
    cases: tuple[tuple[Value, "Kind"], ...]

    def pick(self, name: str, values: dict[str, Value]) -> "Kind":
        for value, kind in self.cases:
            if _equal(values[self.depends_on], value):
                return kind
        known = [value for value, _ in self.cases]
        raise ConfigError(f"space.{name}.cases: no case for {self.depends_on} = {values[self.depends_on]}; has {known}")


Kind = Fixed | Choice | Range | Cases


@dataclass(frozen=True)
class SearchSpace:
    """Parameters in an order in which each stands after those it depends on."""

    kinds: dict[str, Kind]

    def suggest(self, trial: Suggester) -> dict[str, Value]:
        """One value for each parameter, drawn define-by-run from an Optuna trial."""
        values: dict[str, Value] = {}
        for name in self.kinds:
            optuna_name, kind = self._resolve(name, values)
            values[name] = _scaled(kind.suggest(trial, optuna_name), kind.times, values)
        return values

    def to_optuna(self, point: dict[str, Value], *, where: str) -> dict[str, Value]:
        """Parameters under Optuna's names, for `study.enqueue_trial`.

        Args:
            point: parameter name -> value; parameters left out are sampled.
            where: opens the error message.

        Raises:
            ConfigError: a name is not in the space, or a value is outside it.
        """
        for name in point:
            if name not in self.kinds:
                raise ConfigError(f"{where}: {name} is not in the space{_hint(name, self.kinds)}")
        enqueued: dict[str, Value] = {}
        for name in [name for name in self.kinds if name in point]:
            needs = _needs(self.kinds[name])
            if needs and needs not in point:
                raise ConfigError(f"{where}: {name} depends on {needs}, which the point must name too")
            optuna_name, kind = self._resolve(name, point)
            value = _encoded(point[name])
            if kind.times is not None:
                value = _divided(value, point[kind.times])
            if not kind.contains(value):
                unit = f" times {kind.times}" if kind.times else ""
                raise ConfigError(f"{where}: {name} = {point[name]} must be {kind}{unit}")
            if isinstance(kind, Choice):
                value = next(choice for choice in kind.values if _equal(choice, value))
            if not isinstance(kind, Fixed):
                enqueued[optuna_name] = value
        return enqueued

    def grid(self) -> list[dict[str, Value]]:
        """Every combination of choices, in the file's order, the last parameter varying fastest.

        Raises:
            ConfigError: a parameter is a range, or depends on another by cases.
        """
        axes: list[list[Value]] = []
        for name, kind in self.kinds.items():
            if not isinstance(kind, Fixed | Choice):
                raise ConfigError(f"space.{name}: sampler grid needs values or choices, found a range or cases")
            axes.append(kind.corners())
        points = []
        for combination in itertools.product(*axes):
            values: dict[str, Value] = {}
            for (name, kind), value in zip(self.kinds.items(), combination, strict=True):
                values[name] = _scaled(value, getattr(kind, "times", None), values)
            points.append(values)
        return points

    def _resolve(self, name: str, values: dict[str, Value]) -> tuple[str, Fixed | Choice | Range]:
        """The name Optuna knows a parameter by, and its kind given the values before it."""
        kind = self.kinds[name]
        if isinstance(kind, Cases):
            picked = kind.pick(name, values)
            assert not isinstance(picked, Cases)
            return f"{name}[{values[kind.depends_on]}]", picked
        return (f"{name}/{kind.times}" if kind.times else name), kind


def parse_space(space: dict[str, Any]) -> SearchSpace:
    """Parses and checks the `space` section.

    Raises:
        ConfigError: a parameter is unknown, missing, of no known kind, or can leave its range.
    """
    if not space:
        raise ConfigError(f"space: must name {', '.join(REQUIRED)}, found nothing")
    for name in space:
        if name not in Assignment.model_fields:
            raise ConfigError(f"space.{name}: unknown parameter{_hint(name, Assignment.model_fields)}")
    for name in REQUIRED:
        if name not in space:
            raise ConfigError(f"space.{name}: required, but not given")
    kinds = {name: _parse_kind(f"space.{name}", spec) for name, spec in space.items()}
    ordered = SearchSpace(_ordered(kinds))
    for name, kind in kinds.items():
        _check_range(name, kind, kinds)
    return ordered


def _parse_kind(key: str, spec: Any, *, nested: bool = False) -> Kind:
    if not isinstance(spec, dict):
        return Fixed(_encoded(spec))
    spec = dict(spec)
    times = spec.pop("times", None)
    if "depends_on" in spec and not nested:
        if set(spec) != {"depends_on", "cases"} or times or not isinstance(spec["cases"], dict) or not spec["cases"]:
            raise ConfigError(f"{key}: depends_on takes cases (value -> kind) and nothing else, found {sorted(spec)}")
        cases = [
            (value, _parse_kind(f"{key}.cases.{value}", case, nested=True)) for value, case in spec["cases"].items()
        ]
        return Cases(spec["depends_on"], tuple(cases))
    kinds = ("choice", "uniform", "loguniform", "int", "logint")
    if len(spec) != 1 or next(iter(spec)) not in kinds:
        raise ConfigError(f"{key}: must be a value or one of {', '.join(kinds)}, found {list(spec)}")
    kind, argument = next(iter(spec.items()))
    if kind == "choice":
        if not isinstance(argument, list) or not argument:
            raise ConfigError(f"{key}.choice: must be a list of one value or more, found {argument!r}")
        return Choice(tuple(_encoded(value) for value in argument), times)
    return _parse_range(f"{key}.{kind}", kind, argument, times)


def _parse_range(key: str, kind: str, argument: Any, times: str | None) -> Range:
    integer, log = kind.endswith("int"), kind.startswith("log")
    allowed = int if integer else (int, float)
    two = isinstance(argument, list) and len(argument) == 2
    if not two or not all(isinstance(x, allowed) and not isinstance(x, bool) for x in argument):
        raise ConfigError(f"{key}: must be two {'whole ' if integer else ''}numbers [low, high], found {argument!r}")
    low, high = argument
    if low > high or (log and low <= 0):
        rule = "0 < low <= high" if log else "low <= high"
        raise ConfigError(f"{key}: must be [low, high] with {rule}, found {argument!r}")
    return Range(low, high, log=log, integer=integer, times=times)


def _needs(kind: Kind) -> str | None:
    return kind.depends_on if isinstance(kind, Cases) else kind.times


def _ordered(kinds: dict[str, Kind]) -> dict[str, Kind]:
    """The file's order, but each parameter after the one it needs."""
    ordered: dict[str, Kind] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ConfigError(f"space: {' -> '.join([*path, name])} depend on each other")
        needs = _needs(kinds[name])
        if needs is not None:
            if needs not in kinds:
                raise ConfigError(f"space.{name}: depends on {needs}, which the space does not name")
            visit(needs, (*path, name))
        ordered.setdefault(name, kinds[name])

    for name in kinds:
        visit(name, ())
    return ordered


def _check_range(name: str, kind: Kind, kinds: dict[str, Kind]) -> None:
    """Checks the extreme values against the parameter's rule; a value between them cannot break it."""
    field = Assignment.model_fields[name]
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
    if isinstance(kind, Cases):
        for _, case in kind.cases:
            _check_range(name, case, kinds)
        return
    factors: list[Value] = [1]
    if kind.times is not None:
        other = kinds[kind.times]
        factors = [] if isinstance(other, Cases) else other.corners()
    for value, factor in itertools.product(kind.corners(), factors):
        scaled = _scaled(value, "factor" if kind.times else None, {"factor": factor})
        try:
            adapter.validate_python(scaled)
        except ValidationError as error:
            rule = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise ConfigError(f"space.{name} = {scaled!r}: {rule}") from error


def _encoded(value: Any) -> Value:
    """Lists of module names become one string, since Optuna's choices are plain values."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(f"space: a value must be a number, a string, true or false, found {value!r}")
    return value


def _scaled(value: Value, times: str | None, values: dict[str, Value]) -> Value:
    if times is None:
        return value
    other = values[times]
    if isinstance(value, str) or isinstance(other, str):
        raise ConfigError(f"space: `times: {times}` needs numbers, found {value!r} and {other!r}")
    return value * other


def _divided(value: Value, other: Value) -> Value:
    if isinstance(value, str) or isinstance(other, str) or not other:
        return math.nan
    return value / other


def _equal(one: Value, other: Value) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or isinstance(one, str) or isinstance(other, str):
        return type(one) is type(other) and one == other
    return math.isclose(one, other, rel_tol=1e-9)


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
