"""The ONNX Runtime back end: in-memory export, inputs and outputs bound to torch tensors without copies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..ir.errors import ExportError, InputError, suggest
from ..ir.program import Program
from .session import ProgramSession

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OPTIMIZATIONS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_IN_MEMORY_BELOW = 2**31 - 2**20
"""Bytes of weights; a protobuf message ends at 2 GiB."""


def open_session(
    model: bytes | str | os.PathLike[str],
    *,
    provider: str = "cpu",
    intra_threads: int = 0,
    inter_threads: int = 0,
    optimization: str = "all",
    profile: str | os.PathLike[str] | None = None,
) -> onnxruntime.InferenceSession:
    """Open a model in ONNX Runtime.

    Args:
        model: a serialised model, or a file's path.
        provider: ``cpu`` or ``cuda``.
        intra_threads: threads within an operator; 0 lets ONNX Runtime choose.
        inter_threads: operators at a time; 0 lets ONNX Runtime choose.
        optimization: ``none``, ``basic``, ``extended`` or ``all``: what ONNX Runtime may do to the graph.
        profile: prefix of the file to which a profile is written when the session closes.

    Raises:
        InputError: an unknown provider or optimization, or one that this installation lacks.
        ExportError: ONNX Runtime refuses the model.
    """
    ort = _onnxruntime()
    for what, value, known in (("provider", provider, PROVIDERS), ("optimization", optimization, OPTIMIZATIONS)):
        if value not in known:
            raise InputError(
                f"unknown {what} '{value}'{suggest(value, list(known))}", expected=f"one of: {', '.join(known)}"
            )
    available = ort.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise InputError(
            f"ONNX Runtime has no provider '{provider}' here",
            expected=f"one of: {', '.join(name for name, full in PROVIDERS.items() if full in available)}",
            remedy="for CUDA, install onnxruntime-gpu instead of onnxruntime (pip install 'graphlathe[gpu]')",
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_threads
    options.inter_op_num_threads = inter_threads
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMIZATIONS[optimization])
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return ort.InferenceSession(source, options, providers=[PROVIDERS[provider]])
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime {ort.__version__} refuses the model: {str(error).splitlines()[0]}",
            remedy="export with another opset, or use backend='torch'",
        ) from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            "onnxruntime is not installed", remedy="pip install 'graphlathe[cpu]', or 'graphlathe[gpu]' for CUDA"
        ) from error
    return onnxruntime


class Binding:
    """Runs a session on torch tensors through IO binding.

    Args:
        session: the open session.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.outputs = [value.name for value in session.get_outputs()]
        self.inputs = [value.name for value in session.get_inputs()]

    def run(
        self, feeds: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[torch.dtype, list[int]]]
    ) -> dict[str, torch.Tensor]:
        """Run; outputs whose shape is known beforehand are written straight into torch tensors.

        Args:
            feeds: inputs by name.
            shapes: dtype and shape of outputs that are known.
        """
        from ..ir.to_onnx.initializers import onnx_dtype

        binding = self.session.io_binding()
        # Contiguous copies must outlive the run: ONNX Runtime only gets their addresses.
        kept = {name: feeds[name].contiguous() for name in self.inputs}
        device = next((t.device for t in kept.values()), torch.device("cpu"))
        for name, tensor in kept.items():
            self._bind(binding.bind_input, name, tensor, int(onnx_dtype(tensor.dtype)))
        made: dict[str, torch.Tensor] = {}
        for name in self.outputs:
            if name in shapes and all(shapes[name][1]):
                dtype, shape = shapes[name]
                made[name] = torch.empty(shape, dtype=dtype, device=device)
                self._bind(binding.bind_output, name, made[name], int(onnx_dtype(dtype)))
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        values = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        return {name: made[name] if name in made else torch.from_numpy(values[name].numpy()) for name in self.outputs}

    @staticmethod
    def _bind(bind: Any, name: str, tensor: torch.Tensor, element_type: int) -> None:
        bind(name, tensor.device.type, tensor.device.index or 0, element_type, list(tensor.shape), tensor.data_ptr())


class OnnxRuntimeSession(ProgramSession):
    """Runs a program in ONNX Runtime.

    Args:
        program: the program; exported in memory (through a temporary folder above 2 GB of weights).
        entry: which entry.
        opset: the version of ONNX's operators, see `ir.to_onnx.to_onnx_model`.
        provider, intra_threads, inter_threads, optimization, profile: see `open_session`.
    """

    def __init__(
        self,
        program: Program,
        entry: str = "main",
        *,
        opset: int | None = None,
        provider: str = "cpu",
        intra_threads: int = 0,
        inter_threads: int = 0,
        optimization: str = "all",
        profile: str | os.PathLike[str] | None = None,
    ) -> None:
        from ..ir.to_onnx import to_bytes, to_onnx_model, write

        super().__init__(program, entry)
        result = to_onnx_model(program, opset=opset, entry=entry)
        self.notes = result.notes
        options: dict[str, Any] = {
            "provider": provider,
            "intra_threads": intra_threads,
            "inter_threads": inter_threads,
            "optimization": optimization,
            "profile": profile,
        }
        if program.weight_nbytes < _IN_MEMORY_BELOW:
            session = open_session(to_bytes(result.model), **options)
        else:
            with tempfile.TemporaryDirectory(prefix="graphlathe-") as folder:
                session = open_session(write(result.model, Path(folder) / "model.onnx"), **options)
        self._binding: Binding | None = Binding(session)

    def compute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Run through IO binding."""
        if self._binding is None:
            raise InputError("the session is closed")
        values = self._binding.run(feeds, self._known_shapes(sizes))
        for name, node in zip(self.entry.outputs, self.entry.output_values, strict=True):
            if isinstance(node, fx.Node) and not isinstance(node.meta["val"], torch.Tensor):
                values[name] = values[name].item()  # type: ignore[assignment]
        return dict(values)

    def _known_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Outputs whose shape follows from the inputs' (sizes that depend on data do not)."""
        known: dict[str, tuple[torch.dtype, list[int]]] = {}
        symbols = {dim.symbol for dim in self.entry.dims.by_name.values()}
        for name, node in zip(self.entry.outputs, self.entry.output_values, strict=True):
            value = node.meta["val"] if isinstance(node, fx.Node) else None
            if isinstance(value, torch.Tensor) and all(
                isinstance(s, int) or s.node.expr.free_symbols <= symbols for s in value.shape
            ):
                known[name] = (value.dtype, [self.entry.dims.evaluate(s, sizes) for s in value.shape])
        return known

    def close(self) -> None:
        """Free the model; a profile is written now."""
        self._binding = None
