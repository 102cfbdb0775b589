"""What browsers keep of the search page, and send back: read as what strangers send.

A server that kept it would have to know when a tab is closed, for which Gradio holds a connection
open for each, of the six that a browser opens; and would have forgotten it after a restart.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from apps.web.kept import read_object, read_profile
from apps.web.limits import MARKED_PICTURES
from apps.web.search.handlers import Marks, Query, Screen, clean

__all__ = ["read_opening", "read_query", "read_screen", "write"]

MOST_CHARACTERS = 80  # of a token


def write(value: Screen | Query) -> str:
    """As text for `apps.web.kept.kept`."""
    return json.dumps(asdict(value), separators=(",", ":"))


def read_query(text: object) -> Query:
    """A query that `write` wrote; an empty one for anything else."""
    return _query(read_object(text))


def read_screen(text: object) -> Screen:
    """A screen that `write` wrote; what is none of its parts is as on a new page."""
    said = read_object(text)
    return Screen(
        query=_query(said.get("query")),
        profile=read_profile(said.get("profile")),
        taught=said.get("taught") is not False,
        ids=_ids(said.get("ids")),
        refused=_marks(said.get("refused")),
        place=_word(said.get("place")) or "",
    )


def read_opening(text: object) -> tuple[str, Screen | None]:
    """The profile that a browser remembers, and what its tab showed when it was loaded again."""
    said = read_object(text)
    profile = said.get("profile")
    shown = read_object(said.get("shown"))
    kept = None
    if shown:
        kept = Screen(query=_query(shown), taught=shown.get("taught") is not False)
    return profile if isinstance(profile, str) else "", kept


def _query(said: object) -> Query:
    facts = said if isinstance(said, dict) else {}
    text = facts.get("text")
    words = clean(text) if isinstance(text, str) else ""
    return Query(words, _word(facts.get("upload")), _word(facts.get("like")))


def _marks(said: object) -> Marks | None:
    if not isinstance(said, dict):
        return None
    # Pages of 0.1 kept the words alone.
    query, collection, uid = (
        _query(said.get("query", said)),
        said.get("collection"),
        said.get("uid"),
    )
    if query.empty or type(collection) is not int or not 0 <= collection < 256:
        return None
    good, bad, unmark = (_ids(said.get(name)) for name in ("good", "bad", "unmark"))
    profile = read_profile(said.get("profile"))
    return Marks(collection, query, good, bad, unmark, _word(uid), profile)


def _ids(said: object) -> tuple[int, ...]:
    if not isinstance(said, list) or len(said) > MARKED_PICTURES:
        return ()
    return tuple(id for id in said if type(id) is int and 0 <= id < 2**63)


def _word(said: object) -> str | None:
    if not isinstance(said, str) or not 0 < len(said) <= MOST_CHARACTERS or not said.isascii():
        return None
    return said
