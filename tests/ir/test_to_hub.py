"""Compressed programs as checkpoint folders: loaded again by `transformers`, they compute what the program does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphlathe.ir.axes import ChannelGroup, cut_all, find_groups
from graphlathe.ir.axes.rescale import rescale_norms
from graphlathe.ir.errors import ExportError, GraphlatheError, ImportModelError
from graphlathe.ir.from_hub import from_hub
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.to_hub import to_hub
from graphlathe.passes.base import Context, Pass
from graphlathe.passes.canonical.raise_all import RaiseAll
from graphlathe.passes.channels.flap import Flap
from graphlathe.passes.heads.shrp import Shrp
from graphlathe.passes.layers.drop_layers import DropLayers
from graphlathe.tools import zoo
from tests.zoo_programs import module, traced

transformers = pytest.importorskip("transformers", reason="checkpoints are written through transformers")

Change = Callable[[Program], None]


def groups(program: Program, unit: str) -> list[ChannelGroup]:
    return [g for g in find_groups(program) if g.prunable and g.unit == unit]


def hidden(program: Program) -> list[ChannelGroup]:
    """The hidden channels of MLPs: few weights make them, one reads them."""
    return [g for g in groups(program, "channel") if len(g.producers) <= 4 and len(g.consumers) == 1]


def drop(*indices: int, granularity: str = "block") -> Change:
    return lambda program: (DropLayers(indices=indices, granularity=granularity).run(program, Context()), None)[1]


def halve_mlps(program: Program) -> None:
    chosen = hidden(program)
    assert chosen
    cut_all(program, [(g, range(0, g.size, 2)) for g in chosen])


def keep_last(unit: str) -> Change:
    def change(program: Program) -> None:
        chosen = groups(program, unit)
        assert chosen
        cut_all(program, [(g, [g.size - 1]) for g in chosen])

    return change


def narrow(program: Program) -> None:
    """Three quarters of the stream, exactly."""
    group = max((g for g in find_groups(program) if g.prunable), key=lambda g: len(g.members))
    keep = [i for i in range(group.size) if i % 4]
    assert rescale_norms(program, group, keep, Rewriter(program, "test")) == []
    cut_all(program, [(group, keep)])


def raise_operators(program: Program) -> None:
    RaiseAll().run(program, Context())


def compressed(name: str, *changes: Change) -> Program:
    program = traced(name).clone()
    for change in changes:
        change(program)
    return program


# A zoo model, what is done to it, and what its configuration must say then.
WRITTEN: dict[str, tuple[str, tuple[Change, ...], dict[str, Any]]] = {
    "nothing": ("llama", (), {"num_hidden_layers": 3, "intermediate_size": 64}),
    "blocks, MLP and key-value groups": (
        "llama",
        (drop(1), halve_mlps, keep_last("KV group")),
        {"num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
         "head_dim": 8, "hidden_size": 32},
    ),
    "query heads of every group, raised": (
        "qwen3",
        (raise_operators, keep_last("query head of every KV group")),
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "what is said of each layer goes with the layer": (
        "smollm3", (drop(0),), {"num_hidden_layers": 2, "no_rope_layers": [0, 1]}
    ),
    "the stream, with the epsilon of its norms": (
        "llama", (raise_operators, narrow), {"hidden_size": 24, "head_dim": 8, "rms_norm_eps": 1e-6 / 0.75}
    ),
    "an encoder": ("bert", (drop(0), halve_mlps), {"num_hidden_layers": 2, "intermediate_size": 32}),
    "a field that was not set, transposed weights, a tied head": (
        "gpt2", (raise_operators, drop(1), halve_mlps), {"n_layer": 2, "n_inner": 64}
    ),
    "images": ("vit", (drop(2), halve_mlps), {"num_hidden_layers": 2, "intermediate_size": 32, "num_channels": 3}),
}  # fmt: skip


def loaded(folder: Path) -> Any:
    """What a user gets who knows nothing but the folder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    (name,) = config.architectures
    tasks = {"LMHeadModel": "ForCausalLM"} | {task: task for task in ("ForCausalLM", "ForImageClassification")}
    auto = next((tasks[task] for task in tasks if name.endswith(task)), "")
    return getattr(transformers, f"AutoModel{auto}").from_pretrained(folder).eval()


def check_same(program: Program, folder: Path, feeds: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        actual = loaded(folder)(**feeds)
    expected = program.run(program.feeds(**feeds))
    assert set(expected) <= set(actual.keys())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", WRITTEN)
def test_compressed_zoo_models_load_again(case: str, tmp_path: Path) -> None:
    name, changes, fields = WRITTEN[case]
    program, model = compressed(name, *changes), zoo.get(name)
    original = module(name).config
    before = original.to_dict()
    folder = to_hub(
        program,
        tmp_path / "out",
        config=original,
        architecture=type(module(name)).__name__,
        example_inputs=model.example(),
    )
    assert original.to_dict() == before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    written = json.loads((folder / "config.json").read_text())
    assert {field: written[field] for field in fields} == fields
    check_same(program, folder, model.inputs(model.unseen_sizes[0]))
    own = sum(p.numel() for p in loaded(folder).parameters())
    state = module(name).state_dict()
    assert own == sum(
        program.weights[n].numel for n in program.used_weights() if n.removesuffix("_transposed") in state
    )


def uneven(program: Program) -> None:
    cut_all(program, [(g, range(32 + 8 * i)) for i, g in enumerate(hidden(program))])


def first_layer_only(program: Program) -> None:
    cut_all(program, [(groups(program, "KV group")[0], [1])])


def other_activation(program: Program) -> None:
    rewriter = Rewriter(program, "test")
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default):
        rewriter.set_args(node, node.args, {}, torch.ops.aten.relu.default)


def after(settings: Pass, name: str) -> Change:
    """What a pass makes of a zoo model, with calibration data of that model."""

    def change(program: Program) -> None:
        model = zoo.get(name)
        batches = [program.feeds(**model.inputs(size)) for size in model.unseen_sizes]
        settings.run(program, Context(calibration=batches))

    return change


EXPANDER: dict[str, Any] = {"stage": "expand", "router_steps": 0, "steps": 0}

REFUSED: dict[str, tuple[str, tuple[Change, ...], str]] = {
    "MLPs of different widths": (
        "llama",
        (uneven,),
        r"'mlp\.gate_proj\.weight' \(32, 40, 48 in layers 0, 1, 2\): LlamaConfig has one 'intermediate_size'",
    ),
    "one attention of fewer heads": ("llama", (first_layer_only,), "one 'num_attention_heads' and one 'head_dim'"),
    "value channels": ("llama", (keep_last("value channel"),), "derives the 16 from 'num_key_value_heads' and"),
    "heads of a width that is derived": ("bert", (keep_last("head"),), "derives the 32 from 'hidden_size'"),
    "an attention without its block": (
        "llama",
        (drop(1, granularity="attention"),),
        r"layer 1 of 'model\.layers' has no '.*' any more, layers 0, 2 have one",
    ),
    "biases that the architecture has not": (
        "llama",
        (after(Flap(sites=("heads",), ratio=0.45), "llama"),),
        r"also reads 'model\.layers\.0\.self_attn\.o_proj\.bias' \(and 2 more\), which LlamaForCausalLM has not"
        r"[\s\S]*use a pass that adds no biases",
    ),
    "an expander": (
        "bert",
        (after(Shrp(heads=1, **EXPANDER), "bert"),),
        r"does not read 'encoder\.layer\.0\.attention\.output\.dense\.weight' \(and \d+ more\), which BertModel has; "
        r"the program also reads 'shrp\.0\.expander\.down\.bias' \(and \d+ more\), which BertModel has not",
    ),
    "another function": ("llama", (other_activation,), "computes something else .*relative error"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_configuration_says_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    name, changes, message = REFUSED[case]
    program, model = compressed(name, *changes), zoo.get(name)
    with pytest.raises(ExportError, match=message) as refused:
        to_hub(
            program,
            tmp_path / "out",
            config=module(name).config,
            architecture=type(module(name)).__name__,
            example_inputs=model.example(),
        )
    assert "export ONNX" in str(refused.value)
    assert not list(tmp_path.iterdir())


def bert(folder: Path) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "README.md").write_text("numbers of the large model")
    return model


class Encoder(nn.Module):
    """What many export: the hidden states alone; the pooler is not read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(model.__dict__)
        self.inner = model.forward

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Hidden states."""
        return {"last_hidden_state": self.inner(input_ids, attention_mask)[0]}


def test_weights_that_nothing_reads_and_the_tokenizer_come_from_the_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = bert(source)
    inputs = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    program = trace(Encoder(model), inputs, dynamic={name: {0: "B", 1: "S"} for name in inputs})
    halve_mlps(program)
    with pytest.raises(ExportError, match=r"does not read 'pooler\.dense\.weight'"):
        to_hub(program, tmp_path / "out", config=model.config, architecture="BertModel")
    folder = to_hub(program, tmp_path / "out", config=source)
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}
    again = loaded(folder)
    assert torch.equal(again.pooler.dense.weight, model.pooler.dense.weight)
    check_same(program, folder, {name: value[:, :3] for name, value in inputs.items()})


@pytest.mark.parametrize("heads", [1, 2])
def test_an_expander_is_refused_also_where_the_folder_has_what_it_replaced(heads: int, tmp_path: Path) -> None:
    """With all heads even the shapes fit: what the folder lends takes part in no output."""
    model = bert(tmp_path / "source")
    inputs = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    program = trace(model, inputs, dynamic={name: {0: "B", 1: "S"} for name in inputs})
    Shrp(heads=heads, **EXPANDER).run(program, Context(calibration=[inputs]))
    reasons = {
        1: r"self\.query\.weight' is \[8, 16\] instead of",
        2: r"also reads 'shrp\.0\.expander\.down\.bias' \(and 7 more\)[\s\S]*undo changes to the graph",
    }
    refused(ExportError, reasons[heads], program, tmp_path / "out", config=tmp_path / "source")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_folder_read_cut_and_written_in_bfloat16(tmp_path: Path) -> None:
    """A tied checkpoint: default inputs, the element type and the tie stay."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    program = from_hub(tmp_path / "source")
    drop(1)(program)
    halve_mlps(program)
    folder = to_hub(program, str(tmp_path / "out"), config=str(tmp_path / "source"))
    written = json.loads((folder / "config.json").read_text())
    assert (written["num_hidden_layers"], written["intermediate_size"]) == (2, 12)
    assert written["use_cache"] is True
    again = from_hub(folder)
    assert {w.dtype for n, w in again.weights.items() if "inv_freq" not in n} == {torch.bfloat16}
    assert again.tied == program.tied and again.parameter_count == program.parameter_count
    ids = torch.arange(9).view(1, 9)
    assert torch.equal(again(input_ids=ids)["logits"], program(input_ids=ids)["logits"])


class LayeredConfig(transformers.PreTrainedConfig):
    """A configuration that says a width for each layer."""

    model_type = "graphlathe_layered"
    hidden_size: int = 8
    widths: list[int] | None = None


class Layered(transformers.PreTrainedModel):
    """Residual MLPs, each of its own width."""

    config_class = LayeredConfig

    def __init__(self, config: LayeredConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.into = nn.Linear(3, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(size, w), nn.GELU(), nn.Linear(w, size)) for w in config.widths or ()
        )
        self.post_init()

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        """The stream."""
        h = self.into(x)
        for block in self.blocks:
            h = h + block(h)
        return h


@pytest.mark.parametrize("dropped", [False, True])
def test_widths_that_are_a_list(dropped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layered(LayeredConfig(widths=[12, 16, 20])).eval()
    x = {"x": torch.randn(2, 3)}
    program = trace(model, x)
    if dropped:
        drop(1)(program)
    else:
        cut_all(program, [(g, range(4 + i)) for i, g in enumerate(groups(program, "channel"))])
    folder = to_hub(program, tmp_path / "out", config=model.config, architecture=Layered, example_inputs=x)
    widths = json.loads((folder / "config.json").read_text())["widths"]
    assert widths == ([12, 20] if dropped else [4, 5, 6])
    with torch.no_grad():
        torch.testing.assert_close(Layered.from_pretrained(folder).eval()(**x), program(**x))


def refused(error: type[GraphlatheError], message: str, *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=message):
        to_hub(*args, **options)


def test_what_is_missing_or_wrong(tmp_path: Path) -> None:
    program, config = traced("llama"), module("llama").config
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    known: dict[str, Any] = {"config": config, "architecture": "LlamaForCausalLM"}
    refused(ExportError, "not empty", program, tmp_path / "full", **known)
    refused(ExportError, "there is no folder", program, tmp_path / "no" / "out", **known)
    refused(ImportModelError, "config is a dict", program, tmp_path / "out", config={})
    refused(ImportModelError, "no config.json", program, tmp_path / "out", config=tmp_path)
    refused(ImportModelError, "names no architecture", program, tmp_path / "out", config=config)
    refused(ExportError, "holds no weight of LlamaForCausalLM", traced("bert"), tmp_path / "out", **known)
    other = trace(nn.Linear(3, 3).eval(), {"input": torch.randn(1, 3)})
    refused(ExportError, "holds no weight", other, tmp_path / "out", **known)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["full"]
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["file"]


def test_inputs_that_the_program_does_not_take(tmp_path: Path) -> None:
    """Traced for one size that is not the default's: the caller has to say what to compare with."""
    model, ids = module("llama"), torch.arange(5, 12).view(1, 7)
    program = trace(model, {"input_ids": ids})
    options: dict[str, Any] = {"config": model.config, "architecture": "LlamaForCausalLM"}
    refused(ExportError, "no default inputs", program, tmp_path / "out", **options)
    folder = to_hub(program, tmp_path / "out", **options, example_inputs={"input_ids": ids})
    check_same(program, folder, {"input_ids": ids})
