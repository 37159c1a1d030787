"""One ONNX Runtime session: options, providers, and calls that copy nothing that they need not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..ir.errors import GraphlatheError, suggest

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

OPTIMIZATION = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}

# ONNX's element types, by the names that ONNX Runtime gives to a session's inputs.
DTYPES: dict[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}

_ELEMENT = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


def import_onnxruntime() -> ModuleType:
    """The onnxruntime package.

    Raises:
        GraphlatheError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise GraphlatheError(
            "the backend 'onnxruntime' needs the package onnxruntime",
            remedy="pip install graphlathe[cpu], or graphlathe[gpu] for CUDA",
        ) from error
    return onnxruntime


class Runner:
    """An ONNX Runtime session over tensors.

    Args:
        model: the file, or the serialized model.
        threads: threads within an operator; None: one per core.
        inter_threads: threads across operators; more than one turns parallel execution on.
        provider: ``"cpu"`` or ``"cuda"``.
        optimization: ONNX Runtime's own graph optimization: ``"none"``, ``"basic"``, ``"extended"`` or ``"all"``.
        profile: a path prefix; each session writes ``<prefix>_<time>.json`` when closed.
        weights: numbers of external weights, by name; shared with the session, not copied.

    Raises:
        GraphlatheError: an option is wrong, the provider is missing, or ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: bytes | Path,
        *,
        threads: int | None = None,
        inter_threads: int | None = None,
        provider: str = "cpu",
        optimization: str = "all",
        profile: str | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        ort = import_onnxruntime()
        self._ort = ort
        chosen = self._providers(ort, provider)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(
            ort.GraphOptimizationLevel, _choice("optimization", optimization, OPTIMIZATION)
        )
        for name, value in (("threads", threads), ("inter_threads", inter_threads)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise GraphlatheError(f"option '{name}' is {value!r}", expected="a positive integer")
        if threads is not None:
            options.intra_op_num_threads = threads
        if inter_threads is not None:
            options.inter_op_num_threads = inter_threads
            options.execution_mode = (
                ort.ExecutionMode.ORT_PARALLEL if inter_threads > 1 else ort.ExecutionMode.ORT_SEQUENTIAL
            )
        self._profile = profile is not None
        if profile is not None:
            if not Path(profile).absolute().parent.is_dir():
                raise GraphlatheError(f"option 'profile' is {profile!r}, whose folder does not exist")
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self._shared: list[Any] = []
        self._weights = {name: tensor.detach().contiguous() for name, tensor in (weights or {}).items()}
        if self._weights:
            self._shared = [_shared(ort, tensor) for tensor in self._weights.values()]
            # The first gives the optimizer the numbers, the second keeps it from copying them. (Matrices are packed
            # anew for some kernels all the same.)
            options.add_external_initializers(list(self._weights), self._shared)
            for name, value in zip(self._weights, self._shared, strict=True):
                options.add_initializer(name, value)
        source = str(model) if isinstance(model, Path) else model
        try:
            self.session = ort.InferenceSession(source, options, providers=chosen)
        except Exception as error:
            raise GraphlatheError(f"ONNX Runtime refuses the model: {_first_line(error)}") from error
        self.device = "cuda" if provider == "cuda" else "cpu"
        self.inputs: dict[str, Any] = {value.name: value for value in self.session.get_inputs()}
        self.outputs: dict[str, Any] = {value.name: value for value in self.session.get_outputs()}

    @staticmethod
    def _providers(ort: ModuleType, provider: str) -> list[str]:
        wanted = _choice("provider", provider, PROVIDERS)
        if wanted not in ort.get_available_providers():
            raise GraphlatheError(
                f"this onnxruntime has no {wanted}",
                expected=f"one of: {', '.join(ort.get_available_providers())}",
                remedy="pip install graphlathe[gpu] (and uninstall onnxruntime), or use provider='cpu'",
            )
        return [wanted] if provider == "cpu" else [wanted, PROVIDERS["cpu"]]

    def run(
        self, feeds: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...] | None]
    ) -> dict[str, torch.Tensor]:
        """Compute the outputs.

        Args:
            feeds: the inputs; contiguous ones are read in place.
            shapes: the outputs' shapes where they are known; those are written into new tensors directly.

        Raises:
            GraphlatheError: ONNX Runtime failed.
        """
        binding = self.session.io_binding()
        alive: list[torch.Tensor] = []
        results: dict[str, torch.Tensor] = {}
        try:
            for name, value in feeds.items():
                tensor = value.detach().contiguous()
                alive.append(tensor)
                self._bind_input(binding, name, tensor)
            for name, spec in self.outputs.items():
                shape, dtype = shapes.get(name), DTYPES.get(spec.type)
                if self.device == "cpu" and shape is not None and dtype is not None and all(shape):
                    results[name] = torch.empty(shape, dtype=dtype)
                    binding.bind_output(name, "cpu", 0, _ELEMENT[dtype], list(shape), results[name].data_ptr())
                else:
                    binding.bind_output(name, self.device, 0)
            self.session.run_with_iobinding(binding)
        except GraphlatheError:
            raise
        except Exception as error:
            raise GraphlatheError(f"ONNX Runtime failed: {_first_line(error)}") from error
        for (name, spec), value in zip(self.outputs.items(), binding.get_outputs(), strict=True):
            if name not in results:
                results[name] = _tensor(value, DTYPES.get(spec.type))
        return {name: results[name] for name in self.outputs}

    def _bind_input(self, binding: Any, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in _ELEMENT:
            raise GraphlatheError(f"input '{name}' has dtype {tensor.dtype}, which this backend cannot pass on")
        if tensor.numel() == 0:
            empty = self._ort.OrtValue.ortvalue_from_shape_and_type(
                list(tensor.shape), _ELEMENT[tensor.dtype], "cpu", 0
            )
            binding.bind_ortvalue_input(name, empty)
            return
        binding.bind_input(
            name,
            tensor.device.type,
            tensor.device.index or 0,
            _ELEMENT[tensor.dtype],
            list(tensor.shape),
            tensor.data_ptr(),
        )

    def close(self) -> str | None:
        """Free the session; returns the path of its profile, if it wrote one."""
        path = self.session.end_profiling() if self._profile else None
        self._profile = False
        del self.session
        self._shared.clear()
        self._weights.clear()
        return path


def _tensor(value: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """An output that ONNX Runtime allocated, as a tensor over the same memory."""
    shape = value.shape()
    if dtype is not None and not all(shape):
        return torch.empty(shape, dtype=dtype)
    tensor = torch.from_dlpack(value)
    return tensor.view(torch.bool) if dtype is torch.bool and tensor.dtype is torch.uint8 else tensor


def _shared(ort: ModuleType, tensor: torch.Tensor) -> Any:
    """A tensor as ONNX Runtime's own value over the same memory; of booleans, which are small, a copy."""
    if tensor.dtype is torch.bool:
        # Not every pair of versions agrees on what a boolean is called in DLPack.
        return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    value = ort.OrtValue.from_dlpack(tensor)
    return value if isinstance(value, ort.OrtValue) else ort.OrtValue(value)


def _choice(option: str, value: str, known: Mapping[str, str]) -> str:
    if value not in known:
        raise GraphlatheError(
            f"option '{option}' is {value!r}{suggest(str(value), list(known))}", expected=f"one of: {', '.join(known)}"
        )
    return known[value]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
