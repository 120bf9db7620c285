# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The Trainer of all runs by itself; these tests also run on the oldest transformers."""

import inspect
import shutil

import pytest
import torch
from attnres_convert import InputError
from attnres_recipes.trainer import OVERRIDDEN, OVERRIDDEN_IN_PIPELINES, PipelineTrainer, RunTrainer
from families import attn_res_from_donor, perturb, tiny_config, tiny_donor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import attnres  # noqa: F401


def private_methods(kind: type) -> set[str]:
    """Those of transformers that a class has its own of."""
    own = {name for base in kind.__mro__ if base.__module__.startswith("attnres") for name in vars(base)}
    return {name for name in own if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)}


def test_overridden_methods():
    """Exactly those named are overridden, and take what transformers' take."""
    assert private_methods(RunTrainer) == OVERRIDDEN.keys()
    in_pipelines = OVERRIDDEN | OVERRIDDEN_IN_PIPELINES
    assert private_methods(PipelineTrainer) == in_pipelines.keys()
    for name in in_pipelines:
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (PipelineTrainer, Trainer))
        names = [parameter.name for parameter in theirs.parameters.values()]
        takes_all = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in ours.parameters.values())
        assert takes_all or [parameter.name for parameter in ours.parameters.values()] == names


def test_overridden_methods_of_finetuning():
    finetuning = pytest.importorskip("attnres_recipes.finetuning", reason="datasets is not installed")
    assert private_methods(finetuning.SupervisedTrainer) == OVERRIDDEN.keys()


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    input_ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": input_ids, "labels": input_ids}


def new_trainer(folder, model=None, **options) -> RunTrainer:
    torch.manual_seed(0)
    model = model or AutoModelForCausalLM.from_config(tiny_config("llama", attention_dropout=0.2))
    data = [{"input_ids": torch.randint(model.config.vocab_size, (16,))} for _ in range(24)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=options.pop("max_steps", 6),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = {"train_dataset": data, "eval_dataset": data[:2], "data_collator": collate}
    return RunTrainer(model, arguments, optimizers=(optimizer, None), keep_checkpoints=3, **data)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_goes_on_bit_for_bit(tmp_path):
    """With dropout, from a checkpoint in the middle: the same weights, losses, and optimizer."""
    whole = new_trainer(tmp_path / "whole")
    whole.train()
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {f"checkpoint-{step}" for step in (2, 4, 6)}
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = new_trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    assert losses(again) == losses(whole) and len(losses(whole)) == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for parameter, state in zip(whole.optimizer.state.values(), again.optimizer.state.values()):
        assert torch.equal(parameter["exp_avg_sq"], state["exp_avg_sq"])


def test_takes_the_data_in_order(tmp_path):
    trainer = new_trainer(tmp_path)
    batches = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    assert torch.equal(torch.cat(batches), collate(trainer.train_dataset)["input_ids"])


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_stops_at_what_is_not_finite(max_grad_norm, tmp_path):
    """Before the step is taken, and no checkpoint of it is written."""
    trainer = new_trainer(tmp_path, max_grad_norm=max_grad_norm)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = torch.inf
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(InputError, match="the (loss|gradient norm) is (nan|inf) at step 1"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["failure.json"]


def test_another_model_is_refused(tmp_path):
    """A checkpoint of a model of another shape is not taken up."""
    trainer = new_trainer(tmp_path)
    trainer.train()
    other = new_trainer(tmp_path)
    other.model.config.vocab_size += 1
    with pytest.raises(InputError, match="is of a model with vocab_size"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Gradients(TrainerCallback):
    """Keeps those that a step is taken with."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def clipped_gradients(folder, model) -> tuple[dict[str, torch.Tensor], dict]:
    """Of the first step, and what its log says."""
    trainer = new_trainer(folder, model, max_steps=1, max_grad_norm=0.01)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.found, trainer.state.log_history[0]


def test_depth_attention_is_clipped_by_itself(tmp_path):
    """What a converted model has of its donor gets the gradients that the donor gets, and depth attention no more than
    as much: the log holds both norms."""
    donor = perturb(tiny_donor("llama"))
    model = attn_res_from_donor(donor)
    expected, donor_log = clipped_gradients(tmp_path / "donor", donor)
    found, log = clipped_gradients(tmp_path / "converted", model)
    depth = {name: found.pop(name) for name in list(found) if "depth_attention" in name}
    assert found.keys() == expected.keys() and len(depth) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    norm = torch.stack([gradient.norm() for gradient in depth.values()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3) and log["depth_grad_norm"] > 0.02
    assert log["grad_norm"] == pytest.approx(donor_log["grad_norm"], rel=1e-4) and "depth_grad_norm" not in donor_log


def test_depth_attention_alone(tmp_path):
    """The norm in the log is that of what is trained."""
    model = attn_res_from_donor(tiny_donor("llama"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("depth_attention" in name)
    found, log = clipped_gradients(tmp_path, model)
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3) and log["grad_norm"] == log["depth_grad_norm"] > 0.02
