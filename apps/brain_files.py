"""Files of the brain page: uploads, what its viewer reads, the table of a session, NiiVue.

Routes name sessions by their secret, scans by number and files by a word of a fixed list; nothing
that a client sends becomes a path, and nothing that a client sent is sent back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.requests import ClientDisconnect

from apps.brain_session import Desk, Scan, Session, SessionError, Sessions, clean_label
from apps.brain_worker import BRAIN, EXPLANATION, HEAD, PLANES
from apps.server import Route
from apps.visitors import visitor_of

if TYPE_CHECKING:
    from neuro.preprocess import InputKind

__all__ = ["BRAIN_ROUTES", "NIIVUE", "UPLOAD_LIMIT", "add_brain_routes"]

UPLOAD_LIMIT = 256 * 2**20
NIIVUE = "niivue-0.69.0.umd.js"

_SESSION = r"[\w-]{32}"
BRAIN_ROUTES: tuple[Route, ...] = (
    Route("GET", rf"/brain/{NIIVUE}".replace(".", r"\."), forever=True),
    Route("POST", rf"/brain/uploads/{_SESSION}", max_body=UPLOAD_LIMIT, stream=True),
    Route("GET", rf"/brain/files/{_SESSION}/\d{{1,6}}/(?:{HEAD}|{BRAIN}|{EXPLANATION}|{PLANES})"),
    Route("GET", rf"/brain/tables/{_SESSION}"),
)

_KEEP = {"Cache-Control": "private, max-age=3600"}
_FORGET = {"Cache-Control": "no-store"}


def add_brain_routes(
    app: FastAPI, sessions: Sessions, desk: Desk, table: Callable[[Session, str, str], str]
) -> None:
    """Adds `/brain/...` to an app.

    Args:
        app: the application.
        sessions, desk: where scans are kept and worked on.
        table: CSV of a session, for the visitor of a scope under a profile.
    """
    niivue = Path(__file__).parent / "assets" / "niivue" / NIIVUE

    @app.get(f"/brain/{NIIVUE}")
    def script() -> Response:
        return FileResponse(niivue, media_type="text/javascript")

    @app.post("/brain/uploads/{token}")
    async def upload(token: str, request: Request) -> Response:
        try:
            session = sessions.get(token, visitor_of(request).known())
            desk.check_room()
            if int(request.headers.get("content-length", 0)) > sessions.room():
                raise SessionError("this server has no room for more scans; try again later")
            kind = _kind(request.query_params.get("kind", ""))
            scan = session.add(clean_label(request.query_params.get("name", "")), kind)
        except ValueError as error:
            return _problem(error)
        try:
            await _store(request, scan)
        except (OSError, ClientDisconnect) as error:
            with contextlib.suppress(SessionError):
                session.remove(scan.number)
            gone = isinstance(error, ClientDisconnect)
            return _problem("the upload ended early" if gone else "the server's disk is full")
        desk.submit(scan)
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
            text = table(sessions.get(token, scope), scope, profile)
        except (ValueError, LookupError, OSError) as error:
            return _problem(error)
        headers = {"Content-Disposition": 'attachment; filename="brain-ages.csv"', **_FORGET}
        return Response(text, media_type="text/csv; charset=utf-8", headers=headers)


async def _store(request: Request, scan: Scan) -> None:
    """Writes the body as it arrives. Pieces are small, so the loop hardly waits for the disk."""
    with open(scan.source, "xb") as target:
        async for piece in request.stream():
            target.write(piece)


def _kind(given: str) -> InputKind:
    from neuro.preprocess import check_kind

    return check_kind(given or "head")


def _problem(error: BaseException | str) -> Response:
    text = " ".join(str(error).split())[:300]
    return JSONResponse({"error": text}, status_code=422, headers=_FORGET)
