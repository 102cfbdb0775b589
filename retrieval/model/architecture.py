"""CLIP architectures as data: JSON files that come with the package, and the user's own.

A file holds `model_cfg` and `preprocess_cfg` as an `open_clip_config.json` does; open_clip's bare
model JSON is taken too. What a file says of `quick_gelu` is what the network gets.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.model.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Architecture",
    "ArchitectureError",
    "architecture_folders",
    "find_architecture",
    "list_architectures",
    "transformers_architecture",
]

_SHIPPED = Path(__file__).parent / "architectures"

# OpenAI's, for files that say nothing of their preprocessing, as open_clip takes them too.
_PREPROCESS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}

# The words of CLIP's own tokenizer, the only one of these text towers.
_VOCABULARY = 49408


class ArchitectureError(ValueError):
    """An architecture that cannot be read or built; one line."""


@dataclass(frozen=True)
class Architecture:
    """What a CLIP network looks like, without its weights.

    Attributes:
        name: what `load` takes: the file's stem, or the path of a file outside the folders.
        model: open_clip's model configuration.
        preprocess: how it wants its images.
    """

    name: str
    model: Mapping[str, Any]
    preprocess: Preprocess

    @property
    def context_length(self) -> int:
        """Tokens of a text that are read."""
        return int(self.model["text_cfg"].get("context_length", 77))

    @property
    def quick_gelu(self) -> bool:
        """Whether both towers use QuickGELU."""
        return bool(self.model.get("quick_gelu", False))

    def build(self, *, initialise: bool = True) -> nn.Module:
        """The network, in eval mode.

        Args:
            initialise: False leaves the weights undefined, for a state dict that follows: drawing
                random ones takes 2 s for a ViT-B/16 and 5 s for a ViT-L/14.

        Raises:
            ArchitectureError: if open_clip cannot build it.
        """
        import open_clip
        import torch

        config = {**self.model, "vision_cfg": dict(self.model["vision_cfg"])}
        is_timm = "timm_model_name" in config["vision_cfg"]
        if is_timm:
            config["vision_cfg"]["timm_model_pretrained"] = False  # it would be fetched
        try:
            if initialise or is_timm:  # timm's networks compute constants as they are built
                return open_clip.CLIP(**config).eval()
            with torch.device("meta"):
                model = open_clip.CLIP(**config).eval()
            mask = model.attn_mask
            model.to_empty(device="cpu")
            if mask is not None:  # the one tensor that no state dict has
                model.attn_mask = torch.full(mask.shape, float("-inf")).triu_(1)
            return model
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ArchitectureError(f"architecture {self.name} cannot be built: {first}") from error

    def tokenizer(self) -> Any:
        """CLIP's tokenizer, cutting at this context length."""
        import open_clip

        return open_clip.SimpleTokenizer(context_length=self.context_length)


def architecture_folders() -> list[Path]:
    """Where architectures are looked for: the package, then the user's folder.

    The latter is the environment variable ENN_ARCHITECTURES, or `architectures` in the user's
    configuration directory of eigen-suite.
    """
    own = os.environ.get("ENN_ARCHITECTURES")
    if not own:
        from platformdirs import user_config_dir

        own = str(Path(user_config_dir("eigen-suite", appauthor=False)) / "architectures")
    return [_SHIPPED, Path(own).expanduser()]


def list_architectures() -> list[str]:
    """Names that `find_architecture` knows, the shipped ones first."""
    names: dict[str, None] = {}
    for folder in architecture_folders():
        if folder.is_dir():
            names.update(dict.fromkeys(sorted(file.stem for file in folder.glob("*.json"))))
    return list(names)


def find_architecture(name: str) -> Architecture | None:
    """An architecture by its name or by the path of its JSON file; None if there is none.

    Raises:
        ArchitectureError: if its file cannot be read or is not of this kind.
    """
    if name.endswith(".json"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise ArchitectureError(f"architecture file not found: {file}")
        return _read(file, str(file.resolve()))
    if not name or Path(name).name != name:
        return None
    for folder in architecture_folders():
        file = folder / f"{name}.json"
        if file.is_file():
            return _read(file, name)
    return None


def transformers_architecture(folder: Path) -> Architecture | None:
    """Architecture of a directory that transformers' `CLIPModel.save_pretrained` wrote.

    Returns:
        None if the directory's `config.json` is missing or of another model.

    Raises:
        ArchitectureError: for a CLIP that open_clip's network cannot express.
    """
    file = folder / "config.json"
    config = _json(file) if file.is_file() else None
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        return None
    image, text = ({**_TRANSFORMERS, **config.get(f"{side}_config", {})} for side in _SIDES)
    image = {**_TRANSFORMERS_IMAGE, **image}
    text = {**_TRANSFORMERS_TEXT, **text}
    acts = {str(side["hidden_act"]) for side in (image, text)}
    if len(acts) > 1 or not acts <= {"quick_gelu", "gelu"}:
        raise ArchitectureError(
            f"{file} has hidden_act {', '.join(sorted(acts))}; supported: quick_gelu or gelu, "
            "the same in both towers"
        )
    model = {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "image_size": image["image_size"],
            "patch_size": image["patch_size"],
            "layers": image["num_hidden_layers"],
            "width": image["hidden_size"],
            "head_width": image["hidden_size"] // image["num_attention_heads"],
            "mlp_ratio": image["intermediate_size"] / image["hidden_size"],
            "norm_kwargs": {"eps": image["layer_norm_eps"]},
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "layers": text["num_hidden_layers"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
            "norm_kwargs": {"eps": text["layer_norm_eps"]},
        },
    }
    return _checked(str(folder), model, _transformers_preprocess(folder, image["image_size"]))


_SIDES = ("vision", "text")

# transformers leaves out of config.json what equals its defaults, in some versions.
_TRANSFORMERS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_TRANSFORMERS_IMAGE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 32,
}  # fmt: skip
_TRANSFORMERS_TEXT = {
    "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408,
    "max_position_embeddings": 77,
}  # fmt: skip


def _transformers_preprocess(folder: Path, size: int) -> dict[str, Any]:
    """From `preprocessor_config.json`, or OpenAI's values if there is none."""
    fields: dict[str, Any] = {"size": size}
    file = folder / "preprocessor_config.json"
    given = _json(file) if file.is_file() else {}
    crop = given.get("crop_size", size)
    fields["size"] = (crop["height"], crop["width"]) if isinstance(crop, dict) else crop
    fields.update({ours: given[k] for k, ours in _PIXELS.items() if k in given})
    resample = {2: "bilinear", 3: "bicubic", 1: "lanczos"}
    if "resample" in given:
        fields["interpolation"] = resample.get(given["resample"], str(given["resample"]))
    return fields


_PIXELS = {"image_mean": "mean", "image_std": "std"}


def _read(file: Path, name: str) -> Architecture:
    content = _json(file)
    model = content.get("model_cfg", content)
    if not isinstance(model, dict):
        raise ArchitectureError(f"{file}: model_cfg must be an object")
    vision = model.get("vision_cfg")
    size = vision.get("image_size", 224) if isinstance(vision, dict) else 224
    return _checked(name, model, {"size": size, **content.get("preprocess_cfg", {})})


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArchitectureError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ArchitectureError(f"{file} must hold a JSON object")
    return content


def _checked(name: str, model: dict[str, Any], preprocess: Mapping[str, Any]) -> Architecture:
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model]
    if missing:
        raise ArchitectureError(
            f"architecture {name} lacks {', '.join(missing)}; see open_clip's model JSON files"
        )
    text = model["text_cfg"]
    if not isinstance(text, dict) or not isinstance(model["vision_cfg"], dict):
        raise ArchitectureError(f"architecture {name}: text_cfg and vision_cfg must be objects")
    if "hf_model_name" in text or "hf_tokenizer_name" in text or model.get("custom_text"):
        raise ArchitectureError(
            f"architecture {name} has another text tower than CLIP's own: "
            "give open_clip the file (open_clip.add_model_config) and load it by its name"
        )
    if text.get("vocab_size", _VOCABULARY) != _VOCABULARY:
        raise ArchitectureError(
            f"architecture {name} has vocab_size {text['vocab_size']}; CLIP's tokenizer has "
            f"{_VOCABULARY}"
        )
    try:
        pixels = Preprocess.from_config({**_PREPROCESS, **preprocess})
    except (TypeError, ValueError) as error:
        raise ArchitectureError(f"architecture {name}: {error}") from error
    return Architecture(name, {k: v for k, v in model.items() if k != "custom_text"}, pixels)
