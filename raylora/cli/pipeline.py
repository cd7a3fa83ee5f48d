"""Goes from settings to a checked merged model: search, merge, held-out check and report."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from shlex import quote

import torch
from rich.console import Console

from raylora.config.load import dump_config
from raylora.config.schema import SearchConfig
from raylora.evaluate.heldout import evaluate_run
from raylora.machine import n_cpus
from raylora.merge.gate import check_tolerance
from raylora.merge.run import merge_run, save_best_adapter
from raylora.quiet import output_into
from raylora.report.page import write_report
from raylora.report.progress import Progress
from raylora.report.screen import print_summary
from raylora.report.stage import Stage
from raylora.report.start import show_plan
from raylora.run.activity import heard, read_activity, write_activity
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory, check_same_data, with_pinned_commits
from raylora.run.events import EventLog, read_events
from raylora.run.parts import pull_events
from raylora.run.provenance import write_provenance
from raylora.run.state import SearchState
from raylora.search.controller import SearchController
from raylora.search.forecast import Sizes
from raylora.search.messages import Pulse
from raylora.search.plan import Plan, make_plan
from raylora.search.ray.cluster import call_on_device, cluster_devices, connected, local_devices, local_ray
from raylora.search.ray.files import share_files
from raylora.search.ray.lane import lane_settings
from raylora.search.ray.run import run_search, start_broker
from raylora.search.speed import Speed, measured_speed, remember_speed, remembered_speed
from raylora.search.views import Views
from raylora.trackers.processes import TrackerProcesses


def run_pipeline(
    run: RunDirectory,
    config: SearchConfig,
    screen: Console,
    *,
    address: str | None,
    dry_run: bool,
    verbose: bool = False,
    quiet: bool = False,
    push: Callable[[], None] = lambda: None,
) -> None:
    """Run a search to its end and merge, check and report its best trial.

    Args:
        run: new run directory, or one to go on with; locked by the caller.
        config: settings.
        screen: shows plan, progress and tables.
        address: Ray cluster to use; None starts a local instance.
        dry_run: show the plan and stop.
        verbose: show all settings before the start.
        quiet: show nothing but the result.
        push: uploads what has changed, if the run directory lies in object storage.

    Raises:
        RayloraError: the settings, data, model or machine do not allow it, or the search or merge failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything is kept.
    """
    result, screen = screen, Console(quiet=True) if quiet else screen
    with ExitStack() as stack:
        if address:
            stack.enter_context(connected(address))
        devices = cluster_devices() if address else local_devices()
        with Stage("reading base and data", screen) as stage, heard(stage.show):
            plan = make_plan(with_pinned_commits(config, run), run, devices)
        check_same_data(run, plan.data.fingerprint)
        if verbose:
            screen.print(dump_config(plan.config), style="dim")
        show_plan(screen, plan, speed=_speed(run, plan))
        if dry_run:
            screen.print("dry run: nothing was started")
            return
        stack.enter_context(output_into(run.logs / "ray.log"))
        if not address:
            stack.enter_context(local_ray(devices, logs=run.logs / "ray"))
        write_provenance(run, plan.config, _facts(plan))
        push()  # a search whose events are in object storage has its settings there
        stack.enter_context(TrackerProcesses(run, plan.config.report_to, result.print))
        provide = share_files(plan.needed) if address else None
        try:
            _search(run, plan, screen, provide)
            _finish(run, plan, screen, provide, push)
        except KeyboardInterrupt:
            screen.print(f"interrupted; everything is kept. Go on with: --output {quote(str(run.location))} --resume")
            raise
    print_summary(run, result)
    check_tolerance(read_json(run.merge_file))


def _search(run: RunDirectory, plan: Plan, screen: Console, provide: Callable[[], None] | None) -> None:
    storage = run.storage
    parts = pull_events(storage.patient(note=screen.print), run.events_file) if storage else None
    events = list(read_events(run.events_file))
    log = EventLog(run.events_file, parts=parts, note=screen.print)
    controller = SearchController(plan.config, plan.rungs, log, events=events, n_lanes=plan.n_lanes)
    broker = start_broker()
    try:
        sizes = Sizes.of(plan.config.training, plan.data.facts())
        with Progress(controller.state, plan.config, plan.rungs, screen, str(run.logs), sizes) as progress:
            views = Views(run, plan.config, controller.state, events, progress.note)
            controller.listen(progress.show)
            controller.listen(views.add)

            def beat(pulses: dict[str, Pulse]) -> None:
                progress.beat(pulses)
                write_activity(run.activity_file, progress.activity())

            run_search(run, lane_settings(run, plan, broker, provide), broker, controller, views, progress.note, beat)
            screen.print(progress.summary())
    finally:
        with suppress(OSError):  # on a disk that takes nothing, the error before it matters
            run.activity_file.unlink(missing_ok=True)


def _finish(
    run: RunDirectory, plan: Plan, screen: Console, provide: Callable[[], None] | None, push: Callable[[], None]
) -> None:
    """Merge, check and report; the first two where the lanes were, since a cluster's head may have no GPU."""
    _remember_speed(run, plan)
    best = save_best_adapter(run)
    screen.print(f"best: trial {best.number}, eval_loss {best.eval_loss:.4f}; adapter in {run.best_adapter}")
    for what, step in (("merging into the base", merge_run), ("generating on held-out prompts", evaluate_run)):
        with Stage(what, screen) as stage:
            push()  # another node may take it up
            call_on_device(
                step,
                run,
                on_gpu=plan.on_gpu,
                n_cpus=plan.node_cpus,
                waiting=partial(_show_activity, stage, run.activity_file),
                provide=provide,
            )
    write_report(run)


def _show_activity(stage: Stage, file: Path) -> None:
    stage.show(read_activity(file))


def _speed(run: RunDirectory, plan: Plan) -> Speed | None:
    """Return the speed that an earlier search has measured here; None if there is none."""
    if plan.on_gpu and not torch.cuda.is_available():
        return None  # the lanes' GPUs are elsewhere
    device = torch.cuda.get_device_name() if plan.on_gpu else "cpu"
    return remembered_speed(run.cache(plan.config), plan.config.base_model, device)


def _remember_speed(run: RunDirectory, plan: Plan) -> None:
    """Keep the speed of this search for the forecast of the next."""
    state = SearchState.load(run)
    speed = measured_speed(state, plan.data.summaries["validation"].tokens)
    device = next((lane.facts["device"] for lane in state.lanes.values() if "device" in lane.facts), None)
    if speed is not None and device is not None:
        remember_speed(run.cache(plan.config), plan.config.base_model, device, speed)


def _facts(plan: Plan) -> dict[str, object]:
    base = plan.config.base_model
    return {
        "base_model": base.name,
        "base_model_commit": base.revision if not Path(base.name).exists() else None,
        "data_fingerprint": plan.data.fingerprint,
        "data": plan.data.facts(),
        "rungs": plan.rungs,
        "on_gpu": plan.on_gpu,
        "n_lanes": plan.n_lanes,
        "hidden_size": plan.hidden_size,
        "model_type": plan.model_type,
        "seed": plan.config.search.seed,
        "n_cpus": n_cpus(),
    }
