"""What the "Taught" tab does: profiles, history, undo, forgetting, and the chart of effects."""

from __future__ import annotations

from dataclasses import replace

import gradio as gr

from apps.web.html import notice_html
from apps.web.search import taught_html
from apps.web.search.effects_chart import effects_html
from apps.web.search.handlers import EXPECTED, Screen, check_profile, one_line
from apps.web.search.tab_handlers import TabHandlers
from apps.web.visitors import visitor_of
from retrieval.teach.profiles import check_name

__all__ = ["TaughtHandlers"]


class TaughtHandlers(TabHandlers):
    """The handlers of the whole page: searching, and looking at what was taught.

    Those that change something also search again, so that no tab shows what no longer holds.
    """

    def taught(self, which: int, screen: Screen, request: gr.Request, notice: str = "") -> str:
        """The tab."""
        try:
            return notice + self._taught(which, screen, request)
        except EXPECTED as error:
            names = taught_html.profiles_html([], screen.profile)
            return names + notice_html(one_line(error), bad=True)

    def _taught(self, which: int, screen: Screen, request: gr.Request) -> str:
        visitor_of(request).known()
        collection = self.collections[which]
        teacher = self.teacher(which, screen, request)
        names = self.teachers.names(collection.model, visitor_of(request).scope)
        if teacher is None:
            return taught_html.profiles_html(names, screen.profile)
        history = teacher.history()
        index = collection.index
        chart = effects_html(teacher.effects(index), len(index)) if len(teacher) else ""
        heading = '<h2 class="enn-h2">What it did so far</h2>' if chart else ""
        return (
            taught_html.profiles_html(names, screen.profile)
            + heading
            + chart
            + '<h2 class="enn-h2">History</h2>'
            + taught_html.history_html(history)
            + taught_html.files_html(which, screen.profile, any_taught=bool(history))
        )

    def go_to_taught(self, which: int, screen: Screen, request: gr.Request) -> tuple:
        """(tab, tabs): opens the tab."""
        return self.taught(which, screen, request), gr.Tabs(selected="taught")

    def choose_profile(
        self, which: int, count: int, screen: Screen, request: gr.Request, event: gr.EventData
    ) -> tuple:
        """(tab, *search) with another profile."""
        data = event._data if isinstance(event._data, dict) else {}
        try:
            name = self.teachers.called(check_name(data.get("profile", "")))
            scope = visitor_of(request).known()
            self.teachers.get(self.collections[which].model, scope, name)
        except EXPECTED as error:
            return self._both(which, count, screen, request, one_line(error), bad=True)
        screen = replace(screen, profile=name, taught=True, refused=None)
        return self._both(which, count, screen, request)

    def undo_entry(
        self, which: int, count: int, screen: Screen, request: gr.Request, event: gr.EventData
    ) -> tuple:
        """(tab, *search) without an entry of the history."""
        done, text = self.take_back(which, screen, request, event)
        return self._both(which, count, screen, request, text, bad=not done)

    def forget_all(
        self, which: int, count: int, screen: Screen, request: gr.Request, event: gr.EventData
    ) -> tuple:
        """(tab, *search) after forgetting everything that the profile was taught."""
        try:
            check_profile(event._data, screen)
            count_of = self.own_teacher(which, screen, request).forget()
        except EXPECTED as error:
            return self._both(which, count, screen, request, one_line(error), bad=True)
        lessons = "1 lesson" if count_of == 1 else f"{count_of:,} lessons"
        return self._both(which, count, screen, request, f"Forgotten: {lessons}.")

    def imported(
        self, which: int, count: int, screen: Screen, request: gr.Request, event: gr.EventData
    ) -> tuple:
        """(tab, *search) after a file was imported."""
        data = event._data if isinstance(event._data, dict) else {}
        new = data.get("count")
        text = f"Imported: {new:,} new." if isinstance(new, int) else "Imported."
        return self._both(which, count, screen, request, text)

    def _both(
        self,
        which: int,
        count: int,
        screen: Screen,
        request: gr.Request,
        text: str = "",
        *,
        bad: bool = False,
    ) -> tuple:
        found = self.show(screen, which, count, request, typed=True)
        notice = notice_html(text, bad=bad) if text else ""
        return self.taught(which, screen, request, notice), *found
