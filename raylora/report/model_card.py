"""Writes the model card of an exported model: its origin, its scores and the code that loads it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from raylora.report.evaluation_tables import evaluation_rows
from raylora.report.merge_tables import merge_rows, verdict
from raylora.report.rank_vs_loss import rank_vs_loss
from raylora.report.tables import markdown_table
from raylora.run.atomic import read_json
from raylora.run.directory import RunDirectory
from raylora.run.state import SearchState
from raylora.run.trial_row import TrialRow

LOAD = {
    "nf4": 'AutoModelForCausalLM.from_pretrained("{name}")  # needs bitsandbytes',
    "bf16": 'AutoModelForCausalLM.from_pretrained("{name}", dtype="bfloat16")',
    "residual": (
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), "{name}", subfolder="adapter")'
    ),
    "gguf": "ollama create {name} -f Modelfile  # or: llama-cli -m model-*.gguf",
}
"""Format -> code that loads it."""


def model_card(run: RunDirectory, form: str, name: str) -> str:
    """Return the model card in Markdown, with the metadata of the Hub.

    Args:
        run: run directory of a merged search.
        form: a key of `LOAD`.
        name: Hub id or folder of the exported model.
    """
    config, provenance, state, merge = run.config(), run.provenance(), SearchState.load(run), read_json(run.merge_file)
    base = config.base_model.name
    data = ModelCardData(
        base_model=base if not Path(base).exists() else None,
        library_name="peft" if form == "residual" else "transformers",
        tags=["raylora", "qlora", *(["4-bit", "bitsandbytes"] if form in ("nf4", "residual") else [])],
        pipeline_tag="text-generation",
        license=licence(base),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"A QLoRA fine-tune of {_public(base)}, the best of {state.n_proposed()} trials, as {form}.",
        f"## Load\n\n```python\n{LOAD[form].format(name=name)}\n```",
        f"## Best trial\n\n{_assignment(state.trials[merge['trial']])}",
        *_results(run, merge),
        f"## Rank against loss\n\n{markdown_table(rank_vs_loss(list(state.trials.values()), state.history))}",
        f"## Provenance\n\nBase: {_public(base)}, commit {provenance['base_model_commit'] or 'unknown'}. Its "
        f"licence applies to this model: {licence(base) or 'not named by the base, look it up before sharing'}. "
        f"Data fingerprint: {provenance['data_fingerprint']}. Made with raylora {provenance['raylora']}.",
    ]
    return "\n\n".join(sections) + "\n"


def _results(run: RunDirectory, merge: dict[str, Any]) -> list[str]:
    """Return the sections of the held-out check, if there was one, and of the merge."""
    sections = []
    if run.evaluation_file.is_file():
        sections.append(f"## Held-out check\n\n{markdown_table(evaluation_rows(read_json(run.evaluation_file)))}")
    return [*sections, f"## Merge\n\n{verdict(merge).capitalize()}.\n\n{markdown_table(merge_rows(merge))}"]


def _assignment(best: TrialRow) -> str:
    """Return the hyperparameters of a trial as a table."""
    return markdown_table([{"parameter": key, "value": value} for key, value in best.assignment().model_dump().items()])


def _public(base: str) -> str:
    """Return the name of a base, without its path on this machine."""
    return Path(base).name if Path(base).exists() else base


def licence(base: str) -> str | None:
    """Return the licence that the base's own model card names, or None.

    Args:
        base: Hub id, or path of a local base.
    """
    path = Path(base)
    if path.exists() and not (path / "README.md").is_file():
        return None
    try:
        loaded = ModelCard.load(path / "README.md" if path.exists() else base)
    except (OSError, ValueError):
        return None
    licence: Any = loaded.data.get("license")
    return licence if isinstance(licence, str) else None
