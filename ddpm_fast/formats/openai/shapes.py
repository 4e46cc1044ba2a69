"""What the shapes of improved- and guided-diffusion's parameters say about the network: all but the image's size, the
heads and the order of queries, keys and values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ddpm_fast.errors import InputError
from ddpm_fast.formats.openai.weights import shape_of

# What resamples at the end of a level of the decoder.
_UP = re.compile(r"output_blocks\.(\d{1,5})\.[12]\.(?:conv|in_layers\.2)\.weight")
_OUTPUT_BLOCK = re.compile(r"output_blocks\.(\d{1,5})\.0\.in_layers\.0\.weight")


@dataclass(frozen=True)
class Shapes:
    """What the shapes say.

    Attributes:
        model_channels: The flag num_channels: the width of the time embedding.
        stem_channels: Channels after the first convolution.
        level_channels: Channels of each level.
        num_res_blocks: Residual blocks of a level in the encoder.
        attends: Whether each level has attention.
        channels_in: Channels that the first convolution reads.
        channels_out: Channels that the last convolution writes.
        num_classes: Rows of the class table, or 0 without one.
        scale_shift: Whether the embedding scales and shifts.
        resblock_updown: Whether residual blocks resample. False if nothing is resampled.
    """

    model_channels: int
    stem_channels: int
    level_channels: tuple[int, ...]
    num_res_blocks: int
    attends: tuple[bool, ...]
    channels_in: int
    channels_out: int
    num_classes: int
    scale_shift: bool
    resblock_updown: bool

    @property
    def channel_mult(self) -> tuple[float, ...]:
        """Each level's channels as multiples of model_channels, whole ones as ints."""
        ratios = (channels / self.model_channels for channels in self.level_channels)
        return tuple(int(ratio) if ratio == int(ratio) else ratio for ratio in ratios)


def read_shapes(state: Mapping[str, Tensor]) -> Shapes:
    """What the shapes of a state dict say. The names that this needs are checked, and no others.

    Args:
        state: Their parameters under their names.

    Raises:
        InputError: If parameters are missing, or are not those of such a network.
    """
    stages, ups = _decoder(state)
    levels = len(ups) + 1
    blocks = stages // levels - 1
    starts = [(levels - 1 - level) * (blocks + 1) for level in range(levels)]
    first = shape_of(state, "input_blocks.0.0.weight", 4)
    middle = shape_of(state, "middle_block.0.out_layers.0.weight", 1)[0]
    return Shapes(
        model_channels=shape_of(state, "time_embed.0.weight", 2)[1],
        stem_channels=first[0],
        level_channels=tuple(shape_of(state, f"output_blocks.{k}.0.out_layers.0.weight", 1)[0] for k in starts),
        num_res_blocks=blocks,
        attends=tuple(f"output_blocks.{k}.1.qkv.weight" in state for k in starts),
        channels_in=first[1],
        channels_out=shape_of(state, "out.2.weight", 4)[0],
        num_classes=shape_of(state, "label_emb.weight", 2)[0] if "label_emb.weight" in state else 0,
        scale_shift=shape_of(state, "middle_block.0.emb_layers.1.weight", 2)[0] == 2 * middle,
        resblock_updown=any(".in_layers." in name for name in ups.values()),
    )


def _decoder(state: Mapping[str, Tensor]) -> tuple[int, dict[int, str]]:
    """How many blocks the decoder has, and which of them end with what resamples, with its parameter's name."""
    found = [match for name in state if (match := _OUTPUT_BLOCK.fullmatch(name))]
    stages = {int(match[1]) for match in found}
    ups = {int(match[1]): match[0] for name in state if (match := _UP.fullmatch(name))}
    # One after the last block of each level but the highest: all are equally far from each other.
    ends = [-1, *sorted(ups), len(stages) - 1]
    distances = {after - before for before, after in pairwise(ends)}
    if stages != set(range(len(stages))) or len(distances) > 1 or min(distances) < 2:
        raise InputError(
            f"its {len(found)} output_blocks, of which {sorted(ups)[:20]} resample, do not make a network of levels of "
            "equally many residual blocks, at least two in each: this is no file of improved- or guided-diffusion"
        )
    return len(stages), ups
