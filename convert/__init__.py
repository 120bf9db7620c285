# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Exact conversion between checkpoints of supported families and their Attention Residuals form."""

from importlib import import_module


# Imported on use: torch and transformers take seconds, which `attnres-convert --help` needn't wait for
_MODULES = {
    "ConversionError": "checkpoint",
    "ConversionResult": "conversion",
    "DequantizationResult": "dequantization",
    "InputError": "reading",
    "Verification": "verification",
    "convert_checkpoint": "conversion",
    "convert_to_donor": "conversion",
    "convert_to_kimi_k3": "conversion",
    "dequantize_checkpoint": "dequantization",
}
__all__ = list(_MODULES)


def on_use(package: str, modules: dict[str, str]):
    """A `__getattr__` for a package whose names are imported when they are used.

    Args:
        modules: where each name is.
    """

    def __getattr__(name: str):
        if name in modules:
            return getattr(import_module(f".{modules[name]}", package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


__getattr__ = on_use(__name__, _MODULES)
