# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What all training scripts do around training: the run folder, its log, checkpoints that are complete or absent,
and a stop at the first loss that isn't a number.

A run folder holds `run.json` (arguments and versions), `metrics.jsonl` (one line per logged step), `tensorboard/`,
`checkpoint-<step>/`, `model/` and, when the run is done, `results.json` and figures.
"""

import ctypes
import errno
import fcntl
import json
import math
import os
import platform
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import accelerate
import datasets
import matplotlib
import numpy
import tokenizers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from attnres_convert import InputError
from peft import PeftModel
from reports import cpu_name, write_json
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm
from training_data import first_line
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import attnres


matplotlib.use("Agg")  # no window, also where there is a display
from matplotlib import pyplot as plt  # noqa: E402


RUN_FILE, METRICS_FILE, RESULTS_FILE, FAILURE_FILE = "run.json", "metrics.jsonl", "results.json", "failure.json"
FILES_FILE = "files.json"  # of a checkpoint: names and sizes of its files
MODULES = ("attnres", "torch", "transformers")  # whose version may change the losses


class RunError(InputError):
    """The run can't start or go on; the message is one line that says why and what to do."""


def end_without_a_word():
    """Ends a process that isn't the main one, which is left the time to say why: a launcher ends all with the first."""
    time.sleep(2)
    raise SystemExit(1)


def end_with_parent():
    """Lets a process that was started end when the one that started it is killed; Linux alone can do so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def main_process_first():
    """The block runs in the main process, then in all others; if it fails in the main one, they end without a word."""
    is_main, succeeded = PartialState().is_main_process, [False]
    if not is_main and not broadcast_object_list(succeeded)[0]:
        end_without_a_word()
    try:
        yield
        succeeded = [True]
    finally:
        if is_main:
            broadcast_object_list(succeeded)


def launched() -> dict:
    """How `accelerate launch` started this process; a run goes on as it began."""
    sharding = [name for name in ("FSDP", "DeepSpeed") if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"]
    return {"processes": PartialState().num_processes, "sharding": sharding[0] if sharding else None}


def versions() -> dict[str, str]:
    modules = (attnres, torch, transformers, accelerate, datasets, tokenizers, numpy)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def sync_folder(folder: Path):
    """Brings a folder's files to the disk, so that a name given to it afterwards never stands for less."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(partial: Path, folder: Path):
    """Gives a finished folder its name; what had the name before is replaced."""
    sync_folder(partial)
    remove(folder)
    partial.rename(folder)


def remove(folder: Path):
    """Takes a folder's name away before its files, so that there never is half of it under this name."""
    if folder.exists():
        trash = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = ((path.name.removeprefix(prefix), path) for path in folder.glob(f"{prefix}*"))
    return [path for _, path in sorted((int(step), path) for step, path in steps if step.isdecimal())]


def list_files(checkpoint: Path):
    """Writes down what a checkpoint consists of, for [`check_files`]."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    write_json(checkpoint / FILES_FILE, {str(path.relative_to(checkpoint)): path.stat().st_size for path in files})


def check_files(checkpoint: Path):
    """Whether a checkpoint is as it was written.

    Raises:
        RunError: a file is missing or has another size.
    """
    written = checkpoint / FILES_FILE
    for name, size in (read_json(written) if written.exists() else {}).items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            raise RunError(f"{checkpoint} is damaged, see its {name}; remove it to go on from the one before.")


def read_json(path: Path) -> dict:
    """
    Raises:
        RunError: the file isn't as it was written.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise RunError(f"{path} is damaged; restore it, or choose another --output.") from None


held_locks = {}  # open files by the path of a run's folder


def lock(folder: Path):
    """Keeps other processes from training in a folder until this one ends.

    Raises:
        RunError: one does so already, and doesn't end.
    """
    if folder.resolve() in held_locks:
        return
    file = open(folder / RUN_FILE)  # noqa: SIM115, stays open
    for seconds in range(15, -1, -1):  # what a killed process has started ends some seconds after it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held_locks[folder.resolve()] = file
            return
        except OSError:
            time.sleep(1 if seconds else 0)
    raise RunError(f"another process trains in {folder}; let it end, or stop it.")


def make_writable(folder: Path):
    """Makes a folder if there is none, and tries it.

    Raises:
        RunError: it can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RunError(f"can't write to {folder}: {error.strerror}.") from None


def open_run(folder: Path, arguments: dict, is_main_process: bool = True) -> Path | None:
    """Starts a run in `folder` or takes up the one that is there, and returns its last complete checkpoint, if any.

    Raises:
        RunError: the folder is in use for something else, or for a run with other arguments.
    """
    arguments = json.loads(json.dumps({**arguments, **launched()}, default=str))
    run_file = folder / RUN_FILE
    make_writable(folder)
    if run_file.exists():
        before = {"processes": 1, **read_json(run_file)["arguments"]}
        for name in arguments.keys() | before.keys():
            if arguments.get(name) != before.get(name):
                raise RunError(
                    f"{folder} holds a run with {name} = {before.get(name)}, not {arguments.get(name)}; "
                    "choose another --output, or remove it."
                )
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise RunError(f"{folder} exists and isn't the output of such a run; choose another --output.")
    if not is_main_process:
        return next(reversed(checkpoints(folder)), None)
    now = {"arguments": arguments, "versions": versions()}
    if not run_file.exists():
        write_json(run_file, now)
    lock(folder)
    last = next(reversed(checkpoints(folder)), None)
    if last is not None:
        check_files(last)
        before = read_json(run_file)["versions"]
        changed = [f"{name} {before.get(name)}" for name in MODULES if before.get(name) != now["versions"][name]]
        if changed:
            print(f"{folder} was begun with {', '.join(changed)}; losses may differ a little", file=sys.stderr)
    for leftover in folder.glob(".*"):  # of a killed run
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    return last


@contextmanager
def discarded_if_refused(folder: Path, is_new: bool):
    """Leaves nothing behind of a new run that can't start, so that the corrected command may use its folder.

    It stays once there is a loss or a failure to look at, or a run that has begun inside it.
    """
    try:
        yield
    except Exception:
        begun = (
            read_lines(folder / METRICS_FILE) or (folder / FAILURE_FILE).exists() or any(folder.glob(f"*/{RUN_FILE}"))
        )
        if is_new and not begun and (folder / RUN_FILE).exists() and PartialState().is_main_process:
            remove(folder)
        raise


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def one_line_errors(script: str, folder: Path):
    """Ends a script that is interrupted, whose input is bad or which has no room for its run folder with one line."""
    try:
        with discarded_if_refused(folder, is_new=not (folder / RUN_FILE).exists()):
            yield
    except InputError as error:
        raise SystemExit(f"{script}: {error}") from None
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise SystemExit(f"{script}: {no_space(folder, error)}") from None
    except KeyboardInterrupt:
        if PartialState().is_main_process:
            print(f"{script}: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None


def no_space(folder: Path, error: Exception) -> str:
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    return (
        f"can't write to {folder}, where {free / 1e6:,.0f} MB are free: {first_line(error)}; make room and try again."
    )


@contextmanager
def written_or_removed(partial: Path):
    """The block writes the folder `partial`; what it can't write whole is removed.

    Raises:
        RunError: it can't.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the second: torch
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(no_space(partial.parent, error)) from None


def read_lines(path: Path) -> list[dict]:
    """The entries of a JSON lines file; a last line that a killed run didn't finish is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class JsonLines:
    """A log with an entry per line, each with its `step`; entries after `last_step` are removed when it is opened."""

    def __init__(self, path: Path, last_step: int):
        kept = [entry for entry in read_lines(path) if entry["step"] <= last_step]
        partial = path.with_name(f".{path.name}")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        partial.replace(path)
        self.path = path

    def write(self, entry: dict):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class RunLog(TrainerCallback):
    """Writes losses, gradient norm, learning rate and tokens per second to `metrics.jsonl` and TensorBoard.

    Times are those of the steps alone, without evaluation and checkpoints.
    """

    def __init__(self, folder: Path, tokens_per_step: int):
        self.folder, self.tokens_per_step = folder, tokens_per_step
        self.seconds = []

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        step = state.global_step
        if not step:  # what a killed run wrote before its first checkpoint
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
        self.lines = JsonLines(self.folder / METRICS_FILE, step if step else -1)
        self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1 if step else None)
        self.bar = tqdm(
            total=state.max_steps, initial=step, unit="step", desc="training", disable=not sys.stderr.isatty()
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        if state.is_world_process_zero:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            entry = {"held_out_loss": logs["eval_loss"]}
        elif "loss" in logs:
            entry = {name: logs[name] for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            entry["tokens_per_second"] = self.tokens_per_step * len(self.seconds) / sum(self.seconds)
            self.seconds = []
        else:
            return
        self.lines.write({"step": state.global_step, **entry})
        for name, value in entry.items():
            self.writer.add_scalar(name, value, state.global_step)
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in entry.items() if "loss" in name})

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar.close()
            self.writer.flush()


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


class RunTrainer(Trainer):
    """A Trainer that takes the data in the order it is in, writes checkpoints complete or not at all, and stops at a
    loss or gradient that isn't finite, before the step is taken, and before a checkpoint of such a model is written.

    Batches may hold `documents` `(batch, seq)`, which row of the data each token is from.
    """

    def __init__(self, *args, optimizers: tuple = (None, None), keep_checkpoints: int = 2, **kwargs):
        # a Trainer that shards refuses an optimizer that it is given, and takes it from create_optimizer
        self.given_optimizer, scheduler = optimizers
        super().__init__(*args, optimizers=(None, scheduler), **kwargs)
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

    def create_accelerator_and_postprocess(self):
        state = self.args.distributed_state
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate would leave the model unsharded on CPUs without a word, and needs no more than this to shard
            state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2 and self.args.bf16:
            # accelerate's policy rounds the loss, the sum of the gradients and what layers get from depth attention
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def _prepare_for_training(self, *args, **kwargs):
        with buffers_left_whole(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            self.optimizer = self.given_optimizer
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        # transformers' schedules reach their ends after their last steps, here the last step is to have that rate
        return super().create_scheduler(max(1, num_training_steps - 1), optimizer)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, torch.utils.data.IterableDataset):
            return None
        return torch.utils.data.SequentialSampler(dataset)

    def compute_loss(self, model, inputs, **kwargs):
        # a cache would hide from transformers that the sequences are packed
        inputs = {name: value for name, value in inputs.items() if name != "documents"}
        return super().compute_loss(model, {**inputs, "use_cache": False}, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        if self.batches_step != self.state.global_step:
            self.batches, self.batches_step = [], self.state.global_step
        self.batches.append(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._check_finite(loss, "loss", self.state.global_step + 1)
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if norm is not None:
            self._check_finite(norm, "gradient norm", self.state.global_step + 1)
        return norm

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        self._check_finite(metrics["eval_loss"], "held-out loss", self.state.global_step)
        return metrics

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
            failure["batch"] = gather_object(texts)
        if not self.is_world_process_zero():
            end_without_a_word()
        write_json(self.folder / FAILURE_FILE, failure)
        shown = ", ".join(map(str, documents[:20])) + (" ..." if len(documents) > 20 else "")
        raise RunError(
            f"the {name} is {reading} at step {step}"
            + (f", with documents {shown} of the data; " if shown else "; ")
            + (f"the last good checkpoint is {last}" if last else "there is no good checkpoint yet")
            + (f"; {self.folder / FAILURE_FILE} holds the batch." if failure.get("batch") else ".")
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # a Trainer hands the tensors of the file to the module as they are, and leaves out experts, which have other
        # names and shapes there
        loaded, info = type(self.model).from_pretrained(
            resume_from_checkpoint, config=self.model.config, dtype=self.model.dtype, output_loading_info=True
        )
        if info["missing_keys"]:
            raise RunError(f"{resume_from_checkpoint} is damaged: it has no {min(info['missing_keys'])}.")
        self.model.load_state_dict(loaded.state_dict())

    def _get_output_dir(self, trial):
        return str(self.folder / ".saving") if self.is_saving else super()._get_output_dir(trial)

    is_saving = False

    def _loss_of_one(self, model) -> torch.Tensor:
        """The loss of one held-out sequence: what isn't finite for it is no good checkpoint."""
        model.eval()
        inputs = self.data_collator([self.eval_dataset[0]])
        loss, *_ = self.prediction_step(model, inputs, prediction_loss_only=True)
        model.train()
        return loss

    def _save_checkpoint(self, model, trial):
        self._check_finite(self._loss_of_one(model), "held-out loss", self.state.global_step)
        partial = self.folder / ".saving"
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.is_saving = True
        try:
            with written_or_removed(partial):
                super()._save_checkpoint(model, trial)
        finally:
            self.is_saving = False
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.is_fsdp_enabled:  # what `accelerate merge-weights` leaves to be added
                self.model.config.save_pretrained(partial / name)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(partial / name)
            list_files(partial / name)
            publish(partial / name, self.folder / name)
            partial.rmdir()
            for old in checkpoints(self.folder)[: -self.keep_checkpoints]:
                remove(old)
        self.accelerator.wait_for_everyone()

    def save_final_model(self, folder: Path):
        """The model and its tokenizer, as `save_pretrained` writes them, complete or not at all."""
        partial = folder.with_name(f".{folder.name}")
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with written_or_removed(partial):
            if self.is_fsdp_enabled:  # save_model writes nothing if checkpoints are sharded
                state_dict = self.accelerator.get_state_dict(self.model)
                if self.is_world_process_zero():
                    self._save(str(partial), state_dict=state_dict)
            else:
                self.save_model(str(partial), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            (partial / "training_args.bin").unlink(missing_ok=True)
            publish(partial, folder)


def losses(metrics: list[dict], name: str) -> dict[int, float]:
    """By step, from the entries of `metrics.jsonl`: `"loss"` or `"held_out_loss"`, in nats per token."""
    return {entry["step"]: entry[name] for entry in metrics if name in entry}


def tokens_per_second(metrics: list[dict]) -> float:
    """The median over the logged steps, so that starting up and interruptions don't count."""
    return statistics.median(entry["tokens_per_second"] for entry in metrics if "tokens_per_second" in entry)


def without_seed(name: str) -> str:
    return " ".join(part for part in name.split(" ") if not part.startswith("seed=")) or "all"


def plot_losses(runs: dict[str, list[dict]], path: Path, title: str):
    """Held-out losses by step, one colour for all seeds of a run, and for few runs the training losses fainter.

    Args:
        runs: entries of `metrics.jsonl` by the name of the run.
    """
    figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    groups = list(dict.fromkeys(map(without_seed, runs)))
    colors = plt.colormaps["tab10" if len(groups) <= 10 else "viridis"].resampled(max(10, len(groups))).colors
    seen = set()
    for name, metrics in runs.items():
        group = without_seed(name)
        label = None if group in seen else group if len(runs) > 1 else "held-out"
        seen.add(group)
        style = {"color": colors[groups.index(group)], "marker": "o", "markersize": 4}
        held_out, training = losses(metrics, "held_out_loss"), losses(metrics, "loss")
        axes.plot(held_out.keys(), held_out.values(), label=label, **style)
        if len(runs) <= 4:
            style |= {"marker": None, "alpha": 0.3, "linewidth": 1}
            axes.plot(training.keys(), training.values(), label="training" if len(runs) == 1 else None, **style)
    if 1 < len(runs) <= 4:
        axes.plot([], [], color="grey", alpha=0.3, linewidth=1, label="training")
    axes.set_xlabel("training step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("held-out loss (nats per token)" if len(runs) > 4 else "loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)
