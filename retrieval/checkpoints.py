"""Finding and reading model weights.

A model is named by
  - an open_clip architecture and a pretrained tag or local file: "ViT-B-32:openai",
    "ViT-B-32:weights/my.safetensors";
  - a hub id, "hf-hub:org/name", served from the hub's local cache when there is no network;
  - a directory with open_clip's `open_clip_config.json` and weights: "local-dir:/path".
Files are read as safetensors or with torch's `weights_only`: pickled code never runs.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ModelError", "OpenClip", "load_open_clip", "read_tensors", "suggest", "weights_hash"]

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_HUB = "hf-hub:"
_DIRECTORY = "local-dir:"


class ModelError(ValueError):
    """A model that cannot be loaded; one line that says what was given and what to do."""


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model with what belongs to it."""

    name: str
    model: nn.Module
    tokenizer: Any
    preprocess: Mapping[str, Any]


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 hex over names, types, shapes and values: the same for every file format."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a weights file, with training wrappers taken off.

    Raises:
        ModelError: if the file is missing, of an unknown kind, damaged, or holds pickled code.
    """
    if not path.is_file():
        raise ModelError(f"weights file not found: {path}")
    if path.suffix not in _SUFFIXES:
        raise ModelError(f"unknown kind of weights file {path.name}; valid: {', '.join(_SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            import torch

            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds pickled code or is damaged, and code in weights is never run; "
            "save its state_dict with safetensors instead"
        ) from error
    except Exception as error:
        # safetensors, zipfile and torch each have their own errors for damaged files.
        raise ModelError(f"cannot read weights from {path}: {one_line(error)}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {
        str(key).removeprefix("module."): value
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if hasattr(value, "detach")
    }
    if not tensors:
        raise ModelError(f"{path} holds no tensors by name; expected a state_dict")
    return tensors


def load_open_clip(name: str, checkpoint: str | None, device: str) -> OpenClip:
    """Load an open_clip model in float32 with its tokenizer and preprocessing.

    QuickGELU is decided by the architecture's name alone. With a tag, open_clip warns when name
    and tag disagree. A local file does not say what it was trained with: for weights that descend
    from OpenAI's, name the "-quickgelu" architecture, or the vectors are silently poor.

    Args:
        name: "arch", "arch:tag", "arch:file", "hf-hub:org/name", "local-dir:path" or a directory.
        checkpoint: tag or file, if the name does not carry it.
        device: torch device.

    Raises:
        ModelError: if anything is missing or does not fit.
    """
    import open_clip

    if name.startswith((_HUB, _DIRECTORY)):
        if checkpoint is not None:
            raise ModelError(f"{name} brings its own weights; leave checkpoint {checkpoint!r} out")
        if name.startswith(_DIRECTORY):
            _check_directory(Path(name.removeprefix(_DIRECTORY)))
        full, arch, source = name, name, None
    else:
        arch, _, tail = name.partition(":")
        if tail and checkpoint is not None:
            raise ModelError(f"{name} already names its weights; leave {checkpoint!r} out")
        arch, source = arch.replace("/", "-"), checkpoint or tail or None
        _check_architecture(arch, source)
        full = f"{arch}:{source}"
    try:
        with _quiet():
            if source is not None and not open_clip.get_pretrained_cfg(arch, source):
                file = Path(source).expanduser()
                full = f"{arch}:{file.resolve()}"
                model = _from_file(arch, file)
                _warn_of_quick_gelu(arch, file)
                tokenizer = open_clip.get_tokenizer(arch)
            else:
                model, tokenizer = _from_hub(arch, source)
    except ModelError:
        raise
    except Exception as error:
        # open_clip, huggingface_hub and requests raise a dozen kinds for "cannot get it".
        raise ModelError(_explain(full, error)) from error
    visual: Any = model.visual
    model = model.eval().requires_grad_(False).to(device)
    return OpenClip(full, model, tokenizer, dict(visual.preprocess_cfg))


def suggest(word: str, valid: Iterable[str]) -> str:
    """'; did you mean A, B?' for near matches among the valid words, or an empty string."""
    by_lower = {item.lower(): item for item in valid}
    near = difflib.get_close_matches(word.lower(), by_lower, n=4, cutoff=0.5)
    return f"; did you mean {', '.join(by_lower[item] for item in near)}?" if near else ""


def one_line(error: BaseException) -> str:
    """The first lines of an error, joined and cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= 240 else text[:239] + "…"


def _check_architecture(arch: str, source: str | None) -> None:
    import open_clip

    known = open_clip.list_models()
    if arch not in known:
        hint = suggest(arch, ["long-eclip-mini", *known])
        raise ModelError(f"unknown model {arch!r}{hint or '; see retrieval.list_models()'}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if source is None:
        raise ModelError(
            f"{arch} needs weights: name a tag ({', '.join(tags[:6]) or 'none published'}) "
            f"or a local file, as in {arch}:{tags[0] if tags else 'FILE'}"
        )
    is_path = Path(source).suffix in _SUFFIXES or "/" in source or "\\" in source
    if not is_path and not open_clip.get_pretrained_cfg(arch, source):
        hint = suggest(source, tags) or f"; tags: {', '.join(tags[:8]) or 'none'}"
        raise ModelError(f"{arch} has no weights {source!r}, and no such file exists{hint}")


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"model directory not found: {path}")
    if not (path / "open_clip_config.json").is_file():
        raise ModelError(f"{path} has no open_clip_config.json: not an open_clip model directory")
    # open_clip would go on with random weights.
    if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in path.iterdir()):
        raise ModelError(f"{path} has no weights (.safetensors, .bin or .pth)")


def _from_hub(name: str, tag: str | None) -> tuple[nn.Module, Any]:
    """Model and tokenizer by tag, hub id or directory: from local files if they are there."""
    import open_clip

    def create() -> tuple[nn.Module, Any]:
        model = open_clip.create_model(name, tag, require_pretrained=True, weights_only=True)
        return model, open_clip.get_tokenizer(name)

    # Asking an unreachable hub first costs half a minute of retries.
    with contextlib.suppress(Exception), _hub_offline():
        return create()
    return create()


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    from huggingface_hub import constants

    previous = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous


def _from_file(arch: str, path: Path) -> nn.Module:
    import open_clip

    tensors = read_tensors(path)
    model = open_clip.create_model(arch, load_weights=False, pretrained_text=False)
    own = model.state_dict()
    for key, value in tensors.items():
        # open_clip would stretch position tables to fit and say nothing.
        if key.endswith("positional_embedding") and key in own and own[key].shape != value.shape:
            raise ModelError(
                f"{path.name} does not fit {arch}: {key} is {tuple(value.shape)}, "
                f"the architecture has {tuple(own[key].shape)}"
            )
    try:
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
    except (RuntimeError, KeyError, AttributeError) as error:
        detail = _key_difference(own, tensors) or one_line(error)
        raise ModelError(f"{path.name} does not fit {arch}: {detail}") from error
    return model


def _key_difference(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    parts = []
    for label, keys in (
        ("missing", sorted(own.keys() - given.keys())),
        ("unexpected", sorted(given.keys() - own.keys())),
        ("other shape", sorted(k for k in own.keys() & given if own[k].shape != given[k].shape)),
    ):
        if keys:
            shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            parts.append(f"{label} {shown}")
    return "; ".join(parts)


def _explain(name: str, error: Exception) -> str:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(link) for link in chain).lower()
    words = ("connect", "resolve", "offline", "timed out", "urlopen", "network", "locate the file")
    if any(word in text for word in words):
        return (
            f"cannot fetch {name}: the hub cannot be reached and its local cache does not have it; "
            "give a local weights file or directory"
        )
    return f"cannot load {name}: {one_line(error)}"


def _warn_of_quick_gelu(arch: str, path: Path) -> None:
    import open_clip

    if f"{arch}-quickgelu" in open_clip.list_models():
        warnings.warn(
            f"{path.name} does not say which activation it was trained with: {arch} uses GELU; "
            f"if the weights descend from OpenAI's, load them as {arch}-quickgelu",
            stacklevel=4,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's remarks off the root logger; problems arrive as exceptions."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
