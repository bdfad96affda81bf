"""The model card of a quantized pruned model."""

from pathlib import Path

from huggingface_hub import ModelCardData

from optimum_cap.checkpoint import ZEROS_IN_FILES, parsed_card, read_card
from optimum_cap.quantization.schemes import Scheme

_TABLE = "| | |\n|---|---|\n"
_LIMITS = "## Limits\n\n"


def quantized_card(source: Path, name: str, scheme: Scheme, auto_class: str) -> str:
    """Return the text of README.md, with metadata and facts from the sparse model's card.

    Args:
        source: Folder of the sparse checkpoint.
        name: Name of the scheme.
        scheme: The scheme.
        auto_class: Auto class of transformers that loads the model.

    Raises:
        ValueError: The sparse model's card cannot be read.
    """
    file = source / "README.md"
    card = parsed_card(read_card(file)) if file.is_file() else None
    data = card.data if card else ModelCardData(library_name="transformers")
    data.eval_results = data.model_name = None  # they were measured with other weights
    facts = card.text.partition(_TABLE)[2].partition("\n\n")[0] if card else ""
    listed = card.text.partition(_LIMITS)[2].partition("\n\n")[0] if card else ""
    limits = [line for line in listed.splitlines() if not line.startswith(f"- {ZEROS_IN_FILES}")]
    zeros = (
        " Weights that pruning set to zero are still exactly zero, but stored like all others, so "
        "the files take the space of the quantized dense model."
        if "| Sparsity |" in facts
        else ""
    )
    lines = [
        "# Pruned and quantized model",
        "",
        "Pruned by [optimum-cap](https://github.com/optimum-cap/optimum-cap), then quantized to "
        f"{scheme.title}.{zeros}",
        "",
        f"{_TABLE}| Quantized | `{name}`: {scheme.title} |",
        *([facts] if facts else []),
        "",
        "## How to load it",
        "",
        f"transformers loads it with {scheme.package}, without optimum-cap:",
        "",
        "```bash",
        f"pip install '{scheme.requirement}'",
        "```",
        "",
        "```python",
        f"from transformers import {auto_class}",
        f'model = {auto_class}.from_pretrained("this/repository")',
        "```",
        "",
        f"{_LIMITS}- Results of the pruned model are not those of the quantized one, which has not "
        "been measured.",
        *limits,
        "",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)
