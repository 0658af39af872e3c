"""The pairs file: what it takes, what it refuses, and in which words."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vrthinker.data.pairs import MAX_LINE_BYTES, Pair, load_pairs
from vrthinker.errors import InputError

GOOD = {"id": "a", "prompt": "a cat", "video_1": "v/1.mp4", "video_2": "/clips/2.mp4"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def refusal(file: Path, content: bytes | dict[str, Any]) -> str:
    """What the error says behind the file's name; it is one printable line."""
    file.write_bytes(json.dumps(content).encode() if isinstance(content, dict) else content)
    with pytest.raises(InputError) as caught:
        load_pairs(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    assert len(message) < 3000
    message.encode()
    return message.removeprefix(f"{file}: ")


def test_a_pair_is_read_with_its_paths_resolved(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = {**GOOD, "id": "b", "labels": {"TA": 0, "VQ": 1, "MQ": None, "OA": 2}, "dataset": "rapidata"}
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(labelled) + "\n")
    monkeypatch.chdir(file.parent.parent)
    first, second = load_pairs(file.relative_to(file.parent.parent))
    assert first == Pair(
        id="a", prompt="a cat", video_1=file.parent / "v" / "1.mp4", video_2=Path("/clips/2.mp4")
    )
    assert first.labels is None
    assert second.labels == {"TA": 0, "VQ": 1, "OA": 2}
    assert second.dataset == "rapidata"


@pytest.mark.parametrize("labels", [None, {}, {"TA": None, "OA": None}])
def test_labels_that_say_nothing_are_none(file: Path, labels: object) -> None:
    file.write_text(json.dumps({**GOOD, "labels": labels}))
    assert load_pairs(file)[0].labels is None


def test_blank_lines_mark_and_line_ends_are_tolerated(file: Path) -> None:
    lines = [json.dumps({**GOOD, "id": name}, ensure_ascii=False) for name in ("漢\u2028", "ß", "c")]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n  \r\n".join(lines).encode())
    assert [pair.id for pair in load_pairs(file)] == ["漢\u2028", "ß", "c"]


def test_ids_and_prompts_keep_unicode(file: Path) -> None:
    text = " e\u0301 \U0001f63a \x00\n\x1b[31m "
    for ascii_only in (True, False):
        file.write_text(json.dumps({**GOOD, "id": text, "prompt": text}, ensure_ascii=ascii_only), "utf-8")
        assert (load_pairs(file)[0].id, load_pairs(file)[0].prompt) == (text, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "line 1, id: got '', allowed: a non-empty string of valid Unicode"),
        ({"id": " "}, "line 1, id: got ' ', allowed: a non-empty string of valid Unicode"),
        ({"id": 7}, "line 1, id: got 7, allowed: a non-empty string of valid Unicode"),
        ({"id": "\ud800"}, r"line 1, id: got '\ud800', allowed: a non-empty string of valid Unicode"),
        ({"prompt": None}, "line 1, prompt: got None, allowed: a string of valid Unicode"),
        ({"video_1": ""}, "line 1, video_1: got '', allowed: a path, a non-empty string"),
        ({"video_2": "a\0b"}, r"line 1, video_2: got 'a\x00b', allowed: a path, a non-empty string"),
        ({"video_1": "\ud800"}, r"line 1, video_1: got '\ud800', allowed: a path, a non-empty string"),
        ({"video_1": ["a"]}, "line 1, video_1: got ['a'], allowed: a path, a non-empty string"),
        (
            {"labels": [1]},
            "line 1, labels: got [1], allowed: an object with keys among TA, VQ, MQ, OA, or null",
        ),
        ({"labels": {"TA": 3}}, "line 1, labels.TA: got 3, allowed: 0 (tie), "),
        ({"labels": {"TA": -1}}, "line 1, labels.TA: got -1, allowed: 0 (tie), "),
        ({"labels": {"TA": True}}, "line 1, labels.TA: got True, allowed: 0 (tie), "),
        ({"labels": {"TA": 1.0}}, "line 1, labels.TA: got 1.0, allowed: 0 (tie), "),
        ({"labels": {"TA": "1"}}, "line 1, labels.TA: got '1', allowed: 0 (tie), "),
        ({"labels": {"ta": 1}}, "line 1, labels: got the unknown key 'ta', allowed: TA, VQ, MQ, OA"),
        (
            {"dataset": "mine"},
            "line 1, dataset: got 'mine', allowed: genai-bench, mj-bench-video, rapidata, ",
        ),
        (
            {"promt": "x"},
            "line 1: got the unknown key 'promt', allowed: id, prompt, video_1, video_2, labels, ",
        ),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(file: Path, change: dict[str, Any], message: str) -> None:
    assert refusal(file, {**GOOD, **change}).startswith(message)


@pytest.mark.parametrize("name", ["id", "prompt", "video_1", "video_2"])
def test_a_missing_field_is_named(file: Path, name: str) -> None:
    message = refusal(file, {key: value for key, value in GOOD.items() if key != name})
    assert message.startswith(f"line 1, {name}: got nothing, allowed: ")


def test_a_repeated_id_names_both_lines(file: Path) -> None:
    line = json.dumps(GOOD).encode()
    other = json.dumps({**GOOD, "id": "b"}).encode()
    assert refusal(file, line + b"\n\n" + other + b"\n" + line) == (
        "line 4, id: got 'a' again (first on line 1), allowed: each id once"
    )


def test_every_problem_counts_and_the_first_are_shown(file: Path) -> None:
    line = json.dumps(GOOD).encode()
    message = refusal(file, line + b"\n" + b"\n".join([b"[]"] * 7) + b"\n" + line)
    assert message.startswith("8 problems: line 2: got [], allowed: one JSON object; line 3: ")
    assert message.endswith("line 6: got [], allowed: one JSON object; and 3 more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got no pairs"),
        (b"\n \r\n", "got no pairs"),
        (b"{", "line 1: got no JSON ("),
        (b"[" * 500_000, "line 1: got JSON nested too deeply"),
        (b'{"id":' * 100_000, "line 1: got JSON nested too deeply"),
        (b'{"id": ' + b"[" * 400 + b"]" * 400 + b"}", "4 problems: line 1, id: got [[[...]]], allowed"),
        (b'{"id": ' + b"9" * 900_000 + b"}", "line 1: got a number of 900000 digits"),
        (b'{"id": NaN}', "line 1: got NaN, which is not JSON"),
        (b'{"id": -Infinity}', "line 1: got -Infinity, which is not JSON"),
        (b'{"labels": {"TA": 1e999}}', "5 problems: "),
        (b'{"id": "\xff"}', "line 1: got byte 0xff at column 9, allowed: UTF-8 text"),
        ('{"id": "a"}'.encode("utf-16"), "line 1: got byte 0xff at column 1, allowed: UTF-8 text"),
        (b'{"id": "\xed\xa0\x80"}', "line 1: got byte 0xed at column 9, allowed: UTF-8 text"),
        (b'{"\\ud800": 1}', r"line 1: got the key '\ud800', which is not Unicode text"),
        (b'{"id": "a", "id": "b"}', "line 1: got the key 'id' twice in one object"),
        (b'"' + b"x" * 900_000 + b'"', "line 1: got 'xxxx"),
        (b"{" + b'"' + b"k" * 900_000 + b'": 1}', "5 problems: "),
        (b"\0" * 1000, "line 1: got no JSON ("),
        (b"7", "line 1: got 7, allowed: one JSON object"),
    ],
)
def test_hostile_lines_are_input_errors(file: Path, content: bytes, message: str) -> None:
    assert refusal(file, content).startswith(message)


def test_an_overlong_line_is_not_read_to_its_end(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(json.dumps(GOOD).encode() + b"\n")
        stream.truncate(100 << 20)
    with pytest.raises(InputError, match=rf"line 2: got more than {MAX_LINE_BYTES} bytes"):
        load_pairs(file)
    prompt = "x" * (MAX_LINE_BYTES - len(json.dumps({**GOOD, "prompt": ""})) - 1)
    file.write_text(json.dumps({**GOOD, "prompt": prompt}) + "\n")
    assert load_pairs(file)[0].prompt == prompt


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", ".", "absent", "a\0b"])
def test_a_place_without_pairs_is_an_input_error(tmp_path: Path, place: str) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path / place))):
        load_pairs(tmp_path / place)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, json.dumps(GOOD).encode())
    os.close(writer)
    try:
        assert load_pairs(f"/dev/fd/{reader}")[0].id == "a"
    finally:
        os.close(reader)


def test_a_missing_clip_is_no_error_here(file: Path) -> None:
    file.write_text(json.dumps(GOOD))
    assert not load_pairs(file)[0].video_1.exists()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
LABELS = st.dictionaries(
    st.sampled_from(["TA", "VQ", "MQ", "OA", "XX"]), st.sampled_from([0, 1, 2, 3, None, True])
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        **{key: st.just(value) | JSON for key, value in GOOD.items()},
        "labels": LABELS | JSON,
        "dataset": st.sampled_from(["rapidata", None]) | JSON,
        "other": JSON,
    },
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(lines=[{**GOOD, "labels": {"\n" + "k" * 5000: 7}}])
@given(
    lines=st.lists(st.binary(max_size=40) | ROWS.map(lambda row: json.dumps(row).encode()) | ROWS, max_size=4)
)
def test_whatever_is_in_it_a_file_is_read_whole_or_refused(file: Path, lines: list[Any]) -> None:
    content = b"\n".join(
        line
        if isinstance(line, bytes)
        else json.dumps(line, ensure_ascii=False).encode(errors="surrogatepass")
        for line in lines
    )
    file.write_bytes(content)
    refused = None
    try:
        pairs = load_pairs(file)
    except InputError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused
        assert len(refused) < 3000
        refused.encode()
        return
    rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    assert [(pair.id, pair.prompt) for pair in pairs] == [(row["id"], row["prompt"]) for row in rows]
    for pair, row in zip(pairs, rows, strict=True):
        labels = {key: value for key, value in (row.get("labels") or {}).items() if value is not None}
        assert (pair.labels or {}) == labels
        assert all(type(value) is int for value in labels.values())
        assert not set(row) - set(Pair.model_fields)


# Tables

ROW = {"id": "a", "prompt": "a cat", "video_1": "v/1.mp4", "video_2": "/clips/2.mp4"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "pairs.csv"


def test_a_csv_table_is_a_file_of_pairs(table: Path) -> None:
    table.write_bytes(
        b"\xef\xbb\xbfid,prompt,video_1,video_2,TA,VQ,OA,dataset\r\n"
        b'7,"a cat, ""black""\nand a dog",v/1.mp4,/clips/2.mp4,1.0,,2,rapidata\r\n'
        b"\r\n"
        b"b,,1.mp4,2.mp4,,,,\r\n"
    )
    first, second = load_pairs(table)
    assert (first.id, first.prompt) == ("7", 'a cat, "black"\nand a dog')
    assert (first.video_1, first.video_2) == (table.parent / "v" / "1.mp4", Path("/clips/2.mp4"))
    assert (first.labels, first.dataset) == ({"TA": 1, "OA": 2}, "rapidata")
    assert (second.prompt, second.labels, second.dataset) == ("", None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got no pairs, allowed: at least one row below the header"),
        (b"id,prompt,video_1,video_2\n", "got no pairs, allowed: at least one row below the header"),
        (b"id,prompt,video_1\na,x,1\n", "line 2, video_2: got nothing, allowed: a path, a non-empty string"),
        (b"id,prompt,video_1,video_2,T\na,x,1,2,1\n", "got the unknown column 'T', allowed: id, prompt, "),
        (b"id,id\na,b\n", "line 1: got the column 'id' twice, allowed: each column once"),
        (b"id,prompt,video_1,video_2\na,x,1\n", "line 2: got 3 cells, allowed: 4, as in the header"),
        (b"id,prompt,video_1,video_2,TA\na,x,1,2,3\n", "line 2, labels.TA: got 3, allowed: 0 (tie), 1 "),
        (b"id,prompt,video_1,video_2,TA\na,x,1,2,A\n", "line 2, labels.TA: got 'A', allowed: 0 (tie), 1 "),
        (b"id,prompt,video_1,video_2\n,x,1,2\n", "line 2, id: got '', allowed: a non-empty string"),
        (b'id,prompt,video_1,video_2\na,"x,1,2\n', "line 2: got no CSV ("),
        (
            b"id,prompt,video_1,video_2\na,\xff,1,2\n",
            "line 2: got byte 0xff at column 3, allowed: UTF-8 text",
        ),
        (
            b"id,prompt,video_1,video_2\na,x,1,2\n" + b"x" * (MAX_LINE_BYTES + 1),
            "line 3: got more than 1048576",
        ),
        (b'id,prompt,video_1,video_2\na,"' + b"x" * 200_000 + b'",1,2\n', "line 2: got no CSV (field larger"),
        (
            b"id,prompt,video_1,video_2\na,x,1,2\na,x,1,2\n",
            "line 3, id: got 'a' again (first on line 2), allowed: each id once",
        ),
    ],
)
def test_a_table_that_is_no_pairs_is_refused_with_its_line(table: Path, content: bytes, message: str) -> None:
    assert refusal(table, content).startswith(message)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text(alphabet='id,prompt\n\r"\0é', max_size=200).map(str.encode))
def test_no_csv_content_escapes_as_another_error(table: Path, content: bytes) -> None:
    table.write_bytes(b"id,prompt,video_1,video_2\n" + content)
    with contextlib.suppress(InputError):
        load_pairs(table)


def test_a_parquet_table_is_a_file_of_pairs(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "pairs.parquet"
    columns = {name: [value, value] for name, value in ROW.items()}
    columns |= {"id": [1, 2], "TA": [1.0, None], "OA": [2.0, float("nan")], "dataset": [None, "rapidata"]}
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(InputError, match=r"row 2, labels\.OA: got nan, allowed: 0"):
        load_pairs(path)
    columns["OA"] = [2.0, None]
    parquet.write_table(pyarrow.table(columns), path)
    first, second = load_pairs(path)
    assert (first.id, first.labels, first.dataset) == ("1", {"TA": 1, "OA": 2}, None)
    assert first.video_1 == tmp_path / "v" / "1.mp4"
    assert (second.id, second.labels, second.dataset) == ("2", None, "rapidata")


def test_what_is_no_parquet_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "pairs.parquet"
    for content in (b"", b"PAR1", b"PAR1" + b"\xff" * 500 + b"PAR1", b"id,prompt\n"):
        assert refusal(path, content).startswith("got no Parquet (")
    parquet.write_table(pyarrow.table({name: [value] for name, value in ROW.items()}), path)
    whole = path.read_bytes()
    for place in range(4, len(whole), 97):
        path.write_bytes(whole[:place] + b"\xff\xff" + whole[place + 2 :])
        with contextlib.suppress(InputError):
            load_pairs(path)
    path.write_bytes(whole)
    monkeypatch.setattr("vrthinker.data.tables.MAX_PARQUET_BYTES", len(whole) - 1)
    with pytest.raises(InputError, match=rf"got {len(whole)} bytes, allowed: up to {len(whole) - 1}"):
        load_pairs(path)


def test_a_text_that_many_rows_share_is_not_read_for_each_of_them(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "pairs.parquet"
    columns: dict[str, Any] = {name: [value] * 3000 for name, value in ROW.items()}
    once = pyarrow.array(["x" * (1 << 21)])
    columns["prompt"] = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000), once)
    parquet.write_table(pyarrow.table(columns), path, dictionary_pagesize_limit=1 << 24)
    assert path.stat().st_size < 200_000, "six gigabytes, stored once"
    with pytest.raises(InputError, match=r"got \d+ characters, allowed: up to 1048576"):
        load_pairs(path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vrthinker.data.tables.importlib.util.find_spec", lambda name: None)
    (tmp_path / "pairs.parquet").touch()
    with pytest.raises(InputError, match=r"pairs\.parquet: Parquet needs pyarrow.*vrthinker\[train\]"):
        load_pairs(tmp_path / "pairs.parquet")


def test_a_path_of_another_type_is_an_input_error() -> None:
    with pytest.raises(InputError, match="pairs: got NoneType"):
        load_pairs(None)  # type: ignore[arg-type]
