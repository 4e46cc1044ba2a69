"""docs/demo.md: its commands run, and its table says the bounds that the page has."""

import re
import shlex
from pathlib import Path

import pytest
from support.commands import run, save_small_model

from ddpm_fast.commands.demo import command, limits

TEXT = (Path(__file__).parents[2] / "docs" / "demo.md").read_text()


class Server:
    """In the place of the server's module: it listens to nobody, and remembers what it was to serve."""

    def __init__(self):
        self.desks, self.roots = [], []

    def listen(self, host, port):
        return command.socket.socket()

    def application(self, desk, root_path):
        self.desks.append(desk)
        self.roots.append(root_path)

    def serve(self, *_):
        pass


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, small_run):
    monkeypatch.chdir(tmp_path)
    made = Server()
    monkeypatch.setattr(command, "_server", lambda folder: made)
    monkeypatch.setattr(command, "require_gradio", lambda: None)
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if "-m ddpm_fast.demo" in line]
    assert len(commands) == 3
    for words in commands:
        result = run("demo", *words[3:])
        assert result.exit_code == 0, result.stderr
    assert made.desks[1].models.names[0] == "mine" and made.desks[1].runs.names == ["mine"]
    assert made.roots[2] == "https://example.org/demo"


@pytest.fixture
def small_run(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    return save_small_model(tmp_path / "runs" / "mine" / "model.safetensors")


def test_the_table_says_what_is_bounded():
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", TEXT, flags=re.M))
    assert rows["images of one drawing"] == str(limits.MOST_IMAGES)
    assert rows["sampling steps"] == str(limits.MOST_STEPS)
    assert rows["time of one drawing"] == f"{limits.LONGEST_SECONDS // 60} minutes"
    assert rows["drawings that wait"] == str(limits.MOST_WAITING)
    sizes = f"{limits.LARGEST_UPLOAD >> 20} MiB and {limits.MOST_PIXELS // 10**6} million pixels"
    assert rows["an uploaded picture"].startswith(sizes)
