# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Tensor and expert parallel training, for real: processes on gloo that share the layers or the experts of a model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.big_modeling import _attach_context_parallel_hooks
from attnres_recipes.packing import separate_documents
from attnres_recipes.tensors import OLDEST, UNSUPPORTED, Sharding, check_can_be_cut, check_launch, in_parts
from families import FAMILIES, relative_error, tiny_donor, tiny_model, tokens
from launch_process import CONFIGS, environment, launch_server
from packaging import version
from peft import PeftModel
from pretrain_process import SIZES
from test_distributed import REORDERED_GRADIENTS, batch, expected_gradients, run_on_two_processes, whole
from test_multi_device import (
    MUON,
    ONE,
    REORDERED,
    RUN,
    STEPS,
    TIMES,
    TWO,
    accelerate_launch,
    check_same_curve,
    check_same_weights,
    read_lines,
    weights,
    without_times,
)
from transformers import AutoModelForCausalLM, PreTrainedModel


if version.parse(transformers.__version__) < version.parse(OLDEST):
    pytest.skip("this transformers doesn't train models in parts", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")]

EXPERTS = ["num_experts=4", "num_experts_per_tok=2", "moe_intermediate_size=32", "num_key_value_heads=2"]
ROOT = Path(__file__).parents[1]
# with norms of heads, whose gradients processes have in parts
MOE = ["--config=qwen3_moe", "--train-tokenizer=300", "--set", *SIZES, *EXPERTS, *STEPS, "--data=text"]
SHARED = "--expert-parallel=2"
# what is trained, in which processes
RUNS = {
    "tp": ("tp", 2, RUN, ONE),
    "tp-fsdp": ("tp", 4, RUN, TWO),
    "tp-ep": ("tp", 2, [*MOE, SHARED], ONE),
    "ep": ("ddp", 2, [*MOE, SHARED], TWO),
}
KILLED = ("tp", "ep")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with launch_server(tmp_path_factory.mktemp("tensors")) as server:
        yield server


@pytest.fixture(scope="module")
def single(server):
    """The runs of one process."""
    server.launch("", "pretrain", *RUN, ONE, "--output", "single").finish()
    return server.folder / "single"


@pytest.fixture(scope="module")
def single_moe(server):
    server.launch("", "pretrain", *MOE, ONE, "--output", "moe").finish()
    return server.folder / "moe"


@pytest.fixture(scope="module")
def trained(server) -> dict:
    """The folder of each of RUNS, and what was printed; one with the command of users."""
    printed = {}
    for name, (config, processes, options, size) in RUNS.items():
        if name == "tp":
            command = accelerate_launch(config, *options, size, "--output", name)
            result = subprocess.run(command, cwd=server.folder, capture_output=True, text=True, timeout=250)
            assert result.returncode == 0, result.stderr
            printed[name] = result.stdout
        else:
            launch = server.launch(config, "pretrain", *options, size, "--output", name, processes=processes)
            printed[name] = "".join(launch.finish())
    return {name: (server.folder / name, text) for name, text in printed.items()}


@pytest.fixture(scope="module")
def resumed(server, trained) -> dict:
    """The folders of the same training, killed after its first checkpoint and started again."""
    folders = {}
    for name in KILLED:
        config, processes, options, size = RUNS[name]
        folder = folders[name] = server.folder / f"{name}-resumed"
        command = (config, "pretrain", *options, size, "--output", folder.name)
        launch = server.launch(*command, processes=processes)
        assert launch.runs[0].wait_for((folder / "checkpoint-2").exists)
        launch.kill()
        first, *_ = server.launch(*command, processes=processes).finish()
        assert f"going on from {folder.name}/checkpoint-2" in first
    return folders


def parts(folder, processes: int) -> list[dict]:
    return [torch.load(folder / f"rank-{index}.pt") for index in range(processes)]


@pytest.mark.parametrize("name", RUNS)
def test_same_losses(name, single, single_moe, trained):
    """Losses, gradient norms and looks of one process, to rounding; one process sums up, in JSON alone."""
    folder, printed = trained[name]
    expected = single if "--config=llama" in RUNS[name][2] else single_moe
    check_same_curve(folder, expected, REORDERED)
    check_same_weights(weights(folder), weights(expected), tolerance=2e-5)
    summary = json.loads(printed)
    results = json.loads((expected / "results.json").read_text())
    assert all(summary[key] == results[key] for key in ("steps", "tokens", "parameters", "depth_parameters"))
    files = [{path.name for path in run.iterdir() if path.suffix != ".pt"} for run in (folder, expected)]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", RUNS)
def test_parts(name, trained, resumed):
    """Each process has a part of each matrix of the layers, whole experts if it is to, and depth attention whole; what
    is saved, at the end and in checkpoints, loads in one process, and is what they had together."""
    folder, processes = resumed.get(name, trained[name][0]), RUNS[name][1]
    ranks, shares = parts(folder, processes), 4 if name == "tp-fsdp" else 2
    for key, tensor in ranks[0].items():
        assert all(torch.equal(rank[key]["whole"], tensor["whole"]) for rank in ranks)
        here, total = [rank[key]["here"] for rank in ranks], tensor["whole"].numel()
        is_cut = tensor["whole"].ndim > 1 and ".mlp.gate.weight" not in key and "depth" not in key
        if is_cut or name == "ep":
            assert sum(here) == total and max(here) <= -(-total // shares) + tensor["whole"].shape[-1], (key, here)
        elif processes == 2:
            assert here == [total] * 2, key
    for saved in (folder / "model", folder / "checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(saved)
        check_same_weights(dict(model.named_parameters()), {key: rank["whole"] for key, rank in ranks[0].items()})
        assert "distributed_config" not in json.loads((saved / "config.json").read_text())


@pytest.mark.parametrize("name", KILLED)
def test_resume(name, trained, resumed):
    """A killed run ends with the losses, looks and weights of the undisturbed one, bit for bit."""
    assert without_times(resumed[name]) == without_times(trained[name][0])
    check_same_weights(weights(resumed[name]), weights(trained[name][0]))


def test_optimizer_and_stream(server, single):
    """Muon orthogonalises whole matrices also where they are cut up, of a stream that each process reads for itself."""
    options = [*RUN, "--optimizer=muon", "--streaming"]
    server.launch("", "pretrain", *options, ONE, "--output", "muon").finish()
    server.launch("tp", "pretrain", *options, ONE, "--output", "muon-tp").finish()
    check_same_curve(server.folder / "muon-tp", server.folder / "muon", MUON)


def test_lora(server, single):
    """Adapters on parts have the values and losses of those on the whole; a killed run goes on; what they are in the
    end loads in one process, and is merged."""
    sums = [{"prompt": f"What is {a} plus {b}?", "completion": f" It is {a + b}."} for a in range(9) for b in range(9)]
    (server.folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    options = ["--model=single/model", "--data=sums.jsonl", "--learning-rate=0.01", *STEPS, ONE]
    lora = [*options, "--method=lora", "--merge"]
    server.launch("", "finetune", *lora, "--output", "lora").finish()
    command = ("tp", "finetune", *lora, "--output", "lora-tp")
    launch = server.launch(*command)
    folder = server.folder / "lora-tp"
    assert launch.runs[0].wait_for((folder / "checkpoint-2").exists)
    launch.kill()
    server.launch(*command).finish()
    check_same_curve(folder, server.folder / "lora", REORDERED)
    first, second = parts(folder, 2)
    base = AutoModelForCausalLM.from_pretrained(single / "model")
    state = dict(PeftModel.from_pretrained(base, folder / "model").named_parameters())
    here = {key: value for key, value in first.items() if "lora_" in key or "modules_to_save" in key}
    for key, value in here.items():
        assert torch.equal(state[key], value["whole"]) and torch.equal(value["whole"], second[key]["whole"]), key
    assert sum(value["here"] < value["whole"].numel() for value in here.values()) == len(here) // 2 - 1
    assert json.loads((folder / "results.json").read_text())["merged_relative_error"] < 1e-5
    refused = {
        "can't share DoRA's adapters": ["--method=dora"],
        "can't share adapters of lm_head": ["--method=lora", "--target-modules", "lm_head", "q_proj"],
    }
    if importlib.util.find_spec("bitsandbytes"):
        refused["don't cut up quantised weights"] = ["--method=qlora"]
    for message, more in refused.items():
        check_refused(server, message, "tp", "finetune", *options, *more)


def test_full_finetuning(server, single):
    """The mean over the tokens of answers counts each answer once."""
    (server.folder / "facts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}?", "completion": "!" * (1 + a % 5)}) + "\n" for a in range(60))
    )
    options = ["--model=single/model", "--data=facts.jsonl", "--method=full", *STEPS, ONE, "--depth-every=0"]
    for config, output in (("", "full"), ("tp", "full-tp")):
        server.launch(config, "finetune", *options, "--output", output).finish()
    runs = [read_lines(server.folder / output / "metrics.jsonl") for output in ("full", "full-tp")]
    for line, expected in zip(*runs, strict=True):
        assert all(value == pytest.approx(expected[key], rel=1e-5) for key, value in line.items() if key not in TIMES)


def gradients_of_families(rank, folder):
    from transformers.distributed import DistributedConfig

    sizes = [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2, "ep_size": 2}]
    shardings = []
    for size in sizes:
        config, _, mesh = PreTrainedModel.prepare_distribute_model(DistributedConfig(**size))
        shardings.append(Sharding(size.get("tp_size", 1), size.get("ep_size", 1), config, mesh))
    for family in FAMILIES:
        for sharding in shardings:
            model = tiny_for_two(family)
            if sharding.expert > 1 and not model.ep_plan or family in ("olmo", "gpt_oss") and sharding.expert == 1:
                continue
            check_can_be_cut(model, sharding)
            expected = expected_gradients(model)
            cut = in_parts(tiny_for_two(family), sharding).train()
            assert all(torch.equal(whole(value), model.state_dict()[key]) for key, value in cut.state_dict().items())
            for index in range(2):  # what accumulates
                (cut(input_ids=batch(index), labels=batch(index)).loss / 2).backward()
            for key, parameter in cut.named_parameters():
                error = relative_error(whole(parameter.grad), expected[key])
                assert error <= REORDERED_GRADIENTS, f"{family} {sharding}: {key}: {error}"


def tiny_for_two(family: str):
    """A model whose number of experts two processes can share, and with few layers."""
    experts = {"num_local_experts": 4} if "num_local_experts" in FAMILIES[family] else {}
    return tiny_model(family, num_hidden_layers=3, use_cache=False, **experts)


@pytest.mark.slow
def test_families(tmp_path):
    """Gradients of all families in two processes, accumulated over two backwards, are those of one process."""
    run_on_two_processes(tmp_path, gradients_of_families)


def check_refused(server, message: str, config: str, script: str, *options):
    outputs = server.launch(config, script, *options, "--output=refused").finish(exit_code=1)
    lines = [line for output in outputs for line in output.splitlines()]
    assert len(lines) == 1 and message in lines[0], lines
    assert not (server.folder / "refused" / "run.json").exists()


def test_refusals(server, single, trained):
    """What can't be cut up is refused in one line, and leaves nothing behind."""
    one_head = ["--set", *SIZES[:3], "num_attention_heads=3", "hidden_size=48", "num_hidden_layers=2"]
    llama = ["--config=llama", "--train-tokenizer=300", *STEPS, "--data=text"]
    check_refused(server, "must divide num_attention_heads = 3", "tp", "pretrain", *llama, *one_head)
    outputs = server.launch("ddp", "pretrain", *RUN, ONE, "--output=tp").finish(exit_code=1)
    assert "holds a run with sharding = tensor parallelism in 2, not None" in "".join(outputs)


def test_refused_launches(monkeypatch):
    """Numbers of processes that don't fit, and others that cut up models."""
    with pytest.raises(ValueError, match="--expert-parallel 2 must divide the number of processes, 1"):
        check_launch(2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="cuts up models by itself, not with FSDP: use tp.yaml"):
        check_launch(2)
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(ValueError, match="tensor parallelism cuts up models by itself"):
        check_launch(1)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(ValueError, match="1 processes can't share layers in groups of 2"):
        check_launch(1)
    for name in UNSUPPORTED:
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
        with pytest.raises(ValueError, match=f"no {name}: "):
            check_launch(1)
        monkeypatch.delenv(f"PARALLELISM_CONFIG_{name.upper()}")


def test_refused_models():
    """What transformers would cut up wrongly, fail at, or leave whole."""
    tensors, experts = Sharding(2, 1, None, None), Sharding(1, 2, None, None)
    refused = {
        "applies in place": (tiny_model("olmo"), tensors),
        "no tensor parallelism for the layers of attnres_gpt_oss; use --expert-parallel": (
            tiny_model("gpt_oss"),
            tensors,
        ),
        "must divide num_key_value_heads = 1": (tiny_model(num_key_value_heads=1), tensors),
        "must divide the number of experts, 5": (tiny_model("mixtral"), experts),
        "llama has no experts": (tiny_donor(), experts),
    }
    for message, (model, sharding) in refused.items():
        with pytest.raises(ValueError, match=message):
            check_can_be_cut(model, sharding)


def test_context_parallelism(server):
    """It is refused, because accelerate leaves out the masks that keep packed documents apart."""
    config = (CONFIGS / "fsdp2.yaml").read_text() + "parallelism_config: {parallelism_config_cp_size: 2}\n"
    (server.folder / "cp.yaml").write_text(config)
    check_refused(server, "leaves out the masks", str(server.folder / "cp"), "pretrain", *RUN)
    model, ids = separate_documents(tiny_donor()).eval(), tokens(1, 8)
    positions = torch.arange(4).repeat(2)[None]
    with torch.no_grad():
        alone = model(ids[:, 4:], position_ids=positions[:, 4:]).logits
        packed = model(ids, position_ids=positions, use_cache=False).logits[:, 4:]
        _attach_context_parallel_hooks(model)
        mixed = model(ids, position_ids=positions, use_cache=False).logits[:, 4:]
    assert relative_error(packed, alone) < 1e-5 < 0.1 < relative_error(mixed, alone)


def test_configuration(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert (
        "accelerate launch --config_file scripts/accelerate/tp.yaml --num_processes"
        in (CONFIGS / "tp.yaml").read_text()
    )
    variables = environment("tp", 2)
    assert variables["PARALLELISM_CONFIG_TP_SIZE"] == "2" and "ACCELERATE_USE_FSDP" not in variables


@pytest.mark.slow
def test_memory(server, tmp_path):
    """benchmarks/devices.py counts what is there, and what it gave is what it says: a part for each process."""
    output, sizes = tmp_path / "devices.json", "num_hidden_layers=2 hidden_size=32 intermediate_size=64"
    sizes += " num_attention_heads=2 num_key_value_heads=2 vocab_size=2048"
    benchmark = [sys.executable, ROOT / "benchmarks" / "devices.py", "--output", output, "--sizes", sizes]
    training = f"--data {server.folder / 'text'} --held-out 0.2 --seq-len 32 --batch-size 2 --steps 2 --depth-every 0"
    benchmark += [f"--training={training}", "--ways", "llama", "llama tp"]
    subprocess.run(benchmark, check=True, capture_output=True, timeout=250)
    for path in (output, ROOT / "results" / "devices.json"):
        rows = json.loads(path.read_text())["rows"]
        whole, cut = rows["llama"], rows["llama tp"]
        assert cut["loss"] == pytest.approx(whole["loss"], rel=REORDERED)
        for name in ("parameters", "gradients", "optimizer"):
            assert 0.5 <= cut[name] / whole[name] < 0.8
        assert whole["gradients"] == whole["parameters"] == whole["optimizer"] / 2
    assert rows["llama fsdp2"]["parameters"] < 0.51 * rows["llama ddp"]["parameters"]
    assert rows["llama ddp"]["parameters"] == whole["parameters"]
    assert rows["qwen3_moe ep"]["parameters"] < 0.51 * rows["qwen3_moe"]["parameters"]
