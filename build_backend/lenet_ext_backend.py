"""PEP 517 build backend: setuptools, with the target environment's torch in sight.

pip builds in an isolated environment that hides what is installed, torch included, although the extension must be
compiled against exactly the torch that will load it. But the interpreter is the target environment's own, so `site`
still knows where its packages are. They are appended to `sys.path`: whatever the isolated environment has goes first.
"""

from __future__ import annotations

import importlib.util
import site
import sys

from requirements import TORCH, require_setuptools


def _target_site_packages() -> list[str]:
    paths = site.getsitepackages()
    if sys.base_prefix in site.PREFIXES:  # no virtual environment, or one that shares the system's packages
        paths.append(site.getusersitepackages())
    return paths


sys.path += [path for path in _target_site_packages() if path not in sys.path]

require_setuptools()  # in its own words: an older one lacks hooks, and no setuptools at all looks like no backend

# Only now: importing setuptools appends the packages it bundles, and torch must not get an older one of those.
from setuptools import build_meta  # noqa: E402


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if importlib.util.find_spec("torch") else [*requirements, TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))


get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
