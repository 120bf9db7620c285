# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: F405
"""Decoders of transformers whose residual stream is replaced by attention over depth.

Attention Residuals (Kimi Team, arXiv 2603.15031): every sublayer, attention or MLP, reads a softmax-weighted mix of the
embedding and of what the sublayers before it wrote, instead of their plain sum. Everything that is not the residual
stream is the donor family's own code, imported from transformers.
"""

import inspect
import shutil
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import torch
import transformers.modeling_outputs as donor_outputs
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


try:
    from .configuration_attnres import AttnResConfig, donor_class, replaced_model
    from .depth_attention_attnres import *  # noqa: F403
    from .depth_mixers_attnres import DEPTH_MIXERS
except ImportError:
    if __package__:  # loaded from the Hub: the relative import must work, so the error is real
        raise
    from configuration_attnres import AttnResConfig, donor_class, replaced_model
    from depth_attention_attnres import *  # noqa: F403
    from depth_mixers_attnres import DEPTH_MIXERS


class HiddenStateRecorded:
    """Marks modules whose first output, unless it is None, is an entry of a model's `hidden_states`."""


class OutputRead(DepthRead, HiddenStateRecorded):
    """The read before the final norm."""


class AttnResDecoderLayerMixin(HiddenStateRecorded):
    """A donor's decoder layer that reads sources where the donor's adds to a residual stream.

    The sources of a token are one tuple of tensors `(batch, seq, hidden)`: the embedding, the finished blocks and, at
    the end, the sum of the open block where there is one.
    """

    attention_norm = property(lambda self: self.input_layernorm)
    mlp_norm = property(lambda self: self.post_attention_layernorm)

    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """What attention of a normalised read, with the donor's norms after it, adds to the residual stream."""
        return self.self_attn(hidden_states=hidden_states, **kwargs)[0]

    def transform(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """What the MLP of a normalised read, with the donor's norms after it, adds to the residual stream."""
        return self.mlp(hidden_states)

    def set_place(self, config, layer_idx: int):
        """Tells the layer which of the model it is. What it needs at each call is looked up once."""
        self.layer_idx = layer_idx
        self.depth_row = 2 * layer_idx
        if not hasattr(self, "attention_read"):
            self.attention_read = DepthRead(config, self.depth_row)
            self.mlp_read = DepthRead(config, self.depth_row + 1)
        self.attention_read.set_place(config, self.depth_row)
        self.mlp_read.set_place(config, self.depth_row + 1)
        self.place, self.place_after = self.attention_read.place, DepthPlace.of(config, self.depth_row + 2)

    def num_unchanged(self, sources: Sources) -> int:
        """How many of the `sources` that the layer gets stay as they are; the last may have to be joined."""
        return self.attention_read.implementation.num_unchanged(sources, self.place)

    def forward(
        self,
        *sources_and_products: torch.Tensor,
        shared: Sequence = (NOTHING_READ, NOTHING_READ),
        watched: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple:
        """
        Args:
            sources_and_products: the sources; the products of this layer's two reads. Positional, as re-entrant
                checkpointing sees only positional tensors.
            shared, watched: as in [`DepthAttentionImplementation.read`], for both reads.
            kwargs: what the donor's attention takes.

        Returns:
            What attention reads, or None in the first layer, where it is the first source, or if nobody watches; the
            weights of the two reads, or Nones; the sources but the first `num_unchanged`, with this layer's output.
        """
        *sources, attention_product, mlp_product = sources_and_products
        num_unchanged = self.num_unchanged(sources)
        watched = watched or has_forward_hooks(self)
        attention_input, attention_weights, normed, sources = self.attention_read(
            attention_product, sources, NormOfRead(self.attention_norm), shared[0], watched
        )
        sources = (*sources, self.attend(normed, **kwargs))
        _, mlp_weights, normed, sources = self.mlp_read(
            mlp_product, sources, NormOfRead(self.mlp_norm), shared[1], watched
        )
        sources = (*sources, self.transform(normed, **kwargs))
        if self.gradient_checkpointing and self.training:  # what a layer returns is kept until the backward pass
            sources = self.mlp_read.implementation.joined(sources, self.place_after)
        return attention_input if self.layer_idx else None, attention_weights, mlp_weights, *sources[num_unchanged:]


@dataclass
class AttnResModelOutputWithPast(donor_outputs.BaseModelOutputWithPast):
    """`depth_attentions`: the weights of all 2 * num_hidden_layers + 1 reads, `(batch, num_sources, seq)` each, which
    sum to 1 over the sources."""

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResCausalLMOutputWithPast(donor_outputs.CausalLMOutputWithPast):
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResSequenceClassifierOutputWithPast(donor_outputs.SequenceClassifierOutputWithPast):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResTokenClassifierOutput(donor_outputs.TokenClassifierOutput):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResQuestionAnsweringModelOutput(donor_outputs.QuestionAnsweringModelOutput):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


class AttnResPreTrainedModelMixin:
    """What models and heads of every family share."""

    # as in the configuration: a plan's stage hands on one tensor
    _pp_plan = None

    def __init__(self, config, attn_res_implementation: str | None = None):
        self.prepare_config(config, attn_res_implementation)
        super().__init__(config)

    @classmethod
    def prepare_config(cls, config, attn_res_implementation: str | None):
        if config.model_type != cls.config_class.model_type:  # the class differs in remote code
            cls.config_class.check_model_type(config.model_type)
            name = cls.config_class.__name__
            raise ValueError(f"{cls.__name__} needs an {name}; make it of a donor's with {name}(**config.to_dict()).")
        config.validate_attn_res()
        name = attn_res_implementation or config._attn_res_implementation or DepthAttentionInterface.default
        ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(name)
        config._attn_res_implementation = name

    def set_attn_res_implementation(self, attn_res_implementation: str):
        """Switches the implementation of depth attention, a key of `ALL_DEPTH_ATTENTION_FUNCTIONS`.

        Raises:
            ValueError: the name is unknown; the message lists the known ones.
        """
        ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(attn_res_implementation)
        self.config._attn_res_implementation = attn_res_implementation
        for module in self.modules():
            if isinstance(module, DepthRead):
                module.set_implementation(self.config)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DepthMixer):
            module.reset_parameters()

    # transformers looks for these two abilities in the source file of a class, here that of the donor
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return donor_class(cls)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return donor_class(cls)._can_set_experts_implementation()

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        if getattr(distributed_config, "pp_size", 1) > 1:  # whose stages hand on one source, and no plan tells
            raise ValueError(f"{cls.__name__} has no pipeline plan (pp_size): use tensor parallelism or FSDP.")
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def enable_adapters(self):
        """As in transformers, which leaves off what adapters hold in full (`modules_to_save`): depth attention."""
        super().enable_adapters()
        for module in self.modules():
            if type(module).__name__ == "ModulesToSaveWrapper":  # of PEFT, which need not be installed
                module.enable_adapters(enabled=True)

    # transformers' own copying enters only the saved class, under the name that FSDP gave it: see save_pretrained
    is_remote_code = classmethod(lambda cls: False)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers; the folder also gets the code files, so that it loads without this project, and loses the
        weights that the new ones replace. Until all are written it stays as it was."""
        self.base_model.check_layers()
        self.config.auto_map = self.config.hub_classes()
        folder = Path(save_directory)
        if folder.is_file() or not self.should_save_on_this_rank(is_main_process):
            return super().save_pretrained(folder, is_main_process=is_main_process, **kwargs)
        with replaced_model(folder, kwargs.get("variant")) as written:
            for file in self.config_class.hub_files():
                shutil.copyfile(file, written / file.name)
            target = folder if kwargs.get("distributed_checkpoint") else written  # all processes write to that one
            super().save_pretrained(target, **{"repo_id": folder.absolute().name, **kwargs})

    # all files of a save are new to a push, the code files too
    _get_files_timestamps = staticmethod(lambda working_dir: {})


class ReceivedWeights:
    """What a head gets of the model under it besides that model's outputs. Not a list, which wrappers would copy."""

    weights: tuple[torch.Tensor, ...] | None = None


class AttnResModelMixin(AttnResPreTrainedModelMixin):
    """A donor's decoder that carries sources instead of hidden states from layer to layer."""

    layer_class: type[AttnResDecoderLayerMixin]
    stage = slice(0, None)  # the layers of a pipeline's stage
    take_over = hand_on = staticmethod(tuple)  # what a stage makes of its input and of the sources of the next stage

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # One recorder, as donors have, so that hidden states can be selected by index. It takes the first entry, the
        # embedding, from the first argument of the first layer.
        recorder = OutputRecorder(HiddenStateRecorded, index=0)
        cls._can_record_outputs = {**(getattr(cls, "_can_record_outputs", None) or {}), "hidden_states": recorder}
        if "layer_class" in cls.__dict__:
            cls._no_split_modules = [cls.layer_class.__name__]

    def post_init(self):
        # The donor's constructor calls this last. Its layers differ from ours in nothing but methods, so they change
        # their class instead of being built twice, and depth attention joins before the weights are initialised.
        for layer_idx, layer in enumerate(self.layers):
            layer.__class__ = self.layer_class
            layer.set_place(self.config, layer_idx)
        self.depth_attention = DEPTH_MIXERS[self.config.attn_res_mode](self.config)
        self.output_read = OutputRead(self.config, self.config.num_depth_reads - 1)
        kept = getattr(self, "_keep_in_fp32_modules_strict", None) or ()
        self._keep_in_fp32_modules_strict = {*kept, "depth_attention"}
        super().post_init()

    def __setattr__(self, name, value):
        if name == "layers" and hasattr(self, "depth_attention") and isinstance(value, nn.ModuleList):
            self.place_layers(value)
        super().__setattr__(name, value)

    def place_layers(self, layers: nn.ModuleList):
        """Gives depth attention the rows of the `layers` that the model is about to get, of which some may be gone,
        copies (which get copies of the rows) or in another order.

        Raises:
            ValueError: a layer is in the list twice, or has no rows here.
        """
        first_rows = [getattr(layer, "depth_row", -1) for layer in layers]
        num_rows = self.output_read.place.row
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError("A layer can't be in a model twice, as it has one place in it: use copy.deepcopy(layer).")
        if not all(0 <= row < num_rows for row in first_rows):
            raise ValueError("Layers must be this model's or copies of them: others have no rows in depth attention.")
        rows = [row for first in first_rows for row in (first, first + 1)]
        if rows == list(range(num_rows)):
            return
        for module in self.depth_attention.modules():
            if isinstance(module, DepthMixer):
                module.keep_rows(rows)
        for layer_idx, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):  # its place in the cache
                    module.layer_idx = layer_idx
            layer.set_place(self.config, layer_idx)
        self.output_read.set_place(self.config, len(rows))

    def check_layers(self):
        """Raises a `ValueError` if layers have changed without [`place_layers`]; those at the end may be missing."""
        rows, first = [layer.depth_row for layer in list(self.layers)[self.stage]], 2 * self.stage.start
        if rows != list(range(first, first + 2 * len(rows), 2)) or first + 2 * len(rows) > self.output_read.place.row:
            raise ValueError(
                "The layers were changed in place: give the model a new list, model.layers = ModuleList([...])."
            )

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """The first source, from the token embeddings."""
        return inputs_embeds

    def create_masks(self, inputs_embeds, attention_mask, past_key_values, position_ids):
        """What the layers' attention takes as `attention_mask`; a dictionary if it depends on the layer type."""
        if isinstance(attention_mask, dict):
            return attention_mask
        return create_masks_for_generate(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)

    def position_embeddings(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor):
        """What the layers' attention takes as `position_embeddings`; a dictionary if it depends on the layer type."""
        return self.rotary_emb(inputs_embeds, position_ids=position_ids)

    def open_block(self, block: list, products: torch.Tensor, sources: Sources, shared, watched: bool) -> tuple:
        """The sources as the first layer of a `block` takes them, and what its reads, with `products`, share."""
        place, implementation = block[0].place, self.output_read.implementation
        if torch.is_grad_enabled():  # what layers hand on is kept, and the sum is one source for all that read it
            sources = implementation.joined(sources, place)
        is_open = place.num_sources > place.num_closed_sources  # already, in another stage
        if is_open or self.training and any(layer.gradient_checkpointing for layer in block):
            return sources, len(products) * [shared]  # what reads share would be kept for the backward pass

        def norms() -> tuple:
            norm_of_output = () if self.stage.stop else (self.norm,)
            return *norm_of_output, *(norm for layer in block for norm in (layer.attention_norm, layer.mlp_norm))

        return implementation.open_block(place, products, sources, norms, shared, watched)

    def read_over_depth(self, sources: Sources, with_weights: bool, layer_kwargs: Callable) -> tuple:
        """The normalised output of the layers (or what the stage hands on) and the weights of all reads, or Nones;
        `sources` are those of the first layer, `layer_kwargs(layer_idx)` what a layer's attention takes."""
        self.check_layers()
        stage = range(len(self.layers))[: self.config.num_hidden_layers][self.stage]  # the last may be left out
        layers, output_read = list(self.layers)[: stage.stop], self.output_read
        watched = with_weights or any(has_forward_hooks(layer) for layer in layers)
        eps, products = output_read.place.eps, self.depth_attention()
        sources, products, shared = output_read.implementation.begin(sources, products, eps, watched)
        product_of_read, all_weights = tuple(products), []
        block_size = stage.stop if isinstance(shared, TokenReads) else self.config.attn_res_block_size
        for start in range(stage.start - stage.start % block_size, stage.stop, block_size):
            first = max(start, stage.start)
            block = layers[first : start + block_size]
            end = 2 * (first + len(block))
            end += end == output_read.place.row  # the last block shares with the output's read
            sources, shares = self.open_block(block, products[2 * first : end], sources, shared, watched)
            for layer_idx, layer in enumerate(block, start=first):
                row, row_in_block = 2 * layer_idx, 2 * (layer_idx - first)
                num_unchanged = layer.num_unchanged(sources)
                _, attention_weights, mlp_weights, *written = layer(
                    *sources,
                    *product_of_read[row : row + 2],
                    shared=shares[row_in_block : row_in_block + 2],
                    watched=with_weights,
                    **layer_kwargs(layer_idx),
                )
                sources = (*sources[:num_unchanged], *written)
                all_weights += [attention_weights, mlp_weights]

        if 2 * stage.stop < output_read.place.row:  # whose place is that after all layers
            sources = output_read.implementation.joined(sources, layers[-1].place_after)
        if self.stage.stop:
            return self.hand_on(sources), tuple(all_weights)
        device = sources[-1].device  # layers may lie on several devices
        sources = tuple(source.to(device) for source in sources)
        output_shared = (shares[2 * len(block) :] or [shared])[0].to(device)
        _, output_weights, hidden_states, _ = output_read(
            product_of_read[-1].to(device), sources, NormOfRead(self.norm), output_shared, with_weights
        )
        return hidden_states, (*all_weights, output_weights)

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
        depth_attentions: ReceivedWeights | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AttnResModelOutputWithPast:
        """
        The arguments of the donor's forward, and:

        Args:
            output_depth_attentions: whether the outputs hold `depth_attentions`, the weights of all reads.
            depth_attentions: receives these weights, for heads, whose forward is the donor's.
        A pipeline's stage takes the sources of its first layer as `inputs_embeds`, and hands on the next one's.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        sources = self.take_over(inputs_embeds) if self.stage.start else [self.embed(inputs_embeds).contiguous()]
        inputs_embeds = sources[0]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_seen_tokens
        causal_mask = self.create_masks(inputs_embeds, attention_mask, past_key_values, position_ids)
        position_embeddings = self.position_embeddings(inputs_embeds, position_ids)
        kwargs.update(position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache)

        def layer_kwargs(layer_idx: int) -> dict:
            own = causal_mask, position_embeddings
            mask, positions = (v[self.config.layer_types[layer_idx]] if isinstance(v, dict) else v for v in own)
            return {"attention_mask": mask, "position_embeddings": positions, **kwargs}

        if output_depth_attentions is None:
            output_depth_attentions = self.config.output_depth_attentions
        with_weights = output_depth_attentions or depth_attentions is not None
        hidden_states, weights = self.read_over_depth(sources, with_weights, layer_kwargs)
        if with_weights and weights[-1] is None:
            raise ValueError(
                f"The implementation {self.config._attn_res_implementation!r} of depth attention returns no weights; "
                "choose another, such as two_phase, or leave out output_depth_attentions."
            )
        if depth_attentions is not None:
            depth_attentions.weights = weights
        return AttnResModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            depth_attentions=weights if output_depth_attentions else None,
        )


def with_depth_attentions(forward: Callable, output_class: type[donor_outputs.ModelOutput]) -> Callable:
    """The `forward` of a donor's head, with the argument `output_depth_attentions` and outputs that hold them."""

    @wraps(forward)
    @can_return_tuple
    def head_forward(self, *args, output_depth_attentions: bool | None = None, **kwargs) -> output_class:
        if output_depth_attentions is None:
            output_depth_attentions = self.config.output_depth_attentions
        received = ReceivedWeights()
        if output_depth_attentions:
            kwargs["depth_attentions"] = received
        outputs = forward(self, *args, return_dict=True, **kwargs)
        return output_class(**outputs, depth_attentions=received.weights)

    head_forward.__doc__ = f"""{forward.__doc__ or ""}
        output_depth_attentions (`bool`, *optional*):
            Whether the outputs hold `depth_attentions`, the weights of all reads: a tuple of 2 * num_hidden_layers + 1
            tensors `(batch, num_sources, seq)`.
        """
    parameters = dict(inspect.signature(forward).parameters)
    rest = parameters.pop("kwargs")
    kind = inspect.Parameter.KEYWORD_ONLY
    option = inspect.Parameter("output_depth_attentions", kind, default=None, annotation=bool | None)
    head_forward.__signature__ = inspect.Signature([*parameters.values(), option, rest], return_annotation=output_class)
    return head_forward


class AttnResHeadMixin(AttnResPreTrainedModelMixin):
    """A donor's head on top of an AttnRes model."""

    model_class: type[AttnResModelMixin]
    output_class: type[donor_outputs.ModelOutput]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # transformers may build a head's class once more from its dictionary, in which the forward is wrapped already
        if "model_class" in cls.__dict__ and "forward" not in cls.__dict__:
            cls._no_split_modules = cls.model_class._no_split_modules
            cls.forward = with_depth_attentions(cls.forward, cls.output_class)

    def __init__(self, config, attn_res_implementation: str | None = None):
        self.prepare_config(config, attn_res_implementation)
        PreTrainedModel.__init__(self, config)  # the donor's constructor would build the donor's model
        setattr(self, self.base_model_prefix, self.model_class(config))
        self.add_head(config)
        self.post_init()


@dataclass
class AttnResGenerateDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """`depth_attentions`: for each generated token those of [`AttnResModelOutputWithPast`], whose `seq` is the prompt's
    length for the first token, then 1."""

    depth_attentions: tuple[tuple[torch.FloatTensor, ...], ...] | None = None


@dataclass
class AttnResGenerateBeamDecoderOnlyOutput(GenerateBeamDecoderOnlyOutput):
    """`depth_attentions` as those of [`AttnResGenerateDecoderOnlyOutput`], of `batch * num_beams` sequences in the
    order in which they were run; `beam_indices` tells which of them became a result."""

    depth_attentions: tuple[tuple[torch.FloatTensor, ...], ...] | None = None


GENERATED_DEPTH_ATTENTIONS = ContextVar("a list that receives those of each step, if they are asked for", default=None)


class AttnResForCausalLMMixin(AttnResHeadMixin):
    output_class = AttnResCausalLMOutputWithPast

    def generate(self, *args, output_depth_attentions: bool | None = None, **kwargs):
        """As in transformers; with `output_depth_attentions` and `return_dict_in_generate` the result is an
        [`AttnResGenerateDecoderOnlyOutput`] or, with beams, an [`AttnResGenerateBeamDecoderOnlyOutput`].

        Raises:
            ValueError: the weights are asked of assisted generation, whose steps are of several tokens.
        """
        if output_depth_attentions is None:
            output_depth_attentions = self.config.output_depth_attentions
        if output_depth_attentions:
            kwargs["output_depth_attentions"] = True
        steps = [] if output_depth_attentions else None
        token = GENERATED_DEPTH_ATTENTIONS.set(steps)
        try:
            outputs = super().generate(*args, **kwargs)
        finally:
            GENERATED_DEPTH_ATTENTIONS.reset(token)
        if steps is None or not isinstance(outputs, donor_outputs.ModelOutput):
            return outputs
        with_beams = isinstance(outputs, GenerateBeamDecoderOnlyOutput)
        output_class = AttnResGenerateBeamDecoderOnlyOutput if with_beams else AttnResGenerateDecoderOnlyOutput
        return output_class(**outputs, depth_attentions=tuple(steps))

    def _update_model_kwargs_for_generation(self, outputs, *args, **kwargs):
        if (steps := GENERATED_DEPTH_ATTENTIONS.get()) is not None:
            steps.append(outputs.depth_attentions)
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        if GENERATED_DEPTH_ATTENTIONS.get() is not None:
            raise ValueError("Assisted generation doesn't return depth_attentions: leave out output_depth_attentions.")
        return super()._assisted_decoding(*args, **kwargs)

    def add_head(self, config):
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class AttnResDecoderLayer(AttnResDecoderLayerMixin, llama.LlamaDecoderLayer):
    """A Llama layer that reads over depth."""


class AttnResModel(AttnResModelMixin, llama.LlamaModel):
    """The Llama decoder with Attention Residuals."""

    config: AttnResConfig
    layer_class = AttnResDecoderLayer


class AttnResForCausalLM(AttnResForCausalLMMixin, llama.LlamaForCausalLM):
    """[`AttnResModel`] with a language modelling head."""

    config: AttnResConfig
    model_class = AttnResModel


class AttnResForSequenceClassification(AttnResHeadMixin, llama.LlamaForSequenceClassification):
    """[`AttnResModel`] that classifies a sequence by its last token."""

    config: AttnResConfig
    model_class = AttnResModel
    output_class = AttnResSequenceClassifierOutputWithPast

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


class AttnResForTokenClassification(AttnResHeadMixin, llama.LlamaForTokenClassification):
    """[`AttnResModel`] that classifies each token."""

    config: AttnResConfig
    model_class = AttnResModel
    output_class = AttnResTokenClassifierOutput

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)


class AttnResForQuestionAnswering(AttnResHeadMixin, llama.LlamaForQuestionAnswering):
    """[`AttnResModel`] that finds the span of an answer."""

    config: AttnResConfig
    model_class = AttnResModel
    output_class = AttnResQuestionAnsweringModelOutput

    def add_head(self, config):
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


register_checkpoint_names(AttnResConfig)


__all__ = [name for name in globals() if name.startswith("AttnRes") and name.endswith(("Model", "LM", "tion", "ing"))]
