"""The search demo: opens or builds the indexes and serves the search page.

    from apps.web.search.serve import serve
    serve(folders=[Path("PHOTOS")])

The page itself is in `apps.web.search.page`, the protection around it in `apps.web.server`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.web import server
from apps.web.search.gallery import credits_of, gallery

server.prepare_environment()  # before anything imports gradio

if TYPE_CHECKING:
    from fastapi import FastAPI

    from apps.web.search.collection import Collection
    from apps.web.search.pictures import Pictures, Uploads
    from apps.web.visitors import Shelf
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.teach.teacher import Teacher

__all__ = ["DEMO", "create_app", "serve"]

DEMO = "demo"
"""The profile that learns on the page of the sample gallery: nobody's own searches change."""

# Short enough to fit side by side, and the gallery has several pictures for each.
GALLERY_EXAMPLES = (
    "musicians playing on a stage",
    "a bird flying in the air",
    "a castle beside the water",
    "horses in a field",
    "a bridge at night",
    "flowers",
)


def create_app(
    collections: Sequence[Collection],
    pictures: Pictures,
    uploads: Uploads,
    teachers: Shelf[RetrievalModel, Teacher],
    **options: Any,
) -> FastAPI:
    """A FastAPI application with the page, its files and /healthz; run it behind a `Guard`."""
    from fastapi import FastAPI

    from apps.web.search.page import TITLE, build, head, theme
    from apps.web.search.pictures import add_picture_routes
    from apps.web.search.profile_files import add_teaching_routes

    app = FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None)

    add_picture_routes(app, pictures, uploads)
    add_teaching_routes(app, collections, teachers)
    return server.mount_page(
        app,
        build(collections, pictures, uploads, teachers, **options),
        theme=theme(),
        head=head(teachers.default),
    )


def serve(
    index: Path | None = None,
    folders: Sequence[Path] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth_file: Path | None = None,
    open_browser: bool = False,
    forwarded_allow_ips: str = "",
    model: str | None = None,
) -> None:
    """Opens or builds the indexes and serves the page until Ctrl+C.

    Args:
        index: an index directory. None: that of each folder (inside it, or in the user's cache
            when the folder is read-only).
        folders: folders of pictures, indexed at first start. None at all: the shipped gallery,
            where the profile DEMO learns.
        host, port, auth_file, open_browser, forwarded_allow_ips: see `apps.web.server.run`.
        model: name of the model for folders that have no index yet.

    Raises:
        ValueError: arguments that do not go together, an unknown model, another model's index.
        OSError: no such folder or index, the port is taken, and the like.
    """
    from apps.web.search.pictures import PICTURE_ROUTES, Pictures, Uploads
    from apps.web.search.profile_files import TEACHING_ROUTES
    from apps.web.visitors import Shelf
    from retrieval.teach.profiles import DEFAULT, journal_of
    from retrieval.teach.teacher import Teacher

    # Fail before the slow part.
    if index is None and not folders:
        gallery()
    if auth_file is not None:
        server.read_auth_file(auth_file, warn=lambda _: None)
    server.check_port(host, port, forwarded_allow_ips)
    collections: list[Collection] = []
    pictures = Pictures(lambda ref: collections[ref.collection].read(ref))
    collections.extend(_open_collections(index, list(folders), model, pictures))
    _warm_up(collections)
    demo = index is None and not folders
    options = {"examples": GALLERY_EXAMPLES} if demo else {}
    teachers: Shelf[RetrievalModel, Teacher] = Shelf(
        journal_of, Teacher.open, default=DEMO if demo else DEFAULT
    )
    app = create_app(collections, pictures, Uploads(), teachers, **options)
    routes = (
        server.Route("GET", "/healthz", public=True),
        *server.GRADIO_ROUTES,
        *PICTURE_ROUTES,
        *TEACHING_ROUTES,
    )
    try:
        server.run(
            app,
            routes=routes,
            host=host,
            port=port,
            auth_file=auth_file,
            title="The search page",
            open_browser=open_browser,
            forwarded_allow_ips=forwarded_allow_ips,
        )
    finally:
        for collection in collections:
            collection.cancel_update()
        for collection in collections:
            collection.wait(10)


def _open_collections(
    index: Path | None, folders: list[Path], model_name: str | None, pictures: Pictures
) -> Iterator[Collection]:
    from apps.web.search.collection import Collection
    from retrieval.index.eigen_index import EigenIndex, IndexLocked, default_index_dir
    from retrieval.model.loading import load
    from retrieval.search import open_index

    if index is not None and len(folders) > 1:
        raise ValueError(
            f"one index holds one folder, got --index {index} with {len(folders)} folders; "
            "leave --index out, then each folder has its own"
        )
    for folder in folders:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder; give a folder of pictures")
    if index is not None and not folders:
        searcher = open_index(index)
        root = searcher.index.root
        name = root.name if root is not None else Path(index).resolve().name
        yield Collection(name, searcher, root, token=pictures.token)
        return

    _say("Loading the model…")
    model: RetrievalModel | None = None
    shipped = not folders
    for number, folder in enumerate(folders or [gallery()]):
        folder = folder.resolve()
        directory = index if index is not None else default_index_dir(folder)
        known = (directory / "manifest.json").exists()
        if known and not shipped:
            searcher = open_index(directory, model=model)
            model = model or searcher.model
        else:
            model = model or (load(model_name) if model_name else load())
            if shipped or (index is None and not _writable(folder)):
                directory = _cached_index_dir(folder, model)
            if shipped:
                _discard_damaged(directory)
            if not (directory / "manifest.json").exists():
                EigenIndex.create(directory, model, root=folder).close()
            with EigenIndex.open(directory, model=model) as built, _terminal_progress() as show:
                try:
                    built.update(folder, model, progress=show)
                except IndexLocked:
                    if not len(built):  # else another server is at it, and there is something
                        raise
            searcher = open_index(directory, model=model)
        name = "the sample gallery" if shipped else folder.name
        yield Collection(
            name,
            searcher,
            folder,
            number=number,
            token=pictures.token,
            credits=credits_of(folder) if shipped else None,
        )


def _warm_up(collections: Sequence[Collection]) -> None:
    """Does before the first visitor what they would wait for: words now, the rest beside."""
    from PIL import Image

    from retrieval.teach.guard import encode_protected

    models = list({id(c.model): c.model for c in collections}.values())
    for model in models:
        model.text_vectors(["warm up"])

    def warm_up() -> None:
        for model in models:
            # What fails here fails again, visibly, when a visitor asks for it.
            with contextlib.suppress(Exception):
                encode_protected(model)
                blank = Image.new("RGB", (64, 64), "white")
                model.image_vectors(model.preprocess(blank)[None])

    threading.Thread(target=warm_up, name="warm-up", daemon=True).start()


def _cached_index_dir(folder: Path, model: RetrievalModel) -> Path:
    """Where the index of a read-only folder lives; another model gets another directory."""
    from platformdirs import user_cache_dir

    what = f"{folder}\n{sorted(model.fingerprint().items())}".encode("utf-8", "surrogateescape")
    name = f"{folder.name}-{hashlib.sha256(what).hexdigest()[:12]}"
    return Path(user_cache_dir("eigen-suite", appauthor=False)) / "indexes" / name


def _discard_damaged(directory: Path) -> None:
    """Delete an index in the cache that is damaged: all of it can be made again."""
    from retrieval.index.check import check_index
    from retrieval.index.eigen_index import NoIndex

    with contextlib.suppress(NoIndex):
        if check_index(directory):
            _say("The index of these pictures in the cache is damaged; it is made again.")
            shutil.rmtree(directory)


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)


@contextlib.contextmanager
def _terminal_progress() -> Iterator[Callable[[Any], None]]:
    """Shows the progress of a first indexing on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("Looking at the folder", total=None)

        def show(progress: Any) -> None:
            if progress.stage == "index":
                bar.update(
                    task,
                    description="Reading pictures",
                    completed=progress.done,
                    total=progress.total,
                )

        yield show


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
