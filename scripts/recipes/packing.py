# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Keeps packed documents apart in models of transformers that don't look at position ids for it."""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def mixes_documents(config: PreTrainedConfig) -> bool:
    """Whether a state goes on from one packed document to the next, also after [`separate_documents`]."""
    is_recurrent = "linear_attention" in (getattr(config, "layer_types", None) or ())
    return is_recurrent and not has_delta_attention(config)


def has_delta_attention(config: PreTrainedConfig) -> bool:
    return config.model_type in ("kimi_linear", "attnres_kimi_linear")


def separate_documents(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model treat each document of a packed sequence as if it stood alone, where it gets `position_ids` that
    begin again with each. Most families do so by themselves; GPT-OSS gets ready masks, and Kimi Linear's KDA layers
    begin with a fresh state and convolution."""
    if model.config.model_type == "gpt_oss":
        model.model.register_forward_pre_hook(with_masks, with_kwargs=True)
    if has_delta_attention(model.config):
        model.model.register_forward_pre_hook(with_documents, with_kwargs=True)
        for layer, kind in zip(model.model.layers, model.config.layer_types):
            if kind == "linear_attention":
                layer.self_attn.forward = partial(by_document, layer.self_attn.forward)
    return model


def packed_positions(kwargs: dict) -> torch.Tensor | None:
    """The position ids that a decoder is called with, if they may stand for packed documents."""
    positions = kwargs.get("position_ids")
    is_plain = kwargs.get("attention_mask") is None and not kwargs.get("use_cache")
    return positions if is_plain and kwargs.get("input_ids") is not None and torch.is_tensor(positions) else None


def with_masks(decoder, args, kwargs):
    positions = packed_positions(kwargs)
    if positions is not None:
        shape = torch.empty(*positions.shape, 0, dtype=decoder.embed_tokens.weight.dtype, device=positions.device)
        options = {"attention_mask": None, "past_key_values": None, "position_ids": positions}
        kwargs["attention_mask"] = {
            "full_attention": create_causal_mask(decoder.config, shape, **options),
            "sliding_attention": create_sliding_window_causal_mask(decoder.config, shape, **options),
        }
    return args, kwargs


@torch.compiler.disable
def with_documents(decoder, args, kwargs):
    positions = packed_positions(kwargs)
    if positions is not None:
        kwargs["documents"] = document_rows(positions)
    return args, kwargs


def document_rows(position_ids: torch.Tensor, shortest: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Documents as rows of equal length, for each of the lengths 64, 128, 256, ...

    Args:
        position_ids: `(batch, seq)`.
        shortest: the first of the lengths; KDA computes 64 tokens at a time.

    Returns:
        For each length that occurs, `(documents, length)`: the places of tokens in `(batch * seq)`, and whether they
        are the document's; what a row has behind its document are tokens that follow it.
    """
    is_first = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1  # also the first of each sequence
    starts = is_first.flatten().nonzero()
    lengths = starts.diff(dim=0, append=starts.new_tensor([[position_ids.numel()]]))
    doublings = (lengths / shortest).log2().ceil().clamp_min(0).flatten()
    rows = []
    for number in doublings.unique().tolist():
        these = doublings == number
        places = torch.arange(int(shortest * 2**number), device=starts.device)
        index = (starts[these] + places).clamp_max(position_ids.numel() - 1)
        rows.append((index, places < lengths[these]))
    return rows


@torch.compiler.disable  # the number of documents of each length is another one in each batch
def by_document(
    forward: Callable, hidden_states: torch.Tensor, *args, documents: list | None = None, **kwargs
) -> torch.Tensor:
    """Calls a causal layer for rows of one document each."""
    if documents is None:
        return forward(hidden_states, *args, **kwargs)
    tokens = hidden_states.flatten(0, 1)
    places = torch.cat([index[is_own] for index, is_own in documents])
    outputs = [forward(tokens[index], *args, **kwargs)[is_own] for index, is_own in documents]
    return torch.cat(outputs)[places.argsort()].view(*hidden_states.shape[:2], -1)
