"""Decoder-only language models: grouped heads or not, rotary, ALiBi or learned positions, parallel branches or not."""

from __future__ import annotations

from typing import Any

from .model import IDS, TEXT_SIZES, VOCAB, ZooModel, entry, pretrained

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What most text configurations call their sizes; each entry adds what is its own."""

GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
WINDOW: dict[str, Any] = {"sliding_window": 8}
"""Shorter than the traced sequence, so that the window cuts something off."""


def decoder(
    name: str,
    prefix: str,
    layers: int,
    note: str = "",
    head: str = "ForCausalLM",
    config: str = "Config",
    **settings: Any,
) -> ZooModel:
    """A causal language model `<prefix><head>` of `layers` layers."""
    settings = TEXT | {"num_hidden_layers": layers} | settings
    construct = pretrained(prefix + head, prefix + config, settings)
    return entry(name, "decoder", construct, (IDS,), TEXT_SIZES, (layers,), note=note)


DECODERS: tuple[ZooModel, ...] = (
    decoder("llama", "Llama", 3, **GROUPED),
    decoder("mistral", "Mistral", 2, **GROUPED, **WINDOW),
    decoder("qwen2", "Qwen2", 3, **GROUPED),
    decoder("qwen3", "Qwen3", 2, head_dim=8, **GROUPED),
    decoder("gemma", "Gemma", 3, head_dim=8, num_key_value_heads=1),
    decoder(
        "gemma2",
        "Gemma2",
        2,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
        note="soft-capped attention, which transformers runs as plain matmul and softmax; caps low enough to bend",
        **GROUPED,
        **WINDOW,
    ),
    decoder("gemma3", "Gemma3", 3, config="TextConfig", head_dim=8, **GROUPED, **WINDOW),
    decoder("phi", "Phi", 2, partial_rotary_factor=0.5),
    decoder("phi3", "Phi3", 3, note="one matrix for query, key and value; one for gate and up", **GROUPED),
    decoder("olmo", "Olmo", 2, clip_qkv=1.5),
    decoder("olmo2", "Olmo2", 3, **GROUPED),
    decoder("gpt2", "GPT2", 3, head="LMHeadModel", n_embd=32, n_head=4, n_layer=3, n_positions=64),
    decoder("opt", "OPT", 2, ffn_dim=64, word_embed_proj_dim=32),
    decoder(
        "gpt_neo", "GPTNeo", 2, num_layers=2, num_heads=4, window_size=8, attention_types=[[["global", "local"], 1]]
    ),
    decoder("gpt_neox", "GPTNeoX", 3, rotary_pct=0.5, note="parallel residual, partial rotary"),
    decoder("gptj", "GPTJ", 2, n_embd=32, n_head=4, n_layer=2, n_positions=64, rotary_dim=4),
    decoder("bloom", "Bloom", 3, n_layer=3, n_head=4, note="ALiBi"),
    decoder("mpt", "Mpt", 2, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, note="ALiBi, no biases"),
    decoder("falcon_alibi", "Falcon", 2, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    decoder("falcon", "Falcon", 3, new_decoder_architecture=True, num_kv_heads=2, note="parallel residual"),
    decoder("codegen", "CodeGen", 2, n_embd=32, n_head=4, n_layer=2, n_positions=64, rotary_dim=4),
    decoder("granite", "Granite", 3, residual_multiplier=0.6, embedding_multiplier=3.0, logits_scaling=2.0, **GROUPED),
    decoder("smollm3", "SmolLM3", 3, no_rope_layer_interval=2, **GROUPED),
    decoder("starcoder2", "Starcoder2", 2, **GROUPED, **WINDOW),
    decoder("stablelm", "StableLm", 3, partial_rotary_factor=0.5, use_qkv_bias=True, **GROUPED),
    decoder("cohere", "Cohere", 2, use_qk_norm=True, logit_scale=0.5, **GROUPED),
    decoder("glm", "Glm", 3, head_dim=8, partial_rotary_factor=0.5, **GROUPED),
    decoder("persimmon", "Persimmon", 2, note="one matrix for query, key and value, squared ReLU"),
    decoder("xglm", "XGLM", 3, d_model=32, ffn_dim=64, attention_heads=4, num_layers=3),
    decoder("biogpt", "BioGpt", 2),
    decoder("nemotron", "Nemotron", 3, head_dim=8, **GROUPED),
    decoder("gpt_bigcode", "GPTBigCode", 2, n_embd=32, n_head=4, n_layer=2, n_positions=64, multi_query=True),
    decoder("openai_gpt", "OpenAIGPT", 3, head="LMHeadModel", n_embd=32, n_head=4, n_layer=3, n_positions=64),
    decoder(
        "minicpm3",
        "MiniCPM3",
        2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
        dim_model_base=32,
        note="latent attention: keys and values come from one low-rank projection",
    ),
)
