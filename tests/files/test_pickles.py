"""Checkpoints of PyTorch are read whole or refused, and nothing in them is run."""

import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from support.checkpoints import Calls, pickled_tensor, write_archive, write_pickled_code
from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.files import pickles
from ddpm_fast.files.pickles import read_pickle, state_dict


def content() -> dict:
    torch.manual_seed(0)
    weights = torch.nn.Linear(3, 2).half()
    shared = torch.arange(6.0)
    return {
        "step": 7,
        "model": OrderedDict(weight=weights.weight.detach(), bias=weights.bias.detach()),
        "parameters": {"weight": weights.weight},
        "opt": {"state": {0: {"step": torch.tensor(3.0), "views": [shared, shared[2:4], shared.view(2, 3).T]}}},
        "settings": (True, None, 0.5, "text", torch.float16, torch.Size([2, 3])),
    }


def assert_same(found: object, expected: object) -> None:
    assert isinstance(expected, type(found)) or isinstance(found, type(expected))
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert found == expected


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_what_was_saved_is_read(tmp_path, zipped):
    expected = content()
    torch.save(expected, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert_same(read_pickle(tmp_path / "a.pt"), expected)


def test_a_state_dict_is_found_in_its_wrappers(tmp_path):
    weights = {"weight": torch.ones(2), "bias": torch.zeros(2)}
    parallel = {f"module.{name}": tensor for name, tensor in weights.items()}
    for found in (
        state_dict(weights, "ema_model"),
        state_dict({"ema_model": parallel, "step": 3}, "ema_model", "net_model"),
        state_dict({"net_model": weights, "ema_model": None}, "ema_model", "net_model"),
    ):
        assert_same(found, weights)
    for other in (None, [], {}, {"step": 3}, {"ema_model": {"step": 3}}, {0: torch.ones(1)}, torch.ones(1)):
        assert state_dict(other, "ema_model") == {}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_code_is_not_run_and_named(tmp_path, zipped):
    write_pickled_code(tmp_path / "a.pt", tmp_path / "proof", zipped)
    with pytest.raises(InputError, match=r"holds code.*posix\.mkdir.*state_dict"):
        read_pickle(tmp_path / "a.pt")
    assert not (tmp_path / "proof").exists()


def test_a_plain_pickle_with_code_is_not_run(tmp_path):
    for protocol in range(6):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(Calls(os.mkdir, str(tmp_path / "proof")), protocol))
        with pytest.raises(InputError, match=r"holds code.*mkdir"):
            read_pickle(tmp_path / "a.pkl")
    assert not (tmp_path / "proof").exists()


def test_a_module_that_was_saved_whole_says_how_to_save_its_weights(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"torch\.nn\.modules\.linear\.Linear.*torch\.save\(model\.state_dict\(\)"):
        read_pickle(tmp_path / "a.pt")


def test_functions_that_allocate_what_they_are_told_are_not_called(tmp_path):
    torch.save({"a": Calls(bytearray, 2**36)}, tmp_path / "a.pt")  # torch's own list of harmless names has it
    with pytest.raises(InputError, match="bytearray"):
        read_pickle(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path, zipped):
    torch.save(content(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "a.pt").read_bytes()
    for length in [*range(0, 60, 7), *range(60, len(data), 211), len(data) - 30, len(data) - 1]:
        (tmp_path / "b.pt").write_bytes(data[:length])
        with pytest.raises(InputError):
            read_pickle(tmp_path / "b.pt")


def test_a_changed_weight_is_noticed_by_the_checksum(tmp_path):
    torch.save({"w": torch.full((64,), 3.0)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(torch.full((64,), 3.0).numpy().tobytes()) + 17] ^= 4
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(InputError, match="checksum of its record a/data/0"):
        read_pickle(tmp_path / "a.pt")


def test_a_file_that_was_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_pickle(tmp_path / "a.pt"), content())


@pytest.mark.parametrize(
    ("elements", "size", "stride", "offset"),
    [
        (2**40, (2**40,), (1,), 0),
        (2**62, (4,), (1,), 0),
        (4, (5,), (1,), 0),
        (4, (4,), (1,), 1),
        (4, (2, 3), (3, 1), 0),
        (4, (2**40,), (0,), 0),
        (4, (2, 2), (-1, 1), 0),
        (4, (-4,), (1,), 0),
        (4, (4,), (1,), -1),
        (3, (3,), (1,), 0),
        (8, (8,), (1,), 0),
    ],
)
def test_a_tensor_that_is_not_in_its_storage_is_refused(tmp_path, elements, size, stride, offset):
    """The record has four elements."""
    write_archive(tmp_path / "a.pt", pickled_tensor(elements, size, stride, offset), data_0=bytes(16))
    with pytest.raises(InputError):
        read_pickle(tmp_path / "a.pt")
    write_archive(tmp_path / "a.pt", pickled_tensor(4, (2, 2), (2, 1)), data_0=bytes(16))
    assert read_pickle(tmp_path / "a.pt")["w"].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("elements", [5, 2**33, 2**61])
def test_a_storage_of_another_length_is_refused_in_old_files_too(tmp_path, elements):
    torch.save({"w": torch.ones(4)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    length = pickle.dumps(elements, 2)[2:-1]
    changed = data.replace(b"K\x04Nt", length + b"Nt")
    assert changed != data
    (tmp_path / "a.pt").write_bytes(changed)
    with pytest.raises(InputError):
        read_pickle(tmp_path / "a.pt")


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
    write_archive(tmp_path / "bomb.pt", pickle.dumps({}, 2), zipfile.ZIP_DEFLATED, data_0=bytes(10**7))
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    with zipfile.ZipFile(tmp_path / "images.pt", "w") as archive:
        archive.writestr("images/1.png", b"png")
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/DATA.pkl", pickle.dumps({"w": 1}, 2))
    (tmp_path / "begins.pt").write_bytes(b"PK\x03\x04")
    (tmp_path / "begins so.pt").write_bytes(b"PK\x03\x04" + bytes(1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    for name, reason in {
        "bomb": "compressed",
        "images": "0 records data.pkl",
        "two": "records data.pkl",
        "begins": "cannot be read",
        "begins so": "list of records",
        "script": "TorchScript",
    }.items():
        with pytest.raises(InputError, match=reason):
            read_pickle(tmp_path / f"{name}.pt")


def test_tensors_that_are_no_plain_ones_are_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(2**30)}, tmp_path / "expanded.pt")
    torch.save({"w": torch.zeros(3, device="meta")}, tmp_path / "meta.pt")
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    for name in ("expanded", "meta", "sparse"):
        with pytest.raises(InputError):
            read_pickle(tmp_path / f"{name}.pt")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "nowhere.pt").symlink_to(tmp_path / "missing.pt")
    (tmp_path / "round.pt").symlink_to(tmp_path / "round.pt")
    (tmp_path / "to a pipe.pt").symlink_to(tmp_path / "pipe.pt")
    for path in [tmp_path, Path("/dev/zero"), tmp_path / "missing.pt", *tmp_path.glob("*.pt")]:
        with pytest.raises(InputError, match="expected a checkpoint of PyTorch"):
            read_pickle(path)


def test_objects_that_hold_themselves_are_read(tmp_path):
    content = {"w": torch.ones(2)}
    content["again"] = [content]
    torch.save(content, tmp_path / "a.pt")
    assert read_pickle(tmp_path / "a.pt")["again"][0]["w"].tolist() == [1, 1]


def test_a_pickle_of_more_objects_than_any_checkpoint_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 1000)
    write_archive(tmp_path / "a.pt", b"\x80\x02" + b"}" * 1001 + b".")
    with pytest.raises(InputError, match="more than 1,000 objects"):
        read_pickle(tmp_path / "a.pt")
