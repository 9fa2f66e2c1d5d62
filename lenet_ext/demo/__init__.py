"""The drawing page of ``lenet-ext demo``: what it shows (`viewer`), how it is served (`server`), and the page."""

from __future__ import annotations

from lenet_ext.demo.server import build_server
from lenet_ext.demo.viewer import Viewer

__all__ = ["Viewer", "build_server"]
