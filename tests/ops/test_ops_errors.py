"""Every refusal of the fused ops: what was wrong, what was expected, what to do - and nothing written before it."""

import pytest
import torch

from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.ops import (
    diffusion_loss,
    group_norm,
    hybrid_loss,
    normal,
    q_sample,
    reverse_step,
    reverse_step_,
    vlb_terms,
)

X = torch.zeros(2, 3, 4, 4)
PIXELS = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
T = torch.tensor([0, 1])
KEY = NoiseKey.of(0, 2)
STEP = torch.tensor(0)
Q_TABLE, LOSS_TABLE, STEP_TABLE = torch.ones(5, 2), torch.ones(5, 3), torch.ones(5, 8)
BOUND_TABLE, HYBRID_TABLE = torch.ones(5, 9), torch.ones(5, 11)
DOUBLED = torch.zeros(2, 6, 4, 4)
META = X.to("meta")
HUGE = torch.zeros(1).expand(2, 2**34 + 1)
FLOATS = "torch.float32, torch.bfloat16, torch.float16, torch.float64"


def q(x0=X, t=T, table=Q_TABLE, noise=KEY, dtype=None):
    return q_sample(x0, t, table, noise, dtype)


def loss(output=X, x0=X, t=T, table=LOSS_TABLE, noise=KEY):
    return diffusion_loss(output, x0, t, table, noise)


def hybrid(output=DOUBLED, x0=X, t=T, table=HYBRID_TABLE, noise=KEY):
    return hybrid_loss(output, x0, t, table, noise)


def bound(output=X, x0=X, t=T, table=BOUND_TABLE, noise=KEY):
    return vlb_terms(output, x0, t, table, noise)


def reverse(x_t=X, output=X, table=STEP_TABLE, step=STEP, noise=KEY, **others):
    return reverse_step(x_t, output, table, step, noise, **others)


def in_place(x=X, output=X, table=STEP_TABLE, step=STEP, noise=KEY, **others):
    reverse_step_(x, output, table, step, noise, **others)


ERRORS = {
    "in place: pixels": (lambda: in_place(x=PIXELS), ["reverse_step_: x is torch.uint8", FLOATS]),
    "in place: strides": (
        lambda: in_place(x=X.transpose(2, 3)),
        ["reverse_step_: x has shape (2, 3, 4, 4) and strides (48, 16, 1, 4)", "make it so once"],
    ),
    "in place: another x0": (
        lambda: in_place(x0=X[:1]),
        ["reverse_step_: x0 has shape (1, 3, 4, 4) and x (2, 3, 4, 4)"],
    ),
    "in place: x0 in half": (lambda: in_place(x0=X.half()), ["reverse_step_: x0 is torch.float16", "torch.float32"]),
    "in place: copy's strides": (
        lambda: in_place(x_model=X.half().transpose(2, 3)),
        ["reverse_step_: x_model has shape (2, 3, 4, 4)", "contiguous or channels_last"],
    ),
    "in place: a gradient": (
        lambda: in_place(output=X.clone().requires_grad_()),
        ["reverse_step_ has no gradient", "use reverse_step"],
    ),
    "in place: step's shape": (
        lambda: in_place(step=torch.tensor([0, 1])),
        ["reverse_step_: step is torch.int64 of shape (2,) on cpu", "an int64 scalar tensor on cpu"],
    ),
    "normal: integers": (lambda: normal(KEY, (3,), dtype=torch.int32), ["normal: dtype is torch.int32", FLOATS]),
    "normal: negative size": (lambda: normal(KEY, (3, -1)), ["normal: shape (3, -1)", "negative"]),
    "normal: 1-D channels_last": (
        lambda: normal(KEY, (3,), memory_format=torch.channels_last),
        ["normal: channels_last", "[C, H, W] or [C, D, H, W]", "(3,)"],
    ),
    "normal: sample beyond the counter": (
        lambda: normal(KEY, (2**34 + 1,)),
        ["normal: a sample has 17179869185 elements", "reaches 17179869184"],
    ),
    "q_sample: integer images": (lambda: q(x0=X.long()), ["q_sample: x0 is torch.int64", FLOATS, "torch.uint8"]),
    "q_sample: images without channels": (lambda: q(x0=X[:, 0, 0, 0]), ["x0 has shape (2,)", "expected [N, C, ...]"]),
    "q_sample: sample beyond the counter": (lambda: q(x0=HUGE), ["q_sample: a sample has 17179869185 elements"]),
    "q_sample: the loss's table": (
        lambda: q(table=LOSS_TABLE),
        ["q_sample: table is torch.float32 of shape (5, 3)", "expected float32 [rows, 2]"],
    ),
    "q_sample: one row": (lambda: q(table=Q_TABLE[0]), ["table is torch.float32 of shape (2,)", "[rows, 2]"]),
    "q_sample: fp16 table": (lambda: q(table=Q_TABLE.half()), ["table is torch.float16", "expected float32"]),
    "q_sample: table elsewhere": (
        lambda: q(table=Q_TABLE.to("meta")),
        ["q_sample: table is on meta and the images on cpu", "move it there once"],
    ),
    "q_sample: float timesteps": (
        lambda: q(t=T.float()),
        ["q_sample: t is torch.float32 of shape (2,)", "int64 [2], one a sample"],
    ),
    "q_sample: one timestep for two samples": (lambda: q(t=T[:1]), ["t is torch.int64 of shape (1,)", "int64 [2]"]),
    "q_sample: scalar timestep": (lambda: q(t=T[0]), ["t is torch.int64 of shape ()", "int64 [2]"]),
    "q_sample: timesteps elsewhere": (lambda: q(t=T.to("meta")), ["t is on meta and the images on cpu", "share one"]),
    "q_sample: integer result": (lambda: q(dtype=torch.uint8), ["q_sample: dtype is torch.uint8", FLOATS]),
    "q_sample: no noise": (lambda: q(noise=None), ["q_sample: noise is a NoneType", "a tensor or a NoiseKey"]),
    "q_sample: a seed for noise": (lambda: q(noise=3), ["noise is a int", "a tensor or a NoiseKey"]),
    "q_sample: integer noise": (lambda: q(noise=PIXELS), ["q_sample: noise is torch.uint8", FLOATS]),
    "q_sample: noise of another shape": (
        lambda: q(noise=X[:, :1]),
        ["noise has shape (2, 1, 4, 4) and the image (2, 3, 4, 4)", "must be equal"],
    ),
    "q_sample: noise elsewhere": (lambda: q(noise=META), ["noise is on meta and the image on cpu", "share one"]),
    "q_sample: a key for more samples": (
        lambda: q(noise=NoiseKey.of(0, 3)),
        ["q_sample: the NoiseKey names 3 samples and the batch has 2"],
    ),
    "q_sample: a key elsewhere": (
        lambda: q(noise=NoiseKey.of(0, 2, device="meta")),
        ["q_sample: the NoiseKey is on meta and the images on cpu"],
    ),
    "loss: pixels as output": (lambda: loss(output=PIXELS), ["diffusion_loss: output is torch.uint8", FLOATS]),
    "loss: output without channels": (lambda: loss(output=X[:, 0, 0, 0]), ["output has shape (2,)", "[N, C, ...]"]),
    "loss: integer images": (lambda: loss(x0=X.int()), ["diffusion_loss: x0 is torch.int32", "torch.uint8"]),
    "loss: output with twice the channels": (
        lambda: loss(output=torch.zeros(2, 6, 4, 4)),
        ["diffusion_loss: x0 has shape (2, 3, 4, 4) and output (2, 6, 4, 4)", "must be equal"],
    ),
    "loss: images elsewhere": (lambda: loss(x0=META), ["x0 is on meta and output on cpu", "share one"]),
    "loss: q_sample's table": (lambda: loss(table=Q_TABLE), ["table is torch.float32 of shape (5, 2)", "[rows, 3]"]),
    "loss: int32 timesteps": (lambda: loss(t=T.int()), ["diffusion_loss: t is torch.int32", "int64 [2]"]),
    "loss: nothing to average": (
        lambda: loss(output=X[:, :, :0], x0=X[:, :, :0]),
        ["diffusion_loss: samples of shape (3, 0, 4)", "no elements to average over"],
    ),
    "loss: noise of another shape": (lambda: loss(noise=X[:1]), ["diffusion_loss: noise has shape (1, 3, 4, 4)"]),
    "loss: a key for fewer samples": (lambda: loss(noise=NoiseKey.of(0, 1)), ["names 1 samples and the batch has 2"]),
    "step: pixels": (lambda: reverse(x_t=PIXELS), ["reverse_step: x_t is torch.uint8", FLOATS]),
    "step: integer output": (lambda: reverse(output=PIXELS), ["reverse_step: output is torch.uint8", FLOATS]),
    "hybrid: an output without a variance": (
        lambda: hybrid(output=X),
        ["hybrid_loss: output has shape (2, 3, 4, 4) and x0 (2, 3, 4, 4)", "expected an output of (2, 6, 4, 4)"],
    ),
    "hybrid: pixels as output": (lambda: hybrid(output=PIXELS), ["hybrid_loss: output is torch.uint8", FLOATS]),
    "hybrid: integer images": (lambda: hybrid(x0=X.long()), ["hybrid_loss: x0 is torch.int64", "torch.uint8"]),
    "hybrid: images elsewhere": (lambda: hybrid(x0=META), ["hybrid_loss: output is on cpu and x0 on meta"]),
    "hybrid: the bound's table": (
        lambda: hybrid(table=BOUND_TABLE),
        ["hybrid_loss: table is torch.float32 of shape (5, 9)", "[rows, 11]"],
    ),
    "hybrid: float timesteps": (lambda: hybrid(t=T.float()), ["hybrid_loss: t is torch.float32", "int64 [2]"]),
    "hybrid: noise of the output's shape": (
        lambda: hybrid(noise=DOUBLED),
        ["hybrid_loss: noise has shape (2, 6, 4, 4) and the image (2, 3, 4, 4)"],
    ),
    "hybrid: a key for fewer samples": (
        lambda: hybrid(noise=NoiseKey.of(0, 1)),
        ["hybrid_loss: the NoiseKey names 1 samples and the batch has 2"],
    ),
    "hybrid: nothing to average": (
        lambda: hybrid(output=DOUBLED[:, :, :0], x0=X[:, :, :0]),
        ["hybrid_loss: samples of shape (6, 0, 4)", "no elements to average over"],
    ),
    "vlb: three times the channels": (
        lambda: bound(output=torch.zeros(2, 9, 4, 4)),
        ["vlb_terms: output has shape (2, 9, 4, 4)", "expected an output of (2, 3, 4, 4) or (2, 6, 4, 4)"],
    ),
    "vlb: integer output": (lambda: bound(output=PIXELS), ["vlb_terms: output is torch.uint8", FLOATS]),
    "vlb: output without channels": (lambda: bound(output=X[:, 0, 0, 0]), ["output has shape (2,)", "[N, C, ...]"]),
    "vlb: output elsewhere": (lambda: bound(output=META), ["vlb_terms: table is on cpu and the images on meta"]),
    "vlb: the loss's table": (
        lambda: bound(table=LOSS_TABLE),
        ["vlb_terms: table is torch.float32 of shape (5, 3)", "[rows, 9]"],
    ),
    "vlb: timesteps elsewhere": (lambda: bound(t=T.to("meta")), ["vlb_terms: t is on meta", "share one"]),
    "vlb: no noise": (lambda: bound(noise=None), ["vlb_terms: noise is a NoneType", "NoiseKey"]),
    "vlb: nothing to average": (
        lambda: bound(output=X[:, :, :0], x0=X[:, :, :0]),
        ["vlb_terms: samples of shape (3, 0, 4)", "no elements to average over"],
    ),
    "step: output of half as many channels again": (
        lambda: reverse(output=torch.zeros(2, 4, 4, 4)),
        [
            "reverse_step: output has shape (2, 4, 4, 4) and x_t (2, 3, 4, 4)",
            "expected an output of (2, 3, 4, 4) or (2, 6, 4, 4)",
        ],
    ),
    "step: output elsewhere": (lambda: reverse(output=META), ["output is on meta and x_t on cpu"]),
    "step: integer previous x0": (lambda: reverse(x0_previous=PIXELS), ["reverse_step: x0_previous is torch.uint8"]),
    "step: previous x0 of another shape": (
        lambda: reverse(x0_previous=X[:1]),
        ["x0_previous has shape (1, 3, 4, 4) and x_t (2, 3, 4, 4)"],
    ),
    "step: a table of six columns": (
        lambda: reverse(table=STEP_TABLE[:, :6]),
        ["reverse_step: table is torch.float32 of shape (5, 6)", "[rows, 8]"],
    ),
    "step: table elsewhere": (lambda: reverse(table=STEP_TABLE.to("meta")), ["table is on meta", "move it there once"]),
    "step: one step a sample": (
        lambda: reverse(step=T),
        ["reverse_step: step is torch.int64 of shape (2,) on cpu", "an int64 scalar tensor on cpu"],
    ),
    "step: float step": (lambda: reverse(step=torch.tensor(1.0)), ["step is torch.float32", "int64 scalar tensor"]),
    "step: step elsewhere": (lambda: reverse(step=STEP.to("meta")), ["on meta", "int64 scalar tensor on cpu"]),
    "step: integer copy": (
        lambda: reverse(model_dtype=torch.int8),
        ["reverse_step: model_dtype is torch.int8", FLOATS],
    ),
    "step: no noise": (lambda: reverse(noise=None), ["reverse_step: noise is a NoneType", "NoiseKey"]),
}


def refused(call, fragments):
    with pytest.raises(InputError) as error:
        call()
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("word", ERRORS)
def test_refused(word, monkeypatch):
    refused(*ERRORS[word])
    monkeypatch.setattr("ddpm_fast.ops.direct._direct", None)  # the same by the long way
    refused(*ERRORS[word])


@pytest.mark.parametrize("t", [[0, -1], [0, 5], [0, 2**62], [0, -(2**63)]], ids=str)
@pytest.mark.parametrize("op", ["q_sample", "diffusion_loss", "hybrid_loss", "vlb_terms"])
def test_timesteps_outside_the_table(op, t, host_backend):
    call = {"q_sample": q, "diffusion_loss": loss, "hybrid_loss": hybrid, "vlb_terms": bound}[op]
    refused(lambda: call(t=torch.tensor(t)), [f"{op}: t[1] is {t[1]}, outside the table's range 0..4"])


@pytest.mark.parametrize("step", [-1, 5, 2**62])
def test_step_outside_the_table(step, host_backend):
    refused(
        lambda: reverse(step=torch.tensor(step)),
        [f"reverse_step: step[0] is {step}, outside the table's range 0..4"],
    )


def test_the_last_row_is_inside(backend):
    last = torch.tensor([4, 4])
    assert q(t=last).shape == X.shape
    assert loss(t=last).shape == hybrid(t=last).shape == bound(t=last).bits_per_dim.shape == (2,)
    assert reverse(step=torch.tensor(4)).x.shape == X.shape


def test_strided_indices_are_read_by_their_strides(backend):
    # t and the sample ids as every other element of a larger tensor, the table as a transposed one.
    t = torch.tensor([4, 99, 1, 99])[::2]
    ids = torch.tensor([7, 99, 8, 99])[::2]
    table = torch.arange(10, dtype=torch.float32).view(2, 5).t()
    x0 = torch.ones(2, 3, 4, 4)
    actual = q(x0, t, table, NoiseKey(torch.tensor(1), ids, torch.tensor(0)))
    assert torch.equal(actual, q(x0, t.clone(), table.contiguous(), NoiseKey.of(1, 2, first_sample_id=7)))


def test_numbers_of_a_norm_that_are_sparse_are_refused():
    x, one = torch.zeros(3, 2, 1, 4), torch.ones(2)
    with pytest.raises(InputError, match="dense"):
        group_norm(x, one, one, 2, 1e-5, added=torch.ones(1, 2).to_sparse())
