"""Towers taken apart: pixels in, inputs of the last linear map out, and that map; tokens in, text
vectors out, without the padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retrieval.eigen_coordinates import EigenBasis
from retrieval.model.preprocess import Preprocess

__all__ = ["CausalText", "OneToken", "PixelTower", "linear_basis", "split_final_map"]


class PixelTower(nn.Module):
    """An image tower that takes bytes: uint8 (N, H, W, 3) -> float32 (N, n)."""

    def __init__(
        self,
        tower: nn.Module,
        preprocess: Preprocess | None,
        run: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Wrap a tower.

        Args:
            tower: the module that owns the weights.
            preprocess: whose mean and std to apply; None leaves pixels in 0..255.
            run: what of the tower to call with (N, 3, H, W), by default the tower itself.
        """
        super().__init__()
        self.scale: Tensor
        self.shift: Tensor
        self.tower = tower
        self._run = tower if run is None else run
        mean = (0.0,) * 3 if preprocess is None else preprocess.mean
        std = (1 / 255,) * 3 if preprocess is None else preprocess.std
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", scale.float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scale and normalise in float32, run in the weights' type."""
        x = pixels.permute(0, 3, 1, 2).float() * self.scale - self.shift
        out = self._run(x.to(next(self.tower.parameters()).dtype))
        return out[0] if isinstance(out, tuple) else out


class CausalText(nn.Module):
    """CLIP's own text tower, for token rows of any length up to its context.

    It is causal and reads its answer at the end-of-text token, so what follows that token changes
    nothing: rows may be cut behind it, exactly. A ten-word query costs an eighth of 77 tokens.
    The last block is computed for that token alone (`OneToken`).
    """

    def __init__(self, model: nn.Module) -> None:
        """model is open_clip's whole model; see `fits`."""
        super().__init__()
        self.tower: Any = _text_part(model)
        transformer = self.tower.transformer
        self._one = OneToken(transformer) if OneToken.fits(transformer) else None
        self.eval().requires_grad_(False)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether a model's text tower is of this kind."""
        tower = _text_part(model)
        causal = getattr(tower, "attn_mask", None) is not None
        pool = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
        return causal and pool == "argmax" and getattr(tower, "cls_emb", None) is None

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L) token ids -> (N, d) unit vectors, float32; the largest id ends the text."""
        tower, length = self.tower, tokens.shape[1]
        x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
        mask, ends = tower.attn_mask[:length, :length], tokens.argmax(dim=-1)
        if self._one is not None:
            x = self._one(x, mask, ends)
        else:
            x = tower.transformer(x, attn_mask=mask)
            # shape[0], not len: tracers keep it as the variable that it is.
            x = x[torch.arange(tokens.shape[0], device=x.device), ends]
        x = tower.ln_final(x)
        projection = tower.text_projection
        if projection is not None:
            x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
        return nn.functional.normalize(x.float(), dim=-1)


class OneToken(nn.Module):
    """A transformer of which one token of each row is read.

    In the last block all tokens need keys and values, but only that one a query, the output map
    and the MLP: five sixths of the block's products are left out, with the same answer.
    """

    def __init__(self, transformer: Any) -> None:
        """transformer is open_clip's `Transformer`; see `fits`. Shares its blocks."""
        super().__init__()
        self.resblocks: Any = transformer.resblocks

    @staticmethod
    def fits(transformer: Any) -> bool:
        """Whether a transformer is of the plain kind: one sort of block, rows first."""
        from open_clip.transformer import ResidualAttentionBlock, Transformer

        return (
            type(transformer) is Transformer
            and transformer.batch_first
            and len(transformer.resblocks) > 0
            and type(transformer.resblocks[-1]) is ResidualAttentionBlock
            and not hasattr(transformer.resblocks[-1], "ln_1_kv")
        )

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """Run the blocks.

        Args:
            x: (N, L, width).
            attn_mask: (L, L), added to the products of queries and keys; causal if `at` is given.
            at: (N,) which token of each row is read; later ones are hidden from it. None: the
                first, which sees all.

        Returns:
            (N, width) what `at` asks for; without it (N, 1, width), as `VisionTransformer` pools.
        """
        for block in self.resblocks[:-1]:
            x = block(x, attn_mask=attn_mask)
        last = self.resblocks[-1]
        keys, later = last.ln_1(x), None
        if at is None:
            own, query = x[:, :1], keys[:, :1]
        else:
            # shape[0], not len: tracers keep it as the variable that it is.
            rows = torch.arange(x.shape[0], device=x.device)
            own, query = x[rows, at][:, None], keys[rows, at][:, None]
            later = torch.arange(x.shape[1], device=x.device)[None, :] > at[:, None]
        seen = last.attn(query, keys, keys, key_padding_mask=later, need_weights=False)[0]
        own = own + last.ls_1(seen)
        own = own + last.ls_2(last.mlp(last.ln_2(own)))
        return own if at is None else own[:, 0]


def _text_part(model: Any) -> Any:
    """The module with the text tower's weights: a part of its own in some of open_clip's models."""
    return getattr(model, "text", model)


def linear_basis(layer: nn.Linear) -> EigenBasis:
    """Basis of a plain linear layer."""
    return EigenBasis.from_weight(layer.weight, layer.bias)


def split_final_map(visual: Any) -> tuple[nn.Module, EigenBasis | None]:
    """Split an open_clip image tower before its last linear map.

    Known ends: VisionTransformer's bare `proj`, ModifiedResNet's attention pool, TimmModel's
    linear or MLP head. The tower passed in is not changed; the split one shares its weights.

    Returns:
        The tower without its last map, and that map; or the whole tower and None where the last
        step is not linear.
    """
    headless = _twin(visual)
    proj = getattr(visual, "proj", None)
    if isinstance(proj, nn.Parameter):
        headless._parameters["proj"] = None
        if _reads_class_token(headless):
            headless.transformer = OneToken(headless.transformer)
        return headless, EigenBasis.from_weight(proj.detach().T)
    pool: Any = getattr(visual, "attnpool", None)
    if isinstance(getattr(pool, "c_proj", None), nn.Linear):
        # The pool's code reads c_proj's weight, so it becomes the identity instead of going.
        headless.attnpool = _twin(pool)
        width = pool.c_proj.in_features
        headless.attnpool.c_proj = nn.Linear(width, width)
        nn.init.eye_(headless.attnpool.c_proj.weight)
        nn.init.zeros_(headless.attnpool.c_proj.bias)
        return headless, linear_basis(pool.c_proj)
    head: Any = getattr(visual, "head", None)
    if isinstance(head, nn.Sequential) and len(head):
        last = next(reversed(head._modules))
        layer: Any = head._modules[last]
        if isinstance(layer, nn.Linear):
            headless.head = _twin(head)
            headless.head._modules[last] = nn.Identity()
            return headless, linear_basis(layer)
        if last == "mlp" and isinstance(getattr(layer, "fc2", None), nn.Linear):
            headless.head = _twin(head)
            headless.head._modules[last] = _twin(layer)
            headless.head._modules[last].fc2 = nn.Identity()
            return headless, linear_basis(layer.fc2)
    return visual, None


def _reads_class_token(visual: Any) -> bool:
    """Whether an open_clip `VisionTransformer` answers by its first token alone."""
    return (
        getattr(visual, "pool_type", None) == "tok"
        and visual.attn_pool is None
        and not visual.output_tokens
        and OneToken.fits(visual.transformer)
    )


def _twin(module: Any) -> Any:
    """The same module with its own tables of parameters and children, sharing all of them."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin
