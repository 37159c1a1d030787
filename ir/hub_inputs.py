"""Default example inputs and dynamic dimensions of a `transformers` model, from its configuration and signature.

| model | inputs | dynamic |
|---|---|---|
| decoder | ``input_ids`` | B, S |
| text encoder | ``input_ids``, ``attention_mask`` | B, S |
| encoder-decoder | ``input_ids`` (or audio features), ``decoder_input_ids`` | B, S, T |
| vision | ``pixel_values`` | B |
| text-image pair (CLIP-like) | ``input_ids``, ``pixel_values`` | T, S, B |
| audio | ``input_values``, or ``input_features`` | B, L (samples), or B |

Whatever is left out can be asked for with ``example_inputs``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .errors import ImportModelError

Inputs = dict[str, torch.Tensor]
Names = dict[str, dict[int, str]]

_BATCH, _SOURCE, _TARGET, _SAMPLES = 2, 16, 12, 16_000


def default_inputs(model: torch.nn.Module, config: Any) -> tuple[Inputs, Names]:
    """Example inputs of a model, and the names of their dynamic dimensions.

    Raises:
        ImportModelError: no default is known for this kind of model.
    """
    parameters = set(inspect.signature(model.forward).parameters)
    main = str(getattr(model, "main_input_name", "input_ids"))
    generates = type(model).__name__.endswith("ForConditionalGeneration")
    if {"input_ids", "pixel_values"} <= parameters and hasattr(config, "vision_config"):
        if generates:
            raise _no_default(
                model,
                "its prompt must hold image tokens, which only its processor knows how to place",
            )
        ids, names = _text(config.text_config)
        images, image_names = _image(config.vision_config)
        return {**ids, **images}, {"input_ids": {0: "T", 1: "S"}, **image_names}
    if main == "pixel_values":
        return _image(config)
    if main == "input_values" and not hasattr(config, "num_mel_bins"):
        samples = torch.zeros(_BATCH, _SAMPLES, dtype=_float(model))
        return {main: samples}, {main: {0: "B", 1: "L"}}
    if main == "input_features":
        inputs, names = _features(model, config)
    elif main == "input_ids":
        inputs, names = _text(config)
    else:
        raise _no_default(model, f"its main input is '{main}'")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(config, _TARGET)
        names["decoder_input_ids"] = {0: "B", 1: "T"}
    elif main == "input_ids" and "attention_mask" in parameters and not _is_decoder(model, config):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        names["attention_mask"] = {0: "B", 1: "S"}
    return inputs, names


def _is_decoder(model: torch.nn.Module, config: Any) -> bool:
    """Whether positions see only what is before them: such a model needs no mask for padding on the right."""
    if getattr(config, "is_decoder", False) or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return True
    generate = getattr(model, "can_generate", None)
    attention = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return bool(generate and generate()) or (bool(attention) and all(attention))


def _ids(config: Any, length: int) -> torch.Tensor:
    """Ordinary tokens: ids 0, 1 and 2 are often padding, begin and end, which some models look for."""
    vocabulary = int(getattr(config, "vocab_size", 32))
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or length
    length = min(length, max(int(limit) - 2, 2))  # RoBERTa-likes start counting positions at padding + 1
    return (
        (3 + torch.arange(_BATCH * length) % max(vocabulary - 3, 1)).clamp_max(vocabulary - 1).reshape(_BATCH, length)
    )


def _text(config: Any) -> tuple[Inputs, Names]:
    return {"input_ids": _ids(config, _SOURCE)}, {"input_ids": {0: "B", 1: "S"}}


def _image(config: Any) -> tuple[Inputs, Names]:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    dtype = getattr(config, "dtype", None)
    pixels = torch.zeros(
        _BATCH,
        int(getattr(config, "num_channels", 3)),
        height,
        width,
        dtype=dtype if isinstance(dtype, torch.dtype) else None,
    )
    return {"pixel_values": pixels}, {"pixel_values": {0: "B"}}


def _features(model: torch.nn.Module, config: Any) -> tuple[Inputs, Names]:
    bins = getattr(config, "num_mel_bins", None)
    positions = getattr(config, "max_source_positions", None)
    if bins is None or positions is None:
        raise _no_default(model, "its configuration does not say the size of its audio features")
    return {"input_features": torch.zeros(_BATCH, bins, 2 * positions, dtype=_float(model))}, {
        "input_features": {0: "B"}
    }


def _float(model: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _no_default(model: torch.nn.Module, why: str) -> ImportModelError:
    return ImportModelError(
        f"no default example inputs for {type(model).__name__}: {why}",
        expected=f"forward{inspect.signature(model.forward)}",
        remedy="pass example_inputs={...} (and dynamic={...})",
    )
