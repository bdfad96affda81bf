"""Calibration data: what may be passed, what is scored, what is recorded, what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers.paths import SHARED
from helpers.tiny_models import tiny_tokenizer
from transformers import AutoTokenizer

from optimum_cap.config import CAPConfig
from optimum_cap.data.calibration import CalibrationSet, build_calibration_set
from optimum_cap.data.sources import PRESETS, find_data_files, row_digest

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
)
NO_SYSTEM += "{% endif %}{{ m['content'] }}{% endfor %}"
PAIRS = [(f"what is {i} + {i}?", f"{i} + {i} = {2 * i}") for i in range(20)]
QUESTIONS = [{"question": prompt, "answer": answer} for prompt, answer in PAIRS]
CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
EXPECTED = {row_digest(*pair) for pair in PAIRS}
ARC_PUBLISHED = {
    "question": {
        "stem": "which is wet?",
        "choices": [{"text": "sand", "label": "1"}, {"text": "sea", "label": "2"}],
    },
    "answerKey": "2",
}
ARC_HUB = {
    "question": "which is wet?",
    "choices": {"text": ["sand", "sea"], "label": ["1", "2"]},
    "answerKey": "2",
}
HUB_ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": QUESTIONS[1],
    "strategyqa": {"question": "is it?", "answer": True, "facts": "it is. yes."},
    "arc_challenge": ARC_HUB,
    "wikitext2": {"text": " = a title = \n"},
}


def build(dataset: Any, tokenizer: Any = None, num_samples: int = 4, **fields: Any) -> Any:
    config = CAPConfig(sparsity=0.5, dataset=dataset, num_samples=num_samples, **fields)
    return build_calibration_set(config, tokenizer or tiny_tokenizer())


def parts(calibration: CalibrationSet, tokenizer: Any) -> list[tuple[str, str]]:
    """Return `(text not scored, text scored)` of each example."""
    return [
        (
            tokenizer.decode(example.input_ids[~example.scored]),
            tokenizer.decode(example.input_ids[example.scored]),
        )
        for example in calibration.examples
    ]


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(str(path))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


# What is scored


def test_without_template_the_answer_and_its_end_token_are_scored() -> None:
    tokenizer = tiny_tokenizer()
    calibration = build(PAIRS, tokenizer, num_samples=20)
    for example, (prompt, answer) in zip(
        calibration.examples, parts(calibration, tokenizer), strict=True
    ):
        assert (prompt, answer) == (
            PAIRS[example.index][0] + "\n",
            PAIRS[example.index][1] + "</s>",
        )
        assert example.digest == row_digest(*PAIRS[example.index])
        assert example.input_ids.dtype == torch.int64
        assert example.scored.dtype == torch.bool
        assert not example.scored[0]


def test_with_template_the_answer_and_its_end_token_are_scored() -> None:
    tokenizer = tiny_tokenizer(TEMPLATE)
    calibration = build(PAIRS, tokenizer, num_samples=20, max_length=64)
    for example, (prompt, answer) in zip(
        calibration.examples, parts(calibration, tokenizer), strict=True
    ):
        asked, answered = PAIRS[example.index]
        assert answer == answered + "</s>"
        assert prompt == f"<user>{asked}</s><assistant>"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_every_assistant_turn_is_scored(template: str | None) -> None:
    tokenizer = tiny_tokenizer(template)
    chat = [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant") * 2, ("a?", "one", "b?", "two"), strict=True)
    ]
    calibration = build([chat], tokenizer, num_samples=1)
    end = "</s>" if template else ""
    assert parts(calibration, tokenizer)[0][1] == f"one{end}two</s>"
    same = build([{"messages": chat}], tokenizer, num_samples=1)
    assert same.record["digests"] == calibration.record["digests"]


def test_chat_of_one_question_is_the_same_row_as_the_pair() -> None:
    chat = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    assert build([chat], num_samples=1).record["digests"] == [row_digest("a?", "b")]


def test_template_that_is_no_prefix_falls_back_to_the_common_prefix() -> None:
    # The prompt alone ends in "!", which the whole conversation never holds.
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}!{% endif %}"
    )
    calibration = build([("a?", "b")], tokenizer, num_samples=1)
    assert parts(calibration, tokenizer) == [("a?;", "b;")]


def test_template_that_prints_the_date_gives_the_same_tokens_every_day() -> None:
    tokenizer = tiny_tokenizer(
        "\n{{ strftime_now('%d %b %Y') }};{% for m in messages %}{{ m['content'] }};{% endfor %}"
    )
    calibration = build([("a?", "b")], tokenizer, num_samples=1)
    assert parts(calibration, tokenizer) == [("\n26 <unk>ul 2024;a?;", "b;")]


def test_text_and_scored_tokens_all_score_everything_but_the_first_token() -> None:
    for calibration in (build(["one two"] * 4), build(PAIRS, scored_tokens="all")):
        for example in calibration.examples:
            assert example.scored.tolist() == [False] + [True] * (len(example.input_ids) - 1)


def test_text_is_cut_at_the_maximum_length_and_pairs_never_are() -> None:
    assert [len(e.input_ids) for e in build(["x y" * 33], num_samples=1).examples] == [64]
    calibration = build([("x" * 99, "y"), *PAIRS], num_samples=20)
    assert all(example.index != 0 for example in calibration.examples)
    assert calibration.record["sources"][0]["too_long"] in (0, 1)


def test_length_is_the_least_of_config_model_and_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    config = CAPConfig(sparsity=0.5, dataset=["x y" * 33], num_samples=1)

    def limit(**arguments: Any) -> int:
        return build_calibration_set(config, tokenizer, **arguments).record["max_length"]

    assert limit() == 64
    assert limit(max_length=32) == 32
    config.max_length = 16
    assert limit(max_length=32) == 16
    config.max_length = None
    tokenizer.model_max_length = int(1e30)
    assert limit() == 2048


# What is recorded


def test_same_seed_same_selection_and_other_seed_another() -> None:
    first, again, other = (build(PAIRS, seed=seed, num_samples=8) for seed in (3, 3, 4))
    assert first.record == again.record
    for a, b in zip(first.examples, again.examples, strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert a.scored.equal(b.scored)
    assert first.record["digests"] != other.record["digests"]


def test_digests_do_not_depend_on_the_tokenizer_and_exclude_rows() -> None:
    plain, chat = build(PAIRS, num_samples=8), build(PAIRS, tiny_tokenizer(TEMPLATE), 8)
    assert plain.record["digests"] == chat.record["digests"]
    assert plain.record["sha256"] == chat.record["sha256"]
    used = set(plain.record["digests"])
    left = [index for index, pair in enumerate(PAIRS) if row_digest(*pair) not in used]
    assert sorted(left + plain.record["sources"][0]["selected"]) == list(range(len(PAIRS)))


def test_record_is_plain_json() -> None:
    record = build(PAIRS).record
    assert json.loads(json.dumps(record)) == record
    assert record["sources"][0]["rows"] == 20
    assert (record["seed"], record["scored_tokens"]) == (0, "answer")


@pytest.mark.parametrize(("num_samples", "counts"), [(6, [3, 3]), (7, [4, 3])])
def test_several_data_sets_mix_evenly(tmp_path: Path, num_samples: int, counts: list[int]) -> None:
    first = write(tmp_path / "a.jsonl", QUESTIONS)
    second = write(tmp_path / "b.jsonl", [{"text": f"text {i}"} for i in range(9)])
    calibration = build([first, {"path": second, "text_column": "text"}], num_samples=num_samples)
    names = [example.source for example in calibration.examples]
    assert [names.count(name) for name in ("a.jsonl", "b.jsonl")] == counts
    assert names != sorted(names)


# What may be passed


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_files_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    calibration = build(write(tmp_path / f"rows.{ending}", QUESTIONS), num_samples=20)
    assert {example.digest for example in calibration.examples} == EXPECTED


def test_json_file_may_hold_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    text = "\n".join(map(json.dumps, QUESTIONS))
    file.write_text(text, encoding="utf-8-sig")
    assert set(build(str(file), num_samples=20).record["digests"]) == EXPECTED


@pytest.mark.parametrize(
    ("text", "rows"),
    [("one\ntwo\n", ["one", "two"]), ("one\ntwo\n\nthree\n", ["one\ntwo", "three"])],
)
def test_txt_holds_paragraphs_or_else_lines(tmp_path: Path, text: str, rows: list[str]) -> None:
    file = tmp_path / "rows.txt"
    file.write_text(text)
    digests = build(str(file), num_samples=2).record["digests"]
    assert sorted(digests) == sorted(row_digest("", row) for row in rows)


@pytest.mark.parametrize(
    "columns",
    [("prompt", "completion"), ("question", "answer"), ("instruction", "output")],
)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_columns_are_found(columns: tuple[str, str], as_dataset: bool) -> None:
    rows: Any = [dict(zip(columns, pair, strict=True)) for pair in PAIRS]
    rows = datasets.Dataset.from_list(rows) if as_dataset else rows
    assert set(build(rows, num_samples=20).record["digests"]) == EXPECTED


def test_instruction_takes_its_input_along() -> None:
    row = {"instruction": "add", "input": "1 1", "output": "2"}
    assert build([row], num_samples=1).record["digests"] == [row_digest("add\n1 1", "2")]


@pytest.mark.parametrize(
    ("columns", "digest"),
    [
        ({"prompt_column": "q", "answer_column": "a"}, row_digest("why?", "so")),
        ({"text_column": "a"}, row_digest("", "so")),
        ({"messages_column": "chat"}, row_digest("x", "y")),
    ],
)
def test_specification_names_columns(tmp_path: Path, columns: dict[str, str], digest: str) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    file = write(tmp_path / "rows.jsonl", [{"q": "why?", "a": "so", "chat": chat}])
    assert build({"path": file, **columns}, num_samples=1).record["digests"] == [digest]


def test_data_files_of_scores_are_found_whatever_their_names(tmp_path: Path) -> None:
    scores = tmp_path / "scores.safetensors"
    for name in ("rows.jsonl", "size=3.jsonl"):
        (tmp_path / name).touch()
        assert find_data_files(name, scores) == f"{tmp_path}/{name}"
    assert find_data_files("gsm8k=rows.jsonl", scores) == f"gsm8k={tmp_path}/rows.jsonl"
    assert find_data_files("owner/name", scores) == "owner/name"


def test_preset_reads_a_local_file_in_both_notations(tmp_path: Path) -> None:
    file = write(tmp_path / "arc.jsonl", [ARC_PUBLISHED])
    expected = row_digest("which is wet?\n(1) sand\n(2) sea", "sea\n#### 2")
    for dataset in (f"arc_challenge={file}", {"path": file, "preset": "arc_challenge"}):
        assert build(dataset, num_samples=1).record["digests"] == [expected]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_loads_from_the_hub_at_its_revision(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((*arguments, options))
        return datasets.Dataset.from_list([HUB_ROWS[preset]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = build(preset, num_samples=1).record["sources"][0]
    entry = PRESETS[preset]
    options = {"split": "train", "revision": entry.revision}
    assert asked == [(entry.hub_id, entry.config_name, options)]
    assert len(entry.revision) == 40
    assert (source["name"], source["hub_id"]) == (preset, entry.hub_id)
    assert source["config"] == entry.config_name
    assert source["revision"] == entry.revision
    build({"path": preset, "split": "test", "revision": "main"}, num_samples=1)
    assert asked[1][2] == {"split": "test", "revision": "main"}


def test_presets_read_both_layouts_as_the_same_row() -> None:
    strategyqa = {**HUB_ROWS["strategyqa"], "facts": ["it is.", "yes."]}
    for preset, published in (("arc_challenge", ARC_PUBLISHED), ("strategyqa", strategyqa)):
        read = PRESETS[preset].read
        assert read(published).digest == read(HUB_ROWS[preset]).digest


def test_hub_id_loads_with_its_name_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        assert arguments == ("me/mine", "small")
        assert options == {"split": "dev", "revision": "abc"}
        return datasets.Dataset.from_list(QUESTIONS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    specification = {"path": "me/mine", "name": "small", "split": "dev", "revision": "abc"}
    assert build(specification).record["sources"][0]["hub_id"] == "me/mine"


def test_a_preset_without_a_network_says_how_to_pass_its_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"data set 'openai/gsm8k' is not in the cache, and the Hub cannot be reached: without a "
        r"network, name a copy of its file, as gsm8k=FILE for calibration"
    )
    with pytest.raises(ValueError, match=message):
        build("gsm8k")


def test_tokenizer_without_padding_token_works() -> None:
    tokenizer = tiny_tokenizer(edit=lambda special: special.pop("pad_token"))
    assert tokenizer.pad_token is None
    assert len(build(PAIRS, tokenizer).examples) == 4


# What is refused


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("gsm9k", "unknown data set 'gsm9k'.*gsm8k, strategyqa"),
        ("no such thing", "unknown data set 'no such thing'"),
        ("no/where", "'no/where' is not in the cache, and the Hub cannot be reached.*gsm8k"),
        ({"train": 1}, "needs the key 'path'"),
        ({"path": "gsm8k", "splt": "test"}, "unknown key.*splt.*known.*split"),
        ({"path": "x.jsonl", "preset": "gsm9k"}, "unknown preset 'gsm9k'.*gsm8k"),
        ({"path": "gsm8k", "text_column": "x"}, "cannot be combined with the preset 'gsm8k'"),
        ([], "dataset is empty"),
        (["gsm8k=a/folder", "gsm8k"], "mixes texts with the preset name 'gsm8k'"),
        (["gsm8k=a/folder", "x.jsonl"], "'gsm8k=a/folder' names no data file: after the ="),
        (["gsm8k", "a text of its own"], "mixes texts with the preset name 'gsm8k'"),
        ([3, 4], "must be texts, pairs, chats or mappings, got int"),
        ([{"role": "user", "content": "x"}], "which columns.*found role, content.*prompt_column"),
        ([("a", "b", "c")] * 4, "cannot read a row"),
        ([("a", 1)] * 4, "has a value that is not text"),
        ([[{"role": "user"}]] * 4, "cannot read a row.*content"),
        ([("a", " ")] * 4, "0 usable rows of 4 .4 have no token to score.*lower num_samples"),
        ([[{"role": "user", "content": "x"}]] * 4, "4 have no token to score"),
        ([("x" * 99, "y")] * 4, "4 are longer than 64 tokens.*raise max_length"),
        (PAIRS[:3], "3 usable rows of 3, but 4 are needed: lower num_samples"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(QUESTIONS)), "splits train: pass"),
    ],
)
def test_bad_data_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(dataset)


CALLS = TEMPLATE.replace("m['content']", "m['content'] }}{{ m['tool_calls'] | string")
HALF = "a \ud800 b"


@pytest.mark.parametrize(
    "row",
    [
        HALF,
        ("who?", HALF),
        (HALF, "me"),
        {"prompt": "who?", "completion": HALF},
        [{"role": "user", "content": [{"type": "text", "text": HALF}]}, CHAT[1]],
        [CHAT[0], {**CHAT[1], "reasoning_content": HALF}],
        [CHAT[0], {**CHAT[1], "tool_calls": [{"name": "f", "arguments": {"x": [HALF]}}]}],
        {"messages": CHAT, "tools": [{"name": "f", "description": HALF}]},
    ],
)
def test_half_a_surrogate_pair_is_refused(row: Any) -> None:
    message = r"^a row of data set 'in-memory' has text with half a surrogate pair, .*\\ud800 b'$"
    for template in (None, TEMPLATE):
        with pytest.raises(ValueError, match=message):
            build([row], tiny_tokenizer(template), num_samples=1)
    # Both halves are one character.
    whole = json.loads(json.dumps(row).replace("ud800", "ud83d\\ude00"))
    tokenizer = tiny_tokenizer(CALLS)
    tokenizer.model_max_length = 1000
    build([whole], tokenizer, num_samples=1)


def test_messages_may_be_json_text(tmp_path: Path) -> None:
    expected = build([{"messages": CHAT}], num_samples=1).record["digests"]
    for column in ("messages", "chat"):
        rows = [{column: json.dumps(CHAT)}, {column: ""}, {column: " "}]
        for suffix in ("csv", "jsonl", "parquet"):
            file = write(tmp_path / f"{column}.{suffix}", rows)
            data = {"path": file, "messages_column": column}
            assert build(data, num_samples=1).record["digests"] == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("who ran?", r"column 'chat' a text that is not the JSON .*'who ran\?'.*--text-column"),
        ('{"role": "user"}', "column 'chat' a text that is not the JSON of a list of messages"),
        (
            "[" * 100_000,
            r"a text that is not the JSON of a list of messages: '\[{199}\.\.\.; plain",
        ),
        ('["who?"]', "messages that are not a list of mappings with a role and a content: 'who"),
        (["who?", "me"], "messages that are not a list of mappings with a role and a content: 'w"),
        ((("user", "who?"),), "messages that are not a list of mappings .*: .'user', 'who.'.$"),
        (CHAT[0], "messages that are not a list of mappings .*: 'role'$"),
        (5, "cannot read a row .*not iterable"),
    ],
)
def test_a_column_without_messages_is_refused(tmp_path: Path, messages: Any, message: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"chat": messages}]))
    with pytest.raises(ValueError, match=rf"^(a row of data set 'rows.json' has .*)?{message}"):
        build({"path": str(file), "messages_column": "chat"}, num_samples=1)


@pytest.mark.parametrize("dataset", [5, {1, 2}, iter(["a"])])
def test_what_is_no_data_is_refused(dataset: Any) -> None:
    with pytest.raises(TypeError, match="no length or no random access: expected a preset"):
        build(dataset)


def test_a_data_frame_is_refused_instead_of_reading_its_column_names() -> None:
    frame = datasets.Dataset.from_list(QUESTIONS).to_pandas()
    with pytest.raises(TypeError, match=r"frame.to_dict\('records'\)"):
        build(frame)


def test_iterable_dataset_is_refused() -> None:
    streamed = datasets.Dataset.from_list(QUESTIONS).to_iterable_dataset()
    with pytest.raises(TypeError, match="IterableDataset"):
        build(streamed)


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.jsonl", "", {}, "a.jsonl is empty"),
        ("a.json", "", {}, "a.json is empty"),
        ("a.csv", "", {}, "a.csv is empty"),
        ("a.txt", "\n\n", {}, "a.txt is empty"),
        ("a.jsonl", '{"text": "a"}\n\n{oops', {}, r"a.jsonl is not a valid jsonl file .line 3: "),
        ("a.json", "[" * 100_000, {}, r"a.json is not a valid json file .maximum recursion depth"),
        ("a.jsonl", "[" * 100_000, {}, r"a.jsonl is not a valid jsonl file .line 1: maximum rec"),
        ("a.json", f"[{'9' * 5000}]", {}, r"a.json is not a valid json file .*5000 digits.*repair"),
        ("a.parquet", "PAR1junk", {}, "a.parquet is not a valid parquet file .*: repair it, or"),
        ("a.parquet", "PAR1" + "x" * 99 + "PAR1", {}, "a.parquet is not a valid parquet file"),
        ("a.csv", 'x,y\n"' + "z" * 200_000, {}, "a.csv is not a valid csv file .field larger"),
        (
            "a.json",
            '[{"text": "a \\ud800 b"}]',
            {},
            r"'a.json' has text with half .*'a \\ud800 b'$",
        ),
        ("a.xml", "<a/>", {}, "must end in one of .json"),
        ("a.csv", "x,y\n1,2\n", {}, "found x, y"),
        ("a.csv", "x,y\n1,2\n", {"text_column": "z"}, "no column 'z' .text_column.*x, y"),
        ("a.csv", "x,y\n1,2\n", {"prompt_column": "x"}, "set both prompt_column and answer_column"),
        (
            "a.csv",
            "x,y\n1,2\n",
            {"prompt_column": "x", "answer_column": "y", "text_column": "x"},
            "has answer_column, prompt_column, text_column: choose",
        ),
        ("a.csv", "x,y\n1,2\n", {"preset": "gsm8k"}, "cannot read a row.*question.*has x, y"),
        (
            "a.csv",
            "x,y\n1,2\n",
            {"preset": "gsm8k", "text_column": "x"},
            "text_column cannot be combined with the preset 'gsm8k'",
        ),
        ("a.csv", "x,y\n1,2\n", {"split": "test"}, "split of a specification .* is a file"),
    ],
)
def test_bad_file_is_refused(
    tmp_path: Path, name: str, content: str, columns: dict[str, str], message: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        build({"path": str(file), **columns})


def test_missing_file_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/a.jsonl does not exist"):
        build("gsm8k=nowhere/a.jsonl")


def test_fewer_samples_than_data_sets_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", QUESTIONS)
    with pytest.raises(ValueError, match="num_samples is 1, but 2 data sets are mixed"):
        build([file, file], num_samples=1)


def test_missing_tokenizer_is_refused() -> None:
    config = CAPConfig(sparsity=0.5, dataset=PAIRS, num_samples=4)
    with pytest.raises(ValueError, match="expected the model's tokenizer, got None"):
        build_calibration_set(config, None)
    with pytest.raises(TypeError, match="expected a tokenizer object, got 'name'"):
        build_calibration_set(config, "name")


def test_chat_that_the_template_refuses_is_refused() -> None:
    chat = [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(ValueError, match=r"roles system, assistant .no system"):
        build([chat], tiny_tokenizer(NO_SYSTEM), num_samples=1)


@pytest.mark.parametrize("dataset", ["gsm8k", "rows.parquet"])
def test_missing_datasets_package_is_named(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dataset.endswith("parquet"):
        dataset = write(tmp_path / dataset, QUESTIONS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install \"optimum-cap\[data\] @ git"):
        build(dataset)
    assert len(build(PAIRS).examples) == 4


# Real data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "file", "rows"),
    [
        ("gsm8k", "gsm8k/train.jsonl", 7473),
        ("strategyqa", "strategyqa/strategyqa_all_2290.json", 2290),
        ("arc_challenge", "arc_challenge/ARC-Challenge-Train.jsonl", 1119),
        ("wikitext2", "wikitext-2/valid.txt", None),
    ],
)
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_preset_reads_the_files_as_published(
    preset: str, file: str, rows: int | None, template: str | None
) -> None:
    path, name = SHARED / "data" / file, SHARED / "models" / "stories260K"
    if not path.is_file() or not name.is_dir():
        pytest.skip("the published data are not here")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = template
    calibration = build(f"{preset}={path}", tokenizer, num_samples=128)
    assert len(calibration.examples) == 128
    assert rows in (None, calibration.record["sources"][0]["rows"])
    assert len(set(calibration.record["digests"])) == 128
    assert all(len(example.input_ids) <= 512 for example in calibration.examples)
    if preset == "wikitext2":
        assert all(example.scored[1:].all() for example in calibration.examples)
    else:
        assert all(
            "####" in scored and "####" not in prompt
            for prompt, scored in parts(calibration, tokenizer)
        )
    # Every row can be read, not only those that were drawn.
    source = PRESETS[preset]
    if path.suffix != ".txt":
        text = path.read_text()
        published = (
            json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
        )
        digests = {source.read(row).digest for row in published}
        assert set(calibration.record["digests"]) <= digests


@pytest.mark.parametrize("column", ["image", "images", "video", "audio"])
@pytest.mark.parametrize("kind", ["pairs", "chats", "texts"])
def test_rows_with_more_than_text_are_refused(column: str, kind: str) -> None:
    row = {"pairs": QUESTIONS[0], "chats": {"messages": CHAT}, "texts": {"text": "a cat"}}[kind]
    # Where all rows have the column, those without a picture are text.
    without = [{**row, column: empty} for empty in (None, "", [])]
    assert len(build([row, *without], num_samples=4).examples) == 4
    message = f"row of data set 'in-memory' has a column '{column}', but calibration examples are"
    if column.startswith("image"):
        message = "row of data set 'in-memory' has images"
    for value in ("a.png", [{"bytes": b""}], object()):
        with pytest.raises(ValueError, match=message):
            build([*without, {**row, column: value}], num_samples=4)
