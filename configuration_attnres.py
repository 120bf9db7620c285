# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Attention Residuals models (Kimi Team, arXiv 2603.15031).

The arithmetic of the blocks lives here and nowhere else. Two units are in use: a *layer* is a decoder layer of the
donor family, a *sublayer* is one attention or one MLP, so a model of L layers has 2L sublayers. A *read* is one softmax
over depth: row 2i of the depth attention reads before the attention of layer i, row 2i+1 before its MLP, and the last
row, 2L, before the final norm.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import __version__ as transformers_version
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.glm4.configuration_glm4 import Glm4Config
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.olmo.configuration_olmo import OlmoConfig
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.starcoder2.configuration_starcoder2 import Starcoder2Config


try:
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
except ImportError:  # an older transformers
    KimiLinearConfig = None

try:
    from transformers.models.inkling2.configuration_inkling2 import Inkling2TextConfig
except ImportError:
    Inkling2TextConfig = None


SAVING = ".attnres-saving-"  # begins the names of the folders in which saves are written


class DepthSources(NamedTuple):
    """What the reads of a mode read.

    Args:
        sums_blocks: one source sums the outputs of a block; otherwise each output is one.
        has_streams: what isn't closed is kept as `attn_res_num_streams` streams instead of one sum.
        closes: sources are closed, the embedding first; otherwise there are only the streams.
    """

    sums_blocks: bool = False
    has_streams: bool = False
    closes: bool = True


# Ways to weight sources, each of blocks and of single outputs
SOFTMAX_VARIANTS = (
    *("sigmoid", "raw_keys", "static", "window", "heads", "input_query"),
    *("low_rank", "delta", "recency", "inkling2"),
)
ATTN_RES_MODES = {
    "block": DepthSources(sums_blocks=True),
    "full": DepthSources(),
    "denseformer": DepthSources(),
    **{f"block_{variant}": DepthSources(sums_blocks=True) for variant in SOFTMAX_VARIANTS},
    **{f"full_{variant}": DepthSources() for variant in SOFTMAX_VARIANTS},
    "hc": DepthSources(has_streams=True, closes=False),
    "mhc": DepthSources(has_streams=True, closes=False),
    "block_mhc": DepthSources(sums_blocks=True, has_streams=True),
}


def known_modes() -> str:
    """The names of all modes, for people: those of variants once for both kinds of sources."""
    pairs = {f"{sources}_{variant}" for variant in SOFTMAX_VARIANTS for sources in ("block", "full")}
    others = ", ".join(mode for mode in ATTN_RES_MODES if mode not in pairs)
    return f"{others}, or block_ or full_ with {', '.join(SOFTMAX_VARIANTS)}"


MASK_FIELDS = {"attention_chunk_size", "layer_types", "sliding_window"}  # that masks are made by, if they are there

# Families that an older transformers doesn't have, by the model type of the donor, and how their classes begin
YOUNG_FAMILIES = {"kimi_linear": "AttnResKimiLinear", "inkling2_text": "AttnResInkling2Text"}
IS_ABSENT = f"it needs a transformers that has {{}}; installed is {transformers_version}"

# Donors that have no AttnRes form, and why
REFUSED = {
    **dict.fromkeys(
        ("olmo2", "olmo3", "olmo_hybrid", "flex_olmo", "exaone4"),
        "a sublayer of it reads the residual stream without a norm of its own",
    ),
    **dict.fromkeys(
        ("cohere", "cohere2", "cohere2_moe", "codegen", "gptj", "phi"),
        "its attention and MLP read the same input, so that there is no read between them",
    ),
    **dict.fromkeys(
        ("kimi_k3", "kimi_k3_text"),
        "transformers doesn't have Kimi K3's layers; python -m attnres_convert.kimi_k3 exchanges depth attention alone",
    ),
}


def donor_class(cls: type) -> type:
    """The class of transformers that a configuration or model with Attention Residuals extends."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))


@contextmanager
def replaced_model(folder: Path, variant: str | None = None) -> Iterator[Path]:
    """Gives the block a folder to write a model to, whose files then take their places in `folder`, and removes the
    weights there that they replace. What the block wrote whole is taken too if it fails after that, at a push.

    A process that is killed leaves the old model or the new one, but for the moment in which shards are replaced by
    others of the same names.

    Args:
        variant: as in `save_pretrained`; weights of others stay.
    """
    dotted = f".{variant}" if variant else ""
    single, index = f"model{dotted}.safetensors", f"model.safetensors.index{dotted}.json"
    folder.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=SAVING, dir=folder))
    is_whole = False
    try:
        yield written
        is_whole = True
    finally:
        try:
            shards = indexed(written / index)
            if is_whole or has_all(written, single, shards):
                take_places(written, folder, single, index)
        finally:
            shutil.rmtree(written, ignore_errors=True)


def indexed(index: Path) -> set[str] | None:
    """The files that an index lists; None if it isn't there or is none."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None


def has_all(written: Path, single: str, shards: set[str] | None) -> bool:
    """Whether the weights of a save that failed later have been written: all shards, or the one file there is."""
    if shards is not None:
        return all((written / name).exists() for name in shards)
    return any((written / name).exists() for name in (single, "adapter_model.safetensors"))


def take_places(written: Path, folder: Path, single: str, index: str):
    """Moves the files of a save into `folder`, and removes the weights there that they replace: what has the names of a
    model's weights, and what else the index lists."""
    new = sorted((path.name for path in written.iterdir()), key=lambda name: (name in (single, index), name))
    stale = []
    if {single, index} & {*new}:
        shard = re.compile(rf"{re.escape(single.removesuffix('.safetensors'))}(-\d{{5}}-of-\d{{5}})?\.safetensors")
        listed = indexed(folder / index) or set()
        listed -= {"adapter_model.safetensors"}
        files = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"]
        stale = [index, *(name for name in files if name in listed or shard.fullmatch(name))]
    for name in new:
        os.replace(written / name, folder / name)
    for name in stale:
        if name not in new:
            (folder / name).unlink(missing_ok=True)


@dataclass(kw_only=True, repr=False, eq=False)
class AttnResConfigMixin:
    """The configuration fields that Attention Residuals add to those of a donor family.

    Args:
        attn_res_mode (`str`, *optional*, defaults to `"block"`):
            `"block"` sums the sublayer outputs of a block into one source, `"full"` makes every sublayer's output a
            source. The others mix them in other ways; the project's table of modes and `depth_mixers_attnres.py` say
            how.
        attn_res_block_size (`int`, *optional*, defaults to `ceil(num_hidden_layers / 8)`):
            Decoder layers per block, from 1 to `num_hidden_layers`; the last block may be shorter. The paper counts
            sublayers, twice this number. Only for `"block"` and the modes whose names begin so.
        attn_res_sum_scale (`bool`, *optional*, defaults to `False`):
            Multiply each read by its number of sources, so that uniform weights give the plain residual sum. Converted
            checkpoints set it: with zero queries they then compute what the donor computes. It is the same function as
            the paper's with the epsilon of the norm that follows divided by the square of the number of sources.
        attn_res_norm_eps (`float`, *optional*, defaults to the donor's norm epsilon):
            Epsilon of the RMSNorm that turns sources into keys.
        attn_res_window (`int`, *optional*, defaults to 8):
            How many of the latest sources the window modes read, besides the embedding.
        attn_res_num_heads (`int`, *optional*, defaults to 16):
            Heads of the modes with heads; divides `hidden_size`.
        attn_res_rank (`int`, *optional*, defaults to 64):
            Width of the keys of the low rank modes.
        attn_res_num_streams (`int`, *optional*, defaults to 4):
            Parallel residual streams of hyper-connections, at least 2.
        attn_res_implementation (`str`, *optional*):
            Which implementation of depth attention runs; a key of `ALL_DEPTH_ATTENTION_FUNCTIONS`. Not saved.
        output_depth_attentions (`bool`, *optional*, defaults to `False`):
            Whether the model returns the weights of all its reads.

    Raises:
        ValueError: a value is outside its range; the message names the range.
    """

    hub_module = "families_attnres"  # the file that has the model classes
    hub_heads = ("", "ForCausalLM")
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "depth_attentions"]
    # A pipeline stage would have to hand on every source, which a plan's single `hidden_states` can't
    base_model_pp_plan = None
    most_depth_queries = 1  # of a read, in this family

    attn_res_mode: str = "block"
    attn_res_block_size: int | None = None
    attn_res_sum_scale: bool = False
    attn_res_norm_eps: float | None = None
    attn_res_window: int = 8
    attn_res_num_heads: int = 16
    attn_res_rank: int = 64
    attn_res_num_streams: int = 4
    output_depth_attentions: bool = False

    def __post_init__(self, **kwargs):
        self._attn_res_implementation = kwargs.pop("attn_res_implementation", None)
        self.check_model_type(kwargs.pop("model_type", None))
        for name in MASK_FIELDS - {field.name for field in fields(self)}:
            kwargs.pop(name, None)  # a donor that doesn't know it doesn't use it, whatever it says
        super().__post_init__(**kwargs)
        if self.attn_res_block_size is None:
            self.attn_res_block_size = -(-self.num_hidden_layers // 8)
        if self.attn_res_norm_eps is None:
            # OLMo's norm has a literal of torch's own default, every other family a field
            self.attn_res_norm_eps = getattr(self, "rms_norm_eps", None) or getattr(self, "norm_epsilon", 1e-5)
        self.validate_attn_res()

    def validate_attn_res(self):
        """Runs when a configuration is built or saved, and when a model is built from it."""
        if self.attn_res_mode not in ATTN_RES_MODES:
            raise ValueError(f"attn_res_mode is {self.attn_res_mode!r}; it must be one of {known_modes()}.")
        sums_blocks = self.depth_sources.sums_blocks
        most = self.num_hidden_layers if sums_blocks else self.attn_res_block_size  # elsewhere unused
        if not 1 <= self.attn_res_block_size <= most:
            raise ValueError(
                f"attn_res_block_size is {self.attn_res_block_size}; it counts decoder layers and must be an integer "
                f"from 1 to num_hidden_layers = {self.num_hidden_layers}."
            )
        for name, least in (("window", 1), ("num_heads", 1), ("rank", 1), ("num_streams", 2)):
            if (value := getattr(self, f"attn_res_{name}")) < least:
                raise ValueError(f"attn_res_{name} is {value}; it must be at least {least}.")
        if self.attn_res_mode.endswith("_heads") and self.hidden_size % self.attn_res_num_heads:
            raise ValueError(
                f"attn_res_num_heads is {self.attn_res_num_heads}; it must divide hidden_size = {self.hidden_size}. "
                "Give another number of heads."
            )
        if not 0 < self.attn_res_norm_eps < 1:
            raise ValueError(f"attn_res_norm_eps is {self.attn_res_norm_eps}; it must be between 0 and 1.")

    @property
    def depth_sources(self) -> DepthSources:
        return ATTN_RES_MODES[self.attn_res_mode]

    @property
    def attn_res_sublayers_per_block(self) -> int:
        """S in the paper: how many sublayer outputs one source sums."""
        return 2 * self.attn_res_block_size if self.depth_sources.sums_blocks else 1

    def num_depth_queries(self, row: int) -> int:
        """How many queries `row` has in modes whose reads may have several: one for each input of its sublayer."""
        return 1

    @property
    def num_depth_reads(self) -> int:
        """Rows of the depth attention: one per sublayer and one for the output."""
        return 2 * self.num_hidden_layers + 1

    def num_closed_depth_sources(self, row: int) -> int:
        """How many sources are complete when `row` reads: the embedding and all finished blocks."""
        return 1 + row // self.attn_res_sublayers_per_block if self.depth_sources.closes else 0

    def extends_open_depth_source(self, sublayer: int) -> bool:
        """Whether the output of `sublayer` is added to the open block rather than opening a new one."""
        return sublayer % self.attn_res_sublayers_per_block != 0 or not self.depth_sources.closes

    def num_depth_sources(self, row: int) -> int:
        """How many sources `row` reads: the closed ones and, last, the open block where there is one. Streams without
        closed sources are sources themselves."""
        if not self.depth_sources.closes:
            return self.attn_res_num_streams
        return self.num_closed_depth_sources(row) + self.extends_open_depth_source(row)

    def num_depth_tensors(self, row: int) -> int:
        """How many tensors `(batch, seq, hidden)` per token hold the sources of `row`."""
        num_open = self.attn_res_num_streams if self.depth_sources.has_streams else 1
        return self.num_closed_depth_sources(row) + num_open * self.extends_open_depth_source(row)

    def depth_source_sizes(self, row: int) -> tuple[int, ...]:
        """How many vectors each source of `row` sums: the embedding, outputs of a block."""
        per_block = self.attn_res_sublayers_per_block
        num_outputs = [min(per_block, row - first) for first in range(0, row, per_block)]
        return (1, *num_outputs) if self.depth_sources.closes else (row + 1,) * self.attn_res_num_streams

    @classmethod
    def donor_config_class(cls) -> type:
        """The configuration class of transformers that this one extends."""
        return donor_class(cls)

    @classmethod
    def check_model_type(cls, model_type: str | None):
        """Raises a `ValueError` unless `model_type` is this family's, its donor's or not given."""
        if model_type and model_type not in (cls.model_type, cls.donor_config_class().model_type):
            right = attn_res_config_class(model_type)
            raise ValueError(
                f"{cls.__name__} was given a configuration of {model_type!r}; use {right.__name__} and "
                f"{right.hub_classes()['AutoModelForCausalLM'].split('.')[1]}."
            )

    @classmethod
    def hub_classes(cls) -> dict[str, str]:
        """The `auto_map` of a repository: which class of the code files each Auto class loads."""
        prefix = cls.__name__.removesuffix("Config")
        models = {f"AutoModel{head}": f"{cls.hub_module}.{prefix}{head or 'Model'}" for head in cls.hub_heads}
        return {"AutoConfig": f"configuration_attnres.{cls.__name__}", **models}

    @classmethod
    def hub_files(cls) -> list[Path]:
        """The code files of a repository: this one, that of the model classes and what they import."""
        model_file = Path(__file__).with_name(f"{cls.hub_module}.py")
        return sorted({model_file, *map(Path, get_relative_import_files(model_file))})

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        cls.check_model_type(config_dict.get("model_type"))  # before the fields, which differ between families
        if "attn_res_implementation" in kwargs:
            config_dict = {**config_dict, "attn_res_implementation": kwargs.pop("attn_res_implementation")}
        result = super().from_dict(config_dict, **kwargs)
        config, *_ = result if isinstance(result, tuple) else (result,)
        config.validate_attn_res()  # the overrides in kwargs were set after construction
        return result

    def _remove_keys_not_serialized(self, d):
        super()._remove_keys_not_serialized(d)
        d.pop("_attn_res_implementation", None)


@strict
class AttnResConfig(AttnResConfigMixin, LlamaConfig):
    __doc__ = f"""Configuration of [`AttnResModel`], the Llama family with Attention Residuals.

    All fields of [`~transformers.LlamaConfig`], and:

    {AttnResConfigMixin.__doc__.split("family.", 1)[1].strip()}

    Example:

    ```python
    >>> from attnres import AttnResConfig, AttnResForCausalLM

    >>> config = AttnResConfig(num_hidden_layers=16, attn_res_block_size=2)
    >>> config.num_depth_sources(config.num_depth_reads - 1)
    9
    >>> model = AttnResForCausalLM(config)
    ```
    """

    model_type = "attnres"
    hub_module = "modeling_attnres"
    hub_heads = ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@strict
class AttnResMistralConfig(AttnResConfigMixin, MistralConfig):
    """[`~transformers.MistralConfig`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_mistral"


@strict
class AttnResQwen2Config(AttnResConfigMixin, Qwen2Config):
    """[`~transformers.Qwen2Config`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_qwen2"


@strict
class AttnResQwen3Config(AttnResConfigMixin, Qwen3Config):
    """[`~transformers.Qwen3Config`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_qwen3"


@strict
class AttnResQwen3MoeConfig(AttnResConfigMixin, Qwen3MoeConfig):
    """[`~transformers.Qwen3MoeConfig`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_qwen3_moe"


@strict
class AttnResMixtralConfig(AttnResConfigMixin, MixtralConfig):
    """[`~transformers.MixtralConfig`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_mixtral"


@strict
class AttnResSmolLM3Config(AttnResConfigMixin, SmolLM3Config):
    """[`~transformers.SmolLM3Config`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_smollm3"


@strict
class AttnResPhi3Config(AttnResConfigMixin, Phi3Config):
    """[`~transformers.Phi3Config`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_phi3"


@strict
class AttnResStarcoder2Config(AttnResConfigMixin, Starcoder2Config):
    """[`~transformers.Starcoder2Config`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_starcoder2"


@strict
class AttnResOlmoConfig(AttnResConfigMixin, OlmoConfig):
    """[`~transformers.OlmoConfig`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_olmo"


@strict
class AttnResDeepseekV3Config(AttnResConfigMixin, DeepseekV3Config):
    """[`~transformers.DeepseekV3Config`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_deepseek_v3"


@strict
class AttnResGptOssConfig(AttnResConfigMixin, GptOssConfig):
    """[`~transformers.GptOssConfig`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_gpt_oss"


@strict
class AttnResGraniteConfig(AttnResConfigMixin, GraniteConfig):
    """[`~transformers.GraniteConfig`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_granite"
    logit_scale = property(lambda self: 1 / self.logits_scaling)  # the name that serving engines know


@strict
class AttnResGemma2Config(AttnResConfigMixin, Gemma2Config):
    """[`~transformers.Gemma2Config`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_gemma2"


@strict
class AttnResGemma3TextConfig(AttnResConfigMixin, Gemma3TextConfig):
    """[`~transformers.Gemma3TextConfig`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_gemma3_text"

    def validate_attn_res(self):
        super().validate_attn_res()
        if self.use_bidirectional_attention:
            raise ValueError("use_bidirectional_attention makes Gemma 3 an encoder; AttnRes supports decoders.")


@strict
class AttnResGlm4Config(AttnResConfigMixin, Glm4Config):
    """[`~transformers.Glm4Config`] with the fields of [`AttnResConfig`]."""

    model_type = "attnres_glm4"


if KimiLinearConfig is not None:

    @strict
    class AttnResKimiLinearConfig(AttnResConfigMixin, KimiLinearConfig):
        """[`~transformers.KimiLinearConfig`] with the fields of [`AttnResConfig`]."""

        model_type = "attnres_kimi_linear"


if Inkling2TextConfig is not None:

    @strict
    class AttnResInkling2TextConfig(AttnResConfigMixin, Inkling2TextConfig):
        """[`~transformers.Inkling2TextConfig`] with the fields of [`AttnResConfig`]. The default mode, block size and
        epsilon are those of Inkling 2's own depth attention."""

        model_type = "attnres_inkling2_text"

        most_depth_queries = 3

        attn_res_mode: str = "block_inkling2"

        def __post_init__(self, **kwargs):
            if self.attn_res_block_size is None:
                self.attn_res_block_size = min(self.n_layers_per_attn_res_block, self.num_hidden_layers)
            if self.attn_res_norm_eps is None:
                self.attn_res_norm_eps = 1e-6  # a literal there
            super().__post_init__(**kwargs)

        def num_depth_queries(self, row: int) -> int:
            """Full attention reads its queries, keys and values apart, but for the first layer."""
            is_attention = row % 2 == 0 and 0 < row < 2 * self.num_hidden_layers
            return 3 if is_attention and self.layer_types[row // 2] == "hybrid" else 1


__all__ = [name for name in globals() if name.startswith("AttnRes") and name.endswith("Config")]


def attn_res_config_class(model_type: str | None) -> type:
    """The configuration class of a family, from the model type of the donor (`"llama"`) or its own (`"attnres"`).

    Raises:
        ValueError: there is none; the message says why and lists the families that are supported.
    """
    classes = [globals()[name] for name in __all__]
    for config_class in classes:
        if model_type in (config_class.model_type, config_class.donor_config_class().model_type):
            return config_class
    if model_type in REFUSED:
        reason = REFUSED[model_type]
    elif model_type and (donor_type := model_type.removeprefix("attnres_")) in YOUNG_FAMILIES:
        reason = IS_ABSENT.format(donor_type)
    elif model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        reason = "it is an encoder-decoder, and only decoders are supported"
    elif model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        reason = "it is or has an encoder, and only decoders are supported"
    elif model_type is None:
        reason = "the configuration names no model_type"
    else:
        reason = "the family is unknown"
    supported = ", ".join(config_class.donor_config_class().model_type for config_class in classes)
    raise ValueError(f"no Attention Residuals for {model_type!r}: {reason}; supported families: {supported}.")


def __getattr__(name: str):
    for donor_type, prefix in YOUNG_FAMILIES.items():
        if name.startswith(prefix):
            raise ImportError(f"{name}: {IS_ABSENT.format(donor_type)}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
