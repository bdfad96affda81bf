"""Removal of parts of several kinds until a fraction of the parameters is gone."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import ROWS, examples
from helpers.every_architecture import small_model
from helpers.tiny_models import tiny_classifier, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.checkpoint.record import describe_removal
from optimum_cap.models import CannotRemoveError, evaluation_mode
from optimum_cap.pruning import structured
from optimum_cap.pruning.sensitivity import DivergenceEvaluator
from optimum_cap.pruning.structured import StructuredRemoval, _Kind
from optimum_cap.runtime import ALONE

DATA = [{"prompt": prompt, "completion": answer} for prompt, answer in ROWS[:16]]
FIELDS: dict[str, Any] = {"pattern": "structured", "dataset": DATA, "num_samples": 8}
TOKENS = torch.arange(3, 27).view(2, 12)


def pruned(model: PreTrainedModel, sparsity: float, **fields: Any) -> PreTrainedModel:
    return CAPPruner(CAPConfig(sparsity, **{**FIELDS, **fields})).prune(model, tiny_tokenizer())


def removal_of(model: PreTrainedModel, sparsity: float = 0.2) -> StructuredRemoval:
    return StructuredRemoval(model, CAPConfig(sparsity, **FIELDS), ALONE)


def test_ordinary_model_with_as_many_parameters_is_left(tmp_path: Path) -> None:
    model = tiny_model("llama", intermediate_size=96)
    before = model.num_parameters()
    pruned(model, 0.2, recipe="causal_fast").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    removed = loaded.pruning_record.removed
    assert (removed["parameters_before"], removed["parameters_after"]) == (
        before,
        loaded.num_parameters(),
    )
    step = 8 * 3 * 3 * model.config.hidden_size  # channels, matrices, layers
    assert abs(loaded.num_parameters() - 0.8 * before) <= step / 2
    assert {each["part"] for each in removed["measured"]} == {
        "layers",
        "heads",
        "channels",
        "structured",
    }
    assert describe_removal(loaded.pruning_record.removed) in (tmp_path / "README.md").read_text()


def test_divergences_between_two_that_were_measured_are_interpolated() -> None:
    kind = _Kind(None, [float(n) for n in range(7)], {2: 1.0, 4: 5.0})
    assert [kind.divergence(count) for count in range(5)] == [0.0, 0.5, 1.0, 3.0, 5.0]
    assert kind.divergence(5) == float("inf")


def test_counts_have_the_lowest_sum_of_divergences() -> None:
    removal = removal_of(tiny_model("llama", intermediate_size=96, num_hidden_layers=6))
    for most in ((0.1, 9, 9), (9, 0.1, 9), (9, 9, 0.1), (0.4, 0.5, 0.6), (9, 0.3, 0.2)):
        check_cheapest(removal, dict(zip(("layers", "heads", "channels"), most, strict=True)))


def check_cheapest(removal: StructuredRemoval, most: dict[str, float]) -> None:
    kinds = removal._kinds
    for name, kind in kinds.items():
        kind.divergences = {
            count: most[name] * (count / kind.removal.most) ** 2
            for count in range(kind.removal.step, kind.removal.most + 1, kind.removal.step)
        }
    found = removal._cheapest()
    step = removal._gone({"channels": kinds["channels"].removal.step})
    assert removal._gone(found) >= removal._target - step / 2

    def cost(counts: dict[str, int]) -> float:
        return sum(kinds[name].divergence(count) for name, count in counts.items())

    ranges = (range(0, kind.removal.most + 1, kind.removal.step) for kind in kinds.values())
    for numbers in itertools.product(*ranges):
        counts = dict(zip(kinds, numbers, strict=True))
        if removal._gone(counts) >= removal._target:
            assert cost(found) <= cost(counts) + 0.05


def test_names_are_those_of_the_dense_model() -> None:
    model = tiny_model("mixtral").eval()
    removal = removal_of(model)
    chosen = {"layers": [1], "experts": {0: [3, 0], 1: [0, 1], 2: [2, 1]}}
    counts = {"layers": 1, "experts": 1, "heads": 1}
    with evaluation_mode(model):
        smaller = removal._without(examples(4), chosen, counts)
    assert smaller.layers == smaller.kept["layers"] == [0, 2]
    of_experts = [kept for name, kept in smaller.kept.items() if name.endswith("experts")]
    assert of_experts == [[0, 1, 2], [0, 1, 3]]
    assert not [name for name in smaller.kept if ".1." in name]
    assert [(each["part"], each["before"], each["after"]) for each in smaller.parts] == [
        ("layers", 3, 2),
        ("experts", 4, 3),
        ("heads", 2, 1),
    ]
    gate = smaller.model.model.layers[1].mlp.gate.weight
    assert torch.equal(gate, model.model.layers[2].mlp.gate.weight[[0, 1, 3]])
    assert removal._gone({"layers": 1, "experts": 1}) == pytest.approx(
        removal._before
        - removal._without(examples(4), chosen, {"layers": 1, "experts": 1}).model.num_parameters()
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt2", "gemma3"])
def test_other_architectures_become_smaller(architecture: str) -> None:
    model = tiny_model(architecture)
    before = model.num_parameters()
    pruned(model, 0.2)
    assert 0.6 < model.num_parameters() / before < 0.85
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def test_one_kind_is_removed_if_several_turn_out_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    divergence_of = DivergenceEvaluator.divergence_of
    calls: list[float] = []

    def worse_in_the_end(self: DivergenceEvaluator, view: Any) -> torch.Tensor:
        found = divergence_of(self, view)
        calls.append(float(found.mean()))
        several = len({len(view.layers), view.model.config.num_key_value_heads}) > 1
        return found + 100 * several

    monkeypatch.setattr(DivergenceEvaluator, "divergence_of", worse_in_the_end)
    monkeypatch.setattr(
        StructuredRemoval, "_cheapest", lambda self: {"layers": 1, "heads": 1, "channels": 8}
    )
    model = tiny_model("llama", intermediate_size=96, num_hidden_layers=4)
    pruned(model, 0.2, recipe="causal_fast")
    assert len(model.pruning_record.removed["parts"]) == 1
    assert len(calls) == len(model.pruning_record.removed["measured"])


@pytest.mark.slow
def test_interrupted_run_measures_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pruned(tiny_model("llama"), 0.2).state_dict()
    model = tiny_model("llama")
    fields = {"resume_dir": tmp_path / "resume"}
    with monkeypatch.context() as patch:
        patch.setattr(StructuredRemoval, "_cheapest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruned(model, 0.2, **fields)
    assert model.config.num_hidden_layers == 3
    calls: list[int] = []
    divergence_of = DivergenceEvaluator.divergence_of

    def counted(self: DivergenceEvaluator, view: Any) -> torch.Tensor:
        calls.append(1)
        return divergence_of(self, view)

    monkeypatch.setattr(DivergenceEvaluator, "divergence_of", counted)
    pruned(model, 0.2, **fields)
    assert len(calls) == 1  # of the result
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def interrupted(self: StructuredRemoval) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(
        CannotRemoveError, match=r"sparsity 0.95 would remove .* at most .* choose a lower"
    ):
        removal_of(tiny_model("llama"), 0.95)
    with pytest.raises(ValueError, match=r"does not take criterion 'wanda' .*'divergence'"):
        CAPConfig(0.2, pattern="structured", recipe="wanda")
    with pytest.raises(ValueError, match="predicts no tokens"):
        pruned(tiny_classifier("llama"), 0.2)


def test_a_kind_that_cannot_go_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(structured.logger, "info", messages.append)
    model = tiny_model("gpt2")  # the size of its heads follows from their number
    pruned(model, 0.15, recipe="causal_fast")
    assert [text for text in messages if text.startswith("All heads are kept: ")]
    assert {each["part"] for each in model.pruning_record.removed["measured"]} == {
        "layers",
        "channels",
        "structured",
    }


def test_less_than_the_smallest_part_is_refused_or_rounded_up() -> None:
    with pytest.raises(CannotRemoveError, match=r"the smallest parts .* choose a higher sparsity"):
        removal_of(tiny_model("llama"), 0.01)
    model = tiny_model("llama")
    pruned(model, 0.04, recipe="causal_fast")  # less than 4 of 20 channels
    assert model.pruning_record.removed["parts"] == [
        {"part": "channels", "before": 20, "after": 16}
    ]


def test_layers_of_several_sizes_count_as_many_parameters_as_they_have() -> None:
    model = small_model("glm4_moe")
    removal = removal_of(model)
    sizes = map(removal._size_of_layer, (3, 0))
    removal._kinds["layers"].gone = list(itertools.accumulate(sizes, initial=0.0))
    with evaluation_mode(model):
        for count in (1, 2):
            smaller = removal._without(examples(4), {"layers": [3, 0]}, {"layers": count})
            gone = model.num_parameters() - smaller.model.num_parameters()
            assert removal._gone({"layers": count}) == gone


@pytest.mark.slow
def test_another_sparsity_meets_no_divergence_of_other_experts(tmp_path: Path) -> None:
    def measured(folder: Path, sparsity: float) -> list[dict[str, Any]]:
        model = tiny_model("mixtral", num_local_experts=8)
        pruned(model, sparsity, resume_dir=folder)
        return model.pruning_record.removed["measured"]

    measured(tmp_path / "both", 0.15)
    assert measured(tmp_path / "both", 0.45) == measured(tmp_path / "fresh", 0.45)
