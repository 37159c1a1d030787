"""Models that take images and text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .decoders import GROUPED, TEXT
from .model import IDS, IMAGE, TEXT_SIZES, Field, Sizes, ZooModel, drawn, entry, pretrained
from .vision import FIXED_IMAGE, VIT

IMAGES = Field("pixel_values", ("N", 3, 32, 32))
CONTRASTIVE_SIZES: tuple[Sizes, Sizes, Sizes] = (
    {"B": 2, "S": 12, "N": 3},
    {"B": 1, "S": 7, "N": 2},
    {"B": 3, "S": 16, "N": 4},
)
"""As many texts and images as one likes: every text is compared with every image."""

CLIP_TEXT: dict[str, Any] = TEXT | {"num_hidden_layers": 3, "projection_dim": 16}
CLIP_VISION: dict[str, Any] = VIT | {"num_hidden_layers": 2, "projection_dim": 16}

IMAGE_TOKEN = 3
PATCHES = 16
PROMPT = (Field("input_ids", (2, "S"), "ids"), Field("pixel_values", (2, 3, 32, 32)))


def prompts_with_image(sizes: Sizes) -> dict[str, Tensor]:
    """One image a row; its placeholder tokens follow the first token, one for each patch."""
    inputs = drawn(PROMPT)(sizes)
    inputs["input_ids"][:, 1 : 1 + PATCHES] = IMAGE_TOKEN
    return inputs


MULTIMODAL: tuple[ZooModel, ...] = (
    entry(
        "clip",
        "multimodal",
        pretrained(
            "CLIPModel", "CLIPConfig", {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 16}
        ),
        (IDS, IMAGES),
        CONTRASTIVE_SIZES,
        (3, 2),
        note=FIXED_IMAGE,
    ),
    entry(
        "siglip",
        "multimodal",
        pretrained(
            "SiglipModel",
            "SiglipConfig",
            {"text_config": CLIP_TEXT | {"projection_size": 32}, "vision_config": CLIP_VISION},
        ),
        (IDS, IMAGES),
        CONTRASTIVE_SIZES,
        (3, 2),
        note=FIXED_IMAGE,
    ),
    entry(
        "blip",
        "multimodal",
        pretrained(
            "BlipForImageTextRetrieval",
            "BlipConfig",
            {
                "text_config": TEXT | {"num_hidden_layers": 3, "encoder_hidden_size": 32, "projection_dim": 16},
                "vision_config": CLIP_VISION,
                "projection_dim": 16,
                "image_text_hidden_size": 16,
            },
        ),
        (IDS, IMAGE),
        TEXT_SIZES,
        (3, 2),
        note=FIXED_IMAGE,
    ),
    entry(
        "llava",
        "multimodal",
        pretrained(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {
                "text_config": TEXT | GROUPED | {"model_type": "llama", "num_hidden_layers": 2},
                "vision_config": CLIP_VISION | {"model_type": "clip_vision_model"},
                "image_token_index": IMAGE_TOKEN,
                "image_token_id": IMAGE_TOKEN,
                "vision_feature_layer": -1,
            },
        ),
        PROMPT,
        ({"S": 24}, {"S": 20}, {"S": 31}),
        (2, 2),
        inputs=prompts_with_image,
        note=f"{FIXED_IMAGE}; the batch too: features are listed image by image; a prompt holds one image, 16 tokens",
    ),
)
