"""The search page itself: its components, what they are wired to, and how it looks.

`build` makes Gradio `Blocks` for collections that are open already. Each visitor's `Screen` is kept
by the browser; what the handlers hold is shared by all visitors and only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web import limits
from apps.web.html import header_html
from apps.web.kept import kept
from apps.web.search import html
from apps.web.search.api import add_api
from apps.web.search.collection import Collection
from apps.web.search.handlers import Query, Screen
from apps.web.search.kept_screen import read_query, read_screen, write
from apps.web.search.pictures import Pictures, Uploads
from apps.web.search.taught_handlers import TaughtHandlers
from apps.web.server import page_id
from apps.web.style import ASSETS, html_block, script, theme
from retrieval.teach.profiles import DEFAULT

if TYPE_CHECKING:
    from apps.web.visitors import Shelf
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.teach.teacher import Teacher

__all__ = ["CAPTIONS", "EXAMPLES", "TITLE", "build", "head", "theme"]

TITLE = "Eigen Search"

COUNTS = (12, 24, 48, 96, 192)

EXAMPLES: tuple[str, ...] = (
    "a dog in the snow",
    "boats on the water",
    "flowers",
    "people playing music",
    "an old building",
    "something to eat",
    "a red car",
    "mountains at sunset",
)

CAPTIONS: tuple[str, ...] = (
    "a dog playing outdoors",
    "a cat resting",
    "a bird",
    "a horse in a field",
    "an insect on a flower",
    "flowers in a garden",
    "trees in a forest",
    "mountains under a wide sky",
    "a beach by the sea",
    "a boat on the water",
    "a waterfall or a river",
    "a snowy landscape in winter",
    "a sunset",
    "an old building or a church",
    "a bridge",
    "a city street with traffic",
    "a car",
    "a train",
    "an aeroplane in the sky",
    "a person riding a bicycle",
    "children playing",
    "a group of people",
    "a portrait of a man",
    "a portrait of a woman",
    "people doing sports",
    "a musician with an instrument",
    "food on a plate",
    "fruit and vegetables",
    "a tool or a machine",
    "a drawing or a painting",
)


def build(
    collections: Sequence[Collection],
    pictures: Pictures,
    uploads: Uploads,
    teachers: Shelf[RetrievalModel, Teacher],
    *,
    examples: Sequence[str] = EXAMPLES,
) -> gr.Blocks:
    """The page as Gradio `Blocks`; needs the routes of `apps.web.search.pictures` beside it.

    Args:
        collections: at least one; with several, visitors choose.
        pictures: signs and resolves the tokens of the collections' images.
        uploads: keeps visitors' pictures.
        teachers: opens what visitors taught.
        examples: searches offered as buttons.
    """
    page = TaughtHandlers(collections, pictures, uploads, teachers, TITLE)
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    latest: dict[str, Any] = {**hidden, "trigger_mode": "always_last", "concurrency_id": "search"}

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        screen = kept(Screen(), read_screen, write)
        remembered = gr.Textbox(visible=False)  # profile and more, from the browser's memory
        subject = kept(Query(), read_query, write)  # the picture of the captions tab
        header = html_block(
            header_html(TITLE, page.subtitle(0), html.LOGO),
            js_on_load=script("header.js"),
            elem_id="enn-header",
        )
        with gr.Tabs(elem_id="enn-tabs") as tabs:
            with gr.Tab("Search", id="search"):
                with gr.Row(elem_id="enn-searchbar", equal_height=True):
                    text = gr.Textbox(
                        placeholder="What are you looking for?",
                        label="Search words",
                        show_label=False,
                        container=False,
                        max_length=limits.QUERY_CHARACTERS,
                        autofocus=True,
                        lines=1,
                        max_lines=1,
                        scale=8,
                        min_width=180,
                        elem_id="enn-text",
                    )
                    go = gr.Button(
                        "Search", variant="primary", scale=0, min_width=110, elem_id="enn-go"
                    )
                with gr.Row(elem_id="enn-options"):
                    picker = html_block(
                        html.picker_html(),
                        js_on_load=script("picker.js"),
                        elem_id="enn-picker",
                        scale=0,
                        min_width=270,
                    )
                    chips = html_block(
                        html.chips_html(examples),
                        js_on_load=script("chips.js"),
                        elem_id="enn-chips",
                        scale=1,
                        min_width=200,
                    )
                    which = gr.Dropdown(
                        choices=[(c.name, c.number) for c in collections],
                        value=collections[0].number,
                        label="Search in",
                        show_label=False,
                        container=False,
                        visible=len(collections) > 1,
                        scale=0,
                        min_width=190,
                        filterable=False,
                        elem_id="enn-which",
                    )
                    count = gr.Dropdown(
                        choices=[(f"Show {n}", n) for n in COUNTS],
                        value=COUNTS[1],
                        label="Number of pictures shown",
                        show_label=False,
                        container=False,
                        scale=0,
                        min_width=140,
                        filterable=False,
                        elem_id="enn-count",
                    )
                status = html_block(
                    html.status_html(""), js_on_load=script("status.js"), elem_id="enn-status"
                )
                lesson = html_block("", js_on_load=script("lesson.js"), elem_id="enn-lesson")
                results = html_block("", js_on_load=script("results.js"), elem_id="enn-results")
            with gr.Tab("Taught", id="taught") as taught_tab:
                taught = html_block("", js_on_load=script("taught.js"), elem_id="enn-taught")
            with gr.Tab("Captions", id="captions"):
                html_block(
                    '<p class="enn-lead">Give a picture and a list of captions: '
                    "the page ranks the captions by how well they fit. Longer bars fit better.</p>"
                )
                with gr.Row(elem_id="enn-caption-row"):
                    with gr.Column(scale=2, min_width=280):
                        subject_picker = html_block(
                            html.picker_html(label="Choose a picture"),
                            js_on_load=script("picker.js"),
                            elem_id="enn-subject",
                        )
                        lines = gr.Textbox(
                            value="\n".join(CAPTIONS),
                            label="Captions, one per line",
                            lines=8,
                            max_lines=8,
                            max_length=limits.CAPTION_LINES * limits.QUERY_CHARACTERS,
                            elem_id="enn-lines",
                        )
                        rank = gr.Button("Rank captions", variant="primary", elem_id="enn-rank")
                    with gr.Column(scale=3, min_width=300):
                        ranking = html_block(page.no_subject(), elem_id="enn-ranking")
            with gr.Tab("Collection", id="index") as index_tab:
                tiles = html_block("", elem_id="enn-tiles")
                with gr.Row(elem_id="enn-index-buttons"):
                    update = gr.Button(
                        "Update now",
                        variant="primary",
                        scale=0,
                        min_width=150,
                        elem_id="enn-update",
                    )
                    stop = gr.Button(
                        "Stop", visible=False, scale=0, min_width=100, elem_id="enn-stop"
                    )
                job = html_block("", elem_id="enn-job")
                html_block('<h2 class="enn-h2">Files left out</h2>')
                skipped = html_block("", elem_id="enn-skipped")
                timer = gr.Timer(0.7, active=False)

        here = [which, count, screen]
        found = [text, picker, status, lesson, results, screen]
        gr.on([text.submit, go.click], page.search_text, [text, *here], found, **latest)
        gr.on([count.change, which.change], page.again, here, found, **latest)
        chips.pick(page.search_example, here, found, **latest)
        picker.chosen(page.search_upload, [text, *here], found, **latest)
        picker.removed(page.search_without_picture, [text, *here], found, **latest)
        results.like(page.search_like, here, found, **latest)
        status.clear(page.start_again, here, found, **latest)
        status.include(page.with_taught, here, found, **latest)
        status.exclude(page.without_taught, here, found, **latest)

        # Marks are never passed over for later ones: the page sends them one batch at a time.
        every: dict[str, Any] = {**hidden, "trigger_mode": "multiple", "concurrency_id": "teach"}
        results.mark(page.mark, here, found, **every)
        lesson.undo(page.undo_last, here, found, **every)
        lesson.force(page.insist, here, found, **every)

        status.profile(page.go_to_taught, [which, screen], [taught, tabs], **latest)
        gr.on([taught_tab.select, which.change], page.taught, [which, screen], taught, **latest)
        taught.choose(page.choose_profile, here, [taught, *found], **every)
        taught.undo(page.undo_entry, here, [taught, *found], **every)
        taught.forget(page.forget_all, here, [taught, *found], **every)
        taught.imported(page.imported, here, [taught, *found], **every)

        described = [subject_picker, ranking, subject]
        subject_picker.chosen(page.describe_upload, [lines, which], described, **latest)
        subject_picker.removed(page.describe_nothing, None, described, **latest)
        rank.click(page.describe_again, [lines, subject, which], described, **latest)
        results.describe(page.describe_found, [lines, which], [*described, tabs], **latest)

        state = [header, tiles, job, skipped, update, stop, timer]
        # One after the other: a look that began before a click must not be shown after its answer.
        ordered: dict[str, Any] = {**hidden, "concurrency_id": "index", "concurrency_limit": 1}
        gr.on([index_tab.select, which.change], page.index_state, which, state, **ordered)
        timer.tick(page.index_state, which, state, **ordered)
        update.click(page.start_update, which, state, **ordered)
        stop.click(page.stop_update, which, state, **ordered)

        blocks.load(
            page.open,
            [which, count, remembered, screen],
            found,
            js="(which, count, _, screen) => [which, count, window.enn.opening(), screen]",
            **hidden,
        )
        add_api(collections, teachers)
    blocks.app_id = page_id(page.identity)
    blocks.queue(max_size=128, default_concurrency_limit=4, api_open=False)
    return blocks


def head(profile: str = DEFAULT) -> str:
    """Styles and scripts for the document's head; Gradio's own `css` would not reach dialogs.

    Args:
        profile: the one of who chooses none. What browsers remember is kept apart by it: pages
            on one port, one after the other, are one page to them.
    """
    return "".join(
        (
            f'<meta name="enn-profile" content="{profile}">',
            '<meta name="color-scheme" content="light dark">',
            f"<style>{(ASSETS / 'search.css').read_text('utf-8')}</style>",
            f"<script>{script('page.js')}</script>",
        )
    )
