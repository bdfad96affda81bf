"""Examples with images: the tokens and other inputs from a model's processor.

A processor replaces the placeholder of each image in the text with as many tokens as the image has.
Answers are found in the text before that, and then located in the tokens after it.
"""

import copy
import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoProcessor, PreTrainedTokenizerBase
from transformers.utils import is_vision_available

from optimum_cap.data.rendering import Encoded, encode
from optimum_cap.data.sources import IMAGE_PART, Conversation, Source
from optimum_cap.data.tokenizers import load_tokenizer, usable_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

# Part of the examples themselves, which are not padded.
_OWN_INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class EncodedImages:
    """A tokenized conversation with images.

    Attributes:
        encoded: Its tokens, including image tokens.
        inputs: The other inputs of the model, such as `pixel_values`.
        digest: The digest of the conversation and its images.
    """

    encoded: Encoded
    inputs: dict[str, torch.Tensor]
    digest: str


class ImagesFoundError(Exception):
    """A row has images, but only the tokenizer has been loaded."""


@dataclass
class TokenizerWithProcessor:
    """The tokenizer of a model that sees images; its processor is loaded when a row has images.

    Image processors need packages that text does not need.

    Attributes:
        tokenizer: The tokenizer.
        name: Hub id or folder of the processor.
        options: Arguments of `AutoProcessor.from_pretrained`.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    options: dict[str, Any]

    def load(self) -> "ProcessorMixin":
        """Return the processor.

        Raises:
            ValueError: It cannot be loaded, or is only a tokenizer.
        """
        try:
            processor = AutoProcessor.from_pretrained(self.name, **self.options)
        # As for tokenizers; image processors may also lack packages.
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            raise self._no_processor(
                f"none could be loaded from {self.name!r} ({type(error).__name__}: {reason})"
            ) from error
        if getattr(processor, "image_processor", None) is None:
            raise self._no_processor(f"{self.name!r} has a {type(processor).__name__} alone")
        return processor

    def _no_processor(self, reason: str) -> ValueError:
        return ValueError(
            f"the calibration data has images, which need the model's processor, but {reason}: "
            "name another folder (--tokenizer), pass a loaded one "
            "(CAPConfig(tokenizer=processor)), or choose data without images"
        )


@dataclass(frozen=True)
class ImageEncoder:
    """Tokenizes conversations with images like the model's processor.

    Attributes:
        processor: The processor.
        tokenizer: Its tokenizer, with the chat template of the processor.
    """

    processor: "ProcessorMixin"
    tokenizer: Any

    @classmethod
    def of(cls, processor: Any) -> "ImageEncoder | None":
        """Return the encoder of a processor; `None` for a tokenizer or another processor."""
        if getattr(processor, "image_processor", None) is None:
            return None
        tokenizer = usable_tokenizer(processor)
        if template := getattr(processor, "chat_template", None):
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = template
        return cls(processor, tokenizer)

    def encode(
        self, conversation: Conversation, source: Source, every_token: bool
    ) -> EncodedImages:
        """Tokenize a conversation and mark its answers.

        Args:
            conversation: The conversation, with images.
            source: Its data set.
            every_token: Whether to mark all tokens except image tokens.

        Raises:
            ValueError: An image cannot be read, there is no chat template or it does not support
                the conversation, or the processor does not accept it.
            ImportError: Pillow is not installed.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"data set {source.name!r} has images, but the processor "
                f"{type(self.processor).__name__} has no chat template, which says where they "
                "belong: set processor.chat_template"
            )
        if not conversation.finished:
            raise ValueError(
                f"data set {source.name!r} has images and an answer that is not finished: leave "
                "out rows that are not finished"
            )
        place = getattr(self.processor, "image_token", None)
        if place and any(place in text for _, text in conversation.turns):
            raise ValueError(
                f"a row of data set {source.name!r} has images, and {place!r} in its text, which "
                "the chat template prints for each image: write a part of the message "
                '({"type": "image"}) in its place'
            )
        if not every_token and _has_images_in_answers(conversation):
            raise ValueError(
                f"a row of data set {source.name!r} has an image in an answer, and tokens of "
                "images are not scored: score all other tokens (scored_tokens='all'), or leave "
                "such rows out"
            )
        images = [_loaded(image, source) for image in conversation.images]
        plain = encode(conversation, self.tokenizer, limit=0)
        if encode(_without_parts(conversation), self.tokenizer, limit=0).text == plain.text:
            raise ValueError(
                f"the chat template of {type(self.processor).__name__} leaves out the images of "
                f"data set {source.name!r}: set processor.chat_template to one that prints a "
                "placeholder for each, or choose data without images"
            )
        inputs = self._process(plain.text, images, source)
        ids = inputs["input_ids"][0]
        if every_token:
            scored = ~torch.isin(ids, self._image_tokens(plain.input_ids, ids))
        else:
            scored = _found_again(plain, ids, type(self.processor).__name__)
        digest = hashlib.sha256(conversation.digest.encode())
        for image in images:
            digest.update(f"{image.mode} {image.size}\n".encode() + image.tobytes())
        own = {name: value for name, value in inputs.items() if name not in _OWN_INPUTS}
        encoded = replace(plain, input_ids=ids, scored=scored)
        return EncodedImages(encoded, own, digest.hexdigest())

    def _process(self, text: str, images: list["Image"], source: Source) -> dict[str, torch.Tensor]:
        try:
            inputs = self.processor(
                text=[text], images=[images], return_tensors="pt", add_special_tokens=False
            )
        # Processors check little, and may raise any error.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{type(self.processor).__name__} does not take a row of data set {source.name!r} "
                f"with its images, {len(images)} in all ({type(error).__name__}: {reason}): check "
                "the row, and that the chat template prints a placeholder for each image"
            ) from error
        return dict(inputs)

    def _image_tokens(self, plain: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the tokens that represent or accompany images, int64 `[tokens]`.

        Args:
            plain: The tokens with a placeholder per image.
            ids: The tokens after processing.
        """
        counts = Counter(ids.tolist())
        counts.subtract(Counter(plain.tolist()))
        tokens = {token for token, added in counts.items() if added}
        tokens.update(getattr(self.processor, "image_token_ids", None) or ())
        tokens.add(getattr(self.processor, "image_token_id", None))
        return torch.tensor(sorted(tokens - {None}), dtype=torch.long)


def load_tokenizer_of(name: str, sees_images: bool, **options: Any) -> Any:
    """Load the tokenizer of a model; its processor is loaded when calibration data has images.

    Args:
        name: Hub id or folder.
        sees_images: Whether the model sees images.
        **options: Arguments of `from_pretrained`.

    Returns:
        The tokenizer, or a `TokenizerWithProcessor` for a model that sees images.

    Raises:
        ValueError: There is no tokenizer, or it has no vocabulary.
    """
    tokenizer = load_tokenizer(name, **options)
    return TokenizerWithProcessor(tokenizer, name, options) if sees_images else tokenizer


def _has_images_in_answers(conversation: Conversation) -> bool:
    return any(
        message.get("role") == "assistant"
        and isinstance(message.get("content"), list)
        and IMAGE_PART in message["content"]
        for message in conversation.messages
    )


def _without_parts(conversation: Conversation) -> Conversation:
    """Return a conversation without its image parts."""
    messages = []
    for message in conversation.messages:
        content = message.get("content")
        if isinstance(content, list):
            message = {**message, "content": [part for part in content if part != IMAGE_PART]}
        messages.append(message)
    return replace(conversation, messages=tuple(messages))


def _found_again(plain: Encoded, ids: torch.Tensor, processor: str) -> torch.Tensor:
    """Mark in `ids` the tokens scored in `plain`, which has one placeholder per image.

    Each run of scored tokens is found by its position among equal runs, whose number must be the
    same in both.

    Raises:
        ValueError: The numbers differ.
    """
    before, after = plain.input_ids.tolist(), ids.tolist()
    scored = torch.zeros(len(after), dtype=torch.bool)
    for start, stop in _runs(plain.scored.tolist()):
        run = before[start:stop]
        places, found = _occurrences(run, before), _occurrences(run, after)
        if len(places) != len(found):
            raise ValueError(
                f"{processor} gives an answer other tokens than its tokenizer does, so the answer "
                "cannot be found: score all tokens (scored_tokens='all')"
            )
        place = found[places.index(start)]
        scored[place : place + len(run)] = True
    return scored


def _runs(scored: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the start and the end of each run of True."""
    edges = [False, *scored, False]
    starts = [i for i in range(len(scored)) if edges[i + 1] and not edges[i]]
    stops = [i + 1 for i in range(len(scored)) if edges[i + 1] and not edges[i + 2]]
    return list(zip(starts, stops, strict=True))


def _occurrences(run: list[int], ids: list[int]) -> list[int]:
    """Return where a run of tokens begins in `ids`."""
    return [i for i in range(len(ids) - len(run) + 1) if ids[i : i + len(run)] == run]


def _loaded(image: Any, source: Source) -> "Image":
    """Return an image of a row as an RGB image.

    Raises:
        ValueError: It cannot be read.
        ImportError: Pillow is not installed.
    """
    if not is_vision_available():
        raise ImportError(
            f"data set {source.name!r} has images, which need the package pillow: run "
            "`pip install pillow`"
        )
    from PIL import Image
    from transformers.image_utils import load_image

    tried = ""
    try:
        if isinstance(image, Mapping):  # an undecoded image of the package datasets
            data, path = image.get("bytes"), image.get("path") or image.get("url")
            image = path if data is None else Image.open(io.BytesIO(data))
        if isinstance(image, str | Path):
            name = str(image).removeprefix("file://")
            places = [os.path.join(folder, name) for folder in (source.folder or "", "")]
            found = next(filter(os.path.isfile, places), None)
            if found is None and not name.startswith(("http:", "https:", "data:")):
                folders = dict.fromkeys(os.path.dirname(os.path.abspath(p)) for p in places)
                tried = f", no file in {' or '.join(folders)}"
            image = found or str(image)
        return load_image(image).convert("RGB")
    # Image readers may raise any error.
    except Exception as error:
        shown = image if isinstance(image, str) else type(image).__name__
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"an image of data set {source.name!r} cannot be read ({shown:.80}{tried}: "
            f"{type(error).__name__}: {reason:.200}): correct or remove its row"
        ) from error
