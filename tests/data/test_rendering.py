"""What chat templates print of a row: all of it, or a warning or an error says what is missing."""

import json
import re
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
# The system text stands before the last message of the user, if that is the last message of all.
SYSTEM_LAST = (
    "{% set ns = namespace(text='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.text = m.content ~ ';' %}"
    "{% elif m.role == 'user' %}({{ ns.text if loop.last }}{{ m.content }})"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
REVERSED = PLAIN.replace("in messages", "in messages | reverse")
# Prints question and answer together, and nothing of a question alone.
IN_PAIRS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "q: {{ messages[loop.index0 - 1].content }} a: {{ m.content }}</s>{% endif %}{% endfor %}"
)
ARGUMENTS = PLAIN.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "call {{ call.function.name }} {{ call.function.arguments PRINTED }};{% endfor %}",
)
# Every way in which templates print arguments.
PRINTED = {
    "as JSON": "| tojson",
    "as it is": "",
    "as items": "}}{% for key, each in ITEMS %}<{{ key }}>{{ each }}{% endfor %}{{ ''",
}

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
    audio = [{"type": "audio", "url": "a.wav"}, *parts("what is it?")]
    with pytest.raises(ValueError, match="in-memory' has content of type 'audio', but calibr"):
        shown([chat(audio, "a dog")], PLAIN)


def test_a_template_that_renders_neither_form_is_refused() -> None:
    template = "{% for m in messages %}<{{ m.role }}></s>{% endfor %}"
    with pytest.raises(ValueError, match=r"leaves out .* of all 2 answers .*chat_template to one"):
        shown([("who?", "the dog"), ("what?", "the ball")], template)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
            "{% endif %}{{ c }}",
            "it is one, i say.",
        ),
        ("{{ m.content | replace('<think>', '') }}", "i count to one.</think>it is one, i say."),
        ("{{ '' ~ m.content[:25] }}", "<think>i count to one.</t"),
        ("{{ '' ~ m.content | string | trim | replace('one', '1') }}", None),
    ],
)
def test_typed_parts_are_never_printed_as_a_list(
    content: str, expected: str | None, warned: Callable[[], str]
) -> None:
    template = PLAIN.replace("{{ m.content }}", content)
    rows = [("one?", "<think>i count to one.</think>it is one, i say."), ("two?", "it is two.")]
    expected = expected or rows[0][1].replace("one", "1")
    first, second = shown(rows, template)
    assert first.endswith(f"?</s><assistant>⟦{expected}</s>⟧")
    assert second == "<user>two?</s><assistant>⟦it is two.</s>⟧"
    assert "leaves out parts of 1 of 2 answers" in warned()


def test_the_form_does_not_depend_on_the_contents_of_a_row() -> None:
    # The system text reaches the text only as typed parts, which this template prints as a list.
    template = PLAIN.replace(
        "m.content }}", "m.content if m.role != 'system' or '' not in m.content }}"
    )
    row = chat("who?", "the dog ran to the park.")
    assert shown([[{"role": "system", "content": "a long system text."}, *row]], template) == [
        "<system></s><user>who?</s><assistant>⟦the dog ran to the park.</s>⟧"
    ]


# Where the answers are


@pytest.mark.parametrize("system", ["be brief and kind.", "who are you, friend?"])
def test_a_prompt_that_is_rendered_in_another_way_is_not_scored(
    system: str, warned: Callable[[], str]
) -> None:
    messages = [{"role": "system", "content": system}, *chat("who ran?", "the dog.")]
    assert shown([messages], SYSTEM_LAST) == ["(who ran?) ⟦the dog.</s>⟧"]
    assert "leaves out the text of 1 messages of the system of data set" in warned()
    messages += chat("what now?", "it sleeps.")
    (text,) = shown([messages], SYSTEM_LAST)
    assert text.replace("⟦ ", " ⟦") == "(who ran?) ⟦the dog.</s>⟧(what now?) ⟦it sleeps.</s>⟧"
    # Without the system text, the prompt is the beginning of the text.
    assert shown([messages[1:3]], SYSTEM_LAST) == ["(who ran?)⟦ the dog.</s>⟧"]


def test_calls_without_text_are_scored_where_the_prompt_is_rendered_in_another_way() -> None:
    template = SYSTEM_LAST.replace(
        "{% else %}",
        "{% elif m.tool_calls %}call {{ m.tool_calls[0].function.name }}</s>{% else %}",
    )
    messages = [{"role": "system", "content": "be brief and kind."}, *ADDITION["messages"]]
    (text,) = shown([messages], template)
    assert text == "(one and two?)⟦call add</s>⟧ 3</s>⟦ it is three.</s>⟧"


@pytest.mark.parametrize("template", [REVERSED, IN_PAIRS])
def test_no_text_of_another_turn_is_scored(template: str) -> None:
    pairs = [("who ran to the park?", "it was the dog."), ("who?", "me"), ("the dog", "the dog")]
    for text, (prompt, answer) in zip(shown(pairs, template), pairs, strict=True):
        assert text.count("⟦") == 1
        scored = text.partition("⟦")[2].partition("⟧")[0]
        assert scored.removesuffix("</s>").strip() == answer
        assert prompt in text.replace(f"⟦{scored}⟧", "")


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


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_messages_of_every_other_role_are_counted(role: str, warned: Callable[[], str]) -> None:
    messages = [{"role": role, "content": "a text that matters."}, *chat("who?", "it is me.")]
    shown([messages], PLAIN)
    assert warned() == ""
    shown([messages] * 2, PLAIN.replace("m.content }}", f"m.content if m.role != '{role}' }}}}"))
    assert f"leaves out the text of 2 messages of the {role} of data set" in warned()


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_that_are_left_out_are_counted(
    name: str, warned: Callable[[], str]
) -> None:
    row = {"messages": chat("who?", "it is me."), name: [{"name": "add", "text": "a page"}]}
    shown([row] * 2, PLAIN + "{{ " + name + " | length }}")
    assert warned() == ""
    shown([row] * 2, PLAIN)
    assert f"leaves out the {name} of 2 rows of data set 'in-memory' (first in row" in warned()
    shown([row], None)
    assert f"and joining the turns leaves out the {name} of 1 rows" in warned()


VALUES: dict[str, Any] = {
    "text": "the city of paris",
    "short": "s",
    "quotes": "say 'hi' and \"ho\"\n",
    "number": 12.5,
    "flag": True,
    "nothing": None,
    "nested": {"list": [1, {"deep": "to the end"}], "empty": ""},
}


def calling(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    first = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [*chat("one and two?"), first, *chat("more?", "it is three.")]


@pytest.mark.parametrize("printed", PRINTED)
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("value", [VALUES, *({"key": each} for each in VALUES.values())], ids=str)
def test_arguments_of_tool_calls_belong_to_the_answer(
    value: dict[str, Any], as_text: bool, printed: str, warned: Callable[[], str]
) -> None:
    expression = PRINTED[printed].replace("ITEMS", "call.function.arguments | items")
    if as_text:
        expression = PRINTED[printed].replace("ITEMS", "[('json', call.function.arguments)]")
    rows = [calling(json.dumps(value) if as_text else value)]
    template = ARGUMENTS.replace("PRINTED", expression)
    (text,) = shown(rows, template)
    assert "⟦call add " in text
    assert warned() == ""
    if value == {"key": None}:
        return
    (text,) = shown(rows, ARGUMENTS.replace("{{ call.function.arguments PRINTED }}", ""))
    assert "⟦call add ;</s>⟧" in text
    assert "leaves out parts of 1 of 2 answers" in warned()


def test_a_second_call_that_is_left_out_is_counted(warned: Callable[[], str]) -> None:
    messages = calling({"city": "the city of paris"})
    calls = messages[1]["tool_calls"]
    calls.append({"function": {"name": "add", "arguments": {"city": "the town of rome"}}})
    template = ARGUMENTS.replace("PRINTED", "| tojson")
    shown([messages], template)
    assert warned() == ""
    shown([messages], template.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
    assert "leaves out parts of 1 of 2 answers" in warned()


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ 1 + '' }}", "TypeError: unsupported operand"),
        (
            "{{ messages[0].content.encode('ascii', 'no') }}{{ 'a'.index('b') }}",
            "ValueError: subst",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum"),
        ("{{ raise_exception('no chats') }}", "no chats"),
        ("{{ undefined_name() }}", "'undefined_name' is undefined"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_whatever_a_template_raises_is_one_sentence(broken: str, cause: str) -> None:
    message = (
        r"^the tokenizer's chat template does not support a chat with the roles user, assistant "
        rf"\({re.escape(cause)}[^\n]*\): change the chat, or set tokenizer.chat_template to another"
    )
    with pytest.raises(ValueError, match=message):
        shown([("who?", "me")], broken + PLAIN)
    row = Conversation((("user", "who?"), ("assistant", "me")))
    tokenizer = tiny_tokenizer("{% if add_generation_prompt %}" + broken + "{% endif %}" + PLAIN)
    with pytest.raises(ValueError, match=message.replace("user, assistant", "user(, assistant)?")):
        render_prompt(row, tokenizer)


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
