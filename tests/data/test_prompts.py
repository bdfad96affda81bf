"""Prompts are drawn in the order of calibration, and formatted as there."""

import pytest
import torch
from helpers.answers import TEMPLATE, config
from helpers.calibration import ROWS
from helpers.tiny_models import tiny_tokenizer

from optimum_cap import CAPConfig
from optimum_cap.data import Prompt, PromptSource, build_calibration_set, draw_prompts
from optimum_cap.data.rendering import encode_prompt
from optimum_cap.data.sources import Conversation

CHAT = Conversation((("system", "add"), ("user", "1+1=?"), ("assistant", "2")))


def taken(count: int, template: str | None = None, **changes: object) -> list[Prompt]:
    (source,) = draw_prompts(config(**changes), tiny_tokenizer(template)).sources
    assert isinstance(source, PromptSource)
    return source.take(count)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_prompts_are_what_stands_before_the_answers_of_calibration(template: str | None) -> None:
    settings = CAPConfig(0.5, recipe="wanda", dataset=ROWS, num_samples=8)
    examples = build_calibration_set(settings, tiny_tokenizer(template)).examples
    for prompt, example in zip(taken(8, template), examples, strict=True):
        first = int(example.scored.int().argmax())
        assert torch.equal(prompt.example.input_ids, example.input_ids[:first])
        assert (prompt.example.index, prompt.example.digest) == (example.index, example.digest)
        assert prompt.published == ROWS[example.index][1]


def test_taking_goes_on_where_it_stopped() -> None:
    whole = [each.example.index for each in taken(81)]
    (source,) = draw_prompts(config(), tiny_tokenizer()).sources
    assert isinstance(source, PromptSource)
    parts = [[each.example.index for each in source.take(count)] for count in (3, 50, 50, 1)]
    assert [len(part) for part in parts] == [3, 50, 28, 0]
    assert [index for part in parts for index in part] == whole


def test_prompts_that_leave_no_room_for_the_longest_answer_are_skipped() -> None:
    rows = [(f"{'1' * count}=?", "1") for count in range(1, 20)]
    (source,) = draw_prompts(config(dataset=rows, max_length=24), tiny_tokenizer()).sources
    assert isinstance(source, PromptSource)
    prompts = source.take(19)
    assert max(len(each.example.input_ids) for each in prompts) == 24 - 12
    assert source.too_long == 19 - len(prompts)


def test_what_the_template_leaves_out_of_prompts_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    template = TEMPLATE.replace(
        "{{ message.role[0] }}:{{ message.content }}",
        "{% if message.role != 'system' %}{{ message.content }}{% endif %}",
    )
    row = [{"role": role, "content": text} for role, text in CHAT.turns]
    taken(1, template, dataset=[row], num_samples=1)
    assert "leaves out the text of 1 messages of the system of data set 'in-memory'" in caplog.text


def test_the_published_answer_has_no_part_in_the_prompt() -> None:
    tokenizer = tiny_tokenizer(TEMPLATE)
    with_answer = encode_prompt(CHAT, tokenizer).input_ids
    without = encode_prompt(Conversation(CHAT.turns[:-1]), tokenizer).input_ids
    assert torch.equal(with_answer, without)
    assert len(encode_prompt(Conversation(CHAT.turns[-1:]), tokenizer).input_ids) == 0
