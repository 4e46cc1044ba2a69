"""The flags of improved- and guided-diffusion's scripts: which of the two codes they are for, and their diffusion.

The two codes have the same flags with the same defaults but for two: improved-diffusion rescales the timesteps and the
bound's weight unless it is told otherwise, and guided-diffusion does not. Neither is written in a file, and neither
makes a difference at 1000 timesteps. So the code has to be known for other numbers of timesteps, and only there.
"""

from collections.abc import Mapping
from typing import Any

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.errors import InputError
from ddpm_fast.schedule import SCHEDULES

IMPROVED, GUIDED = "improved-diffusion", "guided-diffusion"

# The flags that say what a file holds, with both codes' defaults. in_channels, and channel_mult of improved-diffusion,
# are no flags of theirs: a script that has other values than theirs fixes them.
MODEL_FLAGS: dict[str, object] = {
    "image_size": 64,
    "large_size": 256,
    "small_size": 64,
    "in_channels": 3,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
}
DIFFUSION_FLAGS: dict[str, object] = {
    "learn_sigma": False,
    "sigma_small": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,  # True in improved-diffusion
    "rescale_learned_sigmas": False,  # True in improved-diffusion
}
# What their scripts to train and to sample also take, in the same line. It says nothing about a file.
SCRIPT_FLAGS: dict[str, object] = {
    "data_dir": "",
    "schedule_sampler": "uniform",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "lr_anneal_steps": 0,
    "batch_size": 1,
    "microbatch": -1,
    "ema_rate": "0.9999",
    "log_interval": 10,
    "save_interval": 10000,
    "resume_checkpoint": "",
    "fp16_scale_growth": 1e-3,
    "clip_denoised": True,
    "num_samples": 10000,
    "use_ddim": False,
    "model_path": "",
    "base_samples": "",
}
# Of the script that samples with a classifier.
CLASSIFIER_FLAGS: dict[str, object] = {
    "classifier_path": "",
    "classifier_scale": 1.0,
    "classifier_use_fp16": False,
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
}
KNOWN: dict[str, object] = MODEL_FLAGS | DIFFUSION_FLAGS | SCRIPT_FLAGS | CLASSIFIER_FLAGS

_GUIDED_ALONE = ("num_head_channels", "resblock_updown", "use_new_attention_order", *CLASSIFIER_FLAGS)
# The only line of improved-diffusion's README in which nothing else tells the code, with or without its variations.
_README_OF_IMPROVED = {"image_size": 64, "num_channels": 128, "num_res_blocks": 3, "diffusion_steps": 4000}


def code_of(given: Mapping[str, Any], channel_mult: tuple[float, ...], resblock_updown: bool) -> str | None:
    """Which of the two codes made a file.

    Args:
        given: The flags that were given.
        channel_mult: Each level's channels, as multiples of the flag num_channels.
        resblock_updown: Whether residual blocks resample.

    Returns:
        IMPROVED or GUIDED, or None if the file may be of either.
    """
    size = given.get("image_size", given.get("large_size"))
    has_own_sizes = not given.get("channel_mult") and "in_channels" not in given
    sizes_of_guided = (0.5, 1, 1, 2, 2, 4, 4), (1, 1, 2, 3, 4)
    if resblock_updown or any(flag in given for flag in _GUIDED_ALONE):
        return GUIDED
    if has_own_sizes and (channel_mult in sizes_of_guided or size in (128, 512)):
        return GUIDED
    is_32 = channel_mult == (1, 2, 2, 2) and given.get("image_size", 32) == 32 and "large_size" not in given
    if "sigma_small" in given or (has_own_sizes and is_32):
        return IMPROVED
    if "channel_mult" not in given and all(given.get(flag) == value for flag, value in _README_OF_IMPROVED.items()):
        return IMPROVED
    return None


def rescaling(given: Mapping[str, Any], code: str | None, learned: bool) -> tuple[bool, bool]:
    """The flags rescale_timesteps and rescale_learned_sigmas, whose defaults differ between the codes.

    Args:
        given: The flags that were given.
        code: What `code_of` said.
        learned: Whether the network learns the variance.

    Raises:
        InputError: If the code is not known, a flag is not given, and it makes a difference.
    """
    steps = _timesteps(given)
    matters = {
        "rescale_timesteps": steps != 1000,
        "rescale_learned_sigmas": steps != 1000 and learned and not given.get("use_kl", False),
    }
    unknown = [flag for flag, does in matters.items() if does and flag not in given and code is None]
    if unknown:
        flags = [" ".join(f"--{flag} {value}" for flag in unknown) for value in (True, False)]
        raise InputError(
            f"nothing says whether this file is of {IMPROVED} or {GUIDED}, whose defaults of {' and '.join(unknown)} "
            f"differ, and with --diffusion_steps {steps} that makes a difference: add {flags[0]!r} to the flags for "
            f"{IMPROVED}'s defaults, or {flags[1]!r} for {GUIDED}'s"
        )
    timesteps, sigmas = (bool(given.get(flag, code == IMPROVED)) for flag in matters)
    return timesteps, sigmas


def make_diffusion(given: Mapping[str, Any], learned: bool, rescale_learned_sigmas: bool) -> GaussianDiffusion:
    """The diffusion that their create_gaussian_diffusion makes of the flags, over all timesteps.

    Args:
        given: The flags that were given; the others have their defaults.
        learned: Whether the network learns the variance.
        rescale_learned_sigmas: Whether the bound has the weight 1/1000 of their regression, or 1/T.

    Raises:
        InputError: For a schedule that they do not have, and for too few timesteps.
    """
    flags = DIFFUSION_FLAGS | dict(given)
    schedule, steps = flags["noise_schedule"], _timesteps(given)
    if schedule not in ("linear", "cosine"):
        raise InputError(f"--noise_schedule is {schedule!r:.200}; expected linear or cosine")
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    regression = "hybrid" if learned else "simple"
    return GaussianDiffusion(
        SCHEDULES[schedule](steps),
        prediction="x0" if flags["predict_xstart"] else "eps",
        variance="learned_range" if learned else fixed,
        loss="rescaled_vlb" if flags["use_kl"] else regression,
        vlb_weight=1 / steps if learned and not rescale_learned_sigmas else 1 / 1000,
    )


def _timesteps(given: Mapping[str, Any]) -> int:
    steps = given.get("diffusion_steps", 1000)
    if steps < 1:
        raise InputError(f"--diffusion_steps is {steps}; expected the number of timesteps, such as 1000")
    return int(steps)
