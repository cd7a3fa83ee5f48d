"""Trains one assignment in this process without Ray, for a debugger.

Run as `python -m raylora.trial SPACE.yaml [--output DIR] [--section.key value ...]`.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import command, console, local_path, parse_overrides, run_command
from raylora.cli.spaces import find_space
from raylora.config.load import load_config
from raylora.errors import ConfigError
from raylora.run.directory import open_run
from raylora.run.metrics import RungMetrics
from raylora.run.state import SearchState


@command
def trial(
    context: typer.Context,
    space: Annotated[Path, typer.Argument(help="Search space file.")],
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints. [default: results/trial-NAME]")] = None,
    resume_from: Annotated[Path | None, typer.Option(help="Checkpoint to continue from.")] = None,
) -> None:
    """Train the first assignment of the search. With e.g. --space.r 8, draw it from the changed space."""
    # TRL refuses a 4-bit base where it sees several GPUs
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # these load torch and Ray, which `raylora --help` must not wait for
    import torch  # noqa: PLC0415

    from raylora.search.plan import make_plan  # noqa: PLC0415
    from raylora.search.ray.cluster import local_devices  # noqa: PLC0415
    from raylora.search.sampler import Sampler  # noqa: PLC0415
    from raylora.training.trl import TrlEngine  # noqa: PLC0415

    if resume_from is not None and not resume_from.is_dir():
        raise ConfigError(f"--resume-from names no checkpoint: {resume_from} does not exist")
    space = find_space(space)
    overrides = parse_overrides(context.args)
    if any(key.startswith("space") for key in overrides):
        overrides.setdefault("starting_points", "[]")
    config = load_config(space, overrides)
    screen = console()
    output = local_path(output or Path("results") / f"trial-{space.stem}")
    run = open_run(output, config, resume=resume_from is not None)
    plan = make_plan(config, run, local_devices())
    torch.set_num_threads(plan.threads)
    assignment, _ = Sampler(config, SearchState()).propose(0)
    screen.print(f"assignment: {assignment}")
    device = "cuda:0" if plan.on_gpu else "cpu"
    engine = TrlEngine.load(config, tokens_dir=plan.data.tokens_dir, cache_dir=run.cache(config), device=device)

    def show(report: RungMetrics) -> bool:
        """Print the metrics of a rung, and never stop the trial."""
        screen.print(str(report))
        return False

    engine.fit(
        assignment,
        rungs=plan.rungs,
        directory=run.trial(0),
        report=show,
        resume_from=str(resume_from) if resume_from else None,
    )


if __name__ == "__main__":
    run_command(trial, overrides=True)
