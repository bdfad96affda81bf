"""The evaluation tasks: where their data are, and how a response becomes a final answer.

Rows are read by `data_sources`, as for calibration, so that prompts and digests are the same. A
task is one entry in the table at the foot of this file.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_cap.data import (
    Conversation,
    Source,
    check_folder,
    first_file,
    load_sources,
    row_digest,
)

Extract = Callable[[str], str | None]

_MARKER = "####"
_ROOT = Path(__file__).resolve().parents[2]  # of a checkout
_REASONER_TEST = Path("examples", "tiny_reasoner", "data", "test.jsonl")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: What the user asks.
        answer: The worked answer as published.
        digest: By which calibration recognises the row.
    """

    prompt: str
    answer: str
    digest: str


@dataclass(frozen=True)
class Text:
    """A text to predict.

    Attributes:
        text: The lines as published, joined by blank lines.
        passages: `(start, stop, digest)` per calibration passage, in characters of `text`.
    """

    text: str
    passages: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Document:
    """A text to predict on its own.

    Attributes:
        text: The text as published.
        digest: By which calibration recognises the row.
    """

    text: str
    digest: str


Items = tuple[Question, ...] | tuple[Document, ...] | Text
"""What a task asks: questions, documents, or one long text."""


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    Attributes:
        files: Paths below the data folder where its file may be, the first that exists counts.
        preset: The data set's preset in `data_sources`; `None` for files that are read as they are.
        embedded: Where its file is in a checkout of this code, if it is part of it.
        extract: Takes the final answer from a response, or from the worked answer; `None` for
            texts to predict.
        documents: Whether each row is a text of its own; else the rows are lines of one text.
        fallback: A lenient reading beside `extract`, reported but never counted.
        kind: Of the rows, only those with this `kind`.
        max_new_tokens: Longest response in tokens.
        until: Texts that end a response, beside the end-of-sequence token.
    """

    files: tuple[str, ...]
    preset: str | None = None
    embedded: Path | None = None
    extract: Extract | None = None
    documents: bool = False
    fallback: Extract | None = None
    kind: str | None = None
    max_new_tokens: int = 0
    until: tuple[str, ...] = ()


def resolve_tasks(names: str | Iterable[str]) -> list[str]:
    """Return the names of single tasks, groups expanded, without repetition.

    Args:
        names: Names of tasks or groups; a text may hold several, separated by commas.

    Raises:
        ValueError: A name that is no task or group, or no name at all.
    """
    parts = names.split(",") if isinstance(names, str) else [*names]
    asked = [part.strip() for part in parts if part.strip()]
    if not asked:
        raise ValueError(f"no task was named: choose from {_valid()}")
    for name in asked:
        if name not in TASKS and name not in GROUPS:
            raise ValueError(f"unknown task {name!r}: choose from {_valid()}")
    return list(dict.fromkeys(task for name in asked for task in GROUPS.get(name, (name,))))


def _valid() -> str:
    return ", ".join([*GROUPS, *TASKS])


def load_items(name: str, data_dir: Path | None) -> tuple[Items, dict[str, Any]]:
    """Return what a task asks, and the record of where it is from.

    Args:
        name: A task.
        data_dir: Folder of the files; `None` takes the split `test` from the Hub, or what is part
            of a checkout.

    Raises:
        FileNotFoundError: There is no file of this task; the message says where it was looked for.
        ValueError: The file cannot be used for this task.
    """
    task = TASKS[name]
    if task.extract is not None:
        return _load_questions(name, data_dir)
    return (_load_documents if task.documents else _load_text)(name, data_dir)


def _load_questions(
    name: str, data_dir: Path | None
) -> tuple[tuple[Question, ...], dict[str, Any]]:
    """Return the questions of a task; an answer without a result is a `ValueError`."""
    task = TASKS[name]
    source, details = _load(name, data_dir)
    rows = source.rows
    if task.kind is not None:
        rows = [row for row in rows if isinstance(row, dict) and row.get("kind") == task.kind]
        if not rows:
            raise ValueError(
                f"task {name}: {details['file']} holds no row with the kind {task.kind!r}: "
                "expected the file that examples/tiny_reasoner/train.py writes"
            )
    questions = []
    for row in rows:
        conversation: Conversation = source.read(row)
        *before, (_, answer) = conversation.turns
        prompt = "\n".join(text for _, text in before)
        if extract_of(name)(answer) is None:
            raise ValueError(
                f"task {name}: the answer {answer!r} in {source.name!r} ends without a line "
                f"'{_MARKER} RESULT', so nothing can be compared with it"
            )
        questions.append(Question(prompt, answer, conversation.digest))
    return tuple(questions), details


def _load_documents(
    name: str, data_dir: Path | None
) -> tuple[tuple[Document, ...], dict[str, Any]]:
    """Return the texts of a task, one per row."""
    source, details = _load(name, data_dir)
    conversations = [source.read(row) for row in source.rows]
    return (
        tuple(
            Document(conversation.turns[-1][1], conversation.digest)
            for conversation in conversations
        ),
        details,
    )


def _load_text(name: str, data_dir: Path | None) -> tuple[Text, dict[str, Any]]:
    r"""Return the one text of a task.

    The lines, with their line feeds, are joined by a blank line, as in the field
    (`"\n\n".join(dataset["text"])` over the Hub's rows, where blank lines are empty).
    """
    source, details = _load(name, data_dir)
    if data_dir is not None:
        # The reader of `txt` files strips lines and drops blank ones, which perplexity must not.
        path = _find(name, data_dir)
        with path.open(encoding="utf-8-sig") as file:
            lines = list(file)
    else:
        lines = [row["text"] for row in source.published]
    lines = [line if line.strip() else "" for line in lines]
    return Text("\n\n".join(lines), tuple(_passage_spans(lines, source.rows))), details


def extract_of(name: str) -> Extract:
    """Return the function that takes the final answer of a task from a text."""
    extract = TASKS[name].extract
    if extract is None:
        raise ValueError(f"task {name} measures perplexity and has no answers")
    return extract


def _load(name: str, data_dir: Path | None) -> tuple[Source, dict[str, Any]]:
    preset = TASKS[name].preset
    dataset: Any
    if preset is None:
        dataset = str(_find(name, data_dir))
    elif data_dir is not None:
        dataset = {"path": str(_find(name, data_dir)), "preset": preset}
    else:
        dataset = {"path": preset, "split": "test"}
    (source,) = load_sources(dataset)
    return source, source.details


def _find(name: str, data_dir: Path | None) -> Path:
    task = TASKS[name]
    places = [Path(file) for file in task.files]
    if data_dir is not None:
        check_folder(data_dir)
        places = [data_dir / file for file in places]
    if task.embedded is not None:
        # The checkout is that of this code, or the current folder.
        embedded = [root / task.embedded for root in (_ROOT, Path.cwd())]
        places = embedded if data_dir is None else places + embedded
    return first_file(f"task {name}", places)


def _passage_spans(lines: Sequence[str], passages: Iterable[str]) -> Iterable[tuple[int, int, str]]:
    """Find the passages that calibration draws from in the joined lines."""
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


def extract_marked(text: str) -> str | None:
    """Return the rest of the line after the first `####`; `None` if there is none."""
    _, _, rest = text.partition(_MARKER)
    return (rest.strip().split("\n")[0].strip() or None) if rest else None


def extract_number(text: str) -> str | None:
    """Return the number after `#### `, as lm-evaluation-harness does for GSM8K (strict-match).

    Thousands separators and a final full stop are dropped.
    """
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return _plain_number(match[1]) if match else None


def extract_last_number(text: str) -> str | None:
    """Return the last number, as lm-evaluation-harness does for GSM8K (flexible-extract)."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return _plain_number(found[-1][0] or found[-1][1]) if found else None


def extract_yes_no(text: str) -> str | None:
    """Return `yes` or `no`, the word that follows the first `####`."""
    match = re.match(r"\W*(yes|no)\b", extract_marked(text) or "", re.IGNORECASE)
    return match[1].lower() if match else None


def extract_label(text: str) -> str | None:
    """Return the label of a choice, such as `B` of `#### B`, `#### (B)` or `#### B) a swan`."""
    match = re.match(r"\W*([A-Za-z0-9])\b", extract_marked(text) or "")
    return match[1].upper() if match else None


def _plain_number(text: str) -> str:
    return re.sub(r"[,$]", "", text).removesuffix(".")


# As in the task gsm8k of lm-evaluation-harness: a base model goes on with a next question.
_UNTIL = ("Question:", "</s>", "<|im_end|>")
_REASONER_FILES = ("tiny_reasoner/test.jsonl", "tiny_reasoner/data/test.jsonl", "test.jsonl")

TASKS: dict[str, Task] = {
    "gsm8k": Task(
        ("gsm8k/test.jsonl",),
        preset="gsm8k",
        extract=extract_number,
        fallback=extract_last_number,
        max_new_tokens=512,
        until=_UNTIL,
    ),
    "strategyqa": Task(
        ("strategyqa/test.jsonl", "strategyqa/strategyqa_all_2290.json"),
        preset="strategyqa",
        extract=extract_yes_no,
        max_new_tokens=256,
        until=_UNTIL,
    ),
    "arc_challenge": Task(
        ("arc_challenge/ARC-Challenge-Test.jsonl", "arc_challenge/test.jsonl"),
        preset="arc_challenge",
        extract=extract_label,
        max_new_tokens=256,
        until=_UNTIL,
    ),
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
GROUPS: dict[str, tuple[str, ...]] = {
    "tiny_reasoner": tuple(name for name in TASKS if name.startswith("tiny_reasoner_")),
}
DEFAULT_TASKS = ("gsm8k", "strategyqa", "arc_challenge", "wikitext2")
