"""Loads a language model by name, with all parts of its checkpoint."""

from collections.abc import Mapping
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

# Arguments of `from_pretrained` that locate a config and control whether its code may run.
_OF_THE_CONFIG = (
    "cache_dir",
    "code_revision",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def auto_class(config: PreTrainedConfig, trust_remote_code: bool | None = False) -> Any:
    """Return the Auto class that loads all parts of a language model.

    This is `AutoModelForCausalLM`, unless the model also sees images and that class does not
    support it or would load only its language part (Qwen3.5, Llama 4). Then it is
    `AutoModelForImageTextToText`.

    Args:
        config: The config of the checkpoint.
        trust_remote_code: Whether classes of the repository, named in `auto_map`, take precedence.
    """
    auto_map = (trust_remote_code and getattr(config, "auto_map", None)) or {}
    for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if kind.__name__ in auto_map:
            return kind
    of_images = _classes(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config)
    of_text = _classes(MODEL_FOR_CAUSAL_LM_MAPPING, config)
    saved_as = set(config.architectures or ())
    if of_images <= of_text or of_text & saved_as:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def is_language_model(config: PreTrainedConfig) -> bool:
    """Return whether transformers maps a config to a causal language model, with images or not."""
    return bool(
        _classes(MODEL_FOR_CAUSAL_LM_MAPPING, config)
        or _classes(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config)
    )


def sees_images(class_name: str) -> bool:
    """Return whether `AutoModelForImageTextToText` loads the class with this name."""
    names: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return any(class_name in _as_tuple(each) for each in names)


def load_model(name: Any, **options: Any) -> PreTrainedModel:
    """Load a language model by name, with its vision part if it has one.

    Args:
        name: Hub id or folder.
        **options: Arguments of `from_pretrained`.

    Raises:
        OSError: There is no such model, or one of its files cannot be read.
        ValueError: It is not a language model.
    """
    config = options.get("config")
    where = {key: options[key] for key in _OF_THE_CONFIG if key in options}
    try:
        if not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(config or name, **where)
    except (OSError, ValueError):
        # Either an adapter, whose base model has the config, or a mistake: leave it to the Auto
        # class.
        kind: Any = AutoModelForCausalLM
    else:
        kind = auto_class(config, options.get("trust_remote_code"))
    model: PreTrainedModel = kind.from_pretrained(name, **options)
    return model


def _classes(mapping: Mapping[Any, Any], config: PreTrainedConfig) -> set[str]:
    """Return the names of the classes for a config in a mapping of transformers."""
    if type(config) not in mapping:
        return set()
    return {each.__name__ for each in _as_tuple(mapping[type(config)])}


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Return an entry of a mapping of transformers (one or several classes) as a tuple."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)
