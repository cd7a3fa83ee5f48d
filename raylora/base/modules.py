"""Lists the linear layers of a base and those that an adapter targets."""

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from raylora.errors import ConfigError


def dense_weight(layer: torch.nn.Module) -> torch.Tensor:
    """Return the weight of a linear layer as a dense matrix.

    Args:
        layer: `Linear`, bitsandbytes' `Linear4bit` (dequantized here), or GPT-2's `Conv1D` (transposed here).

    Returns:
        (out_features, in_features), in the layer's dtype.
    """
    weight = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.t() if isinstance(layer, Conv1D) else weight


def linear_shapes(config: PretrainedConfig, *, trust_remote_code: bool = False) -> dict[str, tuple[int, int]]:
    """Return the shapes of all linear layers that peft can adapt, except the output head.

    Args:
        config: the base's architecture; no weights are needed.
        trust_remote_code: run model code that the base carries.

    Returns:
        Module name -> (in_features, out_features), in the model's order.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    shapes = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nx, module.nf)
    return shapes


def resolve_target_modules(targets: str, names: list[str]) -> list[str]:
    """Return the module names for peft's `target_modules`.

    Args:
        targets: `all-linear`, `attention`, `mlp`, or module names joined by commas.
        names: full names of the linear layers, from `linear_shapes`.

    Returns:
        The last part of each name if that selects exactly the chosen modules, else full names.

    Raises:
        ConfigError: no module has one of the given names.
    """
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    if targets == "all-linear":
        return leaves
    if targets == "attention":
        chosen = [name for name in names if "attn" in name or "attention" in name]
    elif targets == "mlp":
        chosen = [name for name in names if not ("attn" in name or "attention" in name)]
    else:
        given = targets.split(",")
        unknown = [one for one in given if not any(name == one or name.endswith(f".{one}") for name in names)]
        if unknown:
            raise ConfigError(
                f"target_modules: no module is named {', '.join(unknown)}; the model has {', '.join(leaves)}"
            )
        return given
    short = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    others = {name.rsplit(".", 1)[-1] for name in names if name not in set(chosen)}
    return chosen if others & set(short) else short


def is_target(name: str, targets: list[str]) -> bool:
    """Return True if the module is among `targets`.

    Args:
        name: full name of a module.
        targets: from `resolve_target_modules`.

    Source: the name matching of peft 0.21, `check_target_module_exists` in peft/tuners/tuners_utils.py.
    """
    return any(name == target or name.endswith(f".{target}") for target in targets)
