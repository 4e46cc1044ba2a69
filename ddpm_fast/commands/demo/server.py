"""The server of the page: what it accepts, what it tells browsers, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.limits import LARGEST_UPLOAD
from ddpm_fast.commands.demo.page import CSS, build, look
from ddpm_fast.errors import InputError

# A browser loads and asks nothing from elsewhere: the page works without a network, and tells nobody that it is open.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
_LARGEST_BODY = LARGEST_UPLOAD + (1 << 20)  # a form has more than its file
_GRACE_SECONDS = 3

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """An ASGI application in front of another: it bounds what is sent, and adds HEADERS to what is answered."""

    def __init__(self, app: Any, largest_body: int = _LARGEST_BODY):
        """app: the application behind it. largest_body: in bytes."""
        self._app, self._largest = app, largest_body

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body") or b"")
            if received > self._largest:
                raise _TooLarge
            return message

        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                given = [(name, value) for name, value in message.get("headers") or [] if name.lower() not in HEADERS]
                message["headers"] = [*given, *HEADERS.items()]
            await send(message)

        try:
            if _length(scope) > self._largest:
                raise _TooLarge
            await self._app(scope, bounded, answer)
        except _TooLarge:
            if not started:
                text = [(b"content-type", b"text/plain")]
                await send({"type": "http.response.start", "status": 413, "headers": text})
                await send({"type": "http.response.body", "body": b"This is larger than the page takes."})


class _TooLarge(Exception):
    """A request is larger than it may be."""


def _length(scope: Message) -> int:
    """The length that a request says it has; 0 if it says none."""
    text = dict(scope["headers"]).get(b"content-length", b"0")
    return int(text) if text.isdigit() and len(text) < 20 else 0


def application(desk: Desk, root_path: str | None = None) -> Guard:
    """The whole server as an ASGI application.

    Args:
        desk: What all visitors share.
        root_path: Where a reverse proxy shows the page, such as "/demo", or None.
    """
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        outer,
        build(desk),
        path="/",
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        root_path=root_path,
        theme=look(),
        css=CSS,
    )
    return Guard(outer)


def listen(host: str, port: int) -> socket.socket:
    """A socket at which the page can be reached.

    Args:
        host: An address or a name of this machine.
        port: The port; 0 for any that is free.

    Raises:
        InputError: If there is no such address, or the port is taken or may not be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"--host is {host!r}, which is no address of this machine ({error})") from None
    try:
        if os.name == "posix":  # elsewhere two programs could then share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(64)
    except OSError as error:
        listening.close()
        advice = "it is in use: give another --port, or 0 for any" if error.errno == errno.EADDRINUSE else str(error)
        raise InputError(f"cannot listen at {host}, port {port}: {advice}") from None
    return listening


def serve(app: Any, listening: socket.socket, is_over: Callable[[], bool]) -> None:
    """Answer requests until it is over.

    Args:
        app: The application.
        listening: Where it can be reached.
        is_over: Whether it is to end, which is asked every second.
    """

    async def look() -> None:
        server.should_exit = server.should_exit or is_over()

    config = uvicorn.Config(
        app,
        log_level="critical",  # a page that is open when the server ends would be a traceback
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        limit_concurrency=200,
        ws="none",
        callback_notify=look,
        timeout_notify=1,
    )
    server = uvicorn.Server(config)
    asyncio.run(server.serve(sockets=[listening]))
