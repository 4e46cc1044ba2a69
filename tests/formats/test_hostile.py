"""Other libraries' files and folders from a stranger: each gives a model, or an InputError that says what is wrong, in
a moment, in little memory, and nothing in it is run."""

import json
import math
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import Calls
from support.diffusers_configs import KINDS, SCHEDULERS
from support.made_weights import made_state
from support.strange import VALUES
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.errors import InputError
from ddpm_fast.formats.load import FORMATS
from ddpm_fast.formats.openai.names import to_theirs

GOLDEN = Path(__file__).parents[1] / "golden"
TABLE = "time_embedding.timembedding.0.weight"
WEIGHTS = "diffusion_pytorch_model"


def golden_shapes(file: str, key: str) -> dict[str, list[int]]:
    with np.load(GOLDEN / file) as golden:
        array = golden[key]
    return json.loads(bytes(array) if array.dtype == np.uint8 else str(array))


def openai() -> dict[str, Tensor]:
    config = df.UNetConfig(image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, scale_shift=True,
                           attention_resolutions=(8,), num_heads=2)  # fmt: skip
    with torch.device("meta"):
        state = to_theirs(df.UNet(config).state_dict(), config.heads, legacy=False)
    return made_state({name: tensor.shape for name, tensor in state.items()})


def w86763777() -> dict[str, Tensor]:
    shapes = golden_shapes("ho2020.npz", "w86763777 two levels/shapes")
    timesteps, channels = shapes.pop(TABLE)
    angles = torch.arange(timesteps)[:, None] * torch.exp(-math.log(10000) * torch.arange(0, channels, 2) / channels)
    return made_state(shapes) | {TABLE: torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)}


def pesser() -> dict[str, Tensor]:
    return made_state(golden_shapes("ho2020.npz", "pesser two levels/shapes"))


def diffusers() -> dict[str, Tensor]:
    return made_state(golden_shapes("diffusers.npz", "as Ho et al., shapes"))


# For each kind of file the weights, the flags, and what is around the weights.
FILES: dict[str, tuple[Callable[[], dict[str, Tensor]], str, Callable[[Any], Any]]] = {
    "openai": (
        openai,
        "--image_size 16 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --num_heads 2 "
        "--attention_resolutions 8 --use_new_attention_order True --use_scale_shift_norm True",
        lambda state: state,
    ),
    "w86763777": (w86763777, "--T 20", lambda state: {"ema_model": state, "step": 3}),
    "pesser": (pesser, "--resolution 8", lambda state: state),
}


def write_folder(folder: Path, state: Any = None, *, weights: str = ".safetensors") -> Path:
    """A pipeline's folder, with weights as .safetensors or .bin."""
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True)
    config = {"_class_name": "UNet2DModel"} | KINDS["as Ho et al."]
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS["DDPM by default"]))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    path = folder / "unet" / f"{WEIGHTS}{weights}"
    state = diffusers() if state is None else state
    if weights == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    return folder


def assert_shown(message: str) -> None:
    """A message has a length that is read, and nothing that a terminal obeys."""
    assert len(message) < 3000 and re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", message) is None, message


def loaded(source: Path, flags: str | None = None) -> df.LoadedModel | str:
    """The model, or the message of the InputError; within bounds of time and memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        result: df.LoadedModel | str = df.load_model(source, flags=flags)
    except InputError as error:
        result = str(error)
        assert_shown(result)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    return result


@pytest.mark.parametrize("kind", FILES)
def test_the_files_that_are_changed_below_are_good_ones(kind, tmp_path):
    weights, flags, wrapped = FILES[kind]
    torch.save(wrapped(weights()), tmp_path / "a.pt")
    assert isinstance(loaded(tmp_path / "a.pt", flags), df.LoadedModel)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_the_folders_that_are_changed_below_are_good_ones(suffix, tmp_path):
    assert isinstance(loaded(write_folder(tmp_path / "a", weights=suffix)), df.LoadedModel)


def strange_weights(tensor: Tensor) -> dict[str, Any]:
    """What may stand in a weight's place. None of them is the weight of a network."""
    return {
        "a scalar": torch.tensor(1.0),
        "empty": torch.empty(0),
        "one row more": torch.cat([tensor, tensor[:1]]),
        "another dimension": tensor[None].clone(),
        "flat": tensor.flatten().clone() if tensor.ndim > 1 else tensor[:, None].clone(),
        "expanded": tensor.flatten()[:1].expand(2**40),
        "integers": tensor.int(),
        "complex": tensor.to(torch.complex64),
        "boolean": tensor > 0,
        "not finite": tensor * torch.nan,
        "on no device": tensor.to("meta"),
        "a list": tensor.flatten()[:3].tolist(),
        "nothing": None,
        "a text": "\x1b[31mweight",
    }


def strange_states(state: dict[str, Tensor]) -> Iterator[tuple[str, str, Any]]:
    """Each change at one weight, and some at those that are joined: their names, what the change is, and the value."""
    names = list(state)
    changes = list(strange_weights(torch.ones(1)))
    for index, what in enumerate(changes):
        name = names[index * len(names) // len(changes)]
        yield name, what, strange_weights(state[name])[what]
    joined = next(name for name in names if re.search(r"(qkv|proj_k|attn\.0\.k|to_k)\.weight", name))
    for what in ("flat", "integers", "complex"):
        yield joined, what, strange_weights(state[joined])[what]


@pytest.mark.parametrize("kind", FILES)
def test_a_weight_of_another_kind_is_refused(kind, tmp_path):
    weights, flags, wrapped = FILES[kind]
    state = weights()
    for name, what, value in strange_states(state):
        torch.save(wrapped(state | {name: value}), tmp_path / "a.pt")
        assert isinstance(loaded(tmp_path / "a.pt", flags), str), f"{name}: {what}"


def test_a_weight_of_another_kind_in_a_folder_is_refused(tmp_path):
    state = diffusers()
    folder = write_folder(tmp_path / "a", state, weights=".bin")
    for name, what, value in strange_states(state):
        torch.save(state | {name: value}, folder / "unet" / f"{WEIGHTS}.bin")
        assert isinstance(loaded(folder), str), f"{name}: {what}"


@pytest.mark.parametrize("kind", FILES)
def test_a_weight_too_many_or_too_few_is_refused(kind, tmp_path):
    weights, flags, wrapped = FILES[kind]
    state = weights()
    for name in list(state)[::40]:
        torch.save(wrapped({n: t for n, t in state.items() if n != name}), tmp_path / "a.pt")
        assert isinstance(loaded(tmp_path / "a.pt", flags), str), name
    for name in ("\x1b[31m", "../../x.weight", "x" * 10**5):
        torch.save(wrapped(state | {name: torch.ones(1)}), tmp_path / "a.pt")
        assert isinstance(loaded(tmp_path / "a.pt", flags), str), name[:30]


@pytest.mark.parametrize("kind", [*FILES, "diffusers"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_code_in_the_place_of_a_weight_is_not_run(kind, zipped, tmp_path):
    code = Calls(os.mkdir, str(tmp_path / "proof"))
    if kind == "diffusers":
        source, flags = write_folder(tmp_path / "a", diffusers(), weights=".bin"), None
        content: Any = diffusers() | {"conv_in.weight": code}
        path = source / "unet" / f"{WEIGHTS}.bin"
    else:
        weights, flags, wrapped = FILES[kind]
        content, path = wrapped(weights() | {"time_embed.0.weight": code}), tmp_path / "a.pt"
        source = path
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "holds code" in loaded(source, flags)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("kind", [*FILES, ".bin", ".safetensors"])
def test_a_file_that_is_cut_off_is_refused(kind, tmp_path):
    if kind in FILES:
        weights, flags, wrapped = FILES[kind]
        source = path = tmp_path / "a.pt"
        torch.save(wrapped(weights()), path)
    else:
        source, flags = write_folder(tmp_path / "a", weights=kind), None
        path = source / "unet" / f"{WEIGHTS}{kind}"
    data = path.read_bytes()
    for share in (0, 1, 9, 50, 99):
        path.write_bytes(data[: len(data) * share // 100])
        assert isinstance(loaded(source, flags), str), share


TEXTS = (
    "--image_size", "image_size 8", "--image_size=-8", "--image_size 99999999999999999999", "--image_size 8.5", "'",
    "--", "--resolution nan", "--T 1e9", "--beta_T inf", "--beta_1 -1", "--beta_T 1e400", "--ch_mult ,", "--attn 1,x",
    "--diffusion_steps 999999999", "--num_diffusion_timesteps 0", "--image_size 8 --image_size 16", "--" + "x" * 10**5,
    "--dropout 7", "--\x1b[31m 3", "--num_heads 0", "--attention_resolutions 0", "--attention_resolutions 99",
    "--img_size 0", "--noise_schedule x", "--mean_type xprev", "--model_var_type x", "--channel_mult 0,0",
)  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_flags_that_nobody_means_are_refused(kind, tmp_path):
    weights, _, wrapped = FILES[kind]
    content = wrapped(weights())
    (claiming,) = (one for one in FORMATS if one.claims(content))
    for text in TEXTS:
        with pytest.raises(InputError) as caught:
            claiming.read(content, tmp_path / "a.pt", text)
        assert_shown(str(caught.value))


FIELDS = [("unet/config.json", name) for name in sorted({"_class_name", *KINDS["as Ho et al."], *KINDS["classes"]})]
FIELDS += [("unet/config.json", name) for name in ("in_channels", "out_channels", "act_fn", "dropout")]
FIELDS += [("scheduler/scheduler_config.json", name) for name in SCHEDULERS["another range"]]
FIELDS += [("scheduler/scheduler_config.json", name) for name in ("trained_betas", "prediction_type", "variance_type")]
FIELDS += [("model_index.json", "id2label")]


@pytest.mark.parametrize(("file", "field"), FIELDS)
def test_a_changed_field_of_a_folder_gives_a_model_or_an_input_error(file, field, tmp_path):
    folder = write_folder(tmp_path / "a")
    config = json.loads((folder / file).read_text())
    place = FIELDS.index((file, field))
    for value in list(VALUES.values())[place % 4 :: 4]:  # over all fields, each value several times
        (folder / file).write_text(json.dumps(config | {field: value}))
        loaded(folder)


def test_a_link_that_leads_out_of_a_folder_is_not_followed(tmp_path):
    write_folder(tmp_path / "good")
    config = "scheduler/scheduler_config.json"
    for file in ("model_index.json", "unet/config.json", f"unet/{WEIGHTS}.safetensors", config):
        folder = tmp_path / "a"
        shutil.copytree(tmp_path / "good", folder)
        (folder / file).unlink()
        (folder / file).symlink_to(tmp_path / "good" / file)
        assert "leads out of the folder" in loaded(folder), file
        shutil.rmtree(folder)
