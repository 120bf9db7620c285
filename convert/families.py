# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Which donors convert: the families that have an AttnRes configuration."""

from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from pathlib import Path

import configuration_attnres
from configuration_attnres import AttnResConfigMixin, attn_res_config_class, donor_class

from .checkpoint import ConversionError


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


@cache
def supported_families() -> dict[str, Family]:
    """All families by the donor's `model_type`."""
    families = {}
    for config_class in (getattr(configuration_attnres, name) for name in configuration_attnres.__all__):
        if isinstance(config_class, type) and issubclass(config_class, AttnResConfigMixin):
            references = [ref.split(".") for auto, ref in config_class.hub_classes().items() if auto != "AutoConfig"]
            classes = [getattr(import_module(module), name) for module, name in references]
            donor_type = config_class.donor_config_class().model_type
            heads = {donor_class(cls).__name__: cls for cls in classes}
            families[donor_type] = Family(donor_type, config_class, heads)
    return families


@cache
def code_files(model_type: str | None = None) -> dict[str, Path]:
    """This project's code files by name: those of a repository of `model_type`, or of all families."""
    classes = [family.config_class for family in supported_families().values()]
    chosen = [cls for cls in classes if cls.model_type == model_type] or classes
    return {path.name: path for cls in chosen for path in cls.hub_files()}


def find_family(config: dict) -> Family:
    """The family of a donor's config.json.

    Raises:
        ConversionError: there is none; the message says why and lists the supported families.
    """
    families = supported_families()
    model_type = config.get("model_type")
    if any(model_type == family.config_class.model_type for family in families.values()):
        raise ConversionError("this checkpoint has Attention Residuals already; --to-donor converts it back.")
    if model_type in families and config.get("is_encoder_decoder"):
        raise ConversionError("config.json says is_encoder_decoder; only decoders can be converted.")
    try:
        return families[attn_res_config_class(model_type).donor_config_class().model_type]
    except ValueError as error:
        raise ConversionError(str(error)) from None


def find_attnres_family(config: dict) -> Family:
    """The family of an AttnRes checkpoint's config.json."""
    families = {family.config_class.model_type: family for family in supported_families().values()}
    if config.get("model_type") not in families:
        raise ConversionError(
            f"model_type is {config.get('model_type')!r}, so this is no AttnRes checkpoint to convert back; expected "
            f"one of {', '.join(sorted(families))}."
        )
    return families[config["model_type"]]
