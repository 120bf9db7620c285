# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Kimi Delta Attention (Kimi Team, arXiv 2510.26692) of transformers on the states that vLLM keeps for its requests."""

import torch
from torch import nn
from transformers.models.kimi_linear import modeling_kimi_linear as donor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum


CONVOLUTIONS = {f"self_attn.{name}_conv1d.": ("self_attn.conv1d.", i) for i, name in enumerate("qkv")}  # on disk

OPERATOR = "attnres::delta_attention"


def state_shapes(config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a request keeps in a layer: the last inputs of the convolution, and the matrix of each head."""
    heads, dim = config.linear_num_heads, config.linear_head_dim
    return (3 * heads * dim, config.linear_conv_kernel_dim - 1), (heads, dim, dim)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    return dtype, torch.float32


class DeltaState(nn.Module, MambaBase):
    """The states of all requests in one layer, `(num_slots, *shape)` each, in memory that vLLM owns."""

    mamba_type = MambaAttentionBackendEnum.LINEAR
    is_kv_cache_tp_replicated = True

    def __init__(self, config, prefix: str):
        super().__init__()
        vllm_config = get_current_vllm_config()
        if vllm_config.speculative_config is not None:  # whose rejected tokens would stay in the states
            raise ValueError("Kimi Linear takes no speculative decoding here: leave out --speculative-config.")
        self.config, self.dtype = config, vllm_config.model_config.dtype
        self.prefix, self.kv_cache = prefix, ()
        compilation = vllm_config.compilation_config
        compilation.static_forward_context[prefix] = self
        if compilation.splitting_ops and OPERATOR not in compilation.splitting_ops:  # as for vLLM's own attention
            compilation.splitting_ops.append(OPERATOR)

    def get_state_shape(self):
        return state_shapes(self.config)

    def get_state_dtype(self):
        return state_dtypes(self.dtype)


class ServedDeltaAttention(donor.KimiLinearDeltaAttention):
    """The donor's layer for a batch as vLLM makes it: the tokens of all requests one after the other."""

    def prepare(self):
        """Lets vLLM load the three convolutions of a checkpoint into the one of the layer."""

        def load(parameter: torch.Tensor, loaded: torch.Tensor):
            parameter.data[loaded.shard_id * self.qkv_dim : (loaded.shard_id + 1) * self.qkv_dim].copy_(loaded)

        weight = nn.Parameter(
            torch.empty(self.conv1d.weight.shape, dtype=self.conv1d.weight.dtype), requires_grad=False
        )
        set_weight_attrs(weight, {"weight_loader": load})
        self.conv1d.weight = weight

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if hidden_states.shape[0] != 1:
            raise ValueError("vLLM puts all requests into one row.")
        inputs = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)], dim=-1)
        decay = self.forget_gate(hidden_states)
        beta = torch.sigmoid(self.b_proj(hidden_states))
        mixed = torch.ops.attnres.delta_attention(inputs, decay, beta, self.attn.prefix)
        gate = self.g_b_proj(self.g_a_proj(hidden_states)).view(mixed.shape)
        return self.o_proj(self.o_norm(mixed, gate).flatten(-2))

    def mix(self, inputs: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """
        Args:
            inputs: `(1, num_tokens, 3 * heads * dim)`, queries, keys and values before the convolution.
            decay: `(1, num_tokens, heads, dim)`, the logarithm of what each channel keeps.
            beta: `(1, num_tokens, heads)`.

        Returns:
            `(1, num_tokens, heads, dim)`.
        """
        mixed = inputs.new_zeros(decay.shape)
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            return mixed
        metadata = metadata[self.attn.prefix]
        slots, num_decodes = metadata.state_indices_tensor, metadata.num_decodes
        if num_decodes:  # one token each, in front; the first token of a prompt may come alone too
            one = [tensor[0, :num_decodes].unsqueeze(1) for tensor in (inputs, decay, beta)]
            is_new = metadata.seq_lens[:num_decodes] == 1
            mixed[0, :num_decodes] = self.advance(slots[:num_decodes], *one, is_new).squeeze(1)
        if not metadata.num_prefills:  # nothing here waits for a GPU, whose graphs take this much
            return mixed
        starts = metadata.query_start_loc.tolist()
        for i in range(num_decodes, num_decodes + metadata.num_prefills):
            tokens = slice(starts[i], starts[i + 1])
            is_new = metadata.seq_lens[i : i + 1] == starts[i + 1] - starts[i]
            part = [tensor[:, tokens] for tensor in (inputs, decay, beta)]
            mixed[:, tokens] = self.advance(slots[i : i + 1], *part, is_new)
        return mixed

    def advance(self, slots: torch.Tensor, inputs, decay, beta, is_new: torch.Tensor) -> torch.Tensor:
        """[`mix`] of `(num_requests, num_tokens, ...)`, whose states in `slots` go on, or begin where a request
        `is_new`, `(num_requests,)`: what a slot holds then is of another one."""
        convolved, recurrent = self.attn.kv_cache
        inputs = inputs.transpose(1, 2)
        before = torch.where(is_new[:, None, None], 0, convolved[slots])
        window = torch.cat([before.to(inputs.dtype), inputs], dim=-1)
        convolved[slots] = window[..., window.shape[-1] - before.shape[-1] :].to(convolved.dtype)
        inputs = donor.ACT2FN[self.activation](
            nn.functional.conv1d(window, self.conv1d.weight, self.conv1d.bias, groups=self.conv_dim)
        )
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)) for part in inputs.transpose(1, 2).chunk(3, dim=-1)
        )
        one_token = inputs.shape[-1] == 1
        attend = donor.recurrent_kimi_delta_attention if one_token else donor.chunk_kimi_delta_attention
        mixed, state = attend(
            query,
            key,
            value,
            g=decay,
            beta=beta,
            initial_state=torch.where(is_new[:, None, None, None], 0, recurrent[slots]),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        recurrent[slots] = state.to(recurrent.dtype)
        return mixed


@torch.library.custom_op(OPERATOR, mutates_args=())
def delta_attention(inputs: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, layer: str) -> torch.Tensor:
    """[`ServedDeltaAttention.mix`] of a layer; compilers need not look into it."""
    return get_forward_context().no_compile_layers[layer].attention().mix(inputs, decay, beta)


@delta_attention.register_fake
def _(inputs, decay, beta, layer):
    return inputs.new_empty(decay.shape)
