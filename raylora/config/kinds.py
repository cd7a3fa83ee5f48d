"""Defines the kinds of search space parameters: a fixed value, a choice, a range, or cases of another parameter."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from raylora.config.assignment import Value
from raylora.errors import ConfigError


class Suggester(Protocol):
    """The part of `optuna.Trial` that draws values, so that this module needs no Optuna."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True)
class Fixed:
    """One value for all trials."""

    value: Value
    times: str | None = None
    """Name of the parameter whose value multiplies this one."""

    def suggest(self, trial: Suggester, name: str) -> Value:
        """Return the value; Optuna is not asked."""
        return self.value

    def corners(self) -> list[Value]:
        """Return the value as the only extreme value."""
        return [self.value]

    def contains(self, value: Value) -> bool:
        """Return True if the value is the fixed one."""
        return same_value(value, self.value)

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Choice:
    """A choice of one of several values, without order."""

    values: tuple[Value, ...]
    times: str | None = None
    """Name of the parameter whose value multiplies this one."""

    def suggest(self, trial: Suggester, name: str) -> Value:
        """Draw one of the values."""
        return trial.suggest_categorical(name, self.values)

    def corners(self) -> list[Value]:
        """Return all values."""
        return list(self.values)

    def contains(self, value: Value) -> bool:
        """Return True if the value is one of the choices."""
        return any(same_value(value, choice) for choice in self.values)

    def __str__(self) -> str:
        return f"one of {list(self.values)}"


@dataclass(frozen=True)
class Range:
    """A number between `low` and `high`, both included."""

    low: float
    high: float
    log: bool
    """True to sample the logarithm uniformly."""

    integer: bool
    """True to sample whole numbers."""

    times: str | None = None
    """Name of the parameter whose value multiplies this one."""

    def suggest(self, trial: Suggester, name: str) -> Value:
        """Draw a number."""
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def corners(self) -> list[Value]:
        """Return both ends."""
        return [int(self.low), int(self.high)] if self.integer else [self.low, self.high]

    def contains(self, value: Value) -> bool:
        """Return True if the value is a number within the range."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"within [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class Cases:
    """A parameter whose kind depends on the value of another parameter."""

    depends_on: str
    cases: tuple[tuple[Value, "Kind"], ...]
    """Value of the other parameter, and the kind that it picks."""

    def pick(self, name: str, values: dict[str, Value]) -> "Kind":
        """Return the kind of the case that applies.

        Args:
            name: name of this parameter, for the error message.
            values: values of the parameters drawn so far.

        Raises:
            ConfigError: the other parameter has a value without a case.
        """
        for value, kind in self.cases:
            if same_value(values[self.depends_on], value):
                return kind
        known = [value for value, _ in self.cases]
        raise ConfigError(f"space.{name}.cases: no case for {self.depends_on} = {values[self.depends_on]}; has {known}")


Kind = Fixed | Choice | Range | Cases
"""Kind of a parameter in the search space."""


def parse_kind(key: str, spec: Any, *, nested: bool = False) -> Kind:
    """Turn one entry of the `space` section into a kind.

    Args:
        key: key of the entry in the config, for error messages.
        spec: value of the entry, as read from YAML.
        nested: True inside `cases`, which cannot hold further cases.

    Raises:
        ConfigError: the entry is of no known kind, or its argument breaks a rule.
    """
    if not isinstance(spec, dict):
        return Fixed(plain_value(spec))
    spec = dict(spec)
    times = spec.pop("times", None)
    for reference, name in (("times", times), ("depends_on", spec.get("depends_on"))):
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"{key}.{reference}: must be the name of a parameter, found {name!r}")
    if "depends_on" in spec and not nested:
        if set(spec) != {"depends_on", "cases"} or times or not isinstance(spec["cases"], dict) or not spec["cases"]:
            raise ConfigError(f"{key}: depends_on takes cases (value -> kind) and nothing else, found {sorted(spec)}")
        cases = [
            (value, parse_kind(f"{key}.cases.{value}", case, nested=True)) for value, case in spec["cases"].items()
        ]
        return Cases(spec["depends_on"], tuple(cases))
    kinds = ("choice", "uniform", "loguniform", "int", "logint")
    if len(spec) != 1 or next(iter(spec)) not in kinds:
        raise ConfigError(f"{key}: must be a value or one of {', '.join(kinds)}, found {list(spec)}")
    kind, argument = next(iter(spec.items()))
    if kind == "choice":
        if not isinstance(argument, list) or not argument:
            raise ConfigError(f"{key}.choice: must be a list of one value or more, found {argument!r}")
        return Choice(tuple(plain_value(value) for value in argument), times)
    return _parse_range(f"{key}.{kind}", kind, argument, times)


def _parse_range(key: str, kind: str, argument: Any, times: str | None) -> Range:
    """Turn `uniform`, `loguniform`, `int` or `logint` with its ends into a range."""
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


def required_parameters(kind: Kind) -> list[str]:
    """Return the names of the parameters that a kind depends on."""
    if isinstance(kind, Cases):
        return [kind.depends_on, *(name for _, case in kind.cases for name in required_parameters(case))]
    return [kind.times] if kind.times is not None else []


def corners(kind: Kind, kinds: dict[str, Kind]) -> list[Value]:
    """Return the extreme values that a parameter can take, those of all cases and with the factor of `times`.

    Args:
        kind: kind of the parameter.
        kinds: parameter name -> kind, of the whole space.

    Raises:
        ConfigError: `times` would multiply a string.
    """
    if isinstance(kind, Cases):
        return [value for _, case in kind.cases for value in corners(case, kinds)]
    if kind.times is None:
        return kind.corners()
    return [
        multiplied(value, kind.times, {kind.times: factor})
        for value in kind.corners()
        for factor in corners(kinds[kind.times], kinds)
    ]


def plain_value(value: Any) -> Value:
    """Return a plain value. Join a list of module names to one string, since Optuna's choices are plain values.

    Raises:
        ConfigError: the value is neither plain nor a list of names.
    """
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(f"space: a value must be a number, a string, true or false, found {value!r}")
    return value


def multiplied(value: Value, times: str | None, values: dict[str, Value]) -> Value:
    """Return the value times that of parameter `times`, or the value itself if `times` is None.

    Raises:
        ConfigError: one of the two values is a string.
    """
    if times is None:
        return value
    other = values[times]
    if isinstance(value, str) or isinstance(other, str):
        raise ConfigError(f"space: `times: {times}` needs numbers, found {value!r} and {other!r}")
    return value * other


def quotient(value: Value, other: Value) -> Value:
    """Return value / other, or NaN if that is no number. NaN is in no range, so the caller's check fails."""
    if isinstance(value, str) or isinstance(other, str) or not other:
        return math.nan
    return value / other


def same_value(one: Value, other: Value) -> bool:
    """Return True if two values are equal. Numbers may differ by rounding; strings and booleans must match in type."""
    if isinstance(one, bool) or isinstance(other, bool) or isinstance(one, str) or isinstance(other, str):
        return type(one) is type(other) and one == other
    return math.isclose(one, other, rel_tol=1e-9)
