"""The brain page itself: its components, what they are wired to, and how it looks.

Its look is that of the search page; each visitor's `Screen` is kept by the browser.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from apps.web.brain import html
from apps.web.brain.handlers import BrainHandlers, Screen, read_screen, write_screen
from apps.web.html import header_html
from apps.web.kept import kept
from apps.web.server import page_id
from apps.web.style import ASSETS, html_block, script, theme

__all__ = ["TITLE", "build", "head", "theme"]

TITLE = "Eigen Brain"


def build(page: BrainHandlers) -> gr.Blocks:
    """The page as Gradio `Blocks`; needs the routes of `apps.web.brain.files` beside it."""
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    latest: dict[str, Any] = {**hidden, "trigger_mode": "always_last", "concurrency_id": "look"}
    every: dict[str, Any] = {**hidden, "trigger_mode": "multiple", "concurrency_id": "teach"}
    youngest, oldest = page.brain.trained_ages
    subtitle = (
        "Predicts age from a T1-weighted scan, and learns from true ages. "
        f"Trained on ages {youngest:.0f} to {oldest:.0f}."
    )

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        screen = kept(Screen(), read_screen, write_screen)
        remembered = gr.Textbox(visible=False)  # session and profile, from the browser's memory
        html_block(
            header_html(TITLE, subtitle, html.LOGO),
            js_on_load=script("header.js"),
            elem_id="enn-header",
        )
        html_block(html.warning_html(), elem_id="enn-warning")
        add = html_block("", js_on_load=script("brain_add.js"), elem_id="enn-add")
        scans = html_block("", js_on_load=script("brain_scans.js"), elem_id="enn-scans")
        with gr.Tabs(elem_id="enn-tabs"):
            with gr.Tab("Scan", id="scan"):
                with gr.Row(elem_id="enn-desk"):
                    with gr.Column(scale=6, min_width=300, elem_id="enn-left"):
                        viewer = html_block(
                            html.viewer_html(),
                            js_on_load=script("brain_viewer.js"),
                            elem_id="enn-viewer",
                        )
                    with gr.Column(scale=5, min_width=300, elem_id="enn-right"):
                        stage = html_block(
                            html.empty_html(),
                            js_on_load=script("brain_stage.js"),
                            elem_id="enn-stage",
                        )
                        form = html_block(
                            "", js_on_load=script("brain_form.js"), elem_id="enn-form"
                        )
                        lesson = html_block(
                            "", js_on_load=script("brain_lesson.js"), elem_id="enn-lesson-box"
                        )
                quality = html_block("", elem_id="enn-quality")
            with gr.Tab("All scans", id="all"):
                table = html_block("", js_on_load=script("brain_table.js"), elem_id="enn-all")
            with gr.Tab("Site profiles", id="taught"):
                taught = html_block("", js_on_load=script("taught.js"), elem_id="enn-site")
        timer = gr.Timer(0.6, active=False)

        shown = [scans, stage, quality, form, lesson, table, taught, timer, screen]
        add.added(page.added, screen, shown, **every)
        add.sample(page.sample, screen, shown, **every)
        scans.choose(page.choose, screen, shown, **latest)
        scans.remove(page.remove, screen, shown, **every)
        form.gap(page.gap, screen, shown, **every)
        form.preview(page.preview, screen, shown, **latest)
        lesson.accept(page.accept, screen, shown, **every)
        lesson.undo(page.undo, screen, shown, **every)
        lesson.dismiss(page.show, screen, shown, **every)
        taught.undo(page.undo, screen, shown, **every)
        taught.forget(page.forget, screen, shown, **every)
        taught.imported(page.imported, screen, shown, **every)
        table.clear(page.clear, screen, shown, **every)
        taught.choose(page.profile, screen, shown, **latest)
        viewer.explain(page.explain, screen, shown, **latest)
        timer.tick(page.tick, screen, shown, **hidden)
        blocks.load(
            page.open,
            [remembered, screen],
            [add, *shown],
            js="(_, screen) => [window.ennBrain.remembered(), screen]",
            **hidden,
        )
    blocks.app_id = page_id(page.brain.sha256)
    blocks.queue(max_size=128, default_concurrency_limit=4, api_open=False)
    return blocks


def head() -> str:
    """Styles and scripts for the document's head."""
    styles = "".join((ASSETS / name).read_text("utf-8") for name in ("search.css", "brain.css"))
    return "".join(
        (
            '<meta name="color-scheme" content="light dark">',
            f"<style>{styles}</style>",
            f"<script>{script('page.js')}</script><script>{script('brain.js')}</script>",
        )
    )
