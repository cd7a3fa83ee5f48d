"""Bases of many classes: trained by the engine that fits, merged, written, and loaded again; or refused by name."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from raylora.base.architecture import Architecture
from raylora.base.load import load_plain, nf4_checkpoint
from raylora.base.locate import find_checkpoint, load_model_config
from raylora.config.schema import BaseModelSection, MergeSection, SearchConfig
from raylora.data.prepare import prepare_data
from raylora.errors import BaseModelError, MergeError
from raylora.merge.job import MergeJob
from raylora.merge.same_base import check_same_base, write_base_file
from raylora.merge.select import merge_adapter
from raylora.testing import make_tiny_model
from raylora.training.choose import load_engine
from raylora.training.memory import MemoryEstimate
from raylora.training.packed.engine import PackedEngine
from tests.helpers import assignment

TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MEMORY = MemoryEstimate(1.0, 1.0, 0.01, 0.01, 0.01, 64)


def text(kind: str, **changes: Any) -> PreTrainedModel:
    """A causal language model of a class of transformers, with random weights."""
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**{**TEXT, **changes}))


def wrapped(kind: str, text_changes: dict[str, Any], vision: dict[str, Any], **changes: Any) -> PreTrainedModel:
    """A model that reads images too, with random weights."""
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TEXT, "head_dim": 16, **text_changes}, vision_config={**VISION, **vision}, **changes
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def gemma3() -> PreTrainedModel:
    tokens = {"image_token_index": 3, "boi_token_index": 2, "eoi_token_index": 4}
    return wrapped("Gemma3", {"sliding_window": 64}, {"num_hidden_layers": 1}, mm_tokens_per_image=4, **tokens)


def mistral3() -> PreTrainedModel:
    vision = {"model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 16}
    return wrapped("Mistral3", {"model_type": "mistral"}, vision, image_token_index=3)


def qwen3_5() -> PreTrainedModel:
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": 64}
    return wrapped("Qwen3_5", LINEAR, vision)


HYBRID = "by layers beside attention that mix tokens"

BASES: dict[str, tuple[Callable[[], PreTrainedModel], str | None]] = {
    "gemma3": (gemma3, None),
    "mistral3": (mistral3, None),
    "qwen3_5": (qwen3_5, HYBRID),
    "gemma3_text": (lambda: text("Gemma3Text", head_dim=16, sliding_window=32), None),
    "phi3": (lambda: text("Phi3"), None),
    "qwen3_moe": (lambda: text("Qwen3Moe", **EXPERTS), None),
    "gpt_oss": (lambda: text("GptOss", num_local_experts=4, head_dim=16, sliding_window=32), "the loss of a row of"),
    "qwen3_next": (lambda: text("Qwen3Next", **{**EXPERTS, **LINEAR}, shared_expert_intermediate_size=64), HYBRID),
    "lfm2": (lambda: text("Lfm2", layer_types=["conv", "full_attention"]), HYBRID),
    "falcon_h1": (lambda: text("FalconH1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16), HYBRID),
}
"""Base -> how to make a tiny one, and why it is not packed (None if it is)."""


def save(model: PreTrainedModel, directory: Path, tiny_model: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    return directory


def train(config: SearchConfig, tokens_dir: Path, cache_dir: Path, directory: Path) -> tuple[Path, str | None]:
    """Train a trial of 20 steps. Return its last checkpoint, and why it was not packed."""
    engine = load_engine(config, tokens_dir=tokens_dir, cache_dir=cache_dir, device="cpu", slots=1, memory=MEMORY)
    trial = assignment(r=4, lora_alpha=8, learning_rate=2e-2, lora_dropout=0.0, per_device_train_batch_size=2)
    checkpoints: list[str] = []
    if isinstance(engine, PackedEngine):
        engine.add(0, trial, rungs=[20], directory=directory)
        while not checkpoints:
            checkpoints += [report.checkpoint for report in engine.step().values() if not isinstance(report, Exception)]
        engine.close()
        return Path(checkpoints[0]), None
    engine.fit(
        trial, rungs=[20], directory=directory, report=lambda metrics: bool(checkpoints.append(metrics.checkpoint))
    )
    return Path(checkpoints[0]), engine.reason


@pytest.mark.parametrize("kind", BASES)
def test_a_base_is_trained_merged_and_loaded_again(
    kind: str, make_config: Callable[..., SearchConfig], tiny_model: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, reason = BASES[kind]
    base = save(make(), tmp_path / "base", tiny_model)
    config = make_config(base_model={"name": str(base)})
    data = prepare_data(config.data, AutoTokenizer.from_pretrained(base), tmp_path)
    adapter, why = train(config, data.tokens_dir, tmp_path / "cache", tmp_path / "trial")
    assert (why is None) if reason is None else (why is not None and reason in why)
    layers = {name.split(".lora_")[0] for name in load_file(adapter / "adapter_model.safetensors")}
    assert not any("vision" in layer or "visual" in layer for layer in layers)
    job = MergeJob(
        base=config.base_model,
        adapter=adapter,
        outputs={form: tmp_path / form for form in ("nf4", "bf16")},
        folder=tmp_path / "merge",
        settings=MergeSection(formats=["nf4", "bf16"]),
        cache_dir=tmp_path / "cache",
        device="cpu",
        tokens_dir=data.tokens_dir,
        batch_size=8,
    )
    result = merge_adapter(job)
    models = result["models"]
    learnt = models["base"]["eval_loss"] - models["adapter"]["eval_loss"]
    assert learnt > 0.1
    # a tenth of what was learnt is far more than rounding a tiny model costs, and far less than to lose the adapter
    for form in ("nf4", "bf16"):
        assert abs(result["forms"][form]["eval_loss"] - models["adapter"]["eval_loss"]) < 0.1 * learnt
    stored = load_file(job.outputs["bf16"] / "model.safetensors")
    original = load_file(base / "model.safetensors")
    if kind == "qwen3_5":  # transformers loads its text model alone
        assert stored.keys() < {name.replace("model.language_model.", "model.") for name in original} | set(original)
    else:
        assert stored.keys() == original.keys()


def test_layers_outside_the_language_model_are_not_adapted() -> None:
    architecture = Architecture.of(gemma3())
    assert len(architecture.shapes) == 14
    assert architecture.others
    # the vision tower has a q_proj too, so that short names would adapt it
    assert all(target.startswith("model.language_model.") for target in architecture.targets("attention"))
    assert len(architecture.targets("q_proj,v_proj")) == 4


def test_experts_are_counted_and_left_alone() -> None:
    architecture = Architecture.of(text("Qwen3Moe", **EXPERTS))
    assert architecture.n_experts == 2 * 4 * (2 * 64 * 64 + 64 * 64)  # layers, experts, gate and up, down
    assert architecture.targets("all-linear") == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_unquantized_parts_of_an_nf4_base_keep_its_16_bits(tiny_model: Path, tmp_path: Path) -> None:
    base = save(text("Llama"), tmp_path / "base", tiny_model)
    section = BaseModelSection(name=str(base))
    stored = load_file(Path(nf4_checkpoint(section, tmp_path / "cache", "cpu")) / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    model = load_plain(nf4_checkpoint(section, tmp_path / "cache", "cpu"), "cpu", torch.float32)
    floating = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    assert floating == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantized by fp8, and .*; name the 16-bit original"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized by gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes in 8 bit"),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "fp4",
                }
            },
            "bitsandbytes in fp4",
        ),
        ({"model_type": "t5", "architectures": ["T5Model"]}, "t5 is an encoder-decoder, .*; name one, such as Llama"),
        ({"model_type": "vit"}, "vit is no causal language model"),
        ({"model_type": "bert"}, "bert is no causal language model"),
    ],
)
def test_bases_that_cannot_be_fine_tuned_are_refused_by_name(
    changes: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    section = BaseModelSection(name=str(tmp_path / "base"))
    with pytest.raises(BaseModelError, match=message):
        load_model_config(section, find_checkpoint(section, tmp_path))


def test_a_base_with_missing_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_plain(str(tmp_path / "base"), "cpu", torch.float32)


def test_a_base_with_a_missing_shard_is_refused_before_anything_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    sorted((tmp_path / "base").glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(BaseModelError, match=r"lacks 1 of \d weight files, such as model-00002-of"):
        find_checkpoint(BaseModelSection(name=str(tmp_path / "base")), tmp_path)


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    ours, other, adapter = tmp_path / "ours", tmp_path / "other", tmp_path / "adapter"
    shutil.copytree(tiny_model, ours)
    make_tiny_model(other, seed=1)
    adapter.mkdir()
    section = BaseModelSection(name=str(ours))
    write_base_file(adapter, section, str(ours))
    check_same_base(adapter, section, str(ours))
    with pytest.raises(MergeError, match=r"was trained on .*ours \(fingerprint .*other has other weights"):
        check_same_base(adapter, BaseModelSection(name=str(other)), str(other))


@pytest.mark.parametrize(
    ("named", "base", "fits"),
    [
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "Qwen/Qwen3-4B", True),
        ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B", False),
        ("/home/me/qwen", "Qwen/Qwen3-4B", True),  # a path says nothing
    ],
)
def test_other_adapters_are_told_by_the_name_of_their_base(named: str, base: str, fits: bool, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    with nullcontext() if fits else pytest.raises(MergeError, match=f"was trained on {named}, and the base is {base}"):
        check_same_base(tmp_path, BaseModelSection(name=base), base)
