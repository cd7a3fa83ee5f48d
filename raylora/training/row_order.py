"""Lists the rows of each optimizer step of a trial, in the order of transformers' Trainer, without its data loader."""

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices


class RowOrder:
    """Rows of each optimizer step of one trial, a function of its seed.

    An epoch is a permutation by seed + epoch, as in transformers' Trainer (accelerate's SeedableRandomSampler). It is
    divided into micro-batches, and these into steps. The last micro-batch and the last step of an epoch may be short.

    Args:
        lengths: tokens of each row.
        batch_size: rows per micro-batch.
        accumulation_steps: micro-batches per optimizer step.
        seed: seed of the permutations.
        group_by_length: True to batch rows of similar length together.
    """

    def __init__(
        self, lengths: list[int], *, batch_size: int, accumulation_steps: int, seed: int, group_by_length: bool
    ) -> None:
        self._lengths, self._batch_size, self._seed, self._grouped = lengths, batch_size, seed, group_by_length
        self._rows_per_step = batch_size * accumulation_steps
        self.steps_per_epoch = -(-len(lengths) // self._rows_per_step)
        self._epoch, self._order = -1, [0]

    def step(self, number: int) -> list[list[int]]:
        """Return the rows of each micro-batch of an optimizer step.

        Args:
            number: the step, counted from 0 over all epochs.
        """
        epoch, step = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        rows = self._order[step * self._rows_per_step : (step + 1) * self._rows_per_step]
        return [rows[start : start + self._batch_size] for start in range(0, len(rows), self._batch_size)]

    def _permutation(self, epoch: int) -> list[int]:
        """Return the order of all rows in an epoch."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        if self._grouped:
            return get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)
        return torch.randperm(len(self._lengths), generator=generator).tolist()
