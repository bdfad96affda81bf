"""Tasks of lm-evaluation-harness: reported as it reports them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from helpers.evaluation import with_room, write_rows
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from optimum_cap.evaluation.harness import run_harness_task
from optimum_cap.evaluation.results import Evaluation
from optimum_cap.evaluation.run import evaluate, load_task_data

DEFINITION = """
task: NAME
tag: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl, train: FOLDER/rows.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "what colour has {{thing}}?"
doc_to_target: gold
doc_to_choice: ["red", "green", "dark blue"]
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {version: 2.0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two tasks and a group of them, on local data."""
    rows = [{"thing": f"thing {n}", "gold": n % 3} for n in range(15)]
    write_rows(tmp_path / "rows.jsonl", rows)
    for name in ("colour", "shade"):
        text = DEFINITION.replace("NAME", name).replace("FOLDER", str(tmp_path))
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "group.yaml").write_text(
        "group: paint\ntask: [colour, shade]\naggregate_metric_list:\n  - metric: acc\n"
    )
    return tmp_path


def reported(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """What `simple_evaluate` of the harness reports."""
    model, tokenizer = with_room()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=512)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(lm, tasks=[name], task_manager=manager, **options)
    assert found is not None
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "num_fewshot"), [(None, None), (6, 2)])
def test_metrics_are_those_that_the_harness_reports(
    limit: int | None, num_fewshot: int | None, folder: Path, tmp_path: Path
) -> None:
    expected = reported(folder, "colour", limit=limit, num_fewshot=num_fewshot)
    found = evaluate(
        *with_room(),
        tasks="lm_eval:colour",
        include_path=folder,
        limit=limit,
        num_fewshot=num_fewshot,
    )
    result = found.tasks["lm_eval:colour"]
    values = expected["results"]["colour"]
    assert [(item.task, item.metric, item.n) for item in result.items] == [
        ("colour", "acc,none", limit or 15),
        ("colour", "acc_norm,none", limit or 15),
    ]
    for item in result.items:
        assert item.value == pytest.approx(values[item.metric])
        assert item.stderr == pytest.approx(values[item.metric.replace(",", "_stderr,")])
    assert result.num_fewshot == {"colour": num_fewshot or 0}
    assert result.versions == {"colour": "2.0"}
    found.save(tmp_path / "found.json")
    assert Evaluation.load(tmp_path / "found.json") == found
    row = next(line.split() for line in found.table().splitlines() if line.startswith("lm_eval"))
    shown = ["lm_eval:colour", str(limit or 15), "acc,none", f"{result.items[0].value:.4f}", "±"]
    assert row[:5] == shown


@pytest.mark.slow
def test_a_group_has_its_parts_and_its_mean(folder: Path) -> None:
    found = evaluate(*with_room(), tasks="lm_eval:paint", include_path=folder)
    values = {(item.task, item.metric): item for item in found.tasks["lm_eval:paint"].items}
    expected = reported(folder, "paint")["groups"]["paint"]
    assert {"colour", "shade", "paint"} == {task for task, _ in values}
    assert values["paint", "acc,none"].value == pytest.approx(expected["acc,none"])
    assert values["paint", "acc,none"].n is None
    assert "lm_eval:paint colour" in found.table()


@pytest.mark.slow
def test_a_task_of_the_harness_is_stored_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "tasks": "lm_eval:colour",
        "include_path": folder,
        "resume_dir": tmp_path / "resume",
    }
    runs: list[str] = []

    def counted(lm: Any, task: Any, *args: Any) -> Any:
        runs.append(task.name)
        return run_harness_task(lm, task, *args)

    monkeypatch.setattr("optimum_cap.evaluation.measure.run_harness_task", counted)
    first = evaluate(*with_room(), **options, log_samples=tmp_path / "a.jsonl")
    second = evaluate(*with_room(), **options, log_samples=tmp_path / "b.jsonl")
    assert second.tasks == first.tasks
    assert runs == ["colour"]
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    # Other documents under the same name are another task.
    write_rows(folder / "rows.jsonl", [{"thing": "sky", "gold": 2}] * 4)
    evaluate(*with_room(), **options)
    assert len(runs) == 2


@pytest.mark.slow
def test_what_the_harness_cannot_do_is_refused_in_one_sentence(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no task 'colur' \(did you mean 'colour'\?\): `lm_eval"):
        load_task_data("lm_eval:colur", include_path=folder)
    with pytest.raises(FileNotFoundError, match=r"none with definitions of tasks \(include_path, "):
        load_task_data("lm_eval:colour", include_path=folder / "none")
    with pytest.raises(ValueError, match="names no task of lm-evaluation-harness: write its name"):
        load_task_data("lm_eval:")
    with pytest.raises(ValueError, match=r"include_path .* has no effect, as no task is one of"):
        load_task_data("tiny_reasoner", include_path=folder)
    (folder / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match=r"task lm_eval:colour of lm-evaluation-harness cannot be"):
        load_task_data("lm_eval:colour", include_path=folder)
