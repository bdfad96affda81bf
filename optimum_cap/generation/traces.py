"""Answers of a model as data set rows that any calibration can read."""

from typing import Any

from optimum_cap.data import FINISHED, ROW_DIGEST, Conversation
from optimum_cap.generation.answers import AnsweredPrompt


def trace_rows(answers: list[AnsweredPrompt]) -> list[dict[str, Any]]:
    """Return prompts and answers as plain JSON values, one row each.

    A question becomes `prompt` and `completion`; a longer conversation, or one with tools, becomes
    `messages`. The other keys describe the source of the prompt and how the answer was generated.

    Args:
        answers: The answers.
    """
    return [
        {
            **_content(each.prompt.conversation, each.text),
            FINISHED: each.answer.finished,
            "correct": each.correct,
            "tokens": len(each.answer.ids),
            "attempts": each.attempts,
            "source": each.prompt.example.source,
            "row": each.prompt.example.index,
            ROW_DIGEST: each.prompt.example.digest,
        }
        for each in answers
    ]


def _content(conversation: Conversation, completion: str) -> dict[str, Any]:
    turns = conversation.turns
    before = turns[:-1] if turns[-1][0] == "assistant" else turns
    if not conversation.messages and [role for role, _ in before] == ["user"]:
        return {"prompt": before[0][1], "completion": completion}
    messages: list[Any] = [dict(each) for each in conversation.messages[: len(before)]]
    messages = messages or [{"role": role, "content": text} for role, text in before]
    row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": completion}]}
    variables = dict(conversation.variables)
    for name in ("tools", "documents"):
        if name in variables:
            row[name] = variables.pop(name)
    return row | ({"chat_template_kwargs": variables} if variables else {})
