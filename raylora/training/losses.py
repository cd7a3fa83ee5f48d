"""Validation loss per token, the one figure that searches minimise and merges are judged by."""

from collections.abc import Iterator

import datasets
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from raylora.config.schema import TrainingSection
from raylora.data.rows import IGNORE


def eval_loss(model: PreTrainedModel, part: datasets.Dataset, *, batch_size: int, pad_token_id: int) -> float:
    """Mean cross entropy over all tokens that bear loss, in nats.

    Trainer's own `eval_loss` averages batch means, so it changes with the batch size; this one does not.

    Args:
        model: causal language model, on any device.
        part: columns `input_ids` and `labels`.
        batch_size: rows per forward pass.
        pad_token_id: fills short rows on the right, where causal attention cannot see it.
    """
    total, count = 0.0, 0
    for logits, targets in predictions(model, part, batch_size=batch_size, pad_token_id=pad_token_id):
        total += float(cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / max(1, count)


def predictions(
    model: PreTrainedModel, part: datasets.Dataset, *, batch_size: int, pad_token_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What a model makes of each token that bears loss, in batches: logits (tokens, vocabulary), tokens (tokens,).

    Arguments as of `eval_loss`; rows come in the same order for every model. Logits are at least float32.
    """
    was_training = model.training
    model.eval()
    for input_ids, labels in _batches(part, batch_size, pad_token_id):
        with torch.inference_mode():
            logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits[:, :-1]
            targets = labels[:, 1:].to(logits.device)
            bears_loss = targets != IGNORE
            yield logits[bears_loss].to(torch.promote_types(logits.dtype, torch.float32)), targets[bears_loss]
    model.train(was_training)


def _batches(part: datasets.Dataset, batch_size: int, pad_token_id: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of like length together, (rows, longest) each; padding in labels is IGNORE."""
    rows = part.select_columns(["input_ids", "labels"])
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    for start in range(0, len(order), batch_size):
        batch = [rows[index] for index in order[start : start + batch_size]]
        yield (
            pad([row["input_ids"] for row in batch], pad_token_id),
            pad([row["labels"] for row in batch], IGNORE),
        )


def pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    """Rows of unlike length as one matrix, (rows, longest), filled on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def validated_rows(lengths: list[int], step: int, rungs: list[int], training: TrainingSection) -> list[int]:
    """Validation rows for a trial at a rung, shorter ones first: all at the full budget, often fewer before it.

    One for each row trained on, at most: training on a row takes as long as three forward passes, so that validation
    takes a third of the time of the training that it judges. Fewer rows are spread evenly over the lengths, and are the
    same for all trials at a rung, whatever their batch sizes.

    Args:
        lengths: tokens of each validation row.
        step: optimizer steps done.
        rungs: of the trial; the last is its full budget.
        training: settings that all trials share.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    n_trained = step * training.per_device_train_batch_size * training.gradient_accumulation_steps
    n = len(rows) if step >= rungs[-1] else min(len(rows), n_trained)
    return [rows[i * len(rows) // n] for i in range(n)]
