"""Names the linear layers of a base and those that an adapter targets."""

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from raylora.errors import ConfigError


def dense_weight(layer: torch.nn.Module) -> torch.Tensor:
    """(out_features, in_features) weight of a linear layer: turned round for Conv1D, dequantized from 4 bit."""
    weight = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.t() if isinstance(layer, Conv1D) else weight


def linear_shapes(config: PretrainedConfig, *, trust_remote_code: bool = False) -> dict[str, tuple[int, int]]:
    """Module name -> (in_features, out_features) of every linear layer that peft can adapt, but for the output head."""
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
    """Module names for peft's `target_modules`.

    Args:
        targets: `all-linear`, `attention`, `mlp`, or module names joined by commas.
        names: full names of the linear layers, from `linear_shapes`.

    Returns:
        Last parts of the names where they tell the chosen modules apart, else full names.

    Raises:
        ConfigError: no module has a name asked for.
    """
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    if targets == "all-linear":
        return leaves
    if targets == "attention":
        chosen = [name for name in names if "attn" in name or "attention" in name]
    elif targets == "mlp":
        chosen = [name for name in names if not ("attn" in name or "attention" in name)]
    else:
        wanted = targets.split(",")
        unknown = [want for want in wanted if not any(name == want or name.endswith(f".{want}") for name in names)]
        if unknown:
            raise ConfigError(
                f"target_modules: no module is named {', '.join(unknown)}; the model has {', '.join(leaves)}"
            )
        return wanted
    short = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    others = {name.rsplit(".", 1)[-1] for name in names if name not in set(chosen)}
    return chosen if others & set(short) else short


def is_target(name: str, targets: list[str]) -> bool:
    """Whether a module is one of those that `resolve_target_modules` chose, by the rule of peft."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
