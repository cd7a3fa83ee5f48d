"""Compares a merged model with the unmerged adapter: loss, KL divergence of predictions, top-1 agreement."""

import hashlib
from dataclasses import dataclass

import datasets
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from raylora.training.losses import predictions

REFERENCE_BYTES = 2**29
"""Memory for the adapter's logits, in bytes. KL divergence and agreement are taken over the tokens that fit."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of one model with the adapter, over validation tokens with loss."""

    eval_loss: float
    """Validation loss in nats per token."""

    kl_to_adapter: float
    """KL(adapter || model) of the next token in nats, mean over tokens."""

    token_agreement: float
    """Top-1 agreement: share of tokens where both models rank the same next token first, given the same text so far."""

    logits_sha256: str
    """SHA-256 of the logits of the first batch, equal for models that are equal to the last bit."""


class Reference:
    """Predictions of the adapter on a data set. The first model that is compared is the adapter.

    Arguments are those of `losses.eval_loss`.
    """

    def __init__(self, part: datasets.Dataset, *, batch_size: int, pad_token_id: int) -> None:
        self._part, self._batches = part, {"batch_size": batch_size, "pad_token_id": pad_token_id}
        self._logits: list[torch.Tensor] = []
        self._left = REFERENCE_BYTES

    def compare(self, model: PreTrainedModel) -> Comparison:
        """Compare a model with the adapter on the same rows."""
        first = not self._logits
        loss, kl, agreed, n_tokens, n_compared = 0.0, 0.0, 0, 0, 0
        digest = ""
        for number, (logits, targets) in enumerate(predictions(model, self._part, **self._batches)):
            digest = digest or _sha256(logits)
            loss += float(cross_entropy(logits, targets, reduction="sum"))
            n_tokens += len(targets)
            if first:
                self._keep(logits)
            reference = self._logits[number].to(logits.device)
            logits = logits[: len(reference)]
            log_p = logits.log_softmax(-1)
            target_log_p = reference.log_softmax(-1)
            kl += float((target_log_p.exp() * (target_log_p - log_p)).sum())
            agreed += int((log_p.argmax(-1) == target_log_p.argmax(-1)).sum())
            n_compared += len(reference)
        n_tokens, n_compared = max(1, n_tokens), max(1, n_compared)
        return Comparison(loss / n_tokens, kl / n_compared, agreed / n_compared, digest)

    def logits_sha256(self, model: PreTrainedModel) -> str:
        """Return the digest that `compare` would, after the first batch."""
        return _sha256(next(predictions(model, self._part, **self._batches))[0])

    def _keep(self, logits: torch.Tensor) -> None:
        """Keep as many of the logits as fit into the memory that is left."""
        kept = logits[: self._left // (logits.shape[-1] * logits.element_size())]
        self._left -= kept.nbytes
        self._logits.append(kept.cpu())


def _sha256(logits: torch.Tensor) -> str:
    """Return the digest of logits, float32 or float64."""
    return hashlib.sha256(logits.cpu().numpy().tobytes()).hexdigest()
