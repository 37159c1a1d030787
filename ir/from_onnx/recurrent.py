"""Recurrent layers: RNN, GRU and LSTM, in both directions, with every option that ONNX has.

The form that PyTorch's own layers compute (its activations, no peepholes, no clipping, sequences of full length)
becomes one call of its layer. Any other is unrolled, step by step, for which the length must be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ImportModelError, MissingOperatorError
from .limits import check_turns
from .registry import operator

Activation = Callable[[Tensor], Tensor]
Cell = Callable[[Tensor, Any], Any]


@dataclass(frozen=True)
class Layer:
    """The options that the three layers share.

    Attributes:
        direction: ``forward``, ``reverse`` or ``bidirectional``.
        batch_first: whether the batch is in front (``layout`` 1).
        lengths: of the sequences; None: all of full length.
        clip: a bound on what goes into an activation.
    """

    direction: str
    batch_first: bool
    lengths: Tensor | None
    clip: float | None

    @property
    def directions(self) -> int:
        """How many directions there are."""
        return 2 if self.direction == "bidirectional" else 1

    def clipped(self, x: Tensor) -> Tensor:
        """Within the bound."""
        return x if self.clip is None else torch.clamp(x, -self.clip, self.clip)


def _affine(alpha: float, beta: float) -> Activation:
    return lambda x: alpha * x + beta


def _activation(name: str, alpha: float | None, beta: float | None) -> Activation:
    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    match name.lower():
        case "tanh":
            return torch.tanh
        case "sigmoid":
            return torch.sigmoid
        case "relu":
            return torch.relu
        case "affine":
            return _affine(given(alpha, 1.0), given(beta, 0.0))
        case "leakyrelu":
            return lambda x: torch.nn.functional.leaky_relu(x, given(alpha, 0.01))
        case "thresholdedrelu":
            return lambda x: torch.where(x > given(alpha, 1.0), x, 0.0)
        case "scaledtanh":
            return lambda x: given(alpha, 1.0) * torch.tanh(given(beta, 1.0) * x)
        case "hardsigmoid":
            return lambda x: torch.clamp(given(alpha, 0.2) * x + given(beta, 0.5), 0, 1)
        case "elu":
            return lambda x: torch.nn.functional.elu(x, given(alpha, 1.0))
        case "softsign":
            return torch.nn.functional.softsign
        case "softplus":
            return torch.nn.functional.softplus
        case _:
            raise MissingOperatorError(f"the activation '{name}' of a recurrent layer cannot be imported")


def _activations(
    names: Sequence[Any] | None,
    default: Sequence[str],
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    directions: int,
) -> tuple[list[list[Activation]], bool]:
    """Activations by direction and gate, and whether they are the defaults."""
    chosen = [n.decode() if isinstance(n, bytes) else str(n) for n in names] if names else list(default) * directions
    rest = {id(values): list(values or ()) for values in (alphas, betas)}

    def take(values: Sequence[float] | None) -> float | None:
        left = rest[id(values)]
        return left.pop(0) if left else None

    functions = [_activation(name, take(alphas), take(betas)) for name in chosen]
    gates = len(default)
    plain = [n.lower() for n in chosen] == [d.lower() for d in default] * directions
    return [functions[i * gates : (i + 1) * gates] for i in range(directions)], plain


def _unroll(x: Tensor, layer: Layer, cells: Sequence[Cell], states: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """Apply each direction's cell along the sequence.

    Args:
        x: [length, batch, inputs].
        layer: its options.
        cells: for each direction, ``(input, state) -> state``; a state is a tuple whose first tensor is the output.
        states: the first state of each direction.

    Returns:
        The outputs [length, directions, batch, hidden] and the last states.
    """
    length = x.shape[0]
    if not isinstance(length, int):
        raise ImportModelError(
            "a recurrent layer of this form over a dynamic length is not supported",
            expected="a fixed length, or a layer with the default activations, without peepholes and clipping",
            remedy="fix that dimension: static=True",
        )
    check_turns(length, "the length of a recurrent layer of this form")
    outputs: list[Tensor] = []
    finals: list[Any] = []
    for number, (cell, state) in enumerate(zip(cells, states, strict=True)):
        backward = layer.direction == "reverse" or number == 1
        steps: list[Tensor | None] = [None] * length
        for step in reversed(range(length)) if backward else range(length):
            new = cell(x[step], state)
            if layer.lengths is not None:
                # Beyond its end a sequence keeps its state, and puts out zeros. Backward it starts at its end.
                inside = (step < layer.lengths).unsqueeze(-1)
                steps[step] = torch.where(inside, new[0], 0.0)
                new = tuple(torch.where(inside, n, old) for n, old in zip(new, state, strict=True))
            else:
                steps[step] = new[0]
            state = new
        outputs.append(torch.stack([s for s in steps if s is not None]))
        finals.append(state)
    return torch.stack(outputs, 1), finals


def _start(x: Tensor, given: Tensor | None, layer: Layer, hidden: int) -> Tensor:
    """First states, [directions, batch, hidden]."""
    if given is None:
        return torch.zeros([layer.directions, x.shape[1], hidden], dtype=x.dtype)
    return given.transpose(0, 1) if layer.batch_first else given


def _finish(y: Tensor, finals: Sequence[Tensor], layer: Layer, n_used: int) -> Any:
    """The outputs in ONNX's order of dimensions."""
    results = [y.permute(2, 0, 1, 3) if layer.batch_first else y]
    results += [f.transpose(0, 1) if layer.batch_first else f for f in finals]
    return tuple(results[:n_used])


def _by_torch(
    function: Callable[..., Any],
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    order: Sequence[int],
    states: Any,
    directions: int,
) -> tuple[Tensor, ...]:
    """One call of PyTorch's layer; ``order`` says which of ONNX's gates stands where in PyTorch's."""
    gates = len(order)

    def arranged(t: Tensor) -> Tensor:
        parts = t.chunk(gates, 0)
        return torch.cat([parts[i] for i in order], 0) if list(order) != list(range(gates)) else t

    weights: list[Tensor] = []
    for d in range(directions):
        weights += [arranged(w[d]), arranged(r[d])]
        if b is not None:
            weights += [arranged(half) for half in b[d].chunk(2, 0)]
    result = function(x, states, weights, b is not None, 1, 0.0, False, directions == 2, False)
    y = result[0].unflatten(-1, (directions, -1)).transpose(1, 2)
    return (y, *result[1:])


def _backward(function: Callable[..., tuple[Tensor, ...]], x: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    """The layer on the sequence read backward, where that is its only direction."""
    y, *finals = function(x.flip(0) if reverse else x)
    return (y.flip(0) if reverse else y, *finals)


@operator("RNN")
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[Any] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    n_used: int,
) -> Any:
    layer = Layer(direction, bool(layout), lengths, clip)
    x = x.transpose(0, 1) if layout else x
    count, size = layer.directions, int(r.shape[-1])
    start = _start(x, h, layer, size)
    functions, plain = _activations(activations, ["Tanh"], activation_alpha, activation_beta, count)
    if plain and lengths is None and clip is None:
        y, last = _backward(
            lambda seq: _by_torch(torch.rnn_tanh, seq, w, r, b, [0], start, count), x, direction == "reverse"
        )
        return _finish(y, [last], layer, n_used)

    def cell(d: int) -> Cell:
        bias = None if b is None else b[d][:size] + b[d][size:]

        def step(value: Tensor, state: Any) -> Any:
            total = value @ w[d].t() + state[0] @ r[d].t()
            return (functions[d][0](layer.clipped(total if bias is None else total + bias)),)

        return step

    y, finals = _unroll(x, layer, [cell(d) for d in range(count)], [(start[d],) for d in range(count)])
    return _finish(y, [torch.stack([f[0] for f in finals])], layer, n_used)


@operator("GRU")
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[Any] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    n_used: int,
) -> Any:
    """Gates in the order update, reset, new; PyTorch resets after the linear layer, and has reset, update, new."""
    layer = Layer(direction, bool(layout), lengths, clip)
    x = x.transpose(0, 1) if layout else x
    count, size = layer.directions, int(r.shape[-1])
    start = _start(x, h, layer, size)
    functions, plain = _activations(activations, ["Sigmoid", "Tanh"], activation_alpha, activation_beta, count)
    if plain and linear_before_reset and lengths is None and clip is None:
        y, last = _backward(
            lambda seq: _by_torch(torch.gru, seq, w, r, b, [1, 0, 2], start, count), x, direction == "reverse"
        )
        return _finish(y, [last], layer, n_used)

    def cell(d: int) -> Cell:
        f, g = functions[d]
        biases = (b[d] if b is not None else torch.zeros([6 * size], dtype=x.dtype)).chunk(6)
        wz, wr, wn = w[d].chunk(3)
        rz, rr, rn = r[d].chunk(3)

        def step(value: Tensor, state: Any) -> Any:
            (old,) = state
            update = f(layer.clipped(value @ wz.t() + old @ rz.t() + biases[0] + biases[3]))
            reset = f(layer.clipped(value @ wr.t() + old @ rr.t() + biases[1] + biases[4]))
            linear = (old if linear_before_reset else reset * old) @ rn.t() + biases[5]
            inner = reset * linear if linear_before_reset else linear
            new = g(layer.clipped(value @ wn.t() + inner + biases[2]))
            return ((1 - update) * new + update * old,)

        return step

    y, finals = _unroll(x, layer, [cell(d) for d in range(count)], [(start[d],) for d in range(count)])
    return _finish(y, [torch.stack([f[0] for f in finals])], layer, n_used)


@operator("LSTM")
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[Any] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    n_used: int,
) -> Any:
    """Gates in the order input, output, forget, cell; PyTorch's is input, forget, cell, output."""
    layer = Layer(direction, bool(layout), lengths, clip)
    x = x.transpose(0, 1) if layout else x
    count, size = layer.directions, int(r.shape[-1])
    start, cells = _start(x, h, layer, size), _start(x, c, layer, size)
    functions, plain = _activations(activations, ["Sigmoid", "Tanh", "Tanh"], activation_alpha, activation_beta, count)
    if plain and lengths is None and clip is None and peepholes is None and not input_forget:
        y, *last = _backward(
            lambda seq: _by_torch(torch.lstm, seq, w, r, b, [0, 2, 3, 1], (start, cells), count),
            x,
            direction == "reverse",
        )
        return _finish(y, last, layer, n_used)

    def cell(d: int) -> Cell:
        f, g, out = functions[d]
        bias = None if b is None else b[d].chunk(2)[0] + b[d].chunk(2)[1]
        pi, po, pf = (None, None, None) if peepholes is None else peepholes[d].chunk(3)

        def step(value: Tensor, state: Any) -> Any:
            old, inner = state
            total = value @ w[d].t() + old @ r[d].t()
            total = total if bias is None else total + bias
            gate_in, gate_out, gate_forget, new = total.chunk(4, -1)
            gate_in = f(layer.clipped(gate_in if pi is None else gate_in + pi * inner))
            gate_forget = f(layer.clipped(gate_forget if pf is None else gate_forget + pf * inner))
            gate_forget = 1 - gate_in if input_forget else gate_forget
            inner = gate_forget * inner + gate_in * g(layer.clipped(new))
            gate_out = f(layer.clipped(gate_out if po is None else gate_out + po * inner))
            return (gate_out * out(inner), inner)

        return step

    y, finals = _unroll(x, layer, [cell(d) for d in range(count)], [(start[d], cells[d]) for d in range(count)])
    return _finish(y, [torch.stack([f[i] for f in finals]) for i in (0, 1)], layer, n_used)
