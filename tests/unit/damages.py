"""Files damaged in every way that tests of readers go through: cut, flipped, of wrong types, hostile."""

import json
import os
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: What is put in the place of each value of a JSON file: other types, numbers out of range, much too long or deep.
OTHERS: tuple[Any, ...] = (
    *(None, True, -1, 0.375, 10**30, 1e308, float("nan"), float("inf"), "", "../x", "a\x00b\x1b[2J", "x" * 10**6),
    *([], {}, [[]], [None], {"": {}}),
)


def cut_and_flipped(content: bytes, seed: int = 0, flips: int = 12) -> Iterator[tuple[str, bytes]]:
    """A file that is empty, ends too early in several places, goes on too long, or has a byte that is another."""
    for share in (0, 1 / 50, 1 / 4, 1 / 2, 9 / 10, 1):
        end = min(int(len(content) * share), len(content) - 2)
        yield f"cut after {end} bytes", content[:end]
    yield "goes on", content + b"\0" * 100
    draw = random.Random(seed)
    for _ in range(flips):
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        yield f"bit {bit} of byte {at}", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    yield "zeros", bytes(len(content))
    yield "noise", draw.randbytes(len(content))


def of_other_types(record: Any) -> Iterator[tuple[str, str]]:
    """A JSON record with each of its values replaced by each of :data:`OTHERS`, removed, or given twice."""
    for path in places(record):
        for number, other in enumerate(OTHERS):
            changed = json.loads(json.dumps(record))
            *above, last = path
            inner = changed
            for step in above:
                inner = inner[step]
            inner[last] = other
            yield f"{'.'.join(map(str, path))} as {str(other)[:20]!r} ({number})", json.dumps(changed)
        if isinstance(path[-1], str):
            changed = json.loads(json.dumps(record))
            inner = changed
            for step in path[:-1]:
                inner = inner[step]
            del inner[path[-1]]
            yield f"no {'.'.join(map(str, path))}", json.dumps(changed)
    for text in ("[" * 10**5, '{"a":' * 10**5, "[" * 10**5 + "]" * 10**5, "null", "3", '"x"', "{} {}", "1e999"):
        yield f"all of it {text[:10]!r}", text
    whole = json.dumps(record)
    key = json.dumps(next(iter(record)))
    yield "a key twice", whole.replace("{", "{" + key + ": 3, ", 1)
    yield "not UTF-8", whole[:-1] + '\ud800"}'


def places(record: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value of a JSON record."""
    steps = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    for step, value in steps:
        yield (*above, step)
        yield from places(value, (*above, step))


def headers(path: Path) -> Iterator[tuple[str, bytes]]:
    """A safetensors file whose header lies."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    data = content[8 + length :]

    def made(header: Any, claimed: int | None = None) -> bytes:
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data

    for claimed in (0, 1, length - 1, length + 1, 10**6, 2**31, 2**40, 2**63 - 1, 2**64 - 1):
        yield f"a header of {claimed} bytes", made(header, claimed)
    name = next(key for key in header if key != "__metadata__")
    start, end = header[name]["data_offsets"]
    changes: dict[str, dict[str, Any]] = {
        "dtype unknown": {"dtype": "F7"},
        "dtype of another size": {"dtype": "F64"},
        "dtype that is no text": {"dtype": 3},
        "dtype that torch may not know": {"dtype": "F8_E8M0", "shape": [end - start]},
        "negative shape": {"shape": [-1, -1]},
        "huge shape": {"shape": [2**62, 2**62]},
        "huge empty shape": {"shape": [2**40, 0], "data_offsets": [0, 0]},
        "a shape of a thousand": {"shape": [1] * 1000 + header[name]["shape"]},
        "no shape": {"shape": None},
        "offsets that overlap": {"data_offsets": [0, end - start + 4]},
        "offsets backwards": {"data_offsets": [end, start]},
        "negative offsets": {"data_offsets": [-4, end]},
        "offsets beyond": {"data_offsets": [10**15, 10**15 + end - start]},
        "no offsets": {"data_offsets": []},
    }
    for what, change in changes.items():
        yield what, made({**header, name: {**header[name], **change}})
    yield "a tensor's name of a megabyte", made({**header, "a." * 500_000: header[name]})
    many = {f"{number}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(50_000)}
    yield "very many tensors", made({**many, **header})
    metadata: Any
    for metadata in (3, [], {"a": 3}, {"a": {"b": "c"}}):
        yield f"metadata {metadata}", made({**header, "__metadata__": metadata})
    yield "no object", made("[]")
    yield "nested deeply", made("[" * 10**5)


def archives(path: Path, large: int = 2**28) -> Iterator[tuple[str, Path]]:
    """A torch file as an archive that is not what torch writes."""
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    bomb = path.with_name(f"bomb{path.suffix}")
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, content in parts.items():
            archive.writestr(part, bytes(large) if part.endswith("/data/0") else content)
    yield "compressed", bomb
    lying = path.with_name(f"lying{path.suffix}")
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    sizes = struct.pack("<II", large, large)
    lying.write_bytes(content[: directory + 20] + sizes + content[directory + 28 :])
    yield "a part that claims more than there is", lying
    other = path.with_name(f"other{path.suffix}")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("x/data.pkl", bytes(17 * 2**20))
    yield "a large pickle", other


def special_files(folder: Path, suffix: str) -> Iterator[tuple[str, Path]]:
    """What is no file, or never ends."""
    pipe, circle, device, inside = (folder / f"{name}{suffix}" for name in ("pipe", "circle", "device", "folder"))
    os.mkfifo(pipe)
    yield "a pipe", pipe
    circle.symlink_to(circle)
    yield "links in a circle", circle
    device.symlink_to("/dev/zero")
    yield "a device", device
    inside.mkdir()
    yield "a folder", inside
    yield "nothing", folder / f"nothing{suffix}"
    yield "a path that is too long", folder / ("x" * 300 + suffix)
