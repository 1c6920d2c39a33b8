"""Metadata and dependencies. Ranges are wide on purpose; constraints.txt pins what is tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "slothcore" / "version.py").read_text(encoding="utf-8")).group(1)

EXTRAS = {
    "plots": ["matplotlib>=3.6"],
    "gguf": ["gguf>=0.10"],
    "parquet": ["pyarrow>=14"],
    "logging": ["tensorboard>=2.14", "wandb>=0.16"],
    "serve": ["starlette>=0.40", "uvicorn>=0.30"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.5",
        "pytest-timeout>=2.2",
        "transformers>=5.0",
        "peft>=0.17",
        "pyarrow>=14",
        "gguf>=0.10",
        'xllamacpp>=2026.10; platform_system == "Linux"',  # llama.cpp, to read what the GGUF export writes
        "starlette>=0.40",
        "uvicorn>=0.30",
        "openai>=1.60",
        "ruff>=0.12",
        "mypy>=1.11",
        "types-PyYAML",
        "types-tqdm",
    ],
}

setup(
    name="slothcore",
    version=VERSION,
    description="Exact, fast LoRA and QLoRA fine-tuning of open-weight language models on your own GPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["slothcore", "slothcore.*"]),
    package_data={
        "slothcore": ["py.typed"],
        "slothcore.data.templates": ["*.jinja"],
        "slothcore.report": ["*.css", "*.js"],
    },
    install_requires=[
        "torch>=2.10",  # addmm with out_dtype, for 16-bit products summed into float32
        'triton>=3.6; platform_system == "Linux"',  # tensor descriptors made on the host
        "safetensors>=0.4.3",
        "huggingface_hub>=0.26",
        "tokenizers>=0.20",
        "bitsandbytes>=0.46",
        "numpy>=1.26",
        "jinja2>=3.1",
        "pyyaml>=6.0",
        "tqdm>=4.64",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["slothcore = slothcore.cli:main"]},
)
