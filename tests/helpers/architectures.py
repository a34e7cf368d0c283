"""Tiny causal language models of every family that transformers can build offline: two layers, hidden size 16.

A configuration takes from `TINY` the fields that it declares (families give the same thing different names), and from
`FAMILIES` what its family needs besides.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN, LAYERS, HEADS, INNER, POSITIONS, EXPERTS = 16, 2, 2, 32, 128, 4

_NAMES: list[tuple[int, str]] = [
    (
        HIDDEN,
        "hidden_size n_embd d_model dim model_dim attention_hidden_size lru_width word_embed_proj_dim embedding_size "
        "embedding_dim moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size dim_model "
        "hidden_size_per_layer_input pooler_hidden_size prefix_hidden_size input_embedding_size dim_head",
    ),
    (
        INNER,
        "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_ff dff d_inner dim_ff "
        "shared_intermediate_size intermediate_size_mlp dense_intermediate_size mamba_d_ssm n_hidden_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_blocks "
        "num_encoder_layers",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads num_key_value_heads num_kv_heads "
        "swa_num_attention_heads swa_num_key_value_heads linear_num_key_heads linear_num_value_heads",
    ),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_seq_length",
    ),
    (
        EXPERTS,
        "num_experts num_local_experts n_routed_experts moe_num_experts state_size mamba_d_state ssm_state_size "
        "qk_rope_head_dim conv_kernel mamba_d_conv",
    ),
    (
        8,
        "head_dim qk_nope_head_dim v_head_dim q_lora_rank kv_lora_rank rotary_dim sliding_window linear_key_head_dim "
        "linear_value_head_dim global_head_dim attention_head_dim swa_head_dim index_head_dim mamba_d_head chunk_size "
        "mamba_head_dim mamba_chunk_size time_step_rank mamba_dt_rank laurel_rank",
    ),
    (
        2,
        "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts index_n_heads index_topk "
        "n_groups mamba_n_groups",
    ),
    (1, "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts"),
]
TINY: dict[str, Any] = {name: size for size, names in _NAMES for name in names.split()}
TINY.update(
    is_decoder=True, pad_token_id=0, eos_token_id=1, bos_token_id=1, decoder_start_token_id=1
)

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}

# What a family needs besides.
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _LINEAR,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 32},
    "gemma3n_text": {**_SLIDING, "num_kv_shared_layers": 0},
    "gemma4_text": _SLIDING,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _CONVOLUTION,
    "lfm2_moe": {**_CONVOLUTION, "num_dense_layers": 1},
    "lfm3": _CONVOLUTION,
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 1},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "minicpm3": {"dim_model_base": 32},
    "mimo_v2_flash": {"head_dim": 12, "num_key_value_heads": 1},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": {
        **_LINEAR,
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 64, "indexer_compress_ratio": 2},
    },
    "reformer": {"axial_pos_embds": False},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rembert": {"output_embedding_size": 16},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xlstm": {
        "hidden_size": 64,
        "embedding_dim": 64,
        "qk_dim_factor": 1.0,
    },  # its cache takes multiples of 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


# Several modalities (no text alone, or no small form), and what transformers itself cannot build or run so small.
LEFT_OUT = set(
    """
    blt emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 llama4
    mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp whisper
    trocr dots3_note dots3_note_text kimi_linear xlm cpmant beam
    """.split()  # noqa: SIM905
)
FAMILIES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - LEFT_OUT)


def build(family: str, vocabulary: int, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A randomly initialised model of a family, its weights moved so that zeros and ones of norms are found out."""
    torch.manual_seed(seed)
    kind = CONFIG_MAPPING[family]
    declared = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    settings = {name: value for name, value in TINY.items() if name in declared}
    settings.update({name: vocabulary for name in declared if name.startswith("vocab_size")})
    settings = {**settings, **SETTINGS.get(family, {}), **options}
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])(kind(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            moved = parameter + 0.05 * torch.randn_like(parameter)
            if parameter.requires_grad:  # a table of sines stays one
                parameter.copy_(moved)
    return model.float()


def minds_padding(vocabulary: int, by: float = 0.05) -> PreTrainedModel:
    """A RoFormer whose table of positions is off a little: padding moves gradients more than log-probabilities."""
    model = build("roformer", vocabulary)
    table = model.roformer.encoder.embed_positions.weight
    with torch.no_grad():
        table.add_(by * torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    return model
