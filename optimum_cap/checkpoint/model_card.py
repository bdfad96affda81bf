"""The model card of a pruned model: metadata for the Hub, and a summary of the pruning."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from optimum_cap.checkpoint.record import MatrixSparsity, PruningRecord, count_units
from optimum_cap.config import CAPConfig
from optimum_cap.formats import FORMATS
from optimum_cap.methods import ALLOCATIONS, CRITERIA
from optimum_cap.version import install_command

_TAGS = ["optimum-cap", "pruning", "sparse"]
_PIPELINES = {"ForCausalLM": "text-generation", "LMHeadModel": "text-generation"}


def model_card(
    record: PruningRecord,
    class_name: str,
    token: str | bool | None = None,
    tags: list[str] | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        record: The pruning record.
        class_name: Class of the model, which determines the pipeline tag.
        token: Token for reading the card of the base model from the Hub.
        tags: Additional tags.
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
        # The Hub has no relation "pruned"; "quantized" is the one for compressed versions.
        base_model_relation="quantized" if base_repo else None,
        datasets=_hub_datasets(record) or None,
        tags=[
            *_TAGS,
            *(["causal-attribution-pruning"] if CRITERIA[method.criterion].needs_scores else []),
            *(tags or []),
        ],
    )
    needs_plugin = FORMATS[config["checkpoint_format"]].needs_plugin
    base_line = f"[{base}](https://huggingface.co/{base})" if base_repo else _local_name(base)
    if record.base_revision:
        base_line += f" at revision `{record.base_revision}`"
    title = f"{CRITERIA[method.criterion].title}{ALLOCATIONS[method.allocation].title}"
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
        **_unsupported(record),
        "Created with": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
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
        *_loading(needs_plugin),
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
        "`pruning_record.json` has the details: zeros per matrix and, depending on the method, "
        "causal scores, sensitivities of sites and calibration examples.",
        "",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)


def _evidence(record: PruningRecord, sources: str) -> dict[str, str]:
    """Return the table rows about calibration data, scores and sensitivities."""
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
        rows[record.sensitivities_are.capitalize()] = (
            f"{len(sparsities)} sites, each pruned alone; their sparsities range from "
            f"{min(sparsities):.2%} to {max(sparsities):.2%}"
        )
    return rows


def _unsupported(record: PruningRecord) -> dict[str, str]:
    """Return a table row about linear weights that CAP cannot prune, if there are any."""
    if not record.unsupported:
        return {}
    names = ", ".join(f"`{weights.name}`" for weights in record.unsupported)
    share = record.share_of(record.unsupported)
    return {"Not supported, left dense": f"{share:.1%} of the decoder's linear weights: {names}"}


def by_projection(matrices: list[MatrixSparsity]) -> dict[str, tuple[int, int]]:
    """Sum `(zeros, weights)` over the layers and experts of each projection, in model order."""
    sums: dict[str, tuple[int, int]] = {}
    for matrix in matrices:
        name = matrix.name.partition("[")[0].removesuffix(".weight").rpartition(".")[2]
        zeros, total = sums.get(name, (0, 0))
        sums[name] = (zeros + matrix.zeros, total + matrix.total)
    return sums


def _loading(needs_plugin: bool) -> list[str]:
    if not needs_plugin:
        return [
            "The zeros are stored like other weights, so transformers loads it without a plugin:",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("this/repository")',
            "```",
        ]
    return [
        "The zeros are not stored, so loading needs the plugin:",
        "",
        "```bash",
        install_command(),
        "```",
        "",
        "```python",
        "import optimum_cap",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("this/repository")',
        "```",
        "",
        "The result is an ordinary model. Without optimum-cap, loading fails with an error; "
        "`optimum-cli cap convert` writes a checkpoint that loads without the plugin.",
    ]


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _local_name(base: str | None) -> str:
    # Only the last part of the path, because the rest may be private.
    return f"a local folder, `{Path(base).name}`" if base else "not recorded"


def _license(base: str | None, token: str | bool | None) -> str | None:
    """Return the license in the base model's card; `None` if it has none or cannot be read."""
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
