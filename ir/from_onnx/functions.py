"""Operators that ONNX itself defines in terms of others: their definitions, from the operator's schema.

An operator without a function of ours is imported as its definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .model_file import DTYPES

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def _schema(node: Any, opset: int) -> Any:
    import onnx

    try:
        return onnx.defs.get_schema(node.op_type, opset, node.domain if node.domain != "ai.onnx" else "")
    except onnx.defs.SchemaError:
        return None


def has_body(node: Any, opset: int) -> bool:
    """Whether the operator is defined in terms of others."""
    schema = _schema(node, opset)
    return schema is not None and (schema.has_function or schema.has_context_dependent_function)


Described = tuple[torch.dtype, Sequence[Any]] | None
"""An input's element type and shape, symbolic sizes included; None for one that is left out."""


def _type(value: Described) -> Any:
    import onnx

    if value is None:
        return onnx.TypeProto()
    sizes = [size if isinstance(size, int) else None for size in value[1]]
    return onnx.helper.make_tensor_type_proto(_CODES[value[0]], sizes)


def body_of(node: Any, opset: int, inputs: Sequence[Described]) -> Any:
    """The definition as a ``FunctionProto``, its attributes filled in; None when there is none for these types.

    Args:
        node: the call.
        opset: the opset version of the operator's domain.
        inputs: what is known of each input.
    """
    import onnx

    schema = _schema(node, opset)
    if schema is None:
        return None
    function = onnx.FunctionProto()
    if schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
        if not versions:
            return None
        code = schema.get_context_dependent_function_with_opset_version(
            versions[-1], node.SerializeToString(), [_type(each).SerializeToString() for each in inputs]
        )
        if not code:
            return None
        function.ParseFromString(code)
    elif schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= opset]
        code = schema.get_function_with_opset_version(versions[-1]) if versions else None
        if not code:
            return None
        function.ParseFromString(code)
    else:
        return None
    _fill_attributes(function.node, node, schema)
    return function


def _fill_attributes(nodes: Any, call: Any, schema: Any) -> None:
    """Replace references to the call's attributes by their values, or their defaults, or nothing."""
    given = {attribute.name: attribute for attribute in call.attribute}
    for inner in nodes:
        kept = []
        for attribute in inner.attribute:
            if not attribute.ref_attr_name:
                _fill_attributes(attribute.g.node, call, schema)
                kept.append(attribute)
                continue
            source = given.get(attribute.ref_attr_name)
            if source is None and attribute.ref_attr_name in schema.attributes:
                default = schema.attributes[attribute.ref_attr_name].default_value
                source = default if default.name else None
            if source is not None:
                filled = type(attribute)()
                filled.CopyFrom(source)
                filled.name = attribute.name
                kept.append(filled)
        del inner.attribute[:]
        inner.attribute.extend(kept)
