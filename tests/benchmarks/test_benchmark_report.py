"""`python -m benchmarks.report`: result files read, drawn as a page, and compared."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from typer.testing import CliRunner

from benchmarks.report import compare, drawings, page
from benchmarks.report.__main__ import app
from benchmarks.report.results import Result, read_result
from ddpm_fast.errors import InputError

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "epyc-avx512-2-cores-ops.json"
THREADS = 2


def row(operation="q_sample", shape=(2, 3, 4, 4), baseline="torch", speedup=4.0, spread=0.05, **more) -> dict:
    """An op's row as older files have it; ours takes 1 ms and draws 1e6 normals a second and thread."""
    interval = [speedup * (1 - spread), speedup * (1 + spread)]
    return {
        **{"operation": operation, "dtype": "float32", "shape": list(shape), "memory_format": "contiguous"},
        **{"measured": "ddpm_fast", "baseline": baseline, "speedup": speedup, "speedup_95": interval, "bytes": 10_000},
        "ddpm_fast": {"error": 1e-7, "median_s": 1e-3, "gb_per_s": 0.01, "normals_per_s_per_thread": 1e6},
        baseline: {"error": 2e-7, "median_s": 1e-3 * speedup, "gb_per_s": 0.01 / speedup},
        **more,
    }


def newer(line: dict, **more) -> dict:
    """The same row as newer files have it."""
    case = f"{line['operation']} {line['dtype']} {'x'.join(map(str, line['shape']))}"
    return {**line, "case": case, "network": False, "setting": "calls", "sets": 1, "unheard_of": [1], **more}


def layer(what="sampling", baseline="diffusers", speedup=1.5, **more) -> dict:
    """A row of a network, training or sampling; ours takes 0.3 s a step."""
    return {
        **{"what": what, "network": "cifar10", "dtype": "fp32", "batch": 8, "steps": 10, "notes": []},
        **{"errors": {"ddpm_fast": 1e-5}, "flops": 3e10, "bytes": 3e8, "normals": 1e5},
        **{"measured": "ddpm_fast", "baseline": baseline, "speedup": speedup},
        **{"speedup_95": [speedup - 0.1, speedup + 0.1], "floor_s": 0.15, "floor_is": "flops"},
        "ddpm_fast": {"median_s": 0.3, "images_per_s": 2.7, "mfu": 0.5},
        baseline: {"median_s": 0.3 * speedup, "images_per_s": 1.8},
        **more,
    }


def made(rows: list, **more) -> dict:
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {
            **{"cpu": "A Processor", "architecture": "x86_64", "cores": 2, "threads": THREADS, "isa": "avx2"},
            **{"backend": "cpu", "load_average": [0.5, 0.25, 0.125]},
        },
        "versions": {"python": "3.11", "torch": "2.13.0", "diffusers": "0.42.1", "ddpm_fast": "0.1.0"},
        "git": {"commit": "c0ffee" + 34 * "0", "changed_files": []},
        **{"rounds": 60, "absent": {}, "mismatches": [], "results": rows, **more},
    }


COPY = row("copy", baseline="clone", measured="copy_", copy_={"error": 0.0, "median_s": 1e-4, "gb_per_s": 0.1})
NORMAL = row("normal", ddpm_fast={"median_s": 8e-4, "normals_per_s_per_thread": 1.25e6, "gb_per_s": 0.01})
FIXED = {"network": "cifar10", "dtype": "fp32", "image_size": 32, "steps": 1, "threads": 0}
GROWTH = {
    **{"task": "training", "axis": "batch", "fixed": FIXED, "seconds_exponent": 1.25, "memory_exponent": None},
    "points": [{"x": x, "seconds": 0.1 * x, "peak_bytes": (x - 1) * 2**20} for x in (1, 2, 4)],
}
NOISE = {
    **{"task": "step", "fixed": {**FIXED, "batch": 8}, "noise_bytes": 2**20},
    **{"stored": {"seconds": 1.0, "peak_bytes": 3 * 2**20}, "regenerated": {"seconds": 1.0, "peak_bytes": 2**21}},
}


@pytest.fixture
def write(tmp_path):
    """Writes what a file holds; its path."""

    def written(holds, name: str = "result") -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(holds if isinstance(holds, str) else json.dumps(holds))
        return path

    return written


@pytest.fixture
def read(write):
    return lambda *arguments: read_result(write(*arguments))


def run(*arguments) -> "CliRunner.invoke":
    return CliRunner().invoke(app, list(map(str, arguments)))


def shown(result) -> str:
    return " ".join((result.stdout + result.stderr).split())


def drawn(result: Result, tmp_path: Path) -> str:
    page.draw([result], tmp_path / "page.md", "a command")
    return (tmp_path / "page.md").read_text()


# --- reading


def test_the_committed_result_is_read():
    result, lines = read_result(COMMITTED), json.loads(COMMITTED.read_text())["results"]
    assert len(result.rows) == len(lines) > 80 and result.rounds >= 30 and not (result.quick or result.failed)
    row = next(each for each in result.rows if each.case == "q_sample float32 128x3x32x32")
    line = next(each for each in lines if each["case"] == row.case)
    assert (row.name, row.size, row.setting) == ("q_sample float32", "128x3x32x32", "calls")
    assert row.baseline == line["baseline"] == "diffusers" and row.speedup == line["speedup"]
    assert row.counts["normals"] == 128 * 3 * 32 * 32 and row.floors.keys() == {"bytes", "normals"}
    assert {"q_sample bfloat16 128x3x32x32", "q_sample bfloat16 16x3x256x256"} <= result.absences["diffusers"]


def test_older_and_newer_rows_are_the_same_rows(read):
    old, new = read(made([row()]), "old").rows, read(made([newer(row())]), "new").rows
    assert old[0].identity == new[0].identity
    assert old[0].case == new[0].case == "q_sample float32 2x3x4x4"


def test_floors_of_an_older_file_come_from_its_copy_and_its_normals(read):
    q_sample = read(made([COPY, NORMAL, row()])).rows[2]
    # 10,000 bytes at 0.1 GB/s; two threads' 2,000 normals at 1.25e6 a second and thread.
    assert q_sample.floors == pytest.approx({"bytes": 1e-4, "normals": 8e-4})
    assert q_sample.floor == ("normals", pytest.approx(8e-4))
    assert q_sample.copy_share == pytest.approx(0.1)
    assert read(made([row()])).rows[0].floors == {}, "of a file with neither"


def test_floors_of_a_newer_file(read):
    line = newer(row(), warp_instructions=3e6, floor_s=7e-4, floor_is="something else")
    (result,) = read(made([line], copy_bytes_per_s=2e7, issue_rate=1e10)).rows
    assert result.floors == pytest.approx({"bytes": 5e-4, "instructions": 3e-4, "something else": 7e-4})
    assert result.floor == ("something else", 7e-4)


def test_the_layers_above_the_ops(read):
    ceilings = {"copy_bytes_per_s": 2e10, "flops_per_s": {"fp32": 2e11}, "normals_per_s": 1e9}
    (result,) = read(made([layer()], ceilings=ceilings)).rows
    assert result.floors == pytest.approx({"bytes": 0.015, "flops": 0.15, "normals": 1e-4})
    assert result.case == "sampling cifar10 fp32 8", "which is what the file's absent peers are listed by"
    assert result.name == "sampling cifar10 fp32, batch 8, 10 steps"
    assert (result.ours.error, result.peer.error, result.ours.mfu) == (1e-5, None, 0.5)


@pytest.mark.parametrize(
    ("header", "quick"),
    [({"rounds": 3}, True), ({"rounds": 5}, False), ({"quick": True}, True), ({"rounds": None}, False)],
)
def test_quick_files_are_known(read, header, quick):
    assert read(made([row()], **header)).quick is quick


def test_quick_files_of_older_loops_are_known(read):
    older = made([layer()], sizes={"rounds": 2}, absent=["diffusers is not installed: its loop is not beside"])
    del older["rounds"]
    result = read(older)
    assert result.quick and result.absences == {"diffusers": set()}


def without(line: dict, *names: str) -> dict:
    return {name: value for name, value in line.items() if name not in names}


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        pytest.param("{", "cannot read", id="no JSON"),
        pytest.param([1], "holds a list; expected the JSON that", id="a list"),
        pytest.param({"benchmarks": []}, "is pytest-benchmark's file; expected", id="pytest-benchmark"),
        pytest.param({"cases": {}}, "is a count of kernels, by benchmarks.kernels; expected", id="kernels"),
        pytest.param({"x": 1}, "has no list of results", id="anything"),
        pytest.param(without(made([row()]), "machine", "date"), "is no result: date, machine missing", id="header"),
        pytest.param(made([row()], rounds="60", absent=3), "is no result: absent, rounds missing", id="kinds"),
        pytest.param(made([]), "has no results: nothing was timed; measure again", id="empty"),
        pytest.param(
            made([row(), without(row(), "speedup_95")]),
            r"results\[1\] \(q_sample float32 2x3x4x4\) lacks a valid speedup_95; expected",
            id="no interval",
        ),
        pytest.param(made([row(speedup_95=[4.0])]), "lacks a valid speedup_95", id="half an interval"),
        pytest.param(made([{**row(), "speedup": "4"}]), "lacks a valid speedup", id="text"),
        pytest.param(made([{**row(), "speedup": float("nan")}]), "lacks a valid speedup", id="NaN"),
        pytest.param(made([row(torch={})]), r"lacks a valid torch\.median_s", id="no time"),
        pytest.param(made([without(row(), "measured")]), "lacks a valid measured", id="whose"),
        pytest.param(made([without(row(), "operation")]), r"results\[0\] lacks a valid operation", id="of what"),
        pytest.param(made([row(case=3)]), "lacks a valid case", id="case"),
        pytest.param(made([{**row(), "shape": 3}]), "lacks a valid shape", id="shape"),
        pytest.param(made([7]), r"results\[0\] lacks a valid object", id="a number"),
        pytest.param(made([without(GROWTH, "task")]), r"results\[0\] lacks a valid task", id="growth of what"),
        pytest.param(made([without(GROWTH, "fixed")]), "lacks a valid fixed", id="growth of which"),
        pytest.param(made([{**GROWTH, "points": [{"x": 0}]}]), r"lacks a valid points\.x", id="growth at 0"),
        pytest.param(made([{**GROWTH, "points": [{"x": 1}]}]), "valid points .seconds, peak_bytes", id="points"),
        pytest.param(made([], noise=[without(NOISE, "stored")]), r"noise\[0\] lacks a valid peak_bytes", id="noise"),
        pytest.param(
            made([], noise=[without(NOISE, "fixed")]), r"noise\[0\] lacks a valid task or fixed", id="whose noise"
        ),
    ],
)
def test_what_is_no_result_says_why(read, holds, message):
    with pytest.raises(InputError, match=message):
        read(holds)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.json: No such file"):
        read_result(tmp_path / "nowhere.json")


# --- drawings


def bars(axes) -> list:
    """(where it starts, where it ends, colour) of each bar, from the top."""
    boxes = sorted(axes.patches, key=lambda bar: bar.get_y())
    return [(bar.get_x(), bar.get_x() + bar.get_width(), to_hex(bar.get_facecolor()).upper()) for bar in boxes]


def test_bars_of_speed_up(read):
    lines = [
        row(),
        row(baseline="diffusers", speedup=0.5),
        row(shape=(1, 3, 8, 8), speedup=9.0),
        row("reverse_step", baseline="diffusers", speedup=3.0),
    ]
    absent = {"diffusers": {"q_sample float32 1x3x8x8"}, "denoising-diffusion-pytorch": set()}
    figure = drawings.draw_speedups(read(made(lines)).rows, "A title", absent)
    small, large = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["2x3x4x4", "1x3x8x8"]
    blue, orange = drawings.PEERS["diffusers"], drawings.PEERS["torch"]
    assert bars(small) == [(1, 0.5, blue), (1, 4.0, orange), (1, 3.0, blue)], "not from the line at 1 to the ratio"
    assert bars(large) == [(1, 9.0, orange)]
    assert [label.get_text() for label in small.get_yticklabels()] == ["q_sample float32", "reverse_step float32"]
    assert small.get_xscale() == "log"
    assert any(np.array_equal(line.get_xdata(), [1, 1]) for line in small.lines), "no line at 1"
    low, high = small.get_xlim()
    assert low < 0.5 * 0.95 and high > 9.0 * 1.05, "an interval is cut off"
    texts = [text.get_text() for text in large.texts]
    assert texts == ["9x", "diffusers: absent"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        *("beside diffusers", "beside torch", "denoising-diffusion-pytorch: absent", "1: as fast as the peer"),
    ]
    # The intervals, as the error bars have them.
    segments = sorted(bar.get_segments()[0][:, 0].tolist() for bar in small.collections)
    np.testing.assert_allclose(segments, [[0.475, 0.525], [2.85, 3.15], [3.8, 4.2]])


def test_floors_stand_below_the_time_measured(read):
    rows = [each for each in read(made([COPY, NORMAL, row()])).rows if each.operation == "q_sample"]
    (axes,) = drawings.draw_floors(rows, "A title").axes
    points = {line.get_label(): line.get_xdata()[0] for line in axes.lines if not line.get_label().startswith("_")}
    assert points == pytest.approx({"bytes": 1e-4, "normals": 8e-4, "measured": 1e-3})
    said, header = (text.get_text().split() for text in axes.texts)
    assert dict(zip(header, said, strict=True)) == {"floor": "80%", "GB/s": "0.01", "copy": "10%"}


def test_the_roof_is_what_the_machine_does(read):
    """Of 3e10 operations on 3e8 bytes: 0.3 s of ours are 1e11 a second at 100 a byte."""
    lines = [
        *(layer(), layer(baseline="torch", speedup=1.2), layer("training", speedup=2.0)),
        *(layer(dtype="bf16"), layer(network="digits", flops=3e9)),
    ]
    rows = read(made(lines, ceilings={"copy_bytes_per_s": 4e9, "flops_per_s": {"fp32": 2e11, "bf16": 8e11}})).rows
    fp32, bf16 = drawings.draw_roofline(rows, "flops", "A title").axes
    for axes, peak in ((fp32, 2e11), (bf16, 8e11)):
        roof = axes.lines[0].get_xydata()
        np.testing.assert_allclose(roof[1], [peak / 4e9, peak])
        assert roof[0][1] / roof[0][0] == pytest.approx(4e9) and roof[2][1] == peak
    points = {line.get_label(): tuple(line.get_xydata()[0]) for line in fp32.lines[1:]}
    case = "sampling cifar10 fp32 8 [calls], ddpm_fast beside"
    assert points[f"{case} torch"] == pytest.approx((100, 1e11)), "the fastest peer stands for all"
    assert points[f"{case} torch: peer"] == pytest.approx((100, 1e11 / 1.2))
    assert f"{case} diffusers" not in points
    assert points["sampling digits fp32 8 [calls], ddpm_fast beside diffusers"] == pytest.approx((10, 1e10))
    assert len(bf16.lines) == 3


def test_the_roof_of_an_op_is_in_normals(read):
    rows = [each for each in read(made([COPY, NORMAL, row()])).rows if each.operation == "q_sample"]
    (axes,) = drawings.draw_roofline(rows, "normals", "A title").axes
    ours = axes.lines[1].get_xydata()[0]
    np.testing.assert_allclose(ours, [THREADS * 1e6 * 1e-3 / 10_000, THREADS * 1e6])


def test_growth(read):
    lines = [GROWTH, {**GROWTH, "task": "sampling"}, {**GROWTH, "axis": "image_size", "fixed": {"batch": 8}}]
    curves = read(made(lines)).curves
    figure = drawings.draw_growth([curve for curve in curves if curve.quantity == "time (s)"], "A title")
    batch, side = figure.axes
    assert [axes.get_xlabel() for axes in (batch, side)] == ["batch", "image size"]
    assert [line.get_label() for line in batch.lines] == [
        "training cifar10 fp32, 32 pixels:\nexponent 1.25",
        "sampling cifar10 fp32, 32 pixels, 1 steps:\nexponent 1.25",
    ]
    np.testing.assert_allclose(side.lines[0].get_xydata(), [[1, 0.1], [2, 0.2], [4, 0.4]])
    memory = next(curve for curve in curves if curve.quantity == "peak memory (MiB)")
    assert (memory.x, memory.y, memory.exponent) == ((2, 4), (1, 3), None), "a point at 0 has no logarithm"


def test_a_figure_says_that_it_is_not_for_timing(read):
    rows = read(made([COPY, NORMAL, row()])).rows
    for draw in (drawings.draw_speedups, drawings.draw_floors):
        assert "NOT FOR TIMING" in draw(rows, "A title", untimed=True).get_suptitle()
        assert "NOT FOR TIMING" not in draw(rows, "A title").get_suptitle()


@pytest.mark.parametrize("what", ["speedups", "floors"])
def test_texts_do_not_overlap(what):
    rows = [each for each in read_result(COMMITTED).rows if each.operation != "copy"]
    draw = {"speedups": drawings.draw_speedups, "floors": lambda *a: drawings.draw_floors(page.one_each(rows), a[1])}
    figure = draw[what](rows, "A title")
    figure.savefig("/dev/null", format="png")
    texts = [text for axes in figure.axes for text in [*axes.texts, *axes.get_yticklabels()]]
    for axes in figure.axes:  # ticks outside of an axis have texts too, which are not drawn
        low, high = axes.get_xlim()
        texts += [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    boxes = [(text, text.get_window_extent()) for text in texts if text.get_visible() and text.get_text()]
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 + 1, f"{text} is cut off"
        for other, taken in boxes[:i]:
            apart = box.x1 < taken.x0 or taken.x1 < box.x0 or box.y1 < taken.y0 or taken.y1 < box.y0
            assert apart or not taken.width, f"{text} and {other} overlap"


# --- the page


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_page_says_where_and_what(read, tmp_path):
    absent = {"diffusers: it is not installed": ["q_sample float32 2x3x4x4"]}
    result = read(made([COPY, NORMAL, row()], absent=absent, mismatches=["vlb_terms: is off by 3"]))
    text = drawn(result, tmp_path)
    for said in (
        *(
            "A Processor",
            "avx2",
            "2 threads used",
            "0.50, 0.25, 0.12",
            "torch 2.13.0",
            "c0ffee",
            "2026-01-02",
            "| 60 |",
        ),
        *("nothing changed", "diffusers: it is not installed (q_sample float32 2x3x4x4)", "vlb_terms: is off by 3"),
        *("| diffusers | diffusers, through its public interface | 0.42.1 | 0 of 2 cases |", "Not timed"),
    ):
        assert said in text
    cells = next(cells for cells in table_rows(text) if cells[0] == "q_sample float32")
    header = next(cells for cells in table_rows(text) if cells[0] == "case")
    said = dict(zip(header, cells, strict=True))
    assert said["time"] == "1 ms" and said["set by"] == "normals" and said["floor/time"] == "80%"
    assert said["torch: time, speed-up"] == "4 ms, **4.00x** (3.80..4.20)"
    assert (said["error"], said["peers' error"]) == ("1.0e-07", "2.0e-07")
    for name in re.findall(r"\]\((images/[^)]+)\)", text):
        with Image.open(tmp_path / name) as picture:
            assert picture.width == 1350


def test_the_page_names_what_is_not_faster(read, tmp_path):
    text = drawn(read(made([row(speedup=1.02), row("reverse_step", speedup=2.0)])), tmp_path)
    assert "**not faster**: q_sample float32 2x3x4x4 [calls], ddpm_fast beside torch: 1.02x (0.97..1.07)" in text
    assert "not faster**: reverse_step" not in text
    assert "not faster (an interval that reaches 1 or below): none" in drawn(read(made([row()])), tmp_path)


def test_the_page_of_a_gpu_has_a_part_for_each_setting(read, tmp_path):
    lines = [newer(row(), setting=setting) for setting in ("calls", "graph", "graph, L2 rotated")]
    result = made(lines, copy_bytes_per_s=1e12)
    result["machine"]["gpu"] = {"name": "A GPU", "state": {"driver_version": "580", "clocks.sm": "1980"}}
    text = drawn(read(result), tmp_path)
    assert re.findall("^### (.*)", text, re.M) == [f"Called as: {line['setting']}" for line in lines]
    assert "driver 580; clocks 1980 MHz" in text
    pictures = re.findall(r"images/(\S+)\.png", text)
    assert pictures[-1] == "page-result-floors-graph-L2-rotated" and len(set(pictures)) == 6


def test_the_page_of_loops_has_rates_and_notes(read, tmp_path):
    lines = [layer(notes=["the peer draws other noise"]), layer("training")]
    text = drawn(read(made(lines, failures=["unet: is off"])), tmp_path)
    assert "- the peer draws other noise (sampling cifar10 fp32 8)" in text
    header = next(cells for cells in table_rows(text) if cells[0] == "case")
    assert {"images/s", "MFU"} <= set(header) and "GB/s" not in header
    assert "- unet: is off" in text


def test_a_roofline_is_of_peers_that_do_the_same_work(read, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        drawings, "draw_roofline", lambda rows, *rest: given.extend(rows) or drawings.draw_speedups(rows, "A title")
    )
    peers = ("diffusers", "denoising-diffusion-pytorch")
    ceilings = {"copy_bytes_per_s": 2e10, "flops_per_s": {"fp32": 2e11}, "normals_per_s": 1e9}
    drawn(read(made([layer(baseline=peer) for peer in peers], ceilings=ceilings)), tmp_path)
    assert [row.baseline for row in given] == ["diffusers"], "its network has other FLOPs than those counted"


def test_the_page_of_growth(read, tmp_path):
    text = drawn(read(made([GROWTH], noise=[NOISE])), tmp_path)
    assert "### Growth of time (s)" in text and "### Growth of peak memory (MiB)" in text
    assert "| training cifar10 fp32, 32 pixels | batch | 1, 2, 4 | 0.1, 0.2, 0.4 | 1.25 |" in text
    assert "| training cifar10 fp32, 32 pixels | batch | 2, 4 | 1, 3 | - |" in text
    assert "| step cifar10 fp32, batch 8, 32 pixels | 3 | 2 | 1 |" in text
    assert "matched" not in text, "where nothing was compared"


def test_a_quick_file_is_drawn_and_marked(read, tmp_path):
    assert "**Not for timing.** Made by `--quick`, with 3 rounds" in drawn(read(made([row()], rounds=3)), tmp_path)
    assert "Not for timing" not in drawn(read(made([row()])), tmp_path)


def test_draw_writes_the_same_page_again(write, tmp_path):
    path = write(made([COPY, NORMAL, row()]))
    out = tmp_path / "new" / "page.md"
    results = [run("draw", path, "--out", out) for _ in range(2)]
    assert results[0].exit_code == 0, results[0].output
    assert f"Wrote {out}" in shown(results[0]) and results[0].stdout == results[1].stdout
    assert sorted(path.name for path in out.parent.rglob("*.*")) == [
        *("page-result-floors-calls.png", "page-result-roofline-calls.png", "page-result-speedup-calls.png"),
        "page.md",
    ]


def test_draw_refuses_two_results_of_one_name(write, tmp_path):
    (tmp_path / "other").mkdir()
    path = write(made([row()]))
    twin = tmp_path / "other" / path.name
    twin.write_text(path.read_text())
    result = run("draw", path, twin, "--out", tmp_path / "page.md")
    assert result.exit_code == 2 and "several results are called result" in shown(result)
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize("place", ["TEXT/page.md", "FOLDER"])
def test_draw_where_nothing_can_be_written(write, tmp_path, place):
    (tmp_path / "TEXT").write_text("")
    (tmp_path / "FOLDER").mkdir()
    result = run("draw", write(made([row()])), "--out", tmp_path / place)
    assert result.exit_code == 2 and re.search("cannot write|is a folder", shown(result))


def test_the_committed_page_is_that_of_the_committed_result(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    committed = (ROOT / "docs" / "benchmarks.md").read_text()
    command = re.search("Drawn by `(.*)`", committed).group(1)
    names = re.search("draw (.*) --out", command).group(1).split()
    page.draw([read_result(Path(name)) for name in names], tmp_path / "benchmarks.md", command)
    linkless = re.compile(r"\[([^\]]*\.json)\]\([^)]*\)|`([^`]*\.json)`")
    expected = (tmp_path / "benchmarks.md").read_text()
    assert linkless.sub(r"\1\2", committed) == linkless.sub(r"\1\2", expected), f"draw it again: {command}"
    for name in re.findall(r"images/[\w.-]+\.png", committed):
        assert (ROOT / "docs" / name).exists()


# --- comparing


def slowed(line: dict, factor: float) -> dict:
    """The row as it would be if ours took so many times as long."""
    line = copy.deepcopy(line)
    line["speedup"] /= factor
    line["speedup_95"] = [ratio / factor for ratio in line["speedup_95"]]
    line["ddpm_fast"]["median_s"] *= factor
    return line


def test_a_planted_slowdown_is_found_in_the_committed_result(write):
    new = json.loads(COMMITTED.read_text())
    chosen = next(i for i, line in enumerate(new["results"]) if line["operation"] == "reverse_step")
    new["results"][chosen] = slowed(new["results"][chosen], 1.25)
    result = run("compare", COMMITTED, write(new))
    assert result.exit_code == 1
    assert "reverse_step float32 128x3x32x32" in shown(result) and "+25%" in shown(result)
    others = sum(line["operation"] != "copy" for line in new["results"]) - 1
    assert "1 slower and 0 faster beyond noise" in shown(result) and f"{others} as before" in shown(result)
    back = run("compare", write(new), COMMITTED)
    assert back.exit_code == 0 and "0 slower and 1 faster" in shown(back) and "-20%" in shown(back)


@pytest.mark.parametrize(
    ("spread", "factor", "changes"),
    [
        pytest.param(0.05, 1.08, False, id="the intervals overlap"),
        pytest.param(0.001, 1.02, False, id="apart, but by less than 3%"),
        pytest.param(0.01, 1.05, True, id="apart, and by more"),
    ],
)
def test_noise_is_ignored(read, spread, factor, changes):
    line = row(spread=spread)
    for scale, slower, faster in ((factor, changes, False), (1 / factor, False, changes)):
        found = compare.compare(read(made([line]), "old"), read(made([newer(slowed(line, scale))]), "new"))
        assert (len(found.slower), len(found.faster), found.same) == (slower, faster, not changes)


def test_the_worst_comes_first(read):
    lines = [row(name, spread=0.01) for name in ("q_sample", "reverse_step", "vlb_terms")]
    new = [slowed(line, factor) for line, factor in zip(lines, (1.1, 2.0, 1.5), strict=True)]
    found = compare.compare(read(made(lines), "old"), read(made(new), "new"))
    assert [change.new.operation for change in found.slower] == ["reverse_step", "vlb_terms", "q_sample"]
    assert [change.slowdown for change in found.slower] == pytest.approx([1.0, 0.5, 0.1])


def test_rows_are_matched_by_all_that_they_are(read):
    """Rows that differ in one thing alone are not taken for one another."""
    others = [
        *({"dtype": "bfloat16"}, {"shape": [1, 3, 4, 4]}, {"memory_format": "channels_last"}, {"setting": "graph"}),
        {"network": True},
    ]
    lines = [row(), row(baseline="diffusers"), *(row(**other) for other in others), layer(), layer(steps=20)]
    found = compare.compare(read(made(lines), "old"), read(made(lines[:1]), "new"))
    assert found.same == 1 and len(found.only_old) == len(lines) - 1 and not found.only_new


def test_copies_are_not_compared(read):
    found = compare.compare(read(made([COPY, row()]), "old"), read(made([row()]), "new"))
    assert found.same == 1 and not found.only_old


def test_rows_of_one_file_alone_and_what_failed_are_named(write):
    new = made([row(), layer()], mismatches=["normal: is off"])
    result = run("compare", write(made([row(), NORMAL]), "old"), write(new, "new"))
    assert result.exit_code == 0
    assert "Only in old.json: normal float32 2x3x4x4 [calls], ddpm_fast beside torch" in shown(result)
    assert "Only in new.json: sampling cifar10 fp32 8 [calls], ddpm_fast beside diffusers" in shown(result)
    assert "Not timed: normal: is off" in shown(result)


def test_other_machines_threads_and_versions_are_warned_of(write):
    new = made([row()])
    new["machine"] |= {"cpu": "Another", "threads": 8, "gpu": {"name": "A GPU"}}
    new["versions"] |= {"torch": "2.14.0", "ddpm_fast": "0.2.0", "triton": "3.9.0"}
    result = run("compare", write(made([row()]), "old"), write(new, "new"))
    for warning in (
        "the cpu differs: A Processor, then Another",
        "the number of threads differs: 2, then 8",
        "the GPU differs: None, then A GPU",
        "the version of torch differs: 2.13.0, then 2.14.0",
    ):
        assert f"Warning: {warning}" in shown(result)
    assert shown(result).count("Warning:") == 4, "of our own version, or of what the older file does not record"
    same = run("compare", write(made([row()]), "old"), write(made([newer(row())]), "new"))
    assert "Warning:" not in shown(same) and same.exit_code == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param(made([row()]), made([layer()]), "have nothing in common: 1 rows such as q_sample", id="apart"),
        pytest.param(made([row()]), made([COPY]), "no rows in the second", id="only a ceiling"),
        pytest.param(made([row()]), made([row()], rounds=3), "3 rounds (--quick), which time nothing", id="quick"),
        pytest.param(made([row(), row()]), made([row()]), "two rows of q_sample float32 2x3x4x4", id="twice"),
        pytest.param(made([row()]), {"benchmarks": []}, "is pytest-benchmark's file", id="another file"),
    ],
)
def test_what_cannot_be_compared_says_why(write, old, new, message):
    result = run("compare", write(old, "old"), write(new, "new"))
    assert result.exit_code == 2 and message in shown(result)
