"""What is installed: the packages, what they need, and the commands."""

from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

REQUIRES = [
    "torch>=2.7.1",
    "megatron-core>=0.12.1",
    "diffusers>=0.33.1",
    "transformers>=4.51",
    "safetensors>=0.4.5",
    "isal>=1.7",
    "numpy>=1.26",
    "einops>=0.8",
    "pydantic>=2.8",
    "jsonargparse>=4.40",
    "pyyaml>=6.0",
    "decord2>=3.0",
    "av>=17.0",
    "pillow>=10.0",
    "opencv-contrib-python-headless>=4.10",
    "ftfy>=6.2",
    "sentencepiece>=0.2",
    "protobuf>=4.25",
    "tqdm>=4.66",
    "tensorboard>=2.16",
]

setup(
    name="mindspeed-mm-vace",
    version="0.1.0",
    description="Convert, extract, train and generate with VACE on NPUs, GPUs and CPUs",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # megatron is a namespace shared with pip's megatron-core: ours is only the portion megatron.mm.
    packages=[
        *find_packages(include=["mindspeed_mm", "mindspeed_mm.*", "checkpoint", "checkpoint.*"]),
        *find_namespace_packages(include=["megatron.mm", "megatron.mm.*"]),
        "mindspeed_mm.starter",  # what `vace init` copies; a checkout has it in examples/vace
    ],
    package_dir={"mindspeed_mm.starter": "examples/vace"},
    package_data={
        "mindspeed_mm": ["py.typed"],
        "mindspeed_mm.tools": ["*.json"],
        "mindspeed_mm.ui": ["*.js", "*.css"],
        "mindspeed_mm.starter": ["**/*"],
    },
    install_requires=REQUIRES,
    extras_require={
        "npu": ["torch_npu>=2.7.1"],
        "serve": [
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "python-multipart>=0.0.18",
            "prometheus-client>=0.20",
            "requests>=2.31",  # of vace generate --server
        ],
        "ui": ["mindspeed-mm-vace[serve]", "gradio>=6.20"],
        "ray": ["mindspeed-mm-vace[serve]", "ray[serve]>=2.60"],  # its cluster has a token by default
        "gguf": ["gguf>=0.17"],
        "heic": ["pillow-heif>=0.18"],
        "annotate": ["onnxruntime>=1.18"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"],  # scripts/build_docs.sh
        "release": ["build>=1.2", "cyclonedx-bom>=7.0", "pip-audit>=2.9"],  # scripts/build_dist.sh
        "dev": [
            "accelerate>=1.1",  # diffusers asks for it in from_pretrained of what mm-convert writes
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "mindspeed-mm-vace[serve,annotate]",
            "mindspeed-mm-vace[ui]",
            "playwright>=1.50",  # drives Debian's chromium through the page
            "mindspeed-mm-vace[docs]",
            "onnx>=1.16",  # tests of annotators export networks of a few weights
            "openai>=2.0; python_version >= '3.11'",  # a client of /v1/videos that others wrote
            "mindspeed-mm-vace[gguf]",
            "peft>=0.17",  # oracle of LoRA layers and files
            "ruff>=0.6",
            "mypy>=1.11",
            "psutil>=6.0",
            "types-PyYAML",
            "types-tqdm",
            "types-requests",
        ],
    },
    entry_points={
        "console_scripts": [
            "vace=mindspeed_mm.cli.main:main",
            "mm-convert=checkpoint.cli:main",
            "mm-inspect=mindspeed_mm.tools.inspect_samples:main",
        ],
    },
)
