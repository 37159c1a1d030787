"""ONNX Runtime: a program exported in memory, sharing its weights, or a file that is there already."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..ir.dims import Dims
from ..ir.errors import ExportError, GraphlatheError, InputError
from ..ir.program import Program, StatePair
from .guards import UnreadableGuardError, holds
from .ort import DTYPES, Runner, import_onnxruntime
from .session import ProgramSession, Session


class OnnxRuntimeSession(ProgramSession):
    """Runs a program in ONNX Runtime. The graph is exported in memory; weights are shared with it, whatever their size.

    Args:
        program: the program.
        entry: which entry.
        threads: threads within an operator; default one per core.
        inter_threads: threads across operators.
        provider: ``"cpu"`` or ``"cuda"``.
        optimization: ONNX Runtime's own graph optimization: ``"none"``, ``"basic"``, ``"extended"``, ``"all"``.
        profile: a path prefix for ONNX Runtime's profile, written when the session is closed.
        opset: the version of ONNX's operators, see `ir.to_onnx`.
        fallback: whether PyTorch's stock exporter may be used, see `ir.to_onnx`.

    Attributes:
        notes: what the export had to say.
    """

    def __init__(
        self,
        program: Program,
        entry: str,
        *,
        threads: int | None = None,
        inter_threads: int | None = None,
        provider: str = "cpu",
        optimization: str = "all",
        profile: str | None = None,
        opset: int | None = None,
        fallback: bool = True,
    ) -> None:
        super().__init__(program, entry)
        import_onnxruntime()
        from ..ir.to_onnx.export import to_onnx_model
        from ..ir.to_onnx.write import in_memory

        result = to_onnx_model(program, opset=opset, entry=entry, metadata=False, fallback=fallback)
        self.notes = result.notes
        self.added = Dims(self.entry.dims.by_name, result.guards)
        graph, weights = in_memory(result.model)
        self.runner: Runner | None = Runner(
            graph,
            threads=threads,
            inter_threads=inter_threads,
            provider=provider,
            optimization=optimization,
            profile=profile,
            weights=weights,
        )
        if len(self.runner.outputs) != len(self.outputs):
            raise ExportError(
                f"the exported graph has {len(self.runner.outputs)} outputs", expected=str(len(self.outputs))
            )
        self._public = dict(zip(self.runner.outputs, self.outputs, strict=True))

    def _check(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        sizes = super()._check(feeds)
        self.added.check({dim.symbol: sizes[name] for name, dim in self.added.by_name.items() if name in sizes})
        return sizes

    def _execute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        assert self.runner is not None
        shapes = {name: self.output_shape(public, sizes) for name, public in self._public.items()}
        given = {name: value for name, value in feeds.items() if name in self.runner.inputs}
        results = self.runner.run(given, shapes)
        return {self._public[name]: value for name, value in results.items()}

    def close(self) -> None:
        """Free ONNX Runtime's session, and write its profile if asked."""
        if self.runner is not None:
            self.runner.close()
            self.runner = None
        super().close()


class OnnxFileSession(Session):
    """Runs an ONNX file, checking calls against its signature and the guards in its metadata.

    Args:
        path: the file.
        options: as for `OnnxRuntimeSession`, but for those of the export.
    """

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.runner: Runner | None = Runner(path, **options)
        metadata = self.runner.session.get_modelmeta().custom_metadata_map
        pairs = json.loads(metadata.get("graphlathe.state", "[]"))
        self._fill = {pair["input"]: pair["initial"] for pair in pairs}
        super().__init__(
            list(self.runner.inputs), list(self.runner.outputs), [StatePair(p["input"], p["output"]) for p in pairs]
        )
        self.guards = tuple(line for line in metadata.get("graphlathe.guards", "").splitlines() if line)

    def _initial(self, pair: StatePair) -> torch.Tensor | None:
        assert self.runner is not None
        fill, spec = self._fill[pair.input], self.runner.inputs[pair.input]
        if fill is None or not all(isinstance(size, int) for size in spec.shape):
            return None
        return torch.full(spec.shape, fill, dtype=DTYPES[spec.type])

    def _check(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        assert self.runner is not None
        sizes: dict[str, int] = {}
        for name, spec in self.runner.inputs.items():
            value, dtype = feeds[name], DTYPES.get(spec.type)
            if not isinstance(value, torch.Tensor):
                raise InputError(f"input '{name}' is a {type(value).__name__}", expected=f"a {dtype} tensor")
            if value.dtype != dtype:
                raise InputError(f"input '{name}' has dtype {value.dtype}", expected=str(dtype))
            if len(spec.shape) != value.dim():
                raise InputError(
                    f"input '{name}' has shape {list(value.shape)}", expected=f"rank {len(spec.shape)}: {spec.shape}"
                )
            for axis, (want, got) in enumerate(zip(spec.shape, value.shape, strict=True)):
                want = sizes.setdefault(want, got) if isinstance(want, str) and want.isidentifier() else want
                if isinstance(want, int) and want != got:
                    raise InputError(
                        f"input '{name}' has size {got} in dimension {axis}", expected=f"{want}, of shape {spec.shape}"
                    )
        for guard in self.guards:
            try:
                fits = holds(guard, sizes)
            except UnreadableGuardError as error:
                raise GraphlatheError(f"the file's size guard '{guard}' cannot be checked: {error}") from error
            if not fits:
                raise InputError(f"the sizes {sizes} are outside what the model was traced for", expected=guard)
        return sizes

    def _execute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        assert self.runner is not None
        return self.runner.run(feeds, {})

    def __call__(self, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run on inputs given in order, or by name."""
        if len(args) > len(self.inputs):
            raise InputError(f"{len(args)} positional inputs given", expected=f"at most {len(self.inputs)}")
        carried = {pair.input for pair in self.state}
        order = sorted(self.inputs, key=lambda name: name in carried)  # what the session carries itself comes last
        return self.run({**dict(zip(order, args, strict=False)), **kwargs})

    def close(self) -> None:
        """Free ONNX Runtime's session, and write its profile if asked."""
        if self.runner is not None:
            self.runner.close()
            self.runner = None
        super().close()


def open_onnx(path: str | os.PathLike[str], **options: Any) -> OnnxFileSession:
    """Open an ONNX file in ONNX Runtime.

    Args:
        path: the file; its data file, if it has one, lies beside it.
        options: ``threads``, ``inter_threads``, ``provider``, ``optimization``, ``profile``.

    Raises:
        GraphlatheError: no such file, an unknown option, or ONNX Runtime refuses it.
    """
    from .compile import check_options

    file = Path(path)
    if not file.is_file():
        raise GraphlatheError(f"no file '{file}'")
    check_options("onnxruntime", Runner, {**options})
    return OnnxFileSession(file, **options)
