"""PEP 517 build backend: setuptools, with the target environment's torch in sight.

pip builds in an isolated environment that hides what is installed, torch included, although the extension must be
compiled against exactly the torch that will load it. `sysconfig` keeps naming the target environment even there, so
its site-packages are appended to `sys.path` (last: whatever the isolated environment has goes first).
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta

MINIMUM_TORCH = "torch>=2.11"


def _target_site_packages() -> list[str]:
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.is_file() and "include-system-site-packages = true" in settings.read_text().lower():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        paths += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    return list(dict.fromkeys(paths))


sys.path += [path for path in _target_site_packages() if path not in sys.path]
sys.path.insert(0, str(Path(__file__).parent))  # setup.py imports its helpers from here


def _requires(found: list[str]) -> list[str]:
    return found if importlib.util.find_spec("torch") else [*found, MINIMUM_TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _requires(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requires(build_meta.get_requires_for_build_editable(config_settings))


get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
