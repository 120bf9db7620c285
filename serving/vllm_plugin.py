# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What vLLM calls when it starts, in each of its processes: an entry point of the group `vllm.general_plugins`."""

import attnres
import configuration_attnres


def register():
    """Lets vLLM know the AttnRes classes, so that it serves their checkpoints without remote code."""
    from vllm import ModelRegistry

    for name in configuration_attnres.__all__:
        config_class = getattr(attnres, name)
        architecture = config_class.hub_classes()["AutoModelForCausalLM"].split(".")[1]
        if "KimiLinear" in architecture:
            served = architecture
        else:
            served = "AttnResMoEForCausalLM" if hasattr(config_class, "num_experts_per_tok") else "AttnResForCausalLM"
        ModelRegistry.register_model(architecture, f"attnres_serving.vllm_models:{served}")
