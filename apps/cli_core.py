"""`enn convert` and `enn fuse`."""

from __future__ import annotations


def convert() -> int:
    """x"""
    return 0


def fuse() -> int:
    """x"""
    return 0
