"""Tasks by the likelihood of choices: against lm-evaluation-harness and their definition."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluation import CHOICES, FACTS, TEMPLATE, with_room, write_rows, write_task_files

from optimum_cap.evaluation.measure import _chosen
from optimum_cap.evaluation.results import Evaluation
from optimum_cap.evaluation.run import evaluate
from optimum_cap.evaluation.tasks import ChoiceQuestion, load_items

TEXTS = ("a cat", "dögs über alles", "7", "the sun and the moon", "é", "ice")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_task_files(tmp_path)


def arc_rows(count: int) -> list[dict[str, Any]]:
    """Questions in the layout of the Hub; some choices have more bytes than characters."""
    return [
        {
            "id": str(n),
            "question": f"which one is number {n}?",
            "choices": {"text": [TEXTS[(n + k) % 6] for k in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[n % 4],
        }
        for n in range(count)
    ]


def harness_arc(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Define `arc_challenge` of the harness on other rows, as the task `local_arc`."""
    write_rows(folder / "rows.jsonl", rows)
    original = resources.files("lm_eval") / "tasks" / "arc" / "arc_challenge.yaml"
    (folder / "local_arc.yaml").write_text(
        f"include: {original}\ntask: local_arc\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "training_split: null\nvalidation_split: null\ntag: null\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_both_accuracies_are_those_of_the_task_of_the_harness(
    template: str | None, tmp_path: Path
) -> None:
    rows = arc_rows(24)
    write_rows(tmp_path / "arc_challenge" / "test.jsonl", rows)
    harness_arc(tmp_path, rows)
    model, tokenizer = with_room(template)
    found = evaluate(
        model,
        tokenizer,
        tasks="arc_challenge_choices,lm_eval:local_arc",
        data_dir=tmp_path,
        include_path=tmp_path,
        log_samples=tmp_path / "samples",
    )
    ours, theirs = found.tasks["arc_challenge_choices"], found.tasks["lm_eval:local_arc"]
    reported = {item.metric: item.value for item in theirs.items}
    assert reported == {"acc,none": ours.acc, "acc_norm,none": ours.acc_norm}
    assert 0 < ours.acc < 1
    assert ours.acc != ours.acc_norm
    lines = (tmp_path / "samples" / "lm_eval_local_arc.jsonl").read_text().splitlines()
    for item, line in zip(ours.items, map(json.loads, lines), strict=True):
        values = [float(value) for ((value, _),) in line["resps"]]
        assert item.log_likelihoods == pytest.approx(values, abs=1e-4)
        assert (item.correct, item.correct_norm) == (line["acc"] == 1, line["acc_norm"] == 1)


def test_log_likelihoods_are_those_of_the_model(data_dir: Path) -> None:
    model, tokenizer = with_room()
    found = evaluate(model, tokenizer, tasks="strategyqa_choices", data_dir=data_dir)
    for row, item in zip(FACTS, found.tasks["strategyqa_choices"].items, strict=True):
        for choice, value in zip((" yes", " no"), item.log_likelihoods, strict=True):
            context = f"Question: {row['question']}\nAnswer:"
            ids = tokenizer(context + choice, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logprobs = model(ids).logits[0].log_softmax(-1)
            count = len(choice)
            picked = logprobs[-count - 1 : -1].gather(1, ids[0, -count:, None])
            assert value == pytest.approx(float(picked.sum()), rel=1e-4)
        assert item.gold == (0 if row["answer"] else 1)


def test_the_likeliest_choice_and_that_per_character() -> None:
    question = ChoiceQuestion("?", ("yes", "certainly"), 1, "digest")
    item = _chosen(question, [-3.0, -4.5])
    assert (item.chosen, item.chosen_norm) == (0, 1)
    assert (item.correct, item.correct_norm) == (False, True)
    tie = _chosen(question, [-3.0, -3.0])
    assert tie.chosen == 0  # the first, as in the harness


def test_both_layouts_of_rows_hold_the_same_question(tmp_path: Path) -> None:
    published = CHOICES[1]
    hub = {
        "question": published["question"]["stem"],
        "choices": {"text": ["one", "two"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    file = tmp_path / "arc_challenge" / "test.jsonl"
    found = []
    for row in (published, hub):
        write_rows(file, [row])
        found.append(load_items("arc_challenge_choices", tmp_path)[0])
    assert found[0] == found[1]
    assert (found[0][0].choices, found[0][0].gold) == (("one", "two"), 1)


def test_choices_are_shown_saved_and_read_again(data_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = with_room()
    found = evaluate(model, tokenizer, tasks="arc_challenge_choices", data_dir=data_dir)
    result = found.tasks["arc_challenge_choices"]
    found.save(tmp_path / "found.json")
    assert Evaluation.load(tmp_path / "found.json") == found
    rows = [line.split() for line in found.table().splitlines() if line.startswith("arc_")]
    assert [row[:4] for row in rows] == [
        ["arc_challenge_choices", "2", "acc", f"{result.acc:.1%}"],
        ["arc_challenge_choices", "2", "acc_norm", f"{result.acc_norm:.1%}"],
    ]


def test_a_likelihood_that_is_not_finite_is_an_error(data_dir: Path) -> None:
    model, tokenizer = with_room()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    found = evaluate(model, tokenizer, tasks="strategyqa_choices", data_dir=data_dir)
    assert "choice is NaN or infinite in 4 of 4 questions" in found.errors["strategyqa_choices"]
    assert "acc not finite" in found.table()
    json.dumps(found.to_dict(), allow_nan=False)


def test_one_choice_is_no_choice(tmp_path: Path) -> None:
    choices = [{"text": "one", "label": "A"}]
    row = {"question": {"stem": "which?", "choices": choices}, "answerKey": "A"}
    write_rows(tmp_path / "arc_challenge" / "test.jsonl", [row])
    with pytest.raises(ValueError, match=r"'which\?' in .* has the choices .*but needs at le"):
        load_items("arc_challenge_choices", tmp_path)
