"""What a model's configuration says its attention and MLP sites must be: the truth that `ir.structure` is held against.

Sites are found without a name; only this file, which no pass sees, knows how architectures call their sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graphlathe.tools import zoo

# The zoo counts Funnel's configured encoder layers; its pooling between them and its decoder of two layers make three
# stacks of values of one shape each.
BLOCKS = {model.name: model.blocks or () for model in zoo.ZOO} | {"funnel": (2, 2, 2)}

Heads = tuple[int, int, int]
"""Query heads, heads of keys and values, channels of a query head."""


@dataclass
class Truth:
    """How many attention sites there are of which heads, and how many MLPs of which width."""

    attention: Counter[Heads] = field(default_factory=Counter)
    mlps: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: Truth) -> Truth:
        return Truth(self.attention + other.attention, self.mlps + other.mlps)


def truth_of(name: str, module: nn.Module) -> Truth:
    """The truth for a transformer of the zoo."""
    config: Any = module.config
    if name in OWN:
        return OWN[name](config)
    if config.is_encoder_decoder:
        sides = sides_of_t5(config) if hasattr(config, "d_kv") else sides_of_bart(config)
        return sum(sides, Truth())
    if "text_config" in config.sub_configs:
        return layers(config.text_config) + layers(config.vision_config)
    return staged(config) if hasattr(config, "depths") else layers(config)


def _first(config: Any, *names: str) -> Any:
    """The first of these fields that the architecture declares and that is set.

    A configuration keeps every keyword it was made with, also those that its architecture never reads.
    """
    declared = [n for n in names if hasattr(type(config), n) or n in config.attribute_map]
    return next((value for name in declared if (value := getattr(config, name)) is not None), None)


def layers(config: Any, count: int | None = None, attentions: int = 1, mlps: int = 1) -> Truth:
    """Equal layers of attention and MLP, or of experts, perhaps after some dense ones."""
    count = config.num_hidden_layers if count is None else count
    heads = config.num_attention_heads
    kv_heads = _first(config, "num_key_value_heads", "num_kv_heads") or heads
    if _first(config, "multi_query") and not _first(config, "new_decoder_architecture"):
        kv_heads = 1
    head_dim = _first(config, "head_dim") or config.hidden_size // heads
    names = ("intermediate_size", "hidden_dim", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner")
    width = _first(config, *names) or 4 * config.hidden_size
    truth = Truth(Counter({(heads, kv_heads, head_dim): attentions * count}))
    if not _first(config, "num_local_experts", "num_experts", "n_routed_experts"):
        truth.mlps[width] += mlps * count
        return truth
    dense = getattr(config, "first_k_dense_replace", 0)
    expert = _first(config, "moe_intermediate_size") or width
    shared = _first(config, "shared_expert_intermediate_size") or expert * getattr(config, "n_shared_experts", 0)
    truth.mlps[width] += dense
    truth.mlps[expert] += count - dense
    if shared:
        truth.mlps[shared] += count - dense
    return Truth(truth.attention, +truth.mlps)


def sides_of_bart(config: Any) -> list[Truth]:
    """An encoder, and a decoder with two attentions a layer."""
    sides = []
    for side, attentions in (("encoder", 1), ("decoder", 2)):
        heads = _first(config, f"{side}_attention_heads", f"num_{side}_attention_heads")
        count = _first(config, f"{side}_layers", f"num_{side}_layers")
        width = getattr(config, f"{side}_ffn_dim")
        key = (heads, heads, config.hidden_size // heads)
        sides.append(Truth(Counter({key: attentions * count}), Counter({width: count})))
    return sides


def sides_of_t5(config: Any) -> list[Truth]:
    """The same in T5's names."""
    key = (config.num_heads, config.num_heads, config.d_kv)
    return [
        Truth(Counter({key: attentions * count}), Counter({config.d_ff: count}))
        for count, attentions in ((config.num_layers, 1), (config.num_decoder_layers, 2))
    ]


def staged(config: Any) -> Truth:
    """Stages that differ in width and heads."""
    truth = Truth()
    heads_of: Sequence[int] = _first(config, "num_heads", "num_attention_heads") or []
    for stage, depth in enumerate(config.depths):
        width = config.hidden_sizes[stage] if hasattr(config, "mlp_ratios") else config.embed_dim * 2**stage
        ratio = config.mlp_ratios[stage] if hasattr(config, "mlp_ratios") else config.mlp_ratio
        truth.attention[heads_of[stage], heads_of[stage], width // heads_of[stage]] += depth
        truth.mlps[int(width * ratio)] += depth
    return truth


def _with_ratio(config: Any) -> Truth:
    truth = layers(config)
    return Truth(truth.attention, Counter({config.hidden_size * config.mlp_ratio: config.num_hidden_layers}))


def _latent(config: Any) -> Truth:
    truth = layers(config)
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    heads = config.num_attention_heads
    return Truth(Counter({(heads, heads, head_dim): config.num_hidden_layers}), truth.mlps)


def _pooled_by_attention(config: Any) -> Truth:
    """Layers, and a head with a learned query and an MLP of its own."""
    return layers(config) + layers(config, 1)


def _prophetnet(config: Any) -> Truth:
    """The decoder attends to itself twice: the main stream, and all predicting streams at once."""
    encoder, decoder = sides_of_bart(config)
    heads = config.num_decoder_attention_heads
    more = Counter({(heads, heads, config.hidden_size // heads): config.num_decoder_layers})
    return encoder + decoder + Truth(more)


OWN: dict[str, Callable[[Any], Truth]] = {
    "fnet": lambda c: Truth(mlps=layers(c).mlps),
    "poolformer": lambda c: Truth(
        mlps=Counter({int(w * c.mlp_ratio): d for w, d in zip(c.hidden_sizes, c.depths, strict=True)})
    ),
    "dinov2": _with_ratio,
    "dinov2_registers": _with_ratio,
    "deepseek_v3": _latent,
    "minicpm3": _latent,
    "prophetnet": _prophetnet,
    "convbert": lambda c: Truth(
        Counter(
            {
                (c.num_attention_heads // c.head_ratio,) * 2
                + (c.hidden_size // c.num_attention_heads,): c.num_hidden_layers
            }
        ),
        layers(c).mlps,
    ),
    "mobilebert": lambda c: Truth(
        Counter({(4, 4, c.true_hidden_size // c.num_attention_heads): c.num_hidden_layers}),
        Counter({c.intermediate_size: c.num_hidden_layers * c.num_feedforward_networks}),
    ),
    "funnel": lambda c: Truth(
        Counter({(c.n_head, c.n_head, c.d_head): sum(c.block_sizes) + c.num_decoder_layers}),
        Counter({c.d_inner: sum(c.block_sizes) + c.num_decoder_layers}),
    ),
    "siglip": lambda c: layers(c.text_config) + _pooled_by_attention(c.vision_config),
    "siglip_vision": _pooled_by_attention,
    "wav2vec2_conformer": lambda c: layers(c, mlps=2),
    "blip": lambda c: layers(c.text_config, attentions=2) + layers(c.vision_config),
    "whisper_encoder": lambda c: sides_of_bart(c)[0],
    "whisper": lambda c: sum(sides_of_bart(c), Truth()),
}
"""Architectures whose configuration does not say it in the usual words."""
