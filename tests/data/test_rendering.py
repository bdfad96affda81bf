"""What chat templates print of a row: all of it, or a warning or an error says what is missing."""

from collections.abc import Callable
from typing import Any

import datasets
import pytest
from helpers.tiny_models import tiny_tokenizer

from optimum_cap.config import CAPConfig
from optimum_cap.data import Conversation, build_calibration_set, describe_example, render_prompt

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TYPED = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Indexes the parts, so that a text is an error and not only empty.
INDEXED = PLAIN.replace("m.content", "m.content[0].text.strip()")
# Accepts nothing but texts: a list of parts is an error.
JOINING = PLAIN.replace("m.content", "('' + m.content)")
TOOLS = (
    "{% for tool in tools or [] %}tool {{ tool.name }};{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}think {{ m.reasoning_content }};{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}call {{ call.function.name }};{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As reasoning models do: only what follows </think> is printed.
CUTTING = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")
# Reasoning of earlier turns is dropped once the user goes on, that of the last turn stays.
FORGETTING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content and loop.last %}think {{ m.reasoning_content }};{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

ADDITION = {
    "tools": [{"name": "add"}],
    "messages": [
        {"role": "user", "content": "one and two?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "i add.",
            "tool_calls": [{"function": {"name": "add"}}],
        },
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "it is three."},
    ],
}


def chat(*contents: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(contents)
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def shown(rows: Any, template: str | None, num_samples: int | None = None) -> list[str]:
    """Return the calibration examples as text, in the order of their rows."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.model_max_length = 1000
    count = num_samples or len(rows)
    config = CAPConfig(0.5, dataset=rows, num_samples=count)
    examples = build_calibration_set(config, tokenizer).examples
    ordered = sorted(examples, key=lambda example: example.index)
    return [describe_example(example, tokenizer).partition("\n")[2] for example in ordered]


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Return the warnings of this package so far."""
    return lambda: caplog.text


# The form of the messages


@pytest.mark.parametrize("template", [TYPED, INDEXED])
@pytest.mark.parametrize("pair", [("who ran?", "the dog ran to the park."), ("d?", "s")])
def test_typed_parts_are_passed_where_the_template_wants_them(
    template: str, pair: tuple[str, str]
) -> None:
    # The short answer is part of what the template prints itself: "s" of "</s>".
    prompt, answer = pair
    assert shown([pair], template) == [f"<user>{prompt}</s><assistant>⟦{answer}</s>⟧"]


@pytest.mark.parametrize("template", [PLAIN, TYPED, INDEXED, JOINING, None])
def test_lists_of_text_parts_are_accepted_by_every_template(template: str | None) -> None:
    rows = [chat(parts("who?"), parts("the dog, i say"))]
    plain = [chat("who?", "the dog, i say")]
    assert shown(rows, template) == shown(plain, template)


def test_several_parts_are_one_text() -> None:
    rows = [chat(parts("who ", "ran?"), parts("the ", "dog."))]
    expected = ["<user>who ran?</s><assistant>⟦the dog.</s>⟧"]
    assert shown(rows, PLAIN) == expected
    assert shown(rows, TYPED) == expected


def test_parts_that_are_no_text_are_refused() -> None:
    image = [{"type": "image", "url": "a.png"}, *parts("what is it?")]
    with pytest.raises(ValueError, match="in-memory' has content of type 'image', but only text"):
        shown([chat(image, "a dog")], PLAIN)


def test_a_template_that_renders_neither_form_is_refused() -> None:
    template = "{% for m in messages %}<{{ m.role }}></s>{% endfor %}"
    with pytest.raises(ValueError, match=r"leaves out .* of all 2 answers .*chat_template to one"):
        shown([("who?", "the dog"), ("what?", "the ball")], template)


# All keys of a row


def test_tools_calls_and_reasoning_reach_the_template() -> None:
    tokenizer = tiny_tokenizer(TOOLS)
    expected = (
        "tool add;<user>one and two?</s><assistant>⟦think i add.;call add;</s>⟧"
        "<tool>3</s><assistant>⟦it is three.</s>⟧"
    )
    assert shown([ADDITION], TOOLS) == [expected]
    reference = tokenizer.apply_chat_template(
        ADDITION["messages"][2:], tools=ADDITION["tools"], tokenize=False
    )
    assert expected.replace("⟦", "").replace("⟧", "").endswith(reference.partition(";")[2])


def test_tools_may_be_json_as_data_sets_on_the_hub_have_them() -> None:
    rows = [{**ADDITION, "tools": '[{"name": "add"}]'}]
    assert shown(rows, TOOLS) == shown([ADDITION], TOOLS)
    for tools, message in (("add", "not valid JSON"), ('{"name": "add"}', "not a list")):
        with pytest.raises(ValueError, match=f"in-memory' has tools that are {message}"):
            shown([{**ADDITION, "tools": tools}], TOOLS)


def test_keys_that_arrow_adds_do_not_reach_the_template() -> None:
    # Arrow gives each message the keys of all messages, and templates print them.
    template = PLAIN.replace("m.content", "m.content }}{{ m.keys() | list | length")
    rows = datasets.Dataset.from_list(
        [{"messages": ADDITION["messages"]}, {"messages": chat("a", "b")}]
    )
    assert "<user>a2</s><assistant>⟦b2</s>⟧" in shown(rows, template)[1]


def test_variables_of_the_template_come_from_the_row() -> None:
    template = "{% if style %}{{ style }};{% endif %}{{ documents[0].text }};" + PLAIN
    row = {
        "messages": chat("who?", "me"),
        "documents": [{"text": "page"}],
        "chat_template_kwargs": {"style": "brief"},
    }
    assert shown([row], template) == ["brief;page;<user>who?</s><assistant>⟦me</s>⟧"]
    row["chat_template_kwargs"] = {"tokenize": True}
    with pytest.raises(ValueError, match="chat_template_kwargs that set tokenize: take them out"):
        shown([row], template)


# What a template leaves out


def test_answers_of_which_the_template_leaves_out_something_are_counted(
    warned: Callable[[], str],
) -> None:
    rows = [("one?", "<think>1</think>one indeed"), ("two?", "two, for certain")]
    config = CAPConfig(0.5, dataset=rows, num_samples=2)
    calibration = build_calibration_set(config, tiny_tokenizer(CUTTING))
    assert calibration.record["sources"][0]["cut_answers"] == 1
    assert "leaves out parts of 1 of 2 answers of data set 'in-memory' (first in row 0)" in warned()
    assert "--show-example" in warned()
    assert shown(rows, CUTTING)[0] == "<user>one?</s><assistant>⟦one indeed</s>⟧"


def test_a_template_that_cuts_every_answer_is_refused() -> None:
    rows = [(f"{word}?", f"<think>hm</think>{word} indeed") for word in ("one", "two")]
    with pytest.raises(ValueError, match="leaves out text or tool calls of all 2 answers of data"):
        shown(rows, CUTTING)


def test_nothing_is_said_if_a_template_only_changes_white_space(
    warned: Callable[[], str],
) -> None:
    template = PLAIN.replace("m.content", "m.content | trim | replace(':', ': ')")
    assert shown([("a?", " one:two  ")], template) == ["<user>a?</s><assistant>⟦one: two</s>⟧"]
    assert warned() == ""


def test_earlier_turns_are_scored_though_later_ones_change_them(
    warned: Callable[[], str],
) -> None:
    messages = chat("one?", "it is one", "two?", "it is two")
    messages[1]["reasoning_content"] = messages[3]["reasoning_content"] = "hm"
    assert shown([messages], FORGETTING) == [
        "<user>one?</s><assistant>⟦it is one</s>⟧<user>two?</s><assistant>⟦think hm;it is two</s>⟧"
    ]
    assert "leaves out parts of 1 of 2 answers" in warned()


def test_a_call_without_text_in_an_earlier_turn_is_scored() -> None:
    template = FORGETTING.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for call in m.tool_calls or [] %}{% if m.content %}\n{% endif %}"
        "call {{ call.function.name }};{% endfor %}",
    )
    (text,) = shown([ADDITION["messages"]], template)
    assert text == (
        "<user>one and two?</s><assistant>⟦call add;</s>⟧<tool>3</s><assistant>⟦it is three.</s>⟧"
    )


def test_a_turn_that_the_template_drops_is_not_scored(warned: Callable[[], str]) -> None:
    (text,) = shown([ADDITION], PLAIN)
    assert text == ("<user>one and two?</s><assistant></s><tool>3</s><assistant>⟦it is three.</s>⟧")
    assert "leaves out parts of 1 of 2 answers" in warned()


def test_messages_of_the_user_that_are_left_out_are_counted(warned: Callable[[], str]) -> None:
    template = PLAIN.replace("m.content }}", "m.content if m.role != 'user' }}")
    shown([("a long question, is it?", "a long answer, yes")], template)
    assert "leaves out the text of 1 messages of the user" in warned()


def test_without_a_template_what_cannot_be_joined_is_counted(warned: Callable[[], str]) -> None:
    shown([ADDITION], None)
    assert "and joining the turns leaves out parts of 1 of 2" in warned()
    with pytest.raises(ValueError, match=r"of all 1 answers .*set tokenizer.chat_template"):
        shown([ADDITION["messages"][:2]], None)


# Rows without a value


@pytest.mark.parametrize("template", [PLAIN, TYPED, JOINING, None])
@pytest.mark.parametrize(
    ("good", "missing"),
    [
        (chat("hi", "hello"), chat("hi", None)),
        ({"messages": chat("hi", "hello")}, {"messages": None}),
        ({"text": "a story"}, {"text": None}),
        ({"prompt": "hi", "completion": "hello"}, {"prompt": "hi", "completion": None}),
        (("hi", "hello"), ("hi", None)),
        ("a story", None),
        ({"prompt": "hi", "completion": "hello"}, None),
    ],
)
def test_missing_values_are_passed_over_as_empty_ones(
    good: Any, missing: Any, template: str | None
) -> None:
    for rows in ([missing, good, good], [good, missing, good]):
        assert len(shown(rows, template, num_samples=2)) == 2
        with pytest.raises(ValueError, match=r"2 usable rows of 3 \(1 have no token to score"):
            shown(rows, template, num_samples=3)


def test_the_prompt_in_evaluation_has_the_form_of_calibration() -> None:
    row = Conversation((("system", "be brief"), ("user", "who?"), ("assistant", "the dog")))
    for template in (PLAIN, TYPED, INDEXED):
        prompt = render_prompt(row, tiny_tokenizer(template))
        assert prompt == "<system>be brief</s><user>who?</s><assistant>"
    assert render_prompt(row, tiny_tokenizer(None)) == "be brief\nwho?\n"
