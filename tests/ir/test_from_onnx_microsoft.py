"""ONNX Runtime's own operators, against ONNX Runtime; where it has no kernel, against their formulas in numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphlathe.ir.errors import ImportModelError
from graphlathe.ir.from_onnx import from_onnx
from tests.onnx_nodes import MICROSOFT, assert_node_agrees, operators_of, run_file, write_node

R = np.random.default_rng(0)
_OPEN = {"shapes": {"x": ["B", "S", 8]}}


def _real(*shape: int) -> np.ndarray:
    return R.standard_normal(shape).astype(np.float32)


def _vector(size: int = 8) -> np.ndarray:
    return R.uniform(0.5, 1.5, size).astype(np.float32)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x).astype(np.float32)


_X = _real(2, 3, 8)

_NORMS: dict[str, Any] = {
    "skip": ("SkipLayerNormalization", {"skip": _real(2, 3, 8), "g": _vector(), "b": _vector()}, {}),
    "skip, bias": (
        "SkipLayerNormalization",
        {"skip": _real(2, 3, 8), "g": _vector(), "b": None, "bias": _real(8)},
        {"epsilon": 1e-3, "outputs": ("y", "", "", "sum")},
    ),
    "skip, rms": (
        "SkipSimplifiedLayerNormalization",
        {"skip": _real(2, 3, 8), "g": _vector(), "bias": _real(8)},
        {"outputs": ("y", "", "", "sum")},
    ),
    "rms": ("SimplifiedLayerNormalization", {"g": _vector()}, {"domain": "", "epsilon": 1e-3}),
}


@pytest.mark.parametrize("case", _NORMS)
def test_norms(case: str, tmp_path: Path) -> None:
    operator, inputs, options = _NORMS[case]
    shapes = {"x": ["B", "S", 8], "skip": ["B", "S", 8]}
    given = {"x": _X, **inputs}
    stored = [name for name in ("g", "b", "bias") if given.get(name) is not None]
    program = assert_node_agrees(
        tmp_path, operator, given, **{"domain": MICROSOFT, "shapes": shapes, "stored": stored, **options}
    )
    assert {"aten.layer_norm", "aten.rms_norm"} & set(operators_of(program))


@pytest.mark.parametrize("with_segments", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_embeddings(with_segments: bool, with_mask: bool, tmp_path: Path) -> None:
    ids = R.integers(0, 11, (2, 5), np.int32)
    inputs: dict[str, Any] = {"ids": ids, "segments": ids % 2 if with_segments else None, "words": _real(11, 8)}
    inputs |= {"places": _real(7, 8), "table": _real(2, 8) if with_segments else None, "g": _vector(), "b": _vector()}
    inputs |= {"mask": (np.arange(5) < np.array([[3], [5]])).astype(np.int32)} if with_mask else {}
    assert_node_agrees(
        tmp_path,
        "EmbedLayerNormalization",
        inputs,
        domain=MICROSOFT,
        outputs=("y", "kept", "sum"),
        stored=[n for n in ("words", "places", "table", "g", "b") if inputs[n] is not None],
        shapes={"ids": ["B", "S"], "segments": ["B", "S"], "mask": ["B", "S"]},
    )


@pytest.mark.parametrize("operator", ["Gelu", "BiasGelu", "FastGelu", "QuickGelu"])
def test_activations(operator: str, tmp_path: Path) -> None:
    inputs = {"x": _X, "bias": _real(8)} if operator in ("BiasGelu", "FastGelu") else {"x": _X}
    program = assert_node_agrees(tmp_path, operator, inputs, domain=MICROSOFT, **_OPEN)
    assert "aten.gelu" in operators_of(program) or operator == "QuickGelu"


def test_activations_without_a_kernel_on_the_processor(tmp_path: Path) -> None:
    bias, skip = _real(8), _real(2, 3, 8)
    value, gate = np.split(_X + bias, 2, -1)
    split = value * 0.5 * gate * (1 + _erf(gate / math.sqrt(2)))
    assert_node_agrees(tmp_path, "BiasSplitGelu", {"x": _X, "bias": bias}, domain=MICROSOFT, expected=[split])
    inputs = {"x": _X, "bias": bias, "skip": skip}
    assert_node_agrees(tmp_path, "BiasAdd", inputs, domain=MICROSOFT, expected=[_X + bias + skip])


def test_group_norm(tmp_path: Path) -> None:
    """[batch, height, width, channels] in two groups."""
    x, g, b, skip = _real(2, 3, 4, 8), _vector(), _real(8), _real(2, 3, 4, 8)

    def normal(x: np.ndarray) -> np.ndarray:
        groups = x.reshape(2, 12, 2, 4)
        mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
        return ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * g + b

    y = normal(x)
    options: dict[str, Any] = {"domain": MICROSOFT, "groups": 2, "channels_last": 1}
    inputs = {"x": x, "g": g, "b": b}
    assert_node_agrees(tmp_path, "GroupNorm", inputs, activation=1, expected=[y / (1 + np.exp(-y))], **options)
    total = x + skip
    assert_node_agrees(
        tmp_path,
        "SkipGroupNorm",
        {**inputs, "skip": skip},
        activation=0,
        expected=[normal(total), total],
        outputs=("y", "sum"),
        **options,
    )


@pytest.mark.parametrize(("axis", "inner", "shape"), [(2, 1, (3, 4)), (2, 0, (2, 1, 3, 4)), (3, 1, (4,))])
def test_bias_softmax(axis: int, inner: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """ONNX Runtime broadcasts the bias inside or outside; the formula is the same."""
    x, bias = _real(2, 5, 3, 4), _real(*shape)
    scores = (x + bias).reshape(*x.shape[:axis], -1)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    inputs = {"x": x, "bias": bias.reshape(2, 3, 4) if not inner else bias}
    expected = [weights.reshape(x.shape)]
    assert_node_agrees(
        tmp_path, "BiasSoftmax", inputs, domain=MICROSOFT, axis=axis, is_inner_broadcast=inner, expected=expected
    )


@pytest.mark.parametrize(
    ("a", "b", "options"),
    [
        ((2, 3, 4), (2, 4, 5), {"alpha": 0.5}),
        ((2, 4, 3), (2, 5, 4), {"transA": 1, "transB": 1}),
        ((3, 2, 4), (2, 4, 5), {"transBatchA": 1}),
        ((4,), (4, 5), {}),
    ],
)
def test_fused_matmul(a: Any, b: Any, options: dict[str, Any], tmp_path: Path) -> None:
    assert_node_agrees(tmp_path, "FusedMatMul", {"a": _real(*a), "b": _real(*b)}, domain=MICROSOFT, **options)


@pytest.mark.parametrize(
    "options",
    [{"activation": "Tanh"}, {"activation": "Relu"}, {"activation": "LeakyRelu", "activation_alpha": 0.2}],
    ids=str,
)
def test_fused_gemm(options: dict[str, Any], tmp_path: Path) -> None:
    inputs = {"a": _real(3, 4), "b": _real(5, 4), "c": _real(5)}
    assert_node_agrees(tmp_path, "FusedGemm", inputs, domain=MICROSOFT, transB=1, alpha=0.5, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "Relu"},
        {"activation": "LeakyRelu", "activation_params": [0.1]},
        {"activation": "Clip", "activation_params": [-1.0, 1.0]},
        {"activation": "HardSigmoid", "activation_params": [0.2, 0.5]},
    ],
    ids=str,
)
def test_fused_conv(options: dict[str, Any], tmp_path: Path) -> None:
    inputs = {"x": _real(2, 4, 6, 6), "w": _real(6, 4, 3, 3), "b": _real(6)}
    assert_node_agrees(
        tmp_path, "FusedConv", inputs, domain=MICROSOFT, pads=[1] * 4, shapes={"x": ["N", 4, 6, 6]}, **options
    )
    with_sum = {**inputs, "z": _real(2, 6, 6, 6)}
    assert_node_agrees(tmp_path, "FusedConv", with_sum, domain=MICROSOFT, pads=[1] * 4, activation="Relu")


def test_an_unknown_activation_is_named(tmp_path: Path) -> None:
    inputs = {"x": _real(2, 4, 6, 6), "w": _real(6, 4, 3, 3)}
    write_node(tmp_path / "m.onnx", "FusedConv", inputs, domain=MICROSOFT, activation="Softsign")
    with pytest.raises(
        ImportModelError, match=r"FusedConv: the activation 'Softsign' with 0 parameters.*\(node %node\)"
    ):
        from_onnx(tmp_path / "m.onnx")


_HEADS, _WIDTH = 2, 4


def _lengths(batch: int, keys: int) -> np.ndarray:
    return R.integers(1, keys, batch, np.int32, endpoint=True)


_MASKS: dict[str, Any] = {
    "none": lambda b, s, t: None,
    "lengths": lambda b, s, t: _lengths(b, t),
    "ends and starts": lambda b, s, t: np.concatenate([np.full(b, t), np.arange(b) % 2]).astype(np.int32),
    "keys": lambda b, s, t: (np.arange(t) < _lengths(b, t)[:, None]).astype(np.int32),
    "queries and keys": lambda b, s, t: R.integers(0, 1, (b, s, t), np.int32, endpoint=True),
}


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("mask", _MASKS)
def test_attention(mask: str, past: int, causal: int, tmp_path: Path) -> None:
    batch, length, size = 3, 4, _HEADS * _WIDTH
    given = _MASKS[mask](batch, length, length + past)
    inputs = {"x": _real(batch, length, 8), "w": _real(8, 3 * size), "b": _real(3 * size), "mask": given}
    inputs["past"] = _real(2, batch, _HEADS, past, _WIDTH) if past else None
    whole = {"x": [batch, "S", 8]} if given is None or given.ndim == 1 else {}
    assert_node_agrees(
        tmp_path,
        "Attention",
        inputs,
        domain=MICROSOFT,
        num_heads=_HEADS,
        unidirectional=causal,
        outputs=("y", "present") if past else ("y",),
        shapes=whole,
        stored=["w", "b"],
    )


def test_attention_with_a_bias_and_sizes_of_its_own(tmp_path: Path) -> None:
    inputs = {"x": _real(2, 3, 8), "w": _real(8, 8 + 8 + 12), "b": _real(28), "mask": None, "past": None}
    inputs["bias"] = _real(1, 2, 3, 3)
    options: dict[str, Any] = {"domain": MICROSOFT, "num_heads": 2, "scale": 0.3}
    assert_node_agrees(tmp_path, "Attention", inputs, qkv_hidden_sizes=[8, 8, 12], **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", ["none", "lengths", "keys"])
def test_multi_head_attention(bias: bool, padding: str, tmp_path: Path) -> None:
    batch, length, keys, size = 2, 3, 5, _HEADS * _WIDTH
    inputs: dict[str, Any] = {"q": _real(batch, length, size), "k": _real(batch, keys, size)}
    inputs |= {"v": _real(batch, keys, size), "b": _real(3 * size) if bias else None}
    inputs["padding"] = _MASKS[padding](batch, length, keys)
    shapes = {"q": [batch, "S", size]}
    options: dict[str, Any] = {"domain": MICROSOFT, "num_heads": _HEADS}
    assert_node_agrees(tmp_path, "MultiHeadAttention", inputs, shapes=shapes, scale=0.4, **options)


@pytest.mark.parametrize("together", [("k", "v"), ("q", "k", "v")], ids=str)
def test_multi_head_attention_of_packed_inputs(together: tuple[str, ...], tmp_path: Path) -> None:
    """What ONNX Runtime computes on graphics cards only equals the same inputs one by one."""
    apart: dict[str, Any] = {name: _real(2, 3, _HEADS * _WIDTH) for name in "qkv"}
    options: dict[str, Any] = {"domain": MICROSOFT, "num_heads": _HEADS}
    write_node(tmp_path / "apart.onnx", "MultiHeadAttention", apart, **options)
    inputs = {name: None if name in together else value for name, value in apart.items()}
    parts = [apart[name].reshape(2, 3, _HEADS, _WIDTH) for name in together]
    inputs[together[0]] = np.stack(parts, 3)
    expected = run_file(tmp_path / "apart.onnx", apart)
    assert_node_agrees(tmp_path, "MultiHeadAttention", inputs, expected=expected, **options)


@pytest.mark.parametrize("causal", [0, 1])
def test_multi_head_attention_with_a_cache(causal: int, tmp_path: Path) -> None:
    size = _HEADS * _WIDTH
    inputs: dict[str, Any] = {name: _real(2, 3, size) for name in "qkv"} | {"b": None, "padding": None}
    inputs["bias"] = _real(1, _HEADS, 3, 7)
    inputs |= {"past_k": _real(2, _HEADS, 4, _WIDTH), "past_v": _real(2, _HEADS, 4, _WIDTH)}
    outputs = ("y", "present_k", "present_v")
    options: dict[str, Any] = {"domain": MICROSOFT, "num_heads": _HEADS, "unidirectional": causal, "outputs": outputs}
    assert_node_agrees(tmp_path, "MultiHeadAttention", inputs, **options)


def _angles(rotated: int = 4) -> dict[str, np.ndarray]:
    turn = np.arange(16)[:, None] * 0.7 ** np.arange(rotated // 2)
    return {"cos": np.cos(turn).astype(np.float32), "sin": np.sin(turn).astype(np.float32)}


_GROUPED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"do_rotary": 1},
    "rotary of neighbours": {"do_rotary": 1, "rotary_interleaved": 1},
    "window": {"local_window_size": 2},
    "soft cap": {"softcap": 2.0},
    "smooth": {"smooth_softmax": 1},
    "scale": {"scale": 0.2, "do_rotary": 1},
}


@pytest.mark.parametrize("step", ["prompt", "prompt, empty cache", "one more", "three more"])
@pytest.mark.parametrize("case", _GROUPED)
def test_group_query_attention(case: str, step: str, tmp_path: Path) -> None:
    """A prompt, with no cache or with an empty one; and one token (or some) more, of sequences of equal lengths."""
    options = _GROUPED[case]
    batch, heads, kv_heads, width = 2, 4, 2, 16
    length, past = {"prompt": (5, 0), "prompt, empty cache": (5, 0), "one more": (1, 4), "three more": (3, 4)}[step]
    if past and length > 1:
        batch = 1  # ONNX Runtime takes several new tokens for one sequence only
    parts = {"q": heads, "k": kv_heads, "v": kv_heads}
    inputs: dict[str, Any] = {name: _real(batch, length, count * width) for name, count in parts.items()}
    if step in ("prompt", "three more"):
        inputs = {"q": np.concatenate(list(inputs.values()), -1), "k": None, "v": None}
    for name in ("past_k", "past_v"):
        inputs[name] = None if step == "prompt" else _real(batch, kv_heads, past, width)
    inputs["last"] = np.full(batch, past + length - 1, np.int32)
    inputs["total"] = np.array(past + length, np.int32)
    inputs |= _angles(width) if options.get("do_rotary") else {}
    outputs = ("y", "present_k", "present_v")
    assert_node_agrees(
        tmp_path,
        "GroupQueryAttention",
        inputs,
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv_heads,
        outputs=outputs,
        stored=[n for n in ("cos", "sin") if n in inputs],
        **options,
    )


def test_group_query_attention_of_sequences_of_different_lengths(tmp_path: Path) -> None:
    """Each new key is written behind its own sequence; what lies behind is not seen."""
    batch, heads, width, past = 3, 2, 16, 6
    inputs: dict[str, Any] = {name: _real(batch, 1, heads * width) for name in "qkv"}
    inputs |= {name: _real(batch, heads, past, width) for name in ("past_k", "past_v")}
    inputs["last"] = np.array([2, 6, 4], np.int32)
    inputs["total"] = np.array(7, np.int32)
    options: dict[str, Any] = {"domain": MICROSOFT, "num_heads": heads, "kv_num_heads": heads, "do_rotary": 1}
    outputs = ("y", "present_k", "present_v")
    write_node(tmp_path / "m.onnx", "GroupQueryAttention", inputs | _angles(width), outputs=outputs, **options)
    y, present_k, _ = run_file(tmp_path / "m.onnx", inputs | _angles(width))
    program = from_onnx(tmp_path / "m.onnx")
    given = {n: torch.from_numpy(v) for n, v in (inputs | _angles(width)).items()}
    ours = program.run({n: given[n] for n in program.main.inputs})
    np.testing.assert_allclose(ours["y"].numpy(), y, atol=1e-5)
    for element, last in enumerate(inputs["last"]):
        kept = slice(0, int(last) + 1)
        np.testing.assert_allclose(ours["present_k"][element, :, kept].numpy(), present_k[element, :, kept], atol=1e-5)


@pytest.mark.parametrize("form", ["flat", "heads", "offset", "partial", "neighbours"])
def test_rotary_embedding(form: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"interleaved": 1} if form == "neighbours" else {}
    rotated = 4 if form == "partial" else 8
    if form == "partial":
        options |= {"num_heads": 2, "rotary_embedding_dim": 4}
    x = _real(2, 2, 3, 8) if form == "heads" else _real(2, 3, 16)
    places = np.array([4], np.int64) if form == "offset" else R.integers(0, 16, (2, 3), np.int64)
    program = assert_node_agrees(
        tmp_path,
        "RotaryEmbedding",
        {"x": x, "places": places, **_angles(rotated)},
        domain=MICROSOFT,
        stored=["cos", "sin"],
        **options,
    )
    assert "graphlathe.rotary_embedding" in operators_of(program)


def test_forms_of_attention_that_are_refused(tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"x": _real(1, 2, 8), "w": _real(8, 24)}
    write_node(tmp_path / "m.onnx", "Attention", inputs, domain=MICROSOFT, num_heads=2, do_rotary=1)
    with pytest.raises(ImportModelError, match=r"rotation.*\(node %node\)"):
        from_onnx(tmp_path / "m.onnx")
    inputs = {"x": _real(1, 2, 8), "p": np.zeros(1, np.int64), **_angles(8)}
    write_node(tmp_path / "m.onnx", "RotaryEmbedding", inputs, domain=MICROSOFT, scale=2.0)
    with pytest.raises(ImportModelError, match=r"with a scale.*\(node %node\)"):
        from_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("bits", "zero_points"), [(4, "none"), (4, "packed"), (4, "real"), (8, "none"), (8, "packed"), (2, "packed")]
)
def test_matmul_of_packed_weights(bits: int, zero_points: str, tmp_path: Path) -> None:
    """A weight of 5 rows and 48 columns, in blocks of 16 or 32 (the last one not full)."""
    rows, columns, block = 5, 48, 32 if bits == 4 else 16
    blocks = -(-columns // block)
    inputs: dict[str, Any] = {
        "a": _real(2, 3, columns),
        "b": R.integers(0, 255, (rows, blocks, block * bits // 8), np.uint8, endpoint=True),
        "scales": R.uniform(0.01, 0.1, rows * blocks).astype(np.float32),
    }
    if zero_points == "packed":
        inputs["zero"] = R.integers(0, 255, rows * -(-blocks * bits // 8), np.uint8, endpoint=True)
    elif zero_points == "real":
        inputs["zero"] = R.uniform(0, 2**bits - 1, rows * blocks).astype(np.float32)
    program = assert_node_agrees(
        tmp_path,
        "MatMulNBits",
        inputs,
        atol=1e-4,
        domain=MICROSOFT,
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
        shapes={"a": ["B", "S", columns]},
        stored=[name for name in inputs if name != "a"],
    )
    assert {"graphlathe.unpack_bits", "graphlathe.dequantize", "aten.linear"} <= set(operators_of(program))


@pytest.mark.parametrize("zero_points", [False, True])
def test_gather_of_packed_rows(zero_points: bool, tmp_path: Path) -> None:
    table = R.integers(0, 255, (7, 24), np.uint8, endpoint=True)
    inputs = {"table": table, "ids": R.integers(0, 7, (2, 3), np.int64), "scales": _real(7, 3)}
    inputs |= {"zero": R.integers(0, 255, (7, 2), np.uint8, endpoint=True)} if zero_points else {}
    stored = [name for name in inputs if name != "ids"]
    options: dict[str, Any] = {"domain": MICROSOFT, "shapes": {"ids": ["B", "S"]}, "stored": stored}
    assert_node_agrees(tmp_path, "GatherBlockQuantized", inputs, block_size=16, bits=4, **options)


def _stored(*shape: int) -> np.ndarray:
    return R.integers(0, 255, shape, np.uint8, endpoint=True)


def _scaled(value: np.ndarray, name: str, scale: float = 0.05) -> dict[str, np.ndarray]:
    return {name: value, f"{name}_scale": np.array(scale, np.float32), f"{name}_zero": np.array(120, np.uint8)}


_RESULT = {"y_scale": np.array(0.1, np.float32), "y_zero": np.array(100, np.uint8)}
_ARITHMETIC: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {
    "QLinearAdd": (_scaled(_stored(2, 3, 4), "a") | _scaled(_stored(3, 1), "b") | _RESULT, {}),
    "QLinearMul": (_scaled(_stored(2, 3, 4), "a") | _scaled(_stored(4), "b") | _RESULT, {}),
    "QLinearSigmoid": (_scaled(_stored(2, 9), "x") | _RESULT, {}),
    "QLinearLeakyRelu": (_scaled(_stored(2, 9), "x") | _RESULT, {"alpha": 0.1}),
    "QLinearSoftmax": (_scaled(_stored(2, 9), "x", 0.01) | _RESULT, {"axis": -1, "opset": 13}),
    "QLinearConcat": (_RESULT | _scaled(_stored(2, 3), "a") | _scaled(_stored(2, 4), "b"), {"axis": 1}),
    "QLinearGlobalAveragePool": (_scaled(_stored(2, 3, 4, 4), "x") | _RESULT, {}),
    "QLinearAveragePool": (_scaled(_stored(2, 3, 4, 4), "x") | _RESULT, {"kernel_shape": [3, 3], "pads": [1] * 4}),
    "QLinearWhere": (
        {"c": R.random((2, 3)) > 0.5} | _scaled(_stored(2, 3), "x") | _scaled(_stored(2, 3), "z", 0.1) | _RESULT,
        {},
    ),
    "QGemm": (_scaled(_stored(3, 4), "a") | _scaled(_stored(4, 5), "b") | {"bias": np.arange(5, dtype=np.int32)}, {}),
    "MatMulIntegerToFloat": (
        {"a": _stored(2, 3, 4), "b": _stored(4, 5), "as": np.array(0.1, np.float32), "bs": _vector(5)}
        | {"az": np.array(9, np.uint8), "bz": _stored(5), "bias": _real(5)},
        {},
    ),
    "DynamicQuantizeMatMul": (
        {"a": _real(2, 3, 4), "b": _stored(4, 5), "bs": np.array(0.1, np.float32), "bz": np.array(99, np.uint8)},
        {},
    ),
}


@pytest.mark.parametrize("operator", _ARITHMETIC)
def test_quantised_arithmetic(operator: str, tmp_path: Path) -> None:
    """Within one step of the result: ONNX Runtime rounds some of them by tables or in fixed point."""
    inputs, options = _ARITHMETIC[operator]
    atol = 1 if operator.startswith("QLinear") else 1e-4
    assert_node_agrees(tmp_path, operator, inputs, domain=MICROSOFT, atol=atol, **options)
