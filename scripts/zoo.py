# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/zoo.py --commands"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
ZOO = "model_cards"


@dataclass(frozen=True)
class Recipe:
    """How a model is made: a script of this folder and its options, with paths from the root of the project."""

    summary: str
    script: str
    options: str
    needs: str | None = None  # the model that it is made from, or whose tokenizer it shares

    def command(self, output: Path) -> list[str]:
        return [f"scripts/{self.script}", *shlex.split(self.options), "--output", str(output)]


STDLIB = "--data stdlib --seq-len 256 --batch-size 8"
TRIO = (
    "--config llama --set num_hidden_layers=24 hidden_size=64 intermediate_size=176 num_attention_heads=4 "
    f"num_key_value_heads=4 tie_word_embeddings=true vocab_size=2048 {STDLIB} --learning-rate 3e-3 --steps 2000 "
    "--warmup 100 --eval-steps 200 --seed 0"
)
KIMI_LAYERS = 2 * [*3 * ["linear_attention"], "full_attention"]
KIMI = (
    "--config kimi_linear --set num_hidden_layers=8 hidden_size=96 intermediate_size=256 moe_intermediate_size=64 "
    "num_attention_heads=4 num_key_value_heads=4 kv_lora_rank=32 qk_nope_head_dim=16 qk_rope_head_dim=8 v_head_dim=16 "
    "linear_num_heads=2 linear_head_dim=32 num_local_experts=4 num_experts_per_tok=2 "
    f"'layer_types={json.dumps(KIMI_LAYERS)}' "
    "max_position_embeddings=2048 tie_word_embeddings=true vocab_size=2048"
)
SHARED_TOKENIZER = f"--tokenizer {ZOO}/llama-1.3m"
FINETUNING = f"--model {ZOO}/attnres-1.3m-continued {STDLIB} --learning-rate 1e-3 --steps 200 --eval-steps 50 --seed 0"

RECIPES = {
    "llama-1.3m": Recipe("Llama, the donor", "pretrain.py", f"{TRIO} --mode donor --train-tokenizer 2048"),
    "attnres-1.3m-block": Recipe(
        "Block AttnRes, from scratch", "pretrain.py", f"{TRIO} --mode block {SHARED_TOKENIZER}", "llama-1.3m"
    ),
    "attnres-1.3m-full": Recipe(
        "Full AttnRes, from scratch", "pretrain.py", f"{TRIO} --mode full {SHARED_TOKENIZER}", "llama-1.3m"
    ),
    "attnres-1.3m-continued": Recipe(
        "the donor converted to Block AttnRes and trained on",
        "pretrain.py",
        f"--model {ZOO}/llama-1.3m --mode block {STDLIB} --learning-rate 1e-3 --steps 300 --warmup 30 --eval-steps 50 "
        "--seed 1",
        "llama-1.3m",
    ),
    "attnres-1.3m-lora": Recipe(
        "LoRA adapter for the continued model, on functions",
        "finetune.py",
        f"{FINETUNING} --method lora",
        "attnres-1.3m-continued",
    ),
    "attnres-1.3m-depth": Recipe(
        "the continued model with its depth attention alone fine-tuned on functions",
        "finetune.py",
        f"{FINETUNING} --method depth",
        "attnres-1.3m-continued",
    ),
    "kimi-linear-block": Recipe(
        "Kimi Linear with Block AttnRes, from scratch",
        "pretrain.py",
        f"{KIMI} --mode block --block-size 2 {STDLIB} --learning-rate 3e-3 "
        f"--steps 800 --warmup 80 --eval-steps 100 --seed 0 {SHARED_TOKENIZER}",
        "llama-1.3m",
    ),
}


def main():
    for name, recipe in RECIPES.items():
        print(f"python {shlex.join(recipe.command(Path('outputs/zoo') / name))}\n")


if __name__ == "__main__":
    sys.exit(main())
