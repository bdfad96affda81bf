"""`cap estimate --pattern`: sizes against smaller models, counted work against real choices."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command_line import run_cap
from helpers.paths import EXAMPLES
from helpers.tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.data.calibration import CalibrationExample
from optimum_cap.estimation.costs import CostModel
from optimum_cap.estimation.disk import SIZES, coded_share
from optimum_cap.estimation.hardware import find_hardware
from optimum_cap.estimation.parts import CHOICES, RemovalCosts, RemovedParts, _layer_trials
from optimum_cap.estimation.run import estimate, load_config, size_of, study_hours, work_of
from optimum_cap.estimation.structured import MeasuredParts
from optimum_cap.estimation.work import Workload
from optimum_cap.formats import FORMATS
from optimum_cap.methods import CRITERIA
from optimum_cap.models import CannotRemoveError, evaluation_mode
from optimum_cap.pruning import CANDIDATES, MEASURED_EXAMPLES
from optimum_cap.pruning.removal import PartRemoval
from optimum_cap.runtime import ALONE

CONFIGS = EXAMPLES / "configs"
DATA = [{"prompt": f"{n} + {n} = ", "completion": f"{2 * n}"} for n in range(8)]
SHAPE = Workload(examples=4, tokens=48, scored=20)


def costs_of(model: PreTrainedModel, pattern: str, sparsity: float, **fields: Any) -> RemovalCosts:
    parts = RemovedParts.of(model.config, CAPConfig(sparsity, pattern=pattern, **fields))
    work = work_of(model.config)
    return RemovalCosts(parts, CostModel(work, find_hardware("h100", size_of(work, 48)), 4))


def examples() -> list[CalibrationExample]:
    scored = torch.arange(SHAPE.tokens) >= SHAPE.tokens - SHAPE.scored
    generator = torch.Generator().manual_seed(0)
    return [
        CalibrationExample(
            torch.randint(3, VOCABULARY, (SHAPE.tokens,), generator=generator), scored, "", i, ""
        )
        for i in range(SHAPE.examples)
    ]


# What is left


@pytest.mark.parametrize(
    ("architecture", "pattern", "dtype"),
    [
        ("llama", "channels", torch.float32),
        ("llama", "heads", torch.bfloat16),
        ("llama", "layers", torch.float32),
        ("qwen3_moe", "experts", torch.bfloat16),
    ],
)
def test_what_is_left_is_what_pruning_leaves(
    architecture: str, pattern: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(architecture).to(dtype)
    model.config.dtype = dtype
    found = estimate(model.config, "h100", pattern=pattern, sparsity=0.5)
    CAPPruner(CAPConfig(0.5, pattern=pattern, recipe="random")).prune(model)
    smaller, removed = found.smaller, model.pruning_record.removed
    assert smaller is not None
    assert smaller.parameters == model.num_parameters()
    [part] = removed["parts"]
    assert (smaller.before, smaller.after) == (part["before"], part["after"])
    assert found.parameters == removed["parameters_before"]
    model.save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    assert smaller.disk == len(data) - 8 - int.from_bytes(data[:8], "little")
    assert found.checkpoint == {"dense": smaller.disk}


def test_what_multiplies_a_token_bounds_the_speed() -> None:
    experts = estimate(CONFIGS / "mixtral-8x7b.json", "h100", pattern="experts", sparsity=0.25)
    assert experts.smaller is not None
    assert experts.smaller.parameters < 0.8 * experts.parameters
    assert 0.999 < experts.smaller.weights_left < 1, "as many experts are active as before"
    model = tiny_model("llama")
    costs = costs_of(model, "channels", 0.4)
    assert costs.parts.dense.multiplied - costs.parts.smaller.multiplied == 3 * 3 * 24 * 8


def test_layers_of_several_sizes_are_named() -> None:
    found = estimate(tiny_model("qwen3_moe").config, "h100", pattern="layers", sparsity=0.3)
    assert "layers differ in size, without layers 1 to 1" in " ".join(found.table().split())
    found = estimate(tiny_model("llama").config, "h100", pattern="layers", sparsity=0.3)
    assert "differ" not in found.table()


# Work


def chosen(model: PreTrainedModel, pattern: str, criterion: str, sparsity: float) -> int:
    """Operations that PyTorch counts while parts are chosen."""
    config = CAPConfig(sparsity, pattern=pattern, criterion=criterion, dataset="gsm8k")
    removal = PartRemoval(model, config, ALONE)
    assert len(removal.view.output_templates) == 3  # found before, as no estimate counts them
    with evaluation_mode(model), FlopCounterMode(display=False) as counter:
        removal.choose(examples(), {}, None)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("architecture", "pattern", "criterion", "sparsity", "tolerated"),
    [
        ("llama", "layers", "divergence", 0.34, 1e-3),
        pytest.param("llama", "layers", "divergence", 0.67, 1e-3, marks=pytest.mark.slow),
        ("llama", "layers", "block_influence", 0.34, 1e-3),
        ("llama", "channels", "wanda", 0.4, 1e-3),
        # Within 2 %: the router runs once more for each batch of which experts are listed.
        pytest.param("mixtral", "experts", "divergence", 0.5, 0.02, marks=pytest.mark.slow),
        pytest.param("mixtral", "experts", "frequency", 0.5, 0.02, marks=pytest.mark.slow),
        pytest.param("mixtral", "experts", "reap", 0.5, 0.02, marks=pytest.mark.slow),
        ("mixtral", "experts", "routed_error", 0.5, 0.02),
    ],
)
def test_choices_take_the_operations_that_pytorch_counts(
    architecture: str, pattern: str, criterion: str, sparsity: float, tolerated: float
) -> None:
    model = tiny_model(architecture, attn_implementation="eager", experts_implementation="eager")
    part = CHOICES[criterion](costs_of(model, pattern, sparsity), SHAPE)
    counted = chosen(model, pattern, criterion, sparsity)
    assert part.operations == pytest.approx(counted, rel=tolerated)


@pytest.mark.parametrize(("pattern", "width"), [("channels", 20), ("heads", 32)])
def test_columns_take_the_operations_that_pytorch_counts(pattern: str, width: int) -> None:
    model = tiny_model("llama", attn_implementation="eager")
    costs = costs_of(model, pattern, 0.5)
    operations = CHOICES["least_squares"](costs, SHAPE).operations
    if pattern == "heads":  # systems of equations, which PyTorch does not count
        size, groups, outputs = 16, 2, 24
        operations -= 3 * groups * (2 / 3 * size**3 + 2 * size**2 * outputs)
    # Nor does it count factors of Hessians, and products that are added in place.
    uncounted = 3 * (width**3 + 2 * SHAPE.examples * SHAPE.tokens * width**2)
    counted = chosen(model, pattern, "least_squares", 0.5)
    assert operations - uncounted == pytest.approx(counted, rel=1e-3)


@pytest.mark.slow
def test_only_the_best_layers_are_tried_again() -> None:
    config = load_config(CONFIGS / "llama-3-8b.json")
    parts = RemovedParts.of(config, CAPConfig(0.1, pattern="layers"))
    few = replace(SHAPE, examples=MEASURED_EXAMPLES)
    one_pass, compared = parts.dense.layer_passes(few), parts.dense.divergence(few)
    trials, layers = 32 + CANDIDATES * 2, 32
    assert parts.count == 3
    advancing = 1 + 1 + 31 / 32 + 30 / 32
    passes = (31 * 32 / 2 + CANDIDATES * (30 + 29) / 2) / layers
    expected = (advancing + passes) * one_pass + trials * compared
    assert _layer_trials(parts, few).operations == pytest.approx(expected.operations)


def test_of_many_experts_a_few_are_tried() -> None:
    few, many, twice = (
        CHOICES["divergence"](
            costs_of(tiny_model("mixtral", num_local_experts=number), "experts", sparsity), SHAPE
        ).operations
        for number, sparsity in ((8, 0.25), (16, 0.125), (16, 0.25))
    )
    assert few < many < 1.5 * few, "of 16, as many are tried as of 8"
    assert 1.8 < twice / many < 2.2


@pytest.mark.slow
def test_processes_share_the_refinement() -> None:
    options = {"pattern": "channels", "sparsity": 0.25}
    one, two = (
        {cost.step: cost for cost in estimate(CONFIGS / "llama-3-8b.json", name, **options).costs}
        for name in ("h100", "h100x2")
    )
    assert two["choose"].seconds == one["choose"].seconds
    assert two["refine"].seconds == pytest.approx(one["refine"].seconds / 2)


@pytest.mark.slow
def test_a_recipe_consists_of_its_steps() -> None:
    found = estimate(CONFIGS / "llama-3-8b.json", "h100", pattern="channels", sparsity=0.25)
    cost = {(each.step, each.name): each for each in found.costs}
    choose, refine = cost["choose", "least_squares"], cost["refine", "3 passes"]
    causal, fast = cost["prune", "causal"], cost["prune", "causal_fast"]
    assert fast.seconds > choose.seconds
    assert causal.seconds == pytest.approx(fast.seconds + refine.seconds)
    assert causal.memory >= fast.memory > found.weight_bytes
    assert fast.disk == found.checkpoint["dense"] < causal.disk


def test_every_criterion_of_parts_has_a_cost() -> None:
    assert set(CHOICES) == {name for name, criterion in CRITERIA.items() if criterion.parts}


# Refusals


@pytest.mark.parametrize(
    ("pattern", "sparsity", "message"),
    [
        ("experts", 0.5, "^LlamaForCausalLM has no experts that CAP knows"),
        ("layers", 0.1, "^sparsity 0.1 of 3 layers is 0 layers: choose a sparsity that removes"),
        ("heads", 0.9, "^sparsity 0.9 of 2 heads is 2 heads"),
    ],
)
def test_what_pruning_refuses_is_refused(pattern: str, sparsity: float, message: str) -> None:
    with pytest.raises(CannotRemoveError, match=message):
        estimate(tiny_model("llama").config, "measured", pattern=pattern, sparsity=sparsity)


def test_heads_of_which_a_model_computes_something_together_are_refused() -> None:
    with pytest.raises(CannotRemoveError, match="computes something of all heads of"):
        estimate(tiny_model("olmoe").config, "h100", pattern="heads", sparsity=0.5)


def test_other_patterns_are_named() -> None:
    with pytest.raises(ValueError, match=r"^there is no estimate for pattern '2:4': choose 'exp"):
        estimate(CONFIGS / "llama-3-8b.json", "h100", pattern="2:4")


# Disk


@pytest.mark.parametrize(
    ("sparsity", "measured"), [(0.0, 0.67), (0.2, 0.55), (0.5, 0.3665), (0.7, 0.235)]
)
def test_coded_matrices_are_as_small_as_those_of_smollm2(sparsity: float, measured: float) -> None:
    # docs/performance.md has the measured shares; the first is that of the embedding.
    assert coded_share(sparsity, torch.bfloat16) == pytest.approx(measured, rel=0.03)


def test_every_format_has_a_size() -> None:
    assert SIZES.keys() == FORMATS.keys()
    work = work_of(load_config(CONFIGS / "llama-3-8b.json"))
    sizes = {name: size(work, 0.5, torch.bfloat16) for name, size in SIZES.items()}
    assert sizes["coded"] < sizes["packed"] < sizes["dense"] == 2 * work.parameters
    assert SIZES["packed"](work, 0.01, torch.bfloat16) == sizes["dense"], "packed only if smaller"
    assert coded_share(0.5, torch.float32) < coded_share(0.0, torch.float32) < 1


# The command


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `optimum-cli cap estimate` in this process: exit status, stdout, stderr."""
    return lambda *arguments: run_cap(monkeypatch, capfd, ["estimate", *arguments])


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    tiny_model("mixtral").config.save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_the_command_estimates_the_removal_of_parts(
    run: Callable[..., tuple[int, str, str]], config_file: Path
) -> None:
    flags = ("--hardware", "h100", "--pattern", "experts", "--sparsity", "0.25")
    status, out, err = run(config_file, *flags)
    assert (status, err) == (0, "")
    assert "removed       1 of 4 experts of each layer" in out
    steps = [line.split()[:2] for line in out.splitlines()[-5:]]
    assert steps == [
        ["choose", "divergence"],
        ["choose", "routed_error"],
        ["refine", "3"],
        ["prune", "causal"],
        ["prune", "causal_fast"],
    ]
    values = json.loads(run(config_file, *flags, "--json")[1])
    assert values["smaller"]["after"] == 3
    assert values["checkpoint"] == {"dense": values["smaller"]["disk"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--pattern", "channels", "--limit", "3"),
            "--limit has no effect with --pattern channels",
        ),
        (("--pattern", "rows"), "error: there is no estimate for pattern 'rows'"),
        (("--pattern", "layers", "--sparsity", "0.01"), "error: sparsity 0.01 of 3 layers is 0"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(
    run: Callable[..., tuple[int, str, str]],
    config_file: Path,
    flags: tuple[str, ...],
    message: str,
) -> None:
    status, out, err = run(config_file, "--hardware", "h100", *flags)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_study_counts_the_removal_of_parts(tmp_path: Path, config_file: Path) -> None:
    file = tmp_path / "study.yaml"

    def pruning(recipe: dict[str, str]) -> float:
        values = {
            "models": {"mixtral": str(config_file)},
            "recipes": {"only": recipe},
            "sparsities": [0.5],
            "calibration": {"sums": "gsm8k"},
            "tasks": ["gsm8k"],
        }
        file.write_text(yaml.safe_dump(values))
        return study_hours(file, "h100", tokens=48).rows["mixtral"]["pruning"]

    causal = pruning({"pattern": "experts"})
    fast = pruning({"recipe": "causal_fast", "pattern": "experts"})
    assert 0 < pruning({"recipe": "random", "pattern": "experts"}) < fast < causal
    assert pruning({"pattern": "structured"}) > 0


# Parts of several kinds


def test_structured_removal_is_estimated_by_its_steps() -> None:
    model = tiny_model("llama")
    found = estimate(model.config, "h100", examples=4, tokens=48, pattern="structured")
    steps = {(cost.step, cost.name): cost for cost in found.costs}
    measured = [cost for (step, _), cost in steps.items() if step == "measure"]
    assert [cost.name for cost in measured] == ["layers", "heads", "channels"]
    fast, causal = steps["prune", "causal_fast"], steps["prune", "causal"]
    # Channels and heads are chosen once more at the end.
    assert sum(cost.operations for cost in measured) < fast.operations
    refined = steps["refine", "3 passes"]
    assert causal.operations == pytest.approx(fast.operations + refined.operations)
    smaller = found.smaller
    assert smaller is not None
    assert smaller.parameters == round(0.5 * model.num_parameters())
    assert found.checkpoint == {"dense": smaller.disk}
    assert "about" in found.table()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_kinds_and_numbers_are_those_that_a_run_measures(architecture: str) -> None:
    model = tiny_model(architecture)
    config = CAPConfig(0.3, pattern="structured", recipe="causal_fast", dataset=DATA, num_samples=4)
    kinds = MeasuredParts.of(model.config, config).kinds
    numbers = {(name, parts.count) for name, counts in kinds.items() for parts in counts}
    CAPPruner(config).prune(model, tiny_tokenizer())
    *measured, _ = model.pruning_record.removed["measured"]
    assert {(each["part"], each["removed"]) for each in measured} == numbers


def test_a_model_without_enough_parameters_in_its_parts_is_refused() -> None:
    with pytest.raises(CannotRemoveError, match="choose a lower sparsity"):
        estimate(tiny_model("llama").config, "h100", pattern="structured", sparsity=0.99)
