"""Reading, dataset formats and splits, with the message of each thing that can be wrong with a file."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from raylora.config.schema import DataSection
from raylora.data.chat_template import CHATML
from raylora.data.examples import Conversation, Example, TextExample
from raylora.data.formats import detect_format, to_examples
from raylora.data.prepare import prepare_data
from raylora.data.read import HfApi, hub_commit, read_rows
from raylora.data.rows import load_part
from raylora.data.split import read_parts
from raylora.errors import DataError

ROWS = [{"prompt": f"q{i}", "completion": f" a{i}"} for i in range(20)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_four_file_types_give_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    pa.csv.write_csv(pa.Table.from_pylist(ROWS), tmp_path / "a.csv")
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert read_rows(str(tmp_path / name)) == {str(tmp_path / name): dict(enumerate(ROWS, 1))}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"data file not found: .*none\.jsonl"),
        ("empty.jsonl", "", r"empty\.jsonl is empty"),
        ("blank.jsonl", "\n\n", r"blank\.jsonl holds no rows"),
        ("broken.jsonl", '{"a": 1}\n{"a": \n', r"broken\.jsonl:2: broken JSON"),
        ("list.jsonl", "[1]\n", r"list\.jsonl:1: must be a JSON object"),
        ("object.json", '{"a": 1, "b": 2}', r"object\.json: must be a JSON array of objects"),
        ("file.txt", "x", r"must end in \.jsonl, .*, \.parquet, or in one of these and \.gz, .* found \.txt"),
        ("bad.parquet", "x", r"bad\.parquet is not a readable parquet file"),
    ],
)
def test_unreadable_files_say_where(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


def converted(row: dict, format: str = "auto") -> Example:
    (example,) = to_examples({1: row}, detect_format({1: row}, "x") if format == "auto" else format, source="x")
    return example


def test_messages_that_csv_holds_in_pythons_notation_are_read() -> None:
    asked, answered = {"role": "user", "content": "it's"}, {"role": "assistant", "content": 'a "b"'}
    expected = converted({"prompt": [asked], "completion": [answered]})
    assert converted({"prompt": str([asked]), "completion": str([answered])}) == expected
    assert converted({"prompt": json.dumps([asked]), "completion": json.dumps([answered])}) == expected


@pytest.mark.parametrize("completion", ['[{"from": "Paris", "to": "Rome"}]', "[{'role': 'x'}]", "[{'role'"])
def test_an_answer_that_looks_like_messages_is_text(completion: str) -> None:
    example = converted({"prompt": "q", "completion": completion})
    assert isinstance(example, TextExample) and example.completion == completion


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ("true", ("true",)),
        ("1.50", ("1.50",)),
        ("null", ("null",)),
        ('[1.50, 1e5, "x", null]', ("1.50", "1e5", "x")),
        (["a", "b"], ("a", "b")),
        (None, ("yo",)),
    ],
)
def test_references_stay_as_they_are_written(references: object, expected: tuple[str, ...]) -> None:
    example = converted({"prompt": "q", "completion": "yo", "references": references})
    assert isinstance(example, TextExample) and example.references == expected


def test_each_dataset_format_is_told_from_its_columns() -> None:
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})
    rows: list[dict] = [
        {"messages": list(chat)},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"conversations": {"from": ["human", "gpt"], "value": ["hi", "yo"]}},
        {"prompt": [chat[0]], "completion": "yo"},
        {"instruction": "hi", "input": "", "output": "yo"},
    ]
    for row in rows:
        assert converted(row) == Conversation(chat, (False, True))
    assert converted({"prompt": "hi", "completion": "yo"}) == TextExample("hi", "yo", ("yo",), False)
    text = converted({"text": "<s>[INST] hi [/INST] yo </s>"})
    assert text == TextExample("<s>[INST] hi [/INST]", " yo </s>", ("yo",), True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x"}], r"no known dataset format has the columns question; known are .*`data\.columns"),
        ([ROWS[0], {"prompt": "x"}], r"row 2 has no completion; its columns: prompt"),
        ([{"prompt": 3, "completion": "x"}], r"row 1 is not of format prompt-completion: prompt must be text"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "a conversation needs an assistant message"),
        ([{"conversations": [{"from": "judge", "value": "x"}]}], "message 1: unknown speaker 'judge'"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}],
            "message 1: content has a part of type image_url; only text can be trained on",
        ),
        (
            [{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}],
            r"message 1: weight must be 0, 1 or a boolean, found 0\.5",
        ),
        (
            [{"messages": [{"role": "system", "content": "x"}], "system": "y"}],
            "has a `system` column and a system message; only one of them can be used",
        ),
        (
            [{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}],
            "message 1: arguments must be JSON, found '{'",
        ),
        ([{"messages": [{"role": "assistant", "content": "x"}], "tools": [{"type": "x"}]}], "tool 1 of `tools` has no"),
        ([{"text": "x"}, {"prompt": "x", "completion": "y"}], "row 2 has no text"),
        ([{"prompt": "x", "completion": "y", "references": '["\\ud83d"]'}], "row 1 is not of format .*surrogates"),
        ([{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": math.nan}], "row 2 has no completion"),
        ([{"messages": [{"role": 3, "content": "x"}]}], "message 1: its role must be text, found 3"),
        ([{"instruction": "x", "output": "y", "history": "a"}], "history must be JSON, found 'a'"),
        (
            [{"instruction": "x", "output": "y", "history": 3}],
            r"history must be a list of \[question, answer\], found 3",
        ),
        ([{"instruction": "x", "output": "y", "history": [["a"]]}], r"history must be a list of \[question, answer\]"),
    ],
)
def test_rows_that_fit_no_dataset_format_say_which(rows: list[dict], message: str) -> None:
    numbered = dict(enumerate(rows, 1))
    with pytest.raises(DataError, match=message):
        to_examples(numbered, detect_format(numbered, "x"), source="x")


def test_parts_share_no_prompt_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i // 3}", "completion": f" a{i}"} for i in range(60)]  # three rows a prompt
    train = write(tmp_path / "a.jsonl", rows)
    data = DataSection(train=train, validation_size=0.2, heldout_size=6)
    parts = read_parts(data)
    keys = [{one.key() for one in part} for part in (parts.train, parts.validation, parts.heldout)]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert len(parts.train) + len(parts.validation) + len(parts.heldout) == 60
    assert len(parts.heldout) == 6
    shuffled = write(tmp_path / "b.jsonl", rows[::-1])
    again = read_parts(data.model_copy(update={"train": shuffled}))
    assert {one.key() for one in again.heldout} == keys[2]
    other = read_parts(data.model_copy(update={"seed": 1}))
    assert {one.key() for one in other.heldout} != keys[2]


def test_heldout_that_overlaps_train_is_an_error_or_dropped(tmp_path: Path) -> None:
    train, heldout = write(tmp_path / "t.jsonl", ROWS), write(tmp_path / "h.jsonl", ROWS[:3])
    data = DataSection(train=train, heldout=heldout)
    with pytest.raises(DataError, match=r"must share no prompt, found 3 training rows, e\.g\. 'q0'"):
        read_parts(data)
    parts = read_parts(data.model_copy(update={"overlap": "drop"}))
    assert parts.n_overlapping == 3
    assert len(parts.train) + len(parts.validation) == 17


def test_too_few_prompts_to_split_say_so(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", [ROWS[0]] * 5)
    with pytest.raises(DataError, match="cannot split off 1 heldout rows from 5 rows with 1 different prompts"):
        read_parts(DataSection(train=train))


def test_a_prompt_of_very_many_rows_stays_in_training(tmp_path: Path) -> None:
    rows = [{"prompt": "the one" if n < 900 else f"q{n}", "completion": f"a{n}"} for n in range(1000)]
    data = DataSection(train=write(tmp_path / "rows.jsonl", rows), validation_size=30, heldout_size=40)
    for seed in range(5):
        parts = read_parts(data.model_copy(update={"seed": seed}))
        assert (len(parts.train), len(parts.validation), len(parts.heldout)) == (930, 30, 40)


def test_limits_draw_rows_by_seed(tmp_path: Path) -> None:
    data = DataSection(train=write(tmp_path / "t.jsonl", ROWS), max_train_rows=5)
    assert len(read_parts(data).train) == 5


def test_the_cache_is_keyed_by_rows_and_settings(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data = DataSection(train=write(tmp_path / "t.jsonl", ROWS), max_length=16)
    first = prepare_data(data, tokenizer, tmp_path)
    state = (first.tokens_dir / "summary.json").stat().st_mtime_ns
    assert prepare_data(data, tokenizer, tmp_path).tokens_dir == first.tokens_dir
    assert (first.tokens_dir / "summary.json").stat().st_mtime_ns == state  # not written again
    longer = prepare_data(data.model_copy(update={"max_length": 32}), tokenizer, tmp_path)
    assert longer.fingerprint != first.fingerprint
    write(tmp_path / "t.jsonl", [*ROWS, {"prompt": "new", "completion": " row"}])
    assert prepare_data(data, tokenizer, tmp_path).fingerprint != first.fingerprint


def test_long_rows_are_counted_and_cut_or_dropped(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [*ROWS, *({"prompt": f"long{i}", "completion": " word" * 20} for i in range(4))]
    sizes = {
        "validation": write(tmp_path / "v.jsonl", [{"prompt": "v", "completion": " v"}]),
        "heldout_size": 2,
        "seed": 3,
    }
    data = DataSection(train=write(tmp_path / "t.jsonl", rows), max_length=16, **sizes)
    cut = prepare_data(data, tokenizer, tmp_path)
    n_long = cut.summaries["train"].n_long
    assert n_long >= 2
    assert max(len(ids) for ids in load_part(cut.tokens_dir, "train")["input_ids"]) == 16
    dropped = prepare_data(data.model_copy(update={"long_rows": "drop"}), tokenizer, tmp_path)
    assert dropped.summaries["train"].n_dropped == n_long
    with pytest.raises(DataError, match=r"no row is left after data\.max_length = 8"):
        prepare_data(
            data.model_copy(
                update={"train": write(tmp_path / "l.jsonl", rows[-4:]), "max_length": 8, "long_rows": "drop"}
            ),
            tokenizer,
            tmp_path,
        )


def test_conversations_need_a_chat_template(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    turns = [({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}) for i in range(20)]
    split = [{"prompt": [asked], "completion": [answered]} for asked, answered in turns]
    for rows in (split, [{"messages": list(pair)} for pair in turns]):
        data = DataSection(train=write(tmp_path / "t.jsonl", rows))
        with pytest.raises(
            DataError, match=r"need a chat template, and the tokenizer has none; set data\.chat_template"
        ):
            prepare_data(data, tokenizer, tmp_path)
    prepare_data(data.model_copy(update={"chat_template": "chatml"}), tokenizer, tmp_path)
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize("name", ["e2e", "gsm8k"])
def test_real_data_sets_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent.parent.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip("the shared data sets are not here")
    data = DataSection(train=str(folder / "train.jsonl"), heldout=str(folder / "heldout.jsonl"))
    parts = read_parts(data)
    assert len(parts.heldout) == len((folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    assert parts.n_overlapping == 0


def test_a_hub_that_cannot_be_asked_leaves_the_revision_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoNetworkError(Exception):
        """An error of the HTTP library, which is neither an OSError nor a ValueError."""

    def unreachable(self: HfApi, source: str, revision: str | None = None) -> None:
        raise NoNetworkError

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    assert hub_commit("owner/rows", None) is None  # rows in the Hub's cache can still be read
    assert hub_commit("owner/rows", "main") == "main"


def test_a_commit_is_not_looked_up_again_and_a_file_has_none(monkeypatch: pytest.MonkeyPatch, rows_file: Path) -> None:
    monkeypatch.delattr(HfApi, "dataset_info")
    assert hub_commit("owner/rows", "0123456789abcdef" * 2 + "01234567") == "0123456789abcdef" * 2 + "01234567"
    assert hub_commit(str(rows_file), None) is None
