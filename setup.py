"""nanofuse: kernel-first training of nanochat-recipe GPTs on NVIDIA Hopper GPUs."""

from pathlib import Path

from setuptools import setup

setup(
    name="nanofuse",
    version="0.1.0",
    description="Kernel-first training of nanochat-recipe GPTs on NVIDIA Hopper GPUs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=["kernels", "model", "train", "bench"],
    package_data={"kernels": ["tuned.json"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "numpy",
        "tiktoken",
        "rustbpe",
        "pyarrow",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "pytest-benchmark", "hypothesis", "ruff==0.17.6"],
        # 2.13 and later want a newer cuBLASLt than torch 2.11 brings; 2.12 also builds against
        # newer torch, whose CUDA libraries are newer than it needs.
        "fp8": ["transformer-engine[pytorch,core_cu13]>=2.12,<2.13"],
        "attention": ["flash-attn-4>=4.0.0b36"],
        "hub": ["huggingface_hub"],
        "plot": ["matplotlib"],
        "wandb": ["wandb"],
    },
)
