"""Scores by hand, and generation against transformers' own."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from raylora.base.load import load_base_model
from raylora.config.schema import BaseModelSection
from raylora.evaluate import dense
from raylora.evaluate import generate as generation
from raylora.evaluate.dense import dense_copies
from raylora.evaluate.generate import Answers, generate, prompts_at_once
from raylora.evaluate.scores import agreement, bleu_p_value, score, score_calls
from raylora.training.memory import MIB


def test_exact_match_takes_any_reference_and_trims() -> None:
    scores = score([" a b ", "c"], [["x", "a b"], ["d"]])
    assert scores["exact_match"] == 0.5


def test_perfect_answers_score_full_marks() -> None:
    text = "the cat sat on the mat"
    scores = score([text, text], [[text], [text, "another answer"]])
    assert scores["bleu"] == pytest.approx(100)
    assert scores["chrf"] == pytest.approx(100)
    assert scores["rouge_l"] == pytest.approx(1)


def test_rouge_l_by_hand() -> None:
    # longest common subsequence of "a b c" and "a c d" is "a c": precision 2/3, recall 2/3
    assert score(["a b c"], [["a c d"]])["rouge_l"] == pytest.approx(2 / 3)


def test_numbers_are_compared_as_numbers() -> None:
    texts = ["so #### 1,200", "#### 3.0", "no answer", "#### 5"]
    references = [["#### 1200"], ["#### 3"], ["#### 1"], ["#### 6"]]
    assert score(texts, references, r"#### (.+)")["answer_match"] == 0.5


def test_the_first_group_is_the_answer_whatever_groups_it_holds() -> None:
    scores = score(["about 2.5 or 7", "none"], [["7"], ["3"]], r"(-?\d+(\.\d+)?)")
    assert scores["answer_match"] == 0.5


def test_agreement_counts_over_the_longer_answer() -> None:
    one, other = Answers([[1, 2, 3], [4]], ["", ""]), Answers([[1, 9], [4]], ["", ""])
    # first: 1 of 3 positions; second: 1 of 1
    assert agreement(one, other) == {"tokens": 0.5, "answers": 0.5}


def test_a_difference_in_bleu_is_told_from_chance() -> None:
    words = ("cat", "dog", "cow", "hen", "fox", "owl", "bat", "ant")
    references = [[f"the {word} sat on the mat today", "no"] for word in words]
    texts = [accepted[0] for accepted in references]
    right, wrong = Answers([], texts), Answers([], ["a completely different answer altogether"] * 8)
    one_off = Answers([], [*texts[:-1], "the ant sat"])
    # whichever way answers are swapped, the difference is the same: it may be chance
    assert bleu_p_value(right, right, references) == 1.0
    assert bleu_p_value(right, one_off, references) == 1.0
    # of 2^8 ways to swap, only two part them as far; four standard errors of 10,000 draws
    assert bleu_p_value(right, wrong, references) == pytest.approx(2 / 2**8, abs=0.004)


def test_left_padded_batches_answer_as_single_prompts_do(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, pad_token="</s>")
    prompts = [tokenizer(text).input_ids for text in ("say", "say the number again", "the word")]
    answers = generate(model, tokenizer, prompts, stop_token_ids=[1], max_new_tokens=6, batch_size=3)
    for prompt, ids in zip(prompts, answers.token_ids, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=1)
        assert [token for token in alone[0, len(prompt) :].tolist() if token != 1] == ids


def test_answers_are_greedy_whatever_the_bases_own_settings_are(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, pad_token="</s>")
    prompts = [tokenizer("say the number again").input_ids]
    options = {"stop_token_ids": [1], "max_new_tokens": 12, "batch_size": 1}
    greedy = generate(model, tokenizer, prompts, **options)
    own = GenerationConfig(do_sample=True, repetition_penalty=50.0, no_repeat_ngram_size=1, eos_token_id=1)
    model.generation_config = own
    assert generate(model, tokenizer, prompts, **options).token_ids == greedy.token_ids
    assert model.generation_config is own


def test_generation_stops_at_every_stop_token(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, pad_token="</s>")
    prompts = [tokenizer("say the number again").input_ids]
    (ids,) = generate(model, tokenizer, prompts, stop_token_ids=[1], max_new_tokens=6, batch_size=1).token_ids
    (cut,) = generate(model, tokenizer, prompts, stop_token_ids=[1, ids[3]], max_new_tokens=6, batch_size=1).token_ids
    assert cut == ids[: ids.index(ids[3])]


def test_an_answer_ends_where_a_base_has_no_further_position(tiny_model: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=12, n_embd=16, n_layer=1, n_head=2)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, pad_token="</s>")
    prompts = [list(range(5, 5 + length)) for length in (3, 10, 12)]
    options = {"stop_token_ids": [1], "max_new_tokens": 6}
    together = generate(model, tokenizer, prompts, batch_size=3, **options).token_ids
    assert [len(ids) for ids in together] == [6, 3, 1]  # the last token needs no position
    assert generate(model, tokenizer, prompts, batch_size=1, **options).token_ids == together
    assert generate(model, tokenizer, prompts, batch_size=3, drafts=together, **options).token_ids == together


def test_drafts_change_no_answer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, pad_token="</s>")
    prompts = [tokenizer(text).input_ids for text in ("say", "say the number again", "the word", "one", "two", "six")]
    whole = generate(model, tokenizer, prompts, stop_token_ids=[1], max_new_tokens=9, batch_size=3).token_ids
    end = whole[0][4]  # ends the first answer after at most four tokens
    options = {"stop_token_ids": [1, end], "max_new_tokens": 9, "batch_size": 2}
    expected = generate(model, tokenizer, prompts, **options).token_ids
    assert {len(ids) for ids in expected} > {9} and len(expected[0]) <= 4
    wrong = max(max(ids) for ids in whole) + 1
    drafts = [
        expected[0],
        expected[1][:3],  # too short
        [*expected[2], wrong],  # too long
        [wrong, *expected[3][1:]],
        [*expected[4][:2], wrong, *expected[4][3:]],
        [],
    ]
    calls: list[int] = []
    continue_ = generation._continue
    monkeypatch.setattr(generation, "_continue", lambda *args: calls.append(len(args[1])) or continue_(*args))
    assert generate(model, tokenizer, prompts, drafts=drafts, **options).token_ids == expected
    assert 0 < sum(calls) < len(prompts)
    calls.clear()
    assert generate(model, tokenizer, prompts, drafts=expected, **options).token_ids == expected
    assert not calls  # one forward pass shows that nothing is left to generate


@pytest.fixture
def quantized(tiny_model: Path, tmp_path: Path) -> PreTrainedModel:
    return load_base_model(BaseModelSection(name=str(tiny_model)), tmp_path, "cpu")


def n_dense(model: PreTrainedModel) -> int:
    return sum("forward" in vars(module) for module in model.modules())


def test_dense_copies_of_4_bit_layers_answer_to_the_bit(
    quantized: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    input_ids = torch.tensor([[3, 4, 5, 6]])
    expected = quantized(input_ids).logits
    with dense_copies(quantized):
        assert n_dense(quantized) == 14
        assert torch.equal(quantized(input_ids).logits, expected)
    assert n_dense(quantized) == 0
    # a share of 0.5 of this is room for two layers of 64 x 64, in float32
    monkeypatch.setattr(dense, "free_memory_mib", lambda device: 4 * 64 * 64 * 4 / MIB)
    with dense_copies(quantized):
        assert 0 < n_dense(quantized) < 14
        assert torch.equal(quantized(input_ids).logits, expected)


def test_generation_takes_fewer_prompts_at_once_where_memory_is_short(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, pad_token="</s>")
    prompts = [tokenizer(text).input_ids for text in ("say", "say the number again", "the word", "one", "two")]
    options = {"stop_token_ids": [1], "max_new_tokens": 6, "batch_size": "auto"}
    expected = generate(model, tokenizer, prompts, **options)
    whole = model.generate
    sizes: list[int] = []

    def short(input_ids: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("made up")
        return whole(input_ids=input_ids, **others)

    monkeypatch.setattr(model, "generate", short)
    assert generate(model, tokenizer, prompts, **options).token_ids == expected.token_ids
    assert sizes == [5, 2, 2, 1]


def test_prompts_at_once_fill_a_quarter_of_the_free_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = model.config
    # a key and a value of each layer, in float32
    prompt = 2 * config.num_hidden_layers * config.num_key_value_heads * 100 * 4 * 16
    assert config.hidden_size // config.num_attention_heads == 16
    for n, expected in ((5, 5), (0.5, 1), (1000, 64)):
        monkeypatch.setattr(generation, "free_memory_mib", lambda device, n=n: 4 * n * prompt / MIB)
        assert prompts_at_once(model, 100) == expected


def test_tool_calls_are_scored_where_they_are_expected() -> None:
    scores = score_calls(["[1]", "", "text"], ["[1]", "[2]", ""])
    assert scores == [{"tool_call_match": 1.0}, {"tool_call_match": 0.0}, {}]
