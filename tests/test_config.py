"""CAPConfig: validation, versions, round trips."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from optimum_cap import CAPConfig, config
from optimum_cap.config import ESTIMATOR_FIELDS, RECIPES, Method, effective, parse_size
from optimum_cap.methods import ALLOCATIONS, CRITERIA
from optimum_cap.methods.criteria import Criterion


@pytest.mark.parametrize(
    "sparsity", [0, 1, -0.1, 1.5, float("nan"), float("inf"), "20", True, None]
)
def test_sparsity_outside_of_zero_to_one(sparsity: Any) -> None:
    with pytest.raises(ValueError, match="sparsity must be a number strictly between 0 and 1"):
        CAPConfig(sparsity=sparsity)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("recipe", "wnada", r"recipe must be one of .*, got 'wnada' \(did you mean 'wanda'\?\)"),
        ("recipe", "magic", "recipe must be one of causal, causal_fast, .*, got 'magic'"),
        ("aggregation", "mode", "aggregation must be one of median, mean, got 'mode'"),
        ("kv_combination", "sum", "kv_combination must be one of mean, max, got 'sum'"),
        ("scored_tokens", "prompt", "scored_tokens must be one of answer, all, got 'prompt'"),
        (
            "estimator",
            "guess",
            "estimator must be one of exact, plain, first_order, .* got 'guess'",
        ),
        ("exact_examples", 1, "exact_examples must be an integer of at least 2, got 1"),
        ("precision", 0, "precision must be a positive number, got 0"),
        ("precision", "high", "precision must be a positive number, got 'high'"),
        (
            "checkpoint_format",
            "zip",
            "checkpoint_format must be one of packed, coded, dense, got 'zip'",
        ),
        ("num_samples", 0, "num_samples must be an integer of at least 1, got 0"),
        ("num_samples", 1.5, "num_samples must be an integer of at least 1, got 1.5"),
        ("subsets", 0, "subsets must be an integer of at least 1"),
        ("seed", -1, "seed must be an integer of at least 0"),
        ("max_length", 1, "max_length must be an integer of at least 2"),
        ("memory_budget", "much", 'memory_budget must be a number of bytes or text such as "4GB"'),
        ("memory_budget", 0, "memory_budget must be a number of bytes"),
        ("torch_compile", "yes", "torch_compile must be True or False, got 'yes'"),
        ("pattern", "rows", 'pattern must be "unstructured", "experts", "heads"'),
        ("answers", "mine", "answers must be one of dataset, model, got 'mine'"),
        ("temperature", 0, "temperature must be a positive number, got 0"),
        ("top_p", 1.5, "top_p must be at most 1, got 1.5"),
        ("top_p", 0, "top_p must be a positive number, got 0"),
        ("max_new_tokens", 0, "max_new_tokens must be an integer of at least 1, got 0"),
        ("answer_attempts", 0, "answer_attempts must be an integer of at least 1, got 0"),
        ("answer_selection", "long", "answer_selection must be one of right, hard, got 'long'"),
        ("answer_candidates", 0, "answer_candidates must be an integer of at least 1, got 0"),
        ("dataset", "", "dataset is empty"),
        ("dataset", None, "dataset is empty"),
        ("modules_to_leave_dense", "o_proj", "must be a list of module names, got 'o_proj'"),
    ],
)
def test_bad_value_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAPConfig(sparsity=0.2, **{field: value})


@pytest.mark.parametrize("estimator", ["control_variate", "adaptive"])
def test_more_exact_examples_than_examples(estimator: str) -> None:
    with pytest.raises(ValueError, match=r"exact_examples \(16\) of num_samples \(6\)"):
        CAPConfig(sparsity=0.2, recipe="paper", num_samples=6, estimator=estimator)
    assert CAPConfig(sparsity=0.2, num_samples=6).exact_examples == 16


def test_more_subsets_than_examples() -> None:
    with pytest.raises(ValueError, match="subsets is 3, but num_samples is only 2"):
        CAPConfig(sparsity=0.2, recipe="paper", num_samples=2)
    assert CAPConfig(sparsity=0.2, recipe="wanda", num_samples=2).subsets == 3


PASSES = RECIPES["causal"].refine

NO_EFFECT = [
    (
        {"recipe": "wanda", "subsets": 5, "estimator": "first_order"},
        "subsets 5 and estimator 'first_order' have no effect with recipe 'wanda': leave them out, "
        "or choose recipe 'paper' to use them",
    ),
    (
        {"recipe": "magnitude", "num_samples": 64},
        "num_samples 64 has no effect with recipe 'magnitude': leave it out, or choose another "
        "recipe to use it, such as 'causal'",
    ),
    (
        {"recipe": "magnitude", "dataset": ["a text"]},
        "dataset list has no effect with recipe 'magnitude': leave it out, or choose another "
        "recipe to use it, such as 'causal'",
    ),
    (
        {"recipe": "magnitude", "memory_budget": "1GB", "resume_dir": Path("runs")},
        "memory_budget '1GB' and resume_dir 'runs' have no effect with recipe 'magnitude': leave "
        "them out, or choose another recipe to use them, such as 'causal'",
    ),
    (
        {"recipe": "magnitude", "seed": 3},
        "seed 3 has no effect with recipe 'magnitude': leave it out, or choose another recipe to "
        "use it, such as 'causal'",
    ),
    (
        {"criterion": "wanda", "aggregation": "mean"},
        "aggregation 'mean' has no effect with criterion 'wanda': leave it out, or choose "
        "criterion 'causal_score' to use it",
    ),
    (
        {"recipe": "owl_wanda", "criterion": "sparsegpt"},
        "recipe 'owl_wanda' has no effect with criterion 'sparsegpt': leave it out",
    ),
    (
        {"recipe": "paper", "precision": 0.2},
        "precision 0.2 has no effect with recipe 'paper' and estimator 'exact': leave it out, or "
        "choose estimator 'adaptive' to use it",
    ),
    (
        {"recipe": "paper", "mlp_unit_size": 64},
        "mlp_unit_size 64 has no effect with recipe 'paper' and scored_units 'heads': leave it "
        "out, or choose scored_units 'all' to use it",
    ),
    (
        {"torch_compile": True},
        "torch_compile True has no effect with recipe 'causal': leave it out, or choose recipe "
        "'paper' to use it",
    ),
    (
        {"recipe": "paper", "estimator": "first_order", "torch_compile": True},
        "torch_compile True has no effect with recipe 'paper' and estimator 'first_order': leave "
        "it out, or choose estimator 'exact', 'control_variate' or 'adaptive' to use it",
    ),
    (
        {"recipe": "paper", "estimator": "plain", "resume_dir": "runs"},
        "resume_dir 'runs' has no effect with recipe 'paper' and estimator 'plain': leave it out, "
        "or choose estimator 'exact', 'first_order', 'control_variate' or 'adaptive' to use it",
    ),
    (
        {"recipe": "paper", "scores": "scores.safetensors", "memory_budget": "1GB"},
        "memory_budget '1GB' has no effect with recipe 'paper' and scores 'scores.safetensors': "
        "leave it out",
    ),
    (
        {"scores": "scores.safetensors"},
        "scores 'scores.safetensors' has no effect with recipe 'causal': leave it out, or choose "
        "recipe 'paper' to use it",
    ),
    (
        {"recipe": "wanda", "target": "local"},
        "target 'local' has no effect with recipe 'wanda': leave it out, or choose recipe "
        "'causal', 'causal_fast', 'sparsegpt' or 'owl_sparsegpt' to use it",
    ),
    (
        {"criterion": "magnitude", "answer_weight": 2},
        "answer_weight 2 has no effect with criterion 'magnitude': leave it out, or choose "
        "criterion 'wanda', 'sparsegpt' or 'alps' to use it",
    ),
    (
        {"recipe": "paper", "order": "projection"},
        "order 'projection' has no effect with recipe 'paper': leave it out, or choose another "
        "recipe to use it, such as 'causal'",
    ),
    (
        {"recipe": "wanda", "temperature": 0.7, "answer_attempts": 3},
        "temperature 0.7 and answer_attempts 3 have no effect with recipe 'wanda' and answers "
        "'dataset': leave them out, or choose answers 'model' to use them",
    ),
    (
        {"recipe": "magnitude", "answers": "model"},
        "answers 'model' has no effect with recipe 'magnitude': leave it out, or choose another "
        "recipe to use it, such as 'causal'",
    ),
    (
        {"pattern": "heads", "target": "dense"},
        "target 'dense' has no effect with recipe 'causal' and pattern 'heads': leave it out",
    ),
    (
        {"recipe": "paper", "pattern": "heads", "kv_combination": "max"},
        "kv_combination 'max' has no effect with recipe 'paper' and pattern 'heads': leave it out",
    ),
    (
        {"pattern": "2:4", "allocation_bound": 0.2},
        "allocation_bound 0.2 has no effect with recipe 'causal' and pattern '2:4': leave it out",
    ),
    (
        {"recipe": "wanda", "owl_bound": 0.2},
        "owl_bound 0.2 has no effect with recipe 'wanda': leave it out, or choose recipe "
        "'owl_wanda' or 'owl_sparsegpt' to use it",
    ),
    (
        {"recipe": "causal", "allocation": "uniform", "allocation_examples": 20},
        "allocation_examples 20 has no effect with recipe 'causal' and allocation 'uniform': "
        "leave it out",
    ),
    (
        {"recipe": "paper", "refine": 2},
        "refine 2 has no effect with recipe 'paper': leave it out, or choose another recipe to use "
        "it, such as 'causal'",
    ),
    (
        {"criterion": "magnitude", "refine": 2},
        "refine 2 has no effect with criterion 'magnitude': leave it out, or choose criterion "
        "'wanda', 'sparsegpt' or 'alps' to use it",
    ),
    (
        {"pattern": "experts", "strict": True},
        "strict True has no effect with recipe 'causal' and pattern 'experts': leave it out",
    ),
    (
        {"pattern": "layers", "modules_to_leave_dense": ["layers.0"]},
        "modules_to_leave_dense list has no effect with recipe 'causal' and pattern 'layers': "
        "leave it out",
    ),
    (
        {"pattern": "experts", "criterion": "reap", "subsets": 5},
        "subsets 5 has no effect with criterion 'reap' and pattern 'experts': leave it out",
    ),
    (
        {"recipe": "causal_fast", "refine_learning_rate": 0.01},
        "refine_learning_rate 0.01 has no effect with recipe 'causal_fast' and refine 0: leave it "
        "out, or choose recipe 'causal' to use it",
    ),
    (
        {"refine": 0, "refine_learning_rate": 0.01},
        "refine_learning_rate 0.01 has no effect with recipe 'causal' and refine 0: leave it out, "
        f"or choose refine {PASSES} to use it",
    ),
    (
        {"criterion": "sparsegpt", "refine_learning_rate": 0.01},
        "refine_learning_rate 0.01 has no effect with criterion 'sparsegpt' and refine 0: leave it "
        f"out, or choose refine {PASSES} to use it",
    ),
]


@pytest.mark.parametrize(("fields", "message"), NO_EFFECT)
def test_a_field_without_an_effect_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CAPConfig(**{"sparsity": 0.5, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"max_length": 512},
            "max_new_tokens is 512, but an example has at most max_length (512) tokens, its prompt "
            "included: lower the first or raise the second",
        ),
        (
            {"answer_candidates": 100},
            "answer_candidates is 100, but num_samples (128) of them are used: raise the first or "
            "lower the second",
        ),
        (
            {"answer_selection": "hard", "answer_candidates": 128},
            "answer_selection 'hard' has no effect with as many answer_candidates as num_samples "
            "(128): raise the first, or leave one of the two out",
        ),
        (
            {"answer_selection": "hard", "answer_attempts": 1},
            "answer_selection 'hard' tells hard prompts by their wrong answers before a right one, "
            "got answer_attempts 1: set it to at least 2",
        ),
    ],
)
def test_settings_of_answers_that_do_not_fit_each_other(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CAPConfig(0.5, answers="model", **fields)


def test_fields_that_a_choice_uses_are_accepted() -> None:
    CAPConfig(0.5, recipe="wanda", answers="model", resume_dir="runs", memory_budget="1GB")
    CAPConfig(0.5, recipe="paper", scores="f", answers="model", resume_dir="runs", top_p=0.9)
    CAPConfig(0.5, recipe="random", seed=3)
    CAPConfig(0.5, recipe="owl_wanda", owl_bound=0.1, owl_outlier_ratio=4)
    CAPConfig(0.5, criterion="magnitude", allocation="fisher", answer_weight=2, resume_dir="runs")
    CAPConfig(0.5, criterion="magnitude", allocation="owl", num_samples=9, memory_budget="1GB")
    CAPConfig(0.5, criterion="causal_score", allocation="fisher", scores="f", memory_budget="1GB")
    CAPConfig(0.5, recipe="wanda", num_samples=4, scored_tokens="all", order="projection")


def test_every_field_has_its_default_accepted_by_every_recipe() -> None:
    defaults = CAPConfig(0.5).to_dict()
    for recipe in RECIPES:
        for pattern in ("unstructured", "2:4"):
            if pattern == "2:4" and RECIPES[recipe].allocation == "owl":
                continue
            config = CAPConfig(**{**defaults, "recipe": recipe, "pattern": pattern})
            assert CAPConfig.from_dict(config.to_dict()) == config
            assert CAPConfig(**config.to_dict()) == config


def test_what_entries_of_the_tables_say_that_they_use_are_fields() -> None:
    fields = {field.name for field in dataclasses.fields(CAPConfig)}
    for entry in (*CRITERIA.values(), *ALLOCATIONS.values()):
        assert set(entry.fields) <= fields
    for used in ESTIMATOR_FIELDS.values():
        assert set(used) <= fields


def test_a_new_criterion_is_checked_by_what_its_entry_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = CRITERIA["magnitude"].importance
    monkeypatch.setitem(CRITERIA, "noisy", Criterion("noisy", importance=ranked, fields=("seed",)))
    monkeypatch.setitem(config._CHOICES, "criterion", tuple(CRITERIA))
    CAPConfig(0.5, criterion="noisy", seed=2)
    with pytest.raises(ValueError, match="num_samples 4 has no effect with criterion 'noisy'"):
        CAPConfig(0.5, criterion="noisy", num_samples=4)


def test_shared_fields_are_taken_where_they_have_an_effect() -> None:
    shared = {"recipe": "paper", "subsets": 2, "num_samples": 8, "typo": 1}
    assert effective(shared, {"sparsity": 0.5}) == {**shared, "sparsity": 0.5}
    assert effective(shared, {"criterion": "wanda", "subsets": 5}) == {
        "num_samples": 8,
        "typo": 1,
        "criterion": "wanda",
        "subsets": 5,
    }


def test_a_config_from_before_the_estimators_is_exact() -> None:
    values = CAPConfig(sparsity=0.2).to_dict()
    for field in ("estimator", "exact_examples", "precision"):
        del values[field]
    assert CAPConfig.from_dict(values).estimator == "exact"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scored_units": "mlps"}, "scored_units must be one of heads, all, got 'mlps'"),
        ({"scored_units": "all", "mlp_unit_size": 0}, "mlp_unit_size must be an integer of at le"),
    ],
)
def test_units_that_cannot_be_scored(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAPConfig(sparsity=0.2, **changes)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match=r"no field 'sparcity' \(did you mean 'sparsity'\?\)$"):
        CAPConfig(sparsity=0.2, sparcity=0.3)
    with pytest.raises(TypeError, match=r"no field 'warmth'; its fields are aggregation, .*"):
        CAPConfig(sparsity=0.2, warmth=0.3)


def test_a_pattern_implies_the_sparsity() -> None:
    assert CAPConfig(pattern="1:4", recipe="wanda").sparsity == 0.75
    for pattern in ("unstructured", "heads"):
        with pytest.raises(ValueError, match=r"sparsity must be a number .* got nothing"):
            CAPConfig(pattern=pattern)


@pytest.mark.parametrize(
    ("sparsity", "advice"),
    [("20%", "write 0.2 for 20 %"), (20, "write 0.2 for 20 %"), ("half", "")],
)
def test_sparsity_in_percent(sparsity: Any, advice: str) -> None:
    with pytest.raises(ValueError, match=rf", got {sparsity!r}(: )?{advice}$"):
        CAPConfig(sparsity)


def test_round_trips_through_json() -> None:
    config = CAPConfig(
        sparsity=0.35,
        recipe="paper",
        dataset=["gsm8k", {"path": "rows.jsonl", "prompt_column": "q", "answer_column": "a"}],
        num_samples=7,
        subsets=2,
        max_length=99,
        scored_units="all",
        mlp_unit_size=64,
        estimator="adaptive",
        exact_examples=3,
        precision=0.05,
        memory_budget="2GB",
        torch_compile=True,
        modules_to_leave_dense=["layers.0"],
        checkpoint_format="dense",
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert values["quant_method"] == "cap"
    assert CAPConfig.from_dict(values) == config
    assert CAPConfig.from_dict(values).to_dict() == config.to_dict()


def test_from_dict_replaces_fields_and_returns_the_unused() -> None:
    config, unused = CAPConfig.from_dict(
        {"sparsity": 0.2}, return_unused_kwargs=True, seed=3, other=1
    )
    assert config.seed == 3
    assert unused == {"other": 1}


def test_unknown_field_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="config_version 1 has no field 'warmth'; its fields"):
        CAPConfig.from_dict({"sparsity": 0.2, "warmth": 1})
    with pytest.raises(ValueError, match=r"no field 'subset' \(did you mean 'subsets'\?\)$"):
        CAPConfig.from_dict({"sparsity": 0.2}, subset=1)


def test_newer_version_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="config_version 2, but this optimum-cap reads up to 1"):
        CAPConfig.from_dict({"sparsity": 0.2, "config_version": 2, "field_of_the_future": 1})


def test_newer_checkpoint_format_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="format version 99, but this optimum-cap reads up to 2"):
        CAPConfig.from_dict({"sparsity": 0.2, "format_version": 99})


def test_data_in_memory_are_described_not_copied() -> None:
    described = CAPConfig(sparsity=0.2, dataset=[("2+2=", "4")]).to_dict()["dataset"]
    assert described.startswith("in-memory, 1 rows, sha256 ")
    same = CAPConfig(sparsity=0.2, dataset=[("2+2=", "4")]).to_dict()["dataset"]
    other = CAPConfig(sparsity=0.2, dataset=[("2+2=", "5")]).to_dict()["dataset"]
    assert described == same != other


def test_paths_become_text(tmp_path: Path) -> None:
    assert CAPConfig(sparsity=0.2, dataset=tmp_path / "a.jsonl").dataset == str(
        tmp_path / "a.jsonl"
    )
    names = [tmp_path / "a.jsonl", {"path": tmp_path / "b.csv", "text_column": "t"}, "gsm8k"]
    expected = [f"{tmp_path}/a.jsonl", {"path": f"{tmp_path}/b.csv", "text_column": "t"}, "gsm8k"]
    for dataset in (names, tuple(names)):
        assert CAPConfig(sparsity=0.2, dataset=dataset).dataset == expected


@pytest.mark.parametrize(
    ("dataset", "saved"),
    [
        ("/home/me/a.jsonl", "a.jsonl"),
        ("data/a.jsonl", "a.jsonl"),
        ("gsm8k=/home/me/train.jsonl", "gsm8k=train.jsonl"),
        ("/home/me/run=3/a.jsonl", "a.jsonl"),
        ("gsm8k=/home/me/run=3/a.jsonl", "gsm8k=a.jsonl"),
        ("size=3.jsonl", "size=3.jsonl"),
        ({"path": "/home/me/b.csv", "text_column": "t"}, {"path": "b.csv", "text_column": "t"}),
        (["/home/me/a.jsonl", "owner/name"], ["a.jsonl", "owner/name"]),
        ("owner/name", "owner/name"),
        ("gsm8k", "gsm8k"),
    ],
)
def test_folders_of_data_files_are_not_saved(dataset: Any, saved: Any) -> None:
    config = CAPConfig(sparsity=0.2, dataset=dataset)
    assert config.dataset == dataset
    assert config.to_dict()["dataset"] == saved
    assert CAPConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_what_is_no_part_of_the_method_is_not_saved() -> None:
    saved = CAPConfig(sparsity=0.2, tokenizer=object(), resume_dir="scores").to_dict()
    assert not {"tokenizer", "resume_dir"} & set(saved)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), ("5B", 5), ("2KB", 2000), ("1.5GiB", 3 << 29), ("3 mb", 3_000_000)],
)
def test_parse_size(size: Any, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pattern": "heads", "recipe": "sparsegpt"},
            "pattern 'heads' does not take criterion 'sparsegpt' (of recipe 'sparsegpt'): choose "
            "criterion 'causal_score', 'magnitude', 'random', 'wanda' or 'least_squares', or "
            "recipe 'causal' or 'causal_fast'",
        ),
        (
            {"criterion": "reap"},
            "pattern 'unstructured' does not take criterion 'reap': choose criterion "
            "'causal_score', 'magnitude', 'random', 'wanda', 'sparsegpt' or 'alps'",
        ),
        (
            {"pattern": "channels", "recipe": "owl_wanda"},
            "recipe 'owl_wanda' gives matrices different sparsities, but pattern 'channels' "
            "removes as much from every layer: choose recipe 'causal' or 'causal_fast', or set "
            "criterion",
        ),
    ],
)
def test_criteria_choose_what_the_pattern_removes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CAPConfig(sparsity=0.2, **changes)


def test_models_that_lose_parts_are_saved_dense() -> None:
    assert CAPConfig(sparsity=0.2, pattern="layers").checkpoint_format == "dense"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pattern": "2:4", "allocation": "interventional"},
            "'2:4' gives every matrix the same .* got allocation 'interventional': choose",
        ),
        ({"allocation": "global"}, "'alps' prunes layer by layer, so allocation 'global' is not"),
        ({"answer_weight": -1}, "answer_weight other than 0 must be a positive number, got -1"),
        ({"allocation_bound": 0}, "allocation_bound must be a positive number, got 0"),
        ({"allocation_examples": 0}, "allocation_examples must be an integer of at least 1"),
        ({"target": "far"}, "target must be one of local, dense, got 'far'"),
        ({"order": "weight"}, "order must be one of layer, projection, got 'weight'"),
        ({"refine": -1}, "refine must be an integer of at least 0, got -1"),
        ({"refine": 1.5}, "refine must be an integer of at least 0, got 1.5"),
        ({"refine": True}, "refine must be an integer of at least 0, got True"),
        ({"refine_learning_rate": 0}, "refine_learning_rate must be a positive number, got 0"),
        ({"refine_learning_rate": "fast"}, "refine_learning_rate must be a positive .* 'fast'"),
        ({"refine_learning_rate": float("inf")}, "refine_learning_rate must be a positive .* inf"),
    ],
)
def test_choices_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAPConfig(sparsity=0.5, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Method("alps", "fisher", answer_weight=3.0, refine=PASSES)),
        ({"answer_weight": 0}, Method("alps", "fisher", answer_weight=0, refine=PASSES)),
        ({"refine": 1}, Method("alps", "fisher", answer_weight=3.0, refine=1)),
        ({"refine": 0}, RECIPES["causal_fast"]),
        ({"pattern": "2:4"}, Method("alps", "uniform", answer_weight=3.0, refine=PASSES)),
        (
            {"allocation": "interventional", "target": "dense", "order": "projection"},
            Method("alps", "interventional", "dense", "projection", 3.0, PASSES),
        ),
        ({"criterion": "alps"}, Method("alps", "uniform")),
        ({"criterion": "wanda", "refine": 2}, Method("wanda", "uniform", refine=2)),
        (
            {"criterion": "wanda", "order": "projection"},
            Method("wanda", "uniform", order="projection"),
        ),
        ({"recipe": "causal_fast"}, Method("alps", "fisher", "local", "layer", 3.0)),
        (
            {"recipe": "causal_fast", "target": "dense"},
            Method("alps", "fisher", "dense", "layer", 3.0),
        ),
        (
            {"recipe": "causal_fast", "pattern": "heads"},
            Method("least_squares", "uniform", answer_weight=3.0),
        ),
        ({"recipe": "paper", "pattern": "heads"}, Method("causal_score", "uniform")),
        ({"pattern": "experts"}, Method("divergence", "uniform", refine=PASSES)),
        ({"recipe": "causal_fast", "pattern": "experts"}, Method("routed_error", "uniform")),
        ({"pattern": "layers", "criterion": "random"}, Method("random", "uniform")),
        (
            {"pattern": "experts", "criterion": "reap", "refine": 2},
            Method("reap", "uniform", refine=2),
        ),
    ],
)
def test_what_the_default_recipe_comes_to(changes: dict[str, Any], expected: Method) -> None:
    assert CAPConfig(sparsity=0.5, **changes).method == expected


def test_a_format_for_zeros_is_refused_where_parts_are_removed() -> None:
    assert CAPConfig(0.5, pattern="channels").checkpoint_format == "dense"
    with pytest.raises(ValueError, match=r"'coded' leaves out zeros, but pattern 'channels'"):
        CAPConfig(0.5, pattern="channels", checkpoint_format="coded")
