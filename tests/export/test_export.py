"""Exports are whole: a GGUF by llama.cpp's own converter, or an error that says what is missing."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from raylora.errors import ConfigError, MergeError
from raylora.export import hub
from raylora.export.gguf import CONVERTER, check_quantizer, convert, find_converter, quantize
from raylora.export.hub import push
from raylora.report.model_card import licence


def test_gguf_needs_llama_cpps_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--llama-cpp must be a checkout of llama\.cpp that holds convert_hf"):
        find_converter(tmp_path, tmp_path)
    (tmp_path / CONVERTER).touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs sentencepiece; `pip install sentencepiece`"):
        find_converter(tmp_path, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert find_converter(tmp_path, tmp_path) == tmp_path / CONVERTER


def test_quantizing_needs_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    check_quantizer("bf16", None)
    with pytest.raises(
        ConfigError, match=r"q4_k_m needs llama\.cpp: `pip install llama-cpp-python`, or llama-quantize"
    ):
        check_quantizer("q4_k_m", None)
    program = tmp_path / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho no such type >&2\nexit 1\n")
    program.chmod(0o755)
    check_quantizer("q4_k_m", tmp_path)
    with pytest.raises(MergeError, match=r"could not quantize .* to q4_k_m: no such type"):
        quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_k_m", tmp_path)


def test_a_failed_conversion_says_why(tmp_path: Path) -> None:
    script = tmp_path / CONVERTER
    script.write_text("import sys\nsys.exit('no such architecture')")
    with pytest.raises(MergeError, match="ended with 1: no such architecture"):
        convert(script, tmp_path, tmp_path / "model.gguf")
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[3]).write_text(' '.join(sys.argv[1:]))")
    convert(script, tmp_path, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text().endswith("--outtype bf16")


def test_the_licence_is_the_bases_own(tmp_path: Path) -> None:
    assert licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base")
    assert licence(str(tmp_path)) == "apache-2.0"


def test_a_push_makes_a_private_repository_and_says_when_nobody_is_logged_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def whoami(self) -> None:
            calls.append(("whoami", None))

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            calls.append((name, private))

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, folder_path))

    monkeypatch.setattr(hub, "HfApi", Hub)
    push(tmp_path, "owner/name", private=True)
    assert calls == [("whoami", None), ("owner/name", True), ("owner/name", tmp_path)]

    class NobodysHub(Hub):
        def whoami(self) -> None:
            raise LocalTokenNotFoundError("Token is required, but no token found.")

    monkeypatch.setattr(hub, "HfApi", NobodysHub)
    with pytest.raises(
        MergeError, match=r"owner/name could not be uploaded to the Hub: Token is required.*`hf auth login`"
    ):
        push(tmp_path, "owner/name", private=True)
    assert len(calls) == 3
