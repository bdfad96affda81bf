"""`optimum-cli cap chat`: answers, conversations and what is refused."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import pruned
from helpers.command_line import run_cap
from helpers.evaluation import TEMPLATE
from helpers.tiny_models import tiny_model, tiny_tokenizer

from optimum_cap.commands import chat as chat_command
from optimum_cap.commands.base import Terminated
from optimum_cap.commands.chat import _answer as answer
from optimum_cap.generation import Chat

FLAGS = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny_model("llama", max_position_embeddings=256).save_pretrained(folder / "dense")
    pruned(max_position_embeddings=256).save_pretrained(folder / "pruned")
    for name in ("dense", "pruned"):
        tiny_tokenizer(TEMPLATE).save_pretrained(folder / name)
    return folder


def cap(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    return run_cap(monkeypatch, capfd, ["chat", *arguments])


def test_an_answer_is_that_of_generate_and_the_next_one_follows_it() -> None:
    model, tokenizer = tiny_model("llama", max_position_embeddings=256), tiny_tokenizer(TEMPLATE)
    chat = Chat(model, tokenizer, max_new_tokens=6)
    pieces: list[str] = []
    reply = chat.ask("1+1?", pieces.append)
    assert "".join(pieces) == reply.text
    messages = [{"role": "user", "content": "1+1?"}]

    def expected() -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert reply.text == expected()
    messages += [
        {"role": "assistant", "content": reply.text},
        {"role": "user", "content": "2+2?"},
    ]
    assert chat.ask("2+2?").text == expected()
    chat.clear()
    assert chat.ask("1+1?").text == reply.text


def test_decoding_is_greedy_whatever_the_settings_of_the_model() -> None:
    model, tokenizer = tiny_model("llama", max_position_embeddings=256), tiny_tokenizer(TEMPLATE)
    greedy = Chat(model, tokenizer, max_new_tokens=6).ask("1+1?").text
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert Chat(model, tokenizer, max_new_tokens=6, seed=1).ask("1+1?").text == greedy
    assert model.generation_config.do_sample, "they stay those of the model"


def test_ctrl_c_ends_an_answer_and_sigterm_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [KeyboardInterrupt, Terminated]

    def answer(*_: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr("builtins.input", lambda _: "1+1?")
    monkeypatch.setattr(chat_command, "_answer", answer)
    with pytest.raises(Terminated):
        chat_command._converse({}, False)
    assert not errors


def test_sampling_is_repeatable_and_an_interrupted_answer_is_forgotten() -> None:
    model, tokenizer = tiny_model("llama", max_position_embeddings=256), tiny_tokenizer(TEMPLATE)
    first = Chat(model, tokenizer, max_new_tokens=6, temperature=1.0, seed=3)
    second = Chat(model, tokenizer, max_new_tokens=6, temperature=1.0, seed=3)

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        first.ask("7+7?", stop)
    assert first.ask("1+1?").text == second.ask("1+1?").text


def test_one_message_to_two_models(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [place / "dense", place / "pruned"]
    status, out, error = cap(monkeypatch, capfd, *names, "-p", "1+1?", *FLAGS)
    assert status == 0, error
    first, second = out.index(f"== {names[0]}\n"), out.index(f"== {names[1]}\n")
    assert first < second
    assert out.count(" tokens/s") == 2
    status, alone, _ = cap(monkeypatch, capfd, names[0], "-p", "1+1?", *FLAGS)
    assert alone.strip() == out[first:second].split("\n", 1)[1].split("\n-- ")[0].strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1?\n"))
    assert cap(monkeypatch, capfd, names[0], *FLAGS)[1] == alone


def test_mistakes_are_refused_before_a_model_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be between 0 and 4294967295, got -1"),
        (["--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
        (["-p", " "], "--prompt is empty"),
        ([place / "nothing"], "nothing does not exist: check the path"),
    ):
        status, _, error = cap(monkeypatch, capfd, place / "dense", *arguments)
        assert status == 2
        assert message in error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_conversation_in_a_terminal(place: Path) -> None:
    controller, terminal = pty.openpty()
    command = Path(sys.executable).with_name("optimum-cli")
    process = subprocess.Popen(
        [command, "cap", "chat", place / "dense", place / "pruned", *FLAGS],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm"},
        close_fds=True,
    )
    os.close(terminal)
    seen = ""

    def wait_for(text: str, after: int = 0) -> int:
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen[after:]:
            assert time.monotonic() < end, seen
            if select.select([controller], [], [], 0.2)[0]:
                seen += os.read(controller, 65536).decode(errors="replace")
        return seen.index(text, after) + len(text)

    try:
        wait_for("\n> ")
        os.write(controller, b"1+1?\n")
        first = wait_for("tokens/s")
        wait_for("\n> ", first)
        assert str(place / "dense")[:20] in seen
        os.write(controller, b"/clear\n")
        os.write(controller, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(controller)


def test_a_conversation_that_is_too_long_or_refused_is_one_sentence() -> None:
    model, tokenizer = tiny_model("llama", max_position_embeddings=40), tiny_tokenizer(TEMPLATE)
    chat = Chat(model, tokenizer, max_new_tokens=100)
    reply = chat.ask("1+1?")  # as much of an answer as there is room for
    assert len(tokenizer(reply.text)["input_ids"]) < 40
    said = list(chat.messages)
    with pytest.raises(ValueError, match=r"tokens, of which the model takes 40: begin a new one"):
        chat.ask("2+2? " * 10)
    assert chat.messages == said
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match=r"refuses these messages \(no system\): leave out"):
        Chat(model, tokenizer, system="Be kind.").ask("1+1?")


def test_token_types_are_left_out() -> None:
    model, tokenizer = tiny_model("llama", max_position_embeddings=256), tiny_tokenizer(TEMPLATE)
    expected = Chat(model, tokenizer, max_new_tokens=4).ask("1+1?").text
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert Chat(model, tokenizer, max_new_tokens=4).ask("1+1?").text == expected


def test_an_answer_that_one_model_does_not_end_is_forgotten_by_both() -> None:
    model, tokenizer = tiny_model("llama", max_position_embeddings=256), tiny_tokenizer(TEMPLATE)
    first, second = (Chat(model, tokenizer, max_new_tokens=4) for _ in range(2))

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    second.ask = interrupted
    with pytest.raises(KeyboardInterrupt):
        answer({"a": first, "b": second}, "1+1?", in_terminal=False)
    assert first.messages == second.messages == []
