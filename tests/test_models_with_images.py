"""Models that see images: their language part is pruned, all other parts stay as they are."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import ROWS, examples
from helpers.checkpoints import contents, same_weights
from helpers.command_line import run_cap
from helpers.evaluation import write_task_files
from helpers.observed_inputs import observed_inputs
from helpers.shared_prefix import examples as examples_with_a_prefix
from helpers.tiny_image_models import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    image_examples,
    tiny_image_model,
    tiny_processor,
)
from helpers.tiny_models import tiny_tokenizer
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
)

import optimum_cap.checkpoint
from optimum_cap import CAPConfig, CAPPruner, pruner
from optimum_cap.checkpoint import convert_checkpoint
from optimum_cap.commands import prune as prune_command
from optimum_cap.data.calibration import CalibrationSet
from optimum_cap.methods.statistics import InputStatistics
from optimum_cap.models import ModelView
from optimum_cap.models.sites import Matrix, matrices_by_layer
from optimum_cap.pruning.activations import LayerwisePass
from optimum_cap.pruning.first_batch import check_first_batch
from optimum_cap.scoring.exact import exact_losses
from optimum_cap.scoring.plain import plain_losses

pytestmark = pytest.mark.slow  # whole prunings of many architectures

# Each with a part of the name of what is no language part.
MODELS = {
    "llava": r"vision_tower",
    "mistral3": r"vision_tower",
    "gemma3": r"vision_tower",
    "qwen2_5_vl": r"visual",
    "qwen3_vl": r"visual",
    "qwen3_5": r"visual",
}
ROTATED_IN_THREE_DIMENSIONS = ("qwen2_5_vl", "qwen3_vl")
TOKENS = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(1))


RED = Image.new("RGB", (8, 8), "red")


def settings(**changes: Any) -> CAPConfig:
    values = {"sparsity": 0.5, "num_samples": 6, "dataset": ROWS, "seed": 3}
    return CAPConfig(**{**values, **changes})


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dense(name: str, tmp_path: Path) -> Path:
    tiny_image_model(name).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_only_the_language_part_is_pruned_and_reloaded_bit_by_bit(
    name: str, dense: Path, tmp_path: Path
) -> None:
    before = AutoModelForImageTextToText.from_pretrained(dense).state_dict()
    model = AutoModelForImageTextToText.from_pretrained(dense, pruning_config=settings())
    record, after = model.pruning_record, model.state_dict()
    assert type(model) is type(tiny_image_model(name))
    assert record.sparsity == pytest.approx(0.5, abs=1e-3)
    assert record.unsupported == []
    pruned = {matrix.name for matrix in record.matrices}
    assert {key for key in after if not torch.equal(after[key], before[key])} == pruned
    assert all(".language_model.layers." in key for key in pruned)
    assert any(MODELS[name] in key for key in after)

    model.save_pretrained(tmp_path / "packed")
    convert_checkpoint(tmp_path / "packed", tmp_path / "again", "dense")
    for folder in ("packed", "again"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / folder)
        assert type(loaded) is type(model)
        assert same_weights(loaded, model)
        assert loaded.pruning_record.zeros == record.zeros
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
        loaded.save_pretrained(tmp_path / f"{folder}_saved")
        assert contents(tmp_path / f"{folder}_saved") == {
            file: data
            for file, data in contents(tmp_path / folder).items()
            if not file.startswith("tokenizer")
        }


def test_exact_scores_equal_one_hooked_pass_per_unit(name: str) -> None:
    view = ModelView.of(tiny_image_model(name))
    exact, plain = exact_losses(view, examples()), plain_losses(view, examples())
    torch.testing.assert_close(exact.masked, plain.masked, rtol=1e-5, atol=1e-6)
    assert (plain.masked - plain.intact).abs().max() > 1e-2


def test_statistics_with_images_are_those_of_the_inputs(name: str) -> None:
    """Qwen3-VL adds features of the images to the hidden states between its layers."""
    rows = [*image_examples(name, 4), *examples()[:3]]
    model = tiny_image_model(name)
    expected = observed_inputs(model, rows)
    view = ModelView.of(model)
    check_first_batch(view, rows, layer_by_layer=True, differentiate=True)
    found: dict[Matrix, InputStatistics] = {}
    with torch.no_grad():
        layerwise = LayerwisePass(view, rows)
        for layer, matrices in matrices_by_layer(view.sites).items():
            found |= layerwise.statistics(layer, matrices, gram=True, advance=True)
    for matrix, statistics in found.items():
        inputs = expected[matrix]
        assert statistics.tokens == len(inputs)
        gram = inputs.T @ inputs
        tolerance = 1e-5 * gram.diagonal().max().item()
        torch.testing.assert_close(statistics.gram.double(), gram, rtol=1e-4, atol=tolerance)


def test_scores_with_images_are_those_of_whole_passes(name: str) -> None:
    view, rows = ModelView.of(tiny_image_model(name)), image_examples(name, 3)
    exact, plain = exact_losses(view, rows), plain_losses(view, rows)
    assert torch.equal(exact.masked, plain.masked)
    blank = [
        replace(row, inputs={**row.inputs, "pixel_values": 0 * row.inputs["pixel_values"]})
        for row in rows
    ]
    assert (plain_losses(view, blank).intact - plain.intact).abs().min() > 1e-4


@pytest.mark.parametrize("recipe", ["causal", "paper", "sparsegpt"])
def test_recipes_with_images(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = image_examples(name, 6)
    monkeypatch.setattr(
        pruner, "build_calibration_set", lambda *args, **kwargs: CalibrationSet(rows, {})
    )
    model = tiny_image_model(name)
    CAPPruner(settings(recipe=recipe)).prune(model, tiny_tokenizer())
    assert model.pruning_record.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("rotated", ROTATED_IN_THREE_DIMENSIONS)
def test_positions_of_earlier_images_do_not_shift_those_of_calibration(rotated: str) -> None:
    """Models keep the offset that the last images gave to the positions of the text after them."""
    rows = examples_with_a_prefix(prefix=24)
    model = tiny_image_model(rotated)
    expected = plain_losses(ModelView.of(model), rows)
    model.model.rope_deltas = torch.tensor([[-7]])
    found = exact_losses(ModelView.of(model), rows)
    torch.testing.assert_close(found.masked, expected.masked, rtol=1e-5, atol=1e-6)


def test_the_language_part_alone_is_loaded_from_the_pruned_checkpoint(tmp_path: Path) -> None:
    model = CAPPruner(settings(recipe="magnitude", num_samples=128, dataset="gsm8k", seed=0)).prune(
        tiny_image_model("qwen3_5")
    )
    model.save_pretrained(tmp_path)
    text = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    with torch.no_grad():
        assert torch.equal(text(TOKENS).logits, model(TOKENS).logits)


def test_layers_that_need_images_are_refused() -> None:
    message = r"^MllamaForConditionalGeneration cannot be pruned: on text alone, it does not run .*"
    with pytest.raises(ValueError, match=message + r"layers\.1 .*are text: choose a model"):
        CAPPruner(settings()).prune(tiny_image_model("mllama"), tiny_tokenizer())


def test_models_that_need_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_image_model("llava")

    def forward(pixel_values: torch.Tensor, input_ids: torch.Tensor, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ValueError, match="does not run without pixel_values, and calibration"):
        CAPPruner(settings()).prune(model, tiny_tokenizer())


# The command line, with a processor


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its processor, and data."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny_image_model("llava")
    model.save_pretrained(folder / "model")
    tiny_processor("{% for m in messages %}{{ m.content }}</s>{% endfor %}").save_pretrained(
        folder / "model"
    )
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ROWS]
    RED.save(folder / "a.png")
    for file, more in (("sums", {}), ("photos", {"image": "a.png"}), ("albums", {"images": []})):
        text = "".join(json.dumps({**row, **more}) + "\n" for row in rows)
        (folder / f"{file}.jsonl").write_text(text)
    return folder


@pytest.fixture
def cap(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Run `optimum-cli cap` in the folder; return what it prints, or its message if it fails."""

    def run(command: str) -> str:
        monkeypatch.chdir(place)
        status, out, err = run_cap(monkeypatch, capfd, command.split())
        return err.splitlines()[-1] if status else out

    return run


Cap = Callable[[str], str]
PRUNE = "prune -m model --sparsity 0.5 --num-samples 6 --seed 3 --device-map cpu --dataset "


@pytest.fixture
def pruned(place: Path, cap: Cap) -> Path:
    """A checkpoint that the command has written, once for all tests."""
    if not (place / "pruned").exists():
        out = cap(f"{PRUNE} sums.jsonl -o pruned")
        (place / "printed").write_text(out)
    return place / "pruned"


def with_image(model: PreTrainedModel, processor: Any) -> torch.Tensor:
    """Return the logits for a text with an image."""
    image = Image.new("RGB", (8, 8), (200, 100, 0))
    inputs = processor(images=image, text="a <image> b", return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 4
    with torch.no_grad():
        return model(**inputs).logits


def test_prune_keeps_the_vision_part_and_the_processor(place: Path, pruned: Path) -> None:
    processor = AutoProcessor.from_pretrained(place / "model")
    config = settings(dataset=[{"prompt": a, "completion": b} for a, b in ROWS])
    expected = AutoModelForImageTextToText.from_pretrained(place / "model")
    CAPPruner(config).prune(expected, processor)
    model = AutoModelForImageTextToText.from_pretrained(pruned)
    assert same_weights(model, expected)
    kept = AutoProcessor.from_pretrained(pruned)
    assert type(kept) is type(processor)
    assert kept.to_dict() == processor.to_dict()
    assert kept.chat_template == processor.chat_template
    assert torch.equal(with_image(model, kept), with_image(expected, processor))


def test_what_the_command_and_the_model_card_say_loads_the_model(place: Path, pruned: Path) -> None:
    code = (place / "printed").read_text().partition("Load it with\n\n")[2]
    code = code.partition("\nSee what it has lost")[0]
    code = code.replace("'pruned'", repr(str(pruned)))
    values: dict[str, Any] = {}
    exec(code, values)
    assert type(values["model"]).__name__ == "LlavaForConditionalGeneration"
    assert type(values["processor"]).__name__ == "LlavaProcessor"
    card = (pruned / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text\n" in card
    assert "| Left dense | embeddings, norms, routers, LM head, vision part |" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code.replace("this/repository", str(pruned)), values)
    assert type(values["model"]).__name__ == "LlavaForConditionalGeneration"


def test_the_processor_is_uploaded(place: Path, cap: Cap, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[str] = []

    class Commit:
        repo_url = "hub/me/model"

    def upload(folder: Path, repo: str, names: list[str], **kwargs: Any) -> type[Commit]:
        uploaded.extend(names)
        return Commit

    monkeypatch.setattr(optimum_cap.checkpoint, "upload", upload)
    monkeypatch.setattr(prune_command, "check_hub_access", lambda repo, token: None)
    flags = "-m model --sparsity 0.5 --recipe magnitude --device-map cpu"
    assert "hub/me/model" in cap(f"prune {flags} -o pushed --push-to-hub me/model")
    processor_files = {path.name for path in (place / "model").glob("*processor*")}
    assert processor_files
    assert set(uploaded) >= processor_files | {"tokenizer.json", "chat_template.jinja"}


def test_the_other_commands_take_the_model(place: Path, pruned: Path, cap: Cap) -> None:
    assert "pruned to     0.5 of" in (inspected := cap("inspect pruned --verify"))
    assert "verified" in inspected
    weights = sum(weight.numel() for weight in tiny_image_model("llava").parameters())
    estimate = json.loads(cap("estimate model --hardware a100-80gb --json"))
    assert estimate["parameters"] == weights
    assert estimate["heads"] == 12
    scored = "score -m model -o scores --num-samples 4 --dataset sums.jsonl --device-map cpu"
    assert "intact loss" in cap(scored)
    by_scores = "prune -m model --sparsity 0.5 --scores scores -o by_scores --device-map cpu"
    assert "saved" in cap(by_scores)
    answers = "generate -m model -o own.jsonl --num-samples 4 --dataset sums.jsonl"
    assert "saved" in cap(f"{answers} --max-new-tokens 4 --device-map cpu")


def test_eval_measures_the_model(place: Path, pruned: Path, cap: Cap) -> None:
    write_task_files(place / "tasks")
    flags = "--tasks wikitext2 --data-dir tasks --limit 2 --device-map cpu"
    assert "wikitext2" in cap(f"eval pruned {flags}")
    assert "wikitext2" in cap(f"eval model {flags}")


def test_rows_with_images_calibrate(place: Path, cap: Cap) -> None:
    processor = tiny_processor(CHAT_TEMPLATE)
    processor.save_pretrained(place / "sees")
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(place / "model" / file, place / "sees" / file)
    flags = f"{PRUNE.replace('-m model', '-m sees')} photos.jsonl"
    assert "<image><image><image><image>" in cap(f"{flags} -o shown --show-example")
    assert "saved" in cap(f"{flags} -o with_images")
    found = AutoModelForImageTextToText.from_pretrained(place / "with_images")
    rows = [{"prompt": a, "completion": b, "image": RED} for a, b in ROWS]
    expected = AutoModelForImageTextToText.from_pretrained(place / "model")
    CAPPruner(settings(dataset=rows)).prune(expected, processor)
    assert same_weights(found, expected)
    assert found.pruning_record.calibration == {
        **expected.pruning_record.calibration,
        "sources": found.pruning_record.calibration["sources"],
    }
    # While loading, and by name.
    config = settings(dataset=str(place / "photos.jsonl"))
    loaded = AutoModelForImageTextToText.from_pretrained(place / "sees", pruning_config=config)
    assert same_weights(loaded, expected)
    scored = "score -m sees -o image_scores --num-samples 4 --dataset photos.jsonl --device-map cpu"
    assert "intact loss" in cap(scored)


def test_images_without_a_template_are_refused(place: Path, cap: Cap) -> None:
    assert cap(f"{PRUNE} photos.jsonl -o none").endswith(
        "the chat template prints the parts of messages themselves, so it takes no images: set "
        "processor.chat_template to one that does"
    )
    assert not (place / "none").exists()
    answers = "generate -m model -o of_photos.jsonl --num-samples 4 --dataset photos.jsonl"
    assert "has images, which only calibration of a model that sees images uses" in cap(answers)
    assert "saved" in cap(f"{PRUNE} albums.jsonl -o empty_lists")
    shutil.rmtree(place / "empty_lists")
