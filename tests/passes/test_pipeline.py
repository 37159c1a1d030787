"""Pipeline strings: they parse, print, round-trip, and say where they are wrong."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graphlathe.ir.errors import PipelineError
from graphlathe.passes import registry
from graphlathe.passes.base import Effect, Pass, kinds_of, option, option_type, options_of
from graphlathe.passes.canonical.cse import CommonSubexpressions
from graphlathe.passes.canonical.dce import DeadCode
from graphlathe.passes.canonical.fold_constants import FoldConstants
from graphlathe.passes.layers.drop_layers import DropLayers
from graphlathe.passes.pipeline import Pipeline, Repeat, parse_pipeline
from tests.passes.example_passes import EVERY_KIND, EveryKind


def test_the_example_of_the_style_guide() -> None:
    text = "fold-constants,repeat{max=4}(cse,dce),drop-layers{ratio=0.25 score=loss}"
    pipeline = parse_pipeline(text)
    assert pipeline.items == (
        FoldConstants(),
        Repeat(Pipeline((CommonSubexpressions(), DeadCode())), 4),
        DropLayers(ratio=0.25, score="loss"),
    )
    assert pipeline.to_text() == text


def test_blanks_mean_nothing_and_defaults_are_not_printed() -> None:
    text = " cse , repeat { max = 10 } ( dce ,\n cse ) , drop-layers{ indices=1,2  granularity=block }"
    text = text.replace(" = ", "=")
    assert parse_pipeline(text).to_text() == "cse,repeat(dce,cse),drop-layers{indices=1,2}"


def test_nested_groups() -> None:
    text = "repeat(cse,repeat{max=2}(dce))"
    assert parse_pipeline(text).to_text() == text
    assert [p.name for p in parse_pipeline(text).passes()] == ["cse", "dce"]


def test_empty() -> None:
    assert parse_pipeline("") == parse_pipeline([]) == Pipeline()


def test_strings_passes_and_sequences_mix() -> None:
    parts: list[Any] = ["cse,dce", DeadCode(), [Repeat(Pipeline((DeadCode(),))), "dce"], parse_pipeline("cse")]
    assert parse_pipeline(parts).to_text() == "cse,dce,dce,repeat(dce),dce,cse"


def test_a_bare_key_means_true() -> None:
    assert parse_pipeline("drop-layers{ratio=0.5 greedy}").items == (DropLayers(ratio=0.5, greedy=True),)


WRONG: dict[str, tuple[str, str, str]] = {
    # text, what stands under the carets, part of the message
    "unknown pass": ("cse,canonicalise", "canonicalise", "did you mean 'canonicalize'?"),
    "unknown key": ("drop-layers{ratoi=0.2}", "ratoi", "did you mean 'ratio'?"),
    "no options": ("cse{x=1}", "x", "'cse' has none"),
    "out of range": ("drop-layers{ratio=1.5}", "1.5", "less than 1"),
    "wrong type": ("drop-layers{ratio=much}", "much", "not a number"),
    "wrong item": ("drop-layers{indices=1,b}", "1,b", "not a whole number"),
    "wrong choice": ("drop-layers{ratio=0.5 score=lss}", "lss", "did you mean 'loss'?"),
    "a comma between options": ("drop-layers{ratio=0.1,score=loss}", "0.1,score", "separated by blanks"),
    "a blank in a list": ("drop-layers{indices=1, 2}", " ", "a value is missing"),
    "a blank instead of a comma": ("drop-layers{indices=1 2}", "2", "the values of a list by commas"),
    "given twice": ("drop-layers{ratio=0.1 ratio=0.2}", "ratio", "given twice"),
    "options that exclude each other": (
        "cse,drop-layers{ratio=0.1 indices=1}",
        "drop-layers{ratio=0.1 indices=1}",
        "one",
    ),
    "open options": ("drop-layers{ratio=0.1", " ", "the end"),
    "open group": ("repeat(cse", " ", "not closed"),
    "repeat without group": ("repeat,cse", ",", "needs a group"),
    "repeat never": ("repeat{max=0}(cse)", "repeat{max=0}(cse)", "at least once"),
    "group on a pass": ("cse(dce)", "(", "takes no group"),
    "missing pass": ("cse,,dce", ",", "missing"),
    "rest": ("cse)", ")", "unexpected"),
    "open quotes": ('drop-layers{score="loss}', '"loss}', "Unterminated"),
}


@pytest.mark.parametrize(("text", "marked", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_point_at_the_spot(text: str, marked: str, message: str) -> None:
    with pytest.raises(PipelineError) as error:
        parse_pipeline(text)
    assert message in str(error.value)
    lines = str(error.value).splitlines()
    caret = next(line for line in lines if set(line) <= {" ", "^"} and "^" in line)
    line = lines[lines.index(caret) - 1].ljust(len(caret))
    assert "".join(c for c, mark in zip(line, caret, strict=False) if mark == "^") == marked


def test_wrong_objects() -> None:
    with pytest.raises(PipelineError, match="class, not a pass"):
        parse_pipeline([DeadCode])
    with pytest.raises(PipelineError, match="int is no pipeline"):
        parse_pipeline(3)


def test_options_are_checked_in_python_too() -> None:
    with pytest.raises(PipelineError, match="less than 1"):
        DropLayers(ratio=1)
    with pytest.raises(PipelineError, match="expected: int"):
        FoldConstants(max_bytes=1.5)  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="expected: int"):
        FoldConstants(max_bytes=True)
    with pytest.raises(PipelineError, match="not a number"):
        DropLayers(ratio=float("nan"))


def values_of(cls: type[Pass], name: str) -> st.SearchStrategy[Any]:
    """Values that an option's declaration allows."""
    spec = next(f for f in options_of(cls) if f.name == name)
    kind, optional = kinds_of(option_type(cls, name))
    bounds, choices = spec.metadata["bounds"], spec.metadata["choices"]
    item = get_args(kind)[0] if get_origin(kind) is tuple else kind
    if choices:
        values: st.SearchStrategy[Any] = st.sampled_from(choices)
    elif item is bool:
        values = st.booleans()
    elif item is int:
        low = bounds.get("ge", bounds["gt"] + 1 if "gt" in bounds else None)
        high = bounds.get("le", bounds["lt"] - 1 if "lt" in bounds else None)
        values = st.integers(low, high)
    elif item is float:
        values = st.floats(
            bounds.get("ge", bounds.get("gt")),
            bounds.get("le", bounds.get("lt")),
            exclude_min="gt" in bounds,
            exclude_max="lt" in bounds,
            allow_nan=False,
        )
    else:
        values = st.text()
    if item is not kind:
        values = st.lists(values, max_size=4).map(tuple)
    return st.none() | values if optional else values


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    cls = registry.get(draw(st.sampled_from(registry.names())))
    names = [f.name for f in options_of(cls)]
    chosen = draw(st.lists(st.sampled_from(names), unique=True)) if names else []
    options = {name: draw(values_of(cls, name)) for name in chosen}
    try:
        return cls(**options)
    except PipelineError:  # options that exclude each other
        assume(False)
        raise


@given(passes())
def test_every_registered_pass_round_trips(pass_: Pass) -> None:
    assert parse_pipeline(pass_.to_text()).items == (pass_,)


@given(st.fixed_dictionaries({}, optional={name: values_of(EveryKind, name) for name in EVERY_KIND}))
def test_every_kind_of_option_round_trips(options: dict[str, Any]) -> None:
    pass_ = EveryKind(**options)
    (again,) = parse_pipeline(pass_.to_text()).items
    assert again == pass_
    assert again.to_text() == pass_.to_text()
    assert pass_.to_text().isascii()


def groups(inner: st.SearchStrategy[Pass | Repeat]) -> st.SearchStrategy[Pass | Repeat]:
    bodies = st.lists(inner, min_size=1, max_size=3).map(lambda items: Pipeline(tuple(items)))
    return st.builds(Repeat, bodies, st.integers(1))


@given(st.recursive(passes(), groups))
def test_groups_round_trip(item: Pass | Repeat) -> None:
    pipeline = parse_pipeline([item, item])
    assert parse_pipeline(pipeline.to_text()) == pipeline


def test_passes_are_values() -> None:
    assert DropLayers(ratio=0.5) == DropLayers(ratio=0.5)
    assert len({DropLayers(ratio=0.5), DropLayers(ratio=0.5), DeadCode()}) == 2
    assert option(1, help="x").metadata["help"] == "x"
    assert EveryKind.effect is Effect.ANALYSIS
