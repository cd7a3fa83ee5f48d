"""Losses of single rows add up to the loss of the part."""

from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from raylora.data.rows import IGNORE
from raylora.training import losses
from raylora.training.losses import eval_loss, likeliest_tokens, row_losses


@pytest.fixture
def part() -> datasets.Dataset:
    rows = [[3, 4, 5, 6, 7], [3, 9], [5, 6, 7]]
    labels = [[IGNORE, IGNORE, 5, 6, 7], [3, IGNORE], [5, 6, 7]]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": labels})


def test_row_losses_come_in_the_order_of_the_rows_and_add_up(tiny_model: Path, part: datasets.Dataset) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    found = row_losses(model, part, batch_size=2, pad_token_id=1)
    assert [count for _, count in found] == [3, 0, 2]  # a row's first token has no loss
    assert found[1][0] == 0.0
    alone = eval_loss(model, part.select([2]), batch_size=1, pad_token_id=1)
    assert found[2][0] / 2 == pytest.approx(alone, rel=1e-5)  # float32's rounding
    whole = eval_loss(model, part, batch_size=2, pad_token_id=1)
    assert sum(loss for loss, _ in found) / 5 == pytest.approx(whole, rel=1e-5)


def test_logits_are_computed_where_a_token_has_loss(
    tiny_model: Path, part: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    shapes = []
    model.lm_head.register_forward_hook(lambda *arguments: shapes.append(arguments[-1].shape[:2]))
    some = eval_loss(model, part, batch_size=1, pad_token_id=1)
    assert shapes == [(1, 0), (1, 2), (1, 3)]
    monkeypatch.setattr(losses, "_keeps_logits", lambda model: False)  # as a model of somebody's own code
    assert eval_loss(model, part, batch_size=1, pad_token_id=1) == pytest.approx(some, rel=1e-6)
    assert shapes[3:] == [(1, 2), (1, 3), (1, 5)]


def test_a_large_vocabulary_makes_batches_smaller(
    tiny_model: Path, part: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    options = {"batch_size": 3, "pad_token_id": 1}
    expected = [loss for loss, _ in row_losses(model, part, **options)]
    assert rows == [3]
    # room for the logits of four tokens: the rows have 1, 3 and 3
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * 4 * model.config.vocab_size)
    assert [loss for loss, _ in row_losses(model, part, **options)] == pytest.approx(expected, rel=1e-5)
    assert rows[1:] == [2, 1]
    monkeypatch.setattr(losses, "LOGITS_BYTES", 1)  # a row is never cut
    assert [loss for loss, _ in row_losses(model, part, **options)] == pytest.approx(expected, rel=1e-5)
    assert rows[3:] == [1, 1, 1]


def test_likeliest_tokens_are_those_of_single_rows(tiny_model: Path, part: datasets.Dataset) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    found = likeliest_tokens(model, part, batch_size=2, pad_token_id=1)
    for ids, row, first in zip(part["input_ids"], found, (2, 0, 1), strict=True):
        logits = model(torch.tensor([ids])).logits[0]
        # the token at a position is predicted by the position before it
        assert row == (logits[first - 1 : -1].argmax(-1).tolist() if first else [])
