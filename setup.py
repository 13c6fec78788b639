"""Build pion_dist. Metadata and requirements are in pyproject.toml."""

import atexit
import shutil
import tempfile

from setuptools import setup

# Without this, `pip install -e .` leaves pion_dist.egg-info among the sources.
egg_base = tempfile.mkdtemp(prefix="pion_dist-build-")
atexit.register(shutil.rmtree, egg_base, ignore_errors=True)

setup(options={"egg_info": {"egg_base": egg_base}})
