"""The search page's server, behind its guard, in a thread of the tests: real HTTP, quick start."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import uvicorn

from apps.web import server
from apps.web.connections import Proxies
from apps.web.search.collection import Collection
from apps.web.search.pictures import PICTURE_ROUTES, Pictures, Uploads
from apps.web.search.profile_files import TEACHING_ROUTES
from apps.web.search.serve import create_app
from apps.web.visitors import Shelf, Visitors
from retrieval.model.retrieval_model import RetrievalModel
from retrieval.search import open_index
from retrieval.teach.profiles import journal_of
from retrieval.teach.teacher import Teacher

__all__ = ["LiveServer"]


class LiveServer:
    """Serves one indexed folder until `stop`.

    Args:
        folder: with its index inside.
        model: the index's model.
        users: names and passwords, or None.
        loopback: whether it behaves as if only this machine could reach it.
    """

    def __init__(
        self,
        folder: Path,
        model: RetrievalModel,
        *,
        users: Mapping[str, str] | None = None,
        loopback: bool = True,
    ) -> None:
        collections: list[Collection] = []
        pictures = Pictures(lambda ref: collections[ref.collection].read(ref))
        searcher = open_index(folder, model=model)
        collections.append(Collection(folder.name, searcher, folder, token=pictures.token))
        app = create_app(collections, pictures, Uploads(), Shelf(journal_of, Teacher.open))
        guarded = server.Guard(
            app,
            routes=(
                server.Route("GET", "/healthz", public=True),
                *server.GRADIO_ROUTES,
                *PICTURE_ROUTES,
                *TEACHING_ROUTES,
            ),
            users=users,
            visitors=Visitors(passwords=users is not None, loopback=loopback),
        )
        self._listener = server._listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self._searcher = searcher
        config = server.configuration(guarded, Proxies())
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()
        self._searcher.close()
