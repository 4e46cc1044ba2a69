"""The network as an ONNX file: onnxruntime computes what we do."""

import json

import pytest
import torch
from support.made_weights import made_input, made_state

import ddpm_fast as df
from ddpm_fast.files.loaded_model import LoadedModel
from ddpm_fast.formats.onnx import export_onnx
from ddpm_fast.nn import UNet, UNetConfig

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")


@pytest.mark.slow
def test_onnxruntime_computes_the_network_for_every_batch(tmp_path):
    """A network of two levels with everything that exporting could stumble over."""
    config = UNetConfig(
        image_size=(8, 16), in_channels=2, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4,
        attention_resolutions=(), num_heads=2, num_classes=3, condition_channels=1, scale_shift=True, dropout=0.1,
        timestep_scale=0.5, augment_channels=4,
    )  # fmt: skip
    model = UNet(config).eval()
    model.load_state_dict(made_state({name: tensor.shape for name, tensor in model.state_dict().items()}))
    diffusion = df.GaussianDiffusion(df.Schedule.cosine(20), prediction="v")
    described = {"diffusion": diffusion.to_dict(), "label_names": ["a", "b", "c"]}
    loaded = LoadedModel(model, diffusion, described, None, tmp_path / "m.safetensors")
    assert export_onnx(loaded, tmp_path / "m.onnx") < 1e-5

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [(one.name, one.shape[1:]) for one in session.get_inputs()] == [
        ("x", [2, 8, 16]), ("t", []), ("labels", []), ("condition", [1, 8, 16]),
    ]  # fmt: skip
    for n in (1, 5):
        given = {
            "x": made_input("x", (n, 2, 8, 16)),
            "t": torch.arange(n),
            "labels": torch.arange(n) % 4,
            "condition": made_input("condition", (n, 1, 8, 16)),
        }
        (found,) = session.run(["output"], {name: tensor.numpy() for name, tensor in given.items()})
        with torch.no_grad():
            expected = model.double()(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()})
        model.float()
        torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=0, atol=1e-5)
    kept = json.loads(session.get_modelmeta().custom_metadata_map["ddpm_fast"])
    assert df.GaussianDiffusion.from_dict(kept["diffusion"]).to_dict() == diffusion.to_dict()
    assert kept["label_names"] == ["a", "b", "c"]
