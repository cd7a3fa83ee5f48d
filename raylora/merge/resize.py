"""Gives a base the number of embeddings that an adapter has: those of a model whose tokenizer got more tokens."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from raylora.base.architecture import without_weights
from raylora.base.load import load_plain
from raylora.base.locate import digest, file_state, find_checkpoint, load_model_config, source_options
from raylora.base.serving import ServingFiles
from raylora.config.schema import BaseModelSection
from raylora.merge.adapter_update import BASE_PREFIX, embedding_modules, read_tensors
from raylora.run.lock import made_once

SAVED_AS = ("original_module.weight", "token_adapter.base_layer.weight", "base_layer.weight", "weight")
"""Names of an embedding's weight in the files of an adapter, below its module: what the base had comes first."""


def resized_base(base: BaseModelSection, adapter: Path, cache_dir: Path) -> BaseModelSection:
    """Return the base with as many embeddings as an adapter has, which peft needs to load the adapter.

    A base of another size is written once more, with the adapter's embeddings and tokenizer.

    Args:
        base: the base model.
        adapter: directory that peft wrote.
        cache_dir: holds resized bases.

    Returns:
        The base itself if the adapter has no embeddings of its own, or as many as the base.
    """
    checkpoint = find_checkpoint(base, cache_dir)
    config = load_model_config(base, checkpoint)
    saved = _saved_embeddings(adapter, without_weights(config, trust_remote_code=base.trust_remote_code))
    if all(len(weight) == config.get_text_config().vocab_size for weight in saved.values()):
        return base
    files = [state for file in sorted(adapter.iterdir()) if file.is_file() for state in file_state(file)]
    commit = getattr(config, "_commit_hash", None) or base.revision

    def write(directory: Path) -> None:
        own_dtype = config.get_text_config().dtype or config.dtype or torch.bfloat16
        model = load_plain(checkpoint, "cpu", own_dtype, **source_options(base))
        _resize(model, saved)
        model.save_pretrained(directory)
        ServingFiles.of_adapter(adapter, base, checkpoint).save(directory)

    resized = made_once(cache_dir / "resized" / digest(checkpoint, commit, *files), write)
    return base.model_copy(update={"name": str(resized), "revision": None})


def _saved_embeddings(adapter: Path, base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the whole embeddings that an adapter has: module of the base -> weight, (n_embeddings, dim)."""
    forms = {module: [f"{BASE_PREFIX}{module}.{form}" for form in SAVED_AS] for module in embedding_modules(base)}
    tensors, saved = read_tensors(adapter, {name for names in forms.values() for name in names}), {}
    for module, names in forms.items():
        if found := [tensors[name] for name in names if name in tensors]:
            saved[module] = found[0]
    return saved


def _resize(model: PreTrainedModel, saved: dict[str, torch.Tensor]) -> None:
    """Resize the embeddings of a model in place, and set them to those of `_saved_embeddings`."""
    (size,) = {len(weight) for weight in saved.values()}
    model.resize_token_embeddings(size, mean_resizing=False)
    for module, weight in saved.items():
        model.get_submodule(module).weight.data.copy_(weight)
