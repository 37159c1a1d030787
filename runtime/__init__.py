"""Run programs: `compile` chooses a back end, `open_onnx` opens a file."""
