"""Turns a Hub id, a local directory or a GGUF file into a frozen base model, quantized once and cached as NF4."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import gguf
import torch
from filelock import FileLock
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from raylora.config import BaseModelSection
from raylora.errors import BaseModelError, ConfigError
from raylora.files import replacing

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def is_gguf(section: BaseModelSection) -> bool:
    """Whether the base model is a GGUF file."""
    return section.name.lower().endswith(".gguf")


def compute_dtype(section: BaseModelSection, device: str) -> torch.dtype:
    """Type of activations and of expanded weights: as set, else bfloat16 on a GPU and float32 on a CPU."""
    if section.compute_dtype != "auto":
        return getattr(torch, section.compute_dtype)
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def find_checkpoint(section: BaseModelSection, cache_dir: Path) -> str:
    """Directory or Hub id of the base in transformers' own format; a GGUF file is converted once, to bfloat16.

    Raises:
        BaseModelError: the path is missing, holds no weights, or is no readable GGUF file.
    """
    path = Path(section.name).expanduser()
    if is_gguf(section):
        return str(_converted_gguf(path, cache_dir))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(f"{path} holds no config.json, so it is no model directory of transformers")
        if not any(next(path.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
            raise BaseModelError(f"{path} holds no weights: must hold one of {', '.join(WEIGHT_PATTERNS)}")
        return str(path)
    if not is_hub_id(section.name):
        raise BaseModelError(f"base model not found: {section.name} is no directory, GGUF file or Hub id (owner/name)")
    return section.name


def is_hub_id(name: str) -> bool:
    """Whether a name can be one of the Hub's, `owner/name`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def load_model_config(section: BaseModelSection, checkpoint: str) -> PretrainedConfig:
    """The base's architecture, without its weights."""
    with _explained(section):
        return AutoConfig.from_pretrained(checkpoint, **_source_options(section))


def load_tokenizer(section: BaseModelSection, checkpoint: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a pad token.

    Where it has none, EOS pads: labels and attention masks are built from lengths, so that no EOS is ever
    mistaken for padding.
    """
    with _explained(section):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **_source_options(section))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BaseModelError(f"the tokenizer of {section.name} has neither a pad token nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(section: BaseModelSection, cache_dir: Path, device: str) -> PreTrainedModel:
    """The frozen base on one device: NF4 from the cache (quantized first if need be), or unquantized.

    Args:
        section: which model, and how.
        cache_dir: holds converted and quantized bases.
        device: `cpu` or `cuda:0`.

    Raises:
        BaseModelError: it cannot be found or loaded.
    """
    dtype = compute_dtype(section, device)
    checkpoint = find_checkpoint(section, cache_dir)
    options = _source_options(section)
    with _explained(section):
        if section.quantization == "nf4":
            nf4 = nf4_checkpoint(section, cache_dir, device)
            checkpoint, options = nf4, options if nf4 == checkpoint else {}
        model = load_plain(checkpoint, device, dtype, attn_implementation=section.attn_implementation, **options)
    model.requires_grad_(False)
    return model


def nf4_checkpoint(section: BaseModelSection, cache_dir: Path, device: str) -> str:
    """Directory or Hub id of the base in NF4: as it is where it is quantized already, else from the cache."""
    checkpoint = find_checkpoint(section, cache_dir)
    with _explained(section):
        if is_quantized(load_model_config(section, checkpoint)):
            return checkpoint
        return str(_quantized(section, checkpoint, cache_dir, device))


def load_plain(checkpoint: str, device: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """What any user of transformers would do: `from_pretrained` on one device, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map={"": device}, **options).eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weight at the first forward in evaluation mode,
            # for a bfloat16 kernel without a backward pass: from then on training gets no gradient through the layer.
            # See docs/design.md, "The CPU kernel that stops training".
            module.support_avx512bf16_for_cpu = False
    return model


def dense_weight(layer: torch.nn.Module) -> torch.Tensor:
    """(out_features, in_features) weight of a linear layer: turned round for Conv1D, dequantized from 4 bit."""
    weight = layer.weight
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.t() if isinstance(layer, Conv1D) else weight


def is_quantized(config: PretrainedConfig) -> bool:
    """Whether the checkpoint is quantized already, so that no 16-bit original is at hand."""
    return getattr(config, "quantization_config", None) is not None


def nf4_config(section: BaseModelSection, dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's 4-bit settings (arXiv:2305.14314, sections 2 and 3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


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


def _source_options(section: BaseModelSection) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if section.revision is not None:
        options["revision"] = section.revision
    return options


def _converted_gguf(path: Path, cache_dir: Path) -> Path:
    if not path.is_file():
        raise BaseModelError(f"base model not found: {path}")
    directory = cache_dir / "gguf" / _digest(*_file_state(path))
    with FileLock(_lock(directory)):
        if not directory.is_dir():
            try:
                gguf.GGUFReader(path)
            except Exception as error:  # the reader raises whatever numpy meets in a broken file
                raise BaseModelError(f"{path} is not a readable GGUF file: {error}") from error
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
                model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            # transformers keeps the GGUF quantizer on the expanded model, and save_pretrained would call it
            del model.hf_quantizer, model.quantization_method, model.config.quantization_config
            model.is_quantized = False
            with replacing(directory) as temporary:
                model.to(torch.bfloat16).save_pretrained(temporary)
                AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(temporary)
    return directory


def _quantized(section: BaseModelSection, checkpoint: str, cache_dir: Path, device: str) -> Path:
    dtype = compute_dtype(section, device)
    config = load_model_config(section, checkpoint)
    commit = getattr(config, "_commit_hash", None) or section.revision
    files = sorted(Path(checkpoint).glob("*")) if Path(checkpoint).is_dir() else []
    states = [state for file in files if file.is_file() for state in _file_state(file)]
    directory = cache_dir / "nf4" / _digest(checkpoint, commit, section.double_quant, dtype, *states)
    with FileLock(_lock(directory)):
        if not directory.is_dir():
            model = load_plain(
                checkpoint, device, dtype, quantization_config=nf4_config(section, dtype), **_source_options(section)
            )
            with replacing(directory) as temporary:
                model.save_pretrained(temporary)
    return directory


def _lock(directory: Path) -> str:
    directory.parent.mkdir(parents=True, exist_ok=True)
    return f"{directory}.lock"


def _file_state(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _explained(section: BaseModelSection) -> Iterator[None]:
    """Turns the Hub's and transformers' errors into one line with the cure."""
    try:
        yield
    except GatedRepoError as error:
        raise BaseModelError(
            f"{section.name} is gated: accept its licence on its Hub page, then `hf auth login` on every node"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise BaseModelError(
            f"the Hub has no model {section.name} at revision {section.revision or 'main'} that you may read; "
            "check the spelling, and `hf auth login` for a private one"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, BaseModelError):
            raise
        text = str(error)
        if "gated repo" in text:
            raise BaseModelError(
                f"{section.name} is gated: accept its licence on its Hub page, then `hf auth login`"
            ) from error
        if "couldn't connect" in text or "offline" in text.lower() or "Connection" in text:
            raise BaseModelError(
                f"{section.name} is not in the local Hub cache and the Hub cannot be reached; "
                "check the network, or give a local directory or GGUF file"
            ) from error
        raise BaseModelError(f"{section.name} cannot be loaded: {text.splitlines()[0]}") from error
