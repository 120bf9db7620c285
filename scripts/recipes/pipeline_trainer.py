# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A Trainer of a model that is cut into a pipeline: a step is one batch, the same in each process."""

from contextlib import nullcontext
from pathlib import Path

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .pipelines import Pipeline
from .trainer import RunTrainer


class PipelineTrainer(RunTrainer):
    """Of transformers' private methods it also overrides those with the state of the optimizer, which every process has
    its own part of.

    Args:
        pipeline: around the model that is trained. The arguments' batch has all microbatches of a step, and their
            gradient accumulation is 1.
    """

    def __init__(self, pipeline: Pipeline, *args, **kwargs):
        self.pipeline = pipeline
        super().__init__(pipeline.model, *args, **kwargs)
        if self.args.bf16:
            for stage in pipeline.modules.values():
                stage.autocast_dtype = torch.bfloat16

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        # each process has the whole batch, and layers that no other has
        self.accelerator.prepare_data_loader = lambda data_loader, *args, **kwargs: data_loader
        self.accelerator.prepare_model = lambda model, *args, **kwargs: model
        self.accelerator.clip_grad_norm_ = self.pipeline.clip_grad_norm_

    def compute_loss_context_manager(self):
        return nullcontext()  # the stages enter it, as their backward passes are inside of a step

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "documents"}
        run = self.pipeline.step if model.training else self.pipeline.evaluate
        loss = run(**inputs, num_items_in_batch=num_items_in_batch).float()
        if model.training:
            loss.requires_grad_()  # a Trainer calls backward, of which nothing is left to do
        return (loss, {}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if (state := self.pipeline.state_dict()) is not None:
            self._save(output_dir, state_dict=state)

    def parts(self, folder: str) -> dict[Path, object]:
        """By file, what this process has of the optimizer and, as its groups may be fewer, of the schedule."""
        suffix = f"-{self.pipeline.rank}" * (self.pipeline.rank > 0)
        named = {OPTIMIZER_NAME: self.optimizer, SCHEDULER_NAME: self.lr_scheduler}
        return {Path(folder) / name.replace(".", f"{suffix}."): part for name, part in named.items()}

    def _save_optimizer_and_scheduler(self, output_dir: str):
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # the first process may not have made it yet
        for file, part in self.parts(output_dir).items():
            torch.save(part.state_dict(), file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        if checkpoint is not None:
            for file, part in self.parts(checkpoint).items():
                part.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
