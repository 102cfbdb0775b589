"""Seals of JSON objects and digests of files."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enn_core.files.digests import DigestError, check_seal, file_sha256, sealed

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "sha256"), JSON, max_size=4))
def test_a_sealed_object_survives_a_file_and_nothing_else(content):
    stored = json.loads(json.dumps(sealed(content)))
    check_seal(stored)
    with pytest.raises(DigestError, match="damaged"):
        check_seal({**stored, "another": 1})


def test_one_changed_number_is_noticed():
    stored = sealed({"slope": [0.25, 1e-300]})
    with pytest.raises(DigestError, match="digest"):
        check_seal({**stored, "slope": [0.25, 2e-300]})


def test_what_has_no_seal_is_as_before():
    check_seal({"slope": 1})


def test_the_digest_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
