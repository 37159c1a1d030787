"""The zoo keeps its promises: many architectures, deterministic models, inputs that fit at every size it names.

That each model traces, and agrees with itself at unseen sizes, is tested with the tracer.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from torch.utils import _pytree as pytree

from graphlathe.tools.zoo import FAMILIES, UNTRACEABLE, ZOO, ZooModel, get, names

EVERY = pytest.mark.parametrize("model", ZOO, ids=lambda model: model.name)


def outputs(model: ZooModel, sizes: dict[str, int] | None = None) -> list[torch.Tensor]:
    """The output tensors at the given sizes, of a freshly built module."""
    with torch.no_grad():
        output = model.module()(**model.inputs(sizes or model.trace_sizes))
    return pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)


def test_names_are_unique_and_found() -> None:
    assert len(set(names())) == len(ZOO)
    assert all(get(model.name) is model for model in ZOO)
    assert not set(names()) & set(UNTRACEABLE)
    with pytest.raises(KeyError, match="no zoo model 'lama'"):
        get("lama")


def test_every_family_is_there() -> None:
    assert all(names(family) for family in FAMILIES)
    assert {model.family for model in ZOO} == set(FAMILIES)
    with pytest.raises(KeyError, match="no zoo family"):
        names("fish")


def test_many_architectures() -> None:
    assert len(ZOO) - len(names("plain")) >= 48


def test_importing_the_zoo_does_not_import_transformers() -> None:
    program = "import sys, graphlathe.tools.zoo; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@EVERY
def test_sizes_and_inputs_agree(model: ZooModel) -> None:
    """Dynamic axes carry the named size, the others never change, and equal sizes give equal tensors."""
    example = model.example()
    dimensions = {dimension for axes in model.dynamic.values() for dimension in axes.values()}
    assert set(model.dynamic) <= set(example)
    for sizes in (model.trace_sizes, *model.unseen_sizes):
        assert set(sizes) == dimensions
        for name, tensor in model.inputs(sizes).items():
            axes = model.dynamic.get(name, {})
            expected = [sizes[axes[axis]] if axis in axes else size for axis, size in enumerate(example[name].shape)]
            assert list(tensor.shape) == expected
            assert torch.equal(tensor, model.inputs(sizes)[name])
    for unseen in model.unseen_sizes:
        # A size that tracing saw would hide what the trace specialised on.
        assert all(size != model.trace_sizes[dimension] for dimension, size in unseen.items())


@pytest.mark.parametrize("name", ["llama", "resnet", "plain_densenet"])
def test_building_twice_gives_the_same_model(name: str) -> None:
    torch.manual_seed(1)
    first = outputs(get(name))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = outputs(get(name))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.random.get_rng_state()), "building must not touch the caller's random state"


@pytest.mark.parametrize(
    "name", ["llama", "mamba2", "bert", "t5", "vit", "mobilenet_v1", "wav2vec2", "clip", "plain_gru"]
)
def test_models_run_at_unseen_sizes(name: str) -> None:
    model = get(name)
    for sizes in model.unseen_sizes:
        assert all(tensor.isfinite().all() for tensor in outputs(model, dict(sizes)))


def test_dropping_a_layer_shows() -> None:
    """Default initialisation would leave residual branches near zero, and a comparison blind to them."""
    model = get("llama")
    module = model.module()
    with torch.no_grad():
        whole = module(**model.example()).logits
        module.model.layers = module.model.layers[:-1]
        short = module(**model.example()).logits
    assert (whole - short).abs().max() > 0.1 * whole.abs().max()
