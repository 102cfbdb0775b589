"""What a page opens with, and what the tabs beside the search do: captions, the collection."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import gradio as gr

from apps.web.html import header_html, note_html, notice_html
from apps.web.kept import read_profile
from apps.web.limits import CAPTION_LINES
from apps.web.search import html
from apps.web.search.collection import Collection, Job, UpdateRunning, share
from apps.web.search.handlers import Query, Screen, SearchHandlers, clean, field
from apps.web.search.kept_screen import read_opening

__all__ = ["TabHandlers"]

SHOWN_SKIPPED = 500


class TabHandlers(SearchHandlers):
    """The handlers of searching, of opening the page, and of two more tabs."""

    def open(
        self, which: int, count: int, remembered: str, screen: Screen, request: gr.Request
    ) -> tuple:
        """A visitor arrives: `?q=words` searches at once, otherwise a look at the collection.

        What was typed while the page was still loading stays. A tab that is loaded again, because
        its visitor or an outage wanted it, shows again what it showed.
        """
        asked = clean(str(request.query_params.get("q", "")))
        profile, kept = read_opening(remembered)
        profile = self.teachers.called(read_profile(profile))
        screen = replace(screen, query=Query(text=asked), profile=profile)
        if kept is not None:
            screen = replace(screen, query=self._again(kept), taught=kept.taught)
        return self.show(screen, which, count, request, typed=not screen.query.text)

    def _again(self, kept: Screen) -> Query:
        """The query of a page that is loaded again, maybe from a server that was started anew."""
        query = kept.query
        if query.like is None:
            return query
        try:
            return replace(query, like=self.pictures.token(self._ref(query.like)))
        except LookupError:
            return replace(query, like=None)

    # -- captions tab ------------------------------------------------------------------------

    def no_subject(self) -> str:
        return html.message_html(
            "No picture yet",
            "Choose one on this page, or open a search result and press “Match captions”.",
        )

    def describe_upload(self, lines: str, which: int, event: gr.EventData) -> tuple:
        return self._describe(Query(upload=field(event, "token")), lines, which)

    def describe_found(self, lines: str, which: int, event: gr.EventData) -> tuple:
        shown = self._describe(Query(like=field(event, "token")), lines, which)
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
        captions = list(dict.fromkeys(filter(None, (clean(c) for c in lines.splitlines()))))
        if not captions:
            text = "Write at least one caption, each on its own line."
            return picker, html.message_html("No captions", text), subject
        ranked = self.collections[which].caption(image, captions[:CAPTION_LINES])
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
        return header_html(self.title, self.subtitle(which), html.LOGO)

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
        return note_html(text)
    return notice_html(job.text, bad=job.state == "failed")
