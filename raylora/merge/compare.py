"""Compares a merged model with the adapter that was merged: loss, divergence of predictions, same next tokens."""

import hashlib
from dataclasses import dataclass

import datasets
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from raylora.training.losses import predictions

REFERENCE_BYTES = 2**29
"""The adapter's logits are kept for as many tokens as fit here; the divergence is taken over those."""


@dataclass(frozen=True)
class Comparison:
    """One model against the adapter, on validation tokens that bear loss."""

    eval_loss: float
    """Nats per token."""

    kl_to_adapter: float
    """Mean KL(adapter || model) of the next token, in nats."""

    token_agreement: float
    """Share of tokens where both would greedily say the same, given the same text so far."""

    logits_sha256: str
    """Of the logits compared: the same for models that are the same to the last bit."""


class Reference:
    """The adapter's predictions on a data set: those of the first model that is compared."""

    def __init__(self, part: datasets.Dataset, *, batch_size: int, pad_token_id: int) -> None:
        """Arguments as of `losses.eval_loss`."""
        self._part, self._batch_size, self._pad_token_id = part, batch_size, pad_token_id
        self._logits: list[torch.Tensor] = []
        self._left = REFERENCE_BYTES

    def compare(self, model: PreTrainedModel) -> Comparison:
        """Runs a model on the same rows."""
        first = not self._logits
        loss, kl, agreed, n_tokens, n_compared = 0.0, 0.0, 0, 0, 0
        digest = hashlib.sha256()
        for number, (logits, targets) in enumerate(
            predictions(model, self._part, batch_size=self._batch_size, pad_token_id=self._pad_token_id)
        ):
            loss += float(cross_entropy(logits, targets, reduction="sum"))
            n_tokens += len(targets)
            if first:
                self._keep(logits)
            reference = self._logits[number].to(logits.device)
            logits = logits[: len(reference)]
            digest.update(logits.cpu().numpy().tobytes())
            mine = logits.log_softmax(-1)
            wanted = reference.log_softmax(-1)
            kl += float((wanted.exp() * (wanted - mine)).sum())
            agreed += int((mine.argmax(-1) == wanted.argmax(-1)).sum())
            n_compared += len(reference)
        n_tokens, n_compared = max(1, n_tokens), max(1, n_compared)
        return Comparison(loss / n_tokens, kl / n_compared, agreed / n_compared, digest.hexdigest())

    def _keep(self, logits: torch.Tensor) -> None:
        kept = logits[: self._left // (logits.shape[-1] * logits.element_size())]
        self._left -= kept.nbytes
        self._logits.append(kept.cpu())
