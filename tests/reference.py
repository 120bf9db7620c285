# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A Llama with Attention Residuals written down from the formulas of the paper, in float64, one token at a time.

It shares no code with the project or with transformers: every sublayer output is kept, and the sources of a read are
formed from all of them anew, by the definition of a block. It takes a state dict and differentiates by autograd.
"""

import math

import torch


def rms_norm(vector: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return gain * vector / torch.sqrt((vector**2).sum() / vector.numel() + eps)


def linear(state: dict, name: str, vector: torch.Tensor) -> torch.Tensor:
    result = state[f"{name}.weight"] @ vector
    return result + state[f"{name}.bias"] if f"{name}.bias" in state else result


def read(sources: list[torch.Tensor], query: torch.Tensor, gain: torch.Tensor, eps: float) -> tuple[torch.Tensor, list]:
    """h = sum_i alpha_i v_i with alpha_i = exp(w . RMSNorm(v_i)) / sum_j exp(w . RMSNorm(v_j)), for one token."""
    exponentials = [torch.exp(torch.dot(query, rms_norm(source, gain, eps))) for source in sources]
    total = sum(exponentials)
    alphas = [exponential / total for exponential in exponentials]
    return sum(alpha * source for alpha, source in zip(alphas, sources)), alphas


def sources_of(outputs: list[torch.Tensor], embedding: torch.Tensor, per_block: int) -> list[torch.Tensor]:
    """b_0 = the embedding; b_n = the sum of the outputs of block n; the last one may still be open."""
    blocks = [outputs[start : start + per_block] for start in range(0, len(outputs), per_block)]
    return [embedding] + [torch.stack(block).sum(0) for block in blocks]


def rotate(vector: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Multiplies the complex numbers (v[k], v[k + half]) by exp(i position theta^(-k / half))."""
    half = vector.numel() // 2
    rotated = [None] * vector.numel()
    for k in range(half):
        # the table of a Llama is float32 in a model of any dtype
        angle = position * (1.0 / theta ** torch.tensor(k / half))
        cos, sin = angle.cos().item(), angle.sin().item()
        rotated[k] = vector[k] * cos - vector[k + half] * sin
        rotated[k + half] = vector[k] * sin + vector[k + half] * cos
    return torch.stack(rotated)


def attention(state: dict, prefix: str, config, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Causal attention over the tokens of one sequence."""
    theta, size = config.rope_parameters["rope_theta"], config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    keys, values, outputs = [], [], []
    for position, vector in enumerate(inputs):
        query = linear(state, f"{prefix}.q_proj", vector).split(size)
        keys.append([rotate(key, position, theta) for key in linear(state, f"{prefix}.k_proj", vector).split(size)])
        values.append(linear(state, f"{prefix}.v_proj", vector).split(size))
        heads = []
        for head in range(config.num_attention_heads):
            rotated = rotate(query[head], position, theta)
            scores = torch.stack([torch.dot(rotated, key[head // group]) for key in keys]) / math.sqrt(size)
            weights = torch.exp(scores) / torch.exp(scores).sum()
            heads.append(sum(weight * value[head // group] for weight, value in zip(weights, values)))
        outputs.append(linear(state, f"{prefix}.o_proj", torch.cat(heads)))
    return outputs


def mlp(state: dict, prefix: str, vector: torch.Tensor) -> torch.Tensor:
    gate = linear(state, f"{prefix}.gate_proj", vector)
    return linear(state, f"{prefix}.down_proj", gate * torch.sigmoid(gate) * linear(state, f"{prefix}.up_proj", vector))


def reference_sequence(state: dict, config, embeddings: list[torch.Tensor], sublayers_per_block: int, scaled: bool):
    """The logits `(seq, vocab)` of one sequence and, per read, the depth weights `(num_sources, seq)`."""
    query, gain = state["model.depth_attention.query"], state["model.depth_attention.key_norm"]
    eps = config.rms_norm_eps
    outputs = [[] for _ in embeddings]  # per token, what each sublayer wrote
    all_weights = []

    def mix(row: int) -> list[torch.Tensor]:
        mixes, weights = [], []
        for embedding, written in zip(embeddings, outputs):
            sources = sources_of(written, embedding, sublayers_per_block)
            mixed, alphas = read(sources, query[row], gain[row], config.attn_res_norm_eps)
            mixes.append(len(sources) * mixed if scaled else mixed)
            weights.append(torch.stack(alphas))
        all_weights.append(torch.stack(weights, dim=1))
        return mixes

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        norm = state[f"{prefix}.input_layernorm.weight"]
        inputs = [rms_norm(vector, norm, eps) for vector in mix(2 * layer)]
        for written, output in zip(outputs, attention(state, f"{prefix}.self_attn", config, inputs)):
            written.append(output)
        norm = state[f"{prefix}.post_attention_layernorm.weight"]
        inputs = [rms_norm(vector, norm, eps) for vector in mix(2 * layer + 1)]
        for written, vector in zip(outputs, inputs):
            written.append(mlp(state, f"{prefix}.mlp", vector))
    final = [rms_norm(vector, state["model.norm.weight"], eps) for vector in mix(2 * config.num_hidden_layers)]
    return torch.stack([state["lm_head.weight"] @ vector for vector in final]), all_weights


def reference_forward(state: dict, config, input_ids: torch.Tensor, sublayers_per_block: int, scaled: bool):
    """Logits `(batch, seq, vocab)` and a list of depth weights `(batch, num_sources, seq)`."""
    table = state["model.embed_tokens.weight"]
    results = [
        reference_sequence(state, config, [table[token] for token in sequence], sublayers_per_block, scaled)
        for sequence in input_ids.tolist()
    ]
    logits = torch.stack([logits for logits, _ in results])
    return logits, [torch.stack(weights) for weights in zip(*(weights for _, weights in results))]


def reference_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean negative log likelihood of each next token."""
    losses = []
    for sequence, targets in zip(logits, labels.tolist()):
        for scores, target in zip(sequence[:-1], targets[1:]):
            losses.append(torch.log(torch.exp(scores).sum()) - scores[target])
    return torch.stack(losses).mean()
