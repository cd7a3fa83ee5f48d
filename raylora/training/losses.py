"""Computes the validation loss per token, which searches minimise and merges are judged by."""

import inspect
from collections.abc import Iterator
from functools import partial

import datasets
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from raylora.config.schema import TrainingSection
from raylora.data.rows import IGNORE
from raylora.training.memory import with_less_memory

LOGITS_BYTES = 2**29
"""Largest size of the logits of a batch in float32, in bytes, unless a single row has more. Our choice."""


def eval_loss(model: PreTrainedModel, part: datasets.Dataset, *, batch_size: int, pad_token_id: int) -> float:
    """Return the mean cross entropy over all tokens with loss, in nats.

    The `eval_loss` of transformers' Trainer averages batch means, so it changes with the batch size. This one does not.

    Args:
        model: causal language model, on any device.
        part: columns `input_ids` and `labels`.
        batch_size: most rows per forward pass. A large vocabulary makes them fewer (`LOGITS_BYTES`).
        pad_token_id: fills short rows on the right, where causal attention cannot see it.

    Returns:
        Nats per token; 0 if no token has a loss.
    """
    total, count = 0.0, 0
    for logits, targets in predictions(model, part, batch_size=batch_size, pad_token_id=pad_token_id):
        total += float(cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / max(1, count)


def row_losses(
    model: PreTrainedModel, part: datasets.Dataset, *, batch_size: int, pad_token_id: int
) -> list[tuple[float, int]]:
    """Return the summed cross entropy of each row, in nats, and its number of tokens with loss.

    Arguments are those of `eval_loss`, which is the sum of the first over the sum of the second.
    """
    tokens = torch.cat(
        [
            cross_entropy(logits, targets, reduction="none").double().cpu()
            for logits, targets in predictions(model, part, batch_size=batch_size, pad_token_id=pad_token_id)
        ]
    )
    return [(float(row.sum()), len(row)) for row in _by_row(tokens, part)]


def likeliest_tokens(
    model: PreTrainedModel, part: datasets.Dataset, *, batch_size: int, pad_token_id: int
) -> list[list[int]]:
    """Return the token that a model ranks first at each position with loss, given the tokens of the row before it.

    Arguments are those of `eval_loss`.

    Returns:
        Token ids of each row, as many as it has tokens with loss.
    """
    tokens = torch.cat(
        [
            logits.argmax(-1).cpu()
            for logits, _ in predictions(model, part, batch_size=batch_size, pad_token_id=pad_token_id)
        ]
    )
    return [row.tolist() for row in _by_row(tokens, part)]


def _by_row(tokens: torch.Tensor, part: datasets.Dataset) -> list[torch.Tensor]:
    """Return what `predictions` gave of each token with loss, (n_tokens,), as one tensor for each row."""
    order, labels = _shortest_first(part), part["labels"]
    counts = [sum(label != IGNORE for label in labels[index][1:]) for index in order]
    rows = dict(zip(order, tokens.split(counts), strict=True))
    return [rows[index] for index in sorted(rows)]


def predictions(
    model: PreTrainedModel, part: datasets.Dataset, *, batch_size: int, pad_token_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a model's predictions of all tokens with loss, batch by batch.

    Arguments are those of `eval_loss`. Rows come in the same order for every model.

    Yields:
        Logits (n_tokens, vocabulary), float32 or float64; and the tokens to predict (n_tokens,), int64.
    """
    was_training = model.training
    model.eval()
    n_tokens = LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)
    for input_ids, labels in _batches(part, batch_size, n_tokens, pad_token_id):
        loss_mask = labels[:, 1:] != IGNORE
        logits = with_less_memory(partial(_predict, model, input_ids, loss_mask), len(input_ids))
        yield logits, labels[:, 1:][loss_mask].to(logits.device)
    model.train(was_training)


@torch.inference_mode()
def _predict(model: PreTrainedModel, input_ids: torch.Tensor, loss_mask: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Return the logits at positions whose next token has a loss.

    Args:
        model: causal language model.
        input_ids: (rows, tokens), int64.
        loss_mask: (rows, tokens - 1), bool.
        n_rows: rows per forward pass.

    Returns:
        (n, vocabulary), float32 or float64.
    """
    found = []
    for ids, mask in zip(input_ids.split(n_rows), loss_mask.split(n_rows), strict=True):
        positions = mask.any(0).nonzero()[:, 0]  # prompts are spared the head
        wanted = {"logits_to_keep": positions.to(model.device)} if _keeps_logits(model) else {}
        logits = model(input_ids=ids.to(model.device), use_cache=False, **wanted).logits
        mask = mask[:, positions] if wanted else torch.nn.functional.pad(mask, (0, 1))
        found.append(logits[mask.to(logits.device)].to(torch.promote_types(logits.dtype, torch.float32)))
    return found[0] if len(found) == 1 else torch.cat(found)


def _keeps_logits(model: PreTrainedModel) -> bool:
    """Return True if the model computes logits at chosen positions only, as nearly all of transformers do."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _batches(
    part: datasets.Dataset, batch_size: int, n_tokens: int, pad_token_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of rows of similar length, with at most `n_tokens` tokens with loss unless one row has more.

    Yields:
        Token ids (rows, longest) and labels (rows, longest), both int64. Padding in labels is IGNORE.
    """
    rows = part.select_columns(["input_ids", "labels"])
    batch: list[dict[str, list[int]]] = []
    left = n_tokens
    for index in _shortest_first(rows):
        row = rows[index]
        count = sum(label != IGNORE for label in row["labels"])
        if batch and (len(batch) == batch_size or count > left):
            yield _padded(batch, pad_token_id)
            batch, left = [], n_tokens
        batch.append(row)
        left -= count
    if batch:
        yield _padded(batch, pad_token_id)


def _padded(batch: list[dict[str, list[int]]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and labels of rows as matrices."""
    return pad([row["input_ids"] for row in batch], pad_token_id), pad([row["labels"] for row in batch], IGNORE)


def _shortest_first(part: datasets.Dataset) -> list[int]:
    """Return the indexes of the rows by length."""
    lengths = list(map(len, part["input_ids"]))
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    """Return rows of different lengths as one matrix.

    Args:
        rows: token ids or labels of each row.
        fill: pads short rows on the right.

    Returns:
        (rows, longest), int64.
    """
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def validated_rows(lengths: list[int], step: int, rungs: list[int], training: TrainingSection) -> list[int]:
    """Return the validation rows for a trial at a rung: all at the full budget, often fewer before it.

    Before the full budget, validation takes at most one row per row trained on. Training on a row takes as long as
    three forward passes. So validation takes at most a third of the time of the training before it.

    A smaller set is spread evenly over the row lengths. It is the same for all trials at a rung, whatever their batch
    sizes.

    Args:
        lengths: tokens of each validation row.
        step: optimizer steps done.
        rungs: rungs of the trial in optimizer steps; the last is the full budget.
        training: settings that all trials share.

    Returns:
        Indexes into `lengths`, shortest row first.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    n_trained = step * training.per_device_train_batch_size * training.gradient_accumulation_steps
    n = len(rows) if step >= rungs[-1] else min(len(rows), n_trained)
    return [rows[i * len(rows) // n] for i in range(n)]
