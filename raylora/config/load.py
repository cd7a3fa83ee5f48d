"""Turns a search space file and command line values into one frozen, validated `SearchConfig`.

Precedence: the defaults of `schema.py` < the YAML file < `--section.key value` on the command line.
Importing this module loads neither torch nor Ray.
"""

import copy
import difflib
import os
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from raylora.config.schema import MergeConfig, SearchConfig, Section
from raylora.errors import ConfigError

RENAMED = {"data.layout": "data.format"}
"""Former key -> present key, for the error message."""

_S = TypeVar("_S", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML loader that reads `2e-4` as a number and `2026-01-31` as text, as no setting is a date.

    YAML 1.1 reads the first as text, since it has no dot.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> SearchConfig:
    """Read a search space file.

    Args:
        path: YAML file.
        overrides: dotted key -> value as typed on the command line. Texts are taken as they are, others read as YAML.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value breaks a rule.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"search space file not found: {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x}; save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections (base_model, data, space, ...), found {type(values).__name__}")
    return _with_absolute_paths(build_config(_changed(values, overrides or {}, SearchConfig), source=str(path)))


def build_config(values: dict[str, Any], *, source: str) -> SearchConfig:
    """Validate plain values, such as those of a resolved config.

    Args:
        values: section -> key -> value.
        source: opens the error message.

    Raises:
        ConfigError: a key or value breaks a rule.
    """
    return _validated(SearchConfig, values, source)


def change_config(config: SearchConfig, overrides: dict[str, str]) -> SearchConfig:
    """Return the config with some settings changed.

    Args:
        config: unchanged.
        overrides: dotted key -> value as typed on the command line.

    Raises:
        ConfigError: a key or value breaks a rule.
    """
    return build_config(_changed(_plain(config), overrides, SearchConfig), source="command line")


def build_merge_config(base: str, overrides: dict[str, str]) -> MergeConfig:
    """Return the settings of a merge without a search.

    Args:
        base: name of the base model.
        overrides: dotted key -> value as typed on the command line.

    Raises:
        ConfigError: a key or value breaks a rule.
    """
    return _validated(MergeConfig, _changed({"base_model": {"name": base}}, overrides, MergeConfig), "command line")


def _validated(kind: type[_S], values: dict[str, Any], source: str) -> _S:
    """Build a config, with one message for all errors."""
    try:
        return kind.model_validate(values)
    except ConfigError:
        raise
    except ValidationError as error:
        lines = [_explain(item, kind) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def _with_absolute_paths(config: SearchConfig) -> SearchConfig:
    """Return the config with absolute paths of files, since the processes of lanes run in other directories."""

    def absolute(section: Any, *names: str) -> Any:
        found = {name: Path(getattr(section, name)).expanduser() for name in names if getattr(section, name)}
        return section.model_copy(update={name: str(path.resolve()) for name, path in found.items() if _is_local(path)})

    return config.model_copy(
        update={
            "base_model": absolute(config.base_model, "name"),
            "data": absolute(config.data, "train", "validation", "heldout", "chat_template"),
        }
    )


def _is_local(path: Path) -> bool:
    """Return True for a path of this machine, or a pattern of such paths, and False for a Hub id or a URL."""
    # unlike `Path.exists`, this takes names of more characters than a file can have
    return os.path.exists(path) or ("*" in path.name and ":" not in path.parts[0])


def dump_config(config: SearchConfig) -> str:
    """Return the resolved config as YAML, for `parse_config` and `load_config`."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_config(text: str, *, source: str) -> SearchConfig:
    """Return the config that `dump_config` has written.

    Args:
        text: YAML.
        source: opens the error message.

    Raises:
        ConfigError: a key or value breaks a rule.
    """
    return build_config(yaml.load(text, _Loader), source=source)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that writes no text which `_Loader` reads as another value."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _plain(config: SearchConfig) -> dict[str, Any]:
    """Return section -> key -> plain value. The keys of cases in the space stay numbers and booleans."""
    return config.model_dump(mode="json") | {"space": copy.deepcopy(config.space)}


def _changed(values: dict[str, Any], overrides: dict[str, str], kind: type[Section]) -> dict[str, Any]:
    """Apply command line values to the plain values of a config, in place."""
    for key, text in overrides.items():
        _set(values, key, text, is_text=_is_text(kind, key.split(".")))
    return values


def _is_text(kind: Any, keys: list[str]) -> bool:
    """Return True if a key of a config takes text and nothing else, but for null."""
    for key in keys:
        if isinstance(kind, type) and issubclass(kind, Section) and key in kind.model_fields:
            kind = kind.model_fields[key].annotation
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return False
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts} - {NoneType} == {str}


def _set(values: dict[str, Any], key: str, text: str, *, is_text: bool) -> None:
    """Set one dotted key to a value: text as it is typed if it is not quoted, and anything else by YAML."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--{key}: {section} is a value, not a section")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        if not is_text:
            raise ConfigError(f"--{key}: not valid YAML: {text}") from error
        value = text
    is_quoted = isinstance(value, str) and text[0] in "'\""
    is_null = value is None and not text.lstrip().startswith("#")  # which opens a comment
    values[last] = text if is_text and not is_quoted and not is_null else value


def _explain(item: Any, kind: type[BaseModel]) -> str:
    """Return one pydantic error as `key = value: rule`. For an unknown key, name the key that was probably meant."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden" and key in RENAMED:
        return f"{key}: renamed to {RENAMED[key]}"
    if item["type"] == "extra_forbidden":
        known = list(_section(kind, location[:-1]).model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{key}: required, but not given"
    if item["type"] == "value_error":
        named = ".".join(part for part in location if "[" not in part)  # pydantic names our check too
        return f"{named}: {item['ctx']['error']}" if named else str(item["ctx"]["error"])
    rule = item["msg"].replace("Input should be", "must be")
    return f"{key} = {item['input']!r}: {rule}"


def _section(section: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """Return the section that a location leads to."""
    for part in location:
        annotation = section.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        section = annotation
    return section
