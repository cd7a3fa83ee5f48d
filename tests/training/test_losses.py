"""Losses of single rows add up to the loss of the part."""

from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForCausalLM

from raylora.data.rows import IGNORE
from raylora.training.losses import eval_loss, row_losses


def test_row_losses_come_in_the_order_of_the_rows_and_add_up(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = [[3, 4, 5, 6, 7], [3, 9], [5, 6, 7]]
    labels = [[IGNORE, IGNORE, 5, 6, 7], [3, IGNORE], [5, 6, 7]]
    part = datasets.Dataset.from_dict({"input_ids": rows, "labels": labels})
    losses = row_losses(model, part, batch_size=2, pad_token_id=1)
    assert [count for _, count in losses] == [3, 0, 2]  # a row's first token has no loss
    assert losses[1][0] == 0.0
    alone = eval_loss(model, part.select([2]), batch_size=1, pad_token_id=1)
    assert losses[2][0] / 2 == pytest.approx(alone, rel=1e-5)  # float32's rounding
    whole = eval_loss(model, part, batch_size=2, pad_token_id=1)
    assert sum(loss for loss, _ in losses) / 5 == pytest.approx(whole, rel=1e-5)
