# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A GGUF file as a folder of transformers: the weights as floats, the configuration, the tokenizer.

transformers reads the file. Of the configuration it leaves out fields that change what the model computes; those are
taken from the file here, and a file of which something would still be lost is refused.
"""

import gc
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig

from configuration_attnres import donor_class

from .card import read_metadata, without_local_bases
from .checkpoint import CONFIG_NAME, LICENCES, ConversionError
from .families import Family, find_family
from .files import check_space, copy_file
from .gguf_file import GgufFile, read_gguf
from .loading import empty_model
from .reading import CARD_NAME, check_inside, one_line, read_json, understood
from .source import GgufSource, Source
from .staging import scratch
from .verification import available_memory, quiet
from .writing import write_json


# Those that transformers reads right, with what is completed here, and that have an AttnRes form. Of gpt-oss it leaves
# out the experts.
ARCHITECTURES = ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3", "qwen3moe", "starcoder2")
LINK_NAME = "model.gguf"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_SIZE = 5 * 10**9
SPACE_FOR_TOKENIZER = 2**25
# Tensors that hold no weights but the frequencies of the rotary embedding, as factors to divide them by
ROPE_FACTORS = {name: f"{name}.weight" for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")}
NO_SCALING = (None, "none")
ONE_FOR_ALL = "rope_freqs"
# Gemma's largest models divide scores by the root of another number than their heads' size; no field of a file says so
GEMMA_LARGE = {"gemma2": 46, "gemma3_text": 62}  # and have so many layers
TOKENIZER_CONFIG = "tokenizer_config.json"
AS_SAVED = "TokenizersBackend"  # the class that adds nothing to a tokenizer.json
PROBES = ("The quick brown fox, 12345 times:\n\tdef f(x): return x  # naïve 日本 🙂", " a  b\n\n", "")


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")


@contextmanager
def gguf_donor(found: GgufSource, dst: Path, dtype: str | None, progress: bool) -> Iterator[tuple[Source, list[str]]]:
    """The float donor of a GGUF file, in a hidden folder beside `dst` until the block ends, and warnings.

    Args:
        dtype: a key of DTYPES; default: see [`default_dtype`].

    Raises:
        InputError: as [`read_gguf`] and [`write_gguf_donor`].
    """
    file = read_gguf(found.path, found.file)
    dtype = dtype or default_dtype(file)
    with scratch(dst) as work:
        donor, alone = work / "donor", work / "gguf"
        donor.mkdir()
        alone.mkdir()
        warnings = write_gguf_donor(file, donor, alone, dtype, progress)
        metadata = _metadata(file)
        if found.folder is not None:
            metadata |= read_metadata(found.folder)
            for path in found.folder.iterdir():
                if path.name == CARD_NAME or any(fnmatch(path.name.lower(), pattern) for pattern in LICENCES):
                    check_inside(found.folder, path)
                    copy_file(path, donor / path.name)
        yield Source(donor, found.name, found.commit, _facts(file, dtype), metadata), warnings


def _facts(file: GgufFile, dtype: str) -> dict[str, str]:
    """What `results.json` and the card say of a file."""
    found = {name: file.text(f"general.{name}") for name in ("name", "license")}
    facts = {"format": "GGUF", "file": file.name, "architecture": one_line(file.architecture)}
    facts |= {"quantization": file.quantization, "dtype": dtype}
    return facts | {name: text for name, text in found.items() if text}


def _metadata(file: GgufFile) -> dict:
    """What a file says for the metadata of a card, as [`read_metadata`] gives those of a card."""
    fields = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    found = {name: file.text(f"general.{field}") for name, field in fields.items()}
    base = file.text("general.base_model.0.repo_url") or file.text("general.source.repo_url")
    found["base_model"] = base and base.removeprefix("https://huggingface.co/")
    for name, field in {"language": "languages", "tags": "tags", "datasets": "datasets"}.items():
        values = file.fields.get(f"general.{field}")
        found[name] = isinstance(values, list) and [one_line(x) for x in values if isinstance(x, str)]
    return without_local_bases({name: value for name, value in found.items() if value})


def default_dtype(file: GgufFile) -> str:
    """bfloat16 for a quantised file, whose own error is larger; float32, which loses nothing, for any other."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return "bfloat16" if file.is_quantized or kinds == {"BF16"} else "float32"


def write_gguf_donor(file: GgufFile, folder: Path, work: Path, dtype: str, progress: bool) -> list[str]:
    """Writes the float donor of a GGUF file.

    Args:
        folder: an empty one, for the donor.
        work: another empty one, in which the file gets a name of its own, alone: transformers reads more of a folder
            than the file that it is told.
        dtype: a key of DTYPES.
        progress: show the progress bar of transformers.

    Returns:
        Warnings.

    Raises:
        InputError: transformers doesn't read such files, or not all of this one.
    """
    link = work / LINK_NAME
    os.symlink(file.path, link)
    where = {"gguf_file": os.fspath(link), "local_files_only": True}
    config, family = _config(file, work, where)
    shapes = _check_numbers(file, family, config)
    _check_room(file, folder, shapes, DTYPES[dtype])
    bar = nullcontext() if progress and sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with understood(f"transformers can't read {file.name}", kind=ConversionError), quiet(), bar:
        model, info = AutoModelForCausalLM.from_pretrained(
            work,
            config=config,
            dtype=DTYPES[dtype],
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **where,
        )
        if lost := sorted(info["missing_keys"] | info["unexpected_keys"] | {k for k, *_ in info["mismatched_keys"]}):
            raise ConversionError(f"transformers finds no {lost[0]} in {file.name} ({len(lost)} tensors in all).")
        # what is left is a plain model, saved under the names that its family has on disk
        model.hf_quantizer = None
        vars(model).pop("_weight_conversions", None)
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        make_readable(folder)
    del model
    gc.collect()
    return _write_tokenizer(file, folder, work, where)


def make_readable(folder: Path) -> None:
    """Gives shards, which safetensors writes for this user alone, the mode of other files."""
    for shard in folder.glob("*.safetensors"):
        shard.chmod(stat.S_IMODE((folder / CONFIG_NAME).stat().st_mode))


def _config(file: GgufFile, work: Path, where: dict) -> tuple[PreTrainedConfig, Family]:
    """The complete configuration, and the family."""
    if file.architecture not in ARCHITECTURES:
        raise ConversionError(
            f"GGUF files of the architecture {file.text('general.architecture')} aren't read, only those of "
            f"{', '.join(ARCHITECTURES)}; convert the model's own checkpoint (safetensors)."
        )
    if file.architecture == "llama" and file.of_model("expert_count"):
        raise ConversionError(
            f"{file.name} is a Llama with experts (Mixtral), which transformers doesn't read from GGUF; convert the "
            "model's own checkpoint."
        )
    with understood(f"the configuration in {file.name} is not valid", kind=ConversionError), quiet():
        config = AutoConfig.from_pretrained(work, **where)
        config = _completed(config, file)
    return config, find_family(config.to_dict())


def _completed(config: PreTrainedConfig, file: GgufFile) -> PreTrainedConfig:
    """The configuration with what the file says and transformers doesn't take from it."""
    content = config.to_dict()
    for name in ("_model_name_or_path", "_name_or_path"):
        content.pop(name, None)
    if file.architecture == "llama":  # one that is called mistral, transformers takes for that
        content["model_type"] = file.architecture
    fields = {
        "head_dim": "attention.key_length",
        "moe_intermediate_size": "expert_feed_forward_length",
        "sliding_window": "attention.sliding_window",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "norm_epsilon": "attention.layer_norm_epsilon",
    }
    found = {name: file.of_model(field) for name, field in fields.items() if name in content}
    content |= {name: value for name, value in found.items() if value is not None}
    if content.get("sliding_window") == 0:
        content["sliding_window"] = None
    head_dim = content.get("head_dim") or content["hidden_size"] // content["num_attention_heads"]
    if "query_pre_attn_scalar" in content:
        is_large = content["num_hidden_layers"] == GEMMA_LARGE.get(content["model_type"])
        size = content["hidden_size"] // content["num_attention_heads"] if is_large else head_dim
        content["query_pre_attn_scalar"] = size
    for name, tensor in {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}.items():
        if name in content:
            content[name] = f"blk.0.{tensor}" in file.tensors
    _complete_rope(content, head_dim, file)
    return AutoConfig.for_model(content.pop("model_type"), **content)


def _complete_rope(content: dict, head_dim: int, file: GgufFile) -> None:
    rope = content["rope_parameters"]
    rope = rope.get("full_attention", rope)  # of Gemma 3; that of its windows is never scaled
    if (base := file.of_model("rope.freq_base")) is not None:
        rope["rope_theta"] = base
    rotated = file.of_model("rope.dimension_count") or head_dim
    if rotated != head_dim:
        if content["model_type"] != "phi3":
            raise ConversionError(f"{file.name} rotates {rotated} of {head_dim} channels of a head, which isn't read.")
        content["partial_rotary_factor"] = rope["partial_rotary_factor"] = rotated / head_dim
    kind, factor = file.of_model("rope.scaling.type"), file.of_model("rope.scaling.factor")
    original = file.of_model("rope.scaling.original_context_length")
    factors = {name: _numbers(file, tensor) for name, tensor in ROPE_FACTORS.items() if tensor in file.tensors}
    if factors:
        # Each frequency has a factor of its own, which is what transformers calls longrope, whatever the rule was
        long = factors.get("rope_factors_long", factors.get(ONE_FOR_ALL))
        short = factors.get("rope_factors_short", long)
        if long is None or {len(long), len(short)} != {rotated // 2}:
            raise ConversionError(f"the rotary factors in {file.name} aren't {rotated // 2} for each length of text.")
        original = original or content["max_position_embeddings"]
        rope |= {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        rope["original_max_position_embeddings"] = content["original_max_position_embeddings"] = original
        if ONE_FOR_ALL in factors:
            rope["attention_factor"] = 1.0
        elif (scale := file.of_model("rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = scale
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind not in NO_SCALING:
        raise ConversionError(f"{file.name} scales its positions by {kind!r}, which isn't read.")


def _numbers(file: GgufFile, name: str) -> list[float]:
    tensor = file.tensors[name]
    if tensor.kind != "F32":
        raise ConversionError(f"{name} in {file.name} is {tensor.kind}; F32 is expected.")
    with open(file.path, "rb") as opened:
        opened.seek(tensor.start)
        values = torch.frombuffer(bytearray(opened.read(tensor.size)), dtype=torch.float32)
    if not (values > 0).all() or not values.isfinite().all():
        raise ConversionError(f"{name} in {file.name} isn't positive.")
    return [float(str(value)) for value in values.numpy()]


def _check_numbers(file: GgufFile, family: Family, config: PreTrainedConfig) -> list[int]:
    """The sizes of the model's tensors, once it is known that the file holds as many numbers as the model has.

    So transformers, which leaves out in silence what it doesn't know, leaves out nothing, and no memory is asked for
    that the file doesn't account for.
    """
    with understood(f"no model can be built from the configuration in {file.name}", kind=ConversionError):
        model = empty_model(donor_class(family.head(None)), config)
    sizes = [tensor.numel() for tensor in model.parameters()]
    buffers = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    sizes += [tensor.numel() for name, tensor in model.state_dict().items() if name in buffers]
    held = sum(t.numel for name, t in file.tensors.items() if name not in ROPE_FACTORS.values())
    if sum(sizes) != held:
        raise ConversionError(
            f"{file.name} holds {held:,} weights where a {config.model_type} model of its sizes has {sum(sizes):,}, so "
            "transformers would read it wrongly; convert the model's own checkpoint."
        )
    return sizes


def _check_room(file: GgufFile, folder: Path, sizes: list[int], dtype: torch.dtype) -> None:
    written = sum(sizes) * dtype.itemsize
    check_space(folder, written + SPACE_FOR_TOKENIZER)
    # all tensors, those of the model beside them, and the largest as it is dequantised
    needed, free = 2 * written + 12 * max(sizes), available_memory()
    if free is not None and needed > free:
        raise ConversionError(
            f"transformers needs about {needed / 1e9:.1f} GB of memory to read {file.name}; "
            f"{free / 1e9:.1f} GB are free."
        )


def _write_tokenizer(file: GgufFile, folder: Path, work: Path, where: dict) -> list[str]:
    if file.fields.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return [f"{file.name} holds no tokenizer; copy the model's own into the result."]
    with understood(f"the tokenizer in {file.name} can't be used", kind=ConversionError), quiet():
        tokenizer = AutoTokenizer.from_pretrained(work, **where)
        tokenizer.save_pretrained(folder)
        content = read_json(folder / TOKENIZER_CONFIG)
        for name in ("is_local", "local_files_only", "gguf_file", "name_or_path"):  # of this run
            content.pop(name, None)
        write_json(folder / TOKENIZER_CONFIG, content)
        if not _is_saved(tokenizer, folder):
            # the class of the family makes another one of what is saved; this takes it as it is
            write_json(folder / TOKENIZER_CONFIG, {**content, "tokenizer_class": AS_SAVED})
            if not _is_saved(tokenizer, folder):
                raise ConversionError(f"the tokenizer in {file.name} gives other tokens once it is saved.")
    size = read_json(folder / CONFIG_NAME)["vocab_size"]
    if len(tokenizer) <= size:
        return []
    return [f"the tokenizer has {len(tokenizer):,} tokens, and the model embeddings of the first {size:,} only."]


def _is_saved(tokenizer, folder: Path) -> bool:
    """Whether the tokenizer in a folder gives the tokens that this one gives."""
    texts = [*PROBES, "".join(tokenizer.all_special_tokens)]
    try:
        saved = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # of all kinds: the class of a family may ask for tokens that this vocabulary lacks
        return False
    return all(tokenizer(text)["input_ids"] == saved(text)["input_ids"] for text in texts)
