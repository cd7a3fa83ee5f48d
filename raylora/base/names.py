"""Translates the names of a base's tensors from those in its checkpoint to those in the model, as transformers does."""

import re

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

_STATE = re.compile(r"(?<=\.weight)\..+")
"""Suffix that bitsandbytes appends to the name of a quantized weight: `.absmax`, `.quant_map` and the like."""


class TensorNames:
    """Names of the tensors of one model class."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Read the rules of a model class.

        Args:
            model: model without or with weights, before peft wraps its layers.
        """
        self._in_model = dict.fromkeys(model.state_dict(), True)
        self._prefix = model.base_model_prefix
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def to_model(self, stored: str) -> str:
        """Return the name in the model of a stored tensor, or of a scale of a quantized one.

        A tensor that transformers joins with others, such as one expert's weight, keeps its stored name.
        """
        weight = without_state(stored)
        name, joined = rename_source_key(weight, self._renamings, self._converters, self._prefix, self._in_model)
        return stored if joined else name + stored[len(weight) :]


def without_state(name: str) -> str:
    """Return the name of a weight for that of one of its scales, and any other name unchanged."""
    return _STATE.sub("", name)


def is_state(name: str) -> bool:
    """Return True for a scale or another part of a quantized weight's state."""
    return _STATE.search(name) is not None
