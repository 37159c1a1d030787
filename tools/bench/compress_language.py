"""The language model of the compression suites: SmolLM2-135M-Instruct, dequantised from its packaged 4-bit file."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ...ir.from_hub import load_tokenizer
from ..smollm2 import smollm2_file
from ..tokens import encode
from .base import Row
from .compiler_steps import build
from .compress_metrics import LanguageMeter
from .compress_subject import Call, Feeds, Score, Subject, spread
from .compress_text import DOMAINS, corpus


class Language(Subject):
    """Perplexity on two domains, of which methods see another slice of the first; KL and first choices on both."""

    scores: ClassVar[tuple[Score, ...]] = (
        Score(f"ppl_{DOMAINS[0]}", higher=False),
        Score(f"ppl_{DOMAINS[1]}", higher=False, unseen=True),
    )
    dynamic: ClassVar[dict[str, dict[int, str]]] = {"input_ids": {0: "B", 1: "S"}}

    def load_module(self) -> torch.nn.Module:
        """The causal language model."""
        module = build(self.case.model)
        # Its numbers are plain floats by now; tools that see how the file was quantised refuse it.
        for owner in (module, module.config):
            for name in ("quantization_config", "hf_quantizer", "quantization_method", "is_quantized"):
                if name in vars(owner):
                    delattr(owner, name)
        if self.case.layers is not None:
            stack = module.get_submodule("model")
            stack.register_module("layers", module.get_submodule("model.layers")[: self.case.layers])  # type: ignore[index]
            module.config.num_hidden_layers = self.case.layers  # type: ignore[union-attr]
        return module

    def example(self) -> Feeds:
        """Two windows of twelve tokens."""
        return {"input_ids": torch.arange(24).reshape(2, 12)}

    @cached_property
    def _texts(self) -> tuple[dict[str, Tensor], str]:
        return self.stored("tokens", self._read)

    def _read(self) -> tuple[dict[str, Tensor], str]:
        """Token ids of the slices, and where they are from."""
        texts, tokenizer = corpus(), load_tokenizer(smollm2_file())
        names = list(texts.domains)
        slices = {"calibration": texts.slice(names[0], "calibration")}
        # The columns keep their names with other texts; a note says what was read.
        slices |= {shown: texts.slice(name, "test") for shown, name in zip(DOMAINS, names, strict=True)}
        return {part: torch.tensor(encode(tokenizer, text)) for part, text in slices.items()}, texts.source

    @property
    def source(self) -> str:
        """Where the text is from."""
        return self._texts[1]

    def windows(self, part: str, count: int) -> list[Tensor]:
        """Windows of a slice (``calibration``, or a domain's test slice), each [1, window], evenly spread over it."""
        ids = self._texts[0][part]
        length = self.case.window
        whole = ids[: len(ids) // length * length].reshape(-1, 1, length)
        return spread(list(whole), count, f"windows of {length} tokens in '{part}'")

    def pieces(self, count: int) -> list[Feeds]:
        """Windows of the first domain's calibration slice."""
        return [{"input_ids": ids} for ids in self.windows("calibration", count)]

    def timed(self) -> dict[str, Feeds]:
        """The first tokens of a test window, at each length."""
        text = torch.cat(self.windows(DOMAINS[0], self.case.test), dim=1)
        return {f"T{length}": {"input_ids": text[:, :length]} for length in self.case.lengths}

    def sizes(self) -> dict[str, int]:
        """One window of the longest timed length."""
        return {"B": 1, "S": self.case.lengths[-1]}

    def units(self, feeds: Feeds) -> int:
        """Tokens."""
        return feeds["input_ids"].numel()

    def quality(self, run: Call, dense: Call) -> Row:
        """Perplexities, mean KL to the dense model, and agreement of first choices."""
        meters = {name: LanguageMeter() for name in DOMAINS}
        for name, meter in meters.items():
            for index, ids in enumerate(self.windows(name, self.case.test)):
                feeds = {"input_ids": ids}
                wanted = self.stored(f"{name}-{index}", lambda feeds=feeds: dense(feeds)["logits"])
                meter.add(ids, run(feeds)["logits"], wanted)
        row: Row = {f"ppl_{name}": meter.perplexity for name, meter in meters.items()}
        for column in ("kl", "top1"):
            values = [getattr(meter, column) for meter in meters.values()]
            row[column] = sum(values) / len(values)
        return row
