"""Merges an adapter into a 4-bit base so that the fine-tune survives, and measures the result.

Run as `python -m raylora.merge RUN_DIRECTORY` after a search, or on any LoRA adapter of peft as
`python -m raylora.merge --base MODEL --adapter DIR --output DIR [--data.train FILE]`.

The update is far smaller than a step of quantization. The usual merge adds it to the dequantized NF4 weight and
quantizes the sum again, which rounds the update away. Here each strategy is measured on validation rows, and the best
model is written (docs/merge.md).
"""

from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import command, console, new_folder, run_command, split_arguments
from raylora.errors import ConfigError
from raylora.merge.gate import check_tolerance
from raylora.report.merge_tables import show_merge
from raylora.run.directory import existing_run
from raylora.run.holding import held


@command
def merge(
    context: typer.Context,
    run_directory: Annotated[Path | None, typer.Argument(help="Folder or URL of a search.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: Hub id, directory or GGUF file.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter of peft: directory or Hub id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write the merged model to.")] = None,
    merge_tolerance: Annotated[float | None, typer.Option(help="As --merge.tolerance.")] = None,
) -> None:
    """Merge a search's best adapter, or any adapter, and measure what it lost. Any setting: --merge.strategy NAME."""
    run_directory, overrides = split_arguments(run_directory, context.args)
    if merge_tolerance is not None:
        overrides["merge.tolerance"] = str(merge_tolerance)
    if run_directory is not None and (base or adapter or output):
        raise ConfigError("the folder of a search has its own base, adapter and output; leave out one or the other")
    if run_directory is not None:
        run = existing_run(run_directory)
        with held(run, console().print):
            from raylora.merge.run import merge_run, save_best_adapter  # noqa: PLC0415  # loads torch

            save_best_adapter(run)
            result = merge_run(run, overrides)
    elif base is not None and adapter is not None and output is not None:
        from raylora.merge.run import merge_without_search  # noqa: PLC0415  # loads torch

        result = merge_without_search(base, adapter, new_folder(output), overrides)
    else:
        raise ConfigError("needs the folder of a search, or --base, --adapter and --output")
    show_merge(result, console())
    check_tolerance(result)


if __name__ == "__main__":
    run_command(merge, overrides=True)
