"""Reads the rows of a token cache from its memory map."""

from pathlib import Path

import datasets
import torch
from torch import Tensor

IGNORE = -100
"""Label of tokens without loss, the default `ignore_index` of torch's cross entropy."""


def load_part(tokens_dir: Path, part: str) -> datasets.Dataset:
    """Open one part of a token cache, memory-mapped.

    Args:
        tokens_dir: token cache.
        part: `train`, `validation` or `heldout`.

    Returns:
        Columns `input_ids`, `labels`, `prompt_ids`, `references`.
    """
    return datasets.load_from_disk(str(tokens_dir / part), keep_in_memory=False)


class TokenRows:
    """Rows of one part of a token cache, read from the memory map without copies."""

    def __init__(self, part: datasets.Dataset) -> None:
        columns = [part.data.column(name).combine_chunks() for name in ("input_ids", "labels")]
        self._offsets = columns[0].offsets.to_numpy()
        self._input_ids, self._labels = (column.values.to_numpy(zero_copy_only=False) for column in columns)
        self.lengths: list[int] = (self._offsets[1:] - self._offsets[:-1]).tolist()
        """Tokens of each row, with and without loss."""

    def __len__(self) -> int:
        return len(self.lengths)

    def input_ids(self, row: int) -> Tensor:
        """Return the token ids of a row: (length,), int64."""
        return torch.tensor(self._input_ids[self._offsets[row] : self._offsets[row + 1]], dtype=torch.int64)

    def labels(self, row: int) -> Tensor:
        """Return the labels of a row: (length,), int64; IGNORE for a token without loss."""
        return torch.tensor(self._labels[self._offsets[row] : self._offsets[row + 1]], dtype=torch.int64)

    def n_predicted(self, row: int) -> int:
        """Return the number of tokens with loss. A row's first token has none: no token precedes it."""
        return int((self._labels[self._offsets[row] + 1 : self._offsets[row + 1]] != IGNORE).sum())
