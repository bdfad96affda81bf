"""Text that is printed or published."""

import pytest

from optimum_cap.text import public_name


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("/home/me/model", "./model"),
        ("runs/may/model", "./model"),
        ("../model", "./model"),
        ("~/model", "./model"),
        ("./model", "./model"),
        ("/home/me/hub/models--owner--a--b/snapshots/0123abcd", "owner/a--b"),
        ("hub/models--gpt2/snapshots/0123abcd/", "gpt2"),
        ("/home/me/snapshots/model", "./model"),
        ("", None),
    ],
)
def test_local_paths_are_not_published(name: str, public: str | None) -> None:
    assert public_name(name) == public
