# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The model card of a converted checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from .source import Source


CARD_NAME = "README.md"
DONOR_CARD_NAME = "DONOR_README.md"
KEPT_METADATA = (
    "base_model",
    "datasets",
    "language",
    "license",
    "license_link",
    "license_name",
    "pipeline_tag",
    "tags",
)

TEMPLATE = """---
{metadata}---

# {title}

{donor_link}{revision} with [Attention Residuals](https://arxiv.org/abs/2603.15031): every
attention and every MLP reads a softmax over depth instead of the plain residual sum.

## How it was made

```
{command}
```

| | |
|---|---|
| source | `{donor}`{revision} |
| class | `{attnres_class}`, from `{donor_class}` |
| mode | {mode} |
| parameters added | {added:,} (`depth_attention.query` and `.key_norm`, float32) |
| verification | {verification} |

All tensors of the source are kept, bit for bit, under their names. With the queries at zero all outputs that a read
mixes weigh the same, and each read is multiplied by their number, so it is the sum that the source model's residual
stream holds: until the queries are trained, the model computes what the source model computes, and
`attnres-convert --to-donor` goes back.

## Use

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{title}", trust_remote_code=True)
```
{donor_card}
## Citation

```bibtex
@article{{attention_residuals,
  title = {{Attention Residuals}},
  author = {{Kimi Team}},
  journal = {{arXiv preprint arXiv:2603.15031}},
  year = {{2026}}
}}
```
"""

DONOR_CARD_SECTION = """
The card of the source model is in [DONOR_README.md](DONOR_README.md).
"""


@dataclass(frozen=True)
class CardFacts:
    title: str
    command: str
    mode: str
    added: int
    attnres_class: str
    donor_class: str
    auto_class: str
    verification: str


def write_card(folder: Path, source: Source, facts: CardFacts) -> None:
    """Writes README.md; the donor's own card comes along as DONOR_README.md."""
    donor_card = source.folder / CARD_NAME
    has_card = donor_card.is_file()
    text = TEMPLATE.format(
        metadata=yaml.safe_dump(_metadata(source), sort_keys=True, allow_unicode=True),
        donor=source.name,
        donor_link=f"[{source.name}](https://huggingface.co/{source.name})" if source.is_hub else f"`{source.name}`",
        revision=f" at revision `{source.commit}`" if source.is_hub else "",
        donor_card=DONOR_CARD_SECTION if has_card else "",
        **vars(facts),
    )
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
    if has_card:
        (folder / DONOR_CARD_NAME).write_bytes(donor_card.read_bytes())


def _metadata(source: Source) -> dict:
    try:
        donor = metadata_load(source.folder / CARD_NAME) or {}
    except (OSError, ValueError, yaml.YAMLError):
        donor = {}
    metadata = {key: donor[key] for key in KEPT_METADATA if key in donor}
    tags = metadata.get("tags") or []
    metadata["tags"] = [*([tags] if isinstance(tags, str) else tags), "attention-residuals"]
    metadata["library_name"] = "transformers"
    if source.is_hub:
        metadata["base_model"] = source.name
    return metadata
