# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Decoders of transformers whose residual stream is replaced by attention over depth.

Attention Residuals (Kimi Team, arXiv 2603.15031): every sublayer, attention or MLP, reads a softmax-weighted mix of the
embedding and of what the sublayers before it wrote, instead of their plain sum. Everything that is not the residual
stream is the donor family's own code, imported from transformers.
"""

import inspect
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import GeneralInterface, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


try:
    from .configuration_attnres import AttnResConfig
except ImportError:
    if __package__:  # loaded from the Hub: the relative import must work, so the error is real
        raise
    from configuration_attnres import AttnResConfig


def eager_depth_attention(
    sources: tuple[torch.Tensor, ...], product: torch.Tensor, eps: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One read, `h = scale * sum_i softmax_i(w . RMSNorm_g(v_i)) v_i` (equations 2 to 4 of the paper).

    Scores, softmax and sums are computed in float32 (float64 for float64 sources) whatever the sources' dtype, also
    under autocast, and cast once at the end. There is no division by sqrt(hidden).

    Args:
        sources: num_sources tensors `(batch, seq, hidden)`, the values v_i.
        product: `(hidden,)`, the read's query w times its key norm gain g; the two only enter as this product.
        eps: epsilon of the RMSNorm of the keys.
        scale: factor of the result.

    Returns:
        The mix `(batch, seq, hidden)` in the dtype of the first source, and the weights `(batch, num_sources, seq)`.
    """
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    values = [source.to(dtype) for source in sources]
    product = product.to(dtype)
    # not a matmul, which autocast would round
    scores = [(v * product).sum(-1) * torch.rsqrt(v.pow(2).mean(-1) + eps) for v in values]
    weights = torch.stack(scores, dim=1).softmax(dim=1)  # (batch, num_sources, seq)
    mixed = sum(weight.unsqueeze(-1) * v for weight, v in zip((weights * scale).unbind(1), values))
    return mixed.to(sources[0].dtype), weights


class DepthAttentionInterface(GeneralInterface):
    """Implementations of depth attention by name, each with the signature and result of [`eager_depth_attention`].

    Select one with `from_pretrained(..., attn_res_implementation=name)` or `model.set_attn_res_implementation(name)`; add
    one with `DepthAttentionInterface.register(name, function)`.
    """

    _global_mapping = {"eager": eager_depth_attention}

    def get_interface(self, name: str) -> Callable:
        if name not in self:
            raise ValueError(
                f"{name!r} is not an implementation of depth attention; choose one of {', '.join(sorted(self))} or add it "
                "with DepthAttentionInterface.register."
            )
        return self[name]


ALL_DEPTH_ATTENTION_FUNCTIONS = DepthAttentionInterface()


class DepthAttention(nn.Module):
    """The learned queries and key norm gains of all reads of a model, kept in float32.

    Zero queries, the initial value, weight all sources equally. Returns the products `query * key_norm`
    `(num_depth_reads, hidden)`: fresh float32 tensors, as a sharded parameter may be freed after this module's forward.
    """

    def __init__(self, config):
        super().__init__()
        shape = (config.num_depth_reads, config.hidden_size)
        self.query = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.key_norm = nn.Parameter(torch.ones(shape, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.to(dtype) * self.key_norm.to(dtype)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` and the like move the parameters but don't round them
        def move(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(move, recurse)


class DepthRead(nn.Module):
    """A read with the implementation that the configuration names. Holds no parameters."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, product: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        depth_attention = ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(self.config._attn_res_implementation)
        scale = len(sources) if self.config.attn_res_sum_scale else 1
        return depth_attention(sources, product, self.config.attn_res_norm_eps, scale)


class AttnResDecoderLayerMixin(GradientCheckpointingLayer):
    """A donor's decoder layer that reads sources where the donor's adds to a residual stream.

    The sources of a token are one tuple of tensors `(batch, seq, hidden)`: the embedding, the finished blocks and, last, the
    sum of the open block where there is one.
    """

    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """What attention, with the donor's norms around it, adds to the residual stream."""
        attn_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return attn_output

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the MLP, with the donor's norms around it, adds to the residual stream."""
        return self.mlp(self.post_attention_layernorm(hidden_states))

    def write(self, sources: tuple[torch.Tensor, ...], sublayer: int, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The sources after `output`, what sublayer number `sublayer` of the model wrote, has joined them."""
        if self.config.extends_open_depth_source(sublayer):
            # in the dtype of the embedding, as a residual stream under autocast
            return *sources[:-1], sources[-1].to(sources[0].dtype) + output
        return *sources, output

    def forward(self, products: torch.Tensor, *sources: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> tuple:
        """
        Args:
            products: `(2, hidden)`, the products of this layer's two reads.
            sources: what there is to read. Positional, as re-entrant checkpointing sees only positional tensors.
            kwargs: what the donor's attention takes.

        Returns:
            What attention reads, the depth weights of the two reads `(batch, num_sources, seq)`, then the sources that are
            new or changed: all but those that were closed before this layer.
        """
        sublayer = 2 * self.layer_idx
        closed = self.config.num_closed_depth_sources(sublayer)
        attention_input, attention_weights = self.depth_read(products[0], sources)
        sources = self.write(sources, sublayer, self.attend(attention_input, **kwargs))
        mlp_input, mlp_weights = self.depth_read(products[1], sources)
        sources = self.write(sources, sublayer + 1, self.transform(mlp_input))
        return attention_input, attention_weights, mlp_weights, *sources[closed:]


@dataclass
class AttnResModelOutputWithPast(BaseModelOutputWithPast):
    """`depth_attentions`: the weights of each read, `(batch, num_sources, seq)`, summing to 1 over the sources."""

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResCausalLMOutputWithPast(CausalLMOutputWithPast):
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResSequenceClassifierOutputWithPast(SequenceClassifierOutputWithPast):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResTokenClassifierOutput(TokenClassifierOutput):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResQuestionAnsweringModelOutput(QuestionAnsweringModelOutput):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


def _select_implementation(config, name: str | None):
    config._attn_res_implementation = name or config._attn_res_implementation or "eager"
    ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(config._attn_res_implementation)


class AttnResPreTrainedModelMixin:
    """What models and heads of every family share."""

    # as in the configuration: a plan's stage hands on one tensor
    _pp_plan = None

    def __init__(self, config, attn_res_implementation: str | None = None):
        _select_implementation(config, attn_res_implementation)
        super().__init__(config)

    def set_attn_res_implementation(self, attn_res_implementation: str):
        """Switches the implementation of depth attention, a key of `ALL_DEPTH_ATTENTION_FUNCTIONS`.

        Raises:
            ValueError: the name is unknown; the message lists the known ones.
        """
        ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(attn_res_implementation)
        self.config._attn_res_implementation = attn_res_implementation

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DepthAttention):
            init.zeros_(module.query)
            init.ones_(module.key_norm)

    # transformers looks for these two abilities in the source file of a class, here that of the donor
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return _donor_class(cls)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return _donor_class(cls)._can_set_experts_implementation()

    @classmethod
    def is_remote_code(cls) -> bool:
        # transformers' own copying enters only the saved class, under its FSDP name if it is sharded: see save_pretrained
        return False

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers; the folder also gets the code files, so that it loads where this project is not installed."""
        self.config.auto_map = self.config.hub_classes()
        if is_main_process and not Path(save_directory).is_file():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for module in (AttnResPreTrainedModelMixin.__module__, AttnResConfig.__module__):
                code_file = Path(sys.modules[module].__file__)
                shutil.copyfile(code_file, Path(save_directory) / code_file.name)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


def _donor_class(cls: type) -> type:
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))


class AttnResModelMixin(AttnResPreTrainedModelMixin):
    """A donor's decoder that carries sources instead of hidden states from layer to layer."""

    layer_class: type[AttnResDecoderLayerMixin]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        read = {"index": 0, "capture_initial_hidden_state": False}
        cls._can_record_outputs = {
            **cls._can_record_outputs,
            "hidden_states": [
                OutputRecorder(AttnResDecoderLayerMixin, **read),
                OutputRecorder(DepthRead, layer_name="output_read", **read),
            ],
        }

    def post_init(self):
        # The donor's constructor calls this last. Its layers differ from ours in nothing but methods, so they change their
        # class instead of being built twice, and depth attention joins before the weights are initialised.
        for layer_idx, layer in enumerate(self.layers):
            layer.__class__ = self.layer_class
            layer.config = self.config
            layer.layer_idx = layer_idx
            layer.depth_read = DepthRead(self.config)
        self.depth_attention = DepthAttention(self.config)
        self.output_read = DepthRead(self.config)
        self._no_split_modules = [self.layer_class.__name__]
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), "depth_attention"}
        super().post_init()

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """The first source, from the token embeddings."""
        return inputs_embeds

    def position_embeddings(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor):
        """What the layers' attention takes as `position_embeddings`; a dictionary if it depends on the layer type."""
        return self.rotary_emb(inputs_embeds, position_ids=position_ids)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_depth_attentions: bool | None = None,
        depth_attentions: list | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AttnResModelOutputWithPast:
        """
        The arguments of the donor's forward, and:

        Args:
            output_depth_attentions: whether the outputs hold `depth_attentions`, the weights of all reads.
            depth_attentions: a list that receives these weights, for heads, whose forward is the donor's.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)
        if not isinstance(causal_mask := attention_mask, dict):
            causal_mask = create_masks_for_generate(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        position_embeddings = self.position_embeddings(inputs_embeds, position_ids)

        def for_layer(value, layer_idx):
            return value[self.config.layer_types[layer_idx]] if isinstance(value, dict) else value

        all_weights = []
        products = self.depth_attention()
        sources = (self.embed(inputs_embeds),)
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            closed = self.config.num_closed_depth_sources(2 * layer_idx)
            _, attention_weights, mlp_weights, *written = decoder_layer(
                products[2 * layer_idx : 2 * layer_idx + 2],
                *sources,
                attention_mask=for_layer(causal_mask, layer_idx),
                position_embeddings=for_layer(position_embeddings, layer_idx),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            sources = (*sources[:closed], *written)
            all_weights += [attention_weights, mlp_weights]

        # layers may lie on several devices
        sources = tuple(source.to(sources[-1].device) for source in sources)
        hidden_states, output_weights = self.output_read(products[-1].to(sources[-1].device), sources)
        all_weights.append(output_weights)
        if depth_attentions is not None:
            depth_attentions.extend(all_weights)
        if output_depth_attentions is None:
            output_depth_attentions = self.config.output_depth_attentions
        return AttnResModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            depth_attentions=tuple(all_weights) if output_depth_attentions else None,
        )


def with_depth_attentions(forward: Callable, output_class: type[ModelOutput]) -> Callable:
    """The `forward` of a donor's head, with the argument `output_depth_attentions` and outputs that hold them."""

    @wraps(forward)
    @can_return_tuple
    def head_forward(self, *args, output_depth_attentions: bool | None = None, **kwargs) -> output_class:
        if output_depth_attentions is None:
            output_depth_attentions = self.config.output_depth_attentions
        depth_attentions = [] if output_depth_attentions else None
        if output_depth_attentions:
            kwargs["depth_attentions"] = depth_attentions
        outputs = forward(self, *args, return_dict=True, **kwargs)
        return output_class(**outputs, depth_attentions=tuple(depth_attentions) if output_depth_attentions else None)

    parameters = dict(inspect.signature(forward).parameters)
    rest = parameters.pop("kwargs")
    option = inspect.Parameter(
        "output_depth_attentions", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=bool | None
    )
    head_forward.__signature__ = inspect.Signature([*parameters.values(), option, rest], return_annotation=output_class)
    return head_forward


class AttnResHeadMixin(AttnResPreTrainedModelMixin):
    """A donor's head on top of an AttnRes model."""

    model_class: type[AttnResModelMixin]

    def __init__(self, config, attn_res_implementation: str | None = None):
        _select_implementation(config, attn_res_implementation)
        PreTrainedModel.__init__(self, config)  # the donor's constructor would build the donor's model
        setattr(self, self.base_model_prefix, self.model_class(config))
        self.add_head(config)
        self.post_init()


class AttnResForCausalLMMixin(AttnResHeadMixin):
    def add_head(self, config):
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class AttnResDecoderLayer(AttnResDecoderLayerMixin, LlamaDecoderLayer):
    """A Llama layer that reads over depth."""


class AttnResModel(AttnResModelMixin, LlamaModel):
    """The Llama decoder with Attention Residuals."""

    config: AttnResConfig
    layer_class = AttnResDecoderLayer


class AttnResForCausalLM(AttnResForCausalLMMixin, LlamaForCausalLM):
    """[`AttnResModel`] with a language modelling head."""

    config: AttnResConfig
    model_class = AttnResModel
    forward = with_depth_attentions(LlamaForCausalLM.forward, AttnResCausalLMOutputWithPast)


class AttnResForSequenceClassification(AttnResHeadMixin, LlamaForSequenceClassification):
    """[`AttnResModel`] that classifies a sequence by its last token."""

    config: AttnResConfig
    model_class = AttnResModel
    forward = with_depth_attentions(LlamaForSequenceClassification.forward, AttnResSequenceClassifierOutputWithPast)

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


class AttnResForTokenClassification(AttnResHeadMixin, LlamaForTokenClassification):
    """[`AttnResModel`] that classifies each token."""

    config: AttnResConfig
    model_class = AttnResModel
    forward = with_depth_attentions(LlamaForTokenClassification.forward, AttnResTokenClassifierOutput)

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)


class AttnResForQuestionAnswering(AttnResHeadMixin, LlamaForQuestionAnswering):
    """[`AttnResModel`] that finds the span of an answer."""

    config: AttnResConfig
    model_class = AttnResModel
    forward = with_depth_attentions(LlamaForQuestionAnswering.forward, AttnResQuestionAnsweringModelOutput)

    def add_head(self, config):
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


__all__ = [
    "ALL_DEPTH_ATTENTION_FUNCTIONS",
    "DepthAttention",
    "DepthAttentionInterface",
    "eager_depth_attention",
    "AttnResModel",
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
]
