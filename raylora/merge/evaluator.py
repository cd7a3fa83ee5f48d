"""Measures base, adapter and merged models on the same rows."""

from dataclasses import asdict
from typing import Any

import datasets
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylora.data.rows import load_part
from raylora.data.split import PARTS
from raylora.merge.compare import Reference
from raylora.merge.job import MergeJob
from raylora.training.losses import eval_loss


class MergeEvaluator:
    """Measurements of all models of one merge beside the unmerged adapter. Without rows, nothing is measured."""

    def __init__(self, job: MergeJob, tokenizer: PreTrainedTokenizerBase) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        """`base`, `adapter` or strategy -> its measurements."""

        self.update_kept: dict[str, dict[str, float]] = {}
        """Strategy -> layer -> share of the update in the merged weight."""

        self.skipped: dict[str, str] = {}
        """Strategy that failed -> reason."""

        self.pad_token_id = tokenizer.pad_token_id
        self._batches = {"batch_size": job.batch_size, "pad_token_id": tokenizer.pad_token_id}
        self._parts = {name: load_part(job.tokens_dir, name) for name in PARTS} if job.tokens_dir else {}
        self._reference = Reference(self._parts["validation"], **self._batches) if self._parts else None
        self._measures_heldout = job.measures_heldout

    def set_reference(self, adapter: PeftModel) -> None:
        """Make the adapter the model that others are compared with. Measure it and its base."""
        self.models["adapter"] = self.measure(adapter)
        with adapter.disable_adapter():
            self.models["base"] = self.measure(adapter)

    def measure(self, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
        """Measure a model.

        Returns:
            The fields of `Comparison`, and if the job asks for it `heldout_loss` in nats per token; empty without rows.
        """
        if self._reference is None:
            return {}
        measured = asdict(self._reference.compare(model))
        if self._measures_heldout:
            measured["heldout_loss"] = eval_loss(model, self._parts["heldout"], **self._batches)
        return measured

    def logits_sha256(self, model: PreTrainedModel) -> str:
        """Return the field of `Comparison` of that name, which takes a single batch."""
        assert self._reference is not None
        return self._reference.logits_sha256(model)

    def calibration_rows(self, n_tokens: int) -> datasets.Dataset:
        """Return shuffled training rows of at most `n_tokens` tokens in all, and at least one row."""
        rows = self._parts["train"].shuffle(seed=0)
        for number, row in enumerate(rows):
            n_tokens -= len(row["input_ids"])
            if number and n_tokens < 0:
                return rows.select(range(number))
        return rows
