# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Real text for gpu_evidence.py, made of what is installed: the source files of Python and of its packages.

A folder of it holds `tokens.xz`, the tokens of held-out documents and then those to train on as 16-bit numbers,
`tokenizer.json`, and `data.json` with counts, hashes, and the packages that the text is of.
"""

import hashlib
import json
import lzma
import platform
import sys
import sysconfig
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path

import numpy as np


TOKENS_FILE, TOKENIZER_FILE, DATA_FILE = "tokens.xz", "tokenizer.json", "data.json"
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE, HELD_OUT_TOKENS, LARGEST_HELD_OUT_SHARE = 0.01, 550_000, 0.1
LARGEST_FILE = 256 * 1024  # larger ones are mostly tables
TOKENIZER_CHARACTERS = 30_000_000
LICENCE = (
    "The text is the source of the packages listed, under their licences. Tokens can be turned back into it, so they "
    "are to be shared only as those licences allow."
)


class EvidenceError(ValueError):
    """What was asked for can't be done; the message is one line that says why and what to do."""


def licence(metadata) -> str:
    """What a package says of its licence, in one line."""
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    stated = metadata.get("License-Expression") or " and ".join(classifiers) or metadata.get("License") or "not stated"
    return stated.strip().splitlines()[0][:80]


def source_files(roots: list[Path]) -> dict[str, tuple[Path, str]]:
    """File and package by path relative to its root; of several versions of a package's file, that of the first root.

    So no file has another version of itself on the other side of the split.
    """
    found = {}
    for root in roots:
        owners = {}
        for package in distributions(path=[str(root)]):
            name = f"{package.metadata['Name']} {package.version}"
            owners |= {str(file): (name, licence(package.metadata)) for file in package.files or []}
        for file in sorted(root.rglob("*.py")):
            path = file.relative_to(root)
            if not path.name.startswith(("__editable__", "_sysconfigdata")):  # these name folders of the machine
                found.setdefault(str(path), (file, owners.get(str(path), ("not known", "not stated"))))
    library = Path(sysconfig.get_paths()["stdlib"])
    owner = (f"Python {platform.python_version()}", "Python Software Foundation License")
    for file in sorted(library.rglob("*.py")):
        path = file.relative_to(library)
        if not {"site-packages", "dist-packages"} & set(path.parts) and not path.name.startswith("_sysconfigdata"):
            found.setdefault(f"stdlib/{path}", (file, owner))
    return found


def documents(roots: list[Path]) -> list[tuple[str, str, tuple[str, str]]]:
    """Hash, text and package of each distinct file, by hash."""
    by_hash = {}
    for file, owner in source_files(roots).values():
        content = file.read_bytes()
        if 64 <= len(content) <= LARGEST_FILE:
            try:
                by_hash.setdefault(hashlib.sha256(content).hexdigest(), (content.decode(), owner))
            except UnicodeDecodeError:
                continue
    return [(key, *by_hash[key]) for key in sorted(by_hash)]


def train_tokenizer(texts: list[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(folder: Path, roots: list[Path], vocab_size: int, max_tokens: int) -> dict:
    """Writes the files of `folder`.

    Documents are in the order of their hashes. The first ones are held out: a hundredth of the tokens, and at least
    550,000 as long as this is less than a tenth. The tokenizer is trained on the last ones.

    Args:
        roots: folders of installed packages.
        max_tokens: tokens to train on at most.
    """
    import tokenizers

    found = documents(roots)
    sample, size = [], 0
    for _, text, _ in reversed(found[len(found) // 10 :]):
        if size < TOKENIZER_CHARACTERS:
            sample.append(text)
            size += len(text)
    print(f"{len(found):,} files; a tokenizer of {size:,} characters", file=sys.stderr, flush=True)
    tokenizer = train_tokenizer(sample, vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.encode_special_tokens = True  # as text, where a file has them
    tokens, total = [], 0
    for first in range(0, len(found), 256):
        for encoding in tokenizer.encode_batch([text for _, text, _ in found[first : first + 256]]):
            tokens.append(np.array([*encoding.ids, end], np.uint16))
            total += len(tokens[-1])
        if total > max_tokens + HELD_OUT_TOKENS:
            break
    ends = np.cumsum([len(document) for document in tokens])
    needed = min(max(HELD_OUT_SHARE * ends[-1], HELD_OUT_TOKENS), LARGEST_HELD_OUT_SHARE * ends[-1])
    num_held_out = int(np.searchsorted(ends, needed)) + 1
    held_out_tokens = int(ends[num_held_out - 1])
    stream = np.concatenate(tokens)[: held_out_tokens + max_tokens]
    used = found[: int(np.searchsorted(ends, len(stream))) + 1]
    print(f"{len(stream):,} tokens; compressing them", file=sys.stderr, flush=True)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}]  # for numbers of two bytes
    compressed = lzma.compress(stream.astype("<u2").tobytes(), filters=filters)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENS_FILE).write_bytes(compressed)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    data = {
        "vocab_size": tokenizer.get_vocab_size(),
        "held_out_tokens": held_out_tokens,
        "train_tokens": len(stream) - held_out_tokens,
        "held_out_documents": num_held_out,
        "train_documents": len(used) - num_held_out,
        "characters": sum(len(text) for _, text, _ in used),
        "tokens_sha256": hashlib.sha256(stream.astype("<u2").tobytes()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256((folder / TOKENIZER_FILE).read_bytes()).hexdigest(),
        "bytes": len(compressed),
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
        "licence": LICENCE,
        "packages": [
            {"package": package, "licence": stated, "files": files}
            for (package, stated), files in sorted(Counter(owner for _, _, owner in used).items())
        ],
    }
    (folder / DATA_FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return data


def read_data(folder: Path) -> dict:
    """What `data.json` says.

    Raises:
        EvidenceError: there is none.
    """
    if not (folder / DATA_FILE).exists():
        raise EvidenceError(f"{folder} holds no {DATA_FILE}; make it with --prepare --data {folder}.")
    return json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))


def unpack(folder: Path, data: dict, file: Path):
    """Writes the tokens of `folder` to `file`, as 16-bit numbers.

    Raises:
        EvidenceError: they aren't those that `data` is about.
    """
    content = lzma.decompress((folder / TOKENS_FILE).read_bytes())
    if hashlib.sha256(content).hexdigest() != data["tokens_sha256"]:
        raise EvidenceError(f"{folder / TOKENS_FILE} isn't what {DATA_FILE} says; make both anew with --prepare.")
    file.write_bytes(content)
