"""Prompts for questions: instructions on the form of an answer, and worked examples.

Chat models get an instruction. Base models, whose tokenizer has no chat template, get examples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optimum_cap.data import Conversation, render_prompt
from optimum_cap.evaluation.tasks import ChoiceQuestion, Question, task_of

EXAMPLES_OF_BASE_MODELS = 5  # as in the task gsm8k of lm-evaluation-harness
_NEXT_QUESTION = "Question:"  # how a base model continues after its answer


def is_chat(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def number_of_examples(name: str, requested: int | None, tokenizer: Any) -> int:
    """Return the number of worked examples in the prompts of a task.

    Args:
        name: Name of the task.
        requested: The requested number. `None` is the default: 5 if answers need a form that only
            worked examples can show to a model without a chat template, else 0.
        tokenizer: The tokenizer.
    """
    if requested is not None:
        return requested
    return EXAMPLES_OF_BASE_MODELS if task_of(name).instruction and not is_chat(tokenizer) else 0


def may_need_examples(name: str, requested: int | None) -> bool:
    """Return whether the prompts of a task contain worked examples for some tokenizer."""
    return bool(task_of(name).instruction) if requested is None else requested > 0


def prompt_of(name: str, question: Question, examples: Sequence[Question], tokenizer: Any) -> str:
    """Return the prompt of a question, which the model continues with its answer.

    Args:
        name: Name of the task.
        question: The question.
        examples: Worked examples to show before it.
        tokenizer: The tokenizer.

    Raises:
        ValueError: The chat template does not support the conversation.
    """
    if is_chat(tokenizer):
        return render_prompt(_chat(task_of(name).instruction, question, examples), tokenizer)
    if not examples:
        return render_prompt(question.conversation, tokenizer)
    shown = [(_asked(example), example.answer) for example in examples]
    return _continued_text(shown, _asked(question))


def stop_texts(name: str, examples: Sequence[Question], tokenizer: Any) -> tuple[str, ...]:
    """Return the texts that end a response to `prompt_of`, besides the end-of-sequence token."""
    until = task_of(name).until
    shows = bool(examples) and not is_chat(tokenizer)
    return (*until, _NEXT_QUESTION) if shows and _NEXT_QUESTION not in until else until


def choices_of(
    question: ChoiceQuestion, examples: Sequence[ChoiceQuestion]
) -> list[tuple[str, str]]:
    """Return the context of a question with each of its choices, as lm-evaluation-harness does.

    It uses no chat template, so the results are the harness's by default.
    """
    shown = [(each.question, each.choices[each.gold]) for each in examples]
    context = _continued_text(shown, question.question)
    return [(context, f" {choice}") for choice in question.choices]


def _continued_text(shown: Sequence[tuple[str, str]], question: str) -> str:
    """Return worked examples (question and answer each), then a question without its answer."""
    examples = "".join(f"{_NEXT_QUESTION} {asked}\nAnswer: {answer}\n\n" for asked, answer in shown)
    return f"{examples}{_NEXT_QUESTION} {question}\nAnswer:"


def _asked(question: Question) -> str:
    return "\n".join(text for _, text in question.conversation.turns[:-1])


def _chat(instruction: str, question: Question, examples: Sequence[Question]) -> Conversation:
    """Return a conversation with the examples as earlier turns, each with the instruction."""
    conversation = question.conversation
    turns, messages = list(conversation.turns), [dict(each) for each in _messages(conversation)]
    start = 1 if turns[0][0] == "system" and len(turns) > 2 else 0
    shown = [turn for example in examples for turn in _without_system(example.conversation)]
    turns[start:start] = shown
    messages[start:start] = [{"role": role, "content": text} for role, text in shown]
    if instruction:
        asks = {start + 2 * position for position in range(len(examples))} | {len(turns) - 2}
        for position in asks:
            role, text = turns[position]
            turns[position] = (role, f"{text}\n\n{instruction}")
            messages[position]["content"] = turns[position][1]
    return Conversation(
        tuple(turns), tuple(messages) if conversation.messages else (), conversation.variables
    )


def _messages(conversation: Conversation) -> Sequence[Mapping[str, Any]]:
    if conversation.messages:
        return conversation.messages
    return [{"role": role, "content": text} for role, text in conversation.turns]


def _without_system(conversation: Conversation) -> list[tuple[str, str]]:
    return [("user", conversation.turns[-2][1]), ("assistant", conversation.turns[-1][1])]
