"""Tiny random models that see images, and a processor to go with one of them."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from helpers.tiny_models import _GEMMA, _GQA, tiny_tokenizer
from optimum_cap.data.calibration import CalibrationExample

# Prints parts, of which images become a placeholder.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}</s>{% endfor %}"
)
IMAGE_TOKEN = 63  # what `tiny_processor` adds to the vocabulary of `tiny_tokenizer`
_TEXT = {**_GQA, "vocab_size": 68}
_WIDE = {**_TEXT, "head_dim": 8}
_TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 65}
_QWEN_TOKENS = {**_TOKENS, "vision_start_token_id": 66, "vision_end_token_id": 67}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 24,
    "patch_size": 4,
    "spatial_merge_size": 2,
}


def _rotation(sections: list[int], **changes: Any) -> dict[str, Any]:
    """Rotations in three dimensions: time, height and width (mrope)."""
    rotation = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
    return {"rope_parameters": {**rotation, **changes}}


# Per model: prefix of its classes, and its config. All have three decoder layers.
IMAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "Llava",
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": 8},
            "image_token_id": IMAGE_TOKEN,
            "image_token_index": IMAGE_TOKEN,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {**_WIDE, "model_type": "mistral"},
            "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
            "image_token_id": IMAGE_TOKEN,
            "image_token_index": IMAGE_TOKEN,
            "spatial_merge_size": 1,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "text_config": {**_GEMMA, "vocab_size": 68},
            "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_id": IMAGE_TOKEN,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 65,
            "eoi_token_index": 66,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            **_QWEN_TOKENS,
            "text_config": {**_TEXT, **_rotation([1, 1, 1])},
            "vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            **_QWEN_TOKENS,
            "text_config": {**_WIDE, **_rotation([2, 1, 1], mrope_interleaved=True)},
            "vision_config": {
                **_QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
    # `AutoModelForCausalLM` loads the language part of these alone.
    "qwen3_5": (
        "Qwen3_5",
        {
            **_QWEN_TOKENS,
            "text_config": {
                **_WIDE,
                **_rotation([1, 0, 0], mrope_interleaved=True, partial_rotary_factor=0.25),
                "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
            },
            "vision_config": {
                **_QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [],
            },
        },
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": {
                **_WIDE,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 20,
            },
            "vision_config": {
                **_VISION,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 65,
            "eoi_token_index": 66,
        },
    ),
    # Layers that attend to images, and do not run without one.
    "mllama": (
        "Mllama",
        {
            "text_config": {**_TEXT, "cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
            },
            "image_token_index": IMAGE_TOKEN,
        },
    ),
}


def tiny_image_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Build a random model that sees images."""
    prefix, settings = IMAGE_MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def image_examples(name: str, count: int) -> list[CalibrationExample]:
    """Calibration examples with an image of 8 by 8 pixels each, as processors make them."""
    generator = torch.Generator().manual_seed(count)
    return [
        _image_example(name, index, torch.randint(4, 60, (8 + index,), generator=generator))
        for index in range(count)
    ]


def _image_example(name: str, index: int, text: torch.Tensor) -> CalibrationExample:
    generator = torch.Generator().manual_seed(index)
    is_qwen = name.startswith("qwen")
    ids = torch.cat([text[:3], torch.full((1 if is_qwen else 4,), IMAGE_TOKEN), text[3:]])
    if is_qwen:  # patches of 4 by 4 pixels, two frames each
        inputs = {
            "pixel_values": torch.randn(4, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long()[None],
        }
    else:
        inputs = {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    if name == "gemma3":  # tokens of an image attend to each other in both directions
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).long()[None]
    if name == "mistral3":
        inputs["image_sizes"] = torch.tensor([[8, 8]])
    scored = torch.arange(len(ids)) > len(ids) - 4
    return CalibrationExample(ids, scored, "images", index, "", inputs)


def tiny_processor(chat_template: str | None = None) -> Any:
    """The processor of the tiny Llava, for images of 8 by 8 pixels."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=chat_template,
    )
