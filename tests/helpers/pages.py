"""What every HTML page has to keep."""

from __future__ import annotations

import re


def assert_stands_alone(html: str) -> None:
    """The page runs no script and loads nothing, and forbids both to the browser."""
    assert "<script" not in html
    assert set(re.findall(r"<[^>]*?(?:src|href)=\W*(\w+:?)", html)) == {"data:"}
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'; img-src data:" in html
