"""Small random models of every decoder-only class that transformers has."""

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, HIDDEN, HEADS, LAYERS, INTERMEDIATE, EXPERTS = 64, 32, 4, 4, 48, 4
MOST_PARAMETERS = 5_000_000

# What fields of configs are set to, by all names that classes have for them.
_NAMES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (
        HIDDEN,
        "hidden_size n_embd d_model dim embedding_size model_dim attention_hidden_size "
        "word_embed_proj_dim lru_width output_embedding_size input_embedding_size emb_dim",
    ),
    (
        INTERMEDIATE,
        "intermediate_size n_inner ffn_dim ffn_hidden_size d_ff shared_intermediate_size "
        "dense_intermediate_size intermediate_size_mlp block_ff_dim dim_ff encoder_ffn_dim "
        "decoder_ffn_dim dff",
    ),
    (64, "mamba_d_ssm sliding_window"),
    (128, "max_position_embeddings n_positions max_seq_len n_ctx"),
    (
        16,
        "moe_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size kv_lora_rank "
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size qk_head_dim "
        "chunk_size mamba_chunk_size",
    ),
    (12, "q_lora_rank o_lora_rank"),
    (
        8,
        "head_dim attention_head_dim kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim "
        "swa_head_dim global_head_dim linear_key_head_dim linear_value_head_dim mamba_n_heads "
        "mamba_num_heads mamba_d_head mamba_head_dim mamba_d_state ssm_state_size state_size "
        "hidden_size_per_layer_input index_head_dim",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "linear_num_value_heads num_hidden_layers n_layer n_layers num_layers decoder_layers "
        "encoder_layers num_decoder_layers num_experts num_local_experts n_routed_experts "
        "moe_num_experts num_routed_experts time_step_rank mamba_dt_rank laurel_rank conv_kernel "
        "index_n_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_topk "
        "experts_per_token num_selected_experts moe_k moe_top_k num_experts_per_token "
        "linear_num_key_heads mamba_expand altup_num_inputs eos_token_id",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group "
        "num_expert_group first_k_dense_replace decoder_sparse_step mamba_n_groups n_groups "
        "bos_token_id",
    ),
    (0, "pad_token_id"),
)
_SIZES = {name: size for size, names in _NAMES for name in names.split()}

_LISTS_BY_LAYER = (
    *("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attn_type_list"),
    *("hybrid_override_pattern", "moe_layer_freq", "hybrid_layer_pattern", "intermediate_size"),
)

# What single classes need on top of that, mostly because fields depend on each other.
_OWN: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "dots1": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention"] * 4,
    },
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [INTERMEDIATE] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    # Blocks of attention are shared by two layers.
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 2,
    },
    "zamba2": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(kind: str) -> PretrainedConfig:
    """Return a small config of the text model of a class, by its `model_type`."""
    whole = CONFIG_MAPPING[kind]()
    # The decoder of an encoder-decoder is built from the config of both.
    text = whole if whole.is_encoder_decoder else whole.get_text_config(decoder=True)
    fields = text.to_dict()
    known = {*inspect.signature(type(text).__init__).parameters, *fields}
    changes = {
        name: size
        for name, size in _SIZES.items()
        if fields.get(name) is not None and not isinstance(fields[name], list | dict)
    }
    if "is_decoder" in fields:  # BERT and its relatives are encoders by default
        changes["is_decoder"] = True
    if "kv_lora_rank" in changes:  # latent attention has keys and values for every head
        changes["num_key_value_heads"] = HEADS
    changes |= {name: value for name, value in _OWN.get(kind, {}).items() if name in known}
    for name in _LISTS_BY_LAYER:
        if isinstance(fields.get(name), list | tuple) and name not in _OWN.get(kind, {}):
            changes[name] = _each_once(list(fields[name]))
    lists = [changes[name] for name in _LISTS_BY_LAYER if isinstance(changes.get(name), list)]
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in changes:
            changes[name] = max([LAYERS, *map(len, lists)])
            for each in lists:
                each += [each[-1]] * (changes[name] - len(each))
            break
    return type(text)(**changes)


def _each_once(values: list[Any]) -> list[Any]:
    """Return every kind of layer once, then more of the first ones up to `LAYERS`."""
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    return kinds + values[len(kinds) : LAYERS]


def small_model(kind: str) -> PreTrainedModel:
    """Return a small random model of a class.

    Raises:
        ValueError: The class is no decoder, or the config does not make it small.
    """
    config = small_config(kind)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in meta.parameters())
    if meta.config.is_encoder_decoder:
        raise ValueError("an encoder and a decoder")
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters, which fields of its config do not make smaller")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with (
        torch.no_grad()
    ):  # biases and gates of new models are 0, so that nothing would depend on them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.02 * torch.randn(parameter.shape)
            elif float(parameter.std()) < 1e-3:
                parameter.normal_(std=0.05)
    return model


def all_kinds() -> list[str]:
    """Return the `model_type` of every class that transformers maps to causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
