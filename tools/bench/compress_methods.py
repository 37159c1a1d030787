"""The methods of the compression suites as data, and the step that makes one of our own results.

A method is a label, who made it, and a step: a function ``module:name`` that gets the case, a level and a file to
write, in a process of its own, and answers with what the search cost. Our methods are pipeline strings in which
``$ratio``, ``$count``, ``$params``, ``$macs`` and ``$ms`` stand for the level's numbers; adding one is adding a line to
`OURS`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

import torch

from ...ir.errors import GraphlatheError
from ...passes.optimize import optimize
from ...passes.search.plan import FORMAT
from .base import Row
from .compress_subject import Case, Subject, subject_of
from .compress_work import WorkCounter, count_macs

PACKAGE = __package__


@dataclass(frozen=True)
class Level:
    """How much is to go.

    Attributes:
        name: in the tables.
        ratio: share of the units (blocks, neurons, heads) that are removed; or of what the suite says.
        count: how many blocks that is.
        params: parameters that may be left.
        macs: multiply-adds that may be left, at the subject's sizes.
        ms: milliseconds that may be left in ONNX Runtime, at the longest timed input.
        peers: whether the other tools are asked, too.
        main: whether methods run that are too slow for every level.
    """

    name: str
    ratio: float
    count: int = 0
    params: int = 0
    macs: int = 0
    ms: float = 0.0
    peers: bool = True
    main: bool = False

    def to_json(self) -> Row:
        """The level as JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Method:
    """A way to compress.

    Attributes:
        label: in the tables.
        by: ``ours``, or the package's name and version.
        step: ``module:function``; called with ``case``, ``level``, ``target`` and ``arguments``.
        arguments: more keyword arguments, JSON data.
        restores: the label of the same method without training, whose loss this one is to win back.
        trained: whether it trains; without training and with it are different leagues.
        sparse: its zeros stay in place: it is compared at equal numbers that are not zero.
        models: the subjects it is for; empty: all.
        levels: the levels it is for, by name; empty: all.
        main: only for the suite's main level.
        whole: leaves out whole blocks: what another shape of the same size is to beat.
    """

    label: str
    by: str
    step: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    restores: str | None = None
    trained: bool = False
    sparse: bool = False
    models: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    main: bool = False
    whole: bool = False

    def fits(self, model: str, level: Level) -> bool:
        """Whether it is to be run there."""
        named = (not self.models or model in self.models) and (not self.levels or level.name in self.levels)
        return named and (level.peers or self.by == "ours") and (level.main or not self.main)


def ours(label: str, pipeline: str, *, given: Mapping[str, Any] | None = None, **more: Any) -> Method:
    """One of our methods: a label, a pipeline with ``$`` numbers, and what else `run_pipeline` is given."""
    arguments = {"pipeline": pipeline, **(given or {})}
    return Method(label, "ours", f"{PACKAGE}.compress_methods:run_pipeline", arguments, **more)


GROUPS, QUERIES = "a third of the key-value groups", "a third of each group's query heads"
BY_PARAMETERS, BY_TIME = "80% of the parameters", "80% of the milliseconds"
BY_SPEED, BY_BLOCKS = "at most 15% of the MACs", "48% fewer parameters in the blocks"
"""Levels that only some methods are for."""

_MEASURED = "compress{{sites={} target=$params allocator=knapsack score=optimal-compensation measure}}"
_LANGUAGE, _ENCODER, _PHOTOS = ("smollm2-135m",), ("minilm-l6",), ("efficientnet-lite0",)
_EVERYTHING = "mlp,heads,drop-attention,drop-mlp"

_DISTILL = {
    _LANGUAGE: "distill{steps=400 learning_rate=0.0002 hold_out=0.02 evaluate_every=50}",
    _ENCODER: "distill{steps=300 learning_rate=0.0002 batches_per_step=8}",
    _PHOTOS: "distill{steps=300 learning_rate=0.0001}",
}
"""Short training by subject: windows and images are one batch each, an encoder's are single paragraphs."""
_HALVED = "steps=600 learning_rate=0.001 batches_per_step=8"
"""The training of an encoder that loses half of its blocks' parameters."""
_SEARCH = "generations=40 offspring=8 survivors=2 small=2 large=12 finalists=4 patience=20"
_EVOPRESS = f"canonicalize,evopress{{target=$params rank=$rank {_SEARCH}}}"


def _distilled(plain: Method, *, main: bool = False) -> tuple[Method, ...]:
    """A method with short distillation, one for every subject; ``main``: only at the suite's main level."""
    found = []
    for models, text in _DISTILL.items():
        if not plain.models or set(models) & set(plain.models):
            label, arguments = f"{plain.label}, distilled", {**plain.arguments, "then": text}
            more: dict[str, Any] = {"restores": plain.label, "trained": True, "models": models, "main": main}
            found.append(replace(plain, label=label, arguments=arguments, **more))
    return tuple(found)


def _with_rank(plain: Method, rank: int) -> Method:
    """A method with a map of this rank in place of what is dropped whole."""
    return replace(plain, label=f"{plain.label}, maps of rank {rank}", arguments={**plain.arguments, "rank": rank})


_WINDOW = ours("ShortGPT, window", "canonicalize,shortgpt{blocks=$count window rank=$rank}")
_DEPTH = ours("EvoPress", _EVOPRESS)
_COMP = ours("COMP", "canonicalize,comp{target=$params}")
_LEAST_SQUARES = ours(
    "optimal compensation, least squares",
    "canonicalize,compress{sites=mlp target=$params score=optimal-compensation}",
)
_HEADS = ours("measured levels", f"canonicalize,{_MEASURED.format('heads')}", levels=(GROUPS,))
_BRANCHES = ours(
    "measured levels, branches and widths",
    f"canonicalize,{_MEASURED.format(_EVERYTHING)}",
    levels=(BY_PARAMETERS,),
)
_ZEROS = ours(
    "EvoPress, sparsity",
    "canonicalize,evopress{mode=sparsity target=$params levels=8 generations=30 offspring=8 small=1 large=6}",
    models=_LANGUAGE,
    sparse=True,
)
_CHANNELS = ours(
    "optimal compensation, least squares",
    "canonicalize,fold-batchnorm,compress{sites=channels target=$params score=optimal-compensation}",
    models=_PHOTOS,
)
_ANYTHING = replace(_DEPTH, levels=(BY_PARAMETERS,))

OURS: dict[str, tuple[Method, ...]] = {
    "compress-depth": (
        ours("block influence, greedy", "canonicalize,drop-layers{ratio=$ratio greedy}", main=True),
        ours("ShortGPT", "canonicalize,shortgpt{blocks=$count}", main=True),
        _WINDOW,
        _with_rank(_WINDOW, 128),
        _DEPTH,
        _with_rank(_DEPTH, 128),
        *_distilled(_DEPTH, main=True),
        *_distilled(_with_rank(_DEPTH, 128), main=True),
    ),
    "compress-width": (
        ours("FLAP", "canonicalize,flap{sites=mlp ratio=$ratio}"),
        _COMP,
        _LEAST_SQUARES,
        *_distilled(_LEAST_SQUARES, main=True),
        ours("Tyr", "canonicalize,tyr{sites=mlp target=$params generations=16 offspring=8 iterations=2 large=6}"),
        _ZEROS,
    ),
    "compress-heads": (
        ours("FLAP", "canonicalize,flap{sites=heads target=$params}", levels=(GROUPS,)),
        _HEADS,
        *_distilled(_HEADS),
        ours(
            "Tyr", "canonicalize,tyr{sites=heads target=$params generations=16 offspring=8 large=6}", levels=(GROUPS,)
        ),
        ours("FLAP, query heads", "canonicalize,flap{sites=query-heads target=$params}", levels=(QUERIES,)),
        ours("measured levels, query heads", f"canonicalize,{_MEASURED.format('query-heads')}", levels=(QUERIES,)),
        _ZEROS,
    ),
    "compress-combined": (
        _BRANCHES,
        *_distilled(_BRANCHES),
        ours(
            "evolution, branches and widths",
            f"canonicalize,compress{{sites={_EVERYTHING} target=$params allocator=evolution"
            " score=optimal-compensation steps=8 generations=40 offspring=12}",
            levels=(BY_PARAMETERS,),
        ),
        _ANYTHING,
        _with_rank(_ANYTHING, 128),
        replace(_ZEROS, levels=(BY_PARAMETERS,)),
        ours(
            "measured levels, milliseconds",
            f"canonicalize,compress{{sites={_EVERYTHING} target=$ms budget=ms allocator=knapsack"
            " score=optimal-compensation measure multiple=16}",
            levels=(BY_TIME,),
        ),
        ours(
            "EvoPress, milliseconds",
            f"canonicalize,evopress{{target=$ms budget=ms {_SEARCH}}}",
            levels=(BY_TIME,),
        ),
        ours(
            "SHRP, distilled",
            f"canonicalize,shrp{{stage=expand heads=1 width=384 {_HALVED}}}",
            given={"trains": True},
            models=_ENCODER,
            levels=(BY_SPEED,),
            trained=True,
        ),
        ours(
            "SHRP that reads the stream, distilled",
            f"canonicalize,shrp{{stage=expand reads=stream heads=8 width=680 {_HALVED}}}",
            given={"trains": True},
            models=_ENCODER,
            levels=(BY_BLOCKS,),
            trained=True,
        ),
        ours(
            "SHRP that reads the stream, as many MACs as whole blocks, distilled",
            f"canonicalize,shrp{{stage=expand reads=stream heads=8 width=592 {_HALVED}}}",
            given={"trains": True},
            models=_ENCODER,
            levels=(BY_BLOCKS,),
            trained=True,
        ),
        ours(
            "ShortGPT, window, distilled",
            "canonicalize,shortgpt{blocks=$count window}",
            given={"then": f"distill{{{_HALVED}}}"},
            models=_ENCODER,
            levels=(BY_BLOCKS,),
            trained=True,
            whole=True,
        ),
    ),
    "compress-vision": (
        ours("FLAP", "canonicalize,fold-batchnorm,flap{sites=channels target=$params}"),
        ours("fluctuation, least squares", "canonicalize,fold-batchnorm,compress{sites=channels target=$params}"),
        _CHANNELS,
        *_distilled(_CHANNELS),
        ours(
            "Tyr",
            "canonicalize,fold-batchnorm,tyr{sites=channels target=$params generations=16 offspring=8 iterations=2"
            " large=6}",
        ),
    ),
}
"""Our methods by suite."""


_ROUNDING = 1.0001
"""Parameters that ours may have, over the level's: tables of constants are counted by some, and not by others, and a
model without the blocks that the level is made of must not be over the budget."""


def fill(pipeline: str, level: Mapping[str, Any]) -> str:
    """The pipeline with the level's numbers in it.

    Raises:
        GraphlatheError: it names a number that levels do not have.
    """
    numbers = {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in level.items()}
    if "params" in level:
        numbers["params"] = str(int(_ROUNDING * level["params"]))
    try:
        return Template(pipeline).substitute(numbers)
    except (KeyError, ValueError) as error:
        raise GraphlatheError(f"in the pipeline '{pipeline}': {error}", expected=f"of {', '.join(numbers)}") from error


def run_pipeline(
    case: Mapping[str, Any],
    level: Mapping[str, Any],
    target: str,
    pipeline: str,
    rank: int = 0,
    then: str | None = None,
    trains: bool = False,
) -> Row:
    """Run one of our pipelines on the dense program and write the ONNX file.

    What differs from a pipeline that the same run has made before only in ``rank`` or ``then`` takes its plans instead
    of searching for them again; the search's cost counts all the same.

    Args:
        case, level, target: see the module's text.
        pipeline: with ``$`` numbers.
        rank: what ``$rank`` stands for: the rank of the maps in place of what is dropped whole.
        then: passes that train what came out, on more of the same text, to answer as the dense program does.
        trains: whether the pipeline trains by itself and gets as much.
    """
    chosen = Case.from_json(case)
    subject = subject_of(chosen)
    module = subject.module()
    batches = subject.training() if trains else subject.calibration()
    program = subject.program(module)
    text = fill(pipeline, {**level, "rank": rank})
    own, plain = _Kept(chosen, text), _Kept(chosen, fill(pipeline, {**level, "rank": 0}))
    source = next((kept for kept in (own, plain) if kept.exists), None)
    steps = text if source is None else source.pipeline(rank)
    with Search(subject, module) as search:
        # Quality is measured on the test data, for all methods alike.
        settings: dict[str, Any] = {"progress": False, "costs": False, "drift_batches": 0}
        result = optimize(program, passes=steps, calibration=batches, **settings)
        plan = result.plan
        if then is not None:
            result = optimize(result, passes=then, calibration=subject.training(), teacher=program, **settings)
    result.export_onnx(target, fallback=False)
    # What was timed in ONNX Runtime; a plan that is taken over holds its own, which are in its cost.
    runs = 0 if source is not None else sum(made.get("budget", {}).get("runs", 0) for made in plan.values())
    row = search.row(outside=runs * subject.units(batches[0]))
    if source is not None:
        row = {key: value + source.cost()[key] for key, value in row.items()}
    elif then is None:
        own.save(plan, row)
    return {"pipeline": text if then is None else f"{text},{then}", **row, "plan": {**plan, **result.plan}}


class _Kept:
    """The plans of a pipeline, and what they cost, in the folder of the run."""

    def __init__(self, case: Case, pipeline: str) -> None:
        name = hashlib.sha256(f"{case.model} {pipeline}".encode()).hexdigest()[:12]
        self._folder = Path(case.work) / name if case.work else None

    @property
    def exists(self) -> bool:
        return self._folder is not None and (self._folder / "cost.json").is_file()

    def pipeline(self, rank: int) -> str:
        """The plans as a pipeline, with maps of this rank in place of what they drop."""
        assert self._folder is not None
        plans = sorted(self._folder.glob("plan-*.json"))
        for plan in plans:
            plan.write_text(json.dumps({**json.loads(plan.read_text()), "rank": rank}))
        return ",".join(["canonicalize", *(f'apply-plan{{path="{plan}"}}' for plan in plans)])

    def cost(self) -> Row:
        assert self._folder is not None
        found: Row = json.loads((self._folder / "cost.json").read_text())
        return found

    def save(self, plans: Mapping[str, Mapping[str, Any]], cost: Row) -> None:
        """Keep them, unless a pass did something that no plan holds."""
        found = list(plans.values())
        if self._folder is None or not found or any(plan.get("format") != FORMAT for plan in found):
            return
        self._folder.mkdir(exist_ok=True)
        for index, plan in enumerate(found):
            (self._folder / f"plan-{index}.json").write_text(json.dumps(plan))
        (self._folder / "cost.json").write_text(json.dumps(cost))


class Search:
    """What the code in ``with`` blocks costs: processor and wall seconds, and the work in units of the dense model.

    Args:
        subject: whose dense model's work on one unit (a token, an image) is the measure.
        module: the dense module, if it is there already.
    """

    def __init__(self, subject: Subject, module: torch.nn.Module | None = None) -> None:
        feeds = subject.example()
        dense = module or subject.module()
        with torch.no_grad():
            self._unit = count_macs(lambda: dense(**feeds)) / subject.units(feeds)
        self._counter = WorkCounter()
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Search:
        self._start = time.perf_counter(), time.process_time()
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]

    def row(self, outside: int = 0) -> Row:
        """The columns; ``outside`` are units that were computed where PyTorch does not see them."""
        units = round(self._counter.macs / self._unit) + outside
        return {"search_units": units, "search_seconds": self.seconds, "search_cpu_seconds": self.cpu_seconds}


def export_module(subject: Subject, module: torch.nn.Module, target: str) -> Path:
    """Write a changed module's ONNX file the way the dense one was written."""
    return subject.program(module.eval()).export_onnx(target, fallback=False)
