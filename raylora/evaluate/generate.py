"""Generates greedy answers to prompts, in left-padded batches with a KV cache."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from raylora.evaluate.dense import dense_copies
from raylora.run.activity import tell
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

    tokens_per_second: float
    """Generated tokens per second, end tokens included."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int | Literal["auto"],
    read: Callable[[list[int]], str] | None = None,
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
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    token_ids: list[list[int]] = [[] for _ in prompts]
    began = time.perf_counter()
    with torch.inference_mode(), _generation_config(model, greedy), dense_copies(model):
        if batch_size == "auto":
            batch_size = prompts_at_once(model, max(map(len, prompts), default=0) + max_new_tokens)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            counter = _Counter(start, len(prompts), max_new_tokens)
            answers = with_less_memory(
                partial(_continue, model, [prompts[index] for index in batch], counter), len(batch)
            )
            for index, ids in zip(batch, answers, strict=True):
                token_ids[index] = _until(ids, ends)
    seconds = time.perf_counter() - began
    # the end token takes a step too, hence the 1
    n_tokens = sum(min(len(ids) + 1, max_new_tokens) for ids in token_ids)
    return Answers(token_ids, list(map(read, token_ids)), n_tokens / seconds)


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
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], counter: StoppingCriteria, n_prompts: int
) -> list[list[int]]:
    """Return the tokens that a model generates after each prompt, `n_prompts` at once."""
    answers = []
    for start in range(0, len(prompts), n_prompts):
        part = prompts[start : start + n_prompts]
        width = max(map(len, part))
        input_ids = torch.full((len(part), width), model.generation_config.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(part):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, width - len(prompt) :] = 1
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
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
