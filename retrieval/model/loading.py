"""Finding and loading a model by its name.

>>> import retrieval                                               # doctest: +SKIP
>>> model = retrieval.load("long-eclip-mini")                      # doctest: +SKIP
>>> c = model.text_vectors(["a dog in the snow"])                  # doctest: +SKIP
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enn_core.files.shipped import shipped
from retrieval.eigen_coordinates import EigenBasis
from retrieval.model.architecture import (
    Architecture,
    ArchitectureError,
    find_architecture,
    list_architectures,
    transformers_architecture,
)
from retrieval.model.checkpoints import (
    SUFFIXES,
    ModelError,
    OpenClip,
    load_architecture,
    load_open_clip,
    one_line,
    read_tensors,
    transformers_from_hub,
    weights_hash,
)
from retrieval.model.preprocess import Preprocess
from retrieval.model.published import has_architecture
from retrieval.model.retrieval_model import RetrievalModel
from retrieval.model.runtime import ImageRuntime

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["MINI", "ModelError", "RetrievalModel", "list_models", "load"]

logger = logging.getLogger(__name__)

_MakeRuntime = Callable[..., ImageRuntime]

MINI = "long-eclip-mini"


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
            your own (see `retrieval.model.architecture`), with a weights file of any CLIP layout;
            an open_clip architecture with its weights, as in "ViT-B-32:laion2b_s34b_b79k" or
            "ViT-B-32:path/to/file.safetensors"; a hub id, "hf-hub:org/name" or "org/name"; a
            directory of open_clip or transformers, as a path or "local-dir:path".
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
    if _is_hub_id(name):
        name = f"hf-hub:{name}"
    images = partial(ImageRuntime, runtime=runtime, device=device, precision=precision)
    try:
        if name == MINI:
            given = str(shipped_model()) if given is None else given
            return _load_tower(MINI, Path(given), device, images)
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


def shipped_model() -> Path:
    """The folder of the model that comes with the package.

    Raises:
        NotInstalledError: this installation has none.
        ShippedDamage: it has another one than this version was released with.
    """
    return shipped(
        f"retrieval/weights/{MINI}", f"the model {MINI}", "name another model", _MINI_SHA256
    )


_MINI_SHA256 = {
    "config.json": "135a105edd14f120d20f6682d1864123156bfea899e2ba21d52e31b493a2e7db",
    "model.safetensors": "2950f3d585c97ec8ee3c958dca9c46c24f2117302d92dd32e26aa663fd64ba50",
}


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


def _is_hub_id(name: str) -> bool:
    """Whether a name is a bare ORG/NAME: no path, and no architecture as in ViT-B/32."""
    path = Path(name).expanduser()
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) or path.exists():
        return False
    return not has_architecture(name) and path.suffix not in (".json", *SUFFIXES)


def _is_tower(directory: Path) -> bool:
    """Whether this is a directory of `retrieval.model.tower_folder`, by its files' names."""
    return (directory / "config.json").is_file() and (directory / "model.safetensors").is_file()


def _load_tower(name: str, directory: Path, device: str, images: _MakeRuntime) -> RetrievalModel:
    """Text side and final map now; the image network only when the compiled one is not cached.

    A search by words then neither imports timm nor builds the network: half the start-up time.
    """
    from retrieval.model.minilm_tower import map_text
    from retrieval.model.text_towers import MiniLM, MiniLMText
    from retrieval.model.tower_folder import load_tower, read_config

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
        from retrieval.model.clip_towers import PixelTower

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
    """How a tower of `tower_folder` wants its images; the tower itself scales pixels."""
    given = config.get("preprocess", {})
    if not isinstance(given, dict):
        raise ValueError(f"preprocess must be an object, got {given!r}")
    preprocess = Preprocess.from_config(given)
    if preprocess.mean != Preprocess.mean or preprocess.std != Preprocess.std:
        raise ValueError("preprocess has another mean or std than 0.5, which these towers apply")
    vision = config.get("vision")
    if vision is not None:
        from retrieval.model.vit import check_vision

        side = check_vision(vision)["image_size"]
        if preprocess.size != (side, side):
            raise ValueError(f"preprocess gives {preprocess.size}, vision wants {(side, side)}")
    return preprocess


def _text_map(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    from retrieval.model.minilm_tower import TEXT_DIM

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
    from retrieval.model.clip_towers import PixelTower, split_final_map
    from retrieval.model.text_towers import OpenClipText

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

    from retrieval.model.clip_towers import PixelTower

    blank = torch.zeros(1, *preprocess.size, 3, dtype=torch.uint8)
    return int(PixelTower(visual, preprocess)(blank).shape[1])
