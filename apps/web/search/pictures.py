"""Pictures for a page: small and large views by opaque token, and uploads kept in memory.

A browser never names a file. It gets tokens signed with a key that lives as long as the server
process; a token stands for one version of one image of one collection. What is sent back was
always decoded and encoded anew, so neither metadata nor anything else of the file leaves.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import struct
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from apps.web.limits import PICTURE_BYTES, PICTURE_PIXELS
from apps.web.server import Route
from apps.web.visitors import visitor_of

__all__ = [
    "PICTURE_ROUTES",
    "ImageRef",
    "Pictures",
    "Uploads",
    "add_picture_routes",
]

CARD_SIDE = 448  # pixels; a card is about 220 CSS pixels wide, twice that on dense screens
LARGE_SIDE = 1600
UPLOAD_SIDE = 1024

PICTURE_ROUTES: tuple[Route, ...] = (
    Route("GET", r"/pictures/(?:card|large)/[\w-]{1,80}", turns=True),
    Route("GET", r"/uploads/[\w-]{1,80}"),
    Route("POST", r"/uploads", max_body=PICTURE_BYTES),
)


@dataclass(frozen=True)
class ImageRef:
    """One version of one image: the collection's number, the image's id, its content hash."""

    collection: int
    id: int
    version: str


class _ByteCache:
    """Least-recently-used values, bounded by their total size in bytes and an age in seconds.

    What goes for others is the oldest of the owner who has most.
    """

    def __init__(self, max_bytes: int, max_age: float = float("inf")) -> None:
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._items: OrderedDict[object, tuple[float, bytes]] = OrderedDict()
        self._owners: dict[object, str] = {}
        self._sizes: Counter[str] = Counter()  # by owner
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: object) -> bytes | None:
        with self._lock:
            if key not in self._items:
                return None
            born, value = self._items[key]
            if time.monotonic() - born > self._max_age:
                self._drop(key)
                return None
            self._items.move_to_end(key)
            return value

    def put(self, key: object, value: bytes, owner: str = "") -> None:
        with self._lock:
            if key in self._items:
                self._drop(key)
            self._items[key] = (time.monotonic(), value)
            self._owners[key] = owner
            self._sizes[owner] += len(value)
            self._size += len(value)
            while self._size > self._max_bytes and len(self._items) > 1:
                most = max(self._sizes, key=self._sizes.__getitem__)
                self._drop(next(k for k in self._items if self._owners[k] == most))

    def _drop(self, key: object) -> None:
        size = len(self._items.pop(key)[1])
        owner = self._owners.pop(key)
        self._size -= size
        self._sizes[owner] -= size
        if self._sizes[owner] <= 0:
            del self._sizes[owner]


class Pictures:
    """Tokens for images and the views they stand for.

    Args:
        load: gives the file's bytes for a reference and whether they still are the version that
            it names; raises LookupError or OSError when the image is gone.
        cache_bytes: memory for encoded views.
    """

    def __init__(
        self,
        load: Callable[[ImageRef], tuple[bytes, bool]],
        *,
        cache_bytes: int = 128 * 1024 * 1024,
    ) -> None:
        self._load = load
        self._key = secrets.token_bytes(32)
        self._cache = _ByteCache(cache_bytes)
        # Decoding a large photo takes tens of MB: bound how many are open at once.
        self._decoding = threading.BoundedSemaphore(4)

    def token(self, ref: ImageRef) -> str:
        """43 URL-safe characters."""
        packed = struct.pack(">BQ", ref.collection, ref.id) + bytes.fromhex(ref.version[:14])
        return base64.urlsafe_b64encode(packed + self._sign(packed)).decode().rstrip("=")

    def resolve(self, token: object) -> ImageRef:
        """The image behind a token; raises LookupError for anything this process did not issue."""
        raw = _unpacked(token)
        packed, signature = raw[:16], raw[16:]
        if not hmac.compare_digest(signature, self._sign(packed)):
            raise LookupError("unknown picture")
        return _reference(packed)

    def read(self, token: object) -> ImageRef:
        """What a token says, whoever issued it; raises LookupError if it is none."""
        return _reference(_unpacked(token))

    def view(self, token: str, side: int) -> tuple[bytes, bool]:
        """A token's picture, at most `side` pixels long, and whether it may be kept for good.

        Raises as `resolve` and `load` do, and ImageError.
        """
        from retrieval.images import thumbnail

        ref = self.resolve(token)
        cached = self._cache.get((ref, side))
        if cached is not None:
            return cached, True
        with self._decoding:
            data, same = self._load(ref)
            view = thumbnail(data, side)
        if same:
            self._cache.put((ref, side), view)
        return view, same

    def _sign(self, packed: bytes) -> bytes:
        return hmac.digest(self._key, packed, "sha256")[:16]


def _unpacked(token: object) -> bytes:
    """(32,) what a token packs and its signature, which is not looked at."""
    try:
        if not isinstance(token, str) or len(token) != 43:
            raise ValueError
        raw = base64.urlsafe_b64decode(token + "=")
        if base64.urlsafe_b64encode(raw).decode() != token + "=":
            raise ValueError  # another spelling of the same bytes
    except (ValueError, binascii.Error) as error:
        raise LookupError("unknown picture") from error
    return raw


def _reference(packed: bytes) -> ImageRef:
    collection, id = struct.unpack(">BQ", packed[:9])
    return ImageRef(collection, id, packed[9:16].hex())


class Uploads:
    """Query pictures of visitors: decoded once, kept small, in memory, for a while."""

    def __init__(self, *, max_bytes: int = 64 * 1024 * 1024, max_age: float = 6 * 3600) -> None:
        self._cache = _ByteCache(max_bytes, max_age)
        self._decoding = threading.BoundedSemaphore(2)

    def add(self, data: bytes, owner: str = "") -> str:
        """Keeps a picture; returns its token. Raises retrieval.images.ImageError if it is none.

        Args:
            data: the file.
            owner: whose it is: who sends many makes nobody else's go.
        """
        from retrieval.images import decode, thumbnail

        with self._decoding:
            image = decode(data, draft_size=(UPLOAD_SIDE, UPLOAD_SIDE), max_pixels=PICTURE_PIXELS)
            encoded = thumbnail(image, UPLOAD_SIDE)
        token = secrets.token_urlsafe(18)
        self._cache.put(token, encoded, owner)
        return token

    def get(self, token: object) -> bytes:
        """The encoded picture; raises LookupError when it expired or never existed."""
        data = self._cache.get(token) if isinstance(token, str) else None
        if data is None:
            raise LookupError("unknown upload")
        return data


def add_picture_routes(app: FastAPI, pictures: Pictures, uploads: Uploads) -> None:
    """Adds `/pictures/{card,large}/TOKEN`, `/uploads/TOKEN` and `POST /uploads` to an app."""
    from retrieval.images import ImageError

    sides = {"card": CARD_SIDE, "large": LARGE_SIDE}

    def image_response(data: bytes, keep: bool) -> Response:
        # A token names one version of an image, so that version's view never changes.
        cache = "private, max-age=31536000, immutable" if keep else "no-store"
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": cache})

    def missing() -> Response:
        return Response(status_code=404, headers={"Cache-Control": "no-store"})

    @app.get("/pictures/{size}/{token}")
    def picture(size: str, token: str) -> Response:
        try:
            return image_response(*pictures.view(token, sides[size]))
        except (LookupError, OSError, ImageError):
            return missing()

    @app.get("/uploads/{token}")
    def upload(token: str) -> Response:
        try:
            return image_response(uploads.get(token), True)
        except LookupError:
            return missing()

    @app.post("/uploads")
    async def receive_upload(request: Request) -> Response:
        try:
            seat = visitor_of(request).seat
            owner = seat.network or seat.visitor
            token = await run_in_threadpool(uploads.add, await request.body(), owner)
        except ImageError as error:
            text = f"This file cannot be used as a picture: {error}"
            return JSONResponse({"error": text}, status_code=422)
        return JSONResponse({"token": token})
