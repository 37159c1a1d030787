"""Mixtures of experts, and models that carry a state instead of attending (with or without some attention layers)."""

from __future__ import annotations

from typing import Any

from .decoders import GROUPED, TEXT
from .model import BATCH_SIZES, FIXED_IDS, IDS, TEXT_SIZES, Sizes, ZooModel, entry, pretrained

CHUNKED_SIZES: tuple[Sizes, Sizes, Sizes] = ({"B": 2, "S": 12}, {"B": 1, "S": 9}, {"B": 3, "S": 21})
CHUNKED = (
    "the scan works on chunks of 8 steps; traced at 12, torch.export guards S > 8 (more than one chunk) and "
    "S % 8 != 0 (padding present)"
)
UNROLLED = "the length is fixed: the recurrence is a Python loop over steps, which a trace unrolls"


def causal(
    name: str,
    family: str,
    prefix: str,
    layers: int,
    note: str = "",
    unrolled: bool = False,
    sizes: tuple[Sizes, Sizes, Sizes] = TEXT_SIZES,
    **settings: Any,
) -> ZooModel:
    """A causal language model `<prefix>ForCausalLM` of `layers` layers.

    `unrolled`: it steps through the sequence in a Python loop, so that a trace fixes the length.
    """
    settings = TEXT | {"num_hidden_layers": layers} | settings
    construct = pretrained(f"{prefix}ForCausalLM", f"{prefix}Config", settings)
    if unrolled:
        return entry(name, family, construct, (FIXED_IDS,), BATCH_SIZES, (layers,), note=note or UNROLLED)
    return entry(name, family, construct, (IDS,), sizes, (layers,), note=note)


EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **GROUPED}

LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}

MAMBA_2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}

MIXTURES: tuple[ZooModel, ...] = (
    causal("mixtral", "moe", "Mixtral", 2, num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    causal("qwen2_moe", "moe", "Qwen2Moe", 3, shared_expert_intermediate_size=32, **EXPERTS),
    causal(
        "qwen3_moe",
        "moe",
        "Qwen3Moe",
        2,
        head_dim=8,
        experts_implementation="batched_mm",
        note="experts as one gathered batched product, in place of the default grouped product",
        **EXPERTS,
    ),
    causal("olmoe", "moe", "Olmoe", 3, **EXPERTS),
    causal("phimoe", "moe", "Phimoe", 2, num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    causal("granitemoe", "moe", "GraniteMoe", 3, num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    causal(
        "gpt_oss",
        "moe",
        "GptOss",
        2,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=8,
        note="attention sinks",
        **GROUPED,
    ),
    causal(
        "deepseek_v3",
        "moe",
        "DeepseekV3",
        3,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        note="latent attention; the first layer is dense",
        **LATENT,
    ),
)

STATE_SPACES: tuple[ZooModel, ...] = (
    causal("mamba", "ssm", "Mamba", 2, unrolled=True, state_size=8, time_step_rank=4, use_mambapy=False),
    causal(
        "mamba2",
        "ssm",
        "Mamba2",
        3,
        sizes=CHUNKED_SIZES,
        note=CHUNKED,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        state_size=8,
        chunk_size=8,
    ),
    causal("falcon_mamba", "ssm", "FalconMamba", 2, unrolled=True, state_size=8, time_step_rank=4),
    causal("bamba", "ssm", "Bamba", 3, sizes=CHUNKED_SIZES, note=CHUNKED, attn_layer_indices=[1], **MAMBA_2, **GROUPED),
    causal(
        "granitemoehybrid",
        "ssm",
        "GraniteMoeHybrid",
        2,
        sizes=CHUNKED_SIZES,
        note=CHUNKED,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        **MAMBA_2,
        **GROUPED,
    ),
    causal(
        "falcon_h1",
        "ssm",
        "FalconH1",
        2,
        sizes=CHUNKED_SIZES,
        note=CHUNKED,
        mamba_d_ssm=64,
        head_dim=8,
        **MAMBA_2,
        **GROUPED,
    ),
    causal(
        "jamba",
        "ssm",
        "Jamba",
        3,
        unrolled=True,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        num_experts=4,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        **GROUPED,
    ),
    causal(
        "zamba2",
        "ssm",
        "Zamba2",
        3,
        sizes=CHUNKED_SIZES,
        note=CHUNKED,
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=2,
        chunk_size=8,
        adapter_rank=4,
        num_key_value_heads=4,
        use_mamba_kernels=False,
    ),
    causal(
        "recurrent_gemma", "ssm", "RecurrentGemma", 3, unrolled=True, attention_window_size=8, num_key_value_heads=1
    ),
    causal("lfm2", "ssm", "Lfm2", 3, layer_types=["conv", "full_attention", "conv"], **GROUPED),
    causal(
        "minimax",
        "ssm",
        "MiniMax",
        2,
        block_size=8,
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sizes=({"B": 2, "S": 12}, {"B": 3, "S": 10}, {"B": 4, "S": 15}),
        note="loops over blocks of 8: traced at two, torch.export guards 10 <= S <= 15, and a batch of at least 2",
        **GROUPED,
    ),
    causal(
        "qwen3_next",
        "ssm",
        "Qwen3Next",
        2,
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        shared_expert_intermediate_size=16,
        note="chunks of 64: traced at one, torch.export guards S < 64; without that guard the program runs, and gives "
        "wrong numbers from 65 on. Slow: more than a minute to trace",
        **EXPERTS,
    ),
    causal(
        "nemotron_h",
        "ssm",
        "NemotronH",
        3,
        sizes=CHUNKED_SIZES,
        note=CHUNKED,
        layers_block_type=["mamba", "attention", "mlp"],
        head_dim=8,
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        chunk_size=8,
        use_mamba_kernels=False,
        **GROUPED,
    ),
    causal("rwkv", "ssm", "Rwkv", 2, unrolled=True, context_length=64, rescale_every=0),
)
