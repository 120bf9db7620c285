# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Exact conversion between checkpoints of supported families and their Attention Residuals form."""

from .checkpoint import ConversionError
from .conversion import ConversionResult, convert_checkpoint, convert_to_donor
from .verification import Verification


__all__ = ["ConversionError", "ConversionResult", "Verification", "convert_checkpoint", "convert_to_donor"]
