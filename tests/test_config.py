"""CAPConfig: validation, versions, round trips."""

import json
from pathlib import Path
from typing import Any

import pytest

from optimum_cap import CAPConfig
from optimum_cap.config import Method, parse_size


@pytest.mark.parametrize(
    "sparsity", [0, 1, -0.1, 1.5, float("nan"), float("inf"), "20", True, None]
)
def test_sparsity_outside_of_zero_to_one(sparsity: Any) -> None:
    with pytest.raises(ValueError, match="sparsity must be a number strictly between 0 and 1"):
        CAPConfig(sparsity=sparsity)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
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
        ("checkpoint_format", "zip", "checkpoint_format must be one of packed, dense, got 'zip'"),
        ("num_samples", 0, "num_samples must be an integer of at least 1, got 0"),
        ("num_samples", 1.5, "num_samples must be an integer of at least 1, got 1.5"),
        ("subsets", 0, "subsets must be an integer of at least 1"),
        ("subsets", 129, "subsets is 129, but num_samples is only 128"),
        ("seed", -1, "seed must be an integer of at least 0"),
        ("max_length", 1, "max_length must be an integer of at least 2"),
        ("memory_budget", "much", 'memory_budget must be a number of bytes or text such as "4GB"'),
        ("memory_budget", 0, "memory_budget must be a number of bytes"),
        ("torch_compile", "yes", "torch_compile must be True or False, got 'yes'"),
        ("pattern", "rows", 'pattern must be "unstructured", "heads", or "N:M"'),
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
        CAPConfig(sparsity=0.2, num_samples=6, estimator=estimator)
    assert CAPConfig(sparsity=0.2, num_samples=6).exact_examples == 16


@pytest.mark.parametrize(
    "fields", [{}, {"recipe": "wanda"}, {"recipe": "paper", "estimator": "first_order"}]
)
def test_compiling_where_nothing_is_compiled(fields: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"torch_compile needs criterion 'causal_score' .* leave torch_com"
    ):
        CAPConfig(sparsity=0.2, torch_compile=True, **fields)


def test_scores_for_a_criterion_without() -> None:
    for recipe, criterion in {"wanda": "wanda", "causal": "alps"}.items():
        message = f"scores need criterion 'causal_score', .* '{criterion}': choose recipe 'paper'"
        with pytest.raises(ValueError, match=message):
            CAPConfig(sparsity=0.2, recipe=recipe, scores="scores.safetensors")


def test_a_config_from_before_the_estimators_is_exact() -> None:
    values = CAPConfig(sparsity=0.2).to_dict()
    for field in ("estimator", "exact_examples", "precision"):
        del values[field]
    assert CAPConfig.from_dict(values).estimator == "exact"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scored_units": "mlps"}, "scored_units must be one of heads, all, got 'mlps'"),
        ({"mlp_unit_size": 64}, r"mlp_unit_size 64 applies to MLPs .* choose scored_units 'all'"),
        ({"scored_units": "all", "mlp_unit_size": 0}, "mlp_unit_size must be an integer of at le"),
    ],
)
def test_units_that_cannot_be_scored(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAPConfig(sparsity=0.2, **changes)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="sparcity"):
        CAPConfig(sparsity=0.2, sparcity=0.3)


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
    with pytest.raises(ValueError, match=r"unknown field\(s\) in the pruning config: warmth"):
        CAPConfig.from_dict({"sparsity": 0.2, "warmth": 1})


def test_newer_version_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="config_version 2, but this optimum-cap reads up to 1"):
        CAPConfig.from_dict({"sparsity": 0.2, "config_version": 2, "field_of_the_future": 1})


def test_newer_checkpoint_format_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="format version 99, but this optimum-cap reads up to 1"):
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


@pytest.mark.parametrize("changes", [{"recipe": "wanda"}, {"allocation": "uniform"}])
def test_whole_heads_need_a_ranking_of_all_heads(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pattern 'heads' ranks all heads"):
        CAPConfig(sparsity=0.2, pattern="heads", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "wanda", "target": "dense"}, "target 'dense' needs one of the criteria sp"),
        ({"criterion": "magnitude", "answer_weight": 2}, "answer_weight 2 needs one of the crite"),
        ({"recipe": "paper", "order": "projection"}, "order 'projection' needs one of the crit"),
        (
            {"pattern": "heads", "target": "dense"},
            "target 'dense' needs .* got criterion 'causal_score'",
        ),
        (
            {"pattern": "2:4", "allocation": "interventional"},
            "'2:4' gives every matrix the same .* got allocation 'interventional': choose",
        ),
        ({"allocation": "global"}, "'alps' prunes layer by layer, so allocation 'global' is not"),
        (
            {"estimator": "adaptive"},
            "'adaptive' needs criterion 'causal_score', .*'alps': .* 'causal_fast'",
        ),
        (
            {"recipe": "wanda", "estimator": "first_order"},
            "'first_order' needs criterion 'causal_score', got",
        ),
        (
            {"recipe": "magnitude", "memory_budget": "1GB"},
            "'1GB' limits activations, .* never runs",
        ),
        ({"answer_weight": -1}, "answer_weight other than 0 must be a positive number, got -1"),
        ({"allocation_bound": 0}, "allocation_bound must be a positive number, got 0"),
        ({"allocation_examples": 0}, "allocation_examples must be an integer of at least 1"),
        ({"target": "far"}, "target must be one of local, dense, got 'far'"),
        ({"order": "weight"}, "order must be one of layer, projection, got 'weight'"),
    ],
)
def test_choices_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAPConfig(sparsity=0.5, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Method("alps", "interventional", "dense", "projection", 3.0)),
        ({"answer_weight": 0}, Method("alps", "interventional", "dense", "projection", 0)),
        ({"pattern": "2:4"}, Method("alps", "uniform", "dense", "projection", 3.0)),
        ({"criterion": "alps"}, Method("alps", "uniform")),
        (
            {"criterion": "wanda", "order": "projection"},
            Method("wanda", "uniform", order="projection"),
        ),
        ({"recipe": "causal_fast"}, Method("alps", "fisher", "local", "layer", 3.0)),
        (
            {"recipe": "causal_fast", "target": "dense"},
            Method("alps", "fisher", "dense", "layer", 3.0),
        ),
        ({"recipe": "causal_fast", "pattern": "heads"}, Method("causal_score", "global")),
        ({"pattern": "heads"}, Method("causal_score", "global")),
        ({"pattern": "heads", "criterion": "random"}, Method("random", "global")),
    ],
)
def test_what_the_default_recipe_comes_to(changes: dict[str, Any], expected: Method) -> None:
    assert CAPConfig(sparsity=0.5, **changes).method == expected
