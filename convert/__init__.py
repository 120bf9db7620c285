# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Exact conversion between checkpoints of supported families and their Attention Residuals form."""

from importlib import import_module


# Imported on use: torch and transformers take seconds, which `attnres-convert --help` needn't wait for
_MODULES = {
    "ConversionError": "checkpoint",
    "ConversionResult": "conversion",
    "InputError": "reading",
    "Verification": "verification",
    "convert_checkpoint": "conversion",
    "convert_to_donor": "conversion",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
