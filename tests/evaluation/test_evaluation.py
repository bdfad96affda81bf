"""Evaluation: what is asked, what counts as right, what is left out, what is refused."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from helpers.evaluation import LINES, SUMS, TEMPLATE, with_room, write_task_files
from helpers.paths import EXAMPLES, SHARED
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import optimum_cap
from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data import Conversation, build_calibration_set, render_prompt
from optimum_cap.data.sources import row_digest
from optimum_cap.evaluation.harness import harness_model
from optimum_cap.evaluation.results import Answer, Evaluation, Window, wilson_interval
from optimum_cap.evaluation.run import evaluate as evaluate_by_default
from optimum_cap.evaluation.run import load_task_data
from optimum_cap.evaluation.tasks import (
    GROUPS,
    TASKS,
    TaskItems,
    extract_label,
    extract_last_number,
    extract_marked,
    extract_number,
    extract_yes_no,
    load_items,
    resolve_tasks,
)

# The tiny models take 64 characters: no worked examples.
evaluate = functools.partial(evaluate_by_default, num_fewshot=0)

REASONER = EXAMPLES / "tiny_reasoner"
sys.path.insert(0, str(REASONER))  # the examples are scripts, no package
from evaluate import correct_answers, generated_answers, load_problems  # noqa: E402


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder with the files of all published data sets, short enough for the tiny models."""
    return write_task_files(tmp_path)


def calibrated(model: PreTrainedModel, digests: list[str]) -> PreTrainedModel:
    """Let `model` look as if it had been pruned with these rows."""
    model.pruning_record = SimpleNamespace(calibration={"digests": digests})
    return model


def damaged_reasoner() -> PreTrainedModel:
    """The embedded model with noise on its weights: it is right here and wrong there."""
    model = AutoModelForCausalLM.from_pretrained(REASONER / "model").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.25 * parameter.std() * noise if parameter.ndim == 2 else 0)
    return model


def question(prompt: str) -> Conversation:
    return Conversation((("user", prompt), ("assistant", "an answer")))


def reasoner_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REASONER / "model")


# Accuracy


@pytest.mark.slow
def test_items_are_graded_as_the_example_grades_them() -> None:
    model, tokenizer = damaged_reasoner(), reasoner_tokenizer()
    problems = load_problems("test", 30)
    right = correct_answers(problems, generated_answers(model, tokenizer, problems))
    expected = {
        row_digest(problem.question, problem.answer): correct
        for problem, correct in zip(problems, right, strict=True)
    }
    assert 0 < sum(right) < len(right)

    data = {name: load_items(name, None) for name in GROUPS["tiny_reasoner"]}
    data = {
        name: TaskItems(tuple(q for q in questions if q.digest in expected), source)
        for name, (questions, source) in data.items()
    }
    found = evaluate(model, tokenizer, data=data, batch_size=128)
    items = [item for result in found.tasks.values() for item in result.items]
    assert {item.digest: item.correct for item in items} == expected


@pytest.mark.parametrize("template", [None, pytest.param(TEMPLATE, marks=pytest.mark.slow)])
def test_the_loss_is_that_on_the_worked_answer(template: str | None, data_dir: Path) -> None:
    model, tokenizer = with_room(template)
    found = evaluate(model, tokenizer, tasks="gsm8k", data_dir=data_dir).tasks["gsm8k"]
    rows = f"gsm8k={data_dir / 'gsm8k' / 'test.jsonl'}"
    config = CAPConfig(sparsity=0.5, dataset=rows, num_samples=len(SUMS))
    expected = {}
    for example in build_calibration_set(config, tokenizer).examples:
        with torch.no_grad():
            logprobs = model(example.input_ids[None]).logits[0].double().log_softmax(-1)
        targets = example.scored.nonzero().flatten()
        chosen = logprobs[targets - 1, example.input_ids[targets]]
        expected[example.digest] = -float(chosen.mean())
    losses = {item.digest: item.loss for item in found.items}
    assert losses == pytest.approx(expected, rel=1e-5)
    assert found.answer_loss == pytest.approx(sum(expected.values()) / len(SUMS), rel=1e-5)
    assert (
        f"{found.answer_loss:.4f}"
        in evaluate(model, tokenizer, tasks="gsm8k", data_dir=data_dir).table()
    )


def test_answers_that_the_model_cannot_take_have_no_loss(data_dir: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=23)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 23
    found = evaluate(model, tokenizer, tasks="gsm8k", data_dir=data_dir).tasks["gsm8k"]
    losses = [item.loss for item in found.items]
    assert None in losses
    assert all(loss > 0 for loss in losses if loss is not None)
    assert found.answer_loss is not None


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ strftime_now('%d') }}" + TEMPLATE])
def test_the_prompt_is_that_of_calibration(template: str | None) -> None:
    tokenizer = tiny_tokenizer(template)
    config = CAPConfig(sparsity=0.5, dataset=[("what?", "so.")], num_samples=1)
    (example,) = build_calibration_set(config, tokenizer).examples
    prompt = example.input_ids[: int(example.scored.nonzero()[0])]
    lm = harness_model(tiny_model("llama"), tokenizer, 64, 1)
    ids, _ = lm.tok_batch_encode([render_prompt(question("what?"), tokenizer)])
    assert ids[0].tolist() == prompt.tolist()


@pytest.mark.slow
def test_typed_parts_reach_a_template_that_wants_them(data_dir: Path) -> None:
    typed = TEMPLATE.replace(
        "{{ m['content'] }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"
    )
    results = [
        evaluate(*with_room(template), tasks="gsm8k", data_dir=data_dir)
        for template in (TEMPLATE, typed)
    ]
    assert results[0].tasks["gsm8k"].items == results[1].tasks["gsm8k"].items


def test_answers_that_the_template_leaves_out_are_counted_or_refused(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = TEMPLATE.replace("m['content']", "m['content'].split('3+3=')[-1]")
    evaluate(*with_room(few), tasks="gsm8k", data_dir=data_dir)
    assert "leaves out parts of 1 of 12 answers of data set 'gsm8k' (first in row 3)" in caplog.text
    every = TEMPLATE.replace("m['content']", "m['content'].split('#')[0]")
    with pytest.raises(ValueError, match="leaves out text or tool calls of all 12 answers of data"):
        evaluate(*with_room(every), tasks="gsm8k", data_dir=data_dir)


def test_messages_are_asked_as_they_are_and_only_the_last_answer_counts(data_dir: Path) -> None:
    file = data_dir / "test.jsonl"
    turns = [("system", "add"), ("user", "1+1?"), ("assistant", "2"), ("user", "and 1?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    answer = {"role": "assistant", "content": "3\n#### 3"}
    row = {"kind": "arithmetic", "messages": [*messages, answer]}
    file.write_text(json.dumps(row))
    model, tokenizer = tiny_model("llama", max_position_embeddings=200), tiny_tokenizer(TEMPLATE)
    tokenizer.model_max_length = 200
    task = "tiny_reasoner_arithmetic"
    (item,) = evaluate(model, tokenizer, tasks=task, data_dir=data_dir).tasks[task].items
    prompt = "<system>add</s><user>1+1?</s><assistant>2</s><user>and 1?</s><assistant>"
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, "3\n#### 3</s>")
    ]
    with torch.no_grad():
        logits = model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1]))
    assert item.loss == pytest.approx(float(expected), rel=1e-5)
    file.write_text(json.dumps({**row, "messages": messages}))
    with pytest.raises(ValueError, match=r"row of 'test.jsonl' is not a prompt and an answer, but"):
        load_task_data(task, data_dir)


def test_special_tokens_are_those_of_calibration() -> None:
    # The tokenizer puts <s> first; the template of the embedded model has it in its text.
    tokenizer = reasoner_tokenizer()
    file = REASONER / "data" / "calibration.jsonl"
    config = CAPConfig(sparsity=0.5, dataset=str(file), num_samples=1)
    (example,) = build_calibration_set(config, tokenizer).examples
    row = json.loads(file.read_text().splitlines()[example.index])
    lm = harness_model(tiny_model("llama"), tokenizer, 256, 1)
    ids, _ = lm.tok_batch_encode([render_prompt(question(row["question"]), tokenizer)])
    assert ids[0].tolist() == example.input_ids[: int(example.scored.nonzero()[0])].tolist()


def test_a_model_without_markers_is_wrong_and_the_rate_is_shown(data_dir: Path) -> None:
    found = evaluate(
        tiny_model("llama"), tiny_tokenizer(), tasks="gsm8k,strategyqa", data_dir=data_dir
    )
    for result in found.tasks.values():
        assert (result.accuracy, result.without_answer) == (0.0, len(result.items))
    assert found.tasks["strategyqa"].fallback_accuracy is None
    assert found.tasks["gsm8k"].fallback_accuracy is not None
    row = next(line for line in found.table().splitlines() if line.startswith("strategyqa"))
    loss = f"{found.tasks['strategyqa'].answer_loss:.4f}"
    assert row.split() == ["strategyqa", "4", "0.0%", "0.0%", "to", "49.0%", "100.0%", loss, "0"]


def test_generation_ends_with_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(REASONER / "model")
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    found = evaluate(model, tasks="tiny_reasoner_arithmetic", limit=4)
    assert found.tasks["tiny_reasoner_arithmetic"].accuracy == 1.0
    assert TASKS["tiny_reasoner_arithmetic"].max_new_tokens == 96
    assert len(steps) < 60


def test_the_model_and_the_tokenizer_are_left_as_they_were(data_dir: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).train()
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 1.5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = model.generation_config

    def no_padding(special: dict) -> None:
        del special["pad_token"]

    tokenizer = tiny_tokenizer(edit=no_padding)
    seen = set()
    model.register_forward_hook(
        lambda module, *_: seen.add((module.lm_head.weight.dtype, module.training))
    )
    state = torch.random.get_rng_state()
    found = evaluate(model, tokenizer, tasks=["gsm8k", "wikitext2"], data_dir=data_dir, limit=3)
    assert seen == {(torch.float32, False)}  # half precision is computed in float32 on the CPU
    assert found.settings["dtype"] == "bfloat16"
    assert model.training
    assert model.dtype == torch.bfloat16
    assert model.generation_config is own
    assert tokenizer.pad_token is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_offloaded_model(data_dir: Path, tmp_path: Path) -> None:
    def results(model: PreTrainedModel) -> Any:
        tasks = ["gsm8k", "wikitext2"]
        return evaluate(model, tiny_tokenizer(), tasks=tasks, data_dir=data_dir, limit=3).tasks

    expected = results(tiny_model("llama"))
    assert results(disk_offload(tiny_model("llama"), tmp_path / "offload")) == expected


def test_sampling_settings_of_the_checkpoint_change_nothing(data_dir: Path) -> None:
    def answers(model: PreTrainedModel) -> list[str | None]:
        found = evaluate(model, tasks="tiny_reasoner", limit=3)
        return [item.answer for result in found.tasks.values() for item in result.items]

    plain = damaged_reasoner()
    odd = damaged_reasoner()
    odd.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    odd.generation_config.max_new_tokens = 1
    assert answers(odd) == answers(plain)


@pytest.mark.parametrize(
    ("extract", "text", "expected"),
    [
        (extract_marked, "1 + 1 = 2\n#### 2", "2"),
        (extract_marked, "####  B \nmore #### C", "B"),
        (extract_marked, "no marker", None),
        (extract_marked, "####", None),
        (extract_number, "so\n#### 1,234.\n#### 5", "1234"),
        (extract_number, "#### -7 apples", "-7"),
        (extract_number, "####7", None),  # as in the harness: a space belongs to the marker
        (extract_number, "the answer is 7", None),
        (extract_last_number, "first 3, then the answer is $1,250.", "1250"),
        (extract_last_number, "none", None),
        (extract_yes_no, "facts\n#### Yes.", "yes"),
        (extract_yes_no, "#### nothing", None),
        (extract_yes_no, "#### Facts\nIt sinks.\n#### No", "no"),  # a heading before
        (extract_yes_no, "yes", None),
        (extract_label, "#### (b) sea", "B"),
        (extract_label, "the sea\n#### 2", "2"),
        (extract_label, "#### sea", None),
        (extract_label, "#### Step 1\nIt floats.\n#### **C**", "C"),
    ],
)
def test_final_answers(
    extract: Callable[[str], str | None], text: str, expected: str | None
) -> None:
    assert extract(text) == expected


def test_wilson_interval() -> None:
    low, high = wilson_interval(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)  # textbook values
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


# Perplexity


def by_hand(model: PreTrainedModel, tokenizer: Any, text: str, size: int) -> float:
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    losses = []
    with torch.no_grad():
        for window in ids[: len(ids) // size * size].view(-1, size):
            losses.append(model(window[None], labels=window[None]).loss.item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.slow
def test_perplexity_is_that_of_windows_one_after_the_other(
    model: PreTrainedModel, data_dir: Path
) -> None:
    tokenizer = tiny_tokenizer()
    result = evaluate(model, tokenizer, tasks="wikitext2", data_dir=data_dir).tasks["wikitext2"]
    text = "\n\n".join(line if line.strip() else "" for line in LINES)
    assert result.window == 64
    assert len(result.items) == len(text) // 64
    assert result.tokens == len(result.items) * 63
    assert result.perplexity == pytest.approx(by_hand(model, tokenizer, text, 64), rel=1e-5)


def test_documents_are_predicted_one_by_one(model: PreTrainedModel, data_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"a story of {n} words" + " and more" * n for n in range(8)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (data_dir / "tinystories").mkdir()
    (data_dir / "tinystories" / "stories_clean.jsonl").write_text(rows)
    seen = calibrated(model, [row_digest("", texts[0])])
    result = evaluate(seen, tokenizer, tasks="tinystories", data_dir=data_dir).tasks["tinystories"]
    assert (len(result.items), result.excluded) == (7, 1)
    total = count = 0
    for text in texts[1:]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert result.tokens == count
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_document_without_anything_to_predict_is_refused(data_dir: Path) -> None:
    (data_dir / "tinystories").mkdir()
    (data_dir / "tinystories" / "stories_clean.jsonl").write_text('{"text": "a"}\n{"text": "ab"}\n')
    with pytest.raises(ValueError, match="tinystories: the document 'a' has 1 tokens"):
        evaluate(tiny_model("llama"), tiny_tokenizer(), tasks="tinystories", data_dir=data_dir)
    every = calibrated(tiny_model("llama"), [row_digest("", "a"), row_digest("", "ab")])
    with pytest.raises(ValueError, match="calibrated on all 2 documents"):
        evaluate(every, tiny_tokenizer(), tasks="tinystories", data_dir=data_dir)
    with pytest.raises(FileNotFoundError, match=r"looked for tinystories/stories_clean\.jsonl"):
        load_task_data("tinystories")


def test_a_text_shorter_than_a_window_is_one_window(data_dir: Path) -> None:
    (data_dir / "wikitext-2" / "test.txt").write_text(" short text \n")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = evaluate(model, tokenizer, tasks="wikitext2", data_dir=data_dir).tasks["wikitext2"]
    assert [item.tokens for item in result.items] == [12]
    assert result.perplexity == pytest.approx(by_hand(model, tokenizer, " short text \n", 13))


def test_a_perplexity_that_is_not_finite_is_named_and_the_rest_kept(data_dir: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    found = evaluate(
        model, tiny_tokenizer(), tasks="strategyqa,wikitext2", data_dir=data_dir, limit=3
    )
    assert found.tasks["wikitext2"].perplexity is None
    assert "NaN or infinite in 3 of 3 windows" in found.errors["wikitext2"]
    assert list(found.errors) == ["wikitext2"]
    assert len(found.tasks["strategyqa"].items) == 3
    assert "not finite" in found.table()
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_hub_gives_the_same_data_from_the_split_test(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"gsm8k": SUMS, "wikitext": [{"text": x if x.strip() else ""} for x in LINES]}

    def load_dataset(hub_id: str, name: str, split: str, revision: str) -> Any:
        assert split == "test"
        return rows[hub_id.split("/")[1]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    names = ("gsm8k", "wikitext2")
    local, hub = load_task_data(names, data_dir, 0), load_task_data(names, None, 0)
    for name in names:
        assert hub[name].items == local[name].items
        assert hub[name].source["split"] == "test"


# What is left out


def test_what_a_pruned_model_was_calibrated_on_is_left_out(data_dir: Path) -> None:
    file = data_dir / "gsm8k" / "test.jsonl"
    config = CAPConfig(sparsity=0.2, dataset=f"gsm8k={file}", num_samples=5)
    model = CAPPruner(config).prune(tiny_model("llama"), tiny_tokenizer())
    found = evaluate(model, tiny_tokenizer(), tasks="gsm8k,strategyqa", data_dir=data_dir)
    result = found.tasks["gsm8k"]
    assert (result.excluded, len(result.items)) == (5, len(SUMS) - 5)
    seen = set(model.pruning_record.calibration["digests"])
    assert not seen & {item.digest for item in result.items}
    assert found.tasks["strategyqa"].excluded == 0
    assert "gsm8k: 5 questions left out" in found.table()


def test_of_a_model_that_was_pruned_without_data_nothing_is_left_out(data_dir: Path) -> None:
    model = CAPPruner(CAPConfig(sparsity=0.5, recipe="magnitude")).prune(tiny_model("llama"))
    found = evaluate(model, tiny_tokenizer(), tasks="gsm8k", data_dir=data_dir)
    assert (found.tasks["gsm8k"].excluded, len(found.tasks["gsm8k"].items)) == (0, len(SUMS))


def test_windows_over_a_calibration_passage_are_left_out(data_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    file = data_dir / "wikitext-2" / "test.txt"
    config = CAPConfig(sparsity=0.2, dataset=f"wikitext2={file}", num_samples=1)
    (example,) = build_calibration_set(config, tokenizer).examples
    model = calibrated(tiny_model("llama"), [example.digest])
    result = evaluate(model, tokenizer, tasks="wikitext2", data_dir=data_dir).tasks["wikitext2"]

    text, _ = load_items("wikitext2", data_dir)
    ((start, stop, _),) = [part for part in text.passages if part[2] == example.digest]
    passage = " ".join(text.text[start:stop].split())
    assert passage.startswith(" ".join(tokenizer.decode(example.input_ids).split())[:20])
    overlapping = stop // 64 - start // 64 + 1
    whole = len(text.text) // 64
    assert (result.excluded, len(result.items)) == (overlapping, whole - overlapping)


def test_nothing_left_is_an_error(data_dir: Path) -> None:
    digests = [row_digest(row["question"], row["answer"]) for row in SUMS]
    text, _ = load_items("wikitext2", data_dir)
    digests += [digest for *_, digest in text.passages]
    model = calibrated(tiny_model("llama"), digests)
    with pytest.raises(ValueError, match="gsm8k: the model was calibrated on all 12 questions"):
        evaluate(model, tiny_tokenizer(), tasks="gsm8k", data_dir=data_dir)
    (data_dir / "wikitext-2" / "test.txt").write_text("".join(LINES[:60]))
    text, _ = load_items("wikitext2", data_dir)
    model = calibrated(tiny_model("llama"), [digest for *_, digest in text.passages])
    with pytest.raises(ValueError, match="wikitext2: the model was calibrated on text in all"):
        evaluate(model, tiny_tokenizer(), tasks="wikitext2", data_dir=data_dir)


def test_a_limit_draws_the_same_items_for_every_model(data_dir: Path) -> None:
    def items(model: PreTrainedModel, seed: int = 0, limit: int | None = 6) -> list[str]:
        found = evaluate(
            model, tiny_tokenizer(), tasks="gsm8k", data_dir=data_dir, limit=limit, seed=seed
        )
        return [item.digest for item in found.tasks["gsm8k"].items]

    everything = items(tiny_model("llama"), limit=None)
    first = items(tiny_model("llama"))
    assert len(first) == 6
    assert first == [digest for digest in everything if digest in first]  # in their order
    assert items(tiny_model("llama", seed=1)) == first
    assert items(tiny_model("llama"), seed=1) != first
    # One that is left out is replaced by one other; nothing else moves.
    left_out = items(calibrated(tiny_model("llama"), first[:1]))
    assert len(left_out) == 6
    assert set(first[1:]) < set(left_out)


# What is refused


def test_unknown_tasks_are_named_with_the_valid_ones() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown task 'gsm' \(did you mean 'gsm8k'\?\): choose from .*gsm8k.*wikitext2",
    ):
        evaluate(tiny_model("llama"), tiny_tokenizer(), tasks="gsm,wikitext2")
    with pytest.raises(ValueError, match="tasks is empty"):
        resolve_tasks(" , ")


def test_groups_expand_without_repetition() -> None:
    assert resolve_tasks("gsm8k, tiny_reasoner,tiny_reasoner_yes_no") == [
        "gsm8k",
        "tiny_reasoner_arithmetic",
        "tiny_reasoner_yes_no",
        "tiny_reasoner_multiple_choice",
    ]


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("limit", 1.5), ("batch_size", -1)])
def test_counts_are_checked(name: str, value: Any, data_dir: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value}"):
        evaluate("nowhere", tasks="gsm8k", data_dir=data_dir, **{name: value})


def test_missing_files_say_where_was_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=rf"gsm8k: .*{tmp_path}/gsm8k/test.jsonl.*data-dir"):
        load_task_data("gsm8k", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data folder .*none does not exist"):
        load_task_data("gsm8k", tmp_path / "none")
    monkeypatch.setattr("optimum_cap.evaluation.tasks._ROOT", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    places = rf"{tmp_path}/elsewhere/examples/tiny_reasoner/data/test.jsonl, {tmp_path}/examples"
    with pytest.raises(FileNotFoundError, match=places):
        load_task_data("tiny_reasoner")


def test_embedded_problems_are_found_in_a_checkout_and_in_a_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the checkout is found from the package, not the current folder
    for folder in (None, REASONER.parent, REASONER / "data"):
        data = load_task_data("tiny_reasoner", folder)
        assert [len(task.items) for task in data.values()] == [300, 300, 300]


def test_rows_that_cannot_be_graded_are_refused(data_dir: Path) -> None:
    file = data_dir / "gsm8k" / "test.jsonl"
    file.write_text('{"question": "1+1?", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"gsm8k: the answer '2' .* must end with a line '#### "):
        load_task_data("gsm8k", data_dir)
    (data_dir / "test.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    with pytest.raises(ValueError, match="has no row of kind 'arithmetic'"):
        load_task_data("tiny_reasoner", data_dir)


def test_a_question_without_room_for_an_answer_is_refused(data_dir: Path) -> None:
    row = {"question": "1+" * 30 + "1?", "answer": "#### 31"}
    (data_dir / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="question has 63 tokens and the model takes 64"):
        evaluate(tiny_model("llama"), tiny_tokenizer(), tasks="gsm8k", data_dir=data_dir)


def test_a_tokenizer_without_an_end_token_is_refused(data_dir: Path) -> None:
    def no_end(special: dict) -> None:
        del special["eos_token"]

    with pytest.raises(ValueError, match="no end-of-sequence token"):
        evaluate(tiny_model("llama"), tiny_tokenizer(edit=no_end), tasks="gsm8k", data_dir=data_dir)


def test_options_for_loading_need_a_name(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="dtype need the name of a model to load"):
        evaluate(
            tiny_model("llama"), tiny_tokenizer(), tasks="gsm8k", data_dir=data_dir, dtype="auto"
        )


def test_without_the_harness_the_error_says_what_to_install(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install \"optimum-cap\[eval\] @ git"):
        load_task_data("gsm8k", data_dir)


# Files


def test_json_round_trip(data_dir: Path, tmp_path: Path) -> None:
    found = evaluate(
        tiny_model("llama"), tiny_tokenizer(), tasks="gsm8k,wikitext2", data_dir=data_dir, limit=4
    )
    found.save(tmp_path / "found.json")
    assert Evaluation.load(tmp_path / "found.json") == found
    values = json.loads((tmp_path / "found.json").read_text())
    assert set(values["versions"]) == {"optimum-cap", "lm-eval", "torch", "transformers"}
    task = values["tasks"]["gsm8k"]
    assert (task["n"], len(task["items"])) == (4, 4)
    assert set(task["items"][0]) == {field.name for field in dataclasses.fields(Answer)}
    assert task["source"] == {"file": "test.jsonl"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as an evaluation"),
        ("[1]", "evaluation_layout None"),
        ('{"evaluation_layout": 99}', "evaluation_layout 99"),
        ('{"evaluation_layout": 1, "model": "m"}', "evaluation_layout 1: evaluate the model again"),
        ('{"evaluation_layout": 2, "model": "m"}', "the evaluation is incomplete"),
        (
            '{"evaluation_layout": 2, "model": "m", "tasks": {"t": {"metric": "bleu"}}}',
            "the evaluation is incomplete .*bleu",
        ),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=rf"odd\.json.*{message}"):
        Evaluation.load(tmp_path / "odd.json")


def test_the_module_is_an_attribute_of_the_package() -> None:
    assert optimum_cap.evaluation.evaluate is evaluate_by_default


def test_a_window_is_recognised_by_its_tokens(data_dir: Path) -> None:
    (data_dir / "wikitext-2" / "test.txt").write_text("ab\n")
    found = evaluate(
        tiny_model("llama"), tiny_tokenizer(), tasks="wikitext2", data_dir=data_dir
    ).tasks["wikitext2"]
    ids = tiny_tokenizer()("ab\n")["input_ids"]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert found.items == (Window(digest, found.items[0].nll, 2),)


# Real data


@pytest.mark.slow
def test_the_embedded_model_is_as_accurate_as_the_example_says() -> None:
    found = evaluate(REASONER / "model", tasks="tiny_reasoner", batch_size=128)
    model = AutoModelForCausalLM.from_pretrained(REASONER / "model")
    problems = load_problems("test")
    right = correct_answers(problems, generated_answers(model, reasoner_tokenizer(), problems))
    for kind in ("arithmetic", "yes_no", "multiple_choice"):
        expected = sum(
            correct for row, correct in zip(problems, right, strict=True) if row.kind == kind
        )
        assert found.tasks[f"tiny_reasoner_{kind}"].correct == expected
    assert found.seconds < 180


@pytest.mark.slow
def test_published_files_are_read_and_perplexity_is_that_by_hand() -> None:
    name = SHARED / "models" / "stories260K"
    if not name.is_dir() or not (SHARED / "data").is_dir():
        pytest.skip("the published data are not here")
    found = evaluate(name, tasks="strategyqa,wikitext2", data_dir=SHARED / "data", limit=40)
    assert found.tasks["strategyqa"].without_answer == 40  # it tells stories
    result = found.tasks["wikitext2"]
    assert (result.window, len(result.items)) == (512, 40)

    with (SHARED / "data" / "wikitext-2" / "test.txt").open() as file:
        text = "\n\n".join(line if line.strip() else "" for line in file)
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(text, verbose=False)["input_ids"]
    windows = {
        hashlib.sha256(json.dumps(ids[start : start + 512]).encode()).hexdigest(): start
        for start in range(0, len(ids) - 511, 512)
    }
    starts = [windows[item.digest] for item in result.items]
    assert starts == sorted(starts)
    model = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        losses = [
            model(part, labels=part).loss.item()
            for part in (torch.tensor([ids[start : start + 512]]) for start in starts)
        ]
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)

    data = load_task_data("gsm8k,strategyqa,arc_challenge", SHARED / "data")
    assert [len(task.items) for task in data.values()] == [1319, 2290, 1172]
