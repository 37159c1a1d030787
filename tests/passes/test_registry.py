"""Laws that every registered pass keeps, and that nothing about one is missing: file, registry line, golden, docs."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlathe.ir.errors import PipelineError, PreconditionError
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.ir.verify import relative_error, verify
from graphlathe.passes import registry
from graphlathe.passes.base import Batch, Context, Effect, Pass, option_type, options_of
from graphlathe.passes.contract import BUDGETS
from graphlathe.passes.heads.blocks import find_sites
from graphlathe.passes.manager import PassManager
from graphlathe.passes.search.linear_sites import linear_sites
from graphlathe.passes.search.sites import channel_sites
from graphlathe.passes.search.units import removable_units
from graphlathe.tools import zoo
from tests.passes.golden_text import golden_text
from tests.zoo_programs import traced, zoo_parameters

ROOT = Path(__file__).parents[2]
NAMES = sorted(registry.BUILTIN)
QUICK = ("llama", "plain_resnet")
# Settings for passes whose defaults are no complete set of options, or search and train for long.
SETTINGS: dict[str, dict[str, Any]] = {
    "comp": {"ratio": 0.25},
    "compress": {"ratio": 0.25, "steps": 4},
    "distill": {"steps": 2},
    "drop-layers": {"ratio": 0.4},
    "evopress": {"ratio": 0.4, "generations": 1, "offspring": 3},
    "flap": {"ratio": 0.25},
    "rocket": {"ratio": 0.2, "step": 0.35},
    "shortgpt": {"ratio": 0.4},
    "shrp": {"steps": 2, "router_steps": 2},
    "tyr": {"ratio": 0.25, "generations": 1, "offspring": 2, "iterations": 1, "step": 0.25},
}
PRESETS = {"apply-plan", "comp", "distill", "evopress", "flap", "shortgpt", "tyr"}
"""Passes that leave the rewriting to what `compress` and `drop-layers` use as well."""
CHOOSES_NOTHING = {"apply-plan"}
"""Approximate passes that carry out what others chose: there is nothing that one could plant for them."""


REFUSED = {
    ("albert", "evopress"): "out of reach",  # its blocks share their weights, so dropping some saves none
    ("albert", "tyr"): "is read by several operators",
    ("convnextv2", "tyr"): "takes the mean over it",
    ("olmoe", "tyr"): "takes the mean over it",
}
"""Where a pass finds its sites and refuses all the same, with what it says."""
NO_CHANNELS = {"plain_dilated", "plain_gru", "plain_lstm", "plain_shuffle"}
"""Models without channels, heads or hidden units that can be cut: dilated and shuffled groups, recurrent layers."""


def places_of(program: Program) -> dict[str, bool]:
    """For each pass that removes something: whether the canonical program has a site for it."""
    found = structure(program)
    sites, _ = channel_sites(program, found, ("heads", "mlp", "channels"))
    kinds = {site.kind for site in sites}
    free = {size: any(not u.blocked for u in removable_units(found, size)) for size in ("block", "attention", "mlp")}
    return {
        **dict.fromkeys(("compress", "flap", "tyr"), bool(kinds)),
        **dict.fromkeys(("drop-layers", "shortgpt"), free["block"]),
        "comp": "mlp" in kinds,
        "evopress": free["attention"] or free["mlp"],
        "rocket": bool(linear_sites(program, found)[0]),
        "shrp": bool(find_sites(program, found).heads),
    }


def declares(name: str, law: str) -> bool:
    """Whether a pass has a law (``neutral``, ``planted``) of its own; making the case to see that would take long."""
    return getattr(registry.get(name), law).__func__ is not getattr(Pass, law).__func__


def pass_of(name: str) -> Pass:
    return registry.get(name)(**SETTINGS.get(name, {}))


def inputs_of(name: str) -> tuple[Program, Batch, Sequence[Batch]]:
    """A zoo program, an example for it, and calibration data of another size."""
    model, program = zoo.get(name), traced(name)
    example = program.feeds(**model.example())
    return program, example, [program.feeds(**model.inputs(sizes)) for sizes in model.unseen_sizes]


@pytest.mark.parametrize("name", zoo_parameters(quick=QUICK))
def test_every_pass_on_every_model(name: str) -> None:
    """Runs, or has nothing to work on and says so; verifies at level 2; keeps its promise (or the manager raises)."""
    program, example, calibration = inputs_of(name)
    canonical = PassManager("canonicalize", costs=False).run(program)[0]
    places = places_of(canonical)
    # What a pass finds is what it is judged by, so what is found is judged by what is known of the model.
    assert places["drop-layers"] == bool(zoo.get(name).blocks)
    assert places["compress"] == (name not in NO_CHANNELS)
    verified, ran = {program.fingerprint()}, 0
    for pass_name in NAMES:
        exact = registry.get(pass_name).effect is Effect.EXACT
        # Of exact ones the result is verified at level 3 below; what presets do to a graph is what `compress` does.
        level = 1 if exact or pass_name in PRESETS else 2
        settings: dict[str, Any] = {"calibration": calibration, "verify": level, "costs": False}
        manager = PassManager(pass_of(pass_name), feeds=example, **settings)
        try:
            after, report = manager.run(program if exact else canonical)
        except PreconditionError as error:
            assert error.pass_name == pass_name
            assert error.remedy or error.expected
            if pass_name not in CHOOSES_NOTHING and (places[pass_name] or (name, pass_name) in REFUSED):
                assert REFUSED[name, pass_name] in error.message
            continue
        assert (name, pass_name) not in REFUSED
        ran += 1
        row = report.rows[-1]
        assert row.unchecked is None
        assert (row.drift is not None) == (row.effect is Effect.APPROXIMATE)
        if exact:
            assert row.error is not None
            # At sizes that neither tracing nor the manager saw. Several passes may give the same program.
            if (fingerprint := after.fingerprint()) not in verified:
                verify(after, 3, reference=program, feeds=calibration or [example], pass_name=pass_name)
                verified.add(fingerprint)
    assert ran >= len([n for n in NAMES if registry.get(n).effect is Effect.EXACT])


OTHER_MODES = ("mode=sparsity levels=4", "mode=bits rank=2")
# One for each form in which linear layers are met: stacked experts, fused and shared ones, convolutions of width one...
_LINEAR_FORMS = (
    "llama", "gpt2", "bert", "t5", "albert", "swin", "deepseek_v3", "qwen2_moe", "mixtral", "gemma3", "phi3", "whisper",
    "clip", "modernbert", "convnextv2", "mamba", "resnet", "plain_lstm",
)  # fmt: skip


@pytest.mark.parametrize("options", OTHER_MODES)
@pytest.mark.parametrize("name", zoo_parameters(_LINEAR_FORMS, quick=("llama", "gpt2")))
def test_other_modes_of_evopress(name: str, options: str) -> None:
    """Zeros and codes in linear layers, wherever there are some: fewer nonzeros or bytes, the same interface."""
    program, _, calibration = inputs_of(name)
    canonical = PassManager("canonicalize", costs=False).run(program)[0]
    has_sites = bool(linear_sites(canonical, structure(canonical))[0])
    text = f"evopress{{{options} ratio=0.3 generations=1 offspring=2}}"
    manager = PassManager(text, calibration=calibration, verify=2, costs=False)
    if not has_sites:
        with pytest.raises(PreconditionError, match=r"nothing of the kinds linear layers|has no residual stream"):
            manager.run(canonical)
        return
    after, report = manager.run(canonical)
    budget = report.rows[-1].plan["budget"]
    assert budget["unit"] == ("nonzeros" if "sparsity" in options else "bytes")
    assert budget["after"] < budget["before"]
    assert [str(o.shape) for o in after.outputs] == [str(o.shape) for o in canonical.outputs]
    values = after.run(after.feeds(**calibration[0]))
    assert all(bool(v.isfinite().all()) for v in values.values() if v.is_floating_point())


@pytest.mark.parametrize("pass_name", [n for n in NAMES if declares(n, "neutral")])
@pytest.mark.parametrize("name", zoo_parameters(["llama", "gpt_neox", "bert", "t5"], quick=QUICK))
def test_neutral_settings_change_nothing(pass_name: str, name: str) -> None:
    program, example, calibration = inputs_of(name)
    neutral = registry.get(pass_name).neutral()
    assert neutral is not None
    after, _ = PassManager(neutral, feeds=example, calibration=calibration, verify=2).run(program)
    for batch in (example, *calibration):
        assert relative_error(after.run(batch), program.run(batch)) == 0.0


@pytest.mark.parametrize("pass_name", [n for n in NAMES if declares(n, "planted")])
def test_what_is_planted_is_found(pass_name: str, golden: Callable[[str, str], None]) -> None:
    case = registry.get(pass_name).planted()
    assert case is not None
    program = case.program.clone()
    context = Context(calibration=case.calibration, original=case.original)
    case.settings.check(program, context)
    stats = case.settings.run(program, context)
    assert case.found(program, stats)
    golden(f"passes/{pass_name}", golden_text(case.program, program))


def test_every_pass_that_chooses_declares_both_laws() -> None:
    for name in NAMES:
        cls = registry.get(name)
        if cls.effect is Effect.APPROXIMATE:
            assert declares(name, "neutral"), name
            assert declares(name, "planted") != (name in CHOOSES_NOTHING), name
            assert cls.paper, name


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_a_documented_frozen_value(name: str) -> None:
    cls = registry.get(name)
    assert cls.name == name == name.lower()
    assert dataclasses.is_dataclass(cls)
    assert cls.__doc__
    assert not cls.__doc__.startswith(cls.__name__ + "(")  # what dataclasses write when nobody does
    module = importlib.import_module(cls.__module__)
    assert module.__doc__
    pass_ = pass_of(name)
    hash(pass_)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pass_.name = "x"  # type: ignore[misc]
    for spec in options_of(cls):
        assert spec.metadata["help"]
        option_type(cls, spec.name)
    assert {f.name for f in dataclasses.fields(cls)} == {f.name for f in options_of(cls)}


def test_every_pass_file_is_registered_and_every_entry_has_its_file_and_test() -> None:
    registered = {where.partition(":")[0].removeprefix(".").replace(".", "/") for where in registry.BUILTIN.values()}
    found = set()
    for path in (ROOT / "passes").rglob("*.py"):
        if path.parent == ROOT / "passes" or path.name == "__init__.py":
            continue
        if re.search(r"^class \w+\((Width)?Pass\):$(?s:.*?)name: ClassVar", path.read_text(encoding="utf-8"), re.M):
            found.add(path.relative_to(ROOT / "passes").with_suffix("").as_posix())
    assert found == registered
    for where in registered:
        test = ROOT / "tests" / "passes" / Path(where).parent / f"test_{Path(where).name}.py"
        assert test.exists(), f"no {test.relative_to(ROOT)}"


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_has_a_golden(name: str) -> None:
    assert (ROOT / "tests" / "goldens" / "passes" / f"{name}.txt").exists(), "see CONTRIBUTING: a pass's golden test"


def test_the_catalogue_in_the_docs_is_up_to_date() -> None:
    from graphlathe.passes.catalogue import markdown

    text = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert text == markdown(NAMES), "run: graphlathe passes --markdown > docs/passes.md"


def test_passes_are_attributes_of_the_package() -> None:
    from graphlathe import passes

    for name in NAMES:
        cls = registry.get(name)
        assert getattr(passes, cls.__name__) is cls
        assert cls.__name__ in dir(passes)
    with pytest.raises(AttributeError, match="no pass or name 'Nothing'"):
        _ = passes.Nothing


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(PipelineError, match="'cse' is taken"):

        @registry.register
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Mine(Pass):
            name = "cse"

    with pytest.raises(PipelineError, match="has no name"):
        registry.register(Pass)


def test_a_class_that_is_defined_again_replaces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})

    def cell() -> type[Pass]:
        @registry.register
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Mine(Pass):
            name = "test-mine"

        return Mine

    first, second = cell(), cell()
    assert registry.get("test-mine") is second is not first


class Plugins:
    def __init__(self, *points: tuple[str, str]) -> None:
        self.points = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in points]

    def __call__(self, group: str) -> list[EntryPoint]:
        assert group == registry.ENTRY_POINT_GROUP
        return self.points


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*points: tuple[str, str]) -> None:
        registry._plugins.cache_clear()
        monkeypatch.setattr(registry, "entry_points", Plugins(*points))

    yield install
    monkeypatch.undo()
    registry._plugins.cache_clear()


def test_third_parties_add_passes_by_entry_point(plugins: Any) -> None:
    plugins(("test-counter", "tests.passes.example_passes:Counter"))
    assert "test-counter" in registry.names()
    from tests.passes.example_passes import Counter

    assert registry.get("test-counter") is Counter


def test_a_plugin_that_clashes_or_lies_is_an_error(plugins: Any) -> None:
    plugins(("cse", "tests.passes.example_passes:Counter"))
    with pytest.raises(PipelineError, match="two packages provide the pass 'cse'"):
        registry.names()
    plugins(("other-name", "tests.passes.example_passes:Counter"))
    with pytest.raises(PipelineError, match="not a Pass of that name"):
        registry.get("other-name")
    plugins(("gone", "tests.passes.example_passes:Gone"))
    with pytest.raises(PipelineError, match="cannot be loaded"):
        registry.get("gone")


def test_budget_names_are_documented() -> None:
    from graphlathe.passes.optimize import optimize

    assert all(f"``{name}``" in (optimize.__doc__ or "") for name in BUDGETS)


def test_functions_of_the_package_stay_functions() -> None:
    import graphlathe as gl

    gl.optimize(torch.nn.ReLU(), (torch.ones(2),), passes="dce")
    for _ in range(2):
        assert callable(gl.passes.bisect)


def test_numbers_of_numpy_are_numbers() -> None:
    settings = registry.get("drop-layers")(indices=[np.int64(1)])  # type: ignore[call-arg]
    assert settings.to_text() == "drop-layers{indices=1}"
