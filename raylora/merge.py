"""Merges the best trial's adapter into the base and measures what the merge lost.

Run as `python -m raylora.merge RUN_DIRECTORY`.

The update is far smaller than a quantization step, so adding it to the dequantized NF4 weight and quantizing again
would round it away. It is added to the original 16-bit weight instead, and the sum quantized (docs/design.md).
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import bitsandbytes
import torch
import typer
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raylora.base_model import (
    compute_dtype,
    find_checkpoint,
    is_quantized,
    load_base_model,
    load_model_config,
    load_plain,
    load_tokenizer,
)
from raylora.commands import command, console, run_command
from raylora.data import load_part
from raylora.errors import MergeError, RunDirectoryError
from raylora.files import replacing, write_json
from raylora.losses import eval_loss
from raylora.records import Records, TrialRow
from raylora.run_directory import RunDirectory
from raylora.tables import print_table

Weights = Callable[[str], torch.Tensor]
"""Module name -> weight in (out_features, in_features)."""


@command
def merge(run_directory: Annotated[Path, typer.Argument(help="Folder of a search.")]) -> None:
    """Merge the best trial's adapter into the base, and measure the validation loss before and after."""
    run = RunDirectory(run_directory)
    save_best_adapter(run)
    show_merge(merge_run(run), console())


def save_best_adapter(run: RunDirectory) -> TrialRow:
    """Copies the best trial's adapter, in peft's format, to `best_adapter`.

    Raises:
        RunDirectoryError: no trial reached the full budget.
    """
    best = Records.load(run).best()
    if best is None or best.checkpoint is None:
        raise RunDirectoryError(f"{run.path} holds no trial that reached the full budget, so none can be called best")
    base = run.config().base_model
    with replacing(run.best_adapter) as temporary:
        temporary.mkdir()
        shutil.copy(Path(best.checkpoint) / "adapter_model.safetensors", temporary)
        config = json.loads((Path(best.checkpoint) / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(
            temporary / "adapter_config.json",
            {**config, "base_model_name_or_path": base.name, "revision": base.revision},
        )
    return best


def merge_run(run: RunDirectory) -> dict[str, Any]:
    """Merges in every form that the config asks for and writes `merge.json`.

    Returns:
        `strategy`, `eval_loss` (name of the model -> validation loss in nats per token), `seconds` and `size_mib` (by
        form).

    Raises:
        MergeError: a form cannot be made from this base.
        RunDirectoryError: no adapter to merge.
    """
    if not run.best_adapter.is_dir():
        raise RunDirectoryError(f"{run.path} holds no best_adapter")
    config, provenance = run.config(), run.provenance()
    device = "cuda:0" if provenance["on_gpu"] and torch.cuda.is_available() else "cpu"
    base_section, cache_dir = config.base_model, run.cache(config)
    checkpoint = find_checkpoint(base_section, cache_dir)
    tokenizer = load_tokenizer(base_section, checkpoint)
    validation = load_part(Path(provenance["tokens_dir"]), "validation")
    has_original = not is_quantized(load_model_config(base_section, checkpoint))

    def loss(model: PreTrainedModel) -> float:
        batch_size = config.training.per_device_eval_batch_size
        return eval_loss(model, validation, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id)

    base = load_base_model(base_section, cache_dir, device)
    losses = {"base": loss(base)}
    del base
    seconds, sizes = {}, {}
    for form in config.merge.formats:
        began = time.perf_counter()
        model = PeftModel.from_pretrained(load_base_model(base_section, cache_dir, device), str(run.best_adapter))
        losses["adapter"] = loss(model)
        if form == "nf4":
            merged = merge_nf4(model, _original(checkpoint, base_section.trust_remote_code) if has_original else None)
        else:
            merged = _merge_bf16(model, checkpoint, has_original, base_section.trust_remote_code, device)
        losses[f"merged_{form}"] = loss(merged)
        with replacing(run.merged(form)) as temporary:
            # transformers 5.23 cannot undo its conversion of bitsandbytes weights, and nothing needs it undone
            merged.save_pretrained(temporary, save_original_format=False)
            tokenizer.save_pretrained(temporary)
        del model, merged
        reloaded = load_plain(str(run.merged(form)), device, compute_dtype(base_section, device))
        losses[f"merged_{form}_reloaded"] = loss(reloaded)
        del reloaded
        seconds[form] = time.perf_counter() - began
        sizes[form] = sum(file.stat().st_size for file in run.merged(form).rglob("*")) / 2**20
    strategy = "quantize(W16 + dW)" if has_original else "quantize(dequantize(NF4(W)) + dW), for want of 16-bit weights"
    result = {"strategy": strategy, "eval_loss": losses, "seconds": seconds, "size_mib": sizes}
    write_json(run.merge_file, result)
    return result


def merge_nf4(model: PeftModel, original: Weights | None) -> PreTrainedModel:
    """Quantizes each adapted layer's updated weight in place; all other weights stay bit for bit.

    Args:
        model: an NF4 base with one LoRA adapter.
        original: the 16-bit weights; None where the base exists only as NF4, and then small updates are lost.

    Returns:
        The bare base with merged weights.

    Raises:
        MergeError: a layer is not 4-bit.
    """
    for name, layer in _lora_layers(model):
        linear = layer.get_base_layer()
        if not isinstance(linear, bitsandbytes.nn.Linear4bit):
            raise MergeError(f"merge.formats nf4 needs a base in nf4, found {type(linear).__name__} in {name}")
        old = linear.weight
        weight = (
            bitsandbytes.functional.dequantize_4bit(old.data, old.quant_state) if original is None else original(name)
        )
        updated = weight.to(old.device, torch.float32) + layer.get_delta_weight("default").float()
        new = bitsandbytes.nn.Params4bit(
            updated.contiguous().cpu(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=old.quant_state.nested,
        ).to(old.device)
        new.quant_state.dtype = old.quant_state.dtype
        linear.weight = new
        linear.quant_state = new.quant_state
    return model.unload()


def _merge_bf16(
    model: PeftModel, checkpoint: str, has_original: bool, trust_remote_code: bool, device: str
) -> PreTrainedModel:
    """The original weights plus the update, in bfloat16."""
    if not has_original:
        raise MergeError("merge.formats bf16 needs the 16-bit weights, and this base exists only in 4 bit")
    merged = load_plain(checkpoint, device, torch.bfloat16, trust_remote_code=trust_remote_code)
    for name, layer in _lora_layers(model):
        linear = merged.get_submodule(name)
        delta = layer.get_delta_weight("default").float()
        updated = linear.weight.data.float() + (delta.T if isinstance(linear, Conv1D) else delta)
        linear.weight.data = updated.to(torch.bfloat16)
    return merged


def _original(checkpoint: str, trust_remote_code: bool) -> Weights:
    """Reads weights from the 16-bit checkpoint, which is memory-mapped in host memory."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", trust_remote_code=trust_remote_code)

    def weight(name: str) -> torch.Tensor:
        module = model.get_submodule(name)
        return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data

    return weight


def _lora_layers(model: PeftModel) -> list[tuple[str, Any]]:
    """Adapted layers by the name they have in the bare base."""
    modules = model.get_base_model().named_modules()
    return [(name, module) for name, module in modules if isinstance(module, LoraLayer)]


def merge_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Validation loss of each model, for a table."""
    adapter = result["eval_loss"]["adapter"]
    return [
        {"model": name, "eval_loss": loss, "against adapter": f"{100 * (loss / adapter - 1):+.2f} %"}
        for name, loss in result["eval_loss"].items()
    ]


def show_merge(result: dict[str, Any], screen: Console) -> None:
    """Prints the table."""
    screen.print(f"\nvalidation loss, merged by {result['strategy']}")
    print_table(merge_rows(result), screen)


if __name__ == "__main__":
    run_command(merge)
