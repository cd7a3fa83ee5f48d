"""A run directory with two trials, as a search leaves it, or as it is when it is cut off."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raylora.config.schema import SearchConfig
from raylora.run.atomic import write_json, write_text
from raylora.run.directory import RunDirectory
from raylora.run.events import Event, EventLog, Failed, Finished, Paused, Promoted, Started
from raylora.run.provenance import write_provenance
from tests.helpers import LANE, SESSION, proposed, reported

FACTS = {
    "base_model_commit": None,
    "data_fingerprint": "f00d",
    "data": {"train": {"rows": 100}},
    "rungs": [2, 3],
}

TO_FIRST_RUNG: list[Event] = [
    SESSION,
    LANE,
    proposed(0, max_steps=3),
    proposed(1, max_steps=3, r=8),
    Started(0, 1, "0", None),
    Started(1, 1, "0", None),
    reported(0, 2, 2.0, step_losses=[4.0, 3.0], step_learning_rates=[1e-3, 2e-3]),
    Paused(0),
    reported(1, 2, 2.5, step_losses=[4.5, 3.5], step_learning_rates=[1e-3, 2e-3]),
]

TO_THE_END: list[Event] = [
    SESSION,
    LANE,
    Failed(1, "diverged"),
    Promoted(0, 1),
    Started(0, 2, "0", "trials/0000/checkpoint-2"),
    reported(0, 3, 1.5, segment=2, step_losses=[2.0], step_learning_rates=[3e-3]),
    Finished(0),
]


def write_events(run: RunDirectory, events: list[Event]) -> None:
    """Append events, an hour after the start of 1970 and each a second later than the one before."""
    log = EventLog(run.events_file, clock=iter(range(3600, 3700)).__next__)
    for event in events:
        log.append(event)
    log.flush()


def write_scores(run: RunDirectory) -> None:
    """Write what a merge and a held-out check leave."""
    adapter = {"eval_loss": 1.5, "kl_to_adapter": 0.0, "update_kept": {"q_proj": 1.0}}
    forms = {"nf4": {"eval_loss": 1.5625, "size_mib": 1.0}}
    write_json(run.merge_file, {"models": {"adapter": adapter}, "forms": forms, "loss_increase": 0.0, "passed": True})
    write_json(run.evaluation_file, {"models": {"adapter": {"bleu": 50.0}}})
    write_text(run.report_file, "# data https://me:secret@example.com/rows.jsonl?key=hidden\n")


@pytest.fixture
def run(make_config: Callable[..., SearchConfig], tmp_path: Path) -> RunDirectory:
    """Run directory of a search that was cut off at its first rung."""
    run = RunDirectory(tmp_path / "run")
    write_provenance(run, make_config(), FACTS)
    write_events(run, TO_FIRST_RUNG)
    return run
