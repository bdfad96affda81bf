"""Data sources: presets, files, Hub ids and Python objects, read as rows of conversations."""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optimum_cap.config import is_dataset_name
from optimum_cap.version import install_command

ROW_DIGEST, FINISHED = "row_digest", "finished"
"""Columns of the rows that `cap generate` writes, other than prompt and answer: the digest of the
prompt's row, and whether the model ended its answer before the token limit."""

_PASSAGE_CHARACTERS = 4000
_SHOWN = 200  # characters of a value that an error shows


@dataclass(frozen=True)
class Conversation:
    """A row of a data set.

    Attributes:
        turns: `(role, text)` of each message; a plain text is one turn with the role `"text"`.
        messages: The messages with all their keys, in the form for chat templates; empty if they
            only have a role and a text. `content` is a text or a list of parts `{"type": "text",
            "text": ...}`.
        variables: The row's other inputs for the chat template: `tools`, `documents`, and the
            entries of `chat_template_kwargs`.
        finished: Whether the last turn is complete. If it was cut off, its end is not marked.
        replaced_digest: The digest of the original row, if its answer was replaced by the last
            turn.
        images: Its images in the order of the parts `{"type": "image"}` in the messages: PIL
            images, paths, URLs, or mappings with `bytes` or `path`.
    """

    turns: tuple[tuple[str, str], ...]
    messages: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = True
    replaced_digest: str | None = None
    images: tuple[Any, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the last turn has no text, no tool call and no reasoning."""
        message = self.messages[-1] if self.messages else {}
        return not self.turns[-1][1].strip() and not tool_names(message) and not reasoning(message)

    @property
    def digest(self) -> str:
        """`row_digest` of the row, or of the original row if its answer was replaced."""
        if self.replaced_digest is not None:
            return self.replaced_digest
        *before, (_, answer) = self.turns
        return row_digest("\n".join(text for _, text in before), answer)


def tool_names(message: Mapping[str, Any]) -> list[str]:
    """Return the names of the tools that a message calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return [str(call["name"]) for call in calls]


def tool_arguments(message: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of each tool call of a message: mappings, or their JSON texts."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return [call.get("arguments") for call in calls]


def without_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose tool calls have empty arguments of the same type."""
    calls: list[Mapping[str, Any]] = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        empty: Any = "" if isinstance(function.get("arguments"), str) else {}
        function = {**function, "arguments": empty}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def leaf_values(value: Any) -> list[Any]:
    """Return the nonempty values in mappings and lists, or in their JSON text.

    A text that is not JSON is itself a value.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [value] if value.strip() else []
    return [leaf for leaf in _leaves(value) if leaf is not None and str(leaf).strip()]


def _leaves(value: Any) -> Iterator[Any]:
    # Not recursive, because JSON may be nested more deeply than the call stack allows.
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
        else:
            yield value


def reasoning(message: Mapping[str, Any]) -> list[str]:
    """Return the texts of a message's reasoning, under the names that chat templates use."""
    texts = [message.get(name) for name in ("reasoning_content", "reasoning", "thinking")]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def row_digest(prompt: str, answer: str) -> str:
    """Return a sha256 that identifies a row independently of the tokenizer.

    Args:
        prompt: The question (the turns before the last one, joined by line feeds); empty for a
            plain text.
        answer: The last answer, or the plain text.
    """
    return hashlib.sha256(json.dumps([prompt, answer]).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        name: Name of the data set, for the record and messages.
        rows: Rows to draw examples from.
        convert: Converts a row to a conversation, which may have images.
        details: Further values for the record, such as Hub id and revision.
        published: The rows of a preset as published, before `Preset.prepare`; empty for other data.
        preset: Name of the preset, if any.
        folder: Base folder of relative image paths; `None` for the current folder.
    """

    name: str
    rows: Sequence[Any]
    convert: Callable[[Any], Conversation]
    details: dict[str, Any]
    published: Sequence[Any] = ()
    preset: str | None = None
    folder: Path | None = None

    def read(self, row: Any, *, images: bool = False) -> Conversation:
        """Convert a row to a conversation.

        Args:
            row: The row.
            images: Whether the reader uses images.

        Raises:
            ValueError: The row cannot be read, or has images that would be ignored.
        """
        conversation = self.convert(row)
        if conversation.images and not images:
            raise ValueError(
                f"a row of data set {self.name!r} has images, which only calibration of a model "
                "that sees images uses: pass the model's processor (CAPPruner.prune(model, "
                "processor)) if it is such a model, or remove the images from rows that can be "
                "answered without them"
            )
        return conversation


def local_presets(dataset: Any, folder: Path) -> Any:
    """Replace names of presets with `preset=FILE` for files in `folder`; keep other data.

    Raises:
        FileNotFoundError: The folder does not exist or has no file for a preset.
    """
    if isinstance(dataset, list):
        return [local_presets(entry, folder) for entry in dataset]
    if not isinstance(dataset, str) or dataset not in PRESETS:
        return dataset
    check_folder(folder)
    places = [folder / file for file in PRESETS[dataset].files]
    return f"{dataset}={first_file(f'data set {dataset}', places)}"


def check_folder(folder: Path) -> None:
    """Raise a `FileNotFoundError` if a data folder does not exist."""
    if not folder.is_dir():
        raise FileNotFoundError(f"the data folder {folder} does not exist: check its path")


def first_file(what: str, places: Sequence[Path]) -> Path:
    """Return the first path of `places` that is a file; `what` names the data in the error.

    Raises:
        FileNotFoundError: None of the paths is a file.
    """
    for path in places:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{what}: no data file; looked for {', '.join(map(str, dict.fromkeys(places)))}: put the "
        "file there, or name its folder (`data_dir`, `--data-dir`)"
    )


def find_data_files(dataset: Any, scores: Path) -> Any:
    """Return the data set named in a scores file, with the folders of its files.

    Scores files contain only the names of data files. They are searched in the current folder, then
    next to the scores file.

    Raises:
        FileNotFoundError: A file is in neither folder.
    """
    if isinstance(dataset, list):
        return [find_data_files(entry, scores) for entry in dataset]
    if isinstance(dataset, dict):
        return {**dataset, "path": find_data_files(dataset["path"], scores)}
    preset, name = _split_preset(str(dataset))
    if Path(name).suffix not in _READERS:
        return dataset
    for file in (Path(name), scores.parent / name):
        if file.is_file():
            return f"{preset}={file}" if preset else str(file)
    raise FileNotFoundError(
        f"the scores in {scores} were measured on the data file {name}, whose folder is not "
        "stored: name the file with --dataset"
    )


def load_sources(dataset: Any) -> list[Source]:
    """Return the sources of `CAPConfig.dataset`: names, files, Hub ids or rows in memory.

    Raises:
        ValueError: The data set is unknown, empty, or has no columns that can be read.
        TypeError: The data has an unsupported type.
        FileNotFoundError: A file does not exist.
        ImportError: The package `datasets` is needed but not installed.
    """
    if isinstance(dataset, str | Path | Mapping) and is_dataset_name(_plain(dataset)):
        return [_named(dataset)]
    if isinstance(dataset, list | tuple) and dataset and all(map(is_dataset_name, dataset)):
        return [_named(entry) for entry in dataset]
    if isinstance(dataset, str):
        raise ValueError(f"unknown data set {dataset!r}: {_KNOWN}")
    if type(dataset).__name__ in ("DatasetDict", "IterableDatasetDict"):
        raise ValueError(
            f"dataset is a {type(dataset).__name__} with the splits {', '.join(dataset)}: "
            "pass one of its splits"
        )
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"a data set specification needs the key 'path', got {', '.join(map(str, dataset))}"
        )
    if hasattr(dataset, "iterrows"):
        raise TypeError(
            "dataset is a pandas DataFrame: pass its rows, dataset=frame.to_dict('records')"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, which has no length or no random access: "
            f"{_KNOWN}"
        )
    rows = dataset if hasattr(dataset, "column_names") else list(dataset)
    if names := [row for row in rows if isinstance(row, str) and row in PRESETS]:
        raise ValueError(
            f"dataset mixes texts with the preset name {names[0]!r}: pass names only, or texts only"
        )
    if files := [row for row in rows if isinstance(row, str) and _split_preset(row)[0]]:
        raise ValueError(
            f"{files[0]!r} names no data file: after the =, write a json/jsonl/csv/parquet/txt file"
        )
    if len(rows) == 0:
        raise ValueError("dataset is empty: pass at least one row")
    return [Source("in-memory", rows, _reader("in-memory", rows, {}), {})]


def _plain(name: Any) -> Any:
    return str(name) if isinstance(name, Path) else name


def _named(entry: Any) -> Source:
    """Load a data set by preset name, `preset=file`, file, Hub id or specification."""
    options = dict(entry) if isinstance(entry, Mapping) else {"path": str(entry)}
    if unknown := sorted(set(options) - _OPTIONS):
        raise ValueError(
            f"unknown key(s) {', '.join(unknown)} in the data set specification {entry!r}; known: "
            f"{', '.join(sorted(_OPTIONS))}"
        )
    leading, path = _split_preset(str(options["path"]))
    if leading:
        options["preset"] = leading
    if (chosen := options.get("preset")) is not None and chosen not in PRESETS:
        raise ValueError(f"unknown preset {chosen!r}: choose one of {', '.join(PRESETS)}")
    is_file = Path(path).suffix in _READERS or Path(path).is_file()
    _check_options(path, options, is_file)
    if path in PRESETS and chosen is None and not Path(path).is_file():
        return _preset_from_hub(path, options)
    if is_file:
        rows = _read_file(Path(path))
        name = f"{options['preset']}={Path(path).name}" if "preset" in options else Path(path).name
        details: dict[str, Any] = {"file": Path(path).name}
    else:
        if "/" not in path:
            raise ValueError(f"unknown data set {path!r}: {_KNOWN}")
        rows, details = _load_from_hub(
            path, options.get("name"), options.get("split", "train"), options.get("revision")
        )
        name = path
    if "preset" in options:
        preset = PRESETS[options["preset"]]
        return Source(
            name,
            preset.prepare(rows),
            _checked(name, preset.read),
            details,
            rows,
            options["preset"],
        )
    folder = Path(path).parent if is_file else None
    return Source(name, rows, _reader(name, rows, options), details, folder=folder)


def _split_preset(name: str) -> tuple[str | None, str]:
    """Split `preset=FILE`; other names, which may also contain "=", have no preset."""
    preset, equals, path = name.partition("=")
    return (preset, path) if equals and preset in PRESETS else (None, name)


def _check_options(path: str, options: Mapping[str, Any], is_file: bool) -> None:
    """Refuse keys of a specification that would have no effect."""
    columns = [key for key in options if key.endswith("_column")]
    preset = options.get("preset", path if path in PRESETS and not is_file else None)
    if preset is not None and columns:
        raise ValueError(
            f"{', '.join(columns)} cannot be combined with the preset {preset!r}, which knows its "
            "columns: leave them out, or name the file or the Hub id without the preset"
        )
    ignored = [key for key in ("name", "split", "revision") if is_file and key in options]
    if ignored:
        raise ValueError(
            f"{', '.join(ignored)} of a specification apply to data on the Hub, but {path} is a "
            "file: leave them out"
        )


def _preset_from_hub(name: str, options: dict[str, Any]) -> Source:
    preset = PRESETS[name]
    rows, details = _load_from_hub(
        preset.hub_id,
        options.get("name", preset.config_name),
        options.get("split", preset.split),
        options.get("revision", preset.revision),
        f"without a network, name a copy of its file, as {name}=FILE for calibration, or by the "
        "folder data_dir (`--data-dir`) for evaluation",
    )
    return Source(name, preset.prepare(rows), _checked(name, preset.read), details, rows, name)


def _load_from_hub(
    hub_id: str, config_name: str | None, split: str, revision: str | None, advice: str = ""
) -> tuple[Sequence[Any], dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"data set {hub_id!r} needs the package `datasets`, which is not installed: run "
            f"{install_command('data')}"
        ) from error
    try:
        rows = datasets.load_dataset(hub_id, config_name, split=split, revision=revision)
    # A wrong id, name or split, no network, or a data set script: errors without a common base
    # class.
    except Exception as error:
        cause = next(iter(str(error).splitlines()), "")
        problem = (
            "is not in the cache, and the Hub cannot be reached"
            if isinstance(error, ConnectionError)
            else f"(split {split!r}, revision {revision!r}) could not be loaded from the Hub "
            f"({type(error).__name__}: {cause})"
        )
        raise ValueError(f"data set {hub_id!r} {problem}: {advice or _KNOWN}") from error
    if len(rows) == 0:
        raise ValueError(
            f"data set {hub_id!r} has no rows in split {split!r}: choose another split"
        )
    details = {"hub_id": hub_id, "config": config_name, "split": split, "revision": revision}
    return rows, details


def _read_file(path: Path) -> Sequence[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist: check its path")
    if path.suffix not in _READERS:
        raise ValueError(f"data file {path} must end in one of {', '.join(_READERS)}")
    try:
        rows = _READERS[path.suffix](path)
    except (ImportError, MemoryError):
        raise
    # Damaged Parquet, JSON nested too deeply, numbers too long: errors without a common base class.
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        cause = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"data file {path} is not a valid {path.suffix[1:]} file ({cause}): repair it, or pass "
            "another file"
        ) from error
    if len(rows) == 0:
        raise ValueError(f"data file {path} is empty: choose another file")
    return rows


def _read_json(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        return _read_jsonl(path)
    return rows if isinstance(rows, list) else [rows]


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> Sequence[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path} needs the package `datasets`, which is not installed: run "
            f"{install_command('data')}"
        ) from error
    rows: Sequence[Any] = datasets.Dataset.from_parquet(str(path))
    return rows


def _read_txt(path: Path) -> list[str]:
    """Return the paragraphs between blank lines, or the lines if there are no blank lines."""
    text = path.read_text(encoding="utf-8-sig").strip()
    parts = text.split("\n\n") if "\n\n" in text else text.split("\n")
    return [part.strip() for part in parts if part.strip()]


# Rows


def _reader(
    name: str, rows: Sequence[Any], options: Mapping[str, Any]
) -> Callable[[Any], Conversation]:
    """Return a function that reads rows with the type and columns of the first one."""
    first = next((row for row in rows if row is not None), "")
    if isinstance(first, str):
        return _checked(name, _text_row)
    if isinstance(first, list | tuple):
        if first and isinstance(first[0], Mapping):
            return _checked(name, _chat)
        return _checked(name, lambda row: _pair(*row))
    if not isinstance(first, Mapping):
        raise ValueError(
            f"rows of data set {name!r} must be texts, pairs, chats or mappings, got "
            f"{type(first).__name__}"
        )
    read = _media_reader(_column_reader(name, list(first), options))
    if ROW_DIGEST in first:
        read = _trace_reader(read)
    if not hasattr(rows, "column_names"):
        return _checked(name, read)
    # Arrow gives every message and tool the keys of all others, with None for missing values.
    return _checked(name, lambda row: read({key: _without_none(row[key]) for key in row}))


def _column_reader(
    name: str, columns: list[str], options: Mapping[str, Any]
) -> Callable[[Any], Conversation]:
    named = {key: options[key] for key in options if key.endswith("_column")}
    for key, column in named.items():
        if column not in columns:
            raise ValueError(
                f"data set {name!r} has no column {column!r} ({key}): choose one of "
                f"{', '.join(columns)}"
            )
    if len({"prompt_column", "answer_column"} & set(named)) == 1:
        raise ValueError(
            f"the specification of data set {name!r} has only {next(iter(named))!r}: set both "
            "prompt_column and answer_column"
        )
    if len({"answer_column", "text_column", "messages_column"} & set(named)) > 1:
        raise ValueError(
            f"the specification of data set {name!r} has {', '.join(sorted(named))}: choose "
            "prompt_column with answer_column, text_column, or messages_column"
        )
    if "text_column" in named:
        return lambda row: _text_row(row[named["text_column"]])
    if "messages_column" in named or (not named and "messages" in columns):
        messages = named.get("messages_column", "messages")
        return lambda row: _chat(_message_list(row[messages], messages), _template_variables(row))
    if named:
        prompt, answer = named["prompt_column"], named["answer_column"]
        return lambda row: _pair(row[prompt], row[answer])
    for prompt, answer in _COLUMN_PAIRS:
        if prompt in columns and answer in columns:
            extra = "input" if prompt == "instruction" and "input" in columns else None
            return lambda row: _pair(
                "\n".join(filter(None, (row[prompt], row[extra] if extra else ""))), row[answer]
            )
    if "text" in columns:
        return lambda row: _text_row(row["text"])
    raise ValueError(
        f"cannot tell which columns of data set {name!r} hold prompts and answers (found "
        f"{', '.join(columns)}): name them in a specification such as "
        '{"path": ..., "prompt_column": ..., "answer_column": ...} or {"path": ..., '
        '"text_column": ...}, or with --prompt-column and --answer-column or --text-column'
    )


def _media_reader(read: Callable[[Any], Conversation]) -> Callable[[Any], Conversation]:
    """Return a function that adds images from columns, and refuses rows with video or audio."""

    def read_media(row: Any) -> Conversation:
        for column in _UNREAD_COLUMNS:
            if _is_given(row.get(column)):
                raise ValueError(
                    f"has a column {column!r}, but calibration examples are text and images: "
                    "choose rows that can be answered without it, and remove the column"
                )
        images: list[Any] = []
        for column in filter(lambda name: _is_given(row.get(name)), _IMAGE_COLUMNS):
            value = _decoded_list(row[column])
            images += value if isinstance(value, list | tuple) else [value]
        return _with_images(read(row), images)

    return read_media


def _decoded_list(value: Any) -> Any:
    """Return a list that a column stores as JSON text, or the value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _is_given(value: Any) -> bool:
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def _with_images(conversation: Conversation, images: list[Any]) -> Conversation:
    """Add images to the message parts that lack one, or put them before the first prompt.

    Raises:
        ValueError: There are more or fewer images than such parts, or no prompt.
    """
    if not images:
        return conversation
    if not conversation.images:
        roles = [role for role, _ in conversation.turns]
        if "user" not in roles:
            raise ValueError("has images but no prompt: images need a prompt and an answer")
        messages = list(conversation.messages) or [
            {"role": role, "content": text} for role, text in conversation.turns
        ]
        first = roles.index("user")
        content = messages[first]["content"]
        content = [content] if isinstance(content, str) else content
        messages[first] = {**messages[first], "content": [*[IMAGE_PART] * len(images), *content]}
        return replace(conversation, messages=tuple(messages), images=tuple(images))
    order = iter(images)
    numbered = [image.number for image in conversation.images if isinstance(image, _Missing)]
    if all(number is None for number in numbered):
        if len(numbered) != len(images):
            raise ValueError(
                f"has images in its columns ({len(images)}) and parts for images in its messages "
                f"({len(numbered)}), but not as many"
            )
    elif not all(isinstance(number, int) and 0 <= number < len(images) for number in numbered):
        raise ValueError(
            f"has parts for the images {numbered} in its messages, but {len(images)} images in its "
            "columns: number all parts by index, from 0 on, or none"
        )
    every = [
        image
        if not isinstance(image, _Missing)
        else next(order)
        if image.number is None
        else images[image.number]
        for image in conversation.images
    ]
    return replace(conversation, images=tuple(every))


@dataclass(frozen=True)
class _Missing:
    """An image stored in a column of the row, with a given number or else the next one."""

    number: Any


def _trace_reader(read: Callable[[Any], Conversation]) -> Callable[[Any], Conversation]:
    """Return a function that reads rows written by `cap generate`, with their metadata."""

    def read_trace(row: Any) -> Conversation:
        digest, finished = row.get(ROW_DIGEST), row.get(FINISHED, True)
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(
                f"has a {ROW_DIGEST} that is not a sha256 of 64 hexadecimal digits: "
                f"{_shortened(digest)}"
            )
        if not isinstance(finished, bool):
            raise ValueError(f"has {FINISHED} that is not true or false: {_shortened(finished)}")
        return replace(read(row), finished=finished, replaced_digest=digest)

    return read_trace


def _checked(name: str, read: Callable[[Any], Conversation]) -> Callable[[Any], Conversation]:
    """Wrap `read` so that errors name the data set, and missing rows become empty texts."""

    def checked(row: Any) -> Conversation:
        try:
            conversation = _text_row(None) if row is None else read(row)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            keys = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"cannot read a row of data set {name!r} ({type(error).__name__}: {error}): it has "
                f"{keys}"
            ) from error
        except ValueError as error:
            raise ValueError(f"a row of data set {name!r} {error}") from error
        if not conversation.turns:
            raise ValueError(
                f"a row of data set {name!r} is a chat without messages: remove the row"
            )
        if any(isinstance(image, _Missing) for image in conversation.images):
            raise ValueError(
                f"a row of data set {name!r} has a message with an image that is not there: name it"
                ' in the part of the message ({"type": "image", "image": ...}), or in a column '
                "'image' or 'images'"
            )
        if not all(isinstance(text, str) for _, text in conversation.turns):
            raise ValueError(f"a row of data set {name!r} has a value that is not text: {row!r}")
        if (text := _not_unicode(conversation)) is not None:
            raise ValueError(
                f"a row of data set {name!r} has text with half a surrogate pair, which is no "
                f"character and cannot be tokenized: correct or remove {_shortened(text)}"
            )
        return conversation

    return checked


def _not_unicode(conversation: Conversation) -> str | None:
    """Return a text of a conversation that cannot be encoded as UTF-8, if there is one."""
    for value in _leaves([conversation.turns, conversation.messages, conversation.variables]):
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return value
    return None


def _shortened(value: Any) -> str:
    """Return the `repr` of a value, or its first characters if it is long."""
    shown = ascii(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _text_row(text: Any) -> Conversation:
    return Conversation((("text", _as_text(text)),))


def _pair(prompt: Any, answer: Any) -> Conversation:
    return Conversation((("user", _as_text(prompt)), ("assistant", _as_text(answer))))


def _chat(
    messages: Iterable[Mapping[str, Any]] | None, variables: Mapping[str, Any] | None = None
) -> Conversation:
    """Read messages; those with only tool calls or only reasoning need no content."""
    if messages is None:
        return _text_row(None)
    turns, whole, images = [], [], []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(
                "has messages that are not a list of mappings with a role and a content: "
                f"{_shortened(message)}"
            )
        others = {
            key: value
            for key, value in message.items()
            if key not in ("role", "content") and value is not None
        }
        optional = tool_names(others) or reasoning(others)
        content = message.get("content") if optional else message["content"]
        turns.append((message["role"], _as_text(content)))
        # Templates that concatenate strings fail on None.
        content = "" if content is None else content
        if isinstance(content, list | tuple):
            images += [_image_of(part) for part in content if _is_image(part)]
            content = [IMAGE_PART if _is_image(part) else part for part in content]
        whole.append({"role": message["role"], "content": content, **others})
    return Conversation(tuple(turns), tuple(whole), dict(variables or {}), images=tuple(images))


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _IMAGE_KEYS


def _image_of(part: Mapping[str, Any]) -> Any:
    """Return the image of a message part, or `_Missing` if it is only a placeholder."""
    keys = _IMAGE_KEYS[part["type"]]
    missing = _Missing(part.get("index"))
    image = next((part[key] for key in keys if part.get(key) is not None), missing)
    return image.get("url") if isinstance(image, Mapping) and "url" in image else image


def _message_list(value: Any, column: str) -> Any:
    """Return the messages in a column, which may store them as JSON text.

    Raises:
        ValueError: The column contains another text.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        messages = None
    if not isinstance(messages, list):
        raise ValueError(
            f"has in the column {column!r} a text that is not the JSON of a list of messages: "
            f"{_shortened(value)}; plain texts are named by text_column (--text-column)"
        )
    return messages


def _as_text(value: Any) -> Any:
    """Return None as an empty text, and a list of parts as their joined texts.

    Raises:
        ValueError: A part is neither a text nor an image.
    """
    if value is None:
        return ""
    if not isinstance(value, list | tuple):
        return value
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in _TEXT_PARTS and kind not in _IMAGE_KEYS:
            raise ValueError(
                f"has content of type {kind!r}, but calibration examples are text and images: take "
                "such rows out"
            )
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in value]
    return "".join(texts)


def _template_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's inputs for the chat template other than the messages.

    Raises:
        ValueError: `tools`, `documents` or `chat_template_kwargs` has the wrong type.
    """
    variables = _decoded(row, "chat_template_kwargs", Mapping, "a mapping of template variables")
    for name in ("tools", "documents"):
        if entries := _decoded(row, name, list, "a list"):
            variables = {**(variables or {}), name: entries}
    if reserved := sorted(_RESERVED & set(variables or {})):
        raise ValueError(f"has chat_template_kwargs that set {', '.join(reserved)}: take them out")
    return dict(variables or {})


def _decoded(row: Mapping[str, Any], name: str, kind: type, noun: str) -> Any:
    """Return a column that may contain JSON, as is common for tools in data sets on the Hub."""
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"has {name} that are not valid JSON ({error}): {_shortened(value)}"
            ) from error
    if value in (None, "") or isinstance(value, kind):
        return value or None
    raise ValueError(f"has {name} that are not {noun}: {_shortened(value)}")


def _without_none(value: Any) -> Any:
    """Return a value without mapping keys, at any depth, whose value is None."""
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


# Presets


def _gsm8k(row: Mapping[str, Any]) -> Conversation:
    # The calculator annotations `<<48/2=24>>` are kept, as published and as used in training.
    return _pair(row["question"], row["answer"])


def _strategyqa(row: Mapping[str, Any]) -> Conversation:
    facts = row["facts"] if isinstance(row["facts"], str) else " ".join(row["facts"])
    return _pair(row["question"], f"{facts}\n#### {'yes' if row['answer'] else 'no'}")


def multiple_choice_parts(row: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]], str]:
    """Return the question, the choices as `(label, text)` and the right label of an ARC row.

    The row has the published layout (`question.stem`) or the Hub's (parallel lists).
    """
    if isinstance(row["question"], Mapping):
        stem = row["question"]["stem"]
        choices = [(choice["label"], choice["text"]) for choice in row["question"]["choices"]]
    else:
        stem = row["question"]
        choices = list(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    return stem, choices, row["answerKey"]


def _arc(row: Mapping[str, Any]) -> Conversation:
    stem, choices, right = multiple_choice_parts(row)
    listed = "\n".join(f"({label}) {text}" for label, text in choices)
    return _pair(f"{stem}\n{listed}", f"{dict(choices)[right]}\n#### {right}")


def _as_is(rows: Sequence[Any]) -> Sequence[Any]:
    return rows


def _passages(rows: Sequence[Any]) -> list[str]:
    """Join consecutive lines into passages long enough to fill an example."""
    passages, current, size = [], [], 0
    for row in rows:
        line = (row["text"] if isinstance(row, Mapping) else row).strip()
        if line:
            current.append(line)
            size += len(line)
        if size >= _PASSAGE_CHARACTERS:
            passages.append("\n".join(current))
            current, size = [], 0
    return passages or ["\n".join(current)]


@dataclass(frozen=True)
class Preset:
    """A data set with a short name.

    Attributes:
        hub_id: Repository on the Hub.
        config_name: Name of its configuration, if it has several.
        split: Split that calibration draws from.
        revision: Commit, which makes results reproducible if the data set changes.
        files: Possible paths of its file in a data folder; the first that exists is used.
        read: Converts a row to a conversation, in the layout of the Hub or of the published files.
        prepare: Regroups the rows before examples are drawn.
    """

    hub_id: str
    config_name: str | None
    split: str
    revision: str
    files: tuple[str, ...]
    read: Callable[[Any], Conversation]
    prepare: Callable[[Sequence[Any]], Sequence[Any]] = _as_is


_RESERVED = {
    "conversation",
    "messages",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
}
_IMAGE_COLUMNS = ("image", "images")
_UNREAD_COLUMNS = ("video", "videos", "audio", "audios")
IMAGE_PART = {"type": "image"}
# The keys under which a message part may store its image, by its type.
_IMAGE_KEYS = {
    "image": ("image", "url", "path", "base64"),
    "image_url": ("image_url",),
    "input_image": ("image_url",),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_OPTIONS = {"path", "preset", "name", "split", "revision"} | {
    f"{kind}_column" for kind in ("prompt", "answer", "text", "messages")
}
_COLUMN_PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
)
_READERS: dict[str, Callable[[Path], Sequence[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}

PRESETS: dict[str, Preset] = {
    "gsm8k": Preset(
        "openai/gsm8k",
        "main",
        "train",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        ("gsm8k/train.jsonl",),
        _gsm8k,
    ),
    "strategyqa": Preset(
        "ChilleD/StrategyQA",
        None,
        "train",
        "705562638fe1d8ca6bb98c66fc8f94d45fda8c83",
        ("strategyqa/train.jsonl", "strategyqa/strategyqa_all_2290.json"),
        _strategyqa,
    ),
    "arc_challenge": Preset(
        "allenai/ai2_arc",
        "ARC-Challenge",
        "train",
        "210d026faf9955653af8916fad021475a3f00453",
        ("arc_challenge/ARC-Challenge-Train.jsonl", "arc_challenge/train.jsonl"),
        _arc,
    ),
    "wikitext2": Preset(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "train",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        ("wikitext-2/train.txt", "wikitext2/train.txt", "wikitext-2/valid.txt"),
        _text_row,
        _passages,
    ),
}
_KNOWN = (
    f"expected a preset ({', '.join(PRESETS)}), preset=FILE, a Hub id (owner/name), a "
    "json/jsonl/csv/parquet/txt file, or rows in memory"
)
