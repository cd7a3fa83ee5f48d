"""Merges an adapter into a 4-bit base so that the fine-tune survives, and measures that it did.

Run as `python -m raylora.merge RUN_DIRECTORY` after a search, or on any LoRA adapter of peft as
`python -m raylora.merge --base MODEL --adapter DIR --output DIR [--data.train FILE]`.

The update is far smaller than a quantization step, so adding it to the dequantized NF4 weight and quantizing again
would round it away. Each strategy is measured on validation rows, and the best is written (docs/merge.md).
"""

from pathlib import Path
from typing import Annotated

import typer

from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.cli.command import command, console, new_folder, run_command, split_arguments
from raylora.config.load import build_merge_config
from raylora.data.prepare import prepare_data
from raylora.errors import ConfigError
from raylora.merge.adapter_update import find_adapter
from raylora.merge.run import check_tolerance, choose_device, merge_run, save_best_adapter
from raylora.merge.select import MergeJob, merge_adapter
from raylora.report.merge_tables import show_merge
from raylora.run.atomic import write_json
from raylora.run.directory import RunDirectory

REPORT = "merge.json"


@command
def merge(
    context: typer.Context,
    run_directory: Annotated[Path | None, typer.Argument(help="Folder of a search.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model: Hub id, directory or GGUF file.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter of peft: directory or Hub id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write the merged model to.")] = None,
    merge_tolerance: Annotated[float | None, typer.Option(help="As --merge.tolerance.")] = None,
) -> None:
    """Merge a search's best adapter, or any adapter, and measure what it lost. Any setting: --merge.strategy NAME."""
    run_directory, overrides = split_arguments(run_directory, context.args)
    if merge_tolerance is not None:
        overrides["merge.tolerance"] = str(merge_tolerance)
    if run_directory is not None:
        run = RunDirectory(run_directory)
        save_best_adapter(run)
        result = merge_run(run, overrides)
    elif base is not None and adapter is not None and output is not None:
        output = new_folder(output)
        result = merge_adapter(_job(base, find_adapter(adapter), output, overrides))
        write_json(output / REPORT, result)
    else:
        raise ConfigError("needs the folder of a search, or --base, --adapter and --output")
    show_merge(result, console())
    check_tolerance(result)


def _job(base: str, adapter: Path, output: Path, overrides: dict[str, str]) -> MergeJob:
    config = build_merge_config(base, overrides)
    cache_dir = Path(config.cache_dir).expanduser() if config.cache_dir else output.parent / ".cache"
    tokens_dir = None
    if config.data is not None:
        tokenizer = load_tokenizer(config.base_model, find_checkpoint(config.base_model, cache_dir))
        tokens_dir = prepare_data(config.data, tokenizer, cache_dir).tokens_dir
    forms = config.merge.formats
    return MergeJob(
        base=config.base_model,
        adapter=adapter,
        outputs={form: output if len(forms) == 1 else output / form for form in forms},
        folder=output.parent,
        settings=config.merge,
        cache_dir=cache_dir,
        device=choose_device(config.device),
        tokens_dir=tokens_dir,
        batch_size=config.per_device_eval_batch_size,
    )


if __name__ == "__main__":
    run_command(merge, overrides=True)
