"""The tokenizer must be one, know the text, and be the model's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data import (
    build_calibration_set,
    check_token_ids,
    load_tokenizer,
    usable_tokenizer,
)
from optimum_cap.evaluation import evaluate

CHAT = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
UNKNOWN, KNOWN = 3, 20  # tokens of the tiny tokenizer
TEXTS = ("ÄÖÜ", "ÖÜÄ", "ÜÄÖ", "ÄÜÖ", "ÖÄÜ")
ROWS = [(f"what is {i}?", f"it is {i}") for i in range(6)]


def extended(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A tokenizer with a token that the tiny models have no embedding for."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
    return tokenizer


def without_vocabulary(*special: str) -> PreTrainedTokenizerFast:
    tokens = {token: index for index, token in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(tokens, [], unk_token=special[0] if special else None))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(special)
    )


def config(**fields: Any) -> CAPConfig:
    return CAPConfig(0.5, **{"recipe": "wanda", "dataset": ROWS, "num_samples": 4, **fields})


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


TOO_LARGE = (
    rf"^token {VOCABULARY} '<\|end\|>' of the tokenizer .* but the model has {VOCABULARY} "
    r"embeddings: resize them \(model.resize_token_embeddings\), or pass the model's own tokenizer"
)


def test_tokens_without_an_embedding_are_refused_before_anything_is_done() -> None:
    model = tiny_model("llama")
    before = weights(model)
    for prune in (CAPPruner(config()).prune, CAPPruner(config(recipe="paper")).measure):
        with pytest.raises(ValueError, match=TOO_LARGE):
            prune(model, extended())
    assert all(value.equal(before[name]) for name, value in weights(model).items())
    model.resize_token_embeddings(VOCABULARY + 1)
    CAPPruner(config()).prune(model, extended())


def test_evaluation_refuses_them_before_it_measures_any_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gsm8k").mkdir()
    row = '{"question": "one and one?", "answer": "two\\n#### 2"}\n'
    (tmp_path / "gsm8k" / "test.jsonl").write_text(row)
    (tmp_path / "tinystories").mkdir()
    text = '{"text": "a story"}\n{"text": "an end<|end|>"}\n'
    (tmp_path / "tinystories" / "stories_clean.jsonl").write_text(text)
    model = tiny_model("llama", max_position_embeddings=512)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    for task, template in (("gsm8k", CHAT), ("gsm8k,tinystories", None)):
        tokenizer = extended(template)
        tokenizer.model_max_length = 512
        with pytest.raises(ValueError, match=TOO_LARGE):
            evaluate(model, tokenizer, tasks=task, data_dir=tmp_path, num_fewshot=0)


def test_the_number_of_tokens_of_the_tokenizer_alone_is_no_error() -> None:
    # Tokens that no example has, such as those of images, need no embedding.
    CAPPruner(config()).prune(tiny_model("llama"), extended(template=None))


@pytest.mark.parametrize("special", [(), ("<unk>", "<s>", "</s>")])
def test_a_tokenizer_without_a_vocabulary_is_refused(special: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"has no vocabulary .*same token or none: .*--tokenizer"):
        build_calibration_set(config(), without_vocabulary(*special))


def test_a_tokenizer_that_knows_no_character_of_the_data_is_refused() -> None:
    rows = [{"text": text} for text in TEXTS]
    with pytest.raises(ValueError, match="turns every text into the same token or none"):
        CAPPruner(config(dataset=rows)).prune(tiny_model("llama"), tiny_tokenizer())
    # Without an unknown token, unknown characters are no tokens at all.
    tokenizer = tiny_tokenizer(edit=lambda special: special.pop("unk_token"))
    with pytest.raises(ValueError, match="turns every text into the same token or none"):
        check_token_ids(tokenizer, [[1, 2], [2]], VOCABULARY)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}\n{% endfor %}"])
@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"{text}\n"} for text in TEXTS],
        [{"text": f"{text} {text}\n"} for text in TEXTS],
        [(text, text) for text in TEXTS],
        [(f"{text}?", f"{text}.") for text in TEXTS],
    ],
)
def test_a_tokenizer_that_hardly_knows_the_data_is_refused(
    rows: list[Any], template: str | None
) -> None:
    model = tiny_model("llama")
    before = weights(model)
    message = (
        r"^the tokenizer .* turns \d+ of \d+ tokens of the data into its unknown token '<unk>', so "
        r"it does not know the characters of the data: pass the model's own tokenizer"
    )
    with pytest.raises(ValueError, match=message):
        CAPPruner(config(dataset=rows)).prune(model, tiny_tokenizer(template))
    assert all(value.equal(before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize(
    ("unknown", "known", "result"),
    [
        (0, 100, None),
        (9, 91, None),
        (10, 90, "turns 10 of 100 tokens of the data into its unknown token '<unk>', so it does"),
        (49, 51, "turns 49 of 100 tokens of the data into its unknown token '<unk>', so it does"),
        (50, 50, ValueError),
        (100, 0, ValueError),
    ],
)
def test_unknown_tokens_are_counted_over_all_texts(
    unknown: int, known: int, result: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # Special tokens do not count, and how the tokens are spread over texts does not matter.
    texts = [[1, *[UNKNOWN] * unknown, 2], torch.tensor([1, *[KNOWN] * known, 2]), [1, 2] * 500]
    if result is ValueError:
        with pytest.raises(ValueError, match=f"turns {unknown} of 100 tokens of the data|the same"):
            check_token_ids(tiny_tokenizer(), texts, VOCABULARY)
        return
    check_token_ids(tiny_tokenizer(), texts, VOCABULARY)
    assert (result in caplog.text) if result else not caplog.text


@pytest.mark.parametrize("special", [{"unk_token": "</s>"}, {"unk_token": "<s>"}, {}])
def test_an_unknown_token_that_ends_texts_is_not_counted(
    special: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    # As in GPT-2, whose tokenizer has a token for every byte.
    def edit(tokens: dict[str, Any]) -> None:
        tokens.pop("unk_token", None)
        tokens.update(special)

    tokenizer = tiny_tokenizer(edit=edit)
    check_token_ids(tokenizer, [[1, KNOWN, 2]] * 9, VOCABULARY)
    assert not caplog.text


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from .*--tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    for folder, options in ((tmp_path / "empty", {}), (tmp_path, {"subfolder": "empty"})):
        with pytest.raises(
            ValueError, match=r"loaded from .* \(the folder has no tokenizer files\)"
        ):
            load_tokenizer(str(folder), **options)
    # transformers makes an empty tokenizer of a folder that has only a config.
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no vocabulary \(perhaps its folder has no tok"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("tokenizer.json", text) for text in ("{}", "[]", "[1", "null", '"a"', "", "\xff")),
        *(("tokenizer_config.json", text) for text in ("[]", "[1", "null", '"a"', "", "\xff")),
        ("tokenizer_config.json", "[" * 100_000),
    ],
)
def test_damaged_files_of_a_tokenizer_are_one_sentence(
    tmp_path: Path, file: str, content: str
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    message = r"^no tokenizer could be loaded from '[^']*' \(.+\): name another one .*a loaded one$"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path))


class Processor(ProcessorMixin):
    """A processor as multimodal models have, without their images."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}.{% endfor %}"])
def test_of_a_processor_the_tokenizer_is_used(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    processor = Processor(tokenizer, template)
    expected = build_calibration_set(config(), tiny_tokenizer(template))
    calibration = build_calibration_set(config(), processor)
    assert calibration.record == expected.record
    assert [e.input_ids.tolist() for e in calibration.examples] == [
        e.input_ids.tolist() for e in expected.examples
    ]
    assert tokenizer.chat_template is None
    model = tiny_model("llama")
    CAPPruner(config()).prune(model, processor)
    reference = tiny_model("llama")
    CAPPruner(config()).prune(reference, tiny_tokenizer(template))
    assert all(v.equal(weights(reference)[name]) for name, v in weights(model).items())


@pytest.mark.parametrize(
    "other",
    ["a name", 3, tiny_model, Tokenizer(models.BPE()), SimpleNamespace(tokenizer=None)],
    ids=lambda other: type(other).__name__,
)
def test_what_is_no_tokenizer_is_refused(other: Any) -> None:
    with pytest.raises(TypeError, match="expected a tokenizer object, got"):
        usable_tokenizer(other)


def test_ids_may_be_lists_or_tensors() -> None:
    tokenizer = tiny_tokenizer()
    check_token_ids(tokenizer, [[1, 20], torch.tensor([2, 30])], 31)
    with pytest.raises(ValueError, match=r"^token 30 "):
        check_token_ids(tokenizer, [[1, 20], torch.tensor([2, 30])], 30)
