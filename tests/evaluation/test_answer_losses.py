"""Tasks that measure the loss on worked answers without generating any: `gsm8k_loss` and others."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from optimum_cap.estimation.costs import AMOUNTS
from optimum_cap.evaluation.comparison import compare, comparison_table
from optimum_cap.evaluation.results import Evaluation, LossResult, WorkedAnswer
from optimum_cap.evaluation.run import evaluate, load_task_data
from optimum_cap.evaluation.tasks import TASKS

SUMS = [{"question": f"{n}+{n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(12)]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    return tmp_path


def losses_of(model: PreTrainedModel, data_dir: Path, limit: int | None = None) -> LossResult:
    found = evaluate(model, tiny_tokenizer(), tasks="gsm8k_loss", data_dir=data_dir, limit=limit)
    result = found.tasks["gsm8k_loss"]
    assert isinstance(result, LossResult)
    return result


def evaluation(model: str, *losses: float | None) -> Evaluation:
    items = tuple(WorkedAnswer(str(index), loss) for index, loss in enumerate(losses))
    return Evaluation(model, {"task": LossResult(items, 0, 0, {})}, {}, {}, 0.0)


def test_the_losses_are_those_of_the_task_that_generates(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    full = evaluate(
        model, tokenizer, tasks="gsm8k", data_dir=data_dir, limit=5, num_fewshot=0
    ).tasks["gsm8k"]

    def generate(*_: object, **__: object) -> None:
        raise AssertionError("nothing is generated")

    monkeypatch.setattr(type(model), "generate", generate)
    alone = losses_of(model, data_dir, limit=5)
    assert [(item.digest, item.loss) for item in alone.items] == [
        (item.digest, item.loss) for item in full.items
    ]
    assert alone.loss == full.answer_loss
    assert (alone.error, alone.too_long, alone.source) == (None, 0, {"file": "test.jsonl"})


def test_every_loss_task_reads_the_rows_of_its_task() -> None:
    alone = {name: task for name, task in TASKS.items() if task.loss_only}
    assert set(alone) == {"gsm8k_loss", "strategyqa_loss", "arc_challenge_loss"}
    for name, task in alone.items():
        full = TASKS[name.removesuffix("_loss")]
        assert (task.files, task.preset, task.extract) == (full.files, full.preset, full.extract)
        assert AMOUNTS[name] == AMOUNTS[name.removesuffix("_loss")]


def test_the_answers_of_a_file_have_losses(data_dir: Path, tmp_path: Path) -> None:
    own = tmp_path / "folder" / "own.jsonl"
    own.parent.mkdir()
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in SUMS]
    own.write_text("\n".join(map(json.dumps, rows)))
    model = tiny_model("llama")
    found = evaluate(model, tiny_tokenizer(), tasks=f"loss:{own}", limit=5)
    assert list(found.tasks) == ["loss:own.jsonl"]  # without its folder
    result = found.tasks["loss:own.jsonl"]
    assert isinstance(result, LossResult)
    assert str(tmp_path) not in json.dumps(found.to_dict())
    published = losses_of(model, data_dir)
    of_prompts = {item.digest: item.loss for item in published.items}
    assert len(result.items) == 5
    assert all(of_prompts[item.digest] == item.loss for item in result.items)

    chats = tmp_path / "chats.jsonl"  # without a result after ####
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    chats.write_text(json.dumps({"messages": turns}))
    assert isinstance(
        evaluate(
            model,
            tiny_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"),
            tasks=[f"loss:{chats}"],
        ).tasks["loss:chats.jsonl"],
        LossResult,
    )


def test_a_file_without_answers_is_refused(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a plain text"}))
    with pytest.raises(ValueError, match="is not a prompt and an answer"):
        load_task_data(f"loss:{texts}")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_task_data("loss:none.jsonl")
    with pytest.raises(ValueError, match="'loss:' names no file: write its path after the colon"):
        load_task_data("loss:")
    with pytest.raises(ValueError, match="loss:gsm8k names a preset, not a file: use the task gsm"):
        load_task_data("loss:gsm8k")
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": "1+1?", "completion": " "}))
    with pytest.raises(ValueError, match=r"all answers in 'empty\.jsonl' are empty"):
        load_task_data(f"loss:{empty}")
    rows = json.dumps({"prompt": "1", "completion": "2"})
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text(rows)
    both = [f"loss:{tmp_path / folder / 'rows.jsonl'}" for folder in ("a", "b")]
    with pytest.raises(ValueError, match=r"two tasks have the name 'loss:rows\.jsonl'"):
        load_task_data(both)


def test_rows_with_an_empty_answer_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "1+1?", "completion": answer} for answer in ("2", "", " ")]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (task,) = load_task_data(f"loss:{file}").values()
    assert [question.answer for question in task.items] == ["2"]
    assert "2 of 3 rows of 'rows.jsonl' have an empty answer, and are left out" in caplog.text


def test_answers_that_the_model_cannot_take_are_counted(data_dir: Path) -> None:
    found = losses_of(tiny_model("llama", max_position_embeddings=23), data_dir)
    assert found.too_long > 0
    assert len(found.items) + found.too_long == len(SUMS)
    assert found.loss is not None
    with pytest.raises(
        ValueError,
        match=r"task gsm8k_loss: none of the 12 questions fits with its answer into the 4 tokens",
    ):
        losses_of(tiny_model("llama", max_position_embeddings=4), data_dir)


def test_a_loss_that_is_not_finite_is_an_error(data_dir: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    found = evaluate(model, tiny_tokenizer(), tasks="gsm8k_loss", data_dir=data_dir, limit=3)
    assert "the loss is NaN or infinite on 3 of 3 answers" in found.errors["gsm8k_loss"]
    assert "not finite" in found.table()
    json.dumps(found.to_dict(), allow_nan=False)
    assert isinstance(compare(evaluation("a", 1.0), evaluation("b", None))["task"], str)


def test_json_round_trip(data_dir: Path, tmp_path: Path) -> None:
    found = evaluate(
        tiny_model("llama"), tiny_tokenizer(), tasks="gsm8k_loss", data_dir=data_dir, limit=4
    )
    found.save(tmp_path / "found.json")
    assert Evaluation.load(tmp_path / "found.json") == found
    assert f"{found.tasks['gsm8k_loss'].loss:.4f}" in found.table()


def test_differences_are_paired_by_question() -> None:
    dense, pruned = evaluation("dense", 1.0, 2.0, 3.0, 9.0), evaluation("pruned", 1.1, 2.2, 3.6)
    [found] = compare(dense, pruned)["task"]
    assert not isinstance(found, str)
    assert (found.n, found.only_dense, found.p_value) == (3, 1, None)
    assert (found.dense, found.pruned) == pytest.approx((2.0, 2.3))
    # Student's t with two degrees of freedom, over the differences 0.1, 0.2 and 0.6
    half = 4.303 * math.sqrt(0.07) / math.sqrt(3)
    assert found.interval == pytest.approx((0.3 - half, 0.3 + half))
    assert "2.0000" in comparison_table(dense, pruned, None)
    [alone] = compare(evaluation("a", 1.0), evaluation("b", 2.0))["task"]
    assert not isinstance(alone, str)
    assert alone.interval is None
