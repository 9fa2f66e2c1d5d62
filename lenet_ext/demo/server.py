"""The server of the drawing page.

Starlette and uvicorn: small, kept, and without a page of their own, so that what the browser shows is the three files
in ``page/`` and nothing else. Gradio and its like bring a hundred megabytes, fonts and scripts from elsewhere, and a
way from the pointer to the answer that is too long for an answer at every stroke.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lenet_ext.demo.viewer import SIDE, Viewer

__all__ = ["build_server"]

_PAGE = Path(__file__).parent / "page"
_CONNECTIONS = 32  # at a time: a few tabs, not a flood


def build_server(viewer: Viewer, host: str) -> uvicorn.Server:
    """A server that shows the page and answers it.

    ``GET /`` and its files are the page; ``GET /about`` is `Viewer.about`; ``POST /look`` takes a drawing and is
    `Viewer.look`. Anything else is an answer from 400 to 499 and a line that says why.

    Args:
        viewer: used by one thread alone, so that the drawings of two tabs do not disturb each other's times.
        host: the address it is reached by. A request that names another host than this or ``localhost`` is refused:
            a page from elsewhere must not come in by a name that it made point here (DNS rebinding).

    Returns:
        ``run(sockets=[...])`` serves until a signal or its ``should_exit`` ends it.
    """
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lenet_ext-demo")

    async def about(request: Request) -> Response:
        return JSONResponse(viewer.about())

    async def look(request: Request) -> Response:
        # Browsers send this type to another origin only after asking, and nobody here says yes: other pages can't call.
        if request.headers.get("content-type") != "application/octet-stream":
            return PlainTextResponse("a drawing is application/octet-stream", status_code=415)
        drawing = bytearray()
        try:
            async for chunk in request.stream():
                drawing += chunk
                if len(drawing) > SIDE * SIDE:
                    return PlainTextResponse(f"a drawing has {SIDE * SIDE} bytes, found more", status_code=413)
        except ClientDisconnect:
            return Response(status_code=400)
        if len(drawing) < SIDE * SIDE:
            return PlainTextResponse(f"a drawing has {SIDE * SIDE} bytes, found {len(drawing)}", status_code=400)
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(worker, viewer.look, drawing))

    app = Starlette(
        routes=[
            Route("/about", about),
            Route("/look", look, methods=["POST"]),
            Mount("/", StaticFiles(directory=_PAGE, html=True)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"], www_redirect=False)],
    )
    return uvicorn.Server(
        uvicorn.Config(
            app,
            # Only what is our own fault is told, with its traceback.
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=2,
        )
    )
