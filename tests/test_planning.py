# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Plans of pipelines hold in real ones: bytes, orders, parameters; and their times in closed formulas."""

import copy
import functools
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attnres_convert import InputError
from attnres_recipes.options import PlanOptions
from attnres_recipes.pipelines import LeanStage, Pipeline, PipelinePlan, cut
from attnres_recipes.planning import Machine, Model, Step, StreamPlan, mean_context, pipeline_size, plan_devices, report
from attnres_recipes.schedules import Operation, most_held, order, simulate
from families import tiny_config, tiny_donor, tiny_donor_config, tiny_model, tokens
from test_pipelines import needs_gloo, run_on_processes
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B, ScheduleLoopedBFS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig


ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "pipeline" / "kimi_linear_48b.json"
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import pipeline_bytes  # noqa: E402
import plan_devices as script  # noqa: E402


MICROBATCHES, BATCH, SEQ, LAYERS = 4, 8, 9, 9
MACHINE = Machine(flops=1e12, memory_bandwidth=1e11, node=2, inside=1e10, between=1e9, latency=1e-5)
SHAPES = [("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("1f1b", 2), ("1f1b", 3)]


def step_of(plan: PipelinePlan, schedule: str = "1f1b", num_microbatches: int = MICROBATCHES, **options) -> Step:
    values = {"replicas": 1, "seq_len": SEQ, "tokens": BATCH // MICROBATCHES * SEQ, "precision": "float32", **options}
    return Step(Model(plan.config), plan, MACHINE, schedule, num_microbatches, **values)


# Against real pipelines


def room(stages) -> int:
    """Bytes of the buffers for what other processes send."""
    infos = [info for stage in stages for by in (stage.args_recv_info, stage.grad_recv_info) for info in by.values()]
    return sum(info.buffer.nbytes for own in infos for info in own if info.buffer is not None)


def compared(rank, folder, num_stages, schedule, cached, **options):
    """One step: what is sent in all and on the busiest link, the order of operations, and the room for what comes."""
    model = tiny_model("llama", num_hidden_layers=LAYERS, **options).train()
    done, rooms, stages, forward, backward = [], [0], {}, LeanStage.forward_one_chunk, LeanStage.backward_one_chunk

    def noted(run, is_backward):
        def noting(stage, chunk, *args, **kwargs):
            stages[stage.stage_index] = stage
            done.append(Operation(stage.stage_index, is_backward, chunk))
            rooms.append(room(stages.values()))
            return run(stage, chunk, *args, **kwargs)

        return noting

    LeanStage.forward_one_chunk, LeanStage.backward_one_chunk = noted(forward, False), noted(backward, True)
    try:
        pipeline = Pipeline(model, MICROBATCHES, num_stages, schedule, cached=cached)
        ids = tokens(BATCH, SEQ)
        pipeline.step(ids, labels=ids)
    finally:
        LeanStage.forward_one_chunk, LeanStage.backward_one_chunk = forward, backward
    step, context = step_of(pipeline.plan, schedule), (num_stages, schedule, cached, options)
    sent = torch.tensor([pipeline.bytes_sent["forward"], pipeline.bytes_sent["backward"]])
    busiest = sent.clone()
    torch.distributed.all_reduce(sent)
    torch.distributed.all_reduce(busiest, op=torch.distributed.ReduceOp.MAX)
    assert sent.tolist() == [step.sent, step.sent], context
    assert busiest.tolist() == [step.busiest_link] * 2, context
    assert done == step.orders[rank], context
    plan = pipeline.plan
    edges = [i for i in range(1, num_stages) if rank in (plan.rank(i), plan.rank(i - 1))]
    assert 0 < max(rooms) < MICROBATCHES * step.tensor * sum(map(plan.num_received, edges)), context
    assert room(stages.values()) == 0, context
    assert sum(p.numel() for p in model.parameters()) == step.parameters(rank) + step.model.everywhere, context


def case(num_stages: int, schedule: str = "1f1b", cached: bool = True, mode: str = "block", block_size: int = 2):
    options = {"attn_res_mode": mode, "attn_res_block_size": block_size}
    return functools.partial(compared, num_stages=num_stages, schedule=schedule, cached=cached, **options)


@needs_gloo
@pytest.mark.slow
def test_two_real_processes(tmp_path):
    """With stages that begin in the middle of a block; Full; naive; both schedules, one to four stages per process."""
    cases = [case(2, "gpipe", mode="full"), case(4, "gpipe", block_size=3), case(4, cached=False), case(6, mode="full")]
    run_on_processes(2, tmp_path, *cases)


@needs_gloo
@pytest.mark.slow
def test_four_real_processes(tmp_path):
    run_on_processes(4, tmp_path, case(4), case(8))


# Against torch's schedules


def operations_of(actions: list) -> list[Operation]:
    names = {"FORWARD": False, "FULL_BACKWARD": True}
    known = [action for action in actions if action is not None and action.computation_type.name in names]
    return [Operation(a.stage_index, names[a.computation_type.name], a.microbatch_index) for a in known]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_orders_are_those_of_torch(num_ranks):
    for number in (num_ranks, 2 * num_ranks, 5 * num_ranks, num_ranks + 1):
        single = SimpleNamespace(_num_stages=num_ranks, _n_microbatches=number)
        for schedule, kind in (("gpipe", ScheduleGPipe), ("1f1b", Schedule1F1B)):
            expected = kind._get_pipeline_order(single)
            # torch's list of 1F1B counts the last stage's forward passes from 1, which is not what it runs
            for rank in range(num_ranks - (schedule == "1f1b")):
                assert order(schedule, rank, num_ranks, 1, number) == operations_of(expected[rank])
        for num_virtual in (2, 3):
            rounds = max(1, number // num_ranks)
            several = SimpleNamespace(n_local_stages=num_virtual, pp_group_size=num_ranks, _n_microbatches=number)
            several._stages, several.microbatches_per_round = [None] * num_virtual, number // rounds
            for schedule, kind in (("gpipe", ScheduleLoopedBFS), ("1f1b", ScheduleInterleaved1F1B)):
                if schedule == "1f1b" and number % rounds:
                    continue  # torch refuses it
                for rank in range(num_ranks):
                    expected = operations_of(kind._calculate_single_rank_operations(several, rank))
                    assert order(schedule, rank, num_ranks, num_virtual, number) == expected


@pytest.mark.parametrize("num_ranks, number", [(2, 4), (4, 4), (4, 12)])
def test_microbatches_in_flight(num_ranks, number):
    """GPipe has all, 1F1B one for each stage from here on."""
    for rank in range(num_ranks):
        kept, left = {rank: 1}, {rank: 0}
        assert most_held(order("gpipe", rank, num_ranks, 1, number), kept, left) == (number, number)
        assert most_held(order("1f1b", rank, num_ranks, 1, number), kept, left)[1] == num_ranks - rank


def test_gradients_that_wait_are_held():
    """Those of sources that an earlier stage of the process has closed: until its backward pass."""
    operations = [Operation(stage, False, 0) for stage in (0, 2)] + [Operation(stage, True, 0) for stage in (2, 0)]
    assert most_held(operations, {0: 10, 2: 1}, {0: -5, 2: 5})[0] == 16
    assert most_held(operations, {0: 10, 2: 1}, {0: -500, 2: 500})[0] == 511
    for num_ranks, num_stages in ((2, 6), (3, 9)):
        step = step_of(PipelinePlan(tiny_config(num_hidden_layers=LAYERS), num_stages, num_ranks))
        lefts = [sum(map(step.stage_left, step.plan.stages(rank))) for rank in range(num_ranks)]
        assert lefts == [0] * num_ranks and any(map(step.stage_left, range(num_stages)))


# Against closed formulas


def run(
    schedule: str, num_ranks: int, num_virtual: int, number: int, seconds=(1.0, 2.0), transfer=(0.0, 0.0), **options
):
    orders = [order(schedule, rank, num_ranks, num_virtual, number) for rank in range(num_ranks)]
    return simulate(orders, lambda operation: seconds[operation.is_backward], lambda _: transfer, **options)


@pytest.mark.parametrize("schedule, num_virtual", SHAPES)
@pytest.mark.parametrize("num_ranks, number", [(2, 2), (2, 6), (4, 4), (4, 8), (8, 32)])
def test_bubble_of_equal_stages(schedule, num_virtual, num_ranks, number):
    """(P - 1) / (V M + P - 1) without communication (Narayanan et al., arXiv 2104.04473, sections 2.2.1 and 2.2.2)."""
    expected = (num_ranks - 1) / (num_virtual * number + num_ranks - 1)
    for is_ahead in (True, False):
        simulated = run(schedule, num_ranks, num_virtual, number, is_ahead=is_ahead)
        assert simulated.bubble == pytest.approx(expected, abs=1e-12)
        assert simulated.busy == [3 * num_virtual * number] * num_ranks


def test_seconds_with_transfers():
    """GPipe: what is received ahead costs once on the way there and back, else once per microbatch more."""
    ranks, number, latency, link = 4, 6, 0.125, 0.25
    transfer = latency + link
    ahead = (number + ranks - 1) * 3 + 2 * (ranks - 1) * transfer
    assert run("gpipe", ranks, 1, number, transfer=(latency, link)).seconds == pytest.approx(ahead)
    late = (number + ranks - 2) * (3 + 2 * transfer) + 3
    assert run("gpipe", ranks, 1, number, transfer=(latency, link), is_ahead=False).seconds == pytest.approx(late)


def test_links_are_taken_in_turn():
    """Where links are slower than stages, they decide: each microbatch waits for the one before on the link."""
    simulated = run("gpipe", 2, 1, 5, seconds=(1.0, 1.0), transfer=(0.0, 3.0))
    assert simulated.seconds == pytest.approx(2 * (1 + 5 * 3) + 2)


def test_orders_that_never_end_are_an_error():
    with pytest.raises(ValueError, match="wait for one another"):
        simulate([[Operation(0, True, 0)], [Operation(1, False, 0)]], lambda _: 1.0, lambda _: (0.0, 0.0))


def test_slower_stage_decides():
    """1F1B: the slowest stage computes without pause, once it has begun."""
    orders = [order("1f1b", rank, 3, 1, 20) for rank in range(3)]
    simulated = simulate(orders, lambda o: (5.0 if o.stage == 1 else 1.0) * (1 + o.is_backward), lambda _: (0.0, 0.0))
    assert simulated.seconds == pytest.approx(20 * 15 + 1 + 2)
    assert simulated.busy == [60, 300, 60]


# Against real models


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "kimi_linear", "gemma2"])
@pytest.mark.parametrize("mode", ["donor", "block", "full"])
def test_parameters_of_processes(family, mode):
    """Those of the model that is left in a process; gemma2 has its embedding at both ends."""
    tied = {"tie_word_embeddings": family == "gemma2"}
    if mode == "donor":
        model = tiny_donor(family, **tied)
    else:
        model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=2, **tied)
    kind = StreamPlan if mode == "donor" else PipelinePlan
    for num_stages, num_ranks in ((2, 2), (4, 2), (3, 3)):
        step = step_of(kind(model.config, num_stages, num_ranks))
        assert step.model.parameters == sum(p.numel() for p in model.parameters())
        for rank in range(num_ranks):
            here = cut(copy.deepcopy(model), step.plan, rank)
            assert step.parameters(rank) + step.model.everywhere == sum(p.numel() for p in here.parameters())


def test_parameters_of_a_large_model():
    """Kimi Linear has 48B parameters, of which 3B are active, and the processes of a pipeline have them all."""
    config = type(tiny_config("kimi_linear"))(attn_res_block_size=3)
    step = step_of(PipelinePlan(config, 16, 8))
    assert 48e9 < step.model.parameters < 50e9 and 2.7e9 < step.model.active < 3.3e9
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    cut(model, step.plan, 7)
    assert sum(p.numel() for p in model.parameters()) == step.parameters(7) + step.model.everywhere
    assert sum(map(step.parameters, range(8))) + step.model.everywhere == step.model.parameters


def saved_bytes(model, ids: torch.Tensor) -> int:
    """What a forward pass of the layers keeps for the backward pass, without parameters."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_kept_activations(family):
    """Real layers keep what is planned, and up to 1.6 times as much where norms and activations aren't fused."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "max_position_embeddings": 128}
    sizes |= {"moe_intermediate_size": 48, "mlp_only_layers": []} if family == "qwen3_moe" else {}
    ids, of_modes = tokens(1, 128), {}
    for mode in ("donor", "block", "full"):
        found = []
        for layers in (4, 8):
            options = {**sizes, "num_hidden_layers": layers}
            if mode == "donor":
                model = tiny_donor(family, **options).train()
            else:
                model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=2, **options).train()
            plan = Model(model.config)
            planned = sum(plan.kept_bytes(layer, 4, False) for layer in range(layers))
            found.append((saved_bytes(model, ids) / ids.numel(), planned))
        (few_saved, few_planned), (saved, planned) = found
        of_modes[mode] = saved - few_saved
        assert 1 < of_modes[mode] / (planned - few_planned) < 1.6, mode
    assert of_modes["donor"] < of_modes["block"] < 1.05 * of_modes["donor"]
    assert of_modes["block"] < of_modes["full"] < 1.15 * of_modes["donor"]


def test_flops_of_llama():
    """A forward pass of a Llama, counted by torch: products of matrices, and attention that isn't causal."""
    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4
    )
    config._attn_implementation = "eager"
    model, seq = AutoModelForCausalLM.from_config(config), 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens(1, seq), use_cache=False)
    planned = Model(config)
    norms = 2 * (2 * 3 + 1) * 32
    attention = sum(planned.attention_flops(layer, seq) for layer in range(3))
    of_all = attention * seq / mean_context(seq, seq)  # eager attention computes what the mask then hides
    total = sum(planned.forward_flops(layer, seq) for layer in range(3))
    last_norm = 2 * 32
    assert (total - attention + of_all - norms + last_norm) * seq == counter.get_total_flops()


def test_context_and_reads():
    assert mean_context(5, 5) == (1 + 2 + 3 + 4 + 5) / 5
    assert mean_context(5, 2) == (1 + 2 + 2 + 2 + 2) / 5
    block = Model(tiny_config(num_hidden_layers=8, attn_res_block_size=2))
    assert block.read_traffic(4) == 2 / 4 + 5  # the embedding and one block are closed
    full = Model(tiny_config(num_hidden_layers=64, attn_res_mode="full", attn_res_block_size=8))
    assert full.read_traffic(0) == 24  # the paper's example: 128 sublayers in blocks of 16
    assert Model(tiny_donor_config()).read_traffic(0) == 3


def test_memory_by_hand():
    """Two devices, a stage each, two microbatches: everything from the sizes of the tensors."""
    config = tiny_config(num_hidden_layers=4, attn_res_block_size=1, tie_word_embeddings=False)
    step = step_of(PipelinePlan(config, 2, 2), "gpipe", 2, precision="mixed", checkpointing=True)
    hidden, vocab = config.hidden_size, config.vocab_size
    assert step.tensor == step.tokens * hidden * 2
    memory = step.memory(1)
    shared = 2 * 9 * hidden
    assert memory["weights"] == 2 * step.parameters(1) + 4 * shared
    assert memory["optimizer"] == 12 * step.parameters(1) + 8 * shared
    received = 3 * step.tensor  # the embedding and two blocks
    assert memory["activations"] == 2 * (received + 3 * step.tensor + step.tokens * vocab * 4)
    again = max(step.model.kept_bytes(layer, 2, False) for layer in (2, 3))
    assert memory["working"] == received + step.tokens * max(6 * vocab, again)
    assert memory["total"] == sum(memory.values()) - memory["total"]
    sharded = step_of(PipelinePlan(config, 2, 2), "gpipe", 2, replicas=4, precision="mixed", shard_optimizer=True)
    assert sharded.memory(1)["optimizer"] == memory["optimizer"] / 4
    assert step.reduce_seconds < sharded.reduce_seconds


# The command, and what is published


@needs_gloo
@pytest.mark.slow
def test_bytes_can_be_counted_again(capsys):
    pipeline_bytes.main(["--processes", "2", "--stages-per-process", "2", "--layers", "4", "--block-sizes", "1"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(rows) == 4 and all(row["counted_forward"] == row["counted_backward"] == row["planned"] for row in rows)


def test_published_bytes():
    """What was counted in real processes is what the plan says, and less than the paper's formulas where it can be."""
    results = json.loads((PUBLISHED.parent / "bytes.json").read_text())
    assert len(results["rows"]) == 28
    for row in results["rows"]:
        assert row["counted_forward"] == row["counted_backward"] == row["planned"]
        args = SimpleNamespace(**results["settings"])
        assert pipeline_bytes.with_formulas(row, row["processes"], args) == row
        by_paper = row["paper_cached" if row["cached"] and row["num_virtual"] > 1 else "paper_naive"]
        embeddings = row["processes"] * row["num_virtual"] - 1
        most = embeddings * row["bytes_per_source"]
        assert row["planned"] <= by_paper + most and (row["cached"] or row["planned"] == by_paper + most)
    assert pipeline_bytes.report(results) == (PUBLISHED.parent / "bytes.md").read_text()


def test_published_table_can_be_made_again():
    """The command in the file, with the same numbers and the same text."""
    expected = json.loads(PUBLISHED.read_text())
    text = PUBLISHED.with_suffix(".md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("$ "))
    options = script.parse_arguments(shlex.split(command)[3:])
    options.config = str(ROOT / options.config)
    plan = plan_devices(options)
    assert {row["devices"] for row in plan["rows"]} == {8, 16, 32, 64}
    plan["model"]["config"] = expected["model"]["config"]
    assert json.loads(json.dumps(plan)) == expected
    assert report(plan, command.removeprefix("$ ")) == text


def test_what_is_said_of_the_table():
    """The numbers in its README."""
    text, rows = (PUBLISHED.parent / "README.md").read_text(), json.loads(PUBLISHED.read_text())["rows"]

    def said(values, digits: int) -> str:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    by_place = {(row["devices"], row["schedule"], row["stages_per_device"]): row for row in rows[::-1]}
    donors = {place: row for place, row in by_place.items() if row["model"] == "donor"}
    assert len(donors) == len(by_place) == 12
    for model in ("block", "full"):
        own = [row for row in rows if row["model"] == model and (row["cached"] or row["stages_per_device"] == 1)]
        for name, several in (("overhead", (1, 2)), ("overhead_received_late", (1,))):
            assert said([100 * row[name] for row in own if row["stages_per_device"] in several], 1) + " %" in text
        memories = [
            row["memory_gb"]["total"] - donors[place]["memory_gb"]["total"]
            for row in own
            if (place := (row["devices"], row["schedule"], row["stages_per_device"]))[1] == "1f1b"
        ]
        assert said(memories, 1) + " GB more" in text
    own = [row for row in rows if row["model"] == "block" and row["schedule"] == "1f1b"]
    bubbles = {row["pipeline_size"] * row["stages_per_device"]: [] for row in own}
    for row in own:
        bubbles[row["pipeline_size"] * row["stages_per_device"]].append(100 * row["bubble"])
    assert said(bubbles[16], 0) + " % of the time" in text and f"{bubbles[8][0]:.0f} % with 8 stages" in text
    seconds = [row["step_s"] for row in own if row["devices"] == 8 and (row["cached"] or row["stages_per_device"] == 1)]
    assert f"{seconds[1]:.1f} s instead of {seconds[0]:.1f} s" in text
    memories = [row["memory_gb"] for row in rows if row["schedule"] == "gpipe"]
    assert min(memory["activations"] for memory in memories) > 80


def test_pipelines_have_as_many_devices_as_they_can():
    assert [pipeline_size(devices, 27, 1, None) for devices in (8, 16, 27, 32, 64)] == [8, 16, 27, 16, 16]
    assert [pipeline_size(devices, 27, 2, None) for devices in (8, 16, 64, 26)] == [8, 8, 8, 13]
    assert pipeline_size(64, 27, 2, 4) == 4
    for devices, given in ((29, None), (8, 3), (1, None)):
        with pytest.raises(InputError, match="don't make pipelines"):
            pipeline_size(devices, 27, 1, given)


SMALL = ["--config", "llama", "--set", "num_hidden_layers=4", "hidden_size=64", "--devices", "2", "--seq-len", "64"]


def test_command(tmp_path, capsys):
    """Files and a last line of JSON; caching shows where there are several stages per device."""
    output = tmp_path / "new" / "plan"
    script.main([*SMALL, "--batch-size", "8", "--block-size", "1", "--json", "--output", str(output)])
    printed = capsys.readouterr().out
    plan = json.loads(printed.splitlines()[-1])
    assert plan == json.loads(output.with_suffix(".json").read_text())
    assert printed.startswith(output.with_suffix(".md").read_text())
    rows = {(row["schedule"], row["stages_per_device"], row["model"], row["cached"]): row for row in plan["rows"]}
    assert len(rows) == len(plan["rows"]) == 3 + 3 + 5
    cached, naive = (rows["1f1b", 2, "full", cached] for cached in (True, False))
    assert cached["sent_forward_gb"] < naive["sent_forward_gb"]
    assert cached["memory_gb"]["working"] < naive["memory_gb"]["working"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "./missing", "--devices", "2"], "./missing doesn't exist"),
        (["--config", "t5", "--devices", "2"], "t5"),
        (["--config", "olmo2", "--devices", "2", "--seq-len", "64"], "no Attention Residuals for 'olmo2'"),
        ([*SMALL, "--devices", "7"], "7 devices and 4 layers don't make pipelines of 2 to 4"),
        ([*SMALL, "--microbatch-size", "3"], "256 sequences can't be divided"),
        ([*SMALL, "--block-size", "9"], "attn_res_block_size is 9"),
        ([*SMALL, "--set", "num_hidden_layers=0"], "must be at least 1"),
        ([*SMALL, "--set", "nothing=1"], "no field nothing"),
        ([*SMALL, "--seq-len", "100000"], "longer than the model's context"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        script.main([*words, "--output", str(tmp_path / "plan")])
    line = str(ended.value.code)  # Python prints it and exits with 1
    assert line.startswith("plan_devices: ") and message in line and "\n" not in line
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_bad_options_are_refused():
    for changes in ({"utilisation": 1.5}, {"devices": []}, {"precision": "int8"}, {"latency": -1.0}):
        with pytest.raises(InputError):
            PlanOptions(**{"config": "llama", "devices": [2], **changes})
    with pytest.raises(InputError, match="attnres is in mhc mode, and donor, block, full are what can be planned"):
        plan_devices(PlanOptions(config="attnres", set={"attn_res_mode": "mhc"}, devices=[2]))
