# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Training scripts in several processes, started as `accelerate launch` does but without its seconds of imports."""

import importlib
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from attnres_recipes.data import stdlib_files
from pretrain_process import LIBRARIES, SCRIPTS, Run, Server


CONFIGS = SCRIPTS / "accelerate"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(config: str, processes: int) -> dict[str, str]:
    """What all processes of `accelerate launch --config_file CONFIG --num_processes N` find in their environment."""
    port = free_port()
    options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(processes)]
    options += ["--main_process_port", str(port), "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, variables = prepare_deepspeed_cmd_env(args)
    else:
        variables = prepare_multi_gpu_env(args)
    theirs = {name: value for name, value in variables.items() if os.environ.get(name) != value}
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in {**theirs, **world}.items()}


def witnessed(save_final_model):
    """Also keeps what a process holds of each parameter at the end of the training, in `rank-N.pt`."""

    def save_and_keep(trainer, folder: Path):
        parameters = {}
        for name, parameter in trainer.model.named_parameters():
            is_sharded = hasattr(parameter, "full_tensor")
            whole = parameter.full_tensor() if is_sharded else parameter
            local = parameter.to_local() if is_sharded else parameter
            parameters[name] = {"whole": whole.detach().clone(), "here": local.numel()}
        torch.save(parameters, folder.with_name(f"rank-{trainer.args.process_index}.pt"))
        save_final_model(trainer, folder)

    return save_and_keep


def rank(variables: dict[str, str], script: str, arguments: list[str], log: Path, folder: Path):
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    from attnres_recipes.trainer import RunTrainer

    RunTrainer.save_final_model = witnessed(RunTrainer.save_final_model)
    importlib.import_module(script).main(arguments)


@dataclass
class Launch:
    runs: list[Run]

    def finish(self, exit_code: int = 0) -> list[str]:
        """What each process printed."""
        for run in self.runs:  # one that fails may leave the others waiting
            run.process.join(120)
        outputs = [run.output() for run in self.runs]
        assert [run.process.exitcode for run in self.runs] == [exit_code] * len(self.runs), "\n".join(outputs)
        return outputs

    def kill(self):
        for number in (signal.SIGSTOP, signal.SIGKILL):  # one that sees another die would end by itself, with an error
            for run in self.runs:
                os.kill(run.process.pid, number)
        for run in self.runs:
            run.process.join()
            assert run.process.exitcode == -signal.SIGKILL


class LaunchServer(Server):
    def __init__(self, folder: Path):
        super().__init__(folder)
        modules = ["pretrain", "finetune", *LIBRARIES, "torch.distributed.checkpoint", "launch_process"]
        self.context.set_forkserver_preload(modules)

    def launch(self, config: str, script: str, *arguments, processes: int = 2) -> Launch:
        """Starts `script` in `processes` processes as `accelerate launch` does; in one if `config` is empty."""
        self.count += 1
        shared = environment(config, processes) if config else {}
        runs = []
        for index in range(processes if config else 1):
            log = self.folder / f"log-{self.count}-{index}"
            variables = {**shared, "RANK": str(index), "LOCAL_RANK": str(index)} if config else {}
            arguments_of_rank = (variables, script, list(map(str, arguments)), log, self.folder)
            process = self.context.Process(target=rank, args=arguments_of_rank)
            process.start()
            runs.append(Run(process, log))
        return Launch(runs)


@contextmanager
def launch_server(folder: Path) -> Iterator[LaunchServer]:
    """A server whose folder has a folder `text` of documents."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "HF_DATASETS_CACHE", "PYTHONPATH"):
            patch.setenv(name, "")
        server = LaunchServer(folder)
        text = server.folder / "text"
        text.mkdir()
        source = "".join(file.read_text(errors="replace") for file in stdlib_files()[:6])
        for index in range(40):
            (text / f"{index:02d}.txt").write_text(source[800 * index : 800 * index + 500 + 7 * index])
        yield server
        server.stop()
