"""Tests of tar shards: Python's tarfile writes them, and their pictures have colours known beforehand."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from ddpm_fast.data import open_dataset
from ddpm_fast.data.selection import Selection
from ddpm_fast.errors import InputError


def picture(colour, form="PNG", size=(4, 4)):
    written = io.BytesIO()
    Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour).save(written, form)
    return written.getvalue()


def write(path, members, form=tarfile.USTAR_FORMAT):
    """A tar file of (name, bytes), where a TarInfo may stand for the name."""
    with tarfile.open(path, "w", format=form) as tar:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def greys(dataset):
    """The grey level of each image, all of whose pixels are alike."""
    images, _ = dataset.batch(torch.arange(len(dataset)))
    flat = images.flatten(1)
    assert torch.equal(flat.amin(1), flat.amax(1))
    return flat[:, 0].tolist()


def labels(dataset):
    return None if dataset.labels is None else dataset.labels.tolist()


def opened(source, **options):
    return open_dataset(str(source), in_memory=False, **options)


# ---- what webdataset's users have ----


def test_samples_are_read_in_the_order_of_the_shards(tmp_path):
    for shard, level in ((2, 20), (10, 100), (1, 10)):
        members = [(f"{k}.png", picture(level + k)) for k in range(3)]
        write(tmp_path / f"train-{shard}.tar", members)
    expected = [10, 11, 12, 20, 21, 22, 100, 101, 102]
    assert greys(opened(tmp_path)) == expected
    assert greys(opened(tmp_path / "train-*.tar")) == expected
    assert greys(opened(tmp_path / "train-{1..2}.tar")) == expected[:6]
    assert greys(opened(tmp_path / "train-{10,1}.tar")) == expected[6:] + expected[:3]


def test_numbers_in_braces_keep_their_zeros(tmp_path):
    for shard in range(8, 12):
        write(tmp_path / f"s-{shard:03}.tar", [("a.png", picture(shard))])
    assert greys(opened(tmp_path / "s-{008..011}.tar")) == [8, 9, 10, 11]


def test_a_set_in_memory_holds_the_same(tmp_path):
    write(tmp_path / "a.tar", [("0.png", picture(7)), ("0.cls", b"1"), ("1.png", picture(8)), ("1.cls", b"0")])
    dataset = open_dataset(tmp_path / "a.tar", in_memory=True)
    assert dataset.images[:, 0, 0, 0].tolist() == [7, 8]
    assert labels(dataset) == [1, 0]


def test_cls_is_the_class_whatever_else_a_sample_has(tmp_path):
    members = []
    for k, label in enumerate((3, 0, 2)):
        members += [
            (f"x/{k}.jpg", picture(10 * k, "JPEG")),
            (f"x/{k}.json", json.dumps({"label": 9}).encode()),
            (f"x/{k}.cls", f"{label}\n".encode()),
            (f"x/{k}.txt", b"a caption"),
        ]
    with pytest.warns(UserWarning, match=r"ignored 3 files: 3 \.txt$"):
        dataset = opened(write(tmp_path / "a.tar", members))
    assert labels(dataset) == [3, 0, 2]
    assert dataset.num_classes == 4


@pytest.mark.parametrize(
    "values, expected, names",
    [
        ([5, 0, 1], [5, 0, 1], None),
        (["dog 10", "dog 2", "cat"], [2, 1, 0], ["cat", "dog 2", "dog 10"]),
        ([None, None, None], None, None),
    ],
    ids=["numbers", "names", "none"],
)
def test_json_may_hold_the_class(tmp_path, values, expected, names):
    members = []
    for k, value in enumerate(values):
        # More than one block of 512 bytes, so that it is not read with its header.
        text = json.dumps({"caption": "x" * 600, "label": value}).encode()
        members += [(f"{k}.json", text), (f"{k}.png", picture(k))]
    dataset = opened(write(tmp_path / "a.tar", members))
    assert labels(dataset) == expected
    assert dataset.label_names == names
    assert greys(dataset) == [0, 1, 2]


def test_another_entry_and_another_picture_can_be_chosen(tmp_path):
    members = []
    for k in range(2):
        members += [
            (f"{k}.jpg", picture(1, "JPEG")),
            (f"{k}.seg.png", picture(200 + k)),
            (f"{k}.json", json.dumps({"label": 0, "kind": 1 - k}).encode()),
        ]
    path = write(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=r"several pictures: jpg, seg\.png; say which"):
        opened(path)
    with pytest.warns(UserWarning, match="ignored 2 files: 2 .jpg"):
        dataset = opened(path, selection=Selection(image_column="seg.png", label_column="kind"))
    assert greys(dataset) == [200, 201]
    assert labels(dataset) == [1, 0]


def test_folders_in_a_tar_are_classes_where_samples_have_none(tmp_path):
    path = write(tmp_path / "a.tar", [("./dog/1.png", picture(1)), ("./cat/1.png", picture(2))])
    dataset = opened(path, classes=True)
    assert (dataset.label_names, labels(dataset)) == (["cat", "dog"], [1, 0])


def test_samples_without_a_class_among_others_are_named(tmp_path):
    path = write(tmp_path / "a.tar", [("0.png", picture(1)), ("0.cls", b"1"), ("1.png", picture(2))])
    with pytest.warns(UserWarning, match=r"such as the sample 1 of .*a\.tar, have none"):
        assert opened(path).labels is None
    with pytest.raises(InputError, match=r"without one, such as the sample 1 of"):
        opened(path, classes=True)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_of_every_format(tmp_path, form):
    length = 200 if form == tarfile.USTAR_FORMAT else 900
    folders = "/".join("f" * 40 for _ in range(length // 41)) + "/"
    names = [f"{folders}{k}" for k in ("ä" if form != tarfile.USTAR_FORMAT else "a", "b")]
    members = []
    for k, name in enumerate(names):
        members += [(f"{name}.png", picture(50 + k)), (f"{name}.cls", f"{k}".encode())]
    dataset = opened(write(tmp_path / "a.tar", members, form))
    assert greys(dataset) == [50, 51]
    assert labels(dataset) == [0, 1]
    assert [dataset.source.name_of(k) for k in range(2)] == [f"{name}.png" for name in names]


def test_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_fast.data.tar._HELD_OPEN", 1)
    for shard in range(3):
        write(tmp_path / f"{shard}.tar", [("a.png", picture(shard)), ("b.png", picture(10 + shard))])
    assert greys(opened(tmp_path)) == [0, 10, 1, 11, 2, 12]


def test_the_digest_is_that_of_the_names_sizes_and_classes(tmp_path):
    members = [("0.png", picture(1)), ("0.cls", b"0"), ("1.png", picture(2)), ("1.cls", b"1")]
    first = opened(write(tmp_path / "a.tar", members)).digest
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "0.tar", members[:2])
    write(tmp_path / "b" / "1.tar", members[2:], tarfile.PAX_FORMAT)
    assert opened(tmp_path / "b").digest == first
    for name, data in (("1.cls", b"0"), ("1.png", picture(2, size=(64, 64)))):
        other = [(n, data if n == name else d) for n, d in members]
        assert opened(write(tmp_path / "c.tar", other), image_size=4).digest != first


# ---- hostile and damaged ----


def test_what_is_no_regular_file_inside_is_counted_and_not_read(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(99))
    members = [
        ("0.png", picture(1)),
        ("../1.png", picture(2)),
        ("a/../../2.png", picture(2)),
        (str(tmp_path / "3.png"), picture(3)),
        (special("4.png", tarfile.SYMTYPE, str(secret)), b""),
        (special("5.png", tarfile.LNKTYPE, "0.png"), b""),
        (special("6.png", tarfile.CHRTYPE), b""),
        (special("7.png", tarfile.FIFOTYPE), b""),
        (special("folder", tarfile.DIRTYPE), b""),
        ("._0.png", b"of macOS"),
        ("unknown", b"?"),
        ("8.cls", b"1"),
    ]
    with pytest.warns(UserWarning, match="ignored 9 files") as said:  # but the folder and the hidden file
        dataset = opened(write(tmp_path / "a.tar", members))
    assert greys(dataset) == [1]
    text = str(said[0].message)
    for kind in ("3 with a path that leads out", "1 symbolic links", "1 hard links"):
        assert kind in text


@pytest.mark.parametrize("form, command", [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path, form, command):
    path = tmp_path / f"a.tar.{form}"
    with tarfile.open(path, f"w:{form}") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(InputError, match=f"compressed by .*unpack it with {command}"):
        opened(path)


@pytest.mark.parametrize("kept", [100, 512 + 40, 1024 + 200], ids=["in a header", "in the data", "in the next header"])
def test_a_tar_that_is_cut_off_is_refused(tmp_path, kept):
    path = write(tmp_path / "a.tar", [("0.png", picture(1)), ("1.png", picture(2))])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"a\.tar: (it ends in the middle|its member at byte 0 has .* bytes, but)"):
        opened(path)


def resummed(header):
    """A header with the right checksum."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def with_size(header, field):
    return resummed(header[:124] + field.ljust(12, b"\0") + header[136:])


@pytest.mark.parametrize(
    "field",
    [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000010\0", b"9", b"0o17", b"1_0"],
    ids=["8 GiB", "2^88", "negative", "signed", "no octal digit", "prefix", "underscore"],
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"], ids=["file", "long name", "extended"])
def test_a_size_that_lies_is_refused(tmp_path, field, kind):
    path = write(tmp_path / "a.tar", [("0.png", picture(1)), ("1.png", picture(2))])
    data = path.read_bytes()
    header = resummed(data[:156] + kind + data[157:512])
    path.write_bytes(with_size(header, field) + data[512:])
    with pytest.raises(InputError, match=r"a\.tar: (its member at|the header at|the extended header at)"):
        opened(path)


@pytest.mark.parametrize(
    "records",
    [
        b"0 path=x\n",
        b"999 path=x\n",
        b"-5 path=x\n",
        b"path\n",
        b"10 pathxxx\n",
        b"17 size=99999999\n",
        b"\xb2 a=b\n",
    ],
)
def test_a_damaged_extended_header_is_refused(tmp_path, records):
    info = special("x", tarfile.XHDTYPE)
    path = write(tmp_path / "a.tar", [(info, records), ("0.png", picture(1))])
    with pytest.raises(InputError, match=r"extended header|its member at byte"):
        opened(path)


def test_sparse_members_are_refused(tmp_path):
    info = tarfile.TarInfo("0.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    path = write(tmp_path / "a.tar", [(info, picture(1))], tarfile.PAX_FORMAT)
    with pytest.raises(InputError, match="sparse members"):
        opened(path)


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(picture(1, size=(64, 64)) * 20)
    with pytest.raises(InputError, match="no tar header at byte 0"):
        opened(path)


def test_a_picture_that_is_none_is_broken_and_named(tmp_path):
    path = write(tmp_path / "a.tar", [("0.png", picture(1)), ("1.png", b"text"), ("2.png", picture(3))])
    dataset = opened(path)
    with pytest.warns(UserWarning, match=r"the image 1\.png is broken: its content is none of the formats"):
        assert greys(dataset) == [1, 3, 3]
    assert dataset.skipped == ["1.png"]


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("0.cls", b"cat", "has the class b'cat'; expected a number"),
        ("0.cls", b"-1", "has the class b'-1'"),
        ("0.cls", b"99999999999999999999", "has the class"),
        ("0.cls", b"70000", "go up to 70000"),
        ("0.json", b"[1]", "it is no object"),
        ("0.json", b'{"label": ', "broken .json"),
        ("0.json", b'{"label": ' + b"[" * 100_000, "broken .json"),
        ("0.json", b'{"label": -1}', "has the class -1"),
        ("0.json", b'{"label": true}', "has the class True"),
        ("0.json", b'{"label": 1.5}', "has the class 1.5"),
        ("0.json", b" " * (1 << 20) + b"{}", "are allowed"),
        ("0.png", picture(2), r"two files ending in \.png"),
    ],
)
def test_a_sample_that_makes_no_sense_is_refused(tmp_path, name, data, reason):
    path = write(tmp_path / "a.tar", [("0.png", picture(1)), (name, data)])
    with pytest.raises(InputError, match=reason):
        opened(path)


def test_names_and_numbers_of_classes_do_not_mix(tmp_path):
    members = [("0.png", picture(1)), ("0.cls", b"1"), ("1.png", picture(2)), ("1.json", b'{"label": "cat"}')]
    with pytest.raises(InputError, match="some are numbers, such as that of the sample 0"):
        opened(write(tmp_path / "a.tar", members))


def test_a_shard_that_shrinks_ends_the_reading(tmp_path, monkeypatch):
    for held in (0, 256):
        monkeypatch.setattr("ddpm_fast.data.tar._HELD_OPEN", held)
        path = write(tmp_path / "a.tar", [("0.png", picture(1)), ("1.png", picture(2))])
        dataset = opened(path)
        with open(path, "rb+") as file:
            file.truncate(520)
        with pytest.raises(InputError, match="shorter than when its headers were read"):
            dataset.read(0)


@pytest.mark.parametrize(
    "pattern, reason",
    [
        ("no-*.tar", "stands for .*no-.*tar, which is not there"),
        ("a-{0..1}.tar", "a-1.tar, which is not there"),
        ("{0..99999999999}.tar", "more than 100000 files"),
        ("{0..9999}{0..9999}.tar", "more than 100000 files"),
        ("{5..3}.tar", "stands for no files"),
        ("nothing.tar", "no file or folder"),
    ],
)
def test_a_pattern_without_files_is_refused(tmp_path, pattern, reason):
    write(tmp_path / "a-0.tar", [("0.png", picture(1))])
    with pytest.raises(InputError, match=reason):
        opened(tmp_path / pattern)


def test_a_folder_of_pictures_stays_one_if_it_has_a_tar(tmp_path):
    write(tmp_path / "backup.tar", [("0.png", picture(1))])
    (tmp_path / "a.png").write_bytes(picture(5))
    with pytest.warns(UserWarning, match=r"ignored 1 file: 1 \.tar"):
        assert greys(opened(tmp_path)) == [5]


@pytest.mark.parametrize("selection", [Selection(split="train"), Selection(subset="a"), Selection(image_column="jpg")])
def test_what_a_folder_does_not_have_cannot_be_selected(tmp_path, selection):
    (tmp_path / "a.png").write_bytes(picture(5))
    with pytest.raises(InputError, match=r"has no (splits|columns)"):
        opened(tmp_path, selection=selection)


def test_a_link_to_itself_beside_shards_does_no_harm(tmp_path):
    write(tmp_path / "a.tar", [("0.png", picture(6))])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert greys(opened(tmp_path)) == [6]
