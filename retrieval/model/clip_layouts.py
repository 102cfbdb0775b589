"""How published CLIP checkpoints name their tensors, and the one form that is loaded.

Everything becomes OpenAI's names, which are open_clip's too. Read are

- OpenAI's own files, told by the scalars `input_resolution`, `context_length`, `vocab_size`;
- Long-CLIP: OpenAI's names with a second position table, `positional_embedding_res`;
- transformers' `CLIPModel`;
- eigen factors, `layer.Q`, `layer.Lambda`, `layer.P` in place of `layer.weight`, within any of
  these; with q, k and v apart (`attn.q_proj`) or packed.

Names that belong to none of these are passed on as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ClipWeights",
    "LayoutError",
    "TensorName",
    "read_layout",
    "stretch_positions",
    "tensor_names",
]

# Long-CLIP keeps the first 20 positions of CLIP's 77 and stretches the others four times.
KEPT = 20
STRETCH = 4

# The stretch is computed in float16, whose steps are 2^-11 of a value; three are added up.
_HALF_PRECISION = 4e-3

_OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")
_PARTS = ("weight", "bias")
_FACTORS = ("Q", "Lambda", "P")
_EIGEN_SUFFIX = "_eigen"

# Maps that CLIP keeps as bare parameters, to be multiplied from the right.
_BARE = ("visual.proj", "text_projection")


class LayoutError(ValueError):
    """Tensors that are no whole checkpoint; one line without the file's name."""


@dataclass(frozen=True)
class ClipWeights:
    """Tensors under OpenAI's names.

    Attributes:
        tensors: by name.
            What were eigen factors are matrices (out, rest), also where the network has a
            convolution kernel.
        layout: "openai", "long-clip", "transformers" or "open_clip"; the last also stands for
            whatever was not recognised.
        quick_gelu: True where the layout says so; None where it does not.
    """

    tensors: dict[str, Tensor]
    layout: str
    quick_gelu: bool | None

    @property
    def context_length(self) -> int | None:
        """Tokens of a text that the file's text tower reads; None if it is no CLIP's."""
        for key in ("positional_embedding", "text.positional_embedding"):
            if key in self.tensors and self.tensors[key].ndim == 2:
                return len(self.tensors[key])
        return None


class TensorName(NamedTuple):
    """One tensor under both names.

    Attributes:
        clip: OpenAI's and open_clip's name.
        transformers: CLIPModel's; three (q, k, v) where they are packed in one.
        transposed: stored as the transpose of transformers' tensor.
    """

    clip: str
    transformers: tuple[str, ...]
    transposed: bool = False


def tensor_names(image_layers: int, text_layers: int) -> Iterator[TensorName]:
    """All tensors of a CLIP with a ViT image tower."""
    yield TensorName("logit_scale", ("logit_scale",))
    yield TensorName("visual.proj", ("visual_projection.weight",), True)
    yield TensorName("text_projection", ("text_projection.weight",), True)
    image, text = "vision_model.", "text_model."
    yield TensorName("visual.class_embedding", (f"{image}embeddings.class_embedding",))
    yield TensorName("visual.conv1.weight", (f"{image}embeddings.patch_embedding.weight",))
    for clip, other in (("visual.", image), ("", text)):
        table = f"{other}embeddings.position_embedding.weight"
        yield TensorName(f"{clip}positional_embedding", (table,))
    yield TensorName("token_embedding.weight", (f"{text}embeddings.token_embedding.weight",))
    for part in _PARTS:
        yield TensorName(
            f"visual.ln_pre.{part}", (f"{image}pre_layrnorm.{part}",)
        )  # their spelling
        yield TensorName(f"visual.ln_post.{part}", (f"{image}post_layernorm.{part}",))
        yield TensorName(f"ln_final.{part}", (f"{text}final_layer_norm.{part}",))
    for clip, other, layers in (("visual.", image, image_layers), ("", text, text_layers)):
        for i in range(layers):
            block, layer = f"{clip}transformer.resblocks.{i}.", f"{other}encoder.layers.{i}."
            for part in _PARTS:
                packed = tuple(f"{layer}self_attn.{which}_proj.{part}" for which in "qkv")
                yield TensorName(f"{block}attn.in_proj_{part}", packed)
                for ours, theirs in _BLOCK:
                    yield TensorName(f"{block}{ours}.{part}", (f"{layer}{theirs}.{part}",))


_BLOCK = (
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def read_layout(given: Mapping[str, Tensor]) -> ClipWeights:
    """Bring a checkpoint's tensors under OpenAI's names.

    Raises:
        LayoutError: if parts are missing, or do not fit each other.
    """
    tensors = dict(given)
    transformers = any(key.startswith(("vision_model.", "text_model.")) for key in tensors)
    _fuse_factors(tensors, bare=() if transformers else _BARE)
    layout = "open_clip"
    quick_gelu: bool | None = None
    if transformers:
        tensors = _from_transformers(tensors)
        layout = "transformers"
    elif any(key in tensors and tensors[key].ndim == 0 for key in _OPENAI_SCALARS):
        for key in _OPENAI_SCALARS:
            tensors.pop(key, None)
        layout, quick_gelu = "openai", True
    _pack_attention(tensors)
    if "positional_embedding_res" in tensors:
        _fold_positions(tensors)
        # Long-CLIP starts from OpenAI's weights, there are no others of it.
        layout, quick_gelu = "long-clip", True
    elif _is_start_of_long_clip(tensors.get("positional_embedding")):
        raise LayoutError(
            "positional_embedding_res is missing: positional_embedding alone is the table that "
            "Long-CLIP's training starts from; take the file as published"
        )
    return ClipWeights(tensors, layout, quick_gelu)


def stretch_positions(table: Tensor) -> Tensor:
    """CLIP's position table for longer texts, as Long-CLIP's training starts.

    The first 20 rows stay; between every two of the others three are interpolated, the last row
    goes on with the step before it. 77 positions become 248.

    Args:
        table: (L, width), L >= 22.

    Returns:
        (20 + 4 (L - 20), width).
    """
    import torch

    tail = table[KEPT:]
    steps = torch.cat([tail[1:] - tail[:-1], tail[-1:] - tail[-2:-1]])
    between = torch.arange(STRETCH, device=table.device, dtype=table.dtype) / STRETCH
    rows = tail[:, None] + between[:, None] * steps[:, None]
    return torch.cat([table[:KEPT], rows.flatten(0, 1)])


def _fold_positions(tensors: dict[str, Tensor]) -> None:
    """Long-CLIP's two tables as one: the first 20 rows of one, the rest of the other."""
    import torch

    trained = tensors.pop("positional_embedding_res")
    kept = tensors.get("positional_embedding")
    if kept is None:
        raise LayoutError(
            "positional_embedding_res is there, but positional_embedding with its first "
            f"{KEPT} rows is missing"
        )
    if kept.shape != trained.shape or kept.ndim != 2 or len(kept) <= KEPT:
        raise LayoutError(
            f"positional_embedding is {tuple(kept.shape)} and positional_embedding_res "
            f"{tuple(trained.shape)}; both must be (tokens, width) with more than {KEPT} tokens"
        )
    tensors["positional_embedding"] = torch.cat([kept[:KEPT], trained[KEPT:].to(kept.dtype)])


def _is_start_of_long_clip(table: Tensor | None) -> bool:
    """Whether a table is a stretched one that was not trained since, to half precision."""
    if table is None or table.ndim != 2 or not table.is_floating_point():
        return False
    # Fewer rows are too few to tell: any two make a line.
    if len(table) < KEPT + 3 * STRETCH or (len(table) - KEPT) % STRETCH:
        return False
    import torch

    table = table.float()
    scale = table[KEPT:].abs().max()
    if (table[KEPT + 1 :] - table[KEPT:-1]).abs().max() <= 1e-2 * scale:
        return False  # nearly constant: a line of any kind
    source = torch.cat([table[:KEPT], table[KEPT::STRETCH]])
    return bool((stretch_positions(source) - table).abs().max() <= _HALF_PRECISION * scale)


def _fuse_factors(tensors: dict[str, Tensor], bare: tuple[str, ...]) -> None:
    """Multiply eigen factors out, in float64."""
    import torch

    for key in [key for key in tensors if key.endswith(".Lambda")]:
        prefix = key.removesuffix(".Lambda")
        missing = [name for name in _FACTORS if f"{prefix}.{name}" not in tensors]
        if missing:
            raise LayoutError(f"{prefix} has Lambda, but {' and '.join(missing)} is missing")
        Q, scale, P = (tensors.pop(f"{prefix}.{name}") for name in _FACTORS)
        fits = Q.ndim == P.ndim == scale.ndim + 1 and Q.ndim in (2, 3)
        if not fits or not Q.shape[-1] == scale.shape[-1] == P.shape[-1]:
            raise LayoutError(
                f"factors of {prefix} do not fit each other: Q {tuple(Q.shape)}, "
                f"Lambda {tuple(scale.shape)}, P {tuple(P.shape)}"
            )
        dtype = torch.promote_types(Q.dtype, torch.float32)
        dense = (Q.double() * scale.double().unsqueeze(-2)) @ P.double().mT
        dense = dense.flatten(0, -2).to(dtype)
        name = prefix.removesuffix(_EIGEN_SUFFIX)
        if name in bare:
            dense = dense.mT
        elif name == prefix:
            name = f"{prefix}.weight"
        tensors[name] = dense.contiguous()


_SPLIT = re.compile(r"((?:visual\.)?transformer\.resblocks\.\d+\.attn\.)q_proj\.(weight|bias)")


def _pack_attention(tensors: dict[str, Tensor]) -> None:
    """q, k and v under names of their own become CLIP's packed tensor."""
    import torch

    for match in [match for key in tensors if (match := _SPLIT.fullmatch(key))]:
        block, part = match.groups()
        names = [f"{block}{which}_proj.{part}" for which in "qkv"]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise LayoutError(f"{names[0]} is there, but {missing[0]} is missing")
        tensors[f"{block}in_proj_{part}"] = torch.cat([tensors.pop(name) for name in names])


_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.")


def _from_transformers(given: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    # Tables of 0, 1, 2, ... that older versions saved.
    rest = {key: value for key, value in given.items() if not key.endswith(".position_ids")}
    depth = {"vision": 0, "text": 0}
    for match in filter(None, map(_LAYER.match, rest)):
        depth[match[1]] = max(depth[match[1]], int(match[2]) + 1)
    for side, prefix in (("image", "vision_model."), ("text", "text_model.")):
        if not any(key.startswith(prefix) for key in rest):
            raise LayoutError(f"it has no {side} tower ({prefix}*): expected a whole CLIPModel")
    tensors, missing = {}, []
    for clip, others, transposed in tensor_names(depth["vision"], depth["text"]):
        parts = [rest.pop(name) for name in others if name in rest]
        if len(parts) < len(others):
            missing += [name for name in others if name not in given]
            continue
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensors[clip] = value.mT.contiguous() if transposed else value
    problems = [
        f"{label} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
        for label, names in (("missing", missing), ("unexpected", list(rest)))
        if names
    ]
    if problems:
        raise LayoutError(f"it is no whole CLIPModel: {'; '.join(problems)}")
    return tensors
