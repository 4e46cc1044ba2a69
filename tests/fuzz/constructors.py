"""Constructors and functions that take numbers, given NumPy's, huge, negative, NaN and what is no number.

A number is what `operator.index` takes and is no bool; it must mean the same whatever its type. All else is refused.
"""

from __future__ import annotations

import functools
import math
import operator
import random
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.errors import InputError
from ddpm_fast.noise import NoiseKey
from ddpm_fast.objective import LOSSES, PREDICTIONS, VARIANCES, WEIGHTINGS
from ddpm_fast.samplers import SAMPLERS
from ddpm_fast.schedule import SCHEDULES
from tests.fuzz.mutations import INTEGERS, ODD, hostile
from tests.fuzz.supervise import Failed, Notes

MOST = 5000  # timesteps or samples of a case: more take too long to be made


class Tiny(nn.Module):
    """A network of two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * x


def plain_number(value: Any) -> int | None:
    """The int that a value is, or None for what must be refused."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, NoiseKey):
        return all(same(x, y) for x, y in ((a.seed, b.seed), (a.sample_id, b.sample_id), (a.step, b.step)))
    return a == b


def run(rng: random.Random, notes: Notes) -> int:
    make = rng.choice((_key, _key, _schedule, _respace, _options, _options, _sample, _objective, _bound_key, _network))
    return make(rng, notes)


def _attempt(name: str, said: str, function: Callable[[], Any], notes: Notes) -> Any:
    """The result, or the InputError. Raises Failed for other errors."""
    notes(f"{name}{said}")
    try:
        return function()
    except InputError as error:
        return error
    except Exception as error:
        what = "".join(traceback.format_exception(error)[-3:])
        raise Failed(f"{name}: {type(error).__name__}", f"{said}\n{what}") from error


def _check_integers(
    name: str, function: Callable[..., Any], given: dict[str, Any], good: dict[str, bool], notes: Notes
) -> int:
    """good: whether each argument's plain value may be taken, by name."""
    said = f"({', '.join(f'{k}={v!r:.60} ({type(v).__name__})' for k, v in given.items())})"
    result = _attempt(name, said, lambda: function(**given), notes)
    plain = {k: plain_number(v) if k in good else v for k, v in given.items()}
    bad = [k for k in good if plain[k] is None or not good[k]]
    if isinstance(result, InputError):
        if not bad:
            raise Failed(f"{name}: a number is refused", f"{said}\n{result}")
        return 1
    if bad:
        raise Failed(f"{name}: {', '.join(bad)} is taken that is no such number", said)
    if not same(result, function(**plain)):
        raise Failed(f"{name}: another result than for the plain number", said)
    return 2


def _key(rng: random.Random, notes: Notes) -> int:
    given = {
        "seed": hostile(rng, rng.getrandbits(20)),
        "n": rng.choice((0, 1, 3, hostile(rng, 3))),
        "first_sample_id": hostile(rng, 5) if rng.random() < 0.5 else 0,
        "step": hostile(rng, 7) if rng.random() < 0.5 else 0,
        "stream": hostile(rng, 5) if rng.random() < 0.3 else 5,
    }
    p = {k: plain_number(v) for k, v in given.items()}
    if (p["n"] or 0) > MOST and (p["n"] or 0) < 2**57:
        return 0  # it would be made, and takes memory
    good = {
        "seed": p["seed"] is not None and -(2**63) <= p["seed"] < 2**64,
        "n": p["n"] is not None and p["n"] >= 0,
        "first_sample_id": p["first_sample_id"] is not None
        and p["first_sample_id"] >= 0
        and p["first_sample_id"] + (p["n"] or 0) <= 2**56,
        "step": p["step"] is not None and 0 <= p["step"] < 2**32,
        "stream": p["stream"] is not None and 0 <= p["stream"] < 256,
    }
    return _check_integers("NoiseKey.of", NoiseKey.of, given, good, notes)


def _bound_key(rng: random.Random, notes: Notes) -> int:
    """NoiseKey from tensors and from what is none."""
    parts = {"seed": torch.tensor(3), "sample_id": torch.arange(3), "step": torch.tensor(0), "stream": 5}
    name = rng.choice(list(parts))
    parts[name] = rng.choice((*ODD, torch.tensor([3]), torch.tensor(3, dtype=torch.int32), torch.ones(2, 2)))
    said = f"({name}={parts[name]!r:.60})"
    result = _attempt("NoiseKey", said, lambda: NoiseKey(**parts), notes)
    if isinstance(result, InputError):
        return 1
    if name == "stream" and plain_number(parts[name]) is None:
        raise Failed("NoiseKey: stream is taken that is no number", said)
    for part, dimensions in (("seed", 0), ("sample_id", 1), ("step", 0)):
        if getattr(result, part).ndim != dimensions or getattr(result, part).dtype != torch.int64:
            raise Failed(f"NoiseKey: {part} is taken", said)
    return 1


def _schedule(rng: random.Random, notes: Notes) -> int:
    kind = rng.choice(sorted(SCHEDULES))
    T = hostile(rng, rng.choice((1, 2, 21, 50, 1000)))
    plain = plain_number(T)
    # The issue of its own: what is too long to be made must be refused where a file asks for it. Here the caller does.
    if plain is not None and plain > MOST:
        return 0
    if rng.random() < 0.3:
        return _schedule_from_dict(rng, kind, T, notes)
    least = {"linear": 21, "scaled_linear": 13}.get(kind, 1)
    good = {"T": plain is not None and plain >= least}
    make = SCHEDULES[kind]
    return _check_integers(f"Schedule.{kind}", lambda T: make(T).betas, {"T": T}, good, notes)


def _schedule_from_dict(rng: random.Random, kind: str, T: Any, notes: Notes) -> int:
    given: dict[str, Any] = {"kind": kind, "T": T}
    if rng.random() < 0.3:
        given["zero_terminal_snr"] = rng.choice((True, False, 1, None, "true"))
    if rng.random() < 0.3:
        given["timesteps"] = rng.choice(
            ([0, 1], [1, 0], [0, 0], [], [0.5], ["1"], None, [True], [10**9], [np.int64(0)])
        )
    if rng.random() < 0.3:
        given[rng.choice(("kind", "betas", "x", "T"))] = rng.choice(
            (*ODD, [0.1, 0.2], [0.5] * 3, [2.0], ["a"], [[0.1]])
        )
    result = _attempt("Schedule.from_dict", f"({given!r:.200})", lambda: df.Schedule.from_dict(given), notes)
    if isinstance(result, InputError):
        return 1
    for table in (result.betas, result.alphas_cumprod, result.posterior_mean_coef1):
        if not bool(table.isfinite().all()):
            raise Failed("Schedule.from_dict: a table is not finite", f"{given!r:.200}")
    return 1


@functools.cache
def _chain() -> df.GaussianDiffusion:
    return df.GaussianDiffusion(df.Schedule.cosine(20), "v")


def _spec(rng: random.Random) -> Any:
    number = hostile(rng, rng.randrange(1, 22))
    return rng.choice(
        (
            number,
            str(rng.randrange(-2, 25)),
            f"ddim{rng.choice((5, 10, 20, 0, -1, 7))}",
            ",".join(str(rng.randrange(0, 8)) for _ in range(rng.randrange(1, 5))),
            sorted(rng.sample(range(20), 4)),
            [*sorted(rng.sample(range(19), 3)), 19],
            torch.tensor([0, 5, 19]),
            np.array([0, 5, 19]),
            [0, number],
            [np.int64(0), np.int64(19)],
            "",
            " 5",
            "5,",
            "ddim",
            "٣",
            "²",
            "1e1",
            range(0, 20, 19),
            {0, 19},
            {0: 1},
            [[0, 19]],
            torch.tensor(3),
            np.array(5),
        )
    )


def _respace(rng: random.Random, notes: Notes) -> int:
    spec = _spec(rng)
    said = f"({spec!r:.80})"
    result = _attempt("Schedule.respace", said, lambda: _chain().schedule.respace(spec), notes)
    if isinstance(result, InputError):
        if isinstance(spec, (np.integer, range)) or (isinstance(spec, list) and all(type(s) is np.int64 for s in spec)):
            ok = 1 <= spec <= 20 if isinstance(spec, np.integer) else True
            if ok:
                raise Failed("Schedule.respace: good timesteps are refused", f"{said}\n{result}")
        return 1
    if isinstance(spec, (bool, np.bool_, float)):
        raise Failed("Schedule.respace: no number is taken", said)
    if not bool(result.betas.isfinite().all()) or not 1 <= len(result) <= 20:
        raise Failed("Schedule.respace: another chain", said)
    return 1


OPTIONS = (
    "seed",
    "first_sample_id",
    "batch_size",
    "steps",
    "eta",
    "guidance",
    "guidance_rescale",
    "dynamic_threshold",
    "null_label",
    "sampler",
    "spacing",
    "labels",
    "clip",
)


def _option_values(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(OPTIONS)
        good: Any = {"eta": 0.5, "guidance": 1.0, "guidance_rescale": 0.5, "dynamic_threshold": 0.9}.get(name, 3)
        if name in ("sampler", "spacing"):
            given[name] = rng.choice((*SAMPLERS, "even", "quadratic", "", *ODD))
        elif name == "steps":
            given[name] = _spec(rng)
        elif name == "clip":
            given[name] = rng.choice((True, False, None, 1, "yes"))
        else:
            given[name] = hostile(rng, good)
    return given


WHOLE = ("seed", "first_sample_id", "batch_size")


def _options(rng: random.Random, notes: Notes) -> int:
    given = _option_values(rng)
    if "eta" in given:
        given["sampler"] = "ddim"
    said = f"({', '.join(f'{k}={v!r:.60} ({type(v).__name__})' for k, v in given.items())})"
    result = _attempt("SamplingOptions", said, lambda: df.SamplingOptions(**given), notes)
    if isinstance(result, InputError):
        _check_refused("SamplingOptions", given, said, result)
        return 1
    _check_taken("SamplingOptions", given, said)
    return 1


def _check_refused(name: str, given: dict[str, Any], said: str, error: InputError) -> None:
    """A single number in range is not refused for its type."""
    if len(given) != 1:
        return
    ((key, value),) = given.items()
    plain = plain_number(value)
    ranges = {"seed": (-(2**63), 2**64 - 1), "first_sample_id": (0, 2**56 - 10), "batch_size": (1, 2**31)}
    if key in ranges and plain is not None and ranges[key][0] <= plain <= ranges[key][1]:
        raise Failed(f"{name}: a number is refused", f"{said}\n{error}")


def _check_taken(name: str, given: dict[str, Any], said: str) -> None:
    for key, value in given.items():
        if key in WHOLE and plain_number(value) is None and value is not None:
            raise Failed(f"{name}: {key} is taken that is no number", said)
        if key in ("eta", "guidance", "guidance_rescale", "dynamic_threshold") and value is not None:
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise Failed(f"{name}: {key} is taken that is no number", said) from None
            if isinstance(value, (str, bool, np.bool_)) or not math.isfinite(number):
                raise Failed(f"{name}: {key} is taken that is no number", said)


def _sample(rng: random.Random, notes: Notes) -> int:
    """df.sample with a tiny network: what the options are taken for is drawn, the same for every type of number."""
    given = _option_values(rng) if rng.random() < 0.7 else {}
    for name in ("labels", "null_label", "guidance", "guidance_rescale"):
        given.pop(name, None)
    if "eta" in given:
        given["sampler"] = "ddim"
    three = given.setdefault("steps", 3)
    n = hostile(rng, 2) if rng.random() < 0.5 else 2
    shape = rng.choice(
        ((1, 2, 2), (2,), (1, 2, 2), (0, 2), (1, -1), (1.5,), (np.int64(2),), (True,), "22", None, 3, ())
    )
    if (plain_number(n) or 0) > MOST:
        return 0
    said = f"(n={n!r:.40} ({type(n).__name__}), shape={shape!r}, {given!r:.200})"
    model = Tiny()

    def draw(count: Any, **options: Any) -> Tensor:
        return df.sample(model, _chain(), count, shape=shape, **options)

    result = _attempt("sample", said, lambda: draw(n, **given), notes)
    plain = plain_number(n)
    if isinstance(result, InputError):
        if (
            plain is not None
            and plain >= 0
            and given.keys() == {"steps"}
            and type(three) is int
            and three == 3
            and shape in ((1, 2, 2), (2,))
        ):
            raise Failed("sample: a number is refused", f"{said}\n{result}")
        return 1
    _check_taken("sample", given, said)
    if plain is None or plain < 0:
        raise Failed("sample: n is taken that is no number", said)
    usual = {k: plain_number(v) if k in WHOLE and v is not None else v for k, v in given.items()}
    if result.shape[0] != plain or not torch.equal(result, draw(plain, **usual)):
        raise Failed("sample: another result than for the plain number", said)
    if plain and not bool(result.isfinite().all()):
        raise Failed("sample: not finite", said)
    return 2


def _objective(rng: random.Random, notes: Notes) -> int:
    given: dict[str, Any] = {
        "prediction": rng.choice(list(PREDICTIONS)),
        "variance": rng.choice(VARIANCES),
        "loss": rng.choice(LOSSES),
        "loss_weighting": rng.choice(list(WEIGHTINGS)),
        "min_snr_gamma": hostile(rng, 5.0),
        "vlb_weight": hostile(rng, 0.001),
    }
    if rng.random() < 0.3:
        given[rng.choice(list(given))] = rng.choice(ODD)
    schedule = df.Schedule.cosine(20) if rng.random() < 0.8 else rng.choice(ODD)
    said = f"({given!r:.300})"
    result = _attempt("GaussianDiffusion", said, lambda: df.GaussianDiffusion(schedule, **given), notes)
    if isinstance(result, InputError):
        return 1
    x = torch.zeros(2, 1, 2, 2)
    output = torch.zeros(2, 2 if result.objective.learned else 1, 2, 2)
    loss = result.training_losses(output, x, torch.tensor([0, 5]), NoiseKey.of(0, 2))
    if not bool(loss.isfinite().all()):
        raise Failed("GaussianDiffusion: a loss is not finite", f"{said}\n{loss}")
    return 2


def _network(rng: random.Random, notes: Notes) -> int:
    """UNetConfig with hostile values: refused, or what it says."""
    good = {"image_size": 8, "in_channels": 1, "model_channels": 8, "num_res_blocks": 1, "num_heads": 1}
    given: dict[str, Any] = {**good, "norm_groups": 4, "channel_mult": (1, 2), "attention_resolutions": ()}
    given |= {"dropout": 0.1, "num_classes": 3, "norm_eps": 1e-5, "scale_shift": True, "resample": "conv"}
    for name in rng.sample(list(given), rng.choice((1, 2))):
        value = given[name]
        if isinstance(value, tuple):
            given[name] = rng.choice((list(value), (), (0,), (-1, 2), (1.5,), ("1",), None, 3, "12", [True, 2], {1: 2}))
        else:
            given[name] = hostile(rng, value) if rng.random() < 0.7 else rng.choice((*ODD, *INTEGERS, (8, 4), (3, 4)))
    said = f"({given!r:.400})"
    result = _attempt("UNetConfig", said, lambda: df.UNetConfig(**given), notes)
    if isinstance(result, InputError):
        return 1
    for name in good:
        sides = getattr(result, name)
        sides = sides if name == "image_size" and isinstance(sides, tuple) else (sides,)
        if any(type(side) is not int for side in sides):
            raise Failed(f"UNetConfig: {name} is {type(getattr(result, name)).__name__}", said)
    if not 0 <= result.dropout < 1 or not math.isfinite(result.norm_eps):
        raise Failed("UNetConfig: a number that is none", said)
    return 1
