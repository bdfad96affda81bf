"""Conversations as text and tokens, with chat template and marked answers.

The model must be calibrated and evaluated on the full content of a row. A chat template may omit
parts of a message, so every rendering is compared with the row.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
import torch
from transformers.utils import logging

from optimum_cap.data.sources import (
    IMAGE_PART,
    Conversation,
    leaf_values,
    reasoning,
    tool_arguments,
    tool_names,
    without_arguments,
)

logger = logging.get_logger(__name__)

# The empty output at the end preserves a line feed at the start of the template.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"
SEPARATOR = "\n"  # between prompt and answer if the tokenizer has no chat template
_MARK = "\ue000here\ue001"  # private use characters, so that no text contains it
# A shorter text may be part of the template's own text, such as "d" in "<|im_end|>".
_SHORT = 16
# What a template prints for a typed part if it treats it as text.
_PRINTED_PARTS = ("'type': 'text'", '"type": "text"')


@dataclass(frozen=True)
class Encoded:
    """A tokenized conversation.

    Attributes:
        input_ids: int64 `[tokens]`.
        scored: bool `[tokens]`, True for tokens of answers.
        answers: Number of answers: nonempty turns of the assistant.
        whole: Number of answers whose text and tool calls are all among the scored tokens.
        cut: Number of answers with omitted text, tool calls or reasoning.
        lost_messages: Number of other messages with omitted text, by role.
        lost_variables: Which of `tools` and `documents` are omitted.
        text: Output of the chat template; empty without one.
    """

    input_ids: torch.Tensor
    scored: torch.Tensor
    answers: int = 0
    whole: int = 0
    cut: int = 0
    lost_messages: Mapping[str, int] = field(default_factory=dict)
    lost_variables: tuple[str, ...] = ()
    text: str = ""


def encode(
    conversation: Conversation, tokenizer: Any, limit: int, last_only: bool = False
) -> Encoded:
    """Tokenize a conversation and mark its answers.

    Plain texts are truncated to `limit` tokens, conversations are not.

    Args:
        conversation: The conversation.
        tokenizer: The tokenizer; its chat template is used if it has one.
        limit: Longest plain text, in tokens.
        last_only: Mark only the last turn instead of all turns of the assistant.

    Raises:
        ValueError: The chat template does not support the conversation.
    """
    if [role for role, _ in conversation.turns] == ["text"]:
        ids = _tokens(tokenizer, conversation.turns[0][1])[:limit]
        return Encoded(torch.tensor(ids, dtype=torch.long), torch.ones(len(ids), dtype=torch.bool))
    lost_messages: Mapping[str, int] = {}
    lost_variables = [name for name in ("tools", "documents") if conversation.variables.get(name)]
    text = ""
    if getattr(tokenizer, "chat_template", None):
        chat = _fitting_chat(conversation, tokenizer)
        ids, answers = _encode_chat(chat)
        text = chat.text()
        lost_messages = chat.lost_messages()
        lost_variables = [name for name in lost_variables if not chat.depends_on_variable(name)]
    else:
        ids, answers = _encode_plain(conversation, tokenizer)
    if not conversation.finished:
        ids, answers = _without_end(conversation, tokenizer, ids, answers)
    if last_only:
        answers = [answer for answer in answers if answer.turn == len(conversation.turns) - 1]
    scored = torch.zeros(len(ids), dtype=torch.bool)
    for answer in answers:
        scored[answer.start : answer.stop] = True
    answers = [answer for answer in answers if answer.expected]
    return Encoded(
        torch.tensor(ids, dtype=torch.long),
        scored,
        len(answers),
        sum(answer.whole for answer in answers),
        sum(answer.cut for answer in answers),
        lost_messages,
        tuple(lost_variables),
        text,
    )


def encode_prompt(conversation: Conversation, tokenizer: Any) -> Encoded:
    """Tokenize the prompt for the next answer of a model, formatted as in calibration.

    Args:
        conversation: The conversation. If its last turn is the assistant's, it is left out, and the
            model answers in its place.
        tokenizer: The tokenizer; its chat template is used if it has one.

    Returns:
        The tokens, none of them scored; empty if nothing precedes the answer.

    Raises:
        ValueError: The chat template does not support the conversation.
    """
    before = _before_answer(conversation)
    count = len(before.turns)
    if not count:
        ids: list[int] = []
    elif not getattr(tokenizer, "chat_template", None):
        ids = _tokens(tokenizer, "".join(text + SEPARATOR for _, text in before.turns))
        if ids and ids[-1] == getattr(tokenizer, "eos_token_id", None):
            ids.pop()  # some tokenizers append it to every text
    else:
        messages = before.messages and (*before.messages, {"role": "assistant", "content": ""})
        answered = replace(before, turns=(*before.turns, ("assistant", "")), messages=messages)
        chat = _fitting_chat(answered, tokenizer)
        text = chat.text(count, generation_prompt=True)
        ids = _tokens(tokenizer, text, special=False)
        prompt = chat.changed(conversation=before)
        names = [name for name in ("tools", "documents") if conversation.variables.get(name)]
        return Encoded(
            torch.tensor(ids, dtype=torch.long),
            torch.zeros(len(ids), dtype=torch.bool),
            lost_messages=prompt.lost_messages(),
            lost_variables=tuple(name for name in names if not prompt.depends_on_variable(name)),
        )
    return Encoded(torch.tensor(ids, dtype=torch.long), torch.zeros(len(ids), dtype=torch.bool))


def _before_answer(conversation: Conversation) -> Conversation:
    """Return the conversation without its last turn, if that is the assistant's."""
    if conversation.turns[-1][0] != "assistant":
        return conversation
    return replace(conversation, turns=conversation.turns[:-1], messages=conversation.messages[:-1])


def render_prompt(conversation: Conversation, tokenizer: Any) -> str:
    """Return the prompt for the last turn of a conversation, formatted as in calibration.

    Raises:
        ValueError: The chat template does not support the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "".join(text + SEPARATOR for _, text in conversation.turns[:-1])
    chat = _fitting_chat(conversation, tokenizer)
    return chat.text(len(conversation.turns) - 1, generation_prompt=True)


def chat_template(tokenizer: Any, tools: Any = None) -> str:
    """Return the chat template of a tokenizer that has one, with a fixed date.

    Some templates (Llama 3) include today's date, so calibration and evaluation would change from
    day to day. It is replaced by the default date of these templates.

    Args:
        tokenizer: The tokenizer.
        tools: The tools of the conversation, for which some tokenizers have a separate template.
    """
    template: str = tokenizer.get_chat_template(tools=tools)
    return _FIXED_DATE + template if "strftime_now" in template else template


@dataclass
class RenderingCheck:
    """Counts what chat templates omit from the conversations of a data set.

    Attributes:
        name: Name of the data set, for messages.
        tokenizer: The tokenizer.
    """

    name: str
    tokenizer: Any
    rows: int = 0
    answers: int = 0
    whole: int = 0
    cut: int = 0
    lost_messages: Counter[str] = field(default_factory=Counter)
    lost_variables: Counter[str] = field(default_factory=Counter)
    _first: int | None = field(default=None, repr=False)

    def add(self, encoded: Encoded, index: int) -> None:
        """Count a conversation; `index` is its row."""
        self.rows += 1
        self.answers += encoded.answers
        self.whole += encoded.whole
        self.cut += encoded.cut
        self.lost_messages.update(encoded.lost_messages)
        self.lost_variables.update(encoded.lost_variables)
        incomplete = encoded.cut or encoded.lost_messages or encoded.lost_variables
        if incomplete and self._first is None:
            self._first = index

    def report(self) -> None:
        """Log a warning if something was omitted.

        Raises:
            ValueError: No answer is complete.
        """
        if self._first is None:
            return
        name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
        if getattr(self.tokenizer, "chat_template", None):
            who = f"the chat template of the tokenizer {name!r}"
            advice = "set tokenizer.chat_template to one that prints them, or to None"
        else:
            who = f"the tokenizer {name!r} has no chat template, and joining the turns"
            advice = "set tokenizer.chat_template"
        if self.cut and not self.whole:
            raise ValueError(
                f"{who} leaves out text or tool calls of all {self.answers} answers of data set "
                f"{self.name!r} (first in row {self._first}), so something else would be scored: "
                f"{advice}, or remove what it leaves out from the data"
            )
        counts = [f"parts of {self.cut} of {self.answers} answers"] if self.cut else []
        for role, count in sorted(self.lost_messages.items()):
            counts.append(f"the text of {count} messages of the {role}")
        for name, count in sorted(self.lost_variables.items()):
            counts.append(f"the {name} of {count} rows")
        logger.warning(
            f"{who} leaves out {' and '.join(counts)} of data set {self.name!r} (first in row "
            f"{self._first}): only what it prints is used; `cap prune --show-example` shows an "
            "example"
        )


@dataclass(frozen=True)
class _Answer:
    """A turn of the assistant, with its position and what is missing.

    Attributes:
        turn: Its position in the conversation.
        start: Its first token.
        stop: The token after its last one.
        expected: Whether it has any text, tool call or reasoning.
        whole: Whether all text and tool calls are present.
        cut: Whether text, tool calls or reasoning are missing.
    """

    turn: int
    start: int
    stop: int
    expected: bool
    whole: bool
    cut: bool


# With a chat template


class ChatTemplateError(ValueError):
    """A chat template cannot render messages."""


@dataclass(frozen=True)
class _Chat:
    """The messages of a conversation in the form passed to the chat template.

    Attributes:
        conversation: The conversation.
        tokenizer: The tokenizer.
        typed: Whether contents are lists of typed parts, as templates of multimodal models expect,
            instead of texts.
        sparse: Whether only contents with images are lists of typed parts.
    """

    conversation: Conversation
    tokenizer: Any
    typed: bool
    sparse: bool = False
    _texts: dict[Any, str] = field(default_factory=dict)
    _places: dict[int, tuple[int, int] | None] = field(default_factory=dict)

    def changed(self, **changes: Any) -> "_Chat":
        """Return the chat with some fields replaced."""
        return replace(self, **changes, _texts={}, _places={})

    def text(
        self,
        count: int | None = None,
        *,
        generation_prompt: bool = False,
        replaced: tuple[int, str] | None = None,
    ) -> str:
        """Render the first `count` messages, or all; `replaced` is a turn and its content.

        Raises:
            ChatTemplateError: The chat template does not support them.
        """
        count = None if count == len(self.conversation.turns) else count
        key = (count, generation_prompt, replaced)
        if key not in self._texts:
            self._texts[key] = self._render(*key)
        return self._texts[key]

    def _render(
        self, count: int | None, generation_prompt: bool, replaced: tuple[int, str] | None
    ) -> str:
        variables, messages = self.conversation.variables, self._messages(replaced)[:count]
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=chat_template(self.tokenizer, variables.get("tools")),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **variables,
            )
        # A template is a program, which may raise any error.
        except Exception as error:
            cause = next(iter(str(error).splitlines()), "")
            if not isinstance(error, jinja2.TemplateError):
                cause = f"{type(error).__name__}: {cause}"
            raise ChatTemplateError(
                "the tokenizer's chat template does not support a chat with the roles "
                f"{', '.join(message['role'] for message in messages)} ({cause}): change the chat, "
                "or set tokenizer.chat_template to another one or to None"
            ) from error
        return rendered

    def _messages(self, replaced: tuple[int, str] | None) -> list[dict[str, Any]]:
        messages = []
        for turn, ((role, text), message) in enumerate(_messages(self.conversation)):
            content: Any = text
            parts = message.get("content")
            parts = parts if isinstance(parts, list | tuple) else []
            typed = self.typed and (not self.sparse or IMAGE_PART in parts)
            if replaced is not None and replaced[0] == turn:
                content = replaced[1]
            elif typed and parts:
                content = [
                    {"type": "text", "text": part} if isinstance(part, str) else part
                    for part in parts
                ]
            if typed and isinstance(content, str):
                content = [{"type": "text", "text": content}]
            messages.append({**message, "role": role, "content": content})
        return messages

    def depends_on(self, turn: int) -> bool:
        """Whether the text changes if the content of `turn` is removed."""
        try:
            return self.text(replaced=(turn, "")) != self.text()
        except ChatTemplateError:
            return True

    def depends_on_arguments(self, turn: int) -> bool:
        """Whether the text changes if the tool calls of `turn` have no arguments."""
        messages = list(self.conversation.messages)
        messages[turn] = without_arguments(messages[turn])
        return self._differs(replace(self.conversation, messages=tuple(messages)))

    def depends_on_calls(self, turn: int) -> bool:
        """Whether the text changes if `turn` calls no tools."""
        messages = self.conversation.messages
        has_calls = bool(messages) and bool(messages[turn].get("tool_calls"))
        return has_calls and self._differs(self.without_calls(turn))

    def without_calls(self, turn: int) -> Conversation:
        """Return the conversation without the tool calls of `turn`."""
        messages = list(self.conversation.messages)
        messages[turn] = {key: each for key, each in messages[turn].items() if key != "tool_calls"}
        return replace(self.conversation, messages=tuple(messages))

    def depends_on_variable(self, name: str) -> bool:
        """Whether the text changes if the template does not get the variable `name`."""
        variables = {key: each for key, each in self.conversation.variables.items() if key != name}
        return self._differs(replace(self.conversation, variables=variables))

    def _differs(self, conversation: Conversation) -> bool:
        try:
            return self.changed(conversation=conversation).text() != self.text()
        except ChatTemplateError:
            return True

    def place(self, turn: int) -> tuple[int, int] | None:
        """Return the span of characters rendered from the content of `turn`.

        `None` if the template does not print it in exactly one place.
        """
        if turn not in self._places:
            self._places[turn] = self._place(turn)
        return self._places[turn]

    def _place(self, turn: int) -> tuple[int, int] | None:
        text = self.text()
        try:
            marked = self.text(replaced=(turn, _MARK))
        except ChatTemplateError:
            return None
        if _MARK not in marked:
            return None
        head, tail = marked.partition(_MARK)[0], marked.rpartition(_MARK)[2]
        start = _common_prefix(text, head)
        return start, max(start, len(text) - _common_prefix(text[::-1], tail[::-1]))

    def holds_others(self, turn: int, start: int, stop: int) -> bool:
        """Whether the characters `start` to `stop` contain content of turns other than `turn`."""
        for other, (_, content) in enumerate(self.conversation.turns):
            place = self.place(other) if other != turn and content.strip() else None
            if place is None:
                continue
            # Longer, because the content changes what the template prints elsewhere.
            longest = max(map(len, _forms(content)))
            if len(_squashed(self.text()[slice(*place)])) <= longest:
                shared = slice(max(start, place[0]), min(stop, place[1]))
                if self.text()[shared].strip():
                    return True
        return False

    def holds(self, turn: int, piece: str, start: int = 0, stop: int | None = None) -> bool:
        """Whether the characters `start` to `stop` contain `piece` of the content of `turn`.

        White space is ignored, because templates strip and insert it. The piece may begin before
        `start`, because the end of the prompt in a template (such as `<think>`) may be the
        beginning of the answer.
        """
        text = self.text()
        first, last = len(_squashed(text[:start])), len(_squashed(text[:stop]))
        area = _squashed(text)[:last]
        for form in _forms(piece):
            if area.find(form, max(0, first - len(form) + 1)) >= 0:
                return len(form) >= _SHORT or self.depends_on(turn)
        return False

    def lost_messages(self) -> Counter[str]:
        """Return the number of messages other than answers with omitted text, by role."""
        return Counter(
            role
            for turn, (role, _) in enumerate(self.conversation.turns)
            if role != "assistant"
            and not all(self.holds(turn, piece) for piece in _pieces(self.conversation, turn))
        )

    def prints_parts(self) -> bool:
        """Whether the template prints typed parts literally, instead of their texts."""
        texts = [text for _, text in self.conversation.turns]
        return (
            self.typed
            and _has_printed_parts(self.text())
            and not any(map(_has_printed_parts, texts))
        )


def _fitting_chat(conversation: Conversation, tokenizer: Any) -> _Chat:
    """Return the messages as texts or as typed parts, as the chat template expects.

    Raises:
        ValueError: The chat template supports neither.
    """
    # Images are parts, so even a template that accepts texts must get parts.
    if conversation.images:
        forms = [(True, False), (True, True)]
    else:
        wanted = _wants_parts(conversation, tokenizer)
        forms = [(wanted, False), (not wanted, False)]
    errors = []
    for typed, sparse in forms:
        chat = _Chat(conversation, tokenizer, typed, sparse)
        try:
            if not chat.prints_parts():
                chat.text()
                return chat
        except ChatTemplateError as error:
            errors.append(error)
    if not errors:
        raise ChatTemplateError(
            "the chat template prints the parts of messages themselves, so it takes no images: "
            "set processor.chat_template to one that does"
        )
    raise errors[0]


def _wants_parts(conversation: Conversation, tokenizer: Any) -> bool:
    """Whether the chat template prints more of the contents if they are lists of typed parts.

    A question and answer are tried first, and the roles of the conversation only if the template
    prints neither. The contents do not matter, so that similar rows get the same form.
    """
    pair = Conversation((("user", ""), ("assistant", "")), variables=conversation.variables)
    for probe in (pair, conversation):
        marks = [f"{_MARK}{turn};" for turn in range(len(probe.turns))]
        turns = tuple((role, mark) for (role, _), mark in zip(probe.turns, marks, strict=True))
        messages = tuple(
            {**message, "content": mark}
            for message, mark in zip(probe.messages, marks, strict=False)
        )
        printed = []
        for typed in (False, True):
            chat = _Chat(replace(probe, turns=turns, messages=messages), tokenizer, typed)
            try:
                text = "" if chat.prints_parts() else chat.text()
            except ChatTemplateError:
                text = ""
            printed.append(sum(mark in text for mark in marks))
        if any(printed):
            break
    return printed[1] > printed[0]


def _encode_chat(chat: _Chat) -> tuple[list[int], list[_Answer]]:
    """Tokenize the rendered conversation; the answers include their end tokens."""
    ids = _tokens(chat.tokenizer, chat.text(), special=False)
    roles = [role for role, _ in chat.conversation.turns]
    return ids, [_answer(chat, turn, ids) for turn, role in enumerate(roles) if role == "assistant"]


def _answer(chat: _Chat, turn: int, ids: list[int]) -> _Answer:
    """Find a turn of the assistant in the rendered conversation."""
    _, message = _messages(chat.conversation)[turn]
    texts = _pieces(chat.conversation, turn)
    names, thoughts = tool_names(message), reasoning(message)
    candidates = [
        candidate
        for candidate in _candidates(chat, turn, ids)
        if not chat.holds_others(turn, *candidate[0])
    ]
    if not candidates:
        calls = _place_of_calls(chat, turn) or (0, 0)
        calls = (0, 0) if chat.holds_others(turn, *calls) else calls
        candidates = [(calls, _token_span(chat, calls, ids))]
    if not (texts or names or thoughts):
        return _Answer(turn, *candidates[0][1], expected=False, whole=False, cut=False)
    for (start, stop), tokens in candidates:
        area = _squashed(chat.text()[start:stop])
        has_thoughts = [any(form in area for form in _forms(each)) for each in thoughts]
        if (
            all(chat.holds(turn, piece, start, stop) for piece in texts)
            # Only contents can be replaced, so a short name cannot be distinguished from other
            # text.
            and all(any(form in area for form in _forms(name)) for name in names)
            and _holds_arguments(chat, turn, area)
            and (texts or names or any(has_thoughts))
        ):
            return _Answer(turn, *tokens, expected=True, whole=True, cut=not all(has_thoughts))
    printed = chat.depends_on(turn) or chat.depends_on_calls(turn)
    tokens = candidates[-1][1] if printed else (0, 0)
    return _Answer(turn, *tokens, expected=True, whole=False, cut=True)


def _holds_arguments(chat: _Chat, turn: int, area: str) -> bool:
    """Whether `area`, without white space, contains the arguments of a turn's tool calls."""
    _, message = _messages(chat.conversation)[turn]
    calls = [each for each in tool_arguments(message) if leaf_values(each)]
    return all(_holds_values(each, area) for each in calls) and (
        not calls or chat.depends_on_arguments(turn)
    )


def _holds_values(arguments: Any, area: str) -> bool:
    """Whether `area` contains arguments, which are a mapping or its JSON text."""
    if isinstance(arguments, str) and any(form in area for form in _forms(arguments)):
        return True
    return all(
        any(form in area for form in _forms_of_value(value)) for value in leaf_values(arguments)
    )


def _candidates(
    chat: _Chat, turn: int, ids: list[int]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield the possible spans of a turn of the assistant, as `(characters, tokens)`.

    The first one follows the prompt, up to the next message. It is right unless the template prints
    earlier messages differently when later ones follow (as templates that drop the reasoning of
    earlier turns do). The second is the place of the turn's content, with its end token.
    """
    text, tokenizer = chat.text(), chat.tokenizer
    try:
        before = chat.text(turn, generation_prompt=True) if turn else None
        after = chat.text(turn + 1)
    except ChatTemplateError:
        before = None
    if before is not None:
        yield (
            (_common_prefix(text, before), _common_prefix(text, after)),
            (
                # A template may not render a shorter conversation as an exact prefix of a longer.
                _common_prefix(ids, _tokens(tokenizer, before, special=False)),
                _common_prefix(ids, _tokens(tokenizer, after, special=False)),
            ),
        )
    if (span := _place_of_content(chat, turn)) is not None:
        yield span, _token_span(chat, span, ids)
    elif before is None:
        yield (0, 0), (0, 0)


def _token_span(chat: _Chat, span: tuple[int, int], ids: list[int]) -> tuple[int, int]:
    """Return the tokens of a span of characters."""
    text = chat.text()
    start, stop = (
        len(ids)
        if end == len(text)
        else _common_prefix(ids, _tokens(chat.tokenizer, text[:end], special=False))
        for end in span
    )
    return start, stop


def _place_of_calls(chat: _Chat, turn: int) -> tuple[int, int] | None:
    """Return the characters of a turn's tool calls, with the token that ends the turn."""
    if not chat.depends_on_calls(turn):
        return None
    text, without = chat.text(), chat.changed(conversation=chat.without_calls(turn))
    try:
        rest, last = without.text(), without.text(turn + 1)
    except ChatTemplateError:
        return None
    start = _common_prefix(text, rest)
    stop = max(start, len(text) - _common_prefix(text[::-1], rest[::-1]))
    ending = last[start:].lstrip() if last.startswith(text[:start]) else ""
    return start, stop + _common_prefix(text[stop:], ending)


def _place_of_content(chat: _Chat, turn: int) -> tuple[int, int] | None:
    """Return the span of characters rendered from a turn's content, with its end token.

    `None` if the template does not print the content as it is.
    """
    text, place = chat.text(), chat.place(turn)
    try:
        last = chat.text(turn + 1, replaced=(turn, _MARK))
    except ChatTemplateError:
        return None
    if place is None or _MARK not in last:
        return None
    start, stop = place
    rest, ending = text[stop:], last.rpartition(_MARK)[2]
    if not text[start:stop].strip():
        # Text after an empty content, such as a tool call, may follow less white space.
        stop, rest, ending = len(text) - len(rest.lstrip()), rest.lstrip(), ending.lstrip()
    end = stop + _common_prefix(rest, ending)
    # If the turn is not printed last, the next turn follows instead of the end of the text.
    return start, stop if chat.holds_others(turn, stop, end) else end


# Without a chat template


def _encode_plain(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[_Answer]]:
    """Join the turns with line feeds and append the end-of-sequence token, if there is one."""
    text, spans = "", []
    for turn, (role, content) in enumerate(conversation.turns):
        before = text + SEPARATOR if text else ""
        text = before + content
        if role == "assistant":
            spans.append((turn, before, text))
    end = getattr(tokenizer, "eos_token_id", None)
    ids = _tokens(tokenizer, text)
    if end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    messages = [message for _, message in _messages(conversation)]
    return ids, [
        _Answer(
            turn,
            _common_prefix(ids, _tokens(tokenizer, before)) if before else 0,
            len(ids) if after == text else _common_prefix(ids, _tokens(tokenizer, after)),
            expected=bool(
                conversation.turns[turn][1].strip()
                or tool_names(messages[turn])
                or reasoning(messages[turn])
            ),
            whole=not tool_names(messages[turn]),
            cut=bool(tool_names(messages[turn]) or reasoning(messages[turn])),
        )
        for turn, before, after in spans
    ]


def _without_end(
    conversation: Conversation, tokenizer: Any, ids: list[int], answers: list[_Answer]
) -> tuple[list[int], list[_Answer]]:
    """Remove the tokens after the content of the last turn, which was cut off before its end.

    Raises:
        ValueError: The chat template does not print the content as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        ended = ids[-1:] == [getattr(tokenizer, "eos_token_id", None)]
        count = len(ids) - ended
    else:
        chat, last = _fitting_chat(conversation, tokenizer), len(conversation.turns) - 1
        place = chat.place(last)
        if place is None:
            raise ChatTemplateError(
                "the tokenizer's chat template changes the text of an answer that is not finished, "
                "so its end cannot be found: leave out rows that are not finished, or set "
                "tokenizer.chat_template to another one"
            )
        ids = _tokens(tokenizer, chat.text()[: place[1]], special=False)
        count = len(ids)
    return ids[:count], [replace(answer, stop=min(answer.stop, count)) for answer in answers]


def _messages(
    conversation: Conversation,
) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    """Return each turn with its message."""
    messages: Sequence[Mapping[str, Any]] = conversation.messages or [
        {} for _ in conversation.turns
    ]
    return [(turn, dict(each)) for turn, each in zip(conversation.turns, messages, strict=True)]


def _pieces(conversation: Conversation, turn: int) -> list[str]:
    """Return the texts of a turn that its rendering must contain."""
    (_, text), message = _messages(conversation)[turn]
    content = message.get("content", text)
    parts = [text] if isinstance(content, str) else content
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
    return [each for each in texts if each.strip()]


def _forms(text: str) -> list[str]:
    """Return how a template may print a text, without white space: unchanged, or as JSON."""
    encoded = (json.dumps(text, ensure_ascii=escaped)[1:-1] for escaped in (False, True))
    return list(dict.fromkeys(map(_squashed, (text, *encoded))))


def _forms_of_value(value: Any) -> list[str]:
    """Return how a template may print a value of a tool call, without white space."""
    if isinstance(value, str):
        return [*_forms(value), _squashed(repr(value)[1:-1])]
    return [str(value), json.dumps(value, default=str)]


def _has_printed_parts(text: str) -> bool:
    return any(mark in text for mark in _PRINTED_PARTS)


def _squashed(text: str) -> str:
    return "".join(text.split())


def _tokens(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    # verbose=False avoids a warning for every row that is too long; the caller counts them.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
