# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The table that a conversion prints."""

from configuration_attnres import ATTN_RES_MODES

from .card import measured
from .conversion import ConversionResult
from .dequantization import DequantizationResult
from .reading import one_line


MAX_PATH = 4096


def report(result: ConversionResult | DequantizationResult) -> str:
    """The result as aligned lines: a name and a value each."""
    rows = _dequantized(result) if isinstance(result, DequantizationResult) else _converted(result)
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _dequantized(result: DequantizationResult) -> dict[str, str]:
    return {
        "written": one_line(str(result.path), MAX_PATH),
        "dequantised": f"from {result.quantization} to {result.dtype}",
        "parameters": f"{result.num_parameters:,}",
    }


def _converted(result: ConversionResult) -> dict[str, str]:
    reads, is_of_blocks = result.depth_sources, ATTN_RES_MODES[result.mode].sums_blocks
    rows = {
        "written": one_line(str(result.path), MAX_PATH),
        "mode": result.mode + (f", {result.block_size} decoder layers per block" if is_of_blocks else ""),
        "sources per read": f"{min(reads)} to {max(reads)} in {len(reads)} reads",
        "depth parameters": f"{result.depth_parameters:,} beside {result.num_parameters:,}",
    }
    if (found := result.verification) is None:
        rows["verification"] = f"skipped, because {result.verification_skipped}"
    else:
        rows |= {
            "largest logit difference": f"{found.max_difference:.2e} (relative {found.relative_difference:.2e})",
            "mean logit difference": f"{found.mean_difference:.2e}",
            "top-1 agreement": f"{found.top1_agreement:.2%} of {found.num_predictions} predictions",
            "compared in": measured(**vars(found)),
        }
    return rows
