"""Adapters whose tokenizer got more tokens are merged into a base with as many embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylora.merge.run import merge_without_search

N_ADDED = 5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["up_proj", "embed_tokens", "lm_head"]},
        {"trainable_token_indices": [300, 301]},
    ],
)
def test_an_adapter_with_added_tokens_is_merged(
    settings: dict[str, Any], tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    adapter, n_tokens = tmp_path / "adapter", save_adapter(tiny_model, tmp_path / "adapter", settings)
    overrides = {"data.train": str(rows_file), "merge.strategy": "stochastic", "merge.formats": "[nf4, bf16]"}
    result = merge_without_search(str(tiny_model), str(adapter), tmp_path / "out", overrides)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "bf16", dtype=torch.float32)
    assert merged.config.vocab_size == n_tokens
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "bf16").encode("<new-0>")) == 1

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    base.resize_token_embeddings(n_tokens, mean_resizing=False)
    expected = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        # bfloat16 keeps 8 bits
        torch.testing.assert_close(getattr(merged, name)().weight, getattr(expected, name)().weight, rtol=2**-8, atol=0)
    # the adapter that it is compared with is the one of the resized base
    assert result["forms"]["bf16"]["kl_to_adapter"] < 0.02 * result["models"]["base"]["kl_to_adapter"]


def test_embeddings_that_are_saved_as_a_whole_are_merged(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    base.get_input_embeddings().weight.data += 0.1  # trained by hand, unknown to peft
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge_without_search(
        str(tiny_model), str(tmp_path / "adapter"), tmp_path / "out", {"data.train": str(rows_file)} | STOCHASTIC
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged.get_input_embeddings().weight.float(), base.get_input_embeddings().weight)


STOCHASTIC = {"merge.strategy": "stochastic"}


def save_adapter(base: Path, directory: Path, settings: dict[str, Any]) -> int:
    """Save an adapter of a base with added tokens, beside its tokenizer; return the number of embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    n_tokens = model.config.vocab_size + N_ADDED
    tokenizer.add_tokens([f"<new-{number}>" for number in range(N_ADDED)])
    model.resize_token_embeddings(n_tokens)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["up_proj", "down_proj"], **settings})
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return n_tokens
