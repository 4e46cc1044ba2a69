"""Which timesteps of a chain to keep or to visit, from a spec: a number, sections, "ddimN" or a list.

The sources are Nichol & Dhariwal 2021, "Improved DDPM", sec. 4 (equal sections of the chain); Song et al. 2020,
"Denoising Diffusion Implicit Models" (integer strides; quadratic spacing, app. D.2); and Lin et al. 2023, "Common
Diffusion Noise Schedules and Sample Steps are Flawed" (why sampling must start at T-1). Nothing but a spec and T is
needed here.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import TypeAlias, TypeGuard

from torch import Tensor

from ddpm_fast.errors import InputError

SPACINGS = ("even", "quadratic")

# A number of timesteps, a number for each section ("10,15,20"), "ddim50", or the timesteps themselves.
TimestepSpec: TypeAlias = int | str | Sequence[int] | Tensor


def kept_timesteps(spec: TimestepSpec, T: int) -> list[int]:
    """The timesteps that a respaced chain keeps, in ascending order.

    Args:
        spec: See Schedule.respace.
        T: The length of the chain.

    Raises:
        InputError: Where Schedule.respace does.
    """
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _ddim_timesteps(_count(spec[4:], spec), T)
    if isinstance(spec, str):
        return _section_timesteps([_count(part, spec) for part in spec.split(",")], T)
    if _is_integer(spec):
        return _section_timesteps([int(spec)], T)
    if isinstance(spec, int) or not hasattr(spec, "__len__"):  # an int that is none is a bool
        raise _unreadable(spec)
    return check_timesteps(spec, T)


def sampling_timesteps(spec: TimestepSpec | None, T: int, spacing: str = "even") -> list[int]:
    """The timesteps that a sampler visits, in ascending order. The last is always T-1, where x_t is pure noise.

    Sampling starts from pure noise. A network that is shown pure noise at an earlier timestep is told that there is an
    image in it (Lin et al. 2023, sec. 3.3).

    Args:
        spec: One of

            - None: all T timesteps.
            - 25 or "25": that many, spaced over 0..T-1 including both ends. A single one is T-1.
            - "10,15,20" or "ddim50": as in Schedule.respace, with the last timestep moved to T-1.
            - [0, 10, 999]: exactly these. The last one must be T-1.

        T: The length of the chain.
        spacing: How a number of timesteps is spaced. "even" is as in Schedule.respace. "quadratic" is
            (i / (n - 1))^2 * (T - 1) for i = 0..n-1, which is dense near 0 (Song et al. 2020, app. D.2). It is rounded
            half up, and each value is at least i, so that none repeats.

    Raises:
        InputError: If the number of timesteps is outside 1..T, a list lacks T-1, the spacing is unknown, "quadratic" is
            combined with sections, strides or a list, or Schedule.respace refuses the spec.
    """
    check_spacing(spacing)
    if spec is None:
        return list(range(T))
    if isinstance(spec, str) and spec.strip().isdecimal():
        spec = int(spec)
    if _is_integer(spec):
        spec = int(spec)
        if not 1 <= spec <= T:
            raise InputError(f"cannot take {spec} steps: the model's chain has T = {T}; ask for 1..{T}")
        return _quadratic_timesteps(spec, T) if spacing == "quadratic" else _section_timesteps([spec], T)
    timesteps = kept_timesteps(spec, T)
    if spacing == "quadratic":
        raise InputError(
            f"quadratic spacing needs a number of steps, got {spec!r:.200}, which already says where they lie: ask for "
            f"{len(timesteps)} steps, or for even spacing"
        )
    if not isinstance(spec, str) and timesteps[-1] != T - 1:
        raise InputError(
            f"the list of timesteps ends at {timesteps[-1]}, but sampling starts from pure noise, which is step "
            f"T-1 = {T - 1}: end the list with {T - 1}"
        )
    return [*timesteps[:-1], T - 1]


def check_spacing(spacing: str) -> None:
    """Raises InputError for a spacing that is not in SPACINGS."""
    if spacing not in SPACINGS:
        raise InputError(f"spacing {spacing!r} is unknown; there are {', '.join(SPACINGS)}")


def _is_integer(value: object) -> TypeGuard[Integral]:
    """Whether it is an integer of Python's or NumPy's types; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _count(text: str, spec: str) -> int:
    if not text.strip().isdecimal():
        raise _unreadable(spec)
    return int(text)


def _unreadable(spec: object) -> InputError:
    return InputError(
        f"cannot read the respacing {spec!r}: expected a number of steps (25 or '25'), one per section "
        "('10,15,20'), 'ddim50', or a list of timesteps"
    )


def _ddim_timesteps(count: int, T: int) -> list[int]:
    strides = {len(range(0, T, stride)): stride for stride in range(T, 0, -1)}
    if count not in strides:
        below, above = [n for n in strides if n < count], [n for n in strides if n > count]
        near = [f"'ddim{n}'" for n in (*below[-1:], *above[:1])] + [f"'{count}'"] * (1 <= count <= T)
        raise InputError(f"'ddim{count}': no integer stride leaves {count} of {T} timesteps; use {' or '.join(near)}")
    return list(range(0, T, strides[count]))


def _section_timesteps(counts: list[int], T: int) -> list[int]:
    if min(counts) < 0 or sum(counts) == 0:
        raise InputError(f"respacing to {','.join(map(str, counts))} keeps no timesteps: ask for at least 1")
    if counts == [1]:
        return [T - 1]
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if count > size:
            where = f"section {i} of {len(counts)} has" if len(counts) > 1 else "the schedule has"
            raise InputError(f"cannot keep {count} timesteps where {where} {size} (T = {T}): ask for {size} or fewer")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # The paper's code rounds a running sum. A multiple of the stride would round differently where it is close to
        # a half.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def _quadratic_timesteps(count: int, T: int) -> list[int]:
    if count == 1:
        return [T - 1]
    # Integer arithmetic is exact. The curve is below i only where it rises by less than 1 per index, so that taking
    # the larger of the two leaves no repeats.
    square = (count - 1) ** 2
    return [max(i, (2 * i * i * (T - 1) + square) // (2 * square)) for i in range(count)]


def check_timesteps(timesteps: Sequence[int] | Tensor, T: int) -> list[int]:
    """A list, array or tensor of timesteps as a list of ints.

    Args:
        timesteps: The timesteps.
        T: The length of the chain.

    Raises:
        InputError: Unless they are ints within 0..T-1 in ascending order, at least one and none repeated.
    """
    values = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if not isinstance(values, Sequence) or not all(_is_integer(t) for t in values):
        raise InputError(f"timesteps must be a list of ints in 0..{T - 1}, got {values!r:.200}")
    values = [int(t) for t in values]
    if len(values) == 0:
        raise InputError(f"the list of timesteps is empty: give at least one in 0..{T - 1}")
    for i, t in enumerate(values):
        if not 0 <= t < T:
            raise InputError(f"timesteps[{i}] = {t} is outside 0..{T - 1}: this schedule has T = {T} steps")
        if i and t <= values[i - 1]:
            what = "repeats" if t == values[i - 1] else "is below"
            raise InputError(
                f"timesteps[{i}] = {t} {what} timesteps[{i - 1}] = {values[i - 1]}: give them in ascending order, "
                "each once"
            )
    return values
