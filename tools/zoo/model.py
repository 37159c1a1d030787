"""What a zoo entry is, and the few helpers every family file builds its entries from.

An entry says its inputs once, as fields with symbolic sizes (`Field("input_ids", ("B", "S"))`); the example tensors at
any size and the table of dynamic dimensions both come from that, so they cannot disagree.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

FAMILIES = (
    "decoder",
    "moe",
    "ssm",
    "encoder",
    "encoder-decoder",
    "vit",
    "hierarchical",
    "cnn",
    "audio",
    "multimodal",
    "plain",
)

VOCAB = 100
"""Vocabulary of every text model here: large enough that random prompts differ, small enough to cost nothing."""

FIRST_ORDINARY_TOKEN = 5
"""Ids below this are padding, begin, end and the like. Random prompts avoid them: some models pool at the end token."""

Sizes = Mapping[str, int]
Inputs = Callable[[Sizes], dict[str, Tensor]]
Draw = Literal["ids", "normal", "padding", "box", "types"]


@dataclass(frozen=True)
class ZooModel:
    """A tiny, randomly initialised model with inputs at several sizes, for tests and benchmarks."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    """Seeded by the name; float32, in eval mode, without a cache."""
    inputs: Inputs
    """Keyword inputs for given sizes; equal sizes give equal tensors."""
    dynamic: Mapping[str, Mapping[int, str]]
    """Input name -> axis -> dimension name. Equal names are equal sizes. Empty when the architecture allows none."""
    trace_sizes: Sizes
    unseen_sizes: tuple[Sizes, Sizes]
    """Two more legal assignments, never the traced one: what a trace specialised on shows up here."""
    blocks: tuple[int, ...] | None
    """Per stack, the residual layers the configuration asks for (encoder, decoder); None without a residual stream."""
    note: str = ""
    """Why a dimension is fixed, which sizes are legal, what else is unusual."""
    identity_blocks: int | None = None
    """For a CNN: how many of its blocks add their input unchanged (others project the shortcut, or have none)."""

    def module(self) -> nn.Module:
        """Build the model: a fresh one each time, always with the same weights."""
        return self.build()

    def example(self) -> dict[str, Tensor]:
        """The inputs to trace with."""
        return self.inputs(self.trace_sizes)


@dataclass(frozen=True)
class Field:
    """One input tensor: its name, its shape (a name for a dimension that may change, a number for one that may not),
    and how its values are drawn.
    """

    name: str
    shape: tuple[int | str, ...]
    draw: Draw = "normal"

    def sample(self, sizes: Sizes, generator: torch.Generator) -> Tensor:
        """Draw the tensor at the given sizes."""
        shape = [sizes[size] if isinstance(size, str) else size for size in self.shape]
        match self.draw:
            case "ids":
                return torch.randint(FIRST_ORDINARY_TOKEN, VOCAB, shape, generator=generator)
            case "types":
                return torch.randint(0, 2, shape, generator=generator)
            case "padding":
                # Ragged on the right, the first row whole: what a tokenizer gives for sentences of unequal length.
                rows, length = shape
                kept = length - (torch.arange(rows) * 3) % max(length // 2, 1)
                return (torch.arange(length) < kept[:, None]).long()
            case "box":
                # Left, top, right, bottom with left <= right and top <= bottom.
                corner = torch.randint(0, 20, [*shape[:-1], 2], generator=generator)
                extent = torch.randint(0, 20, [*shape[:-1], 2], generator=generator)
                return torch.cat([corner, corner + extent], dim=-1)
            case "normal":
                return torch.randn(shape, generator=generator)


IDS = Field("input_ids", ("B", "S"), "ids")
FIXED_IDS = Field("input_ids", ("B", 12), "ids")
"""For models that a trace ties to one sequence length."""
IMAGE = Field("pixel_values", ("B", 3, 32, 32))
"""For models whose position embedding ties them to one image size."""
ANY_IMAGE = Field("pixel_values", ("B", 3, "H", "W"))


def drawn(fields: tuple[Field, ...]) -> Inputs:
    """Inputs that draw every field from one generator, seeded by the sizes."""

    def inputs(sizes: Sizes) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_of(repr(sorted(sizes.items()))))
        return {field.name: field.sample(sizes, generator) for field in fields}

    return inputs


def dynamic_of(fields: tuple[Field, ...]) -> dict[str, dict[int, str]]:
    """The dimensions that have names."""
    named = {
        field.name: {axis: size for axis, size in enumerate(field.shape) if isinstance(size, str)} for field in fields
    }
    return {name: axes for name, axes in named.items() if axes}


def seed_of(text: str) -> int:
    """A seed that is the same in every process (`hash` of a string is not)."""
    return zlib.crc32(text.encode())


def enliven(module: nn.Module, seed: int) -> None:
    """Draw weights so that every part of the model matters to its output, which default initialisation does not give.

    Published initialisers start residual branches near zero, norms at one and biases at zero: dropping a layer or
    forgetting a bias would then go unnoticed in a comparison. Matrices get variance 1/fan-in, so that values keep their
    scale from layer to layer; vectors (biases, norms, decay rates) stay near their default, but off it.
    """
    generator = torch.Generator().manual_seed(seed)
    convolutions = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Conv1d | nn.Conv2d)}
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            # State-space decay rates are log-spaced, and a weight-norm magnitude is a norm: both mean something.
            if weight.ndim < 2 or name.endswith(("A_log", "original0")):
                weight.add_(0.1 * noise)
            else:
                fan_in = weight[0].numel() if id(weight) in convolutions else weight.shape[-1]
                weight.copy_(noise / math.sqrt(fan_in))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                for statistic, drawn_values in (
                    (layer.running_mean, 0.1 * torch.randn(layer.num_features, generator=generator)),
                    (layer.running_var, 0.5 + torch.rand(layer.num_features, generator=generator)),
                ):
                    if statistic is not None:
                        statistic.copy_(drawn_values)


def entry(
    name: str,
    family: str,
    construct: Callable[[], nn.Module],
    fields: tuple[Field, ...],
    sizes: tuple[Sizes, Sizes, Sizes],
    blocks: tuple[int, ...] | None,
    **extra: Any,
) -> ZooModel:
    """A zoo entry whose module comes from `construct`; `sizes` are the traced one and two unseen ones."""

    def build() -> nn.Module:
        # Construction draws default weights; a forked generator keeps the caller's random state as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(name))
            module = construct().float().eval()
        enliven(module, seed_of(name))
        return module

    trace, *unseen = sizes
    return ZooModel(
        name=name,
        family=family,
        build=build,
        inputs=extra.pop("inputs", drawn(fields)),
        dynamic=dynamic_of(fields),
        trace_sizes=trace,
        unseen_sizes=(unseen[0], unseen[1]),
        blocks=blocks,
        **extra,
    )


def pretrained(architecture: str, config: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A constructor for a `transformers` model with random weights. The library is imported only when it is called."""

    def construct() -> nn.Module:
        transformers = importlib.import_module("transformers")
        configuration = getattr(transformers, config)(**settings)
        # A cache in the output is no tensor, and `torch.export` refuses it.
        parts = [configuration, *(getattr(configuration, name) for name in configuration.sub_configs)]
        for part in filter(None, parts):  # an optional part may be absent
            part.use_cache = False
        return getattr(transformers, architecture)(configuration)

    return construct


BATCH_SIZES = ({"B": 2}, {"B": 1}, {"B": 3})
TEXT_SIZES = ({"B": 2, "S": 12}, {"B": 1, "S": 7}, {"B": 3, "S": 19})
PAIR_SIZES = ({"B": 2, "S": 12, "T": 9}, {"B": 1, "S": 7, "T": 5}, {"B": 3, "S": 19, "T": 14})
"""Source and target of an encoder-decoder."""
