"""Finding, quantizing and caching the base; what a broken one says."""

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import gguf
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from raylora.base import locate as base_model
from raylora.base.architecture import Architecture, dense_weight
from raylora.base.load import load_base_model
from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.config.schema import BaseModelSection, SearchConfig
from raylora.errors import BaseModelError, ConfigError


def test_the_base_is_quantized_once(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    section = make_config().base_model
    first = load_base_model(section, tmp_path, "cpu")
    (cached,) = [path for path in (tmp_path / "nf4").iterdir() if path.is_dir()]
    stamp = (cached / "model.safetensors").stat().st_mtime_ns
    second = load_base_model(section, tmp_path, "cpu")
    assert (cached / "model.safetensors").stat().st_mtime_ns == stamp
    linear = second.model.layers[0].mlp.up_proj
    assert isinstance(linear, bitsandbytes.nn.Linear4bit)
    assert linear.weight.quant_state.nested  # double quantization
    ids = torch.arange(10)[None]
    torch.testing.assert_close(first(ids).logits, second(ids).logits, rtol=0, atol=0)


def test_a_base_that_nothing_uses_is_freed_before_the_next_one_is_loaded(
    make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    section = make_config().base_model
    gc.disable()  # Python may collect at any time, and mostly does not
    try:
        model = load_base_model(section, tmp_path, "cpu")
        unused = weakref.ref(model.model.layers[0].mlp.up_proj)
        del model
        assert unused() is not None
        load_base_model(section, tmp_path, "cpu")
        assert unused() is None
    finally:
        gc.enable()


def test_codes_that_are_stored_as_bfloat16_stay_codes(
    make_config: Callable[..., SearchConfig], tiny_model: Path, tmp_path: Path
) -> None:
    # as in checkpoints for FSDP, whose shards must have one dtype
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    ids, found = torch.arange(10)[None], []
    for storage in (torch.uint8, torch.bfloat16):
        quantization = BitsAndBytesConfig(**options, bnb_4bit_quant_storage=storage)
        folder = tmp_path / str(storage)
        AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny_model / name).read_bytes())
        model = load_base_model(make_config(base_model={"name": str(folder)}).base_model, tmp_path, "cpu")
        assert model.model.layers[0].mlp.up_proj.weight.dtype == storage
        found.append(model(ids).logits)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(("stored", "used"), [("bfloat16", "float32"), (None, "bfloat16")])
def test_a_quantized_base_computes_in_our_dtype_and_not_in_the_one_it_brings(
    stored: str | None, used: str, make_config: Callable[..., SearchConfig], tiny_model: Path, tmp_path: Path
) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=stored)
    folder = shutil.copytree(tiny_model, tmp_path / "quantized", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization).save_pretrained(folder)
    section = make_config(base_model={"name": str(folder), "compute_dtype": used}).base_model
    layer = load_base_model(section, tmp_path, "cpu").model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, dtype=getattr(torch, used))
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(layer(x), x @ weight.to(x.dtype).T, rtol=0, atol=0)


def test_evaluating_does_not_cut_gradients_off(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    # bitsandbytes 0.50 repacks weights for a kernel without backward at the first evaluation on some CPUs
    model = load_base_model(make_config().base_model, tmp_path, "cpu")
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        model.eval()(ids)
    model.train()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


def test_unquantized_bases_are_lora(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    section = make_config(base_model={"quantization": "none"}).base_model
    model = load_base_model(section, tmp_path, "cpu")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_a_missing_pad_token_becomes_eos(tiny_model: Path) -> None:
    assert AutoTokenizer.from_pretrained(tiny_model).pad_token is None
    section = BaseModelSection(name=str(tiny_model))
    assert load_tokenizer(section, str(tiny_model)).pad_token == "</s>"


@pytest.mark.parametrize(
    ("prepare", "name", "message"),
    [
        (lambda path: None, "./nowhere", r"base model not found: \./nowhere is no directory, GGUF file or Hub id"),
        (lambda path: (path / "m").mkdir(), "m", r"m holds no config\.json"),
        (
            lambda path: ((path / "m").mkdir(), (path / "m" / "config.json").write_text("{}")),
            "m",
            r"m holds no weights: must hold one of \*\.safetensors",
        ),
        (lambda path: None, "none.gguf", r"base model not found: .*none\.gguf"),
        (
            lambda path: (path / "bad.gguf").write_bytes(b"GGUX" * 40),
            "bad.gguf",
            r"bad\.gguf is not a readable GGUF file",
        ),
    ],
)
def test_bad_paths_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    with pytest.raises(BaseModelError, match=message):
        find_checkpoint(BaseModelSection(name=name), tmp_path / "cache")


def test_a_cut_off_gguf_is_unreadable(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_tensor("x", torch.zeros(64, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:-8000])
    with pytest.raises(BaseModelError, match=r"cut\.gguf is not a readable GGUF file"):
        find_checkpoint(BaseModelSection(name=str(tmp_path / "cut.gguf")), tmp_path)


class _Response:
    headers: dict = {}
    request = None
    status_code = 403
    text = ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("gated", response=_Response()), "is gated: accept its licence on its Hub page"),
        (RepositoryNotFoundError("404", response=_Response()), "the Hub has no model owner/name at revision main"),
        (OSError("We couldn't connect to the Hub"), "is not in the local Hub cache and the Hub cannot be reached"),
    ],
    ids=["gated", "missing", "offline"],
)
def test_hub_errors_get_a_cure(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(base_model.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(BaseModelError, match=message):
        load_tokenizer(BaseModelSection(name="owner/name"), "owner/name")


LLAMA = LlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=100)


def test_target_presets_name_the_modules_of_any_architecture() -> None:
    llama = Architecture.of_config(LLAMA)
    assert llama.targets("attention") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert llama.targets("mlp") == ["down_proj", "gate_proj", "up_proj"]
    assert len(llama.targets("all-linear")) == 7
    gpt2 = Architecture.of_config(GPT2Config(n_layer=1, n_embd=64, n_head=4, vocab_size=100))
    # c_proj stands in both blocks of GPT-2, so that the last part alone would not tell them apart
    assert gpt2.targets("attention") == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_a_dense_weight_is_what_the_layer_multiplies_by(kind: str) -> None:
    torch.manual_seed(0)
    layer = {
        "linear": lambda: torch.nn.Linear(64, 32, bias=False),
        "conv1d": lambda: Conv1D(32, 64),
        "nf4": lambda: Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu"),
    }[kind]()
    x = torch.randn(5, 64)
    # the same float32 sums in another order; Conv1D's bias starts at zero
    torch.testing.assert_close(x @ dense_weight(layer).float().t(), layer(x), rtol=1e-5, atol=1e-5)


def test_an_unknown_target_module_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="no module is named query; the model has down_proj, gate_proj, k_proj"):
        Architecture.of_config(LLAMA).targets("query")


def test_shapes_are_read_without_weights(tiny_model: Path) -> None:
    architecture = Architecture.of_config(AutoConfig.from_pretrained(tiny_model))
    shapes = architecture.shapes
    assert shapes["model.layers.0.mlp.up_proj"] == (64, 128)
    assert "lm_head" not in shapes
    # two layers of four attention and three MLP matrices; 300 embeddings and as many rows of the head, and five norms
    assert architecture.n_linear == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert architecture.n_rest == 2 * 300 * 64 + 5 * 64
