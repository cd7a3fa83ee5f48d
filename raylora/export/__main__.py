"""Turns a search's best adapter into a model directory with a model card, and uploads it to the Hub if asked.

Run as `python -m raylora.export RUN_DIRECTORY --format nf4|bf16|residual|gguf --output DIR [--gguf-type q4_k_m]
[--push-to-hub OWNER/NAME]`.
"""

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import command, console, new_folder, run_command
from raylora.export.gguf import check_quantizer, convert, find_converter, quantize
from raylora.export.hub import push
from raylora.report.model_card import model_card
from raylora.run.atomic import replacing, write_text
from raylora.run.directory import RunDirectory, existing_run
from raylora.run.holding import held
from raylora.run.state import SearchState


class Format(StrEnum):
    """Formats of an exported model."""

    nf4 = "nf4"
    bf16 = "bf16"
    residual = "residual"
    gguf = "gguf"


class GgufType(StrEnum):
    """Types of the weights in a GGUF file."""

    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_k_m = "q4_k_m"


@command
def export(
    run_directory: Annotated[Path, typer.Argument(help="Folder or URL of a search.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.nf4,
    gguf_type: Annotated[GgufType, typer.Option(help="Type of the weights in a GGUF file.")] = GgufType.bf16,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Checkout of llama.cpp for gguf. [default: its source package, downloaded once]")
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Hub repository to upload to, owner/name.")] = None,
    private: Annotated[bool, typer.Option(help="Make the Hub repository private.")] = True,
) -> None:
    """Write the best adapter's merged model with a model card, and upload it to the Hub if asked."""
    output = new_folder(output)
    run = existing_run(run_directory, folders=True)
    converter = None
    if format is Format.gguf:
        check_quantizer(gguf_type.value, llama_cpp)
        converter = find_converter(llama_cpp, run.cache(run.config()))
    with held(run, console().print):
        merged = _merged(run, "bf16" if format is Format.gguf else format.value)
    with replacing(output) as temporary:
        if converter is None:
            shutil.copytree(merged, temporary)
        else:
            temporary.mkdir()
            _write_gguf(converter, merged, temporary, gguf_type.value, llama_cpp)
        name = push_to_hub or output.name
        write_text(temporary / "README.md", model_card(run, format.value, name))
    console().print(f"written: {output}")
    if push_to_hub:
        push(output, push_to_hub, private)
        console().print(f"on the Hub: {push_to_hub}")


def _write_gguf(converter: Path, merged: Path, directory: Path, file_type: str, llama_cpp: Path | None) -> None:
    """Write a GGUF file and a Modelfile for Ollama."""
    from raylora.export.ollama import write_modelfile  # noqa: PLC0415  # loads transformers

    file = directory / f"model-{file_type}.gguf"
    plain = directory / "model-bf16.gguf"
    convert(converter, merged, plain)
    if file != plain:
        quantize(plain, file, file_type, llama_cpp)
        plain.unlink()
    write_modelfile(directory / "Modelfile", file.name, merged)


def _merged(run: RunDirectory, form: str) -> Path:
    """Return the directory of the merged model in one format.

    Merge again if the search did not write that format, or if trials have finished since the merge.
    """
    from raylora.merge.run import merge_run, save_best_adapter  # noqa: PLC0415  # loads torch

    directory = run.merged(form)
    merge = SearchState.load(run).merge_of(run)
    if merge is None or form not in merge["forms"] or not directory.is_dir():
        save_best_adapter(run)
        merge_run(run, {"merge.formats": str([*run.config().merge.formats, form])})
    return directory


if __name__ == "__main__":
    run_command(export)
