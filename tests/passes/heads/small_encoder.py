"""A small encoder whose heads are easy to cut by hand, and what every test of ``shrp`` does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Batch, Context, Pass, Stats
from graphlathe.passes.heads.blocks import HeadBlock, find_sites, head_blocks
from graphlathe.passes.search.apply_plan import ApplyPlan
from graphlathe.passes.search.plan import Plan
from graphlathe.tools import zoo
from tests.zoo_programs import traced

QUIET: dict[str, Any] = {"steps": 0, "router_steps": 0}


def inputs(name: str, count: int = 3) -> list[dict[str, Any]]:
    """Calibration batches of a zoo model."""
    model = zoo.get(name)
    sizes = (list(model.unseen_sizes) * count)[:count]
    return [dict(traced(name).feeds(**model.inputs(each))) for each in sizes]


def run(program: Program, settings: Pass, batches: list[dict[str, Any]]) -> tuple[Program, Stats]:
    changed = program.clone()
    context = Context(calibration=batches)
    settings.check(changed, context)
    stats = settings.run(changed, context)
    settings.ensure(program, changed, stats)
    verify(changed, 2)
    return changed, stats


def blocks_of(program: Program) -> list[HeadBlock]:
    found = structure(program)
    return head_blocks(program, found, find_sites(program, found), Stats(), None)


class Encoder(nn.Module):
    """A pre-norm encoder in whose attention heads are easy to cut by hand."""

    def __init__(self, heads: int = 4, dim: int = 6, width: int = 20, layers: int = 2, post: bool = False) -> None:
        super().__init__()
        self.heads, self.dim, self.post = heads, dim, post
        self.spelled = ""
        stream = 16
        self.embed = nn.Embedding(31, stream)
        names = {"q": heads * dim, "k": heads * dim, "v": heads * dim}
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {n: nn.Linear(stream, size) for n, size in names.items()}
                | {
                    "o": nn.Linear(heads * dim, stream),
                    "up": nn.Linear(stream, width),
                    "down": nn.Linear(width, stream),
                }
                | {"n1": nn.LayerNorm(stream), "n2": nn.LayerNorm(stream)}
            )
            for _ in range(layers)
        )

    def outputs(self, m: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, heads * dim]."""
        q, k, v = (m[n](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def project(self, m: Any, value: torch.Tensor) -> torch.Tensor:
        """The output projection, over positions that are laid out in another way for it (``spelled``)."""
        batch, tokens, width = value.shape
        if self.spelled in ("", "stream"):
            return m["o"](value)
        if self.spelled == "flat":
            return m["o"](value.reshape(-1, width)).reshape(batch, tokens, -1)
        if self.spelled == "rolled":
            return m["o"](value.roll((2, 1), (1, 0))).roll((-2, -1), (1, 0))
        return m["o"](value.transpose(0, 1).reshape(-1, width)).reshape(tokens, batch, -1).transpose(0, 1)

    def feed_forward(self, m: Any, x: torch.Tensor) -> torch.Tensor:
        """The sum behind the feed-forward layer of a pre-norm block."""
        rows = x.reshape(-1, x.shape[-1]) if self.spelled == "stream" else x
        return (rows + m["down"](F.gelu(m["up"](m["n2"](rows))))).reshape(x.shape)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[:, None, None, :] != 0
        x = self.embed(ids)
        for m in self.layers:
            if self.post:
                x = m["n1"](x + self.project(m, self.outputs(m, x, mask)))
                x = m["n2"](x + m["down"](F.gelu(m["up"](x))))
            else:
                x = x + self.project(m, self.outputs(m, m["n1"](x), mask))
                x = self.feed_forward(m, x)
        return x


def data(count: int = 4, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        mask = torch.ones(3, 9, dtype=torch.int64)
        mask[1, 6:] = 0
        batches.append({"ids": torch.randint(0, 31, (3, 9), generator=generator), "attention_mask": mask})
    return batches


def encoder(seed: int = 0, spelled: str = "", **form: Any) -> tuple[Encoder, Program]:
    torch.manual_seed(seed)
    model = Encoder(**form).eval()
    model.spelled = spelled
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    dynamic = {"ids": {0: "B", 1: "S"}, "attention_mask": {0: "B", 1: "S"}}
    return model, trace(model, data(1)[0], dynamic=dynamic)


def hidden_inputs(model: Encoder, batch: Batch) -> list[tuple[Any, torch.Tensor]]:
    """Each layer with what its attention reads."""
    found = []
    mask = batch["attention_mask"][:, None, None, :] != 0
    x = model.embed(batch["ids"])
    for m in model.layers:
        if model.post:
            found.append((m, x))
            x = m["n1"](x + m["o"](model.outputs(m, x, mask)))  # type: ignore[index]
            x = m["n2"](x + m["down"](F.gelu(m["up"](x))))  # type: ignore[index]
        else:
            found.append((m, m["n1"](x)))  # type: ignore[index]
            x = x + m["o"](model.outputs(m, m["n1"](x), mask))  # type: ignore[index]
            x = x + m["down"](F.gelu(m["up"](m["n2"](x))))  # type: ignore[index]
    return found


def applied(program: Program, plan: dict[str, Any], folder: Path) -> Program:
    Plan.from_json(plan).save(folder / "plan.json")
    return run(program, ApplyPlan(path=str(folder / "plan.json")), [])[0]
