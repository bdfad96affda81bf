"""The model card of a pruned model: metadata for the Hub, and what was done, in a table."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from optimum_cap.checkpoint.record import MatrixSparsity, PruningRecord, count_units
from optimum_cap.config import CAPConfig
from optimum_cap.methods import CRITERIA

_TAGS = ["optimum-cap", "pruning", "sparse"]
_ALLOCATIONS = {
    "owl": " and OWL (arXiv 2310.05175)",
    "interventional": " and a sparsity for each site by what pruning it alone does",
    "fisher": " and a sparsity for each site by an estimate of what pruning it alone does",
}
_PIPELINES = {"ForCausalLM": "text-generation", "LMHeadModel": "text-generation"}


def model_card(
    record: PruningRecord,
    class_name: str,
    token: str | bool | None = None,
    tags: list[str] | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        record: What was pruned and how.
        class_name: Class of the model, from which the pipeline follows.
        token: Token to read the card of the base model with.
        tags: Further tags.
    """
    config = record.config
    method = CAPConfig.from_dict(config).method
    base = record.base_model
    base_repo = base if base and _is_repo_id(base) else None
    pipelines = [task for ending, task in _PIPELINES.items() if class_name.endswith(ending)]
    data = ModelCardData(
        license=_license(base, token),
        library_name="transformers",
        pipeline_tag=pipelines[0] if pipelines else None,
        base_model=base_repo,
        # The Hub knows no relation "pruned"; its "quantized" stands for any compressed version.
        base_model_relation="quantized" if base_repo else None,
        datasets=_hub_datasets(record) or None,
        tags=[
            *_TAGS,
            *(["causal-attribution-pruning"] if CRITERIA[method.criterion].needs_scores else []),
            *(tags or []),
        ],
    )
    packed = config["checkpoint_format"] == "packed"
    base_line = f"[{base}](https://huggingface.co/{base})" if base_repo else _local_name(base)
    if record.base_revision:
        base_line += f" at revision `{record.base_revision}`"
    title = f"{CRITERIA[method.criterion].title}{_ALLOCATIONS.get(method.allocation, '')}"
    sources = ", ".join(str(source["name"]) for source in record.calibration.get("sources", []))
    rows = {
        "Base model": base_line,
        "Sparsity": f"{record.sparsity:.2%} of {record.total:,} prunable weights are zero",
        "Recipe": f"`{config['recipe']}` (criterion `{method.criterion}`, allocation "
        f"`{method.allocation}`, pattern `{config['pattern']}`)",
        **_evidence(record, sources),
        "Left dense": ", ".join(
            ["embeddings", "norms", "routers", "LM head", *config["modules_to_leave_dense"]]
        ),
        "Made with": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    lines = [
        "# Pruned model",
        "",
        "Pruned by [optimum-cap](https://github.com/optimum-cap/optimum-cap) with "
        f"{title}, without training.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## How to load it",
        "",
        *_loading(packed),
        "",
        "## Zeros per projection",
        "",
        "| projection | weights | zeros |",
        "|---|---|---|",
        *(
            f"| `{name}` | {total:,} | {zeros / total:.2%} |"
            for name, (zeros, total) in by_projection(record.matrices).items()
        ),
        "",
        "More is in `pruning_record.json`: zeros per matrix, and scores, effects of sites and "
        "calibration examples where there are any.",
        "",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)


def _evidence(record: PruningRecord, sources: str) -> dict[str, str]:
    """What the importances rest on."""
    config = record.config
    rows = {}
    if record.calibration:
        rows["Calibration"] = (
            f"{config['num_samples']} examples of {sources or config['dataset']}, seed "
            f"{config['seed']}"
        )
    if record.scores:
        units = count_units(score.kind for score in record.scores)
        rows["Scored"] = (
            f"{units}, on {config['scored_tokens']} tokens; "
            f"{config['aggregation']} of {config['subsets']} subsets"
        )
    if record.sensitivities:
        sparsities = [sensitivity.sparsity for sensitivity in record.sensitivities]
        rows[record.responses_are.capitalize()] = (
            f"{len(sparsities)} sites, each pruned alone; their sparsities are "
            f"{min(sparsities):.2%} to {max(sparsities):.2%}"
        )
    return rows


def by_projection(matrices: list[MatrixSparsity]) -> dict[str, tuple[int, int]]:
    """Sum `(zeros, weights)` over the layers and experts of each projection, in model order."""
    sums: dict[str, tuple[int, int]] = {}
    for matrix in matrices:
        name = matrix.name.partition("[")[0].removesuffix(".weight").rpartition(".")[2]
        zeros, total = sums.get(name, (0, 0))
        sums[name] = (zeros + matrix.zeros, total + matrix.total)
    return sums


def _loading(packed: bool) -> list[str]:
    if not packed:
        return [
            "The zeros are stored like other weights, so any version of transformers loads it:",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("this/repository")',
            "```",
        ]
    return [
        "The zeros are not stored. `pip install optimum-cap`, then",
        "",
        "```python",
        "import optimum_cap",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("this/repository")',
        "```",
        "",
        "gives an ordinary model. Where optimum-cap is not installed, loading stops with an error; "
        "`optimum-cli cap convert` writes a version that needs no plugin.",
    ]


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _local_name(base: str | None) -> str:
    # The name alone: where the folder was on somebody's disk is nobody's business.
    return f"a local folder, `{Path(base).name}`" if base else "not recorded"


def _license(base: str | None, token: str | bool | None) -> str | None:
    """Return the license of the base model's card, if there is one that can be read."""
    if not base:
        return None
    local = Path(base) / "README.md"
    try:
        if Path(base).is_dir():
            card = ModelCard.load(local) if local.is_file() else None
        else:
            card = ModelCard.load(base, token=token if isinstance(token, str) else None)
    except (OSError, ValueError, HfHubHTTPError):
        return None
    license_name: Any = card.data.get("license") if card else None
    return license_name if isinstance(license_name, str) else None


def _hub_datasets(record: PruningRecord) -> list[str]:
    sources = record.calibration.get("sources", [])
    return sorted({source["hub_id"] for source in sources if "hub_id" in source})
