"""Examples with images: the tokens and other inputs that the processor of a model makes of them.

A processor replaces the placeholder of each image in the text by as many tokens as the image has.
Answers are found in the text before that, and then in the tokens after it.
"""

import copy
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoProcessor
from transformers.utils import is_vision_available

from optimum_cap.data.rendering import Encoded, encode
from optimum_cap.data.sources import IMAGE_PART, Conversation, Source, has_images
from optimum_cap.data.tokenizers import load_tokenizer, usable_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

# What examples have themselves: they are not padded.
_OWN_INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class EncodedImages:
    """A tokenized conversation with images.

    Attributes:
        encoded: Its tokens, with those of the images.
        inputs: The other inputs of the model, such as `pixel_values`.
        digest: The digest of the conversation with that of its images.
    """

    encoded: Encoded
    inputs: dict[str, torch.Tensor]
    digest: str


@dataclass(frozen=True)
class ImageEncoder:
    """Tokenizes conversations with images as the processor of a model does.

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
            every_token: Whether to mark all tokens besides those of images.

        Raises:
            ValueError: An image cannot be read, there is no chat template or it does not support
                the conversation, or the processor does not take it.
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
            scored = torch.ones(len(ids), dtype=torch.bool)
            scored[ids == self._image_token()] = False
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
        # Processors check little, and raise anything.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{type(self.processor).__name__} does not take a row of data set {source.name!r} "
                f"with {len(images)} images ({type(error).__name__}: {reason}): check the row, and "
                "that its chat template prints a placeholder for each image"
            ) from error
        return dict(inputs)

    def _image_token(self) -> int:
        token = getattr(self.processor, "image_token_id", None)
        if token is None:
            raise ValueError(
                f"{type(self.processor).__name__} does not say which tokens are those of images, "
                "so scored_tokens 'all' would score them: choose scored_tokens 'answer'"
            )
        return int(token)


def load_tokenizer_for(dataset: Any, name: str, **options: Any) -> Any:
    """Load the tokenizer of a model, or its processor if calibration data has images.

    Args:
        dataset: The calibration data.
        name: Hub id or folder.
        **options: Keywords of `from_pretrained`.

    Raises:
        ValueError: It cannot be loaded, or the data cannot be read.
        TypeError, FileNotFoundError, ImportError: The data cannot be read.
    """
    load = load_processor if has_images(dataset) else load_tokenizer
    return load(name, **options)


def load_processor(name: str, **options: Any) -> Any:
    """Load the processor of a model that sees images, with its tokenizer.

    Args:
        name: Hub id or folder.
        **options: Keywords of `AutoProcessor.from_pretrained`.

    Raises:
        ValueError: It cannot be loaded.
    """
    try:
        return AutoProcessor.from_pretrained(name, **options)
    # As for tokenizers; image processors also miss packages.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"calibration data with images needs the model's processor, but none could be loaded "
            f"from {name!r} ({type(error).__name__}: {reason}): name another folder (--tokenizer), "
            "pass a loaded one (CAPConfig(tokenizer=processor)), or choose data without images"
        ) from error


def _without_parts(conversation: Conversation) -> Conversation:
    """Return a conversation without the parts that stand for its images."""
    messages = []
    for message in conversation.messages:
        content = message.get("content")
        if isinstance(content, list):
            message = {**message, "content": [part for part in content if part != IMAGE_PART]}
        messages.append(message)
    return replace(conversation, messages=tuple(messages))


def _found_again(plain: Encoded, ids: torch.Tensor, processor: str) -> torch.Tensor:
    """Mark in `ids` the tokens that are scored in `plain`, which has one placeholder per image.

    Each run of scored tokens is found by its number among the equal runs, of which there must be
    as many in both.

    Raises:
        ValueError: There are more or fewer.
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

    try:
        if isinstance(image, Mapping):  # an image of the package datasets that is not decoded
            data, image = image.get("bytes"), image.get("path")
            image = image if data is None else Image.open(io.BytesIO(data))
        if isinstance(image, str | Path):
            beside = (source.folder or Path()) / image
            image = str(beside if beside.is_file() else image)
        return load_image(image).convert("RGB")
    # Image readers raise anything.
    except Exception as error:
        shown = image if isinstance(image, str) else type(image).__name__
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"an image of data set {source.name!r} cannot be read ({shown:.80}: "
            f"{type(error).__name__}: {reason:.200}): correct or remove its row"
        ) from error
