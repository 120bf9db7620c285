# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Which donors convert: the families that have an AttnRes configuration, and why others can't."""

from dataclasses import dataclass, fields

from transformers import CONFIG_MAPPING
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

import configuration_attnres
import modeling_attnres
from configuration_attnres import AttnResConfigMixin

from .checkpoint import ConversionError


POST_NORM = "one of its sublayers reads the residual stream without a norm before it"
PARALLEL = "its attention and its MLP read the same input"
REFUSED = {"olmo2": POST_NORM, "olmo3": POST_NORM, "exaone4": POST_NORM, "cohere": PARALLEL, "cohere2": PARALLEL}

ATTN_RES_FIELDS = tuple(field.name for field in fields(AttnResConfigMixin))


@dataclass(frozen=True)
class Family:
    """A donor family. `heads` maps the names of the donor's model classes to the AttnRes classes."""

    donor_type: str
    config_class: type
    heads: dict[str, type]

    def head(self, architectures: list[str] | None) -> type:
        """The AttnRes class for a donor's `architectures`; a configuration without them is that of a causal LM."""
        if not architectures:
            return next(cls for name, cls in self.heads.items() if name.endswith("ForCausalLM"))
        if len(architectures) != 1 or architectures[0] not in self.heads:
            raise ConversionError(
                f"architecture {', '.join(map(str, architectures))} is not supported; supported of {self.donor_type}: "
                f"{', '.join(self.heads)}."
            )
        return self.heads[architectures[0]]

    def donor_head(self, architectures: list[str] | None) -> str:
        """The name of the donor's class for an AttnRes checkpoint's `architectures`."""
        names = {cls.__name__: donor for donor, cls in self.heads.items()}
        if not architectures:
            return next(donor for donor in self.heads if donor.endswith("ForCausalLM"))
        if len(architectures) != 1 or architectures[0] not in names:
            raise ConversionError(
                f"architecture {', '.join(map(str, architectures))} is not an AttnRes class; expected one of "
                f"{', '.join(names)}."
            )
        return names[architectures[0]]


def donor_class(attnres_class: type) -> type:
    """The model class of transformers that an AttnRes class extends."""
    return next(base for base in attnres_class.__mro__ if base.__module__.startswith("transformers.models."))


def supported_families() -> dict[str, Family]:
    """All families by the donor's `model_type`."""
    families = {}
    for config_class in (getattr(configuration_attnres, name) for name in configuration_attnres.__all__):
        if isinstance(config_class, type) and issubclass(config_class, AttnResConfigMixin):
            references = (ref for auto, ref in config_class.hub_classes().items() if auto != "AutoConfig")
            classes = [getattr(modeling_attnres, reference.split(".")[1]) for reference in references]
            donor_type = config_class.donor_config_class().model_type
            heads = {donor_class(cls).__name__: cls for cls in classes}
            families[donor_type] = Family(donor_type, config_class, heads)
    return families


def find_family(config: dict) -> Family:
    """The family of a donor's config.json.

    Raises:
        ConversionError: there is none; the message says why and lists the supported families.
    """
    families = supported_families()
    model_type = config.get("model_type")
    if model_type in families and not config.get("is_encoder_decoder"):
        return families[model_type]
    if any(model_type == family.config_class.model_type for family in families.values()):
        raise ConversionError("this checkpoint has Attention Residuals already; --to-donor converts it back.")
    raise ConversionError(f"{_refusal(model_type, config)}; supported families: {', '.join(sorted(families))}.")


def find_attnres_family(config: dict) -> Family:
    """The family of an AttnRes checkpoint's config.json."""
    families = {family.config_class.model_type: family for family in supported_families().values()}
    if config.get("model_type") not in families:
        raise ConversionError(
            f"model_type is {config.get('model_type')!r}, so this is no AttnRes checkpoint to convert back; expected "
            f"one of {', '.join(sorted(families))}."
        )
    return families[config["model_type"]]


def _refusal(model_type, config: dict) -> str:
    if not isinstance(model_type, str):
        return "config.json names no model_type"
    if model_type in REFUSED:
        return f"model_type {model_type!r} can't be converted exactly, because {REFUSED[model_type]}"
    known = model_type in CONFIG_MAPPING
    if config.get("is_encoder_decoder") or (known and getattr(CONFIG_MAPPING[model_type], "is_encoder_decoder", False)):
        return f"model_type {model_type!r} is an encoder-decoder; only decoders can be converted"
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return f"model_type {model_type!r} is an encoder; only decoders can be converted"
    if known and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"model_type {model_type!r} is not a decoder-only language model"
    if not known:
        return f"model_type {model_type!r} is unknown to transformers {transformers_version}"
    return f"model_type {model_type!r} is not supported"
