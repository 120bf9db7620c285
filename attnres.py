# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Attention Residuals for Hugging Face Transformers.

Importing this module registers every AttnRes class with the Auto classes of transformers, so that
`AutoModelForCausalLM.from_pretrained` loads AttnRes checkpoints without remote code.
"""

import os
from importlib.util import find_spec

import torch
import transformers
from transformers import AutoConfig

import configuration_attnres
import depth_attention_attnres
import families_attnres
import modeling_attnres
from attnres_kernels.cpu import CPP_KERNELS, compiler
from attnres_kernels.fused import FusedDepthAttention
from attnres_kernels.peers import register_peers
from configuration_attnres import *  # noqa: F403
from configuration_attnres import (
    ATTN_RES_MODES,
    DepthSources,
    __getattr__,  # noqa: F401
)
from depth_attention_attnres import *  # noqa: F403
from depth_attention_attnres import DEPTH_MIXERS, DepthAttentionInterface, DepthMixer
from families_attnres import *  # noqa: F403
from modeling_attnres import *  # noqa: F403


__version__ = "0.2.0"
__all__ = [
    "register_depth_mixer",
    *configuration_attnres.__all__,
    *depth_attention_attnres.__all__,
    *modeling_attnres.__all__,
    *families_attnres.__all__,
]


def register_depth_mixer(mode: str, mixer_class: type[DepthMixer], sums_blocks: bool = False):
    """Makes `attn_res_mode=mode` choose a [`DepthMixer`]; with `sums_blocks`, the outputs of a block are one source."""
    ATTN_RES_MODES[mode] = DepthSources(sums_blocks)
    DEPTH_MIXERS[mode] = mixer_class


for _name in configuration_attnres.__all__:
    _config_class = globals()[_name]
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    for _auto_class, _reference in _config_class.hub_classes().items():
        if _auto_class != "AutoConfig":
            _model_class = globals()[_reference.split(".")[1]]
            getattr(transformers, _auto_class).register(_config_class, _model_class, exist_ok=True)

register_peers()
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if compiler() is not None and not _INTERPRETED:  # whose kernels run on a CPU too
    DepthAttentionInterface.register("cpp", FusedDepthAttention(CPP_KERNELS))
    DepthAttentionInterface.default = "cpp"
if find_spec("triton") is not None and (torch.cuda.is_available() or _INTERPRETED):
    from attnres_kernels.triton_kernels import TRITON_KERNELS

    DepthAttentionInterface.register("triton", FusedDepthAttention(TRITON_KERNELS))
    if torch.cuda.is_available():
        DepthAttentionInterface.default = "triton"
