"""Which engine a lane gets, and what it says when it cannot pack."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from raylora.base.locate import load_tokenizer
from raylora.config.schema import SearchConfig
from raylora.data.prepare import prepare_data
from raylora.errors import PackingError
from raylora.training import choose as engines
from raylora.training.choose import load_engine
from raylora.training.memory import Fit, MemoryEstimate
from raylora.training.packed import layers
from raylora.training.packed.engine import PackedEngine
from raylora.training.packed.forward import Pack
from raylora.training.packed.verify import Reference
from raylora.training.trl import TrlEngine

MEMORY = MemoryEstimate(
    base_mib=1, trial_mib=1, token_mib=0.001, checkpointed_token_mib=0.001, logits_mib=0.01, micro_batch_tokens=64
)


def load(config: SearchConfig, tmp_path: Path, memory: MemoryEstimate = MEMORY) -> PackedEngine | TrlEngine:
    data = prepare_data(config.data, load_tokenizer(config.base_model, config.base_model.name), tmp_path)
    options = {"tokens_dir": data.tokens_dir, "cache_dir": tmp_path, "device": "cpu"}
    return load_engine(config, **options, slots=7, memory=memory)


def test_packing_is_the_default(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    engine = load(make_config(), tmp_path)
    assert isinstance(engine, PackedEngine)
    assert engine.slots == 7


def test_one_trial_at_a_time_can_be_asked_for(make_config: Callable[..., SearchConfig], tmp_path: Path) -> None:
    engine = load(make_config(search={"engine": "trl"}), tmp_path)
    assert isinstance(engine, TrlEngine)
    assert engine.reason is None


def test_what_cannot_be_packed_trains_with_trl_and_says_why(
    make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    engine = load(make_config(training={"optim": "adafactor"}), tmp_path)
    assert isinstance(engine, TrlEngine)
    assert engine.reason == "training.optim is adafactor, which only TRL's trainer has"
    with pytest.raises(PackingError, match=r"training\.optim is adafactor"):
        load(make_config(training={"optim": "adafactor"}, search={"engine": "packed"}), tmp_path)


def test_a_model_that_cannot_be_packed_is_found_out(
    make_config: Callable[..., SearchConfig], tiny_model: Path, tmp_path: Path
) -> None:
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "gemma2" / name).write_bytes((tiny_model / name).read_bytes())
    engine = load(make_config(base_model={"name": str(tmp_path / "gemma2")}), tmp_path)
    assert isinstance(engine, TrlEngine)
    assert (engine.reason or "").startswith("the model caps its attention scores (softcap)")


def test_a_model_that_computes_something_else_in_a_pack_is_found_out(
    make_config: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = engines.measure_reference

    def halved(*args: Any, **options: Any) -> Reference:
        """A reference whose adapters act half as strongly as in the pack."""
        found = measure(*args, **options)
        return replace(found, gradients=[{name: g / 2 for name, g in one.items()} for one in found.gradients])

    monkeypatch.setattr(engines, "measure_reference", halved)
    engine = load(make_config(), tmp_path)
    assert isinstance(engine, TrlEngine)
    assert engine.reason == "packed, the gradient of an adapter of rank 8 differs from peft's by 100.0%"


def test_kernels_that_fail_their_check_are_not_used_and_it_says_so(
    make_config: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []

    def fails(*args: object) -> None:
        raise PackingError("the gradient of rank 8 differs")

    monkeypatch.setattr(engines, "has_fused_products", lambda device, dtype: True)
    monkeypatch.setattr(engines, "check_pack", lambda pack, *args: checked.append(pack.fused))
    monkeypatch.setattr(engines, "check_kernels", lambda *args: None)
    engine = load(make_config(), tmp_path)
    assert isinstance(engine, PackedEngine) and engine.pack.fused and not engine.notes and checked == [True]
    monkeypatch.setattr(engines, "check_kernels", fails)
    engine = load(make_config(), tmp_path)
    assert isinstance(engine, PackedEngine) and not engine.pack.fused and checked == [True, True, False, False]
    assert engine.notes == ["fused kernels are not used: the gradient of rank 8 differs"]
    assert engine.pack.fused_layers  # which have not failed
    engine = load(make_config(search={"fused_kernels": False}), tmp_path)
    assert isinstance(engine, PackedEngine) and not engine.notes
    assert not engine.pack.fused and not engine.pack.fused_layers


@pytest.mark.parametrize("kernels_fail", [False, True])
def test_layers_that_fail_their_check_are_not_used_and_it_says_so(
    make_config: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels_fail: bool
) -> None:
    def check(pack: Pack, *args: object) -> None:
        if pack.fused_layers or (pack.fused and kernels_fail):
            raise PackingError("the loss differs")

    monkeypatch.setattr(engines, "has_fused_products", lambda device, dtype: True)
    monkeypatch.setattr(engines, "check_pack", check)
    monkeypatch.setattr(engines, "check_kernels", lambda *args: None)
    engine = load(make_config(), tmp_path)
    assert isinstance(engine, PackedEngine) and not engine.pack.fused_layers
    assert engine.pack.fused != kernels_fail
    off = ["kernels", "layers"] if kernels_fail else ["layers"]
    assert engine.notes == [f"fused {name} are not used: the loss differs" for name in off]


def test_a_wrong_norm_is_found_out_by_the_check_of_a_lane(
    make_config: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * 1.01, None, None

    monkeypatch.setattr(layers._RmsNorm, "backward", wrong)
    engine = load(make_config(), tmp_path)
    assert isinstance(engine, PackedEngine) and not engine.pack.fused_layers
    (note,) = engine.notes
    assert note.startswith("fused layers are not used: packed, the gradient of an adapter of rank 8 differs from peft")


def test_attention_that_the_pack_has_not_is_left_to_trl(
    make_config: Callable[..., SearchConfig], tmp_path: Path
) -> None:
    engine = load(make_config(base_model={"attn_implementation": "eager"}), tmp_path)
    assert isinstance(engine, TrlEngine)
    assert (engine.reason or "").startswith("base_model.attn_implementation is eager, which only TRL's trainer uses")
    assert engine.model.config._attn_implementation == "eager"


def test_a_pack_takes_no_more_than_there_is_memory_for(
    make_config: Callable[..., SearchConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "free_memory_mib", lambda device: 10.0)
    # 9 MiB usable; half of them take 70 tokens of 0.064 MiB, which leaves 4.52 MiB for trials of 2 MiB
    small = MemoryEstimate(
        base_mib=1, trial_mib=2, token_mib=0.054, checkpointed_token_mib=0.054, logits_mib=0.01, micro_batch_tokens=64
    )
    engine = load(make_config(), tmp_path, small)
    assert isinstance(engine, PackedEngine)
    assert engine.slots == 2
    assert 64 <= engine.tokens_per_pass <= 70


def test_activations_are_recomputed_only_where_half_of_the_pack_would_not_fit() -> None:
    estimate = MemoryEstimate(
        base_mib=0, trial_mib=10, token_mib=1, checkpointed_token_mib=0.1, logits_mib=0, micro_batch_tokens=100
    )

    def fit(free_mib: float) -> Fit:
        return estimate.fit(free_mib, slots=8, tokens=400, checkpointing="auto")

    assert fit(1000) == Fit(8, 400, False)  # 900 usable, of which 400 for the pass
    assert not fit(500).checkpointing and fit(500).tokens >= 200  # 450 usable, 225 of them for the pass
    assert fit(400) == Fit(8, 400, True)  # 180 tokens would fit without
    assert estimate.fit(10_000, slots=8, tokens=400, checkpointing=True) == Fit(8, 400, True)


def test_trials_leave_room_for_a_checkpoint_where_it_takes_more_than_a_pass() -> None:
    estimate = MemoryEstimate(
        base_mib=5, trial_mib=10, token_mib=1, checkpointed_token_mib=1, logits_mib=0, micro_batch_tokens=10
    )
    large = replace(estimate, checkpoint_mib=50)
    assert [one.fit(100, slots=8, tokens=10, checkpointing=False).slots for one in (estimate, large)] == [8, 4]
    assert large.total_mib(Fit(4, 10, False)) == 5 + 4 * 10 + 50
    # fewer activations would make no room for a trial more
    cheaper = replace(large, checkpointed_token_mib=0.1)
    assert cheaper.fit(80, slots=8, tokens=10, checkpointing="auto") == Fit(2, 10, False)
