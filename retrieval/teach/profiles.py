"""Profiles of the search: one journal for each model, see `enn_core.lessons.places`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from enn_core.lessons.places import (
    DEFAULT,
    LOCAL,
    ProfileError,
    check_name,
    journal_name,
    journal_path,
    list_journals,
    profiles_dir,
)

if TYPE_CHECKING:
    from retrieval.index.manifest import EmbeddingModel

__all__ = [
    "DEFAULT",
    "LOCAL",
    "ProfileError",
    "check_name",
    "journal_of",
    "journal_of_weights",
    "list_profiles",
    "profile_path",
    "profiles_dir",
]


def profile_path(name: str, model: EmbeddingModel, scope: str = LOCAL) -> Path:
    """The journal of a profile for a model, which need not exist.

    Raises:
        ProfileError: if the name or the scope cannot be one.
    """
    return journal_path(name, journal_of(model), scope)


def list_profiles(model: EmbeddingModel, scope: str = LOCAL) -> list[str]:
    """Names of the profiles that this model was taught under, in alphabetical order.

    Raises:
        ProfileError: if the scope cannot be one.
    """
    return list_journals(journal_of(model), scope)


def journal_of(model: EmbeddingModel) -> str:
    """File name of the journals of a model's profiles."""
    return journal_of_weights(str(model.fingerprint()["weights"]))


def journal_of_weights(weights: str) -> str:
    """The same, of a model by the SHA-256 of its weights, in hex."""
    return journal_name("search", weights)
