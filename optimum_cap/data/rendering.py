"""Conversations as text and tokens: with the chat template, and with the answers marked.

What the model is calibrated and evaluated on must be what the row says. A chat template decides
alone what it prints of a message, so every rendering is compared with the row.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
import torch
from transformers.utils import logging

from optimum_cap.data.sources import Conversation, reasoning, tool_names

logger = logging.get_logger(__name__)

# The empty output at the end preserves a line feed at the start of the template.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"
SEPARATOR = "\n"  # between prompt and answer if the tokenizer has no chat template
_MARK = "\ue000here\ue001"  # of private use, so that no text holds it
# A shorter text may be part of what the template prints itself, such as "d" of "<|im_end|>".
_SHORT = 16
# Templates are programs, and these are what a message in the wrong form makes them raise.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class Encoded:
    """A tokenized conversation.

    Attributes:
        input_ids: int64 `[tokens]`.
        scored: bool `[tokens]`, True for tokens of answers.
        answers: Number of answers: turns of the assistant that are not empty.
        whole: Number of answers with all of their text and tool calls among the scored tokens.
        cut: Number of answers of which text, tool calls or reasoning are left out.
        lost_prompts: Number of messages of the user whose text is left out.
    """

    input_ids: torch.Tensor
    scored: torch.Tensor
    answers: int = 0
    whole: int = 0
    cut: int = 0
    lost_prompts: int = 0


def encode(
    conversation: Conversation, tokenizer: Any, limit: int, last_only: bool = False
) -> Encoded:
    """Tokenize a conversation and mark its answers.

    A plain text is truncated to `limit` tokens, a conversation is not.

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
    lost_prompts = 0
    if getattr(tokenizer, "chat_template", None):
        chat = _fitting_chat(conversation, tokenizer)
        ids, answers = _encode_chat(chat)
        lost_prompts = chat.missing(role="user")
    else:
        ids, answers = _encode_plain(conversation, tokenizer)
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
        lost_prompts,
    )


def render_prompt(conversation: Conversation, tokenizer: Any) -> str:
    """Return the text that a model continues with the last turn, formatted as in calibration.

    Raises:
        ValueError: The chat template does not support the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "".join(text + SEPARATOR for _, text in conversation.turns[:-1])
    chat = _fitting_chat(conversation, tokenizer)
    return chat.text(len(conversation.turns) - 1, generation_prompt=True)


def chat_template(tokenizer: Any, tools: Any = None) -> str:
    """Return the chat template of a tokenizer that has one, with today's date made constant.

    Some templates (Llama 3) include the date, which would make calibration and evaluation change
    from day to day. It is replaced by the date that these templates use as their default.

    Args:
        tokenizer: The tokenizer.
        tools: The tools of the conversation, for which some tokenizers have another template.
    """
    template: str = tokenizer.get_chat_template(tools=tools)
    return _FIXED_DATE + template if "strftime_now" in template else template


@dataclass
class RenderingCheck:
    """Counts what chat templates leave out of the conversations of a data set.

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
    lost_prompts: int = 0
    _first: int | None = field(default=None, repr=False)

    def add(self, encoded: Encoded, index: int) -> None:
        """Count a conversation; `index` is its row."""
        self.rows += 1
        self.answers += encoded.answers
        self.whole += encoded.whole
        self.cut += encoded.cut
        self.lost_prompts += encoded.lost_prompts
        if (encoded.cut or encoded.lost_prompts) and self._first is None:
            self._first = index

    def report(self) -> None:
        """Log a warning if something was left out.

        Raises:
            ValueError: No answer is whole.
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
        if self.lost_prompts:
            counts.append(f"the text of {self.lost_prompts} messages of the user")
        logger.warning(
            f"{who} leaves out {' and '.join(counts)} of data set {self.name!r} (first in row "
            f"{self._first}): only what it prints is used; `cap prune --show-example` shows an "
            "example"
        )


@dataclass(frozen=True)
class _Answer:
    """A turn of the assistant, where it is, and what it lost.

    Attributes:
        turn: Its position in the conversation.
        start: Its first token.
        stop: The token after its last one.
        expected: Whether it has any text, tool call or reasoning.
        whole: Whether all text and tool calls are there.
        cut: Whether text, tool calls or reasoning are missing.
    """

    turn: int
    start: int
    stop: int
    expected: bool
    whole: bool
    cut: bool


# With a chat template


@dataclass(frozen=True)
class _Chat:
    """The messages of a conversation in the form that is passed to the chat template.

    Attributes:
        conversation: The conversation.
        tokenizer: The tokenizer.
        typed: Whether contents are lists of typed parts, as templates of multimodal models expect,
            instead of texts.
    """

    conversation: Conversation
    tokenizer: Any
    typed: bool
    _texts: dict[Any, str] = field(default_factory=dict)

    def text(
        self,
        count: int | None = None,
        *,
        generation_prompt: bool = False,
        replaced: tuple[int, str] | None = None,
    ) -> str:
        """Render the first `count` messages, or all; `replaced` is a turn and its content."""
        count = None if count == len(self.conversation.turns) else count
        key = (count, generation_prompt, replaced)
        if key not in self._texts:
            self._texts[key] = self._render(*key)
        return self._texts[key]

    def _render(
        self, count: int | None, generation_prompt: bool, replaced: tuple[int, str] | None
    ) -> str:
        variables = self.conversation.variables
        rendered: str = self.tokenizer.apply_chat_template(
            self._messages(replaced)[:count],
            chat_template=chat_template(self.tokenizer, variables.get("tools")),
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **variables,
        )
        return rendered

    def _messages(self, replaced: tuple[int, str] | None) -> list[dict[str, Any]]:
        messages = []
        for turn, ((role, text), message) in enumerate(_messages(self.conversation)):
            content: Any = text
            if replaced is not None and replaced[0] == turn:
                content = replaced[1]
            elif self.typed and isinstance(message.get("content"), list | tuple):
                content = [
                    {"type": "text", "text": part} if isinstance(part, str) else part
                    for part in message["content"]
                ]
            if self.typed and isinstance(content, str):
                content = [{"type": "text", "text": content}]
            messages.append({**message, "role": role, "content": content})
        return messages

    def depends_on(self, turn: int) -> bool:
        """Whether the text changes if the content of `turn` is removed."""
        try:
            return self.text(replaced=(turn, "")) != self.text()
        except _TEMPLATE_ERRORS:
            return True

    def holds(self, turn: int, piece: str, start: int = 0, stop: int | None = None) -> bool:
        """Whether the characters `start` to `stop` hold `piece` of the content of `turn`.

        White space is ignored, because templates strip and insert it. The piece may begin before
        `start`: what a template ends the prompt with (such as `<think>`) may begin the answer.
        """
        text = self.text()
        first, last = len(_squashed(text[:start])), len(_squashed(text[:stop]))
        area = _squashed(text)[:last]
        for form in _forms(piece):
            if area.find(form, max(0, first - len(form) + 1)) >= 0:
                return len(form) >= _SHORT or self.depends_on(turn)
        return False

    def missing(self, role: str | None = None) -> int:
        """Return the number of messages, of one role or all, whose text is left out."""
        return sum(
            not all(self.holds(turn, piece) for piece in _pieces(self.conversation, turn))
            for turn, (each, _) in enumerate(self.conversation.turns)
            if role in (None, each)
        )


def _fitting_chat(conversation: Conversation, tokenizer: Any) -> _Chat:
    """Return the messages as texts or, if that renders more of them, as typed parts.

    Raises:
        ValueError: The chat template supports neither.
    """
    texts = _Chat(conversation, tokenizer, typed=False)
    typed = replace(texts, typed=True, _texts={})
    try:
        texts.text()
    except _TEMPLATE_ERRORS as error:
        try:
            typed.text()
        except _TEMPLATE_ERRORS:
            roles = ", ".join(role for role, _ in conversation.turns)
            raise ValueError(
                f"the tokenizer's chat template does not support a chat with the roles {roles} "
                f"({error}): change the chat, or set tokenizer.chat_template = None"
            ) from error
        return typed
    if missing := texts.missing():
        try:
            return typed if typed.missing() < missing else texts
        except _TEMPLATE_ERRORS:
            return texts
    return texts


def _encode_chat(chat: _Chat) -> tuple[list[int], list[_Answer]]:
    """Tokenize the rendered conversation; the answers include the tokens that end them."""
    ids = _tokens(chat.tokenizer, chat.text(), special=False)
    roles = [role for role, _ in chat.conversation.turns]
    return ids, [_answer(chat, turn, ids) for turn, role in enumerate(roles) if role == "assistant"]


def _answer(chat: _Chat, turn: int, ids: list[int]) -> _Answer:
    """Find a turn of the assistant in the rendered conversation."""
    _, message = _messages(chat.conversation)[turn]
    texts = _pieces(chat.conversation, turn)
    names, thoughts = tool_names(message), reasoning(message)
    candidates = list(_candidates(chat, turn, ids))
    if not (texts or names or thoughts):
        return _Answer(turn, *candidates[0][1], expected=False, whole=False, cut=False)
    for (start, stop), tokens in candidates:
        area = _squashed(chat.text()[start:stop])
        has_thoughts = [any(form in area for form in _forms(each)) for each in thoughts]
        if (
            all(chat.holds(turn, piece, start, stop) for piece in texts)
            # Only contents can be replaced, so nothing tells a short name from other text.
            and all(any(form in area for form in _forms(name)) for name in names)
            and (texts or names or any(has_thoughts))
        ):
            return _Answer(turn, *tokens, expected=True, whole=True, cut=not all(has_thoughts))
    tokens = candidates[-1][1] if chat.depends_on(turn) else (0, 0)
    return _Answer(turn, *tokens, expected=True, whole=False, cut=True)


def _candidates(
    chat: _Chat, turn: int, ids: list[int]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield where a turn of the assistant may be, as `(characters, tokens)`.

    First what follows the prompt, up to where the next message begins: right unless the template
    prints earlier messages in another way once later ones follow (as those that drop the reasoning
    of earlier turns do). Then what stands in the place of the turn's content, with its end token.
    """
    text, tokenizer = chat.text(), chat.tokenizer
    try:
        before = chat.text(turn, generation_prompt=True) if turn else None
        after = chat.text(turn + 1)
    except _TEMPLATE_ERRORS:
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
        start, stop = (
            len(ids)
            if end == len(text)
            else _common_prefix(ids, _tokens(tokenizer, text[:end], special=False))
            for end in span
        )
        yield span, (start, stop)
    elif before is None:
        yield (0, 0), (0, 0)


def _place_of_content(chat: _Chat, turn: int) -> tuple[int, int] | None:
    """Return the characters that the content of a turn becomes, with the token that ends the turn.

    `None` if the template does not print the content as it is.
    """
    text = chat.text()
    try:
        marked = chat.text(replaced=(turn, _MARK))
        last = chat.text(turn + 1, replaced=(turn, _MARK))
    except _TEMPLATE_ERRORS:
        return None
    if _MARK not in marked or _MARK not in last:
        return None
    head, tail = marked.partition(_MARK)[0], marked.rpartition(_MARK)[2]
    start = _common_prefix(text, head)
    stop = max(start, len(text) - _common_prefix(text[::-1], tail[::-1]))
    rest, ending = text[stop:], last.rpartition(_MARK)[2]
    if not text[start:stop].strip():
        # What follows an empty content, such as a tool call, may stand after less white space.
        stop, rest, ending = len(text) - len(rest.lstrip()), rest.lstrip(), ending.lstrip()
    return start, stop + _common_prefix(rest, ending)


# Without a chat template


def _encode_plain(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[_Answer]]:
    """Join the turns by line feeds and append the end-of-sequence token, if there is one."""
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


def _messages(
    conversation: Conversation,
) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    """Return each turn with its message."""
    messages: Sequence[Mapping[str, Any]] = conversation.messages or [
        {} for _ in conversation.turns
    ]
    return [(turn, dict(each)) for turn, each in zip(conversation.turns, messages, strict=True)]


def _pieces(conversation: Conversation, turn: int) -> list[str]:
    """Return the texts of a turn that must be in its rendering."""
    (_, text), message = _messages(conversation)[turn]
    content = message.get("content", text)
    parts = [text] if isinstance(content, str) else content
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
    return [each for each in texts if each.strip()]


def _forms(text: str) -> list[str]:
    """Return how a template may print a text, without white space: as it is, or as JSON."""
    encoded = (json.dumps(text, ensure_ascii=escaped)[1:-1] for escaped in (False, True))
    return list(dict.fromkeys(map(_squashed, (text, *encoded))))


def _squashed(text: str) -> str:
    return "".join(text.split())


def _tokens(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    # verbose=False: no warning per row that is too long; the caller counts them.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
