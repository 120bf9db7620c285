# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""gpu_evidence.py at its smallest, on a CPU: its data, its training, its plan, and going on after an interruption."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_evidence  # noqa: E402
import gpu_evidence_data  # noqa: E402
import gpu_evidence_report  # noqa: E402
import gpu_evidence_training as training  # noqa: E402


pytestmark = pytest.mark.slow

FOREVER = time.time() + 3600


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small data folder, of a package made up for it."""
    root, folder = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("data")
    source = Path(json.__file__).parent
    for number, file in enumerate(sorted(BENCHMARKS.glob("*.py")) + sorted(source.glob("*.py"))):
        (root / f"module{number}.py").write_bytes(file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_evidence_data.sysconfig, "get_paths", lambda: {"stdlib": str(source)})
        gpu_evidence_data.prepare(folder, [root], vocab_size=512, max_tokens=200_000)
    return folder


def options(data: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--layers", "3", "--hidden-size", "32", "--head-size", "16", "--block-size", "1", "--seq-len", "32"]
    sizes += ["--held-out-sequences", "24", "--tokens", "4096", "--bracket-tokens", "4096", "--seeds", "0"]
    return ["--tiny", "--device", "cpu", "--workers", "2", "--implementation", "two_phase", "--rates", "4e-3", "8e-3",
        *sizes, "--data", str(data), "--output", str(output), *more]  # fmt: skip


@pytest.fixture
def run(data, tmp_path):
    """Trains one run: `run(variant, seed)`."""
    args = gpu_evidence.parse_arguments(options(data, tmp_path))
    settings = {name: value for name, value in vars(args).items() if name not in gpu_evidence.NOT_SETTINGS}
    about = gpu_evidence_data.read_data(data)
    gpu_evidence_data.unpack(data, about, tmp_path / "tokens")
    windows = training.Windows(tmp_path / "tokens", about, settings)

    def trained(variant: str, seed: int = 0, deadline: float = FOREVER, save_to: Path | None = None) -> dict | None:
        run = {"stage": "final", "variant": variant, "seed": seed, "learning_rate": 8e-3, "tokens": 8192}
        return training.train(run, windows, about, settings, deadline, save_to)

    return trained


def test_data_are_what_data_json_says(data, tmp_path):
    from tokenizers import Tokenizer

    about = gpu_evidence_data.read_data(data)
    gpu_evidence_data.unpack(data, about, tmp_path / "tokens")
    tokens = np.fromfile(tmp_path / "tokens", np.uint16)
    assert len(tokens) == about["held_out_tokens"] + about["train_tokens"] and tokens.max() < about["vocab_size"] == 512
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    ends = np.flatnonzero(tokens == tokenizer.token_to_id(gpu_evidence_data.END_OF_TEXT))
    held_out = [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends)[: about["held_out_documents"]]]
    assert ends[about["held_out_documents"] - 1] == about["held_out_tokens"] - 1
    files = [file.read_text() for file in [*BENCHMARKS.glob("*.py"), *Path(json.__file__).parent.glob("*.py")]]
    assert held_out and all(document in files for document in held_out)
    (data / "broken").mkdir()
    (data / "broken" / "tokens.xz").write_bytes((data / "tokens.xz").read_bytes())
    with pytest.raises(gpu_evidence_data.EvidenceError, match="isn't what data.json says"):
        gpu_evidence_data.unpack(data / "broken", {**about, "tokens_sha256": "0"}, tmp_path / "tokens")


def test_variants_learn_and_one_seed_gives_one_result(run, tmp_path):
    torch.set_num_threads(1)
    rows = {
        variant: run(variant, save_to=tmp_path if variant == "block" else None) for variant in gpu_evidence.VARIANTS
    }
    for row in rows.values():
        assert row["curve"][-1][1] < row["curve"][0][1] - 0.3
        assert len(row["sequence_losses"]) == 24 and len(row["depth"]["output_rms"]) == 6
        assert abs(np.mean(row["sequence_losses"]) - row["held_out_loss"]) < 1e-3
    # all start from the donor's weights on the same batch, but read it another way
    assert [len(row["gradient_norms"][0]) for row in rows.values()] == [3, 3, 2]
    weights = rows["full"]["depth"]["depth_weights"]
    assert [len(read) for read in weights] == [*range(1, 7), 7]
    assert all(abs(sum(read) - 1) < 1e-3 for read in weights)
    assert run("block")["sequence_losses"] == rows["block"]["sequence_losses"]
    assert run("block", seed=1)["sequence_losses"] != rows["block"]["sequence_losses"]
    assert run("block", deadline=0) is None
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.attn_res_mode == "block" and model.dtype == torch.bfloat16


def test_weights_and_batches_are_shared(data, tmp_path):
    args = gpu_evidence.parse_arguments(options(data, tmp_path))
    donor, block = (training.new_model(variant, 3, vars(args), 512) for variant in ("donor", "block"))
    for name, parameter in donor.named_parameters():
        assert torch.equal(parameter, block.get_parameter(name))
    assert donor.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert donor.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx((32 * 6) ** -0.5, rel=0.1)
    decayed = [group for group in training.new_optimizer(block, 1e-3, 3.0).param_groups if group["weight_decay"]]
    assert len(decayed) == 1 and len(decayed[0]["params"]) == 3 * 7


def test_plan_fits_into_the_time():
    settings = {"seeds": [0, 1, 2], "rates": [1e-3, 2e-3], "tokens": 10_000_000, "bracket_tokens": 3_000_000}
    plan = gpu_evidence.Plan({**settings, "seq_len": 512, "batch_size": 32}, 2, time.time() + 100)
    plan.speeds, best = dict.fromkeys(gpu_evidence.VARIANTS, 100_000.0), dict.fromkeys(gpu_evidence.VARIANTS, 1e-3)
    bracket, final = plan.bracket_tokens(), plan.final_tokens(best)
    assert 0 < bracket < final < 2_000_000 and final % (512 * 32) == 0
    assert plan.seconds(plan.final(final, best)) < 85
    plan.deadline += 10_000
    assert 9_950_000 < plan.final_tokens(best) <= 10_000_000
    assert gpu_evidence.makespan([3, 2, 2, 2], 2) == 5


def test_rates_are_tried_beyond_an_edge():
    def rows(*losses):
        return [
            {"stage": "bracket", "variant": "donor", "learning_rate": rate, "held_out_loss": loss}
            for rate, loss in losses
        ]

    assert gpu_evidence.further_rates(rows((1, 3.0), (2, 2.0), (4, 2.5)), [1, 2, 4]) == {}
    assert gpu_evidence.further_rates(rows((1, 3.0), (2, 2.0)), [1, 2]) == {"donor": 4}
    assert gpu_evidence.further_rates(rows((1, 2.0), (2, None)), [1, 2]) == {"donor": 0.5}
    assert gpu_evidence.further_rates(rows((1, 5.0), (2, 4.0), (4, 3.0), (8, 2.0)), [1, 2]) == {}


def test_interval_holds_the_mean():
    differences = np.random.default_rng(0).normal(-0.1, 0.2, 2048)
    low, high = gpu_evidence_report.interval(differences)
    assert low < differences.mean() < high and high - low == pytest.approx(4 * 0.2 / 2048**0.5, rel=0.3)


@pytest.mark.slow
def test_an_interrupted_command_goes_on(data, tmp_path):
    output = tmp_path / "output"
    command = [sys.executable, str(BENCHMARKS / "gpu_evidence.py"), *options(data, output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [*command, "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    while first.poll() is None and not (output / "evidence.json").exists():
        time.sleep(0.05)
    assert first.poll() is None
    first.kill()
    first.communicate()  # also waits for its workers, which hold the pipe
    before = json.loads((output / "evidence.json").read_text())["rows"]
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert second.returncode == 0, second.stderr
    content = json.loads((output / "evidence.json").read_text())
    assert content["rows"][: len(before)] == before and len(content["sessions"]) == 2
    keys = [gpu_evidence.key(row) for row in content["rows"]]
    assert len(set(keys)) == len(keys) and sum(key[0] == "final" for key in keys) == 3
    summary = json.loads(second.stdout.splitlines()[-1])
    assert summary["complete"] and set(summary["variants"]) == {"donor", "block", "full"}
    names = {path.name for path in output.iterdir()}
    assert names == {"evidence.json", "evidence.md", "evidence.png", "config.json", "model.safetensors"}
    assert gpu_evidence.main(options(data, output)) is None  # nothing is left to do
    assert json.loads((output / "evidence.json").read_text())["rows"] == content["rows"]
    with pytest.raises(SystemExit, match="other options"):
        gpu_evidence.main(options(data, output, "--depth-lr-scale", "1"))
