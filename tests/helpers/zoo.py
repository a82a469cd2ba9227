"""Tiny random models of the families that people train: 102 of text, 28 composites (text beside pictures).

`build(name)` gives one in float32. Weights are far larger than at an initialization, so that a wrong mask, state or
scale moves the log-probs. Sliding windows and chunks are 16 tokens, rotary scaling begins at 64: short texts cross
them all.
"""

from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

VOCAB = 320
PICTURE = 300  # ids from here on stand for pictures and their borders
WINDOW = 16
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

# Taken over where a config has such a field.
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    sliding_window=WINDOW,
    # Mixtures of experts.
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    shared_intermediate_size=48,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    num_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    router_jitter_noise=0.0,
    input_jitter_noise=0.0,
    # Latent attention.
    kv_lora_rank=16,
    q_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    # Indexers.
    index_head_dim=16,
    index_n_heads=2,
    index_topk=8,
    # Linear attention and state spaces.
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_conv_kernel_dim=4,
    mamba_n_heads=8,
    mamba_d_state=16,
    mamba_d_head=16,
    mamba_chunk_size=16,
    chunk_size=16,
    # Heads that predict further tokens.
    num_mtp_layers=0,
    num_nextn_predict_layers=0,
    **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout", "hidden_dropout"), 0.0),
)
# Latent attention has as many keys as queries.
_LATENT = {"num_key_value_heads": 4}
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_YARN = dict(
    rope_type="yarn",
    rope_theta=1e6,
    factor=16.0,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=64,
    max_position_embeddings=1024,
    llama_4_scaling_beta=0.1,
)
_NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_WINDOWED = dict(layer_types=[SLIDING, FULL])
_WINDOWED_4 = dict(num_hidden_layers=4, layer_types=[SLIDING, FULL, SLIDING, FULL])
_LINEAR_FULL = dict(layer_types=[LINEAR, FULL])
_CONV_FULL = dict(layer_types=["conv", FULL])
_NO_EXPERTS = dict(num_experts=None, moe_intermediate_size=None)
_GEMMA4 = dict(global_head_dim=32, hidden_size_per_layer_input=0)
_GEMMA4_MOE = dict(_WINDOWED, **_GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2)
_PER_LAYER = dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=2)
_LLAMA4 = dict(
    num_hidden_layers=4,
    intermediate_size_mlp=96,
    num_experts_per_tok=1,
    interleave_moe_layer_step=2,
    attention_chunk_size=WINDOW,
    no_rope_layers=[1, 1, 1, 0],
)
_QWEN4 = dict(
    _LINEAR_FULL,
    hc_count=2,
    hc_lowrank=8,
    ple_layer_ids=[1],
    ple_embed_dim=16,
    ngram_vocab_size_base=64,
    heads_per_ngram=2,
    split_ngram_parts=1,
    make_ngram_vocab_size_divisible_by=1,
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=16,
    indexer_budget=8,
    indexer_compress_ratio=4,
)
_NEMOTRON_H = dict(
    layers_block_type=["mamba", "attention", "moe", "mlp"],
    num_hidden_layers=None,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=1,
    ssm_state_size=16,
    conv_kernel=4,
    moe_shared_expert_intermediate_size=32,
    use_mamba_kernels=False,
)
_GRANITE = dict(logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0625)
_GRANITE4_DENSE = dict(
    layer_types=["attention", "attention"],
    num_local_experts=0,
    num_experts_per_tok=0,
    position_embedding_type="rope",
    shared_intermediate_size=96,
)

# Family -> what differs from COMMON. The name is its model type, unless `model_type` stands there.
TEXT: dict[str, dict[str, Any]] = {
    "afmoe": dict(_WINDOWED, num_dense_layers=1, global_attn_every_n_layers=2),
    "apertus": {},
    "arcee": {},
    "bailing_hybrid": dict(_LINEAR_FULL, **_LATENT, layer_group_size=2),
    "bamba": dict(attn_layer_indices=[1], mamba_expand=2),
    "bitnet": {},
    "bloom": dict(n_layer=2, n_head=4),
    "cohere": {},
    "cohere2": _WINDOWED,
    "cohere2_moe": _WINDOWED,
    "deepseek_v2": dict(_LATENT, head_dim=None, n_group=None, topk_group=None, topk_method="greedy"),
    "deepseek_v3": _LATENT,
    "deepseek_v32": dict(_LATENT, head_dim=8),
    "deepseek_v4": dict(num_hidden_layers=4, o_groups=2, o_lora_rank=16, partial_rotary_factor=0.5),
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": dict(moe_k=2, moe_num_experts=4, moe_num_shared_experts=1),
    "exaone4": dict(_WINDOWED, sliding_window_pattern=2),
    "exaone_moe": dict(_WINDOWED, sliding_window_pattern=2),
    "falcon": {},
    "falcon_h1": dict(mamba_d_ssm=128, mamba_expand=2),
    "falcon_mamba": dict(state_size=8),
    "gemma": {},
    "gemma2": dict(query_pre_attn_scalar=16),
    "gemma3_text": dict(_WINDOWED, query_pre_attn_scalar=16),
    "gemma3n_text": dict(
        _WINDOWED_4,
        **_PER_LAYER,
        laurel_rank=8,
        intermediate_size=[96] * 4,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
    ),
    "gemma4_e2b": dict(
        _WINDOWED_4,
        **_PER_LAYER,
        **_NO_EXPERTS,
        model_type="gemma4_text",
        global_head_dim=32,
        use_double_wide_mlp=True,
        final_logit_softcapping=30.0,
    ),
    "gemma4_moe": dict(_GEMMA4_MOE, model_type="gemma4_text"),
    "gemma4_text": dict(
        _WINDOWED,
        **_GEMMA4,
        **_NO_EXPERTS,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        final_logit_softcapping=30.0,
    ),
    "gemma4_unified_text": dict(_WINDOWED, global_head_dim=32, use_bidirectional_attention=None),
    "glm": {},
    "glm4": {},
    "glm4_moe": dict(use_qk_norm=True),
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": dict(_LATENT, head_dim=8),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024, **_NO_DROPOUT),
    "gpt_neox": {},
    "gpt_oss": _WINDOWED,
    "gptj": dict(n_embd=64, n_layer=2, n_head=4, n_positions=1024, rotary_dim=8, **_NO_DROPOUT),
    "granite": _GRANITE,
    "granite4_dense": dict(_GRANITE4_DENSE, model_type="granitemoehybrid"),
    "granitemoe": {},
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], position_embedding_type=None, mamba_expand=2),
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_dense": dict(model_type="hunyuan_v1_dense"),
    "hunyuan_moe": dict(model_type="hunyuan_v1_moe", moe_topk=2),
    "hy_v3": {},
    "hy_v4": _LATENT,
    "inkling_text": dict(
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        sliding_window_size=WINDOW,
        d_rel=8,
        rel_extent=32,
    ),
    "internlm3": {},
    "jamba": dict(
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    "kimi_linear": dict(_LINEAR_FULL, **_LATENT, linear_head_dim=16, linear_num_heads=4, q_lora_rank=None),
    "laguna": {},
    "lfm2": dict(_CONV_FULL, block_auto_adjust_ff_dim=False),
    "lfm2_moe": dict(_CONV_FULL, num_dense_layers=1),
    "lfm3": dict(num_hidden_layers=3, layer_types=["conv", FULL, SLIDING]),
    "llama": {},
    "llama3_rope": dict(model_type="llama", rope_parameters=_LLAMA3),
    "llama4_text": _LLAMA4,
    "longcat_flash": dict(
        _LATENT,
        num_layers=2,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=32,
        zero_expert_num=2,
        moe_topk=2,
        head_dim=8,
        num_hidden_layers=None,
    ),
    "mamba2": dict(head_dim=16, num_heads=8, state_size=16, n_groups=1, n_group=None),
    "mimo_v2_flash": _WINDOWED,
    "minicpm3": dict(_LATENT, head_dim=None),
    "minimax": dict(_LINEAR_FULL, block_size=16, sliding_window=None),
    "minimax_m2": {},
    "minimax_m3_text": dict(
        model_type="minimax_m3_vl_text",
        dense_intermediate_size=96,
        rotary_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
        layer_types=None,
    ),
    "ministral": {},
    "ministral3": dict(sliding_window=None, rope_parameters=_YARN),
    "mistral": dict(sliding_window=None),
    "mistral4": _LATENT,
    "mistral_sw": dict(model_type="mistral"),
    "mixtral": dict(sliding_window=None),
    "mpt": dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=1024),
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": _NEMOTRON_H,
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOWED,
    "olmo_hybrid": _LINEAR_FULL,
    "olmoe": {},
    "opt": dict(ffn_dim=96, word_embed_proj_dim=64, dropout=0.0),
    "phi": {},
    "phi3": dict(sliding_window=None),
    "phi3_sw": dict(model_type="phi3"),
    "phimoe": dict(sliding_window=None),
    "qwen2": dict(use_sliding_window=False),
    "qwen2_moe": {},
    "qwen3": dict(use_sliding_window=False),
    "qwen3_5_moe_text": _LINEAR_FULL,
    "qwen3_5_text": _LINEAR_FULL,
    "qwen3_moe": {},
    "qwen3_next": _LINEAR_FULL,
    "qwen4_exp_text": _QWEN4,
    "seed_oss": {},
    "smollm3": dict(no_rope_layers=[1, 0], use_sliding_window=False),
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": dict(query_pre_attn_scalar=16),
    "zamba2": dict(
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        n_mamba_heads=8,
        use_mamba_kernels=False,
        num_mem_blocks=1,
    ),
}
# Older configs, which have fields of their own for everything in COMMON but these.
_OLD = ("gpt2", "gptj", "bloom", "mpt")
_OLD_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")

_SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
_SIGLIP = dict(_SMALL, model_type="siglip_vision_model", image_size=16, patch_size=4, vision_use_head=False)
_SIGLIP2 = dict(_SMALL, model_type="siglip2_vision_model", patch_size=4, num_patches=16)
_CLIP = dict(_SMALL, model_type="clip_vision_model", image_size=16, patch_size=4, projection_dim=32)
_PIXTRAL = dict(_SMALL, model_type="pixtral", head_dim=16, image_size=32, patch_size=4)
_PATCHES = dict(_SMALL, image_size=16, patch_size=4)
_KIMI = dict(_SMALL, patch_size=4, pos_emb_height=8, pos_emb_width=8)
_QWEN_VISION = dict(
    depth=2,
    hidden_size=32,
    num_heads=2,
    in_channels=3,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    intermediate_size=48,
    out_hidden_size=64,
    num_position_embeddings=64,
)
_QWEN_IDS = dict(image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303)
_GEMMA4_VISION = dict(_SMALL, num_key_value_heads=2, head_dim=16, patch_size=4, pooling_kernel_size=2)
_GEMMA4_VISION |= dict(position_embedding_size=64)
_GEMMA4_IDS = dict(boi_token_id=302, eoi_token_id=303, image_token_id=300, video_token_id=301, audio_config=None)
_GEMMA4_IDS |= dict(boa_token_id=304, eoa_token_index=305, audio_token_id=306)
_GLM_IDS = dict(image_start_token_id=302, image_end_token_id=303, video_start_token_id=304, video_end_token_id=305)
_MROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 2, 2])
_MROPE_INTERLEAVED = dict(_MROPE, mrope_interleaved=True)
_MROPE_PARTIAL = dict(_MROPE_INTERLEAVED, mrope_section=[2, 1, 1], partial_rotary_factor=0.5)
_LLAMA4_VISION = dict(_SMALL, intermediate_size=128, vision_output_dim=32, image_size=16, patch_size=4)
_LLAMA4_VISION |= dict(projector_input_dim=32, projector_output_dim=32)
_MLLAMA_VISION = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_global_layers=1,
    attention_heads=2,
    intermediate_size=48,
    vision_output_dim=64,
    image_size=16,
    patch_size=4,
    intermediate_layers_indices=[0],
    max_num_tiles=1,
    supported_aspect_ratios=[[1, 1]],
)

# Composite -> its model type, the text family in it (a name of TEXT, or a text type of its own with what differs from
# COMMON), its vision config, and the rest.
_Text = str | tuple[str, dict[str, Any]]
COMPOSITES: dict[str, tuple[str, _Text, dict[str, Any], dict[str, Any]]] = {
    "cohere2_vision": (
        "cohere2_vision",
        "cohere2",
        _SIGLIP,
        dict(image_token_id=PICTURE, alignment_intermediate_size=64),
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        _SIGLIP,
        dict(mm_tokens_per_image=4, boi_token_index=302, eoi_token_index=303, image_token_index=PICTURE),
    ),
    "gemma4": (
        "gemma4",
        (
            "gemma4_text",
            dict(_WINDOWED_4, **_PER_LAYER, **_NO_EXPERTS, global_head_dim=32, final_logit_softcapping=30.0),
        ),
        _GEMMA4_VISION,
        _GEMMA4_IDS,
    ),
    "gemma4_moe": ("gemma4", ("gemma4_text", _GEMMA4_MOE), _GEMMA4_VISION, _GEMMA4_IDS),
    "gemma4_unified": (
        "gemma4_unified",
        ("gemma4_unified_text", dict(_WINDOWED, global_head_dim=32)),
        dict(patch_size=4, pooling_kernel_size=2, mm_embed_dim=64, mm_posemb_size=64, output_proj_dims=64),
        _GEMMA4_IDS,
    ),
    "glm4v": (
        "glm4v",
        ("glm4v_text", dict(rope_parameters=dict(_MROPE_PARTIAL, mrope_interleaved=False))),
        dict(
            depth=2, hidden_size=32, num_heads=2, patch_size=4, out_hidden_size=64, intermediate_size=48, image_size=16
        ),
        dict(_GLM_IDS, image_token_id=300, video_token_id=301),
    ),
    "idefics3": ("idefics3", "llama", _PATCHES, dict(image_token_id=PICTURE)),
    "internvl": (
        "internvl",
        "qwen2",
        dict(_SMALL, image_size=(16, 16), patch_size=(4, 4)),
        dict(image_token_id=PICTURE, image_seq_length=4),
    ),
    "kimi_k25": ("kimi_k25", "deepseek_v3", _KIMI, dict(_QWEN_IDS, projection_hidden_size=32)),
    "lfm2_vl": ("lfm2_vl", "lfm2", _SIGLIP2, dict(image_token_id=PICTURE)),
    "llama4": (
        "llama4",
        "llama4_text",
        _LLAMA4_VISION,
        dict(boi_token_index=302, eoi_token_index=303, image_token_index=PICTURE),
    ),
    "llava": ("llava", "llama", _CLIP, dict(image_token_index=PICTURE, image_seq_length=16)),
    "llava_next": (
        "llava_next",
        "mistral",
        _CLIP,
        dict(image_token_index=PICTURE, image_grid_pinpoints=[[16, 16]], image_seq_length=16),
    ),
    "ministral3": ("mistral3", "ministral3", _PIXTRAL, dict(image_token_index=PICTURE)),
    "mistral3": ("mistral3", "mistral", _PIXTRAL, dict(image_token_index=PICTURE)),
    "mistral4": ("mistral3", "mistral4", _PIXTRAL, dict(image_token_index=PICTURE)),
    "mllama": (
        "mllama",
        ("mllama_text_model", dict(num_hidden_layers=3, cross_attention_layers=[1])),
        _MLLAMA_VISION,
        dict(image_token_index=PICTURE),
    ),
    "muse_glimmer": (
        "muse_glimmer",
        ("muse_glimmer_text", {}),
        _KIMI,
        dict(image_token_id=300, video_token_id=301, out_hidden_size=64, projector_hidden_size=48),
    ),
    "paligemma": (
        "paligemma",
        "gemma2",
        dict(_SIGLIP, projection_dim=64),
        dict(image_token_index=PICTURE, vocab_size=VOCAB, projection_dim=64, hidden_size=64),
    ),
    "pixtral": (
        "llava",
        "mistral",
        _PIXTRAL,
        dict(image_token_index=PICTURE, vision_feature_layer=-1, vision_feature_select_strategy="full"),
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        ("qwen2_5_vl_text", dict(rope_parameters=_MROPE)),
        dict(_QWEN_VISION, fullatt_block_indexes=(1,), window_size=16),
        _QWEN_IDS,
    ),
    "qwen2_vl": (
        "qwen2_vl",
        ("qwen2_vl_text", dict(rope_parameters=_MROPE)),
        dict(_QWEN_VISION, embed_dim=32, hidden_size=64, mlp_ratio=2),
        _QWEN_IDS,
    ),
    "qwen3_5": (
        "qwen3_5",
        ("qwen3_5_text", dict(_LINEAR_FULL, rope_parameters=_MROPE_PARTIAL)),
        _QWEN_VISION,
        _QWEN_IDS,
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        ("qwen3_5_moe_text", dict(_LINEAR_FULL, rope_parameters=_MROPE_PARTIAL)),
        _QWEN_VISION,
        _QWEN_IDS,
    ),
    "qwen3_vl": (
        "qwen3_vl",
        ("qwen3_vl_text", dict(rope_parameters=_MROPE_INTERLEAVED)),
        dict(_QWEN_VISION, deepstack_visual_indexes=(0, 1)),
        _QWEN_IDS,
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        ("qwen3_vl_moe_text", dict(rope_parameters=_MROPE_INTERLEAVED)),
        dict(_QWEN_VISION, deepstack_visual_indexes=(0, 1)),
        _QWEN_IDS,
    ),
    "qwen4_exp": ("qwen4_exp", "qwen4_exp_text", _QWEN_VISION, _QWEN_IDS),
    "smolvlm": ("smolvlm", "llama", _PATCHES, dict(image_token_id=PICTURE)),
}
# One name may be a text family and a composite: composites are called "NAME-vl" where a test has both.
ALL = [*TEXT, *(f"{name}-vl" for name in COMPOSITES)]


def _options(model_type: str, differing: dict[str, Any]) -> dict[str, Any]:
    """Returns what of COMMON a config takes, and what differs."""
    known = {field.name for field in fields(CONFIG_MAPPING[model_type])}
    if model_type in _OLD:
        known &= set(_OLD_FIELDS)
    options = {key: value for key, value in COMMON.items() if key in known} | differing
    unset = [key for key in ("num_hidden_layers", "n_group") if key in differing and differing[key] is None]
    if model_type != "deepseek_v2":
        options = {key: value for key, value in options.items() if key not in unset}
    return options


def config_of(name: str, **of_text: Any) -> PreTrainedConfig:
    """Returns the config of a family of TEXT, or of a composite as "NAME-vl", there with other options `of_text`."""
    if not name.endswith("-vl"):
        differing = dict(TEXT[name])
        model_type = differing.pop("model_type", name)
        return CONFIG_MAPPING[model_type](**_options(model_type, differing))
    model_type, text, vision, rest = COMPOSITES[name.removesuffix("-vl")]
    family, differing = (text, dict(TEXT[text])) if isinstance(text, str) else text
    options = dict(_options(family, differing | of_text), model_type=family)
    config = CONFIG_MAPPING[model_type](text_config=options, vision_config=vision, **rest)
    config.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if hasattr(config, key) and getattr(config, key) is None:
            setattr(config, key, COMMON[key])
    return config


def build(name: str, noise: float = 0.1, config: Any = None) -> Any:
    """Returns the model of a family, float32: its initialization and random numbers `noise` wide on every matrix."""
    config = config or config_of(name)
    torch.manual_seed(0)
    if name.endswith("-vl"):
        classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config.model_type]
        model = getattr(transformers, classes if isinstance(classes, str) else classes[0])(config)
    elif name == "mistral4":  # no class of AutoModelForCausalLM
        model = transformers.Mistral4ForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    model = model.float()
    for parameter in model.parameters():
        parameter.data += (noise if parameter.ndim > 1 else 0.02) * torch.randn_like(parameter)
    return model
