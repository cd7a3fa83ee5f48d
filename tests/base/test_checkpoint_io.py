"""Checkpoints are read and written tensor by tensor, as transformers reads and writes them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from raylora.base.checkpoint_io import Checkpoint, ShardWriter
from raylora.base.names import TensorNames
from raylora.errors import MergeError


def open_checkpoint(directory: Path, model: Path) -> Checkpoint:
    return Checkpoint(directory, TensorNames(AutoModelForCausalLM.from_pretrained(model)))


def test_shards_are_of_bounded_size_and_load_in_transformers(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model, tiny_model)
    writer = ShardWriter(tmp_path, shard_bytes=100_000)
    for name in checkpoint.weights():
        writer.add(checkpoint.tensors(name))
    writer.close()
    checkpoint.copy_rest(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    # 451,328 bytes of weights; a shard is closed before the tensor that would not fit
    assert len(shards) == 6
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tiny_model).state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    assert open_checkpoint(tmp_path, tiny_model).size() > 451_328


def test_a_single_shard_needs_no_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add({"a": torch.ones(3)})
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_older_pickled_checkpoints_are_read(tiny_model: Path, tmp_path: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path, tiny_model)
    assert checkpoint.weights() == list(state)
    assert torch.equal(checkpoint.tensor("model.norm.weight"), state["model.norm.weight"])


def test_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    bare = {name.removeprefix("transformer."): tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(bare, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint(tmp_path, TensorNames(model))
    assert set(checkpoint.weights()) == set(model.state_dict())


def test_a_directory_without_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"holds no weights: neither \*\.safetensors nor pytorch_model\*\.bin"):
        open_checkpoint(tmp_path, tiny_model)


def test_a_missing_tensor_is_named(tiny_model: Path) -> None:
    with pytest.raises(MergeError, match=r"has no tensor model.layers.7.mlp.up_proj.weight, which the adapter updates"):
        open_checkpoint(tiny_model, tiny_model).tensor("model.layers.7.mlp.up_proj.weight")
