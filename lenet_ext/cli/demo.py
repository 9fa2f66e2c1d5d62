"""``lenet-ext demo``."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import os
import socket
import sys
import threading
import webbrowser
from typing import Any

from lenet_ext.cli.common import UsageError, add_data, add_device, add_threads, integer, say
from lenet_ext.cli.evaluate import load_model

_DESCRIPTION = """\
A page to draw a digit on, which shows, as you draw, what the network takes it for, what its two fused layers make of
it, and how long fused and stock take for it. It needs no network, and is served to this machine alone; from another
one: ssh -L 7860:127.0.0.1:7860 MACHINE. Ctrl-C ends it.
"""
_PORT = 7860
_PORTS_TRIED = 10


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("demo", help="draw a digit and see what the network sees", description=_DESCRIPTION)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default="mnist",
        metavar="CHECKPOINT",
        help="model.safetensors, checkpoint.pt, or a folder of Net.save_pretrained (default: mnist, in the package)",
    )
    parser.add_argument(
        "--host", type=_local_address, default="127.0.0.1", metavar="ADDRESS", help="of this machine (127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=integer(0, 65535), metavar="N", help=f"0 is any free one (default: {_PORT}, or the next free)"
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address only; a browser is opened from a terminal alone"
    )
    add_data(parser, "what the checkpoint was trained on")
    add_device(parser)
    add_threads(parser)
    parser.set_defaults(run=run, model="fused")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand."""
    from lenet_ext.environment.extras import require

    for module in ("starlette", "uvicorn"):
        require(module, "the drawing page", extra="demo")
    from lenet_ext.demo import Viewer, build_server

    loaded = load_model(args)
    try:
        viewer = Viewer(loaded.model, loaded.data, loaded.data_set)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(str(error)) from None
    with _listen(args.host, args.port) as listener:
        address = f"http://{args.host}:{listener.getsockname()[1]}/"
        say(f"draw at {address} (Ctrl-C ends)")
        if not args.no_browser and _somebody_watches():
            # Some browsers keep the caller waiting.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        # Every measurement collects garbage before it begins; what stays for good need not be searched each time.
        gc.freeze()
        build_server(viewer, args.host).run(sockets=[listener])
    return 0


def _local_address(text: str) -> str:
    """Argument type: an IPv4 address that other machines cannot reach."""
    try:
        if text == "localhost" or ipaddress.IPv4Address(text).is_loopback:
            return "127.0.0.1" if text == "localhost" else text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"the page is for this machine alone: must be 127.0.0.1 or another address of the loopback, found {text!r}"
    )


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket at that port; at the first of some where none is given, and in need at any."""
    for number in (port,) if port is not None else (*range(_PORT, _PORT + _PORTS_TRIED), 0):
        try:
            return socket.create_server((host, number))
        except OSError as error:
            reason = error
    # The operating system's own words do not say of what.
    raise OSError(reason.errno, os.strerror(reason.errno or 0), f"{host}:{port}")


def _somebody_watches() -> bool:
    """Whether a browser would be seen: not from a script, nor without a desktop, where one would take the terminal."""
    desktop = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return desktop and sys.stdin.isatty() and sys.stdout.isatty()
