"""Fuzz the readers: `make fuzz MINUTES=60`, or

    python tests/fuzz/run.py [TARGET ...] [--minutes 60]

Each target runs for so long, with other inputs every time.  A case that breaks a promise is made as small as hypothesis
can, put into corpus/TARGET, where the test suite finds it from then on, and ends the run with code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

CORPUS = Path(__file__).parent / "corpus"
LONGEST_S = 20
"""A case that takes longer hangs."""
MUTANTS = 9
"""Tried of each input that hypothesis draws, which takes longer than reading it."""
_PIECES = (b'"', b"'", b"\n", b"\r", b"\0", b",", b"\t", b"[", b"]", b"{", b"}", b":", b"\\", b"-1", b"9" * 30,
           b"1e999", b"NaN", b"\xff", b"\xff\xff\xff\xff", b"\x80\x00\x00\x00",
           b"\xed\xa0\x80", b"\xef\xbb\xbf")  # fmt: skip


def cases(name: str) -> list[Path]:
    """Cases that were found once."""
    return sorted((CORPUS / name).glob("*"))


def run_case(name: str, data: bytes) -> None:
    """One input through one target.

    Raises:
        TimeoutError: it takes longer than any input may.
    """

    def late(*_: object) -> None:
        raise TimeoutError(f"{name}: longer than {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_S)
    try:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[name].run(data, Path(folder))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutants(data: bytes) -> Iterator[bytes]:
    """The input with a few places cut out, overwritten, or copied elsewhere; the same ones each time."""
    chance = random.Random(data)
    for _ in range(MUTANTS):
        mutant = data
        for _ in range(chance.choice((1, 1, 2, 4))):
            at, size = chance.randrange(len(mutant) + 1), chance.choice((0, 1, 1, 2, 4, 16, 512))
            start = chance.randrange(len(mutant) + 1)
            piece = chance.choice((b"", chance.randbytes(size), mutant[start : start + size], chance.choice(_PIECES)))
            mutant = mutant[:at] + piece + mutant[at + chance.choice((0, len(piece), size)) :]
        yield mutant


def search(name: str, examples: int, seed: int) -> None:
    """Try inputs; the smallest that breaks a promise is kept in the corpus, and its error is raised."""
    failing: list[bytes] = []

    @seeded(seed)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(TARGETS[name].inputs)
    def attempt(data: bytes) -> None:
        for case in (data, *mutants(data)):
            try:
                run_case(name, case)
            except BaseException:
                failing.append(case)
                raise

    try:
        attempt()
    except BaseException:
        if failing:
            folder = CORPUS / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / hashlib.sha256(failing[-1]).hexdigest()[:12]).write_bytes(failing[-1])
        raise


def main() -> int:
    """Run targets one after the other; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=1, help="for each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="(default: another each time)")
    parsed = parser.parse_args()
    found = 0
    for name in parsed.targets or TARGETS:
        end, tried, seed = time.monotonic() + 60 * parsed.minutes, 0, parsed.seed
        try:
            while time.monotonic() < end:
                search(name, examples=500, seed=seed)
                tried, seed = tried + 500 * (1 + MUTANTS), seed + 1
        except Exception as error:
            found += 1
            for one in getattr(error, "exceptions", [error]):  # hypothesis groups what differs
                print(f"{name}: {type(one).__name__}: {one}", flush=True)
            print(f"  the last one is kept in {CORPUS / name}; seed {seed}", flush=True)
        else:
            print(f"{name}: nothing found in about {tried:,} inputs (seeds {parsed.seed} to {seed - 1})", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
