"""What is exported is whole: a GGUF by llama.cpp's own converter, or an error that says what is missing."""

from pathlib import Path

import pytest

from raylora.errors import ConfigError, MergeError
from raylora.export import CONVERTER, _convert, _converter, _licence


def test_gguf_needs_llama_cpps_converter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gguf needs --llama-cpp, a checkout of llama\.cpp that holds convert_hf"):
        _converter(tmp_path)
    (tmp_path / CONVERTER).touch()
    assert _converter(tmp_path) == tmp_path / CONVERTER


def test_a_failed_conversion_says_why(tmp_path: Path) -> None:
    script = tmp_path / CONVERTER
    script.write_text("import sys\nsys.exit('no such architecture')")
    with pytest.raises(MergeError, match="ended with 1: no such architecture"):
        _convert(script, tmp_path, tmp_path / "model.gguf")
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[3]).write_text(' '.join(sys.argv[1:]))")
    _convert(script, tmp_path, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text().endswith("--outtype bf16")


def test_the_licence_is_the_bases_own(tmp_path: Path) -> None:
    assert _licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base")
    assert _licence(str(tmp_path)) == "apache-2.0"
