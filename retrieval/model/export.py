"""A model as plain files for other programs: open_clip, transformers, ONNX.

Eigen factors are multiplied out, Long-CLIP's two position tables are one: what is written needs
nothing of this package.

>>> import retrieval                                                 # doctest: +SKIP
>>> from retrieval.model.export import export                              # doctest: +SKIP
>>> model = retrieval.load("long-eclip-b16:longclip-B.pt")           # doctest: +SKIP
>>> export(model, "longclip-b16", "transformers")                    # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from enn_core.files.atomic import new_folder
from enn_core.files.tensors import write_tensors
from retrieval.model.checkpoints import ModelError, OpenClip, one_line
from retrieval.model.clip_layouts import tensor_names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from retrieval.model.retrieval_model import RetrievalModel

__all__ = ["FORMS", "check_target", "export"]

# Largest difference of an ONNX tower's unit vectors from torch's.
_TOLERANCE = 1e-4


def export(model: RetrievalModel, folder: str | os.PathLike[str], form: str = "open_clip") -> Path:
    """Write a model as plain files.

    Forms:
        open_clip: `open_clip_config.json` and `open_clip_model.safetensors`; loads with
            `open_clip.create_model("local-dir:FOLDER")` and with `retrieval.load(FOLDER)`.
        transformers: a `CLIPModel` with image processor and tokenizer.
        onnx: `image.onnx` (`pixels`, uint8 (N, height, width, 3), resized and cropped -> unit
            `image_embeds`) and `text.onnx` (`tokens`, int64 (N, L), L up to the context, each row
            ending in end-of-text, zeros behind it -> unit `text_embeds`), compared with torch
            before they are kept; `config.json` and the tokenizer's files. Needs the extra `onnx`.

    Args:
        model: with a CLIP network: not the shipped mini.
        folder: to be made; an existing one must be empty.
        form: one of `FORMS`.

    Returns:
        The folder.

    Raises:
        ModelError: if the model has no such form, the folder is not empty, or a package is missing.
        OSError: if it cannot be written; then nothing is left.
    """
    if form not in FORMS:
        raise ModelError(f"unknown form {form!r}; valid: {', '.join(FORMS)}")
    if model.clip is None:
        raise ModelError(f"{model.name} is no CLIP network: there is no plain form of it")
    target = check_target(folder)
    with new_folder(target) as new:
        FORMS[form](model.clip, new)
        if target.is_dir():
            target.rmdir()
    return target


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder that `export` would make.

    Raises:
        ModelError: if there is something already.
    """
    target = Path(folder).expanduser()
    if target.is_dir() and any(target.iterdir()):
        raise ModelError(f"{target} holds files already; name a new folder")
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target} is a file; name a new folder")
    return target


def _open_clip(clip: OpenClip, folder: Path) -> None:
    from dataclasses import asdict

    preprocess = asdict(clip.preprocess)
    preprocess["resize_mode"] = preprocess.pop("mode")
    preprocess["fill_color"] = preprocess.pop("fill")
    config = {"model_cfg": clip.config, "preprocess_cfg": preprocess}
    _write_json(folder / "open_clip_config.json", config)
    write_tensors(folder / "open_clip_model.safetensors", clip.model.state_dict())


def _transformers(clip: OpenClip, folder: Path) -> None:
    config = _transformers_config(clip)
    image, text = config["vision_config"], config["text_config"]
    given = clip.model.state_dict()
    tensors: dict[str, Tensor] = {}
    for clip_name, others, transposed in tensor_names(
        image["num_hidden_layers"], text["num_hidden_layers"]
    ):
        value = given.pop(clip_name, None)
        if value is None:
            raise ModelError(f"{clip.name} has no {clip_name}: it is no CLIPModel of transformers")
        value = value.mT if transposed else value
        tensors.update(
            zip(others, value.chunk(len(others)) if others[1:] else [value], strict=True)
        )
    if given:
        raise ModelError(f"{clip.name} has {next(iter(given))}: it is no CLIPModel of transformers")
    height, width = clip.preprocess.size
    if clip.preprocess.mode != "shortest":
        raise ModelError(
            f"{clip.name} resizes by {clip.preprocess.mode!r}, which transformers' CLIP does not"
        )
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": min(height, width)},
            "resample": {"lanczos": 1, "bilinear": 2, "bicubic": 3}[clip.preprocess.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(clip.preprocess.mean),
            "image_std": list(clip.preprocess.std),
        },
    )
    _write_tokenizer(clip, folder)
    write_tensors(folder / "model.safetensors", tensors)


def _transformers_config(clip: OpenClip) -> dict[str, Any]:
    image, text = clip.config["vision_cfg"], clip.config["text_cfg"]
    model: Any = clip.model
    act = "quick_gelu" if clip.config.get("quick_gelu") else "gelu"
    try:
        width, depth = image.get("width", 768), int(image.get("layers", 12))
    except TypeError:
        raise ModelError(
            f"{clip.name} has a ResNet image tower: it is no CLIPModel of transformers"
        ) from None
    if "timm_model_name" in image or not hasattr(model, "transformer"):
        raise ModelError(f"{clip.name} has towers of other kinds: it is no CLIPModel")
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": clip.config["embed_dim"],
        "dtype": "float32",
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_act": act,
            "hidden_size": text.get("width", 512),
            "intermediate_size": int(text.get("width", 512) * text.get("mlp_ratio", 4.0)),
            "num_attention_heads": text.get("heads", 8),
            "num_hidden_layers": text.get("layers", 12),
            "max_position_embeddings": model.context_length,
            "layer_norm_eps": model.ln_final.eps,
            "vocab_size": model.vocab_size,
            # Not the tokens of older files (0 and 2): those make transformers pool elsewhere.
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": act,
            "hidden_size": width,
            "intermediate_size": int(width * image.get("mlp_ratio", 4.0)),
            "num_attention_heads": width // image.get("head_width", 64),
            "num_hidden_layers": depth,
            "image_size": image.get("image_size", 224),
            "patch_size": image.get("patch_size", 16),
            "layer_norm_eps": model.visual.ln_post.eps,
        },
    }


def _write_tokenizer(clip: OpenClip, folder: Path) -> None:
    """CLIP's tokenizer in transformers' files; its special tokens have other names there."""
    tokenizer = clip.tokenizer
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = {names.get(word, word): number for word, number in tokenizer.encoder.items()}
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)])
    (folder / "merges.txt").write_text(f"{merges}\n", encoding="utf-8")
    _write_json(folder / "vocab.json", words)
    start, end = names.values()
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **special}
    _write_json(
        folder / "tokenizer_config.json", {**config, "model_max_length": tokenizer.context_length}
    )


def _onnx(clip: OpenClip, folder: Path) -> None:
    import torch

    from retrieval.model.clip_towers import CausalText, PixelTower

    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise ModelError(
                f"export to ONNX needs {package}: pip install 'eigen-suite[onnx]' ({error})"
            ) from error
    if not CausalText.fits(clip.model):
        raise ModelError(f"{clip.name} has another text tower than CLIP's own: no ONNX form of it")
    model: Any = clip.model
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ModelError(f"export to ONNX runs on the CPU: load the model there, not on {device}")
    rng = np.random.default_rng(0)
    height, width = clip.preprocess.size
    pixels = rng.integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    tokens = clip.tokenizer(["a dog", "two red cars in the street at night", "word " * 500])
    short = tokens[:2, :16]
    _write_onnx(
        _unit(PixelTower(model.visual, clip.preprocess)),
        folder / "image.onnx",
        ("pixels", "image_embeds"),
        torch.from_numpy(pixels[:2]),
        {0: torch.export.Dim("images")},
        [torch.from_numpy(pixels)],
    )
    _write_onnx(
        CausalText(model),
        folder / "text.onnx",
        ("tokens", "text_embeds"),
        short,
        {0: torch.export.Dim("texts"), 1: torch.export.Dim("length", max=model.context_length)},
        [tokens, short[:1]],
    )
    _write_tokenizer(clip, folder)
    from dataclasses import asdict

    _write_json(
        folder / "config.json",
        {
            "model": clip.name,
            "context_length": model.context_length,
            "preprocess": {k: v for k, v in asdict(clip.preprocess).items() if k not in _INSIDE},
        },
    )


# What the exported graph does itself.
_INSIDE = ("mean", "std")


def _unit(tower: nn.Module) -> nn.Module:
    from torch import nn

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, pixels: Tensor) -> Tensor:
            return nn.functional.normalize(self.tower(pixels), dim=-1)

    return Unit().eval()


def _write_onnx(
    tower: nn.Module,
    path: Path,
    names: tuple[str, str],
    example: Tensor,
    dynamic: dict[int, Any],
    probes: list[Tensor],
) -> None:
    import onnxruntime
    import torch

    # Fused attention has no counterpart in ONNX.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                tower,
                (example,),
                dynamo=True,
                input_names=[names[0]],
                output_names=[names[1]],
                dynamic_shapes=(dynamic,),
                verbose=False,
            )
            if program is None:
                raise ModelError(f"torch gave no ONNX program for {path.stem}")
            program.save(path)
            expected = [tower(probe).numpy() for probe in probes]
    except ModelError:
        raise
    except Exception as error:
        # The exporter has a dozen kinds of errors of its own.
        raise ModelError(f"the {path.stem} tower cannot be exported: {one_line(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        got = [session.run([names[1]], {names[0]: probe.numpy()})[0] for probe in probes]
    except Exception as error:
        # onnxruntime's errors share no base class.
        raise ModelError(f"onnxruntime cannot run {path.name}: {one_line(error)}") from error
    for ours, wanted in zip(got, expected, strict=True):
        difference = float(np.abs(ours - wanted).max())
        if not difference <= _TOLERANCE:
            raise ModelError(f"{path.name} differs from torch by {difference:.1e}: it was not kept")


FORMS: dict[str, Callable[[OpenClip, Path], None]] = {
    "open_clip": _open_clip,
    "transformers": _transformers,
    "onnx": _onnx,
}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter reports its steps on the root logger; its result is checked instead."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
