"""Recovery brings a pruned model closer to the dense one, keeps its zeros, and resumes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import run_cap
from helpers.paths import ROOT
from helpers.tiny_models import tiny_model
from helpers.training import needs_trainer, same_masks, zero_masks
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.checkpoint import inspect_checkpoint
from optimum_cap.training import recover

pytestmark = needs_trainer

REASONER = ROOT / "examples/tiny_reasoner"
DATA = str(REASONER / "data/calibration.jsonl")
SHORT = {"dataset": DATA, "steps": 8, "num_samples": 48, "learning_rate": 3e-4}


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(REASONER / "model")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REASONER / "model")


@pytest.fixture
def pruned(dense: PreTrainedModel) -> PreTrainedModel:
    return CAPPruner(CAPConfig(sparsity=0.7, recipe="magnitude")).prune(copy.deepcopy(dense))


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"lora_rank": 4, "learning_rate": 2e-3}, marks=pytest.mark.slow),
        pytest.param({"hidden_states": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_a_model_comes_closer_and_keeps_its_zeros(
    options: dict[str, Any], pruned: PreTrainedModel, dense: PreTrainedModel, tokenizer: Any
) -> None:
    before, weights = zero_masks(pruned), copy.deepcopy(dense.state_dict())
    recovery = recover(pruned, dense, tokenizer, **{**SHORT, **options})
    assert recovery.divergence_after < 0.98 * recovery.divergence_before
    assert recovery.model is pruned
    assert same_masks(before, zero_masks(pruned))
    assert all(torch.equal(weights[name], each) for name, each in dense.state_dict().items())
    assert not any("lora" in name for name, _ in pruned.named_parameters())
    [record] = pruned.pruning_record.recovery
    assert record["divergence_after"] == recovery.divergence_after
    assert record["steps"] == recovery.best_step
    assert record["calibration"]["sources"][0]["rows"] == 384


@pytest.mark.slow
def test_half_precision_comes_back(pruned: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path / "pruned")
    model, dense = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for folder in (tmp_path / "pruned", REASONER / "model")
    )
    model.model.norm.float()  # as some models have their norms
    frozen = model.model.norm.weight.requires_grad_(False)
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
    dtypes = {
        name: each.dtype for name, each in [*model.named_parameters(), *model.named_buffers()]
    }
    recover(model, dense, tokenizer, **{**SHORT, "steps": 4, "learning_rate": 1e-3})
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert {name: each.dtype for name, each in tensors} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    with torch.no_grad():
        assert torch.equal(dense(input_ids=ids).logits, expected)
    assert not frozen.requires_grad
    assert all(each.requires_grad for each in model.parameters() if each is not frozen)
    assert not model.training
    assert model.config.use_cache
    assert not {"forward", "_is_accelerate_prepared"} & set(model.__dict__)


def stop_training(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[int]:
    """Raise an error in that step of all that are run; return which steps these are, from 0 on."""
    own = Trainer.training_step
    steps: list[int] = []

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == number:
            raise error
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}])
def test_an_interrupted_recovery_resumes_with_the_same_bytes(
    options: dict[str, Any],
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = copy.deepcopy(pruned.state_dict())
    whole = copy.deepcopy(pruned)
    recover(whole, dense, tokenizer, **SHORT, **options)
    steps = stop_training(monkeypatch, 6, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        recover(pruned, dense, tokenizer, **SHORT, **options, resume_dir=tmp_path)
    assert all(torch.equal(start[name], each) for name, each in pruned.state_dict().items())
    recover(pruned, dense, tokenizer, **SHORT, **options, resume_dir=tmp_path)
    assert steps[6] == 5
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, pruned.state_dict()[name]), name
    assert list((tmp_path / "recovery").iterdir())
    pruned.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "recovery").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}])
def test_a_failure_changes_nothing(
    options: dict[str, Any],
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = copy.deepcopy(pruned.state_dict())
    stop_training(monkeypatch, 4, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        recover(pruned, dense, tokenizer, **SHORT, **options)
    after = pruned.state_dict()
    assert start.keys() == after.keys()
    assert all(torch.equal(start[name], each) for name, each in after.items())
    assert not any(each._post_accumulate_grad_hooks for each in pruned.parameters())


@pytest.mark.slow
def test_what_was_not_saved_is_not_trained_again(
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = copy.deepcopy(pruned)
    first = recover(pruned, dense, tokenizer, **SHORT, resume_dir=tmp_path)
    monkeypatch.setattr(Trainer, "train", None)
    second = recover(other, dense, tokenizer, **SHORT, resume_dir=tmp_path)
    assert (first.steps, first.best_step) == (second.steps, second.best_step)
    assert first.divergence_after == second.divergence_after
    for name, weight in pruned.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.slow
def test_the_record_has_each_recovery_and_pruning_again_keeps_them(
    pruned: PreTrainedModel, dense: PreTrainedModel, tokenizer: Any
) -> None:
    for _ in range(2):
        recover(pruned, dense, tokenizer, **{**SHORT, "steps": 4})
    assert len(pruned.pruning_record.recovery) == 2
    CAPPruner(CAPConfig(sparsity=0.8, recipe="magnitude")).prune(pruned)
    assert len(pruned.pruning_record.recovery) == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}])
def test_training_that_does_not_help_changes_nothing(
    options: dict[str, Any], pruned: PreTrainedModel, dense: PreTrainedModel, tokenizer: Any
) -> None:
    before = copy.deepcopy(pruned.state_dict())
    with pytest.raises(ValueError, match="did not bring the model closer to the dense one"):
        recover(pruned, dense, tokenizer, **{**SHORT, "steps": 3, "learning_rate": 0.9, **options})
    after = pruned.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], each) for name, each in after.items())


def test_what_is_refused(pruned: PreTrainedModel, dense: PreTrainedModel, tokenizer: Any) -> None:
    def refused(match: str, model: Any = pruned, other: Any = dense, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            recover(model, other, tokenizer, **{**SHORT, **options})

    refused("steps must be an integer of at least 1, got 0", steps=0)
    refused("num_samples must be an integer of at least 16, got 8", num_samples=8)
    refused("lora_rank must be an integer of at least 1, got 0", lora_rank=0)
    refused("learning_rate must be between 0 and 1, got 2", learning_rate=2)
    refused("hidden_states must be a weight of at least 0, got -1", hidden_states=-1)
    refused("are the same object", other=pruned)
    refused("has no zeros to keep", model=copy.deepcopy(dense))
    refused("has no linear layers with zeros to adapt", model=copy.deepcopy(dense), lora_rank=2)
    refused(r"is not the model that was pruned: lm_head.weight is", other=tiny_model("llama"))


@pytest.mark.slow
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        REASONER / "model", pruning_config=CAPConfig(sparsity=0.7, recipe="magnitude")
    )
    model.save_pretrained(tmp_path / "pruned")
    AutoTokenizer.from_pretrained(REASONER / "model").save_pretrained(tmp_path / "pruned")
    output = tmp_path / "recovered"
    call = ["recover", "-m", tmp_path / "pruned", "-o", output, "--dataset", DATA]
    few = ["--steps", "4", "--num-samples", "32", "--resume-dir", tmp_path / "resume"]
    status, _, err = run_cap(monkeypatch, capfd, [*call, *few])
    assert status == 2
    assert "does not say where its dense model" in err
    assert "name it with --dense" in err
    call += ["--dense", REASONER / "model"]
    status, _, err = run_cap(monkeypatch, capfd, [*call, "--steps", "0"])
    assert status == 2
    assert "steps must be an integer of at least 1, got 0" in err
    assert not output.exists()
    status, out, err = run_cap(monkeypatch, capfd, [*call, *few])
    assert status == 0, err
    assert "steps of distillation from the dense model on calibration.jsonl" in out
    record = inspect_checkpoint(output).record
    assert record.sparsity == pytest.approx(0.7, abs=1e-4)
    assert record.recovery[0]["divergence_after"] < record.recovery[0]["divergence_before"]
    assert (output / "tokenizer.json").exists()
    assert "trained to predict what the dense model predicts" in (output / "README.md").read_text()


# Models that have lost parts


@pytest.mark.parametrize(
    ("pattern", "sparsity", "options"),
    [
        ("channels", 0.6, {}),
        pytest.param(
            "layers", 0.4, {"lora_rank": 4, "learning_rate": 2e-3}, marks=pytest.mark.slow
        ),
        pytest.param("channels", 0.6, {"hidden_states": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_a_smaller_model_comes_closer_and_stays_an_ordinary_one(
    pattern: str,
    sparsity: float,
    options: dict[str, Any],
    dense: PreTrainedModel,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    config = CAPConfig(sparsity, recipe="random", pattern=pattern)
    smaller = CAPPruner(config).prune(copy.deepcopy(dense), tokenizer)
    shapes = {name: weight.shape for name, weight in smaller.named_parameters()}
    recovery = recover(smaller, dense, tokenizer, **{**SHORT, **options})
    assert recovery.divergence_after < 0.98 * recovery.divergence_before
    assert {name: weight.shape for name, weight in smaller.named_parameters()} == shapes
    smaller.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "then trained to predict what the dense model predicts." in card
    assert "zeros were kept" not in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(8, 40)[None]
    assert torch.equal(loaded(ids).logits, smaller(ids).logits)


def test_what_a_smaller_model_must_share_with_the_dense_one(
    dense: PreTrainedModel, tokenizer: Any
) -> None:
    config = CAPConfig(0.4, recipe="random", pattern="layers")
    smaller = CAPPruner(config).prune(copy.deepcopy(dense), tokenizer)
    with pytest.raises(ValueError, match=r"layer by layer, but 2 of 6 layers were removed"):
        recover(smaller, dense, tokenizer, **SHORT, hidden_states=0.1)
    with pytest.raises(ValueError, match=r"the dense model is a MistralForCausalLM"):
        recover(smaller, tiny_model("mistral"), tokenizer, **SHORT)
    with pytest.raises(ValueError, match=r"embeddings, but the pruned one"):
        recover(smaller, tiny_model("llama"), tokenizer, **SHORT)
