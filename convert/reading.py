# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Reading folders that somebody else wrote: the one place that opens their files.

Nothing in such a folder is trusted: not that a file is a file, nor its size, its nesting or its types. Whatever is
wrong is an [`InputError`], one line that says what, where and what to do.
"""

import hashlib
import json
import os
import re
import signal
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml


CONFIG_NAME = "config.json"
ADAPTER_NAME = "adapter_config.json"
TEMPLATE_FOLDER = "additional_chat_templates"
CARD_NAME = "README.md"
MAX_MESSAGE = 275  # characters: with the name of a script in front, 300 at most
MAX_JSON = 100_000_000  # bytes, of a tokenizer or an index; the largest in use have a third of it
MAX_CONFIG = 10_000_000
MAX_TEXT = 10_000_000
MAX_KEYS = 10_000  # of a configuration
MAX_LAYERS = 10_000
MAX_LABELS = 1_000_000  # for each of which a configuration makes a name
MAX_NESTING = 100  # of what is in a JSON file
MAX_METADATA = 250_000  # characters, of a card, which PyYAML takes seconds to read
MAX_DIGITS = 100
MAX_CARD_DEPTH = 20  # of the metadata of a card
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # of the Hub; also in the middle of a word

# The fields of a configuration that are looked at before transformers does; all may be null, which is their default.
FLAGS = (
    "output_attentions",
    "output_depth_attentions",
    "output_hidden_states",
    "return_dict",
    "tie_word_embeddings",
    "is_encoder_decoder",
    "is_decoder",
    "use_cache",
)
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
SIZES += ("vocab_size", "max_position_embeddings", "attn_res_block_size", "head_dim", "num_labels")


class InputError(ValueError):
    """What somebody gave can't be used. The message is one line of at most MAX_MESSAGE characters."""

    def __init__(self, message: str = ""):
        super().__init__(one_line(message))


def one_line(message: str, limit: int = MAX_MESSAGE) -> str:
    """A message without what a terminal or a log can't take, a token of the Hub, or more than `limit` characters."""
    text = "".join(character if character.isprintable() else " " for character in str(message)[: 100 * limit])
    text = TOKEN.sub("hf_...", " ".join(text.split()))
    if len(text) <= limit:
        return text
    end = limit // 3  # what to do stands at the end
    return f"{text[: limit - end - 5]} ... {text[-end:]}"


@contextmanager
def understood(what: str, advice: str = "", kind: type[InputError] = InputError) -> Iterator[None]:
    """Turns whatever goes wrong in a library that reads `what` into one line.

    Args:
        what: begins the message, such as "config.json of some/model isn't valid".
        advice: ends it.
        kind: of the error.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # of all kinds: what a file holds decides on them
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise kind(f"{what}: {reason(error)}{f'; {advice}' if advice else ''}.") from None


def is_panic(error: BaseException) -> bool:
    """Whether an error, which is no Exception, is how a library in Rust such as tokenizers fails."""
    return type(error).__name__ == "PanicException"


@contextmanager
def no_panic() -> Iterator[None]:
    """Turns the failure of a library in Rust, wherever it is called, into an [`InputError`]."""
    try:
        yield
    except BaseException as error:
        if is_panic(error):
            raise InputError(f"the tokenizer or a file is broken: {reason(error)}.") from None
        raise


class _TimeIsUp(BaseException):
    """No handler of an Exception takes it for an error of its own."""


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Ends the block after `seconds`, where signals can: in the main thread of a process on Unix.

    Raises:
        InputError: the time is up; `message` begins what it says.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    is_over = False

    def end(_, frame):
        if is_over:
            return
        if frame is not None and frame.f_globals.get("__name__") == "contextlib":
            # on the way into or out of a block, where nothing would catch it
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        raise _TimeIsUp

    left, interval = signal.getitimer(signal.ITIMER_REAL)
    handler, started = signal.signal(signal.SIGALRM, end), time.monotonic()
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            is_over = True  # an alarm from here on does nothing
    except _TimeIsUp:
        raise InputError(f"{message}; it was ended after {seconds:g} seconds.") from None
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        left = max(0.001, left - (time.monotonic() - started)) if left else 0
        signal.setitimer(signal.ITIMER_REAL, left, interval)


def first_line(error: BaseException) -> str:
    """The first line of a message, and the next one if the first only announces it."""
    lines = [line.strip() for line in str(error)[: 100 * MAX_MESSAGE].splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


def reason(error: BaseException) -> str:
    """What an error says, in one short line that ends without a full stop."""
    text = first_line(error)
    if isinstance(error, KeyError) and error.args:
        text = f"{type(error).__name__} {text}"
    return one_line(text.rstrip(".:"), MAX_MESSAGE // 2)


def is_regular(path: Path) -> bool:
    """Whether there is a regular file, perhaps behind a link: no folder, pipe or device."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


@contextmanager
def open_regular(path: Path, limit: int | None = None) -> Iterator:
    """A regular file opened to read bytes; nothing else is waited for.

    Args:
        limit: the largest size in bytes.

    Raises:
        InputError: it isn't there, is no regular file, is too large, or can't be read.
    """
    try:
        # a pipe would keep an open without O_NONBLOCK waiting for whoever writes to it
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing in {path.parent}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}.") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is no regular file; put the file itself there.")
    with os.fdopen(descriptor, "rb") as file:
        if limit is not None and found.st_size > limit:
            raise InputError(f"{path} has {found.st_size / 1e6:,.0f} MB; at most {limit / 1e6:,.0f} MB are read.")
        yield file


def sha256(path: Path) -> str:
    """The hash of a regular file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """
    Raises:
        InputError: as [`open_regular`], or it is no UTF-8.
    """
    try:
        with open_regular(path, limit) as file:
            return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#x}.") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from None


def check_text(text: str, name: str) -> None:
    """
    Raises:
        InputError: the text `name`, of a command line or terminal, was no UTF-8.
    """
    if not is_text(text):
        raise InputError(f"{name} is no UTF-8 text.")


def is_text(text: str) -> bool:
    """Whether it can be encoded; what was no UTF-8 in a path or on a command line can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: str | bytes, name: str, unique: bool = False):
    """The value in a JSON text, in which every string is text.

    Args:
        name: of the file, for messages.
        unique: refuse names that stand twice in an object, of which Python takes the last.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
        _check_nesting(value)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError:
        raise InputError(f"{name} is not valid JSON: it is nested too deeply.") from None
    except MemoryError:
        raise InputError(f"{name} is too large for the memory of this machine.") from None
    except UnicodeEncodeError:
        raise InputError(f"{name} has half a surrogate pair in a string, which is no text.") from None
    except ValueError as error:
        raise InputError(f"{name} is not valid JSON: {reason(error)}.") from None
    return value


def _unique(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _check_nesting(value) -> None:
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
        if depth > MAX_NESTING:
            raise RecursionError


def _inside(value) -> Iterable:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json(path: Path, limit: int = MAX_JSON) -> dict:
    """The object in a JSON file.

    Raises:
        InputError: the file is missing or broken, or holds something else.
    """
    content = parse_json(read_text(path, limit), str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not {kind_of(content)}.")
    return content


def kind_of(value) -> str:
    """What JSON calls the type of a value."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def read_config(folder: Path) -> dict:
    """The configuration of a model folder, after a check of the fields that are used before a model checks them.

    Raises:
        InputError: it is missing, broken, or a field has a wrong type.
    """
    path = folder / CONFIG_NAME
    if not is_regular(path) and is_regular(folder / ADAPTER_NAME):
        raise InputError(f"{folder} holds an adapter, not a model; merge it first (PEFT: merge_and_unload).")
    return check_config(read_json(path, MAX_CONFIG), str(path))


def check_config(config: dict, name: str) -> dict:
    """`config` itself, once the types of what is used before a model checks it are known to be right.

    Raises:
        InputError: one is wrong, or the sizes can't be those of a model.
    """
    if len(config) > MAX_KEYS:
        raise InputError(f"{name} has {len(config):,} fields; no configuration has more than {MAX_KEYS:,}.")
    typed(config, "model_type", str, name)
    typed(config, "auto_map", dict, name)
    typed(config, "quantization_config", dict, name)
    texts(config, "architectures", name)
    for field in ("dtype", "torch_dtype"):
        typed(config, field, (str, dict), name)
    for field in FLAGS:
        typed(config, field, bool, name)
    for field in SIZES:
        size = typed(config, field, (int, list) if field.startswith(("inter", "num_key")) else int, name)
        if type(size) is int and size < 0:
            raise InputError(f"{name}: {field} is {size}, which is no size.")
    if (config.get("num_hidden_layers") or 0) > MAX_LAYERS:
        raise InputError(f"{name}: num_hidden_layers is {config['num_hidden_layers']:,}; at most {MAX_LAYERS:,} work.")
    if (config.get("num_labels") or 0) > MAX_LABELS:
        raise InputError(f"{name}: num_labels is {config['num_labels']:,}; at most {MAX_LABELS:,} work.")
    return config


def typed(content: dict, field: str, kinds: type | tuple[type, ...], name: str):
    """A field of `content`, `None` if it is null or absent.

    Raises:
        InputError: it is of none of `kinds`; true and false are no numbers.
    """
    value, kinds = content.get(field), kinds if isinstance(kinds, tuple) else (kinds,)
    if value is None or type(value) in kinds or float in kinds and type(value) is int:
        return value
    wanted = " or ".join(dict.fromkeys(kind_of(kind()) for kind in kinds))
    raise InputError(f"{name}: {field} must be {wanted}, not {kind_of(value)} ({json.dumps(value)[:40]}).")


def texts(content: dict, field: str, name: str) -> list[str]:
    """A field that is a list of texts; empty if it is null or absent."""
    values = typed(content, field, list, name) or []
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"{name}: {field} must be a list of texts, not of {kind_of(value)}.")
    return values


class _CardLoader(yaml.SafeLoader):
    """Without aliases, of which a few lines can stand for more than any memory holds."""

    def compose_node(self, parent, index):
        self.depth = getattr(self, "depth", 0) + 1
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias; write the value out")
        if self.depth > MAX_CARD_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_number(self, node):
        if len(node.value) > MAX_DIGITS:  # 1:1:1:... is a number to the base 60
            raise yaml.YAMLError(f"it has a number of {len(node.value):,} digits")
        return self.construct_yaml_int(node)


_CardLoader.add_constructor("tag:yaml.org,2002:int", _CardLoader.construct_number)


def parse_metadata(card: str, name: str) -> dict:
    """The metadata at the beginning of a model card, empty if it has none.

    Raises:
        InputError: they are no YAML mapping.
    """
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", card, re.DOTALL)
    if found is None:
        return {}
    return parse_yaml(found[1], f"the metadata of {name}")


def parse_yaml(text: str, name: str) -> dict:
    """The mapping in a YAML text, names with values.

    Raises:
        InputError: there is none.
    """
    if len(text) > MAX_METADATA:
        raise InputError(f"{name} has more than {MAX_METADATA:,} characters.")
    try:
        content = yaml.load(text, Loader=_CardLoader)
        content = {} if content is None else content
        json.dumps(content, ensure_ascii=False, default=str, skipkeys=True).encode()  # as in parse_json
    except Exception as error:  # of all kinds: a tag such as !!int decides what makes the value
        problem = getattr(error, "problem", None) or reason(error)
        raise InputError(f"{name}: this is no valid YAML: {problem}.") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{name} must be names with values, not {kind_of(content)}.")
    return content


def model_entries(folder: Path) -> list[Path]:
    """What a library that loads a model or tokenizer may open in its folder."""
    return sorted(path for pattern in ("*", f"{TEMPLATE_FOLDER}/*") for path in folder.glob(pattern))


def check_folder(folder: Path) -> None:
    """Whether a folder may be handed to a library that opens files by itself.

    Raises:
        InputError: a file in it is a pipe or device, which it would wait for, or a text without end.
    """
    try:
        for path in model_entries(folder):
            found = path.stat() if path.exists() else None
            if found is None or stat.S_ISDIR(found.st_mode):
                continue
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path} is no regular file; put the file itself there, or remove it.")
            if path.suffix == ".json" and found.st_size > MAX_JSON:
                raise InputError(f"{path} has {found.st_size / 1e6:,.0f} MB; at most {MAX_JSON / 1e6:,.0f} are read.")
    except OSError as error:
        raise InputError(f"{folder} can't be read: {error.strerror}.") from None


def is_own_code(path: Path) -> bool:
    """Whether a link stands for a code file of this project, byte for byte and under its name, as in `model_cards`."""
    if not path.is_symlink():
        return False
    from .families import code_files  # takes seconds, and needs this module

    own = code_files().get(path.name)
    return own is not None and is_regular(path) and sha256(path) == sha256(own)


def check_inside(folder: Path, path: Path) -> None:
    """Whether a file of `folder` may be copied or published as its own.

    Raises:
        InputError: it is a link to nothing, or to a file outside the folder that is neither this project's code nor in
            the cache of the Hub, where the files of a repository lie in `blobs/` beside it.
    """
    try:
        home, target = folder.resolve(), path.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop is the second, until Python 3.13
        raise InputError(f"{path} is a link to nothing; put the file itself there (cp -L), or remove it.") from None
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    is_inside = target.is_relative_to(home) or blobs is not None and target.is_relative_to(blobs)
    if not is_inside and not is_own_code(path):
        raise InputError(f"{path} is a link that leaves the folder; put the file itself there, or remove it.")


def check_own_files(folder: str | Path) -> None:
    """[`check_inside`] for all files that belong to a model or tokenizer: what is made of them may be published.

    Args:
        folder: what is none, such as a Hub id, has no links.

    Raises:
        InputError: one is a link that leaves the folder.
    """
    if not os.path.isdir(folder):
        return
    folder = Path(folder)
    try:
        for path in model_entries(folder):
            check_inside(folder, path)
    except OSError as error:
        raise InputError(f"{folder} can't be read: {error.strerror}.") from None
