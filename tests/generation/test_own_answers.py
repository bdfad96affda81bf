"""The model's own answers as calibration data: which are used, as what, and what is recorded."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.answers import FIELDS, TEMPLATE, answered, config, let_it_answer
from helpers.calibration import ROWS
from helpers.checkpoints import on_disk, saved
from helpers.out_of_memory import OUT_OF_MEMORY
from helpers.processes import ranks
from helpers.pruning_runs import weights
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data import build_calibration_set
from optimum_cap.data.calibration import CalibrationExample, CalibrationSet
from optimum_cap.generation import AnsweredPrompt, answered_calibration_set, sampler, sampling
from optimum_cap.generation.sampling import Answer
from optimum_cap.runtime.distributed import ProcessGroup

MARKED = [{"prompt": f"{a}+{a}=?", "completion": f"so\n#### {2 * a}"} for a in range(40)]


def calibration(
    model: PreTrainedModel, tokenizer: Any = None, check: Any = None, **changes: Any
) -> CalibrationSet:
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    return answered_calibration_set(model, tokenizer, config(**changes), ProcessGroup(), check)


def published(**changes: Any) -> CalibrationSet:
    """The same rows with their published answers."""
    kept = {name: value for name, value in changes.items() if name in ("dataset", "num_samples")}
    return build_calibration_set(
        CAPConfig(**{**FIELDS, **kept, "answers": "dataset", "max_new_tokens": 512}),
        tiny_tokenizer(),
    )


def ids_of(answered_prompts: list[AnsweredPrompt]) -> list[tuple[int, ...]]:
    return [each.answer.ids for each in answered_prompts]


def same(first: list[CalibrationExample], second: list[CalibrationExample]) -> bool:
    return all(
        torch.equal(one.input_ids, other.input_ids) and torch.equal(one.scored, other.scored)
        for one, other in zip(first, second, strict=True)
    )


# What an example is


def test_rows_are_those_of_the_data_set_and_answers_those_of_the_model(
    llama: PreTrainedModel,
) -> None:
    own, theirs = calibration(llama), published()
    results = answered(llama).answers
    assert own.record["digests"] == theirs.record["digests"]
    assert own.record["sources"][0]["selected"] == theirs.record["sources"][0]["selected"]
    for example, other, result in zip(own.examples, theirs.examples, results, strict=True):
        prompt = int(other.scored.int().argmax())
        assert torch.equal(example.input_ids[:prompt], other.input_ids[:prompt])
        assert example.input_ids[prompt:].tolist() == list(result.answer.ids)
        assert example.scored.tolist() == [False] * prompt + [True] * len(result.answer.ids)
    everything = calibration(llama, scored_tokens="all").examples
    assert all(
        each.scored.tolist() == [False] + [True] * (len(each.scored) - 1) for each in everything
    )


def test_prompts_go_through_the_chat_template(llama: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer(TEMPLATE)
    row = [
        {"role": "system", "content": "add"},
        {"role": "user", "content": "1+1=?"},
        {"role": "assistant", "content": "2"},
    ]
    (example,) = calibration(llama, tokenizer, dataset=[row], num_samples=1).examples
    first = int(example.scored.int().argmax())
    assert tokenizer.decode(example.input_ids[:first]) == "s:add</s>\nu:1+1=?</s>\na:"


def test_rows_need_no_published_answer(llama: PreTrainedModel) -> None:
    chats = [[{"role": "user", "content": f"{n}+1=?"}] for n in range(4)]
    pairs = [(f"{n}+1=?", "") for n in range(4)]
    from_chats = calibration(llama, dataset=chats, num_samples=4).examples
    from_pairs = calibration(llama, dataset=pairs, num_samples=4).examples
    assert same(from_chats, from_pairs)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(llama: PreTrainedModel) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for each in answered(llama, tokenizer).answers:
        ids = each.prompt.example.input_ids.tolist()
        assert ids[0] == 1
        assert 2 not in ids


def test_answers_that_are_cut_off_have_no_end(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    let_it_answer(monkeypatch, lambda prompt: ("so it is", False))
    cut = calibration(llama)
    assert all(2 not in example.input_ids for example in cut.examples)
    assert cut.record["answers"]["truncated"] == 8
    assert "8 of 8 answers of the model were cut off at 12 tokens: raise max_new_tokens" in (
        caplog.text
    )


def test_plain_texts_beside_prompts_stay_as_they_are(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(f"text number {n}" for n in range(9)))
    (tmp_path / "rows.json").write_text(
        '[{"prompt": "1+1=?", "completion": "2"}, {"prompt": "1+2=?", "completion": "3"},'
        '{"prompt": "1+3=?", "completion": "4"}]'
    )
    names = [str(tmp_path / "texts.txt"), str(tmp_path / "rows.json")]
    mixed = calibration(llama, dataset=names, num_samples=5)
    texts = [each for each in mixed.examples if each.source == "texts.txt"]
    assert [source["name"] for source in mixed.record["sources"]] == ["texts.txt", "rows.json"]
    assert len(texts) == 3
    assert all(tiny_tokenizer().decode(each.input_ids).startswith("text") for each in texts)
    assert mixed.record["answers"]["used"] == 2
    assert mixed.record["digests"] == [each.digest for each in mixed.examples]


# Which answers are used


def test_empty_answers_are_replaced_by_those_to_other_prompts(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_it_answer(monkeypatch, lambda prompt: " " if prompt.startswith(("1", "2")) else "yes")
    own = calibration(llama, num_samples=40)
    record = own.record["answers"]
    assert record["empty"] > 0
    assert record["prompts"] == 40 + record["empty"]
    assert record["used"] == len(own.examples) == 40
    assert not [each for each in own.examples if ROWS[each.index][0].startswith(("1", "2"))]
    with pytest.raises(
        ValueError,
        match=re.escape(
            "data set 'in-memory' has 63 usable prompts of 81 rows (the model's answers to 18 are "
            "empty), but 70 are needed: lower num_samples"
        ),
    ):
        calibration(llama, num_samples=70)


def test_wrong_answers_are_tried_again_and_the_first_right_one_is_used(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def right(prompt: str) -> str:
        return f"#### {2 * int(prompt.partition('+')[0])}"

    sizes = let_it_answer(
        monkeypatch, lambda prompt: right(prompt) if prompt < "2" else "#### no", right
    )
    results = answered(llama, dataset=MARKED, num_samples=40, answer_attempts=4).answers
    at_once = [*range(2), *range(10, 20)]
    for each in results:
        assert each.attempts == (1 if each.prompt.example.index in at_once else 2)
    assert all(each.correct for each in results)
    assert sum(sizes) == 40 + 40 - len(at_once)


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("#### 4", True),
        ("#### 5", False),
        ("who knows", None),
        (("#### 4", False), False),
    ],
)
def test_only_complete_answers_with_a_result_are_checked(
    answer: Any, correct: bool | None, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is cut off has no result, even if something looks like one."""
    sizes = let_it_answer(monkeypatch, lambda prompt: answer)
    rows = [{"prompt": "2+2=?", "completion": "#### 4"}]
    (result,) = answered(llama, dataset=rows, num_samples=1).answers
    assert result.correct is correct
    assert len(sizes) == (2 if correct is False else 1)


@pytest.mark.parametrize(
    ("preset", "row", "texts"),
    [
        (
            "gsm8k",
            {"question": "1+1=?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
            {"it is 1, or 2.": True, "#### 2": True, "it is 3": False, "it is a": None},
        ),
        (
            "strategyqa",
            {"question": "does it?", "facts": ["it does"], "answer": True},
            {"#### yes": True, "#### no": False, "yes": None},
        ),
    ],
)
def test_answers_to_presets_are_read_as_in_evaluation(
    preset: str,
    row: dict[str, Any],
    texts: dict[str, bool | None],
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import json

    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    for text, correct in texts.items():
        let_it_answer(monkeypatch, lambda prompt, text=text: text)
        (result,) = answered(llama, dataset=f"{preset}={file}", num_samples=1).answers
        assert result.correct is correct, text


def test_right_answers_are_preferred_where_there_are_more_than_needed(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_it_answer(
        monkeypatch,
        lambda prompt: f"#### {2 * int(prompt[0])}" if prompt[0] in "357" else "#### no",
    )
    rows = MARKED[:10]
    chosen = answered(llama, dataset=rows, num_samples=4, answer_candidates=10).answers
    assert sum(each.correct is True for each in chosen) == 3
    first = answered(llama, dataset=rows, num_samples=4).answers
    assert [each.correct for each in first].count(True) < 3
    drawn = [
        each.prompt.example.index for each in answered(llama, dataset=rows, num_samples=10).answers
    ]
    indices = [each.prompt.example.index for each in chosen]
    assert indices == sorted(indices, key=drawn.index), "in the order in which they were drawn"


def test_hard_ones_of_middling_length(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right ones first, of them those that took two attempts, of these the middling long ones."""

    def first(prompt: str) -> str:
        number = int(prompt[0])
        return f"#### {2 * number}" if number < 3 else "no #### no"

    def second(prompt: str) -> str:
        number = int(prompt[0])
        return "a" * number + f"#### {2 * number}" if number < 8 else "no #### no"

    let_it_answer(monkeypatch, first, second)
    rows = MARKED[:10]
    chosen = answered(
        llama, dataset=rows, num_samples=4, answer_selection="hard", answer_candidates=10
    ).answers
    assert {each.prompt.example.index for each in chosen} == {3, 4, 5, 6}
    again = answered(llama, dataset=rows, num_samples=5, answer_selection="hard")
    assert again.record["prompts"] == 10, "twice as many prompts as examples"


# Repeating, sharing, resuming


def test_an_answer_depends_on_its_prompt_the_seed_and_the_attempt(llama: PreTrainedModel) -> None:
    few = {each.prompt.example.index: each.answer for each in answered(llama).answers}
    many = {
        each.prompt.example.index: each.answer
        for each in answered(llama, num_samples=40, memory_budget=200_000).answers
    }
    assert few.items() <= many.items()
    other = {
        each.prompt.example.index: each.answer
        for each in answered(llama, num_samples=81, seed=1).answers
    }
    assert sum(other[index] == answer for index, answer in few.items()) < 4


def test_bfloat16_is_computed_in_float32_and_the_weights_stay() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = weights(model)
    results = answered(model).answers
    assert weights(model) == before
    assert ids_of(results) == ids_of(answered(model.float()).answers)


def test_weights_on_disk_give_the_same_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ids_of(answered(tiny_model("llama")).answers)
    assert "offloaded" not in caplog.text
    assert ids_of(answered(on_disk(saved(tmp_path), tmp_path / "weights")).answers) == expected
    assert "weights of the model are offloaded, so each token of an answer loads them" in (
        caplog.text
    )


@pytest.mark.slow
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_memory_that_runs_out_halves_the_batch(
    error: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ids_of(answered(llama).answers)
    tried, original = [], sampling.sample_answers

    def limited(model: Any, batch: Any, *rest: Any) -> list[Answer]:
        tried.append(len(batch.positions))
        if tried[-1] > 2:
            raise OUT_OF_MEMORY[error]
        return original(model, batch, *rest)

    monkeypatch.setattr(sampler, "sample_answers", limited)
    assert ids_of(answered(llama).answers) == expected
    assert tried == [8, 4, 2, 2, 2, 2]


@pytest.fixture
def batches_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the model answers from now on."""
    sizes: list[int] = []
    original = sampling.sample_answers

    def counting(model: Any, batch: Any, *rest: Any) -> list[Answer]:
        if len(sizes) == 3:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(len(batch.positions))
        return original(model, batch, *rest)

    monkeypatch.setattr(sampler, "sample_answers", counting)
    return sizes


def test_a_stopped_run_says_how_to_resume_and_continues(
    llama: PreTrainedModel,
    tmp_path: Path,
    batches_run: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fields = {"num_samples": 40, "memory_budget": 200_000, "resume_dir": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        answered(llama, **fields)
    done = sum(batches_run)
    assert f"the model had answered {done} of 40 prompts: finished results are stored in" in (
        caplog.text
    )
    assert f"{tmp_path / 'kept'}; run the same command again to resume" in caplog.text
    batches_run.append(0)
    resumed = answered(llama, **fields)
    assert sum(batches_run) == 40, "what was done is not done again"
    assert len(list(tmp_path.rglob("answers/*.safetensors"))) == 40
    fresh = answered(llama, **{**fields, "resume_dir": tmp_path / "other"})
    assert ids_of(fresh.answers) == ids_of(resumed.answers)
    assert fresh.record == resumed.record
    for changes in ({"seed": 1}, {"temperature": 0.7}, {"top_p": 0.9}, {"max_new_tokens": 11}):
        before = sum(batches_run)
        answered(llama, **{**fields, **changes})
        assert sum(batches_run) >= before + 40, changes
    before = sum(batches_run)
    answered(tiny_model("llama", seed=1), **fields)
    assert sum(batches_run) >= before + 40


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda stored: stored.__setitem__(0, 99), "its number of tokens or its end is not valid"),
        (lambda stored: stored.__setitem__(1, 2), "its number of tokens or its end is not valid"),
        (lambda stored: stored.__setitem__(2, 64), "a token that the model has no embedding for"),
    ],
)
def test_stored_answers_that_cannot_be_are_sampled_again(
    damage: Callable[[torch.Tensor], None],
    problem: str,
    llama: PreTrainedModel,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import safetensors.torch

    from optimum_cap.runtime import digest_of

    expected = ids_of(answered(llama, resume_dir=tmp_path).answers)
    file = next(tmp_path.rglob("answers/*.safetensors"))
    stored = safetensors.torch.load_file(file)["tensor"]
    damage(stored)
    key = file.relative_to(tmp_path).with_suffix("").as_posix()
    safetensors.torch.save_file({"tensor": stored}, file, {"sha256": digest_of(key, stored)})
    assert ids_of(answered(llama, resume_dir=tmp_path).answers) == expected
    assert problem in caplog.text


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from helpers.answers import answered
from helpers.tiny_models import tiny_model
from optimum_cap.generation import sampler
from optimum_cap.runtime.distributed import ProcessGroup

original, sizes = sampler.sample_answers, []

def counting(model, batch, *rest):
    sizes.append(len(batch.positions))
    return original(model, batch, *rest)

sampler.sample_answers = counting
group = ProcessGroup.current()
result = answered(tiny_model("llama"), group=group, num_samples=60)
print(result.record["sha256"], sum(sizes))
group.shutdown()
"""


@pytest.mark.slow
def test_two_ranks_share_the_work_and_get_the_same_answers(llama: PreTrainedModel) -> None:
    done = ranks(script=SCRIPT)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    lines = [one.stdout.split() for one in done]
    expected = answered(llama, num_samples=60).record["sha256"]
    assert [line[0] for line in lines] == [expected, expected]
    counts = sorted(int(line[1]) for line in lines)
    assert sum(counts) == 60
    assert counts[0] >= 12


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_new_tokens": 64},
            "max_new_tokens is 64, but an example with its prompt has at most 64 tokens "
            "(max_length, or the limit of the model or the tokenizer): lower max_new_tokens",
        ),
        (
            {"dataset": ["a plain text", "another text"], "num_samples": 1},
            "answers 'model' needs prompts to answer, but data set 'in-memory' has plain texts "
            "only: choose data with prompts, or answers 'dataset'",
        ),
        (
            {"max_new_tokens": 62},
            "data set 'in-memory' has 0 usable prompts of 81 rows (81 are longer than 2 tokens), "
            "but 8 are needed: lower num_samples, lower max_new_tokens or raise max_length",
        ),
    ],
)
def test_data_that_cannot_be_answered_is_refused_before_the_first_answer(
    changes: dict[str, Any],
    message: str,
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = let_it_answer(monkeypatch, lambda prompt: "yes")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        answered(llama, **changes)
    assert not sizes


def test_a_tokenizer_without_an_end_is_refused(llama: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer(edit=lambda special: special.pop("eos_token"))
    with pytest.raises(ValueError, match="has no end-of-sequence token, so answers of the model"):
        answered(llama, tokenizer)


def test_the_model_is_checked_before_it_answers(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = let_it_answer(monkeypatch, lambda prompt: "yes")
    torch.nn.init.constant_(llama.model.layers[1].mlp.up_proj.weight, 3e38)
    for start in (
        lambda: CAPPruner(config()).prune(llama, tiny_tokenizer()),
        lambda: CAPPruner(config(recipe="paper")).measure(llama, tiny_tokenizer()),
    ):
        with pytest.raises(ValueError, match="NaN or infinite"):
            start()
    assert not sizes


def test_a_calibration_set_of_answers_needs_the_model() -> None:
    with pytest.raises(ValueError, match="which is needed to build the calibration set: use CAPPr"):
        build_calibration_set(config(), tiny_tokenizer())


# Pruning


@pytest.mark.parametrize("recipe", ["causal", "causal_fast", "paper", "sparsegpt"])
def test_pruning_calibrates_on_them(recipe: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    expected = calibration(model)
    fields = {"recipe": recipe, "resume_dir": tmp_path}
    CAPPruner(config(**fields)).prune(model, tiny_tokenizer())
    record = model.pruning_record
    assert record.calibration == expected.record
    assert record.calibration["answers"]["sha256"] == expected.record["answers"]["sha256"]
    assert record.config["answers"] == "model"
    own = weights(model)
    theirs = CAPPruner(config(recipe=recipe, answers="dataset", max_new_tokens=512)).prune(
        tiny_model("llama"), tiny_tokenizer()
    )
    assert weights(theirs) != own
    again = CAPPruner(config(**fields)).prune(tiny_model("llama"), tiny_tokenizer())
    assert weights(again) == own


def test_losses_measured_on_answers_serve_pruning(llama: PreTrainedModel, tmp_path: Path) -> None:
    fields = {"recipe": "paper", "subsets": 2}
    CAPPruner(config(**fields)).measure(llama, tiny_tokenizer(), save_to=tmp_path / "scores")
    with_scores = config(**fields, scores=tmp_path / "scores", resume_dir=tmp_path / "answers")
    pruned = CAPPruner(with_scores).prune(llama, tiny_tokenizer())
    assert weights(pruned) == weights(
        CAPPruner(config(**fields)).prune(tiny_model("llama"), tiny_tokenizer())
    )
    other = config(**fields, scores=tmp_path / "scores", temperature=0.9)
    with pytest.raises(ValueError, match="are of other calibration examples"):
        CAPPruner(other).prune(tiny_model("llama"), tiny_tokenizer())


def test_record_card_and_counts(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endings = itertools.cycle(["#### 0", "#### 2", "who knows", ("cut off", False)])
    let_it_answer(monkeypatch, lambda prompt: next(endings))
    rows = [{"prompt": f"{n}-{n}=?", "completion": "#### 0"} for n in range(8)]
    CAPPruner(config(dataset=rows, answer_attempts=1)).prune(llama, tiny_tokenizer())
    record = llama.pruning_record.calibration["answers"]
    assert {name: record[name] for name in ("used", "prompts", "generated", "empty")} == {
        "used": 8,
        "prompts": 8,
        "generated": 8,
        "empty": 0,
    }
    counts = {name: record[name] for name in ("right", "wrong", "unchecked", "truncated")}
    assert counts == {"right": 2, "wrong": 4, "unchecked": 2, "truncated": 2}
    assert record["mean_tokens"] == 7.8
    assert re.fullmatch("[0-9a-f]{64}", record["sha256"])
    llama.save_pretrained(tmp_path)
    assert (
        "| Answers | 8 of the dense model's own, sampled at temperature 0.6 and top-p 0.95: 2 "
        "right, 4 wrong, 2 unchecked; 2 cut off at 12 tokens; 7.8 tokens on average |"
    ) in (tmp_path / "README.md").read_text()
