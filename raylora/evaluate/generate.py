"""Generates greedy answers to prompts, in left-padded batches with a KV cache."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from raylora.training.memory import with_less_memory


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
    batch_size: int,
    read: Callable[[list[int]], str] | None = None,
) -> Answers:
    """Generate a greedy answer to each prompt.

    Args:
        model: causal language model, on any device.
        tokenizer: tokenizer of the model, with a pad token.
        prompts: token ids of each prompt.
        stop_token_ids: tokens that end an answer, at least one.
        max_new_tokens: longest answer in tokens.
        batch_size: prompts per batch. A batch has prompts of similar length.
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
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        batch_prompts = [prompts[index] for index in batch]
        with torch.inference_mode(), _generation_config(model, greedy):
            answers = with_less_memory(partial(_continue, model, batch_prompts), len(batch))
        for index, ids in zip(batch, answers, strict=True):
            token_ids[index] = _until(ids, ends)
    seconds = time.perf_counter() - began
    # the end token takes a step too, hence the 1
    n_tokens = sum(min(len(ids) + 1, max_new_tokens) for ids in token_ids)
    return Answers(token_ids, list(map(read, token_ids)), n_tokens / seconds)


def _continue(model: PreTrainedModel, prompts: Sequence[Sequence[int]], n_prompts: int) -> list[list[int]]:
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
        output = model.generate(input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device))
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
