# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The Trainer of all runs: it stops at what isn't finite, and goes on from a checkpoint as if there had been no end.

Of transformers' private methods it overrides OVERRIDDEN, and in pipelines OVERRIDDEN_IN_PIPELINES, for which there is
no public way.
"""

import math
import os
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from attnres_convert import InputError
from attnres_convert.checkpoint import read_checkpoint, read_shard
from attnres_convert.loading import check_tensors, empty_model
from attnres_convert.reading import understood
from attnres_convert.writing import write_json
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .checkpoints import ADVICE, check_archives, check_same_model, checkpoints, is_untouched, list_files, run_id
from .folders import FAILURE_FILE, WORK_NAME, begin_work, end_work, no_space_in_one_line, publish, remove
from .optim import is_depth_attention, uses_deepspeed
from .process import data_processes, end_without_a_word, main_process_first, tensor_parallel_size
from .tensors import clip_as_one, cut_optimizer_state, part_of, whole_optimizer_state


OVERRIDDEN = {
    "_clip_grad_norm": "depth attention by itself; the norm before clipping, while the step can still be left out",
    "_load_from_checkpoint": "weights as `from_pretrained` loads them: experts have other names and shapes in a file",
    "_prepare_for_training": "no padding token without an embedding, and FSDP2 of models with buffers",
    "_save_checkpoint": "checkpoints that are complete or absent",
}
OVERRIDDEN_IN_PIPELINES = {
    "_load_optimizer_and_scheduler": "each process has its own part of the optimizer",
    "_save_optimizer_and_scheduler": "each process has its own part of the optimizer",
}


@contextmanager
def buffers_left_whole(model: torch.nn.Module):
    """In this block accelerate can shard a model that has buffers in its checkpoints, such as the routers' biases of
    DeepSeek-V3 and Kimi Linear: it takes all that is in a state dict for sharded. All processes get the main one's."""
    persistent = [
        (module, name)
        for module in model.modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    ]
    values = [[module._buffers[name] for module, name in persistent]]
    for (module, name), value in zip(persistent, broadcast_object_list(values)[0]):
        module._buffers[name].copy_(value)
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in persistent:
            module._non_persistent_buffers_set.discard(name)


def check_saved(folder: Path, model: torch.nn.Module) -> bool:
    """Whether a folder that `model` was saved to holds safetensors, of which a sharded checkpoint has none.

    Raises:
        InputError: `from_pretrained` wouldn't find what it wants in them, names and shapes.
    """
    name = SAFETENSORS_WEIGHTS_NAME if isinstance(model, PeftModel) else SAFE_WEIGHTS_NAME
    if not ((folder / name).exists() or (folder / SAFE_WEIGHTS_INDEX_NAME).exists()):
        return False
    with understood("the model can't be saved in a form that loads again"):
        if isinstance(model, PeftModel):
            # names alone matter, and other processes don't wait to put parts together
            state = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in model.state_dict().items()}
            saved, expected = read_shard(folder / name).tensors, get_peft_model_state_dict(model, state)
            for tensor in sorted(saved.keys() ^ expected.keys()):
                raise KeyError(tensor)
        else:
            config = AutoConfig.from_pretrained(folder)
            shapes = {name: tensor.shape for name, tensor in read_checkpoint(folder).tensors.items()}
            try:
                check_tensors(empty_model(AutoModelForCausalLM._model_mapping[type(config)], config), shapes, 0)
            except InputError as error:
                raise ValueError(str(error)) from None
    return True


def without_documents(inputs: dict) -> dict:
    """A batch as models take it."""
    return {name: value for name, value in inputs.items() if name != "documents"}


def remove_untouched(old: list[Path]):
    """Removes checkpoints, but for those into which something was put; within `begin_work` and `end_work`."""
    for checkpoint in filter(is_untouched, old):
        remove(checkpoint)


class RunTrainer(Trainer):
    """A Trainer that takes the data in the order it is in, writes checkpoints complete or not at all, and stops at a
    loss or gradient that isn't finite, before the step is taken, and before a checkpoint of such a model is written.

    Batches may hold `documents` `(batch, seq)`, which row of the data each token is from.
    """

    def __init__(self, model, args, *more, optimizers: tuple = (None, None), keep_checkpoints: int = 2, **kwargs):
        # a Trainer that shards refuses an optimizer that it is given, and takes it from create_optimizer
        self.given_optimizer, scheduler = optimizers
        self.in_parts = getattr(model, "_is_distributed_loading_by_transformers", False)  # see tensors.py
        args.save_only_model = self.in_parts  # a Trainer refuses others: it would save a part of the optimizer's state
        super().__init__(model, args, *more, optimizers=(None, scheduler), **kwargs)
        self.args.save_only_model = False
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            # accelerate fails at a class that a model names and doesn't have
            classes = {type(module).__name__ for module in self.model.modules()} & set(self.model._no_split_modules)
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(classes)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.args.world_size > 1 and self.eval_dataset is not None:
            # What accelerate fills up the last batches with is left out of the mean where it has batches of its own
            size, largest = len(self.eval_dataset), self.args.per_device_eval_batch_size
            divisors = [batch_size for batch_size in range(1, largest + 1) if size % batch_size == 0]
            self.args.per_device_eval_batch_size = divisors[-1]
        self.folder = Path(self.args.output_dir)
        self.keep_checkpoints = keep_checkpoints
        self.batches, self.batches_step = [], -1  # the micro-batches of a step
        self.depth_grad_norm = None  # of a step, before clipping

    def create_accelerator_and_postprocess(self):
        state = self.args.distributed_state
        shards = os.environ.get("ACCELERATE_USE_FSDP") == "true" or tensor_parallel_size() > 1
        if shards and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate would leave the model unsharded on CPUs without a word, or refuse, and needs no more than this
            state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2 and self.args.bf16:
            # accelerate's policy rounds the loss, the sum of the gradients and what layers get from depth attention
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def _prepare_for_training(self, *args, **kwargs):
        config = self.model.config
        if (config.pad_token_id or 0) >= config.vocab_size:  # a Trainer has taken it from the tokenizer
            config.pad_token_id = None  # padding gets no embedding, and a model that says otherwise doesn't load
        with buffers_left_whole(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = self.given_optimizer
            if self.in_parts:
                self.optimizer.register_load_state_dict_pre_hook(cut_optimizer_state)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        # transformers' schedules reach their ends after their last steps, here the last step is to have that rate
        return super().create_scheduler(max(1, num_training_steps - 1), optimizer)

    def compute_loss(self, model, inputs, **kwargs):
        # a cache would hide from transformers that the sequences are packed
        inputs = without_documents(inputs)
        return super().compute_loss(model, {**inputs, "use_cache": False}, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        if self.batches_step != self.state.global_step:
            self.batches, self.batches_step = [], self.state.global_step
        self.batches.append(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._check_finite(loss, "loss", self.state.global_step + 1)
        return loss

    def _clip_grad_norm(self, model):
        """Clips depth attention by itself, and everything else. In a model that was just converted the gradients of the
        queries are several times as long as all others together: one norm for both would hold the others back.

        Returns:
            The norm of everything else before it is clipped, or that of depth attention if nothing else is trained.
        """
        if uses_deepspeed() or self.is_fsdp_enabled and not self.accelerator.is_fsdp2:  # they know one norm alone
            return self._checked_norm(super()._clip_grad_norm(model), "gradient norm")
        depth, others = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (depth if is_depth_attention(name) else others).append(parameter)
        clip = clip_as_one if self.in_parts else self.accelerator.clip_grad_norm_
        self.depth_grad_norm = self._checked_norm(
            clip(depth, self.args.max_grad_norm) if depth else None, "gradient norm of depth attention"
        )
        if not others:
            return self.depth_grad_norm
        return self._checked_norm(clip(others, self.args.max_grad_norm), "gradient norm")

    def _checked_norm(self, norm, name: str):
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if norm is not None:
            self._check_finite(norm, name, self.state.global_step + 1)
        return norm

    @property
    def copies(self) -> int:
        """How many processes have the same batch."""
        return self.args.world_size // data_processes()

    def log(self, logs, *args, **kwargs):
        if "grad_norm" in logs and self.depth_grad_norm is not None:
            logs["depth_grad_norm"] = float(self.depth_grad_norm)
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        if tensor_parallel_size() > 1:
            self.gather_function = self.gather_once
        metrics = super().evaluate(*args, **kwargs)
        self._check_finite(metrics["eval_loss"], "held-out loss", self.state.global_step)
        return metrics

    def gather_once(self, values: torch.Tensor) -> torch.Tensor:
        """As `gather_for_metrics` of accelerate, which takes several times what processes with the same batches have,
        but where it leaves out what it has filled up with."""
        gathered = self.accelerator.gather(values).view(data_processes(), -1, len(values))[:, 0].flatten()
        state = self.accelerator.gradient_state
        return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered

    def _check_finite(self, value, name: str, step: int):
        """Stops the run if `value` isn't finite in one of the processes.

        Args:
            step: the one that `value` belongs to, or after which it was measured.
        """
        value = torch.as_tensor(value, device=self.args.device).detach().float().reshape(1)
        values = self.accelerator.gather(value)  # all processes stop together
        if values.isfinite().all():
            return
        batches = [] if value.isfinite() else self.batches
        rows = [int(row) for batch in batches if "documents" in batch for row in batch["documents"].unique()]
        documents = sorted(set(gather_object(rows)))
        last = next(reversed(checkpoints(self.folder)), None)
        reading = ", ".join(str(number) for number in values.tolist() if not math.isfinite(number))
        failure = {"step": step, "what": name, "value": reading, "documents": documents, "checkpoint": last}
        if self.processing_class is not None:
            texts = [self.processing_class.decode(ids) for batch in batches for ids in batch["input_ids"]]
            failure["batch"] = gather_object([] if self.args.process_index % self.copies else texts)
        if not self.is_world_process_zero():
            end_without_a_word()
        write_json(self.folder / FAILURE_FILE, failure)
        shown = ", ".join(map(str, documents[:8])) + (" ..." if len(documents) > 8 else "")
        raise InputError(
            f"the {name} is {reading} at step {step}"
            + (f", with documents {shown} of the data; " if shown else "; ")
            + (f"the last good checkpoint is {last.name}" if last else "there is no good checkpoint yet")
            + (f"; {FAILURE_FILE} holds the batch" if failure.get("batch") else "")
            + f", in {self.folder}."
        )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if isinstance(resume_from_checkpoint, (str, Path)):
            with main_process_first():
                check_same_model(Path(resume_from_checkpoint), self.model.config)
                check_archives(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # a Trainer hands the tensors of the file to the module as they are, and leaves out experts, which have other
        # names and shapes there
        with understood(f"{resume_from_checkpoint} is damaged", ADVICE):
            loaded, info = type(self.model).from_pretrained(
                resume_from_checkpoint, config=self.model.config, dtype=self.model.dtype, output_loading_info=True
            )
        if info["missing_keys"]:
            raise InputError(f"{resume_from_checkpoint} is damaged: it has no {min(info['missing_keys'])}.")
        state = loaded.state_dict()  # of which this process may have a part
        own = {name: part_of(state[name], value) for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(own)

    def complete(self, folder: Path):
        """Adds what else belongs to a saved model. For the main process."""

    names_checked = False  # of the tensors in a checkpoint

    def _check_names(self, folder: Path):
        """Whether a folder with the first checkpoint can be loaded again; what is wrong is wrong in all of them."""
        if not self.names_checked and self.is_world_process_zero():
            self.names_checked = check_saved(folder, self.accelerator.unwrap_model(self.model))

    def _loss_of_one(self, model) -> torch.Tensor:
        """The loss of one held-out sequence: what isn't finite for it is no good checkpoint."""
        model.eval()
        inputs = self.data_collator([self.eval_dataset[0]])
        loss, *_ = self.prediction_step(model, inputs, prediction_loss_only=True)
        model.train()
        return loss

    def _save_checkpoint(self, model, trial):
        self._check_finite(self._loss_of_one(model), "held-out loss", self.state.global_step)
        if self.is_world_process_zero():
            begin_work(self.folder)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(self.folder / WORK_NAME)
        try:
            with self._written_whole(), whole_optimizer_state(self.given_optimizer, self.in_parts):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(self.folder)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            partial = self.folder / WORK_NAME / name
            with self._written_whole():
                if self.is_fsdp_enabled:  # what `accelerate merge-weights` leaves to be added
                    self.model.config.save_pretrained(partial)
                    if self.processing_class is not None:
                        self.processing_class.save_pretrained(partial)
                self.complete(partial)
                self._check_names(partial)
                list_files(partial, run_id(self.folder), self.model.config)
                publish(partial, self.folder / name)
            remove_untouched(checkpoints(self.folder)[: -self.keep_checkpoints])
            end_work(self.folder)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _written_whole(self):
        """What the block can't write whole is removed."""
        try:
            with no_space_in_one_line(self.folder):
                yield
        except Exception:
            with suppress(OSError):
                end_work(self.folder)
            raise

    def save_final_model(self, folder: Path):
        """The model and its tokenizer, as `save_pretrained` writes them, complete or not at all."""
        partial = self.folder / WORK_NAME / folder.name
        if self.is_world_process_zero():
            begin_work(self.folder)
        self.accelerator.wait_for_everyone()
        with self._written_whole():
            if self.is_fsdp_enabled:  # save_model writes nothing if checkpoints are sharded
                state_dict = self.accelerator.get_state_dict(self.model)
                if self.is_world_process_zero():
                    self._save(str(partial), state_dict=state_dict)
            else:
                self.save_model(str(partial), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            with self._written_whole():
                (partial / "training_args.bin").unlink(missing_ok=True)
                self.complete(partial)
                self._check_names(partial)
                publish(partial, folder)
            end_work(self.folder)


class PipelineTrainer(RunTrainer):
    """A Trainer of a model that is cut into a pipeline. A step is one batch, the same in each process.

    Args:
        pipeline: a [`Pipeline`] around the model. The arguments' batch has all microbatches of a step, without
            gradient accumulation.
    """

    def __init__(self, *args, pipeline, **kwargs):
        self.pipeline = pipeline
        super().__init__(*args, **kwargs)
        if self.args.bf16:
            for stage in pipeline.modules.values():
                stage.autocast_dtype = torch.bfloat16

    @property
    def copies(self) -> int:
        return self.args.world_size

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        # each process has the whole batch, and layers that no other has
        self.accelerator.prepare_data_loader = lambda data_loader, *args, **kwargs: data_loader
        self.accelerator.prepare_model = lambda model, *args, **kwargs: model
        self.accelerator.clip_grad_norm_ = self.pipeline.clip_grad_norm_

    def compute_loss_context_manager(self):
        return nullcontext()  # the stages enter it, as their backward passes are inside of a step

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        inputs = without_documents(inputs)
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
