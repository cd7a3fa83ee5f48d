"""Writes merged models as directories that transformers loads without raylora."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from raylora.base import nf4
from raylora.base.checkpoint_io import ShardWriter, edit_config
from raylora.base.load import load_plain
from raylora.base.serving import ServingFiles
from raylora.merge.layer_reader import LayerReader
from raylora.merge.strategies import RoundedWeights
from raylora.run.atomic import replacing


def load_into(model: PreTrainedModel, reader: LayerReader, rounded: RoundedWeights) -> None:
    """Load merged weights into a model in memory, which then equals the one that `write_nf4` writes.

    Args:
        model: the NF4 base, changed in place.
        reader: reads the layers of base and adapter.
        rounded: merged weights of all layers.
    """
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


def write_nf4(reader: LayerReader, rounded: RoundedWeights | None, directory: Path, serving: ServingFiles) -> None:
    """Write the merged model in NF4. Layers without an update stay equal to the base, bit for bit.

    Args:
        reader: reads the layers of base and adapter.
        rounded: merged weights of all layers; None writes the base's own.
        directory: replaced if it exists.
        serving: written beside the model.
    """
    layers, plain = set(reader.layers) if rounded else set(), reader.other_parameters()
    with replacing(directory) as temporary:
        temporary.mkdir()
        writer = ShardWriter(temporary, reader.checkpoint.stored_name)
        for name in reader.checkpoint.weights():
            layer = name.removesuffix(".weight")
            if rounded and layer in layers:
                writer.add(rounded.tensors(layer))
            elif name not in plain:
                writer.add(reader.checkpoint.tensors(name))
        writer.add(plain)
        writer.close()
        _write_rest(reader, temporary, plain, serving)


def write_bf16(reader: LayerReader, directory: Path, serving: ServingFiles) -> None:
    """Write the dequantized base plus the update in bfloat16: the model with the unmerged adapter, up to rounding."""
    layers, plain = set(reader.layers), reader.other_parameters()
    with replacing(directory) as temporary:
        temporary.mkdir()
        writer = ShardWriter(temporary, reader.checkpoint.stored_name)
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
        _write_rest(reader, temporary, plain, serving)
        edit_config(temporary, dtype="bfloat16", quantization_config=None)


def write_residual(reader: LayerReader, directory: Path, serving: ServingFiles, *, r: int) -> None:
    """Write the base in NF4 and, in the folder `adapter`, an adapter of rank r that approximates the update.

    The error of rounding has full rank, so no small adapter could hold it. Therefore the base is not rounded anew, and
    the adapter holds the whole update. It is exact if the rank of the update is at most r.

    Args:
        reader: reads the layers of base and adapter.
        directory: replaced if it exists.
        serving: written beside the model.
        r: rank of the adapter, >= 1.

    Source: the truncated singular value decomposition is the best approximation of rank r (Eckart and Young 1936).
    """
    write_nf4(reader, None, directory, serving)
    factors = {}
    for name in reader.layers:
        base_weight = reader.base_weight(name)
        update = reader.target(name, base_weight)[0] - base_weight
        left, values, right = torch.linalg.svd(update, full_matrices=False)
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


def load_merged(
    directory: Path, device: str, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel | PeftModel:
    """Load a written model of any format, as any user of transformers and peft would."""
    model = load_plain(str(directory), device, dtype, trust_remote_code=trust_remote_code)
    adapter = directory / "adapter"
    return PeftModel.from_pretrained(model, str(adapter)).eval() if adapter.is_dir() else model


def _write_rest(reader: LayerReader, directory: Path, plain: dict[str, torch.Tensor], serving: ServingFiles) -> None:
    """Write config, tokenizer and generation settings. They come last: a directory with a config is complete."""
    reader.checkpoint.copy_rest(directory)
    serving.save(directory)
    if reader.unties_embeddings(plain):
        edit_config(directory, tie_word_embeddings=False)


def _to_bf16(tensor: torch.Tensor) -> torch.Tensor:
    """Return a floating point tensor in bfloat16, and any other tensor unchanged."""
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
