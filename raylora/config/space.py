"""Turns the `space` section of a search space file into Optuna suggestions and checked assignments.

Kinds: a plain value (fixed), `choice`, `uniform`, `loguniform`, `int` and `logint` (both ends included).
`times: other` multiplies the value by that of another parameter. `depends_on: other` with `cases` picks a kind by the
value of another parameter.
"""

import itertools
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from raylora.config.assignment import REQUIRED, Assignment, Value, hint
from raylora.config.kinds import (
    Cases,
    Choice,
    Fixed,
    Kind,
    Range,
    Suggester,
    corners,
    multiplied,
    parse_kind,
    plain_value,
    quotient,
    required_parameters,
    same_value,
)
from raylora.errors import ConfigError


@dataclass(frozen=True)
class SearchSpace:
    """A parsed search space."""

    kinds: dict[str, Kind]
    """Parameter name -> kind. Each parameter comes after those that it depends on."""

    def suggest(self, trial: Suggester) -> dict[str, Value]:
        """Draw a value for each parameter from an Optuna trial, define-by-run."""
        values: dict[str, Value] = {}
        for name in self.kinds:
            optuna_name, kind = self._resolve(name, values)
            values[name] = multiplied(kind.suggest(trial, optuna_name), kind.times, values)
        return values

    def to_optuna(self, point: dict[str, Value], *, where: str) -> dict[str, Value]:
        """Return a point of the space under Optuna's parameter names, for `study.enqueue_trial`.

        Args:
            point: parameter name -> value. Optuna samples the parameters that are left out.
            where: opens the error message.

        Raises:
            ConfigError: a name is not in the space, or a value is outside it.
        """
        for name in point:
            if name not in self.kinds:
                raise ConfigError(f"{where}: {name} is not in the space{hint(name, self.kinds)}")
        enqueued: dict[str, Value] = {}
        for name in [name for name in self.kinds if name in point]:
            depends_on = getattr(self.kinds[name], "depends_on", None)
            if depends_on is not None:
                _check_named(name, depends_on, point, where)
            optuna_name, kind = self._resolve(name, point)
            if kind.times is not None:
                _check_named(name, kind.times, point, where)
            value = plain_value(point[name])
            if kind.times is not None:
                value = quotient(value, point[kind.times])
            if not kind.contains(value):
                unit = f" times {kind.times}" if kind.times else ""
                raise ConfigError(f"{where}: {name} = {point[name]} must be {kind}{unit}")
            if isinstance(kind, Choice):
                value = next(choice for choice in kind.values if same_value(choice, value))
            if not isinstance(kind, Fixed):
                enqueued[optuna_name] = value
        return enqueued

    def grid(self) -> list[dict[str, Value]]:
        """Return every combination of choices, in the order of the file; the last parameter varies fastest.

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
                values[name] = multiplied(value, getattr(kind, "times", None), values)
            points.append(values)
        return points

    def _resolve(self, name: str, values: dict[str, Value]) -> tuple[str, Fixed | Choice | Range]:
        """Return the name of a parameter in Optuna, and its kind given the values drawn before it."""
        kind = self.kinds[name]
        if isinstance(kind, Cases):
            picked = kind.pick(name, values)
            assert not isinstance(picked, Cases)
            return f"{name}[{values[kind.depends_on]}]", picked
        return (f"{name}/{kind.times}" if kind.times else name), kind


def _check_named(name: str, needs: str, point: dict[str, Value], where: str) -> None:
    """Check that a point names the parameter that another depends on."""
    if needs not in point:
        raise ConfigError(f"{where}: {name} depends on {needs}, which the point must name too")


def parse_space(space: dict[str, Any]) -> SearchSpace:
    """Parse and check the `space` section.

    Args:
        space: parameter name -> entry, as read from YAML.

    Raises:
        ConfigError: a parameter is unknown, missing, of no known kind, or can leave its range.
    """
    if not space:
        raise ConfigError(f"space: must name {', '.join(REQUIRED)}, found nothing")
    for name in space:
        if name not in Assignment.model_fields:
            raise ConfigError(f"space.{name}: unknown parameter{hint(name, Assignment.model_fields)}")
    for name in REQUIRED:
        if name not in space:
            raise ConfigError(f"space.{name}: required, but not given")
    kinds = {name: parse_kind(f"space.{name}", spec) for name, spec in space.items()}
    ordered = SearchSpace(_ordered(kinds))
    for name, kind in kinds.items():
        _check_range(name, kind, kinds)
    return ordered


def _ordered(kinds: dict[str, Kind]) -> dict[str, Kind]:
    """Return the kinds in the order of the file, except that each comes after the parameter it depends on."""
    ordered: dict[str, Kind] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ConfigError(f"space: {' -> '.join([*path, name])} depend on each other")
        for needs in required_parameters(kinds[name]):
            if needs not in kinds:
                raise ConfigError(f"space.{name}: depends on {needs}, which the space does not name")
            visit(needs, (*path, name))
        ordered.setdefault(name, kinds[name])

    for name in kinds:
        visit(name, ())
    return ordered


def _check_range(name: str, kind: Kind, kinds: dict[str, Kind]) -> None:
    """Check the extreme values of a parameter against its rule. Values between them cannot break it."""
    field = Assignment.model_fields[name]
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
    if isinstance(kind, Cases):
        _check_cases(name, kind, kinds)
    for one in [case for _, case in kind.cases] if isinstance(kind, Cases) else [kind]:
        if field.annotation is int and isinstance(one, Range) and not one.integer:
            raise ConfigError(f"space.{name}: takes whole numbers; draw them by `int` or `logint`")
    for value in corners(kind, kinds):
        try:
            if isinstance(value, str) and field.annotation in (int, float):
                raise ConfigError(f"space.{name}: must be a number, found text {value!r}; leave the quotes out")
            adapter.validate_python(value)
        except ValidationError as error:
            rule = error.errors()[0]["msg"].replace("Input should be", "must be")
            raise ConfigError(f"space.{name} = {value!r}: {rule}") from error


def _check_cases(name: str, kind: Cases, kinds: dict[str, Kind]) -> None:
    """Check that there is a case for every value of the other parameter."""
    other = kinds[kind.depends_on]
    of_other = [case for _, case in other.cases] if isinstance(other, Cases) else [other]
    if any(isinstance(one, Range) for one in of_other):
        raise ConfigError(f"space.{name}: depends_on needs a parameter of values or choices, found {kind.depends_on}")
    for value in corners(other, kinds):
        kind.pick(name, {kind.depends_on: value})
