"""The U-Net that predicts the noise (or x0, or v) from a noised image and its timestep.

One class holds the network of Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (appendix B), and its improved
form of Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (scale-shift conditioning, several
attention heads, learned variance, classes). unet_config.py says what it is built from.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import compat
from ddpm_fast.errors import InputError
from ddpm_fast.nn.convolution import Conv2d
from ddpm_fast.nn.derived import Derives
from ddpm_fast.nn.layers import (
    Attention,
    Downsample,
    Embedding,
    GroupNorm,
    ResBlock,
    TimeEmbedding,
    Upsample,
    zeroed,
)
from ddpm_fast.nn.pending import Pending, convolved, is_added_by_norms, is_fused, unfused, whole
from ddpm_fast.nn.products import Linear
from ddpm_fast.nn.recomputing import recomputed
from ddpm_fast.nn.unet_config import UNetConfig
from ddpm_fast.noise import NoiseKey, Stream
from ddpm_fast.ops.checks import check_noise


class Stage(nn.ModuleList):
    """Layers that run one after another. Those that are residual blocks also get the embedding, and the first of them
    the channels that are joined."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor | Pending, emb: Embedding, joined: Tensor | None = None) -> Tensor | Pending:
        for layer in self:
            if isinstance(layer, ResBlock):
                x, joined = layer(x, emb, joined), None
            else:
                x = layer(x)
        return x


class Layers:
    """Makes the layers of a config's U-Net."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        self.emb_channels = 4 * config.model_channels

    def res_block(self, c_in: int, c_out: int, resample: str | None = None) -> nn.Module:
        return ResBlock(
            c_in,
            c_out,
            self.emb_channels,
            groups=self.config.norm_groups,
            eps=self.config.norm_eps,
            dropout=self.config.dropout,
            scale_shift=self.config.scale_shift,
            resample=resample,
        )

    def attention(self, c: int, groups: int | None) -> nn.Module:
        return Attention(c, self.config.heads(c), groups=groups, eps=self.config.norm_eps)

    def attentions(self, level: int, heights: tuple[int, ...]) -> list[nn.Module]:
        """The attention of a level if its height is among these, or nothing."""
        if self.config.resolutions[level] not in heights:
            return []
        return [self.attention(self.config.level_channels[level], self.config.norm_groups)]

    def middle(self, c: int) -> Stage:
        kind, norm_groups = self.config.middle_attention, self.config.norm_groups
        attention = [] if kind == "none" else [self.attention(c, norm_groups if kind == "normed" else None)]
        return Stage(self.res_block(c, c), *attention, self.res_block(c, c))

    def downsample(self, c: int) -> nn.Module:
        if self.config.resample == "resblock":
            return self.res_block(c, c, "down")
        return Downsample(c, self.config.downsample_padding)

    def encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """The stages of the way down, and the channels of the first convolution's image and of each stage's."""
        config, stages = self.config, nn.ModuleList()
        channels = [config.first_channels]
        for level, c in enumerate(config.level_channels):
            for _ in range(config.num_res_blocks):
                attentions = self.attentions(level, config.attention_resolutions)
                stages.append(Stage(self.res_block(channels[-1], c), *attentions))
                channels.append(c)
            if level < len(config.level_channels) - 1:
                stages.append(Stage(self.downsample(c)))
                channels.append(c)
        return stages, channels

    def upsample(self, c: int) -> nn.Module:
        return self.res_block(c, c, "up") if self.config.resample == "resblock" else Upsample(c)


class UNet(Derives):
    """The U-Net of Ho et al. 2020 and Nichol & Dhariwal 2021; UNetConfig says what can be chosen.

    The output of each stage of the encoder also goes to one stage of the decoder, which concatenates it with its own
    input. The parameters are channels_last. At initialisation the output is exactly 0.

    Attributes:
        config: What it was built from.
        recompute: Whether a forward whose gradient is wanted keeps only what goes from one stage to the next, and the
            backward computes the rest again (nn/recomputing.py). It changes no number.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        channels = config.level_channels
        layers = Layers(config)
        self.time_embedding = TimeEmbedding(
            config.model_channels, config.time_denominator, config.time_order, config.timestep_scale
        )
        if config.num_classes:
            self.label_embedding = nn.Embedding(config.label_rows, layers.emb_channels)
        self.conv_in = Conv2d(config.in_channels + config.condition_channels, config.first_channels)

        self.encoder, skips = layers.encoder()
        c = skips[-1]
        self.middle = layers.middle(c)

        on_the_way_up = config.attention_resolutions if config.decoder_attention is None else config.decoder_attention
        self.decoder = nn.ModuleList()
        for level, c_level in reversed(list(enumerate(channels))):
            for block in range(config.num_res_blocks + 1):
                stage = [layers.res_block(c + skips.pop(), c_level), *layers.attentions(level, on_the_way_up)]
                c = c_level
                if level > 0 and block == config.num_res_blocks:
                    stage.append(layers.upsample(c))
                self.decoder.append(Stage(*stage))

        self.norm_out = GroupNorm(config.norm_groups, c, config.norm_eps)
        self.conv_out = zeroed(Conv2d(c, config.out_channels))
        if config.augment_channels:  # the last one, so that the others begin as they would without it
            self.augment_embedding = Linear(config.augment_channels, config.model_channels, bias=False)
            zeroed(self.augment_embedding)
        for number, each in enumerate(self._blocks()):
            each.dropout.number = number
        # torch's own stubs lack this overload.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        seed: Tensor | None = None,
        sample_id: Tensor | None = None,
        condition: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Predict from noised images.

        Args:
            x: [N, C, H, W], floats, of any size that can be halved for the levels. They are cast to the parameters'
                dtype.
            t: [N], the timesteps, integer or float.
            labels: [N], integer classes, where num_classes is the null class, if there is one. None means the null
                class for all.
            seed: int64 scalar on x's device. In train mode dropout then is a function of it, of the sample's id and of
                nothing else (ops.dropout). None means torch's own dropout.
            sample_id: int64 [N], the ids that go with the seed: the numbers of the training examples, say, of which no
                two steps have the same.
            condition: [N or 1, condition_channels, H', W'], floats, for a network that gets a second image. Another
                size than x's is scaled to it, bilinearly.
            augment: [N, augment_channels], floats: how each image was augmented (data/augmentation.py). None means
                zeros, which stand for images as they are: what sampling asks for.

        Returns:
            [N, C or 2C, H, W], channels_last, in the parameters' dtype or autocast's.

        Raises:
            InputError: For wrong shapes and dtypes, labels for an unconditional network, no labels for a network of
                classes without a null class, labels out of range, a seed without ids, a condition too much or too few,
                and an augment of another shape. The range is checked only on the CPU, because on a GPU the check would
                wait for the device.
        """
        self._check(x, t, labels)
        added = self._embedded_augment(augment, x)
        key = _dropout_key(x, seed, sample_id)
        x = self._beside(condition, x).to(self.conv_in.weight.dtype, memory_format=torch.channels_last)
        pends = is_added_by_norms(x)
        if pends and any(compat.has_forward_hooks(module) for module in self.modules()):
            with unfused():  # a hook is given whole images
                return self._run(x, self._embedding(t, labels, added, is_fused(x)), key, False)
        return self._run(x, self._embedding(t, labels, added, is_fused(x)), key, pends)

    def _run(self, x: Tensor, emb: Embedding, key: NoiseKey | None, pends: bool) -> Tensor:
        emb.key = key
        first = convolved(self.conv_in, x)
        # With one input channel x fits any memory format, and the convolution may choose the wrong one.
        first.image = first.image.contiguous(memory_format=torch.channels_last)
        h: Tensor | Pending = first if pends else first.image
        skips = [h]
        for stage in self.encoder:
            h = self._runs(stage, emb)(h, emb)
            skips.append(h)
        h = self._runs(self.middle, emb)(h, emb)
        for stage in self.decoder:
            h = self._runs(stage, emb)(h, emb, whole(skips.pop()))
        return self.conv_out(self.norm_out(h))

    def _runs(self, stage: nn.Module, emb: Embedding) -> Callable[..., Tensor | Pending]:
        """What runs a stage: itself, or what computes it again in the backward."""
        if not (self.recompute and torch.is_grad_enabled()):
            return stage
        layers = (layer for layer in stage.modules() if isinstance(layer, nn.Dropout))
        return recomputed(stage, emb.emb, draws=emb.key is None and any(layer.training and layer.p for layer in layers))

    def _embedding(self, t: Tensor, labels: Tensor | None, added: Tensor | None, fuses: bool) -> Embedding:
        """The embedding of timesteps, of what is added to their sinusoids, and of labels.

        A loop gives all samples one timestep, as an expanded tensor: it is embedded once on a GPU. A CPU would round
        one row otherwise than several, for which it would save nothing.
        """
        emb = self.time_embedding(t[:1] if fuses and t.stride() == (0,) else t, added)
        if self.config.num_classes:
            table = self.label_embedding.weight
            emb = emb + (table[-1] if labels is None else F.embedding(labels, table))
        emb = F.silu(emb)
        if not fuses:
            return Embedding(emb)
        blocks = self._blocks()
        if not all(_is_as_it_was_made(block) for block in blocks):
            return Embedding(emb)
        weight, bias, *biases = self.derived()
        rows = F.linear(emb, weight, bias)
        rows = rows + biases[0] if biases else rows.float()
        each = rows.split([block.emb.out_features for block in blocks], dim=1)
        return Embedding(emb, dict(zip(blocks, each, strict=True)))

    def _blocks(self) -> list[ResBlock]:
        stages = (*self.encoder, self.middle, *self.decoder)
        return [layer for stage in stages for layer in stage if isinstance(layer, ResBlock)]

    def derive(self) -> tuple[Tensor, ...]:
        """All blocks' projections of the embedding as one matrix, their biases, and those of their first convolutions,
        fp32, if these are added as well."""
        blocks = self._blocks()
        projection = torch.cat([block.emb.weight for block in blocks]), torch.cat([block.emb.bias for block in blocks])
        if self.config.scale_shift:
            return projection
        biases = [block.conv1.bias for block in blocks if block.conv1.bias is not None]
        return *projection, torch.cat(biases).float()

    def sampling_state(self) -> dict[str, Tensor]:
        """The state_dict without what only training uses: the weights by which the network is told of augmentation."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("augment_embedding.")}

    def _beside(self, condition: Tensor | None, x: Tensor) -> Tensor:
        """x, and the condition's channels after its own."""
        channels = self.config.condition_channels
        if condition is None and not channels:
            return x
        if condition is None:
            raise InputError(f"this network gets a second image of {channels} channels beside x: give it as condition")
        if not channels:
            raise InputError("this network gets no second image (condition_channels = 0): leave the condition out")
        n = x.shape[0]  # not len(x), which would fix the batch of what torch.export makes
        if condition.ndim != 4 or condition.shape[1] != channels or condition.shape[0] not in (1, n):
            raise InputError(f"condition is {list(condition.shape)}; expected [{n} or 1, {channels}, H, W]")
        condition = condition.to(x.dtype)
        if condition.shape[2:] != x.shape[2:]:
            condition = F.interpolate(condition, (x.shape[2], x.shape[3]), mode="bilinear")
        return torch.cat([x, condition.expand(n, -1, -1, -1)], dim=1)

    def _embedded_augment(self, augment: Tensor | None, x: Tensor) -> Tensor | None:
        """What is added to the sinusoids of the timesteps, [N, model_channels]. Zeros would add nothing."""
        if augment is None:
            return None
        channels = self.config.augment_channels
        if not channels:
            raise InputError("this network is not told how images are augmented (augment_channels = 0): leave it out")
        if augment.shape != (x.shape[0], channels) or not augment.is_floating_point():
            raise InputError(
                f"augment is {augment.dtype} {list(augment.shape)}; expected floats [{x.shape[0]}, {channels}]"
            )
        return self.augment_embedding(augment.to(self.augment_embedding.weight.dtype))

    def _check(self, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels or not x.is_floating_point():
            raise InputError(
                f"x is {x.dtype} {list(x.shape)}; expected floats [N, {', '.join(map(str, config.shape))}]"
            )
        config.check_halves(x.shape[2], x.shape[3])
        if t.shape != x.shape[:1] or t.dtype == torch.bool or t.is_complex():
            raise InputError(f"t is {t.dtype} {list(t.shape)}; expected one timestep for each sample, [{x.shape[0]}]")
        if labels is None:
            if config.num_classes and not config.null_class:
                raise InputError(
                    f"this network has {config.num_classes} classes and no null class: give labels, one for each sample"
                )
            return
        if not config.num_classes:
            raise InputError("labels were given to an unconditional network (num_classes = 0): leave them out")
        if labels.shape != x.shape[:1] or labels.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"labels are {labels.dtype} {list(labels.shape)}; expected one int64 class for each sample, "
                f"[{x.shape[0]}]"
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
            low, high = labels.min().item(), labels.max().item()
            if low < 0 or high >= config.label_rows:
                null = f", or {config.num_classes} for the null class" if config.null_class else ""
                raise InputError(f"labels go from {low} to {high}; expected 0 to {config.num_classes - 1}{null}")


def _dropout_key(x: Tensor, seed: Tensor | None, sample_id: Tensor | None) -> NoiseKey | None:
    """Whose dropout it is. The key's step counts for nothing: the layer's number takes its place."""
    if seed is None and sample_id is None:
        return None
    if seed is None or sample_id is None:
        raise InputError("seed and sample_id belong together: give both, or neither for torch's own dropout")
    key = NoiseKey(seed, sample_id, step=seed, stream=Stream.DROPOUT)
    check_noise("UNet", key, x)
    return key


def _is_as_it_was_made(block: ResBlock) -> bool:
    """Whether the block's projection and first convolution have all that is joined with those of other blocks."""
    return type(block.emb) is Linear and block.emb.bias is not None and block.conv1.bias is not None
