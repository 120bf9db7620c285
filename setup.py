# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

from setuptools import setup


root = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (root / "attnres.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)
MODELS_AND_DATA = [
    "accelerate>=1.6",
    "datasets>=3.0",
    "peft>=0.20",  # before, a module in `modules_to_save` had to take an argument
]
# The file in `scripts` by the name of the command
COMMANDS = {
    "pretrain": "pretrain",
    "finetune": "finetune",
    "evaluate": "evaluate_model",
    "generate": "generate",
    "serve": "serve",
    "plot": "plot_depth_attention",
    "push": "push_to_hub",
    "export": "export",
}

setup(
    name="attnres",
    version=version,
    description="Attention Residuals for Hugging Face Transformers: models, exact conversion, training recipes",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    py_modules=[
        "attnres",
        "configuration_attnres",
        "depth_attention_attnres",
        "depth_mixers_attnres",
        "families_attnres",
        "modeling_attnres",
        *(f"attnres_commands.{module}" for module in ("__init__", *COMMANDS.values())),
    ],
    packages=["attnres_convert", "attnres_kernels", "attnres_recipes", "attnres_serving"],
    package_dir={
        "attnres_commands": "scripts",
        "attnres_convert": "convert",
        "attnres_recipes": "scripts/recipes",
        "attnres_serving": "serving",
    },
    package_data={"attnres_kernels": ["*.cpp"], "attnres_recipes": ["*.html", "evaluation_modules/*/*.py"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.17,<6",
        "huggingface_hub>=1.5",
        "safetensors>=0.8",
        "tqdm",
    ],
    extras_require={
        "train": [*MODELS_AND_DATA, "matplotlib>=3.8", "tensorboard>=2.15"],  # attnres-pretrain, attnres-finetune
        "evaluate": [*MODELS_AND_DATA, "evaluate>=0.4"],
        "generate": MODELS_AND_DATA,
        # attnres-serve: what transformers[serving] needs
        "serve": [*MODELS_AND_DATA, "fastapi>=0.115", "openai>=1.98", "pydantic>=2", "uvicorn>=0.30"],
        "plot": [*MODELS_AND_DATA, "matplotlib>=3.8"],
        "quantization": ["bitsandbytes>=0.46.1", "torchao>=0.16"],  # for QLoRA
        "gguf": ["accelerate>=1.6", "gguf>=0.17"],  # for attnres-convert model.gguf
        # for attnres-export
        "export": [*MODELS_AND_DATA, "onnxruntime>=1.20", "onnxscript>=0.5"],
        "trl": ["trl>=1.0"],
        "lm-eval": ["lm_eval[hf]>=0.4.13"],  # for attnres-evaluate --lm-eval
        "test": [
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "psutil>=5.9",
            "parameterized>=0.9",
            "triton>=3.2; sys_platform == 'linux'",  # whose interpreter runs the kernels on a CPU
        ],
        "lint": ["ruff"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0", "ruff"],  # which formats signatures
    },
    entry_points={
        "console_scripts": [
            "attnres-convert = attnres_convert.cli:main",
            *(f"attnres-{name} = attnres_commands.{module}:main" for name, module in COMMANDS.items()),
        ],
        "vllm.general_plugins": ["attnres = attnres_serving.vllm_plugin:register"],
    },
    keywords=["attention residuals", "depth attention", "residual connections", "transformers", "language models"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
