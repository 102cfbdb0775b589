"""Searching and marking on the search page: from what a visitor did to what the page shows.

Handlers hold only what all visitors share. A visitor's `Screen` comes in and goes out; whose
teaching it is comes with the request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web.limits import MARKED_PICTURES, QUERY_CHARACTERS
from apps.web.search import html
from apps.web.search.collection import Collection
from apps.web.search.pictures import ImageRef, Pictures, Uploads
from apps.web.visitors import visitor_of
from enn_core.lessons.errors import AlreadyTaught
from enn_core.lessons.events import is_uid
from retrieval.images import ImageError
from retrieval.teach.knowledge import LOOKUP
from retrieval.teach.profiles import DEFAULT

if TYPE_CHECKING:
    from apps.web.visitors import Shelf
    from retrieval.index.eigen_index import EigenIndex
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.teach.teacher import Lesson, Teacher

__all__ = [
    "Query",
    "Screen",
    "SearchHandlers",
    "check_profile",
    "clean",
    "field",
    "one_line",
]

# What teaching raises when it cannot be done, with a line fit to show.
EXPECTED = (LookupError, ValueError, RuntimeError, OSError)

_ELSEWHERE = "these marks were made in another collection, or by somebody else"


@dataclass(frozen=True)
class Query:
    """What one visitor is searching for: words, a picture (an upload or a found one), or both."""

    text: str = ""
    upload: str | None = None  # token of an uploaded picture
    like: str | None = None  # token of a picture of the collection

    @property
    def empty(self) -> bool:
        return not (self.text or self.upload or self.like)

    @property
    def picture(self) -> str:
        """The picture of the query, as a page's script sends it back; "" for none."""
        return f"upload {self.upload}" if self.upload else f"like {self.like}" if self.like else ""

    @classmethod
    def sent(cls, text: str, picture: object) -> Query:
        """What a page's script sent.

        Raises:
            ValueError: it asks for nothing.
        """
        kind, _, token = picture.partition(" ") if isinstance(picture, str) else ("", "", "")
        query = cls(text, token if kind == "upload" else None, token if kind == "like" else None)
        if query.empty:
            raise ValueError("there is no search that the marks are about")
        return query


@dataclass(frozen=True)
class Marks:
    """What a visitor says of pictures of one collection, by id, for a query.

    Attributes:
        collection: its number.
        query: that they are about.
        good, bad, unmark: ids of the pictures.
        uid: by which the marks are known if they arrive twice, see `Teacher.teach`.
        profile: that learns.
        lost: marks of pictures that are no longer there, besides these.
    """

    collection: int
    query: Query
    good: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()
    unmark: tuple[int, ...] = ()
    uid: str | None = None
    profile: str = DEFAULT
    lost: int = 0

    def still_there(self, index: EigenIndex, marked: Container[int]) -> Marks:
        """Without what cannot be learned, if anything else is left.

        Marks wait in browsers while pictures are deleted and other tabs take marks back; one of
        them must not be the end of the others.

        Args:
            index: the collection's.
            marked: pictures with a mark for the query.
        """
        entries = index.entries_of([*self.good, *self.bad])
        here = {id_ for id_, entry in entries.items() if entry.state == "indexed"}
        good = tuple(id_ for id_ in self.good if id_ in here)
        bad = tuple(id_ for id_ in self.bad if id_ in here)
        unmark = tuple(id_ for id_ in self.unmark if id_ in marked)
        if not (good or bad or unmark):
            return self
        lost = self.lost + len(self.good) + len(self.bad) - len(good) - len(bad)
        return replace(self, good=good, bad=bad, unmark=unmark, lost=lost)


@dataclass(frozen=True)
class Screen:
    """What one visitor's page shows; the browser keeps it (`apps.web.search.kept_screen`).

    Attributes:
        query: what was searched for last.
        profile: name of the profile that learns and counts.
        taught: whether results are with what was taught.
        ids: pictures shown, best first.
        refused: marks that were not learned, in case the visitor insists.
        place: of which indexes and visitor this is, see `SearchHandlers.place`.
    """

    query: Query = Query()
    profile: str = DEFAULT
    taught: bool = True
    ids: tuple[int, ...] = ()
    refused: Marks | None = None
    place: str = ""


@dataclass(frozen=True)
class _Body:
    """Results as HTML, and what is told about them."""

    status: str
    results: str
    ids: tuple[int, ...] = ()
    new: int = 0
    up: int = 0


class SearchHandlers:
    """The handlers of searching and marking.

    Args:
        collections: at least one.
        pictures: signs and resolves the tokens of the collections' images.
        uploads: keeps visitors' pictures.
        teachers: opens what visitors taught.
        title: of the page.
    """

    def __init__(
        self,
        collections: Sequence[Collection],
        pictures: Pictures,
        uploads: Uploads,
        teachers: Shelf[RetrievalModel, Teacher],
        title: str,
    ) -> None:
        self.collections = collections
        self.pictures = pictures
        self.uploads = uploads
        self.teachers = teachers
        self.title = title
        self.identity = sha256("\n".join(c.identity for c in collections).encode()).hexdigest()

    def place(self, request: gr.Request) -> str:
        """Stands for these indexes and this visitor: what a page holds is for no others."""
        return self._place_of(visitor_of(request).scope or "")

    def _place_of(self, scope: str) -> str:
        return sha256(f"{self.identity} {scope}".encode()).hexdigest()[:16]

    # -- searching ---------------------------------------------------------------------------

    def _ref(self, token: object) -> ImageRef:
        """The picture of a token of this server, or of one before it that is the same still.

        Whoever makes a token up has to know the content of the picture that it is about.

        Raises:
            LookupError: there is no such picture.
        """
        try:
            return self.pictures.resolve(token)
        except LookupError:
            ref = self.pictures.read(token)
            if ref.collection < len(self.collections) and self.collections[ref.collection].has(ref):
                return ref
            raise

    def search_text(
        self, text: str, which: int, count: int, screen: Screen, request: gr.Request
    ) -> tuple:
        query = replace(screen.query, text=clean(text))
        return self.show(replace(screen, query=query), which, count, request, typed=True)

    def again(self, which: int, count: int, screen: Screen, request: gr.Request) -> tuple:
        return self.show(screen, which, count, request, typed=True)

    def search_example(
        self, which: int, count: int, screen: Screen, request: gr.Request, event: gr.EventData
    ) -> tuple:
        query = Query(text=clean(field(event, "query")))
        return self.show(replace(screen, query=query), which, count, request)

    def search_upload(
        self,
        text: str,
        which: int,
        count: int,
        screen: Screen,
        request: gr.Request,
        event: gr.EventData,
    ) -> tuple:
        query = Query(text=clean(text), upload=field(event, "token"))
        return self.show(replace(screen, query=query), which, count, request, typed=True)

    def search_without_picture(
        self, text: str, which: int, count: int, screen: Screen, request: gr.Request
    ) -> tuple:
        query = Query(text=clean(text))
        return self.show(replace(screen, query=query), which, count, request, typed=True)

    def search_like(
        self, which: int, count: int, screen: Screen, request: gr.Request, event: gr.EventData
    ) -> tuple:
        query = Query(like=field(event, "token"))
        return self.show(replace(screen, query=query), which, count, request)

    def start_again(self, which: int, count: int, screen: Screen, request: gr.Request) -> tuple:
        return self.show(replace(screen, query=Query()), which, count, request)

    def with_taught(self, which: int, count: int, screen: Screen, request: gr.Request) -> tuple:
        return self.show(replace(screen, taught=True), which, count, request, typed=True)

    def without_taught(self, which: int, count: int, screen: Screen, request: gr.Request) -> tuple:
        return self.show(replace(screen, taught=False), which, count, request, typed=True)

    def show(
        self,
        screen: Screen,
        which: int,
        count: int,
        request: gr.Request,
        *,
        typed: bool = False,
        before: Sequence[int] | None = None,
        answer: str = "",
        lesson: Lesson | str | None = None,
        bad: bool = True,
        teacher: Teacher | None = None,
        marks: dict[int, bool] | None = None,
    ) -> tuple:
        """(text, picker, status, lesson, results, screen) for a screen.

        Args:
            screen: what to show.
            which, count: the collection and how many pictures.
            request: who asks.
            typed: the text box stays as it is, its visitor may be typing on.
            before: ids of the ranking before what the visitor just did, to tell what moved;
                None compares with the ranking without teaching.
            answer: HTML put behind the results, for the page's script.
            lesson: what to tell: a lesson, or a text.
            bad: the text is about something that failed.
            teacher: the visitor's, if it was just taught.
            marks: that hold for the query, if they are known: id -> whether it is good.
        """
        text = gr.skip() if typed else screen.query.text
        message = ""
        if isinstance(lesson, str):
            message = html.lesson_html(lesson, bad=bad)
        try:
            picker = self._picker(screen.query)
        except LookupError:
            screen = replace(screen, query=replace(screen.query, upload=None, like=None), ids=())
            status = html.status_html("That picture is no longer here.", clear=True)
            body = html.message_html(
                "Please choose the picture again", "Pictures to search with are kept for a while."
            )
            return text, html.picker_html(), status, message, body, screen
        try:
            if teacher is None:
                teacher = self.teacher(which, screen, request)
        except EXPECTED as error:
            message = html.lesson_html(
                f"Searching without what was taught: {one_line(error)}", bad=True
            )
        shown = self._body(screen, which, count, teacher, before, marks)
        if lesson is not None and not isinstance(lesson, str):
            message = html.lesson_html(
                html.told(lesson, new=shown.new, up=shown.up),
                undo=lesson.entry,
                profile=screen.profile,
                force=lesson.refused is not None,
                bad=lesson.refused is not None,
            )
        if not message and shown.ids and not screen.query.empty:
            message = html.MARK_HINT  # at the place of the first lesson, so that nothing jumps
        screen = replace(screen, ids=shown.ids, place=self.place(request))
        results = shown.results + html.kept_html(_facts(screen)) + answer
        return text, picker, shown.status, message, results, screen

    def teacher(self, which: int, screen: Screen, request: gr.Request) -> Teacher | None:
        """The visitor's teacher, up to date; None for one whom nothing tells from others yet."""
        if visitor_of(request).scope is None:
            return None
        teacher = self.own_teacher(which, screen, request)
        teacher.refresh()
        return teacher

    def own_teacher(self, which: int, screen: Screen, request: gr.Request) -> Teacher:
        """The visitor's teacher, to be changed; raises UnknownVisitor if nothing tells whose."""
        scope = visitor_of(request).known()
        return self.teachers.get(self.collections[which].model, scope, screen.profile)

    def _picker(self, query: Query) -> str:
        if query.upload:
            self.uploads.get(query.upload)
            return html.picker_html(f"uploads/{query.upload}", caption="Your picture")
        if query.like:
            self.pictures.resolve(query.like)
            return html.picker_html(f"pictures/card/{query.like}", caption="Pictures like it")
        return html.picker_html()

    def _body(
        self,
        screen: Screen,
        which: int,
        count: int,
        teacher: Teacher | None,
        before: Sequence[int] | None,
        marks: dict[int, bool] | None,
    ) -> _Body:
        try:
            return self._found(screen, which, count, teacher, before, marks)
        except (LookupError, OSError, ImageError) as error:
            return _Body(
                html.status_html("This picture cannot be used any more.", clear=True),
                html.message_html("The picture is gone", one_line(error)),
            )
        except ValueError as error:
            return _Body(
                html.status_html("This search could not be understood.", clear=True),
                html.message_html("Please put it in other words", one_line(error)),
            )
        except RuntimeError as error:
            return _Body(
                html.status_html("The search could not be done.", clear=True),
                html.message_html("Something is wrong with the collection", one_line(error)),
            )

    def _found(
        self,
        screen: Screen,
        which: int,
        count: int,
        teacher: Teacher | None,
        before: Sequence[int] | None,
        marks: dict[int, bool] | None,
    ) -> _Body:
        collection, query = self.collections[which], screen.query
        if not (len(collection) or len(collection.index)):
            return _Body(
                html.status_html("", clear=not query.empty),
                html.message_html(
                    "No pictures yet",
                    "Open the Collection tab and press “Update now” to read the folder.",
                ),
            )
        if query.empty:
            cards = collection.browse(count)
            text = f"A look into {collection.name}: {len(cards):,} of {len(collection):,} pictures."
            return _Body(html.status_html(text), html.cards_html(cards, label="Some pictures"))
        started = time.monotonic()
        asked = self._asked(query, which)
        counted = teacher is not None and len(teacher) and (query.text or teacher.knows_pictures)
        knows = teacher if counted else None
        counts = knows if screen.taught else None
        found = collection.find(**asked, k=count, teacher=counts)
        seconds = time.monotonic() - started
        if before is None and counts is not None:
            before = collection.find(**asked, k=count).ids
        if marks is None and knows is not None:
            with contextlib.suppress(*EXPECTED):  # marks of another index, of no use here
                marks = knows.marks(index=collection.index, **asked)
        cards = collection.cards(found, marks=marks, before=before)
        text = (
            f"{_said(query)}: best {len(cards):,} of {len(collection):,} pictures, {seconds:.2f} s"
        )
        status = html.status_html(
            text,
            clear=True,
            taught=screen.taught if knows is not None else None,
            profile=screen.profile,
            follows=found.follows,
        )
        teachable = not query.picture or teacher is None or teacher.rule in (None, LOOKUP)
        results = html.cards_html(
            cards,
            label="Search results",
            query=query.text if teachable else None,
            picture=query.picture,
            profile=screen.profile,
        )
        new, up = sum([card.new for card in cards]), sum([card.moved > 0 for card in cards])
        return _Body(status, results, found.ids, new=new, up=up)

    def _asked(self, query: Query, which: int) -> dict[str, Any]:
        """A query as the package takes it: text, image (bytes), like (an id of the collection)."""
        image, like = None, None
        if query.upload:
            image = self.uploads.get(query.upload)
        elif query.like:
            ref = self.pictures.resolve(query.like)
            if ref.collection == which and not query.text:
                like = ref.id
            else:  # beside words, or found in another folder and now asked for in this one
                image = self.collections[ref.collection].read(ref)[0]
        return {"text": query.text or None, "image": image, "like": like}

    # -- marking -----------------------------------------------------------------------------

    def mark(
        self, which: int, count: int, screen: Screen, request: gr.Request, event: gr.EventData
    ) -> tuple:
        """Pictures were marked; the answer comes after what was learned is on disk."""
        data = event._data if isinstance(event._data, dict) else {}
        serial = data.get("answer")
        number = serial if type(serial) is int and 0 <= serial < 2**53 else 0
        try:
            marks = self._marks(data, screen, request)
        except EXPECTED as error:
            text = f"Not learned: {one_line(error)}"
            answer = html.answer_html(number, text)
            return self.show(screen, which, count, request, typed=True, answer=answer, lesson=text)
        return self._learn(marks, number, which, count, screen, request)

    def insist(self, which: int, count: int, screen: Screen, request: gr.Request) -> tuple:
        """Teach what was refused."""
        if screen.refused is None:
            return self.again(which, count, screen, request)
        if screen.place != self.place(request):
            return self.show(
                replace(screen, refused=None), which, count, request, typed=True, lesson=_ELSEWHERE
            )
        return self._learn(screen.refused, 0, which, count, screen, request, force=True)

    def undo_last(
        self, which: int, count: int, screen: Screen, request: gr.Request, event: gr.EventData
    ) -> tuple:
        """Take back an entry of the history; what is shown compares with before."""
        done, text = self.take_back(which, screen, request, event)
        return self.show(
            screen,
            which,
            count,
            request,
            typed=True,
            before=screen.ids if done else None,
            lesson=text,
            bad=not done,
        )

    def take_back(
        self, which: int, screen: Screen, request: gr.Request, event: gr.EventData
    ) -> tuple[bool, str]:
        """Whether an entry was undone, and a line about it."""
        data = event._data if isinstance(event._data, dict) else {}
        entry = data.get("entry")
        try:
            if type(entry) is not int:  # True is none
                raise ValueError("no entry of the history is named")
            check_profile(data, screen)
            teacher = self.own_teacher(which, screen, request)
            undone = teacher.undo(entry, index=self.collections[which].index)
        except EXPECTED as error:
            return False, f"Not undone: {one_line(error)}"
        marks = html.counted(undone.good, undone.bad, undone.unmarked)
        return True, f"Undone: {marks} for “{_short(undone.shown)}”."

    def _learn(
        self,
        marks: Marks,
        number: int,
        which: int,
        count: int,
        screen: Screen,
        request: gr.Request,
        *,
        force: bool = False,
    ) -> tuple:
        lesson: Lesson | str
        refused, learned, held = True, None, None
        # Marks that waited may be for a profile, or a query, that is shown no more.
        own = self.teachers.called(marks.profile) == self.teachers.called(screen.profile)
        same = own and marks.query == screen.query and marks.collection == which
        try:
            learning = replace(screen, profile=marks.profile)
            teacher = self.own_teacher(marks.collection, learning, request)
            collection = self.collections[marks.collection]
            index = collection.index
            asked = self._asked(marks.query, marks.collection)
            marks = marks.still_there(index, teacher.marks(index=index, **asked))
            lesson = teacher.teach(
                index,
                good=marks.good,
                bad=marks.bad,
                **asked,
                unmark=marks.unmark,
                force=force,
                uid=marks.uid,
            )
            refused = lesson.refused is not None
            if marks.lost:
                gone = dict.fromkeys(range(-marks.lost, 0), "no longer in the collection")
                lesson = replace(lesson, ignored={**lesson.ignored, **gone})
            if same:
                learned = teacher
                if not refused:
                    held = {**dict.fromkeys(lesson.good, True), **dict.fromkeys(lesson.bad, False)}
        except AlreadyTaught:
            lesson, refused = "These marks were learned already.", False
        except EXPECTED as error:
            lesson = f"Not learned: {one_line(error)}"
        if not own and not isinstance(lesson, str) and not refused:
            lesson = f"Learned: marks that waited for the profile “{marks.profile}”."
        before = screen.ids if same and not refused and screen.taught else None
        said = lesson if isinstance(lesson, str) else html.told(lesson)
        screen = replace(
            screen,
            taught=screen.taught or not refused,
            refused=marks if refused and not isinstance(lesson, str) else None,
        )
        return self.show(
            screen,
            which,
            count,
            request,
            typed=True,
            before=before,
            answer=html.answer_html(number, said if refused else None),
            lesson=lesson,
            bad=refused,
            teacher=learned,
            marks=held,
        )

    def _marks(self, data: dict[str, Any], screen: Screen, request: gr.Request) -> Marks:
        """Marks as the page's script sent them or kept them, checked."""
        uid, profile = data.get("id"), data.get("profile")
        if uid is not None and not is_uid(uid):
            raise ValueError("the marks have no proper id; load the page again")
        visitor_of(request).known()
        if "place" not in data:
            check_profile(data, screen)
        elif data["place"] not in (self.place(request), self._place_of("")):  # nobody's yet
            raise ValueError(_ELSEWHERE)
        said, text = data.get("marks"), data.get("query")
        words = clean(text) if isinstance(text, str) else ""
        if not isinstance(said, dict) or not 0 < len(said) <= MARKED_PICTURES:
            raise ValueError(f"1 to {MARKED_PICTURES} pictures can be marked at once")
        query = Query.sent(words, data.get("picture"))
        refs: dict[str, list[ImageRef]] = {"good": [], "bad": [], "none": []}
        lost: list[LookupError] = []
        for token, what in said.items():
            if what not in ("good", "bad", "none"):
                raise ValueError("a picture is good, bad, or neither")
            try:
                refs[what].append(self._ref(token))
            except LookupError as error:
                self.pictures.read(token)  # what is no token at all is refused
                lost.append(error)
        if len(lost) == len(said):
            raise lost[0]
        numbers = {ref.collection for group in refs.values() for ref in group}
        if len(numbers) != 1:
            raise ValueError("the pictures are of several collections")
        ids = {what: tuple(ref.id for ref in group) for what, group in refs.items()}
        return Marks(
            numbers.pop(),
            query,
            ids["good"],
            ids["bad"],
            ids["none"],
            uid,
            str(profile),  # checked where it is opened
            len(lost),
        )


def check_profile(data: Any, screen: Screen) -> None:
    """Raises ValueError unless the page shows the profile that the server has in mind.

    They differ after a restart, when the server has forgotten the visitor's screen.
    """
    if not isinstance(data, dict) or data.get("profile") != screen.profile:
        raise ValueError("the server was started anew since this page was loaded; load it again")


def one_line(error: BaseException) -> str:
    """What an error says, in at most 300 characters."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())[:300]


def _said(query: Query) -> str:
    text = _short(query.text)
    if query.upload or query.like:
        return f"“{text}” together with the picture" if text else "Like the picture"
    return f"“{text}”"


def _facts(screen: Screen) -> dict[str, object]:
    """What a page that is loaded again sends back, see `read_opening`."""
    query = screen.query
    return {
        "place": screen.place,
        "text": query.text,
        "upload": query.upload,
        "like": query.like,
        "taught": screen.taught,
    }


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


def clean(text: str) -> str:
    """One line of QUERY_CHARACTERS at most, without control characters and lone surrogates."""
    text = text[: 4 * QUERY_CHARACTERS].encode("utf-8", "ignore").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:QUERY_CHARACTERS]


def field(event: gr.EventData, name: str) -> str:
    """A text field of what the page's script sent; anything else is an empty text."""
    data = event._data
    value = data.get(name) if isinstance(data, dict) else None
    return value if isinstance(value, str) else ""
