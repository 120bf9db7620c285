# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The conversion of a checkpoint, there and back, as files: no tensor of the donor is loaded."""

import copy
import json
import os
import platform
import shlex
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save as serialize
from transformers import PreTrainedConfig

from configuration_attnres import donor_class

from .card import (
    CARD_NAME,
    DONOR_CARD_NAME,
    FIGURE_NAME,
    RESULTS_NAME,
    config_facts,
    folder_card,
    inherit,
    read_metadata,
    write_card,
)
from .checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_SHARD_NAME,
    Checkpoint,
    ConversionError,
    clear_errors,
    read_checkpoint,
)
from .code_references import AUTO_MAP, local_code
from .families import ATTN_RES_FIELDS, Family, code_files, find_attnres_family, find_family
from .files import FIRST_OF_TWO, check_space, copy_file, new_index, write_shards
from .gguf_donor import check_dtype, gguf_donor
from .loading import check_tensors, empty_model
from .reading import is_regular, is_text, one_line, parse_json, read_json, typed, understood
from .source import Source, find_gguf, open_source
from .staging import check_destination, staged
from .verification import Verification, possible_dtype, quiet, verify
from .writing import write_json


MODES = ("block", "full")
DONOR_FILES = {CARD_NAME: DONOR_CARD_NAME, RESULTS_NAME: f"DONOR_{RESULTS_NAME}"}  # and what they are beside our own
FIGURE_NUMBERS = Path(FIGURE_NAME).with_suffix(".json").name
NOT_COPIED = (*DONOR_FILES, *DONOR_FILES.values(), FIGURE_NUMBERS, *code_files())
SECOND_OF_TWO = "model-00002-of-00002.safetensors"
DEPTH_SHARD_NAME = "model-depth-attention.safetensors"
INITIAL_VALUES = {"depth_attention.query": torch.zeros, "depth_attention.key_norm": torch.ones}
AUTO_MAP_METADATA = "donor_auto_map"
DEPTH_DTYPES = ("F32", "F64", "F16", "BF16")
SPACE_FOR_SMALL_FILES = 2**20


@dataclass(frozen=True)
class ConversionResult:
    """What was done. `depth_sources` is the number of sources of each read; parameters are counted as elements."""

    path: Path
    mode: str
    block_size: int
    depth_sources: tuple[int, ...]
    num_parameters: int
    depth_parameters: int
    verification: Verification | None
    verification_skipped: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All that is decided before anything is written; `config` and `attnres_class` are those of the AttnRes side.

    `companions` goes by file name; it has the new content of a JSON file from which something is left out.
    """

    source: Source
    checkpoint: Checkpoint
    family: Family
    attnres_class: type
    config: PreTrainedConfig
    new_config: dict
    shard_names: dict[str, str]
    depth: dict[str, torch.Tensor]
    donor_auto_map: dict | None
    companions: dict[str, dict | None]
    warnings: tuple[str, ...]


def convert_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    mode: str = "block",
    block_size: int | None = None,
    num_blocks: int | None = None,
    link: bool = False,
    verify: bool = True,
    revision: str | None = None,
    force: bool = False,
    progress: bool = False,
    gguf_file: str | None = None,
    dtype: str | None = None,
) -> ConversionResult:
    """Writes the Attention Residuals form of a checkpoint, which computes what the checkpoint computes.

    Args:
        src: a checkpoint folder of a supported family, a GGUF file or a Hub id.
        dst: the folder to write.
        mode: `"block"` or `"full"`.
        block_size: decoder layers per block, by default `ceil(layers / 8)`. Only for block mode.
        num_blocks: number of blocks, instead of `block_size`; the last block may be shorter.
        link: hard-link the weights instead of copying them; source and result then share these files.
        verify: run both models and compare their logits, if they fit in free memory.
        revision: branch, tag or commit of a Hub id.
        force: replace `dst`, after everything else is done.
        progress: show a progress bar.
        gguf_file: the name of a GGUF file in the folder or repository `src`.
        dtype: `"bfloat16"` or `"float32"`, of the weights that a GGUF file gives; default: bfloat16 if the file is
            quantised or in bfloat16, float32 otherwise.

    Raises:
        ConversionError: nothing was written; the message says why.
    """
    if mode not in MODES:
        raise ConversionError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    if block_size is not None and num_blocks is not None:
        raise ConversionError("give either a block size or a number of blocks, not both.")
    if mode == "full" and (block_size is not None or num_blocks is not None):
        raise ConversionError("full mode has no blocks; leave out the block size and the number of blocks.")
    check_dtype(dtype)
    with clear_errors(dst):
        dst = check_paths(src, dst, force)
        with _opened(src, dst, revision, gguf_file, dtype, link, progress) as (source, warnings):
            plan = _plan_attnres(source, mode, block_size, num_blocks, warnings)
            is_made = source.dequantized is not None  # nothing else needs the files that it has
            _check_space(plan, dst, link or is_made)
            with staged(dst, force) as folder:
                _write_attnres(plan, folder, None if is_made else link, progress)
                comparison, skipped = _verify(plan, source.folder, folder, verify)
                words = ["attnres-convert", source.name, one_line(dst.name)]
                command = shlex.join(words) + _options(plan, revision, link)
                _write_card(plan, folder, one_line(dst.name), command, comparison, skipped)
    return _result(plan, dst, comparison, skipped)


@contextmanager
def _opened(src, dst: Path, revision: str | None, gguf_file: str | None, dtype: str | None, link: bool, progress: bool):
    """The source, and warnings; the floats of a GGUF file are there until the block ends."""
    found = find_gguf(src, revision, gguf_file)
    if found is None:
        if dtype is not None:
            raise ConversionError(f"a dtype is for GGUF files only; the weights of {src} keep their own.")
        yield open_source(src, revision, find_family), []
        return
    if link:
        raise ConversionError("a GGUF file has no weights to share as they are; leave out --link.")
    with gguf_donor(found, dst, dtype, progress) as opened:
        yield opened


def convert_to_donor(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    link: bool = False,
    verify: bool = True,
    revision: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> ConversionResult:
    """Writes the donor's form of an AttnRes checkpoint whose queries are all zero.

    The inverse of [`convert_checkpoint`], whose arguments it takes.

    Raises:
        ConversionError: nothing was written; the message says why. Among the reasons: a query isn't zero.
    """
    with clear_errors(dst):
        dst = check_paths(src, dst, force)
        source = open_source(src, revision, find_attnres_family)
        plan = _plan_donor(source)
        _check_space(plan, dst, link)
        with staged(dst, force) as folder:
            _write_donor(plan, folder, link, progress)
            comparison, skipped = _verify(plan, folder, source.folder, verify)
    return _result(plan, dst, comparison, skipped)


def check_paths(src, dst, force: bool) -> Path:
    """The absolute destination, once it is known that it may be written and has nothing to do with the source."""
    with understood(f"{src} and {dst} are not both paths"):
        dst = Path(os.path.abspath(Path(dst).expanduser()))
        source, target = Path(src).expanduser().resolve(), dst.resolve()
        exists = source.exists()
    if not dst.name:
        raise ConversionError(f"{dst} can't be a destination.")
    if exists and (source == target or source in target.parents or target in source.parents):
        raise ConversionError(f"{src} and {dst} are one folder, or one is inside the other; choose another DST.")
    check_destination(dst, force)
    return dst


def _plan_attnres(source: Source, mode: str, block_size: int | None, num_blocks: int | None, found: list[str]) -> Plan:
    donor = read_checkpoint(source.folder)
    family = find_family(donor.config)
    attnres_class = family.head(donor.config.get("architectures"))
    if taken := [name for name in donor.tensors if name.endswith(tuple(INITIAL_VALUES))]:
        raise ConversionError(
            f"{source.folder} holds {taken[0]} of an AttnRes model, and its {CONFIG_NAME} is that of a donor; give it "
            "the one that it was saved with."
        )
    companions, warnings = plan_companions(donor)
    kept, more = local_code(donor.config, companions, CONFIG_NAME)
    warnings += [*found, *more]
    content = kept | {"model_type": family.config_class.model_type, "attn_res_sum_scale": True}
    if donor.config.get("architectures"):
        content["architectures"] = [attnres_class.__name__]
    content |= {"auto_map": family.config_class.hub_classes(), "attn_res_mode": mode}
    num_layers = build_config(family.config_class, content).num_hidden_layers
    check_layers(num_layers, donor)
    content["attn_res_block_size"] = _block_size(num_layers, block_size, num_blocks)
    config = build_config(family.config_class, content)
    content["attn_res_norm_eps"] = config.attn_res_norm_eps

    model = build_model(attnres_class, config)
    new = {
        name: (initial, tuple(tensor.shape))
        for suffix, initial in INITIAL_VALUES.items()
        for name, tensor in model.state_dict().items()
        if name.endswith(suffix)
    }
    shapes = _shapes(donor) | {name: shape for name, (_, shape) in new.items()}
    warnings += check_tensors(model, shapes, num_mtp_layers(donor.config))
    depth = {name: initial(shape) for name, (initial, shape) in new.items()}
    shard_names = {name: FIRST_OF_TWO if name == SINGLE_SHARD_NAME else name for name in donor.shards}
    return Plan(
        source=source,
        checkpoint=donor,
        family=family,
        attnres_class=attnres_class,
        config=config,
        new_config=content,
        shard_names=shard_names,
        depth=depth,
        donor_auto_map=kept.get(AUTO_MAP),
        companions=companions,
        warnings=tuple(warnings),
    )


def _plan_donor(source: Source) -> Plan:
    checkpoint = read_checkpoint(source.folder)
    family = find_attnres_family(checkpoint.config)
    donor_name = family.donor_head(checkpoint.config.get("architectures"))
    attnres_class = family.heads[donor_name]
    config = build_config(family.config_class, checkpoint.config)
    if config.attn_res_mode not in MODES:
        raise ConversionError(f"only models of mode {' or '.join(MODES)} convert back; this is {config.attn_res_mode}.")
    check_layers(config.num_hidden_layers, checkpoint)
    companions, warnings = plan_companions(checkpoint)
    shapes, num_mtp = _shapes(checkpoint), num_mtp_layers(checkpoint.config)
    warnings += check_tensors(build_model(attnres_class, config), shapes, num_mtp)
    depth = _read_depth(checkpoint)
    _check_uniform(depth, config)

    content = {key: value for key, value in checkpoint.config.items() if key not in ATTN_RES_FIELDS}
    content["model_type"] = family.donor_type
    if checkpoint.config.get("architectures"):
        content["architectures"] = [donor_name]
    content.pop(AUTO_MAP, None)
    shard = checkpoint.file_of(next(iter(depth)))
    if auto_map := checkpoint.shards[shard].metadata.get(AUTO_MAP_METADATA):
        content[AUTO_MAP] = parse_json(auto_map, f"{AUTO_MAP_METADATA} in {shard}")
    content, more = local_code(content, companions, CONFIG_NAME)
    kept = [name for name, shard in checkpoint.shards.items() if shard.tensors.keys() - depth.keys()]
    shard_names = {name: SINGLE_SHARD_NAME if kept == [FIRST_OF_TWO] else name for name in kept}
    return Plan(
        source=source,
        checkpoint=checkpoint,
        family=family,
        attnres_class=attnres_class,
        config=config,
        new_config=content,
        shard_names=shard_names,
        depth=depth,
        donor_auto_map=None,
        companions=companions,
        warnings=(*warnings, *more),
    )


def plan_companions(checkpoint: Checkpoint) -> tuple[dict[str, dict | None], list[str]]:
    """The small files that come along, as in a plan, and warnings."""
    companions = dict.fromkeys(name for name in checkpoint.companions() if name not in NOT_COPIED)
    warnings = []
    for name in companions:
        if name.endswith("config.json"):
            content, found = local_code(read_json(checkpoint.folder / name), companions, name)
            companions[name] = content if found else None
            warnings += found
    return companions, warnings


def num_mtp_layers(config: dict) -> int:
    return typed(config, "num_nextn_predict_layers", int, CONFIG_NAME) or 0


def check_layers(num_layers: int, checkpoint: Checkpoint) -> None:
    """Before a model is built, which takes time for each layer."""
    if num_layers > len(checkpoint.tensors):
        raise ConversionError(
            f"{CONFIG_NAME} disagrees with the tensors: it says {num_layers} layers, more than there are tensors."
        )


def build_config(config_class: type, content: dict) -> PreTrainedConfig:
    donor_type = getattr(config_class, "donor_config_class", lambda: config_class)().model_type
    with understood(f"{CONFIG_NAME} is not a valid {donor_type} configuration", kind=ConversionError), quiet():
        return config_class.from_dict(copy.deepcopy(content))  # nested values are changed in place


def build_model(model_class: type, config: PreTrainedConfig):
    with understood(f"no model can be built from {CONFIG_NAME}", kind=ConversionError):
        return empty_model(model_class, config)


def _block_size(num_layers: int, block_size: int | None, num_blocks: int | None) -> int:
    if num_blocks is not None:
        return _size_of_blocks(num_layers, num_blocks)
    if block_size is None:
        return -(-num_layers // 8)
    if type(block_size) is not int or not 1 <= block_size <= num_layers:
        raise ConversionError(f"the block size is {block_size}; it counts decoder layers, from 1 to {num_layers}.")
    return block_size


def _size_of_blocks(num_layers: int, num_blocks: int) -> int:
    if type(num_blocks) is not int or not 1 <= num_blocks <= num_layers:
        raise ConversionError(f"the number of blocks is {num_blocks}; {num_layers} layers allow 1 to {num_layers}.")
    size = -(-num_layers // num_blocks)
    if -(-num_layers // size) != num_blocks:
        possible = {-(-num_layers // size) for size in range(1, num_layers + 1)}
        below, above = (pick(x for x in possible if before(x)) for pick, before in _neighbours(num_blocks))
        raise ConversionError(
            f"{num_layers} layers can't be cut into {num_blocks} equal blocks with at most the last one shorter; "
            f"the nearest possible numbers are {below} and {above}."
        )
    return size


def _neighbours(number: int):
    return (max, lambda x: x < number), (min, lambda x: x > number)


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def _read_depth(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    depth = {}
    for suffix in INITIAL_VALUES:
        name = next(name for name in checkpoint.tensors if name.endswith(suffix))
        if checkpoint.tensors[name].dtype not in DEPTH_DTYPES:
            raise ConversionError(f"{name} is {checkpoint.tensors[name].dtype}; {DEPTH_DTYPES[0]} is expected.")
        path = checkpoint.shards[checkpoint.file_of(name)].path
        with understood(f"{path.name} can't be read"), safe_open(path, framework="pt") as file:
            depth[name] = file.get_tensor(name)
    return depth


def _check_uniform(depth: dict[str, torch.Tensor], config: PreTrainedConfig) -> None:
    """Raises a ConversionError unless every read is the plain sum of its sources, which the donor computes."""
    query, key_norm = depth.values()
    if (query * key_norm != 0).any() or query.any():
        raise ConversionError(
            f"the queries are trained, so the donor computes something else: the largest |query| is "
            f"{query.abs().max().item():.3g}, and only zero can be converted back. What runs donors alone, such as "
            "llama.cpp, can't run this model; attnres-export writes it for other runtimes."
        )
    if not config.attn_res_sum_scale:
        raise ConversionError(
            "attn_res_sum_scale is false, so the reads are means where the donor computes sums, and its results would "
            "differ; only a model that came from a donor can be converted back."
        )


def _check_space(plan: Plan, dst: Path, link: bool) -> None:
    rewritten = {plan.checkpoint.file_of(name) for name in plan.depth if name in plan.checkpoint.tensors}
    copied = [name for name in plan.shard_names if not link or name in rewritten]
    small = [plan.source.folder / name for name in plan.checkpoint.companions()]
    sizes = [plan.checkpoint.shards[name].size for name in copied] + [path.stat().st_size for path in small]
    check_space(dst, sum(sizes) + sum(tensor.nbytes for tensor in plan.depth.values()) + SPACE_FOR_SMALL_FILES)


def _write_attnres(plan: Plan, folder: Path, link: bool | None, progress: bool) -> None:
    write_shards(plan.checkpoint, plan.shard_names, set(), folder, link, progress)
    is_alone = set(plan.shard_names.values()) == {FIRST_OF_TWO}
    name = SECOND_OF_TWO if is_alone else DEPTH_SHARD_NAME
    metadata = {"format": "pt"}
    if plan.donor_auto_map is not None:
        metadata[AUTO_MAP_METADATA] = json.dumps(plan.donor_auto_map)
    with open(folder / name, "xb") as file:
        file.write(serialize(plan.depth, metadata))
    weights = dict.fromkeys(plan.depth, name)
    write_json(folder / INDEX_NAME, new_index(plan.checkpoint, plan.shard_names, weights, _depth_size(plan, 1)))
    copy_companions(plan.companions, plan.source.folder, folder)
    for file in plan.family.config_class.hub_files():
        copy_file(file, folder / file.name)
    write_json(folder / CONFIG_NAME, plan.new_config)


def _write_donor(plan: Plan, folder: Path, link: bool, progress: bool) -> None:
    write_shards(plan.checkpoint, plan.shard_names, set(plan.depth), folder, link, progress)
    if list(plan.shard_names.values()) != [SINGLE_SHARD_NAME]:
        index = new_index(plan.checkpoint, plan.shard_names, {}, _depth_size(plan, -1))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in plan.depth}
        write_json(folder / INDEX_NAME, index)
    copy_companions(plan.companions, plan.source.folder, folder)
    for name, donor_name in DONOR_FILES.items():
        if is_regular(plan.source.folder / donor_name):
            copy_file(plan.source.folder / donor_name, folder / name)
    write_json(folder / CONFIG_NAME, plan.new_config)


def _depth_size(plan: Plan, sign: int) -> dict[str, int]:
    return {
        "total_size": sign * sum(tensor.nbytes for tensor in plan.depth.values()),
        "total_parameters": sign * sum(tensor.numel() for tensor in plan.depth.values()),
    }


def copy_companions(companions: dict[str, dict | None], source: Path, folder: Path) -> None:
    for name, content in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if content is None:
            copy_file(source / name, folder / name)
        else:
            write_json(folder / name, content)


def _verify(plan: Plan, donor: Path, attnres: Path, wanted: bool) -> tuple[Verification | None, str | None]:
    dtype, skipped = possible_dtype(plan.checkpoint) if wanted else (None, "it was switched off")
    if skipped is None and not all(is_text(os.fspath(path)) for path in (donor, attnres)):
        skipped = "safetensors opens no folder whose name isn't UTF-8"
    if skipped is not None:
        return None, skipped
    return verify(donor, donor_class(plan.attnres_class), attnres, plan.attnres_class, dtype), None


def _options(plan: Plan, revision: str | None, link: bool) -> str:
    full = plan.config.attn_res_mode == "full"
    shape = " --mode full" if full else f" --mode block --block-size {plan.config.attn_res_block_size}"
    if (made := plan.source.dequantized) is not None:
        file = "" if plan.source.name == made["file"] else f" --gguf-file {shlex.quote(made['file'])}"
        shape += f"{file} --dtype {made['dtype']}"
    return shape + (f" --revision {revision}" if revision else "") + (" --link" if link else "")


def _write_card(
    plan: Plan, folder: Path, title: str, command: str, comparison: Verification | None, skipped: str | None
) -> None:
    """Writes `results.json` and the card; those of the donor come along under other names."""
    source = plan.source
    for name, donor_name in DONOR_FILES.items():
        if is_regular(source.folder / name):
            copy_file(source.folder / name, folder / donor_name)
    found = vars(comparison) if comparison is not None else {"verification_skipped": skipped}
    added = _depth_size(plan, 1)["total_parameters"]
    results = {
        "command": command,
        "base": source.name,
        "revision": source.commit,
        "model_config": config_facts(plan.new_config),
        "conversion": {"donor_class": donor_class(plan.attnres_class).__name__, "parameters_added": added, **found},
        "versions": versions(),
    }
    if source.dequantized is not None:
        results["dequantized"] = source.dequantized
    write_json(folder / RESULTS_NAME, results)
    metadata = read_metadata(source.folder) if source.metadata is None else source.metadata
    metadata = inherit(metadata, source.name if source.is_hub else None, is_trained=False)
    write_card(folder, folder_card(folder, title, metadata))


def versions() -> dict[str, str]:
    """Of what computes the results."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _result(plan: Plan, dst: Path, comparison: Verification | None, skipped: str | None) -> ConversionResult:
    config = plan.config
    total, added = plan.checkpoint.num_parameters, _depth_size(plan, 1)["total_parameters"]
    return ConversionResult(
        path=dst,
        mode=config.attn_res_mode,
        block_size=config.attn_res_block_size,
        depth_sources=tuple(config.num_depth_sources(row) for row in range(config.num_depth_reads)),
        num_parameters=total - added if plan.depth.keys() <= plan.checkpoint.tensors.keys() else total,
        depth_parameters=added,
        verification=comparison,
        verification_skipped=skipped,
        warnings=plan.warnings,
    )
