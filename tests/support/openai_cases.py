"""Networks and diffusions of improved- and guided-diffusion as lines of flags, and what they are in our terms.

tests/golden/make_openai.py makes them with the authors' code, tests/formats/test_openai.py with ours.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_fast.diffusion import GaussianDiffusion
from ddpm_fast.nn.unet_config import UNetConfig
from ddpm_fast.schedule import Schedule
from tests.support.made_weights import made_input


@dataclass(frozen=True)
class Case:
    """A line of flags.

    Attributes:
        code: "improved" or "guided".
        flags: Those of its README, or others.
        shape: [N, C, H, W] of the input that is tried.
        config: The network in our terms; None where only the diffusion is tried.
        upsampler: Whether the flags are for the scripts of upsamplers, where no flag says so.
    """

    code: str
    flags: str
    shape: tuple[int, ...] = (2, 3, 8, 8)
    config: UNetConfig | None = None
    upsampler: bool = False


@dataclass(frozen=True)
class Export:
    """A model of ours that is written for their code.

    Attributes:
        code: The code that its flags are for.
        config: Its network.
        diffusion: Its diffusion.
    """

    code: str
    config: UNetConfig
    diffusion: GaussianDiffusion


_SMALL = UNetConfig(image_size=64, model_channels=32, channel_mult=(1, 2, 3, 4), num_res_blocks=1)
_SMALL = replace(_SMALL, attention_resolutions=(16, 8), num_heads=4, scale_shift=True)
_UPDOWN = replace(_SMALL, image_size=16, model_channels=64, channel_mult=(1, 2), resample="resblock")

# Small networks of every kind.
NETWORKS = {
    "improved_32": Case(
        "improved",
        "--image_size 32 --num_channels 32 --num_res_blocks 1 --learn_sigma True --dropout 0.3 "
        "--diffusion_steps 4000 --noise_schedule cosine",
        (2, 3, 16, 8),
        replace(
            _SMALL, image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.3, learned_variance=True, timestep_scale=0.25
        ),
    ),
    "improved_classes": Case(
        "improved",
        "--image_size 64 --num_channels 32 --num_res_blocks 2 --num_heads 1 --class_cond True "
        "--use_scale_shift_norm False --attention_resolutions 16 --sigma_small True",
        (2, 3, 8, 8),
        replace(
            _SMALL,
            num_res_blocks=2,
            attention_resolutions=(16,),
            num_heads=1,
            scale_shift=False,
            num_classes=1000,
            null_class=False,
        ),
    ),
    "improved_upsampler": Case(
        "improved",
        "--large_size 64 --small_size 16 --num_channels 32 --num_res_blocks 1 --learn_sigma True --num_heads 2 "
        "--diffusion_steps 4000 --rescale_learned_sigmas False --rescale_timesteps True",
        (2, 3, 8, 16),
        replace(_SMALL, num_heads=2, learned_variance=True, condition_channels=3, timestep_scale=0.25),
    ),
    "guided_old_order": Case(
        "guided",
        "--image_size 64 --num_channels 32 --num_res_blocks 1 --num_head_channels 16 --attention_resolutions 32,16",
        (2, 3, 16, 8),
        replace(_SMALL, attention_resolutions=(32, 16), num_heads=1, head_channels=16),
    ),
    "guided_new_order": Case(
        "guided",
        "--image_size 16 --channel_mult 1,2 --num_channels 64 --num_res_blocks 1 --num_head_channels 32 "
        "--attention_resolutions 16,8 --resblock_updown True --use_new_attention_order True --class_cond True "
        "--learn_sigma True --use_fp16 True",
        (2, 3, 8, 8),
        replace(_UPDOWN, num_heads=1, head_channels=32, num_classes=1000, null_class=False, learned_variance=True),
    ),
    "guided_heads_by_number": Case(
        "guided",
        "--image_size 16 --channel_mult 1,2 --num_channels 64 --num_res_blocks 2 --num_heads 2 "
        "--attention_resolutions 8 --resblock_updown True --use_scale_shift_norm False "
        "--use_new_attention_order True --diffusion_steps 500 --rescale_timesteps True",
        (2, 3, 8, 8),
        replace(
            _UPDOWN,
            num_res_blocks=2,
            attention_resolutions=(8,),
            num_heads=2,
            scale_shift=False,
            timestep_scale=2.0,
        ),
    ),
    "guided_512": Case(
        "guided",
        "--attention_resolutions 32,16,8 --image_size 512 --learn_sigma True --num_channels 64 "
        "--num_head_channels 32 --num_res_blocks 1 --resblock_updown True",
        (1, 3, 64, 64),
        replace(
            _SMALL,
            image_size=512,
            model_channels=64,
            channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
            stem_channels=32,
            attention_resolutions=(32, 16, 8),
            num_heads=1,
            head_channels=32,
            learned_variance=True,
            resample="resblock",
        ),
    ),
    "guided_upsampler": Case(
        "guided",
        "--large_size 64 --small_size 16 --num_channels 32 --num_res_blocks 1 --learn_sigma True --class_cond True "
        "--num_heads 4 --attention_resolutions 32,16 --resblock_updown True",
        (2, 3, 8, 8),
        replace(
            _SMALL,
            attention_resolutions=(32, 16),
            num_classes=1000,
            null_class=False,
            learned_variance=True,
            condition_channels=3,
            resample="resblock",
        ),
    ),
}

# Every choice of their diffusions.
_TINY = "--num_channels 32 --num_res_blocks 1 --image_size 64"
_LEARNED = replace(_SMALL, learned_variance=True)
DIFFUSIONS = {
    "improved_learned": Case(
        "improved",
        f"{_TINY} --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine --sigma_small False",
        config=_LEARNED,
    ),
    "improved_unscaled": Case(
        "improved",
        f"{_TINY} --learn_sigma True --diffusion_steps 4000 --rescale_learned_sigmas False --rescale_timesteps True",
        config=_LEARNED,
    ),
    "improved_bound": Case(
        "improved",
        f"{_TINY} --learn_sigma True --diffusion_steps 4000 --use_kl True --rescale_timesteps False",
        config=_LEARNED,
    ),
    "improved_small": Case(
        "improved", f"{_TINY} --sigma_small True --predict_xstart True --diffusion_steps 50", config=_SMALL
    ),
    "guided_learned": Case(
        "guided", f"{_TINY} --learn_sigma True --diffusion_steps 500 --num_head_channels 32", config=_LEARNED
    ),
    "guided_rescaled": Case(
        "guided",
        f"{_TINY} --learn_sigma True --diffusion_steps 500 --num_head_channels 32 --rescale_learned_sigmas True",
        config=_LEARNED,
    ),
    "guided_fixed": Case("guided", f"{_TINY} --noise_schedule cosine", config=_SMALL),
    "guided_bound": Case("guided", f"{_TINY} --use_kl True --predict_xstart True", config=_SMALL),
}

_IMPROVED = UNetConfig(image_size=64, channel_mult=(1, 2, 3, 4), num_res_blocks=3, attention_resolutions=(16, 8))
_IMPROVED = replace(_IMPROVED, num_heads=4, scale_shift=True, learned_variance=True)
_LSUN_OF_IMPROVED = replace(
    _IMPROVED,
    image_size=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_res_blocks=2,
    attention_resolutions=(16,),
    num_heads=1,
    scale_shift=False,
)
_GUIDED = replace(
    _IMPROVED,
    image_size=256,
    model_channels=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_res_blocks=2,
    attention_resolutions=(32, 16, 8),
    num_heads=1,
    head_channels=64,
    resample="resblock",
)
_CLASSES = {"num_classes": 1000, "null_class": False}

# The models that were published, with MODEL_FLAGS and DIFFUSION_FLAGS as the READMEs print them.
PUBLISHED = {
    "improved ImageNet-64": Case(
        "improved",
        "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
        "--diffusion_steps 4000 --noise_schedule cosine",
        config=replace(_IMPROVED, timestep_scale=0.25),
    ),
    "improved ImageNet-64, bound": Case(
        "improved",
        "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
        "--diffusion_steps 4000 --noise_schedule cosine --use_kl True",
        config=replace(_IMPROVED, timestep_scale=0.25),
    ),
    "improved ImageNet-64, classes": Case(
        "improved",
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True --diffusion_steps "
        "4000 --noise_schedule cosine --rescale_learned_sigmas False --rescale_timesteps False",
        config=replace(_IMPROVED, model_channels=192, **_CLASSES),
    ),
    "improved CIFAR-10": Case(
        "improved",
        "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
        "--diffusion_steps 4000 --noise_schedule cosine",
        config=replace(_IMPROVED, image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.3, timestep_scale=0.25),
    ),
    "improved CIFAR-10, bound": Case(
        "improved",
        "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
        "--diffusion_steps 4000 --noise_schedule cosine --use_kl True",
        config=replace(_IMPROVED, image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.3, timestep_scale=0.25),
    ),
    "improved upsampler 64 to 256": Case(
        "improved",
        "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True --diffusion_steps 4000 "
        "--noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False",
        config=replace(
            _IMPROVED,
            image_size=256,
            model_channels=192,
            channel_mult=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            condition_channels=3,
            **_CLASSES,
        ),
        upsampler=True,
    ),
    "improved LSUN bedroom, 1e-4": Case(
        "improved",
        "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
        "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
        "--rescale_learned_sigmas False --rescale_timesteps False",
        config=_LSUN_OF_IMPROVED,
    ),
    "improved LSUN bedroom, 2e-5": Case(
        "improved",
        "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
        "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
        "--rescale_learned_sigmas False --rescale_timesteps False --use_scale_shift_norm False",
        config=_LSUN_OF_IMPROVED,
    ),
    "guided ImageNet-64": Case(
        "guided",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
        "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
        "--resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True",
        config=replace(
            _GUIDED,
            image_size=64,
            model_channels=192,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            dropout=0.1,
            **_CLASSES,
        ),
    ),
    "guided ImageNet-128": Case(
        "guided",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 --learn_sigma True "
        "--noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 --resblock_updown True "
        "--use_fp16 True --use_scale_shift_norm True",
        config=replace(_GUIDED, image_size=128, channel_mult=(1, 1, 2, 3, 4), num_heads=4, head_channels=0, **_CLASSES),
    ),
    "guided ImageNet-256": Case(
        "guided",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 256 --learn_sigma True "
        "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
        "--use_fp16 True --use_scale_shift_norm True",
        config=replace(_GUIDED, **_CLASSES),
    ),
    "guided ImageNet-256, no classes": Case(
        "guided",
        "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --image_size 256 --learn_sigma True "
        "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
        "--use_fp16 True --use_scale_shift_norm True",
        config=_GUIDED,
    ),
    "guided ImageNet-512": Case(
        "guided",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512 --learn_sigma True "
        "--noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 --resblock_updown True "
        "--use_fp16 False --use_scale_shift_norm True",
        config=replace(_GUIDED, image_size=512, channel_mult=(0.5, 1, 1, 2, 2, 4, 4), stem_channels=128, **_CLASSES),
    ),
    "guided upsampler 64 to 256": Case(
        "guided",
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --large_size 256  --small_size 64 "
        "--learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 --num_res_blocks 2 "
        "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
        config=replace(_GUIDED, model_channels=192, num_heads=4, head_channels=0, condition_channels=3, **_CLASSES),
    ),
    "guided upsampler 128 to 512": Case(
        "guided",
        "--attention_resolutions 32,16 --class_cond True --diffusion_steps 1000 --large_size 512 --small_size 128 "
        "--learn_sigma True --noise_schedule linear --num_channels 192 --num_head_channels 64 --num_res_blocks 2 "
        "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
        config=replace(
            _GUIDED,
            image_size=512,
            model_channels=192,
            attention_resolutions=(32, 16),
            condition_channels=3,
            **_CLASSES,
        ),
    ),
    "guided LSUN": Case(
        "guided",
        "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --dropout 0.1 --image_size 256 "
        "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
        "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
        config=replace(_GUIDED, dropout=0.1),
    ),
}

_TWO_LEVELS = replace(_SMALL, image_size=16, channel_mult=(1, 2), attention_resolutions=(8,))
# Models of ours that their code can be.
EXPORTS = {
    # Of the kind of the MNIST model: guidance's null class is class 10 of theirs.
    "null class": Export(
        "guided",
        replace(_TWO_LEVELS, num_classes=10, num_heads=1, head_channels=16, dropout=0.1, learned_variance=True),
        GaussianDiffusion(Schedule.cosine(400), variance="learned_range", loss="hybrid"),
    ),
    "added": Export(
        "guided",
        replace(_TWO_LEVELS, attention_resolutions=(), scale_shift=False, resample="resblock", timestep_scale=2.0),
        GaussianDiffusion(Schedule.linear(500), prediction="x0", loss="rescaled_vlb"),
    ),
    "fixed small": Export(
        "improved",
        replace(_SMALL, image_size=32, channel_mult=(1, 2, 2, 2), num_classes=5, null_class=False, timestep_scale=0.25),
        GaussianDiffusion(Schedule.linear(4000), variance="fixed_small"),
    ),
    "guided 512": Export(
        "guided",
        replace(NETWORKS["guided_512"].config, attention_resolutions=(16,)),
        GaussianDiffusion(Schedule.linear(1000), variance="learned_range", loss="rescaled_vlb"),
    ),
    "upsampler": Export(
        "guided",
        replace(_SMALL, condition_channels=3, learned_variance=True),
        GaussianDiffusion(Schedule.linear(250), variance="learned_range", loss="hybrid", vlb_weight=1 / 250),
    ),
}


def network_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(x, t, labels, condition) for a network: the labels and the condition where it has such. t is a timestep of the
    diffusion, before it is rescaled."""
    assert case.config is not None
    n, channels, height, width = case.shape
    t = torch.tensor([37, 461][:n])
    labels = torch.tensor([7, 999][:n]) if case.config.num_classes else None
    condition = (
        made_input("condition", (n, channels, height // 2, width // 2)) if case.config.condition_channels else None
    )
    return made_input("x", case.shape), t, labels, condition


def diffusion_inputs(case: Case, timesteps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, noise, output, t) for a diffusion, t being the first, the last and some other timesteps."""
    t = torch.tensor([0, 1, timesteps // 3, timesteps - 1])
    channels = 6 if "learn_sigma" in case.flags else 3
    x0 = made_input("x0", (4, 3, 4, 4)).clamp(-1, 1)
    return x0, made_input("noise", (4, 3, 4, 4)), 0.3 * made_input("output", (4, channels, 4, 4)), t


def thinned(output: Tensor) -> Tensor:
    """The output at so few pixels that a golden file stays small."""
    step = max(1, output.shape[-2] // 16)
    return output[..., ::step, ::step].contiguous()


def export_inputs(export: Export) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(x, t, labels, condition) for an exported network, of as few pixels as it takes."""
    config = export.config
    size = max(8, 2 ** (len(config.channel_mult) - 1))
    t = torch.tensor([3, export.diffusion.num_timesteps - 1])
    labels = torch.tensor([0, config.label_rows - 1]) if config.num_classes else None
    condition = made_input("condition", (2, 3, size // 2, size // 2)) if config.condition_channels else None
    return made_input("x", (2, config.in_channels, size, size)), t, labels, condition
