"""Checkpoint folders and GGUF files: lazy weights, names, dtypes, ties, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphlathe.ir.errors import GraphlatheError, ImportModelError
from graphlathe.ir.from_hub import find_gguf, from_hub, load_tokenizer
from graphlathe.ir.safetensors_index import INDEX_NAME, main_dtype, read_checkpoint, read_header
from graphlathe.ir.weights import FileSource
from graphlathe.tools.smollm2 import smollm2_file

transformers = pytest.importorskip("transformers", reason="checkpoints are read through transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def _llama(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, use_cache=False, **settings)
    module = transformers.LlamaForCausalLM(config).to(dtype).eval()
    module.save_pretrained(folder, max_shard_size=shard)
    return module


def _run(module: Any, **inputs: torch.Tensor) -> Any:
    with torch.no_grad():
        return module(**inputs)


IDS = torch.arange(21).reshape(3, 7)


def test_sharded_folder_is_lazy_and_exact(tmp_path: Path) -> None:
    """Every parameter points into its shard; outputs equal the module's bit by bit, at sizes not traced."""
    module = _llama(tmp_path, shard="20KB")
    assert (tmp_path / INDEX_NAME).is_file()
    program = from_hub(tmp_path)
    assert program.metadata["weights"].startswith("lazy")
    assert program.metadata["architecture"] == "LlamaForCausalLM"
    parameters = dict(module.named_parameters())
    for name, weight in program.weights.items():
        if name in parameters:
            assert isinstance(weight.source, FileSource), name
            assert torch.equal(weight.tensor(), parameters[name])
    assert set(parameters) <= set(program.weights)
    assert len({w.source.path for w in program.weights.values() if isinstance(w.source, FileSource)}) > 1
    assert list(program.main.dims.by_name) == ["B", "S"]
    assert torch.equal(program(input_ids=IDS)["logits"], _run(module, input_ids=IDS).logits)


def test_tied_head_is_one_weight(tmp_path: Path) -> None:
    """A tied checkpoint stores the matrix once, and so does the program."""
    module = _llama(tmp_path, tie_word_embeddings=True)
    program = from_hub(tmp_path)
    assert program.tied == {"model.embed_tokens.weight": "lm_head.weight"}
    assert program.parameter_count == sum(p.numel() for p in module.parameters()) + 4  # and the rotary frequencies
    assert program.metadata["weights"].startswith("lazy")
    assert torch.equal(program(input_ids=IDS)["logits"], _run(module, input_ids=IDS).logits)


def test_tied_configuration_with_two_different_matrices(tmp_path: Path) -> None:
    """Where the file holds different numbers for tied names, both are used, as the library itself does."""
    _llama(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, file, {"format": "pt"})
    program = from_hub(tmp_path)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert not torch.equal(reference.lm_head.weight, reference.model.embed_tokens.weight)
    assert program.metadata["untied"] == "lm_head.weight"
    assert torch.equal(program(input_ids=IDS)["logits"], _run(reference, input_ids=IDS, use_cache=False).logits)


def test_bfloat16_weights_keep_their_type_and_slice_lazily(tmp_path: Path) -> None:
    """bfloat16 files stay bfloat16; slice, select, permute and cast agree with the same steps on the read tensor."""
    module = _llama(tmp_path, torch.bfloat16)
    program = from_hub(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    weight, expected = program.weights[name], module.get_parameter(name).detach()
    assert weight.dtype == torch.bfloat16
    assert program.outputs[0].dtype == torch.bfloat16
    cut = weight.slice(0, 5, 60, 3).select(1, [7, 0, 31]).permute((1, 0)).cast(torch.float32)
    assert (cut.shape, cut.dtype) == ((3, 19), torch.float32)
    assert torch.equal(cut.tensor(), expected[5:60:3][:, [7, 0, 31]].t().float())
    assert b"".join(bytes(c) for c in weight.chunks(1000)) == expected.view(torch.uint8).numpy().tobytes()
    assert torch.equal(program(input_ids=IDS)["logits"], _run(module, input_ids=IDS).logits)


def test_other_dtype_is_a_lazy_cast(tmp_path: Path) -> None:
    """Asked for float32, a bfloat16 checkpoint is cast when read, not before."""
    _llama(tmp_path, torch.bfloat16)
    program = from_hub(tmp_path, dtype=torch.float32)
    weight = program.weights["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(weight.source, FileSource)
    assert (weight.source.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(program(input_ids=IDS)["logits"], _run(reference, input_ids=IDS, use_cache=False).logits)


def test_base_model_prefix(tmp_path: Path) -> None:
    """A checkpoint of a model with a head serves the bare model, whose names lack the prefix."""
    _llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = from_hub(tmp_path)
    assert program.metadata["weights"].startswith("lazy")
    reference = transformers.LlamaModel.from_pretrained(tmp_path).eval()
    expected = _run(reference, input_ids=IDS, use_cache=False).last_hidden_state
    assert torch.equal(program(input_ids=IDS)["last_hidden_state"], expected)


def test_converted_weights_are_really_loaded_and_said_so(tmp_path: Path) -> None:
    """Fused experts exist in no file; the library computes them, and the program says so."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, use_cache=False)
    module = transformers.MixtralForCausalLM(config).eval()
    module.save_pretrained(tmp_path)
    program = from_hub(tmp_path)
    assert "loaded by transformers" in program.metadata["weights"]
    assert "gate_up_proj" in program.metadata["weights"]
    assert torch.equal(program(input_ids=IDS)["logits"], _run(module, input_ids=IDS).logits)


def _bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def _vit() -> Any:
    settings = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "max_position_embeddings")}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**settings, image_size=32, patch_size=8))


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


@pytest.mark.parametrize(
    ("build", "names", "dims"),
    [
        (_bert, ["input_ids", "attention_mask"], {"B", "S"}),
        (_vit, ["pixel_values"], {"B"}),
        (_t5, ["input_ids", "decoder_input_ids"], {"B", "S", "T"}),
    ],
    ids=["encoder", "vision", "encoder-decoder"],
)
def test_default_inputs(tmp_path: Path, build: Any, names: list[str], dims: set[str]) -> None:
    """Each kind of model has inputs and dynamic dimensions of its own, and runs equal at sizes not traced."""
    torch.manual_seed(0)
    module = build().eval()
    module.save_pretrained(tmp_path)
    program = from_hub(tmp_path)
    assert list(program.main.inputs) == names
    assert set(program.main.dims.by_name) == dims
    inputs: dict[str, torch.Tensor] = {
        "input_ids": torch.arange(3, 18).reshape(3, 5),
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1] * 5]),
        "decoder_input_ids": torch.arange(3, 15).reshape(3, 4),
        "pixel_values": torch.randn(3, 3, 32, 32),
    }
    feeds = {name: inputs[name] for name in names}
    extra = {"use_cache": False} if "decoder_input_ids" in names else {}
    expected = _run(module, **feeds, **extra)
    actual = program(**feeds)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def test_example_inputs_and_dynamic_can_be_given(tmp_path: Path) -> None:
    module = _llama(tmp_path)
    mask = torch.ones(2, 8, dtype=torch.int64)
    given = {"input_ids": torch.zeros(2, 8, dtype=torch.int64), "attention_mask": mask}
    program = from_hub(
        tmp_path, example_inputs=given, dynamic={"input_ids": {1: "length"}, "attention_mask": {1: "length"}}
    )
    assert list(program.main.dims.by_name) == ["length"]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    expected = _run(module, input_ids=IDS[:2, :5], attention_mask=mask).logits
    assert torch.equal(program(input_ids=IDS[:2, :5], attention_mask=mask)["logits"], expected)


def test_meta_needs_no_weights(tmp_path: Path) -> None:
    """Structure only: from a configuration object, or a folder with nothing else; it cannot run."""
    config = transformers.LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    for program in (from_hub(config, meta=True), from_hub(tmp_path, meta=True)):
        parameters = [w for name, w in program.weights.items() if name.endswith(".weight")]
        assert parameters
        assert all(w.is_meta for w in parameters)
        with pytest.raises(GraphlatheError, match="no numbers"):
            program(input_ids=IDS)
    with pytest.raises(ImportModelError, match="no weights"):
        from_hub(config)
    with pytest.raises(ImportModelError, match="no weights"):
        from_hub(tmp_path)


def test_header_agrees_with_the_library(tmp_path: Path) -> None:
    """Our header parser against the safetensors library, over types, scalars and empty tensors."""
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).to(torch.bfloat16),
        "c": torch.tensor(7),
        "d": torch.zeros(0, 3),
        "e": torch.tensor([True, False]),
        "f": torch.randn(2, 2).half(),
        "g": torch.arange(5, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert set(header) == set(tensors)
    for name, weight in header.items():
        assert (weight.shape, weight.dtype) == (tuple(tensors[name].shape), tensors[name].dtype)
        assert torch.equal(weight.tensor(), tensors[name])
    assert main_dtype(header) == torch.float32


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_missing_shard(tmp_path: Path) -> None:
    _llama(tmp_path, shard="20KB")
    _shards(tmp_path)[1].unlink()
    with pytest.raises(ImportModelError, match="names the shard 'model-00002") as error:
        from_hub(tmp_path)
    assert "what to do" in str(error.value)


def test_truncated_shard(tmp_path: Path) -> None:
    _llama(tmp_path, shard="20KB")
    shard = _shards(tmp_path)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ImportModelError, match="truncated"):
        from_hub(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x05", struct.pack("<Q", 2**60), struct.pack("<Q", 4) + b"{}{}"])
def test_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ImportModelError, match="no safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_header_that_disagrees_with_itself(tmp_path: Path) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ImportModelError, match="'w' has 4 bytes"):
        read_header(tmp_path / "x.safetensors")
    text = json.dumps({"w": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ImportModelError, match="'w' cannot be read"):
        read_header(tmp_path / "x.safetensors")


def test_index_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    (inside / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))
    with pytest.raises(ImportModelError, match="inside the folder"):
        read_checkpoint(inside)


def test_index_that_promises_too_much(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": "one.safetensors", "v": "one.safetensors"}}))
    with pytest.raises(ImportModelError, match="places 'v'"):
        read_checkpoint(tmp_path)
    (tmp_path / INDEX_NAME).write_text("{}")
    with pytest.raises(ImportModelError, match="weight_map"):
        read_checkpoint(tmp_path)


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_config_without_architecture(tmp_path: Path) -> None:
    _llama(tmp_path)
    _edit_config(tmp_path, architectures=None)
    with pytest.raises(ImportModelError, match="names no architecture") as error:
        from_hub(tmp_path)
    assert "architectures" in str(error.value.remedy)


def test_unknown_architecture_and_model_type(tmp_path: Path) -> None:
    _llama(tmp_path)
    _edit_config(tmp_path, architectures=["LamaForCausalLM"])
    with pytest.raises(ImportModelError, match="did you mean 'LlamaForCausalLM'"):
        from_hub(tmp_path)
    _edit_config(tmp_path, model_type="no_such_model")
    with pytest.raises(ImportModelError, match=r"config\.json"):
        from_hub(tmp_path)


def test_lacking_and_misshapen_weights(tmp_path: Path) -> None:
    """A weight that no file holds is an error, never a random number."""
    _llama(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ImportModelError, match=r"lacks weights.*'model\.norm\.weight'"):
        from_hub(tmp_path)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ImportModelError, match="cannot load"):
        from_hub(tmp_path)


def test_quantized_checkpoint(tmp_path: Path) -> None:
    _llama(tmp_path)
    _edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ImportModelError, match="quantized"):
        from_hub(tmp_path)


def test_no_folder_no_config(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match="no folder"):
        from_hub(tmp_path / "nothing")
    with pytest.raises(ImportModelError, match=r"no config\.json"):
        from_hub(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ImportModelError, match="cannot read"):
        from_hub(tmp_path)


def test_multimodal_model_needs_inputs(tmp_path: Path) -> None:
    text = {**SMALL, "num_key_value_heads": 2}
    vision = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        architectures=["LlavaForConditionalGeneration"],
    )
    with pytest.raises(ImportModelError, match="no default example inputs"):
        from_hub(config, meta=True)


def test_gguf_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"no such thing")
    with pytest.raises(ImportModelError, match="2 GGUF files"):
        find_gguf(tmp_path)
    with pytest.raises(ImportModelError, match="no GGUF file"):
        find_gguf(tmp_path, "b.gguf")
    with pytest.raises(ImportModelError, match="no file"):
        find_gguf(tmp_path / "c.gguf")
    with pytest.raises(ImportModelError, match="cannot read"):
        from_hub(tmp_path / "a.gguf")


@pytest.mark.slow
def test_smollm2_gguf() -> None:
    """The real model: dequantized, said so, and it knows a capital."""
    try:
        folder = smollm2_file().parent
    except ImportModelError as error:
        pytest.skip(str(error))
    program = from_hub(folder)
    assert program.metadata["weights"].startswith("in memory: dequantized from Q4_1")
    assert program.parameter_count == pytest.approx(134_515_008, rel=1e-3)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(program(input_ids=ids)["logits"][0, -1].argmax()).strip() == "Paris"


def test_tokenizer_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match="no folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ImportModelError, match="tokenizer"):
        load_tokenizer(tmp_path)
