"""Turns a peft LoRA adapter into the updated weights of its base, one module at a time and without loading the base.

The base is built without weights. peft itself loads the adapter onto it and merges each layer. So ranks, scalings,
rsLoRA, DoRA, trained biases and whole trained modules have the meaning that they have in peft.
"""

import copy
from collections.abc import Collection
from pathlib import Path
from pickle import PickleError

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raylora.base.architecture import without_weights
from raylora.base.locate import is_hub_id
from raylora.base.names import TensorNames
from raylora.errors import ConfigError, MergeError, first_line

CHANGES_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations of peft that change the base, so that the adapter fits no other base until peft converts it."""

ADAPTER = "default"
"""Name that peft gives to the only adapter of a model."""

WRAPPERS = (".original_module.", ".token_adapter.")
"""Parts of names in peft's wrappers that name no parameter of the base."""

BASE_PREFIX = "base_model.model."
"""Prefix of the base's names in the files of an adapter."""

ADAPTER_FILES = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]
"""Patterns of an adapter's files on the Hub: the adapter, its tokenizer and its generation settings."""

MAX_NAMED = 3
"""Largest number of wrong tensors that an error names, to keep it on one line."""


def find_adapter(name: str) -> Path:
    """Return the local directory of an adapter.

    Args:
        name: directory, or Hub id. A Hub id is taken from the Hub cache, or downloaded.

    Raises:
        ConfigError: no adapter of peft is there.
    """
    directory = Path(name).expanduser()
    if not directory.exists() and is_hub_id(name):
        try:
            directory = Path(snapshot_download(name, allow_patterns=ADAPTER_FILES))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{name} is neither a directory nor an adapter on the Hub: {first_line(error)}"
            ) from error
    if not (directory / CONFIG_NAME).is_file():
        raise ConfigError(f"{name} is no adapter of peft: it holds no {CONFIG_NAME}")
    return directory


class AdapterUpdate:
    """Update of one adapter to its base."""

    def __init__(self, adapter: Path, config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
        """Load an adapter.

        Args:
            adapter: directory that peft wrote.
            config: config of the base.
            trust_remote_code: run model code that the base carries.

        Raises:
            MergeError: this is no LoRA adapter, or none of this base, or a value is not finite.
        """
        settings = _lora_config(adapter)
        tensors = read_tensors(adapter)
        base = without_weights(config, trust_remote_code=trust_remote_code)
        self.names = TensorNames(base)
        """Names of the base's tensors, stored and in the model."""

        with torch.device("meta"):
            self._conv1d = {name for name, module in base.named_modules() if isinstance(module, Conv1D)}
            self._embeddings = embedding_modules(base)
            try:
                self._model = get_peft_model(base, settings, low_cpu_mem_usage=True)
            except (ValueError, TypeError) as error:
                raise MergeError(f"{adapter} does not fit the base: {error}") from error
        expected = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        with_embeddings = get_peft_model_state_dict(self._model, save_embedding_layers=True)
        for name in tensors.keys() & with_embeddings.keys() - expected.keys():
            expected[name] = with_embeddings[name]
            if name.removeprefix(BASE_PREFIX) in self.embeddings():  # saved as a whole, so maybe trained
                self._model.get_parameter(name).requires_grad = True
        _check(adapter, tensors, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        _allocate_trained(self._model)
        set_peft_model_state_dict(self._model, tensors)
        self._base = self._model.get_base_model()
        bare = [name for name in self.layers() if self.adds_bias(name) and not self._has_bias(name)]
        if bare:
            raise MergeError(
                f"{adapter} has a bias (lora_bias) for {bare[0]}, which has none in the base; keep it unmerged"
            )

    def is_transposed(self, name: str) -> bool:
        """Return True if a module stores its weight as (in_features, out_features), as GPT-2's Conv1D does."""
        return name in self._conv1d

    def adds_bias(self, name: str) -> bool:
        """Return True if the update of an adapted module has a bias of its own (`lora_bias`)."""
        return any(self._base.get_submodule(name).lora_bias.values())

    def _has_bias(self, name: str) -> bool:
        return getattr(self._base.get_submodule(name).get_base_layer(), "bias", None) is not None

    def embeddings(self) -> tuple[str, str]:
        """Return the names of the weights of input embeddings and output head, which a tied model shares."""
        input_embeddings, output_head = self._embeddings
        return f"{input_embeddings}.weight", f"{output_head}.weight"

    def layers(self) -> list[str]:
        """Return the names of the adapted modules in the base."""
        return [name for name, module in self._base.named_modules() if isinstance(module, LoraLayer)]

    def apply(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the update to the weight and the bias of one adapted module.

        Args:
            name: from `layers`.
            weight: (out_features, in_features); (n_embeddings, dim) for an embedding. Any dtype and device.
            bias: (out_features,); None if the layer has none.

        Returns:
            Weight and bias with the update, in the given shapes, float32, on the given device.

        Raises:
            MergeError: the sum has values that are not finite.
        """
        layer = copy.deepcopy(self._base.get_submodule(name))  # the weight has no memory here, so the copy is small
        module = layer.get_base_layer()
        transposed = self.is_transposed(name)
        module.weight = _frozen(weight.float().T.contiguous() if transposed else weight.float().clone())
        if bias is not None:
            trained = self.replaced_parameters().get(f"{name}.bias")
            module.bias = _frozen(bias.float().clone() if trained is None else trained.to(bias.device).float())
        layer.to(weight.device, torch.float32)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise MergeError(f"the update of {name} has values that are not finite") from error
        merged = module.weight.data.T if transposed else module.weight.data
        return merged.contiguous(), None if bias is None else module.bias.data

    def replaced_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters that the adapter replaces as a whole: `modules_to_save` and trained biases.

        Returns:
            Name in the base -> value.
        """
        found = {}
        for name, parameter in self._base.named_parameters():
            saved = f".modules_to_save.{ADAPTER}."
            if saved in name:
                found[name.replace(saved, ".")] = parameter.data
            elif not parameter.is_meta and not any(part in name for part in ("lora_", *WRAPPERS)):
                found[name.replace(".base_layer.", ".")] = parameter.data
        return found

    def trained_tokens(self) -> dict[str, tuple[list[int], torch.Tensor]]:
        """Return the rows of embeddings that the adapter replaces (`trainable_token_indices`).

        Returns:
            Name of the weight in the base -> token ids, and their rows: (n_tokens, dim).
        """
        found = {}
        for name, module in self._base.named_modules():
            if isinstance(module, TrainableTokensLayer):
                rows = module.trainable_tokens_delta[ADAPTER].data
                weight = f"{name.removesuffix('.token_adapter')}.weight"
                found[weight] = (list(module.token_indices[ADAPTER]), rows)
        return found


def embedding_modules(base: PreTrainedModel) -> tuple[str, str]:
    """Return the names of a base's input embeddings and output head."""
    names = {id(module): name for name, module in base.named_modules()}
    return names[id(base.get_input_embeddings())], names[id(base.get_output_embeddings())]


def _frozen(values: torch.Tensor) -> torch.nn.Parameter:
    """Return a parameter without a gradient."""
    return torch.nn.Parameter(values, requires_grad=False)


def _lora_config(adapter: Path) -> LoraConfig:
    """Read an adapter's settings. Refuse those that are no LoRA, or that need a changed base."""
    try:
        settings = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise MergeError(f"{adapter} is no adapter of peft: its adapter_config.json cannot be read") from error
    if not isinstance(settings, LoraConfig):
        raise MergeError(f"{adapter} must be a LoRA adapter, found {settings.peft_type}")
    settings.inference_mode = False  # so that peft marks the trained parameters by requires_grad
    initial = settings.init_lora_weights
    if isinstance(initial, str) and initial.startswith(CHANGES_THE_BASE):
        raise MergeError(
            f"{adapter} was initialised by {initial}, which changes the base; save it with "
            "path_initial_model_for_weight_conversion, which converts it to an adapter of the original base"
        )
    return settings


def _allocate_trained(model: PeftModel) -> None:
    """Allocate memory for the trained parameters only. The base stays without memory."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))


def read_tensors(adapter: Path, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors, and check that all values are finite.

    Args:
        adapter: directory that peft wrote.
        names: tensors to read, where the adapter has them; None reads all.

    Raises:
        MergeError: the file cannot be read, or a value is not finite.
    """
    try:
        safe = adapter / SAFETENSORS_WEIGHTS_NAME
        if safe.is_file():
            with safe_open(safe, "pt") as file:
                wanted = [name for name in file.keys() if names is None or name in names]  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in wanted}
        else:
            stored = torch.load(adapter / WEIGHTS_NAME, weights_only=True)
            tensors = {name: tensor for name, tensor in stored.items() if names is None or name in names}
    except (OSError, SafetensorError, RuntimeError, PickleError, ValueError, LookupError, AttributeError) as error:
        raise MergeError(
            f"{adapter} holds no {SAFETENSORS_WEIGHTS_NAME} that can be read: {first_line(error)}"
        ) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise MergeError(f"{name} in {adapter} has values that are not finite")
    return tensors


def _check(adapter: Path, found: dict[str, torch.Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Check that the adapter has the tensors that peft makes for this base, in the same shapes, and no others."""
    wrong = [f"{name} (missing)" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            wrong.append(f"{name} (the base has no such layer)")
        elif tuple(tensor.shape) != expected[name]:
            wrong.append(f"{name} (found {tuple(tensor.shape)}, must be {expected[name]})")
    if wrong:
        more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        raise MergeError(f"{adapter} is an adapter of another base: {', '.join(wrong[:MAX_NAMED])}{more}")
