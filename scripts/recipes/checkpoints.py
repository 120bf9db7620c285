# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a run: complete or absent, known by their hashes, and of this run alone."""

import json
import re
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

from attnres_convert import InputError, reading, staging
from attnres_convert.reading import sha256
from attnres_convert.writing import write_json
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .folders import RUN_FILE


ADVICE = "rename it to go on from the one before"
FILES_FILE = "files.json"  # of a checkpoint: names, sizes and hashes of its files
# what a model is, whatever its weights are
MODEL_FACTS = ("model_type", "attn_res_mode", "attn_res_block_size", "attn_res_sum_scale", "attn_res_norm_eps")
MODEL_FACTS += ("attn_res_window", "attn_res_num_heads", "attn_res_rank", "attn_res_num_streams")
MODEL_FACTS += ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODEL_FACTS += ("head_dim", "hidden_act", "vocab_size", "rms_norm_eps", "tie_word_embeddings")
TRAINER_READS = re.compile(
    r"((pytorch_|adapter_)?model|optimizer|scheduler|scaler|rng_state)[^/]*\.(safetensors|bin|pt|pth|index\.json)"
    r"|(pytorch_model_fsdp|optimizer|global_step)[^/]*/.*|(adapter_)?config\.json|latest"
)


def step_of(checkpoint: Path) -> int | None:
    """Of a folder that has the name of a checkpoint."""
    step = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    is_name = step.isascii() and step.isdecimal() and checkpoint.name == f"{PREFIX_CHECKPOINT_DIR}-{int(step)}"
    return int(step) if is_name else None


def named_checkpoints(folder: Path) -> list[Path]:
    """All that have the name of a checkpoint, oldest first."""
    named = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in named if step_of(path) is not None and path.is_dir()), key=step_of)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints that a run has written, oldest first."""
    return [path for path in named_checkpoints(folder) if is_own(path)]


def is_own(checkpoint: Path) -> bool:
    with suppress(InputError):
        return bool(listed_files(checkpoint))
    return False


def run_id(folder: Path) -> str | None:
    """What tells a run from others; those of earlier versions have none."""
    with suppress(InputError):
        return reading.typed(reading.read_json(folder / RUN_FILE), "id", str, RUN_FILE)
    return None


def model_facts(config) -> dict:
    content = config if isinstance(config, dict) else json.loads(json.dumps(config.to_dict(), default=str))
    return {name: content[name] for name in MODEL_FACTS if name in content}


def list_files(checkpoint: Path, run: str | None, config):
    """Writes down what a checkpoint consists of, for [`check_files`], while it is still in memory."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    listed = {name: [path.stat().st_size, sha256(path)] for name, path in files.items()}
    content = {"step": step_of(checkpoint), "run": run, "model": model_facts(config), "files": listed}
    write_json(checkpoint / FILES_FILE, content)


def listed_files(checkpoint: Path) -> dict[str, list]:
    """Size and hash of each file of a checkpoint, as they were when it was written; the hash of old ones is `None`.

    Raises:
        InputError: there is no such list, it is broken, or it is that of another checkpoint.
    """
    path = checkpoint / FILES_FILE
    content = reading.read_json(path)
    if "files" not in content:  # of an earlier version
        content = {"files": {name: [size, None] for name, size in content.items()}}
    files, step = reading.typed(content, "files", dict, str(path)), reading.typed(content, "step", int, str(path))
    if step not in (None, step_of(checkpoint)):
        raise InputError(f"{checkpoint} is a copy of {PREFIX_CHECKPOINT_DIR}-{step}.")
    if reading.typed(content, "run", str, str(path)) != run_id(checkpoint.parent):
        raise InputError(f"{checkpoint} is of another run.")
    for entry in (files or {}).values():
        if not (isinstance(entry, list) and list(map(type, entry)) in ([int, str], [int, type(None)])):
            raise InputError(f"{checkpoint} is damaged, see its {FILES_FILE}.")
    return files or {}


def check_files(checkpoint: Path):
    """Whether a checkpoint is as it was written.

    Raises:
        InputError: it isn't of this run; or a file is missing, has changed, or is none of those that were written.
    """
    listed = listed_files(checkpoint)
    if lacking := not_listed(listed):
        raise InputError(f"{checkpoint} is damaged, its {FILES_FILE} lists no {lacking}.")
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint).as_posix()
        if name not in listed and TRAINER_READS.fullmatch(name) and not path.is_dir():
            raise InputError(f"{checkpoint} is damaged, its {FILES_FILE} lists no {name}.")
    for name, (size, digest) in listed.items():
        path = checkpoint / name
        if not reading.is_regular(path) or path.stat().st_size != size or digest not in (None, sha256(path)):
            raise InputError(f"{checkpoint} is damaged, see its {name}.")
    state = reading.read_json(checkpoint / TRAINER_STATE_NAME)
    if state.get("global_step") != step_of(checkpoint):
        raise InputError(f"{checkpoint} is damaged, see its {TRAINER_STATE_NAME}.")


def not_listed(listed: dict[str, list]) -> str | None:
    """What a checkpoint can't be without and isn't listed: a Trainer goes on without most of it, in another way."""
    needed = [(TRAINER_STATE_NAME,)]
    if any(name.startswith("global_step") for name in listed):  # of DeepSpeed
        needed += [("latest",)]
    else:  # whole, or in folders of FSDP
        needed += [(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, "pytorch_model_fsdp")]
        needed += [("optimizer.",), ("scheduler.",), ("rng_state",)]
        if any(name.startswith(("pytorch_model_fsdp", "optimizer_")) for name in listed):
            needed[2] = ("optimizer",)
    return next((names[0] for names in needed if not any(name.startswith(names) for name in listed)), None)


def is_untouched(checkpoint: Path) -> bool:
    """Whether a folder holds what a run has written, and nothing else. Only files that are newer than the list of them
    are read."""
    files, listed = staging.entries(checkpoint), listed_files(checkpoint)
    if files is None or files.keys() - {FILES_FILE} != listed.keys():
        return False
    written = files[FILES_FILE].stat().st_mtime_ns
    for name, (size, digest) in listed.items():
        found = files[name].stat()
        is_newer = max(found.st_mtime_ns, found.st_ctime_ns) > written
        if found.st_size != size or is_newer and sha256(files[name]) != digest:
            return False
    return True


def check_archives(checkpoint: Path):
    """Whether what torch has written is as it was, of a checkpoint without hashes.

    Raises:
        InputError: it isn't.
    """
    for name, (_, digest) in listed_files(checkpoint).items():
        if digest is None and name.endswith((".pt", ".pth")):
            damaged = reading.understood(f"{checkpoint} is damaged", ADVICE)
            with damaged, zipfile.ZipFile(checkpoint / name) as archive:
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"{broken} in its {name} isn't as it was written")


def check_same_model(checkpoint: Path, config):
    """
    Raises:
        InputError: the checkpoint is of another model than the one that it is to go on as.
    """
    before = reading.typed(reading.read_json(checkpoint / FILES_FILE), "model", dict, FILES_FILE)
    if before is None and reading.is_regular(checkpoint / reading.CONFIG_NAME):  # of an earlier version
        before = model_facts(reading.read_json(checkpoint / reading.CONFIG_NAME))
    now = model_facts(config)
    for name in MODEL_FACTS:
        if before is not None and name in before and before[name] != now.get(name):
            raise InputError(
                f"{checkpoint} is of a model with {name} = {before[name]}, not {now.get(name)}: what was trained on "
                "has changed; restore it, or choose another --output."
            )


def last_good_checkpoint(folder: Path) -> Path | None:
    """The last one that is as it was written. Damaged ones after it get other names, a line for each says so.

    Raises:
        InputError: there are checkpoints, and none is good.
    """
    bad = []
    for checkpoint in reversed(named_checkpoints(folder)):
        try:
            check_files(checkpoint)
        except InputError as error:
            bad.append((checkpoint, str(error).rstrip(".")))
            continue
        for path, reason in bad:
            kept = f"it is now {staging.set_aside(path, 'damaged').name}" if is_own(path) else "it is left alone"
            print(f"{reason}; {kept}, and the run goes on from {checkpoint.name}", file=sys.stderr)
        return checkpoint
    if bad:
        reason = bad[0][1] + (f" ({len(bad)} are bad)" if len(bad) > 1 else "")
        raise InputError(f"no checkpoint in {folder} is good: {reason}; restore one, or choose another --output.")
    return None
