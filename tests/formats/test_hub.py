"""Models of the Hugging Face Hub: the library fetches from a server on this machine, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.commands import save_small_model
from support.hub_server import COMMIT, UNKNOWN_LICENSE, Hub, hub_server

import ddpm_fast as df
from ddpm_fast.formats.repository import Address, needed

pytest.importorskip("huggingface_hub", reason="the extra [hf] is not installed")

PIPELINE = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
            "scheduler/scheduler_config.json"]  # fmt: skip

# Takes a JSON list of actions: the source of a model to load, the arguments of an export, or "down", from which on the
# server is gone. Prints what became of each.
ACTIONS = """
import json, os, sys, urllib.request
sys.modules["diffusers"] = None  # as if it were not installed: importing it takes seconds
import ddpm_fast as df
from support.commands import run
from support.hub_server import DOWN

def act(action):
    if isinstance(action, list):
        done = run("export", *action)
        return [done.exit_code, done.stdout, done.stderr]
    if action == "down":
        return urllib.request.urlopen(os.environ["HF_ENDPOINT"] + DOWN).status
    try:
        loaded = df.load_model(action)
    except df.InputError as error:
        return str(error)
    return {"shape": loaded.shape, "origin": loaded.origin, "name": loaded.name, "sha": loaded.digest}

print(json.dumps([act(action) for action in json.loads(sys.argv[1])]))
"""


def in_a_process(actions, endpoint, home):
    """What becomes of the actions in a process for which the Hub is at the endpoint. home: the library's folder."""
    settings = {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": "hf_made_up", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [Path.cwd(), Path.cwd() / "tests"])),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ACTIONS, json.dumps(actions)], env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pushed(model, to, name, *options):
    return [str(model), "--to", to, "--push", f"hf:me/{name}", "--license", "cc-by-4.0", *map(str, options)]


SOURCES = (
    "hf:someone/ours", "hf:someone/ours@v1", "hf:someone/two/second.safetensors", "hf:someone/two", "hf:someone/none",
    "hf:someone/gated", "hf:someone/ours@v2", "hf:someone/../etc", "hf:me/pipeline", "down", "hf:someone/ours",
    f"hf:someone/ours@{COMMIT}", "hf:someone/two@v1",
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The server; what became of the exports and of SOURCES; and the model that all of them hold."""
    folder = tmp_path_factory.mktemp("hub")
    file = folder / "m.safetensors"
    model = save_small_model(file, names=["cat", "dog", "owl`\x1b"], training={"data": "pets", "steps": 7}).read_bytes()
    exports = [
        pushed(file, "diffusers", "pipeline", "--out", folder / "out", "--samples", 2, "--public"),
        pushed(file, "ddpm_fast", "own", "--samples", 0),
        [str(file), "--to", "diffusers", "--out", str(folder / "unsent")],
        pushed(file, "diffusers", "forbidden", "--samples", 0),
        [str(file), "--to=ddpm_fast", "--push=hf:me/own", f"--license={UNKNOWN_LICENSE}", "--samples=0"],
    ]
    with hub_server() as (hub, endpoint):
        hub.repositories["someone/ours"] = {"model.safetensors": model, "README.md": b"a page", "extra.bin": b"0" * 99}
        hub.repositories["someone/two"] = {"first.safetensors": b"", "second.safetensors": model}
        hub.gated |= {"someone/gated", "me/forbidden"}
        answers = in_a_process([*exports, *SOURCES], endpoint, folder / "home")
    loads = dict(zip([*SOURCES[:9], "down", *(f"{name} offline" for name in SOURCES[10:])], answers[5:], strict=True))
    return Done(hub, answers[:5], loads, folder)


class Done(NamedTuple):
    """What became of it all."""

    hub: Hub
    exports: list
    loads: dict
    folder: Path


def test_a_model_is_downloaded_and_says_where_it_is_from(done):
    expected = df.load_model(done.folder / "m.safetensors")
    for source in SOURCES[:3]:
        assert done.loads[source] == {
            "shape": list(expected.shape), "origin": {"hub": source, "commit": COMMIT}, "name": source,
            "sha": expected.digest,
        }  # fmt: skip


def test_only_what_is_needed_is_downloaded(done):
    files = {path for method, path, _ in done.hub.requests if method == "GET" and "/resolve/" in path}
    assert files == {
        f"/someone/ours/resolve/{COMMIT}/model.safetensors",
        f"/someone/two/resolve/{COMMIT}/second.safetensors",
        *(f"/me/pipeline/resolve/{COMMIT}/{name}" for name in PIPELINE),
    }


def test_what_cannot_be_had_is_said_and_what_to_do(done):
    answers = done.loads
    assert "hf:someone/two/FILE. It holds first.safetensors, second.safetensors" in answers["hf:someone/two"]
    assert "there is no repository someone/none" in answers["hf:someone/none"]
    assert "someone/gated is gated: ask for access" in answers["hf:someone/gated"]
    assert "someone/ours has no revision v2" in answers["hf:someone/ours@v2"]


def test_a_wrong_name_is_refused_before_anything_is_sent(done):
    assert "names no" in done.loads["hf:someone/../etc"]
    assert not any("etc" in path for _, path, _ in done.hub.requests)


def test_without_a_network_the_cache_is_used(done):
    branch, commit = done.loads["hf:someone/ours offline"], done.loads[f"hf:someone/ours@{COMMIT} offline"]
    assert branch["sha"] == commit["sha"] == df.load_model(done.folder / "m.safetensors").digest
    assert branch["origin"]["commit"] == COMMIT
    other = done.loads["hf:someone/two@v1 offline"]
    assert "the Hub cannot be reached" in other and "the cache of huggingface_hub does not have it" in other


def test_what_is_pushed_is_what_was_written(done):
    code, said, errors = done.exports[0]
    assert code == 0, errors
    files = done.hub.repositories["me/pipeline"]
    written = {path.relative_to(done.folder / "out").as_posix(): path for path in (done.folder / "out").rglob("*.*")}
    assert set(files) == {*written, "README.md", "samples.png"} and set(PIPELINE) < set(written)
    assert all(files[name] == path.read_bytes() for name, path in written.items())
    assert "The folder was not compared: install diffusers" in said
    assert f"/me/pipeline/commit/{COMMIT}" in said and files["samples.png"].startswith(b"\x89PNG")


def test_a_pushed_model_is_loaded_again(done):
    assert done.loads["hf:me/pipeline"]["shape"] == [3, 8, 8]
    (done.folder / "own.safetensors").write_bytes(done.hub.repositories["me/own"]["model.safetensors"])
    own, expected = (df.load_model(done.folder / name).model for name in ("own.safetensors", "m.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), expected.parameters(), strict=True))


def test_a_new_repository_is_private_unless_it_is_to_be_public(done):
    seen = [(asked["name"], asked.get("visibility", "private" if asked.get("private") else "public"))
            for asked in done.hub.created]  # fmt: skip
    assert seen[:2] == [("pipeline", "public"), ("own", "private")]


def test_nothing_is_sent_without_push(done):
    assert done.exports[2][0] == 0
    assert not any("unsent" in path for _, path, _ in done.hub.requests)
    assert {asked["name"] for asked in done.hub.created} == {"pipeline", "own", "forbidden"}


def test_a_token_that_may_not_write_is_an_error_that_says_so(done):
    code, _, errors = done.exports[3]
    assert code == 2 and "me/forbidden" in errors and "hf auth login" in errors


def test_what_the_server_refuses_is_an_error_that_says_why(done):
    code, _, errors = done.exports[4]
    assert code == 2 and '"license" must be one of' in errors


def test_the_token_is_the_librarys_own(done):
    assert {token for _, path, token in done.hub.requests if path.startswith("/api")} == {"Bearer hf_made_up"}


def test_the_page_says_what_the_model_is(done):
    page = done.hub.repositories["me/pipeline"]["README.md"].decode()
    assert page.startswith("---\nlicense: cc-by-4.0\nlibrary_name: diffusers\n")
    for words in (
        "![Samples](samples.png)",
        "on pets, 7 steps",
        "3 (cat, dog, owl'",
        '"me/pipeline", trust_remote_code',
    ):
        assert words in page
    assert "\x1b" not in page


@pytest.mark.parametrize(
    "source, repository, revision, file",
    [
        ("hf:google/ddpm-cifar10-32", "google/ddpm-cifar10-32", None, ""),
        ("hf:a/b.c_d@main", "a/b.c_d", "main", ""),
        ("hf:a/b@refs/pr/3/unet", "a/b", "refs/pr/3", "unet"),
        ("hf:a/b/models/step 1.pt", "a/b", None, "models/step 1.pt"),
        (f"hf:a/b@{COMMIT}/unet/", "a/b", COMMIT, "unet"),
    ],
)
def test_an_address_is_read(source, repository, revision, file):
    assert Address.of(source) == Address(repository, revision, file)


@pytest.mark.parametrize(
    "source",
    ["hf:", "hf:a", "hf:a/", "hf:/b", "hf:a/b/../c", "hf:a/b//c", "hf:a/b/*.pt", "hf:a/b@", "hf:a/b@x..y", "hf:a--b/c",
     "hf:a/b@-x", "hf:a/b\n", "hf:a/b/c\x1b", "hf:https://x/y", "hf:a/b/.hidden", "hf:a/b/[x]", "hf:-a/b", "hf:ä/b"],
)  # fmt: skip
def test_an_address_that_could_lead_elsewhere_is_refused(source):
    with pytest.raises(df.InputError, match="expected hf:OWNER/NAME"):
        Address.of(source)


SHARDS = ["config.json", "diffusion_pytorch_model.safetensors.index.json",
          "diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors",
          "scheduler_config.json"]  # fmt: skip


@pytest.mark.parametrize(
    "names, file, expected",
    [
        ([*PIPELINE, "README.md", "unet/diffusion_pytorch_model.bin", "vae/config.json"], "", PIPELINE),
        ([*PIPELINE, "weights.pt"], "unet", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]),
        ([*SHARDS, "README.md"], "", SHARDS),
        (["model.safetensors", "optimizer.bin", "x.ckpt"], "", ["model.safetensors"]),
        (["64x64_diffusion.pt", "README.md"], "", ["64x64_diffusion.pt"]),
        (["a.pt", "b.pt"], "b.pt", ["b.pt"]),
        (["a/../../b.pt", "/etc/x.pt", "*.pt", "c.pt"], "", ["c.pt"]),
    ],
)
def test_which_files_a_model_is_made_of(names, file, expected):
    assert sorted(needed(names, Address("a/b", None, file))) == sorted(expected)


@pytest.mark.parametrize("names, file, words", [([], "", "nothing"), (["a.pt"], "b.pt", "no such file"),
                                                (["README.md"], "", "cannot be told")])  # fmt: skip
def test_a_repository_without_a_model_is_refused(names, file, words):
    with pytest.raises(df.InputError, match=words):
        needed(names, Address("a/b", None, file))
