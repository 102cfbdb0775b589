"""Models that put images and texts into one space, ready for the eigen-index.

>>> import retrieval                                               # doctest: +SKIP
>>> model = retrieval.load("long-eclip-mini")                      # doctest: +SKIP
>>> c = model.text_vectors(["a dog in the snow"])                  # doctest: +SKIP
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrieval.architecture import (
    Architecture,
    ArchitectureError,
    find_architecture,
    list_architectures,
    transformers_architecture,
)
from retrieval.checkpoints import (
    ModelError,
    OpenClip,
    load_architecture,
    load_open_clip,
    one_line,
    read_tensors,
    transformers_from_hub,
    weights_hash,
)
from retrieval.eigen import EigenBasis
from retrieval.preprocess import Preprocess
from retrieval.runtime import ImageRuntime

if TYPE_CHECKING:
    from torch import Tensor, nn

    from retrieval.text import TextTower

__all__ = ["MINI", "ModelError", "RetrievalModel", "list_models", "load"]

logger = logging.getLogger(__name__)

_MakeRuntime = Callable[..., ImageRuntime]

MINI = "long-eclip-mini"
_MINI_WEIGHTS = Path(__file__).parent / "weights" / MINI

# Queries whose vectors are remembered: 2 MB at r = 512.
_REMEMBERED_QUERIES = 1024

# Images per call of the tower; bounds memory whatever the caller passes.
_MAX_BATCH = 64


class RetrievalModel:
    """An image tower and a text tower that share a space, in eigen-coordinates.

    Attributes:
        name: what `load` takes to get this model again.
        weights_hash: sha256 hex of the tensors, independent of the file format.
        preprocess: PIL image -> uint8 (H, W, 3) pixels.
        basis: the final linear map of the image tower, factored in float64.
        context_length: tokens of a text that are read.
        clip: the plain network with tokenizer and configuration, None if it is no CLIP.
    """

    def __init__(
        self,
        *,
        name: str,
        weights_hash: str,
        preprocess: Preprocess,
        basis: EigenBasis,
        text: TextTower,
        images: ImageRuntime,
        image_tower: Callable[[], nn.Module],
        clip: OpenClip | None = None,
    ) -> None:
        """Put a model together; `load` does this.

        image_tower gives the eigen form of the whole image tower.
        """
        self.clip = clip
        self.name = name
        self.weights_hash = weights_hash
        self.preprocess = preprocess
        self.basis = basis
        self.context_length = text.context_length
        self._text = text
        self._images = images
        self._make_image_tower = image_tower
        self._image_tower: nn.Module | None = None
        self._remembered: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return (
            f"RetrievalModel({self.name!r}, dim={self.dim}, runtime={self.runtime!r}, "
            f"weights={self.weights_hash[:12]})"
        )

    @property
    def dim(self) -> int:
        """r, the length of the stored vectors."""
        return self.basis.dim

    @property
    def runtime(self) -> str:
        """ "openvino" or "torch": what runs the image tower."""
        return self._images.name

    @property
    def precision(self) -> str:
        """ "f32" or "bf16": what the image tower computes in."""
        return self._images.precision

    @property
    def image_tower(self) -> nn.Module:
        """The image tower as eigen layers, float pixels as the original takes them -> (N, d).

        Converted on first access: factoring every layer takes seconds to minutes, text queries
        do not need it, and `image_vectors` runs the fused form, which has the same outputs.
        """
        with self._lock:
            if self._image_tower is None:
                self._image_tower = self._make_image_tower()
            return self._image_tower

    @property
    def truncated_texts(self) -> int:
        """How many texts were longer than the context so far."""
        return self._text.truncated

    def image_vectors(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Vectors to store.

        Args:
            pixels: (N, H, W, 3) uint8 from `preprocess`.

        Returns:
            (N, r) float32 of unit norm.

        Raises:
            ValueError: for pixels of another size or type.
        """
        rows = [
            self.basis.vectors(self._images(pixels[start : start + _MAX_BATCH]))
            for start in range(0, max(len(pixels), 1), _MAX_BATCH)
        ]
        return np.concatenate(rows)

    def text_vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Eigen-coordinates of texts; recent ones are remembered.

        Args:
            texts: N strings; what exceeds the context is cut, counted and logged.

        Returns:
            (N, r) float32. Their products with stored vectors are cosines.

        Raises:
            TypeError: if one string is passed instead of a sequence of them.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string: pass [text]")
        with self._lock:
            known = {text: self._remembered[text] for text in texts if text in self._remembered}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            coordinates = self.basis.query(self._text.encode(missing))
            known.update(zip(missing, coordinates, strict=True))
        with self._lock:
            for text in texts[-_REMEMBERED_QUERIES:]:
                self._remembered[text] = known[text]
                self._remembered.move_to_end(text)
            while len(self._remembered) > _REMEMBERED_QUERIES:
                self._remembered.popitem(last=False)
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        return np.stack([known[text] for text in texts])

    def fingerprint(self) -> dict[str, Any]:
        """What an index remembers, and refuses to mix."""
        return {
            "model": self.name,
            "weights": self.weights_hash,
            "preprocess": self.preprocess.hash,
            "dim": self.dim,
            "precision": self.precision,
        }


def load(
    name: str = MINI,
    *,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    runtime: str = "auto",
    precision: str = "f32",
) -> RetrievalModel:
    """Load a model by name.

    QuickGELU comes from the weights' origin: a published tag, the directory's configuration or
    the file's layout. Where a local file does not say, the architecture decides.

    Args:
        name: "long-eclip-mini" (shipped); "long-eclip-b16", "long-eclip-l14" or an architecture of
            your own (see `retrieval.architecture`), with a weights file of any CLIP layout; an
            open_clip architecture with its weights, as in "ViT-B-32:laion2b_s34b_b79k" or
            "ViT-B-32:path/to/file.safetensors"; a hub id "hf-hub:org/name"; a directory of
            open_clip or transformers, as a path or "local-dir:path".
        checkpoint: pretrained tag or weights file, when name is an architecture alone.
        device: torch device, for example "cpu" or "cuda".
        runtime: "auto", "openvino" or "torch" for the image tower.
        precision: "f32", or "bf16" to run the image tower in bfloat16: on a CPU with units for it
            ViT-B/16 is 2.4 times as fast and its vectors turn by less than 1 degree. Texts stay
            in f32. An index keeps to the precision that it was made with.

    Raises:
        ModelError: with one line that says what is missing or does not fit, and what to do.
    """
    name = str(name)
    given = None if checkpoint is None else str(checkpoint)
    directory = Path(name.removeprefix("local-dir:")).expanduser()
    images = partial(ImageRuntime, runtime=runtime, device=device, precision=precision)
    try:
        if name == MINI:
            return _load_tower(MINI, Path(given) if given else _MINI_WEIGHTS, device, images)
        if _is_directory(name, directory):
            if given is not None:
                raise ModelError(f"{name} brings its own weights; leave checkpoint {given!r} out")
            name = f"local-dir:{directory.resolve()}"
            architecture = _architecture_of(directory)
            if architecture is not None:
                loaded = load_architecture(architecture, directory, device, name)
                return _from_clip(loaded, device, images)
            if not (directory / "open_clip_config.json").is_file() and _is_tower(directory):
                return _load_tower(name, directory, device, images)
        elif name.startswith("hf-hub:"):
            # With a checkpoint of its own, open_clip's loader says that there can be no other.
            folder = transformers_from_hub(name) if given is None else None
            architecture = None if folder is None else transformers_architecture(folder)
            if folder is not None and architecture is not None:
                loaded = load_architecture(architecture, folder, device, name)
                return _from_clip(loaded, device, images)
        else:
            architecture, tail = _architecture(name)
            if architecture is not None:
                file = _one_of(name, tail, given, architecture)
                return _from_clip(load_architecture(architecture, file, device), device, images)
        return _from_clip(load_open_clip(name, given, device), device, images)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(one_line(error)) from error


def list_models() -> list[str]:
    """Names that `load` takes: the shipped model, architectures, open_clip's published weights.

    Architectures need a weights file.
    """
    import open_clip

    return [MINI, *list_architectures(), *open_clip.list_pretrained(as_str=True)]


def _architecture(name: str) -> tuple[Architecture | None, str]:
    """The architecture that a name begins with, and the file behind its colon."""
    head, mark, tail = name.partition(".json:")
    if mark or name.endswith(".json"):
        return find_architecture(f"{head}.json" if mark else name), tail
    head, _, tail = name.partition(":")
    return find_architecture(head), tail


def _architecture_of(directory: Path) -> Architecture | None:
    """What a model directory says of itself; None if this is no plain CLIP."""
    config = directory / "open_clip_config.json"
    if not config.is_file():
        return transformers_architecture(directory)
    try:
        return find_architecture(str(config))
    except ArchitectureError:
        return None  # open_clip knows more text towers


def _one_of(name: str, tail: str, given: str | None, architecture: Architecture) -> str:
    """The weights file, which the name or the argument gives."""
    if tail and given is not None:
        raise ModelError(f"{name} already names its weights; leave {given!r} out")
    file = tail or given
    if not file:
        raise ModelError(
            f"{architecture.name} needs weights: give a file trained for "
            f"{architecture.context_length} tokens, as in {architecture.name}:FILE"
        )
    return file


def _is_directory(name: str, path: Path) -> bool:
    """Whether a name means a directory; a folder that happens to be called RN50 does not."""
    if not name or not path.is_dir():
        return False
    is_path = name.startswith("local-dir:") or any(sign in name for sign in "/\\~")
    return is_path or (path / "open_clip_config.json").is_file() or _is_tower(path)


def _is_tower(directory: Path) -> bool:
    """Whether this is a directory of `retrieval.minilm_tower`, by its files' names."""
    return (directory / "config.json").is_file() and (directory / "model.safetensors").is_file()


def _load_tower(name: str, directory: Path, device: str, images: _MakeRuntime) -> RetrievalModel:
    """Text side and final map now; the image network only when the compiled one is not cached.

    A search by words then neither imports timm nor builds the network: half the start-up time.
    """
    from retrieval.minilm_tower import load_tower, map_text, read_config
    from retrieval.text import MiniLM, MiniLMText

    if not _is_tower(directory):
        raise ModelError(f"{directory} has no config.json and model.safetensors of {MINI}")
    state = read_tensors(directory / "model.safetensors")
    kind = "a model"
    try:
        config = read_config(directory)
        kind = config.get("architecture", MINI)
        preprocess = _tower_preprocess(config)
        basis = EigenBasis.from_weight(state["proj.weight"], state.get("proj.bias"))
        mean, weight = _text_map(state)
        mean, weight = mean.to(device), weight.to(device)
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"cannot read {kind} from {directory}: {one_line(error)}") from error
    except KeyError as error:
        missing = f"model.safetensors lacks {error.args[0]}"
        raise ModelError(f"cannot read {kind} from {directory}: {missing}") from error
    tensors = weights_hash(state)
    # Heads are not seen in the tensors.
    shape = f"|{json.dumps(config['vision'], sort_keys=True)}" if "vision" in config else ""

    @lru_cache(maxsize=1)
    def tower() -> Any:
        try:
            return load_tower(directory, device).requires_grad_(False)
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ModelError(f"cannot read {kind} from {directory}: {one_line(error)}") from error

    def pixel_tower() -> nn.Module:
        from retrieval.towers import PixelTower

        return PixelTower(tower(), None, tower().features)

    def image_tower() -> nn.Module:
        from enn_core import to_enn

        return to_enn(tower())

    return RetrievalModel(
        name=name,
        weights_hash=tensors,
        preprocess=preprocess,
        basis=basis,
        text=MiniLMText(MiniLM(device=device), lambda e: map_text(e, mean, weight), device),
        images=images(
            pixel_tower,
            preprocess.size,
            key=f"{tensors}|{preprocess.hash}{shape}",
        ),
        image_tower=image_tower,
    )


def _tower_preprocess(config: dict[str, Any]) -> Preprocess:
    """How a tower of `retrieval.minilm_tower` wants its images; the tower itself scales pixels."""
    given = config.get("preprocess", {})
    if not isinstance(given, dict):
        raise ValueError(f"preprocess must be an object, got {given!r}")
    preprocess = Preprocess.from_config(given)
    if preprocess.mean != Preprocess.mean or preprocess.std != Preprocess.std:
        raise ValueError("preprocess has another mean or std than 0.5, which these towers apply")
    vision = config.get("vision")
    if vision is not None:
        from retrieval.vit import check_vision

        side = check_vision(vision)["image_size"]
        if preprocess.size != (side, side):
            raise ValueError(f"preprocess gives {preprocess.size}, vision wants {(side, side)}")
    return preprocess


def _text_map(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    from retrieval.minilm_tower import TEXT_DIM

    mean, weight = state["text_mean"], state["text_proj.weight"]
    wanted = {"text_mean": (TEXT_DIM,), "text_proj.weight": (len(state["proj.weight"]), TEXT_DIM)}
    for key, shape in wanted.items():
        if state[key].shape != shape:
            raise ValueError(f"{key} is {tuple(state[key].shape)}, expected {shape}")
        if not bool(state[key].isfinite().all()):
            raise ValueError(f"{key} holds NaN or infinity: the file is damaged")
    return mean, weight


def _from_clip(loaded: OpenClip, device: str, images: _MakeRuntime) -> RetrievalModel:
    from enn_core import to_enn
    from retrieval.text import OpenClipText
    from retrieval.towers import PixelTower, split_final_map

    model: Any = loaded.model
    preprocess = loaded.preprocess
    tensors = weights_hash(model.state_dict())
    headless, basis = split_final_map(model.visual)
    if basis is None:
        headless, basis = model.visual, EigenBasis.identity(_output_width(model.visual, preprocess))
    return RetrievalModel(
        name=loaded.name,
        weights_hash=tensors,
        preprocess=preprocess,
        basis=basis,
        text=OpenClipText(model, loaded.tokenizer, device),
        images=images(
            lambda: PixelTower(headless, preprocess),
            preprocess.size,
            key=f"{tensors}|{preprocess.hash}",
        ),
        image_tower=lambda: to_enn(model.visual),
        clip=loaded,
    )


def _output_width(visual: nn.Module, preprocess: Preprocess) -> int:
    """d of a tower whose last step is not linear, found by running it once."""
    import torch

    from retrieval.towers import PixelTower

    blank = torch.zeros(1, *preprocess.size, 3, dtype=torch.uint8)
    return int(PixelTower(visual, preprocess)(blank).shape[1])
