"""An adapter's updates, computed without the base, are those that peft would merge."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from raylora.errors import MergeError
from raylora.merge.adapter_update import AdapterUpdate, read_tensors


def save_adapter(base: PreTrainedModel, directory: Path, **settings: Any) -> None:
    """An adapter with every trained parameter moved a little."""
    settings = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", **settings}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(directory)


def plain(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 16}},
        {"target_modules": ["up_proj", "lm_head", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_updates_are_those_that_peft_merges(settings: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    check_against_peft(tiny_model, tmp_path, settings)


@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_transposed_layers_and_trained_biases_are_those_that_peft_merges(
    settings: dict[str, Any], gpt2: Path, tmp_path: Path
) -> None:
    check_against_peft(gpt2, tmp_path, settings)


def check_against_peft(model: Path, directory: Path, settings: dict[str, Any]) -> None:
    save_adapter(plain(model), directory / "adapter", **settings)
    merged = PeftModel.from_pretrained(plain(model), str(directory / "adapter")).merge_and_unload().state_dict()
    base = plain(model).state_dict()
    updates = AdapterUpdate(directory / "adapter", AutoConfig.from_pretrained(model))
    assert updates.layers()
    found = dict(updates.replaced_parameters())
    for name in updates.layers():
        weight = base[f"{name}.weight"]
        transposed = updates.is_transposed(name)
        new, bias = updates.apply(name, weight.T if transposed else weight, base.get(f"{name}.bias"))
        found[f"{name}.weight"] = new.T if transposed else new
        if bias is not None:
            found[f"{name}.bias"] = bias
    for name, tensor in merged.items():
        # peft sums in place, in another order
        torch.testing.assert_close(found.get(name, base[name]), tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_an_adapter_of_another_base_is_named_with_shapes(tiny_model: Path, gpt2: Path, tmp_path: Path) -> None:
    save_adapter(plain(gpt2), tmp_path / "other", target_modules=["c_attn"])
    with pytest.raises(MergeError, match=r"other does not fit the base: .*c_attn"):
        AdapterUpdate(tmp_path / "other", AutoConfig.from_pretrained(tiny_model))
    narrow = AutoConfig.from_pretrained(tiny_model)
    narrow.intermediate_size = 96
    save_adapter(AutoModelForCausalLM.from_config(narrow), tmp_path / "narrow", target_modules=["up_proj"])
    with pytest.raises(
        MergeError, match=r"another base: .*up_proj.lora_B.weight \(found \(96, 4\), must be \(128, 4\)\)"
    ):
        AdapterUpdate(tmp_path / "narrow", AutoConfig.from_pretrained(tiny_model))


def test_layers_that_the_base_lacks_are_named(tiny_model: Path, tmp_path: Path) -> None:
    deep = AutoConfig.from_pretrained(tiny_model)
    deep.num_hidden_layers = 3
    save_adapter(AutoModelForCausalLM.from_config(deep), tmp_path / "deep")
    with pytest.raises(MergeError, match=r"layers.2.*\(the base has no such layer\).* and 11 more"):
        AdapterUpdate(tmp_path / "deep", AutoConfig.from_pretrained(tiny_model))


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    save_adapter(plain(tiny_model), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_values_that_are_no_numbers_are_named(adapter: Path, tiny_model: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(MergeError, match=r"q_proj.lora_B.weight in .* has values that are not finite"):
        AdapterUpdate(adapter, AutoConfig.from_pretrained(tiny_model))


def test_what_is_no_lora_adapter_is_refused(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    with pytest.raises(MergeError, match="is no adapter of peft"):
        AdapterUpdate(tmp_path / "nothing", config)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(MergeError, match=r"holds no adapter_model.safetensors that can be read"):
        AdapterUpdate(adapter, config)


def test_an_adapter_that_needs_a_changed_base_is_refused(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "pissa")
    file = tmp_path / "pissa" / "adapter_config.json"
    file.write_text(file.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(MergeError, match="was initialised by pissa, which changes the base"):
        AdapterUpdate(tmp_path / "pissa", AutoConfig.from_pretrained(tiny_model))


def test_a_bias_that_the_base_has_no_place_for_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_adapter(plain(tiny_model), tmp_path, lora_bias=True)
    with pytest.raises(
        MergeError, match=r"has a bias \(lora_bias\) for model\.layers\.0\..*, which has none in the base"
    ):
        AdapterUpdate(tmp_path, AutoConfig.from_pretrained(tiny_model))


def test_of_a_large_adapter_only_the_named_tensors_are_read(tmp_path: Path) -> None:
    whole = {"head": torch.ones(2, 2), "factor": torch.full((2, 2), torch.nan)}
    save_file(whole, tmp_path / "adapter_model.safetensors")
    assert read_tensors(tmp_path, {"head", "other"}).keys() == {"head"}  # the factor is not looked at
    with pytest.raises(MergeError, match=r"factor in .* has values that are not finite"):
        read_tensors(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(whole, tmp_path / "adapter_model.bin")
    assert read_tensors(tmp_path, {"head"}).keys() == {"head"}
