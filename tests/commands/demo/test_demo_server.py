"""The server of the page: it is this machine's alone unless told otherwise, calls nobody, opens nothing that it is
sent, and shows errors in words."""

import asyncio
import importlib.util
import socket
from types import SimpleNamespace

import pytest
import torch
from support.commands import run

from ddpm_fast.commands.demo import command
from ddpm_fast.commands.demo.desk import Desk
from ddpm_fast.commands.demo.limits import LARGEST_UPLOAD
from ddpm_fast.commands.demo.runs import Runs
from ddpm_fast.commands.demo.showing import safe
from ddpm_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("wide_terminal")
gr = pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'ddpm-fast[demo]'")

from fastapi.testclient import TestClient  # noqa: E402  # comes with Gradio

from ddpm_fast.commands.demo import gates, server  # noqa: E402


class Fake:
    """In the place of the server's module: it listens, and serves nothing."""

    def __init__(self):
        self.asked, self.desk, self.root_path = None, None, None

    def listen(self, host, port):
        self.asked = host, port
        return server.listen("127.0.0.1", 0)

    def application(self, desk, root_path):
        self.desk, self.root_path = desk, root_path

    def serve(self, *_):
        pass


@pytest.fixture
def fake(monkeypatch):
    made = Fake()
    monkeypatch.setattr(command, "_server", lambda folder: made)
    return made


def test_the_page_is_this_machines_alone_unless_told_otherwise(fake):
    result = run("demo", "--port", 0)
    assert result.exit_code == 0, result.stderr
    assert fake.asked == ("127.0.0.1", 0) and "http://127.0.0.1:" in result.stdout and "Warning" not in result.stderr


def test_another_host_is_warned_of_and_paths_are_not_shown_then(fake, small, tmp_path):
    result = run("demo", "--host", "0.0.0.0", "--model", small, "--run", tmp_path, "--root-path", "/demo")
    assert result.exit_code == 0, result.stderr
    assert "everybody who can reach this machine" in result.stderr and fake.root_path == "/demo"
    assert str(small.parent) not in fake.desk.models.offered("small.safetensors").shown


def test_models_and_runs_are_checked_before_the_page_opens(fake, tmp_path):
    for wrong in (("--model", tmp_path / "no.safetensors"), ("--run", tmp_path / "no"), ("--device", "abacus")):
        result = run("demo", *wrong)
        assert result.exit_code == 2 and "Error:" in result.stderr and fake.asked is None


def test_without_gradio_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else find(name, *a))
    result = run("demo")
    assert result.exit_code == 2 and "pip install 'ddpm-fast[demo]'" in result.stderr


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", False), ("192.0.2.1", False), ("", False)],
)
def test_what_only_this_machine_can_reach(host, is_local):
    assert command.is_loopback(host) is is_local


def test_a_port_that_is_taken_is_refused():
    with server.listen("127.0.0.1", 0) as taken:
        with pytest.raises(InputError, match="in use: give another --port"):
            server.listen("127.0.0.1", taken.getsockname()[1])
        assert command.address(taken) == f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(InputError, match=r"192\.0\.2\.1"):
        server.listen("192.0.2.1", 0)


@pytest.fixture(scope="module")
def client(models):
    return TestClient(server.application(Desk(models, Runs([]), torch.device("cpu"))))


def test_browsers_are_told_to_load_and_ask_nothing_from_elsewhere(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "http" not in policy and "*" not in policy
    for kind in ("default-src", "connect-src", "img-src", "font-src", "script-src"):
        assert f"{kind} 'self'" in policy
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_there_are_no_endpoints_for_other_programs_and_no_pages_of_them(client):
    config = client.get("/config").json()
    assert {one["api_visibility"] for one in config["dependencies"]} == {"private"}
    assert not config["analytics_enabled"] and not config.get("run_history")
    for path in ("/docs", "/redoc", "/openapi.json", "/monitoring", "/gradio_api/mcp/sse"):
        assert client.get(path).status_code in (401, 403, 404), path


def test_more_than_may_be_uploaded_is_refused(client):
    large = b"x" * (LARGEST_UPLOAD + (2 << 20))
    assert client.post("/gradio_api/upload", files={"files": ("a.png", large)}).status_code == 413

    def pieces():  # without a length
        for _ in range(18):
            yield b"x" * (1 << 20)

    assert client.post("/gradio_api/upload", content=pieces()).status_code in (400, 413)


def test_files_of_the_machine_are_not_served(client, small):
    for path in ("/etc/passwd", str(small)):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_the_body_of_a_request_is_counted_as_it_arrives():
    seen, sent = [], []

    async def app(scope, receive, send):
        while (message := await receive()).get("more_body"):
            seen.append(len(message["body"]))

    async def receive():
        return {"type": "http.request", "body": b"12345", "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(server.Guard(app, largest_body=12)({"type": "http", "headers": []}, receive, send))
    assert seen == [5, 5] and sent[0]["status"] == 413


def test_an_uploaded_file_is_handed_on_unopened(tmp_path):
    component = gates.upload(gr.Image(type="filepath"))
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    assert component.preprocess(SimpleNamespace(path=str(path), url=None)) == str(path)
    assert component.preprocess(None) is None
    assert component.preprocess(SimpleNamespace(path=None, url="data:image/png;base64,AAAA")) is None


@pytest.mark.parametrize("kind", [gr.Image, gr.ImageEditor])
def test_a_web_address_in_the_place_of_a_file_is_not_fetched(kind, monkeypatch):
    def called(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", called)
    component = (gates.upload if kind is gr.Image else gates.painting)(kind())
    for address in ("http://127.0.0.1:1/a.png", "https://192.0.2.1/a.png", "ftp://192.0.2.1/a.png"):
        with pytest.raises(gr.Error, match="not a web address"):
            asyncio.run(component.async_move_resource_to_block_cache(address))


def part(kind, sent, name="me", index="0"):
    return SimpleNamespace(data={"type": kind, "id": name, "index": index}, files=[("blob", sent)])


def test_the_parts_of_a_painting_are_handed_on_unopened():
    editor = gates.painting(gr.ImageEditor())
    editor.accept_blobs(part("background", b"below"))
    editor.accept_blobs(part("layer", b"paint"))
    payload = SimpleNamespace(id="me", background=None, layers=[], composite=None)
    assert editor.preprocess(payload) == {"picture": b"below", "layers": [b"paint"]}
    assert editor.preprocess(payload) == {"picture": None, "layers": []}


def test_paintings_are_bounded():
    editor = gates.painting(gr.ImageEditor())
    with pytest.raises(gr.Error):
        editor.accept_blobs(part("background", bytes(LARGEST_UPLOAD + 1)))
    for index in range(100):
        editor.accept_blobs(part("layer", b"x", index=str(10**index)))
        editor.accept_blobs(part("background", b"x", name=f"other {index}"))
    payload = SimpleNamespace(id="other 99", background=None, layers=[], composite=None)
    assert editor.preprocess(payload)["picture"] == b"x"
    payload.id = "other 1"
    assert editor.preprocess(payload)["picture"] is None


def test_wrong_input_is_shown_in_words_and_as_text(desk):
    with pytest.raises(gr.Error) as caught, gates.errors_shown(desk):
        raise InputError("<img src=x onerror=alert(1)> is no label\x1b[2J")
    message = str(caught.value.message)
    assert "<" not in message and "&lt;img" in message and "\x1b" not in message
    assert caught.value.print_exception is False


def test_what_is_a_fault_of_the_package_is_printed_where_it_runs_and_not_shown(desk, capsys):
    with pytest.raises(gr.Error, match="the terminal") as caught, gates.errors_shown(desk):
        raise ZeroDivisionError("secret")
    assert "secret" not in str(caught.value.message) and "ZeroDivisionError: secret" in capsys.readouterr().err


def test_texts_hold_nothing_that_a_browser_or_a_template_obeys():
    assert safe("<b>${1+1}{{x}}</b>\n") == "&lt;b&gt;&#36;&#123;1+1&#125;&#123;&#123;x&#125;&#125;&lt;/b&gt;\\x0a"
