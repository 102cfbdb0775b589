"""Files of the brain page: uploads, what its viewer reads, tables, profiles to take along, NiiVue.

Routes name sessions by their secret, scans by number and files by a word of a fixed list; nothing
that a client sends becomes a path, and nothing that a client sent is sent back.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.requests import ClientDisconnect

from apps.web.brain.session import Desk, Session, SessionError, Sessions, clean_label
from apps.web.brain.worker import BRAIN, EXPLANATION, HEAD, PLANES
from apps.web.limits import BRAIN_LESSONS_BYTES, SCAN_BYTES
from apps.web.server import Route
from apps.web.visitors import visitor_of

if TYPE_CHECKING:
    from apps.web.visitors import Shelf
    from neuro.age.predict import BrainAge
    from neuro.scans.preprocess import InputKind
    from neuro.teach import Site

__all__ = ["BRAIN_ROUTES", "NIIVUE", "add_brain_routes"]

NIIVUE = "niivue-0.69.0.umd.js"

_SESSION = r"[\w-]{32}"
_PROFILE = r"/brain/profiles/[A-Za-z0-9._-]{1,64}"
BRAIN_ROUTES: tuple[Route, ...] = (
    Route("GET", rf"/brain/{NIIVUE}".replace(".", r"\."), forever=True),
    Route("POST", rf"/brain/uploads/{_SESSION}", max_body=SCAN_BYTES, stream=True),
    Route("POST", r"/brain/left", max_body=1024, json_body=True),
    Route("GET", rf"/brain/files/{_SESSION}/\d{{1,6}}/(?:{HEAD}|{BRAIN}|{EXPLANATION}|{PLANES})"),
    Route("GET", rf"/brain/tables/{_SESSION}", turns=True),
    Route("GET", _PROFILE, turns=True),
    Route("POST", _PROFILE, max_body=BRAIN_LESSONS_BYTES, stream=True),
)

# What cannot be done is told in a line fit to show.
_EXPECTED = (LookupError, ValueError, RuntimeError, OSError)
_KEEP = {"Cache-Control": "private, max-age=3600"}
_LOOK_BYTES = 2**24
_NO_ROOM = "this server has no room for more scans; try again later"
_FORGET = {"Cache-Control": "no-store"}


def add_brain_routes(
    app: FastAPI,
    sessions: Sessions,
    desk: Desk,
    sites: Shelf[BrainAge, Site],
    table: Callable[[Session, Site], str],
) -> None:
    """Adds `/brain/...` to an app.

    Args:
        app: the application.
        sessions, desk: where scans are kept and worked on.
        sites: opens site profiles.
        table: CSV of a session under a profile.
    """
    niivue = Path(__file__).parents[1] / "assets" / "niivue" / NIIVUE

    @app.get(f"/brain/{NIIVUE}")
    def script() -> Response:
        return FileResponse(niivue, media_type="text/javascript")

    @app.post("/brain/left")
    async def left(request: Request) -> Response:
        said = await request.json()
        with contextlib.suppress(*_EXPECTED, AttributeError):
            sessions.leave(str(said.get("tab")), said.get("session"), visitor_of(request).known())
        return Response(status_code=204)

    @app.post("/brain/uploads/{token}")
    async def upload(token: str, request: Request) -> Response:
        try:
            session = sessions.get(token, visitor_of(request).known())
            desk.check_room(session.seat)
            left = sessions.room(session.seat)
            if int(request.headers.get("content-length", 0)) > left:
                raise SessionError(_NO_ROOM)
            kind = _kind(request.query_params.get("kind", ""))
            scan = session.add(clean_label(request.query_params.get("name", "")), kind)
        except ValueError as error:
            return _problem(error)
        try:
            await _store(request, scan.source, lambda: sessions.room(session.seat))
            desk.submit(scan)
        except (OSError, ClientDisconnect, SessionError) as error:
            with contextlib.suppress(SessionError):
                session.remove(scan.number)
            if isinstance(error, SessionError):
                return _problem(error)
            gone = isinstance(error, ClientDisconnect)
            return _problem(
                "the upload ended early" if gone else "the server has no room left on its disk"
            )
        return JSONResponse({"scan": scan.number}, headers=_FORGET)

    @app.get("/brain/files/{token}/{number}/{name}")
    def file(token: str, number: int, name: str, request: Request) -> Response:
        try:
            scan = sessions.get(token, visitor_of(request).known()).get(number)
        except ValueError:
            return Response(status_code=404, headers=_FORGET)
        path = scan.folder / name
        if name not in (HEAD, BRAIN, EXPLANATION, PLANES) or not path.is_file():
            return Response(status_code=404, headers=_FORGET)
        kind = "image/png" if name == PLANES else "application/gzip"
        return FileResponse(path, media_type=kind, headers=_KEEP)

    @app.get("/brain/tables/{token}")
    def csv(token: str, request: Request, profile: str = "default") -> Response:
        try:
            scope = visitor_of(request).known()
            text = table(sessions.get(token, scope), sites.get(desk.brain, scope, profile))
        except _EXPECTED as error:
            return _problem(error)
        return _attached(text, "text/csv; charset=utf-8", "brain-ages.csv")

    @app.get("/brain/profiles/{profile}")
    def export(profile: str, request: Request) -> Response:
        try:
            site = sites.get(desk.brain, visitor_of(request).known(), profile)
            with tempfile.TemporaryDirectory(dir=sessions.root) as folder:
                path = Path(folder) / "profile"
                site.export(path)
                data = path.read_bytes()
        except _EXPECTED as error:
            return _problem(error)
        return _attached(data, "application/octet-stream", f"brain-{profile}.json")

    @app.post("/brain/profiles/{profile}")
    async def import_(profile: str, request: Request) -> Response:
        with tempfile.TemporaryDirectory(dir=sessions.root) as folder:
            path = Path(folder) / "profile"
            try:
                visitor = visitor_of(request)
                site = sites.get(desk.brain, visitor.known(), profile)
                await _store(request, path, lambda: sessions.room(visitor.seat))
                return JSONResponse({"imported": await run_in_threadpool(site.import_, path)})
            except ClientDisconnect:
                return _problem("the upload ended early")
            except _EXPECTED as error:
                return _problem(str(error).replace(str(path), "the file"))


async def _store(request: Request, path: Path, room: Callable[[], int] | None = None) -> None:
    """Writes the body as it arrives. Pieces are small, so the loop hardly waits for the disk.

    Args:
        request: with the body.
        path: a new file.
        room: bytes that are left; asked now and then, since others upload at the same time.

    Raises:
        SessionError: no room is left.
    """
    written = 0
    with open(path, "xb") as target:
        async for piece in request.stream():
            target.write(piece)
            written += len(piece)
            if room is not None and written >= _LOOK_BYTES:
                written = 0
                if await run_in_threadpool(room) < 0:
                    raise SessionError(_NO_ROOM)


def _attached(data: str | bytes, kind: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"', **_FORGET}
    return Response(data, media_type=kind, headers=headers)


def _kind(given: str) -> InputKind:
    from neuro.scans.preprocess import check_kind

    return check_kind(given or "head")


def _problem(error: BaseException | str) -> Response:
    text = " ".join(str(error).split())[:300]
    return JSONResponse({"error": text}, status_code=422, headers=_FORGET)
