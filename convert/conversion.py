# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The conversion of a checkpoint, there and back, as files: no tensor of the donor is loaded."""

import copy
import json
import math
import os
import platform
import re
import shlex
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import save as serialize
from transformers import PreTrainedConfig

from configuration_attnres import ATTN_RES_MODES, donor_class, known_modes
from depth_attention_attnres import DEPTH_MIXERS

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
from .forms import INKLING2_TYPE, Form, donor_config, find_form, inkling2_fields, to_inkling2
from .gguf_donor import check_dtype, gguf_donor
from .kimi_k3 import to_kimi_k3
from .loading import FLOATS, check_layers, check_tensors, empty_model, read_tensors
from .reading import is_regular, is_text, one_line, parse_json, read_json, typed, understood
from .source import Source, find_gguf, open_source
from .staging import check_destination, staged
from .verification import Verification, possible_dtype, quiet, verify
from .writing import write_json


DEFAULT_MODE = "block"
# that may be set, and how the modes end that use them
NUMBERS = {
    "attn_res_window": "_window",
    "attn_res_num_heads": "_heads",
    "attn_res_rank": "_low_rank",
    "attn_res_num_streams": "hc",
}
DEPTH = re.compile(r"(|.*\.)depth_attention\.(.+)")
SEED = 0  # of the initial values that are random
DONOR_FILES = {CARD_NAME: DONOR_CARD_NAME, RESULTS_NAME: f"DONOR_{RESULTS_NAME}"}  # and what they are beside our own
FIGURE_NUMBERS = Path(FIGURE_NAME).with_suffix(".json").name
NOT_COPIED = (*DONOR_FILES, *DONOR_FILES.values(), FIGURE_NUMBERS, *code_files())
SECOND_OF_TWO = "model-00002-of-00002.safetensors"
DEPTH_SHARD_NAME = "model-depth-attention.safetensors"
AUTO_MAP_METADATA = "donor_auto_map"
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

    `depth` are the tensors of depth attention on that side. Of the source's tensors those in `removed` are left out,
    and those in `added` join the others. `companions` goes by file name; it has the new content of a JSON file from
    which something is left out. `numbers` are the fields that were given. `incomparable` says why no logits can be
    compared, if they can't.
    """

    source: Source
    checkpoint: Checkpoint
    family: Family
    attnres_class: type
    config: PreTrainedConfig
    new_config: dict
    depth: dict[str, torch.Tensor]
    removed: set[str]
    added: dict[str, torch.Tensor]
    companions: dict[str, dict | None]
    warnings: tuple[str, ...]
    donor_auto_map: dict | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    form: Form | None = None
    incomparable: str | None = None

    @property
    def shard_names(self) -> dict[str, str]:
        """The shards that keep tensors, by their old names."""
        shards = self.checkpoint.shards
        kept = [name for name, shard in shards.items() if shard.tensors.keys() - self.removed]
        is_alone = kept in ([SINGLE_SHARD_NAME], [FIRST_OF_TWO])
        first = FIRST_OF_TWO if self.added else SINGLE_SHARD_NAME
        return {name: first if is_alone else name for name in kept}

    def grown(self) -> dict[str, int]:
        """By how much the weights grow."""
        removed = [self.checkpoint.tensors[name] for name in self.removed]
        size = sum(x.nbytes for x in self.added.values()) - sum(x.end - x.start for x in removed)
        parameters = sum(x.numel() for x in self.added.values()) - sum(math.prod(x.shape) for x in removed)
        return {"total_size": size, "total_parameters": parameters}


def convert_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    mode: str | None = None,
    block_size: int | None = None,
    num_blocks: int | None = None,
    fields: dict[str, int] | None = None,
    link: bool = False,
    verify: bool = True,
    revision: str | None = None,
    force: bool = False,
    progress: bool = False,
    gguf_file: str | None = None,
    dtype: str | None = None,
) -> ConversionResult:
    """Writes the Attention Residuals form of a checkpoint, which computes what the checkpoint computes.

    A checkpoint of another project that has depth attention already, in a form of `forms.py`, keeps it; it says itself
    which mode and blocks.

    Args:
        src: a checkpoint folder of a supported family, a GGUF file or a Hub id.
        dst: the folder to write.
        mode: a mode of [`AttnResConfig`] that can compute what a donor does, by default `"block"`.
        block_size: decoder layers per block, by default `ceil(layers / 8)`. Only for modes whose sources are blocks.
        num_blocks: number of blocks, instead of `block_size`; the last block may be shorter.
        fields: numbers of the configuration, of those that `NUMBERS` names.
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
    given = {"mode": mode, "block_size": block_size, "num_blocks": num_blocks, **_checked_numbers(fields)}
    given = {name: value for name, value in given.items() if value is not None}
    _check_mode(given)
    check_dtype(dtype)
    with clear_errors(dst):
        dst = check_paths(src, dst, force)
        with _opened(src, dst, revision, gguf_file, dtype, link, progress) as (source, warnings):
            plan = _plan_attnres(source, given, warnings)
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
        yield open_source(src, revision, _find_family), []
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
    """Writes the donor's form of an AttnRes checkpoint that computes what a donor does, as with queries that are zero.

    The inverse of [`convert_checkpoint`], whose arguments it takes.

    Raises:
        ConversionError: nothing was written; the message says why. Among the reasons: it was trained.
    """
    return _convert_back(_plan_donor, src, dst, link, verify, revision, force, progress)


def convert_to_kimi_k3(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    link: bool = False,
    verify: bool = True,
    revision: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> ConversionResult:
    """Writes an AttnRes checkpoint of block mode as its donor with depth attention under the names of Kimi K3, which
    [`convert_checkpoint`] reads.

    Arguments as those of [`convert_to_donor`]; nothing here runs the result, so `verify` changes nothing.

    Raises:
        ConversionError: nothing was written; the message says why. Among the reasons: its reads are scaled.
    """
    return _convert_back(_plan_kimi_k3, src, dst, link, verify, revision, force, progress)


def _convert_back(make_plan, src, dst, link: bool, verify: bool, revision, force: bool, progress: bool):
    with clear_errors(dst):
        dst = check_paths(src, dst, force)
        source = open_source(src, revision, find_attnres_family)
        plan = make_plan(source)
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


def _find_family(config: dict) -> Family:
    return find_family(donor_config(config))


def _checked_numbers(numbers: dict | None) -> dict[str, int]:
    for name, value in (numbers or {}).items():
        if name not in NUMBERS:
            raise ConversionError(f"{name} can't be set; {', '.join(NUMBERS)} can.")
        if type(value) is not int:
            raise ConversionError(f"{name} is {value!r}; it must be an integer.")
    return dict(numbers or {})


def _check_mode(given: dict) -> None:
    mode, is_sized = given.get("mode", DEFAULT_MODE), "block_size" in given or "num_blocks" in given
    if mode not in ATTN_RES_MODES:
        raise ConversionError(f"mode is {mode!r}; it must be one of {known_modes()}.")
    if "block_size" in given and "num_blocks" in given:
        raise ConversionError("give either a block size or a number of blocks, not both.")
    if is_sized and not ATTN_RES_MODES[mode].sums_blocks:
        raise ConversionError(f"{mode} mode has no blocks; leave out the block size and the number of blocks.")


def _plan_attnres(source: Source, given: dict, found: list[str]) -> Plan:
    checkpoint = read_checkpoint(source.folder)
    form = find_form(checkpoint)
    if form is not None and given:
        raise ConversionError(f"the checkpoint says itself what depth attention it has; leave out {', '.join(given)}.")
    for name in given.keys() & NUMBERS.keys():
        if not given.get("mode", DEFAULT_MODE).endswith(NUMBERS[name]):
            raise ConversionError(f"{name} is of modes that end in {NUMBERS[name]}; leave it out, or give one.")
    donor = checkpoint.config if form is None else form.donor_config
    family = find_family(donor)
    attnres_class = family.head(donor.get("architectures"))
    if taken := [name for name in checkpoint.tensors if DEPTH.fullmatch(name)]:
        raise ConversionError(
            f"{source.folder} holds {taken[0]} of an AttnRes model, and its {CONFIG_NAME} is that of a donor; give it "
            "the one that it was saved with."
        )
    companions, warnings = plan_companions(checkpoint)
    kept, more = local_code(donor, companions, CONFIG_NAME)
    warnings += [*found, *more]
    content = kept | {"model_type": family.config_class.model_type, "attn_res_sum_scale": form is None}
    if donor.get("architectures"):
        content["architectures"] = [attnres_class.__name__]
    content |= {"auto_map": family.config_class.hub_classes()}
    numbers = {name: value for name, value in given.items() if name in NUMBERS}
    content |= {"attn_res_mode": given.get("mode", DEFAULT_MODE), **numbers} if form is None else form.fields
    config = build_config(family.config_class, content)
    num_layers = config.num_hidden_layers
    check_layers(num_layers, checkpoint.tensors)
    if form is None:
        size = _block_size(num_layers, given.get("block_size"), given.get("num_blocks"))
        config = build_config(family.config_class, content | {"attn_res_block_size": size})
    content["attn_res_block_size"] = config.attn_res_block_size
    content["attn_res_norm_eps"] = config.attn_res_norm_eps
    mixer = DEPTH_MIXERS[config.attn_res_mode]
    if form is None and (reason := mixer.why_no_donor(config)):
        raise ConversionError(f"a donor can't be converted to {config.attn_res_mode} mode: {reason}.")

    model = build_model(attnres_class, config)
    parameters = {name: match[2] for name in model.state_dict() if (match := DEPTH.fullmatch(name))}
    removed = set() if form is None else {*form.names}
    shapes = {name: shape for name, shape in _shapes(checkpoint).items() if name not in removed}
    shapes |= {name: tuple(model.state_dict()[name].shape) for name in parameters}
    warnings += check_tensors(model, shapes, num_mtp_layers(donor))
    values = initial_values(config) if form is None else form.rows(read_tensors(checkpoint, form.names), config)
    depth = {name: values[parameter].contiguous() for name, parameter in parameters.items()}
    return Plan(
        source=source,
        checkpoint=checkpoint,
        family=family,
        attnres_class=attnres_class,
        config=config,
        new_config=content,
        depth=depth,
        removed=removed,
        added=depth,
        companions=companions,
        warnings=tuple(warnings),
        donor_auto_map=kept.get(AUTO_MAP),
        numbers=numbers,
        form=form,
        incomparable=None if form is None or form.runs else "the code that runs the source isn't part of transformers",
    )


@torch.no_grad()
def initial_values(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """The parameters of depth attention as they are before any training, the same ones on every run."""
    with (
        understood(f"depth attention of {config.attn_res_mode} mode can't be made", kind=ConversionError),
        torch.random.fork_rng(devices=[]),
    ):
        mixer = DEPTH_MIXERS[config.attn_res_mode](config)
        torch.manual_seed(SEED)
        mixer.reset_parameters()
    return mixer.state_dict()


def _plan_donor(source: Source) -> Plan:
    plan = _plan_back(source)
    config, mode = plan.config, plan.config.attn_res_mode
    if plan.family.donor_type == INKLING2_TYPE:
        content = plan.new_config | inkling2_fields(config)
        ((name, query), *_) = plan.depth.items()
        return replace(plan, new_config=content, added=to_inkling2(query.float(), config, DEPTH.fullmatch(name)[1]))
    if reason := DEPTH_MIXERS[mode].why_no_donor(config):
        raise ConversionError(f"a model of {mode} mode can't be converted back: {reason}.")
    _check_donor(plan.depth, config)
    return plan


def _plan_kimi_k3(source: Source) -> Plan:
    plan = _plan_back(source)
    config = plan.config
    if config.attn_res_mode != "block":
        raise ConversionError(f"Kimi K3 has block mode; attn_res_mode is {config.attn_res_mode!r}.")
    if config.attn_res_sum_scale:
        raise ConversionError(
            "attn_res_sum_scale is true, and Kimi K3 doesn't multiply reads by their number of sources, so it would "
            "compute something else."
        )
    parameters = {DEPTH.fullmatch(name)[2]: tensor.float() for name, tensor in plan.depth.items()}
    prefix = DEPTH.fullmatch(next(iter(plan.depth)))[1]
    return replace(
        plan,
        new_config={**plan.new_config, "attn_res_block_size": config.attn_res_block_size},
        added=to_kimi_k3(parameters["query"], parameters["key_norm"], prefix),
        incomparable="nothing here runs Kimi K3's form but its conversion back",
    )


def _plan_back(source: Source) -> Plan:
    """The donor's tensors and configuration, whatever depth attention computes."""
    checkpoint = read_checkpoint(source.folder)
    family = find_attnres_family(checkpoint.config)
    donor_name = family.donor_head(checkpoint.config.get("architectures"))
    attnres_class = family.heads[donor_name]
    config = build_config(family.config_class, checkpoint.config)
    check_layers(config.num_hidden_layers, checkpoint.tensors)
    companions, warnings = plan_companions(checkpoint)
    shapes, num_mtp = _shapes(checkpoint), num_mtp_layers(checkpoint.config)
    warnings += check_tensors(build_model(attnres_class, config), shapes, num_mtp)
    depth = read_tensors(checkpoint, [name for name in checkpoint.tensors if DEPTH.fullmatch(name)], (*FLOATS, "F64"))

    content = {key: value for key, value in checkpoint.config.items() if key not in ATTN_RES_FIELDS}
    content["model_type"] = family.donor_type
    if checkpoint.config.get("architectures"):
        content["architectures"] = [donor_name]
    content.pop(AUTO_MAP, None)
    shard = checkpoint.file_of(next(iter(depth)))
    if auto_map := checkpoint.shards[shard].metadata.get(AUTO_MAP_METADATA):
        content[AUTO_MAP] = parse_json(auto_map, f"{AUTO_MAP_METADATA} in {shard}")
    content, more = local_code(content, companions, CONFIG_NAME)
    return Plan(
        source=source,
        checkpoint=checkpoint,
        family=family,
        attnres_class=attnres_class,
        config=config,
        new_config=content,
        depth=depth,
        removed={*depth},
        added={},
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


def _check_donor(depth: dict[str, torch.Tensor], config: PreTrainedConfig) -> None:
    """Raises a ConversionError unless every read is the plain sum of its sources, which the donor computes."""
    mixer = DEPTH_MIXERS[config.attn_res_mode]
    as_converted = copy.copy(config)
    as_converted.attn_res_sum_scale = True
    initial = initial_values(as_converted)
    for name, tensor in depth.items():
        parameter = DEPTH.fullmatch(name)[2]
        expected = initial[parameter]
        if tensor.shape != expected.shape:
            raise ConversionError(f"{name} is {[*tensor.shape]} where the configuration says {[*expected.shape]}.")
        if parameter not in (mixer.idle or initial) or not (off := (tensor - expected).abs().max().item()):
            continue
        if parameter == "query":
            found = f"the queries are trained, so the donor computes something else: the largest |query| is {off:.3g}, "
            found += "and only zero can be converted back"
        else:
            found = f"{name} is trained, so the donor computes something else: it is off its initial values by up to "
            found += f"{off:.3g}, and only they can be converted back"
        raise ConversionError(
            f"{found}. What runs donors alone, such as llama.cpp, can't run this model; attnres-export writes it for "
            "other runtimes."
        )
    if mixer.sums_to_one and not config.attn_res_sum_scale:
        raise ConversionError(
            "attn_res_sum_scale is false, so the reads are means where the donor computes sums, and its results would "
            "differ; only a model that came from a donor can be converted back."
        )


def _check_space(plan: Plan, dst: Path, link: bool) -> None:
    rewritten = {plan.checkpoint.file_of(name) for name in plan.removed}
    copied = [name for name in plan.shard_names if not link or name in rewritten]
    small = [plan.source.folder / name for name in plan.checkpoint.companions()]
    sizes = [plan.checkpoint.shards[name].size for name in copied] + [path.stat().st_size for path in small]
    check_space(dst, sum(sizes) + sum(tensor.nbytes for tensor in plan.added.values()) + SPACE_FOR_SMALL_FILES)


def _write_attnres(plan: Plan, folder: Path, link: bool | None, progress: bool) -> None:
    write_shards(plan.checkpoint, plan.shard_names, plan.removed, folder, link, progress)
    _write_rest(plan, folder)
    for file in plan.family.config_class.hub_files():
        copy_file(file, folder / file.name)


def _write_donor(plan: Plan, folder: Path, link: bool, progress: bool) -> None:
    write_shards(plan.checkpoint, plan.shard_names, plan.removed, folder, link, progress)
    _write_rest(plan, folder)
    if not plan.added:  # else it isn't as the card says
        for name, donor_name in DONOR_FILES.items():
            if is_regular(plan.source.folder / donor_name):
                copy_file(plan.source.folder / donor_name, folder / name)


def _write_rest(plan: Plan, folder: Path) -> None:
    """New tensors, index, small files and configuration."""
    names = plan.shard_names
    name = SECOND_OF_TWO if {*names.values()} == {FIRST_OF_TWO} else DEPTH_SHARD_NAME
    if plan.added:
        metadata = {"format": "pt"}
        if plan.donor_auto_map is not None:
            metadata[AUTO_MAP_METADATA] = json.dumps(plan.donor_auto_map)
        with open(folder / name, "xb") as file:
            file.write(serialize(plan.added, metadata))
    if [*names.values()] != [SINGLE_SHARD_NAME]:
        added = dict.fromkeys(plan.added, name)
        write_json(folder / INDEX_NAME, new_index(plan.checkpoint, names, plan.removed, added, plan.grown()))
    copy_companions(plan.companions, plan.source.folder, folder)
    write_json(folder / CONFIG_NAME, plan.new_config)


def copy_companions(companions: dict[str, dict | None], source: Path, folder: Path) -> None:
    for name, content in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if content is None:
            copy_file(source / name, folder / name)
        else:
            write_json(folder / name, content)


def _verify(plan: Plan, donor: Path, attnres: Path, wanted: bool) -> tuple[Verification | None, str | None]:
    dtype, skipped = possible_dtype(plan.checkpoint) if wanted else (None, "it was switched off")
    skipped = plan.incomparable or skipped
    if skipped is None and not all(is_text(os.fspath(path)) for path in (donor, attnres)):
        skipped = "safetensors opens no folder whose name isn't UTF-8"
    if skipped is not None:
        return None, skipped
    return verify(donor, donor_class(plan.attnres_class), attnres, plan.attnres_class, dtype), None


def _options(plan: Plan, revision: str | None, link: bool) -> str:
    config, shape = plan.config, ""
    if plan.form is None:
        shape = f" --mode {config.attn_res_mode}"
        shape += f" --block-size {config.attn_res_block_size}" if config.depth_sources.sums_blocks else ""
        shape += "".join(f" --set {name}={value}" for name, value in plan.numbers.items())
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
    added = {"parameters_added": _depth_parameters(plan), "tensors_added": sorted(plan.depth)}
    if plan.form is not None:
        added["project"] = plan.form.project
    if plan.incomparable is None:
        added["donor_class"] = donor_class(plan.attnres_class).__name__
    results = {
        "command": command,
        "base": source.name,
        "revision": source.commit,
        "model_config": config_facts(plan.new_config),
        "conversion": {**added, **found},
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


def _depth_parameters(plan: Plan) -> int:
    return sum(tensor.numel() for tensor in plan.depth.values())


def _result(plan: Plan, dst: Path, comparison: Verification | None, skipped: str | None) -> ConversionResult:
    config = plan.config
    replaced = sum(math.prod(plan.checkpoint.tensors[name].shape) for name in plan.removed)
    return ConversionResult(
        path=dst,
        mode=config.attn_res_mode,
        block_size=config.attn_res_block_size,
        depth_sources=tuple(config.num_depth_sources(row) for row in range(config.num_depth_reads)),
        num_parameters=plan.checkpoint.num_parameters - replaced,
        depth_parameters=_depth_parameters(plan),
        verification=comparison,
        verification_skipped=skipped,
        warnings=plan.warnings,
    )
