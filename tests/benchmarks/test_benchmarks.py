"""The benchmarks' own parts: what they conclude from times, what they read from profilers, how they time a GPU (a
pretended one), and that their programs run."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion
from typer.testing import CliRunner

from benchmarks import (
    cases,
    comparison,
    fidelity,
    growth,
    kernels,
    loop,
    machine,
    networks,
    peers,
    ratios,
    report,
    sanitize,
    timing,
)
from benchmarks.operations import Case
from ddpm_fast.errors import InputError
from ddpm_fast.loops import graphs

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MIB = 2**20


# --- what is concluded from times


def test_the_interval_of_a_median():
    assert timing.median_interval(np.full(20, 3.0)) == (3.0, 3.0)
    values = np.random.default_rng(1).normal(10.0, 1.0, 400)
    low, high = timing.median_interval(values)
    assert low < np.median(values) < high
    # A median's standard error is 1.25 sigma / sqrt(n).
    assert 0.5 < (high - low) / (2 * 1.96 * 1.2533 / math.sqrt(400)) < 2.0
    assert timing.median_interval(values) == (low, high), "another interval of the same values"


def test_a_ratio_is_that_of_each_round():
    ours, baseline = np.array([1.0, 2.0, 4.0]), np.array([3.0, 6.0, 8.0])
    assert timing.ratio(baseline, ours)["speedup"] == 3.0


@pytest.mark.parametrize("nbytes", [1, 1000, 3 * MIB, 50 * MIB, 199 * MIB, 200 * MIB, 900 * MIB])
def test_a_rotation_overflows_the_l2(nbytes):
    sets = timing.rotation(nbytes, 50 * MIB)
    assert sets * nbytes >= 200 * MIB
    assert sets == 1 or (sets - 1) * nbytes < 200 * MIB


def test_settings_by_size():
    small, cifar, large = (ratios.settings(nbytes, 50 * MIB) for nbytes in (24_000, 3 * MIB, 200 * MIB))
    assert [str(setting) for setting in small] == ["calls", "graph"]
    assert [str(setting) for setting in cifar] == ["calls", "graph", "graph, L2 rotated"]
    assert [str(setting) for setting in large] == ["calls"]
    assert ratios.settings(24_000, None) == [ratios.Setting()], "of the CPU"


def test_repeats_fill_the_time_of_a_batch():
    assert timing.repeats_for(0.3e-3) == 14
    assert timing.repeats_for(1.0) == 1
    assert timing.repeats_for(0.0) == timing.MAX_REPEATS


def test_the_floor_is_the_larger_time():
    assert machine.floor(bytes=2e-3, instructions=0.0) == (2e-3, "bytes")
    assert machine.floor(bytes=2e-3, instructions=1e-2) == (1e-2, "instructions")
    ceilings = machine.Ceilings(4e12, {"fp32": 1e13, "bf16": 1e14}, 1e11)
    assert ceilings.floor(8e9, 1e11, "fp32", 0) == (1e-2, "flops")
    assert ceilings.floor(8e9, 1e11, "bf16", 0) == (2e-3, "bytes")
    assert ceilings.floor(8e9, 1e11, "bf16", 1e9) == (1e-2, "normals")


def test_the_issue_rate():
    assert machine.issue_rate({"multiprocessors": 132, "sm_clock_hz": 1.98e9}) == 132 * 4 * 1.98e9
    assert machine.issue_rate({"multiprocessors": 132, "sm_clock_hz": None}) is None
    assert machine.issue_rate(None) is None


def test_nvidia_smi_is_believed_only_with_as_many_values_as_asked_for():
    state = machine.smi_state("580.95, 1980, 1980, 3201, 312.5, 700.00, 41\n")
    assert state["clocks.sm"] == "1980" and state["driver_version"] == "580.95"
    assert machine.smi_state("") == machine.smi_state("No devices were found") == {}
    assert machine.smi_state("1, 2, 3, 4, 5, 6, 7\n1, 2, 3, 4, 5, 6, 7") == {}


def test_a_markdown_table():
    table = report.markdown_table(("case", "time"), [("a|b", "1 ms")])
    assert table == "| case | time |\n| --- | ---: |\n| a\\|b | 1 ms |\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us"), (0.9996, "1e+03 ms")]
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


# --- what profilers say

TRACE = {  # one call of Kineto's trace: an op on the CPU, the mark, a kernel of ours, a copy, another kernel
    "traceEvents": [
        {"ph": "X", "cat": "cpu_op", "name": "ddpm_fast::q_sample", "ts": 1.0, "dur": 9.0, "args": {"External id": 1}},
        {
            **{"ph": "X", "cat": "kernel", "name": "loss_kernel", "pid": 0, "tid": 7, "ts": 40.5, "dur": 2.25},
            "args": {"stream": 7, "registers per thread": 40, "grid": [12, 1, 1], "block": [128, 1, 1]},
        },
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 30.0, "dur": 1.0, "args": {"bytes": 4}},
        {
            **{"ph": "X", "cat": "kernel", "name": "void q_sample<float>(int)", "pid": 0, "tid": 7, "ts": 20.0},
            **{"dur": 4.5, "args": {"registers per thread": 32, "grid": [96, 4, 1], "block": [256, 1, 1]}},
        },
        {
            **{"ph": "X", "cat": "kernel", "name": "at::cuda::(anonymous namespace)::spin_kernel(long)"},
            **{"ts": 10.0, "dur": 1.0, "args": {"grid": [1, 1, 1], "block": [1, 1, 1]}},
        },
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
    ]
}
COLUMNS = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device"'
)
NCU = f"""==PROF== Connected to process 7 (/usr/bin/python3)
==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 1 pass
{COLUMNS},"CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python3","127.0.0.1","spin_kernel(long)","1","7","(1, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler \
metrics","smsp__inst_executed.sum","inst","52"
"1","7","python3","127.0.0.1","_q_sample_kernel","1","7","(128, 1, 1)","(96, 4, 1)","0","9.0","Command line profiler \
metrics","gpu__time_duration.sum","ns","4,512"
"1","7","python3","127.0.0.1","_q_sample_kernel","1","7","(128, 1, 1)","(96, 4, 1)","0","9.0","Command line profiler \
metrics","smsp__inst_executed.sum","inst","1,234,567"
"2","7","python3","127.0.0.1","fill(int)","1","7","(128, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler \
metrics","gpu__time_duration.sum","ns","900"
"2","7","python3","127.0.0.1","fill(int)","1","7","(128, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler \
metrics","smsp__inst_executed.sum","inst","433"
"""
CASE = Case("q_sample", (128, 3, 32, 32))


def test_kernels_of_a_kineto_trace():
    found = kernels.by_variant(kernels.from_trace(TRACE), [(str(CASE), "cuda")])
    assert found == {
        str(CASE): {
            "cuda": [
                {
                    **{"name": "void q_sample<float>(int)", "grid": [96, 4, 1], "block": [256, 1, 1]},
                    **{"nanoseconds": 4500.0, "registers": 32},
                },
                {
                    **{"name": "loss_kernel", "grid": [12, 1, 1], "block": [128, 1, 1]},
                    **{"nanoseconds": 2250.0, "registers": 40},
                },
            ]
        }
    }
    assert kernels.seconds(found, CASE, "cuda") == pytest.approx(6.75e-6)
    assert kernels.instructions(found, CASE, "cuda") is None, "the trace counts none"
    assert kernels.instructions(found, CASE, "triton") is None


def test_kernels_of_an_ncu_log():
    found = kernels.by_variant(kernels.from_ncu(NCU), [(str(CASE), "triton")])
    assert [kernel["name"] for kernel in found[str(CASE)]["triton"]] == ["_q_sample_kernel", "fill(int)"]
    assert kernels.instructions(found, CASE, "triton") == 1_235_000
    assert kernels.seconds(found, CASE, "triton") == pytest.approx(5.412e-6)
    row = kernels.cells(found)[0]
    assert row[:5] == [str(CASE), "triton", "_q_sample_kernel", "96x4x1", "128x1x1"] and row[6] == "-"
    n_a = kernels.from_ncu(NCU.replace("1,234,567", "n/a"))
    assert kernels.instructions(kernels.by_variant(n_a, [(str(CASE), "triton")]), CASE, "triton") is None


def test_a_profile_with_a_mark_too_many_says_nothing():
    with pytest.raises(InputError, match=r"1 marks .* expected 2"):
        kernels.by_variant(kernels.from_ncu(NCU), [("a", "cuda"), ("b", "cuda")])


def test_ncu_is_started_with_the_clocks_left_alone(tmp_path, monkeypatch):
    script = f"""#!/bin/bash
printf '%s\\n' "$@" > {tmp_path}/arguments
while [ "$1" != --log-file ]; do shift; done
cat > "$2" <<'END'
{NCU}
END
"""
    (tmp_path / "ncu").write_text(script)
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert len(kernels.profiled_by_ncu(["--out", "x.json"])) == 3
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[arguments.index("--clock-control") + 1] == "none"
    assert arguments[-6:] == [sys.executable, "-m", "benchmarks.kernels", "--out", "x.json", "--inside-ncu"]

    (tmp_path / "ncu").write_text("#!/bin/bash\necho '==ERROR== ERR_NVGPUCTRPERM'; exit 1\n")
    with pytest.raises(InputError, match=r"status 1.*\n.*ERR_NVGPUCTRPERM"):
        kernels.profiled_by_ncu([])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_each_variant_is_warm_and_alone_when_it_is_profiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    case = Case("reverse_step", (2, 3, 4, 4))
    operation = cases.build(case, CPU)
    operation.key.step.zero_()
    steps = []
    kernels.call_each(
        [(case, "cpu"), (case, "reference")], CPU, lambda run: (steps.append(int(operation.key.step)), run())
    )
    assert steps == [2, 5], "two calls to warm up, then the one that counts"
    # Without a GPU a trace holds no kernel; that it can be made and read is what counts here.
    assert kernels.profiled_by_torch([(case, "cpu")], CPU) == []


def test_kernels_needs_a_gpu(tmp_path):
    made = CliRunner().invoke(kernels.app, ["--device", "cpu", "--out", str(tmp_path / "k.json")])
    assert made.exit_code == 2 and "only a GPU's kernels" in made.stderr


def test_counts_of_another_file_are_refused(tmp_path):
    (tmp_path / "k.json").write_text(json.dumps({"cases": {str(CASE): {}}}))
    assert kernels.read(tmp_path / "k.json") == {str(CASE): {}}
    assert kernels.read(None) == {}
    (tmp_path / "k.json").write_text("[]")
    with pytest.raises(InputError, match="is not what"):
        kernels.read(tmp_path / "k.json")


# --- cases


@pytest.mark.parametrize("case", cases.cases(quick=True)[:19], ids=str)
def test_a_replica_has_the_same_values_in_other_memory(case):
    operation = cases.build(case, CPU)
    replica = operation.replica()
    tensors = {name: value for name, value in vars(operation).items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        twin = getattr(replica, name)
        assert torch.equal(twin, tensor) and twin.data_ptr() != tensor.data_ptr(), name
        assert twin.stride() == tensor.stride() and twin.requires_grad == tensor.requires_grad, name
    assert replica.key.step.data_ptr() != operation.key.step.data_ptr()
    for label in [label for kind in cases.labels(case) for label in kind]:
        if not cases.absent(case, label, quick=True):
            assert cases.check(replica, label) <= operation.tolerance


def test_a_result_that_differs_is_not_timed():
    operation = cases.build(Case("q_sample", (2, 3, 4, 4)), CPU).replica()
    right = operation.expected
    operation.expected = lambda noise: tuple(1.001 * x for x in right(noise))
    with pytest.raises(cases.Mismatch, match="ddpm_fast does not give the result of q_sample float32 2x3x4x4"):
        cases.check(operation, "ddpm_fast")


def test_gpu_cases_are_some_of_each_kind():
    chosen = cases.cases(False, "cuda")
    assert len(set(map(str, chosen))) == len(chosen)
    assert {case.operation for case in chosen} == set(cases.OPERATIONS)
    assert max(case.elements for case in chosen) > 64e6
    assert cases.labels(chosen[1], cases.OURS["cuda"]) == (("cuda", "triton"), ("torch",))


def test_a_backend_that_is_not_there_is_absent_with_a_reason():
    assert "backend 'cuda'" in cases.absent(CASE, "cuda", False, "cpu")
    with pytest.raises(InputError, match="backend 'gpu' is unknown"):
        cases.our_backends(["gpu"], CPU)


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


def test_a_batch_fills_its_time(pretended):
    batch = timing.batch([lambda: time.sleep(1e-4)], pretended)
    assert 8 <= batch.calls <= 40


@pytest.mark.parametrize("setting", [ratios.Setting(), ratios.Setting(graph=True), ratios.Setting(True, 3)], ids=str)
def test_results_of_a_gpu(pretended, setting):
    case = Case("hybrid_loss", (2, 3, 8, 8), torch.uint8, network=True)
    operation = cases.build(case, CPU).replica()
    ours = ("cpu", "reference")
    errors = {label: cases.check(operation, label) for label in (*ours, "composed")}
    operation.device = pretended
    counted = {str(case): {"cpu": [{"instructions": 10**7, "nanoseconds": 2000.0}]}}
    card = {"multiprocessors": 132, "sm_clock_hz": 1.98e9}
    results, skipped = ratios.compare(operation, setting, errors, 3, ratios.Ceilings(ours, 3e12, 1e12, card, counted))
    assert not skipped and [line["measured"] for line in results] == ["cpu", "reference"]
    first, second = results
    assert first["floor_is"] == "instructions" and second["floor_is"] == "bytes"
    assert first["floor_s"] == pytest.approx(1e7 / (132 * 4 * 1.98e9))
    assert first["kernels_s"] == pytest.approx(2e-6) and second["kernels_s"] is None
    assert second["bytes"] == case.elements * (1 + 8 * 2)
    assert first["composed"]["median_s"] > 0 and len(ratios.cells(first)) == len(ratios.COLUMNS)
    json.dumps(results)


def test_what_cannot_be_captured_is_left_out_with_its_reason(pretended, monkeypatch):
    @contextlib.contextmanager
    def fails(graph, **options):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *place: None, raising=False)
    operation = cases.build(Case("vlb_terms", (2, 3, 8, 8)), CPU).replica()
    operation.device = pretended
    ceilings = ratios.Ceilings(("ddpm_fast",), 1e12, 1e12, None, {})
    errors = {"ddpm_fast": 0.0, "composed": 0.0, "diffusers": 0.0}
    results, skipped = ratios.compare(operation, ratios.Setting(graph=True), errors, 3, ceilings)
    assert not results and skipped["composed"] == "graph: operation not permitted when stream is capturing"
    assert "host" in skipped["diffusers"]


def test_a_line_for_each_case():
    def line(setting, measured, baseline, speedup):
        numbers = {"speedup": speedup, "floor_share": 0.5, "floor_is": "bytes", measured: {"median_s": 2e-6}}
        return {"case": "a", "setting": setting, "measured": measured, "baseline": baseline} | numbers

    results = [
        *(line("calls", "cuda", "diffusers", 9.0), line("calls", "cuda", "torch", 8.0)),
        *(line("graph", "cuda", "torch", 3.0), line("graph", "triton", "torch", 2.0)),
    ]
    expected = "a [graph] cuda 2 us (50% bytes), triton 2 us (50% bytes); torch 3.00x diffusers 9.00x (calls)"
    assert ratios.brief(results) == [expected]


# --- programs


@pytest.mark.parametrize("backends", [[], ["--backend", "reference", "--backend", "cpu"]], ids=["default", "two"])
def test_ratios(backends, tmp_path):
    places = ["--out", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    made = CliRunner().invoke(ratios.app, ["--quick", "--only", "reverse_step", *places, *backends])
    assert made.exit_code == 0, made.output
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert {line["measured"] for line in results} == set(backends[1::2] or ["ddpm_fast"])
    page = (tmp_path / "r.md").read_text()
    assert page.count("\n| reverse_step") == len(results) and "Absent" in page


def test_a_backend_that_cannot_run_fails_the_run(tmp_path):
    options = [
        "--quick",
        "--only",
        "normal",
        "--backend",
        "cpu",
        "--backend",
        "triton",
        "--out",
        str(tmp_path / "r.json"),
    ]
    made = CliRunner().invoke(ratios.app, options, env={"TRITON_INTERPRET": None})
    assert made.exit_code == 1 and "Not measured in all cases: triton" in made.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert {line["measured"] for line in written["results"]} == {"cpu"} and written["absent"]


def test_the_time_limit_fails_a_run(tmp_path):
    options = ["--quick", "--only", "vlb_terms", "--minutes", "0", "--out", str(tmp_path / "r.json")]
    made = CliRunner().invoke(ratios.app, options)
    assert made.exit_code == 1
    assert "minutes were over" in json.loads((tmp_path / "r.json").read_text())["mismatches"][0]


def test_sanitize_runs_every_op():
    made = CliRunner().invoke(sanitize.app, ["--device", "cpu", "--backend", "cpu"])
    assert made.exit_code == 0 and "cpu: ran 8 shapes" in made.output
    made = CliRunner().invoke(sanitize.app, ["--device", "cpu", "--backend", "none"])
    assert made.exit_code == 2 and "no backend could run" in made.stderr


def test_the_two_sample_test_is_calibrated_and_tells_apart():
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> torch.Tensor:
        return torch.randn(n, 4, generator=generator)

    values = np.array([fidelity.two_sample_p(drawn(50), drawn(50), 500) for _ in range(100)])
    assert abs(values.mean() - 0.5) < 0.12 and (values < 0.05).mean() < 0.12, "not uniform where nothing differs"
    assert fidelity.two_sample_p(drawn(200), drawn(200) + 0.4) < 1e-3
    assert fidelity.two_sample_p(drawn(200), 1.5 * drawn(200)) < 1e-3, "the same mean"
    with pytest.raises(InputError, match="expected as many of both"):
        fidelity.two_sample_p(drawn(3), drawn(4))


def test_deviations_are_in_levels():
    exact = torch.zeros(2, 1, 2, 2)
    off = exact.clone()
    off[0, 0, 0, 0] = 4 / 127.5
    found = fidelity.deviations(off, exact)
    assert found == {"mean_levels": 0.5, "differing_share": 0.125, "worst_image_mean_levels": 1.0}


def test_fidelity_runs_and_fp32_is_the_exact_mode(tmp_path):
    out = tmp_path / "f.json"
    places = ["--device", "cpu", "--out", str(out), "--markdown", str(tmp_path / "f.md")]
    made = CliRunner().invoke(fidelity.app, ["--n", "4", "--steps", "5", *places])
    assert made.exit_code == 0, made.output
    written = json.loads(out.read_text())
    fp32, bf16 = written["results"]
    assert (fp32["mode"], bf16["mode"]) == ("fp32", "bf16") and written["control"]["steps"] == 1
    assert fp32["mean_levels"] < 0.05 and 0 < bf16["mean_levels"] < 20
    assert "| bf16 |" in (tmp_path / "f.md").read_text()
    few = CliRunner().invoke(fidelity.app, ["--n", "1", "--out", str(tmp_path / "g.json")])
    assert few.exit_code == 2 and "at least 2 images" in few.stderr


@pytest.mark.parametrize("only", ["forward quick", "training quick fp32", "sampling quick"])
def test_loop(only, tmp_path):
    places = ["--out", str(tmp_path / "l.json"), "--markdown", str(tmp_path / "l.md")]
    made = CliRunner().invoke(loop.app, ["--quick", "--device", "cpu", "--only", only, *places])
    assert made.exit_code == 0, made.output
    written = json.loads((tmp_path / "l.json").read_text())
    assert not written["failures"] and all(only.split()[0] in line["what"] for line in written["results"])
    for line in written["results"]:
        assert line["floor_s"] > 0 and line[line["measured"]]["mfu"] > 0, line
    assert set(written["networks"]) == {"quick"} and written["ceilings"]["normals_per_s_per_thread"] > 0
    lines = (tmp_path / "l.md").read_text().splitlines()
    named = [line for line in lines if line.startswith("| ") and only.split()[0] in line[:20]]
    assert len(named) == len(written["results"]) > 0


def test_loop_refuses_what_it_does_not_know(tmp_path):
    for option, message in ((["--size", "512"], "size '512' is unknown"), (["--only", "tea"], "no case's name")):
        made = CliRunner().invoke(loop.app, [*option, "--device", "cpu", "--out", str(tmp_path / "l.json")])
        assert made.exit_code == 2 and message in made.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_layer_is_measured_at_every_size(device):
    made = loop.cases(False, torch.device(device))
    assert len(set(map(str, made))) == len(made)
    assert {(case.layer, case.size, case.dtype) for case in made} == {
        (layer, size, dtype)
        for layer in ("unet forward", "unet forward+backward", "training", "sampling")
        for size in loop.ALL_SIZES
        for dtype in ("fp32", "bf16")
        if device == "cuda" or size != "256x256" or layer == "unet forward"
    }
    sampled = {case.size for case in made if case.layer == "sampling"}
    assert sampled == {case.size for case in made if case.layer == "sampling" and case.batch == 1}


def test_a_run_that_differs_is_not_timed():
    with pytest.raises(InputError, match=r"sampling is off by 0\.01"):
        comparison.deviation(torch.full((4,), 1.01), torch.ones(4), 1e-3, "sampling")
    with pytest.raises(InputError, match="off by nan"):
        comparison.deviation(torch.tensor([math.nan]), torch.ones(1), 1e-3, "sampling")


def test_what_is_not_compiled(monkeypatch):
    case = comparison.Case("training", "digits", "bf16", 4)
    assert "--compile" in comparison.uncompiled(case, CPU, False)
    assert not comparison.uncompiled(case, torch.device("cuda"), True)
    assert not comparison.uncompiled(case._replace(layer="sampling"), CPU, True)
    for version, is_wrong in (("2.9.1", True), ("2.13.0+cpu", True), ("2.14.1", False)):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        assert ("gradients are wrong" in comparison.uncompiled(case, CPU, True)) is is_wrong


def test_what_a_comparison_says():
    case = comparison.Case("sampling", "quick", "fp32", 4, steps=2)
    made = comparison.Comparison(case, flops=10**6, bytes=10**3, normals=10)
    made.add_ours("ddpm_fast", lambda: time.sleep(2e-3))
    made.runs["torch"] = lambda: time.sleep(6e-3)
    (line,) = made.results(3, CPU, machine.Ceilings(1e9, {"fp32": 1e10}, 1e9))
    ours = line["ddpm_fast"]
    assert line["floor_is"] == "flops" and line["floor_s"] == pytest.approx(1e-4)
    assert line["floor_share"] == pytest.approx(1e-4 / ours["median_s"]) == pytest.approx(ours["mfu"])
    assert ours["images_per_s"] == pytest.approx(2 / ours["median_s"]), "four images in two steps"
    assert line["speedup"] > 1 and "mfu" not in line["torch"]
    made.compare("torch", torch.full((4,), 1.01), torch.ones(4), 1e-3)
    assert "torch is off by 0.01" in made.failures["torch"] and list(made.timed) == ["ddpm_fast"]
    made.failures.clear()
    del made.runs["torch"]
    (line,) = made.results(3, CPU, machine.Ceilings(1e9, {"fp32": 1e10}, 1e9))
    assert line["baseline"] is line["speedup"] is None and line["ddpm_fast"]["median_s"] > 0
    assert len(loop.cells(line)) == len(loop.COLUMNS)


# --- growth


def test_the_exponent_of_points():
    x = [1, 2, 4, 8]
    assert growth.exponent(x, [3 * n**1.5 for n in x]) == pytest.approx(1.5)
    assert growth.exponent(x, [7.0] * 4) == pytest.approx(0, abs=1e-12)
    assert growth.exponent([1], [1.0]) is None
    assert growth.exponent([1, 2], [0, 5]) is None


@pytest.mark.parametrize("task", growth.TASKS)
def test_a_point_s_time_and_memory(task):
    point = growth.Point(task, "quick", 2, 32 if task == "loss" else 16)
    measured = growth.measure(point)
    assert measured["seconds"] > 0 and measured["peak_bytes"] >= 0


def test_the_peak_of_memory_is_seen():
    before = growth.memory_now()
    held = torch.ones(2**24)
    del held
    assert growth.memory_peak() - before > 60 * MIB


def test_unknown_work_is_refused(tmp_path):
    with pytest.raises(InputError, match="task 'tea' is unknown"):
        growth.Point("tea", "quick", 1, 16)
    with pytest.raises(InputError, match="loss, batch -1, 16 pixels: "):
        growth.measured_apart(growth.Point("loss", "quick", -1, 16))
    made = CliRunner().invoke(growth.app, ["--quick", "--only", "tea", "--out", str(tmp_path / "g.json")])
    assert made.exit_code == 2 and "noise loss" in made.stderr


def test_every_axis_is_planned():
    for device in ("cpu", "cuda"):
        made = growth.plan(False, torch.device(device))
        assert {axis for axis, values in made.axes.items() if values} >= {"batch", "image_size", "steps"}
        for size in made.axes["image_size"]:
            assert 16 in growth.Point("training", "cifar10", 1, size).config.resolutions
    assert growth.plan(False, CPU).axes["threads"][-1] <= machine.cores()


@pytest.mark.slow
def test_growth(tmp_path):
    places = ["--out", str(tmp_path / "g.json"), "--markdown", str(tmp_path / "g.md")]
    made = CliRunner().invoke(growth.app, ["--quick", "--device", "cpu", "--only", "training batch", *places])
    assert made.exit_code == 0, made.output
    written = json.loads((tmp_path / "g.json").read_text())
    lines = written["results"]
    assert [(line["task"], line["axis"]) for line in lines] == [("training", "batch")]
    for line in lines:
        assert [point["x"] for point in line["points"]] == [1, 2] and line["seconds_exponent"] is not None
    assert "| training | batch size | 1, 2 |" in (tmp_path / "g.md").read_text()


# --- networks


def test_the_work_of_a_network():
    work = networks.work(networks.CIFAR10)
    assert work.parameters == 35_746_307
    # 6.1 billion multiplications and additions are the figure known of this network.
    assert work.flops == pytest.approx(2 * 6.1e9, rel=0.05)
    # The first layer needs no gradient of its input: a little less than three times.
    assert 2.9 < work.training_flops / work.flops <= 3
    assert work.bytes(8, 4) - work.bytes(7, 4) == 4 * work.activations


DIFFUSERS = pytest.mark.skipif(bool(peers.absent(peers.DIFFUSERS)), reason=peers.absent(peers.DIFFUSERS))


@pytest.mark.peers
@DIFFUSERS
@pytest.mark.parametrize("size", loop.ALL_SIZES)
def test_the_peer_network_is_the_same_architecture(size):
    import ddpm_fast as df

    config = networks.SIZES[size] if size in networks.SIZES else networks.network(size).model.config
    with torch.device("meta"):
        assert networks.parameters(networks.peer_network(config)) == networks.parameters(df.UNet(config))


@pytest.mark.peers
@DIFFUSERS
@pytest.mark.parametrize("size", loop.QUICK_SIZES)
def test_weights_survive_the_way_to_diffusers_and_back(size):
    model = networks.network(size).model
    state = model.state_dict()
    back = networks.from_diffusers(networks.same_weights(model).state_dict(), model.config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.peers
@DIFFUSERS
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4, "attention_resolutions": (16, 8)}, None),
        ({"num_heads": 4, "channel_mult": (1, 2, 4), "attention_resolutions": (16,)}, "heads of one width"),
        ({"resample": "resblock"}, "resamples by convolutions"),
    ],
)
def test_what_diffusers_cannot_hold(changes, message):
    import ddpm_fast as df

    config = df.UNetConfig(**changes)
    if message is None:
        with torch.device("meta"):
            networks.peer_network(config)
        return
    with pytest.raises(InputError, match=message):
        networks.peer_network(config)


def test_networks_that_there_are():
    with pytest.raises(InputError, match="size '8x8' is unknown; there are digits, cifar10"):
        networks.network("8x8")


def gpu_sh(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_gpu_sh_refuses_what_it_does_not_know(tmp_path):
    made = gpu_sh("--out", str(tmp_path), "benchmark")
    assert made.returncode == 2 and "benchmark is no section" in made.stderr
    assert gpu_sh().returncode == 2
    assert "--quick" in gpu_sh("--help").stdout


@pytest.mark.slow
def test_gpu_sh_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = gpu_sh("--out", str(tmp_path), "profile", "tests", "loop")
    assert made.returncode == 0
    summary = made.stdout.split("summary")[1]
    for section in ("tests", "loop", "profile"):
        assert f"--- {section}: skipped: no CUDA device" in summary
    assert "--- ops" not in summary
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
    def test_ratios_on_this_gpu(only, tmp_path):
        options = ["--quick", "--device", "cuda", "--only", only, "--out", str(tmp_path / "r.json")]
        made = CliRunner().invoke(ratios.app, options)
        assert made.exit_code == 0, made.output
        results = json.loads((tmp_path / "r.json").read_text())["results"]
        assert {line["setting"] for line in results} == {"calls", "graph"}
