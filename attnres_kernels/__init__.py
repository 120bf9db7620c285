# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Fused operators of depth attention, and the kernels that run them; they don't travel to the Hub.

fused.py has the operators, cpu.py and cpu.cpp their kernels for CPUs, triton_kernels.py those for GPUs, and peers.py
takes other projects' operators.
"""
