# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Text for training: loaded with `datasets`, split by the hash of each document, tokenised, packed without padding.

A document is a row of a data set, or a file, paragraph or line of text. Documents follow one another with an end of
text between them, and are cut into sequences of equal length. Position ids restart with each document: from this, and
because no attention mask is given, transformers keeps attention within a document (see also packing.py).
"""

import gzip
import hashlib
import itertools
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import iglob
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from attnres_convert import InputError
from attnres_convert.reading import first_line, is_panic, is_regular, time_limit
from attnres_convert.verification import available_memory
from datasets.exceptions import DatasetNotFoundError
from datasets.utils.extract import Extractor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .defaults import SOURCES, STDLIB


BUILDERS = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".json"), "json"),
    ".parquet": "parquet",
}
PACKAGE_FOLDERS = ("site-packages", "dist-packages")
TOKENIZER_CHARACTERS = 100_000_000  # more text hardly changes a vocabulary
MAX_FILES = 100_000  # to look at
MAX_SECONDS = 120  # to look for them
MAX_DOCUMENT = 10_000_000  # characters; a tokenizer needs some 200 bytes of memory for each
CHARACTERS_AT_ONCE = 2_000_000  # to tokenise
MAX_BYTES = 4 * MAX_DOCUMENT
PIECE, LOOKED_AT = 2**20, 2**26  # bytes
PACKING_VERSION = 1  # part of the cache's key, to be raised when `tokenize` changes
TOKEN_FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "num_tokens": datasets.Value("int64"),
        "document": datasets.Value("int64"),
        "hash": datasets.Value("int64"),
    }
)


def python_files(root: Path, *skipped: str) -> list[Path]:
    """The source files under a folder, without unit tests."""
    skip = {"test", "tests", *skipped}
    return sorted(file for file in root.rglob("*.py") if skip.isdisjoint(file.parts[len(root.parts) :]))


def stdlib_files() -> list[Path]:
    """The source files of Python's standard library, without installed packages."""
    return python_files(Path(sysconfig.get_paths()["stdlib"]), *PACKAGE_FOLDERS, "idle_test")


def package_files() -> list[Path]:
    """Those of the packages that Python finds, in an order that a slice of is like the whole."""
    roots = [Path(path) for path in dict.fromkeys(sys.path) if Path(path).name in PACKAGE_FOLDERS]
    names = {file: file.relative_to(root).as_posix() for root in roots for file in python_files(root)}
    return sorted(names, key=lambda file: (text_hash(names[file]), file))


def builder_of(file: Path) -> str | None:
    """The builder of `datasets` that reads a file; it decompresses by itself."""
    return BUILDERS.get(Path(file.name.lower().removesuffix(".gz")).suffix)


def few_enough(paths: Iterable, name) -> Iterator:
    """The paths that are found somewhere.

    Raises:
        InputError: there are too many, as in a whole file system.
    """
    for number, path in enumerate(paths):
        if number == MAX_FILES:
            raise InputError(f"{name} holds more than {MAX_FILES:,} files; name a folder or pattern with fewer.")
        yield path


def matching(pattern: str) -> list[str]:
    """The paths that a pattern stands for; itself if it stands for none."""
    with time_limit(MAX_SECONDS, f"{pattern} takes too long to look for"):
        return sorted(few_enough(iglob(pattern, recursive=True), pattern)) or [pattern]


def check_file(file: Path, separator: bytes | None, most: int, room: int) -> int:
    """Whether the memory has room for each document of a file, and the disk for what it unpacks to, in bytes.

    Args:
        separator: of documents; without one, the file is read whole.
        most: bytes of a document.
        room: bytes on the disk.

    Raises:
        InputError: one hasn't.
    """
    kind = Extractor.infer_extractor_format(str(file))
    if kind not in (None, "gzip"):
        raise InputError(f"{file} is an archive ({kind}), which isn't unpacked; give the files in it.")
    size = since = 0  # bytes in all, and since the last separator
    end = b""
    with gzip.open(file) if kind else open(file, "rb") as opened:
        # what a plain file has is known from its size, and what its documents are like from its beginning
        while (kind or size < LOOKED_AT) and (piece := opened.read(PIECE)):
            size += len(piece)
            text = end + piece.replace(b"\r", b"")
            at = text.rfind(separator) if separator else -1
            since = since + len(piece) if at < 0 else len(text) - at
            end = text[-1:]
            if since > most:
                what = {None: "is", b"\n": "has a line", b"\n\n": "has a paragraph"}[separator]
                raise InputError(f"{file} {what} of more than {most / 1e6:,.0f} MB; split it, or change --sample-by.")
            if kind and size > room:
                raise InputError(f"{file} unpacks to more than the {room / 1e9:,.1f} GB that there is room for.")
    return size if kind else 0


def check_files(files: list[Path], builder: str, sample_by: str | None, streaming: bool):
    """[`check_file`] for all files of a data set."""
    cache = Path(datasets.config.HF_DATASETS_CACHE).absolute()
    folder = next(path for path in (cache, *cache.parents) if path.exists())
    room = sys.maxsize if streaming else shutil.disk_usage(folder).free // 3  # unpacked, as rows, as tokens
    for file in files if builder != "parquet" else ():
        separator, most = {"document": None, "paragraph": b"\n\n"}.get(sample_by, b"\n"), MAX_BYTES
        if builder == "json" and file.name.lower().removesuffix(".gz").endswith(".json"):  # may be one list
            separator, most = None, (available_memory() or 8 * MAX_BYTES) // 8
        if separator is None and file.stat().st_size > most:
            raise InputError(f"{file} is of more than {most / 1e6:,.0f} MB, which are read at once; split it.")
        room -= check_file(file, separator, most, room)


def local_files(paths: list[Path]) -> tuple[str, list[Path]]:
    """The builder of `datasets` that reads `paths`, files or folders, and the files; hidden ones are left out."""
    files = []
    for path in paths:
        if path.is_dir():
            with time_limit(MAX_SECONDS, f"{path} takes too long to look through"):
                inside = few_enough(path.rglob("*"), path)
                known = (file for file in inside if builder_of(file) and file.is_file())
                files += sorted(f for f in known if not any(p.startswith(".") for p in f.relative_to(path).parts))
        elif not is_regular(path):
            raise InputError(f"{path} is no regular file.")
        else:
            files.append(path)
    unknown = [file for file in files if builder_of(file) is None]
    if unknown:
        raise InputError(f"{unknown[0]}: unknown kind of file; known are {', '.join(BUILDERS)}, also with .gz.")
    if not files:
        raise InputError(f"{paths[0]} holds no file to train on; known kinds are {', '.join(BUILDERS)}, also with .gz.")
    if not any(file.stat().st_size for file in files):
        raise InputError(f"{paths[0]} is empty.")
    kinds = {builder_of(file): file for file in files}
    if len(kinds) > 1:
        raise InputError(f"text, JSON and Parquet can't be mixed: {', '.join(map(str, kinds.values()))}.")
    return next(iter(kinds)), files


# is said of files without a row
NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0", "at least one example when writing data")


def reading_error(name: str, error: BaseException) -> InputError:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration) or any(words in str(error) for words in NO_ROWS):
        return InputError(f"{name} is empty.")
    if isinstance(error, UnicodeDecodeError):
        return InputError(f"{name} is not text: {error}.")
    if names := re.match(r"Config name is missing.*?\[(.*?)\]", str(error), re.DOTALL):
        return InputError(f"{name} has several configurations; choose one of {names[1]}.")
    hint = "; log in with `hf auth login` if it is private" if type(error) is DatasetNotFoundError else ""
    return InputError(f"{name} can't be read: {first_line(error)}{hint}.")


@contextmanager
def reading(name: str):
    """What goes wrong with the data `name` in the block, in one line. Some of it shows only when rows are read: JSON
    may hold bytes that are no text."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # of many kinds, some of what decompresses
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise reading_error(name, error) from None


def data_name(data: list[str]) -> str:
    name = " ".join(data)
    return name if len(name) <= 100 else f"{data[0]} and {len(data) - 1} more"


def load_rows(
    data: list[str],
    columns: list[str],
    config: str | None = None,
    split: str = "train",
    sample_by: str | None = None,
    streaming: bool = False,
    option: str = "--column",
) -> tuple[datasets.Dataset | datasets.IterableDataset, dict]:
    """The rows of a data set, with `columns` alone, and the first of them.

    Args:
        columns: none for all of them.
        option: with which a user chooses columns, for the message. The others are those of [`load_documents`].

    Raises:
        InputError: it can't be read, is empty or lacks a column.
    """
    name = data_name(data)
    data = [path for pattern in data for path in matching(pattern)]
    options = {"split": split, "streaming": streaming}
    paths = [Path(path) for path in data]
    with reading(name):
        if len(data) == 1 and data[0] in SOURCES:
            files = list(map(str, stdlib_files() if data == [STDLIB] else package_files()))
            rows = datasets.load_dataset(
                "text", data_files=files, sample_by="document", encoding_errors="replace", **options
            )
        elif own := [name for name in data if name in SOURCES and not Path(name).exists()]:
            raise InputError(f"{own[0]} goes with no other data; leave out {own[0]} or the others.")
        elif any(path.exists() for path in paths):
            missing = [path for path in paths if not path.exists()]
            if missing:
                raise InputError(f"{missing[0]} doesn't exist.")
            builder, files = local_files(paths)
            if builder == "text":
                options["encoding"] = "utf-8-sig"  # leaves out a byte order mark
                options["sample_by"] = sample_by or ("document" if len(files) > 1 else "paragraph")
            check_files(files, builder, options.get("sample_by"), streaming)
            rows = datasets.load_dataset(builder, data_files=list(map(str, files)), **options)
        elif len(data) > 1 or builder_of(paths[0]) or data[0].startswith((".", "/")):
            raise InputError(f"{data[0]} doesn't exist.")
        else:
            rows = datasets.load_dataset(data[0], config, **options)
        first = next(iter(rows), {})
    if not first:
        raise InputError(f"{name} is empty.")
    for column in columns:
        if column not in first:
            raise InputError(f"{name} has no column {column!r}; choose with {option} from: {', '.join(first)}.")
    return rows.select_columns(columns) if columns else rows, first


def load_documents(
    data: list[str],
    column: str = "text",
    config: str | None = None,
    split: str = "train",
    sample_by: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """The documents, in one column `column` of strings.

    Args:
        data: `["stdlib"]`, `["site-packages"]`, files or folders of one kind, or `[id]` of a data set on the Hub.
        column: which column holds the text.
        config: configuration of a data set on the Hub.
        split: which split, also with a slice as in `train[:1%]`.
        sample_by: what a document is in text files: `"document"` (a file), `"paragraph"` or `"line"`. By default
            files if there are several, otherwise paragraphs.
        streaming: read as training goes on instead of preparing all of it first.

    Raises:
        InputError: it can't be read, is empty or has no such column.
    """
    documents, first = load_rows(data, [column], config, split, sample_by, streaming)
    if not isinstance(first[column], (str, type(None))):
        raise InputError(
            f"column {column!r} of {data_name(data)} doesn't hold text; its first row is {first[column]!r:.80}."
        )
    return documents


def checked_text(value, row: int, column: str) -> str:
    """The text of a row, none for null.

    Raises:
        InputError: it holds something else, as JSON may from any row on.
    """
    if not isinstance(value, (str, type(None))):
        raise InputError(f"row {row} of the data doesn't hold text in column {column!r}, but {value!r:.80}.")
    if value and len(value) > MAX_DOCUMENT:
        raise InputError(
            f"row {row} of the data has {len(value):,} characters, and at most {MAX_DOCUMENT:,} are tokenised at once; "
            "split it, or change --sample-by."
        )
    return value or ""


def text_hash(text: str) -> int:
    """63 bits that decide on which side of the split a document is, whatever else the data holds."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def is_held_out(hashes, fraction: float):
    return hashes < int(fraction * 2**63)


def held_out_rows(hashes: np.ndarray, fraction: float, sizes: np.ndarray, at_least: int = 1) -> np.ndarray:
    """Which documents are held out: those with a hash in the lowest `fraction`; of little data, in which their `sizes`
    come to less than `at_least`, as many more as it takes, the lowest hashes first."""
    order = np.argsort(hashes, kind="stable")
    needed = sizes[order].cumsum() - sizes[order] < at_least
    return is_held_out(hashes, fraction) | (hashes <= hashes[order][needed].max(initial=-1))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` tokens that puts `<bos>` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def training_texts(documents, column: str, held_out_fraction: float) -> Iterator[str]:
    """The documents that aren't held out, up to TOKENIZER_CHARACTERS."""
    characters = 0
    with reading("the data"):
        for index, row in enumerate(documents):
            text = checked_text(row[column], index, column)
            if text and not is_held_out(text_hash(text), held_out_fraction):
                yield text
                characters += len(text)
                if characters > TOKENIZER_CHARACTERS:
                    return


def few_characters(texts: list[str]) -> Iterator[list[str]]:
    """The texts in groups whose tokens fit into the memory."""
    group, characters = [], 0
    for text in texts:
        if group and characters + len(text) > CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
        group.append(text)
        characters += len(text)
    if group:
        yield group


def tokenize(batch: dict, indices: list[int], tokenizer, column: str) -> dict[str, list]:
    """Documents as tokens, end of text after each. Blank ones are left out."""
    texts = [checked_text(value, index, column) for index, value in zip(indices, batch[column])]
    kept = [(index, text) for index, text in zip(indices, texts) if text and not text.isspace()]
    if not kept:
        return {name: [] for name in TOKEN_FEATURES}
    tokens = []
    for texts in few_characters([text for _, text in kept]):
        found = tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]
        if (eos := tokenizer.eos_token_id) is not None:
            found = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in found]
        tokens += [np.array(ids, np.int32) for ids in found]  # a list needs many times the memory
    return {
        "input_ids": tokens,
        "num_tokens": [len(ids) for ids in tokens],
        "document": [index for index, _ in kept],
        "hash": [text_hash(text) for _, text in kept],
    }


def check_tokens(input_ids, vocab_size: int, tokenizer, name: str):
    """Whether a model has an embedding of each token; a tokenizer may know more than occur.

    Args:
        input_ids: an array or, of any length, a data set with such a column.

    Raises:
        InputError: it has none of one.
    """
    if len(tokenizer) <= vocab_size:
        return
    if isinstance(input_ids, datasets.Dataset):
        lists = input_ids.data.column("input_ids")
        largest = max((pc.max(chunk.flatten()).as_py() or 0 for chunk in lists.chunks), default=0)
    else:
        largest = int(np.asarray(input_ids).max(initial=0))
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"{name} has the token {token!r:.40}, number {largest}, and the model embeds {vocab_size} tokens; enlarge "
            "it by training with --resize-embeddings (finetune.py --method full, pretrain.py)."
        )


def vocabulary_key(tokenizer) -> str:
    """What decides how a tokenizer cuts text, for a cache's key."""
    vocabulary = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    )
    return f"{tokenizer.eos_token_id} {vocabulary}"


def mapped(
    rows: datasets.Dataset,
    function: Callable,
    options: dict,
    features: datasets.Features,
    key: str,
    name: str,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """What `function` makes of batches of rows and their indices, kept in the cache of `datasets`.

    Args:
        options: more arguments of `function`.
        key: decides whether what the cache has is the same.
        name: of the data, for messages.
    """
    with reading(name):
        return rows.map(
            function,
            batched=True,
            batch_size=256,
            with_indices=True,
            fn_kwargs=options,
            remove_columns=rows.column_names,
            features=features,
            num_proc=num_proc,
            new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
            desc="tokenising",
        )


def tokenized(documents: datasets.Dataset, tokenizer, column: str, num_proc: int | None = None) -> datasets.Dataset:
    """All documents as tokens, kept in the cache of `datasets` for the next run with the same text and tokenizer."""
    key = f"{documents._fingerprint} {PACKING_VERSION} {column} {vocabulary_key(tokenizer)}"
    options = {"tokenizer": tokenizer, "column": column}
    return mapped(documents, tokenize, options, TOKEN_FEATURES, key, "the data", num_proc)


def sequence(input_ids: np.ndarray, documents: np.ndarray) -> dict[str, torch.Tensor]:
    """One sequence `(seq,)` of tokens with the documents that they come from; positions count within a document."""
    index = np.arange(len(input_ids))
    is_first = np.diff(documents, prepend=-1) != 0
    positions = index - np.maximum.accumulate(np.where(is_first, index, 0))
    return {
        "input_ids": torch.tensor(input_ids, dtype=torch.long),
        "position_ids": torch.from_numpy(positions),
        "documents": torch.tensor(documents, dtype=torch.long),
    }


class PackedDocuments(torch.utils.data.Dataset):
    """Tokenised documents, one after another, as sequences of `seq_len` tokens. Reads only what an index asks for."""

    def __init__(self, documents: datasets.Dataset, seq_len: int):
        self.documents = documents.with_format("arrow")
        columns = documents.with_format("numpy")
        self.lengths, self.hashes = (np.asarray(columns[name][:], np.int64) for name in ("num_tokens", "hash"))
        self.ends = self.lengths.cumsum()
        self.seq_len = seq_len

    @property
    def num_tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return self.num_tokens // self.seq_len

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.seq_len
        first, last = np.searchsorted(self.ends, [start, start + self.seq_len - 1], side="right")
        rows = self.documents[int(first) : int(last) + 1]
        skipped = start - (self.ends[first] - self.lengths[first])
        wanted = slice(skipped, skipped + self.seq_len)
        input_ids = rows["input_ids"].combine_chunks().flatten().to_numpy()[wanted]
        documents = np.repeat(rows["document"].to_numpy(), self.lengths[first : last + 1])[wanted]
        return sequence(input_ids, documents)


class ShuffledSequences(torch.utils.data.Dataset):
    """`length` sequences: all of `sequences` in a random order, then all again in another one, and so on.

    The order depends on `seed` alone, not on what else draws random numbers, so that every model trained with it sees
    the same batches and a resumed run finds its place.
    """

    def __init__(self, sequences: PackedDocuments, length: int, seed: int):
        self.sequences, self.length, self.seed = sequences, length, seed
        self.orders = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        epoch, index = divmod(index, len(self.sequences))
        if epoch not in self.orders:
            self.orders = {epoch: np.random.default_rng((self.seed, epoch)).permutation(len(self.sequences))}
        return self.sequences[int(self.orders[epoch][index])]


class StreamedSequences(torch.utils.data.IterableDataset):
    """`length` sequences of a stream of documents, read again from its start whenever it ends. One side of the split.

    Documents are numbered in the order in which they are read. Without a length, a Trainer would take one more step
    when it goes on from the last one.
    """

    def __init__(
        self,
        documents,
        tokenizer,
        column: str,
        seq_len: int,
        held_out: bool,
        fraction: float,
        length: int = sys.maxsize,
        vocab_size: int = sys.maxsize,
    ):
        self.documents, self.tokenizer, self.column, self.vocab_size = documents, tokenizer, column, vocab_size
        self.seq_len, self.held_out, self.fraction, self.length = seq_len, held_out, fraction, length

    def __len__(self) -> int:
        return self.length

    def batches(self) -> Iterator[dict]:
        """Documents and their indices, as [`tokenize`] takes them."""
        position = 0
        with reading("the stream"):
            for batch in self.documents.iter(batch_size=64):
                size = len(batch[self.column])
                yield {"batch": batch, "indices": list(range(position, position + size))}
                position += size

    def once(self) -> Iterator[dict[str, torch.Tensor]]:
        input_ids, documents = np.empty(0, np.int64), np.empty(0, np.int64)
        for batch in self.batches():
            tokens = tokenize(**batch, tokenizer=self.tokenizer, column=self.column)
            for ids, document, value in zip(tokens["input_ids"], tokens["document"], tokens["hash"]):
                if is_held_out(value, self.fraction) == self.held_out:
                    check_tokens(ids, self.vocab_size, self.tokenizer, f"document {document}")
                    input_ids = np.concatenate([input_ids, ids])
                    documents = np.concatenate([documents, np.full(len(ids), document)])
            while len(input_ids) >= self.seq_len:
                yield sequence(input_ids[: self.seq_len], documents[: self.seq_len])
                input_ids, documents = input_ids[self.seq_len :], documents[self.seq_len :]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return itertools.islice(self.endless(), self.length)

    def endless(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            empty = True
            for item in self.once():
                empty = False
                yield item
            if empty:
                raise InputError(f"the stream holds less than one sequence of {self.seq_len} tokens to train on.")


def collate(sequences: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch `(batch, seq)`; the first token of a document is predicted from the end of text before it."""
    batch = {name: torch.stack([item[name] for item in sequences]) for name in sequences[0]}
    return {**batch, "labels": batch["input_ids"]}


def split_and_pack(tokens: datasets.Dataset, seq_len: int, fraction: float) -> tuple[PackedDocuments, PackedDocuments]:
    """Sequences to train on, and those of the held-out documents, these in the order of their hashes.

    Raises:
        InputError: one of the two is empty.
    """
    hashes = np.asarray(tokens.with_format("numpy")["hash"][:], dtype=np.int64)
    sizes = np.asarray(tokens.with_format("numpy")["num_tokens"][:], dtype=np.int64)
    held_out = held_out_rows(hashes, fraction, sizes, seq_len)
    order = np.argsort(hashes, kind="stable")
    train = PackedDocuments(tokens.select(np.flatnonzero(~held_out)), seq_len)
    test = PackedDocuments(tokens.select(order[held_out[order]]), seq_len)
    for packed, what in ((train, "to train on"), (test, "held out")):
        if len(packed) == 0:
            raise InputError(
                f"too little text: {packed.num_tokens} tokens {what}, fewer than one sequence of {seq_len}; give more "
                "text or more documents (--sample-by), or change --seq-len or --held-out."
            )
    return train, test
