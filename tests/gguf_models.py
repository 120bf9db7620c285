# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Tiny GGUF files, written as llama.cpp's own converter lays a model out, for the conversion tests."""

import gguf
import numpy as np
import torch
from families import tiny_donor


# By the name of the architecture in the file: the donor's family, and what differs from the tests' rows. Heads are
# divided as these files say, and windows are those that a file states; where it states none, there are none.
ARCHITECTURES = {
    "llama": ("llama", {"attention_bias": False, "mlp_bias": False}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"attention_bias": False, "head_dim": 10}),
    "qwen3moe": ("qwen3_moe", {"attention_bias": False, "mlp_only_layers": []}),
    "phi3": ("phi3", {"sliding_window": 4}),
    "starcoder2": ("starcoder2", {"sliding_window": 4}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 12}),
    "gemma3": ("gemma3_text", {"sliding_window_pattern": 6, "query_pre_attn_scalar": 12}),
    "gpt-oss": ("gpt_oss", {}),
}
SENTENCEPIECE = ("gemma2", "gemma3", "phi3")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # whose spelling in a byte-level vocabulary is themselves
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level_vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and types: all bytes, two merged words and what a chat is written with."""
    others = [byte for byte in range(256) if byte not in BYTES]
    tokens = [chr(byte) for byte in BYTES] + [chr(256 + i) for i in range(len(others))]
    merges = ["h e", "l l", "he ll", "hell o", "\u0120 w"]
    tokens += ["".join(pair.split()) for pair in merges]
    return [*SPECIAL, *tokens], merges, [3] * len(SPECIAL) + [1] * len(tokens)


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types, with all bytes: 1 is a word, 2 unknown, 3 control, 6 a byte."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    types = [3, 3, 3, 2, *[3] * 5] + [6] * 256
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["he", "ll", "hell", "hello", "\u2581w", "\u2581wo", *"helo\u2581wrd0123456789abc", "\u2581\u2581"]
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(words))]
    return tokens + words, scores, types + [1] * len(words)


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a rotary projection as llama.cpp has them: pairs side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model, arch: str) -> dict[str, torch.Tensor]:
    """The tensors of a model under the names and in the form of a file."""
    config = model.config
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), config.num_hidden_layers
    )
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and "self_attn.q_proj" in name:
            tensor = _permuted(tensor, config.num_attention_heads)
        if arch == "llama" and "self_attn.k_proj" in name:
            tensor = _permuted(tensor, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        layer = name.split(".")[2] if ".layers." in name else ""
        if name.endswith("experts.gate_up_proj") and arch == "qwen3moe":
            gate, up = tensor.chunk(2, dim=1)
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
        elif name.endswith("experts.down_proj") and arch == "qwen3moe":
            found[f"blk.{layer}.ffn_down_exps.weight"] = tensor
        elif ".experts." in name and arch == "gpt-oss":
            kind = "bias" if name.endswith("_bias") else "weight"
            tensor = tensor if kind == "bias" else tensor.transpose(-1, -2)
            if "gate_up" in name:
                found[f"blk.{layer}.ffn_gate_exps.{kind}"] = tensor[:, ::2]
                found[f"blk.{layer}.ffn_up_exps.{kind}"] = tensor[:, 1::2]
            else:
                found[f"blk.{layer}.ffn_down_exps.{kind}"] = tensor
        elif name.endswith("sinks"):
            found[f"blk.{layer}.attn_sinks.weight"] = tensor
        else:
            stem, _, suffix = name.rpartition(".")
            found[f"{names.get_name(stem)}.{suffix}"] = tensor
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def write_gguf(path, arch="llama", kind=None, tokenizer=True, sentencepiece=None, fields=None, tensors=None, **options):
    """A tiny file of an architecture; returns the model that it was written from, with a vocabulary of the file's.

    Args:
        kind: how matrices are quantised, a `gguf.GGMLQuantizationType`; default: they are float32.
        tokenizer: whether the file has one, and `sentencepiece` whether it is of that kind; default: as in real files.
        fields: further ones, by their full name; `None` leaves one out that would be there.
        tensors: further ones, and changed ones, by their name.
    """
    family, changes = ARCHITECTURES[arch]
    is_sentencepiece = arch in SENTENCEPIECE if sentencepiece is None else sentencepiece
    tokens, ranks, types = (sentencepiece_vocabulary if is_sentencepiece else byte_level_vocabulary)()
    model = tiny_donor(family, **{"vocab_size": len(tokens), **changes, **options})
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    values = {
        "general.name": "Tiny",
        "general.license": "apache-2.0",
        "general.file_type": gguf.LlamaFileType[f"MOSTLY_{kind.name}"] if kind is not None else 0,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        f"{arch}.vocab_size": config.vocab_size,
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values[f"{arch}.attention.key_length"] = head_dim
    values[f"{arch}.rope.dimension_count"] = head_dim
    if arch == "starcoder2":
        values[f"{arch}.attention.layer_norm_epsilon"] = config.norm_epsilon
    else:
        values[f"{arch}.attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if getattr(config, "sliding_window", None):
        values[f"{arch}.attention.sliding_window"] = config.sliding_window
    if arch in ("qwen3moe", "gpt-oss"):
        values[f"{arch}.expert_count"] = config.num_local_experts if arch == "gpt-oss" else config.num_experts
        values[f"{arch}.expert_used_count"] = config.num_experts_per_tok
        values[f"{arch}.expert_feed_forward_length"] = getattr(
            config, "moe_intermediate_size", config.intermediate_size
        )
    if tokenizer:
        values |= {
            "tokenizer.ggml.model": "llama" if is_sentencepiece else "gpt2",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_bos_token": is_sentencepiece,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.scores" if is_sentencepiece else "tokenizer.ggml.merges": ranks,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.chat_template": CHAT_TEMPLATE,
        }
    if tokenizer and is_sentencepiece:
        values["tokenizer.ggml.unknown_token_id"] = 3
    for name, value in (values | (fields or {})).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, tensor in (gguf_tensors(model, arch) | (tensors or {})).items():
        data = tensor.numpy().astype(np.float32)
        if kind is not None and tensor.dim() > 1:
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
