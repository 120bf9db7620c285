# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Other ways to mix depth, by the modes that choose them: ablations of Attention Residuals, and their relatives.

Knows no model, like `depth_attention_attnres.py`. In this order: weights that don't depend on the input, other weights
of the same sources, other sums of them, and streams. A formula has the letters of Attention Residuals: sources v_i
from the embedding on, a query w, the key norm's gain g, n sources in a read.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers import initialization as init


try:
    from .depth_attention_attnres import (
        DEPTH_MIXERS,
        NOTHING_READ,
        DepthAttentionImplementation,
        DepthMixer,
        DepthQueries,
        EachReadItself,
        Sources,
        depth_softmax,
        key_scores,
        scaled_sum,
        upcast,
        weighted_sum,
    )
except ImportError:
    if __package__:  # loaded from the Hub: the relative import must work, so the error is real
        raise
    from depth_attention_attnres import (
        DEPTH_MIXERS,
        NOTHING_READ,
        DepthAttentionImplementation,
        DepthMixer,
        DepthQueries,
        EachReadItself,
        Sources,
        depth_softmax,
        key_scores,
        scaled_sum,
        upcast,
        weighted_sum,
    )


def new_parameter(*shape: int) -> nn.Parameter:
    """In float32, still without values."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def normalized(values: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm without a gain, over the last axis."""
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)


def dot_scores(values: list[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    """`w . v_i` of values and a query `(..., hidden)`, as `(batch, num_sources, seq)`."""
    return torch.stack([(value * query).sum(-1) for value in values], dim=1)


# Weights that don't depend on the input


def fixed_depth_mix(sources: Sources, weights: torch.Tensor, eps: float, scale: float):
    """The read of DenseFormer, `h = sum_i w_i v_i` (Pagliardini et al., arXiv 2402.02622).

    The signature and the result of this and of the other functions are those of [`eager_depth_attention`].

    Args:
        sources: num_sources tensors `(batch, seq, hidden)`.
        weights: of which the first num_sources count.
        eps, scale: not used.
    """
    values = upcast(sources)
    weights = weights[: len(sources)].to(values[0].dtype)
    mixed = sum(weight * value for weight, value in zip(weights, values))
    return mixed.to(sources[0].dtype), for_all_tokens(weights, sources)


def for_all_tokens(weights: torch.Tensor, sources: Sources) -> torch.Tensor:
    batch, seq = sources[0].shape[:2]
    return weights[None, :, None].expand(batch, -1, seq)


def static_depth_attention(sources: Sources, scores: torch.Tensor, eps: float, scale: float):
    """Learned numbers instead of scores, `h = scale * sum_i softmax_i(b_i) v_i`: input-independent mixing, an ablation
    of Attention Residuals (Kimi Team, arXiv 2603.15031)."""
    values = upcast(sources)
    scores = for_all_tokens(scores[: len(sources)].to(values[0].dtype), sources)
    return scaled_sum(scores, values, sources, scale)


class SourceNumbers(DepthMixer):
    """A number for each source of each read, `(num_depth_reads, most sources)`."""

    depends_on_input = False

    def __init__(self, config):
        super().__init__()
        self.sublayers_per_source = config.attn_res_sublayers_per_block
        self.weight = new_parameter(config.num_depth_reads, config.num_depth_sources(config.num_depth_reads - 1))

    def rows_of(self, name: str, parameter: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        kept = super().rows_of(name, parameter, rows)
        if self.sublayers_per_source == 1:
            return kept[:, [0, *(row + 1 for row in rows)]]  # each read's output is a source too
        return kept[:, : 1 + -(-len(rows) // self.sublayers_per_source)]

    def forward(self) -> torch.Tensor:
        return self.weight.clone()


class DenseFormerWeights(SourceNumbers):
    """The weight of each source in each read, 1 at first, the plain sum."""

    sums_to_one = False

    def reset_parameters(self):
        init.ones_(self.weight)

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return EachReadItself(fixed_depth_mix)


class StaticScores(SourceNumbers):
    """The score of each source in each read, 0 at first."""

    def reset_parameters(self):
        init.zeros_(self.weight)

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return EachReadItself(static_depth_attention)


# Other weights of the same sources


def sigmoid_depth_attention(sources: Sources, product: torch.Tensor, eps: float, scale: float):
    """Sigmoids instead of a softmax, `h = sum_i 2 sigmoid(w . RMSNorm_g(v_i)) v_i`: an ablation of arXiv 2603.15031.

    The factor 2 is the same function but for the epsilon of the norm that follows; zero queries give the plain sum.
    `scale` is not used.
    """
    values = upcast(sources)
    weights = 2 * torch.sigmoid(key_scores(values, product, eps))
    return weighted_sum(weights, values).to(sources[0].dtype), weights


class SigmoidQueries(DepthQueries):
    sums_to_one = False

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return EachReadItself(sigmoid_depth_attention)


def raw_key_depth_attention(sources: Sources, query: torch.Tensor, eps: float, scale: float):
    """Keys without a norm, `h = scale * sum_i softmax_i(w . v_i) v_i`: an ablation of arXiv 2603.15031."""
    values = upcast(sources)
    return scaled_sum(dot_scores(values, query.to(values[0].dtype)), values, sources, scale)


class RawKeyQueries(DepthMixer):
    idle = ("query",)

    def __init__(self, config):
        super().__init__()
        self.query = new_parameter(config.num_depth_reads, config.hidden_size)

    def reset_parameters(self):
        init.zeros_(self.query)

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return EachReadItself(raw_key_depth_attention)

    def forward(self) -> torch.Tensor:
        return self.query.clone()


def windowed_depth_attention(sources: Sources, product: torch.Tensor, eps: float, scale: float, window: int):
    """Attention to the embedding and to the `window` latest sources, an ablation of arXiv 2603.15031. The others weigh
    nothing, and a `scale` that is the number of sources becomes that of those that are read."""
    chosen = [*sources[:1], *sources[1:][-window:]]
    values = upcast(chosen)
    scale = len(chosen) if scale == len(sources) else scale
    mixed, weights = scaled_sum(key_scores(values, product, eps), values, sources, scale)
    nothing = torch.zeros_like(weights[:, :1]).expand(-1, len(sources) - len(chosen), -1)
    return mixed, torch.cat([weights[:, :1], nothing, weights[:, 1:]], dim=1)


class WindowQueries(DepthQueries):
    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return EachReadItself(partial(windowed_depth_attention, window=config.attn_res_window))

    @staticmethod
    def why_no_donor(config) -> str | None:
        most = config.num_depth_sources(config.num_depth_reads - 1)
        if most <= 1 + config.attn_res_window:
            return None
        return (
            f"its reads have up to {most} sources, and a window of {config.attn_res_window} leaves out some of what a "
            f"residual stream sums; attn_res_window = {most - 1} leaves out none"
        )


def headed_depth_attention(sources: Sources, product: torch.Tensor, eps: float, scale: float, num_heads: int):
    """A softmax for each of `num_heads` groups of channels, an ablation of arXiv 2603.15031. The norm of the keys is
    over all channels. The weights are means over the heads."""
    values = upcast(sources)
    product = product.to(values[0].dtype)
    scores = [(normalized(v, eps) * product).unflatten(-1, (num_heads, -1)).sum(-1) for v in values]
    weights, factors = depth_softmax(torch.stack(scores, dim=1), 1, scale)  # (batch, num_sources, seq, num_heads)
    by_head = [value.unflatten(-1, (num_heads, -1)) for value in values]
    return weighted_sum(factors, by_head).flatten(-2).to(sources[0].dtype), weights.mean(-1)


class HeadQueries(DepthQueries):
    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return EachReadItself(partial(headed_depth_attention, num_heads=config.attn_res_num_heads))


def input_query_depth_attention(sources: Sources, weight: torch.Tensor, eps: float, scale: float):
    """A query that is computed from the latest source v_n, `w = W RMSNorm(v_n) / hidden`, with keys `RMSNorm(v_i)`: an
    ablation of arXiv 2603.15031, which doesn't say from which vector.

    Args:
        weight: W divided by the hidden size.
    """
    values = upcast(sources)
    keys = [normalized(value, eps) for value in values]
    with torch.autocast(weight.device.type, enabled=False):
        query = nn.functional.linear(keys[-1], weight.to(keys[-1].dtype))
    return scaled_sum(dot_scores(keys, query), values, sources, scale)


class QueryProjections(DepthMixer):
    """W of each read, `(num_depth_reads, hidden, hidden)`.

    It is divided by the hidden size, so that a step of Adam, which moves each element by its learning rate, moves a
    score as far as with a query that is learned. Undivided, it diverges at such rates.
    """

    def __init__(self, config):
        super().__init__()
        self.query_projection = new_parameter(config.num_depth_reads, config.hidden_size, config.hidden_size)

    def reset_parameters(self):
        init.zeros_(self.query_projection)

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return EachReadItself(input_query_depth_attention)

    def forward(self) -> torch.Tensor:
        return self.query_projection / self.query_projection.shape[-1]


# Other sums of the same sources


class AveragedBlocks(DepthAttentionImplementation):
    """Blocks as LR-AttnRes has them: of a block of c outputs, the source is the mean and the score gets log c, so that
    zero queries weight outputs, not blocks, equally. A scale is the number of all outputs."""

    def __call__(self, sources, product, eps, scale, sizes=None):
        sizes = sizes or (1,) * len(sources)
        values = upcast(sources)
        scores = key_scores(values, product, eps).unbind(1)
        scores = torch.stack([score + math.log(size) for score, size in zip(scores, sizes)], dim=1)
        scale = sum(sizes) if scale == len(sources) else scale
        return scaled_sum(scores, [value / size for value, size in zip(values, sizes)], sources, scale)

    def read(self, place, product, sources, norm, shared, watched):
        sources = self.joined(sources, place)
        mixed, weights = self(sources, product, place.eps, place.scale, place.sizes)
        return mixed, weights, norm(mixed), sources


class LowRankQueries(DepthMixer):
    """LR-AttnRes (github.com/jon123boss/LR-AttnRes): keys of few numbers, `k_i = P RMSNorm(v_i)`, with one projection P
    for all sources (there `lrid_key_from_value_shared`), and scores `w . k_i / sqrt(rank)`.

    That is a score `(P^T w / sqrt(rank)) . RMSNorm(v_i)`, so that full mode runs in all implementations of Attention
    Residuals. Blocks are [`AveragedBlocks`].
    """

    idle = ("query",)
    shared_by_reads = ("key_projection",)

    def __init__(self, config):
        super().__init__()
        self.query = new_parameter(config.num_depth_reads, config.attn_res_rank)
        self.key_projection = new_parameter(config.attn_res_rank, config.hidden_size)

    def reset_parameters(self):
        init.zeros_(self.query)
        devices = [self.key_projection.device] if self.key_projection.is_cuda else []
        with torch.random.fork_rng(devices):  # what comes next, a head, is the same in all modes
            init.normal_(self.key_projection, std=self.key_projection.shape[-1] ** -0.5)

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return AveragedBlocks() if config.depth_sources.sums_blocks else DepthMixer.implementation(config)

    def forward(self) -> torch.Tensor:
        """What is multiplied with keys of full width, `(num_depth_reads, hidden)`."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        with torch.autocast(self.query.device.type, enabled=False):
            return self.query.to(dtype) @ self.key_projection.to(dtype) / math.sqrt(self.query.shape[-1])


def delta_depth_attention(sources: Sources, learned: torch.Tensor, eps: float, scale: float):
    """Delta Attention Residuals (Luo et al., arXiv 2605.18855): the residual stream, and a mix of what it was made of.

        h = c (sum_i v_i + alpha_0 u + sum_i alpha_i v_i),  alpha = softmax of w . RMSNorm_g of u and of all v_i

    u is the null source, learned, which lets a read take nothing. Of n sources, zero queries and a null source of zero
    add 1 / (n + 1) of the stream to itself. The factor c = (n + 1) / (n + 2), which isn't in the paper, makes that the
    stream again. But for its epsilon, the norm that follows undoes any such factor.

    Args:
        learned: the product of w and g, and u, one after the other.
        scale: not used.

    Returns:
        The mix, and the factor of each source, `c (1 + alpha_i)`.
    """
    values = upcast(sources)
    product, null_source = learned.to(values[0].dtype).chunk(2)
    read = [null_source.expand_as(values[0]), *values]
    _, added = depth_softmax(key_scores(read, product, eps), 1, len(read))
    weights = (len(read) + added[:, 1:]) / (len(read) + 1)
    of_null_source = added[:, 0] / (len(read) + 1)
    mixed = weighted_sum(weights, values) + of_null_source.unsqueeze(-1) * null_source
    return mixed.to(sources[0].dtype), weights


class DeltaQueries(DepthQueries):
    """Also the null source of each read, zero at first."""

    sums_to_one = False
    idle = ("query", "null_source")

    def __init__(self, config):
        super().__init__(config)
        self.null_source = new_parameter(config.num_depth_reads, config.hidden_size)

    def reset_parameters(self):
        super().reset_parameters()
        init.zeros_(self.null_source)

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return EachReadItself(delta_depth_attention)

    def forward(self) -> torch.Tensor:
        products = super().forward()
        return torch.cat([products, self.null_source.to(products.dtype)], dim=1)


def recent_depth_attention(sources: Sources, learned: torch.Tensor, eps: float, scale: float):
    """Attention to the states of the residual stream, with a bias for the latest (open-attention-residuals,
    github.com/wdlctc/open-attention-residuals):

        c_i = v_0 + ... + v_i,  h = sum_i softmax_i(w . RMSNorm_g(c_i) + [i = n] b) c_i

    Args:
        learned: the product of w and g, and b, one after the other.
        scale: not used.
    """
    values = [*torch.stack(upcast(sources)).cumsum(0)]
    product, bias = learned.to(values[0].dtype).split([values[0].shape[-1], 1])
    *others, latest = key_scores(values, product, eps).unbind(1)
    scores = torch.stack([*others, latest + bias], dim=1)
    return scaled_sum(scores, values, sources, 1)


class RecencyQueries(DepthQueries):
    """Also the bias b of each read, 3 at first as there."""

    def __init__(self, config):
        super().__init__(config)
        self.bias = new_parameter(config.num_depth_reads, 1)

    def reset_parameters(self):
        super().reset_parameters()
        init.constant_(self.bias, 3.0)

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return EachReadItself(recent_depth_attention)

    @staticmethod
    def why_no_donor(config) -> str | None:
        return "its reads only tend to the latest state of the residual stream, as their bias grows"

    def forward(self) -> torch.Tensor:
        products = super().forward()
        return torch.cat([products, self.bias.to(products.dtype)], dim=1)


class NormedValues(DepthAttentionImplementation):
    """The read of Inkling 2 (transformers' `inkling2`): `h = sum_i softmax_i(w . u_i / sqrt(hidden)) u_i` of normalised
    sources `u_i = RMSNorm(v_i)`. A single source is read as it is. There may be several queries, one for each input of
    attention; then the norm takes as many reads, and what is seen of them is the first and the mean of their weights.
    """

    def __call__(self, sources, query, eps, scale):
        mixes, weights = self.all_reads(sources, query[None], eps)
        return mixes[0], weights

    @staticmethod
    def all_reads(sources: Sources, queries: torch.Tensor, eps: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        values = [normalized(value, eps) for value in upcast(sources)]
        mixes, all_weights = [], []
        for query in queries.to(values[0].dtype) / math.sqrt(queries.shape[-1]):
            mixed, weights = scaled_sum(dot_scores(values, query), values, sources, 1)
            mixes.append(sources[0] if len(sources) == 1 else mixed)
            all_weights.append(weights)
        return mixes, torch.stack(all_weights).mean(0)

    def read(self, place, product, sources, norm, shared, watched):
        sources = self.joined(sources, place)
        mixes, weights = self.all_reads(sources, product, place.eps)
        return mixes[0], weights, norm(*mixes), sources


class NormedValueQueries(DepthMixer):
    """As many queries as a read has, `(num_depth_reads, most queries, hidden)`."""

    def __init__(self, config):
        super().__init__()
        self.num_queries = [config.num_depth_queries(row) for row in range(config.num_depth_reads)]
        self.query = new_parameter(config.num_depth_reads, config.most_depth_queries, config.hidden_size)

    def reset_parameters(self):
        init.zeros_(self.query)

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return NormedValues()

    @staticmethod
    def why_no_donor(config) -> str | None:
        return "it reads normalised sources, whose mean isn't the residual stream"

    def keep_rows(self, rows: Sequence[int]):
        super().keep_rows(rows)
        self.num_queries = [self.num_queries[row] for row in (*rows, -1)]

    def forward(self) -> tuple[torch.Tensor, ...]:
        return tuple(queries[:number].clone() for queries, number in zip(self.query, self.num_queries))


# Streams


def doubly_stochastic(logits: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """Sinkhorn and Knopp's matrix of a square one `(..., n, n)`, whose columns sum to 1, and whose rows nearly do."""
    logits = logits.movedim((-2, -1), (0, 1)).contiguous()  # short rows would take many times as long
    for _ in range(iterations):
        logits = logits.log_softmax(1).log_softmax(0)
    return logits.exp().movedim((0, 1), (-2, -1))


def dynamic_connections(streams: torch.Tensor, learned: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """Hyper-connections (Zhu et al., arXiv 2409.19606), dynamic ones, with RMSNorm: learned numbers, and what a stream
    says through a tanh.

    Args:
        streams: `(batch, seq, num_streams, hidden)`.
        learned: what [`HyperConnectionWeights`] has for a read.

    Returns:
        What is read of each stream `(batch, seq, num_streams)`, how much of the output is written to each, and how much
        of stream j goes into stream k `(batch, seq, j, k)`.
    """
    num_streams, hidden = streams.shape[-2:]
    width = num_streams + 2
    weight, bias, scale = learned.to(streams.dtype).split([width * hidden, num_streams * width, 2])
    with torch.autocast(streams.device.type, enabled=False):
        dynamic = nn.functional.linear(normalized(streams, eps), weight.view(width, hidden)).tanh()
    scales = torch.cat([scale[:1].expand(num_streams + 1), scale[1:]])
    taken, *mixed, written = (dynamic * scales + bias.view(num_streams, width)).unbind(-1)
    return taken, written, torch.stack(mixed, dim=-1)


def manifold_connections(streams: torch.Tensor, learned: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """Manifold-constrained hyper-connections, mHC (Xie et al., arXiv 2512.24880): all streams together give what is
    read of each, through a sigmoid, what is written, through twice a sigmoid, and a doubly stochastic matrix.

    Arguments and result are those of [`dynamic_connections`], of what [`ManifoldWeights`] has for a read.
    """
    num_streams, hidden = streams.shape[-2:]
    sizes = [num_streams, num_streams, num_streams**2]
    width = sum(sizes)
    weight, bias, scale = learned.to(streams.dtype).split([width * num_streams * hidden, width, 3])
    with torch.autocast(streams.device.type, enabled=False):
        logits = nn.functional.linear(normalized(streams.flatten(-2), eps), weight.view(width, num_streams * hidden))
    logits = logits * torch.cat([part.expand(size) for part, size in zip(scale.split(1), sizes)]) + bias
    taken, written, mixed = logits.split(sizes, dim=-1)
    mixed = doubly_stochastic(mixed.unflatten(-1, (num_streams, num_streams)))
    return torch.sigmoid(taken), 2 * torch.sigmoid(written), mixed


class HyperConnections(DepthAttentionImplementation):
    """Parallel residual streams instead of sources, with `connections` that are made of them at each read.

    What goes from read to read is the streams; behind a read, before its sublayer's output, the mixed streams and how
    much of that output is written to each, `(batch, seq, num_streams)`.
    """

    def __init__(self, connections, num_streams: int):
        self.connections, self.num_streams = connections, num_streams

    def begin(self, sources, products, eps, watched):
        sources = tuple(sources)
        return sources * self.num_streams if len(sources) == 1 else sources, products, NOTHING_READ

    def joined(self, sources, place):
        if len(sources) == self.num_streams:
            return tuple(sources)
        *streams, written, output = sources
        return self.written(streams, written, output)

    def num_unchanged(self, sources, place):
        return 0

    @staticmethod
    def written(streams: Sequence[torch.Tensor], written: torch.Tensor, output: torch.Tensor) -> Sources:
        """The streams with a sublayer's output."""
        parts = written.unbind(-1)
        return tuple((v + w.unsqueeze(-1) * output).to(s.dtype) for s, v, w in zip(streams, upcast(streams), parts))

    def connect(self, streams: Sequence[torch.Tensor], learned: torch.Tensor, eps: float) -> tuple:
        """What is read of the streams, in float32, what of each, and the streams as they are behind the read."""
        values = torch.stack(upcast(streams), dim=2)  # (batch, seq, num_streams, hidden)
        taken, written, mixed = self.connections(values, learned, eps)
        read = (taken.unsqueeze(-1) * values).sum(2)
        kept = [(mixed[..., k].unsqueeze(-1) * values).sum(2).to(streams[0].dtype) for k in range(self.num_streams)]
        return read, taken.transpose(1, 2), (*kept, written)

    def read(self, place, product, sources, norm, shared, watched):
        streams = self.joined(sources, place)
        read, taken, sources = self.connect(streams, product, place.eps)
        read = read.to(streams[0].dtype)
        return read, taken, norm(read), sources


class StreamConnections(DepthMixer):
    """Of a read: `weight` and `scale` of what the streams say, 0 and 0.01 at first, and a `bias`, which at first makes
    the streams, that begin equal, a donor's residual stream all of them."""

    sums_to_one = False
    connections: Callable  # what makes connections of streams and of these numbers

    def first_bias(self) -> torch.Tensor:
        raise NotImplementedError

    def reset_parameters(self):
        init.zeros_(self.weight)
        init.copy_(self.bias, self.first_bias())
        init.constant_(self.scale, 0.01)

    @classmethod
    def implementation(cls, config) -> DepthAttentionImplementation:
        return HyperConnections(cls.connections, config.attn_res_num_streams)

    def forward(self) -> torch.Tensor:
        """One after the other, `(num_depth_reads, numbers)`."""
        parameters = (self.weight, self.bias, self.scale)
        return torch.cat([parameter.flatten(1) for parameter in parameters], dim=1)


class HyperConnectionWeights(StreamConnections):
    """At first read i takes stream i mod num_streams, all streams stay as they are, and each gets the whole output."""

    connections = staticmethod(dynamic_connections)

    def __init__(self, config):
        super().__init__()
        num_reads, num_streams = config.num_depth_reads, config.attn_res_num_streams
        self.weight = new_parameter(num_reads, num_streams + 2, config.hidden_size)
        self.bias = new_parameter(num_reads, num_streams, num_streams + 2)
        self.scale = new_parameter(num_reads, 2)

    def first_bias(self) -> torch.Tensor:
        num_reads, num_streams = self.bias.shape[:2]
        identity, ones = torch.eye(num_streams), torch.ones(num_streams, 1)
        rows = [torch.cat([identity[read % num_streams, :, None], identity, ones], 1) for read in range(num_reads)]
        return torch.stack(rows)


class ManifoldWeights(StreamConnections):
    """At first a half of what read i takes is of stream i mod num_streams, streams are mixed a little, and each gets
    the whole output."""

    connections = staticmethod(manifold_connections)
    diagonal = 4.0  # of the matrix's logits, at first

    def __init__(self, config):
        super().__init__()
        num_reads, self.num_streams = config.num_depth_reads, config.attn_res_num_streams
        width = (2 + self.num_streams) * self.num_streams
        self.weight = new_parameter(num_reads, width, self.num_streams * config.hidden_size)
        self.bias = new_parameter(num_reads, width)
        self.scale = new_parameter(num_reads, 3)

    def first_bias(self) -> torch.Tensor:
        # a half of one stream and the rest of the others, which sum to 1 although these logits are rounded
        num_others = self.num_streams - 1
        others = torch.tensor(0.5 / num_others).logit()
        own = (1 - num_others * others.double().sigmoid()).logit().float()
        taken = others.repeat(self.num_streams, self.num_streams)
        taken[range(self.num_streams), range(self.num_streams)] = own
        written, mixed = torch.zeros(self.num_streams), self.diagonal * torch.eye(self.num_streams).flatten()
        return torch.stack(
            [torch.cat([taken[read % self.num_streams], written, mixed]) for read in range(len(self.bias))]
        )


class BlockHyperConnections(HyperConnections):
    """Attention Residuals over blocks whose open sum is kept as streams, connected as in mHC. A read attends to the
    closed sources and to what it takes of the streams; a block is closed as the mean of its streams."""

    def begin(self, sources, products, eps, watched):
        return sources, products, NOTHING_READ

    def joined(self, sources, place):
        num_closed = place.num_closed_sources
        is_open = place.num_sources > num_closed
        if len(sources) <= num_closed + self.num_streams * is_open:
            return tuple(sources)
        *before, written, output = sources
        streams = self.written(before[-self.num_streams :], written, output)
        if not is_open:
            streams = [(sum(upcast(streams)) / self.num_streams).to(output.dtype)]
        return *before[: -self.num_streams], *streams

    def num_unchanged(self, sources, place):
        num_open = self.num_streams * (place.num_sources > place.num_closed_sources)
        if len(sources) == place.num_closed_sources + num_open:
            return place.num_closed_sources
        return len(sources) - self.num_streams - 2

    def read(self, place, product, sources, norm, shared, watched):
        sources = self.joined(sources, place)
        closed, streams = sources[: place.num_closed_sources], sources[place.num_closed_sources :]
        hidden = closed[0].shape[-1]
        query, learned = product[:hidden], product[hidden:]
        is_open = len(streams) > 0
        if not is_open:
            streams = [torch.zeros_like(closed[0])] * self.num_streams
        partial_sum, _, kept = self.connect(streams, learned, place.eps)
        values = [*upcast(closed), *[partial_sum] * is_open]
        mixed, weights = scaled_sum(key_scores(values, query, place.eps), values, closed, place.scale)
        return mixed, weights, norm(mixed), (*closed, *kept)


class BlockManifoldWeights(DepthQueries):
    """Queries and key norm gains, and the connections of the streams."""

    idle = ("query", "connections.weight", "connections.bias", "connections.scale")

    def __init__(self, config):
        super().__init__(config)
        self.connections = ManifoldWeights(config)

    def reset_parameters(self):
        super().reset_parameters()
        self.connections.reset_parameters()

    @staticmethod
    def implementation(config) -> DepthAttentionImplementation:
        return BlockHyperConnections(manifold_connections, config.attn_res_num_streams)

    def forward(self) -> torch.Tensor:
        return torch.cat([super().forward(), self.connections()], dim=1)


VARIANTS = {
    "sigmoid": SigmoidQueries,
    "raw_keys": RawKeyQueries,
    "static": StaticScores,
    "window": WindowQueries,
    "heads": HeadQueries,
    "input_query": QueryProjections,
    "low_rank": LowRankQueries,
    "delta": DeltaQueries,
    "recency": RecencyQueries,
    "inkling2": NormedValueQueries,
}
DEPTH_MIXERS.update(
    {f"{sources}_{name}": mixer for name, mixer in VARIANTS.items() for sources in ("block", "full")},
    denseformer=DenseFormerWeights,
    hc=HyperConnectionWeights,
    mhc=ManifoldWeights,
    block_mhc=BlockManifoldWeights,
)
