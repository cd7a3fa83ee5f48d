"""Says in ten lines what a search is about to do."""

from rich.console import Console

from raylora.config.schema import SearchConfig
from raylora.data.prepare import PreparedData
from raylora.report.progress import duration
from raylora.run.state import SearchState
from raylora.search.forecast import Forecaster, Sizes
from raylora.search.plan import Plan
from raylora.search.speed import Speed
from raylora.training.memory import Fit

LABEL = 9
"""Width of the labels."""


def show_plan(screen: Console, plan: Plan, speed: Speed | None = None) -> None:
    """Show base, data, space, trials, lanes, memory and time, a line each; then what looks wrong.

    Args:
        screen: terminal to print to.
        plan: the search.
        speed: what an earlier search has measured on this device; None if none has.
    """
    for label, text in (
        _base(plan),
        *_data(plan.data),
        *_space(plan.config),
        *_trials(plan),
        ("time", _time(plan, speed)),
    ):
        screen.print(f"{label:{LABEL}} {text}")
    for line in (*plan.data.notes(), *plan.notes):
        screen.print(line)


def _base(plan: Plan) -> tuple[str, str]:
    base = plan.config.base_model
    commit = f" at {base.revision[:8]}" if base.revision else ""
    return "base", f"{base.name}{commit}, {base.quantization}, {plan.memory.base_mib:,.0f} MiB"


def _data(data: PreparedData) -> list[tuple[str, str]]:
    """Return a line for the training rows and one for the rest."""
    train, validation, heldout = (data.summaries[part] for part in ("train", "validation", "heldout"))
    left_out = {"over max_length": train.n_long, "dropped": train.n_dropped, "overlapping": data.n_overlapping}
    left_out |= {"duplicates kept": data.n_duplicates}
    counts = "".join(f"; {n} {what}" for what, n in left_out.items() if n)
    return [
        (
            "data",
            f"{train.rows:,} rows, {train.tokens:,} tokens, {train.trained_tokens:,} with loss; length "
            f"{train.length_p50} (median), {train.length_max} (longest){counts}",
        ),
        ("", f"{validation.rows:,} rows for validation, {heldout.rows:,} held out"),
    ]


def _space(config: SearchConfig) -> list[tuple[str, str]]:
    """Return a line for each parameter that is searched."""
    searched = {name: kind for name, kind in config.space.items() if isinstance(kind, dict)}
    labels = ["space", *[""] * (len(searched) - 1)]
    return [(label, f"{name}: {_kind(kind)}") for label, (name, kind) in zip(labels, searched.items(), strict=False)]


def _kind(kind: dict) -> str:
    """Return one entry of the space in words."""
    rest = {key: value for key, value in kind.items() if key != "times"}
    ((name, values), *_) = rest.items()
    text = ", ".join(map(str, values)) if name == "choice" else f"{name} {values}"
    return f"{text}, times {kind['times']}" if "times" in kind else text


def _trials(plan: Plan) -> list[tuple[str, str]]:
    """Return a line each for trials, lanes and memory."""
    memory, threads = plan.memory, "" if plan.on_gpu else f" of {plan.threads} threads"
    full = Fit(plan.slots, plan.tokens_per_pass, plan.config.training.gradient_checkpointing is True)
    device = "GPU" if plan.on_gpu else "CPU"
    return [
        (
            "trials",
            f"{plan.config.n_trials()} of at most {plan.rungs[-1]} steps, validated at steps "
            f"{', '.join(map(str, plan.rungs))}",
        ),
        ("lanes", f"{plan.n_lanes} on a {device}{threads}, up to {plan.slots} trials at once on each"),
        (
            "memory",
            f"about {memory.total_mib(full):,.0f} MiB a lane, of which {memory.trial_mib:,.0f} for each trial and "
            f"{plan.tokens_per_pass:,} tokens a pass",
        ),
    ]


def _time(plan: Plan, speed: Speed | None) -> str:
    """Return the time that training and validation will take, if the speed is known."""
    forecast = Forecaster(plan.config, plan.rungs).forecast(SearchState(), 0.0)
    steps = f"{forecast.steps_left:,} steps of all trials together"
    if speed is None:
        return f"unknown before the first steps; about {steps}"
    sizes = Sizes.of(plan.config.training, plan.data.facts())
    training = forecast.steps_left * sizes.step / speed.tokens_per_second
    seconds = training + forecast.reports_left * speed.seconds_per_report * sizes.validation
    return (
        f"{duration(seconds / plan.n_lanes)} for about {steps}, at the speed of {speed.measured}; merge and held-out "
        "check come after"
    )
