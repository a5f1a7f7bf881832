"""Images as sequences of grey pixels, for every architecture with an image head.

Works without Pillow and torchvision: images may be arrays or tensors, and Pillow images if Pillow is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts to grey


class PixelSequenceImageProcessor(BaseImageProcessor):
    """Grey, resized, scaled to 0..1 and normalised: `pixel_values` (B, 1, H, W), read by the models row by row.

    Args:
        image_size: height and width to resize to; None keeps the size (all images of a batch must then have the same
            size).
        rescale_factor: factor for integer pixels; floating-point pixels must already lie in 0..1.
        image_mean, image_std: values to subtract and to divide by, after scaling.
    """

    model_input_names: list[str] = ["pixel_values"]

    def __init__(
        self,
        image_size: int | None = None,
        rescale_factor: float = 1 / 255,
        image_mean: float = 0.5,
        image_std: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size is not None and image_size < 1:
            raise ValueError(f"`image_size` must be a positive number of pixels, or None; got {image_size}.")
        if image_std <= 0:
            raise ValueError(f"`image_std` must be positive; got {image_std}.")
        self.image_size = image_size
        self.rescale_factor = rescale_factor
        self.image_mean = image_mean
        self.image_std = image_std

    def _pixels(self, image: Any) -> torch.Tensor:
        """One image (H, W), (H, W, 1 or 3) or (1 or 3, H, W) as grey float32 pixels (H, W) in 0..1."""
        pixels = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
        scaled = pixels.float() if pixels.is_floating_point() else pixels.float() * self.rescale_factor
        if scaled.dim() == 3 and scaled.shape[-1] in (1, 3, 4) and scaled.shape[0] not in (1, 3):
            scaled = scaled.permute(2, 0, 1)
        if scaled.dim() == 3 and scaled.shape[0] in (3, 4):
            scaled = torch.tensordot(torch.tensor(_LUMA), scaled[:3], dims=1)
        elif scaled.dim() == 3 and scaled.shape[0] == 1:
            scaled = scaled[0]
        if scaled.dim() != 2 or scaled.numel() == 0:
            raise ValueError(
                "An image must have shape (height, width), with 1, 3 or 4 channels first or last; got "
                f"{tuple(pixels.shape)}."
            )
        return scaled

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Processes one image, a list of them, or a batch (B, C, H, W).

        Raises:
            ValueError: there are no images, a shape is not that of an image, or sizes differ without `image_size`.
        """
        is_batch = isinstance(images, (list, tuple)) or (getattr(images, "ndim", 0) == 4)
        several: Sequence[Any] = list(images) if is_batch else [images]
        if not several:
            raise ValueError("`images` is empty: pass at least one image.")
        pixels = [self._pixels(image) for image in several]
        if self.image_size is not None:
            size = (self.image_size, self.image_size)
            pixels = [
                image
                if tuple(image.shape) == size
                else F.interpolate(image[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
                for image in pixels
            ]
        shapes = {tuple(image.shape) for image in pixels}
        if len(shapes) > 1:
            raise ValueError(
                f"The images of a batch must have the same size; got {sorted(shapes)}. Set `image_size` to resize "
                "them."
            )
        values = (torch.stack(pixels).unsqueeze(1) - self.image_mean) / self.image_std
        return BatchFeature({"pixel_values": values.numpy()}, tensor_type=return_tensors)


__all__ = ["PixelSequenceImageProcessor"]
