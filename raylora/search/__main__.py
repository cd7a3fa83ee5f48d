"""Finds the best QLoRA fine-tune: search, merge, held-out check and report in one command.

Run as `python -m raylora.search [SPACE.yaml] [--output DIR] [--section.key value ...]`.
"""

import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import ray
import typer
from rich.console import Console

from raylora.cli.command import command, console, run_command, split_arguments
from raylora.config.load import dump_config, load_config
from raylora.config.schema import SearchConfig
from raylora.data.prepare import PreparedData
from raylora.evaluate.heldout import evaluate_run
from raylora.merge.run import check_tolerance, merge_run, save_best_adapter
from raylora.report.page import write_report
from raylora.report.progress import Progress
from raylora.report.screen import print_summary
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory, check_same_data, open_run
from raylora.run.provenance import start
from raylora.run.tables import Records
from raylora.search.plan import Plan, make_plan
from raylora.search.ray.cluster import cluster_devices, connected, local_devices, local_ray
from raylora.search.ray.lane import LaneSettings
from raylora.search.ray.run import run_search, start_broker
from raylora.search.ray.searcher import reconcile
from raylora.search.sampler import Study

DEFAULT_SPACE = Path(__file__).parent.parent / "search_spaces" / "qlora.yaml"


@command
def search(
    context: typer.Context,
    space: Annotated[Path | None, typer.Argument(help="Search space file. [default: qlora.yaml]")] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory. [default: results/NAME-OF-SPACE]")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the search in the run directory.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show settings, trials, memory and lanes, and stop.")] = False,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to use, e.g. auto; none starts a local one.")
    ] = None,
    merge_tolerance: Annotated[float | None, typer.Option(help="As --merge.tolerance.")] = None,
) -> None:
    """Search, then merge and check the best trial. Any setting of the file: --section.key value."""
    space, overrides = split_arguments(space, context.args)
    if merge_tolerance is not None:
        overrides["merge.tolerance"] = str(merge_tolerance)
    space = space or DEFAULT_SPACE
    config = load_config(space, overrides)
    screen = console()
    run = open_run(output or Path("results") / space.stem, config, resume=resume)
    with ExitStack() as stack:
        if address:
            stack.enter_context(connected(address))
        devices = cluster_devices() if address else local_devices()
        plan = make_plan(config, run, devices)
        check_same_data(run, plan.data.fingerprint)
        _show_plan(screen, config, plan)
        if dry_run:
            screen.print("dry run: nothing was started")
            return
        if not address:
            stack.enter_context(local_ray(devices))
        start(run, config, _facts(config, plan))
        _search(run, config, plan, screen)
        _finish(run, plan, screen)


def _search(run: RunDirectory, config: SearchConfig, plan: Plan, screen: Console) -> None:
    records = Records.load(run)
    study = Study(config, file=run.study_file, n_lanes=plan.n_lanes)
    reconcile(study, records)
    broker = start_broker(plan.n_lanes)
    settings = [
        LaneSettings(
            name=str(index),
            broker=broker,
            config=config,
            run_path=run.path,
            tokens_dir=plan.data.tokens_dir,
            slots=plan.slots,
            memory=plan.memory,
            on_gpu=plan.on_gpu,
            threads=plan.threads,
        )
        for index in range(plan.n_lanes)
    ]
    try:
        with Progress(records, config.n_trials(), plan.rungs, screen) as progress:
            run_search(run, settings, plan.rungs, broker, progress, records, study)
            screen.print(progress.summary())
    except KeyboardInterrupt:
        screen.print(f"interrupted; everything is kept. Go on with: --output {run.path} --resume")
        raise


def _finish(run: RunDirectory, plan: Plan, screen: Console) -> None:
    """Merge, check and report; the first two where the lanes were, since a cluster's head may have no GPU."""
    best = save_best_adapter(run)
    screen.print(f"best: trial {best.number}, eval_loss {best.eval_loss:.4f}; adapter in {run.best_adapter}")
    # on a CPU, Ray gives a task as many threads as it asks for CPUs
    on_device = ray.remote(num_cpus=1, num_gpus=1) if plan.on_gpu else ray.remote(num_cpus=plan.node_cpus)
    for what, step in (("merging into the base", merge_run), ("generating on held-out prompts", evaluate_run)):
        screen.print(f"{what} ...")
        ray.get(on_device(step).remote(run))
    write_report(run)
    print_summary(run, screen)
    check_tolerance(read_json(run.merge_file))


def _show_plan(screen: Console, config: SearchConfig, plan: Plan) -> None:
    screen.print(dump_config(config), style="dim")
    show_data(screen, plan.data)
    memory = plan.memory
    screen.print(
        f"trials: {config.n_trials()} of at most {plan.rungs[-1]} steps, validated at steps "
        f"{', '.join(map(str, plan.rungs))}\n"
        f"lanes: {plan.n_lanes} on {'a GPU' if plan.on_gpu else 'the CPU'} each, {plan.threads} threads, up to "
        f"{plan.slots} trials at once\n"
        f"memory, estimated: base {memory.base_mib:.0f} MiB, a trial at most {memory.trial_mib:.0f}; "
        f"{memory.total_mib(plan.slots, plan.tokens_per_pass):.0f} with {plan.slots} of them and "
        f"{plan.tokens_per_pass} tokens a pass"
    )


def show_data(screen: Console, data: PreparedData) -> None:
    """Rows, tokens, lengths, and what was left out."""
    for part, summary in data.summaries.items():
        screen.print(
            f"{part}: {summary.rows} rows, {summary.tokens} tokens ({summary.trained_tokens} bear loss), length median "
            f"{summary.length_p50}, 95 % {summary.length_p95}, longest {summary.length_max}; {summary.n_long} over "
            f"max_length, {summary.n_dropped} dropped"
        )
    if data.n_overlapping or data.n_duplicates:
        screen.print(f"{data.n_overlapping} overlapping training rows left out, {data.n_duplicates} duplicates kept")


def _facts(config: SearchConfig, plan: Plan) -> dict[str, object]:
    return {
        "base_model": config.base_model.name,
        "base_model_commit": plan.commit,
        "data_fingerprint": plan.data.fingerprint,
        "data": {part: asdict(summary) for part, summary in plan.data.summaries.items()},
        "tokens_dir": str(plan.data.tokens_dir),
        "rungs": plan.rungs,
        "on_gpu": plan.on_gpu,
        "n_lanes": plan.n_lanes,
        "seed": config.search.seed,
        "n_cpus": os.cpu_count(),
    }


if __name__ == "__main__":
    run_command(search, overrides=True)
