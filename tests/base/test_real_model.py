"""The real base model: a GGUF becomes a cached NF4 base that speaks."""

from pathlib import Path

import pytest

from raylora.base.load import load_base_model
from raylora.base.locate import find_checkpoint, load_tokenizer
from raylora.config.schema import BaseModelSection
from raylora.evaluate.generate import generate

GGUF = Path(__file__).parent.parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_loads_from_gguf_and_answers(tmp_path: Path) -> None:
    if not GGUF.is_file():
        pytest.skip("the model is not here: `make model`")
    section = BaseModelSection(name=str(GGUF))
    checkpoint = find_checkpoint(section, tmp_path)
    assert find_checkpoint(section, tmp_path) == checkpoint  # converted once
    tokenizer = load_tokenizer(section, checkpoint)
    model = load_base_model(section, tmp_path, "cpu")
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=True)
    answers = generate(
        model, tokenizer, [prompt["input_ids"]], stop_token_ids=[tokenizer.eos_token_id], max_new_tokens=8, batch_size=1
    )
    assert "Paris" in answers.texts[0]
