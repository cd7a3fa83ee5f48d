"""Tokens and labels equal those that TRL's SFTTrainer prepares for the same rows."""

from pathlib import Path

import datasets
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from raylora.data.chat_template import CHATML
from raylora.data.formats import detect_format, to_examples
from raylora.data.rows import IGNORE
from raylora.data.tokenize import Encoder


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHATML
    return tokenizer


def encode(row: dict, tokenizer: PreTrainedTokenizerBase, *, completion_only: bool = True) -> dict:
    (example,) = to_examples({1: row}, detect_format({1: row}, "x"), source="x")
    (encoded,) = Encoder(tokenizer, completion_only=completion_only, template_kwargs={}).rows(example)
    return encoded


CHAT = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "one"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "say 1 again:", "completion": " 1 1"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"text": "say the number and the word again"},
    ],
    ids=["prompt-completion", "conversational prompt-completion", "text"],
)
def test_tokens_and_labels_equal_trls(
    row: dict, tokenizer: PreTrainedTokenizerBase, tiny_model: Path, tmp_path: Path
) -> None:
    trainer = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    expected = trainer.train_dataset[0]
    encoded = encode(row, tokenizer)
    assert encoded["input_ids"] == expected["input_ids"]
    assert encoded["labels"] == expected["labels"]


def test_the_loss_mask_covers_every_assistant_turn_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [*CHAT, {"role": "user", "content": "say two"}, {"role": "assistant", "content": "two"}]
    encoded = encode({"messages": turns}, tokenizer)
    trained = [token for token in encoded["labels"] if token != IGNORE]
    assert tokenizer.decode(trained) == "one<|im_end|>\ntwo<|im_end|>\n"
    assert tokenizer.decode(encoded["prompt_ids"]).endswith("say two<|im_end|>\n<|im_start|>assistant\n")


def test_the_seed_articles_text_rows_get_one_bos_and_one_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    # mlabonne/guanaco-llama2-1k spells both, and Llama's tokenizer adds a BOS of its own
    tokenizer.add_bos_token = True
    bos = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=bos
    )
    encoded = encode({"text": "<s>[INST] hi [/INST] yo </s>"}, tokenizer)
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1
    assert encoded["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(encoded["prompt_ids"]) == "<s>[INST] hi [/INST]"
    assert encoded["labels"] == encoded["input_ids"]  # the whole text is trained on, as in TRL


def test_completion_only_can_be_turned_off(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode({"prompt": "a", "completion": " b"}, tokenizer, completion_only=False)
    assert encoded["labels"] == encoded["input_ids"]
