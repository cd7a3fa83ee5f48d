"""The merge keeps the fine-tune, and what it writes is a plain bitsandbytes checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model

from raylora.base_model import load_base_model, load_plain
from raylora.config import SearchConfig
from raylora.errors import MergeError, RunDirectoryError
from raylora.merge import _original, merge_nf4, merge_run, save_best_adapter
from raylora.run_directory import RunDirectory, start


@pytest.fixture
def adapted(make_config: Callable[..., SearchConfig], tmp_path: Path) -> Callable[[], PeftModel]:
    """The NF4 base with the same small adapter each time: an update of about 1 % of the weight."""

    def load(quantization: str = "nf4") -> PeftModel:
        section = make_config(base_model={"quantization": quantization}).base_model
        model = get_peft_model(
            load_base_model(section, tmp_path, "cpu"),
            LoraConfig(r=4, lora_alpha=4, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM"),
        )
        torch.manual_seed(1)
        for layer in _layers(model):
            layer.lora_A["default"].weight.data.normal_()
            layer.lora_B["default"].weight.data.normal_(std=1e-4)
        return model

    return load


def _layers(model: PeftModel) -> list:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")]


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if "Linear4bit" in type(module).__name__ and not hasattr(module, "lora_A")
    }


def _kept(model: PeftModel, before: dict[str, torch.Tensor], original: Callable | None) -> float:
    """Share of the update that the merged weights keep: its projection on the wanted direction."""
    deltas = {
        name: layer.get_delta_weight("default")
        for name, layer in model.get_base_model().named_modules()
        if layer in _layers(model)
    }
    after = _weights(merge_nf4(model, original))
    moved = torch.cat([(after[name] - before[name]).flatten() for name in deltas])
    wanted = torch.cat([delta.flatten() for delta in deltas.values()])
    return float(moved @ wanted / (wanted @ wanted))


def test_merging_into_the_original_keeps_what_merging_into_nf4_erases(
    adapted: Callable[[], PeftModel], tiny_model: Path
) -> None:
    before = _weights(adapted().unload())
    kept = _kept(adapted(), before, _original(str(tiny_model), False))
    erased = _kept(adapted(), before, None)
    # rounding to a grid keeps an update on average when it starts from weights that do not lie on the grid
    assert kept == pytest.approx(1, abs=0.25)
    assert erased < 0.2


def test_layers_without_an_adapter_stay_bit_for_bit(adapted: Callable[[], PeftModel], tiny_model: Path) -> None:
    before = _weights(adapted().unload())
    after = _weights(merge_nf4(adapted(), _original(str(tiny_model), False)))
    assert before.keys() == after.keys()
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == ("up_proj" not in name and "down_proj" not in name), name


def test_a_saved_merge_reloads_bit_for_bit(adapted: Callable[[], PeftModel], tiny_model: Path, tmp_path: Path) -> None:
    merged = merge_nf4(adapted(), _original(str(tiny_model), False))
    merged.save_pretrained(tmp_path / "merged", save_original_format=False)
    reloaded = load_plain(str(tmp_path / "merged"), "cpu", torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(reloaded(ids).logits, merged(ids).logits, rtol=0, atol=0)


def test_nf4_needs_a_base_in_nf4(adapted: Callable[..., PeftModel]) -> None:
    with pytest.raises(MergeError, match=r"merge\.formats nf4 needs a base in nf4, found Linear in model\.layers\.0"):
        merge_nf4(adapted("none"), None)


def test_steps_out_of_order_say_what_is_missing(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    run, config = RunDirectory(tmp_path / "run"), make_config()
    start(run, config, {})
    with pytest.raises(RunDirectoryError, match="holds no trial that reached the full budget"):
        save_best_adapter(run)
    with pytest.raises(RunDirectoryError, match="holds no best_adapter"):
        merge_run(run)
