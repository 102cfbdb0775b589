"""From a decoded photo to the pixels a model reads.

The geometric half (resize, crop) runs on PIL images in the decoding threads and yields uint8; the
arithmetic half (mean, std) runs inside the model, so that pixels travel as bytes and a compiled
model can fold it into its first layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MODES", "Preprocess"]

MODES = ("shortest", "longest", "squash")
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")

# Bump when the same fields start to give other pixels: indexes then know that they are stale.
_ALGORITHM = 1

# A JPEG may be decoded at 1/2, 1/4 or 1/8 while it stays this many times larger than the target.
_DRAFT_FACTOR = 2

# Beyond this aspect the part that the centre crop drops anyway is cut off before resizing, which
# bounds memory for panoramas and scrolls.
_MAX_ASPECT = 8


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images, as data that travels with the weights.

    Attributes:
        size: (height, width) in pixels.
        mode: "shortest" resizes the shorter side and crops the centre; "longest" resizes the
            longer side and pads; "squash" ignores the aspect ratio.
        interpolation: "bicubic", "bilinear" or "lanczos" (PIL's, antialiased).
        mean, std: per channel, of pixels scaled to 0..1; applied by the model, not here.
        fill: grey value 0..255 of the padding in mode "longest".
    """

    size: tuple[int, int] = (224, 224)
    mode: str = "shortest"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    fill: int = 0

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be (height, width) in pixels, got {self.size}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, "
                f"got {self.interpolation!r}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need three values, std > 0: {self.mean}, {self.std}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """From a JSON object with this class's fields, or open_clip's names for them.

        Raises:
            ValueError: for unknown keys or values.
        """
        fields = dict(config)
        if "resize_mode" in fields:
            # open_clip's "mode" is the colour mode.
            if fields.pop("mode", "RGB") != "RGB":
                raise ValueError(f"only RGB models are supported, got mode {config['mode']!r}")
            fields["mode"] = fields.pop("resize_mode") or "shortest"
        if "fill_color" in fields:
            fields["fill"] = int(fields.pop("fill_color"))
        unknown = fields.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(
                f"unknown preprocessing {', '.join(sorted(unknown))}; "
                f"valid: {', '.join(cls.__dataclass_fields__)}"
            )
        size = fields.get("size", cls.size)
        fields["size"] = (size, size) if isinstance(size, int) else tuple(size)
        for key in ("mean", "std"):
            value = fields.get(key, getattr(cls, key))
            fields[key] = (float(value),) * 3 if isinstance(value, float | int) else tuple(value)
        return cls(**fields)

    @cached_property
    def hash(self) -> str:
        """sha256 hex of everything that decides the pixels; an index remembers it."""
        fields = {**asdict(self), "algorithm": _ALGORITHM, "draft": _DRAFT_FACTOR}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @cached_property
    def draft_size(self) -> tuple[int, int]:
        """(width, height) below which a JPEG must not be decoded, for `PIL.Image.draft`."""
        height, width = self.size
        return width * _DRAFT_FACTOR, height * _DRAFT_FACTOR

    def __call__(self, image: Image) -> npt.NDArray[np.uint8]:
        """Resize and crop a photo.

        Args:
            image: any PIL image; other modes than RGB are converted first.

        Returns:
            (height, width, 3) uint8, RGB.
        """
        from PIL.Image import Resampling

        resample = Resampling[self.interpolation.upper()]
        if image.mode != "RGB":
            image = image.convert("RGB")
        height, width = self.size
        if self.mode == "squash":
            image = image.resize((width, height), resample)
        elif self.mode == "shortest":
            image = self._cut_excess(image)
            image = image.resize(self._scaled(image.size, min), resample)
            left = round((image.width - width) / 2)
            top = round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        else:
            from PIL.Image import new

            image = image.resize(self._scaled(image.size, max), resample)
            canvas = new("RGB", (width, height), (self.fill,) * 3)
            canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            image = canvas
        return np.asarray(image, dtype=np.uint8)

    def _scaled(self, source: tuple[int, int], fit: Callable[..., float]) -> tuple[int, int]:
        """(width, height) after resizing; fit is min (shorter side fits) or max (longer side)."""
        height, width = self.size
        ratio = fit(source[0] / width, source[1] / height)
        if fit is min and height == width:
            # Truncated, not rounded: what torchvision's Resize(int) does, hence open_clip.
            short, long = sorted(source)
            scaled = int(height * long / short)
            return (height, scaled) if source[0] <= source[1] else (scaled, height)
        return max(1, round(source[0] / ratio)), max(1, round(source[1] / ratio))

    def _cut_excess(self, image: Image) -> Image:
        height, width = self.size
        scale = min(image.width / width, image.height / height)
        keep_w = min(image.width, int(np.ceil(width * scale * _MAX_ASPECT)))
        keep_h = min(image.height, int(np.ceil(height * scale * _MAX_ASPECT)))
        if (keep_w, keep_h) == image.size:
            return image
        left, top = (image.width - keep_w) // 2, (image.height - keep_h) // 2
        return image.crop((left, top, left + keep_w, top + keep_h))
