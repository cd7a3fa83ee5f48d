"""Trains many LoRA adapters on one frozen base at once: one forward and one backward pass serve them all.

The rows of all trials are laid end to end, without padding, as one sequence of tokens. Each layer of the base
multiplies all tokens at once. The low-rank update of each trial is added to the trial's own tokens:

    y = W x + scaling * B A dropout(x)                              (LoRA, arXiv:2106.09685, section 4.1)

Only attention looks across tokens, and it gets each row by itself. The base is frozen and no token sees another row.
So the gradient of the summed losses with respect to one adapter is the gradient of its own trial's loss. A trial learns
the same whatever trains beside it.

    pack = Pack(model, names)
    adapter = Adapter(pack.shapes, r=8, scaling=2.0, dropout=0.05, seed=0)
    losses = pack.backward([MicroBatch(adapter, rows, labels, weight=1 / n_tokens, key=step)])
    # adapter.parameters now have gradients, ready for any torch optimizer
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from raylora.base.architecture import dense_weight
from raylora.base.onednn import fast_products
from raylora.training.memory import CHUNK
from raylora.training.packed.adapter import Shapes
from raylora.training.packed.attention import attend_within_rows
from raylora.training.packed.layers import replace_layers
from raylora.training.packed.layout import Layout, MicroBatch


class Pack:
    """A frozen base through which many adapters train. Adapters may join and leave between any two calls.

    The base keeps its modules. Its linear layers get another `forward` until `close` restores their own; so do norms
    and rotary embeddings with `fused_layers`.

    Args:
        model: causal language model with frozen parameters, on any device.
        names: names of the linear layers that adapters may adapt.
        autocast: dtype of activations, e.g. bfloat16 on a GPU; None is the dtype of the parameters. In float16 the
            weights of micro-batches apply to gradients, which needs no loss scaler.
        grouped: True to take the products of adapters of the same shapes in one call, in bfloat16 where
            `has_grouped_products`.
        fused: True to take the products of all adapters by kernels, where `has_fused_products`.
        fused_layers: True to compute norms, rotary embeddings and attention by fewer kernels, where they are known.
        dense: True to keep the base's layers dequantized, in the dtype of activations, until `forget_dense`.
        chunk: positions whose logits are in memory at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: list[str],
        *,
        autocast: torch.dtype | None = None,
        grouped: bool = False,
        fused: bool = False,
        fused_layers: bool = False,
        dense: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        self.model, self._autocast, self._grouped, self._chunk = model, autocast, grouped, chunk
        self.fused = fused
        """True to take the products of all adapters by kernels."""

        self._layers = {name: model.get_submodule(name) for name in names}
        self.shapes: Shapes = {name: _features(layer) for name, layer in self._layers.items()}
        """Layer -> (in_features, out_features)."""

        self._dense: dict[str, Tensor] = {}
        if dense:
            self._dense = {name: dense_weight(layer).to(autocast) for name, layer in self._layers.items()}
        self._layout: Layout | None = None
        self._layer_undo = ExitStack()
        with ExitStack() as undo:  # an error leaves the base as it was
            undo.callback(self._layer_undo.close)
            self.fused_layers = fused_layers
            self._replace(undo)
            self._undo = undo.pop_all()
        model.eval()

    def _replace(self, undo: ExitStack) -> None:
        """Replace the base's linear layers and attention. `undo` learns how to restore them."""
        for index, (name, layer) in enumerate(self._layers.items()):
            layer.forward = self._make_forward(index, name, layer)
            undo.callback(delattr, layer, "forward")  # uncovers the method of the class
        # the embeddings must require a gradient, else autograd leaves the first layers out of the graph
        embeddings = self.model.get_input_embeddings()
        undo.callback(embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_()).remove)
        attention = f"within-rows-{id(self)}"
        ALL_ATTENTION_FUNCTIONS[attention] = self._attend
        undo.callback(ALL_ATTENTION_FUNCTIONS.pop, attention)
        undo.callback(self.model.set_attn_implementation, self.model.config._attn_implementation)
        self.model.set_attn_implementation(attention)

    def close(self) -> None:
        """Restore the base's own layers and attention."""
        self._undo.close()
        self.forget_dense()

    @property
    def fused_layers(self) -> bool:
        """True if norms, rotary embeddings and attention are computed by fewer kernels, where they are known."""
        return self._fused_layers

    @fused_layers.setter
    def fused_layers(self, fused_layers: bool) -> None:
        self._layer_undo.close()
        if fused_layers:
            self._layer_undo.enter_context(replace_layers(self.model))
        self._fused_layers = fused_layers

    @property
    def is_dense(self) -> bool:
        """True if the base's layers are kept dequantized."""
        return bool(self._dense)

    def forget_dense(self) -> None:
        """Dequantize the base's layers in each pass from now on."""
        self._dense.clear()

    def backward(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Add the gradient of each micro-batch's loss to the gradient of its adapter.

        Args:
            micro_batches: rows of any trials; a trial may have several.

        Returns:
            Losses, (n_micro_batches,), float64: weight times the sum over tokens with loss, in nats.
        """
        self._set_training(True)
        try:
            hidden, layout = self._hidden(micro_batches, with_gradient=True)
            nll, grad_hidden = self._cross_entropy(hidden.detach(), layout, with_gradient=True)
            hidden.backward(grad_hidden)
        finally:  # a pass that runs out of memory leaves no factors behind
            self._layout = None
        for group in layout.groups:
            group.add_gradients_to_adapters()
        return layout.weights * layout.sums(nll)

    @torch.no_grad()
    def nll(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Return the negative log-likelihood of each micro-batch, without weight.

        Args:
            micro_batches: rows of any trials.

        Returns:
            (n_micro_batches,), float64: the sum over tokens with loss, in nats.
        """
        self._set_training(False)
        try:
            hidden, layout = self._hidden(micro_batches, with_gradient=False)
        finally:
            self._layout = None
        return layout.sums(self._cross_entropy(hidden, layout, with_gradient=False)[0])

    def _set_training(self, training: bool) -> None:
        """Set training or evaluation mode. Gradient checkpointing needs training mode.

        The base's own dropout stays off: its random draws would make a trial depend on its pack.
        """
        if self.model.training != training:
            self.model.train(training)
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()

    def _hidden(self, micro_batches: list[MicroBatch], *, with_gradient: bool) -> tuple[Tensor, Layout]:
        """Return the last hidden states at positions whose next token has a loss, (n, hidden_size), and the layout."""
        device = self.model.device
        self._layout = layout = Layout(
            micro_batches,
            device,
            self._autocast,
            grouped=self._grouped,
            layers=list(self._layers) if self.fused else None,
            with_gradient=with_gradient,
            weigh_gradients=self._autocast == torch.float16,
        )
        backbone = self.model.get_decoder()  # without the vision tower of a model that has one
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            output = backbone(input_ids=layout.input_ids[None], position_ids=layout.position_ids[None], use_cache=False)
        return output.last_hidden_state[0][layout.predicting], layout

    def _make_forward(self, index: int, name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the forward function that replaces that of a linear layer."""

        def forward(x: Tensor) -> Tensor:
            dtype = self._autocast or x.dtype
            weight = self._dense.get(name)
            return _AdaptedLinear.apply(
                x,
                (lambda: dense_weight(layer).to(dtype)) if weight is None else lambda: weight,
                layer.bias,
                dtype,
                index,
                name,
                self._layout,
            )

        return forward

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Apply `attend_within_rows`, by the signature of transformers' attention interface.

        The mask is ignored, since rows have no padding. There are no attention weights to return.
        """
        assert self._layout is not None
        return attend_within_rows(self._layout, module, query, key, value, flash=self.fused_layers, **options), None

    def _cross_entropy(self, hidden: Tensor, layout: Layout, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the loss of each position and the gradient of the weighted sum, chunk by chunk.

        Each chunk's gradient is computed before the next chunk's logits, so that only one chunk's logits are in memory.

        Args:
            hidden: last hidden states, (n, hidden_size).
            layout: gives targets and weights.
            with_gradient: True to compute the gradient.

        Returns:
            Losses, (n,), in nats; and the gradient with respect to `hidden`, (n, hidden_size), or None.
        """
        head = self.model.get_output_embeddings()
        nll, gradients = [], []
        for states, targets, weights in zip(
            hidden.split(self._chunk),
            layout.targets.split(self._chunk),
            layout.token_weights.split(self._chunk),
            strict=True,
        ):
            with fast_products(states.device):
                logits = head(states)
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            nll.append(-log_p.gather(1, targets[:, None])[:, 0])
            if with_gradient:
                # the gradient of the loss with respect to the logits is softmax - one-hot
                gradient = log_p.exp_()
                gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
                gradient *= weights[:, None].to(gradient.dtype)
                with fast_products(states.device):
                    gradients.append(gradient.to(head.weight.dtype) @ head.weight)
        return torch.cat(nll), torch.cat(gradients).to(hidden.dtype) if with_gradient else None


class _AdaptedLinear(torch.autograd.Function):
    """Frozen linear layer on all tokens, plus scaling * B A dropout(x) on the tokens of each group.

    The factors are not inputs of the graph. Their gradients go straight to the vectors of the optimizer. The backward
    pass dequantizes the weight again, so that the dense weights of only one layer are in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
        index: int,
        name: str,
        layout: Layout | None,
    ) -> Tensor:
        """Compute the output of the layer.

        Args:
            x: (..., in_features).
            weight: gives the frozen weight, (out_features, in_features), of `dtype`.
            bias: frozen, (out_features,), or None.
            dtype: dtype of the product.
            index: index of the layer, which seeds its dropout masks.
            name: name of the layer.
            layout: gives the groups of adapters and the dropout masks; None adds no update.

        Returns:
            (..., out_features), of `dtype`.
        """
        tokens_in = x.flatten(0, -2).to(dtype)
        with fast_products(x.device):
            tokens_out = tokens_in @ weight().t()
        if bias is not None:
            tokens_out += bias.to(dtype)
        groups = [group for group in layout.groups if group.adapts(name)] if layout else []
        mask = layout.dropout_mask(index, tokens_in.shape[1]) if layout and groups else None
        products = [group.add_update(name, index, tokens_in, tokens_out, mask) for group in groups]
        ctx.save_for_backward(tokens_in, mask, *products)
        ctx.weight, ctx.index, ctx.name, ctx.groups, ctx.dtype_in = weight, index, name, groups, x.dtype
        return tokens_out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient with respect to x, and add those of the factors to their adapters."""
        tokens_in, mask, *products = ctx.saved_tensors
        grad_out = grad_output.flatten(0, -2)
        with fast_products(grad_out.device):
            grad_in = grad_out @ ctx.weight().to(grad_out.dtype)
        for group, h in zip(ctx.groups, products, strict=True):
            group.add_gradients(ctx.name, ctx.index, tokens_in, mask, h, grad_out, grad_in)
        return grad_in.unflatten(0, grad_output.shape[:-1]).to(ctx.dtype_in), *(None,) * 6


def _features(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
