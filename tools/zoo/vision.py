"""Vision: plain transformers, hierarchical models, and convolutional networks."""

from __future__ import annotations

from typing import Any

from .model import ANY_IMAGE, BATCH_SIZES, IMAGE, Field, Sizes, ZooModel, entry, pretrained

FIXED_IMAGE = "height and width are fixed: a position embedding of that size is added"

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}

PIXEL_SIZES = ({"B": 2, "H": 64, "W": 96}, {"B": 1, "H": 96, "W": 64}, {"B": 3, "H": 75, "W": 83})
"""The last is a multiple of no stride."""
STRIDED_SIZES = ({"B": 2, "H": 64, "W": 96}, {"B": 1, "H": 96, "W": 64}, {"B": 3, "H": 128, "W": 160})
TF_PADDING = "TensorFlow's padding depends on the size: a trace guards height and width to multiples of 32, from 64"


def vit(name: str, architecture: str, config: str, layers: int, note: str = FIXED_IMAGE, **settings: Any) -> ZooModel:
    """A vision transformer over a fixed grid of patches."""
    settings = VIT | {"num_hidden_layers": layers} | settings
    return entry(name, "vit", pretrained(architecture, config, settings), (IMAGE,), BATCH_SIZES, (layers,), note=note)


def image_classifier(
    name: str,
    family: str,
    prefix: str,
    blocks: tuple[int, ...] | None,
    field: Field = ANY_IMAGE,
    head: str = "ForImageClassification",
    sizes: tuple[Sizes, Sizes, Sizes] | None = None,
    note: str = "",
    identity_blocks: int | None = None,
    **settings: Any,
) -> ZooModel:
    """A staged network `<prefix><head>`."""
    sizes = sizes or (PIXEL_SIZES if field is ANY_IMAGE else BATCH_SIZES)
    construct = pretrained(prefix + head, f"{prefix}Config", {"num_labels": 10} | settings)
    return entry(name, family, construct, (field,), sizes, blocks, note=note, identity_blocks=identity_blocks)


VISION: tuple[ZooModel, ...] = (
    vit("vit", "ViTForImageClassification", "ViTConfig", 3),
    vit("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", 2),
    vit("dinov2", "Dinov2ForImageClassification", "Dinov2Config", 3, mlp_ratio=2, layerscale_value=1.0),
    vit(
        "dinov2_registers",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        2,
        mlp_ratio=2,
        layerscale_value=1.0,
        num_register_tokens=2,
    ),
    vit(
        "beit",
        "BeitForImageClassification",
        "BeitConfig",
        2,
        layer_scale_init_value=1.0,
        use_relative_position_bias=True,
    ),
    vit("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", 3),
    vit("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", 2),
    vit("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", 3, layerscale_value=1.0, num_register_tokens=2),
    vit("yolos", "YolosModel", "YolosConfig", 2, num_detection_tokens=5, image_size=[32, 32]),
    image_classifier(
        "swin",
        "hierarchical",
        "Swin",
        (2, 2),
        Field("pixel_values", ("B", 3, 32, 32)),
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    image_classifier(
        "swinv2",
        "hierarchical",
        "Swinv2",
        (2, 2),
        IMAGE,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        pretrained_window_sizes=[0, 0],
    ),
    image_classifier(
        "convnext",
        "hierarchical",
        "ConvNext",
        (2, 3),
        hidden_sizes=[16, 32],
        depths=[2, 3],
        num_stages=2,
        layer_scale_init_value=1.0,
    ),
    image_classifier(
        "convnextv2", "hierarchical", "ConvNextV2", (2, 3), hidden_sizes=[16, 32], depths=[2, 3], num_stages=2
    ),
    image_classifier(
        "segformer",
        "hierarchical",
        "Segformer",
        (1, 2),
        head="ForSemanticSegmentation",
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    image_classifier(
        "pvt",
        "hierarchical",
        "Pvt",
        (1, 2),
        IMAGE,
        image_size=32,
        num_encoder_blocks=2,
        depths=[1, 2],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
    image_classifier(
        "pvt_v2",
        "hierarchical",
        "PvtV2",
        (1, 2),
        image_size=32,
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    ),
    image_classifier(
        "poolformer",
        "hierarchical",
        "PoolFormer",
        (1, 2),
        num_encoder_blocks=2,
        depths=[1, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        mlp_ratio=2.0,
        layer_scale_init_value=1.0,
    ),
    image_classifier(
        "resnet",
        "cnn",
        "ResNet",
        (4,),
        identity_blocks=3,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[2, 2],
        layer_type="basic",
    ),
    image_classifier(
        "resnet_bottleneck",
        "cnn",
        "ResNet",
        (5,),
        identity_blocks=3,
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[2, 3],
        layer_type="bottleneck",
    ),
    image_classifier(
        "regnet",
        "cnn",
        "RegNet",
        (5,),
        identity_blocks=3,
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[2, 3],
        groups_width=8,
        layer_type="y",
    ),
    image_classifier(
        "mobilenet_v1",
        "cnn",
        "MobileNetV1",
        None,
        sizes=STRIDED_SIZES,
        note=TF_PADDING,
        depth_multiplier=0.25,
        min_depth=8,
    ),
    image_classifier(
        "mobilenet_v2", "cnn", "MobileNetV2", (16,), identity_blocks=10, depth_multiplier=0.25, tf_padding=False
    ),
    image_classifier(
        "efficientnet",
        "cnn",
        "EfficientNet",
        (5,),
        identity_blocks=2,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        image_size=64,
        hidden_dim=320,
        kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 2],
        expand_ratios=[1, 6, 6],
        depthwise_padding=[],
    ),
)
