"""The fuzz targets for as long as a test may take, and every case that they have found."""

from __future__ import annotations

import pytest
from fuzz.run import CORPUS, cases, run_case, search
from fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_found_cases_stay_mended(name: str) -> None:
    for path in cases(name):
        run_case(name, path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_no_new_case_is_found_at_once(name: str) -> None:
    search(name, examples=200, seed=0)


def test_the_corpus_has_no_stranger() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
