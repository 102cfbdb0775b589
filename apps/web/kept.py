"""Values of a page that its browser keeps between two acts, instead of the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from enn_core.lessons.places import DEFAULT, ProfileError, check_name

__all__ = ["kept", "read_object", "read_profile"]

T = TypeVar("T")

MOST_CHARACTERS = 2**16


def kept(first: T, read: Callable[[object], T], write: Callable[[T], str]) -> gr.Textbox:
    """A component that is not seen, whose value handlers take and give like `gr.State`.

    Gradio frees a `gr.State` when its tab is closed, and holds a connection of every open tab to
    know. What browsers keep needs neither, and outlives the server; but anybody may send anything.

    Args:
        first: value of a page that is new.
        read: a value from a text that `write` wrote, or that anybody made up; never raises.
        write: a value as text.
    """
    box = gr.Textbox(write(first), visible=False)
    # A class of its own would have to be known to the browser's side.
    methods: dict[str, Any] = {"preprocess": read, "postprocess": write}
    for name, method in methods.items():
        setattr(box, name, method)
    return box


def read_object(text: object) -> dict[str, Any]:
    """A JSON object that a stranger sent; empty if it is none, or far too large."""
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_profile(name: Any) -> str:
    """A profile's name that a browser remembers; the usual one for what cannot be one."""
    try:
        return check_name(name)
    except ProfileError:
        return DEFAULT
