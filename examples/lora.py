# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python examples/lora.py --model model_cards/attnres-1.3m-continued --output outputs/lora_example

LoRA with PEFT, and depth attention trained beside it, with TRL's SFTTrainer on a few chats. It prints the loss on chats
that are held out, before and after, saves the adapter, and loads it again. The model is one with Attention Residuals,
as attnres-convert writes it.
"""

import argparse
import sys
from pathlib import Path

import torch
from attnres_convert.reading import one_line
from attnres_recipes import new_optimizer
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import attnres  # noqa: F401  (makes the models known to the Auto classes)


CHATS = Path(__file__).resolve().with_name("captain.jsonl")
ZOO = CHATS.parents[1] / "model_cards"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # of a model that has none
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", default=str(ZOO / "attnres-1.3m-continued"), help="folder or Hub id; default: of the zoo"
)
parser.add_argument("--data", default=str(CHATS), help="JSON lines with messages; default: examples/captain.jsonl")
parser.add_argument("--output", default="outputs/lora_example", help="folder of the adapter")
parser.add_argument("--steps", type=int, default=30, help="training steps; default: 30")
args = parser.parse_args()
if args.steps < 1:
    parser.error("--steps must be above zero")


class ClipApart(TrainerCallback):
    """In a model that was just converted, depth attention's gradients are longer than all others together."""

    def on_pre_optimizer_step(self, *_, model, **kwargs):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for inside in (True, False):
            torch.nn.utils.clip_grad_norm_([p for name, p in trained if ("depth_attention" in name) is inside], 1.0)


try:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    chats = load_dataset("json", data_files=args.data, split="train").train_test_split(test_size=8, seed=0)
except (OSError, ValueError) as error:
    sys.exit(one_line(f"lora: {error}"))
tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", modules_to_save=["depth_attention"])
model = get_peft_model(base, lora)
# Queries that move fast would harm a model that is already good
optimizer = new_optimizer(model, learning_rate=5e-4, depth_lr_scale=0.03)
quiet = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
settings = SFTConfig(args.output, max_steps=args.steps, max_grad_norm=0, bf16=False, **quiet)
data = {"train_dataset": chats["train"], "eval_dataset": chats["test"]}
trainer = SFTTrainer(model, settings, **data, processing_class=tokenizer, optimizers=(optimizer, None))
trainer.add_callback(ClipApart())
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss {before:.4f} before, {trainer.evaluate()['eval_loss']:.4f} after")

trainer.save_model(args.output)
loaded = AutoPeftModelForCausalLM.from_pretrained(args.output, dtype="float32").eval()
inputs = tokenizer("Steady as she goes.", return_tensors="pt", return_token_type_ids=False)
with torch.no_grad():
    print(f"loaded logits off by {(loaded(**inputs).logits - model.eval()(**inputs).logits).abs().max():.1e}")
