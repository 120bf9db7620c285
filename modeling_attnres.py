# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
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
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.masking_utils import create_masks_for_generate
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
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


try:
    from .configuration_attnres import AttnResConfig
    from .depth_attention_attnres import (
        ALL_DEPTH_ATTENTION_FUNCTIONS,
        ClosedDepthRead,
        DepthAttentionInterface,
        TokenReads,
        TwoPhaseDepthAttention,
        can_fuse_norm,
        fixed_depth_mix,
        fused_rms_norm,
        has_forward_hooks,
        write,
    )
except ImportError:
    if __package__:  # loaded from the Hub: the relative import must work, so the error is real
        raise
    from configuration_attnres import AttnResConfig
    from depth_attention_attnres import (
        ALL_DEPTH_ATTENTION_FUNCTIONS,
        ClosedDepthRead,
        DepthAttentionInterface,
        TokenReads,
        TwoPhaseDepthAttention,
        can_fuse_norm,
        fixed_depth_mix,
        fused_rms_norm,
        has_forward_hooks,
        write,
    )


class DepthParameters(nn.Module):
    """Parameters that stay in float32: `model.to(torch.bfloat16)` and the like move them but don't round them."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(move, recurse)

    @staticmethod
    def rows_of(parameter: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """A copy of what belongs to the reads with these `rows`, two of each layer that stays, and to the last read."""
        return parameter[[*rows, -1]]

    def keep_rows(self, rows: Sequence[int]):
        for name, parameter in list(self.named_parameters(recurse=False)):
            kept = nn.Parameter(self.rows_of(parameter.detach(), rows), parameter.requires_grad)
            kept._is_hf_initialized = getattr(parameter, "_is_hf_initialized", False)
            setattr(self, name, kept)


class DepthAttention(DepthParameters):
    """The learned queries and key norm gains of all reads of a model, kept in float32.

    Zero queries, the initial value, weight all sources equally. Returns the products `query * key_norm`
    `(num_depth_reads, hidden)`: fresh float32 tensors, as a sharded parameter may be freed after this module's forward.

    As a group of torch's `fully_shard` has one dtype, it gets one of its own in a model of another dtype:

    ```python
    fully_shard(model.model.depth_attention)
    fully_shard(model)
    ```
    """

    def __init__(self, config):
        super().__init__()
        shape = (config.num_depth_reads, config.hidden_size)
        self.query = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self.key_norm = nn.Parameter(torch.ones(shape, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.to(dtype) * self.key_norm.to(dtype)


class DepthScalars(DepthParameters):
    """What denseformer mode has in place of depth attention: the learned weight of each source in each read."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.num_depth_reads, config.num_depth_reads, dtype=torch.float32))

    @staticmethod
    def rows_of(parameter: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return DepthParameters.rows_of(parameter, rows)[:, [0, *(row + 1 for row in rows)]]  # each is a source too

    def forward(self) -> torch.Tensor:
        return self.weight.clone()


class RowsOfLayers(ConversionOps):
    """Loads and saves the rows of depth attention that belong to the layers of a model, the checkpoint's first ones,
    and the last row, that of the output."""

    @torch.no_grad
    def convert(self, input_dict: dict, source_patterns, target_patterns, *, model, config, full_layer_name, **kwargs):
        (values,) = input_dict.values()
        parameter = values[0] if isinstance(values, list) else values
        if hasattr(model.get_parameter_or_buffer(full_layer_name), "device_mesh"):  # comes in pieces
            return {target_patterns[0]: parameter}
        num_reads = config.num_depth_reads
        if len(parameter) < num_reads:
            raise ValueError(
                f"{full_layer_name} has {len(parameter)} rows, those of {len(parameter) // 2} layers, and "
                f"num_hidden_layers is {config.num_hidden_layers}: there is nothing from which the others could get "
                "theirs. Set num_hidden_layers to the number of layers, or fewer."
            )
        if len(parameter) > num_reads:
            module = model.get_submodule(full_layer_name.rpartition(".")[0])
            parameter = module.rows_of(parameter, range(num_reads - 1))
        return {target_patterns[0]: parameter}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def register_checkpoint_names(config_class: type):
    """Checkpoints keep the donor's tensor names, which for some families (experts) are not those of the modules; and
    may have more layers than are loaded."""
    mapping = get_checkpoint_conversion_mapping(config_class.donor_config_class().model_type) or []
    mapping = [*mapping, WeightConverter("depth_attention.", "depth_attention.", [RowsOfLayers()])]
    register_checkpoint_conversion_mapping(config_class.model_type, mapping, overwrite=True)


class NormOfRead:
    """A norm as an argument of a read: what wraps the read, as accelerate does, moves modules that it sees to a device,
    which it can't do to one that lies elsewhere or on disk."""

    def __init__(self, module: nn.Module):
        self.module = module


class DepthRead(nn.Module):
    """Everything between two sublayers: the read of `row`, in the place that it has in a model. Holds no parameters.

    What the sublayer before has put out is handed over as it is, and joins the sources here.
    """

    def __init__(self, config, row: int):
        super().__init__()
        self.set_place(config, row)
        self.set_implementation(config)

    def set_place(self, config, row: int):
        self.row = row
        self.num_closed_sources = config.num_closed_depth_sources(row)
        self.extends = row > 0 and config.extends_open_depth_source(row - 1)
        self.eps = config.attn_res_norm_eps
        self.scale = config.num_depth_sources(row) if config.attn_res_sum_scale else 1

    def set_implementation(self, config):
        if config.attn_res_mode == "denseformer":
            self.depth_attention = fixed_depth_mix
        else:
            self.depth_attention = ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(config._attn_res_implementation)
        self.has_steps = isinstance(self.depth_attention, TwoPhaseDepthAttention)

    def forward(
        self,
        product: torch.Tensor,
        sources: tuple[torch.Tensor, ...],
        output: torch.Tensor | None,
        norm: nn.Module | NormOfRead,
        closed_read: ClosedDepthRead | TokenReads | None = None,
        watched: bool = False,
    ) -> tuple:
        """
        Args:
            product: `(hidden,)`, the read's query times its key norm gain.
            sources: tensors `(batch, seq, hidden)`.
            output: `(batch, seq, hidden)`, which the sublayer before has put out, or None if it is in the sources.
            norm: what is applied to the result before the sublayer gets it.
            closed_read: what the read has got from the first sources, if anything, or what it needs for a single token.
            watched: whether the read itself and its weights are needed, not only what the norm makes of it.

        Returns:
            The read and its weights `(batch, num_sources, seq)`, Nones if they aren't needed and weren't computed; the
            read after the norm; the sources with `output`.
        """
        watched = watched or has_forward_hooks(self)
        norm = norm.module if isinstance(norm, NormOfRead) else norm
        if watched and isinstance(closed_read, ClosedDepthRead) and closed_read.weights is None:
            closed_read = None
        if isinstance(closed_read, TokenReads):
            if product.is_cpu and not watched:  # layers may lie on several devices
                return closed_read.step(self, product, sources, output, norm)
            closed_read = None
        if self.has_steps:
            step = self.depth_attention.step(self, product, sources, output, norm, closed_read, watched)
            if step is not None:
                return step
        sources = write(sources, output, self.extends)
        if closed_read is None:
            mixed, weights = self.depth_attention(sources, product, self.eps, self.scale)
        else:
            mixed, weights = self.depth_attention.read(closed_read, sources, product, self.eps, self.scale)
        normed = fused_rms_norm(norm, mixed) if self.has_steps else norm(mixed)
        return mixed, weights, normed, sources


class HiddenStateRecorded:
    """Marks modules whose first output, unless it is None, is an entry of a model's `hidden_states`."""


class OutputRead(DepthRead, HiddenStateRecorded):
    """The read before the final norm."""


class AttnResDecoderLayerMixin(HiddenStateRecorded):
    """A donor's decoder layer that reads sources where the donor's adds to a residual stream.

    The sources of a token are one tuple of tensors `(batch, seq, hidden)`: the embedding, the finished blocks and, at
    the end, the sum of the open block where there is one.
    """

    @property
    def attention_norm(self) -> nn.Module:
        return self.input_layernorm

    @property
    def mlp_norm(self) -> nn.Module:
        return self.post_attention_layernorm

    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """What attention of a normalised read, with the donor's norms after it, adds to the residual stream."""
        attn_output, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        return attn_output

    def transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
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
        self.output_extends = config.extends_open_depth_source(2 * layer_idx + 1)
        self.opens_block = layer_idx % config.attn_res_block_size == 0
        self.num_closed_before = config.num_closed_depth_sources(2 * layer_idx - 1)

    def num_unchanged_sources(self, output: torch.Tensor | None) -> int:
        """How many sources neither this layer changes nor the `output` of the layer before, if it gets that."""
        return self.num_closed_before + (self.opens_block and output is None)

    def forward(
        self,
        *sources_and_products: torch.Tensor | None,
        closed_reads: tuple[ClosedDepthRead | None, ...] = (None, None),
        watched: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple:
        """
        Args:
            sources_and_products: the sources; the output of the layer before, or None if it is among them; the products
                `(hidden,)` of this layer's two reads. Positional, as re-entrant checkpointing sees only positional
                tensors.
            closed_reads: what the two reads have got from the sources before this layer's block, if anything.
            watched: whether the depth weights are needed.
            kwargs: what the donor's attention takes.

        Returns:
            What attention reads, or None in the first layer, where it is the first source, or if nobody watches; the
            depth weights of the two reads `(batch, num_sources, seq)`, or Nones; the sources that are new or changed,
            all but the first `num_unchanged_sources`; and this layer's output, or None if it is among them.
        """
        *sources, output, attention_product, mlp_product = sources_and_products
        num_unchanged = self.num_unchanged_sources(output)
        watched = watched or has_forward_hooks(self)
        attention_input, attention_weights, normed, sources = self.attention_read(
            attention_product, sources, output, NormOfRead(self.attention_norm), closed_reads[0], watched
        )
        output = self.attend(normed, **kwargs)
        _, mlp_weights, normed, sources = self.mlp_read(
            mlp_product, sources, output, NormOfRead(self.mlp_norm), closed_reads[1], watched
        )
        output = self.transform(normed)
        if self.gradient_checkpointing and self.training:  # what a layer returns is kept until the backward pass
            sources, output = write(sources, output, self.output_extends), None
        new_sources = sources[num_unchanged:]
        return attention_input if self.layer_idx else None, attention_weights, mlp_weights, *new_sources, output


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
            raise ValueError(
                f"{cls.__name__} needs an {cls.config_class.__name__}; make it of a donor's with "
                f"{cls.config_class.__name__}(**config.to_dict())."
            )
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
        if isinstance(module, DepthAttention):
            init.zeros_(module.query)
            init.ones_(module.key_norm)
        elif isinstance(module, DepthScalars):
            init.ones_(module.weight)

    # transformers looks for these two abilities in the source file of a class, here that of the donor
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return _donor_class(cls)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return _donor_class(cls)._can_set_experts_implementation()

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        # transformers splits layers into stages without a look at the plan
        if getattr(distributed_config, "pp_size", 1) > 1:
            raise ValueError(
                f"{cls.__name__} has no pipeline parallelism: a stage hands on one tensor, and the layers after it "
                "read all sources. Use pp_size=1 with tensor parallelism or FSDP."
            )
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def enable_adapters(self):
        """As in transformers, which leaves off what adapters hold in full (`modules_to_save`): depth attention."""
        super().enable_adapters()
        for module in self.modules():
            if type(module).__name__ == "ModulesToSaveWrapper":  # of PEFT, which need not be installed
                module.enable_adapters(enabled=True)

    @classmethod
    def is_remote_code(cls) -> bool:
        # transformers' own copying enters only the saved class, under the name that FSDP gave it: see save_pretrained
        return False

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers; the folder also gets the code files, so that it loads without this project."""
        self.base_model.check_layers()
        self.config.auto_map = self.config.hub_classes()
        if is_main_process and not Path(save_directory).is_file():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for code_file in self.config_class.hub_files():
                shutil.copyfile(code_file, Path(save_directory) / code_file.name)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


def _donor_class(cls: type) -> type:
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))


class ReceivedWeights:
    """What a head gets of the model under it besides that model's outputs. Not a list, which wrappers would copy."""

    weights: tuple[torch.Tensor, ...] | None = None


class AttnResModelMixin(AttnResPreTrainedModelMixin):
    """A donor's decoder that carries sources instead of hidden states from layer to layer."""

    layer_class: type[AttnResDecoderLayerMixin]

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
        depth_class = DepthScalars if self.config.attn_res_mode == "denseformer" else DepthAttention
        self.depth_attention = depth_class(self.config)
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
        num_rows = self.output_read.row
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError("A layer can't be in a model twice, as it has one place in it: use copy.deepcopy(layer).")
        if not all(0 <= row < num_rows for row in first_rows):
            raise ValueError("Layers must be this model's or copies of them: others have no rows in depth attention.")
        rows = [row for first in first_rows for row in (first, first + 1)]
        if rows == list(range(num_rows)):
            return
        for module in self.depth_attention.modules():
            if isinstance(module, DepthParameters):
                module.keep_rows(rows)
        for layer_idx, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):  # its place in the cache
                    module.layer_idx = layer_idx
            layer.set_place(self.config, layer_idx)
        self.output_read.set_place(self.config, len(rows))

    def check_layers(self):
        """Raises a `ValueError` if layers have changed without [`place_layers`]; those at the end may be missing."""
        rows = [layer.depth_row for layer in self.layers]
        if rows != list(range(0, 2 * len(rows), 2)) or 2 * len(rows) > self.output_read.row:
            raise ValueError(
                "The list of layers has been changed in place, so that depth attention doesn't know with which of its "
                "rows they read. Give the model a new list, as in model.layers = torch.nn.ModuleList([...])."
            )

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """The first source, from the token embeddings."""
        return inputs_embeds

    def position_embeddings(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor):
        """What the layers' attention takes as `position_embeddings`; a dictionary if it depends on the layer type."""
        return self.rotary_emb(inputs_embeds, position_ids=position_ids)

    def open_block(
        self,
        block: list,
        products: torch.Tensor,
        sources: tuple[torch.Tensor, ...],
        output: torch.Tensor | None,
        watched: bool,
    ) -> tuple:
        """The sources and the output of the layer before, as the first layer of a `block` takes them; and what the
        block's reads, with `products`, get from the sources that are closed by then: Nones if each read does it itself.
        """
        depth_attention = self.output_read.depth_attention
        if torch.is_grad_enabled():  # what layers hand on is kept, and the sum is one source for all that read it
            sources, output = write(sources, output, block[0].attention_read.extends), None
        each_itself = sources, output, products.shape[0] * [None]
        if not isinstance(depth_attention, TwoPhaseDepthAttention):
            return each_itself
        if self.training and any(layer.gradient_checkpointing for layer in block):
            return each_itself  # closed reads would be kept for the backward pass
        if not depth_attention.batches(sources if output is None else (*sources, output), products):
            return each_itself
        sources = write(sources, output, block[0].attention_read.extends)
        device = sources[-1].device  # earlier layers may lie on others
        closed, products = [v.to(device) for v in sources], products.to(device)
        norms = (self.norm, *(norm for layer in block for norm in (layer.attention_norm, layer.mlp_norm)))
        rounded = not watched and all(map(can_fuse_norm, norms))
        return sources, None, depth_attention.closed_reads(closed, products, self.output_read.eps, watched, rounded)

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

        if output_depth_attentions is None:
            output_depth_attentions = self.config.output_depth_attentions
        with_weights = output_depth_attentions or depth_attentions is not None
        all_weights = []
        self.check_layers()
        layers = list(self.layers)[: self.config.num_hidden_layers]
        block_size = self.config.attn_res_block_size
        products = self.depth_attention()
        embedding, output = self.embed(inputs_embeds), None
        watched = with_weights or any(has_forward_hooks(layer) for layer in layers)
        depth_attention, token_reads = self.output_read.depth_attention, None
        if isinstance(depth_attention, TwoPhaseDepthAttention):
            prepared = depth_attention.prepare(embedding, products, self.output_read.eps, watched)
            embedding, products, token_reads = prepared
        sources, product_of_read = (embedding,), products.unbind(0)
        closed_reads = (2 * block_size + 1) * [token_reads]
        with_output_read = token_reads is not None
        for layer_idx, decoder_layer in enumerate(layers):
            row, row_in_block = 2 * layer_idx, 2 * (layer_idx % block_size)
            if row_in_block == 0 and token_reads is None:
                block = layers[layer_idx : layer_idx + block_size]
                end = 2 * (layer_idx + len(block))
                with_output_read = end + 1 == products.shape[0]  # the model's last block
                of_block = products[row : end + with_output_read]
                sources, output, closed_reads = self.open_block(block, of_block, sources, output, watched)
            unchanged = sources[: decoder_layer.num_unchanged_sources(output)]
            _, attention_weights, mlp_weights, *written, output = decoder_layer(
                *sources,
                output,
                *product_of_read[row : row + 2],
                closed_reads=closed_reads[row_in_block : row_in_block + 2],
                watched=with_weights,
                attention_mask=for_layer(causal_mask, layer_idx),
                position_embeddings=for_layer(position_embeddings, layer_idx),
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            sources = (*unchanged, *written)
            all_weights += [attention_weights, mlp_weights]

        # layers may lie on several devices
        device = (sources[-1] if output is None else output).device
        sources = tuple(source.to(device) for source in sources)
        closed_read = closed_reads[-1] if with_output_read else None  # fewer layers than there are may have run
        if isinstance(closed_read, ClosedDepthRead):
            closed_read = closed_read.to(device)
        _, output_weights, hidden_states, _ = self.output_read(
            product_of_read[-1].to(device), sources, output, NormOfRead(self.norm), closed_read, with_weights
        )
        all_weights.append(output_weights)
        if with_weights and output_weights is None:
            raise ValueError(
                f"The implementation {self.config._attn_res_implementation!r} of depth attention returns no weights; "
                "choose another, such as two_phase, or leave out output_depth_attentions."
            )
        if depth_attentions is not None:
            depth_attentions.weights = tuple(all_weights)
        return AttnResModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            depth_attentions=tuple(all_weights) if output_depth_attentions else None,
        )


OUTPUT_DEPTH_ATTENTIONS_DOC = """
        output_depth_attentions (`bool`, *optional*):
            Whether the outputs hold `depth_attentions`, the weights of all reads: a tuple of 2 * num_hidden_layers + 1
            tensors `(batch, num_sources, seq)`.
"""


def with_depth_attentions(forward: Callable, output_class: type[ModelOutput]) -> Callable:
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

    head_forward.__doc__ = (forward.__doc__ or "") + OUTPUT_DEPTH_ATTENTIONS_DOC
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
    output_class: type[ModelOutput]

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
    """`depth_attentions`: for each generated token the weights of all reads, a tuple of 2 * num_hidden_layers + 1
    tensors `(batch, num_sources, seq)`. `seq` is the prompt's length for the first token, then 1."""

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
        """As in transformers, and:

        Args:
            output_depth_attentions: whether the outputs hold `depth_attentions`, the weights of all reads at each step,
                if `return_dict_in_generate` is set: an [`AttnResGenerateDecoderOnlyOutput`] or, with beams, an
                [`AttnResGenerateBeamDecoderOnlyOutput`].

        Raises:
            ValueError: they are asked of assisted generation, whose steps are of several tokens.
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
        if steps is None or not isinstance(outputs, ModelOutput):
            return outputs
        with_beams = isinstance(outputs, GenerateBeamDecoderOnlyOutput)
        output_class = AttnResGenerateBeamDecoderOnlyOutput if with_beams else AttnResGenerateDecoderOnlyOutput
        return output_class(**outputs, depth_attentions=tuple(steps))

    def _update_model_kwargs_for_generation(self, outputs, *args, **kwargs):
        steps = GENERATED_DEPTH_ATTENTIONS.get()
        if steps is not None:
            steps.append(outputs.depth_attentions)
        return super()._update_model_kwargs_for_generation(outputs, *args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        if GENERATED_DEPTH_ATTENTIONS.get() is not None:
            raise ValueError("Assisted generation doesn't return depth_attentions: leave out output_depth_attentions.")
        return super()._assisted_decoding(*args, **kwargs)

    def add_head(self, config):
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class AttnResMoeForCausalLMMixin(AttnResForCausalLMMixin):
    def add_head(self, config):
        super().add_head(config)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok


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


class AttnResForSequenceClassification(AttnResHeadMixin, LlamaForSequenceClassification):
    """[`AttnResModel`] that classifies a sequence by its last token."""

    config: AttnResConfig
    model_class = AttnResModel
    output_class = AttnResSequenceClassifierOutputWithPast

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)


class AttnResForTokenClassification(AttnResHeadMixin, LlamaForTokenClassification):
    """[`AttnResModel`] that classifies each token."""

    config: AttnResConfig
    model_class = AttnResModel
    output_class = AttnResTokenClassifierOutput

    def add_head(self, config):
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)


class AttnResForQuestionAnswering(AttnResHeadMixin, LlamaForQuestionAnswering):
    """[`AttnResModel`] that finds the span of an answer."""

    config: AttnResConfig
    model_class = AttnResModel
    output_class = AttnResQuestionAnsweringModelOutput

    def add_head(self, config):
        self.qa_outputs = nn.Linear(config.hidden_size, 2)


register_checkpoint_names(AttnResConfig)


__all__ = [
    "AttnResModel",
    "AttnResForCausalLM",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResForQuestionAnswering",
]
