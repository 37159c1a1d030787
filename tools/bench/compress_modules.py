"""Where the framework modules of the subjects keep their parts, for the tools that want to be told.

Our own passes get none of this. The other tools take hints (which modules are attention, which layer must stay), as
their documentations recommend; here is what the hints are made of.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .compress_subject import Feeds


@dataclass(frozen=True)
class Attention:
    """The projections of one attention layer."""

    owner: Any
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear


@dataclass(frozen=True)
class Mlp:
    """The projections of one MLP: what makes its neurons (one, or gate and up), and what reads them."""

    makers: tuple[nn.Linear, ...]
    reader: nn.Linear


class Transformer:
    """The parts of a Llama-like or BERT-like module.

    Attributes:
        module: the whole.
        path: where its blocks are, as a path of submodules.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.llama = hasattr(module, "model")
        self.path = "model.layers" if self.llama else "encoder.layer"

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks in order."""
        found = self.module.get_submodule(self.path)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def head(self) -> list[nn.Module]:
        """What makes the outputs, and keeps its width."""
        return [self.module.lm_head] if self.llama else []

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads of a layer, as configured."""
        config = self.module.config
        return config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only these blocks, in this order; each learns its new place, where it has one."""
        path, _, name = self.path.rpartition(".")
        old = self.blocks
        self.module.get_submodule(path).register_module(name, nn.ModuleList(old[index] for index in kept))
        self.module.config.num_hidden_layers = len(kept)
        for place, attention in enumerate(self.attentions()):
            if hasattr(attention.owner, "layer_idx"):
                attention.owner.layer_idx = place

    @contextmanager
    def only(self, kept: Sequence[int]) -> Generator[None]:
        """Keep only these blocks for the length of a ``with`` block."""
        path, _, name = self.path.rpartition(".")
        whole = self.blocks
        self.keep(kept)
        try:
            yield
        finally:
            self.module.get_submodule(path).register_module(name, whole)
            self.keep(range(len(whole)))

    def attentions(self) -> Iterator[Attention]:
        """The attention layers in order."""
        for block in self.blocks:
            each: Any = block
            if self.llama:
                a = each.self_attn
                yield Attention(a, a.q_proj, a.k_proj, a.v_proj, a.o_proj)
            else:
                a = each.attention.self
                yield Attention(a, a.query, a.key, a.value, each.attention.output.dense)

    def mlps(self) -> Iterator[Mlp]:
        """The MLPs in order."""
        for block in self.blocks:
            each: Any = block
            if self.llama:
                yield Mlp((each.mlp.gate_proj, each.mlp.up_proj), each.mlp.down_proj)
            else:
                yield Mlp((each.intermediate.dense,), each.output.dense)


def parameters(module: nn.Module) -> int:
    """Numbers in parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def first_output(value: Any) -> Tensor:
    """The tensor that counts of whatever a module returns."""
    if isinstance(value, Tensor):
        return value
    return value.logits if hasattr(value, "logits") else value[0]


def block_states(transformer: Transformer, feeds: Feeds) -> list[Tensor]:
    """The stream before the first block and after every block, each [batch, tokens, width]."""
    states: list[Tensor] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).detach())

    def after(block: nn.Module, args: Any, output: Any) -> None:
        states.append(first_output(output).detach())

    blocks = transformer.blocks
    hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after) for block in blocks]
    try:
        with torch.no_grad():
            transformer.module(**feeds)
    finally:
        for hook in hooks:
            hook.remove()
    return states
