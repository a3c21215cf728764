"""Kill commands at random moments, let each go on to its end, and compare its bytes: `make kills TIMES=12`.

    python tests/fuzz/kills.py [JOB ...] [--times 12]      # of shards, index, embed, features, import; all by default

Each output is killed (SIGKILL, all workers too) up to five times while it is made; afterwards every file of it must
equal that of a run that nobody disturbed.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.shards_data import karpathy

KILLS = 5
OUT, WORKERS = "OUT", "WORKERS"
"""Words of a command, replaced by the folder to write and by 1 or 2."""


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, its makers' notes and lock among them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(folder: Path) -> list[str]:
    """A build of shards, one image of which is broken."""
    source = karpathy(folder / "in", {"train": 300, "val": 40}, suffix="tif")
    (folder / "in/images/7.tif").write_bytes(b"broken")
    return ["-m", "msa_openclip.shards", "build", str(source), OUT, "--images", str(source.parent / "images"),
            "--shards", "12", "--resize-px", "160", "--resize-mode", "squash", "--quiet",
            "--workers", WORKERS]  # fmt: skip


def index(folder: Path) -> list[str]:
    """An index of images in many small segments, one image of which is broken."""
    return ["-m", "msa_openclip", "index", model(folder), OUT, "--folder", tiles(folder), "--segment-images", "3"]


def embed(folder: Path) -> list[str]:
    """Vectors of images in many small partitions, one image of which is broken."""
    return ["-m", "msa_openclip", "embed", model(folder), OUT, "--folder", tiles(folder), "--partition-images", "3",
            "--precision", "fp32"]  # fmt: skip


def features(folder: Path) -> list[str]:
    """Outputs of locked towers, shard by shard."""
    from helpers.retrieval_data import write_shards

    source = write_shards(folder / "in", count=60, shards=12)
    return ["-m", "msa_openclip", "features", model(folder), OUT, "--shards", source, "--views", "2"]


def imported(folder: Path) -> list[str]:
    """An index of partitions that somebody made."""
    words = [str(folder / "parts") if word == OUT else word for word in embed(folder)]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return ["-m", "msa_openclip", "index", "import", OUT, str(folder / "parts")]


def model(folder: Path) -> str:
    """A tiny model, known to this process and to those that it starts."""
    import open_clip
    import torch
    from helpers import tiny
    from helpers.retrieval_data import randomise

    (folder / "configs").mkdir()
    tiny.write_config(folder / "configs", "MSA-tiny-ViT", tiny.config("ViT", msa={}))
    os.environ["MSA_OPENCLIP_CONFIGS"] = str(folder / "configs")
    os.environ["XDG_STATE_HOME"] = str(folder / "state")  # what `index` remembers of models
    open_clip.add_model_config(folder / "configs")
    torch.save(randomise(open_clip.create_model("MSA-tiny-ViT"), seed=3).state_dict(), folder / "msa.pt")
    return f"MSA-tiny-ViT={folder / 'msa.pt'}"


def tiles(folder: Path) -> str:
    """Sixty images."""
    from helpers.retrieval_data import scene

    (folder / "tiles").mkdir()
    for number in range(60):
        scene(number).save(folder / "tiles" / f"{number}.png")
    (folder / "tiles/7.png").write_bytes(b"broken")
    return str(folder / "tiles")


JOBS: dict[str, Callable[[Path], list[str]]] = {
    "shards": shards, "index": index, "embed": embed, "features": features, "import": imported,
}  # fmt: skip
"""Name -> what makes its sources in a folder and returns the command, without Python's name."""


def run(name: str, times: int, draw: random.Random) -> bool:
    """Make, kill, go on, compare; whether all went well."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = JOBS[name](folder)

        def start(out: Path, workers: int) -> subprocess.Popen[bytes]:
            words = [{OUT: str(out), WORKERS: str(workers)}.get(word, word) for word in command]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            return subprocess.Popen([sys.executable, *words], start_new_session=True, **quiet)

        began = time.monotonic()
        process, first_s = start(folder / "whole", 1), 0.0
        while process.poll() is None:
            first_s = first_s if (folder / "whole").exists() else time.monotonic() - began
            time.sleep(0.01)
        duration_s, killed, bad = time.monotonic() - began, 0, 0
        if process.returncode:
            print(f"{name}: failed undisturbed")
            return False
        for number in range(times):
            out = folder / f"out{number}"
            for _ in range(draw.randint(1, KILLS)):
                process = start(out, draw.choice((1, 2)))
                time.sleep(draw.uniform(first_s, duration_s))  # before, nothing is written
                killed += process.poll() is None
                with suppress(ProcessLookupError):  # it was faster
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if start(out, 1).wait() or content(out) != content(folder / "whole"):
                bad += 1
                print(f"{name}: output {number} differs", flush=True)
    print(f"{name}: {times} outputs, killed {killed} times: {times - bad} as if undisturbed", flush=True)
    return not bad


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS)} (default: all)")
    parser.add_argument("--times", type=int, default=12, help="outputs of each job (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="(default: another each time)")
    parsed = parser.parse_args()
    print(f"seed {parsed.seed}", flush=True)
    draw = random.Random(parsed.seed)
    went_well = [run(name, parsed.times, draw) for name in parsed.jobs or JOBS]
    return 0 if all(went_well) else 1


if __name__ == "__main__":
    sys.exit(main())
