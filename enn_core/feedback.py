"""The public names of `enn_core.lessons`, where they have been importable since version 0.1."""

from enn_core.lessons import *  # noqa: F403
from enn_core.lessons import __all__ as __all__
