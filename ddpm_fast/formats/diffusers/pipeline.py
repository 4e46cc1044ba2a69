"""A pipeline for diffusers that draws images of given classes, with classifier-free guidance.

DDPMPipeline has no labels to give to a network that takes them. This file is saved beside such a network; it needs
diffusers and torch alone:

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
    images = pipeline(class_labels=[3, 5], guidance_scale=2.0).images

The guidance is that of Ho & Salimans 2022, "Classifier-Free Diffusion Guidance".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images of classes.

    Args:
        unet: A UNet2DModel with num_class_embeds.
        scheduler: Such as DDPMScheduler.
        null_class: Whether its last class stands for "no class", which guidance needs.
        id2label: The names of the classes, {"0": "cat", ...}, or None.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self, unet: UNet2DModel, scheduler: DDPMScheduler, null_class: bool = False, id2label: dict | None = None
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_class=null_class, id2label=id2label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | torch.Tensor,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each label.

        Args:
            class_labels: Numbers or names of classes.
            guidance_scale: 1 draws from the network as it is; 0 from its null class; above 1 the images are more of
                their class and less varied.
            generator: What draws the noise.
            num_inference_steps: How many timesteps are visited; None means all that the network was trained with.
            output_type: "pil", "np" for float32 [N, H, W, C] in [0, 1], or "pt" for a tensor [N, C, H, W].
            return_dict: Whether to return an ImagePipelineOutput, or a tuple.

        Raises:
            ValueError: For an unknown class, and for guidance without a null class.
        """
        guided = guidance_scale != 1
        if guided and not self.config.null_class:
            raise ValueError("this network has no null class, so it cannot be guided: leave guidance_scale out")
        labels = self._labels(class_labels)
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        sides = (size, size) if isinstance(size, int) else tuple(size)
        image = randn_tensor(
            (len(labels), channels, *sides), generator=generator, device=self._execution_device, dtype=self.unet.dtype
        )
        self.scheduler.set_timesteps(num_inference_steps or self.scheduler.config.num_train_timesteps)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self._guided(image, t, labels, guidance_scale) if guided else self._output(image, t, labels)
            image = self.scheduler.step(output, t, image, generator=generator).prev_sample
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).float().numpy()
            image = self.numpy_to_pil(image) if output_type == "pil" else image
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    def _output(self, image: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.unet(image, t, class_labels=labels).sample

    def _guided(self, image: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        """The guided prediction; what sets a learned variance is the conditional output's."""
        none = torch.full_like(labels, self.unet.config.num_class_embeds - 1)
        cond, uncond = self._output(torch.cat([image, image]), t, torch.cat([labels, none])).chunk(2)
        channels = image.shape[1]
        prediction = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([prediction, cond[:, channels:]], dim=1)

    def _labels(self, given: Sequence[int | str] | torch.Tensor) -> torch.Tensor:
        """int64 [N] on the network's device."""
        classes = self.unet.config.num_class_embeds - bool(self.config.null_class)
        numbers = {name: int(number) for number, name in (self.config.id2label or {}).items()}
        found = [numbers.get(label, -1) if isinstance(label, str) else int(label) for label in given]
        for label, number in zip(given, found, strict=True):
            if not 0 <= number < classes:
                names = f" or one of {', '.join(numbers)}" if numbers else ""
                raise ValueError(f"class {label!r} is unknown; expected a number from 0 to {classes - 1}{names}")
        return torch.tensor(found, dtype=torch.int64, device=self._execution_device)
