"""The flags for the fields of `CAPConfig`, and how the commands read them."""

import json
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Mapping
from typing import Any

from optimum_cap.commands.parser import DATA, OUTPUT, RUN, CommandParser
from optimum_cap.text import enumeration

# Titles of the groups of flags for CAPConfig.
RECIPE = "recipe"
METHOD = "parts of the recipe (advanced)"
ANSWERS = "the model's own answers"
SCORES = "causal scores, for the recipe paper"


def _or_text(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a conversion that passes on invalid values, which `CAPConfig` checks."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return convert


def _size(text: str) -> int | str:
    return int(text) if text.isdigit() else text


# Flag, field of CAPConfig, type (None for a switch), help. Only flags that were set are passed on,
# so only CAPConfig defines the defaults; a test compares the help texts with them.
_Flags = tuple[tuple[str, str, Any, str], ...]
_RECIPE_FLAGS: _Flags = (
    (
        "--sparsity",
        "sparsity",
        float,
        "fraction of the prunable weights to zero, or of the parts to remove, between 0 and 1; "
        "pattern N:M implies it",
    ),
    (
        "--recipe",
        "recipe",
        str,
        "causal, causal_fast, paper, magnitude, magnitude_global, random, wanda, sparsegpt, "
        "owl_wanda, owl_sparsegpt (default: causal)",
    ),
    (
        "--pattern",
        "pattern",
        str,
        "unstructured; N:M, such as 2:4; experts, heads, channels, layers or structured remove "
        "parts (default: unstructured)",
    ),
)
_DATA_FLAGS: _Flags = (
    ("--num-samples", "num_samples", int, "number of calibration examples (default: 128)"),
    (
        "--max-length",
        "max_length",
        int,
        "longest example, in tokens; longer ones are skipped (default: 2048 or the model's limit)",
    ),
    (
        "--scored-tokens",
        "scored_tokens",
        str,
        "tokens that count in the loss: answer or all (default: answer)",
    ),
    (
        "--answers",
        "answers",
        str,
        "answers to calibrate on: those of the dataset, or model: the dense model's own "
        "(default: dataset)",
    ),
    (
        "--seed",
        "seed",
        int,
        "seed for the selection of examples and the answers of the model (default: 0)",
    ),
)
_METHOD_FLAGS: _Flags = (
    (
        "--criterion",
        "criterion",
        str,
        "causal_score, magnitude, random, wanda, sparsegpt or alps; for parts, see "
        "docs/smaller_models.md (default: the recipe's)",
    ),
    (
        "--allocation",
        "allocation",
        str,
        "zeros per matrix: global, uniform, owl, interventional or fisher (default: the recipe's)",
    ),
    (
        "--allocation-bound",
        "allocation_bound",
        float,
        "most by which interventional and fisher move the sparsity of a site (default: 0.1)",
    ),
    (
        "--allocation-examples",
        "allocation_examples",
        int,
        "examples to measure sensitivities on (default: as many as cost one pass over the "
        "calibration set, at least 16)",
    ),
    (
        "--target",
        "target",
        str,
        "what kept weights are fitted to: outputs of the matrix itself (local) or of the dense "
        "model (dense) (default: the recipe's)",
    ),
    (
        "--order",
        "order",
        str,
        "when inputs are measured again: after each layer (layer), or before each projection "
        "(projection) (default: the recipe's)",
    ),
    (
        "--answer-weight",
        "answer_weight",
        float,
        "extra weight of scored tokens and of the tokens that predict them (default: the recipe's)",
    ),
    (
        "--refine",
        "refine",
        int,
        "passes that fit the kept weights of a layer to the hidden states of the "
        "dense model; 0 for none (default: the recipe's)",
    ),
    (
        "--refine-learning-rate",
        "refine_learning_rate",
        float,
        "learning rate of --refine, relative to the size of the weights (default: 0.006)",
    ),
    (
        "--strict",
        "strict",
        None,
        "refuse a model if some linear weights of its decoder would stay dense (default: False)",
    ),
)
_ANSWERS_FLAGS: _Flags = (
    (
        "--temperature",
        "temperature",
        float,
        "temperature at which the model samples its answers (default: 0.6)",
    ),
    (
        "--top-p",
        "top_p",
        float,
        "tokens are drawn from the fewest that together have this probability (default: 0.95)",
    ),
    (
        "--max-new-tokens",
        "max_new_tokens",
        int,
        "longest answer of the model, in tokens; longer ones are cut off (default: 512)",
    ),
    (
        "--answer-attempts",
        "answer_attempts",
        int,
        "answers of the model to a prompt, at most, until one is right (default: 2)",
    ),
    (
        "--answer-selection",
        "answer_selection",
        str,
        "answers used if there are more than needed: right, or hard of middling length "
        "(default: right)",
    ),
    (
        "--answer-candidates",
        "answer_candidates",
        int,
        "prompts that the model answers (default: num_samples, twice as many if hard)",
    ),
)
_SCORES_FLAGS: _Flags = (
    ("--subsets", "subsets", int, "number of disjoint calibration subsets (default: 3)"),
    (
        "--aggregation",
        "aggregation",
        str,
        "how the losses of the subsets are combined: median or mean (default: median)",
    ),
    (
        "--kv-combination",
        "kv_combination",
        str,
        "how a key/value head combines the importances of its query heads: mean or max "
        "(default: mean)",
    ),
    (
        "--units",
        "scored_units",
        str,
        "units to score: heads, or all (heads, MLPs and experts) (default: heads)",
    ),
    (
        "--mlp-unit-size",
        "mlp_unit_size",
        int,
        "channels per MLP or expert unit, with --units all (default: all channels)",
    ),
    (
        "--estimator",
        "estimator",
        str,
        "how causal scores are obtained: exact, plain, first_order, control_variate or adaptive "
        "(default: exact)",
    ),
    (
        "--exact-examples",
        "exact_examples",
        int,
        "examples measured exactly by control_variate, or per round of adaptive (default: 16)",
    ),
    (
        "--precision",
        "precision",
        float,
        "adaptive stops once 1.96 standard errors are at most this fraction of the range of the "
        "scores (default: 0.1)",
    ),
    (
        "--torch-compile",
        "torch_compile",
        None,
        "compile the decoder layers to measure causal scores; pays off in long GPU runs "
        "(default: False)",
    ),
)
_RUN_FLAGS: _Flags = (
    (
        "--memory-budget",
        "memory_budget",
        _size,
        "memory for activations, e.g. 4GB; auto: half of free memory, or a fixed batch size for "
        "layer-by-layer passes (default: auto)",
    ),
    (
        "--resume-dir",
        "resume_dir",
        str,
        "folder for intermediate results, so that an interrupted run resumes "
        "(default: optimum_cap/resume in HF_HOME)",
    ),
)
_OUTPUT_FLAGS: _Flags = (
    (
        "--format",
        "checkpoint_format",
        str,
        "packed (bit mask and values), coded (the same, compressed) or dense, which loads without "
        "this plugin (default: packed)",
    ),
)
# In the order of `--help`.
_CONFIG_FLAGS = {
    RECIPE: _RECIPE_FLAGS,
    DATA: _DATA_FLAGS,
    METHOD: _METHOD_FLAGS,
    ANSWERS: _ANSWERS_FLAGS,
    SCORES: _SCORES_FLAGS,
    RUN: _RUN_FLAGS,
    OUTPUT: _OUTPUT_FLAGS,
}
_FIELDS = [field for flags in _CONFIG_FLAGS.values() for _, field, _, _ in flags]

# Column of the data set -> its content.
_COLUMN_FLAGS = {
    "prompt": "the prompts",
    "answer": "the answers",
    "text": "plain texts",
    "messages": "chats",
}


def add_config_flags(parser: CommandParser, fields: Collection[str] | None = None) -> None:
    """Add the flags for fields of `CAPConfig`, all by default, for its data set, and the tokenizer.

    The groups of `--help` are those of `_CONFIG_FLAGS`, in their order.
    """
    for title, flags in _CONFIG_FLAGS.items():
        chosen = [each for each in flags if fields is None or each[1] in fields]
        if title == DATA:
            _add_data_flags(parser)
        for flag, field, kind, text in chosen:
            options: dict[str, Any] = {"action": "store_true"}
            if kind is not None:
                options = {"type": _or_text(kind), "metavar": flag.split("-")[-1].upper()}
            parser.group(title)(flag, dest=field, default=SUPPRESS, help=text, **options)


def _add_data_flags(parser: CommandParser) -> None:
    add = parser.group(DATA)
    add(
        "--dataset",
        nargs="+",
        default=SUPPRESS,
        help="preset, preset=path, Hub id, file or JSON specification; several are mixed evenly "
        "(default: gsm8k)",
    )
    for column, of in _COLUMN_FLAGS.items():
        add(
            f"--{column}-column",
            default=SUPPRESS,
            metavar="NAME",
            help=f"column of the data set with {of} (default: found by its name)",
        )
    add("--tokenizer", help="Hub id or folder of the tokenizer (default: the model's)")


def config_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `CAPConfig` that were set on the command line."""
    fields = [*_FIELDS, "modules_to_leave_dense"]
    values = {field: flags[field] for field in fields if field in flags}
    if "dataset" in flags:
        names = [dataset_value(name) for name in flags["dataset"]]
        values["dataset"] = names[0] if len(names) == 1 else names
    columns = {
        f"{column}_column": flags[f"{column}_column"]
        for column in _COLUMN_FLAGS
        if f"{column}_column" in flags
    }
    if columns:
        values["dataset"] = _with_columns(values.get("dataset"), columns)
    return values


def dataset_value(text: str) -> str | dict[str, Any]:
    """Return a data set as given on the command line: a name, or a specification in JSON.

    Raises:
        ValueError: The specification is not a JSON object.
    """
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--dataset {text} is not valid JSON ({error}): write it in single quotes, as in "
            """'{"path": "rows.jsonl", "text_column": "story"}'"""
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"--dataset {text} is a JSON list: write its entries after --dataset, separated by "
            "spaces"
        )
    return value


def _with_columns(dataset: Any, columns: dict[str, str]) -> dict[str, Any]:
    """Return the specification of a data set with the columns given by flags."""
    flags = enumeration([f"--{name.replace('_', '-')}" for name in columns])
    need = "needs" if len(columns) == 1 else "need"
    if dataset is None:
        raise ValueError(f"{flags} {need} a file or a Hub id: add --dataset")
    if isinstance(dataset, list):
        raise ValueError(
            f"{flags} {need} a single data set, got {len(dataset)}: name the columns of each in a "
            """specification, as in --dataset '{"path": "rows.jsonl", "text_column": "story"}'"""
        )
    specification = dict(dataset) if isinstance(dataset, dict) else {"path": dataset}
    if twice := [
        name for name in columns if specification.get(name, columns[name]) != columns[name]
    ]:
        raise ValueError(
            f"--dataset and {flags} name other columns for {', '.join(twice)}: leave one of them "
            "out"
        )
    return {**specification, **columns}
