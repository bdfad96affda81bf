"""A conversation with a model, with streamed answers."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, TextStreamer, set_seed

from optimum_cap.generation.sampling import no_other_generation_settings
from optimum_cap.models import device_of, longest_sequence


@dataclass(frozen=True)
class Reply:
    """An answer of a model.

    Attributes:
        text: The text, without special tokens.
        tokens: Its length in tokens.
        seconds: Time for generating it.
        finished: Whether the model ended it; otherwise it stopped at the limit.
    """

    text: str
    tokens: int
    seconds: float
    finished: bool


class Chat:
    """A conversation with one model.

    Attributes:
        messages: The messages so far, in the form that chat templates take.

    Args:
        model: The model.
        tokenizer: Its tokenizer. Without a chat template, the model continues the text of the
            conversation.
        max_new_tokens: Longest answer, in tokens.
        temperature: Sampling temperature; 0 always takes the most probable token.
        seed: Seed of sampling, set before each answer.
        system: System message; `None` for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        system: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._seed = seed
        self._system = system
        self.messages: list[dict[str, str]] = []
        self._length = longest_sequence(model)
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        # Keep only the special tokens of the model's own settings, so that models are comparable.
        names = ("bos_token_id", "pad_token_id", "eos_token_id")
        own = {name: getattr(model.generation_config, name) for name in names}
        own["pad_token_id"] = own["pad_token_id"] or tokenizer.pad_token_id
        own["eos_token_id"] = own["eos_token_id"] or tokenizer.eos_token_id
        self._generation = GenerationConfig(max_new_tokens=max_new_tokens, **own, **sampling)
        self.clear()

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def ask(self, text: str, on_text: Callable[[str], None] = lambda _: None) -> Reply:
        """Return the answer to a message; both become part of the conversation.

        If interrupted, the conversation is as before the message.

        Args:
            text: The message.
            on_text: Called with each piece of the answer.

        Raises:
            ValueError: The chat template rejects the messages, or they leave no room for an answer.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        inputs = self._tokens(messages).to(device_of(self.model))
        count = inputs["input_ids"].shape[1]
        room = self._generation.max_new_tokens
        if self._length is not None:
            room = min(room, self._length - count)
        if room < 1:
            raise ValueError(
                f"the conversation has {count} tokens, of which the model takes {self._length}: "
                "begin a new one (/clear)"
            )
        streamer = _Pieces(self.tokenizer, on_text)
        settings = copy.deepcopy(self._generation)
        settings.max_new_tokens = room
        set_seed(self._seed)
        start = time.monotonic()
        with torch.inference_mode(), no_other_generation_settings(self.model):
            output = self.model.generate(**inputs, generation_config=settings, streamer=streamer)
        seconds = time.monotonic() - start
        tokens = output[0, count:]
        ends = self._generation.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        finished = bool(len(tokens)) and int(tokens[-1]) in ends
        answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return Reply(answer, len(tokens) - finished, seconds, finished)

    def _tokens(self, messages: list[dict[str, str]]) -> Any:
        if self.has_template:
            try:
                inputs = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            except TemplateError as error:
                raise ValueError(
                    f"the chat template of {self.model.name_or_path} refuses these messages "
                    f"({error}): leave out the system message if there is one, or change the "
                    "template"
                ) from error
        else:
            text = "".join(message["content"] for message in messages)
            inputs = self.tokenizer(text, return_tensors="pt")
        inputs.pop("token_type_ids", None)  # decoders do not accept them
        return inputs


class _Pieces(TextStreamer):
    """Passes on the text of an answer word by word."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)
