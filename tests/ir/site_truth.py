"""What a model's configuration says its attention and MLP sites must be: the truth that `ir.structure` is held against.

The structure is found without any name; only this file, which no pass sees, knows how architectures call their sizes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Heads = tuple[int, int, int]
"""Query heads, heads of keys and values, channels of a query head."""


@dataclass
class Truth:
    """How many attention sites of which heads, and how many MLPs of which width."""

    attention: Counter[Heads] = field(default_factory=Counter)
    mlps: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: Truth) -> Truth:
        return Truth(self.attention + other.attention, self.mlps + other.mlps)


def truth_of(name: str, module: nn.Module) -> Truth | None:
    """The truth for a model of the zoo; None where there is no configuration, or neither attention nor MLP."""
    config: Any = getattr(module, "config", None)
    if config is None or name in WITHOUT:
        return None
    if name in OWN:
        return OWN[name](config)
    if getattr(config, "is_encoder_decoder", False) and hasattr(config, "decoder_layers"):
        return encoder_decoder(config)
    if config.sub_configs:
        parts = [getattr(config, part) for part in config.sub_configs]
        return sum((uniform(part) for part in parts if getattr(part, "num_hidden_layers", 0)), Truth())
    return uniform(config)


WITHOUT = {
    "fnet": "Fourier transforms",
    "convnext": "convolutions",
    "convnextv2": "convolutions",
    "poolformer": "pooling",
}


def uniform(config: Any, layers: int | None = None, attentions: int = 1) -> Truth:
    """One attention and one MLP in each of `layers` equal layers."""
    layers = config.num_hidden_layers if layers is None else layers
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    truth = Truth(Counter({(heads, kv_heads, head_dim): attentions * layers}))
    experts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    if any(experts):
        dense = getattr(config, "first_k_dense_replace", 0)
        truth.mlps[getattr(config, "moe_intermediate_size", None) or width] += layers - dense
        truth.mlps[width] += dense
        shared = getattr(config, "shared_expert_intermediate_size", None) or (
            getattr(config, "n_shared_experts", None) or 0
        ) * (getattr(config, "moe_intermediate_size", None) or 0)
        truth.mlps[shared] += layers - dense if shared else 0
    else:
        truth.mlps[width] += layers
    truth.mlps = +truth.mlps
    return truth


def encoder_decoder(config: Any) -> Truth:
    """An encoder, and a decoder with two attentions a layer."""
    truth = Truth()
    for side, attentions in (("encoder", 1), ("decoder", 2)):
        heads = getattr(config, f"{side}_attention_heads")
        layers = getattr(config, f"{side}_layers")
        truth.attention[heads, heads, config.d_model // heads] += attentions * layers
        truth.mlps[getattr(config, f"{side}_ffn_dim")] += layers
    return truth


def t5(config: Any) -> Truth:
    """T5's own names."""
    heads, layers, decoder_layers = config.num_heads, config.num_layers, config.num_decoder_layers
    return Truth(
        Counter({(heads, heads, config.d_kv): layers + 2 * decoder_layers}),
        Counter({config.d_ff: layers + decoder_layers}),
    )


def stages(config: Any) -> Truth:
    """Stages of different widths."""
    truth = Truth()
    heads_of = getattr(config, "num_heads", None) or config.num_attention_heads
    for stage, (depth, heads) in enumerate(zip(config.depths, heads_of, strict=True)):
        width = config.hidden_sizes[stage] if hasattr(config, "hidden_sizes") else config.embed_dim * 2**stage
        ratio = config.mlp_ratios[stage] if hasattr(config, "mlp_ratios") else config.mlp_ratio
        truth.attention[heads, heads, width // heads] += depth
        truth.mlps[int(width * ratio)] += depth
    return truth
