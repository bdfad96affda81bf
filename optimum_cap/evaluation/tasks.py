"""The evaluation tasks: where their data is, and how final answers are extracted from responses.

Rows are read by `optimum_cap.data`, as for calibration, so that prompts and digests are the same.
To add a task, add an entry to `TASKS` at the end of this file.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from optimum_cap.data import (
    PRESETS,
    Conversation,
    Source,
    check_folder,
    first_file,
    load_sources,
    local_presets,
    multiple_choice_parts,
    row_digest,
)
from optimum_cap.text import did_you_mean

Extract = Callable[[str], str | None]
ReadChoices = Callable[[Any], tuple[str, Sequence[str], int]]

HARNESS_PREFIX = "lm_eval:"
"""Marks the name of a task of lm-evaluation-harness, as in `lm_eval:hellaswag`."""

LOSS_PREFIX = "loss:"
"""Marks a data file whose answers are scored, as in `loss:rows.jsonl`."""

logger = logging.get_logger(__name__)

_MARKER = "####"
_ROOT = Path(__file__).resolve().parents[2]  # of a checkout
_REASONER_TEST = Path("examples", "tiny_reasoner", "data", "test.jsonl")


@dataclass(frozen=True)
class Question:
    """A question with its worked answer.

    Attributes:
        conversation: The row; its last turn is the worked answer.
    """

    conversation: Conversation

    @property
    def text(self) -> str:
        """The question, with the turns before it."""
        return "\n\n".join(text for _, text in self.conversation.turns[:-1])

    @property
    def answer(self) -> str:
        """The worked answer as published."""
        return self.conversation.turns[-1][1]

    @property
    def digest(self) -> str:
        """`row_digest` of the row, which identifies it in calibration."""
        return self.conversation.digest


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question whose choices are compared by their likelihood.

    Attributes:
        question: The question, without its choices.
        choices: The text of each choice.
        gold: Position of the right choice.
        digest: `row_digest` of the row, which identifies it in calibration.
    """

    question: str
    choices: tuple[str, ...]
    gold: int
    digest: str


@dataclass(frozen=True)
class Text:
    """One long text for perplexity.

    Attributes:
        text: The lines as published, joined by blank lines.
        passages: `(start, stop, digest)` per calibration passage, as character offsets in `text`.
    """

    text: str
    passages: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Document:
    """One of many separate texts for perplexity.

    Attributes:
        text: The text as published.
        digest: `row_digest` of the row, which identifies it in calibration.
    """

    text: str
    digest: str


Items = tuple[Question, ...] | tuple[ChoiceQuestion, ...] | tuple[Document, ...] | Text
"""The items of a task: questions, documents, or one long text."""


@dataclass(frozen=True)
class TaskItems:
    """The data of a task.

    Attributes:
        items: What the task measures.
        source: Where they come from, for the record.
        examples: Questions from which worked examples are drawn; empty if none can be needed.
        examples_source: Where the examples come from.
    """

    items: Items
    source: dict[str, Any]
    examples: tuple[Any, ...] = ()
    examples_source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Attributes:
        files: Possible paths of its file in the data folder; the first that exists is used.
        preset: Preset of the data set (`PRESETS` in `optimum_cap/data/sources.py`); `None` reads
            its files like any data file.
        embedded: Path of its file in a checkout of this repository, if it contains the file.
        extract: Extracts the final answer from a response or a worked answer; `None` if nothing is
            generated.
        read_choices: Reads question, choices and position of the right choice from a row, if the
            task compares the likelihood of choices.
        instruction: Tells a chat model which form of answer `extract` needs; empty if the task is
            for models trained on this form.
        documents: Whether each row of texts is a separate document; otherwise the rows are lines
            of one text.
        fallback: A lenient extraction in addition to `extract`, reported but not counted.
        kind: Uses only the rows with this `kind`; `None` uses all.
        max_new_tokens: Longest response in tokens.
        until: Texts that end a response, besides the end-of-sequence token.
        loss_only: Whether only the loss on the worked answers is measured, so that nothing is
            generated.
    """

    files: tuple[str, ...]
    preset: str | None = None
    embedded: Path | None = None
    extract: Extract | None = None
    read_choices: ReadChoices | None = None
    instruction: str = ""
    documents: bool = False
    fallback: Extract | None = None
    kind: str | None = None
    max_new_tokens: int = 0
    until: tuple[str, ...] = ()
    loss_only: bool = False

    @property
    def shows_examples(self) -> bool:
        """Whether the task has questions, so that worked examples can precede them."""
        return (self.extract is not None and not self.loss_only) or self.read_choices is not None


def resolve_tasks(names: str | Iterable[str]) -> list[str]:
    """Return the names of tasks with groups expanded and duplicates removed.

    Names with the prefix `lm_eval:` are tasks of lm-evaluation-harness, and `loss:` precedes a file
    name; `load_task_data` looks both up.

    Args:
        names: Names of tasks or groups, as a list or as comma-separated text.

    Raises:
        ValueError: A name is unknown, or there is no name.
    """
    parts = names.split(",") if isinstance(names, str) else [*names]
    requested = [part.strip() for part in parts if part.strip()]
    if not requested:
        raise ValueError(f"tasks is empty: choose from {_valid()}")
    for name in requested:
        if name == HARNESS_PREFIX:
            raise ValueError(
                f"{name!r} names no task of lm-evaluation-harness: write its name after the colon, "
                f"as in {HARNESS_PREFIX}hellaswag"
            )
        if name.startswith(LOSS_PREFIX):
            _check_loss_file(name.removeprefix(LOSS_PREFIX))
        known = [*GROUPS, *TASKS]
        if not name.startswith((HARNESS_PREFIX, LOSS_PREFIX)) and name not in known:
            raise ValueError(
                f"unknown task {name!r}{did_you_mean(name, known)}: choose from {_valid()}"
            )
    return list(dict.fromkeys(task for name in requested for task in GROUPS.get(name, (name,))))


def _check_loss_file(file: str) -> None:
    if not file:
        raise ValueError(
            f"{LOSS_PREFIX!r} names no file: write its path after the colon, as in "
            f"{LOSS_PREFIX}rows.jsonl"
        )
    if file in PRESETS and not Path(file).is_file():
        known = f"{file}_loss"
        advice = f"use the task {known}" if known in TASKS else "use a file of prompts and answers"
        raise ValueError(f"{LOSS_PREFIX}{file} names a preset, not a file: {advice}")


def _valid() -> str:
    return ", ".join([*GROUPS, *TASKS, f"{HARNESS_PREFIX}NAME", f"{LOSS_PREFIX}FILE"])


def task_of(name: str) -> Task:
    """Return the task for a name from `resolve_tasks`, unless it is a harness task."""
    if name.startswith(LOSS_PREFIX):
        return Task((name.removeprefix(LOSS_PREFIX),), extract=_whole, loss_only=True)
    return TASKS[name]


def result_name(name: str) -> str:
    """Return the name of a task in results, without the folder of a file."""
    if name.startswith(LOSS_PREFIX):
        return LOSS_PREFIX + Path(name.removeprefix(LOSS_PREFIX)).name
    return name


def load_items(name: str, data_dir: Path | None) -> tuple[Items, dict[str, Any]]:
    """Return the items of a task and their source.

    Args:
        name: Name of the task.
        data_dir: Folder with the data files; `None` downloads the split `test` from the Hub, or
            uses the file in a checkout of this repository.

    Raises:
        FileNotFoundError: The task has no file; the message names the paths that were tried.
        ValueError: The file cannot be used for this task.
    """
    task = task_of(name)
    if task.extract is None and task.read_choices is None:
        return (_load_documents if task.documents else _load_text)(name, data_dir)
    source = _load(name, data_dir)
    return _questions(name, source), source.details


def load_examples(name: str, data_dir: Path | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the questions from which worked examples are drawn, and their source.

    They come from the split `train`, in `data_dir` or on the Hub; or from the task itself, if it
    has no such split or the folder has no file for it.

    Raises:
        ValueError: The data cannot be used for this task.
    """
    task = task_of(name)
    if task.preset is None:
        source = _load(name, data_dir)
    elif data_dir is None:
        (source,) = load_sources(task.preset)
    else:
        try:
            (source,) = load_sources(local_presets(task.preset, data_dir))
        except FileNotFoundError:
            source = _load(name, data_dir)
    return _questions(name, source), source.details


def _questions(name: str, source: Source) -> tuple[Any, ...]:
    """Return the questions of a task in `source`."""
    read = _read_questions if task_of(name).read_choices is None else _read_choice_questions
    return read(name, source)


def _read_choice_questions(name: str, source: Source) -> tuple[ChoiceQuestion, ...]:
    read_choices = task_of(name).read_choices
    if read_choices is None:
        raise ValueError(f"task {name} has no choices to compare")
    questions = []
    for row in source.rows:
        digest = source.read(row).digest  # checks the row
        question, choices, gold = read_choices(row)
        if len(choices) < 2 or not all(choice.strip() for choice in choices):
            raise ValueError(
                f"task {name}: the question {question!r} in {source.name!r} has the choices "
                f"{choices!r}, but needs at least 2 that are not empty: use another file"
            )
        questions.append(ChoiceQuestion(question, tuple(choices), gold, digest))
    return tuple(questions)


def _read_questions(name: str, source: Source) -> tuple[Question, ...]:
    """Return the questions of a source with their worked answers.

    Raises:
        ValueError: A row has no prompt, a worked answer has no final answer, or no row has the
            task's `kind`.
    """
    task = task_of(name)
    rows = source.rows
    if task.kind is not None:
        rows = [row for row in rows if isinstance(row, dict) and row.get("kind") == task.kind]
        if not rows:
            raise ValueError(
                f"task {name}: {source.name} has no row of kind {task.kind!r}: use the file "
                "that examples/tiny_reasoner/train.py writes"
            )
    questions = []
    empty = 0
    for row in rows:
        conversation: Conversation = source.read(row)
        *before, (role, answer) = conversation.turns
        if not before or role != "assistant":
            raise ValueError(
                f"task {name}: a row of {source.name!r} is not a prompt and an answer, but has the "
                f"roles {', '.join(role for role, _ in conversation.turns)}: use a file of "
                "questions with worked answers"
            )
        if conversation.is_empty and task.loss_only:
            empty += 1
            continue
        if extract_of(name)(answer) is None and not task.loss_only:
            raise ValueError(
                f"task {name}: the answer {answer!r} in {source.name!r} must end with a line "
                f"'{_MARKER} RESULT', with which responses are compared"
            )
        questions.append(Question(conversation))
    if empty == len(rows):
        raise ValueError(
            f"task {name}: all answers in {source.name!r} are empty: use a file of questions with "
            "worked answers"
        )
    if empty:
        logger.warning(
            f"task {name}: {empty} of {len(rows)} rows of {source.name!r} have an empty answer, "
            "and are left out"
        )
    return tuple(questions)


def _load_documents(
    name: str, data_dir: Path | None
) -> tuple[tuple[Document, ...], dict[str, Any]]:
    """Return the documents of a task, one per row."""
    source = _load(name, data_dir)
    conversations = [source.read(row) for row in source.rows]
    documents = (
        Document(conversation.turns[-1][1], conversation.digest) for conversation in conversations
    )
    return tuple(documents), source.details


def _load_text(name: str, data_dir: Path | None) -> tuple[Text, dict[str, Any]]:
    r"""Return the single text of a task.

    The lines, with their line feeds, are joined by blank lines, as is standard for this metric
    (`"\n\n".join(dataset["text"])` over the Hub's rows, where blank lines are empty).
    """
    source = _load(name, data_dir)
    if data_dir is not None:
        # Calibration strips the lines of `txt` files and drops blank ones; perplexity needs both.
        path = _find(name, data_dir)
        with path.open(encoding="utf-8-sig") as file:
            lines = list(file)
    else:
        lines = [row["text"] for row in source.published]
    lines = [line if line.strip() else "" for line in lines]
    return Text("\n\n".join(lines), tuple(_passage_spans(lines, source.rows))), source.details


def extract_of(name: str) -> Extract:
    """Return the function that extracts the final answer of a task from a text.

    Raises:
        ValueError: The task generates no answers.
    """
    extract = task_of(name).extract
    if extract is None:
        raise ValueError(f"task {name} generates no text, so it has no answers to extract")
    return extract


def _load(name: str, data_dir: Path | None) -> Source:
    preset = task_of(name).preset
    dataset: Any
    if name.startswith(LOSS_PREFIX):
        dataset = name.removeprefix(LOSS_PREFIX)
    elif preset is None:
        dataset = str(_find(name, data_dir))
    elif data_dir is not None:
        dataset = {"path": str(_find(name, data_dir)), "preset": preset}
    else:
        dataset = {"path": preset, "split": "test"}
    (source,) = load_sources(dataset)
    return source


def _find(name: str, data_dir: Path | None) -> Path:
    task = task_of(name)
    places = [Path(file) for file in task.files]
    if data_dir is not None:
        check_folder(data_dir)
        places = [data_dir / file for file in places]
    if task.embedded is not None:
        # The current folder may also be a checkout.
        embedded = [root / task.embedded for root in (_ROOT, Path.cwd())]
        places = embedded if data_dir is None else places + embedded
    return first_file(f"task {name}", places)


def _passage_spans(lines: Sequence[str], passages: Iterable[str]) -> Iterable[tuple[int, int, str]]:
    """Yield `(start, stop, digest)` of the calibration passages in the joined lines."""
    starts, position = [], 0
    for line in lines:
        if line.strip():
            starts.append((position, position + len(line)))
        position += len(line) + len("\n\n")
    taken = 0
    for passage in passages:
        count = sum(bool(line.strip()) for line in passage.split("\n"))
        spans = starts[taken : taken + count]
        taken += count
        if spans:
            yield spans[0][0], spans[-1][1], row_digest("", passage)


# Final answers


def _whole(text: str) -> str | None:
    """Return a whole answer; only its loss is measured."""
    return text or None


def extract_marked(text: str) -> str | None:
    """Return the rest of the line after the first `####`; `None` if there is none."""
    _, _, rest = text.partition(_MARKER)
    return (rest.strip().split("\n")[0].strip() or None) if rest else None


def extract_number(text: str) -> str | None:
    """Return the number after `#### `, as lm-evaluation-harness does for GSM8K (strict-match).

    Thousands separators and a final full stop are removed. `None` if there is no such number.
    """
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return _plain_number(match[1]) if match else None


def extract_last_number(text: str) -> str | None:
    """Return the last number, as lm-evaluation-harness does for GSM8K (flexible-extract)."""
    numbers = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return _plain_number(numbers[-1][0] or numbers[-1][1]) if numbers else None


def extract_yes_no(text: str) -> str | None:
    """Return `yes` or `no` after the first `####` that one of them follows, else `None`.

    Other `####` are headings, which chat models also write.
    """
    match = re.search(_MARKER + r"\W*(yes|no)\b", text, re.IGNORECASE)
    return match[1].lower() if match else None


def extract_label(text: str) -> str | None:
    """Return the label of a choice, such as `B` from `#### B`, `#### (B)` or `#### B) a swan`.

    The label comes after the first `####` followed by a single letter or digit.
    """
    match = re.search(_MARKER + r"\W*([A-Za-z0-9])\b", text)
    return match[1].upper() if match else None


def _plain_number(text: str) -> str:
    return re.sub(r"[,$]", "", text).removesuffix(".")


# Choices


def _arc_choices(row: Any) -> tuple[str, Sequence[str], int]:
    question, choices, label = multiple_choice_parts(row)
    return question, [text for _, text in choices], [each for each, _ in choices].index(label)


def _yes_no_choices(row: Any) -> tuple[str, Sequence[str], int]:
    return row["question"], ("yes", "no"), 0 if row["answer"] else 1


# As in the gsm8k task of lm-evaluation-harness: a base model continues with the next question.
_UNTIL = ("Question:", "</s>", "<|im_end|>")
# Without an example answer: small models would copy it as their own answer.
_REASON = 'Reason step by step, and end with a line of "#### " followed by the final answer,'
_STRATEGYQA_FILES = ("strategyqa/test.jsonl", "strategyqa/strategyqa_all_2290.json")
_ARC_FILES = ("arc_challenge/ARC-Challenge-Test.jsonl", "arc_challenge/test.jsonl")
_REASONER_FILES = ("tiny_reasoner/test.jsonl", "tiny_reasoner/data/test.jsonl", "test.jsonl")

TASKS: dict[str, Task] = {
    "gsm8k": Task(
        ("gsm8k/test.jsonl",),
        preset="gsm8k",
        extract=extract_number,
        instruction=f"{_REASON} a plain number.",
        fallback=extract_last_number,
        max_new_tokens=512,
        until=_UNTIL,
    ),
    "strategyqa": Task(
        _STRATEGYQA_FILES,
        preset="strategyqa",
        extract=extract_yes_no,
        instruction=f"{_REASON} yes or no.",
        max_new_tokens=256,
        until=_UNTIL,
    ),
    "arc_challenge": Task(
        _ARC_FILES,
        preset="arc_challenge",
        extract=extract_label,
        instruction=f"{_REASON} the label of the right choice.",
        max_new_tokens=256,
        until=_UNTIL,
    ),
    "strategyqa_choices": Task(
        _STRATEGYQA_FILES, preset="strategyqa", read_choices=_yes_no_choices
    ),
    "arc_challenge_choices": Task(_ARC_FILES, preset="arc_challenge", read_choices=_arc_choices),
    "wikitext2": Task(
        ("wikitext-2/test.txt", "wikitext2/test.txt"),
        preset="wikitext2",
    ),
    "tinystories": Task(("tinystories/stories_clean.jsonl",), documents=True),
    **{
        f"tiny_reasoner_{kind}": Task(
            _REASONER_FILES,
            embedded=_REASONER_TEST,
            extract=extract_marked,
            kind=kind,
            max_new_tokens=96,
        )
        for kind in ("arithmetic", "yes_no", "multiple_choice")
    },
}
TASKS |= {
    f"{name}_loss": replace(
        TASKS[name],
        instruction="",
        fallback=None,
        max_new_tokens=0,
        until=(),
        loss_only=True,
    )
    for name in ("gsm8k", "strategyqa", "arc_challenge")
}
GROUPS: dict[str, tuple[str, ...]] = {
    "tiny_reasoner": tuple(name for name in TASKS if name.startswith("tiny_reasoner_")),
}
DEFAULT_TASKS = ("gsm8k", "strategyqa", "arc_challenge", "wikitext2")
