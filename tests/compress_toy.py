"""A subject of the compression suites that takes no time, and rows as they would come from one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from graphlathe.tools.bench.base import Row
from graphlathe.tools.bench.compress_methods import Level, Method
from graphlathe.tools.bench.compress_metrics import LanguageMeter
from graphlathe.tools.bench.compress_subject import Call, Case, Feeds, Score, Subject

LEVEL = Level("half", 0.5, 1, 100, ms=1.5).to_json()


class Net(torch.nn.Module):
    """An embedding, one layer, and a vocabulary of 20."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(20, 8)
        self.hidden = torch.nn.Linear(8, 16, bias=False)
        self.head = torch.nn.Linear(16, 20, bias=False)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.hidden(self.embed(input_ids)).relu())}


class Toy(Subject):
    """`Net`, as a subject."""

    scores: ClassVar[tuple[Score, ...]] = (Score("ppl", higher=False, unseen=True),)
    dynamic: ClassVar[dict[str, dict[int, str]]] = {"input_ids": {0: "B", 1: "S"}}

    def load_module(self) -> torch.nn.Module:
        return Net().eval()

    def example(self) -> Feeds:
        return {"input_ids": torch.arange(6).reshape(2, 3)}

    def pieces(self, count: int) -> list[Feeds]:
        return [self.example()] * count

    def timed(self) -> dict[str, Feeds]:
        return {f"T{n}": {"input_ids": torch.arange(n)[None]} for n in self.case.lengths}

    def sizes(self) -> dict[str, int]:
        return {"B": 1, "S": self.case.lengths[-1]}

    def units(self, feeds: Feeds) -> int:
        return feeds["input_ids"].numel()

    def quality(self, run: Call, dense: Call) -> Row:
        meter = LanguageMeter()
        feeds = self.example()
        meter.add(feeds["input_ids"], run(feeds)["logits"], dense(feeds)["logits"])
        return {"ppl": meter.perplexity, "kl": meter.kl}


TOY = Case("toy", calibration=1, lengths=(2, 10), rounds=1)


def row(ppl: float | None, parameters: int, **more: Any) -> Row:
    return {"state": "ok", "ppl_faq": ppl, "ppl_handbook": ppl, "parameters": parameters, "macs": None, **more}


def measured(by: str, label: str, values: Row, level: Level | None = None, **more: Any) -> tuple[Method, Level, Row]:
    return Method(label, by, "m:f", **more), level or Level("20%", 0.2, params=100), values


BASE = row(10.0, 120, macs=1000)
