# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/conformance.py --families llama,gemma2

Runs the model tests of transformers on every donor and on its AttnRes family, and compares them test by test.

What the donor passes AttnRes must pass, and what runs for the donor must run for AttnRes. The tests are not part of an
installed transformers, so the source distribution of the same version is fetched once through pip. The results go to a
JSON file, one row per family; rows of other families in it are kept.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import torch
import transformers
from attnres_convert.writing import write_json


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "conformance.json"
CACHE = ROOT / ".cache" / "conformance"
SUITE = ROOT / "tests" / "conformance" / "suite.py"

# Tests that AttnRes need not pass, with the reason: {test: {family or "*": reason}}
EXCEPTIONS = {}

# From worst to best
RANKS = {"failed": 0, "skipped": 1, "passed": 2}

# The test modules import two mixins that the source distribution leaves out. Their tests are not run, on either side.
LEFT_OUT = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
}


def download_source(folder: Path) -> Path:
    """Fetches the source distribution of the installed transformers from the package index, as pip is configured."""
    package = f"transformers=={transformers.__version__}"
    options = ["--no-deps", "--no-binary", "transformers", "--dest", folder]
    command = [sys.executable, "-m", "pip", "download", *options, package]
    result = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if result.returncode or not archives:
        reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise SystemExit(f"error: pip could not fetch the source distribution of {package}: {''.join(reason)}")
    return archives[0]


def unpack_tests(archive_path: Path, folder: Path):
    """Writes the archive's test modules to `folder`, after a comparison of its code with the installed one.

    Raises:
        SystemExit: a file of the installed transformers is missing or differs, so the tests may not belong to it.
    """
    installed = Path(transformers.__file__).parents[1]
    with tarfile.open(archive_path) as archive:
        for member in archive:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if not member.isfile() or path.suffix != ".py":
                continue
            content = archive.extractfile(member).read()
            if path.parts[0] == "src":
                code_file = installed.joinpath(*path.parts[1:])
                if not code_file.is_file() or code_file.read_bytes() != content:
                    raise SystemExit(f"error: {code_file} is not that of transformers {transformers.__version__}.")
            elif path.parts[0] == "tests" and len(path.parts) == 2:
                (folder / path.name).write_bytes(content)
    for name, content in LEFT_OUT.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(content)


def prepare_tests(cache: Path) -> Path:
    """The folder that holds the tests as the package `transformers_tests`; complete or absent."""
    folder = cache / f"transformers-{transformers.__version__}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            print(f"fetching the tests of transformers {transformers.__version__}", flush=True)
            package = Path(temporary) / "tests" / "transformers_tests"
            package.mkdir(parents=True)
            unpack_tests(download_source(Path(temporary)), package)
            package.parent.rename(folder)
    return folder


def run_suite(family: str, tests_folder: Path) -> dict:
    """Runs both test classes of a family in a process of its own and returns what became of each test."""
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = Path(temporary) / "outcomes.json"
        nodes = [f"{SUITE}::{side}_{family}" for side in ("donor", "attnres")]
        options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", ROOT]
        path = os.pathsep.join(filter(None, [str(tests_folder), os.environ.get("PYTHONPATH")]))
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", *options, "--outcomes", outcomes, *nodes]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if result.returncode not in (0, 1) or not outcomes.is_file():  # 1: a test failed
            log = (result.stdout + result.stderr)[-3000:]
            raise SystemExit(f"error: the tests of {family} did not run:\n{log}")
        return json.loads(outcomes.read_text())


def is_worse(donor: dict, attn_res: dict) -> bool:
    if donor["outcome"] == "failed":
        return False
    lower = RANKS[attn_res["outcome"]] < RANKS[donor["outcome"]]
    return lower or attn_res["skipped_subtests"] > donor["skipped_subtests"]


def compare(family: str, outcomes: dict) -> dict:
    """The family's row: counts of both sides, where AttnRes is worse, and which of that is an exception."""
    donor, attn_res = outcomes[f"donor_{family}"], outcomes[f"attnres_{family}"]

    def count(tests: dict) -> dict:
        return {outcome: sum(test["outcome"] == outcome for test in tests.values()) for outcome in RANKS}

    row = {"donor": count(donor), "attnres": count(attn_res)}
    worse = {test: attn_res[test] for test in donor if is_worse(donor[test], attn_res[test])}
    reasons = {
        test: by_family.get(family, by_family.get("*"))
        for test, by_family in EXCEPTIONS.items()
        if family in by_family or "*" in by_family
    }
    row["donor"]["failures"] = sorted(test for test in donor if donor[test]["outcome"] == "failed")
    row["regressions"] = {test: worse[test].get("message", "skipped") for test in sorted(worse) if test not in reasons}
    row["exceptions"] = {test: reason for test, reason in reasons.items() if test in worse}
    row["stale_exceptions"] = sorted(set(reasons) - set(worse))
    row["seconds"] = round(sum(test["seconds"] for tests in outcomes.values() for test in tests.values()))
    return row


def circumstances() -> dict:
    versions = {"python": platform.python_version(), "attnres": version("attnres")}
    versions |= {module.__name__: module.__version__ for module in (torch, transformers)}
    return {"hardware": f"CPU, {platform.machine()}", "versions": versions}


def run_conformance(families: list[str], cache: Path, processes: int) -> dict:
    """Runs the suite for `families`, `processes` at a time, and returns a row for each."""
    tests_folder = prepare_tests(cache)
    rows = {}

    def run_family(family):
        return compare(family, run_suite(family, tests_folder))

    print(f"{'family':14}{'donor passed':>14}{'AttnRes passed':>16}{'worse':>7}{'exceptions':>12}{'seconds':>9}")
    with ThreadPoolExecutor(processes) as pool:
        for family, row in zip(families, pool.map(run_family, families)):
            rows[family] = row | circumstances()
            passed = f"{row['donor']['passed']:>14}{row['attnres']['passed']:>16}"
            worse = f"{len(row['regressions']):>7}{len(row['exceptions']):>12}"
            print(f"{family:14}{passed}{worse}{row['seconds']:>9}", flush=True)
    return rows


def parse_args(argv: list[str] | None, families: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--families", default=",".join(families), help="comma-separated; default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to update (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the tests are kept (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="families tested at a time")
    args = parser.parse_args(argv)
    args.families = args.families.split(",")
    if unknown := sorted(set(args.families) - set(families)):
        parser.error(f"unknown family {', '.join(unknown)}; choose from {', '.join(families)}")
    if args.processes < 1:
        parser.error("--processes must be at least 1")
    if find_spec("parameterized") is None:
        parser.error("the tests of transformers need the package parameterized: pip install parameterized")
    return args


def main(argv: list[str] | None = None):
    sys.path.insert(0, str(ROOT / "tests"))
    from families import FAMILIES

    args = parse_args(argv, list(FAMILIES))
    start = time.perf_counter()
    rows = run_conformance(args.families, args.cache, args.processes)
    known = json.loads(args.output.read_text())["rows"] if args.output.is_file() else {}
    results = {
        "command": "python benchmarks/conformance.py",
        "rows": {family: (known | rows)[family] for family in FAMILIES if family in known | rows},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, results)

    for family, row in rows.items():
        for test, message in row["regressions"].items():
            print(f"\n{family}: {test}\n{message}")
        for test in row["stale_exceptions"]:
            print(f"\n{family}: {test} is listed as an exception and is none; remove it from EXCEPTIONS")
    failed = [family for family, row in rows.items() if row["regressions"] or row["stale_exceptions"]]
    summary = {"families": len(rows), "failed": failed, "seconds": round(time.perf_counter() - start)}
    print(json.dumps(summary))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
