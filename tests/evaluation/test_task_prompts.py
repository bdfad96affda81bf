"""Prompts: what a chat is told, what a base model is shown, and where worked examples come from."""

from pathlib import Path
from typing import Any

import pytest
from helpers.evaluation import SUMS, TEMPLATE, with_room, write_rows, write_task_files
from helpers.tiny_models import tiny_tokenizer

from optimum_cap.data import Conversation
from optimum_cap.data.sources import row_digest
from optimum_cap.evaluation.prompts import choices_of, number_of_examples, prompt_of, stop_texts
from optimum_cap.evaluation.run import evaluate, load_task_data
from optimum_cap.evaluation.tasks import TASKS, ChoiceQuestion, Question, extract_of

TRAIN = [{"question": f"{n}-1?", "answer": f"#### {n - 1}"} for n in range(20, 30)]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_task_files(tmp_path)


def asked(text: str, answer: str = "#### 1") -> Question:
    return Question(Conversation((("user", text), ("assistant", answer))))


def digests(items: Any) -> list[str]:
    return [item.digest for item in items]


def test_a_chat_is_told_the_form_of_the_answer() -> None:
    prompt = prompt_of("gsm8k", asked("1+1?"), [], tiny_tokenizer(TEMPLATE))
    assert prompt == f"<user>1+1?\n\n{TASKS['gsm8k'].instruction}</s><assistant>"


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.instruction])
def test_the_instruction_names_a_form_that_the_extraction_finds(name: str) -> None:
    form = {"gsm8k": "#### 7", "strategyqa": "#### no", "arc_challenge": "#### C"}[name]
    assert "####" in TASKS[name].instruction
    assert extract_of(name)(f"so\n{form}") == form.split()[1]


def test_examples_are_earlier_turns_of_a_chat() -> None:
    prompt = prompt_of(
        "gsm8k",
        asked("3?"),
        [asked("1?", "#### 1"), asked("2?", "#### 2")],
        tiny_tokenizer(TEMPLATE),
    )
    told = f"\n\n{TASKS['gsm8k'].instruction}</s>"
    assert prompt == (
        f"<user>1?{told}<assistant>#### 1</s><user>2?{told}<assistant>#### 2</s>"
        f"<user>3?{told}<assistant>"
    )


def test_a_system_text_stays_before_the_examples() -> None:
    turns = (("system", "add"), ("user", "3?"), ("assistant", "#### 3"))
    question = Question(Conversation(turns))
    prompt = prompt_of(
        "tiny_reasoner_arithmetic", question, [asked("1?")], tiny_tokenizer(TEMPLATE)
    )
    assert prompt == ("<system>add</s><user>1?</s><assistant>#### 1</s><user>3?</s><assistant>")


def test_messages_keep_their_keys_with_examples() -> None:
    messages = (
        {"role": "user", "content": "3?", "name": "me"},
        {"role": "assistant", "content": "#### 3"},
    )
    turns = (("user", "3?"), ("assistant", "#### 3"))
    template = TEMPLATE.replace("<{{ m['role'] }}>", "<{{ m['role'] }}{{ m['name'] }}>")
    prompt = prompt_of(
        "tiny_reasoner_arithmetic",
        Question(Conversation(turns, messages)),
        [asked("1?")],
        tiny_tokenizer(template),
    )
    assert prompt == "<user>1?</s><assistant>#### 1</s><userme>3?</s><assistant>"


def test_a_base_model_is_shown_examples_as_the_harness_shows_them() -> None:
    tokenizer = tiny_tokenizer()
    examples = [asked("1?", "one\n#### 1"), asked("2?", "#### 2")]
    prompt = prompt_of("gsm8k", asked("3?"), examples, tokenizer)
    assert prompt == (
        "Question: 1?\nAnswer: one\n#### 1\n\nQuestion: 2?\nAnswer: #### 2\n\nQuestion: 3?\nAnswer:"
    )
    assert prompt_of("gsm8k", asked("3?"), [], tokenizer) == "3?\n"  # as in calibration
    name = "tiny_reasoner_arithmetic"
    assert stop_texts(name, examples, tokenizer) == ("Question:",)
    assert stop_texts(name, [], tokenizer) == ()
    assert stop_texts("gsm8k", examples, tokenizer) == TASKS["gsm8k"].until


def test_choices_follow_the_question_as_in_the_harness() -> None:
    first = ChoiceQuestion("which?", ("one", "two"), 1, "")
    second = ChoiceQuestion("what?", ("a", "b"), 0, "")
    assert choices_of(second, [first]) == [
        ("Question: which?\nAnswer: two\n\nQuestion: what?\nAnswer:", " a"),
        ("Question: which?\nAnswer: two\n\nQuestion: what?\nAnswer:", " b"),
    ]


@pytest.mark.parametrize(
    ("name", "requested", "template", "expected"),
    [
        ("gsm8k", None, None, 5),
        ("gsm8k", None, TEMPLATE, 0),
        ("gsm8k", 2, TEMPLATE, 2),
        ("gsm8k", 0, None, 0),
        ("arc_challenge_choices", None, None, 0),
        ("tiny_reasoner_arithmetic", None, None, 0),  # the model was trained on its prompt
    ],
)
def test_the_number_of_examples(
    name: str, requested: int | None, template: str | None, expected: int
) -> None:
    assert number_of_examples(name, requested, tiny_tokenizer(template)) == expected


def test_examples_come_from_the_file_for_training(data_dir: Path) -> None:
    write_rows(data_dir / "gsm8k" / "train.jsonl", TRAIN)
    model, tokenizer = with_room()
    found = evaluate(model, tokenizer, tasks="gsm8k", data_dir=data_dir, max_new_tokens=4)
    result = found.tasks["gsm8k"]
    training = {row_digest(row["question"], row["answer"]) for row in TRAIN}
    assert len(set(result.examples)) == 5
    assert set(result.examples) < training
    assert len(result.items) == len(SUMS)
    assert result.examples_source == {"file": "train.jsonl"}
    assert "gsm8k: the prompts show 5 worked examples" in found.table()
    again = evaluate(model, tokenizer, tasks="gsm8k", data_dir=data_dir, max_new_tokens=4, seed=1)
    assert again.tasks["gsm8k"].examples != result.examples


def test_without_a_file_for_training_examples_are_left_out_of_the_test(data_dir: Path) -> None:
    model, tokenizer = with_room()
    draw = {"tasks": "gsm8k", "data_dir": data_dir, "max_new_tokens": 4, "num_fewshot": 3}
    result = evaluate(model, tokenizer, **draw).tasks["gsm8k"]
    assert len(result.examples) == 3
    assert len(result.items) == len(SUMS) - 3
    assert not set(result.examples) & set(digests(result.items))
    # A model gets the same examples whatever the limit.
    limited = evaluate(model, tokenizer, **draw, limit=2).tasks["gsm8k"]
    assert limited.examples == result.examples
    assert set(digests(limited.items)) < set(digests(result.items))


def test_examples_of_choices(data_dir: Path) -> None:
    model, tokenizer = with_room()
    found = evaluate(
        model, tokenizer, tasks="strategyqa_choices", data_dir=data_dir, num_fewshot=2
    ).tasks["strategyqa_choices"]
    assert (len(found.examples), len(found.items)) == (2, 2)


def test_too_many_examples_are_refused(data_dir: Path) -> None:
    model, tokenizer = with_room()

    def refused(count: int, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate(
                *(model, tokenizer),
                data_dir=data_dir,
                **{"tasks": "gsm8k", **options},
                num_fewshot=count,
            )

    refused(13, r"gsm8k: num_fewshot is 13, but there are only 12 questions to draw worked")
    refused(12, r"gsm8k: all 12 questions are worked examples, so none is left .* or lower num_few")
    refused(-1, r"num_fewshot must be an integer of at least 0, got -1")
    small, short = with_room(size=64)
    message = (
        r"question with its 5 worked examples has \d+ tokens and the model takes 64, .* lower num"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(small, short, tasks="gsm8k", data_dir=data_dir)
    message = (
        r"the longest question with a choice has \d+ tokens, but the model takes 64: lower num"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(small, short, tasks="strategyqa_choices", data_dir=data_dir, num_fewshot=2)


def test_examples_are_read_only_where_they_are_needed(data_dir: Path) -> None:
    def examples(name: str, count: int | None) -> int:
        return len(load_task_data(name, data_dir, count)[name].examples)

    assert examples("gsm8k", 0) == 0
    assert examples("gsm8k", None) == len(SUMS)  # whether the model is a chat is not known yet
    assert examples("strategyqa_choices", None) == 0
    assert examples("strategyqa_choices", 1) == 4
    assert examples("wikitext2", 3) == 0
