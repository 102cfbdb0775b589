"""How our web pages look, and their smallest parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

__all__ = ["ASSETS", "html_block", "script", "theme"]

ASSETS = Path(__file__).parent / "assets"


def html_block(value: str, **options: Any) -> gr.HTML:
    """A component that shows our own HTML, without Gradio's styles for running text."""
    return gr.HTML(value, apply_default_css=False, **options)


def script(name: str) -> str:
    """A file of `apps/web/assets`."""
    return (ASSETS / name).read_text("utf-8")


def theme() -> gr.themes.Base:
    """System fonts and two hues; nothing is loaded from elsewhere."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    # `Font` names what the system has; a plain string would make Gradio look for a web font.
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=[gr.themes.Font(name) for name in sans],
        font_mono=[gr.themes.Font(name) for name in mono],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        # Gradio's own grey for secondary text is too pale to read on white.
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )
