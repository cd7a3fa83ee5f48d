"""Turns a search's best adapter into a model directory to share, with a model card; and puts it on the Hub if asked.

Run as `python -m raylora.export RUN_DIRECTORY --format nf4|bf16|residual|gguf --output DIR [--push-to-hub OWNER/NAME]`.
"""

import os
import shutil
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import HfApi, ModelCard, ModelCardData

from raylora.commands import command, console, new_folder, run_command
from raylora.errors import ConfigError, MergeError
from raylora.evaluate import evaluation_rows
from raylora.files import read_json, replacing, write_text
from raylora.merge import merge_rows, merge_run, save_best_adapter, verdict
from raylora.records import Records, TrialRow, rank_vs_loss
from raylora.run_directory import RunDirectory
from raylora.tables import markdown_table


class Format(StrEnum):
    """What can be exported."""

    nf4 = "nf4"
    bf16 = "bf16"
    residual = "residual"
    gguf = "gguf"


CONVERTER = "convert_hf_to_gguf.py"
"""llama.cpp's own script, which knows every architecture's GGUF names and tokenizers."""

LOAD = {
    "nf4": 'AutoModelForCausalLM.from_pretrained("{name}")  # needs bitsandbytes',
    "bf16": 'AutoModelForCausalLM.from_pretrained("{name}", dtype="bfloat16")',
    "residual": (
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), "{name}", subfolder="adapter")'
    ),
    "gguf": "llama-cli -m model-bf16.gguf",
}
"""How a user loads each format."""


@command
def export(
    run_directory: Annotated[Path, typer.Argument(help="Folder of a search.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.nf4,
    llama_cpp: Annotated[Path | None, typer.Option(help="Checkout of llama.cpp, whose converter gguf needs.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Hub repository to put it in, owner/name.")] = None,
    private: Annotated[bool, typer.Option(help="Make the Hub repository private.")] = True,
) -> None:
    """Write the best adapter's merged model with a model card, and put it on the Hub if asked."""
    run, output = RunDirectory(run_directory), new_folder(output)
    converter = _converter(llama_cpp) if format is Format.gguf else None
    merged = _merged(run, "bf16" if format is Format.gguf else format.value)
    with replacing(output) as temporary:
        if converter is None:
            shutil.copytree(merged, temporary)
        else:
            temporary.mkdir()
            _convert(converter, merged, temporary / "model-bf16.gguf")
        name = push_to_hub or output.name
        write_text(temporary / "README.md", model_card(run, format.value, name))
    console().print(f"written: {output}")
    if push_to_hub:
        _push(output, push_to_hub, private)
        console().print(f"on the Hub: {push_to_hub}")


def model_card(run: RunDirectory, form: str, name: str) -> str:
    """What the model is, where it comes from, what it scores, and how to load it; Markdown with Hub metadata."""
    config, provenance, records, merge = run.config(), run.provenance(), Records.load(run), read_json(run.merge_file)
    base = config.base_model.name
    data = ModelCardData(
        base_model=base if not Path(base).exists() else None,
        library_name="peft" if form == "residual" else "transformers",
        tags=["raylora", "qlora", *(["4-bit", "bitsandbytes"] if form in ("nf4", "residual") else [])],
        pipeline_tag="text-generation",
        license=_licence(base),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"A QLoRA fine-tune of {_public(base)}, the best of {len(records.trials)} trials, as {form}.",
        f"## Load\n\n```python\n{LOAD[form].format(name=name)}\n```",
        f"## Best trial\n\n{_assignment(records.trials[merge['trial']])}",
        *_results(run, merge),
        f"## Rank against loss\n\n{markdown_table(rank_vs_loss(list(records.trials.values()), records.history))}",
        f"## Provenance\n\nBase: {_public(base)}, commit {provenance['base_model_commit'] or 'unknown'}. Its "
        f"licence applies to this model: {_licence(base) or 'not named by the base, look it up before sharing'}. "
        f"Data fingerprint: {provenance['data_fingerprint']}. Made with raylora {provenance['raylora']}.",
    ]
    return "\n\n".join(sections) + "\n"


def _results(run: RunDirectory, merge: dict[str, Any]) -> list[str]:
    sections = []
    if run.evaluation_file.is_file():
        sections.append(f"## Held-out check\n\n{markdown_table(evaluation_rows(read_json(run.evaluation_file)))}")
    return [*sections, f"## Merge\n\n{verdict(merge).capitalize()}.\n\n{markdown_table(merge_rows(merge))}"]


def _assignment(best: TrialRow) -> str:
    return markdown_table([{"parameter": key, "value": value} for key, value in best.assignment().model_dump().items()])


def _public(base: str) -> str:
    """A base's name without the path it has on this machine."""
    return Path(base).name if Path(base).exists() else base


def _licence(base: str) -> str | None:
    """The base's licence as its own model card names it; None where it names none."""
    here = Path(base)
    if here.exists() and not (here / "README.md").is_file():
        return None
    try:
        loaded = ModelCard.load(here / "README.md" if here.exists() else base)
    except (OSError, ValueError):
        return None
    licence: Any = loaded.data.get("license")
    return licence if isinstance(licence, str) else None


def _merged(run: RunDirectory, form: str) -> Path:
    """The merged model in one form; merged anew where the search did not write that form."""
    directory = run.merged(form)
    if not directory.is_dir():
        save_best_adapter(run)
        merge_run(run, {"merge.formats": str([*run.config().merge.formats, form])})
    return directory


def _converter(llama_cpp: Path | None) -> Path:
    if llama_cpp is None or not (llama_cpp / CONVERTER).is_file():
        raise ConfigError(f"gguf needs --llama-cpp, a checkout of llama.cpp that holds {CONVERTER}, found {llama_cpp}")
    return llama_cpp / CONVERTER


def _convert(converter: Path, model: Path, output: Path) -> None:
    command = [sys.executable, str(converter), str(model), "--outfile", str(output), "--outtype", "bf16"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    if ended.returncode or not output.is_file():
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise MergeError(f"{converter} ended with {ended.returncode}: {last}; what it needs is in its requirements.txt")


def _push(directory: Path, repository: str, private: bool) -> None:
    try:
        api = HfApi()
        api.whoami()  # says at once if nobody is logged in
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory)
    except Exception as error:  # beside its own errors, the Hub's client lets those of its HTTP library through
        first = str(error).strip().splitlines()[0]
        raise MergeError(f"{repository} could not be put on the Hub: {first}; `hf auth login` first") from error


if __name__ == "__main__":
    run_command(export)
