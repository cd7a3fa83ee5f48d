"""Runs a function as a command: typed options, one line per error, exit codes.

0: done. 1: the work failed. 2: the settings, data, model or machine do not allow it to start. 130: interrupted.
"""

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from safetensors import SafetensorError

from raylora.errors import ConfigError, MergeError, RayloraError, SearchError, TrackerError, TrialError
from raylora.quiet import quiet_libraries
from raylora.run.directory import url_of
from raylora.run.outage import is_of_the_disk

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Typer context settings for commands that take `--section.key value`."""

FAILED, REFUSED, INTERRUPTED = 1, 2, 130

NOT_ALLOWED = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
"""Errors of a path that a command is to read or write, and cannot."""


def command(function: Callable[..., Any]) -> Callable[..., None]:
    """Wrap a command function: quiet libraries, and our errors as one line on standard error."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        quiet_libraries()
        for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too, which a shell's background jobs start without
            signal.signal(number, _interrupt)
        try:
            function(*args, **kwargs)
        except RayloraError as error:
            _show(getattr(error, "cause", error))  # Ray wraps an error of a task into one with its whole traceback
            raise typer.Exit(
                FAILED if isinstance(error, SearchError | TrialError | MergeError | TrackerError) else REFUSED
            ) from error
        except (OSError, SafetensorError) as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, NOT_ALLOWED) and cause.filename is not None:
                _show(f"{cause.filename}: {(cause.strerror or type(cause).__name__).lower()}")
                raise typer.Exit(REFUSED) from error
            if not is_of_the_disk(cause):
                raise
            _show(cause)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error

    return run


def run_command(function: Callable[..., None], *, overrides: bool = False) -> None:
    """Run a command function as the main program of a module."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings=OVERRIDES if overrides else {})(function)
    app()


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """Return the settings of `--section.key value` and `--section.key=value` as key -> value.

    Raises:
        ConfigError: an argument is of neither form.
    """
    overrides = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument}; override a setting by --section.key value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"{argument} needs a value")
            value = rest.pop(0)
        overrides[key] = value
    return overrides


def split_arguments(first: Path | None, rest: list[str]) -> tuple[Path | None, dict[str, str]]:
    """Return an optional first argument and the overrides after it; typer takes an override for one that is left out.

    Raises:
        ConfigError: an override is of no known form.
    """
    if first is not None and str(first).startswith("--"):
        return None, parse_overrides([str(first), *rest])
    return first, parse_overrides(rest)


def new_folder(path: Path) -> Path:
    """Return the folder that a command is to write, as an absolute path.

    Raises:
        ConfigError: it is not empty.
    """
    path = local_path(path).resolve()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} is not empty, and nothing is overwritten; name another folder by --output")
    return path


def local_path(path: Path) -> Path:
    """Return a path that a command is to write to.

    Raises:
        ConfigError: it is a URL.
    """
    if (url := url_of(path)) is not None:
        raise ConfigError(f"--output must be a local path, found {url}")
    return path.expanduser()


def console() -> Console:
    """Return standard output as a console; it is wide if it is no terminal, so that no line is broken in a log."""
    # the stream by itself: `sys.stdout` may be another one while libraries are kept quiet
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def _show(error: BaseException | str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
