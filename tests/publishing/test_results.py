"""Results on the model card: what is shown, for how long it stays, what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import pruned
from helpers.command_line import run_cap
from helpers.evaluation import with_room, write_task_files
from huggingface_hub import EvalResult, ModelCard
from transformers import AutoModelForCausalLM

from optimum_cap.checkpoint import (
    CARD_NAME,
    RESULTS_NAME,
    convert_checkpoint,
    inspect_checkpoint,
    set_base_model,
)
from optimum_cap.evaluation.results import (
    AccuracyResult,
    Answer,
    Choice,
    ChoiceResult,
    Evaluation,
    HarnessMetric,
    HarnessResult,
    LossResult,
    PerplexityResult,
    Result,
    Transcript,
    Window,
    WorkedAnswer,
)
from optimum_cap.publishing import add_results, load_results

GSM8K = {"hub_id": "openai/gsm8k", "config": "main", "split": "test", "revision": "abc"}


LOSS = LossResult((WorkedAnswer("a", 1.0), WorkedAnswer("b", 2.0)), 0, 0, GSM8K)


def answers(right: str, response: str = "#### 1", first: str = "a") -> AccuracyResult:
    """One question per character, of which those with `1` are answered rightly."""
    digests = [chr(ord(first) + index) for index in range(len(right))]
    items = tuple(
        Answer(digest, mark == "1", "1", 4, False)
        for digest, mark in zip(digests, right, strict=True)
    )
    transcripts = tuple(Transcript(digest, f"how many {digest}?", response) for digest in digests)
    return AccuracyResult(items, 0, 8, GSM8K, transcripts=transcripts[:3])


def evaluation(model: str, **tasks: Result) -> Evaluation:
    settings = {"dtype": "float32", "seed": 0, "limit": 8}
    return Evaluation(model, tasks, settings, {"torch": "2.6.0"}, 1.0)


def every_kind() -> dict[str, Result]:
    return {
        "gsm8k": answers("1100"),
        "arc": ChoiceResult((Choice("a", 0, (-1.0, -2.0), 0, 0),), 0, {}),
        "wikitext2": PerplexityResult((Window("a", 2.0, 4), Window("b", 2.0, 4)), 0, 5, {}),
        "gsm8k_loss": LossResult((WorkedAnswer("a", 1.0), WorkedAnswer("b", 2.0)), 0, 0, {}),
        "lm_eval:x": HarnessResult((HarnessMetric("x", "acc,none", 0.5, 0.1, 4),), {}, {}),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pruned().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def card(folder: Path) -> str:
    return (folder / CARD_NAME).read_text(encoding="utf-8")


def test_the_card_shows_results_beside_the_dense_model(folder: Path) -> None:
    assert "Nobody has added results" in card(folder)
    add_results(
        folder,
        evaluation(str(folder), gsm8k=answers("1100", "I say #### 1")),
        evaluation("/home/me/dense", gsm8k=answers("1111", "It is #### 2")),
    )
    text = card(folder)
    assert "Nobody has added results" not in text
    assert "| gsm8k | accuracy | 4 | 100.0% | 50.0% | -50.0 points |" in text
    assert "| gsm8k | tokens per answer | 4 | 4.0 | 4.0 |" in text
    assert "seconds per answer" not in text, "says nothing about other machines"
    assert "gsm8k: float32, seed 0, limit 8, greedy decoding, with torch 2.6.0" in text
    question, dense, own = (
        text.index(part) for part in ("how many a?", "It is #### 2", "I say #### 1")
    )
    assert question < dense < own
    (result, lengths) = ModelCard.load(folder / CARD_NAME).data.eval_results
    assert result.dataset_type == "openai/gsm8k"
    assert (result.dataset_config, result.dataset_split) == ("main", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.5)
    assert "95 % interval 15.0% to 85.0%" in result.metric_name
    assert (lengths.metric_type, lengths.metric_value) == ("tokens", 4.0)
    assert "/home/me" not in text + (folder / RESULTS_NAME).read_text()


def test_every_kind_of_result_is_shown_with_and_without_the_dense_model(folder: Path) -> None:
    add_results(folder, evaluation("pruned", **every_kind()))
    alone = card(folder)
    for shown in (
        "| gsm8k | 4 | 50.0% |",
        "| arc | 1 | acc 100.0% |",
        "| wikitext2 | 2 | ppl 1.649",
    ):
        assert shown in alone, shown
    metrics = {each.metric_type for each in ModelCard(alone).data.eval_results}
    assert metrics == {"accuracy", "tokens", "acc", "acc_norm", "perplexity", "loss"}
    assert "1.5000" in alone
    add_results(folder, evaluation("pruned", **every_kind()), evaluation("d", **every_kind()))
    both = card(folder)
    assert "Measured without the dense model" not in both
    for shown in (
        "| gsm8k_loss | loss | 2 | 1.5000 | 1.5000 | +0.0000 |",
        "| lm_eval:x | acc,none |",
    ):
        assert shown in both, shown
    names = load_results(folder)
    assert list(names) == list(every_kind())
    assert names["wikitext2"].pruned.tasks["wikitext2"] == every_kind()["wikitext2"]


def test_what_else_is_on_the_card_stays_and_earlier_results_are_replaced(folder: Path) -> None:
    text = card(folder).replace("# Pruned model", "# My model\n\nWritten by hand.")
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    dense = evaluation("d", gsm8k=answers("1111"))
    add_results(folder, evaluation("p", gsm8k=answers("1100")), dense)
    add_results(folder, evaluation("p", gsm8k=answers("1110")))  # keeps the dense one
    add_results(folder, evaluation("p", wikitext2=every_kind()["wikitext2"]))
    text = card(folder)
    assert text.count("## Results") == 1
    assert "Written by hand." in text
    assert "| 100.0% | 75.0% |" in text
    assert "50.0%" not in text.split("## Results")[1].split("## Limits")[0].replace("ppl", "")
    assert "wikitext2" in text
    assert text.index("## Results") < text.index("## Limits")
    # Other questions cannot be compared with those of the dense model.
    add_results(folder, evaluation("p", gsm8k=answers("10", first="x")))
    assert load_results(folder)["gsm8k"].dense is None


def test_results_of_others_in_the_metadata_stay(folder: Path) -> None:
    data = ModelCard(card(folder)).data
    data.model_name = "mine"
    data.eval_results = [EvalResult("text-generation", "cais/mmlu", "MMLU", "accuracy", 0.42)]
    text = f"---\n{data}\n---\n\n# Mine\n"
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    for right in ("1100", "1110"):
        add_results(folder, evaluation("p", gsm8k=answers(right), gsm8k_loss=LOSS))
    found = ModelCard(card(folder)).data.eval_results
    assert [(each.metric_type, each.metric_value) for each in found] == [
        ("accuracy", 0.42),
        ("accuracy", 0.75),
        ("tokens", 4.0),
        ("loss", 1.5),
    ]


def test_a_card_without_a_place_for_results_gets_one_at_its_end(folder: Path) -> None:
    (folder / CARD_NAME).write_text("---\nlicense: mit\n---\n\n# Mine\n\nText.\n")
    add_results(folder, evaluation("p", gsm8k=answers("10")))
    text = card(folder)
    assert text.startswith("---\nlicense: mit\n")
    assert text.index("Text.") < text.index("## Results") < text.index("| gsm8k | 2 | 50.0% |")


def test_results_are_kept_by_a_conversion_and_lost_with_the_weights(
    folder: Path, tmp_path: Path
) -> None:
    both = evaluation("p", gsm8k=answers("1100")), evaluation("d", gsm8k=answers("1111"))
    add_results(folder, *both)
    section = card(folder).split("## Results")[1].split("## Limits")[0]
    for form in ("dense", "coded"):
        convert_checkpoint(folder, tmp_path / form, form)
        assert load_results(tmp_path / form) == load_results(folder)
        assert card(tmp_path / form).split("## Results")[1].split("## Limits")[0] == section
        assert ModelCard.load(tmp_path / form / CARD_NAME).data.eval_results
        inspect_checkpoint(str(tmp_path / form), verify=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(folder)
    assert not (folder / RESULTS_NAME).exists()
    assert load_results(folder) == {}
    assert "Nobody has added results" in card(folder)


def test_results_of_other_weights_are_not_shown(folder: Path, tmp_path: Path) -> None:
    add_results(folder, evaluation("p", gsm8k=answers("1100")))
    model = pruned()
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / RESULTS_NAME).write_bytes((folder / RESULTS_NAME).read_bytes())
    assert load_results(tmp_path / "other") == {}


@pytest.mark.parametrize(
    "text",
    [
        "```\n# Not a heading\n````",
        "<!-- results: end -->",
        "| a | b |",
        "<script>alert(1)</script>",
        "\x1b[31m",
        "",
    ],
)
def test_answers_are_shown_as_they_are(text: str, folder: Path) -> None:
    markdown = pytest.importorskip("markdown_it").MarkdownIt().enable("table")
    pair = (evaluation(name, gsm8k=answers("10", text)) for name in "pd")
    add_results(folder, *pair)
    tokens = markdown.parse(ModelCard(card(folder)).text)
    blocks = [token.content.rstrip("\n") for token in tokens if token.type == "fence"]
    shown = text.replace("\x1b", "\\x1b").replace("<!--", "<! --")  # the card has such lines itself
    assert blocks.count(shown) == 2
    headings = [
        t.content
        for t, before in zip(tokens[1:], tokens, strict=False)
        if before.type == "heading_open"
    ]
    assert headings[-3:] == ["An answer before and after", "Limits", "Zeros per projection"]


def test_what_cannot_take_results_is_refused(folder: Path, tmp_path: Path) -> None:
    result = evaluation("p", gsm8k=answers("10"))
    with pytest.raises(ValueError, match=r"user/model is no folder, .*`hf download"):
        add_results("user/model", result)
    with pytest.raises(ValueError, match="is not a CAP checkpoint"):
        add_results(tmp_path, result)
    original = card(folder)
    (folder / CARD_NAME).write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"metadata at the beginning of README.md cannot be read"):
        add_results(folder, result)
    (folder / CARD_NAME).write_bytes(b"# caf\xe9")
    with pytest.raises(ValueError, match=r"README.md is not UTF-8 text .*: save it as UTF-8"):
        add_results(folder, result)
    (folder / CARD_NAME).unlink()
    with pytest.raises(ValueError, match=r"has no README.md"):
        add_results(folder, result)
    (folder / CARD_NAME).write_text(original)
    (folder / RESULTS_NAME).write_text('{"layout": 99}')
    with pytest.raises(ValueError, match=r"layout 99, expected 1\): upgrade"):
        add_results(folder, result)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), None),
        ((), {}),
        (("dense",), 3),
        (("pruned",), None),
        (("pruned", "evaluation_layout"), "\x1b[31m"),
        (("pruned", "settings"), []),
        (("pruned", "tasks"), {}),
        (("pruned", "tasks", "gsm8k", "items"), []),
        (("pruned", "tasks", "gsm8k", "items", 0, "tokens"), None),
        (("pruned", "tasks", "gsm8k", "transcripts", 0, "response"), 5),
    ],
)
def test_damaged_results_are_one_clear_error(
    path: tuple[Any, ...], value: Any, folder: Path
) -> None:
    both = evaluation("p", gsm8k=answers("1100")), evaluation("d", gsm8k=answers("1111"))
    add_results(folder, *both)
    values = json.loads((folder / RESULTS_NAME).read_text())
    *parents, last = ("tasks", "gsm8k", *path)
    place = values
    for name in parents:
        place = place[name]
    place[last] = value
    (folder / RESULTS_NAME).write_text(json.dumps(values))
    for use in (load_results, lambda each: add_results(each, *both)):
        with pytest.raises(
            ValueError, match=r"pruning_results.json cannot be read .*delete"
        ) as found:
            use(folder)
        assert str(found.value).isprintable()


def test_the_base_model_can_be_named_later(folder: Path) -> None:
    set_base_model(folder, "org/dense")
    assert inspect_checkpoint(str(folder), verify=True).record.base_model == "org/dense"
    data = ModelCard.load(folder / CARD_NAME).data
    assert (data.base_model, data.base_model_relation) == ("org/dense", "quantized")
    assert "| Base model | [org/dense](https://huggingface.co/org/dense) |" in card(folder)


def test_the_card_has_a_picture_limits_and_a_snippet_that_runs(folder: Path) -> None:
    from helpers.tiny_models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(folder)
    text = card(folder)
    assert "![Sparsity by layer and projection](pruning_sparsity.svg)" in text
    svg = (folder / "pruning_sparsity.svg").read_text()
    assert "<title>q_proj, layer 0: " in svg
    assert "It was calibrated on gsm8k." in text.split("## Limits")[1]
    code = text.split("```python\n")[1].split("```")[0].replace("this/repository", str(folder))
    exec(code.replace("max_new_tokens=512", "max_new_tokens=4"), {})


# Commands


@pytest.fixture
def models(tmp_path: Path, folder: Path) -> dict[str, Any]:
    model, tokenizer = with_room()
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    changed = pruned(max_position_embeddings=512)
    changed.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    data = write_task_files(tmp_path / "data")
    flags = ["--limit", "2", "--max-new-tokens", "4", "--num-fewshot", "1", "--data-dir", data]
    return {
        "dense": tmp_path / "dense",
        "pruned": tmp_path / "pruned",
        "flags": [*flags, "--resume-dir", tmp_path / "resume"],
    }


def test_eval_and_compare_add_results_to_the_card(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def cap(*arguments: object) -> tuple[int, str, str]:
        return run_cap(monkeypatch, capfd, arguments)

    model, flags = models["pruned"], [*models["flags"], "--add-to-card"]
    status, out, error = cap("eval", model, "--tasks", "wikitext2,gsm8k", *flags)
    assert status == 0, error
    assert f"card          {model / CARD_NAME}\n" in out
    assert "Measured without the dense model" in card(model)
    status, out, error = cap("compare", models["dense"], model, "--tasks", "gsm8k", *flags)
    assert status == 0, error
    text = card(model)
    assert "### An answer before and after" in text
    assert "| gsm8k | accuracy | 2 |" in text
    assert "wikitext2" in text
    results = load_results(model)
    assert results["gsm8k"].dense is not None
    assert results["gsm8k"].dense.model == "./dense"
    assert str(model.parent) not in (model / RESULTS_NAME).read_text() + text
    with_dense = dataclasses.asdict(results["gsm8k"].pruned)
    assert json.dumps(with_dense["settings"])


def test_what_has_no_card_is_refused_before_work(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = [*models["flags"], "--add-to-card"]
    for arguments, message in (
        (["eval", models["dense"], *flags], "is not a CAP checkpoint"),
        (["eval", "user/model", *flags], "user/model is no folder"),
        (["compare", models["dense"], "saved.json", *flags], "got the file saved.json"),
    ):
        status, _, error = run_cap(monkeypatch, capfd, arguments)
        assert status == 2
        assert message in error
        assert len(error.strip().splitlines()) == 1, error
