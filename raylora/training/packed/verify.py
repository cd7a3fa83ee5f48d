"""Checks, when a base is loaded, that a pack computes on this device what the model and peft compute by themselves.

The rows are those of the training data, so that a sliding window or a change of rotary angles shows that only long rows
have. Where the check fails, `raylora.training.choose` falls back to TRL.
"""

import inspect
import math
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from raylora.base.architecture import Architecture
from raylora.data.rows import IGNORE, TokenRows
from raylora.errors import PackingError
from raylora.training.adapted import adapted
from raylora.training.packed.adapter import Adapter
from raylora.training.packed.forward import Pack
from raylora.training.packed.layout import MicroBatch

RANKS = (8, 8, 3)
"""Ranks of the adapters that are compared: two alike and one of other shapes."""

SHORT = 24
"""Tokens of the rows that the adapters train on, so that the check takes seconds on a CPU."""

LAST = 256
"""Tokens of the long row whose loss is compared: its last ones, which a sliding window or other angles change."""

DROPOUT = 0.3
"""Drop probability with which the kernels are compared with torch: a wrong mask shows."""

INITIAL_B = 0.02
"""Standard deviation of B's values, of the order of a trained adapter's."""

LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative difference of a row's loss: the pack sums in another order, and 16-bit types have 8 or 11 bits."""

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Largest relative difference of an adapter's gradient, by its norm.

On SmolLM2's 30 layers, rounding alone makes 4e-6, 0.08 and 0.007. A wrong factor makes 1.
"""


@dataclass(frozen=True)
class Reference:
    """Losses and gradients of a model by itself, and of peft's adapters on it."""

    rows: list[Tensor]
    """Token ids of each row, int64: a long row, and a short one for each adapter."""

    base_nll: list[float]
    """Negative log-likelihood of the last tokens of each row, without an adapter, in nats."""

    has_experts: bool
    """True if the base is a mixture of experts."""

    adapters: list[Adapter]
    adapted_nll: list[float]
    """Negative log-likelihood of each short row, with its adapter, in nats."""

    gradients: list[dict[str, Tensor]]
    """Gradients of these: name of the factor in peft -> its shape, float32."""


def measure_reference(
    model: PreTrainedModel,
    architecture: Architecture,
    data: TokenRows,
    *,
    autocast: torch.dtype | None,
    rank_multiple: int,
    ranks: tuple[int, ...] = RANKS,
) -> Reference:
    """Measure a model before it is packed.

    Args:
        model: frozen base, on any device. It is left as it was.
        architecture: linear layers of the base.
        data: training rows, at least one.
        autocast: dtype of activations; None is the dtype of the parameters.
        rank_multiple: as in `Adapter`.
        ranks: ranks of the adapters.
    """
    by_length = sorted(range(len(data)), key=data.lengths.__getitem__)
    parts = range(1, len(ranks) + 1)
    short = [data.input_ids(by_length[len(by_length) * part // (len(ranks) + 1)])[:SHORT] for part in parts]
    rows = [data.input_ids(by_length[-1]), *short]
    adapters = [
        Adapter(
            architecture.shapes,
            r=r,
            scaling=0.5,
            dropout=0.0,
            seed=seed,
            device=model.device,
            rank_multiple=rank_multiple,
        )
        for seed, r in enumerate(ranks)
    ]
    for adapter in adapters:
        generator = torch.Generator().manual_seed(adapter.seed)
        for view in adapter.lora_B.values():  # B starts at zero, where A would have no gradient
            view.copy_(torch.randn(view.shape, generator=generator) * INITIAL_B)
    with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        with torch.no_grad():
            base_nll = [float(_nll(model, row, LAST)) for row in rows]
        adapted = [_by_peft(model, architecture, *pair) for pair in zip(adapters, short, strict=True)]
    return Reference(
        rows,
        base_nll,
        architecture.n_experts > 0,
        adapters,
        [nll for nll, _ in adapted],
        [gradients for _, gradients in adapted],
    )


def check_pack(pack: Pack, reference: Reference, dtype: torch.dtype) -> None:
    """Compare a pack with a reference.

    Args:
        pack: the same model, packed.
        reference: measured before.
        dtype: dtype of activations, which sets the tolerances.

    Raises:
        PackingError: the pack fails, or computes something else.
    """
    for adapter in reference.adapters:
        adapter.zero_grad()
    try:
        found = pack.nll([MicroBatch(no_adapter(pack), [row], [_last(row)]) for row in reference.rows]).tolist()
        # experts get another number of tokens from another row, so that their sums are rounded in another way
        leak = LOSS_TOLERANCE[dtype] if reference.has_experts else 0.0
        stay_apart = _rows_stay_apart(pack, *reference.rows[1:3], tolerance=leak)
        batches = [
            MicroBatch(adapter, [row], [row], weight=1 / len(row))
            for adapter, row in zip(reference.adapters, reference.rows[1:], strict=True)
        ]
        losses = pack.backward(batches).tolist()
    except PackingError:
        raise
    except Exception as error:  # whatever a model's code raises for rows laid end to end
        raise PackingError(f"the model cannot be packed: {type(error).__name__}: {error}") from error
    if not stay_apart:
        raise PackingError("packed, a row's loss depends on its neighbour, by layers beside attention that mix tokens")
    for row, nll, expected in zip(reference.rows, found, reference.base_nll, strict=True):
        _check_loss(nll, expected, f"a row of {len(row)} tokens", dtype)
    for batch, loss, expected, gradients in zip(
        batches, losses, reference.adapted_nll, reference.gradients, strict=True
    ):
        name = f"an adapter of rank {batch.adapter.r}"
        _check_loss(loss / batch.weight, expected, name, dtype)
        ours = batch.adapter.factors([parameter.grad / batch.weight for parameter in batch.adapter.parameters])
        difference = _norm({factor: ours[factor] - gradients[factor] for factor in gradients}) / _norm(gradients)
        if not difference <= GRADIENT_TOLERANCE[dtype]:
            raise PackingError(f"packed, the gradient of {name} differs from peft's by {difference:.1%}")


def check_kernels(pack: Pack, reference: Reference, dtype: torch.dtype) -> None:
    """Compare the fused products of a pack with those of torch, with dropout.

    Args:
        pack: a pack with fused products.
        reference: gives rows and adapters.
        dtype: dtype of activations, which sets the tolerances.

    Raises:
        PackingError: the kernels fail, or compute something else.
    """
    found = []
    try:
        for pack.fused in (False, True):
            for adapter in reference.adapters:
                adapter.dropout = DROPOUT
                adapter.zero_grad()
            pairs = zip(reference.adapters, reference.rows[1:], strict=True)
            pack.backward([MicroBatch(adapter, [row], [row], 1 / len(row), key=0) for adapter, row in pairs])
            found.append([torch.cat([vector.grad for vector in one.parameters]) for one in reference.adapters])
        for adapter, expected, gradient in zip(reference.adapters, *found, strict=True):
            difference = float((gradient - expected).norm() / expected.norm())
            if not difference <= GRADIENT_TOLERANCE[dtype]:
                what = f"the kernels' gradient of rank {adapter.r}"
                raise PackingError(f"{what} differs from that of torch's products by {difference:.1%}")
    except PackingError:
        raise
    except Exception as error:  # whatever the compiler or the device raises
        raise PackingError(f"{type(error).__name__}: {error}") from error
    finally:
        for adapter in reference.adapters:
            adapter.dropout = 0.0


def no_adapter(pack: Pack) -> Adapter:
    """Return an adapter of no layers."""
    return Adapter({}, r=1, scaling=0.0, dropout=0.0, seed=0, device=pack.model.device)


def _check_loss(found: float, expected: float, what: str, dtype: torch.dtype) -> None:
    """Check that two losses are equal up to rounding."""
    if not abs(found - expected) <= LOSS_TOLERANCE[dtype] * expected:
        raise PackingError(f"packed, the loss of {what} is {found:.6f}, must be {expected:.6f}")


def _nll(model: nn.Module, row: Tensor, last: int) -> Tensor:
    """Return the negative log-likelihood of the last tokens of a row by the model's own forward pass, in nats."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    takes_count = "logits_to_keep" in inspect.signature(base.forward).parameters
    fewer = {"logits_to_keep": last + 1} if takes_count else {}  # all logits of a long row could exceed the memory
    logits = model(input_ids=row[None].to(model.device), use_cache=False, **fewer).logits[0, :-1][-last:]
    return cross_entropy(logits.float(), row[1:][-last:].to(logits.device), reduction="sum")


def _last(row: Tensor) -> Tensor:
    """Return labels for the loss of `_nll`."""
    labels = row.clone()
    labels[:-LAST] = IGNORE
    return labels


def _by_peft(
    model: PreTrainedModel, architecture: Architecture, adapter: Adapter, row: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Return the negative log-likelihood of a row, and its gradients, by peft's own layers."""
    targets = architecture.targets("all-linear")
    settings = LoraConfig(r=adapter.r, lora_alpha=adapter.scaling * adapter.r, target_modules=targets)
    with adapted(model, settings) as peft_model:
        factors = {
            f"base_model.model.{name}.lora_{kind}.weight": getattr(model.get_submodule(name), f"lora_{kind}")["default"]
            for name in architecture.shapes
            for kind in ("A", "B")
        }
        for name, view in adapter.state_dict().items():
            factors[name].weight = nn.Parameter(view.clone())
        nll = _nll(peft_model, row, len(row))
        nll.backward()
        return float(nll.detach()), {name: factor.weight.grad for name, factor in factors.items()}


def _rows_stay_apart(pack: Pack, first: Tensor, second: Tensor, *, tolerance: float) -> bool:
    """Return True if the loss of a row is the same, up to a relative tolerance, whatever its neighbour holds.

    Layers of linear attention or state spaces pass on what they have read, over the border of two rows.
    """

    def losses(*rows: Tensor) -> list[float]:
        return pack.nll([MicroBatch(no_adapter(pack), [row], [row]) for row in rows]).tolist()

    before = losses(first, second)
    after = (losses(first, second.flip(0))[0], losses(first.flip(0), second)[1])
    return all(abs(new - old) <= tolerance * old for new, old in zip(after, before, strict=True))


def _norm(tensors: dict[str, Tensor]) -> float:
    """Return the Euclidean norm of all values."""
    return math.sqrt(sum(float(tensor.float().square().sum()) for tensor in tensors.values()))
