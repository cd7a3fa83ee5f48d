"""A GGUF file by llama.cpp's own tools answers as the model that it was made of."""

import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylora.base.locate import find_checkpoint
from raylora.config.schema import BaseModelSection
from raylora.evaluate.generate import generate
from raylora.export.gguf import convert, find_converter, quantize

MODEL = Path(__file__).parent.parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

PROMPTS = ("The capital of France is", "Monday, Tuesday, Wednesday,", "1, 2, 3, 4, 5,")
"""Prompts of whose next tokens the model is sure, so that 4 bits change none."""


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["q8_0", "q4_k_m"])
def test_a_quantized_file_answers_as_the_model_does(file_type: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    if not MODEL.is_file():
        pytest.skip("`make model` has not put the model in place")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # llama.cpp's threads spin
    directory = find_checkpoint(BaseModelSection(name=str(MODEL)), tmp_path)
    plain, quantized = tmp_path / "plain.gguf", tmp_path / "quantized.gguf"
    convert(find_converter(None, tmp_path), Path(directory), plain)
    quantize(plain, quantized, file_type, None)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    options = {"stop_token_ids": [tokenizer.eos_token_id], "max_new_tokens": 4, "batch_size": 1}
    expected = generate(AutoModelForCausalLM.from_pretrained(directory), tokenizer, ids, **options).texts
    model = llama_cpp.Llama(str(quantized), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
    for prompt, prompt_ids, text in zip(PROMPTS, ids, expected, strict=True):
        assert model.tokenize(prompt.encode(), add_bos=False) == prompt_ids
        assert model.create_completion(prompt_ids, max_tokens=4, temperature=0.0)["choices"][0]["text"] == text
