"""Ways to damage valid files."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from onnx import TensorProto, helper, numpy_helper

from .valid_models import NAMES

ABSURD = (0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
TEXTS = ("", "x", "w", "a b", "%0", "../x", "\x00", "é" * 3, "n" * 5000, "aten.relu", "Add", "N")


def damage(valid: Path, folder: Path, kind: str, seed: int) -> Path:
    """A damaged copy of one of the valid models; returns what is to be read."""
    rng = random.Random(f"{kind} {seed}")
    name = "control" if kind == "onnx_nested" else rng.choices(NAMES, weights=(3, 1))[0]
    shutil.copytree(valid / name, folder, dirs_exist_ok=True)
    return DAMAGES[kind](folder, rng)


def onnx_bytes(folder: Path, rng: random.Random) -> Path:
    """Bytes of the file changed, cut, added or repeated."""
    path = folder / "model.onnx"
    path.write_bytes(_changed(path.read_bytes(), rng))
    return path


def _changed(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 50))):
        if not made:
            break
        at = rng.randrange(len(made))
        match rng.randrange(6):
            case 0:
                made[at] = rng.randrange(256)
            case 1:
                made[at] ^= 1 << rng.randrange(8)
            case 2:
                del made[at : at + rng.randrange(1, 40)]
            case 3:
                made[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 4:
                made[at:at] = made[at : at + rng.randrange(1, 200)]
            case _ if rng.random() < 0.2:
                del made[at:]
            case _:
                made[at : at + 8] = b"\xff" * 8
    return bytes(made)


def onnx_fields(folder: Path, rng: random.Random) -> Path:
    """Any fields of the message, at any depth: other numbers, texts and enumerators; left out, repeated, swapped."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places: list[tuple[Any, FieldDescriptor]] = []
        _collect(model, places)
        if places:
            _mutate(*rng.choice(places), rng)
    path.write_bytes(model.SerializeToString())
    return path


def _collect(message: Any, places: list[tuple[Any, FieldDescriptor]]) -> None:
    for field, value in message.ListFields():
        places.append((message, field))
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if _repeated(field) else [value]:
                _collect(inner, places)


def _repeated(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated)


def _mutate(message: Any, field: FieldDescriptor, rng: random.Random) -> None:
    value = getattr(message, field.name)
    choice = rng.randrange(4)
    if choice == 0:
        message.ClearField(field.name)
    elif _repeated(field) and choice == 1 and len(value) > 1:
        items = list(value)
        rng.shuffle(items)
        message.ClearField(field.name)
        getattr(message, field.name).extend(items)
    elif _repeated(field) and choice == 2 and len(value):
        value.extend([value[rng.randrange(len(value))]] * rng.choice((1, 1, 3)))
    elif _repeated(field) and len(value):
        at = rng.randrange(len(value))
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            del value[at]
        else:
            value[at] = _other(field, value[at], rng)
    elif field.type != FieldDescriptor.TYPE_MESSAGE:
        setattr(message, field.name, _other(field, value, rng))


def _other(field: FieldDescriptor, value: Any, rng: random.Random) -> Any:
    """Another value of a field's type."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _changed(value, rng)
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice([number.number for number in field.enum_type.values])
    narrow = field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_UINT32)
    return rng.choice([n for n in ABSURD if not narrow or -(2**31) <= n < 2**31])


def onnx_names(folder: Path, rng: random.Random) -> Path:
    """Values under other values' names: cycles, values twice, values from nowhere, wrong types and shapes."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    names = sorted({name for node in model.graph.node for name in (*node.input, *node.output)})
    for _ in range(rng.choice((1, 2, 4))):
        node = rng.choice(model.graph.node)
        list_of = rng.choice((node.input, node.input, node.output))
        if list_of:
            list_of[rng.randrange(len(list_of))] = rng.choice((*names, "", "nowhere"))
        if rng.random() < 0.2:
            node.op_type = rng.choice(sorted({schema.name for schema in onnx.defs.get_all_schemas()}))
    path.write_bytes(model.SerializeToString())
    return path


def onnx_sizes(folder: Path, rng: random.Random) -> Path:
    """Absurd sizes: of stored tensors, inputs, shapes that are computed with, trip counts."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for place in sorted(
        rng.choices(range(4), k=rng.choice((1, 2))), reverse=True
    ):  # stored sizes last: numbers fit them
        match place:
            case 0:
                tensor = rng.choice(model.graph.initializer)
                at = rng.randrange(len(tensor.dims) or 1)
                if tensor.dims:
                    tensor.dims[at] = rng.choice(ABSURD)
                else:
                    tensor.dims.append(rng.choice(ABSURD))
            case 1:
                dim = rng.choice(model.graph.input[0].type.tensor_type.shape.dim)
                dim.dim_value = rng.choice(ABSURD)
            case _:
                tensor = rng.choice([t for t in model.graph.initializer if t.data_type == TensorProto.INT64])
                array = numpy_helper.to_array(tensor).copy()
                array.reshape(-1)[rng.randrange(array.size)] = rng.choice(ABSURD)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    path.write_bytes(model.SerializeToString())
    return path


def onnx_nested(folder: Path, rng: random.Random) -> Path:
    """Branches in branches, functions in functions, and functions that call themselves."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    depth = rng.choice((3, 40, 90, 300, 3000))
    match rng.randrange(5):
        case 0:  # by hand, since protobuf itself refuses to write it
            graph = b""
            for _ in range(depth):
                branch = _field(1, b"then_branch") + _field(6, graph) + b"\xa0\x01\x05"
                node = _field(1, b"yes") + _field(2, b"z") + _field(4, b"If") + _field(5, branch)
                graph = _field(1, node) + _field(12, _field(1, b"z"))
            path.write_bytes(model.SerializeToString() + _field(7, graph))
            return path
        case 1:
            for level in range(depth):
                inner = f"F{level - 1}" if level else "Twice"
                body = [helper.make_node(inner, ["p"], ["q"], domain="local")]
                opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
                model.functions.append(helper.make_function("local", f"F{level}", ["p"], ["q"], body, opsets))
            model.graph.node[1].op_type = f"F{depth - 1}"
        case 2:  # twice as many nodes at each level
            for level in range(min(depth, 90)):
                inner = f"F{level - 1}" if level else "Twice"
                body = [helper.make_node(inner, [a], [b], domain="local") for a, b in ("pr", "rq")]
                opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
                model.functions.append(helper.make_function("local", f"F{level}", ["p"], ["q"], body, opsets))
            model.graph.node[1].op_type = f"F{min(depth, 90) - 1}"
        case 3:  # loops in loops
            loop = next(node for node in model.graph.node if node.op_type == "Loop")
            for _ in range(min(depth, 40)):
                outer = copy.deepcopy(loop)
                outer.attribute[0].g.node[0].CopyFrom(loop)
                outer.attribute[0].g.node[0].input[2] = "c_in"
                outer.attribute[0].g.node[0].output[0] = "c_out"
                loop.CopyFrom(outer)
        case _:
            model.functions[0].node[0].op_type = "Twice"
            model.functions[0].node[0].domain = "local"
            del model.functions[0].node[0].input[1:]
    path.write_bytes(model.SerializeToString())
    return path


def _field(number: int, content: bytes) -> bytes:
    """A field of a Protocol Buffers message that holds bytes."""
    length, size = len(content), bytearray()
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + content


def onnx_external(folder: Path, rng: random.Random) -> Path:
    """External data elsewhere, behind links, beyond the file's end, with lengths that do not fit."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "w")
    (folder.parent / "secret.bin").write_bytes(bytes(4096))
    (folder / "link.bin").unlink(missing_ok=True)
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    places = (
        "../secret.bin",
        str(folder.parent / "secret.bin"),
        "link.bin",
        "/dev/zero",
        "/etc/passwd",
        ".",
        "",
        "missing",
    )
    values = {
        "location": (*places, "a/../../secret.bin", "model.onnx", "data.bin\x00"),
        "offset": ("-1", "10000", "x", "", "99999999999999999999", "1e3"),
        "length": ("0", "-48", "47", "49", "1000000000000", "y"),
    }
    for entry in tensor.external_data:
        if rng.random() < 0.5:
            entry.value = rng.choice(values[entry.key])
    if rng.random() < 0.2:
        tensor.external_data.add(key=rng.choice(("location", "offset", "checksum")), value=rng.choice(places))
    path.write_bytes(model.SerializeToString())
    return path


def saved_bytes(folder: Path, rng: random.Random) -> Path:
    """Bytes of one of a saved program's files."""
    path = rng.choice(sorted((folder / "saved").iterdir()))
    path.write_bytes(_changed(path.read_bytes(), rng))
    return folder / "saved"


def saved_json(folder: Path, rng: random.Random) -> Path:
    """Values in the manifest of a saved program."""
    path = folder / "saved" / "program.json"
    data = json.loads(path.read_text())
    for _ in range(rng.choice((1, 2))):
        places = list(_json_places(data))
        holder, key = rng.choice(places)
        others = (*ABSURD, *TEXTS, None, [], {}, [1], {"a": 1}, 1.5, float("nan"), True)
        holder[key] = rng.choice(others)
    path.write_text(json.dumps(data))
    return folder / "saved"


def _json_places(data: Any) -> Any:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield data, key
        if isinstance(value, (dict, list)):
            yield from _json_places(value)


def saved_text(folder: Path, rng: random.Random) -> Path:
    """Lines and words of the text form."""
    path = folder / "saved" / "graph.txt"
    lines = path.read_text().splitlines()
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(lines))
        words = lines[at].split(" ")
        match rng.randrange(6):
            case 0:
                lines.insert(rng.randrange(len(lines)), lines.pop(at))
            case 1:
                lines.insert(at, lines[at])
            case 2:
                words[rng.randrange(len(words))] = str(rng.choice((*ABSURD, 10**40, 1e400, "nan")))
            case 3:
                words[rng.randrange(len(words))] = rng.choice(
                    (*TEXTS, "[" * 2000, "(" * 2000 + ")" * 2000, "%1", "f32[B]")
                )
            case 4:
                other = rng.choice(lines).split(" ")
                words[rng.randrange(len(words))] = rng.choice(other)
            case _:
                del words[rng.randrange(len(words))]
        if at < len(lines):
            lines[at] = " ".join(words)
    path.write_text("\n".join(lines) + "\n")
    return folder / "saved"


DAMAGES: dict[str, Callable[[Path, random.Random], Path]] = {
    function.__name__: function
    for function in (
        onnx_bytes, onnx_fields, onnx_names, onnx_sizes, onnx_nested, onnx_external,
        saved_bytes, saved_json, saved_text,
    )
}  # fmt: skip
