# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Loads a model folder as a stranger would, without this project, in a process that is closed off.

The code in the folder runs in that process. It gets a few harmless variables of the environment, an empty home folder,
a limit of time, and, where the system allows it without any rights, which Linux does:

- no connections and no new process group, by a filter of system calls (seccomp),
- no files but Python's, the system's libraries and the model, and no look into other processes (Landlock).

`load` starts the process; what it runs is this file too, so nothing but the standard library is imported at the top.
"""

import contextlib
import ctypes
import json
import logging
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT if (ROOT / "attnres.py").is_file() else None  # installed, it is beside libraries: no folder to leave out
MODULES = ["attnres", "configuration_attnres", "depth_attention_attnres", "depth_mixers_attnres"]
MODULES += ["families_attnres", "modeling_attnres"]
MODULES += ["attnres_commands", "attnres_convert", "attnres_kernels", "attnres_recipes"]
TEST_PROMPT, TEST_MESSAGE = "import", "Hello"  # the second of a chat
TEST_TOKENS = 4
SECONDS, SECONDS_PER_GB = 600, 60
MAX_OUTPUT = 100_000_000  # bytes, of any file that is written
LAST_LINES = 100_000  # bytes of the output that are looked at
VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "WINDIR")
VARIABLES += ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OPEN = {
    "sockets": "this system keeps no process from the network: the check could have used it",
    "files": "this system hides no files from a process: the check could have read all that you can read",
}

# What a process may read, as far as it is there: libraries, and how the system is set up for them
SYSTEM = "/usr /bin /sbin /lib /lib32 /lib64 /nix/store /sys /proc/self /proc/cpuinfo /proc/meminfo /proc/stat "
SYSTEM += "/proc/sys/vm /proc/sys/kernel /proc/filesystems /dev/zero /dev/random /dev/urandom /etc/ld.so.cache "
SYSTEM += "/etc/ld.so.conf /etc/ld.so.conf.d /etc/localtime /etc/timezone /etc/passwd /etc/group /etc/nsswitch.conf "
SYSTEM += "/etc/mime.types /etc/os-release /etc/ssl/openssl.cnf /etc/pki/tls/openssl.cnf /etc/crypto-policies"


class StrangerError(ValueError):
    """A stranger can't load it; the message says why, without a full stop."""


def load(files: dict[str, Path], with_code: bool, adapter: dict[str, Path] | None = None) -> tuple[str, list[str]]:
    """Loads files in a process of its own and lets the model generate.

    Args:
        files: by their path in the model folder.
        with_code: run the code among them.
        adapter: files of one that goes on the model.

    Returns:
        the text, and what the system didn't keep the process from.

    Raises:
        StrangerError: they don't load, or don't generate, or not in time.
    """
    with tempfile.TemporaryDirectory(prefix="attnres-push-") as temporary:
        stages, home = (Path(temporary, "model"), Path(temporary, "adapter")), Path(temporary, "home")
        home.mkdir()
        for stage, part in zip(stages, (files, adapter or {})):
            for name, path in part.items():
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                if name.endswith(".py"):
                    shutil.copyfile(path, stage / name)  # what was looked at, whatever becomes of the file
                else:
                    (stage / name).symlink_to(path.resolve())
        paths = [*files.values(), *(adapter or {}).values()]
        size = sum(path.stat().st_size for path in paths)
        task = {
            "folder": str(stages[0]),
            "adapter": str(stages[1]) if adapter else None,
            "home": str(home),
            "with_code": with_code,
            "readable": [*map(str, stages), *(str(path.resolve()) for path in paths)],
            "project": PROJECT and str(PROJECT),
            "modules": MODULES,
            "parent": os.getpid(),
        }
        seconds = SECONDS + SECONDS_PER_GB * size / 1e9
        still_open = None
        if os.name == "posix":
            result, still_open = _run({**task, "closed": True}, Path(temporary), seconds)
        if still_open is None:  # the libraries don't load behind closed doors; nothing of the folder has run yet
            result, _ = _run({**task, "closed": False}, Path(temporary), seconds)
            still_open = list(OPEN)
        if "error" in result:
            raise StrangerError(str(result["error"]).replace(temporary, ""))
        return str(result["text"]), [OPEN[door] for door in still_open]


def _run(task: dict, folder: Path, seconds: float) -> tuple[dict, list[str] | None]:
    """What a process says in its last lines of JSON, and what is open to it, `None` if it didn't get that far."""
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    environment |= dict.fromkeys(("HOME", "USERPROFILE", "HF_HOME", "TMPDIR", "TEMP", "TMP"), task["home"])
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", __file__]
    # the output goes to files, as what is printed without end would fill the memory of this process
    with open(folder / "task", "w+") as given, open(folder / "out", "w+b") as out, open(folder / "err", "w+b") as err:
        options = {"stdin": given, "stdout": out, "stderr": err}
        # not through the output, into which the folder's code can write
        read, write = os.pipe()
        if os.name == "posix":
            task, options = {**task, "status": write}, {**options, "pass_fds": [write], "start_new_session": True}
        json.dump(task, given)
        given.seek(0)
        process = subprocess.Popen(command, cwd=task["home"], env=environment, **options)
        os.close(write)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise StrangerError(f"it isn't done after {seconds:,.0f} seconds") from None
        finally:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.kill()
            process.wait()
            status = os.read(read, LAST_LINES)
            os.close(read)
        result = {}
        for line in _last_lines(out):
            with contextlib.suppress(ValueError, TypeError):
                result = dict(json.loads(line))
        if not {"error", "text"} & result.keys():
            result["error"] = (_last_lines(err) or [f"its process ended with code {process.returncode}"])[-1]
    return result, json.loads(status) if status else None


def _last_lines(file) -> list[str]:
    file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_LINES))
    return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


# What runs in the process


def child():
    task = json.load(sys.stdin)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    limit(task["parent"])
    still_open = close(task) if task["closed"] else list(OPEN)
    for name in task["modules"]:
        sys.modules[name] = None  # an installed project can't be imported either
    sys.path[:] = [path for path in sys.path if path not in (task["project"], os.path.dirname(__file__), "")]
    import torch
    import transformers

    if "status" in task:
        os.write(task["status"], json.dumps(still_open).encode())
        os.close(task["status"])
    try:
        print(json.dumps({"text": generated(torch, transformers, task)}))
    except StrangerError as error:
        print(json.dumps({"error": str(error)}))


class Reported(logging.Handler):
    """What a library only logs, such as the errors behind "see the above report"."""

    errors = ()

    def emit(self, record):
        self.errors = re.findall(r"(?m)^\w*Error: (.+)$", record.getMessage()) or self.errors


REPORTED = Reported()


@contextlib.contextmanager
def doing(what: str, advice: str):
    """Says of whatever goes wrong where it did, and what helps."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason is given"]
        lines = REPORTED.errors if REPORTED.errors and "report" in lines[0] else lines
        text = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
        raise StrangerError(f"{what}: {text} ({type(error).__name__}); {advice}") from None


def generated(torch, transformers, task: dict) -> str:
    """The text of a few tokens.

    Raises:
        StrangerError: the model doesn't load, or doesn't generate.
    """
    folder, adapter, with_code = task["folder"], task["adapter"], task["with_code"]
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").addHandler(REPORTED)
    model_again, tokenizer_again = (f"save the {what} again with save_pretrained" for what in ("model", "tokenizer"))
    with doing("config.json doesn't load", model_again):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=with_code)
    if with_code:
        with doing("the code doesn't load", model_again):
            check_classes(config, folder)
    with doing("the tokenizer doesn't load", tokenizer_again):
        # of an adapter, which may have brought a chat template
        own = adapter if adapter and os.path.exists(os.path.join(adapter, "tokenizer_config.json")) else folder
        tokenizer = transformers.AutoTokenizer.from_pretrained(own, trust_remote_code=with_code and own == folder)
    prompt, options = TEST_PROMPT, {}
    if tokenizer.chat_template:
        with doing("the chat template can't be filled", "correct it, or leave it out"):
            messages = [{"role": "user", "content": TEST_MESSAGE}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            options = {"add_special_tokens": False}
    with doing("the model doesn't load", model_again):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=with_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # or the error doesn't tell what is wrong
        )
        for problem in ("mismatched_keys", "missing_keys", "unexpected_keys"):
            if info[problem]:
                raise ValueError(f"the weights have {problem.replace('_', ' ')}: {min(map(str, info[problem]))}")
    if adapter:
        with doing("the adapter doesn't load", "save it again with save_pretrained"):
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
    with doing("the model doesn't generate", "try it with attnres-generate"):
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; enlarge "
                "it with model.resize_token_embeddings"
            )
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, **options)
        with torch.no_grad():
            if not model(**inputs).logits.isfinite().all():
                raise ValueError("the model's logits are not finite")
        return tokenizer.decode(model.generate(**inputs, max_new_tokens=TEST_TOKENS, do_sample=False)[0])


def check_classes(config, folder: str) -> None:
    """All classes that the configuration promises are in the folder's code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    expected = config.hub_classes()
    if config.auto_map != expected:
        lacks = sorted(set(expected) - set(config.auto_map)) or f"other classes than {expected}"
        raise ValueError(f"the auto_map of config.json lacks {lacks}")
    for reference in config.auto_map.values():
        get_class_from_dynamic_module(reference, folder)


def limit(parent: int) -> None:
    """This process ends with its parent, and writes no file without end."""
    if sys.platform == "linux":
        _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise SystemExit("the process that started this one has ended")
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_OUTPUT, MAX_OUTPUT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def close(task: dict) -> list[str]:
    """Gives up what the system lets this process give up, for good; returns what it doesn't."""
    still_open = []
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))]
    python += [path for path in sys.path if path not in (task["project"], os.path.dirname(__file__))]
    try:
        close_files([*python, *task["readable"]], task["home"])
    except OSError:
        still_open.append("files")
    try:
        close_sockets()
    except OSError:
        still_open.append("sockets")
    return still_open


def _prctl(option: int, *arguments) -> None:
    _checked(_libc().prctl(option, *arguments, *[0] * (4 - len(arguments))))


def _libc():
    if sys.platform != "linux":
        raise OSError("not on this system")
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on all processors
EXECUTE, WRITE, READ, READ_FOLDER, TRUNCATE, DEVICE = 1, 2, 4, 8, 1 << 14, 1 << 15


def close_files(readable: list[str], home: str) -> None:
    """Landlock: only the system's libraries and `readable` can be read, only `home` be written. An OSError if not."""
    libc, ctypes_call = _libc(), ctypes.c_long
    libc.syscall.restype = ctypes_call
    version = _checked(libc.syscall(CREATE_RULESET, None, ctypes_call(0), 1))
    handled = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    # TCP from version 4; signals to others and abstract sockets from version 6
    rules = struct.pack("=QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = _checked(libc.syscall(CREATE_RULESET, rules, ctypes_call(len(rules)), 0))
    read = EXECUTE | READ | READ_FOLDER
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    allowed = {path: read for path in [*SYSTEM.split(), *libraries, *readable] if path}
    for path, rights in {**allowed, os.devnull: READ | WRITE, home: handled}.items():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not os.path.isdir(path):
                rights &= EXECUTE | WRITE | READ | TRUNCATE | DEVICE
            rule = struct.pack("=Qi", rights & handled, descriptor)
            _checked(libc.syscall(ADD_RULE, ruleset, 1, rule, 0))
            os.close(descriptor)
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS, without which neither this nor a filter is allowed
    _checked(libc.syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


# By processor, as the kernel numbers it: socket, connect, setsid, setpgid, add_key, request_key, keyctl, truncate,
# which Landlock knows from Linux 6.2 only, io_uring_setup
FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 42, 112, 109, 248, 249, 250, 76, 425)),
    "aarch64": (0xC00000B7, (198, 203, 157, 154, 217, 218, 219, 45, 425)),
}


def close_sockets() -> None:
    """A filter under which there is neither a new socket nor a way out of the process group. An OSError if not."""
    libc = _libc()
    if platform.machine() not in FORBIDDEN or sys.maxsize < 2**32:
        raise OSError("not on this processor")
    processor, calls = FORBIDDEN[platform.machine()]
    load, equal, at_least, give, allow, refuse = 0x20, 0x15, 0x35, 0x06, 0x7FFF0000, 0x00050001  # EPERM
    steps = [(load, 0, 0, 4), (equal, 0, len(calls) + 3, processor), (load, 0, 0, 0)]
    steps.append((at_least, len(calls) + 1, 0, 1 << 30))  # numbers for 32-bit addresses
    steps += [(equal, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    steps += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    header = struct.pack("@HP", len(steps), ctypes.addressof(program))
    _prctl(38, 1)
    _checked(libc.prctl(22, 2, header, 0, 0))  # PR_SET_SECCOMP


if __name__ == "__main__":
    child()
