# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What the look at each layer reports, against the same quantities computed another way."""

import json
import statistics
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers
from attnres_recipes.callback import DepthCallback
from attnres_recipes.look import gradient_norms, look
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import attnres


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99}


def perturbed(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def attnres_model(**options):
    torch.manual_seed(2)
    return perturbed(attnres.AttnResForCausalLM(attnres.AttnResConfig(**SIZES, **options)))


@pytest.fixture
def probe() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 99, (2, 11), generator=torch.Generator().manual_seed(0))}


def rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


@pytest.mark.parametrize("options", [{"attn_res_mode": "full"}, {"attn_res_block_size": 2}], ids=["full", "block"])
def test_look_at_attnres(options, probe):
    """Weights, reads and outputs are those of the model's own outputs, also under gradient checkpointing."""
    model = attnres_model(**options)
    seen = look(model, probe)
    with torch.no_grad():
        outputs = model.eval()(**probe, output_depth_attentions=True, output_hidden_states=True)
    weights = [read.double() for read in outputs.depth_attentions]
    assert seen["largest_weight"] == pytest.approx([read.amax(1).mean().item() for read in weights], rel=1e-5)
    entropy = [-(read * read.log()).sum(1).mean().item() for read in weights]
    assert seen["entropy"] == pytest.approx(entropy, rel=1e-5, abs=1e-7)
    assert seen["query_norm"] == pytest.approx(model.model.depth_attention.query.norm(dim=1).tolist(), rel=1e-6)
    reads = [rms(hidden_states) for hidden_states in outputs.hidden_states[:-1]]
    assert seen["read_rms"][:-1:2] == pytest.approx(reads, rel=1e-5)
    assert len(seen["read_rms"]) == 7 and len(seen["output_rms"]) == 6
    model.gradient_checkpointing_enable()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    checkpointed = look(model.train(), probe)
    assert checkpointed.keys() == seen.keys() and model.training
    for name, values in seen.items():  # sums may be in another order
        assert checkpointed[name] == pytest.approx(values, rel=1e-5, abs=1e-7), name
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any("attend" in vars(layer) for layer in model.model.layers)


def test_outputs_are_those_that_are_read(probe):
    """In full mode the sources are the outputs: a read of the mixture of them gives the reported RMS."""
    model = attnres_model(attn_res_mode="full")
    written = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, inputs, output: written.append(output[0]))
        layer.mlp.register_forward_hook(lambda module, inputs, output: written.append(output))
    seen = look(model, probe)
    assert seen["output_rms"] == pytest.approx([rms(output) for output in written], rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "also", "largest"),
    [
        ("denseformer", set(), 1),
        ("mhc", set(), 0.5),
        ("full_static", {"entropy"}, None),
        ("block_sigmoid", {"query_norm"}, 1),
        ("block_inkling2", {"entropy", "query_norm"}, None),
    ],
)
def test_look_at_other_modes(mode, also, largest, probe):
    """Weights that are no distribution have no entropy, and not all modes have queries."""
    model = attnres.AttnResForCausalLM(attnres.AttnResConfig(**SIZES, attn_res_mode=mode))
    seen = look(model, probe)
    sums = set() if mode == "mhc" else {"sum_rms"}
    assert seen.keys() == {"output_rms", "read_rms", "largest_weight", *sums, *also}
    assert largest is None or seen["largest_weight"] == pytest.approx([largest] * 7)
    for name in also:
        assert len(seen[name]) == 7 and all(isinstance(value, float) for value in seen[name])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_look_at_donor(family, probe):
    """A donor and the AttnRes model that computes the same function show the same reads and outputs."""
    donor_classes = {"llama": (LlamaConfig, LlamaForCausalLM), "gemma2": (Gemma2Config, Gemma2ForCausalLM)}
    classes = {
        "llama": (attnres.AttnResConfig, attnres.AttnResForCausalLM),
        "gemma2": (attnres.AttnResGemma2Config, attnres.AttnResGemma2ForCausalLM),
    }
    sizes = {**SIZES, "head_dim": 16, "num_key_value_heads": 2}
    config_class, model_class = donor_classes[family]
    donor = perturbed(model_class(config_class(**sizes)))
    config_class, model_class = classes[family]
    model = model_class(config_class(**sizes, attn_res_mode="full", attn_res_sum_scale=True))
    model.load_state_dict(donor.state_dict(), strict=False)
    expected, seen = look(donor, probe), look(model, probe)
    for name in ("output_rms", "read_rms"):
        assert seen[name] == pytest.approx(expected[name], rel=1e-4)


def hooked_outputs(layers, probe, model, names: tuple[str, str]) -> torch.Tensor:
    """What the modules of these names put out, in order, `(2L, batch, seq, hidden)`."""
    written = []

    def seen(module, inputs, output):
        written.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.get_submodule(name).register_forward_hook(seen) for layer in layers for name in names]
    with torch.no_grad():
        model.eval()(**probe)
    for handle in handles:
        handle.remove()
    return torch.stack(written)


def block_sums(outputs: torch.Tensor, size: int) -> list[float]:
    """RMS of sums that begin anew after `size` outputs."""
    return [rms(sums) for block in outputs.split(size) for sums in block.cumsum(0)]


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, None], ids=lambda size: f"block {size}" if size else "full")
@pytest.mark.parametrize("adapted", [False, True], ids=["", "lora"])
def test_running_sums(block_size, adapted, probe):
    """Sums are those of the outputs of a block, whether blocks divide the layers or not; with other blocks the numbers
    are others."""
    options = {"attn_res_block_size": block_size} if block_size else {"attn_res_mode": "full"}
    torch.manual_seed(2)
    model = perturbed(attnres.AttnResForCausalLM(attnres.AttnResConfig(**{**SIZES, "num_hidden_layers": 5}, **options)))
    layers = model.double().model.layers
    if adapted:
        lora = peft.LoraConfig(target_modules="all-linear", modules_to_save=["depth_attention"], task_type="CAUSAL_LM")
        model = perturbed(peft.get_peft_model(model, lora)).double()
    seen = look(model, probe)
    outputs = hooked_outputs(layers, probe, model, ("self_attn", "mlp"))
    size = 2 * block_size if block_size else 1
    assert seen["sum_rms"] == pytest.approx(block_sums(outputs, size), rel=1e-5)
    for other in {1, 2, 4, 6, 10} - {size}:
        assert seen["sum_rms"] != pytest.approx(block_sums(outputs, other), rel=1e-2)


@pytest.mark.parametrize("mode", ["block", "full", "block_delta", "block_window"])
def test_running_sums_are_sources(mode, probe):
    """They are the latest sources of the reads that come next."""
    model = attnres_model(attn_res_mode=mode, attn_res_block_size=2 if "block" in mode else 1)
    model.set_attn_res_implementation("eager")
    base, latest = model.model, []
    for read in [*(read for layer in base.layers for read in (layer.attention_read, layer.mlp_read)), base.output_read]:
        read.register_forward_hook(lambda module, inputs, output: latest.append(rms(output[3][-1])))
    assert look(model, probe)["sum_rms"] == pytest.approx(latest[1:], rel=1e-5)


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}, ("self_attn", "mlp"), (1, 1)),
    # norms after the sublayers; its embedding has its multiplier in it
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"head_dim": 16, "num_key_value_heads": 2},
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        (1, 1),
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.2},
        ("self_attn", "mlp"),
        (3, 0.2),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_running_sums_of_donors(family, probe):
    """A donor's sum is its residual stream, which begins with the embedding; multipliers and norms of the family
    count."""
    config_class, model_class, options, names, (embedding, residual) = FAMILIES[family]
    torch.manual_seed(2)
    model = perturbed(model_class(config_class(**SIZES, **options))).double()
    outputs = residual * hooked_outputs(model.model.layers, probe, model, names)
    stream = embedding * model.get_input_embeddings()(probe["input_ids"])[None] + outputs.cumsum(0)
    seen = look(model, probe)
    assert seen["sum_rms"] == pytest.approx([rms(state) for state in stream], rel=1e-5)
    assert seen["sum_rms"] != pytest.approx(block_sums(outputs, 6), rel=1e-2)


def test_gradient_norms(probe):
    """The norm of each layer is that of all its parameters' gradients together; a frozen layer has none."""
    model = attnres_model()
    assert gradient_norms(model.model.layers) == [None] * 3
    model(**probe, labels=probe["input_ids"]).loss.backward()
    expected = [torch.cat([p.grad.flatten() for p in layer.parameters()]).norm().item() for layer in model.model.layers]
    assert gradient_norms(model.model.layers) == pytest.approx(expected, rel=1e-5)
    model.model.layers[1].zero_grad()
    assert gradient_norms(model.model.layers) == [pytest.approx(expected[0]), None, pytest.approx(expected[2])]


def trained(
    model, folder: Path, callbacks: list, steps: int = 5, seq_len: int = 16, resume: str | None = None, **options
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 99, (8 * steps, seq_len))]
    options = {"save_strategy": "no", "max_steps": steps, "learning_rate": 1e-2, "use_cpu": True, **options}
    options = {"per_device_train_batch_size": 8, "report_to": "none", "disable_tqdm": True, **options}
    arguments = TrainingArguments(str(folder), **options)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return model.state_dict()


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "depth.jsonl").read_text().splitlines()]


def test_any_trainer(probe, tmp_path):
    """Under a plain Trainer every N-th step is in the file and in TensorBoard, and training isn't touched. A step is
    that of the weights that are seen, from those before training to those after it."""
    reference = trained(attnres_model(attention_dropout=0.3), tmp_path, [])
    model = attnres_model(attention_dropout=0.3)
    weights = trained(model, tmp_path, [DepthCallback(tmp_path / "run", probe, every=2)])
    assert all(torch.equal(weights[name], reference[name]) for name in reference)
    lines = entries(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    start, end = look(attnres_model(), probe), look(model, probe)
    assert {name: lines[0][name] for name in start} == start and {name: lines[-1][name] for name in end} == end
    assert lines[1]["query_norm"] != start["query_norm"]
    assert all(len(line["gradient_norm"]) == 3 and min(line["gradient_norm"]) > 0 for line in lines[:-1])
    assert lines[-1].keys() == lines[0].keys() - {"gradient_norm"}
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "depth"))
    events.Reload()
    assert [event.step for event in events.Scalars("sum_rms/005")] == [0, 2, 4, 5]
    assert [event.step for event in events.Scalars("gradient_norm/002")] == [0, 2, 4]
    last = [event.value for event in events.Scalars("entropy/006")]
    assert last == pytest.approx([line["entropy"][6] for line in lines])


def test_best_model_at_end(probe, tmp_path):
    """Weights that are loaded when training ends may be those of an earlier step, and aren't taken for the last
    ones."""
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    callback = DepthCallback(tmp_path, probe, every=1)
    trained(attnres_model(), tmp_path, [callback], steps=2, load_best_model_at_end=True, **options)
    assert [entry["step"] for entry in entries(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, {"logging_strategy": "no"}]
)
def test_gradient_norms_before_clipping(options, probe, tmp_path):
    """Clipping doesn't hide how large gradients are, whatever the Trainer logs."""
    norms = {}
    for clip in (0, 1e3, 1e-2):
        folder = tmp_path / str(clip)
        trained(attnres_model(), folder, [DepthCallback(folder, probe, every=1)], 1, max_grad_norm=clip, **options)
        entry, _ = entries(folder)
        norms[clip] = entry["gradient_norm"]
    assert min(norms[0]) > 0.1
    assert norms[1e3] == norms[0] and norms[1e-2] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize(
    ("every", "checkpoint", "num_lines", "expected"),
    [
        (1, 2, 2, [0, 1, 2, 3, 4]),
        (1, 2, 5, [0, 1, 2, 3, 4]),
        (1, 4, 5, [0, 1, 2, 3, 4]),
        (3, 2, 1, [0, 3, 4]),
        (3, 2, 3, [0, 3, 4]),
        (2, 2, 1, [0, 2, 4]),
    ],
)
def test_resumed(every, checkpoint, num_lines, expected, probe, tmp_path):
    """A run that goes on from a checkpoint has the entries of a whole one, each once: also that of the checkpoint's
    own step, whether the run had come to it or further or not."""
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    trained(attnres_model(), tmp_path, [DepthCallback(tmp_path, probe, every)], steps=4, **options)
    whole = entries(tmp_path)
    lines = (tmp_path / "depth.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "depth.jsonl").write_text("".join(lines[:num_lines]))
    resume = str(tmp_path / f"checkpoint-{checkpoint}")
    trained(attnres_model(), tmp_path, [DepthCallback(tmp_path, probe, every)], 4, resume=resume, **options)
    resumed = entries(tmp_path)
    assert [entry["step"] for entry in resumed] == expected
    for entry, other in zip(whole, resumed, strict=True):
        assert {**entry, "seconds": 0} == {**other, "seconds": 0}


def test_frozen_layers(probe, tmp_path):
    """Layers that aren't trained have no norm, and take none away from the others."""
    model = attnres_model()
    model.model.layers[:2].requires_grad_(False)
    trained(model, tmp_path, [DepthCallback(tmp_path, probe)], steps=1)
    norms = entries(tmp_path)[0]["gradient_norm"]
    assert norms[:2] == [None, None] and norms[2] > 0


@pytest.mark.parametrize("name", ["GPT2", "Olmo2", "Cohere"])
def test_refuses(name, probe, tmp_path):
    """A model whose sublayers begin elsewhere is refused when training begins, before anything is written."""
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(config)
    with pytest.raises(ValueError, match=f"{type(model).__name__} can't be watched over depth; AttnRes models can"):
        trained(model, tmp_path / "run", [DepthCallback(tmp_path / "run", probe)])
    assert not (tmp_path / "run" / "depth.jsonl").exists()


def test_adapters(probe, tmp_path):
    """With LoRA the query norms are those of the copy that is trained."""
    lora = peft.LoraConfig(target_modules="all-linear", modules_to_save=["depth_attention"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(attnres_model(), lora)
    trained(model, tmp_path, [DepthCallback(tmp_path, probe, every=1)])
    lines = entries(tmp_path)
    assert lines[-1]["query_norm"] != lines[0]["query_norm"]
    module = model.get_base_model().model.depth_attention.modules_to_save["default"]
    assert look(model, probe)["query_norm"] == pytest.approx(module.query.norm(dim=1).tolist())


class StepTimes(transformers.TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


def test_cost(tmp_path):
    """At its default the callback costs less than one percent of training, also of 201 steps, with the looks at 0, 200
    and 201, and batches as small as the probe."""
    probe, times = {"input_ids": torch.zeros(1, 128, dtype=torch.long)}, StepTimes()
    callbacks = [DepthCallback(tmp_path, probe, every=1), times]
    trained(attnres_model(), tmp_path, callbacks, steps=12, seq_len=128, per_device_train_batch_size=1)
    looks = [line["seconds"] for line in entries(tmp_path)]
    step = statistics.median(step - look for step, look in zip(times.seconds, looks))
    assert 3 * statistics.median(looks[:-1]) / ((DepthCallback(tmp_path, probe).every + 1) * step) < 0.01
