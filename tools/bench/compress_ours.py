"""Our methods of the compression suites, as data: adding one is adding a line to `OURS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .compress_methods import PACKAGE, Method


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
_TEXTS = 3800
"""On so many texts, so that hardly any is seen twice: all that the source has beyond what is measured on."""
_JUDGED = {(*_LANGUAGE, *_PHOTOS): "large=6", _ENCODER: "small=4 large=24"}
"""Batches that searches judge few candidates on; an encoder's are paragraphs, of which one says little."""
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


def _judged(label: str, pipeline: str, **more: Any) -> tuple[Method, ...]:
    """A search that is told on how much to judge candidates: ``$judged`` of the pipeline, by subject."""
    return tuple(
        ours(label, pipeline.replace("$judged", text), models=models, **more) for models, text in _JUDGED.items()
    )


def _with_rank(plain: Method, rank: int) -> Method:
    """A method with a map of this rank in place of what is dropped whole."""
    return replace(plain, label=f"{plain.label}, maps of rank {rank}", arguments={**plain.arguments, "rank": rank})


def _shrp(label: str, options: str, level: str) -> Method:
    """SHRP of the encoder, which trains by itself."""
    pipeline = f"canonicalize,shrp{{stage=expand {options} {_HALVED}}}"
    given = {"trains": True, **({"training": _TEXTS} if level == BY_BLOCKS else {})}
    return ours(label, pipeline, given=given, models=_ENCODER, levels=(level,), trained=True)


_WINDOW = ours("ShortGPT, window", "canonicalize,shortgpt{blocks=$count window rank=$rank}")
_DEPTH = ours("EvoPress", _EVOPRESS)
_COMP = ours("COMP", "canonicalize,comp{target=$params}")
_LEAST_SQUARES = ours(
    "optimal compensation, least squares",
    "canonicalize,compress{sites=mlp target=$params score=optimal-compensation}",
)
_FLUCTUATION = ours("fluctuation, least squares", "canonicalize,compress{sites=mlp target=$params}")
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
_ZEROS_BY_WANDA = ours(
    "EvoPress, sparsity by Wanda",
    "canonicalize,evopress{mode=sparsity method=wanda target=$params levels=8 generations=30 offspring=8 large=6}",
    models=_LANGUAGE,
    sparse=True,
    main=True,
)
_ZEROS_BY_RIA = ours(
    "EvoPress, sparsity by RIA, corrected",
    "canonicalize,evopress{mode=sparsity method=ria-corrected target=$params levels=8 generations=30 offspring=8"
    " large=6}",
    models=_LANGUAGE,
    sparse=True,
)
_ZEROS_AT_ONCE = ours(
    "RIA, corrected, equal shares",
    "canonicalize,evopress{mode=sparsity method=ria-corrected target=$params levels=1 generations=0}",
    models=_LANGUAGE,
    sparse=True,
)
_CHANNELS = ours(
    "optimal compensation, least squares",
    "canonicalize,fold-batchnorm,compress{sites=channels target=$params score=optimal-compensation multiple=16}",
    models=_PHOTOS,
)
_ANYTHING = replace(_DEPTH, levels=(BY_PARAMETERS,))
_WINDOW_AND_NEURONS = ours(
    "ShortGPT, window, maps of rank 128, then neurons",
    "canonicalize,shortgpt{ratio=0.2 window rank=128},compress{sites=mlp target=$params score=optimal-compensation}",
    levels=(BY_PARAMETERS,),
)

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
        _FLUCTUATION,
        *_distilled(_FLUCTUATION, main=True),
        *_judged(
            "Tyr",
            "canonicalize,tyr{sites=mlp target=$params generations=16 offspring=8 iterations=2 $judged}",
            main=True,
        ),
        replace(_ZEROS, main=True),
        _ZEROS_BY_WANDA,
        replace(_ZEROS_BY_RIA, main=True),
        replace(_ZEROS_AT_ONCE, levels=tuple(f"{share:.0%} of the neurons" for share in (0.1, 0.4))),
    ),
    "compress-heads": (
        ours("FLAP", "canonicalize,flap{sites=heads target=$params}", levels=(GROUPS,)),
        _HEADS,
        *_distilled(_HEADS),
        *_judged(
            "Tyr",
            "canonicalize,tyr{sites=heads target=$params generations=16 offspring=8 $judged}",
            levels=(GROUPS,),
        ),
        ours("FLAP, query heads", "canonicalize,flap{sites=query-heads target=$params}", levels=(QUERIES,)),
        ours("measured levels, query heads", f"canonicalize,{_MEASURED.format('query-heads')}", levels=(QUERIES,)),
        replace(_ZEROS, levels=(GROUPS,)),
        replace(_ZEROS_AT_ONCE, levels=(QUERIES,)),
    ),
    "compress-combined": (
        _BRANCHES,
        *_distilled(_BRANCHES),
        *_judged(
            "evolution, branches and widths",
            f"canonicalize,compress{{sites={_EVERYTHING} target=$params allocator=evolution"
            " score=optimal-compensation steps=8 generations=40 offspring=12 $judged}",
            levels=(BY_PARAMETERS,),
        ),
        _WINDOW_AND_NEURONS,
        *_distilled(_WINDOW_AND_NEURONS),
        _ANYTHING,
        _with_rank(_ANYTHING, 128),
        replace(_ZEROS_BY_RIA, levels=(BY_PARAMETERS,)),
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
        _shrp("SHRP, distilled", "heads=1 width=384", BY_SPEED),
        *(
            _shrp(
                f"SHRP that reads the stream{faster}, distilled{how}", f"{more}reads=stream heads=8 {width}", BY_BLOCKS
            )
            for faster, width in (("", "width=680"), (", as many MACs as whole blocks", "width=592"))
            for how, more in (("", ""), (" by outputs alone", "feature_weight=0 "))
        ),
        ours(
            "ShortGPT, window, distilled",
            "canonicalize,shortgpt{blocks=$count window}",
            given={"then": f"distill{{{_HALVED}}}", "training": _TEXTS},
            models=_ENCODER,
            levels=(BY_BLOCKS,),
            trained=True,
            whole=True,
        ),
    ),
    "compress-vision": (
        ours("FLAP", "canonicalize,fold-batchnorm,flap{sites=channels target=$params multiple=16}"),
        ours(
            "fluctuation, least squares",
            "canonicalize,fold-batchnorm,compress{sites=channels target=$params multiple=16}",
        ),
        _CHANNELS,
        *_distilled(_CHANNELS),
        *_judged(
            "Tyr",
            "canonicalize,fold-batchnorm,tyr{sites=channels target=$params multiple=16 generations=16 offspring=8"
            " iterations=2 $judged}",
        ),
    ),
}
"""Our methods by suite."""
