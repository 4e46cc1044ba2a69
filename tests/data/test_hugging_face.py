"""Tests of data sets that Hugging Face's library loads: local ones, made here, and the call for one of the Hub."""

import io
import sys

import pytest
import torch
from PIL import Image

from ddpm_fast.data import open_dataset
from ddpm_fast.data.selection import Selection
from ddpm_fast.errors import InputError

datasets = pytest.importorskip("datasets", reason="the extra [hf] is not installed")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The library's own files go into the test's folder, and it shows no bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(level, size=(4, 4)):
    written = io.BytesIO()
    Image.new("L", size, level).save(written, "PNG")
    return written.getvalue()


def rows(levels, label=None, **columns):
    """A data set of grey pictures."""
    features = {"image": datasets.Image()}
    table = {"image": [{"bytes": png(level), "path": None} for level in levels]}
    if label is not None:
        features["label"], table["label"] = label
    features |= {name: feature for name, (feature, _) in columns.items()}
    table |= {name: values for name, (_, values) in columns.items()}
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


def parquet(path, table):
    pq.write_table(table, path)
    return path


def opened(source, in_memory=False, **options):
    return open_dataset(str(source), in_memory=in_memory, **options)


def greys(dataset):
    images, _ = dataset.batch(torch.arange(len(dataset)))
    return images[:, 0, 0, 0].tolist()


CLASSES = datasets.ClassLabel(names=["dog", "cat"])


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_parquet_file_is_read_with_the_names_of_its_classes(tmp_path, in_memory):
    rows([5, 6, 7], (CLASSES, [1, 0, 1])).to_parquet(tmp_path / "a.parquet")
    dataset = opened(tmp_path / "a.parquet", in_memory)
    assert greys(dataset) == [5, 6, 7]
    assert dataset.labels.tolist() == [1, 0, 1]
    assert dataset.label_names == ["dog", "cat"]
    assert dataset.shape == (1, 4, 4)


def test_parquet_files_come_in_natural_order(tmp_path):
    for part in (10, 2):
        rows([part, part + 1]).to_parquet(tmp_path / f"part-{part}.parquet")
    assert greys(opened(tmp_path / "part-*.parquet")) == [2, 3, 10, 11]
    (tmp_path / "cache").rename(tmp_path / ".cache")  # the library's own, beside which the folder has no others
    assert greys(opened(tmp_path)) == [2, 3, 10, 11]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])])
def test_parquet_that_another_library_wrote(tmp_path, kind):
    values = [{"bytes": png(k)} if pa.types.is_struct(kind) else png(k) for k in (1, 2, 3)]
    table = pa.table({"picture": pa.array(values, kind), "label": ["b 10", "b 9", "a"], "note": ["", "", ""]})
    dataset = opened(parquet(tmp_path / "a.parquet", table))
    assert greys(dataset) == [1, 2, 3]
    assert (dataset.label_names, dataset.labels.tolist()) == (["a", "b 9", "b 10"], [2, 1, 0])


def test_columns_are_chosen_by_name(tmp_path):
    masks = (datasets.Image(), [{"bytes": png(k), "path": None} for k in (100, 101)])
    fine = (datasets.ClassLabel(names=["x", "y", "z"]), [2, 0])
    coarse = (datasets.ClassLabel(names=["u", "v"]), [0, 1])
    made = rows([1, 2], None, mask=masks, fine=fine, coarse=coarse)
    made.to_parquet(tmp_path / "a.parquet")
    dataset = opened(tmp_path / "a.parquet")
    assert greys(dataset) == [1, 2]
    assert dataset.labels is None
    dataset = opened(tmp_path / "a.parquet", selection=Selection(image_column="mask", label_column="fine"))
    assert greys(dataset) == [100, 101]
    assert (dataset.label_names, dataset.labels.tolist()) == (["x", "y", "z"], [2, 0])


def test_saved_data_sets_and_their_splits(tmp_path):
    split = datasets.DatasetDict({"train": rows([1, 2, 3]).shuffle(seed=1), "test": rows([4])})
    order = [row["image"].getpixel((0, 0)) for row in split["train"]]
    split.save_to_disk(tmp_path / "saved")
    assert greys(opened(f"hf:{tmp_path}/saved")) == order
    assert greys(opened(f"hf:{tmp_path}/saved:test")) == [4]
    assert greys(opened(f"hf:{tmp_path}/saved", selection=Selection(split="test"))) == [4]
    with pytest.raises(InputError, match="has no split dev, only train, test; say which with --split"):
        opened(f"hf:{tmp_path}/saved:dev")


def test_a_folder_of_pictures_by_the_library(tmp_path):
    for name, level in (("cat", 7), ("dog", 8)):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        (tmp_path / "pets" / "train" / name / "0.png").write_bytes(png(level))
    dataset = opened(f"hf:{tmp_path}/pets")
    assert greys(dataset) == [7, 8]
    assert (dataset.label_names, dataset.labels.tolist()) == (["cat", "dog"], [0, 1])


def test_a_data_set_of_the_hub_is_asked_for_by_its_name(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return rows([1, 2, 3], (CLASSES, [0, 1, 0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = opened("hf:someone/pets", selection=Selection(split="train[:3]", subset="small"))
    assert greys(dataset) == [1, 2, 3]
    assert dataset.name == "hf:someone/pets"
    assert len(opened("hf:mnist:test")) == 3
    assert asked == [(("someone/pets", "small"), {"split": "train[:3]"}), (("mnist", None), {"split": "test"})]


def test_the_digest_is_that_of_the_rows(tmp_path):
    made = rows([1, 2, 3], (CLASSES, [0, 1, 0]))
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    first = opened(tmp_path / "a.parquet").digest
    assert opened(f"hf:{tmp_path}/saved").digest == first
    rows([1, 2, 3], (CLASSES, [0, 1, 1])).to_parquet(tmp_path / "b.parquet")
    assert opened(tmp_path / "b.parquet").digest != first


# ---- what is wrong, or hostile ----


def test_without_the_extra_the_command_to_install_it_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("hf:mnist", tmp_path / "a.parquet"):
        with pytest.raises(InputError, match=r"pip install 'ddpm-fast\[hf\]'"):
            opened(source)


def test_a_version_that_runs_other_peoples_programs_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(InputError, match=r"needs version 4 or later .* and this is 3\.6\.0"):
        opened("hf:mnist")


@pytest.mark.parametrize("error", [ConnectionError("no network"), ValueError('Unknown split "dev".'), OSError("disk")])
def test_what_the_library_raises_is_said(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=rf"cannot load mnist: {error} \({type(error).__name__}\); check the name"):
        opened("hf:mnist")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 100, b"text"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot load .*a\.parquet"):
        opened(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "columns, selection, reason",
    [
        ({"image": [1, 2]}, {}, r"has 0 columns of pictures \(none\) among image; say which"),
        ({"a": [png(1)] * 2, "b": [png(2)] * 2}, {}, r"2 columns of pictures \(a, b\)"),
        ({"image": [png(1)] * 2}, {"image_column": "picture"}, "no column picture for --image-column, only image"),
        ({"image": [png(1)] * 2, "x": [1, 2]}, {"image_column": "x"}, "the column x of .* is of the type int64"),
        ({"image": [[1, 2], [3, 4]]}, {"image_column": "image"}, "expected pictures as the bytes of files"),
        ({"image": [png(1)] * 2}, {"label_column": "kind"}, "no column kind for --label-column"),
        ({"image": [png(1)] * 2, "x": [1.5, 2]}, {"label_column": "x"}, "of the type double, expected class numbers"),
        ({"image": [png(1)] * 2, "label": [-2, 0]}, {}, "go down to -2"),
        ({"image": [png(1)] * 2, "label": [0, 1 << 40]}, {}, "go up to 1099511627776"),
    ],
)
def test_columns_that_make_no_sense_are_refused(tmp_path, columns, selection, reason):
    with pytest.raises(InputError, match=reason):
        opened(parquet(tmp_path / "a.parquet", pa.table(columns)), selection=Selection(**selection))


def test_a_data_set_without_rows_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows([]))
    with pytest.raises(InputError, match="has no rows"):
        opened("hf:mnist")


def test_rows_without_a_class_among_others_are_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", pa.table({"image": [png(1)] * 3, "label": [4, None, 1]}))
    with pytest.warns(UserWarning, match="such as row 1, have none: no class is used"):
        assert opened(path).labels is None
    with pytest.raises(InputError, match=r"classes were asked for, but .* without one, such as row 1"):
        opened(path, classes=True)


@pytest.mark.filterwarnings("ignore:the image")  # one of three is looked at
def test_rows_that_hold_no_picture_are_broken_and_named(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    values = [
        {"bytes": png(1), "path": None},
        {"bytes": None, "path": str(secret)},
        {"bytes": b"text", "path": "b.png"},
        {"bytes": None, "path": None},
        None,
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = parquet(tmp_path / "a.parquet", pa.table({"image": pa.array(values, kind)}))
    dataset = opened(path, image_size=4, channels=1)
    with pytest.warns(UserWarning, match="only a path, which is not followed"):
        assert greys(dataset) == [1] * 5
    assert dataset.skipped == [str(secret), "b.png", "row 3", "row 4"]


@pytest.mark.parametrize("in_memory", [False, True])
def test_pictures_become_images_of_a_size_that_is_no_square(tmp_path, in_memory):
    table = pa.table({"image": pa.array([png(level, size=(9, 12)) for level in (3, 5)], pa.binary())})
    dataset = opened(parquet(tmp_path / "a.parquet", table), in_memory, image_size=(4, 6), channels=1)
    assert dataset.shape == (1, 4, 6) and greys(dataset) == [3, 5]


def test_a_damaged_arrow_file_is_refused(tmp_path):
    """Its places lie outside of it, and whoever believed them would read the memory of other things."""
    column = pa.array([png(1), png(2)], pa.binary())
    places = column.buffers()[1].to_pybytes()[:12]  # where the two begin, and the second ends: int32 [3]
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema([("image", pa.binary())])) as writer,
    ):
        writer.write_batch(pa.record_batch([column], names=["image"]))
    content = (tmp_path / "a.arrow").read_bytes()
    assert content.count(places) == 1
    damaged = torch.tensor([0, 1 << 30, 70], dtype=torch.int32).numpy().tobytes()
    (tmp_path / "a.arrow").write_bytes(content.replace(places, damaged))
    with pytest.raises(InputError, match=r"damaged|cannot load"):
        opened(tmp_path / "a.arrow")
