"""Trains many LoRA adapters on one frozen base at once: one forward and one backward pass serve them all.

The rows of all trials are laid end to end, without padding, as one sequence of tokens. Each layer of the base
multiplies all tokens at once; to the tokens of each trial, the trial's own low-rank update is added:

    y = W x + scaling * B A dropout(x)                              (LoRA, arXiv:2106.09685, section 4.1)

Only attention looks across tokens, and it is given each row by itself. As the base is frozen and no token sees
another row, the gradient of the summed losses with respect to one adapter is the gradient of its own trial's loss:
what a trial learns does not depend on who trains beside it.

    pack = Pack(model, names)
    adapter = Adapter(pack.shapes, r=8, scaling=2.0, dropout=0.05, seed=0)
    losses = pack.backward([MicroBatch(adapter, rows, labels, weight=1 / n_tokens, key=step)])
    # adapter.parameters now hold gradients; any torch optimizer takes it from here
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from raylora.data.tokens import IGNORE
from raylora.memory import CHUNK

Shapes = dict[str, tuple[int, int]]
"""Name of an adapted layer -> (in_features, out_features), in the model's order."""


class Adapter:
    """One trial's low-rank factors: views into two vectors, which are all that an optimizer has to know.

    Args:
        shapes: layers to adapt.
        r: rank.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).
        dropout: drop probability on the input of A, in [0, 1).
        seed: of A's first values and of the dropout masks.
        device: where it lives.
        dtype: its own precision, whatever the base's.
        rank_multiple: the rank is filled up to a multiple of this with zeros, which stay zero: A's new rows get their
            gradient through B's new columns, and the other way round.
    """

    def __init__(
        self,
        shapes: Shapes,
        *,
        r: int,
        scaling: float,
        dropout: float,
        seed: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        rank_multiple: int = 1,
    ) -> None:
        self.r, self.scaling, self.dropout, self.seed = r, scaling, dropout, seed
        rows = rank_multiple * math.ceil(r / rank_multiple)
        self.sizes = (
            {name: (rows, in_features) for name, (in_features, _) in shapes.items()},
            {name: (out_features, rows) for name, (_, out_features) in shapes.items()},
        )
        """Of A and of B in each layer."""

        self.shape = tuple(self.sizes[0].items())
        """Alike for adapters whose products can be taken in one call."""

        self.parameters = [_zeros(sizes, device, dtype) for sizes in self.sizes]
        """A of all layers, and B of all layers, as two vectors."""

        views_A, views_B = (_views(*pair) for pair in zip(self.parameters, self.sizes, strict=True))
        self.lora_A = {name: view.data[:r] for name, view in views_A.items()}
        self.lora_B = {name: view.data[:, :r] for name, view in views_B.items()}
        self._draw_A()

    def _draw_A(self) -> None:
        """A's first values as peft draws them (peft 0.21, LoraLayer.reset_lora_parameters); B starts at zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for view in self.lora_A.values():
                view.copy_(nn.init.kaiming_uniform_(torch.empty(view.shape), a=math.sqrt(5)))

    @property
    def n_parameters(self) -> int:
        """Trained ones."""
        return sum(view.numel() for views in (self.lora_A, self.lora_B) for view in views.values())

    def zero_grad(self) -> None:
        """Clears the gradients in place, since the views must go on pointing at them."""
        for parameter in self.parameters:
            parameter.grad.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The factors under peft's names."""
        return {
            f"base_model.model.{name}.lora_{factor}.weight": view
            for factor, views in (("A", self.lora_A), ("B", self.lora_B))
            for name, view in views.items()
        }


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one trial that go through the base together."""

    adapter: Adapter
    input_ids: list[Tensor]
    """One (length,) int64 tensor per row."""

    labels: list[Tensor]
    """Like `input_ids`; IGNORE where a token bears no loss."""

    weight: float = 1.0
    """Factor of each token's loss: one over the tokens of the whole optimizer step that bear loss."""

    key: int | None = None
    """Counts the trial's micro-batches; with the adapter's seed, it decides the dropout masks. None: no dropout."""

    @property
    def n_tokens(self) -> int:
        return sum(len(row) for row in self.input_ids)


class Pack:
    """A frozen base through which many adapters train. Adapters may come and go between any two calls.

    The base keeps its modules: the updates are added by forward hooks, and `close` leaves it as it was found.

    Args:
        model: causal language model with frozen parameters, on any device.
        names: its linear layers that adapters may adapt.
        autocast: type of activations where that is not the parameters' own, e.g. bfloat16 on a GPU.
        grouped: take the products of adapters of one shape in one call. Launching kernels for each adapter would eat up
            what a pack gains on a GPU; on a CPU there is nothing to launch.
        chunk: positions whose logits exist at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: list[str],
        *,
        autocast: torch.dtype | None = None,
        grouped: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self.model, self._autocast, self._grouped, self._chunk = model, autocast, grouped, chunk
        self.shapes: Shapes = {name: _features(model.get_submodule(name)) for name in names}
        self._layout: _Layout | None = None
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._add_updates(index, name))
            for index, name in enumerate(names)
        ]
        # without a gradient at its very input, the first layers' products would stay out of the graph
        self._handles.append(
            model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        )
        self._attention_before = model.config._attn_implementation
        self._attention = f"within-rows-{id(self)}"
        ALL_ATTENTION_FUNCTIONS[self._attention] = self._attend_within_rows
        model.eval()
        model.set_attn_implementation(self._attention)

    def close(self) -> None:
        """Gives the base back."""
        for handle in self._handles:
            handle.remove()
        self.model.set_attn_implementation(self._attention_before)
        del ALL_ATTENTION_FUNCTIONS[self._attention]

    def backward(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Adds the gradient of each micro-batch's loss to its adapter's.

        Returns:
            (len(micro_batches),) the losses: weight times the sum over tokens, in nats.
        """
        self._train(True)
        hidden, layout = self._hidden(micro_batches)
        nll, grad_hidden = self._cross_entropy(hidden.detach(), layout, with_gradient=True)
        hidden.backward(grad_hidden)
        self._layout = None
        for group in layout.groups:
            group.hand_out_gradients()
        return layout.weights * layout.sums(nll)

    @torch.no_grad()
    def nll(self, micro_batches: list[MicroBatch]) -> Tensor:
        """(len(micro_batches),) negative log-likelihood in nats, summed over the tokens that bear loss."""
        self._train(False)
        hidden, layout = self._hidden(micro_batches)
        self._layout = None
        return layout.sums(self._cross_entropy(hidden, layout, with_gradient=False)[0])

    def _train(self, training: bool) -> None:
        """Gradient checkpointing needs training mode; the base's own dropout would tie a trial to its pack."""
        if self.model.training != training:
            self.model.train(training)
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()

    def _hidden(self, micro_batches: list[MicroBatch]) -> tuple[Tensor, "_Layout"]:
        """(n, hidden_size) last hidden states at the n positions whose next token bears loss."""
        device = self.model.device
        self._layout = layout = _Layout(micro_batches, device, self._autocast, grouped=self._grouped)
        backbone = getattr(self.model, self.model.base_model_prefix)
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            output = backbone(input_ids=layout.input_ids[None], position_ids=layout.position_ids[None], use_cache=False)
        return output.last_hidden_state[0][layout.predicting], layout

    def _add_updates(self, layer: int, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            groups = [group for group in self._layout.groups if name in group.lora_A] if self._layout else []
            return _LowRankUpdates.apply(output, inputs[0], layer, name, groups) if groups else None

        return hook

    def _attend_within_rows(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Causal attention of each row to itself. Arguments and result as in transformers' attention interface.

        Args:
            query, key, value: (1, heads, tokens, head_dim).

        Returns:
            (1, tokens, heads, head_dim).
        """
        assert self._layout is not None
        layout, mask = self._layout, None
        if sliding_window is not None and layout.longest > sliding_window:
            ones = torch.ones(layout.longest, layout.longest, dtype=torch.bool, device=query.device)
            mask = ones.tril() & ones.triu(1 - sliding_window)
        rows = [layout.pad(part[0].transpose(0, 1)).transpose(1, 2) for part in (query, key, value)]
        attended, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, *rows, mask, dropout=0.0, scaling=scaling, is_causal=mask is None, softcap=options.get("softcap")
        )
        return layout.unpad(attended)[None], None

    def _cross_entropy(self, hidden: Tensor, layout: "_Layout", *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Loss of each position, and with it the gradient of the weighted sum, before the next chunk's logits exist.

        Returns:
            (n,) nats; and (n, hidden_size), or None.
        """
        head = self.model.get_output_embeddings()
        nll, gradients = [], []
        for states, targets, weights in zip(
            hidden.split(self._chunk),
            layout.targets.split(self._chunk),
            layout.token_weights.split(self._chunk),
            strict=True,
        ):
            logits = head(states)
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            nll.append(-log_p.gather(1, targets[:, None])[:, 0])
            if with_gradient:
                # d nll / d logits = softmax - one-hot
                gradient = log_p.exp_()
                gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
                gradient *= weights[:, None].to(gradient.dtype)
                gradients.append(gradient.to(head.weight.dtype) @ head.weight)
        return torch.cat(nll), torch.cat(gradients).to(hidden.dtype) if with_gradient else None


@dataclass(frozen=True)
class _Share:
    """The tokens of one micro-batch within the sequence."""

    adapter: Adapter
    tokens: slice
    key: int | None

    @property
    def drops(self) -> bool:
        return self.key is not None and self.adapter.dropout > 0

    def kept(self, layer: int, x: Tensor) -> Tensor:
        """Which entries of one layer's input dropout keeps; its factor 1 / (1 - p) is in `scaling`.

        They follow from the trial's seed, the micro-batch's key and the layer alone, so that they are the same when
        they are drawn again for the backward pass, after a pause, or in another pack. The bits of int64 draws are four
        times as fast as `bernoulli_` on a CPU; p is rounded to 1 / 65536.
        """
        generator = torch.Generator(x.device).manual_seed(hash((self.adapter.seed, self.key, layer)))
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64, device=x.device)
        draws = bits.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
        return draws.view(x.shape) >= round(self.adapter.dropout * 2**16) - 2**15

    @property
    def scaling(self) -> float:
        """Of the update, with dropout's factor."""
        return self.adapter.scaling / (1 - self.adapter.dropout if self.drops else 1.0)


class _Group:
    """Shares of adapters of one shape that lie one behind the other, so that each product of theirs is one call.

    A share that is alone works on its adapter's own memory; the factors of several are stacked for this pass.
    """

    def __init__(self, shares: list[_Share], autocast: torch.dtype | None) -> None:
        self.shares = shares
        self.tokens = slice(shares[0].tokens.start, shares[-1].tokens.stop)
        self._lengths = [share.tokens.stop - share.tokens.start for share in shares]
        self._adapters = [share.adapter for share in shares]
        parameters = [[adapter.parameters[factor] for adapter in self._adapters] for factor in (0, 1)]
        device, self.dtype = parameters[0][0].device, autocast or parameters[0][0].dtype
        sizes = self._adapters[0].sizes
        if len(shares) == 1:
            stacks = [one.detach()[None] for (one,) in parameters]
            self._gradients = [one.grad[None] for (one,) in parameters]
            self.scaling: float | Tensor = shares[0].scaling
        else:
            stacks = [torch.stack([one.detach() for one in several]) for several in parameters]
            self._gradients = [torch.zeros_like(stack) for stack in stacks]
            lengths = torch.tensor(self._lengths)
            self._ends = lengths.cumsum(0).to(device, torch.int32)
            scalings = torch.tensor([share.scaling for share in shares], dtype=self.dtype)
            self.scaling = scalings.repeat_interleave(lengths)[:, None].to(device)
        # (adapters, r, in_features) and (adapters, out_features, r) of each layer
        self.lora_A, self.lora_B = (
            _views(stack.to(self.dtype), size) for stack, size in zip(stacks, sizes, strict=True)
        )
        self.grad_A, self.grad_B = (
            _views(gradient, size) for gradient, size in zip(self._gradients, sizes, strict=True)
        )

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """(tokens, n) @ (adapters, n, m): the tokens of each share times the matrix of its own adapter."""
        return x @ matrices[0] if len(matrices) == 1 else grouped_mm(x, matrices, offs=self._ends)

    def add_times(self, total: Tensor, x: Tensor, matrices: Tensor) -> None:
        """Adds `times`."""
        if len(matrices) == 1 and total.dtype == x.dtype:
            total.addmm_(x, matrices[0])
        else:
            total.add_(self.times(x, matrices))

    def add_outer(self, gradients: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds (n, tokens) @ (tokens, m) of each share to its own of (adapters, n, m)."""
        if len(gradients) == 1 and gradients.dtype == left.dtype:
            gradients[0].addmm_(left.t(), right)
        elif len(gradients) == 1:
            gradients[0].add_(left.t() @ right)
        else:
            gradients.add_(grouped_mm(left.t(), right, offs=self._ends))

    def kept(self, layer: int, x: Tensor) -> Tensor | None:
        """Which entries of one layer's input dropout keeps; None for all."""
        if not any(share.drops for share in self.shares):
            return None
        parts = zip(self.shares, x.split(self._lengths), strict=True)
        masks = [share.kept(layer, part) for share, part in parts]
        return masks[0] if len(masks) == 1 else torch.cat(masks)

    def hand_out_gradients(self) -> None:
        """Where they were gathered for several adapters: adds them to the adapters' own."""
        if len(self.shares) > 1:
            for index, adapter in enumerate(self._adapters):
                for parameter, gradients in zip(adapter.parameters, self._gradients, strict=True):
                    parameter.grad += gradients[index]


class _Layout:
    """Where each row of each micro-batch lies in the sequence."""

    def __init__(
        self, micro_batches: list[MicroBatch], device: torch.device, autocast: torch.dtype | None, *, grouped: bool
    ) -> None:
        # adapters of one shape side by side
        order = list(range(len(micro_batches)))
        if grouped:
            order.sort(key=lambda index: micro_batches[index].adapter.shape)
        placed = [micro_batches[index] for index in order]
        rows = [row for batch in placed for row in batch.input_ids]
        labels = torch.cat([row for batch in placed for row in batch.labels])
        lengths = torch.tensor([len(row) for row in rows])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        n_tokens = [batch.n_tokens for batch in placed]
        stops = list(itertools.accumulate(n_tokens))
        shares = [
            _Share(batch.adapter, slice(stop - n, stop), batch.key)
            for batch, stop, n in zip(placed, stops, n_tokens, strict=True)
        ]
        alike = itertools.groupby(shares, key=lambda share: share.adapter.shape if grouped else share.tokens.start)
        self.groups = [_Group(list(group), autocast) for _, group in alike]
        self.longest = int(lengths.max())
        owner = torch.tensor(order).repeat_interleave(torch.tensor(n_tokens))
        # a position predicts the next token of its row; a row's first token is predicted by none
        bears_loss = labels != IGNORE
        bears_loss[starts] = False
        predicted = bears_loss.nonzero()[:, 0]
        positions = torch.arange(int(ends[-1])) - starts.repeat_interleave(lengths)
        weights = torch.tensor([batch.weight for batch in micro_batches], dtype=torch.float64)

        self.input_ids = torch.cat(rows).to(device)
        self.position_ids = positions.to(device)
        self.predicting = (predicted - 1).to(device)
        self.targets = labels[predicted].to(device)
        self._owner = owner[predicted].to(device)
        self.weights = weights.to(device)
        self.token_weights = weights[owner[predicted]].to(device)
        # where the tokens of (rows, longest) stand that are inside their row
        inside = torch.arange(self.longest) < lengths[:, None]
        self._inside = inside.flatten().nonzero()[:, 0].to(device)
        self._n_rows = len(rows)

    def pad(self, sequence: Tensor) -> Tensor:
        """(tokens, ...) -> (rows, longest, ...). What stands behind a row's end, no causal attention sees."""
        padded = sequence.new_zeros(self._n_rows * self.longest, *sequence.shape[1:])
        return padded.index_copy(0, self._inside, sequence).unflatten(0, (self._n_rows, self.longest))

    def unpad(self, padded: Tensor) -> Tensor:
        """(rows, longest, ...) -> (tokens, ...)."""
        return padded.flatten(0, 1).index_select(0, self._inside)

    def sums(self, values: Tensor) -> Tensor:
        """(n,) values of predicting positions -> their sum for each micro-batch."""
        total = torch.zeros(len(self.weights), dtype=torch.float64, device=values.device)
        return total.index_add_(0, self._owner, values.double())


class _LowRankUpdates(torch.autograd.Function):
    """Adds scaling * B A dropout(x) to the tokens of each group, in place.

    The factors are no inputs of the graph: their gradients are added where the optimizer looks for them.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, layer: int, name: str, groups: list[_Group]) -> Tensor:
        tokens_in, tokens_out = x.flatten(0, -2), output.flatten(0, -2)
        reduced = []
        for group in groups:
            inputs = tokens_in[group.tokens].to(group.dtype)
            h = group.times(_only(group.kept(layer, inputs), inputs), group.lora_A[name].mT).mul_(group.scaling)
            group.add_times(tokens_out[group.tokens], h, group.lora_B[name].mT)
            reduced.append(h)
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, *reduced)
        ctx.layer, ctx.name, ctx.groups = layer, name, groups
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *reduced = ctx.saved_tensors
        tokens_in, tokens_out = x.flatten(0, -2), grad_output.flatten(0, -2)
        grad_x = torch.zeros_like(tokens_in)
        for group, h in zip(ctx.groups, reduced, strict=True):
            inputs, g = (tokens[group.tokens].to(group.dtype) for tokens in (tokens_in, tokens_out))
            kept = group.kept(ctx.layer, inputs)
            grad_h = group.times(g, group.lora_B[ctx.name]).mul_(group.scaling)
            group.add_outer(group.grad_A[ctx.name], grad_h, _only(kept, inputs))
            group.add_outer(group.grad_B[ctx.name], g, h)
            grad_x[group.tokens] = _only(kept, group.times(grad_h, group.lora_A[ctx.name]))
        return grad_output, grad_x.view_as(x), None, None, None


def _only(kept: Tensor | None, x: Tensor) -> Tensor:
    return x if kept is None else x * kept


def _zeros(sizes: dict[str, tuple[int, int]], device: str | torch.device, dtype: torch.dtype) -> nn.Parameter:
    vector = nn.Parameter(torch.zeros(sum(a * b for a, b in sizes.values()), device=device, dtype=dtype))
    vector.grad = torch.zeros_like(vector)
    return vector


def _views(vectors: Tensor, sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """(..., n) cut into one (..., a, b) for each layer."""
    parts = vectors.split([a * b for a, b in sizes.values()], dim=-1)
    return {name: part.unflatten(-1, size) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def _features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
