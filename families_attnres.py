# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: F405
"""The families beside Llama's. Each says only where its layer or its embedding differs from the pattern of Llama."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM, Gemma3TextModel
from transformers.models.glm4.modeling_glm4 import Glm4DecoderLayer, Glm4ForCausalLM, Glm4Model
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssForCausalLM, GptOssModel
from transformers.models.granite.modeling_granite import GraniteDecoderLayer, GraniteForCausalLM, GraniteModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralForCausalLM, MixtralModel
from transformers.models.olmo.modeling_olmo import OlmoDecoderLayer, OlmoForCausalLM, OlmoModel
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3ForCausalLM, Phi3Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeForCausalLM, Qwen3MoeModel
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer, SmolLM3ForCausalLM, SmolLM3Model
from transformers.models.starcoder2.modeling_starcoder2 import (
    Starcoder2DecoderLayer,
    Starcoder2ForCausalLM,
    Starcoder2Model,
)


try:
    from transformers.models.kimi_linear.modeling_kimi_linear import (
        KimiLinearDecoderLayer,
        KimiLinearForCausalLM,
        KimiLinearModel,
    )
except ImportError:  # an older transformers
    KimiLinearModel = None

try:
    from transformers.masking_utils import (
        create_causal_mask,
        create_recurrent_attention_mask,
        create_sliding_window_causal_mask,
    )
    from transformers.models.inkling2.modeling_inkling2 import (
        Inkling2ForCausalLM,
        Inkling2FullDecoderLayer,
        Inkling2Softcap,
        Inkling2TextModel,
    )
except ImportError:  # an older transformers
    Inkling2TextModel = None

try:
    from .configuration_attnres import *  # noqa: F403
    from .configuration_attnres import __all__ as CONFIG_CLASSES
    from .configuration_attnres import __getattr__  # noqa: F401
    from .depth_attention_attnres import register_checkpoint_names
    from .modeling_attnres import AttnResDecoderLayerMixin, AttnResForCausalLMMixin, AttnResModelMixin
except ImportError:
    if __package__:  # loaded from the Hub: the relative import must work, so the error is real
        raise
    from configuration_attnres import *  # noqa: F403
    from configuration_attnres import __all__ as CONFIG_CLASSES
    from configuration_attnres import __getattr__  # noqa: F401
    from depth_attention_attnres import register_checkpoint_names
    from modeling_attnres import AttnResDecoderLayerMixin, AttnResForCausalLMMixin, AttnResModelMixin


class AttnResMoeForCausalLMMixin(AttnResForCausalLMMixin):
    def add_head(self, config):
        super().add_head(config)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok


class AttnResMistralDecoderLayer(AttnResDecoderLayerMixin, MistralDecoderLayer):
    pass


class AttnResMistralModel(AttnResModelMixin, MistralModel):
    config: AttnResMistralConfig
    layer_class = AttnResMistralDecoderLayer


class AttnResMistralForCausalLM(AttnResForCausalLMMixin, MistralForCausalLM):
    config: AttnResMistralConfig
    model_class = AttnResMistralModel


class AttnResQwen2DecoderLayer(AttnResDecoderLayerMixin, Qwen2DecoderLayer):
    pass


class AttnResQwen2Model(AttnResModelMixin, Qwen2Model):
    config: AttnResQwen2Config
    layer_class = AttnResQwen2DecoderLayer


class AttnResQwen2ForCausalLM(AttnResForCausalLMMixin, Qwen2ForCausalLM):
    config: AttnResQwen2Config
    model_class = AttnResQwen2Model


class AttnResQwen3DecoderLayer(AttnResDecoderLayerMixin, Qwen3DecoderLayer):
    pass


class AttnResQwen3Model(AttnResModelMixin, Qwen3Model):
    config: AttnResQwen3Config
    layer_class = AttnResQwen3DecoderLayer


class AttnResQwen3ForCausalLM(AttnResForCausalLMMixin, Qwen3ForCausalLM):
    config: AttnResQwen3Config
    model_class = AttnResQwen3Model


class AttnResQwen3MoeDecoderLayer(AttnResDecoderLayerMixin, Qwen3MoeDecoderLayer):
    pass


class AttnResQwen3MoeModel(AttnResModelMixin, Qwen3MoeModel):
    config: AttnResQwen3MoeConfig
    layer_class = AttnResQwen3MoeDecoderLayer


class AttnResQwen3MoeForCausalLM(AttnResMoeForCausalLMMixin, Qwen3MoeForCausalLM):
    config: AttnResQwen3MoeConfig
    model_class = AttnResQwen3MoeModel


class AttnResMixtralDecoderLayer(AttnResDecoderLayerMixin, MixtralDecoderLayer):
    pass


class AttnResMixtralModel(AttnResModelMixin, MixtralModel):
    config: AttnResMixtralConfig
    layer_class = AttnResMixtralDecoderLayer


class AttnResMixtralForCausalLM(AttnResMoeForCausalLMMixin, MixtralForCausalLM):
    config: AttnResMixtralConfig
    model_class = AttnResMixtralModel


class AttnResSmolLM3DecoderLayer(AttnResDecoderLayerMixin, SmolLM3DecoderLayer):
    pass


class AttnResSmolLM3Model(AttnResModelMixin, SmolLM3Model):
    config: AttnResSmolLM3Config
    layer_class = AttnResSmolLM3DecoderLayer


class AttnResSmolLM3ForCausalLM(AttnResForCausalLMMixin, SmolLM3ForCausalLM):
    config: AttnResSmolLM3Config
    model_class = AttnResSmolLM3Model


class AttnResPhi3DecoderLayer(AttnResDecoderLayerMixin, Phi3DecoderLayer):
    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.resid_attn_dropout(super().attend(hidden_states, **kwargs))

    def transform(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.resid_mlp_dropout(super().transform(hidden_states, **kwargs))


class AttnResPhi3Model(AttnResModelMixin, Phi3Model):
    config: AttnResPhi3Config
    layer_class = AttnResPhi3DecoderLayer


class AttnResPhi3ForCausalLM(AttnResForCausalLMMixin, Phi3ForCausalLM):
    config: AttnResPhi3Config
    model_class = AttnResPhi3Model


class AttnResStarcoder2DecoderLayer(AttnResDecoderLayerMixin, Starcoder2DecoderLayer):
    pass


class AttnResStarcoder2Model(AttnResModelMixin, Starcoder2Model):
    config: AttnResStarcoder2Config
    layer_class = AttnResStarcoder2DecoderLayer

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(inputs_embeds, p=self.embedding_dropout, training=self.training)


class AttnResStarcoder2ForCausalLM(AttnResForCausalLMMixin, Starcoder2ForCausalLM):
    config: AttnResStarcoder2Config
    model_class = AttnResStarcoder2Model


class AttnResOlmoDecoderLayer(AttnResDecoderLayerMixin, OlmoDecoderLayer):
    pass


class AttnResOlmoModel(AttnResModelMixin, OlmoModel):
    config: AttnResOlmoConfig
    layer_class = AttnResOlmoDecoderLayer


class AttnResOlmoForCausalLM(AttnResForCausalLMMixin, OlmoForCausalLM):
    config: AttnResOlmoConfig
    model_class = AttnResOlmoModel


class AttnResDeepseekV3DecoderLayer(AttnResDecoderLayerMixin, DeepseekV3DecoderLayer):
    pass


class AttnResDeepseekV3Model(AttnResModelMixin, DeepseekV3Model):
    config: AttnResDeepseekV3Config
    layer_class = AttnResDeepseekV3DecoderLayer


class AttnResDeepseekV3ForCausalLM(AttnResForCausalLMMixin, DeepseekV3ForCausalLM):
    config: AttnResDeepseekV3Config
    model_class = AttnResDeepseekV3Model


class AttnResGptOssDecoderLayer(AttnResDecoderLayerMixin, GptOssDecoderLayer):
    def transform(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        output, _ = super().transform(hidden_states, **kwargs)  # and router scores
        return output


class AttnResGptOssModel(AttnResModelMixin, GptOssModel):
    config: AttnResGptOssConfig
    layer_class = AttnResGptOssDecoderLayer


class AttnResGptOssForCausalLM(AttnResMoeForCausalLMMixin, GptOssForCausalLM):
    config: AttnResGptOssConfig
    model_class = AttnResGptOssModel


class AttnResGraniteDecoderLayer(AttnResDecoderLayerMixin, GraniteDecoderLayer):
    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return super().attend(hidden_states, **kwargs) * self.residual_multiplier

    def transform(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return super().transform(hidden_states, **kwargs) * self.residual_multiplier


class AttnResGraniteModel(AttnResModelMixin, GraniteModel):
    config: AttnResGraniteConfig
    layer_class = AttnResGraniteDecoderLayer

    def embed(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return inputs_embeds * self.embedding_multiplier


class AttnResGraniteForCausalLM(AttnResForCausalLMMixin, GraniteForCausalLM):
    config: AttnResGraniteConfig
    model_class = AttnResGraniteModel


class AttnResGemma2DecoderLayerMixin(AttnResDecoderLayerMixin):
    mlp_norm = property(lambda self: self.pre_feedforward_layernorm)

    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.post_attention_layernorm(super().attend(hidden_states, **kwargs))

    def transform(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.post_feedforward_layernorm(super().transform(hidden_states, **kwargs))


class AttnResGemma2DecoderLayer(AttnResGemma2DecoderLayerMixin, Gemma2DecoderLayer):
    pass


class AttnResGemma2Model(AttnResModelMixin, Gemma2Model):
    config: AttnResGemma2Config
    layer_class = AttnResGemma2DecoderLayer


class AttnResGemma2ForCausalLM(AttnResForCausalLMMixin, Gemma2ForCausalLM):
    config: AttnResGemma2Config
    model_class = AttnResGemma2Model


class AttnResGemma3TextDecoderLayer(AttnResGemma2DecoderLayerMixin, Gemma3DecoderLayer):
    pass


class AttnResGemma3TextModel(AttnResModelMixin, Gemma3TextModel):
    config: AttnResGemma3TextConfig
    layer_class = AttnResGemma3TextDecoderLayer

    def position_embeddings(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> dict:
        layer_types = set(self.config.layer_types)
        return {layer_type: self.rotary_emb(inputs_embeds, position_ids, layer_type) for layer_type in layer_types}


class AttnResGemma3TextForCausalLM(AttnResForCausalLMMixin, Gemma3ForCausalLM):
    config: AttnResGemma3TextConfig
    model_class = AttnResGemma3TextModel


class AttnResGlm4DecoderLayer(AttnResDecoderLayerMixin, Glm4DecoderLayer):
    def attend(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.post_self_attn_layernorm(super().attend(hidden_states, **kwargs))

    def transform(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.post_mlp_layernorm(super().transform(hidden_states, **kwargs))


class AttnResGlm4Model(AttnResModelMixin, Glm4Model):
    config: AttnResGlm4Config
    layer_class = AttnResGlm4DecoderLayer


class AttnResGlm4ForCausalLM(AttnResForCausalLMMixin, Glm4ForCausalLM):
    config: AttnResGlm4Config
    model_class = AttnResGlm4Model


if KimiLinearModel is not None:

    class AttnResKimiLinearDecoderLayer(AttnResDecoderLayerMixin, KimiLinearDecoderLayer):
        def attend(self, hidden_states: torch.Tensor, past_key_values: Cache | None = None, **kwargs) -> torch.Tensor:
            if self.block_type == "linear_attention":
                return self.self_attn(hidden_states, cache_params=past_key_values, **kwargs)
            attn_output, _ = self.self_attn(hidden_states, past_key_values=past_key_values, **kwargs)
            return attn_output

    class AttnResKimiLinearModel(AttnResModelMixin, KimiLinearModel):
        config: AttnResKimiLinearConfig
        layer_class = AttnResKimiLinearDecoderLayer

        def position_embeddings(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> None:
            return None  # MLA without rotary positions; KDA's decay carries them

    class AttnResKimiLinearForCausalLM(AttnResForCausalLMMixin, KimiLinearForCausalLM):
        config: AttnResKimiLinearConfig
        model_class = AttnResKimiLinearModel


if Inkling2TextModel is not None:

    class NormsOfInputs:
        """The norms of the inputs of attention, which are several reads, or one for all."""

        def __init__(self, *norms: nn.Module):
            self.norms = norms

        def __call__(self, *reads: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(norm(read) for norm, read in zip(self.norms, reads * (len(self.norms) // len(reads))))

    class AttnResInkling2TextDecoderLayer(AttnResDecoderLayerMixin, Inkling2FullDecoderLayer):
        """Layers with full attention, whose queries, keys and values come from reads of their own, and others."""

        @property
        def attention_norm(self):
            if hasattr(self, "input_layernorm"):
                return self.input_layernorm
            return NormsOfInputs(self.q_input_layernorm, self.k_input_layernorm, self.v_input_layernorm)

        def attend(self, hidden_states, attention_mask: tuple, past_key_values: Cache | None = None, **kwargs):
            attention_mask, conv_mask = attention_mask
            states = {"past_key_values": past_key_values, "conv_mask": conv_mask}
            if isinstance(hidden_states, tuple):
                hidden_states, kwargs["key_hidden_states"], kwargs["value_hidden_states"] = hidden_states
            attn_output, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **states, **kwargs)
            return self.post_attention_convolution(attn_output, **states)

        def transform(self, hidden_states, attention_mask: tuple, past_key_values: Cache | None = None, **kwargs):
            _, conv_mask = attention_mask
            output = super().transform(hidden_states)
            return self.post_mlp_convolution(output, past_key_values=past_key_values, conv_mask=conv_mask)

    class AttnResInkling2TextModel(AttnResModelMixin, Inkling2TextModel):
        """Inkling 2, whose own depth attention, in each layer, is the mode `block_inkling2` here."""

        config: AttnResInkling2TextConfig
        layer_class = AttnResInkling2TextDecoderLayer

        def post_init(self):
            for module in (*self.layers, self):
                for name in ("attention_input", "mlp_input", "final_input"):
                    if hasattr(module, name):
                        delattr(module, name)
            super().post_init()

        def create_masks(self, inputs_embeds, attention_mask, past_key_values, position_ids):
            """For each layer type the masks of attention and of the convolutions."""
            masks = attention_mask
            if not isinstance(masks, dict):
                arguments = (self.config, inputs_embeds, attention_mask, past_key_values)
                masks = {
                    "full_attention": create_causal_mask(*arguments, position_ids=position_ids),
                    "sliding_attention": create_sliding_window_causal_mask(*arguments, position_ids=position_ids),
                    "linear_attention": create_recurrent_attention_mask(*arguments, position_ids=position_ids),
                }
            by_layer_type = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
            return {kind: (masks.get(name), masks["linear_attention"]) for kind, name in by_layer_type.items()}

        def position_embeddings(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> None:
            return None  # attention learns relative positions

    class AttnResInkling2TextForCausalLM(AttnResForCausalLMMixin, Inkling2ForCausalLM):
        config: AttnResInkling2TextConfig
        model_class = AttnResInkling2TextModel

        def add_head(self, config):
            super().add_head(config)
            self.logit_softcap = Inkling2Softcap(config.final_logit_softcapping)


for _name in CONFIG_CLASSES:
    if globals()[_name].hub_module == "families_attnres":
        register_checkpoint_names(globals()[_name])


__all__ = [name for name in globals() if name.startswith("AttnRes") and name.endswith(("Model", "ForCausalLM"))]
