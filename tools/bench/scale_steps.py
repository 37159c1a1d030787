"""What the suite ``scale`` runs in processes of their own: JSON in, JSON out."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...ir.errors import GraphlatheError

SHAPE_8B: Mapping[str, int] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHAPE_70B: Mapping[str, int] = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_BF16_BYTES = 2
_SHARDS = 4


def tensor_shapes(layers: int, shape: Mapping[str, int] = SHAPE_8B) -> dict[str, list[int]]:
    """Names and shapes of a Llama checkpoint's tensors, as published ones have them."""
    hidden, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": [hidden, hidden],
            f"model.layers.{i}.self_attn.k_proj.weight": [keys, hidden],
            f"model.layers.{i}.self_attn.v_proj.weight": [keys, hidden],
            f"model.layers.{i}.self_attn.o_proj.weight": [hidden, hidden],
            f"model.layers.{i}.mlp.gate_proj.weight": [inner, hidden],
            f"model.layers.{i}.mlp.up_proj.weight": [inner, hidden],
            f"model.layers.{i}.mlp.down_proj.weight": [hidden, inner],
            f"model.layers.{i}.input_layernorm.weight": [hidden],
            f"model.layers.{i}.post_attention_layernorm.weight": [hidden],
        }
    return shapes | {"model.norm.weight": [hidden], "lm_head.weight": [vocabulary, hidden]}


def _bytes(shape: list[int]) -> int:
    return _BF16_BYTES * (shape[0] * shape[1] if len(shape) == 2 else shape[0])


def checkpoint_bytes(layers: int) -> int:
    """What the checkpoint's tensors would take on disk if they were not holes."""
    return sum(_bytes(shape) for shape in tensor_shapes(layers).values())


def config(layers: int, shape: Mapping[str, int]) -> dict[str, Any]:
    """A configuration file's content."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **shape,
    }


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write a sharded checkpoint whose tensor bytes are holes: its size is apparent, its disk use is the headers'."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(layers, SHAPE_8B)))
    shapes = tensor_shapes(layers)
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(_SHARDS):
        file = f"model-{shard + 1:05d}-of-{_SHARDS:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names[shard * len(names) // _SHARDS : (shard + 1) * len(names) // _SHARDS]:
            end = offset + _bytes(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, end]}
            weight_map[name] = file
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + offset)
    index = {"metadata": {"total_size": checkpoint_bytes(layers)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class _Phases:
    """Wall and processor time of named phases; the second says what a busy machine hides."""

    def __init__(self) -> None:
        self.times: dict[str, tuple[float, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Generator[None, None, None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.times[name] = (time.perf_counter() - wall, time.process_time() - cpu)


def structure_of(folder: str) -> dict[str, Any]:
    """Trace a checkpoint folder and find its structure."""
    phase = _Phases()
    with phase("imports"):
        from ...ir.from_hub import from_hub
        from ...ir.structure import structure
    with phase("from_hub"):
        program = from_hub(folder)
    if not program.metadata["weights"].startswith("lazy"):
        raise GraphlatheError(f"the weights were read: {program.metadata['weights']}")
    with phase("structure"):
        found = structure(program)
    blocks = sum(len(stream.blocks) for stream in found.streams)
    return {
        "phases": phase.times,
        "blocks": blocks,
        "nodes": len(program.graph.nodes),
        "parameters": program.parameter_count,
    }


def surgery(folder: str, indices: list[int], target: str) -> dict[str, Any]:
    """From a checkpoint folder to an ONNX file without the blocks at ``indices``."""
    from ...ir.from_hub import from_hub
    from ...passes.optimize import optimize

    phase = _Phases()
    with phase("from_hub"):
        program = from_hub(folder)
    with phase("drop-layers"):
        cut = optimize(program, passes=f"drop-layers{{indices={','.join(map(str, indices))}}}", progress=False)
    with phase("export_onnx"):
        path = cut.export_onnx(target)
    written = sum(file.stat().st_size for file in path.parent.iterdir())
    if written < cut.weight_nbytes:
        raise GraphlatheError(f"{written} bytes were written", expected=f"at least the weights' {cut.weight_nbytes}")
    return {
        "phases": phase.times,
        "parameters": cut.parameter_count,
        "weight_bytes": cut.weight_nbytes,
        "disk_bytes": written,
    }


def meta_70b(layers: int) -> dict[str, Any]:
    """Trace, structure and cost of a 70B configuration, by shapes only."""
    phase = _Phases()
    with phase("imports"):
        from transformers import LlamaConfig

        from ...ir.from_hub import from_hub
        from ...ir.structure import structure
    with phase("from_hub"):
        program = from_hub(LlamaConfig.from_dict(config(layers, SHAPE_70B)), meta=True)
    with phase("structure"):
        found = structure(program)
    with phase("cost"):
        costs = program.cost().at(B=1, S=512)
    blocks = sum(len(stream.blocks) for stream in found.streams)
    return {
        "phases": phase.times,
        "blocks": blocks,
        "nodes": len(program.graph.nodes),
        "parameters": costs.params,
        "weight_bytes": costs.weight_bytes,
        "macs_at_512": int(costs.macs),
        "activation_bytes_at_512": int(costs.peak_activation_bytes),
    }


def check_small(folder: str) -> dict[str, Any]:
    """The measured path at a small size: ONNX Runtime on the cut file against the module without these layers."""
    import onnxruntime
    import torch
    import transformers

    from ...ir.from_hub import from_hub
    from ...passes.optimize import optimize

    torch.manual_seed(0)
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    shape = config(5, settings) | {"dtype": "float32", "max_position_embeddings": 64}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(shape)).eval()
    module.save_pretrained(folder, max_shard_size="50KB")
    program = from_hub(folder)
    if not program.metadata["weights"].startswith("lazy"):
        raise GraphlatheError(f"the weights were read: {program.metadata['weights']}")
    path = optimize(program, passes="drop-layers{indices=1,3}", progress=False).export_onnx(Path(folder) / "cut.onnx")
    del module.model.layers[3], module.model.layers[1]
    ids = torch.arange(22).reshape(2, 11)
    with torch.no_grad():
        expected = module(input_ids=ids, use_cache=False).logits
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    actual = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
    return {"error": float((actual - expected).abs().max() / expected.abs().max())}
