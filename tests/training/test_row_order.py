"""Row order: that of transformers' Trainer and accelerate, without their loaders."""

from pathlib import Path

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler

from raylora.data.rows import IGNORE, TokenRows
from raylora.training.row_order import RowOrder


def order(n: int = 10, batch_size: int = 3, accumulation_steps: int = 2, **options: object) -> RowOrder:
    values = {"seed": 5, "group_by_length": False, **options}
    return RowOrder([7] * n, batch_size=batch_size, accumulation_steps=accumulation_steps, **values)


def test_epochs_are_accelerates_permutations_cut_into_batches_and_steps() -> None:
    rows = order()
    assert rows.steps_per_epoch == 2  # 10 rows: batches of 3, 3, 3 and 1, two of them a step
    for epoch in range(3):
        sampler = SeedableRandomSampler(range(10), data_seed=5)
        sampler.set_epoch(epoch)
        drawn = [rows.step(2 * epoch + step) for step in range(2)]
        assert [[len(batch) for batch in step] for step in drawn] == [[3, 3], [3, 1]]
        assert [row for step in drawn for batch in step for row in batch] == list(sampler)


def test_any_step_can_be_asked_for_at_any_time() -> None:
    assert order().step(5) == [order().step(number) for number in range(6)][5]


def test_rows_of_like_length_can_be_batched_together() -> None:
    lengths = [1, 50] * 32
    rows = RowOrder(lengths, batch_size=4, accumulation_steps=1, seed=0, group_by_length=True)
    batches = [batch for step in range(rows.steps_per_epoch) for batch in rows.step(step)]
    assert sorted(row for batch in batches for row in batch) == list(range(64))
    mixed = sum(len({lengths[row] for row in batch}) > 1 for batch in batches)
    assert mixed <= 4  # one a mega-batch at most


def test_token_rows_are_those_of_the_cache(tmp_path: Path) -> None:
    rows = {"input_ids": [[1, 2, 3], [4, 5]], "labels": [[1, IGNORE, 3], [IGNORE, 5]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "part")
    tokens = TokenRows(datasets.load_from_disk(tmp_path / "part"))
    assert (len(tokens), tokens.lengths) == (2, [3, 2])
    assert [tokens.input_ids(row).tolist() for row in range(2)] == rows["input_ids"]
    assert [tokens.labels(row).tolist() for row in range(2)] == rows["labels"]
    assert [tokens.n_predicted(row) for row in range(2)] == [1, 1]  # a row's first token is predicted by none
    assert tokens.input_ids(0).dtype == torch.int64
