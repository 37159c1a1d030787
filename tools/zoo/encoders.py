"""Bidirectional text encoders, and encoder-decoders."""

from __future__ import annotations

from typing import Any

from .decoders import TEXT
from .model import BATCH_SIZES, FIXED_IDS, IDS, PAIR_SIZES, TEXT_SIZES, Field, ZooModel, entry, pretrained

MASK = Field("attention_mask", ("B", "S"), "padding")
TYPES = Field("token_type_ids", ("B", "S"), "types")
TARGET = Field("decoder_input_ids", ("B", "T"), "ids")


def encoder(
    name: str,
    prefix: str,
    layers: int,
    *fields: Field,
    note: str = "",
    head: str = "Model",
    refused: str = "",
    fixed: bool = False,
    **settings: Any,
) -> ZooModel:
    """`<prefix><head>` of `layers` layers; `fields` are inputs besides the token ids.

    `refused` is the one common setting that this configuration raises at; `fixed` says that a trace ties the length.
    """
    settings = {
        key: value for key, value in (TEXT | {"num_hidden_layers": layers}).items() if key != refused
    } | settings
    construct = pretrained(prefix + head, f"{prefix}Config", settings)
    ids, sizes = (FIXED_IDS, BATCH_SIZES) if fixed else (IDS, TEXT_SIZES)
    return entry(name, "encoder", construct, (ids, *fields), sizes, (layers,), note=note)


ENCODERS: tuple[ZooModel, ...] = (
    encoder("bert", "Bert", 3, MASK, TYPES, note="with a padding mask"),
    encoder("roberta", "Roberta", 2, MASK, head="ForSequenceClassification", note="positions depend on the padding"),
    encoder("distilbert", "DistilBert", 3, dim=32, hidden_dim=64, n_heads=4, n_layers=3),
    encoder("electra", "Electra", 2, embedding_size=16),
    encoder("albert", "Albert", 3, embedding_size=16, note="all layers share one set of weights"),
    encoder("deberta", "Deberta", 2, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    encoder(
        "deberta_v2",
        "DebertaV2",
        3,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["c2p", "p2c"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    encoder("mpnet", "MPNet", 2),
    encoder("modernbert", "ModernBert", 3, MASK, local_attention=8, global_attn_every_n_layers=2),
    encoder(
        "xlnet",
        "XLNet",
        2,
        refused="max_position_embeddings",
        use_mems_eval=False,
        d_model=32,
        n_head=4,
        n_layer=2,
        d_inner=64,
    ),
    encoder("roformer", "RoFormer", 3, embedding_size=32),
    encoder("fnet", "FNet", 2, note="Fourier transform in place of attention"),
    encoder(
        "squeezebert",
        "SqueezeBert",
        3,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        intermediate_groups=2,
        output_groups=2,
        embedding_size=32,
        note="grouped convolutions in place of linear layers",
    ),
    encoder(
        "mobilebert",
        "MobileBert",
        2,
        embedding_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
        true_hidden_size=16,
    ),
    encoder("convbert", "ConvBert", 3, embedding_size=32, conv_kernel_size=3),
    encoder(
        "funnel",
        "Funnel",
        4,
        refused="num_hidden_layers",
        fixed=True,
        note="the length is fixed: relative positions are gathered at offsets computed as Python numbers",
        block_sizes=[2, 2],
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
    ),
    encoder("esm", "Esm", 2, MASK, position_embedding_type="rotary", token_dropout=False, mask_token_id=3),
    encoder("layoutlm", "LayoutLM", 3, Field("bbox", ("B", "S", 4), "box"), max_2d_position_embeddings=64),
    encoder("xlm", "XLM", 2, emb_dim=32, n_heads=4, n_layers=2),
    encoder("eurobert", "EuroBert", 2, num_key_value_heads=2),
)


def pair(
    name: str,
    prefix: str,
    blocks: tuple[int, int],
    *fields: Field,
    note: str = "",
    head: str = "ForConditionalGeneration",
    **settings: Any,
) -> ZooModel:
    """An encoder-decoder `<prefix><head>`, with a source and a target of independent lengths.

    `fields` are inputs besides the token ids.
    """
    construct = pretrained(prefix + head, f"{prefix}Config", TEXT | {"decoder_start_token_id": 2} | settings)
    return entry(name, "encoder-decoder", construct, (IDS, TARGET, *fields), PAIR_SIZES, blocks, note=note)


def t5_like(
    name: str, prefix: str, blocks: tuple[int, int], *fields: Field, note: str = "", **settings: Any
) -> ZooModel:
    """Sizes as T5 names them."""
    sizes: dict[str, Any] = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_heads": 4,
        "num_layers": blocks[0],
        "num_decoder_layers": blocks[1],
        "relative_attention_num_buckets": 8,
        "decoder_start_token_id": 0,
    }
    return pair(name, prefix, blocks, *fields, note=note, **sizes | settings)


def bart_like(name: str, prefix: str, blocks: tuple[int, int], note: str = "", **settings: Any) -> ZooModel:
    """Sizes as BART, and everything copied from it, names them."""
    sizes: dict[str, Any] = {
        "d_model": 32,
        "encoder_layers": blocks[0],
        "decoder_layers": blocks[1],
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    return pair(name, prefix, blocks, note=note, **sizes | settings)


PAIRS: tuple[ZooModel, ...] = (
    t5_like("t5", "T5", (3, 2)),
    t5_like("t5_gated", "T5", (2, 3), feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    t5_like("umt5", "UMT5", (2, 3), note="every layer has its own relative position bias"),
    t5_like(
        "longt5",
        "LongT5",
        (2, 2),
        MASK,
        local_radius=4,
        encoder_attention_type="local",
        note="attends within blocks of 5: torch.export guards S % 5 != 0 (padding present); it needs the mask to trace",
    ),
    bart_like("bart", "Bart", (2, 3)),
    bart_like("mbart", "MBart", (3, 2)),
    bart_like("pegasus", "Pegasus", (2, 3)),
    bart_like("marian", "Marian", (3, 2), head="MTModel"),
    bart_like("m2m_100", "M2M100", (2, 3)),
    bart_like("blenderbot", "Blenderbot", (3, 2)),
    pair(
        "prophetnet",
        "ProphetNet",
        (2, 2),
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        ngram=2,
    ),
)
