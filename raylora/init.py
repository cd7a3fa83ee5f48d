"""Writes a search space file for a model and a data file, with a comment on each line.

Run as `python -m raylora.init [FILE] [--model NAME --data FILE ...]`; what is not given is asked for.
"""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
import yaml

from raylora.cli.command import command, console, local_path, run_command
from raylora.config.load import load_config
from raylora.errors import ConfigError
from raylora.run.atomic import write_text

RANKS = {"quick": [8, 16], "usual": [8, 16, 32, 64]}
TRIALS = {"quick": 9, "usual": 27}
"""Effort -> number of trials: 3 or 9 of them see more than a third of the budget."""

TEMPLATE = """\
# python -m raylora.search {file} --output results/{name}
# What each setting means, and what else can be set: search_spaces/README.md

base_model:
  # Hub id, directory or GGUF file; quantized to NF4 once
  name: {model}

data:
  # file, folder, pattern, s3://..., or Hub data set
  train: {data}
  # tokens of the longest row; longer ones are cut, and counted at the start
  max_length: {max_length}

training:
  # full budget of a trial; or max_steps
  num_train_epochs: 1
  lr_scheduler_type: cosine
  per_device_train_batch_size: 4

space:
  r: {{choice: {ranks}}}
  # 1 or 2 times r
  lora_alpha: {{choice: [1, 2], times: r}}
  lora_dropout: {{uniform: [0.0, 0.1]}}
  # matters most
  learning_rate: {{loguniform: [5e-5, 2e-3]}}

starting_points:
  # the published default, which is tried first
  - {{r: 16, lora_alpha: 32, lora_dropout: 0.05, learning_rate: 2e-4}}

search:
  # all trials; most stop at a ninth or a third of the budget
  n_trials: {n_trials}

evaluation:
  # tokens of the longest answer in the held-out check
  max_new_tokens: {max_new_tokens}
"""


@command
def init(
    file: Annotated[Path, typer.Argument(help="File to write.")] = Path("search.yaml"),
    *,
    model: Annotated[str, typer.Option(prompt="Base model (Hub id, directory or GGUF file)", help="Base model.")],
    data: Annotated[str, typer.Option(prompt="Training rows (file or Hub data set)", help="Training rows.")],
    max_length: Annotated[int, typer.Option(prompt="Longest row in tokens", help="data.max_length.")] = 1024,
    max_new_tokens: Annotated[int, typer.Option(prompt="Longest answer in tokens", help="Held-out check.")] = 256,
    effort: Annotated[
        str, typer.Option(prompt="Effort (quick or usual)", help="quick: 9 trials; usual: 27.")
    ] = "usual",
) -> None:
    """Ask five questions, or take them as options, and write a commented search space file."""
    if effort not in TRIALS:
        raise ConfigError(f"--effort must be quick or usual, found {effort}")
    file = local_path(file)
    if file.exists():
        raise ConfigError(f"{file} is there already, and nothing is overwritten; name another file")
    text = TEMPLATE.format(
        file=file,
        name=file.stem,
        model=_quoted(model),
        data=_quoted(data),
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        ranks=RANKS[effort],
        n_trials=TRIALS[effort],
    )
    write_text(file, text)
    try:
        load_config(file)  # whatever the answers break is named now
    except ConfigError:
        file.unlink()
        raise
    console().print(f"written: {file}\ncheck it: python -m raylora.search {quote(str(file))} --dry-run")


def _quoted(value: str) -> str:
    """Return a text as YAML, quoted where it must be."""
    return yaml.safe_dump(value, width=10_000).removesuffix("...\n").strip()


if __name__ == "__main__":
    run_command(init)
