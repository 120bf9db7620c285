# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The families under test: one row each, and the tiny models every test is run on."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import attnres  # noqa: F401  registers the classes


# Widths that are no powers of two and heads that share keys, so that a transposed or repeated axis shows. The rows name
# only what differs from these.
COMMON = {
    "vocab_size": 67,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MASSIVE_TOKENS, MASSIVE_CHANNEL, MASSIVE = slice(8, None, 8), 7, 4000.0

# name: arguments of the tiny configuration. The model type is "attnres" for llama, "attnres_<name>" for the others.
# Windows and layer patterns fit a few tokens and layers. An epsilon is larger where the stream is so large that
# reads without their scale would hardly show.
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 12, "attention_bias": True},
    "qwen3_moe": {
        "head_dim": 12,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 4},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"sliding_window": 4},
    "starcoder2": {"sliding_window": 4},
    "olmo": {"clip_qkv": 2.0},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 20,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 3,
        "topk_group": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {
        "head_dim": 12,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "rms_norm_eps": 5e-5,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "gemma2": {"head_dim": 12, "sliding_window": 4, "query_pre_attn_scalar": 10, "rms_norm_eps": 1e-3},
    "gemma3_text": {
        "head_dim": 12,
        "sliding_window": 4,
        "query_pre_attn_scalar": 10,
        "sliding_window_pattern": 2,
        "rms_norm_eps": 1e-3,
    },
    "glm4": {"head_dim": 12, "attention_bias": True, "rms_norm_eps": 1e-3},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "linear_head_dim": 6,
        "linear_num_heads": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}


def config_class(family: str) -> type:
    return type(AutoConfig.for_model("attnres" if family == "llama" else f"attnres_{family}"))


def tiny_config(family: str = "llama", **kwargs):
    """The AttnRes configuration of a family; `kwargs` override the row."""
    return config_class(family)(**{**COMMON, **FAMILIES[family], **kwargs})


def tiny_donor_config(family: str = "llama", **kwargs):
    donor_class = config_class(family).donor_config_class()
    return donor_class(**{**COMMON, **FAMILIES[family], **kwargs})


@torch.no_grad()
def perturb(model: torch.nn.Module, std: float = 0.1, seed: int = 0) -> torch.nn.Module:
    """Moves every floating point tensor of the state dict, also norms and biases, away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator).mul_(std).to(tensor.dtype))
    return model.eval()


@torch.no_grad()
def make_massive(model: torch.nn.Module) -> torch.nn.Module:
    """Gives some tokens one huge channel, as trained models have it (SmolLM2: 23,000 beside a median of 1 to 12).

    As there, the output's norm leaves that channel out, so that it isn't all that the logits say.
    """
    model.get_input_embeddings().weight[MASSIVE_TOKENS, MASSIVE_CHANNEL] = MASSIVE
    for name, tensor in model.base_model.norm.named_parameters():
        # Gemma's gains are 1 + weight
        is_gemma = "gemma" in model.config.model_type
        tensor[MASSIVE_CHANNEL] = -1 if is_gemma and name == "weight" else 0
    return model


def tiny_donor(family: str = "llama", auto_class=AutoModelForCausalLM, **kwargs) -> torch.nn.Module:
    """A donor of transformers, every tensor perturbed, with massive activations, in evaluation mode."""
    torch.manual_seed(0)
    return make_massive(perturb(auto_class.from_config(tiny_donor_config(family, **kwargs))))


def tiny_qwen3_next_config(**changes) -> PreTrainedConfig:
    """Of a family that has no AttnRes form, and recurrent layers."""
    sizes = dict.fromkeys(["num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok"], 2)
    sizes |= dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2)
    sizes |= dict.fromkeys(["head_dim", "linear_key_head_dim", "linear_value_head_dim", "moe_intermediate_size"], 8)
    sizes |= {"hidden_size": 16, "num_hidden_layers": 4, "shared_expert_intermediate_size": 8, "vocab_size": 67}
    return AutoConfig.for_model("qwen3_next", **{**sizes, **changes})


def tiny_model(family: str = "llama", auto_class=AutoModelForCausalLM, **kwargs) -> torch.nn.Module:
    """An AttnRes model, every tensor perturbed, queries and gains included."""
    torch.manual_seed(0)
    return perturb(auto_class.from_config(tiny_config(family, **kwargs)), std=0.2)


def attn_res_from_donor(donor, mode: str = "block", block_size: int | None = None, **kwargs) -> torch.nn.Module:
    """The AttnRes model that holds the tensors of `donor` and computes what it computes: queries zero, reads scaled."""
    fields = donor.config.to_dict()
    family = fields.pop("model_type")
    options = {"attn_res_mode": mode, "attn_res_block_size": block_size, "attn_res_sum_scale": True, **kwargs}
    config = config_class(family)(**{**fields, **options})
    config._attn_implementation = donor.config._attn_implementation
    model = AutoModelForCausalLM.from_config(config, dtype=donor.dtype)
    missing, unexpected = model.load_state_dict(donor.state_dict(), strict=False)
    assert set(missing) == {"model.depth_attention.query", "model.depth_attention.key_norm"} and not unexpected
    return model.eval()


def tokens(batch: int = 3, seq: int = 7, vocab_size: int = COMMON["vocab_size"], seed: int = 1) -> torch.Tensor:
    """Token ids `(batch, seq)` without the special ones."""
    return torch.randint(3, vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
