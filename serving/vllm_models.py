# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""AttnRes models in vLLM: its backend for models of transformers, with what that does not know of them."""

import weakref
from functools import partial

import torch
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.fusers import AttentionFuser
from vllm.model_executor.models.utils import WeightsMapper, make_empty_intermediate_tensors_factory

from .vllm_delta_attention import CONVOLUTIONS, DeltaState, ServedDeltaAttention, state_dtypes, state_shapes


# Attention with latent keys and values (MLA) by heads, which vLLM divides and the plans of transformers don't
LATENT_ATTENTION_PLAN = {"q_proj": "colwise", "q_b_proj": "colwise", "kv_b_proj": "colwise", "o_proj": "rowwise"}


class AttnResMixin:
    """A stage of a pipeline hands on the sources that the next one reads, instead of one residual stream."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = self.text_config
        num_sources = config.num_depth_tensors(2 * self.model.stage.start)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], num_sources * config.hidden_size
        )

    def recursive_replace(self):
        if getattr(self.text_config, "kv_lora_rank", None) is not None:
            for layer_idx, layer in enumerate(self.model.layers):
                if hasattr(getattr(layer, "self_attn", None), "kv_b_proj"):
                    prefix = f"layers.{layer_idx}.self_attn"
                    plan = {f"{prefix}.{name}": style for name, style in LATENT_ATTENTION_PLAN.items()}
                    self.model.tp_plan.update(plan)
        super().recursive_replace()

    def pipeline_parallel(self):
        depth_attention = self.model.depth_attention  # of which every stage needs its rows
        super().pipeline_parallel()
        self.model.depth_attention = depth_attention
        group = self.pp_group
        first, end = get_pp_indices(self.text_config.num_hidden_layers, group.rank_in_group, group.world_size)
        self.model.stage = slice(first, None if group.is_last_rank else end)
        # side by side, in the one tensor that vLLM knows
        hidden_size = self.text_config.hidden_size
        self.model.hand_on = partial(torch.cat, dim=-1)
        self.model.take_over = lambda tensor: [source.contiguous() for source in tensor.split(hidden_size, -1)]


class AttnResForCausalLM(AttnResMixin, TransformersForCausalLM):
    """Any family without experts."""


class AttnResMoEForCausalLM(AttnResMixin, TransformersMoEForCausalLM):
    """Any family with experts."""


class AttnResKimiLinearForCausalLM(AttnResMoEForCausalLM, HasInnerState, IsHybrid):
    """Kimi Linear, some of whose layers keep a state instead of keys and values."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config):
        return state_shapes(vllm_config.model_config.hf_text_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config):
        return state_dtypes(vllm_config.model_config.dtype)

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.kda_state_copy_func()

    def pipeline_parallel(self):
        if self.pp_group.world_size > 1:
            raise ValueError("Kimi Linear gives wrong tokens in vLLM's pipelines: use --tensor-parallel-size instead.")
        super().pipeline_parallel()

    def recursive_replace(self):
        self.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_stacked=CONVOLUTIONS)
        linear = {}
        for layer_idx, layer in enumerate(self.model.layers):
            if getattr(layer, "block_type", None) == "linear_attention":
                layer.self_attn.__class__ = ServedDeltaAttention
                layer.self_attn.prepare()
                linear[layer_idx] = f"model.layers.{layer_idx}.self_attn"
        super().recursive_replace()
        for layer_idx, name in linear.items():
            self.attention_fusers[layer_idx] = (name, AttentionFuser(ServedDeltaAttention.__name__))

    def _get_attn_cls(self):
        attention_class = super()._get_attn_cls()

        def make(prefix: str, **kwargs):
            attention = self.get_submodule(prefix.rpartition(".")[0])
            if not isinstance(attention, ServedDeltaAttention):
                return attention_class(prefix=prefix, **kwargs)
            state = DeltaState(self.text_config, prefix)
            state.attention = weakref.ref(attention)
            return state

        return make
