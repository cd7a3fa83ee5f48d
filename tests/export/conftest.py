"""A real fine-tune to export: one trial on the demo's rows, merged and checked. It takes minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

ONE_TRIAL = "[{r: 8, lora_alpha: 16, lora_dropout: 0.05, learning_rate: 2e-3}]"


def raylora(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the search, with merged models in NF4 and in bfloat16."""
    if not (ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf").is_file():
        pytest.skip("`make model` has not put the model in place")
    run = tmp_path_factory.mktemp("search") / "run"
    settings = {"starting_points": ONE_TRIAL, "search.n_trials": "1", "merge.formats": "[nf4, bf16]"}
    options = [text for key, value in settings.items() for text in (f"--{key}", value)]
    raylora("raylora.search", "search_spaces/demo.yaml", "--output", str(run), *options)
    return run
