"""What a `with` block closes."""

from __future__ import annotations

from typing import Self

__all__ = ["Closing"]


class Closing:
    """Has a method `close`, which the end of a `with` block calls."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
