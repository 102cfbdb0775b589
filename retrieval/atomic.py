"""Files that are complete or not there."""

from enn_core.atomic import replacing

__all__ = ["replacing"]
