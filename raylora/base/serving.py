"""Keeps beside a model what serves it: the tokenizer with its chat template, and where generation stops."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from raylora.base.locate import load_tokenizer
from raylora.config.schema import BaseModelSection

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
"""Files of which a directory with a tokenizer has at least one."""


@dataclass(frozen=True)
class ServingFiles:
    """Tokenizer and generation settings of a model."""

    tokenizer: PreTrainedTokenizerBase
    """Tokenizer, with the chat template that the model was trained with."""

    generation_config: GenerationConfig
    """Settings of the base, with every token that ends an answer."""

    @classmethod
    def of_training(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        base: BaseModelSection,
        checkpoint: str,
        stop_token_ids: Iterable[int],
    ) -> "ServingFiles":
        """Return the files of a model that was trained with a tokenizer.

        Args:
            tokenizer: tokenizer, with its chat template.
            base: the base model.
            checkpoint: directory or Hub id of the base, whose other generation settings are kept.
            stop_token_ids: tokens that end answers in the training data.
        """
        settings = load_generation_config(checkpoint, base.revision)
        settings.eos_token_id = sorted({*stop_token_ids, *end_tokens(settings)})
        settings.pad_token_id = tokenizer.pad_token_id
        return cls(tokenizer, settings)

    @classmethod
    def of_adapter(cls, adapter: Path, base: BaseModelSection, checkpoint: str) -> "ServingFiles":
        """Return the files beside an adapter, and those of the base where the adapter has none.

        Args:
            adapter: directory that peft wrote.
            base: the base model.
            checkpoint: directory or Hub id of the base.
        """
        own_tokenizer = any((adapter / name).is_file() for name in TOKENIZER_FILES)
        tokenizer = load_tokenizer(base, str(adapter) if own_tokenizer else checkpoint)
        if (adapter / GENERATION_CONFIG_NAME).is_file():
            return cls(tokenizer, load_generation_config(str(adapter)))
        return cls(tokenizer, load_generation_config(checkpoint, base.revision))

    def save(self, directory: Path) -> None:
        """Write both into a directory."""
        self.tokenizer.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer puts a BOS token before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


def load_generation_config(checkpoint: str, revision: str | None = None) -> GenerationConfig:
    """Return the generation settings of a checkpoint; transformers' defaults if it has none.

    Args:
        checkpoint: directory or Hub id.
        revision: commit of a Hub id; None is the main branch.
    """
    try:
        return GenerationConfig.from_pretrained(checkpoint, **({} if revision is None else {"revision": revision}))
    except OSError:
        return GenerationConfig()


def end_tokens(settings: GenerationConfig) -> set[int]:
    """Return the tokens at which generation settings stop."""
    named = settings.eos_token_id
    return {token for token in (named if isinstance(named, list) else [named]) if token is not None}
