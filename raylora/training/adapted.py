"""Puts a peft adapter on a resident base for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


@contextmanager
def adapted(base: PreTrainedModel, settings: LoraConfig) -> Iterator[PeftModel]:
    """Yield the base with a fresh adapter. Afterwards restore the bare base, frozen.

    Args:
        base: frozen base.
        settings: settings of the adapter.
    """
    model = get_peft_model(base, settings)
    try:
        yield model
    finally:
        model.unload()
        base.__dict__.pop("peft_config", None)
        base.requires_grad_(False)
