"""Turns a peft LoRA adapter into what it changes in its base, computed one module at a time without the base.

The base is built without weights; peft itself reads the adapter onto it and merges each layer, so that ranks, scalings,
rsLoRA, DoRA, trained biases and whole trained modules mean here what they mean in peft.
"""

import copy
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from raylora.base.locate import is_hub_id
from raylora.errors import ConfigError, MergeError

CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations whose adapter fits a changed base only, until peft converts it."""


ADAPTER = "default"
"""peft's name for the one adapter of a model."""


FROZEN_COPY = ".base_layer.weight"
"""peft saves the base's embeddings beside a LoRA of them, as they were: their shape must fit, and no more is needed."""


NAMED = 3
"""So many wrong tensors are named in an error."""


def find_adapter(name: str) -> Path:
    """Directory of an adapter; one on the Hub (owner/name) is looked up in the Hub cache, and downloaded if need be.

    Raises:
        ConfigError: there is none.
    """
    directory = Path(name).expanduser()
    if not directory.exists() and is_hub_id(name):
        try:
            directory = Path(snapshot_download(name, allow_patterns="adapter_*"))
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(f"{name} is no directory, nor an adapter that the Hub gives: {first}") from error
    if not (directory / CONFIG_NAME).is_file():
        raise ConfigError(f"{name} is no adapter of peft: it holds no {CONFIG_NAME}")
    return directory


class AdapterUpdate:
    """What one adapter changes."""

    def __init__(self, adapter: Path, config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
        """Reads an adapter; `names` are then those of the base's parameters, `prefix` its `base_model_prefix`.

        Args:
            adapter: directory that peft wrote.
            config: of the base.
            trust_remote_code: run model code that the base carries.

        Raises:
            MergeError: it is no LoRA adapter, or none for this base, or holds a value that is no number.
        """
        settings = _lora_config(adapter)
        tensors = _read(adapter)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            self.names = list(base.state_dict())
            self.prefix = base.base_model_prefix
            self._conv1d = {name for name, module in base.named_modules() if isinstance(module, Conv1D)}
            ends = (base.get_input_embeddings(), base.get_output_embeddings())
            self._ends = [next(name for name, module in base.named_modules() if module is end) for end in ends]
            try:
                self._model = get_peft_model(base, settings, low_cpu_mem_usage=True)
            except ValueError as error:
                raise MergeError(f"{adapter} does not fit the base: {error}") from error
        expected = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        for name in [name for name in tensors if name.endswith(FROZEN_COPY)]:
            expected[name] = self._model.get_parameter(name)
        _check(adapter, tensors, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        _make_room(self._model)
        set_peft_model_state_dict(self._model, tensors)
        self._bare = self._model.get_base_model()

    def is_transposed(self, name: str) -> bool:
        """Whether a module, like GPT-2's Conv1D, keeps its weight as (in_features, out_features)."""
        return name in self._conv1d

    def adds_bias(self, name: str) -> bool:
        """Whether the update of an adapted module has a bias of its own (`lora_bias`)."""
        return any(self._bare.get_submodule(name).lora_bias.values())

    def embeddings(self) -> tuple[str, str]:
        """Names of the input embeddings' and the output head's weights, which are one in a tied model."""
        first, last = self._ends
        return f"{first}.weight", f"{last}.weight"

    def layers(self) -> list[str]:
        """Names of the adapted modules, as in the bare base."""
        return [name for name, module in self._bare.named_modules() if isinstance(module, LoraLayer)]

    def apply(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """AdapterUpdate one adapted module.

        Args:
            name: from `layers`.
            weight: (out_features, in_features), or an embedding's (n_embeddings, dim).
            bias: (out_features,), of a layer that has one.

        Returns:
            Weight and bias, of the same shapes, float32, on the same device.

        Raises:
            MergeError: the sum holds values that are no numbers.
        """
        layer = copy.deepcopy(self._bare.get_submodule(name))  # its weight has no values yet, so this is small
        module = layer.get_base_layer()
        transposed = self.is_transposed(name)
        module.weight = _frozen(weight.float().T.contiguous() if transposed else weight.float().clone())
        if bias is not None:
            trained = self.whole().get(f"{name}.bias")
            module.bias = _frozen(bias.float().clone() if trained is None else trained.to(bias.device).float())
        layer.to(weight.device, torch.float32)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise MergeError(f"the update of {name} holds values that are no finite numbers") from error
        merged = module.weight.data.T if transposed else module.weight.data
        return merged.contiguous(), None if bias is None else module.bias.data

    def whole(self) -> dict[str, torch.Tensor]:
        """Parameters that the adapter replaces (`modules_to_save`, trained biases): name in the bare base -> value."""
        found = {}
        for name, parameter in self._bare.named_parameters():
            kept = f".modules_to_save.{ADAPTER}."
            if kept in name:
                found[name.replace(kept, ".")] = parameter.data
            elif not parameter.is_meta and "lora_" not in name and ".original_module." not in name:
                found[name.replace(".base_layer.", ".")] = parameter.data
        return found


def _frozen(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)


def _lora_config(adapter: Path) -> LoraConfig:
    try:
        settings = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, OSError) as error:
        raise MergeError(f"{adapter} is no adapter of peft: no adapter_config.json that can be read") from error
    if not isinstance(settings, LoraConfig):
        raise MergeError(f"{adapter} must be a LoRA adapter, found {settings.peft_type}")
    settings.inference_mode = False  # so that peft marks what was trained
    initial = settings.init_lora_weights
    if isinstance(initial, str) and initial.startswith(CHANGES_THE_BASE):
        raise MergeError(
            f"{adapter} was started by {initial}, which changes the base; save it with "
            "path_initial_model_for_weight_conversion, which makes it an adapter of the base as it was"
        )
    return settings


def _make_room(model: PeftModel) -> None:
    """Gives the trained parameters memory, and leaves the base without."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))


def _read(adapter: Path) -> dict[str, torch.Tensor]:
    try:
        safe = adapter / SAFETENSORS_WEIGHTS_NAME
        tensors = load_file(safe) if safe.is_file() else torch.load(adapter / WEIGHTS_NAME, weights_only=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise MergeError(f"{adapter} holds no {SAFETENSORS_WEIGHTS_NAME} that can be read: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise MergeError(f"{name} in {adapter} holds values that are no finite numbers")
    return tensors


def _check(adapter: Path, found: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """That the adapter has each tensor that peft would make for this base, in its shape, and no other."""
    wrong = [f"{name} (missing)" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            wrong.append(f"{name} (the base has no such layer)")
        elif tuple(tensor.shape) != expected[name]:
            wrong.append(f"{name} (found {tuple(tensor.shape)}, must be {expected[name]})")
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise MergeError(f"{adapter} is an adapter of another base: {', '.join(wrong[:NAMED])}{more}")
