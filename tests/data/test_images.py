"""Rows with images: what is read, tokenized and given to the model, and what is refused."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_image_models import CHAT_TEMPLATE, IMAGE_TOKEN, tiny_image_model, tiny_processor
from helpers.tiny_models import tiny_model, tiny_tokenizer
from PIL import Image
from transformers import Gemma3ImageProcessorPil, Gemma3Processor

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data import build_calibration_set, describe_example, load_tokenizer_of
from optimum_cap.data.calibration import CalibrationExample

RED, BLUE = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))


@pytest.fixture
def processor() -> Any:
    return tiny_processor(CHAT_TEMPLATE)


def config(**changes: Any) -> CAPConfig:
    return CAPConfig(**{"sparsity": 0.5, "num_samples": 1, **changes})


def only_example(rows: Any, processor: Any, **changes: Any) -> CalibrationExample:
    [example] = build_calibration_set(config(**changes), processor, dataset=rows).examples
    return example


def asked(*parts: Any, answer: str = "red") -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def png(image: Image.Image) -> bytes:
    return base64.b64decode(data_url(image).partition(",")[2])


FORMS = {
    "pair": {"prompt": "what?", "completion": "red", "image": RED},
    "list": {"question": "what?", "answer": "red", "images": [RED]},
    "bytes": {"prompt": "what?", "completion": "red", "image": [{"bytes": png(RED), "path": "a"}]},
    "messages": {"messages": asked({"type": "image"}, text("what?")), "images": [RED]},
    "before": {"messages": asked(text("what?")), "images": [RED]},
    "text": {
        "messages": [
            {"role": "user", "content": "what?"},
            {"role": "assistant", "content": [text("red")]},
        ],
        "image": RED,
    },
    "part": {"messages": asked({"type": "image", "image": RED}, text("what?"))},
    "numbered": {
        "messages": asked({"type": "image", "index": 1}, text("what?")),
        "images": [BLUE, RED],
    },
    "mapping": {"prompt": "what?", "completion": "red", "image": {"url": data_url(RED)}},
    "url": {"messages": asked({"type": "image", "url": data_url(RED)}, text("what?"))},
    "openai": {
        "messages": asked({"type": "image_url", "image_url": {"url": data_url(RED)}}, text("what?"))
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_the_processor_gives(form: str, processor: Any) -> None:
    example = only_example([FORMS[form]], processor)
    expected = processor.apply_chat_template(
        asked({"type": "image", "image": RED}, text("what?"), answer=[text("red")]),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"add_special_tokens": False},
    )
    assert torch.equal(example.input_ids, expected["input_ids"][0])
    assert (example.input_ids == IMAGE_TOKEN).sum() == 4
    assert set(example.inputs) == {"pixel_values"}
    assert torch.equal(example.inputs["pixel_values"], expected["pixel_values"])
    assert describe_example(example, processor).endswith("what?</s>⟦red</s>⟧")


def test_a_chat_that_is_no_mapping_may_have_images_too(processor: Any) -> None:
    example = only_example([asked({"type": "image", "image": RED}, text("what?"))], processor)
    assert set(example.inputs) == {"pixel_values"}


def test_answers_between_images_are_found(processor: Any) -> None:
    """Also an answer whose tokens stand elsewhere before."""
    row = [
        *asked({"type": "image", "image": RED}, text("red or blue?"), answer="red"),
        *asked(text("red</s>red?"), {"type": "image", "image": BLUE}, answer="blue"),
        *asked({"type": "image", "image": RED}, text("and now?"), answer="red"),
    ]
    example = only_example([row], processor)
    assert example.inputs["pixel_values"].shape[0] == 3
    image = "<image>" * 4
    assert describe_example(example, processor).partition("\n")[2] == (
        f"{image}red or blue?</s>⟦red</s>⟧red</s>red?{image}</s>⟦blue</s>⟧{image}and now?</s>"
        "⟦red</s>⟧"
    )


def test_all_tokens_but_those_of_images_are_scored(processor: Any) -> None:
    example = only_example([FORMS["pair"]], processor, scored_tokens="all")
    assert torch.equal(example.scored[1:], example.input_ids[1:] != IMAGE_TOKEN)


def test_the_digest_covers_the_image(processor: Any) -> None:
    red, blue = ({**FORMS["pair"], "image": image} for image in (RED, BLUE))
    digests = {only_example([row], processor).digest for row in (red, blue, FORMS["url"])}
    assert len(digests) == 2


def test_paths_are_relative_to_the_data_file(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    RED.save(tmp_path / "photos" / "red.png")
    row = {"prompt": "what?", "completion": "red", "image": "photos/red.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    example = only_example(str(tmp_path / "rows.jsonl"), processor)
    monkeypatch.chdir(tmp_path)
    same = only_example([row], processor)
    assert torch.equal(example.inputs["pixel_values"], same.inputs["pixel_values"])


def test_rows_with_and_without_images_are_mixed(processor: Any) -> None:
    rows = [FORMS["pair"], {"prompt": "1+1=", "completion": "2"}]
    examples = build_calibration_set(config(num_samples=2), processor, dataset=rows).examples
    assert sorted(len(example.inputs) for example in examples) == [0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": asked({"type": "image"}, text("a?")), "images": [RED, BLUE]},
            r"has images in its columns \(2\) and parts for images in its messages \(1\), but not",
        ),
        (
            {"messages": asked({"type": "image", "index": 1}, text("a?")), "images": [RED]},
            r"has parts for the images \[1\] in its messages, but 1 images in its columns",
        ),
        (
            {"prompt": "<image> what?", "completion": "red", "image": RED},
            "has images, and '<image>' in its text, which the chat template prints",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "draw"},
                    {"role": "assistant", "content": [{"type": "image", "image": RED}, text("ok")]},
                ]
            },
            "has an image in an answer, and tokens of images are not scored",
        ),
        (
            {"messages": asked({"type": "image"}, text("a?"))},
            "has a message with an image that is not there: name it in the part of the message",
        ),
        ({"text": "a photo", "image": RED}, "has images but no prompt"),
        (
            {"prompt": "a?", "completion": "b", "image": "nowhere.png"},
            r"an image of data set 'in-memory' cannot be read \(nowhere.png, no file in /",
        ),
        (
            {"prompt": "a?", "completion": "b", "image": {"bytes": b"no image", "path": None}},
            r"an image of data set 'in-memory' cannot be read \(.*UnidentifiedImageError",
        ),
        (
            {"prompt": "a?", "completion": "b", "video": "a.mp4"},
            "has a column 'video', but calibration examples are text and images",
        ),
        (
            {"messages": asked({"type": "audio", "audio": "a.wav"}, text("a?"))},
            "has content of type 'audio', but calibration examples are text and images",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused(
    row: dict[str, Any], message: str, processor: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        only_example([row], processor)


def test_images_need_a_processor(tmp_path: Path) -> None:
    message = "a row of data set 'in-memory' has images, which only calibration of a model that"
    with pytest.raises(ValueError, match=message):
        only_example([FORMS["pair"]], tiny_tokenizer())
    tiny_image_model("llava").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = type(tiny_image_model("llava")).from_pretrained(tmp_path)
    message = f"need the model's processor, but none could be loaded from '{tmp_path}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        CAPPruner(config(dataset=[FORMS["pair"]])).prune(model)


def test_the_processor_is_loaded_once_a_row_has_images(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    of_model = load_tokenizer_of(str(tmp_path), sees_images=True)
    words = {"prompt": "1+1=", "completion": "2"}
    for rows in ([words, FORMS["pair"]], [FORMS["pair"], words]):
        found, expected = (
            build_calibration_set(config(num_samples=2), each, dataset=rows).examples
            for each in (of_model, processor)
        )
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.scored, other.scored)
    damaged = tmp_path / "processor_config.json"
    damaged.write_text("{")
    assert len(only_example([words], of_model).inputs) == 0
    with pytest.raises(ValueError, match="need the model's processor, but none could be loaded"):
        only_example([FORMS["pair"]], of_model)
    assert load_tokenizer_of(str(tmp_path), sees_images=False).chat_template == CHAT_TEMPLATE


def test_data_urls_of_any_length_are_read(processor: Any) -> None:
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.numpy().astype("uint8"))
    for form in (data_url(image), data_url(image).partition(",")[2]):
        example = only_example([{"prompt": "a?", "completion": "b", "image": form}], processor)
        same = only_example([{"prompt": "a?", "completion": "b", "image": image}], processor)
        assert torch.equal(example.inputs["pixel_values"], same.inputs["pixel_values"])


def test_parts_may_be_for_prompts_alone(processor: Any) -> None:
    """The template of Pixtral joins answers as texts."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}"
        "{% endif %}{% endfor %}{% else %}{{ '!' + m.content }}{% endif %}</s>{% endfor %}"
    )
    example = only_example([FORMS["pair"]], tiny_processor(template))
    assert describe_example(example, processor).endswith("what?</s>⟦!red</s>⟧")


def test_tokens_around_images_are_not_scored() -> None:
    """Those of Gemma 3 say that an image begins and ends, and that it is one."""
    tokenizer = tiny_tokenizer()
    names = {"boi_token": "<boi>", "image_token": "<soft>", "eoi_token": "<eoi>"}
    tokenizer.add_tokens(list(names.values()), special_tokens=True)
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    gemma = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 8, "width": 8}),
        tokenizer,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<boi>"),
        image_seq_length=4,
    )
    for scored_tokens in ("all", "answer"):
        example = only_example([FORMS["pair"]], gemma, scored_tokens=scored_tokens)
        special = torch.isin(
            example.input_ids, torch.tensor(tokenizer.convert_tokens_to_ids(list(names.values())))
        )
        assert special.sum() == 6
        assert not (example.scored & special).any()
        assert describe_example(example, gemma).endswith("⟦red</s>⟧") == (scored_tokens == "answer")


def test_images_need_a_model_that_sees_them(processor: Any) -> None:
    with pytest.raises(ValueError, match="have images, which LlamaForCausalLM does not see: load"):
        CAPPruner(config(dataset=[FORMS["pair"]])).prune(tiny_model("llama"), processor)


def test_answers_of_the_model_are_to_texts(processor: Any) -> None:
    settings = config(dataset=[FORMS["pair"]], answers="model", max_new_tokens=4)
    with pytest.raises(ValueError, match="has images, which only calibration"):
        CAPPruner(settings).prune(tiny_image_model("llava"), processor)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "LlavaProcessor has no chat template, which says where they belong"),
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            "the chat template of LlavaProcessor leaves out the images of data set 'in-memory'",
        ),
        (
            CHAT_TEMPLATE.replace("<image>", "<image><image>"),
            r"LlavaProcessor does not take a row of data set 'in-memory' with its images, 1 in ",
        ),
        (
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            "the chat template prints the parts of messages themselves, so it takes no images",
        ),
    ],
)
def test_templates_without_images_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        only_example([FORMS["pair"]], tiny_processor(template))
