# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Training, evaluation, generation, figures and publishing of models with Attention Residuals: the library under the
commands.

- what a command takes: `options`, read by `parser`; `defaults`
- what is written: `folders`, `checkpoints`, `space`, `run`, `log`, `card`, `figures`, `page`
- what is loaded: `configs`, `loading`, `start`, `adapters`, `packing`
- text and examples: `data`, `chats`, `examples`
- training: `training` has the run that `pretraining` and `finetuning` share; `trainer`, `optim`, `callback`,
  `comparison`
- scaling laws: `scaling`, and their fits in `laws`
- looking into models: `look`, `plotting`, `evaluation`, `resampling`, `generation`, `serving`
- other runtimes: `exporting`
- several devices: `tensors`, `pipelines`, and on paper `planning`, `schedules`
- the Hub: `publishing`, `stranger`, `leaks`
- processes and machines: `process`, `hardware`

Imports go from the specific to the general, in seven levels.
"""

from attnres_convert import on_use


# Imported on use: torch and transformers take seconds, which `attnres-pretrain --help` needn't wait for
_MODULES = {
    "DepthCallback": "callback",
    "EvaluateOptions": "options",
    "ExportOptions": "options",
    "FinetuneOptions": "options",
    "GenerateOptions": "options",
    "PlanOptions": "options",
    "PlotOptions": "options",
    "Pipeline": "pipelines",
    "PretrainOptions": "options",
    "PushOptions": "options",
    "ScalingOptions": "options",
    "ServeOptions": "options",
    "evaluate": "evaluation",
    "export": "exporting",
    "finetune": "finetuning",
    "generate": "generation",
    "new_optimizer": "optim",
    "plan_devices": "planning",
    "plot": "plotting",
    "pretrain": "pretraining",
    "push": "publishing",
    "serve": "serving",
}
__all__ = list(_MODULES)


__getattr__ = on_use(__name__, _MODULES)
