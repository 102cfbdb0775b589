"""Finding and reading model weights.

A model is named by
  - an open_clip architecture and a pretrained tag or local file: "ViT-B-32:openai",
    "ViT-B-32:weights/my.safetensors";
  - a hub id, "hf-hub:org/name", of open_clip or of transformers, served from the hub's local cache
    when there is no network;
  - a directory with open_clip's `open_clip_config.json` and weights, or one that transformers'
    `CLIPModel.save_pretrained` wrote: "local-dir:/path";
  - an architecture of `retrieval.model.architecture` and a local file:
    "long-eclip-b16:longclip-B.pt".
Files are read as safetensors, with torch's `weights_only`, or, if they are TorchScript archives as
OpenAI's, without the program in them: code in weights never runs. Their layout (OpenAI, Long-CLIP,
transformers, eigen factors) is recognised: see `retrieval.model.clip_layouts`.

QuickGELU is a fact of the weights' origin. The architecture or directory states it; where a file's
layout or the `config.json` beside it says otherwise, the file is refused.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enn_core.files.tensors import TensorFileError, read_weights
from retrieval.model.architecture import (
    Architecture,
    list_architectures,
    transformers_architecture,
)
from retrieval.model.clip_layouts import ClipWeights, LayoutError, read_layout
from retrieval.model.hub import is_out_of_reach, local_first
from retrieval.model.preprocess import Preprocess
from retrieval.model.published import has_architecture, sources_of
from retrieval.model.torchscript import is_torchscript, read_torchscript

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "SUFFIXES",
    "ModelError",
    "OpenClip",
    "load_architecture",
    "load_open_clip",
    "read_clip",
    "read_tensors",
    "suggest",
    "transformers_from_hub",
    "weights_hash",
]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Endings of weights files."""

_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
_OPEN_CLIP_CONFIG = "open_clip_config.json"
_AWAY = (
    "cannot fetch {}: the hub cannot be reached and its local cache does not have it; give a local "
    "weights file or directory (on a slow line: HF_HUB_ETAG_TIMEOUT=30)"
)
_HUB = "hf-hub:"
_DIRECTORY = "local-dir:"


class ModelError(ValueError):
    """A model that cannot be loaded; one line that says what was given and what to do."""


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model with what belongs to it.

    Attributes:
        name: what `retrieval.load` takes to get it again.
        model: in float32, frozen.
        tokenizer: strings -> (N, L) token ids.
        preprocess: how images become pixels.
        config: open_clip's model configuration.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    preprocess: Preprocess
    config: Mapping[str, Any]


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
    if path.suffix not in SUFFIXES:
        raise ModelError(f"unknown kind of weights file {path.name}; valid: {', '.join(SUFFIXES)}")
    try:
        archive = path.suffix != ".safetensors" and is_torchscript(path)
        content = read_torchscript(path) if archive else read_weights(path)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds pickled code or is damaged, and code in weights is never run; "
            "save its state_dict with safetensors instead"
        ) from error
    except TensorFileError as error:
        raise ModelError(f"cannot read weights: {error}") from error
    except Exception as error:  # zipfile and unpickling have their own for damaged files
        raise ModelError(f"cannot read weights from {path}: {one_line(error)}") from error
    tensors = {
        str(key).removeprefix("module."): value
        for key, value in content.items()
        if hasattr(value, "detach")
    }
    if not tensors:
        raise ModelError(f"{path} holds no tensors by name; expected a state_dict")
    return tensors


def read_clip(path: Path) -> ClipWeights:
    """Tensors of a CLIP weights file under OpenAI's names, whatever its layout.

    Raises:
        ModelError: if the file cannot be read, parts are missing, or numbers are not finite.
    """
    try:
        weights = read_layout(read_tensors(path))
    except (LayoutError, RuntimeError) as error:
        raise ModelError(f"{path.name}: {one_line(error)}") from error
    if weights.layout == "transformers" and weights.quick_gelu is None:
        # The tensors do not tell, the file that belongs to them does.
        beside = transformers_architecture(path.parent)
        if beside is not None:
            weights = replace(weights, quick_gelu=beside.quick_gelu)
    for key, value in weights.tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(f"{path.name} is damaged: {key} holds NaN or infinity")
    return weights


def load_architecture(
    architecture: Architecture, checkpoint: str | Path, device: str, name: str | None = None
) -> OpenClip:
    """Fill an architecture with the weights of a local file, in float32.

    Args:
        architecture: from `find_architecture` or `transformers_architecture`.
        checkpoint: a weights file of any CLIP layout, or a directory with one.
        device: torch device.
        name: the name to go by; None makes "architecture:file".

    Raises:
        ModelError: if the file cannot be read, or is not of this architecture.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        path = _weights_of(path)
    weights = read_clip(path)
    _check_quick_gelu(weights, architecture.quick_gelu, architecture.name, path)
    model = architecture.build(initialise=False)
    _fill(model, weights, architecture.name, path)
    return OpenClip(
        name or f"{architecture.name}:{path.resolve()}",
        model.requires_grad_(False).to(device),
        architecture.tokenizer(),
        architecture.preprocess,
        architecture.model,
    )


def load_open_clip(name: str, checkpoint: str | None, device: str) -> OpenClip:
    """Load an open_clip model in float32 with its tokenizer and preprocessing.

    A tag says itself whether its weights want QuickGELU, whatever the architecture's name says
    (open_clip loads 27 of its tags with the wrong activation unless told). A local file in
    open_clip's own layout does not say: then the architecture's name decides, with a warning where
    a "-quickgelu" twin exists.

    Args:
        name: "arch", "arch:tag", "arch:file", "hf-hub:org/name", "local-dir:path" or a directory.
        checkpoint: tag or file, if the name does not carry it.
        device: torch device.

    Raises:
        ModelError: if anything is missing or does not fit.
    """
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
        full = f"{arch}:{source}"
        published = sources_of(source) if source is not None and has_architecture(arch) else None
        if published and is_out_of_reach(published):
            raise ModelError(_AWAY.format(full))
        _check_architecture(arch, source)
    import open_clip

    try:
        with _quiet():
            if source is not None and not open_clip.get_pretrained_cfg(arch, source):
                file = Path(source).expanduser()
                full = f"{arch}:{file.resolve()}"
                if not file.is_file():
                    raise ModelError(f"weights file not found: {file}")
                tokenizer = _tokenizer(arch)  # first, as it is missed sooner than weights are read
                model = _from_file(arch, file)
            else:
                quick_gelu = source is not None and _tag_wants_quick_gelu(arch, source)
                model = local_first(
                    lambda: open_clip.create_model(
                        arch,
                        source,
                        force_quick_gelu=quick_gelu,
                        require_pretrained=True,
                        weights_only=True,
                    )
                )
                tokenizer = _tokenizer(arch)
            config = _config_of(arch)
    except ModelError:
        raise
    except Exception as error:
        # open_clip, huggingface_hub and requests raise a dozen kinds for "cannot get it".
        raise ModelError(_explain(full, error)) from error
    if source is not None and _tag_wants_quick_gelu(arch, source):
        config["quick_gelu"] = True
    visual: Any = model.visual
    model = model.eval().requires_grad_(False).to(device)
    preprocess = Preprocess.from_config(dict(visual.preprocess_cfg))
    return OpenClip(full, model, tokenizer, preprocess, config)


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
        hint = suggest(arch, ["long-eclip-mini", *list_architectures(), *known])
        where = "; `--model list` shows the names, as does retrieval.list_models()"
        raise ModelError(f"unknown model {arch!r}{hint or where}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if source is None:
        raise ModelError(
            f"{arch} needs weights: name a tag ({', '.join(tags[:6]) or 'none published'}) "
            f"or a local file, as in {arch}:{tags[0] if tags else 'FILE'}"
        )
    is_path = Path(source).suffix in SUFFIXES or "/" in source or "\\" in source
    if not is_path and not open_clip.get_pretrained_cfg(arch, source):
        hint = suggest(source, tags) or f"; tags: {', '.join(tags[:8]) or 'none'}"
        raise ModelError(f"{arch} has no weights {source!r}, and no such file exists{hint}")


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"model directory not found: {path}")
    if not (path / _OPEN_CLIP_CONFIG).is_file():
        raise ModelError(f"{path} has no open_clip_config.json: not an open_clip model directory")
    # open_clip would go on with random weights.
    if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in path.iterdir()):
        raise ModelError(f"{path} has no weights (.safetensors, .bin or .pth)")


def _config_of(name: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture, hub id or directory."""
    import open_clip

    config: dict[str, Any] = local_first(lambda: open_clip.get_model_config(name))
    return config


def _tokenizer(name: str) -> Any:
    """The tokenizer of an open_clip architecture, hub id or directory.

    Raises:
        ModelError: if it is another repository's and neither here nor can be fetched.
    """
    import open_clip

    try:
        return local_first(lambda: open_clip.get_tokenizer(name))
    except Exception as error:  # transformers raises a dozen kinds
        wanted = _config_of(name)["text_cfg"].get("hf_tokenizer_name")
        if not wanted:
            raise
        if name.startswith(_DIRECTORY):
            raise ModelError(
                f"{name.removeprefix(_DIRECTORY)} has no tokenizer of {wanted}, which its "
                f"{_OPEN_CLIP_CONFIG} names: put tokenizer.json and tokenizer_config.json into it"
            ) from error
        raise ModelError(
            f"{name} needs the tokenizer of {wanted} beside its weights, and it is not in the "
            f"hub's local cache, nor can it be fetched: run `hf download {wanted} --include "
            "'*.json' '*.model'` once where the hub can be reached"
        ) from error


def transformers_from_hub(name: str) -> Path | None:
    """Local copy of a hub repository in transformers' form; None if it is in open_clip's.

    Args:
        name: "hf-hub:org/name".

    Raises:
        ModelError: if it is neither in the hub's local cache nor can be fetched.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository = name.removeprefix(_HUB)

    def fetch(file: str) -> Path | None:
        try:
            return Path(local_first(lambda: hf_hub_download(repository, file)))
        except LocalEntryNotFoundError:
            raise  # the hub could not be asked
        except EntryNotFoundError:
            return None

    try:
        complete = isinstance(try_to_load_from_cache(repository, "config.json"), str)
        own = try_to_load_from_cache(repository, _OPEN_CLIP_CONFIG)
        if isinstance(own, str) or (not complete and fetch(_OPEN_CLIP_CONFIG)):
            return None
        config = fetch("config.json")
        if config is None or transformers_architecture(config.parent) is None:
            return None
        if fetch("model.safetensors") is None:
            fetch("pytorch_model.bin")
        with contextlib.suppress(LocalEntryNotFoundError):
            fetch("preprocessor_config.json")
    except Exception as error:
        # huggingface_hub and its transport raise a dozen kinds for "cannot get it".
        raise ModelError(_explain(name, error)) from error
    return config.parent


def _tag_wants_quick_gelu(arch: str, tag: str) -> bool:
    import open_clip

    return bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu"))


def _weights_of(folder: Path) -> Path:
    """The weights file of a model directory."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} weights files: name one of them" if files else "no weights file"
    raise ModelError(f"{folder} has {found}; looked for {', '.join(_WEIGHTS)}")


def _from_file(arch: str, path: Path) -> nn.Module:
    """An open_clip architecture with the weights of a file."""
    import open_clip

    weights = read_clip(path)
    quick_gelu = bool((open_clip.get_model_config(arch) or {}).get("quick_gelu"))
    _check_quick_gelu(weights, quick_gelu, arch, path)
    model = open_clip.create_model(arch, load_weights=False, pretrained_text=False)
    if weights.layout == "open_clip":
        if weights.quick_gelu is None:
            _warn_of_quick_gelu(arch, path)
        # open_clip knows a few layouts of its own and of its timm towers.
        tensors = open_clip.factory.convert_state_dict(model, dict(weights.tensors))
        weights = replace(weights, tensors=tensors)
    _fill(model, weights, arch, path)
    return model


def _fill(model: nn.Module, weights: ClipWeights, arch: str, path: Path) -> None:
    """Put weights into a model; everything must be there and fit."""
    import open_clip

    tensors = dict(weights.tensors)
    own = model.state_dict()
    if "positional_embedding" in tensors and "positional_embedding" not in own:
        tensors = open_clip.model.convert_to_custom_text_state_dict(tensors)
    for key in ("logit_scale", "logit_bias"):
        if key in tensors and key in own and tensors[key].numel() == own[key].numel():
            tensors[key] = tensors[key].reshape(own[key].shape)
    if "logit_bias" in own:
        tensors.setdefault("logit_bias", own["logit_bias"] * 0)
    # Old versions of transformers saved a table of 0, 1, 2, ...
    tensors.pop("text.transformer.embeddings.position_ids", None)
    for key, value in tensors.items():
        wanted = tuple(own[key].shape) if key in own else tuple(value.shape)
        if len(wanted) > value.ndim == 2 and value.numel() == own[key].numel():
            tensors[key] = value.reshape(wanted)  # a kernel that was eigen factors
        elif key.endswith("positional_embedding") and tuple(value.shape) != wanted:
            # open_clip itself would stretch position tables to fit and say nothing.
            raise ModelError(
                f"{path.name} does not fit {arch}: {key} is {tuple(value.shape)}, the "
                f"architecture has {wanted}{_explain_positions(key, len(value), wanted[0])}"
            )
    try:
        model.load_state_dict(tensors, strict=True)
    except (RuntimeError, KeyError, AttributeError) as error:
        detail = _key_difference(own, tensors) or one_line(error)
        raise ModelError(f"{path.name} does not fit {arch}: {detail}") from error


def _explain_positions(key: str, given: int, wanted: int) -> str:
    if key.startswith("visual."):
        return "; image size or patch size differ: name another architecture"
    if given == wanted:
        return ""
    remedy = f"an architecture of {given} tokens, or give a file that was trained for {wanted}"
    return f"; the file reads {given} tokens of text, {wanted} were asked for: name {remedy}"


def _check_quick_gelu(weights: ClipWeights, has: bool, arch: str, path: Path) -> None:
    if weights.quick_gelu is None or weights.quick_gelu == has:
        return
    names = ("GELU", "QuickGELU")
    origin = {
        "openai": "it is OpenAI's",
        "long-clip": "Long-CLIP starts from OpenAI's weights",
    }.get(weights.layout, "the config.json beside it says so")
    raise ModelError(
        f"{path.name} was trained with {names[weights.quick_gelu]} ({origin}), but {arch} uses "
        f"{names[has]}; name an architecture with quick_gelu {str(weights.quick_gelu).lower()}"
        + (f", as {arch}-quickgelu" if weights.quick_gelu and "/" not in arch else "")
    )


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
        return _AWAY.format(name)
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
