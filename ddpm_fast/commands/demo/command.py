"""`python -m ddpm_fast.demo`: a page in the browser, to draw with models, edit pictures, and look at trainings."""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import os
import socket
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ddpm_fast.commands.common import SOURCES, App, choose_device, console, errors, expand_home, plain_errors
from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.models import Models
from ddpm_fast.commands.demo.runs import Runs
from ddpm_fast.commands.stopping import stop_signals
from ddpm_fast.errors import InputError

LOOPBACK = "127.0.0.1"
# Gradio's own settings, from before it is imported: it tells nobody that it runs, and looks for no other version.
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}

app = App()


@app.command()
def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"also offer this model: {SOURCES}; may be given several times")
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(help="show the training in this folder, which may go on; may be given several times"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="the address to listen at; another than the default lets other machines use the page")
    ] = LOOPBACK,
    port: Annotated[int, typer.Option(help="the port to listen at; 0 is any that is free", min=0, max=65535)] = 7860,
    root_path: Annotated[
        str | None, typer.Option(help="where a reverse proxy shows the page, such as /demo or https://example.org/demo")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu, ...")] = "auto",
) -> None:
    """Open a page in the browser: draw with models, edit pictures, look at trainings, see what schedules do."""
    with plain_errors():
        require_gradio()
        torch_device = choose_device(device)
        is_local = is_loopback(host)
        models = Models([expand_home(source) for source in model or []], torch_device, shows_paths=is_local)
        desk = Desk(models, Runs([expand_home(folder) for folder in run or []]), torch_device, device)
        with tempfile.TemporaryDirectory(prefix="ddpm_fast-demo-", ignore_cleanup_errors=True) as folder:
            server = _server(Path(folder))
            with server.listen(host, port) as listening:
                if not is_local:
                    errors.print(f"[yellow]Warning:[/] {escape(_open_to_others(host))}")
                console.print(f"The page is at {escape(address(listening))} (Ctrl-C ends it)")
                with stop_signals("", lambda: "") as stopping:
                    server.serve(server.application(desk, root_path), listening, lambda: bool(stopping))
        raise typer.Exit(stopping.status)


def require_gradio() -> None:
    """Raises InputError if the package of the page is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs Gradio, which is not installed: pip install 'ddpm-fast[demo]'")


def _server(folder: Path) -> Any:
    """The module of the server, which imports Gradio. folder: where Gradio keeps what is uploaded."""
    os.environ.update(_QUIET)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return importlib.import_module("ddpm_fast.commands.demo.server")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at that address. A name counts by what it stands for."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False  # what listens there says what is wrong
    return bool(host) and all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def _open_to_others(host: str) -> str:
    return (
        f"--host {host} lets everybody who can reach this machine use the page: its models, its device and the runs "
        "that you named, without a password and unencrypted. docs/demo.md says how to put it behind a server that asks "
        "for one"
    )


def address(listening: socket.socket) -> str:
    """The address of the page, for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = LOOPBACK
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
