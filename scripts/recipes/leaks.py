# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What must not be published: secrets, and files that run code when they are loaded.

Secrets are found by the form that their makers gave them, in plain bytes, in UTF-16, as escapes of JSON, in base64 and
in the compressed texts of a PNG. A secret without a form, such as a password, is not found.
"""

import binascii
import io
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from attnres_convert.checkpoint import MAX_HEADER_SIZE
from attnres_convert.reading import one_line, open_regular


HUB_TOKEN = "a Hub token"
# Kind: bytes of which one must be there, which is looked up fast, and the whole form, which no text has by chance
SECRETS = {
    HUB_TOKEN: ((b"hf_",), rb"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{30,}"),
    "a Hub token of an organisation": ((b"api_org_",), rb"api_org_[A-Za-z0-9]{30,}"),
    "an AWS key": ((b"AKIA", b"ASIA"), rb"(?<![A-Za-z0-9])A[KS]IA[A-Z2-7]{16}(?![A-Za-z0-9])"),
    "a GitHub token": (
        (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
        rb"gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,}",
    ),
    "a GitLab token": ((b"glpat-",), rb"glpat-[A-Za-z0-9_-]{20,}"),
    "an API key": (
        (b"sk-",),
        rb"(?<![A-Za-z0-9])sk-(?:ant-|proj-|svcacct-|or-v1-)?[A-Za-z0-9]{20}[A-Za-z0-9_-]{20,}",
    ),
    "a Slack token": ((b"xox",), rb"xox[abprs]-[0-9]{10,}-[0-9A-Za-z-]{20,}"),
    "a private key": (
        (b"PRIVATE KEY",),
        rb"-----BEGIN [A-Z ]{0,20}PRIVATE KEY[A-Z ]{0,10}-----(?:\s|\\[nr])*"
        rb"(?:[\w-]+: [^\r\n]{1,100}(?:\s|\\[nr])+){0,4}[A-Za-z0-9+/]{40}",
    ),
}
SECRETS = {kind: (marks, re.compile(pattern)) for kind, (marks, pattern) in SECRETS.items()}
ESCAPE = re.compile(rb"\\u00([0-7][0-9A-Fa-f])")
BASE64 = re.compile(rb"(?:[A-Za-z0-9+/_-]{60,76}(?:\r?\n|\\n))*[A-Za-z0-9+/_-]{40,}")
CHUNK, OVERLAP = 1 << 24, 1 << 16  # bytes; no secret is longer than the second
MAX_TEXT = 1 << 24  # bytes of a compressed text of a PNG
MAX_KEYWORDS = 1000  # bytes before it
SHORTEST = 8  # bytes of a token in use that has no form

ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c")
ARCHIVES += (b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"Rar!\x1a\x07", b"\x5d\0\0", b"\x93NUMPY", b"\x89HDF\r\n")
PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
CALL = re.compile(r" *\d+: \S+ +(REDUCE|INST|OBJ|NEWOBJ|NEWOBJ_EX|BUILD)\b")  # a step of a pickle that runs something
MAX_STEPS = 1_000_000  # characters about the steps of a pickle; what is one so far, is one


def secret_in(content: bytes, token: str | None = None) -> str | None:
    """What secret is in some bytes, in any of their readings; `token` is one that is known."""
    for form in readings(content):
        if token and len(token) >= SHORTEST and token.encode("utf-8", "surrogateescape") in form:
            return HUB_TOKEN
        for kind, (marks, pattern) in SECRETS.items():
            if any(mark in form for mark in marks) and pattern.search(form):
                return kind
    return None


def readings(content: bytes) -> Iterator[bytes]:
    """The bytes themselves, and the texts that they may stand for."""
    yield content
    if b"\0" in content:
        yield content.replace(b"\0", b"")  # UTF-16 of either order, UTF-32
    if b"\\u00" in content:
        yield ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), content)
    for match in BASE64.finditer(content):
        run = re.sub(rb"\r?\n|\\n", b"", match[0]).translate(bytes.maketrans(b"-_", b"+/"))
        for start in range(4):
            decoded = binascii.a2b_base64(run[start : start + (len(run) - start) // 4 * 4])
            yield decoded
            if b"\0" in decoded:
                yield decoded.replace(b"\0", b"")


def secret_in_text(text: str) -> str | None:
    return secret_in(text.encode("utf-8", "surrogateescape"))


def printable(text: str) -> str:
    """A name or text in one line in which no secret is left."""
    content = str(text).encode("utf-8", "backslashreplace")
    for _, pattern in SECRETS.values():
        content = pattern.sub(b"...", content)
    text = one_line(content.decode())
    return text if secret_in_text(text) is None else "..."


def secret_in_file(path: Path, token: str | None = None) -> str | None:
    """What secret a file holds. Of weights, the header is read in all ways, the numbers for Hub tokens only."""
    with open_regular(path) as file:
        if path.suffix == ".safetensors":
            header = int.from_bytes(file.read(8), "little")
            found, pattern = secret_in(file.read(min(header, MAX_HEADER_SIZE)), token), SECRETS[HUB_TOKEN][1]
            return found or next((HUB_TOKEN for part in _chunks(file) if pattern.search(part)), None)
        for part in _chunks(file):
            if found := secret_in(part, token):
                return found
        file.seek(0)
        return next((found for text in _png_texts(file) if (found := secret_in(text, token))), None)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while part := file.read(CHUNK):
        yield rest + part
        rest = part[-OVERLAP:]


def _png_texts(file: BinaryIO) -> Iterator[bytes]:
    """The compressed texts of a PNG; nothing of another file."""
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return
    while len(start := file.read(8)) == 8:
        size, kind = int.from_bytes(start[:4], "big"), start[4:]
        if kind not in (b"zTXt", b"iTXt", b"iCCP"):
            file.seek(size + 4, 1)
            continue
        content = file.read(min(size + 4, MAX_TEXT))
        for begin in range(min(len(content) - 1, MAX_KEYWORDS)):
            if content[begin] & 15 == 8 and int.from_bytes(content[begin : begin + 2], "big") % 31 == 0:  # of zlib
                try:
                    yield zlib.decompressobj().decompress(content[begin:], MAX_TEXT)
                    break
                except zlib.error:
                    continue


def runs_code(path: Path) -> bool:
    """Whether a file that isn't safetensors is a pickle, or an archive in which there may be one."""
    with open_regular(path) as file:
        start = file.read(300)
        if start.startswith(ARCHIVES + PICKLES) or start[257:262] == b"ustar" or zipfile.is_zipfile(file):
            return True
        file.seek(0)
        return _is_old_pickle(file)


class _Steps(io.StringIO):
    """What pickletools says of a pickle, as far as it is looked at."""

    def write(self, text: str) -> int:
        if self.tell() > MAX_STEPS:
            raise EOFError
        return super().write(text)


def _is_old_pickle(file: BinaryIO) -> bool:
    """Whether a file can be read as a pickle of protocol 0 or 1, which have no mark at their beginning."""
    steps = _Steps()
    try:
        pickletools.dis(file, steps)  # checks too that each step has on the stack what it needs
        complete = not file.read().strip()
    except EOFError:
        return True
    except Exception:  # of many kinds: no pickle, at least from here on
        complete = False
    lines = steps.getvalue().splitlines()
    # a text such as "N." is a pickle as well, but no text calls something
    return complete and len(lines) > 4 or any(CALL.match(line) for line in lines[:-1])
