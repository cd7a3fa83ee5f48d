"""Makes a tiny random Llama and a few rows, for tests and for `search_spaces/smoke.yaml`.

Run as `python -m raylora.testing DIRECTORY`.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from raylora.cli.command import command, run_command


@command
def make(directory: Annotated[Path, typer.Argument(help="Folder for model/ and rows.jsonl.")]) -> None:
    """Write a tiny random model and 64 rows."""
    make_tiny_model(directory / "model")
    make_rows(directory / "rows.jsonl")


def make_tiny_model(directory: Path, *, chat_template: str | None = None, seed: int = 0) -> Path:
    """Save a random Llama of 2 layers and width 64 with a byte-level tokenizer of 300 tokens, about 500 KiB.

    Args:
        directory: folder for the model.
        chat_template: Jinja template of the tokenizer; None gives it none.
        seed: seed of the weights.

    Returns:
        The directory.
    """
    # these load torch, which makes the command's help wait
    import torch  # noqa: PLC0415
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["say the number and the word again"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_rows(path: Path, n: int = 64) -> Path:
    """Save n rows of `prompt` and `completion` as JSONL, with n different prompts.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"say {number} again:", "completion": f" {number} {number}"} for number in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    run_command(make)
