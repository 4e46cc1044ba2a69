"""Which timesteps of a chain of T to keep or to visit, from a spec: a number, sections, "ddimN" or a list.

Nichol & Dhariwal 2021, "Improved DDPM", sec. 4 (even sections of the chain); Song et al. 2020, "Denoising Diffusion
Implicit Models" (integer strides; quadratic spacing, app. D.2); Lin et al. 2023, "Common Diffusion Noise Schedules
and Sample Steps are Flawed" (why sampling starts at T-1). Only a spec and T are known here: no noise, no tensors.
"""

from collections.abc import Sequence

from ddpm_fast.errors import InputError

SPACINGS = ("even", "quadratic")


def kept_timesteps(spec, T: int) -> list[int]:
    """The timesteps that a respaced chain keeps, ascending; for the specs and errors see Schedule.respace."""
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _ddim_timesteps(_count(spec[4:], spec), T)
    if isinstance(spec, str):
        return _section_timesteps([_count(part, spec) for part in spec.split(",")], T)
    if isinstance(spec, int) and not isinstance(spec, bool):
        return _section_timesteps([spec], T)
    if hasattr(spec, "__len__"):
        return check_timesteps(spec, T)
    raise _unreadable(spec)


def sampling_timesteps(spec, T: int, spacing: str = "even") -> list[int]:
    """The timesteps that a sampler visits, ascending: always ending at T-1, where x_t is the pure noise it starts from.

    A network shown pure noise at an earlier step is told that there is an image in it (Lin et al. 2023, sec. 3.3). spec
    is one of

    - None: all T;
    - 25 or "25": that many steps, spaced over 0..T-1 with both ends (a single one is T-1). "even": as Schedule.respace;
      "quadratic": (i / 24)^2 * (T - 1), dense near 0 (Song et al. 2020, app. D.2), rounded half up, each at least i so
      that none repeats;
    - "10,15,20" or "ddim50": as Schedule.respace, the last step moved to T-1;
    - [0, 10, 999]: these steps, of which the last must be T-1.

    Raises InputError for a number of steps outside 1..T, a list without T-1, an unknown spacing, "quadratic" with
    sections, strides or a list, and whatever Schedule.respace refuses.
    """
    check_spacing(spacing)
    if spec is None:
        return list(range(T))
    if isinstance(spec, str) and spec.strip().isdecimal():
        spec = int(spec)
    if isinstance(spec, int) and not isinstance(spec, bool):
        if not 1 <= spec <= T:
            raise InputError(f"cannot take {spec} steps: the model's chain has T = {T}; ask for 1..{T}")
        return _quadratic_timesteps(spec, T) if spacing == "quadratic" else _section_timesteps([spec], T)
    timesteps = kept_timesteps(spec, T)
    if spacing == "quadratic":
        raise InputError(
            f"quadratic spacing needs a number of steps, got {spec!r:.200}, which says itself where they lie: ask for "
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


def _count(text: str, spec: str) -> int:
    if not text.strip().isdecimal():
        raise _unreadable(spec)
    return int(text)


def _unreadable(spec) -> InputError:
    return InputError(
        f"cannot read the respacing {spec!r}: expected a number of steps (25 or '25'), one per section "
        "('10,15,20'), 'ddim50', or a list of timesteps"
    )


def _ddim_timesteps(count: int, T: int) -> list[int]:
    strides = {len(range(0, T, stride)): stride for stride in range(T, 0, -1)}
    if count not in strides:
        below, above = [n for n in strides if n < count], [n for n in strides if n > count]
        near = [f"'ddim{n}'" for n in (*below[-1:], *above[:1])] + [f"'{count}'"] * (1 <= count <= T)
        raise InputError(
            f"'ddim{count}': no integer stride leaves {count} of {T} timesteps; {' or '.join(near)} would do"
        )
    return list(range(0, T, strides[count]))


def _section_timesteps(counts: list[int], T: int) -> list[int]:
    if min(counts) < 0 or sum(counts) == 0:
        raise InputError(f"respacing to {','.join(map(str, counts))} keeps no timesteps: ask for at least 1")
    if counts == [1]:
        return [T - 1]
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if count > size:
            where = f"section {i} of {len(counts)} has" if len(counts) > 1 else "the schedule has"
            raise InputError(f"cannot keep {count} timesteps where {where} {size} (T = {T}): ask for {size} or fewer")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: the paper's code rounds the running sum, and the two differ where it lands
        # near a half.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def _quadratic_timesteps(count: int, T: int) -> list[int]:
    if count == 1:
        return [T - 1]
    # In integers, exact. Below i only where the curve is flatter than one step a step, so max() leaves no repeats.
    square = (count - 1) ** 2
    return [max(i, (2 * i * i * (T - 1) + square) // (2 * square)) for i in range(count)]


def check_timesteps(timesteps, T: int) -> list[int]:
    """A list of ints from a list, array or tensor of timesteps. Raises InputError unless ascending within 0..T-1."""
    if hasattr(timesteps, "tolist"):
        timesteps = timesteps.tolist()
    if not isinstance(timesteps, Sequence) or not all(type(t) is int for t in timesteps):
        raise InputError(f"timesteps must be a list of ints in 0..{T - 1}, got {timesteps!r:.200}")
    if len(timesteps) == 0:
        raise InputError(f"the list of timesteps is empty: give at least one in 0..{T - 1}")
    for i, t in enumerate(timesteps):
        if not 0 <= t < T:
            raise InputError(f"timesteps[{i}] = {t} is outside 0..{T - 1}: this schedule has T = {T} steps")
        if i and t <= timesteps[i - 1]:
            what = "repeats" if t == timesteps[i - 1] else "is below"
            raise InputError(
                f"timesteps[{i}] = {t} {what} timesteps[{i - 1}] = {timesteps[i - 1]}: give them ascending, each once"
            )
    return list(timesteps)
