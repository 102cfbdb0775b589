"""Whose teaching a request reads and writes, and the profiles that are open for it.

On the own machine everybody is the owner; with passwords it is who signed in; an open server tells
browsers apart by a cookie that it gives them. People on one server never see what others taught.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Generic, TypeVar

from apps.web.limits import OPEN_PROFILES, PROFILES_EACH
from apps.web.turns import Seat
from enn_core.lessons.places import DEFAULT, LOCAL, ProfileError, check_name, list_journals
from enn_core.lessons.profile import Profile

__all__ = [
    "COOKIE",
    "LOCAL",
    "Shelf",
    "UnknownVisitor",
    "Visitor",
    "Visitors",
    "network_of",
    "remember",
    "visitor_of",
]

COOKIE = "enn-visitor"

_KEY = "eigen.visitor"  # of the ASGI scope
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")  # 32 random bytes
_YEAR = 365 * 24 * 3600

M = TypeVar("M")
P = TypeVar("P", bound=Profile[Any])


class UnknownVisitor(ValueError):
    """Something is to be remembered for a visitor whom nothing tells from others."""


@dataclass(frozen=True)
class Visitor:
    """Who sent a request.

    Attributes:
        scope: name of the place of their profiles; None while there is nothing to tell them by.
        set_cookie: value of a Set-Cookie header to answer with, or None.
        network: where they are, see `network_of`; "" on the own machine. Cookies cost nothing, so
            it has a share of its own in what visitors wait for.
    """

    scope: str | None
    set_cookie: str | None = None
    network: str = ""

    @property
    def seat(self) -> Seat:
        """Who they are among those who wait."""
        return Seat(self.network, self.scope or self.network)

    def known(self) -> str:
        """The scope; raises UnknownVisitor if there is none."""
        if self.scope is None:
            raise UnknownVisitor(
                f"this server tells visitors apart by the cookie {COOKIE}, which this request "
                "lacks; allow cookies and load the page again"
            )
        return self.scope


class Visitors:
    """Tells from a request who sent it.

    Args:
        passwords: visitors sign in.
        loopback: only this machine can reach the server, so that without passwords every visitor
            is its user. Otherwise cookies have to tell visitors apart.
    """

    def __init__(self, *, passwords: bool = False, loopback: bool = True) -> None:
        self.passwords = passwords
        self.loopback = loopback

    def identify(
        self,
        login: str | None,
        headers: Mapping[bytes, str],
        *,
        page: bool = False,
        network: str = "",
    ) -> Visitor:
        """The sender of a request.

        Args:
            login: the name of whoever signed in, None on a server without passwords.
            headers: by lower-case name.
            page: the request may be answered with a new cookie: it begins a visit.
            network: where it comes from, see `network_of`.
        """
        if self.passwords:
            return Visitor(None if login is None else f"user-{_short(login)}", network=network)
        if self.loopback:
            return Visitor(LOCAL)
        secret = _cookie(headers.get(b"cookie", ""))
        if secret is not None:
            cookie = _set_cookie(secret) if page else None
            return Visitor(f"visitor-{_short(secret)}", cookie, network)
        # A visitor who comes by a link of another site has a cookie that the browser keeps back
        # this once (SameSite=Strict); a new one must not replace it.
        foreign = headers.get(b"sec-fetch-site", "none") in {"cross-site", "same-site"}
        fresh = page and not foreign
        cookie = _set_cookie(secrets.token_urlsafe(32)) if fresh else None
        return Visitor(None, cookie, network)


def remember(scope: Mapping[str, Any], visitor: Visitor) -> dict[str, Any]:
    """An ASGI scope that knows its visitor."""
    return {**scope, _KEY: visitor}


def visitor_of(request: Any) -> Visitor:
    """The visitor behind a request, Starlette's or Gradio's; nobody if no guard stood before it."""
    inner = getattr(request, "request", None) or request
    visitor = inner.scope.get(_KEY)
    return visitor if isinstance(visitor, Visitor) else Visitor(None)


class Shelf(Generic[M, P]):
    """The open profiles of a server, one per person, profile and model: those used last.

    Args:
        journal_of: file name of the journals of a model's profiles.
        open_profile: opens the profile (model, name, scope=...), like `Teacher.open`.
        default: the profile of who names none. Where it is not the usual one, the usual one is
            out of reach: what is tried out in a demo must not change the user's own searches.
    """

    def __init__(
        self,
        journal_of: Callable[[M], str],
        open_profile: Callable[..., P],
        *,
        default: str = DEFAULT,
    ) -> None:
        self.default = default
        self._journal_of = journal_of
        self._open_profile = open_profile
        self._journals: dict[int, tuple[M, str]] = {}  # by the id of a model, which so stays
        self._open: OrderedDict[tuple[str, str, str], P] = OrderedDict()
        self._lock = threading.Lock()

    def called(self, profile: str) -> str:
        """The profile that a name stands for here."""
        return self.default if profile == DEFAULT else profile

    def get(self, model: M, scope: str, profile: str) -> P:
        """A profile of a model; nothing is written until it is taught something.

        Raises:
            ProfileError: the name cannot be a profile's, or there are too many already.
            RuntimeError, ValueError, OSError: what was taught cannot be read.
        """
        profile = self.called(profile)
        key = (scope, profile, self._journal(model))
        with self._lock:
            if not isinstance(profile, str) or key not in self._open:  # strangers send anything
                check_name(profile)
                names = self.names(model, scope)
                if scope != LOCAL and profile not in names and len(names) >= PROFILES_EACH:
                    raise ProfileError(
                        f"there are {len(names)} profiles already, the most that one visitor may "
                        "have; choose one of them, or forget one"
                    )
                self._open[key] = self._open_profile(model, profile, scope=scope)
                # One that falls out may be in use: it closes when its last user lets go.
                if len(self._open) > OPEN_PROFILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]

    def names(self, model: M, scope: str | None) -> list[str]:
        """Profiles that were taught something, in alphabetical order; nobody (None) has any."""
        names = list_journals(self._journal(model), scope) if scope is not None else []
        return [name for name in names if self.called(name) == name]

    def _journal(self, model: M) -> str:
        """`journal_of`, asked once: a server's models are few and never change."""
        if id(model) not in self._journals:
            self._journals[id(model)] = model, self._journal_of(model)
        return self._journals[id(model)][1]


def network_of(address: str) -> str:
    """What of an address stands for one household or firm: all of IPv4's, the half of IPv6's.

    >>> network_of("192.0.2.7"), network_of("2001:db8::1:2"), network_of("::ffff:192.0.2.7")
    ('192.0.2.7', '2001:db8::', '192.0.2.7')
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ipaddress.IPv6Address(int(ip) >> 64 << 64)
    return str(ip)


def _short(secret: str) -> str:
    return sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _cookie(header: str) -> str | None:
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE and _SECRET.fullmatch(value):
            return value
    return None


def _set_cookie(secret: str) -> str:
    # Not `Secure`: the server itself speaks plain HTTP.
    return f"{COOKIE}={secret}; Path=/; Max-Age={_YEAR}; HttpOnly; SameSite=Strict"
