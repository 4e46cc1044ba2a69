"""Two processes that train together do what one process does, bit for bit: the same images, noise, timesteps, labels,
masks and weights. What they do is in support/two_ranks.py; torchrun starts it once for all tests here."""

import fcntl
import os

import pytest
import torch
from support import two_ranks

from ddpm_fast.errors import InputError
from ddpm_fast.files import checkpoint
from ddpm_fast.loops import distributed
from ddpm_fast.loops.distributed import RanksDiffer, check_same
from ddpm_fast.loops.snapshot import checksum
from ddpm_fast.loops.train_config import TrainConfig, divided


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the two processes have written what they found."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_ranks"
    out.mkdir(exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker of pytest-xdist starts them for all
        if not (out / "1.pt").exists():
            (out / "printed").write_text(two_ranks.start(out, "cpu"))
    return out


@pytest.fixture(scope="session")
def found(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(autouse=True)
def one_thread():
    """As many as each of the two processes has: the bits of a sum depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone():
    """What one process finds, by the name of the training, in micro-batches of one process's share."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = two_ranks.train(name, micro_batch=two_ranks.BATCH // 2)
        return known[name]

    return get


def check_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, state[name]), name


def of_two(name):
    """Whether the sums of a training have two terms."""
    return "four" not in name


pytestmark = pytest.mark.slow
SAMPLERS = ["uniform", "stratified", "loss_second_moment"]


@pytest.mark.parametrize("name", list(filter(of_two, two_ranks.TRAININGS)))
def test_the_weights_are_those_of_one_process_bit_for_bit(found, alone, name):
    expected = alone(name)
    assert any(key.startswith("ema.") for key in expected["state"])
    for each in found:
        check_equal(each["trainings"][name]["state"], expected["state"])
        assert torch.equal(each["trainings"][name]["metrics"], expected["metrics"])


@pytest.mark.parametrize("name", [*SAMPLERS, "augmented"])
def test_the_networks_are_given_the_whole_batch_in_its_order(found, name):
    """Noised images, timesteps, labels, the ids by which dropout draws, and how images are augmented, beside what one
    process with one micro-batch gives. As long as the weights are the same: in the first step, and without importance
    sampling in all."""
    whole = two_ranks.train(name, steps=4)["given"]
    steps = 1 if name == "loss_second_moment" else 4
    halves = list(zip(*(each["trainings"][name]["given"] for each in found), strict=True))
    for expected, parts in list(zip(whole, halves, strict=False))[:steps]:
        assert len(expected) == (5 if name == "augmented" else 4) and expected[0].shape == (two_ranks.BATCH, 2, 8, 8)
        for tensor, *of_ranks in zip(expected, *parts, strict=True):
            assert torch.equal(torch.cat(of_ranks), tensor)


@pytest.mark.parametrize("name", [name for name in two_ranks.TRAININGS if not of_two(name)])
def test_other_divisions_differ_by_the_order_of_sums(found, name):
    expected = two_ranks.train(name, micro_batch=None)
    for each in found:
        torch.testing.assert_close(each["trainings"][name]["metrics"], expected["metrics"], rtol=1e-4, atol=1e-5)
        for key, value in expected["state"].items():
            if key.startswith("model."):
                torch.testing.assert_close(each["trainings"][name]["state"][key], value, rtol=0, atol=2e-3)
    check_equal(*(each["trainings"][name]["state"] for each in found))


def test_a_run_goes_on_with_another_number_of_processes(folder, alone):
    subject = two_ranks.trainer(
        timestep_sampling="loss_second_moment", diffusion=two_ranks.SHORT, micro_batch=two_ranks.BATCH // 2
    )
    subject.load(checkpoint.latest_checkpoint(folder / "halves"))
    assert subject.step == two_ranks.STEPS // 2
    while subject.step < two_ranks.STEPS:
        subject.train_step()
    check_equal(subject.snapshot({}).tensors, alone("loss_second_moment")["state"])


def test_one_of_them_writes_and_shows_a_bar(folder):
    assert sorted(path.name for path in (folder / "halves").iterdir()) == [
        "model.safetensors",
        "step-00000010.safetensors",
    ]
    assert (folder / "printed").read_text().count("10/10") == 1


def test_they_stop_after_the_same_step(found):
    for each in found:
        assert each["stop"] == [False, False, True, True, True]
        assert each["late stop"] == [False, False, False, True, True], "a GPU's number is read a step later"


def test_they_find_a_gradient_that_is_not_finite_at_the_same_step(found):
    assert found[0]["not finite"] == found[1]["not finite"]
    assert "step 3 gave the loss" in found[0]["not finite"] and "the gradient norm nan" in found[0]["not finite"]


def test_a_bit_that_differs_is_found_before_anything_is_saved(found, folder):
    for each in found:
        assert "the state of step 1 differs between the ranks" in each["differing"]
    assert not (folder / "differing").exists()


def test_what_is_wrong_is_raised_by_all(found):
    for each in found:
        assert "batch_size is 9, which 2 processes cannot share equally: give 8 or 10" in each["odd batch"]
        assert "cannot write" in each["no folder"]


def test_the_group_is_left_by_whom_it_was_joined(found):
    for each in found:
        assert each["group"] == ("gloo", 2) and each["kept"] and each["left"]


def test_the_rank_that_differs_from_most_is_named():
    check_same("the state", [7, 7, 7])
    with pytest.raises(RanksDiffer, match="the state of rank 1 is not that of the other ranks"):
        check_same("the state", [7, 8, 7])
    with pytest.raises(RanksDiffer, match="the state of rank 0, 3 are not that"):
        check_same("the state", [1, 7, 7, 2, 7])
    with pytest.raises(RanksDiffer, match="no more than 2 of 4 agree"):
        check_same("the state", [1, 1, 2, 2])


def test_a_checksum_sees_each_bit_and_its_place():
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(()), "c": torch.tensor([1, 2**40])}
    expected = checksum(base)
    assert checksum({name: x.clone() for name, x in base.items()}) == expected
    assert checksum({**base, "a": base["a"].T.contiguous().T}) == expected, "the memory format counts"
    others = [{**base, "a": base["a"].flip(0)}, {**base, "b": -base["b"]}, {**base, "c": base["c"].flip(0)}]
    for bit in (0, 31):
        flipped = base["a"].clone()
        flipped.view(torch.int32)[1, 2] ^= 1 << bit if bit < 31 else -(2**31)
        others.append({**base, "a": flipped})
    assert len({checksum(other) for other in others} | {expected}) == 1 + len(others)


@pytest.mark.parametrize(
    ("size", "micro", "processes", "expected"),
    [(64, None, 1, (1, 64)), (64, 16, 1, (4, 16)), (64, 16, 2, (2, 16)), (64, 32, 4, (1, 16)), (6, 3, 2, (1, 3))],
)
def test_a_batch_is_divided(size, micro, processes, expected):
    assert divided(TrainConfig(batch_size=size, micro_batch=micro), processes) == expected


@pytest.mark.parametrize(
    ("size", "micro", "processes", "fits"),
    [
        (64, None, 3, "give 63 or 66"),
        (2, None, 4, "give 4"),
        (96, 32, 2, "give micro_batch 24, or batch_size 64 or 128"),
        (7, 2, 1, "give micro_batch 1, or batch_size 6 or 8"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_what_would_fit(size, micro, processes, fits):
    with pytest.raises(InputError, match=fits):
        divided(TrainConfig(batch_size=size, micro_batch=micro), processes)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT is not: start the processes with torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "expected a rank in 0..1"),
        ({"RANK": "zero", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK is 'zero'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, variables, problem):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=problem), distributed.join(torch.device("cpu")):
        pass


def test_a_process_alone_joins_nobody(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.join(torch.device("cpu")):
        assert (distributed.rank(), distributed.world_size()) == (0, 1) and not torch.distributed.is_initialized()
    assert distributed.of_each_process("x") == ["x"] and distributed.of_first_process("x") == "x"


def test_each_process_of_a_machine_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    for name, value in {"RANK": "13", "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, expected in {"auto": "cuda:3", "cuda": "cuda:3", "cuda:1": "cuda:1", "cpu": "cpu"}.items():
        assert distributed.local_device(name) == torch.device(expected)
    monkeypatch.delenv("RANK")
    assert distributed.local_device() == torch.device("cuda:0")
