"""Tasks of models by class name: how to load them, and the names of their heads."""

from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from optimum_cap.models.loading import sees_images

_DECODERS = {
    name
    for names in MODEL_MAPPING_NAMES.values()
    for name in ((names,) if isinstance(names, str) else names)
}


@dataclass(frozen=True)
class ModelTask:
    """The task of models whose class names share an ending.

    Attributes:
        auto_class: The Auto class of transformers that loads them.
        pipeline: Their pipeline tag on the Hub.
        head: Name of their head.
    """

    auto_class: str
    pipeline: str
    head: str


_LANGUAGE = ModelTask("AutoModelForCausalLM", "text-generation", "LM head")
_IMAGES = ModelTask("AutoModelForImageTextToText", "image-text-to-text", "LM head")
MODEL_TASKS = {
    "ForCausalLM": _LANGUAGE,
    "LMHeadModel": _LANGUAGE,
    "ForSequenceClassification": ModelTask(
        "AutoModelForSequenceClassification", "text-classification", "classification head"
    ),
    "ForTokenClassification": ModelTask(
        "AutoModelForTokenClassification", "token-classification", "classification head"
    ),
}
"""Ending of a model class name -> task of its models."""


def model_task(class_name: str) -> ModelTask | None:
    """Return the task of a model from its class name; `None` if unknown."""
    if sees_images(class_name):
        return _IMAGES
    tasks = (task for ending, task in MODEL_TASKS.items() if class_name.endswith(ending))
    return next(tasks, None)


def classifier_class(config: Any) -> str | None:
    """Return the class named in the config of a saved model, if it is a classifier.

    Any other Auto class would load its decoder with a new, randomly initialised head.
    """
    names = getattr(config, "architectures", None) or []
    tasks = {name: model_task(name) for name in names}
    return next(
        (name for name, task in tasks.items() if task not in (None, _LANGUAGE, _IMAGES)), None
    )


def check_saved_with_head(config: Any, name: str) -> None:
    """Check by its config that a saved model has a head, which would otherwise be random.

    Args:
        config: The config.
        name: Name of the model, for the error.

    Raises:
        ValueError: The config names a class without a head, such as an embedding model.
    """
    with_head = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for class_name in getattr(config, "architectures", None) or []:
        if class_name in _DECODERS and class_name not in with_head:
            raise ValueError(
                f"the model {name} was saved as {class_name}, without an LM head, which would get "
                "random weights: choose a causal language model or a classifier"
            )


def check_saved_with_lm_head(config: Any, name: str) -> None:
    """Check by its config that a saved model predicts tokens, unlike classifiers.

    Args:
        config: The config.
        name: Name of the model, for the error.

    Raises:
        ValueError: The config names a classifier, or a model without a head.
    """
    check_saved_with_head(config, name)
    if (class_name := classifier_class(config)) is not None:
        raise ValueError(
            f"the model {name} is a {class_name}, which has no LM head and predicts no tokens: "
            "choose a causal language model"
        )
