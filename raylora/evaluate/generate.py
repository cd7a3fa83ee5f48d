"""Generates greedy answers to prompts, in left-padded batches with a KV cache.

A model that is nearly the same as another one need not generate what both would say. The other's answer is its draft:
one forward pass shows how many of its tokens the model would choose itself, and it generates the rest.

Source: Stern et al. 2018, "Blockwise Parallel Decoding" (arXiv:1811.03115), with the other model's answer as proposal.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import datasets
import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from raylora.base.architecture import position_limit
from raylora.data.rows import IGNORE
from raylora.evaluate.dense import dense_copies
from raylora.run.activity import tell
from raylora.training.losses import likeliest_tokens
from raylora.training.memory import MIB, free_memory_mib, with_less_memory

MAX_PROMPTS = 64
"""Largest number of prompts at once of `auto`. Our choice: on a CPU, 48 at once are answered 1.4 to 2.4 times as
fast as in batches of 8 (benchmarks/generate.json)."""

CACHE_SHARE = 0.25
"""Share of the free memory for the KV cache. Its tensors are copied as they grow. Our choice."""


@dataclass(frozen=True)
class Answers:
    """Answers of one model to all prompts."""

    token_ids: list[list[int]]
    """Token ids of each answer, without end tokens."""

    texts: list[str]
    """Text of each answer, as `read` gives it."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int | Literal["auto"],
    read: Callable[[list[int]], str] | None = None,
    drafts: Sequence[Sequence[int]] | None = None,
) -> Answers:
    """Generate a greedy answer to each prompt.

    Args:
        model: causal language model, on any device.
        tokenizer: tokenizer of the model, with a pad token.
        prompts: token ids of each prompt.
        stop_token_ids: tokens that end an answer, at least one.
        max_new_tokens: longest answer in tokens.
        batch_size: prompts per batch, which have similar lengths; `auto` is `prompts_at_once`.
        read: turns the token ids of an answer into text; None decodes them without special tokens.
        drafts: answer of a similar model to each prompt, without its end token. They save time and change no answer,
            up to rounding.

    Returns:
        Answers in the order of the prompts.
    """
    model.eval()
    read = read or partial(tokenizer.decode, skip_special_tokens=True)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    ends = set(stop_token_ids)
    with torch.inference_mode(), _generation_config(model, greedy), dense_copies(model):
        begun = _check_drafts(model, prompts, drafts) if drafts else [[] for _ in prompts]
        token_ids = [_until(ids[:max_new_tokens], ends) for ids in begun]
        # without an end token yet
        unfinished = [index for index, ids in enumerate(begun) if len(token_ids[index]) == len(ids) < max_new_tokens]
        order = sorted(unfinished, key=lambda index: len(prompts[index]) + len(begun[index]))
        if batch_size == "auto":
            batch_size = prompts_at_once(model, max(map(len, prompts), default=0) + max_new_tokens)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            texts = [[*prompts[index], *begun[index]] for index in batch]
            n_new = max_new_tokens - min(len(begun[index]) for index in batch)
            counter = _Counter(len(prompts) - len(order) + start, len(prompts), n_new)
            answers = with_less_memory(partial(_continue, model, texts, n_new, counter), len(batch))
            for index, ids in zip(batch, answers, strict=True):
                token_ids[index] = _until([*begun[index], *ids][:max_new_tokens], ends)
    return Answers(token_ids, list(map(read, token_ids)))


def _check_drafts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Return how a model's own answers begin: the tokens of the draft that it would choose itself, and one more."""
    one_more = [0]  # whatever it is: its place shows which token the model would choose after the whole draft
    n_positions = position_limit(model.config)
    rows = [[*prompt, *draft, *one_more][:n_positions] for prompt, draft in zip(prompts, drafts, strict=True)]
    labels = [[IGNORE] * len(prompt) + row[len(prompt) :] for prompt, row in zip(prompts, rows, strict=True)]
    part = datasets.Dataset.from_dict({"input_ids": rows, "labels": labels})
    chosen = likeliest_tokens(model, part, batch_size=MAX_PROMPTS, pad_token_id=model.generation_config.pad_token_id)
    return [own[: _n_equal(own, draft) + 1] for own, draft in zip(chosen, drafts, strict=True)]


def _n_equal(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of tokens that two sequences have in common at their start."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(ids), len(others)))


def prompts_at_once(model: PreTrainedModel, length: int) -> int:
    """Return the number of prompts whose KV cache fits into a part of the free memory, from 1 to `MAX_PROMPTS`.

    Args:
        model: causal language model.
        length: tokens of the longest prompt and its answer.
    """
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * n_heads * head_dim * model.dtype.itemsize  # a key and a value
    free = CACHE_SHARE * MIB * free_memory_mib(str(model.device))
    return max(1, min(MAX_PROMPTS, int(free / (token_bytes * length))))


class _Counter(StoppingCriteria):
    """Never stops, and says how many prompts are answered; those of a batch by their share of the longest answer.

    Args:
        n_before: prompts answered before this batch.
        n_prompts: prompts in all.
        max_new_tokens: longest answer in tokens.
    """

    def __init__(self, n_before: int, n_prompts: int, max_new_tokens: int) -> None:
        self._n_prompts, self._max_new_tokens = n_prompts, max_new_tokens
        self._n_answered = float(n_before)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        self._n_answered += len(input_ids) / self._max_new_tokens  # a token of each prompt
        tell("answering held-out prompts", min(self._n_prompts, int(self._n_answered)), self._n_prompts)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _continue(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    counter: StoppingCriteria,
    n_prompts: int,
) -> list[list[int]]:
    """Return the tokens that a model generates after each prompt, `n_prompts` at once.

    An answer ends where a base such as GPT-2 has no position for a further token.
    """
    answers: list[list[int]] = []
    n_positions = position_limit(model.config)
    for start in range(0, len(prompts), n_prompts):
        part = prompts[start : start + n_prompts]
        width = max(map(len, part))
        room = max_new_tokens if n_positions is None else n_positions + 1 - width  # the last token needs no position
        if room < max_new_tokens and len(part) > 1:  # the shorter ones have more room
            answers += _continue(model, part, max_new_tokens, counter, 1)
            continue
        input_ids = torch.full((len(part), width), model.generation_config.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(part):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, width - len(prompt) :] = 1
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=min(max_new_tokens, room),
            stopping_criteria=StoppingCriteriaList([counter]),
        )
        answers += output[:, width:].tolist()
    return answers


@contextmanager
def _generation_config(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Give a model other generation settings for a while.

    `generate` takes what its argument leaves open, such as a repetition penalty, from the model's own settings.
    """
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Return the tokens before the first end token."""
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]
