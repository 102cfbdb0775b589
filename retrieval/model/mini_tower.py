"""The network of `long-eclip-mini`: an EfficientNet-Lite0 image tower beside a MiniLM text tower.

Image: pixels -> EfficientNet-Lite0 (timm) -> LayerNorm -> Linear -> GELU = features `x`, then the
last, linear map `z = W x + b` into the joint space. Text: the frozen MiniLM embedding, centred on
the mean training caption, through one linear map into the joint space. Every linear map and
pointwise convolution of the image tower is an eigen layer while it trains; the shipped file holds
the fused (plain) weights, which `enn_core.to_enn` factors again, exactly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from retrieval.model.minilm_tower import MiniLMTower

__all__ = ["MiniTower", "fold_batchnorm"]


class MiniTower(MiniLMTower):
    """Image tower and text map of `long-eclip-mini`; see `MiniLMTower`.

    Args:
        hidden: width of the features `x` that the last map reads.
        dim: size of the joint space.
        dropout: on the features, while training.
    """

    def __init__(self, hidden: int = 1024, dim: int = 384, dropout: float = 0.0) -> None:
        super().__init__()
        import timm  # seconds to import, and needed by this model alone

        backbone: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        fold_batchnorm(backbone)
        width: int = backbone.num_features
        self.backbone = backbone
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.proj = nn.Linear(hidden, dim)
        self.add_text_map(dim)

    def head(self, pooled: Tensor) -> Tensor:
        """Pooled backbone features (N, 1280) -> features `x` (N, hidden)."""
        return self.dropout(F.gelu(self.hidden(self.norm(pooled))))

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in 0..255 -> features `x` (N, hidden)."""
        return self.head(self.backbone(pixels / 127.5 - 1.0))


def fold_batchnorm(backbone: nn.Module) -> None:
    """Fold each BatchNorm of a timm EfficientNet into the convolution before it, in place.

    The eigen factors are then those of the map that the network really applies, and training and
    inference both skip the normalisation. Uses the running statistics, as `eval()` would.
    """
    for owner in [backbone, *backbone.modules()]:
        children = dict(owner.named_children())
        # timm names them in the order in which they run: conv_stem, bn1; conv_pw, bn1, conv_dw, ...
        previous: str | None = None
        for name, child in children.items():
            if isinstance(child, nn.Conv2d):
                previous = name
            elif isinstance(child, nn.BatchNorm2d) and previous is not None:
                conv: Any = children[previous]
                setattr(owner, previous, fuse_conv_bn_eval(conv.eval(), child.eval()))
                setattr(owner, name, getattr(child, "act", nn.Identity()))
                previous = None
