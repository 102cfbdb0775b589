"""Taking a profile along: its file to download, and one to upload.

The routes name a collection by number and a profile by name, never a file; whose profile it is
comes from the request (`apps.web.visitors`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from apps.web.limits import SEARCH_LESSONS_BYTES
from apps.web.server import Route
from apps.web.visitors import visitor_of

if TYPE_CHECKING:
    from apps.web.search.collection import Collection
    from apps.web.visitors import Shelf
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.teach.teacher import Teacher

__all__ = ["TEACHING_ROUTES", "add_teaching_routes"]

_ADDRESS = r"/teaching/\d{1,3}/[A-Za-z0-9._-]{1,64}"
TEACHING_ROUTES: tuple[Route, ...] = (
    Route("GET", _ADDRESS, turns=True),
    Route("POST", _ADDRESS, max_body=SEARCH_LESSONS_BYTES),
)

# What a profile that cannot be read or written raises, with a line fit to show.
_EXPECTED = (LookupError, ValueError, RuntimeError, OSError)


def add_teaching_routes(
    app: FastAPI, collections: Sequence[Collection], teachers: Shelf[RetrievalModel, Teacher]
) -> None:
    """Adds `GET` and `POST /teaching/COLLECTION/PROFILE` to an app."""

    def export(collection: int, profile: str, request: Request) -> Response:
        try:
            model = collections[collection].model
            teacher = teachers.get(model, visitor_of(request).known(), profile)
            if not teacher.history():
                return _problem("nothing has been taught under this profile", 404)
            with tempfile.TemporaryDirectory(prefix="enn-export-") as folder:
                path = Path(folder) / "profile.json"
                teacher.export(path)
                data = path.read_bytes()
        except _EXPECTED as error:
            return _problem(error)
        name = f'attachment; filename="taught-{profile}.json"'
        headers = {"Content-Disposition": name, "Cache-Control": "no-store"}
        return Response(data, media_type="application/json", headers=headers)

    def import_(collection: int, profile: str, request: Request, data: bytes) -> Response:
        try:
            model = collections[collection].model
            teacher = teachers.get(model, visitor_of(request).known(), profile)
            with tempfile.TemporaryDirectory(prefix="enn-import-") as folder:
                path = Path(folder) / "profile.json"
                path.write_bytes(data)
                return JSONResponse({"imported": teacher.import_(path)})
        except _EXPECTED as error:
            return _problem(error)

    @app.get("/teaching/{collection}/{profile}")
    def send(collection: int, profile: str, request: Request) -> Response:
        return export(collection, profile, request)

    @app.post("/teaching/{collection}/{profile}")
    async def receive(collection: int, profile: str, request: Request) -> Response:
        data = await request.body()
        return await run_in_threadpool(import_, collection, profile, request, data)


def _problem(error: BaseException | str, status: int = 422) -> Response:
    """One line for the page; temporary file names are nobody's business."""
    text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
    text = " ".join(text.split())
    folder = tempfile.gettempdir()
    words = [
        "the file" if word.strip("'\",:;").startswith(folder) else word for word in text.split(" ")
    ]
    return JSONResponse({"error": " ".join(words)[:300]}, status_code=status)
