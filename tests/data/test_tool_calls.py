"""Tool calls are read in the syntax of each chat template, and compared by names and arguments."""

import json
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raylora.data.answers import AnswerParser
from raylora.data.chat_template import ChatTemplate

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
"""Real templates, as TRL ships them."""

REAL = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))

SYNTAXES = {
    "lfm2_2_5": (
        """<|tool_call_start|>[f(b=2, a='x, "y")]', c={"d": [true, null]}), g()]<|tool_call_end|>""",
        """<|tool_call_start|>[f(a='x, "y")]',c={'d': [True, None]},b=2),g()]<|tool_call_end|>""",
    ),
    "gemma4": (
        '<|tool_call>call:f{a:<|"|>x, "y")]<|"|>,b:2,c:{d:[true,None]}}<tool_call|><|tool_call>call:g{}<tool_call|>',
        '<|tool_call>call:f{b:2,c:{d:[true,null]},a:<|"|>x, "y")]<|"|>}<tool_call|><|tool_call>call:g{}<tool_call|>',
    ),
    "qwen3": (
        '<tool_call>\n{"name": "f", "arguments": {"b": 2, "a": "x, \\"y\\")]", "c": {"d": [true, null]}}}\n</tool_call>'
        '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        '<tool_call>{"arguments": {"a": "x, \\"y\\")]", "c": {"d": [true,null]}, "b": 2}, "name": "f"}</tool_call>'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
    ),
}
"""Template -> the same two calls, spelt in two ways."""


@pytest.fixture
def plain(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("template", SYNTAXES)
def test_calls_are_compared_by_names_and_arguments_in_each_syntax(
    template: str, plain: PreTrainedTokenizerBase
) -> None:
    plain.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    parser = AnswerParser(ChatTemplate(plain))
    one, other = (parser.parse(f"Wait. {answer}") for answer in SYNTAXES[template])
    f = {"name": "f", "arguments": {"a": 'x, "y")]', "b": 2, "c": {"d": [True, None]}}}
    assert json.loads(one.calls) == [f, {"name": "g", "arguments": {}}]
    assert one.calls == other.calls and one.text.startswith("Wait.")


@pytest.mark.parametrize("template", REAL)
def test_what_a_real_template_writes_as_a_call_is_read_back(template: str, plain: PreTrainedTokenizerBase) -> None:
    plain.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    parser = AnswerParser(ChatTemplate(plain))
    call = {"name": "count", "arguments": {"what": 'sheep, "two" {x}', "deep": {"all": True, "n": [1, 2.5]}, "k": 3}}
    written = parser._written(content="", tool_calls=[{"type": "function", "id": "a12345678", "function": call}])
    if "sheep" not in written:
        pytest.skip("the template writes no tool calls")
    assert json.loads(parser.parse(written).calls) == [call]


@pytest.mark.parametrize(
    "answer",
    [
        "<|tool_call_start|>[f(a=1)",
        "<|tool_call_start|>[f(a=)]<|tool_call_end|>",
        "<|tool_call_start|>f(a=1)<|tool_call_end|>",
        "<|tool_call_start|>[f(1)]<|tool_call_end|>",
        "<|tool_call_start|>[f(a=g())]<|tool_call_end|>",
        "<|tool_call_start|>[3]<|tool_call_end|>",
        "call [f(a=1)] now",
    ],
)
def test_a_call_that_is_not_whole_stays_text(answer: str, plain: PreTrainedTokenizerBase) -> None:
    plain.chat_template = (TEMPLATES / "lfm2_2_5.jinja").read_text(encoding="utf-8")
    parsed = AnswerParser(ChatTemplate(plain)).parse(answer)
    assert (parsed.calls, parsed.text) == ("", answer)
