"""Export to ONNX, on PyTorch's own operator translations: see `export`."""

from .export import DEFAULT_OPSET, OPSETS, ExportResult, check_graph, export_onnx, to_onnx_model
from .write import to_bytes, write_model

__all__ = [
    "DEFAULT_OPSET",
    "OPSETS",
    "ExportResult",
    "check_graph",
    "export_onnx",
    "to_bytes",
    "to_onnx_model",
    "write_model",
]
