"""Generated answers: length, limit, the log of samples, the warning, and resuming."""

import functools
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.evaluation import SUMS, TEMPLATE, with_room, write_task_files
from helpers.paths import EXAMPLES
from helpers.tiny_models import tiny_model, tiny_tokenizer
from scipy.stats import binom
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from optimum_cap.evaluation.harness import generate_batch, harness_model, in_order_of_length
from optimum_cap.evaluation.results import Evaluation, median_and_interval, wilson_interval
from optimum_cap.evaluation.run import evaluate
from optimum_cap.evaluation.samples import SampleLog, check_sample_log

REASONER = EXAMPLES / "tiny_reasoner" / "model"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_task_files(tmp_path)


def writing(texts: dict[str, str], tokenizer: Any, size: int = 256) -> PreTrainedModel:
    """A model that continues each prompt, told by its first character, with a text.

    The text of a prompt without an end is repeated.
    """
    model = tiny_model("llama", max_position_embeddings=size)
    ids = {
        tokenizer.convert_tokens_to_ids(first): tokenizer(text, add_special_tokens=False)[
            "input_ids"
        ]
        for first, text in texts.items()
    }
    starts: dict[str, Any] = {}

    def write(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = kwargs.get("input_ids")
        past = kwargs["past_key_values"].get_seq_length() - given.shape[1]
        if past == 0:
            starts.clear()
            starts["length"] = given.shape[1]
            first = (given != tokenizer.pad_token_id).int().argmax(1)
            starts["texts"] = [ids[int(row[at])] for row, at in zip(given, first, strict=True)]
        written = past + given.shape[1] - starts["length"]
        logits = torch.zeros_like(output.logits)
        for row, text in enumerate(starts["texts"]):
            logits[row, -1, text[written % len(text)]] = 1.0
        return type(output)(logits=logits, past_key_values=output.past_key_values)

    model.register_forward_hook(write, with_kwargs=True)
    return model


def test_a_response_has_its_own_length_and_end() -> None:
    tokenizer = tiny_tokenizer()
    texts = {"a": "12</s>", "b": "345stop:7</s>", "c": "6", "d": "89 </s>"}
    lm = harness_model(writing(texts, tokenizer), tokenizer, 256, 4)
    prompts = ["a1", "b2", "c3", "d4"]
    order = in_order_of_length(lm, prompts)
    found = generate_batch(lm, [prompts[each] for each in order], ("stop:",), 20)
    by_prompt = dict(zip(order, found, strict=True))
    shown = [(each.text, each.tokens, each.hit_limit) for _, each in sorted(by_prompt.items())]
    assert shown == [("12", 2, False), ("345", 3, False), ("6" * 20, 20, True), ("89 ", 3, False)]


def test_a_special_token_that_ends_a_turn_ends_the_response() -> None:
    # A chat template may end turns with a token that is not the end-of-sequence token.
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["="]})
    lm = harness_model(writing({"a": "12=345</s>"}, tokenizer), tokenizer, 256, 4)
    (found,) = generate_batch(lm, ["a"], ("=",), 20)
    assert (found.text, found.tokens, found.hit_limit) == ("12", 2, False)


def test_a_response_as_long_as_the_limit_that_ended_is_not_cut_off() -> None:
    tokenizer = tiny_tokenizer()
    lm = harness_model(writing({"a": "1234</s>"}, tokenizer), tokenizer, 256, 4)
    (found,) = generate_batch(lm, ["a"], (), 5)
    assert (found.text, found.tokens, found.hit_limit) == ("1234", 4, False)
    (found,) = generate_batch(lm, ["a"], (), 4)
    assert (found.tokens, found.hit_limit) == (4, True)


def test_responses_are_those_of_generate() -> None:
    model = AutoModelForCausalLM.from_pretrained(REASONER)
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    task = "tiny_reasoner_multiple_choice"
    result = evaluate(model, tokenizer, tasks=task, limit=6).tasks[task]
    assert result.at_limit == 0
    assert 5 < sum(result.lengths) / 6 < 96
    assert result.seconds > 0
    assert result.seconds_per_answer == result.seconds / 6


def test_lengths_limit_and_time_are_shown_and_saved(data_dir: Path, tmp_path: Path) -> None:
    found = evaluate(
        *with_room(), tasks="gsm8k", data_dir=data_dir, num_fewshot=0, max_new_tokens=7
    )
    result = found.tasks["gsm8k"]
    assert result.max_new_tokens == 7
    assert result.lengths == [item.tokens for item in result.items]
    values = result.to_dict()
    low, high = wilson_interval(result.at_limit, 12)
    assert values["at_limit_interval"] == [low, high]
    assert values["tokens"]["mean"] == pytest.approx(sum(result.lengths) / 12)
    assert values["tokens"]["median_interval"] == list(median_and_interval(result.lengths)[1] or ())
    assert values["seconds_per_answer"] == pytest.approx(result.seconds / 12)
    table = found.table()
    assert f"{result.at_limit / 12:.1%}" in table
    assert f"{low:.1%} to {high:.1%}" in table
    found.save(tmp_path / "found.json")
    again = Evaluation.load(tmp_path / "found.json")
    assert again == found
    assert again.tasks["gsm8k"].seconds == result.seconds


def test_a_limit_that_does_not_fit_is_told(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    options: dict[str, Any] = {"tasks": "gsm8k", "data_dir": data_dir, "num_fewshot": 0}
    result = evaluate(model, tokenizer, **options, max_new_tokens=100).tasks["gsm8k"]
    longest = max(len(row["question"]) for row in SUMS) + 1
    assert result.max_new_tokens == 64 - longest
    assert (
        f"answers have at most {64 - longest} tokens instead of 100, as the longest prompt has "
        f"{longest} and the model takes 64" in caplog.text
    )
    with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 1, got 0"):
        evaluate(model, tokenizer, **options, max_new_tokens=0)


@pytest.mark.parametrize("count", [6, 9, 20, 41, 1319])
def test_the_interval_of_the_median_is_that_of_the_binomial_distribution(count: int) -> None:
    values = [float(value) for value in range(count)]
    middle, interval = median_and_interval(values)
    assert middle == (count - 1) / 2
    assert interval is not None
    low, high = interval
    below = int(low)  # positions outside on either side
    assert high == count - 1 - below
    assert 2 * binom.cdf(below, count, 0.5) <= 0.05 < 2 * binom.cdf(below + 1, count, 0.5)


def test_few_values_have_no_interval_of_the_median() -> None:
    assert median_and_interval([3, 1, 2, 5, 4]) == (3.0, None)


# The warning


def test_a_model_that_hardly_answers_is_told_what_to_do(
    data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"tasks": "gsm8k", "data_dir": data_dir, "max_new_tokens": 4}
    found = evaluate(*with_room(), **options, num_fewshot=0)
    message = "gsm8k: the model gives no answer that can be extracted in 12 of 12 responses"
    assert message in caplog.text
    assert "--log-samples" in caplog.text
    assert "some worked examples with num_fewshot (--num-fewshot)" in caplog.text
    assert f"WARNING: {message}" in found.table()
    caplog.clear()
    evaluate(*with_room(), **options, num_fewshot=2)
    assert "more worked examples with num_fewshot (--num-fewshot), of which there were 2" in (
        caplog.text
    )


def test_a_model_that_answers_gets_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    found = evaluate(REASONER, tasks="tiny_reasoner_yes_no", limit=4)
    assert found.tasks["tiny_reasoner_yes_no"].without_answer == 0
    assert "WARNING" not in found.table()
    assert "no answer that can be extracted" not in caplog.text


# The log


def test_samples_hold_prompts_responses_and_answers(tmp_path: Path) -> None:
    task = "tiny_reasoner_multiple_choice"
    found = evaluate(REASONER, tasks=task, limit=3, log_samples=tmp_path / "samples")
    file = tmp_path / "samples" / f"{task}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line, item in zip(lines, found.tasks[task].items, strict=True):
        assert line["task"] == task
        assert line["prompt"]
        assert line["response"].rstrip().endswith(f"#### {line['answer']}")
        expected = {"digest", "answer", "correct", "tokens", "hit_limit", "loss"}
        assert {name: line[name] for name in expected} == {
            name: getattr(item, name) for name in expected
        }
        assert line["worked_answer"].endswith(line["expected"])
    assert math.isclose(lines[0]["loss"], found.tasks[task].items[0].loss or 0)


def test_one_file_holds_the_samples_of_all_tasks(data_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    evaluate(
        *with_room(),
        tasks="gsm8k,strategyqa_choices,wikitext2",
        data_dir=data_dir,
        num_fewshot=0,
        max_new_tokens=3,
        limit=2,
        log_samples=file,
    )
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["task"] for line in lines] == ["gsm8k"] * 2 + ["strategyqa_choices"] * 2
    assert lines[-1]["choices"] == ["yes", "no"]
    assert len(lines[-1]["log_likelihoods"]) == 2


def test_a_log_that_cannot_be_written_is_refused_first(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for path, message in (
        (tmp_path / "file.txt", r"file\.txt is neither a file that ends in \.jsonl nor a folder"),
        (tmp_path / "file.txt" / "in", r"as .*file\.txt is a file: name another one"),
        (tmp_path / "folder.jsonl", r"is a folder that ends in \.jsonl: name a file"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate("nowhere", tasks="gsm8k", data_dir=data_dir, log_samples=path)
    with pytest.raises(FileNotFoundError, match="none of log_samples does not exist: create it"):
        check_sample_log(tmp_path / "none" / "samples.jsonl")


def test_samples_are_whole_after_each_task(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "log.jsonl")
    log.add("one", [{"text": "ü\n"}])
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"task": "one", "text": "ü\n"}
    log.add("two", [{"text": "b"}])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


# Resuming


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of each forward pass. A hook would be part of what results are stored under."""
    calls: list[dict[str, Any]] = []
    original = LlamaForCausalLM.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    return calls


def test_a_second_evaluation_computes_nothing_and_finds_the_same(
    data_dir: Path, tmp_path: Path, passes: list[dict[str, Any]]
) -> None:
    options: dict[str, Any] = {
        "tasks": "gsm8k,arc_challenge_choices,wikitext2",
        "data_dir": data_dir,
        "num_fewshot": 0,
        "max_new_tokens": 4,
        "limit": 6,
        "batch_size": 4,
        "resume_dir": tmp_path / "resume",
    }
    first = evaluate(*with_room(), **options)
    model, tokenizer = with_room()
    passes.clear()
    again = evaluate(model, tokenizer, **options)
    assert again.tasks == first.tasks
    assert again.tasks["gsm8k"].seconds == first.tasks["gsm8k"].seconds
    assert not passes
    plain = evaluate(*with_room(), **{**options, "resume_dir": None})
    assert plain.tasks == first.tasks
    passes.clear()
    # Other settings, prompts or weights are other batches.
    for change in ({"max_new_tokens": 5}, {"num_fewshot": 1}, {"batch_size": 3}):
        evaluate(model, tokenizer, **{**options, "tasks": "gsm8k", **change})
        assert passes, change
        passes.clear()
    with torch.no_grad():
        model.lm_head.weight[7] += 1
    evaluate(model, tokenizer, **options)
    assert passes


def test_an_interrupted_evaluation_continues_with_the_next_batch(
    data_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {
        "tasks": "strategyqa_choices,gsm8k",
        "data_dir": data_dir,
        "num_fewshot": 0,
        "max_new_tokens": 4,
        "batch_size": 3,
        "resume_dir": tmp_path / "resume",
    }
    expected = evaluate(*with_room(), **{**options, "resume_dir": None})
    batches: list[list[str]] = []

    def interrupted(lm: Any, prompts: list[str], *args: Any) -> Any:
        batches.append(prompts)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generate_batch(lm, prompts, *args)

    monkeypatch.setattr("optimum_cap.evaluation.measure.generate_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*with_room(), **options, log_samples=tmp_path / "samples")
    assert "stopped gsm8k after 6 of 12 answers: finished results are stored in" in caplog.text
    # The task that was finished is logged.
    assert (tmp_path / "samples" / "strategyqa_choices.jsonl").is_file()
    assert evaluate(*with_room(), **options).tasks == expected.tasks
    assert len(batches) == 3 + 2
    assert batches[3] == batches[2]


def test_damaged_results_are_measured_again(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "tasks": "strategyqa_choices",
        "data_dir": data_dir,
        "resume_dir": tmp_path / "resume",
    }
    first = evaluate(*with_room(TEMPLATE), **options)
    (file,) = (tmp_path / "resume").rglob("*.json")
    assert file.stat().st_mode & 0o077 == 0
    content = json.loads(file.read_text())
    content["value"]["values"][0] = -1.0
    for text in (json.dumps(content), "{", '{"a": 1}'):
        file.write_text(text)
        caplog.clear()
        assert evaluate(*with_room(TEMPLATE), **options).tasks == first.tasks
        assert "is damaged" in caplog.text
