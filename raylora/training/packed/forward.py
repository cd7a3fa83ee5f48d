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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from raylora.base.modules import dense_weight
from raylora.base.onednn import fast_products
from raylora.training.memory import CHUNK
from raylora.training.packed.adapter import Shapes
from raylora.training.packed.layout import Group, Layout, MicroBatch


class Pack:
    """A frozen base through which many adapters train. Adapters may come and go between any two calls.

    The base keeps its modules, of which the linear ones get another `forward`; `close` leaves it as it was found.

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
        self._layers = {name: model.get_submodule(name) for name in names}
        self.shapes: Shapes = {name: _features(layer) for name, layer in self._layers.items()}
        self._layout: Layout | None = None
        for index, (name, layer) in enumerate(self._layers.items()):
            layer.forward = self._adapted(index, name, layer)
        # without a gradient at its very input, the first layers' products would stay out of the graph
        self._handle = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        self._attention_before = model.config._attn_implementation
        self._attention = f"within-rows-{id(self)}"
        ALL_ATTENTION_FUNCTIONS[self._attention] = self._attend_within_rows
        model.eval()
        model.set_attn_implementation(self._attention)

    def close(self) -> None:
        """Gives the base back."""
        for layer in self._layers.values():
            del layer.forward  # the class's own comes back
        self._handle.remove()
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

    def _hidden(self, micro_batches: list[MicroBatch]) -> tuple[Tensor, Layout]:
        """(n, hidden_size) last hidden states at the n positions whose next token bears loss."""
        device = self.model.device
        self._layout = layout = Layout(micro_batches, device, self._autocast, grouped=self._grouped)
        backbone = getattr(self.model, self.model.base_model_prefix)
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            output = backbone(input_ids=layout.input_ids[None], position_ids=layout.position_ids[None], use_cache=False)
        return output.last_hidden_state[0][layout.predicting], layout

    def _adapted(self, index: int, name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """What takes the place of a linear layer's forward."""

        def forward(x: Tensor) -> Tensor:
            groups = [group for group in self._layout.groups if name in group.lora_A] if self._layout else []
            return _AdaptedLinear.apply(x, layer, self._autocast or x.dtype, index, name, groups)

        return forward

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

    def _cross_entropy(self, hidden: Tensor, layout: Layout, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
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
            with fast_products(states.device):
                logits = head(states)
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            nll.append(-log_p.gather(1, targets[:, None])[:, 0])
            if with_gradient:
                # d nll / d logits = softmax - one-hot
                gradient = log_p.exp_()
                gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
                gradient *= weights[:, None].to(gradient.dtype)
                with fast_products(states.device):
                    gradients.append(gradient.to(head.weight.dtype) @ head.weight)
        return torch.cat(nll), torch.cat(gradients).to(hidden.dtype) if with_gradient else None


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer on all tokens, and scaling * B A dropout(x) on the tokens of each group.

    The factors are no inputs of the graph: their gradients are added where the optimizer looks for them. The weight is
    dequantized anew for the backward pass, so that it is in memory one layer at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: nn.Module, dtype: torch.dtype, index: int, name: str, groups: list[Group]
    ) -> Tensor:
        tokens_in = x.flatten(0, -2).to(dtype)
        saved: list[Tensor | None] = [tokens_in]
        with fast_products(x.device):
            tokens_out = tokens_in @ dense_weight(layer).to(dtype).t()
        if layer.bias is not None:
            tokens_out += layer.bias.to(dtype)
        for group in groups:
            inputs = tokens_in[group.tokens].to(group.dtype)
            kept = group.kept(index, inputs)
            h = group.times(_only(kept, inputs), group.lora_A[name].mT).mul_(group.scaling)
            group.add_times(tokens_out[group.tokens], h, group.lora_B[name].mT)
            saved += [kept, h]
        ctx.save_for_backward(*saved)
        ctx.layer, ctx.name, ctx.groups, ctx.dtype_in = layer, name, groups, x.dtype
        return tokens_out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tokens_in, *saved = ctx.saved_tensors
        grad_out = grad_output.flatten(0, -2)
        with fast_products(grad_out.device):
            grad_in = grad_out @ dense_weight(ctx.layer).to(grad_out.dtype)
        for group, kept, h in zip(ctx.groups, saved[::2], saved[1::2], strict=True):
            inputs, g = (tokens[group.tokens].to(group.dtype) for tokens in (tokens_in, grad_out))
            grad_h = group.times(g, group.lora_B[ctx.name]).mul_(group.scaling)
            group.add_outer(group.grad_A[ctx.name], grad_h, _only(kept, inputs))
            group.add_outer(group.grad_B[ctx.name], g, h)
            grad_in[group.tokens].add_(_only(kept, group.times(grad_h, group.lora_A[ctx.name])))
        return grad_in.unflatten(0, grad_output.shape[:-1]).to(ctx.dtype_in), None, None, None, None, None


def _only(kept: Tensor | None, x: Tensor) -> Tensor:
    return x if kept is None else x * kept


def _features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)
