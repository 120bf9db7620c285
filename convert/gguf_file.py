# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""GGUF files: what they say about themselves, read from the header only, and whether it is sound.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The weights themselves are read by
transformers, which trusts the header: so nothing that this module hasn't checked is given to it.
"""

import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import MAX_DIMENSIONS, MAX_SIZE, ConversionError, is_inside
from .reading import MAX_JSON, MAX_LAYERS, check_inside, is_regular, one_line, open_regular


MAGIC = b"GGUF"
SUFFIX = ".gguf"
VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, TEXT, ARRAY = 6, 8, 9
MAX_ENTRIES = 4_000_000  # of an array: a vocabulary and its merges have a quarter of it
MAX_FIELDS = 10_000
MAX_TENSORS = 200_000
MAX_KEPT = 1_000  # entries of an array that are looked at
FLOATS = ("F32", "F16", "BF16", "F64")  # the types of tensors that aren't quantised


@dataclass(frozen=True)
class GgufTensor:
    """`shape` is in the order of torch; `kind` is the name of the format's type, such as `Q4_1`."""

    shape: tuple[int, ...]
    kind: str
    start: int
    size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """What a file says. Arrays with more than MAX_KEPT entries are in `fields` as their number of entries."""

    path: Path
    name: str
    fields: dict[str, object]
    tensors: dict[str, GgufTensor]

    def text(self, field: str) -> str | None:
        """A field that is a text, in one line, `None` if it is absent or of another kind."""
        value = self.fields.get(field)
        return one_line(value) if isinstance(value, str) and value.strip() else None

    @property
    def architecture(self) -> str:
        return self.fields["general.architecture"]

    def of_model(self, field: str):
        """A field of the architecture, such as `block_count`."""
        return self.fields.get(f"{self.architecture}.{field}")

    @property
    def quantization(self) -> str:
        """How the file calls its quantisation, such as `Q4_K_M`; otherwise the type that holds most numbers."""
        import gguf

        try:
            name = gguf.LlamaFileType(self.fields.get("general.file_type")).name
        except ValueError:
            name = "GUESSED"
        if name != "GUESSED":
            return name.removeprefix("MOSTLY_").removeprefix("ALL_")
        count = Counter()
        for tensor in self.tensors.values():
            count[tensor.kind] += tensor.numel
        return count.most_common(1)[0][0]

    @property
    def is_quantized(self) -> bool:
        return any(tensor.kind not in FLOATS for tensor in self.tensors.values())


def is_gguf(path: Path) -> bool:
    """Whether this is meant to be a GGUF file, by its name or its first bytes."""
    if not is_regular(path):
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def gguf_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SUFFIX and is_regular(path))


def check_name(name: str) -> str:
    """The relative name of a file in a folder or repository, which can't lie outside it."""
    if not is_inside(name) or name.startswith("~"):
        raise ConversionError(f"{name!r} is no name of a file inside SRC; give it as it is there, such as model.gguf.")
    return name


def in_folder(folder: Path, name: str) -> Path:
    """
    Raises:
        InputError: there is no such file in the folder, or it is a link that leaves it.
    """
    path = folder / check_name(name)
    if not is_regular(path):
        found = gguf_names(folder)
        there = f"; it has {', '.join(found[:5])}" if found else ""
        raise ConversionError(f"{folder} has no file {name}{there}.")
    check_inside(folder, path)
    return path


def read_gguf(path: Path, name: str) -> GgufFile:
    """Reads and checks the header of a GGUF file; none of its tensors is read.

    Args:
        name: of the file, as it can be published.

    Raises:
        InputError: the file is no sound GGUF file, or only a part of one.
    """
    types = _types()
    with open_regular(path) as file:
        try:
            reader = _Reader(file, os.fstat(file.fileno()).st_size)
            fields, tensors = _header(reader, types)
        except (ValueError, struct.error) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(
                f"{name} is damaged or incomplete ({error}); if it was downloaded or copied, get it again."
            ) from None
    found = GgufFile(path.resolve(), name, fields, tensors)
    _check_fields(found)
    return found


def _types() -> dict[int, tuple[str, int, int]]:
    """The name, the numbers of a block and the bytes of a block, by the number of a tensor's type."""
    try:
        import accelerate  # noqa: F401  which transformers asks for
        import gguf
    except ImportError as error:
        raise ConversionError(f"GGUF files need the package {error.name}: pip install 'attnres[gguf]'") from None
    return {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


class _Reader:
    """Reads values one after the other; ValueErrors instead of anything beyond the end of the file."""

    def __init__(self, file, size: int):
        self.file, self.size, self.position = file, size, 0

    def bytes(self, count: int) -> bytes:
        if count > min(self.size, MAX_JSON) - self.position:
            raise ValueError("it ends in its header")
        self.position += count
        return self.file.read(count)

    def number(self, code: str):
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int):
        if kind == FLOAT32:
            return _shortest(self.bytes(4))
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a field is of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if count > MAX_ENTRIES:
            raise ValueError(f"a field has {count:,} entries")
        if kind == TEXT:
            found = [self.text() if i < MAX_KEPT else self.bytes(self.number("Q")) for i in range(count)]
        elif kind in NUMBERS:
            width = struct.calcsize(f"<{NUMBERS[kind]}")
            found = struct.unpack(f"<{count}{NUMBERS[kind]}", self.bytes(width * count))
        else:
            raise ValueError(f"a field is an array of the type {kind}")
        return list(found) if count <= MAX_KEPT else count


def _shortest(data: bytes) -> float:
    """A float32 as the shortest decimal that means it, which is what it was made from: 1e-05, not 9.99999975e-06."""
    import numpy

    return float(str(numpy.frombuffer(data, "<f4")[0]))


def _header(reader: _Reader, types: dict[int, tuple[str, int, int]]) -> tuple[dict, dict[str, GgufTensor]]:
    if reader.size < 4 or reader.bytes(4) != MAGIC:
        raise ConversionError("this is no GGUF file: it doesn't begin with GGUF. Give a file that llama.cpp can load.")
    version = reader.number("I")
    if version not in VERSIONS:
        kind = "big-endian" if version in [v << 24 for v in VERSIONS] else f"of version {version}"
        raise ConversionError(f"this GGUF file is {kind}; those of version 2 and 3, little-endian, are read.")
    num_tensors, num_fields = reader.number("Q"), reader.number("Q")
    if num_fields > MAX_FIELDS or num_tensors > MAX_TENSORS:
        raise ValueError(f"it says that it has {num_fields:,} fields and {num_tensors:,} tensors")
    fields, infos = {}, {}
    for _ in range(num_fields):
        name, kind = reader.text(), reader.number("I")
        if name in fields:
            raise ValueError(f"its field {one_line(name, 60)} is there twice")
        fields[name] = reader.value(kind)
    for _ in range(num_tensors):
        name, num_dimensions = reader.text(), reader.number("I")
        if num_dimensions > MAX_DIMENSIONS:
            raise ValueError(f"{one_line(name, 60)} has {num_dimensions:,} dimensions")
        shape = tuple(reversed([reader.number("Q") for _ in range(num_dimensions)]))
        if name in infos:
            raise ValueError(f"its tensor {one_line(name, 60)} is there twice")
        infos[name] = (shape, reader.number("I"), reader.number("Q"))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    tensors = {name: _tensor(name, *info, start, types) for name, info in infos.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start < end or tensor.start + tensor.size > reader.size:
            what = "overlaps another tensor" if tensor.start < end else "is cut off"
            raise ValueError(f"{one_line(name, 60)} {what}")
        end = tensor.start + tensor.size
    return fields, tensors


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, types: dict) -> GgufTensor:
    if kind not in types:
        raise ConversionError(
            f"{one_line(name, 60)} is of type {kind}, which the installed gguf doesn't know: pip install -U gguf"
        )
    kind_name, numbers, size = types[kind]
    if math.prod(size or 1 for size in shape) >= MAX_SIZE or any(not n for n in shape) or shape[-1:] == ():
        raise ValueError(f"{one_line(name, 60)} has the shape {shape}")
    if shape[-1] % numbers:
        raise ValueError(f"{one_line(name, 60)} has rows of {shape[-1]:,} numbers, which {kind_name} can't hold")
    return GgufTensor(shape, kind_name, start + offset, math.prod(shape) // numbers * size)


def _check_fields(file: GgufFile) -> None:
    """Raises a ConversionError for what isn't a whole model, and for sizes that can't be those of one."""
    if (parts := file.fields.get("split.count")) and parts != 1:
        raise ConversionError(
            f"{file.name} is one of {parts} parts; join them first: llama-gguf-split --merge {file.name} WHOLE.gguf"
        )
    if not isinstance(file.fields.get("general.architecture"), str):
        raise ConversionError(f"{file.name} doesn't say its architecture (general.architecture).")
    if file.fields.get("general.type", "model") != "model":
        raise ConversionError(f"{file.name} is no model but {file.text('general.type') or 'something else'}.")
    if not file.tensors:
        raise ConversionError(f"{file.name} holds no tensors; give a file with a model's weights.")
    for name, value in file.fields.items():
        if name.startswith(f"{file.architecture}.") and isinstance(value, float) and not math.isfinite(value):
            raise ConversionError(f"{file.name}: {name} is {value}.")
    layers = file.of_model("block_count")
    if type(layers) is not int or not 0 < layers <= min(MAX_LAYERS, len(file.tensors)):
        raise ConversionError(f"{file.name} says that it has {layers} layers, and holds {len(file.tensors):,} tensors.")
