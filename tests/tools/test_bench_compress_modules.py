"""The compression suites' references on framework modules: layers left out, what parts weigh, the hints for tools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphlathe.tools.bench.compress_facts import facts
from graphlathe.tools.bench.compress_modules import Transformer, block_states, parameters
from graphlathe.tools.bench.compress_passthrough import CHOICES, cosines

transformers = pytest.importorskip("transformers", reason="the references are made of its modules")

IDS = {"input_ids": torch.arange(24).reshape(2, 12)}


def llama(**changes: Any) -> Any:
    settings = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_cache": False,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()


def bert(**changes: Any) -> Any:
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    config = transformers.BertConfig(**settings | changes)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def outputs(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(**IDS)[0]
    return found


@pytest.mark.parametrize("make", [llama, bert])
def test_layers_left_out_are_slices_of_the_model(make: Any) -> None:
    """Bit-equal to a model of that depth with the same weights, which is what a passthrough merge writes."""
    module = make()
    transformer = Transformer(module)
    count = len(transformer.blocks)
    kept = [0, *range(2, count)]
    shallow = make(num_hidden_layers=count - 1)
    prefix = transformer.path + "."
    states = dict(module.state_dict())
    wanted = {name: value for name, value in states.items() if not name.startswith(prefix)}
    for place, index in enumerate(kept):
        start = f"{prefix}{index}."
        wanted |= {f"{prefix}{place}.{name[len(start) :]}": v for name, v in states.items() if name.startswith(start)}
    shallow.load_state_dict(wanted)
    whole = outputs(module)
    with transformer.only(kept):
        assert torch.equal(outputs(module), outputs(shallow))
        assert module.config.num_hidden_layers == count - 1
    assert torch.equal(outputs(module), whole), "and all is back afterwards"
    transformer.keep(kept)
    assert torch.equal(outputs(module), outputs(shallow))
    places = [getattr(attention.owner, "layer_idx", place) for place, attention in enumerate(transformer.attentions())]
    assert places == list(range(count - 1)), "each layer knows its new place"


@pytest.mark.parametrize("choice", sorted(CHOICES))
def test_layers_that_do_nothing_are_left_out(choice: str) -> None:
    module = llama()
    for block in list(module.model.layers)[2:4]:
        nn.init.zeros_(block.self_attn.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert CHOICES[choice](Transformer(module), [IDS], 2) == [2, 3]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_cosines_of_the_stream() -> None:
    """Against the library's own hidden states."""
    module = llama()
    with torch.no_grad():
        states = module.model(**IDS, output_hidden_states=True).hidden_states[:-1]  # the last is behind the norm
    mine = block_states(Transformer(module), IDS)
    assert len(mine) == 7 and all(torch.equal(a, b) for a, b in zip(mine, states, strict=False))
    expected = torch.nn.functional.cosine_similarity(states[1].double(), states[4].double(), dim=-1).mean()
    assert cosines(Transformer(module), [IDS, IDS], 3)[1] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "key", "change"),
    [
        (llama, "block", {"num_hidden_layers": 5}),
        (llama, "neuron", {"intermediate_size": 47}),
        (llama, "group", {"num_attention_heads": 3, "num_key_value_heads": 1}),
        (llama, "query", {"num_attention_heads": 4}),
        (bert, "block", {"num_hidden_layers": 2}),
        (bert, "neuron", {"intermediate_size": 47}),
    ],
)
def test_what_parts_weigh(make: Any, key: str, change: dict[str, int]) -> None:
    """A model that is built without the part has that many parameters less."""
    module = make()
    assert facts(module)[key] == parameters(module) - parameters(make(**change))


def test_what_a_head_of_an_encoder_weighs() -> None:
    """Eight rows of three projections with their biases, and eight columns of the fourth, in three layers."""
    found = facts(bert())
    assert found["group"] == 3 * (3 * (8 * 32 + 8) + 8 * 32)
    assert found["queries"] == 1 and found["groups"] == 4


def test_parts_are_found() -> None:
    for module, neurons in ((llama(), 48), (bert(), 48)):
        transformer = Transformer(module)
        mlps, attentions = list(transformer.mlps()), list(transformer.attentions())
        assert len(mlps) == len(attentions) == len(transformer.blocks)
        assert all(mlp.reader.in_features == neurons == maker.out_features for mlp in mlps for maker in mlp.makers)
        assert all(each.output.in_features == each.query.out_features for each in attentions)


def test_a_network_of_another_kind_has_only_its_size() -> None:
    assert facts(nn.Linear(3, 4)) == {"parameters": 16}
