"""Writes merged models as directories that transformers loads without us."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylora.base import nf4
from raylora.base.checkpoint_io import ShardWriter, edit_config
from raylora.base.load import load_plain
from raylora.merge.layer_reader import LayerReader
from raylora.merge.strategies import RoundedWeights
from raylora.run.atomic import replacing


def put(model: PreTrainedModel, reader: LayerReader, rounded: RoundedWeights) -> None:
    """Merges into a loaded NF4 base, in place: what `write_nf4` writes, before it is written."""
    for name in reader.layers:
        linear = model.get_submodule(name)
        linear.weight = nf4.from_tensors(name, rounded.tensors(name), str(model.device))
        linear.quant_state = linear.weight.quant_state
    plain = reader.other_parameters()
    if reader.unties_embeddings(plain):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.data.clone(), requires_grad=False)
    for name, tensor in plain.items():
        parameter = model.get_parameter(name)
        parameter.data = tensor.to(parameter.device, parameter.dtype)


def write_nf4(
    reader: LayerReader, rounded: RoundedWeights | None, directory: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes the base with merged weights in NF4, or with its own where none are given.

    Layers without an update stay as they are, bit for bit.
    """
    layers, plain = set(reader.layers) if rounded else set(), reader.other_parameters()
    with replacing(directory) as temporary:
        temporary.mkdir()
        writer = ShardWriter(temporary)
        for name in reader.checkpoint.weights():
            layer = name.removesuffix(".weight")
            if rounded and layer in layers:
                writer.add(rounded.tensors(layer))
            elif name not in plain:
                writer.add(reader.checkpoint.tensors(name))
        writer.add(plain)
        writer.close()
        _write_rest(reader, temporary, plain, tokenizer)


def write_bf16(reader: LayerReader, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the dequantized base plus the update in bfloat16: the model that the adapter was trained as."""
    layers, plain = set(reader.layers), reader.other_parameters()
    with replacing(directory) as temporary:
        temporary.mkdir()
        writer = ShardWriter(temporary)
        for name in reader.checkpoint.weights():
            layer = name.removesuffix(".weight")
            if name in plain:
                continue
            if layer in layers:
                weight = reader.target(layer)[0]
            elif reader.checkpoint.is_quantized(name):
                weight = reader.base_weight(layer)
            else:
                writer.add({name: _to_bf16(reader.checkpoint.tensor(name))})
                continue
            writer.add({name: _to_bf16(weight.T if reader.updates.is_transposed(layer) else weight)})
        writer.add({name: _to_bf16(tensor) for name, tensor in plain.items()})
        writer.close()
        _write_rest(reader, temporary, plain, tokenizer)
        edit_config(temporary, dtype="bfloat16", quantization_config=None)


def write_residual(reader: LayerReader, directory: Path, tokenizer: PreTrainedTokenizerBase, *, r: int) -> None:
    """Writes the base in NF4 as it is and, in `adapter`, the update cut to rank r: exact where it has no higher rank.

    Rounding loses noise of full rank, which no small adapter holds; so nothing of the update is rounded here. It is cut
    by its singular values, which is best for the weight (Eckart and Young 1936).
    """
    write_nf4(reader, None, directory, tokenizer)
    factors = {}
    for name in reader.layers:
        before = reader.base_weight(name)
        left, values, right = torch.linalg.svd(reader.target(name, before)[0] - before, full_matrices=False)
        root = values[:r].sqrt()
        prefix = f"base_model.model.{name}"
        factors[f"{prefix}.lora_A.weight"] = (root[:, None] * right[:r]).cpu().contiguous()
        factors[f"{prefix}.lora_B.weight"] = (left[:, :r] * root).cpu().contiguous()
    with replacing(directory / "adapter") as temporary:
        temporary.mkdir()
        save_file(factors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config = LoraConfig(r=r, lora_alpha=r, target_modules=reader.layers, task_type="CAUSAL_LM")
        config.base_model_name_or_path = str(directory)
        config.inference_mode = True
        config.save_pretrained(str(temporary))


def load_merged(directory: Path, device: str, dtype: torch.dtype) -> PreTrainedModel | PeftModel:
    """A written model of any form, as any user of transformers and peft would load it."""
    model = load_plain(str(directory), device, dtype)
    adapter = directory / "adapter"
    return PeftModel.from_pretrained(model, str(adapter)).eval() if adapter.is_dir() else model


def _write_rest(
    reader: LayerReader, directory: Path, plain: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Config and tokenizer last, so that a directory without them is not whole."""
    reader.checkpoint.copy_rest(directory)
    tokenizer.save_pretrained(directory)
    if reader.unties_embeddings(plain):
        edit_config(directory, tie_word_embeddings=False)


def _to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
