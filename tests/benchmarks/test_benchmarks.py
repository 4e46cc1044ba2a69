"""The benchmarks' own parts: what they conclude from times, what they read from profilers, how they time a GPU (a
pretended one), which rows there are, and that the commands run."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import every_op
from torch.torch_version import TorchVersion
from typer.testing import CliRunner

from benchmarks import comparison, growth, kernels, layers, loading, machine, networks, ops, peers, sampling, timing
from benchmarks.__main__ import app
from benchmarks.operations import Case
from benchmarks.rows import Subject, duration, lines, rows
from benchmarks.runs import Mismatch, Options, Run
from ddpm_fast.errors import InputError
from ddpm_fast.loops import graphs

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MIB = 2**20
CASE = Case("q_sample", (128, 3, 32, 32))


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


# --- every committed row can still be had


def test_every_committed_row_is_still_measured():
    """Cases, shapes, dtypes and peers, without timing anything."""
    there = set()
    for case in ops.cases(False, CPU):
        others = ops.KINDS[case.operation].peers
        assert set(others) == set(ops.build(case._replace(shape=(2, 3, 4, 4)), CPU).peers), case
    for device in (CPU, torch.device("cuda")):
        for case in ops.cases(False, device):
            ours, others = ops.our_labels(case, device), ops.KINDS[case.operation].peers
            there |= {(case.subject.text, 1, mine, peer) for mine in ours for peer in others}
        for case in layers.cases(False, device):
            labels = layers.labels(case, device)
            ours = {"ddpm_fast", sampling.FOLDER, *comparison.WAYS[device.type]} & set(labels)
            there |= {(case.subject.text, case.steps, mine, peer) for mine in ours for peer in {*labels} - ours}
    series = growth.series(False, CPU)
    growing = {(s.fixed.task, s.axis, value) for s in series for value in s.values}
    by_cores = {(s.fixed.task, s.axis) for s in series if s.axis in ("threads", "ranks")}  # up to what a machine has
    committed = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert len(committed) >= 7
    found = 0
    for path in committed:
        result = json.loads(path.read_text())
        for row in result["rows"]:
            subject = row["subject"]
            assert (subject["text"], subject["steps"], row["measured"], row["baseline"]) in there, row
            found += 1
        for line in result.get("growth", []):
            for point in line["points"]:
                task, axis = line["task"], line["axis"]
                assert (task, axis) in by_cores or (task, axis, point["x"]) in growing, (task, axis, point)
    assert found >= 118 + 70 + 22


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_told_apart_and_cover_everything(device):
    chosen = ops.cases(False, torch.device(device))
    assert len(set(map(str, chosen))) == len(chosen) and {case.operation for case in chosen} == set(ops.KINDS)
    made = layers.cases(False, torch.device(device))
    assert len(set(map(str, made))) == len(made)
    assert {(case.layer, case.size, case.dtype) for case in made} == {
        (layer, size, dtype)
        for layer in layers.NETWORK + layers.LOOPS
        for size in layers.ALL_SIZES
        for dtype in ("fp32", "bf16")
        if device == "cuda" or size != "256x256" or layer == "unet forward"
    }
    assert made[0].dtype == "bf16" and made[0].size == "cifar10", "not the headline first"


def test_every_series_of_growth_is_planned():
    for device in ("cpu", "cuda"):
        made = growth.series(False, torch.device(device))
        assert {each.axis for each in made} >= {"batch", "image_size", "steps", "stored"}
        with torch.device("meta"):
            assert {growth.Point("training", "cifar10", 1, size).shape[-1] for size in (16, 128)} == {16, 128}


# --- what is concluded from times


def test_the_interval_of_a_median():
    assert timing.median_interval(np.full(20, 3.0)) == (3.0, 3.0)
    values = np.random.default_rng(1).normal(10.0, 1.0, 400)
    low, high = timing.median_interval(values)
    assert low < np.median(values) < high
    # A median's standard error is 1.25 sigma / sqrt(n).
    assert 0.5 < (high - low) / (2 * 1.96 * 1.2533 / math.sqrt(400)) < 2.0


SUBJECT = Subject("sampling", "sampling quick fp32 4", "sampling fp32, a batch", "quick", "fp32", 4, steps=2)


def test_a_row_has_the_median_of_the_rounds_ratios_and_its_floors():
    seconds = {"ours": np.array([1.0, 2.0, 4.0]), "torch": np.array([3.0, 6.0, 8.0])}
    (row,) = rows(SUBJECT, seconds, {"ours": {"flops": 1e9, "bytes": 1e6, "normals": 0}}, {"torch": 1e-7})
    assert (row.measured, row.baseline, row.speedup) == ("ours", "torch", 3.0)
    assert (row.ours.median_s, row.peer.median_s, row.ours.error, row.peer.error) == (2.0, 6.0, None, 1e-7)
    ceilings = {"bytes": 1e7, "flops fp32": 1e9, "flops bf16": 1e15, "normals": 1.0}
    assert row.floors(ceilings) == {"bytes": 0.1, "flops": 1.0} and row.floor(ceilings) == ("flops", 1.0)
    assert "50% of the time is the floor of the flops; torch 3.00x" in lines([row], ceilings)[0]
    (alone,) = rows(SUBJECT, {"ours": seconds["ours"]}, {"ours": {}}, {})
    assert alone.peer is None and "compared with nothing" in lines([alone], {})[0]


@pytest.mark.parametrize("nbytes", [1, 1000, 3 * MIB, 50 * MIB, 199 * MIB, 200 * MIB, 900 * MIB])
def test_a_rotation_overflows_the_l2(nbytes):
    sets = timing.rotation(nbytes, 50 * MIB)
    assert sets * nbytes >= 200 * MIB
    assert sets == 1 or (sets - 1) * nbytes < 200 * MIB


def test_settings_by_size():
    small, cifar, large = (ops.settings(nbytes, 50 * MIB) for nbytes in (24_000, 3 * MIB, 200 * MIB))
    assert [str(setting) for setting in small] == ["calls", "graph"]
    assert [str(setting) for setting in cifar] == ["calls", "graph", "graph, L2 rotated"]
    assert [str(setting) for setting in large] == ["calls"]
    assert ops.settings(24_000, None) == [ops.Setting()], "of the CPU"


def test_the_gpu_s_own_numbers():
    assert machine.issue_rate({"multiprocessors": 132, "sm_clock_hz": 1.98e9}) == 132 * 4 * 1.98e9
    assert machine.issue_rate({"multiprocessors": 132, "sm_clock_hz": None}) is machine.issue_rate(None) is None
    state = machine.smi_state("580.95, 1980, 1980, 3201, 312.5, 700.00, 41\n")
    assert state["clocks.sm"] == "1980" and state["driver_version"] == "580.95"
    assert machine.smi_state("") == machine.smi_state("No devices were found") == {}


@pytest.mark.parametrize(("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us")])
def test_durations(seconds, text):
    assert duration(seconds) == text


# --- what ncu says

HEADER = '"ID","Kernel Name","Block Size","Grid Size","Metric Name","Metric Unit","Metric Value"'
COUNTED = """"0","spin_kernel(long)","(1, 1, 1)","(1, 1, 1)","smsp__inst_executed.sum","inst","52"
"1","_kernel","(128, 1, 1)","(96, 4, 1)","gpu__time_duration.sum","ns","4,512"
"1","_kernel","(128, 1, 1)","(96, 4, 1)","smsp__inst_executed.sum","inst","1,234,567"
"2","fill(int)","(128, 1, 1)","(1, 1, 1)","smsp__inst_executed.sum","inst","433"
"""


def test_instructions_of_an_ncu_log(tmp_path, monkeypatch):
    log = tmp_path / "log.csv"
    log.write_text(f"==PROF== Connected to process 7\n{HEADER}\n{COUNTED}")
    monkeypatch.setattr(kernels, "variants", lambda options: [(CASE, "triton")])
    assert kernels.read(log, Options(log)) == {(str(CASE), "triton"): 1_235_000}
    monkeypatch.setattr(kernels, "variants", lambda options: [(CASE, "cuda"), (CASE, "triton")])
    with pytest.raises(InputError, match=r"1 marks .* expected 2"):
        kernels.read(log, Options(log))
    with pytest.raises(InputError, match="cannot read"):
        kernels.read(tmp_path / "none.csv", Options(log))
    assert "only a GPU's kernels" in run("kernels", "--device", "cpu").stderr


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_each_variant_is_warm_and_alone_when_it_is_profiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    case = Case("reverse_step", (2, 3, 4, 4))
    operation, steps = ops.build(case, CPU), []
    operation.key.step.zero_()

    def note() -> None:
        steps.append(int(operation.key.step))

    kernels.call_each([(case, "cpu"), (case, "reference")], CPU, note, note)
    assert steps == [2, 3, 5, 6], "two calls to warm up, then the one that counts"


# --- variants


@pytest.mark.parametrize("case", ops.cases(True, CPU)[:20], ids=str)
def test_a_replica_has_the_same_values_in_other_memory(case):
    operation = ops.build(case, CPU)
    replica = ops.replica(case, CPU, operation.shared)
    assert replica.key.step.data_ptr() != operation.key.step.data_ptr()
    for label in (*ops.our_labels(case, CPU), *ops.KINDS[case.operation].peers):
        if not ops.absent(case, label, True, CPU):
            assert ops.check(replica, label) <= operation.tolerance
            if case.operation not in ("normal", "copy") and label in operation.peers:
                noise = replica.randn(torch.Generator().manual_seed(1))
                with operation.running(label):
                    pairs = list(zip(operation.variant(label)(noise), replica.variant(label)(noise), strict=True))
                assert all(torch.equal(a, b) for a, b in pairs) or label == peers.DIFFUSERS, label


def test_a_result_that_differs_is_not_timed():
    operation = ops.replica(Case("q_sample", (2, 3, 4, 4)), CPU, {})
    right = operation.expected
    operation.expected = lambda noise: tuple(1.001 * x for x in right(noise))
    with pytest.raises(Mismatch, match="ddpm_fast does not give the result of q_sample float32 2x3x4x4"):
        ops.check(operation, "ddpm_fast")


def test_a_backend_that_is_not_there_is_absent_with_a_reason():
    assert "backend 'cuda'" in ops.absent(CASE, "cuda", False, CPU)
    with pytest.raises(InputError, match="backend 'gpu' is unknown"):
        ops.our_labels(CASE, CPU, ("gpu",))


@pytest.fixture
def unknown_peers(monkeypatch):
    peers.absent.cache_clear()
    yield monkeypatch
    peers.absent.cache_clear()


def test_a_peer_that_is_not_installed_says_how_to_install_it(unknown_peers):
    unknown_peers.setattr(peers, "MODULES", {peers.LUCIDRAINS: "no_such_module"})
    assert peers.absent(peers.LUCIDRAINS).endswith("is not installed: pip install -e '.[all-peers]'")


def test_a_peer_whose_import_fails_is_absent_with_its_reason(unknown_peers, tmp_path):
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    unknown_peers.syspath_prepend(tmp_path)
    unknown_peers.setattr(peers, "MODULES", {peers.LUCIDRAINS: "broken_peer"})
    reason = peers.absent(peers.LUCIDRAINS)
    assert "RuntimeError: operator torchvision::nms" in reason and "same index" in reason


def test_a_run_that_differs_is_not_timed():
    with pytest.raises(InputError, match=r"sampling is off by 0\.01"):
        comparison.deviation(torch.full((4,), 1.01), torch.ones(4), 1e-3, "sampling")
    with pytest.raises(InputError, match="off by nan"):
        comparison.deviation(torch.tensor([math.nan]), torch.ones(1), 1e-3, "sampling")


def test_what_is_not_compiled(monkeypatch):
    case = comparison.Case("training", "digits", "bf16", 4)
    compiling = Options(Path(), compiling=True)
    assert "--compile" in comparison.uncompiled(case, CPU, Options(Path()))
    assert not comparison.uncompiled(case, torch.device("cuda"), compiling)
    *others, tuned = comparison.compiled_labels(torch.device("cuda"))
    assert len(others) == 2 and "--max-autotune" in comparison.uncompiled(case, CPU, compiling, tuned)
    assert not comparison.uncompiled(case._replace(layer="sampling"), CPU, compiling)
    for version, is_wrong in (("2.9.1", True), ("2.13.0+cpu", True), ("2.14.1", False)):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        assert ("gradients are wrong" in comparison.uncompiled(case, CPU, compiling)) is is_wrong


@pytest.mark.skipif(bool(peers.absent(peers.DIFFUSERS)), reason="diffusers is not installed")
@pytest.mark.parametrize("layer", ["sampling", "training", "unet forward"])
def test_every_way_of_compiling_is_a_variant_and_one_that_fails_is_absent(layer, monkeypatch):
    """As on a GPU, with a compiler that does nothing, or raises."""

    def compiled(function, mode):
        if mode == "max-autotune":
            raise RuntimeError("no kernel\nfits")
        return function

    monkeypatch.setattr(comparison, "compiled_labels", lambda device: tuple(comparison.MODES))
    monkeypatch.setattr(peers, "compiled", compiled)
    started = Run(Options(Path(), quick=True, compiling=True, autotuning=True), {})
    made = layers.compared(comparison.Case(layer, "quick", "fp32", 2, steps=2), started)
    default, graphs_, tuned = comparison.MODES
    assert {default, graphs_} <= set(made.runs) and tuned not in made.runs
    assert f"{tuned}: RuntimeError: no kernel" in started.found["absent"] and not started.found["failures"]
    made.runs[graphs_]()


def test_only_what_matches_is_timed_and_the_steps_count(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def lasts(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    case = comparison.Case("sampling", "quick", "fp32", 4, steps=2)
    started = Run(Options(tmp_path / "r.json", rounds=3), {})
    made = comparison.Comparison(case, started)
    made.counts = {"flops": 1e6}
    made.ours.append("ddpm_fast")
    made.runs |= {"ddpm_fast": lasts(4.0), "torch": lasts(12.0), "wrong": lasts(0.0)}
    made.compare("wrong", torch.full((4,), 1.01), torch.ones(4), 1e-3)
    (row,) = made.rows()
    assert row.baseline == "torch" and row.speedup == pytest.approx(3.0) and row.ours.median_s == pytest.approx(2.0)
    assert "wrong is off by 0.01" in started.found["failures"][0]


# --- a GPU that is pretended, with torch.cuda's names as the benchmarks use them


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Graph:
    made = ()
    replays = 0

    def __init__(self):
        Graph.made = (*Graph.made, self)

    def replay(self):
        self.replays += 1


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(Graph, "made", ())
    fakes = {"Event": Event, "Stream": Stream, "CUDAGraph": Graph, "current_stream": Stream}
    fakes |= {"stream": contextlib.nullcontext, "device": contextlib.nullcontext, "synchronize": lambda device: None}
    fakes |= {"graph_pool_handle": lambda: (0, 1), "graph": lambda graph, **options: contextlib.nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graphs, "_capture_stream", Stream)  # the real one keeps what it made
    return torch.device("cuda")


def test_a_graph_takes_the_sets_in_turn(pretended):
    order = []
    batch = timing.graph_batch([lambda i=i: order.append(i) for i in range(20)], pretended)
    captured = order[timing.WARMUP :]
    assert captured == [*range(20)] * 3, "the 50 calls that a graph has at least are whole rounds"
    assert batch.calls % 60 == 0
    before = Graph.made[0].replays
    batch.run()
    assert Graph.made[0].replays - before == batch.calls // 60
    assert len(order) == timing.WARMUP + 60, "replays call nothing"


@pytest.mark.parametrize(("call_seconds", "calls"), [(1e-4, 20), (1.5e-4, 14), (1.0, 1), (1e-9, timing.MAX_REPEATS)])
def test_a_batch_fills_its_time(pretended, monkeypatch, call_seconds, calls):
    monkeypatch.setattr(timing, "BATCH_SECONDS", 2e-3)
    taken = iter([10 * call_seconds] + [call_seconds] * timing.WARMUP)  # the first run also warms up
    monkeypatch.setattr(timing, "seconds_of", lambda run, device: run() or next(taken))
    made = []
    batch = timing.batch([lambda: made.append(None)], pretended)
    assert batch.calls == calls
    made.clear()
    batch.run()
    assert len(made) == calls


def test_diffusers_is_not_in_graphs(pretended):
    operation, left_out = ops.replica(Case("q_sample", (2, 3, 4, 4)), CPU, {}), {}
    noise = torch.zeros(2, 3, 4, 4)
    operation.device, operation.draw = pretended, lambda given: noise
    made = ops.batches(operation, ["torch", peers.DIFFUSERS], ops.Setting(True), left_out.__setitem__)
    assert list(made) == ["torch"] and "counts steps on the host" in left_out[peers.DIFFUSERS]


# --- runs and commands


def test_a_run_keeps_what_it_had_and_says_what_it_left_out(tmp_path, capsys):
    made = Run(Options(tmp_path / "r.json", minutes=60), {})
    seen = []

    def measure(case: str) -> None:
        seen.append(json.loads(made.options.out.read_text())["failures"] if made.options.out.exists() else None)
        if case == "b":
            raise Mismatch("b is wrong")
        if case == "c":
            made.started -= 3601

    made.each(["a", "b", "c", "d"], measure)
    assert seen == [None, [], ["b is wrong"]], "not written after each case"
    with pytest.raises(BaseException) as stopped:  # typer's Exit is no Exception's subclass in every version
        made.finish()
    assert getattr(stopped.value, "exit_code", 1) == 1
    assert json.loads(made.options.out.read_text())["left_out"] == ["d"]
    assert "Left out, as the 60 minutes were over: d" in capsys.readouterr().out


def test_ops(tmp_path):
    out = tmp_path / "r.json"
    made = run("ops", "--quick", "--only", "reverse_step float32 4x3", "--out", out)
    assert made.exit_code == 0, made.output
    found = json.loads(out.read_text())
    assert {row["measured"] for row in found["rows"]} == {"ddpm_fast"} and found["absent"] and not found["failures"]
    made = run("ops", "--quick", "--only", "normal", "--backend", "cpu", "--backend", "cuda", "--out", out)
    assert made.exit_code == 1 and "Failed: normal float32 4x3x16x16: cuda:" in made.output
    assert {row["measured"] for row in json.loads(out.read_text())["rows"]} == {"cpu"}


@pytest.mark.parametrize(
    ("command", "only"),
    [("network", "quick fp32"), ("loops", "training quick fp32"), ("loops", "sampling quick bf16 2")],
)
def test_layers(command, only, tmp_path):
    made = run(command, "--quick", "--device", "cpu", "--only", only, "--out", tmp_path / "l.json")
    what = layers.NETWORK if command == "network" else layers.LOOPS
    assert made.exit_code == 0, made.output
    found = json.loads((tmp_path / "l.json").read_text())
    assert found["rows"] and not found["failures"] and set(found["networks"]) == {"quick"}
    assert all(row["counts"]["flops"] > 0 and row["subject"]["place"] == "quick" for row in found["rows"])
    for case in (case for case in layers.cases(True, CPU) if only in str(case) and case.layer in what):
        there = {row["baseline"] for row in found["rows"] if row["subject"]["text"] == str(case)}
        absent = {reason.split(": ")[0] for reason, cases in found["absent"].items() if str(case) in cases}
        without = peers.absent(peers.DIFFUSERS)  # then its variants go unmentioned
        gone = {label for label in layers.labels(case, CPU) if label.startswith("diffusers ")} | {sampling.FOLDER}
        wanted = {*layers.labels(case, CPU)[1:]} - (gone if without else set())
        assert (there | absent) - {""} == wanted and not there & absent, case


def test_what_is_not_known_is_refused(tmp_path):
    for arguments, message in (
        (["loops", "--size", "512"], "size '512' is unknown"),
        (["network", "--only", "tea"], "no case's name holds"),
        (["growth", "--only", "tea"], "noise loss"),
        (["fidelity", "--n", "1"], "at least 2 images"),
    ):
        made = run(*arguments, "--device", "cpu", "--out", tmp_path / "l.json")
        assert made.exit_code == 2 and message in made.stderr
    with pytest.raises(InputError, match="size '8x8' is unknown; there are digits, cifar10"):
        networks.network("8x8")


def test_every_op_for_the_sanitizer():
    made = CliRunner().invoke(every_op.app, ["--device", "cpu", "--backend", "cpu"])
    assert made.exit_code == 0 and "cpu: ran 16 shapes" in made.output
    made = CliRunner().invoke(every_op.app, ["--device", "cpu", "--backend", "none"])
    assert made.exit_code == 2 and "no backend could run" in made.stderr


def test_fidelity_and_fp32_is_the_exact_mode(tmp_path):
    out = tmp_path / "f.json"
    made = run("fidelity", "--n", 4, "--steps", 5, "--device", "cpu", "--out", out)
    assert made.exit_code == 0, made.output
    written = json.loads(out.read_text())
    fp32, bf16 = written["fidelity"]
    assert (fp32["mode"], bf16["mode"]) == ("fp32", "bf16") and written["control"]["steps"] == 1
    assert fp32["mean_levels"] < 0.05 and 0 < bf16["mean_levels"] < 20


@pytest.mark.parametrize("task", ["sampling", "training", "step", "loss"])
def test_a_point_s_time_and_memory(task):
    measured = growth.measured(growth.Point(task, "quick", 2, 32 if task == "loss" else 16))
    assert measured["seconds"] > 0 and measured["peak_bytes"] >= 0


def test_the_peak_of_memory_is_seen():
    before = growth.memory("VmRSS")
    held = torch.ones(2**24)
    del held
    assert growth.memory("VmHWM") - before > 60 * MIB
    with pytest.raises(InputError, match="loss, batch -1, 16 pixels: "):
        growth.measured_apart(growth.Point("loss", "quick", -1, 16))


@pytest.mark.slow
def test_loading(tmp_path):
    for point in loading.points(quick=True)[::2]:
        found = loading.measured(str(loading.make(point, tmp_path)), 2)
        assert found["count"] == 100 and found["images_per_second"] > 0 and 0 <= found["waited"] <= 1
        assert found["anonymous_bytes_of_the_set"] < found["anonymous_bytes"] <= found["peak_bytes"]


def test_growth(tmp_path):
    made = run("growth", "--quick", "--device", "cpu", "--only", "noise loss", "--out", tmp_path / "g.json")
    assert made.exit_code == 0, made.output
    (line,) = json.loads((tmp_path / "g.json").read_text())["growth"]
    assert line["task"] == "loss" and [point["x"] for point in line["points"]] == [1, 0] and line["noise_bytes"] > 0


def gpu_sh(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_gpu_sh_refuses_what_it_does_not_know(tmp_path):
    made = gpu_sh("--out", str(tmp_path), "benchmark")
    assert made.returncode == 2 and "benchmark is no section" in made.stderr
    assert gpu_sh().returncode == gpu_sh("--out", str(tmp_path), "--minutes", "2").returncode == 2
    assert "--wheels" in gpu_sh("--help").stdout


@pytest.mark.slow
def test_gpu_sh_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = gpu_sh("--out", str(tmp_path), "tests", "loops")
    assert made.returncode == 0
    summary = made.stdout.split("summary")[1]
    assert summary.count("skipped: no CUDA device") == 2 and "\nops" not in summary
    assert (tmp_path / "gpu.log").read_text() == made.stdout


if torch.cuda.is_available():

    @pytest.mark.gpu
    @pytest.mark.parametrize("sets", [1, 3])
    @pytest.mark.parametrize("make", [timing.batch, timing.graph_batch])
    def test_a_batch_makes_as_many_calls_as_it_says(make, sets):
        device = torch.device("cuda")
        counters = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(sets)]
        batch = make([lambda counter=counter: counter.add_(1) for counter in counters], device)
        before = sum(int(counter) for counter in counters)
        seconds = timing.seconds_of(batch.run, device)
        assert sum(int(counter) for counter in counters) - before == batch.calls
        assert 0 < seconds < 1

    @pytest.mark.gpu
    def test_after_a_capture_that_failed_others_succeed():
        device = torch.device("cuda")
        x, stream = torch.ones(4, device=device), torch.cuda.current_stream()
        with pytest.raises(RuntimeError):
            timing.graph_batch([lambda: x.sum().item()], device)
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()
        assert timing.graph_batch([lambda: x + 1], device).calls >= timing.GRAPH_CALLS

    @pytest.mark.gpu
    def test_the_ceilings_of_this_gpu():
        card = machine.gpu(torch.device("cuda"))
        assert card["l2_bytes"] > MIB and card["multiprocessors"] > 0
        assert machine.copy_bandwidth(torch.device("cuda")) > 1e10

    @pytest.mark.gpu
    @pytest.mark.parametrize("only", ["q_sample uint8 4x3", "hybrid_loss float32 4x3"])
    def test_ops_on_this_gpu(only, tmp_path):
        made = run("ops", "--quick", "--device", "cuda", "--only", only, "--out", tmp_path / "r.json")
        assert made.exit_code == 0, made.output
        found = json.loads((tmp_path / "r.json").read_text())["rows"]
        assert {row["setting"] for row in found} == {"calls", "graph"}
