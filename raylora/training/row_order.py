"""Says which rows a trial trains on at which step: the order of transformers' Trainer, without its data loader."""

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices


class RowOrder:
    """The rows of each optimizer step of one trial, a function of its seed alone.

    As in transformers' Trainer, an epoch is a permutation by seed + epoch (accelerate's SeedableRandomSampler), cut
    into batches and those into steps; the last of each may be short.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a micro-batch.
        accumulation_steps: micro-batches of an optimizer step.
        seed: of the permutations.
        group_by_length: batch rows of like length together.
    """

    def __init__(
        self, lengths: list[int], *, batch_size: int, accumulation_steps: int, seed: int, group_by_length: bool
    ) -> None:
        self._lengths, self._batch_size, self._seed, self._grouped = lengths, batch_size, seed, group_by_length
        self._rows_per_step = batch_size * accumulation_steps
        self.steps_per_epoch = -(-len(lengths) // self._rows_per_step)
        self._epoch, self._order = -1, [0]

    def step(self, number: int) -> list[list[int]]:
        """Rows of each micro-batch of an optimizer step, which is counted from 0 over all epochs."""
        epoch, step = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        rows = self._order[step * self._rows_per_step : (step + 1) * self._rows_per_step]
        return [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed + epoch)
        if self._grouped:
            return get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)
        return torch.randperm(len(self._lengths), generator=generator).tolist()
