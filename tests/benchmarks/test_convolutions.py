"""The benchmark of convolutions, and the profile beside the ledger."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import convolutions, networks, peers
from benchmarks.__main__ import app
from ddpm_fast.formats.diffusers.network import peer_network


@pytest.mark.skipif(bool(peers.absent(peers.DIFFUSERS)), reason="diffusers is not installed")
def test_the_shapes_are_all_of_the_network():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        peer_network(networks.CIFAR10)(torch.empty(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    flops = sum(shape.count * shape.flops(2) for shape in convolutions.SHAPES)
    assert flops == counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert sum(shape.count for shape in convolutions.SHAPES) == 65


def test_both_ways_of_upsampling_have_one_shape(monkeypatch):
    made = []
    monkeypatch.setattr(convolutions.Timer, "seconds", lambda self, call: made.append(call()) or 1.0)
    timer = convolutions.Timer(torch.device("cpu"), 1)
    found = list(convolutions.upsampling(convolutions.Shape(4, 4, 4), 2, timer))
    assert [line["pass"] for line in found] == ["nearest, 3x3", "transposed 4x4"]
    assert [tuple(image.shape) for image in made] == [(2, 4, 8, 8)] * 2


def test_the_command(tmp_path):
    out = tmp_path / "c.json"
    done = CliRunner().invoke(app, ["convolutions", "--quick", "--device", "cpu", "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())["convolutions"]
    forward = [line for line in found if line["pass"] == "forward"]
    assert len(forward) == 2 and len(found) == 2 * 2 + 2 * 3 + 2
    for line in forward:
        pixels = (line["height"] // line["stride"]) ** 2 * 2
        work = 2 * pixels * line["channels"] * line["out_channels"] * 9
        assert line["flops_per_second"] * line["seconds"] == pytest.approx(work)
    page = tmp_path / "page.md"
    drawn = CliRunner().invoke(app, ["report", "draw", str(out), "--out", str(page)])
    assert drawn.exit_code == 0, drawn.output
    text = page.read_text()
    assert "| 3x3 8->16 at 8 | 1 | 2 | off |" in text and "gradient of the weight" in text and "transposed 4x4" in text
    assert {line["pass"] for line in found if "gradient" in line["pass"]} == {
        f"gradient of the {name}" for name in ("input", "weight", "bias")
    }


def test_a_trace_is_beside_the_ledger(tmp_path):
    out = tmp_path / "t.txt"
    arguments = ["trace", "--quick", "--device", "cpu", "--only", "forward quick bf16 256, ddpm_fast"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert text.startswith("forward quick bf16 2, ddpm_fast: 0 kernels") and "aten::" in text
