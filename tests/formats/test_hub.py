"""Models of the Hugging Face Hub: the library fetches from a server on this machine, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import save_small_model
from support.hub_server import COMMIT, hub_server

import ddpm_fast as df
from ddpm_fast.formats.hub import Address, needed

pytest.importorskip("huggingface_hub")

# Loads each source; from the word "down" on the server is gone. Prints what became of each.
LOADS = """
import json, os, sys, urllib.request
import ddpm_fast as df
from support.hub_server import DOWN
answers = []
for source in sys.argv[1:]:
    if source == "down":
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + DOWN).close()
        continue
    try:
        loaded = df.load_model(source)
        answers.append({"shape": loaded.shape, "origin": loaded.origin, "name": loaded.name, "sha": loaded.digest})
    except df.InputError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def in_a_process(script, endpoint, home, *arguments):
    """What a script prints last, as JSON. home: the library's folder."""
    settings = {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": "hf_made_up", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [Path.cwd(), Path.cwd() / "tests"])),
    }  # fmt: skip
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SOURCES = (
    "hf:someone/ours", "hf:someone/ours@v1", "hf:someone/two/second.safetensors", "hf:someone/two", "hf:someone/none",
    "hf:someone/gated", "hf:someone/ours@v2", "hf:someone/../etc", "down", "hf:someone/ours",
    f"hf:someone/ours@{COMMIT}", "hf:someone/two@v1",
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The server, and what became of SOURCES."""
    folder = tmp_path_factory.mktemp("hub")
    model = save_small_model(folder / "m.safetensors").read_bytes()
    with hub_server() as (hub, endpoint):
        hub.repositories["someone/ours"] = {"model.safetensors": model, "README.md": b"a page", "extra.bin": b"0" * 99}
        hub.repositories["someone/two"] = {"first.safetensors": b"", "second.safetensors": model}
        hub.gated.add("someone/gated")
        answers = in_a_process(LOADS, endpoint, folder / "home", *SOURCES)
    asked = [source for source in SOURCES if source != "down"]
    return hub, list(zip(asked, answers, strict=True)), folder / "m.safetensors"


def test_a_model_is_downloaded_and_says_where_it_is_from(loaded):
    _, answers, file = loaded
    expected = df.load_model(file)
    for source, answer in answers[:3]:
        assert answer == {
            "shape": list(expected.shape), "origin": {"hub": source, "commit": COMMIT}, "name": source,
            "sha": expected.digest,
        }  # fmt: skip


def test_only_what_is_needed_is_downloaded(loaded):
    hub, _, _ = loaded
    files = {path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert files == {
        f"/someone/ours/resolve/{COMMIT}/model.safetensors",
        f"/someone/two/resolve/{COMMIT}/second.safetensors",
    }


def test_what_cannot_be_had_is_said_and_what_to_do(loaded):
    answers = dict(loaded[1][:8])
    assert (
        "name one as hf:someone/two/FILE. It holds first.safetensors, second.safetensors" in answers["hf:someone/two"]
    )
    assert "there is no repository someone/none" in answers["hf:someone/none"]
    assert "someone/gated is gated: ask for access" in answers["hf:someone/gated"]
    assert "someone/ours has no revision v2" in answers["hf:someone/ours@v2"]


def test_a_wrong_name_is_refused_before_anything_is_sent(loaded):
    hub, answers, _ = loaded
    assert "names no" in dict(answers)["hf:someone/../etc"]
    assert not any("etc" in path for _, path, _ in hub.requests)


def test_without_a_network_the_cache_is_used(loaded):
    _, answers, file = loaded
    branch, commit, other = (answer for _, answer in answers[8:])
    assert branch["sha"] == commit["sha"] == df.load_model(file).digest and branch["origin"]["commit"] == COMMIT
    assert "the Hub cannot be reached" in other and "the cache of huggingface_hub does not have it" in other


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


PIPELINE = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
            "scheduler/scheduler_config.json"]  # fmt: skip
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
