"""Run directories made by hand: their losses, merge and answers are known."""

import json
from pathlib import Path
from typing import Any

from raylora.config.load import dump_config
from raylora.config.schema import SearchConfig
from raylora.run.atomic import write_json, write_text
from raylora.run.directory import RunDirectory
from raylora.run.events import Event, EventLog, Paused, Stopped
from raylora.run.state import SearchState
from tests.helpers import LANE, SESSION, history_of

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> ```{{ 7 * 7 }}'
"""Text that would run, load a picture or end a block if anything read it as more than text."""

SPACE = {"r": {"choice": [4, 16]}, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": {"loguniform": [1e-4, 1e-2]}}

EVENTS: list[Event] = [
    SESSION,
    LANE,
    *history_of(0, {3: 4.0, 9: 1.0}, "finished", learning_rate=1e-3),
    *history_of(1, {3: 5.0, 9: 2.0}, "finished", learning_rate=2e-4, r=16, lora_alpha=32),
    *history_of(2, {3: 6.0}, learning_rate=4e-4),
    Paused(2),
    Stopped(2, HOSTILE),
    *history_of(3, {}, "failed"),
]
"""Four trials. The best has 1.0 at step 9; the one with the published default's values has 2.0 there."""

CONFIG = {"base_model_name_or_path": "x", "hidden_size": 2000, "model_type": "llama"}
"""Hidden size at which the learning-rate rule is 5e-4, whatever its exponent."""

MERGE = {
    "trial": 0,
    "strategy": "calibrated",
    "loss_increase": 0.01,
    "tolerance": 0.02,
    "passed": True,
    "skipped": {},
    "merged_candidates": {"0": 1.01, "1": 2.2},
    "models": {
        "adapter": {"eval_loss": 1.0, "kl_to_adapter": 0.0, "token_agreement": 1.0, "heldout_loss": 1.1},
        "base": {"eval_loss": 500.0, "kl_to_adapter": 4.0, "token_agreement": 0.2, "heldout_loss": 5.1},
        "calibrated": {
            "eval_loss": 1.01,
            "kl_to_adapter": 0.01,
            "token_agreement": 0.9,
            "heldout_loss": 1.2,
            "seconds": 3.0,
        },
        "requantize": {
            "eval_loss": 1.5,
            "kl_to_adapter": 0.3,
            "token_agreement": 0.8,
            "heldout_loss": 1.7,
            "seconds": 1.0,
        },
    },
    "forms": {},
    "update_kept": {
        "calibrated": {
            f"model.layers.{depth}.{name}": 0.5 for depth in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")
        }
    },
}
"""A merge within the tolerance, of two strategies and six layers."""

MODELS = ("base", "adapter", "merged_nf4")


def answer(text: str, match: float) -> dict[str, Any]:
    return {"text": text, "exact_match": match, "chrf": 100 * match, "rouge_l": match}


ANSWERS = [
    {"prompt": HOSTILE, "references": ["light on"], "answers": {name: answer("light on", 1.0) for name in MODELS}},
    {"prompt": "dim it", "references": ["light low"], "answers": {name: answer(HOSTILE, 0.0) for name in MODELS}},
]


def evaluation(match: float = 0.5, low: float = 0.1, high: float = 0.9) -> dict[str, Any]:
    scores = {"heldout_loss": 1.2, "exact_match": match, "bleu": 40.0, "chrf": 50.0, "rouge_l": 0.6}
    intervals = {"heldout_loss": [1.0, 1.4], "exact_match": [low, high], "bleu": [30.0, 50.0], "chrf": [40.0, 60.0]}
    return {
        "n_rows": 2,
        "n_prompts": 2,
        "n_draws": 1000,
        "models": {name: dict(scores) for name in MODELS},
        "intervals": dict.fromkeys(MODELS, intervals),
        "agreement_with_adapter": {"merged_nf4": {"tokens": 1.0, "answers": 1.0, "bleu_p_value": 1.0}},
        "samples": [
            {"prompt": "say", "reference": "hello", **dict.fromkeys(MODELS, "hello world")},
        ],
    }


def make_run(
    folder: Path, config: SearchConfig, events: list[Event] | None = None, fingerprint: str = "abc"
) -> RunDirectory:
    """Write a search that has trained: config, provenance and events."""
    run = RunDirectory(folder)
    write_text(run.config_file, dump_config(config))
    counts = {"rows": 8, "tokens": 80, "n_dropped": 0}
    provenance = {
        "started": "2026-11-27T05:05:37+00:00",
        "command": "search",
        "raylora": "0.1.0",
        "git_commit": None,
        "base_model": "tiny",
        "base_model_commit": None,
        "python": "3.11",
        "platform": "Linux",
        "n_lanes": 1,
        "seed": 0,
        "packages": {"torch": "2.13.0"},
        "data_fingerprint": fingerprint,
        "data": dict.fromkeys(("train", "validation", "heldout"), counts),
        "rungs": [3, 9],
    }
    write_json(run.provenance_file, provenance)
    log = EventLog(run.events_file)
    for event in EVENTS if events is None else events:
        log.append(event)
    log.flush()
    return run


def make_checked_run(folder: Path, config: SearchConfig, **scores: float) -> RunDirectory:
    """Write a search that is merged and checked as well."""
    run = make_run(folder, config)
    finished = [trial.number for trial in SearchState.load(run).finished()]
    write_json(run.merge_file, {**MERGE, "finished": finished})
    write_json(run.merged("nf4") / "config.json", CONFIG)
    write_json(run.evaluation_file, evaluation(**scores))
    write_text(run.answers_file, "".join(json.dumps(line) + "\n" for line in ANSWERS))
    return run
