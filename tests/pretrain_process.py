# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Training scripts in processes of their own, which start from one that has already imported everything."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path


SCRIPTS = Path(__file__).parents[1] / "scripts"
# what scripts import once they run
LIBRARIES = ["attnres_recipes.pretraining", "attnres_recipes.finetuning", "torch.utils.tensorboard"]
SIZES = ["num_hidden_layers=3", "hidden_size=32", "intermediate_size=64", "num_attention_heads=2"]
SIZES += ["max_position_embeddings=64"]
TINY = ["--config=llama", "--train-tokenizer=300", "--seq-len=32", "--batch-size=4", "--set", *SIZES]


def child(script: str, arguments: list[str], log: Path, folder: Path):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    importlib.import_module(script).main(arguments)


@dataclass
class Run:
    process: multiprocessing.Process
    log: Path

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def finish(self, exit_code: int = 0) -> str:
        self.process.join()
        assert self.process.exitcode == exit_code, self.output()
        return self.output()

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL

    def wait_for(self, condition, seconds: float = 60) -> bool:
        """Whether `condition` came true before the process ended."""
        end = time.monotonic() + seconds
        while self.process.is_alive():
            if condition():
                return True
            assert time.monotonic() < end, self.output()
            time.sleep(0.001)
        return False


class Server:
    """Starts a script with arguments, in `folder`, where caches and logs lie too."""

    def __init__(self, folder: Path, script: str = "pretrain"):
        self.folder, self.script, self.count = folder, script, 0
        os.environ.update(
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1",
            HF_DATASETS_CACHE=str(folder / "cache"),
            PYTHONPATH=os.pathsep.join([str(SCRIPTS), str(Path(__file__).parent), *sys.path]),
        )
        self.stop()  # another test's fork server has another environment
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([script, *LIBRARIES, "pretrain_process"])

    @staticmethod
    def stop():
        forkserver._forkserver._stop()

    def start(self, *arguments) -> Run:
        self.count += 1
        log = self.folder / f"log-{self.count}"
        process = self.context.Process(target=child, args=(self.script, list(map(str, arguments)), log, self.folder))
        process.start()
        return Run(process, log)

    def run(self, *arguments, exit_code: int = 0) -> str:
        return self.start(*arguments).finish(exit_code)
