"""The default recipe through `CAPPruner`, whole."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.calibration import ROWS
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.checkpoint.record import PruningRecord
from optimum_cap.config import RECIPES
from optimum_cap.models.architectures import find_sites
from optimum_cap.models.sites import matrices_by_layer, oriented
from optimum_cap.pruning.sensitivity import DivergenceEvaluator
from optimum_cap.scoring.estimators import ESTIMATORS


def config(**changes: Any) -> CAPConfig:
    return CAPConfig(**{"sparsity": 0.5, "dataset": ROWS, "num_samples": 12, **changes})


def pruned(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    return CAPPruner(config(**changes)).prune(copy.deepcopy(model), tiny_tokenizer())


def same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    layers = matrices_by_layer(find_sites(model))
    return [oriented(model, matrix) for own in layers.values() for matrix in own]


def test_the_default_is_the_causal_recipe(llama: PreTrainedModel) -> None:
    assert same(pruned(llama), pruned(llama, recipe="causal"))


def test_it_gives_the_same_bytes_twice(model: PreTrainedModel) -> None:
    first, second = pruned(model, refine=1), pruned(model, refine=1)
    assert same(first, second)
    assert first.pruning_record == second.pruning_record


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.01, 0.99])
def test_very_little_and_very_much_is_pruned(sparsity: float, model: PreTrainedModel) -> None:
    new = pruned(model, sparsity=sparsity)
    weights = matrices(new)
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(sparsity * total)
    assert all(weight.isfinite().all() for weight in weights)
    for sensitivity in new.pruning_record.sensitivities:
        less = sparsity - sensitivity.zeros / sensitivity.total
        assert less <= min(0.1, sparsity / 2) + 2 / sensitivity.total
        assert -less <= min(0.1, (1 - sparsity) / 2) + 2 / sensitivity.total


def test_more_fragile_sites_get_fewer_zeros(llama: PreTrainedModel) -> None:
    sensitivities = pruned(llama).pruning_record.sensitivities
    by_fragility = sorted(sensitivities, key=lambda r: r.divergence / r.total)
    shares = [r.zeros / r.total for r in by_fragility]
    assert shares[0] > 0.55
    assert shares[-1] < 0.45
    assert all(a > b - 0.01 for a, b in itertools.pairwise(shares))


def test_the_record_keeps_sensitivities_in_json(llama: PreTrainedModel) -> None:
    record = pruned(llama).pruning_record
    assert PruningRecord.from_dict(record.to_dict()) == record
    assert [r.site for r in record.sensitivities] == [site.name for site in find_sites(llama)]
    assert sum(r.zeros for r in record.sensitivities) == record.zeros
    assert sum(r.total for r in record.sensitivities) == record.total


def test_a_record_without_sensitivities_has_none(llama: PreTrainedModel) -> None:
    values = pruned(llama, recipe="wanda").pruning_record.to_dict()
    del values["sensitivities"]
    assert PruningRecord.from_dict(values).sensitivities == []


@pytest.mark.parametrize(
    ("allocation", "are"), [("fisher", "estimated"), ("interventional", "measured")]
)
def test_the_card_says_how_sensitivities_were_found(
    allocation: str, are: str, tmp_path: Path
) -> None:
    new = pruned(tiny_model("mixtral"), allocation=allocation)
    new.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"ALPS (arXiv 2406.07831) and a sparsity per site from the {are}" in card
    shares = [sensitivity.sparsity for sensitivity in new.pruning_record.sensitivities]
    assert (
        f"| {are.capitalize()} | {len(shares)} sites, each pruned alone; their sparsities range "
        f"from {min(shares):.2%} to {max(shares):.2%} |"
    ) in card


def test_the_card_says_that_kept_weights_were_refined(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    cards = {}
    for recipe in ("causal", "causal_fast"):
        pruned(llama, recipe=recipe).save_pretrained(tmp_path / recipe)
        cards[recipe] = (tmp_path / recipe / "README.md").read_text()
    passes = RECIPES["causal"].refine
    assert (
        "; the kept weights of each layer were then fitted to the hidden states of the dense model."
    ) in cards["causal"]
    assert (
        f"| Refined | up to {passes} passes over the calibration set for each layer |"
        in (cards["causal"])
    )
    assert "Refined" not in cards["causal_fast"]
    assert ". Pruning took no training." in cards["causal_fast"]


def test_a_pattern_takes_the_rest_of_the_recipe(llama: PreTrainedModel) -> None:
    new = pruned(llama, pattern="2:4")
    for weight in matrices(new):
        assert ((weight.reshape(len(weight), -1, 4) != 0).sum(-1) == 2).all()
    assert new.pruning_record.sensitivities == []
    assert not same(new, pruned(llama, pattern="2:4", criterion="alps"))


def test_sensitivities_can_be_measured(llama: PreTrainedModel) -> None:
    estimated, measured = pruned(llama), pruned(llama, allocation="interventional")
    assert measured.pruning_record.zeros == estimated.pruning_record.zeros
    assert not same(measured, estimated)
    assert len(measured.pruning_record.sensitivities) == len(find_sites(llama))
    assert same(measured, pruned(llama, allocation="interventional"))


def test_the_quick_variant_is_the_default_without_refinement(llama: PreTrainedModel) -> None:
    fast = pruned(llama, recipe="causal_fast")
    assert same(fast, pruned(llama, refine=0))
    assert fast.pruning_record.sensitivities == pruned(llama).pruning_record.sensitivities


def test_refinement_moves_kept_weights_alone(llama: PreTrainedModel) -> None:
    refined, fast = pruned(llama), pruned(llama, recipe="causal_fast")
    pairs = list(zip(matrices(refined), matrices(fast), strict=True))
    # Later layers get other inputs, so other weights may be pruned there.
    for after, before in pairs[: len(pairs) // 3]:
        assert torch.equal(after == 0, before == 0)
    assert not same(refined, fast)


@pytest.mark.slow
def test_each_choice_changes_what_is_pruned(llama: PreTrainedModel) -> None:
    every = pruned(llama)
    for changes in (
        {"target": "dense"},
        {"order": "projection"},
        {"answer_weight": 0},
        {"refine": 0},
        {"refine_learning_rate": 1e-3},
        {"allocation": "uniform"},
        {"allocation": "interventional"},
        {"allocation_bound": 0.02},
        {"allocation_examples": 2},
        {"criterion": "alps"},
    ):
        assert not same(every, pruned(llama, **changes)), changes


def test_what_stays_dense_stays_as_it_was(llama: PreTrainedModel) -> None:
    names = ["layers.1", "layers.2.mlp", "o_proj"]
    new = pruned(llama, modules_to_leave_dense=names)
    for name, weight in new.named_parameters():
        if any(f".{part}." in name for part in names):
            assert torch.equal(weight, llama.get_parameter(name)), name
    record = new.pruning_record
    assert record.zeros == round(0.5 * record.total)
    sites = [sensitivity.site.removeprefix("model.layers.") for sensitivity in record.sensitivities]
    assert sites == ["0.self_attn.o_proj", "0.mlp.down_proj", "2.self_attn.o_proj"]


def test_half_precision_is_stored_rounded() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    new = pruned(model)
    assert {weight.dtype for weight in new.parameters()} == {torch.bfloat16}
    assert new.pruning_record.zeros == round(0.5 * new.pruning_record.total)
    assert all(weight.isfinite().all() for weight in matrices(new))


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"exact"}))
def test_other_estimators_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"estimator '{name}' has no effect with recipe 'causal'"):
        config(estimator=name)


@pytest.mark.parametrize("cached", [False, True])
def test_an_interrupt_while_sensitivities_are_measured_leaves_the_model(
    cached: bool,
    llama: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    measure = DivergenceEvaluator.divergences

    def interrupted(self: DivergenceEvaluator, layer: int, *args: Any) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return measure(self, layer, *args)

    before = copy.deepcopy(llama)
    monkeypatch.setattr(DivergenceEvaluator, "divergences", interrupted)
    settings = config(allocation="interventional", resume_dir=tmp_path if cached else None)
    with pytest.raises(KeyboardInterrupt):
        CAPPruner(settings).prune(llama, tiny_tokenizer())
    assert same(llama, before)
    assert not hasattr(llama, "pruning_record")
    kept = (
        f"finished results are stored in {tmp_path}; run the same command again to resume"
        if cached
        else "no resume_dir was set, so the run must start over"
    )
    assert caplog.messages == [f"measuring sensitivities was stopped after 2 of 6 sites: {kept}"]
