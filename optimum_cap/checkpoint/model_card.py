"""The model card of a pruned model: metadata for the Hub, and a summary of the pruning."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from optimum_cap.checkpoint.digests import PICTURE_NAME
from optimum_cap.checkpoint.pictures import sparsity_picture
from optimum_cap.checkpoint.record import (
    MatrixSparsity,
    PruningRecord,
    count_units,
    count_zeros,
    describe_answers,
    describe_recovery,
    describe_refinement,
    describe_removal,
)
from optimum_cap.config import CAPConfig
from optimum_cap.formats import FORMATS
from optimum_cap.methods import ALLOCATIONS, CRITERIA
from optimum_cap.models import ModelTask, model_task, sees_images
from optimum_cap.text import enumeration, printable
from optimum_cap.version import install_command

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
ZEROS_IN_FILES = "The zeros make the files smaller."
"""Start of the limitation on the card that applies only to the sparse formats."""

_BEGIN_RESULTS, _END_RESULTS = "<!-- results: begin -->", "<!-- results: end -->"
_MARKDOWN = re.compile(r"[\\`*<>\[\]|#&]|(?<!\w)_|_(?!\w)|!(?=\[)|://")
_TAGS = ["optimum-cap", "pruning", "sparse"]
_RECOVERED = ", then trained to predict what the dense model predicts."
_REFINED = (
    "; the kept weights of each layer were then fitted to the hidden states of the dense model."
)


def write_model_card(
    folder: Path,
    record: PruningRecord,
    class_name: str,
    token: str | bool | None = None,
    tags: list[str] | None = None,
    base_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Write README.md and its picture, or warn if they cannot be created.

    A missing card must not fail a save.

    Args:
        folder: Folder of the checkpoint.
        record: As for `model_card`, like the other arguments.
        class_name: Class of the model.
        token: Token for the Hub.
        tags: Additional tags.
        base_folder: Folder the model was loaded from.
    """
    try:
        card = model_card(record, class_name, token, tags, base_folder)
        picture = sparsity_picture(record.matrices) if _has_picture(record) else None
    except Exception as error:
        logger.warning(
            f"the model card could not be created ({type(error).__name__}: {error}), so the "
            "checkpoint is saved without README.md"
        )
    else:
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        (folder / PICTURE_NAME).unlink(missing_ok=True)
        if picture is not None:
            (folder / PICTURE_NAME).write_text(picture, encoding="utf-8")


def _has_picture(record: PruningRecord) -> bool:
    return bool(record.matrices) and not record.removed


def model_card(
    record: PruningRecord,
    class_name: str,
    token: str | bool | None = None,
    tags: list[str] | None = None,
    base_folder: str | os.PathLike[str] | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        record: The pruning record.
        class_name: Class of the model, which determines the pipeline tag and how to load it.
        token: Token for reading the card of the base model from the Hub.
        tags: Additional tags.
        base_folder: Folder the model was loaded from, whose card names the license; the record
            contains no local paths.
    """
    config = record.config
    method = CAPConfig.from_dict(config).method
    base = record.base_model
    base_repo = base if base and _is_repo_id(base) else None
    task = model_task(class_name)
    data = ModelCardData(
        license=_license(base_folder, base_repo, token),
        library_name="transformers",
        pipeline_tag=task.pipeline if task else None,
        base_model=base_repo,
        # The Hub has no relation "pruned"; "quantized" is the one for compressed versions.
        base_model_relation="quantized" if base_repo else None,
        datasets=_hub_datasets(record) or None,
        tags=[
            *(_TAGS[:2] if record.lost_zeros or record.removed else _TAGS),
            *(["causal-attribution-pruning"] if CRITERIA[method.criterion].needs_scores else []),
            *(tags or []),
        ],
    )
    needs_plugin = FORMATS[config["checkpoint_format"]].needs_plugin
    base_line = f"[{base}](https://huggingface.co/{base})" if base_repo else _local_name(base)
    if record.base_revision:
        base_line += f" at revision {_code(record.base_revision)}"
    title = f"{CRITERIA[method.criterion].title}{ALLOCATIONS[method.allocation].title}"
    sources = ", ".join(
        plain_markdown(source["name"]) for source in record.calibration.get("sources", [])
    )
    rows = {
        "Base model": base_line,
        **(
            {"Removed": plain_markdown(describe_removal(record.removed))}
            if record.removed
            else {
                "Sparsity": f"{record.sparsity:.2%} of {record.total:,} prunable weights are zero"
                + _other_zeros(record)
            }
        ),
        **({"Compacted": _compacted(record)} if record.compacted else {}),
        **({"Recovered": _recovered(record)} if record.recovery else {}),
        "Recipe": f"`{config['recipe']}` (criterion `{method.criterion}`, allocation "
        f"`{method.allocation}`, pattern `{config['pattern']}`)",
        **_evidence(record, sources),
        **({} if record.removed else _left_dense(record, class_name)),
        "Created with": ", ".join(
            f"{plain_markdown(name)} {plain_markdown(version)}"
            for name, version in record.versions.items()
        ),
    }
    lines = [
        "# Pruned model",
        "",
        "Pruned by [optimum-cap](https://github.com/optimum-cap/optimum-cap) "
        + (f"with {title}" if not record.removed else f"by removing {_part(record)}")
        + (
            ". The weights have been changed since, which filled zeros."
            if record.lost_zeros
            else _RECOVERED + ("" if record.removed else " Its zeros were kept.")
            if record.recovery
            else _REFINED
            if method.refine
            else ". Pruning took no training."
        ),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## How to use it",
        "",
        *_usage(needs_plugin, task, bool(record.removed or record.compacted)),
        "",
        "## Results",
        "",
        _BEGIN_RESULTS,
        "",
        "Nobody has added results to this card.",
        "",
        _END_RESULTS,
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in _limits(record, sources)),
        "",
        *(_zeros_per_projection(record) if _has_picture(record) else []),
        "`pruning_record.json` has the details: "
        + ("what is kept of the base model" if record.removed else "zeros per matrix")
        + " and, depending on the method, causal scores, sensitivities of sites and calibration "
        "examples. `optimum-cli cap report` makes a page of it.",
        "",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)


def with_results(card: str, section: str, results: list[EvalResult], name: str) -> str:
    """Return the text of a card with its results replaced and the rest unchanged.

    Metadata results of other tasks, which users may have added, are kept too.

    Args:
        card: Text of README.md.
        section: Markdown of the results. It replaces the existing section, or is appended to a card
            without one.
        results: The results for the metadata, which replace existing ones of the same tasks.
        name: Name of the model in the metadata, if it has none yet.

    Raises:
        ValueError: The metadata of the card cannot be read.
    """
    parsed = parsed_card(card)
    names = {each.dataset_name for each in results}
    others = [each for each in parsed.data.eval_results or [] if each.dataset_name not in names]
    parsed.data.eval_results = [*others, *results]
    parsed.data.model_name = parsed.data.model_name or name
    before, begin, rest = parsed.text.partition(_BEGIN_RESULTS)
    _, end, after = rest.partition(_END_RESULTS)
    if not begin or not end:
        before, after = f"{parsed.text.rstrip()}\n\n## Results\n\n", "\n"
    parsed.text = f"{before}{_BEGIN_RESULTS}\n\n{section.strip()}\n\n{_END_RESULTS}{after}"
    return str(parsed)


def results_in(card: str) -> tuple[str, list[EvalResult], str] | None:
    """Return the section, results and name that `with_results` wrote; `None` if there are none.

    Raises:
        ValueError: The metadata of the card cannot be read.
    """
    parsed = parsed_card(card)
    _, begin, rest = parsed.text.partition(_BEGIN_RESULTS)
    section, end, _ = rest.partition(_END_RESULTS)
    if not begin or not end or not parsed.data.eval_results:
        return None
    return section.strip(), parsed.data.eval_results, parsed.data.model_name or ""


def with_base_model(card: str, base_model: str) -> str:
    """Return the text of a card with the base model set to a Hub id.

    Raises:
        ValueError: The metadata of the card cannot be read.
    """
    parsed = parsed_card(card)
    parsed.data.base_model = base_model
    relation = getattr(parsed.data, "base_model_relation", None)
    parsed.data.base_model_relation = relation or "quantized"
    row = f"| Base model | [{base_model}](https://huggingface.co/{base_model}) |"
    parsed.text = re.sub(r"(?m)^\| Base model \|.*\|$", lambda _: row, parsed.text, count=1)
    return str(parsed)


def read_card(file: Path) -> str:
    """Return the text of a card.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): save it as UTF-8") from error


def parsed_card(card: str) -> Any:  # a ModelCard, whose metadata has no types
    """Return a card with its metadata.

    Raises:
        ValueError: The metadata cannot be read.
    """
    try:
        return ModelCard(card)
    except Exception as error:  # YAML and huggingface_hub raise many kinds
        problem = " ".join(str(error).split())
        raise ValueError(
            f"the metadata at the beginning of {CARD_NAME} cannot be read ({problem}): correct it, "
            "or delete the file and save the model again"
        ) from error


def _part(record: PruningRecord) -> str:
    """Return what was removed, and by which criterion."""
    criterion = CRITERIA[CAPConfig.from_dict(record.config).method.criterion]
    parts = enumeration([plain_markdown(each["part"]) for each in record.removed["parts"]])
    if record.config["pattern"] == "structured":
        return f"{parts}, in amounts chosen by their measured effect on the predictions"
    return f"{parts}, chosen by {criterion.title}"


def _recovered(record: PruningRecord) -> str:
    """Return how the model was trained to reproduce the dense model's predictions."""
    return "; then ".join(plain_markdown(describe_recovery(each)) for each in record.recovery)


def _compacted(record: PruningRecord) -> str:
    """Return what was removed later because it was zero."""
    return "; then ".join(plain_markdown(describe_removal(each)) for each in record.compacted)


def _left_dense(record: PruningRecord, class_name: str) -> dict[str, str]:
    """Return the table rows about weights that were not pruned."""
    task = model_task(class_name)
    parts = [
        *("embeddings", "norms", "routers", task.head if task else "LM head"),
        *(["vision part"] if sees_images(class_name) else []),
        *map(plain_markdown, record.config["modules_to_leave_dense"]),
    ]
    return {"Left dense": ", ".join(parts), **_unsupported(record)}


def _zeros_per_projection(record: PruningRecord) -> list[str]:
    return [
        "## Zeros per projection",
        "",
        f"![Sparsity by layer and projection]({PICTURE_NAME})",
        "",
        "| projection | weights | zeros |",
        "|---|---|---|",
        *(
            f"| {_code(name)} | {total:,} | {zeros / total:.2%} |"
            for name, (zeros, total) in by_projection(record.matrices).items()
        ),
        "",
    ]


def _other_zeros(record: PruningRecord) -> str:
    """Return notes on zeros: those before pruning, and those filled since."""
    text = ""
    if record.zeros_before and not record.compacted:  # unknown how many are left after compaction
        text += f"; {record.zeros_before / record.total:.2%} were before pruning"
    if record.lost_zeros:
        text += f"; {(record.zeros_after or 0) / record.total:.2%} were right after pruning"
    return text


def _evidence(record: PruningRecord, sources: str) -> dict[str, str]:
    """Return the table rows about calibration data, scores and sensitivities."""
    config = record.config
    rows = {}
    if record.calibration:
        rows["Calibration"] = (
            f"{config['num_samples']} examples of "
            f"{sources or plain_markdown(str(config['dataset']))}, seed {config['seed']}"
        )
    if answers := record.calibration.get("answers"):
        rows["Answers"] = describe_answers(answers)
    if record.scores:
        units = count_units(score.kind for score in record.scores)
        rows["Scored"] = (
            f"{units}, on {config['scored_tokens']} tokens; "
            f"{config['aggregation']} of {config['subsets']} subsets"
        )
    if record.refine:
        rows["Refined"] = f"{describe_refinement(record.refine)} for each layer"
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
    names = ", ".join(_code(weights.name) for weights in record.unsupported)
    share = record.share_of(record.unsupported)
    return {"Not supported, left dense": f"{share:.1%} of the decoder's linear weights: {names}"}


def by_projection(matrices: list[MatrixSparsity]) -> dict[str, tuple[int, int]]:
    """Sum `(zeros, weights)` of each projection over layers and experts, in model order."""
    sums: dict[str, tuple[int, int]] = {}
    for (_, name), (zeros, total) in count_zeros(matrices).items():
        projection = name.rpartition(".")[2]
        zeros_before, total_before = sums.get(projection, (0, 0))
        sums[projection] = (zeros_before + zeros, total_before + total)
    return sums


def _usage(needs_plugin: bool, task: ModelTask | None, is_smaller: bool) -> list[str]:
    """Return how to install the requirements, load the model and run it."""
    if needs_plugin:
        lines = [
            "The zeros are not stored, so loading needs the plugin:",
            "",
            "```bash",
            install_command(),
            "```",
        ]
    elif is_smaller:
        lines = ["It is an ordinary, smaller model, so transformers loads it without a plugin:"]
    else:
        lines = [
            "The zeros are stored like other weights, so transformers loads it without a plugin:"
        ]
    lines += [
        "",
        "```python",
        *(["import optimum_cap"] if needs_plugin else []),
        *_snippet(task),
        "```",
    ]
    if needs_plugin:
        lines += [
            "",
            "The result is an ordinary model. Without optimum-cap, loading fails with an error; "
            "`optimum-cli cap convert` writes a checkpoint that loads without the plugin.",
        ]
    return lines


def _snippet(task: ModelTask | None) -> list[str]:
    """Return lines of Python that load a model with its tokenizer and run it."""
    auto_class = task.auto_class if task else "AutoModelForCausalLM"
    reads_images = task is not None and task.pipeline == "image-text-to-text"
    reader, name = (
        ("AutoProcessor", "processor") if reads_images else ("AutoTokenizer", "tokenizer")
    )
    lines = [
        f"from transformers import {auto_class}, {reader}",
        "",
        'name = "this/repository"',
        f"model = {auto_class}.from_pretrained(name)",
        f"{name} = {reader}.from_pretrained(name)",
    ]
    if task is not None and task.pipeline != "text-generation":
        return lines
    return [
        *lines,
        "",
        'question = "A pen costs 3 dollars and a book 8. What do 2 pens and a book cost?"',
        "if tokenizer.chat_template:",
        '    messages = [{"role": "user", "content": question}]',
        "    inputs = tokenizer.apply_chat_template(",
        '        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        "    )",
        "else:",
        '    inputs = tokenizer(question, return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=512)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
    ]


def _limits(record: PruningRecord, sources: str) -> list[str]:
    """Return sentences about the limitations of the model."""
    limits = []
    if record.calibration:
        limits.append(
            f"It was calibrated on {sources or 'unknown data'}. On other tasks and in other "
            "languages, it may have lost more: measure it on yours, with `optimum-cli cap eval`."
        )
    else:
        limits.append(
            "No data decided what was removed. Measure the model on your tasks, with `optimum-cli "
            "cap eval`."
        )
    if not record.removed and not record.compacted:
        pattern = record.config["pattern"]
        limits.append(
            f"{ZEROS_IN_FILES} In memory they are weights like others, so the model takes as much "
            "memory and is as fast as its base model"
            + (
                f", unless an engine uses the {pattern} pattern."
                if re.fullmatch(r"\d+:\d+", pattern)
                else "."
            )
        )
    limits.append(
        "Pruned models may answer at greater length, or fail to end. Whether the base model's "
        "biases and refusals have changed has not been examined."
    )
    return limits


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _local_name(base: str | None) -> str:
    # Only the last part of the path; the rest may be private.
    return f"a local folder, {_code(Path(base).name)}" if base else "not recorded"


def _license(
    folder: str | os.PathLike[str] | None, base_repo: str | None, token: str | bool | None
) -> str | None:
    """Return the license from the card in `folder`, or from the base model's card on the Hub.

    `None` if there is none or it cannot be read.
    """
    local = Path(folder) / "README.md" if folder else None
    try:
        if local is not None and local.is_file():
            card = ModelCard.load(local)
        elif base_repo:
            card = ModelCard.load(base_repo, token=token if isinstance(token, str) else None)
        else:
            return None
    except (OSError, ValueError, HfHubHTTPError):
        return None  # it has no card, or the Hub cannot be reached
    except Exception as error:  # such as invalid YAML; metadata must not fail a save
        problem = " ".join(str(error).split())
        logger.warning(
            f"the license of the base model could not be read from its README.md ({problem}), so "
            "the model card names none: add it to the card"
        )
        return None
    license_name: Any = card.data.get("license")
    return license_name if isinstance(license_name, str) else None


def plain_markdown(text: str) -> str:
    """Return text escaped so that Markdown shows it as plain text, also in table cells."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def _code(text: str) -> str:
    """Return text from a record as code for a cell of a Markdown table."""
    plain = printable(text).replace("|", r"\|")
    return f"`{plain}`" if "`" not in plain else plain_markdown(text)


def _hub_datasets(record: PruningRecord) -> list[str]:
    sources = record.calibration.get("sources", [])
    return sorted({source["hub_id"] for source in sources if "hub_id" in source})
