# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The kernels of fused.py for CPUs, written in C++.

They are compiled for the processor at hand by g++, or the command in CXX (`ccache g++`), when they are first needed:
two seconds, once, as the library is kept in `~/.cache/attnres`, or under XDG_CACHE_HOME. What others could have put
there is never loaded. They run on the threads of PyTorch.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

from attnres_kernels.fused import KERNELS, DepthKernels, is_plain
from depth_attention_attnres import DepthAttentionInterface, TokenReads, can_fuse_norm


logger = logging.get_logger(__name__)

COMPILE_SECONDS = 120  # at most; it takes a few


SOURCE = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int64)]


DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ABSENT = Rows(None, 0)
RANGES = 64  # of tokens, over which a gradient is summed up separately

INTEGER, FLOAT, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
SIGNATURES = {
    "closed_forward": [INTEGER] * 5 + [POINTER, INTEGER, POINTER, FLOAT, POINTER, INTEGER] + [POINTER] * 3,
    "closed_backward": [INTEGER] * 5 + [POINTER, INTEGER, POINTER, POINTER, INTEGER] + [POINTER] * 7 + [INTEGER],
    "step_forward": [INTEGER] * 3
    + [Rows] * 3
    + [POINTER] * 3
    + [FLOAT, FLOAT, Rows, FLOAT, INTEGER]
    + [Rows] * 3
    + [POINTER] * 2,
    "step_backward": [INTEGER] * 3
    + [Rows, Rows, POINTER, Rows, POINTER, Rows, Rows, Rows, POINTER, FLOAT, INTEGER, Rows, Rows]
    + [POINTER] * 3
    + [INTEGER],
    "read_forward": [INTEGER] * 5
    + [POINTER, ctypes.c_char_p, Rows, Rows, POINTER, FLOAT, FLOAT, Rows, FLOAT, INTEGER, Rows, Rows, POINTER],
    "token_read": [POINTER, INTEGER, INTEGER, FLOAT, POINTER, POINTER, POINTER, INTEGER, FLOAT, POINTER],
}


def compiler() -> list[str] | None:
    """The C++ compiler's command, None where there is none or the kernels aren't for the system."""
    return None if missing_compiler() else [shutil.which(compiler_words()[0]), *compiler_words()[1:]]


def compiler_words() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "") or ["g++"]


def missing_compiler() -> str | None:
    """Why the kernels can't be compiled, None if they may be."""
    if sys.platform != "linux":
        return f"its kernels are compiled on Linux only, and this is {sys.platform}"
    try:
        command = compiler_words()[0]
    except ValueError as error:
        return f"CXX={os.environ['CXX']} is no command: {error}"
    if shutil.which(command) is None:
        return f"its kernels need a C++ compiler, and there is no {command}: install g++, or name another in CXX"
    return None


def build_command() -> list[str]:
    if reason := missing_compiler():
        raise RuntimeError(reason)
    return [*compiler(), "-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]


def run(command: list[str], given: str = "", **environment: str) -> tuple[int, str]:
    """A program's exit code and what it has written. It and all it has started have ended then, whatever happens.

    Raises:
        RuntimeError: it can't be started, or takes too long.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **environment},
            start_new_session=True,  # a group of processes, which can be ended together
        )
    except OSError as error:
        raise RuntimeError(f"{command[0]} doesn't run: {error.strerror}") from error
    try:
        output, _ = process.communicate(given, timeout=COMPILE_SECONDS)
        return process.returncode, output
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} took more than {COMPILE_SECONDS:g} seconds") from error
    finally:
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()


def danger_of(path: Path) -> str | None:
    """Who but this user could change a file or folder, or put another in its place; None if nobody could."""
    state, user = path.lstat(), os.geteuid()
    if not (stat.S_ISDIR(state.st_mode) or stat.S_ISREG(state.st_mode)):
        return f"{path} is a link"
    for place in (path, *path.parents):
        state = place.lstat()
        if state.st_uid != user and (place == path or state.st_uid != 0):
            return f"{place} belongs to another user"
        is_shared = state.st_mode & stat.S_ISVTX and place != path  # as /tmp: each may change what is theirs
        if state.st_mode & 0o022 and not is_shared:
            return f"others may write to {place}"
    return None


def cache_folders() -> list[Path]:
    """Where compiled kernels may be kept, the best place first."""
    folders = []
    with suppress(OSError, RuntimeError):  # there is no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folders.append(folder.resolve() / "attnres")
    with suppress(OSError):  # no temporary files can be written
        folders.append(Path(tempfile.gettempdir()).resolve() / f"attnres-{os.geteuid()}")
    return folders


def open_folder(folder: Path):
    """Makes a folder if need be.

    Raises:
        OSError: it can't be made, or others could put something there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    if danger := danger_of(folder):
        raise PermissionError(danger)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def build_key() -> str:
    """What another source, compiler or processor would change."""
    command = build_command()
    _, version = run([*compiler(), "--version"])
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return digest("\n".join((SOURCE, *command, version, platform.machine(), *sorted(processor))).encode())


def build(folder: Path) -> Path:
    """Compiles the kernels into a file of a `folder`."""
    built = folder / "built.so"
    command = [*build_command(), "-x", "c++", "-", "-o", str(built)]
    code, output = run(command, SOURCE, TMPDIR=str(folder))  # in which a compiler that is ended leaves files
    if code != 0 or not built.exists():
        errors = [line for line in output.splitlines() if "error" in line]
        raise RuntimeError((errors or [f"{command[0]} failed"])[0].strip())
    built.chmod(0o700)
    return built


def kept_library(folder: Path, name: str) -> Path | None:
    """The file of compiled kernels of this name in a folder that only this user may write to."""
    for path in folder.glob(f"{name}-*.so"):
        # its name ends with the digest of what is in it, as loading half a file would end the process
        if danger_of(path) is None and path.stem == f"{name}-{digest(path.read_bytes())}":
            return path
    return None


def new_library(folder: Path, name: str) -> Path:
    """The same, compiled."""
    for left in folder.glob("building-*"):  # by processes that were ended
        with suppress(OSError):
            if left.stat().st_mtime < time.time() - 10 * COMPILE_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as temporary:
        built = build(Path(temporary))
        path = folder / f"{name}-{digest(built.read_bytes())}.so"
        os.replace(built, path)  # another process may have been faster
    return path


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message holds its first error.
    """
    name, loaded, place, reasons = f"kernels-{build_key()}", None, "nowhere, so each process compiles them", []
    for folder in cache_folders():
        try:
            open_folder(folder)
            kept = kept_library(folder, name)
            loaded = ctypes.CDLL(str(kept or new_library(folder, name)))
        except OSError as error:
            reasons.append(f"not in {folder} ({error.strerror or error})")
        else:
            place = None if kept else f"in {folder}"
            break
    if loaded is None:
        with tempfile.TemporaryDirectory() as temporary:
            loaded = ctypes.CDLL(str(build(Path(temporary))))
    if reasons and place is not None:
        logger.warning(
            f"The compiled cpp kernels are kept {place}; {', '.join(reasons)}. Mend that, or set XDG_CACHE_HOME to a "
            "folder that only you may write to."
        )
    for name, types in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def pointers(tensors) -> ctypes.Array:
    return (POINTER * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def rows(tensor: torch.Tensor | None) -> Rows:
    return ABSENT if tensor is None or tensor.numel() == 0 else Rows(tensor.data_ptr(), DTYPES[tensor.dtype])


class Token(ctypes.Structure):
    _fields_ = [("width", INTEGER), ("dtype", INTEGER), ("products", POINTER), ("eps", FLOAT), ("sources", POINTER)]


class CppTokenReads(TokenReads):
    """Checks once, and keeps a table of the sources, so that little is left to do around the kernel."""

    def __init__(self, hidden_states: torch.Tensor, products: torch.Tensor, eps: float):
        self.like, self.products = hidden_states.contiguous(), products.contiguous()
        self.addresses = (POINTER * (products.shape[0] + 1))()
        self.kept = []  # the sources whose addresses are in the table, which thus live on
        fields = hidden_states.shape[-1], DTYPES[hidden_states.dtype], self.products.data_ptr(), eps
        self.token = Token(*fields, ctypes.addressof(self.addresses))
        self.arguments = ctypes.addressof(self.token)
        self.kernel = library().token_read
        self.is_uniform, self.width = True, hidden_states.shape[-1:]

    def takes(self, sources):
        for index, source in enumerate(sources):
            if index == len(self.kept):
                self.kept.append(None)
            if self.kept[index] is not source:
                self.addresses[index], self.kept[index] = source.data_ptr(), source
                # once one isn't, other code reads this token
                self.is_uniform &= source.dtype == self.like.dtype and source.is_contiguous()
        return self.is_uniform

    def read(self, place, product, sources, norm):
        like, num_sources = self.like, min(len(sources), place.num_sources)
        added = new_partial = None
        if len(sources) > num_sources:
            partial = torch.empty_like(like)
            added, new_partial = self.addresses[num_sources], partial.data_ptr()
            sources = (*sources[:-2], partial)
        gain, gain_dtype, norm_eps, dtype = None, 0, 0.0, like.dtype
        weight = norm.weight if can_fuse_norm(norm) else None
        fits = weight is not None and is_plain(weight) and weight.dtype in DTYPES and weight.shape == self.width
        if fits:
            weight, norm_eps = weight.contiguous(), norm.variance_epsilon
            gain, gain_dtype = weight.data_ptr(), DTYPES[weight.dtype]
            if weight.dtype != dtype:
                dtype = torch.float32
        result = torch.empty_like(like, dtype=dtype)
        self.kernel(
            self.arguments,
            place.row,
            num_sources,
            place.scale,
            added,
            new_partial,
            gain,
            gain_dtype,
            norm_eps,
            result.data_ptr(),
        )
        return None, None, result if fits else norm(result), sources


class CppKernels(DepthKernels):
    name = "cpp"
    dtypes = tuple(DTYPES)
    few_tokens = 0

    def token_reads(self, embedding, products, eps):
        return CppTokenReads(embedding, products, eps)

    def closed_forward(self, sources, products, eps, mixed, lse, scores, inverse_rms):
        (num_reads, width), (num_sources, num_tokens) = products.shape, inverse_rms.shape
        library().closed_forward(
            torch.get_num_threads(),
            num_tokens,
            width,
            num_sources,
            num_reads,
            pointers(sources),
            DTYPES[sources[0].dtype],
            products.data_ptr(),
            eps,
            pointers(mixed),
            DTYPES[mixed[0].dtype],
            lse.data_ptr(),
            scores.data_ptr(),
            inverse_rms.data_ptr(),
        )

    def closed_backward(
        self,
        sources,
        products,
        lse,
        scores,
        inverse_rms,
        grad_mixed,
        grad_lse,
        grad_scores,
        grad_sources,
        need_products,
    ):
        (num_reads, width), (num_sources, num_tokens) = products.shape, inverse_rms.shape
        ranges = min(RANGES, num_tokens)
        product_sums = products.new_empty(ranges, num_reads, width) if need_products else None
        library().closed_backward(
            torch.get_num_threads(),
            num_tokens,
            width,
            num_sources,
            num_reads,
            pointers(sources),
            DTYPES[sources[0].dtype],
            products.data_ptr(),
            pointers(grad_mixed),
            DTYPES[grad_mixed[0].dtype],
            lse.data_ptr(),
            grad_lse.data_ptr(),
            scores.data_ptr(),
            inverse_rms.data_ptr(),
            pointer(grad_scores),
            pointers(grad_sources) if grad_sources else None,
            pointer(product_sums),
            ranges,
        )
        return product_sums.sum(0) if need_products else None

    def step_forward(
        self, partial, output, mixed, lse, product, score, key_eps, scale, norm_weight, norm_eps, dtype, results
    ):
        new_partial, normed, hidden, weight, statistics = results
        library().step_forward(
            torch.get_num_threads(),
            statistics.shape[1],
            mixed.shape[-1],
            rows(partial),
            rows(output),
            rows(mixed),
            pointer(lse),
            pointer(product),
            pointer(score),
            key_eps,
            scale,
            rows(norm_weight),
            norm_eps,
            DTYPES[dtype],
            rows(new_partial),
            rows(normed),
            rows(hidden),
            pointer(weight),
            statistics.data_ptr(),
        )

    def step_backward(
        self,
        value,
        mixed,
        product,
        norm_weight,
        statistics,
        grads,
        scale,
        dtype,
        grad_value,
        grad_mixed,
        grad_lse,
    ):
        grad_partial, grad_normed, grad_hidden, grad_weight = grads
        width, ranges = mixed.shape[-1], min(RANGES, statistics.shape[1])
        product_sums = norm_sums = None
        if value is not None and product is not None:
            product_sums = statistics.new_empty(ranges, width)
        if grad_normed is not None:
            norm_sums = statistics.new_empty(ranges, width)
        library().step_backward(
            torch.get_num_threads(),
            statistics.shape[1],
            width,
            rows(value),
            rows(mixed),
            pointer(product),
            rows(norm_weight),
            statistics.data_ptr(),
            rows(grad_partial),
            rows(grad_normed),
            rows(grad_hidden),
            pointer(grad_weight),
            scale,
            DTYPES[dtype],
            rows(grad_value),
            rows(grad_mixed),
            pointer(grad_lse),
            pointer(product_sums),
            pointer(norm_sums),
            ranges,
        )
        return tuple(None if sums is None else sums.sum(0) for sums in (product_sums, norm_sums))

    def read_forward(
        self, sources, output, product, eps, scale, norm_weight, norm_eps, dtype, partial, normed, hidden, weights
    ):
        batch, seq, _ = sources[0].shape
        library().read_forward(
            torch.get_num_threads(),
            batch * seq,
            seq,
            product.shape[0],
            len(sources),
            pointers(sources),
            bytes(DTYPES[source.dtype] for source in sources),
            rows(output),
            rows(partial),
            product.data_ptr(),
            eps,
            scale,
            rows(norm_weight),
            norm_eps,
            DTYPES[dtype],
            rows(normed),
            rows(hidden),
            pointer(weights),
        )


CPP_KERNELS = CppKernels()
KERNELS.setdefault("cpu", CPP_KERNELS)  # unless Triton's interpreter has them
if _reason := missing_compiler():
    DepthAttentionInterface.absent[CppKernels.name] = _reason
