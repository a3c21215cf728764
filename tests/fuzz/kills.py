"""Kill shard builds at random moments, let each go on to its end, and compare its bytes: `make kills TIMES=12`.

Each build is killed (SIGKILL, all its workers too) up to five times; shards, manifest, sizes and rejections must equal
those of a build that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.shards_data import karpathy

KILLS = 5


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, the builder's notes and lock among them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> int:
    """Build, kill, go on, compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=12, help="number of builds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="(default: another each time)")
    parsed = parser.parse_args()
    draw = random.Random(parsed.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = karpathy(folder / "in", {"train": 300, "val": 40}, suffix="tif")
        (folder / "in/images/7.tif").write_bytes(b"broken")
        command = [sys.executable, "-m", "msa_openclip.shards", "build", str(source), "OUT", "--images",
                   str(source.parent / "images"), "--shards", "12", "--resize-px", "160", "--resize-mode", "squash",
                   "--quiet", "--workers"]  # fmt: skip

        def build(out: Path, workers: int) -> subprocess.Popen[bytes]:
            words = [str(out) if word == "OUT" else word for word in command]
            return subprocess.Popen([*words, str(workers)], stdout=subprocess.DEVNULL, start_new_session=True)

        began = time.monotonic()
        if build(folder / "whole", 1).wait():
            return 1
        duration_s, killed, bad = time.monotonic() - began, 0, 0
        for number in range(parsed.times):
            out = folder / f"out{number}"
            for _ in range(draw.randint(1, KILLS)):
                process = build(out, draw.choice((1, 2)))
                time.sleep(draw.uniform(0, duration_s))
                killed += process.poll() is None
                with suppress(ProcessLookupError):  # it was faster
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if build(out, 1).wait() or content(out) != content(folder / "whole"):
                bad += 1
                print(f"build {number} of seed {parsed.seed} differs", flush=True)
    print(f"{parsed.times} builds, killed {killed} times (seed {parsed.seed}): {parsed.times - bad} as if undisturbed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
