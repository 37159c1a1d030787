"""torch-kirigami as its documentation recommends: candidates of the whole graph, group magnitude, a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Row
from .compress_peers import load_peer
from .compress_reach import reach
from .compress_subject import Case, export_module, subject_of
from .compress_work import Search


def prune(case: Mapping[str, Any], level: Mapping[str, Any], target: str, parts: Sequence[str] = ()) -> Row:
    """Prune to the level's parameters where it names them, else to its share of the channels.

    ``parts`` are what the suite is about; the tool has no such notion, and chooses among all candidates that it finds.
    """
    chosen = Case.from_json(case)
    subject = subject_of(chosen)
    tool = load_peer(chosen.peers, "torch_kirigami")
    pruning = load_peer(chosen.peers, "torch_kirigami.pruning")

    def make(ratio: float) -> Any:
        module = subject.module()
        graph = tool.DependencyGraph.build(module, kwargs=subject.example())
        pruner = pruning.Pruner(module, graph=graph)
        share, most = pruning.ChannelRatio, pruning.ParameterBudget
        budget = most(max_params=level["params"]) if level["params"] else share(ratio)
        strategy = pruning.Greedy(pruning.GroupMagnitude(p=2))
        return pruner.prune(pruner.discover_candidates(), budget=budget, strategy=strategy)[0]

    search = Search(subject)
    with search:
        if level["params"]:
            ratio, module = 0.0, make(0.0)
        else:
            ratio, module = reach(level, subject, make)
    export_module(subject, module, target)
    return {**search.row(), "plan": {"ratio": ratio, "parts": list(parts)}}
