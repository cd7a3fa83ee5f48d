"""A fine-tune that is exported by llama.cpp's own tools answers as the merged model does."""

import os
from pathlib import Path

import pytest

from raylora.run.atomic import read_json
from tests.export.conftest import raylora


@pytest.fixture(scope="module", autouse=True)
def _needs_llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("file_type", ["q8_0", "q4_k_m"])
def test_a_quantized_file_answers_as_the_merged_model_does(
    file_type: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    import llama_cpp  # noqa: PLC0415  # not installed everywhere

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # llama.cpp's threads spin
    searched, out = request.getfixturevalue("searched"), tmp_path / "out"
    raylora("raylora.export", str(searched), "--format", "gguf", "--gguf-type", file_type, "--output", str(out))
    file = out / f"model-{file_type}.gguf"
    model = llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    samples = read_json(searched / "evaluation.json")["samples"]
    assert len(samples) >= 3
    for sample in samples:
        prompt_ids = model.tokenize(sample["prompt"].encode(), add_bos=False, special=True)
        completion = model.create_completion(prompt_ids, max_tokens=24, temperature=0.0)
        assert completion["choices"][0]["text"].strip() == sample["merged_bf16"].strip()
