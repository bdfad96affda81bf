"""Answers written to a file and read again are the same calibration examples, as far as text is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.answers import TEMPLATE, answered, config, let_it_answer
from helpers.calibration import ROWS
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data import build_calibration_set, row_digest
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.generation import AnsweredPrompts, trace_rows

CHATS = [
    [
        {"role": "system", "content": "add"},
        {"role": "user", "content": f"{n}+1=?"},
        {"role": "assistant", "content": f"{n + 1}"},
    ]
    for n in range(8)
]


def written(answers: AnsweredPrompts, folder: Path) -> Path:
    file = folder / "traces.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in trace_rows(answers.answers)))
    return file


def read(file: Path, tokenizer: PreTrainedTokenizerFast, count: int) -> list[CalibrationExample]:
    settings = CAPConfig(0.5, recipe="wanda", dataset=str(file), num_samples=count)
    return build_calibration_set(settings, tokenizer).examples


def by_digest(examples: list[CalibrationExample]) -> dict[str, tuple[list[int], list[bool]]]:
    return {each.digest: (each.input_ids.tolist(), each.scored.tolist()) for each in examples}


@pytest.mark.parametrize("dataset", [ROWS[:16], CHATS], ids=["pairs", "chats"])
@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "template"])
def test_a_file_of_answers_gives_the_examples_of_the_answers(
    template: str | None, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some answers are complete and some are cut off, which no end token may follow."""
    tokenizer = tiny_tokenizer(template)
    let_it_answer(
        monkeypatch, lambda prompt: (f"it is {len(prompt)}", sum(map(ord, prompt)) % 2 == 0)
    )
    results = answered(tiny_model("llama"), tokenizer, dataset=dataset)
    expected = [each.example("answer") for each in results.answers]
    from_file = read(written(results, tmp_path), tokenizer, 8)
    assert {each.answer.finished for each in results.answers} == {True, False}
    for digest, (ids, scored) in by_digest(from_file).items():
        own_ids, own_scored = by_digest(expected)[digest]
        if template is not None and own_ids[-1] == 2:
            own_ids, own_scored = [*own_ids, 4], [*own_scored, True]  # the template's line feed
        assert (ids, scored) == (own_ids, own_scored)


def test_rows_say_where_prompts_are_from_and_how_answers_came_about(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_it_answer(monkeypatch, lambda prompt: ("so\n#### 4", prompt[0] != "3"))
    rows = [{"prompt": f"{n}+1=?", "completion": f"#### {n + 1}"} for n in (3, 4)]
    found = trace_rows(answered(llama, dataset=rows, num_samples=2).answers)
    expected = {
        "prompt": "3+1=?",
        "completion": "so\n#### 4",
        "finished": False,
        "correct": False,
        "tokens": 9,
        "attempts": 1,
        "source": "in-memory",
        "row": 0,
        "row_digest": row_digest("3+1=?", "#### 4"),
    }
    assert expected in found
    assert {each["finished"] for each in found} == {True, False}


def test_tools_and_template_variables_are_kept(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_it_answer(monkeypatch, lambda prompt: "yes")
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    template = "{% if tools %}t{% endif %}{{ style }}\n" + TEMPLATE
    row = {
        "messages": CHATS[0],
        "tools": [tool],
        "chat_template_kwargs": {"style": "brief"},
    }
    (found,) = trace_rows(
        answered(llama, tiny_tokenizer(template), dataset=[row], num_samples=1).answers
    )
    assert found["messages"] == [*CHATS[0][:-1], {"role": "assistant", "content": "yes"}]
    assert (found["tools"], found["chat_template_kwargs"]) == ([tool], {"style": "brief"})
    settings = CAPConfig(0.5, recipe="wanda", dataset=[found], num_samples=1)
    (example,) = build_calibration_set(settings, tiny_tokenizer(template)).examples
    assert example.digest == found["row_digest"]


def test_pruning_on_the_file_is_pruning_on_the_answers(tmp_path: Path) -> None:
    """Up to rounding: the examples come in another order.

    A special token in the middle of an answer would be lost in its text, so the model writes none.
    """

    def without_special_tokens() -> PreTrainedModel:
        model = tiny_model("llama")
        never = torch.zeros(64)
        never[[0, 1, 3, *range(len(tiny_tokenizer()), 64)]] = -1e4
        model.lm_head.register_forward_hook(
            lambda module, args, out: out + never if out.shape[-1] == 64 else out
        )
        return model

    model = without_special_tokens()
    file = written(answered(model), tmp_path)
    from_file = CAPConfig(0.5, recipe="sparsegpt", dataset=str(file), num_samples=8)
    first = CAPPruner(config(recipe="sparsegpt")).prune(model, tiny_tokenizer())
    second = CAPPruner(from_file).prune(without_special_tokens(), tiny_tokenizer())
    records = [pruned.pruning_record.calibration for pruned in (first, second)]
    assert sorted(records[0]["digests"]) == sorted(records[1]["digests"])
    assert records[0]["tokens"] == records[1]["tokens"]
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_digest": 3}, "has a row_digest that is not a sha256 of 64 hexadecimal digits: 3"),
        ({"row_digest": "ab"}, "has a row_digest that is not a sha256 of 64 hexadecimal digits"),
        ({"finished": "no"}, "has finished that is not true or false: 'no'"),
    ],
)
def test_metadata_of_the_wrong_type_are_refused(changes: dict[str, Any], message: str) -> None:
    row = {"prompt": "1+1=?", "completion": "2", "finished": True, "row_digest": "0" * 64}
    settings = CAPConfig(0.5, recipe="wanda", dataset=[{**row, **changes}], num_samples=1)
    with pytest.raises(ValueError, match=message):
        build_calibration_set(settings, tiny_tokenizer())


def test_a_column_finished_of_other_data_means_nothing() -> None:
    row = {"prompt": "1+1=?", "completion": "2", "finished": False}
    settings = CAPConfig(0.5, recipe="wanda", dataset=[row], num_samples=1)
    (example,) = build_calibration_set(settings, tiny_tokenizer()).examples
    assert example.input_ids[-1] == 2


def test_a_template_that_changes_an_unfinished_answer_is_refused() -> None:
    row = {"prompt": "1+1=?", "completion": "it is", "finished": False, "row_digest": "0" * 64}
    template = TEMPLATE.replace("message.content }}", "message.content | upper }}")
    settings = CAPConfig(0.5, recipe="wanda", dataset=[row], num_samples=1)
    with pytest.raises(ValueError, match="changes the text of an answer that is not finished"):
        build_calibration_set(settings, tiny_tokenizer(template))
