"""The search page itself: its components, what they do, and how it looks.

`build` makes Gradio `Blocks` for collections that are open already. Each visitor's query lives in
`gr.State`; what the handlers hold is shared by all visitors and only read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from apps import search_html as html
from apps.collection import Collection, Job, UpdateRunning, share
from apps.pictures import Pictures, Uploads
from retrieval.images import ImageError

__all__ = ["CAPTIONS", "EXAMPLES", "TITLE", "Query", "build", "head", "theme"]

ASSETS = Path(__file__).parent / "assets"
TITLE = "Eigen Search"

TEXT_LIMIT = 500  # characters of a query; the text tower reads fewer words than that
CAPTIONS_LIMIT = 200
COUNTS = (12, 24, 48, 96, 192)
SHOWN_SKIPPED = 500

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


@dataclass(frozen=True)
class Query:
    """What one visitor is searching for: words, a picture (an upload or a found one), or both."""

    text: str = ""
    upload: str | None = None  # token of an uploaded picture
    like: str | None = None  # token of a picture of the collection

    @property
    def empty(self) -> bool:
        return not (self.text or self.upload or self.like)


def build(
    collections: Sequence[Collection],
    pictures: Pictures,
    uploads: Uploads,
    *,
    examples: Sequence[str] = EXAMPLES,
) -> gr.Blocks:
    """The page as Gradio `Blocks`; needs the routes of `apps.pictures` beside it.

    Args:
        collections: at least one; with several, visitors choose.
        pictures: signs and resolves the tokens of the collections' images.
        uploads: keeps visitors' pictures.
        examples: searches offered as buttons.
    """
    page = _Page(collections, pictures, uploads)
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    latest: dict[str, Any] = {**hidden, "trigger_mode": "always_last", "concurrency_id": "search"}

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        query = gr.State(Query())
        subject = gr.State(Query())  # the picture of the captions tab
        header = _html(
            html.header_html(TITLE, page.subtitle(0)),
            js_on_load=_script("header.js"),
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
                        max_length=TEXT_LIMIT,
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
                    picker = _html(
                        html.picker_html(),
                        js_on_load=_script("picker.js"),
                        elem_id="enn-picker",
                        scale=0,
                        min_width=270,
                    )
                    chips = _html(
                        html.chips_html(examples),
                        js_on_load=_script("chips.js"),
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
                status = _html(
                    html.status_html(""), js_on_load=_script("status.js"), elem_id="enn-status"
                )
                results = _html("", js_on_load=_script("results.js"), elem_id="enn-results")
            with gr.Tab("Captions", id="captions"):
                _html(
                    '<p class="enn-lead">Give a picture and a list of captions: '
                    "the page ranks the captions by how well they fit. Longer bars fit better.</p>"
                )
                with gr.Row(elem_id="enn-caption-row"):
                    with gr.Column(scale=2, min_width=280):
                        subject_picker = _html(
                            html.picker_html(label="Choose a picture"),
                            js_on_load=_script("picker.js"),
                            elem_id="enn-subject",
                        )
                        lines = gr.Textbox(
                            value="\n".join(CAPTIONS),
                            label="Captions, one per line",
                            lines=8,
                            max_lines=8,
                            max_length=CAPTIONS_LIMIT * TEXT_LIMIT,
                            elem_id="enn-lines",
                        )
                        rank = gr.Button("Rank captions", variant="primary", elem_id="enn-rank")
                    with gr.Column(scale=3, min_width=300):
                        ranking = _html(page.no_subject(), elem_id="enn-ranking")
            with gr.Tab("Collection", id="index") as index_tab:
                tiles = _html("", elem_id="enn-tiles")
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
                job = _html("", elem_id="enn-job")
                _html('<h2 class="enn-h2">Files left out</h2>')
                skipped = _html("", elem_id="enn-skipped")
                timer = gr.Timer(0.7, active=False)

        found = [text, picker, status, results, query]
        gr.on(
            [text.submit, go.click],
            page.search_text,
            [text, query, which, count],
            found,
            **latest,
        )
        gr.on([count.change, which.change], page.again, [query, which, count], found, **latest)
        chips.pick(page.search_example, [which, count], found, **latest)
        picker.chosen(page.search_upload, [text, which, count], found, **latest)
        picker.removed(page.search_without_picture, [text, which, count], found, **latest)
        results.like(page.search_like, [which, count], found, **latest)
        status.clear(page.start_again, [which, count], found, **latest)

        described = [subject_picker, ranking, subject]
        subject_picker.chosen(page.describe_upload, [lines, which], described, **latest)
        subject_picker.removed(page.describe_nothing, None, described, **latest)
        rank.click(page.describe_again, [lines, subject, which], described, **latest)
        results.describe(page.describe_found, [lines, which], [*described, tabs], **latest)

        state = [header, tiles, job, skipped, update, stop, timer]
        gr.on([index_tab.select, which.change], page.index_state, which, state, **hidden)
        timer.tick(page.index_state, which, state, **hidden)
        update.click(page.start_update, which, state, **hidden)
        stop.click(page.stop_update, which, state, **hidden)

        blocks.load(page.open, [which, count], found, **hidden)
    blocks.queue(max_size=128, default_concurrency_limit=4, api_open=False)
    return blocks


class _Page:
    """The handlers. Holds only what all visitors share; a visitor's state comes in and goes out."""

    def __init__(
        self, collections: Sequence[Collection], pictures: Pictures, uploads: Uploads
    ) -> None:
        self.collections = collections
        self.pictures = pictures
        self.uploads = uploads

    # -- search tab --------------------------------------------------------------------------

    def open(self, which: int, count: int, request: gr.Request) -> tuple:
        """A visitor arrives: `?q=words` searches at once, otherwise a look at the collection."""
        asked = _clean(str(request.query_params.get("q", "")))
        return self._show(Query(text=asked), which, count)

    def search_text(self, text: str, query: Query, which: int, count: int) -> tuple:
        return self._show(replace(query, text=_clean(text)), which, count, typed=True)

    def again(self, query: Query, which: int, count: int) -> tuple:
        return self._show(query, which, count, typed=True)

    def search_example(self, which: int, count: int, event: gr.EventData) -> tuple:
        asked = _clean(_field(event, "query"))
        return self._show(Query(text=asked), which, count)

    def search_upload(self, text: str, which: int, count: int, event: gr.EventData) -> tuple:
        asked = Query(text=_clean(text), upload=_field(event, "token"))
        return self._show(asked, which, count, typed=True)

    def search_without_picture(self, text: str, which: int, count: int) -> tuple:
        return self._show(Query(text=_clean(text)), which, count, typed=True)

    def search_like(self, which: int, count: int, event: gr.EventData) -> tuple:
        return self._show(Query(like=_field(event, "token")), which, count)

    def start_again(self, which: int, count: int) -> tuple:
        return self._show(Query(), which, count)

    def _show(self, query: Query, which: int, count: int, *, typed: bool = False) -> tuple:
        """(text, picker, status, results, query) for a query.

        With `typed` the text box stays as it is: its visitor may be typing on.
        """
        text = gr.skip() if typed else query.text
        try:
            picker = self._picker(query)
        except LookupError:
            query = replace(query, upload=None, like=None)
            status = html.status_html("That picture is no longer here.", clear=True)
            body = html.message_html(
                "Please choose the picture again", "Pictures to search with are kept for a while."
            )
            return text, html.picker_html(), status, body, query
        try:
            status, body = self._found(query, which, count)
        except (LookupError, OSError, ImageError) as error:
            status = html.status_html("This picture cannot be used any more.", clear=True)
            body = html.message_html("The picture is gone", _one_line(error))
        except ValueError as error:
            status = html.status_html("This search could not be understood.", clear=True)
            body = html.message_html("Please put it in other words", _one_line(error))
        except RuntimeError as error:
            status = html.status_html("The search could not be done.", clear=True)
            body = html.message_html("Something is wrong with the collection", _one_line(error))
        return text, picker, status, body, query

    def _picker(self, query: Query) -> str:
        if query.upload:
            self.uploads.get(query.upload)
            return html.picker_html(f"uploads/{query.upload}", caption="Your picture")
        if query.like:
            self.pictures.resolve(query.like)
            return html.picker_html(f"pictures/card/{query.like}", caption="Pictures like it")
        return html.picker_html()

    def _found(self, query: Query, which: int, count: int) -> tuple[str, str]:
        """Status line and results."""
        collection = self.collections[which]
        total = len(collection.index)
        if not total:
            return html.status_html("", clear=not query.empty), html.message_html(
                "No pictures yet",
                "Open the Collection tab and press “Update now” to read the folder.",
            )
        if query.empty:
            cards = collection.browse(count)
            text = f"A look into {collection.name}: {len(cards):,} of {total:,} pictures."
            return html.status_html(text), html.cards_html(cards, label="Some pictures")
        started = time.monotonic()
        image, like = None, None
        if query.like:
            ref = self.pictures.resolve(query.like)
            if ref.collection == which:
                like = ref.id
            else:  # found in another folder, now asked for in this one
                image, _ = self.collections[ref.collection].read(ref)
        elif query.upload:
            image = self.uploads.get(query.upload)
        cards = collection.search(query.text, image, like, count)
        seconds = time.monotonic() - started
        text = f"{_asked(query)}: best {len(cards):,} of {total:,} pictures, {seconds:.2f} s"
        return html.status_html(text, clear=True), html.cards_html(cards, label="Search results")

    # -- captions tab ------------------------------------------------------------------------

    def no_subject(self) -> str:
        return html.message_html(
            "No picture yet",
            "Choose one on this page, or open a search result and press “Match captions”.",
        )

    def describe_upload(self, lines: str, which: int, event: gr.EventData) -> tuple:
        return self._describe(Query(upload=_field(event, "token")), lines, which)

    def describe_found(self, lines: str, which: int, event: gr.EventData) -> tuple:
        shown = self._describe(Query(like=_field(event, "token")), lines, which)
        return (*shown, gr.Tabs(selected="captions"))

    def describe_again(self, lines: str, subject: Query, which: int) -> tuple:
        return self._describe(subject, lines, which)

    def describe_nothing(self) -> tuple:
        return html.picker_html(label="Choose a picture"), self.no_subject(), Query()

    def _describe(self, subject: Query, lines: str, which: int) -> tuple:
        """(picker, ranking, subject) for a picture and captions."""
        image = self._picture(subject)
        if image is None:
            return self.describe_nothing()
        url = f"uploads/{subject.upload}" if subject.upload else f"pictures/large/{subject.like}"
        picker = html.picker_html(url)
        captions = list(dict.fromkeys(filter(None, (_clean(c) for c in lines.splitlines()))))
        if not captions:
            text = "Write at least one caption, each on its own line."
            return picker, html.message_html("No captions", text), subject
        ranked = self.collections[which].caption(image, captions[:CAPTIONS_LIMIT])
        average = sum(score for _, score in ranked) / len(ranked)
        rows = [
            (caption, score, max(2, round(100 * share(score, average, ranked[0][1]))))
            for caption, score in ranked
        ]
        return picker, html.captions_html(rows), subject

    def _picture(self, query: Query) -> bytes | None:
        """The bytes of a query's picture, None if there is none (any more)."""
        with contextlib.suppress(LookupError, OSError, ValueError):
            if query.upload:
                return self.uploads.get(query.upload)
            if query.like:
                ref = self.pictures.resolve(query.like)
                return self.collections[ref.collection].read(ref)[0]
        return None

    # -- collection tab ----------------------------------------------------------------------

    def header(self, which: int) -> str:
        return html.header_html(TITLE, self.subtitle(which))

    def subtitle(self, which: int) -> str:
        collection = self.collections[which]
        return f"{len(collection):,} pictures · {collection.name}"

    def index_state(self, which: int) -> tuple:
        """(header, tiles, job, skipped, update button, stop button, timer)."""
        collection = self.collections[which]
        facts = collection.stats()
        tiles = html.tiles_html(
            [
                ("pictures can be searched", f"{len(collection):,}"),
                ("files left out", f"{facts['skipped']:,}"),
                ("size of the index", html.file_size(facts["bytes"])),
                ("model", str(facts["model"])),
            ]
        )
        now = collection.job
        skipped = html.skipped_html(collection.skipped(SHOWN_SKIPPED), facts["skipped"])
        can_update = collection.root is not None and not now.active
        return (
            self.header(which),
            tiles,
            _job_html(now, collection),
            skipped,
            gr.Button(interactive=can_update),
            gr.Button(visible=now.active, interactive=now.state == "running"),
            gr.Timer(active=now.active),
        )

    def start_update(self, which: int) -> tuple:
        with contextlib.suppress(UpdateRunning, ValueError):
            self.collections[which].start_update()
        return self.index_state(which)

    def stop_update(self, which: int) -> tuple:
        self.collections[which].cancel_update()
        return self.index_state(which)


def _html(value: str, **options: Any) -> gr.HTML:
    """A component that shows our own HTML, without Gradio's styles for running text."""
    return gr.HTML(value, apply_default_css=False, **options)


def head() -> str:
    """Styles and scripts for the document's head; Gradio's own `css` would not reach dialogs."""
    return "".join(
        (
            '<meta name="color-scheme" content="light dark">',
            f"<style>{(ASSETS / 'search.css').read_text('utf-8')}</style>",
            f"<script>{_script('page.js')}</script>",
        )
    )


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


def _job_html(job: Job, collection: Collection) -> str:
    if job.active:
        return html.progress_html(job.text, done=job.done, total=job.total)
    if job.state == "idle":
        text = (
            f"Looks for new, changed and deleted pictures in the folder “{collection.root.name}” "
            "that the server was started with. Searching goes on meanwhile."
            if collection.root is not None
            else "The server was started with an index alone, so there is no folder to read."
        )
        return html.note_html(text)
    return html.notice_html(job.text, bad=job.state == "failed")


def _asked(query: Query) -> str:
    text = query.text if len(query.text) <= 80 else query.text[:79] + "…"
    if query.upload or query.like:
        return f"“{text}” together with the picture" if text else "Like the picture"
    return f"“{text}”"


def _clean(text: str) -> str:
    """One line of at most TEXT_LIMIT characters, without control characters and lone surrogates."""
    text = text[: 4 * TEXT_LIMIT].encode("utf-8", "ignore").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:TEXT_LIMIT]


def _field(event: gr.EventData, name: str) -> str:
    """A text field of what the page's script sent; anything else is an empty text."""
    data = event._data
    value = data.get(name) if isinstance(data, dict) else None
    return value if isinstance(value, str) else ""


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())[:300]


def _script(name: str) -> str:
    return (ASSETS / name).read_text("utf-8")
