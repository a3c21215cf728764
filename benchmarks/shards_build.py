"""Build rate of the shard builder against img2dataset, a webdataset ShardWriter loop and a plain copy of the bytes.

    python benchmarks/shards_build.py --images 6000 --rounds 3 --out docs/results/shards_build.json

Everybody reads the same JPEG files from the same disk and stores their bytes unchanged.  img2dataset wants older
libraries than open_clip, so give the Python of an environment of its own: --img2dataset-python PATH.
Contestants take turns, round by round; reported are medians and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import webdataset
from machine import cpu_name

from msa_openclip.shards import BuildOptions, build
from msa_openclip.shards.synthetic.scenes import scene

DRAWN = 60  # different scenes; each is stored many times under different names

IMG2DATASET = """
import sys, time
from img2dataset import download

if __name__ == "__main__":
    started = time.perf_counter()
    download(url_list=sys.argv[1], output_folder=sys.argv[2], processes_count=int(sys.argv[3]), thread_count=16,
             input_format="csv", url_col="url", caption_col="caption", output_format="webdataset", resize_mode="no",
             skip_reencode=True, number_sample_per_shard=int(sys.argv[4]), enable_wandb=False)
    print("SECONDS", time.perf_counter() - started)
"""


def make_source(folder: Path, images: int) -> int:
    """Files, a Karpathy JSON and a CSV of file:// URLs; returns the bytes of all images."""
    (folder / "images").mkdir()
    scenes = []
    for index in range(DRAWN):
        drawn = scene(index, size_px=256)
        path = folder / f"scene{index}.jpg"
        drawn.image.save(path, quality=90)
        scenes.append((path.read_bytes(), drawn.captions))
    rows, lines, total = [], ["url,caption"], 0
    for number in range(images):
        data, captions = scenes[number % DRAWN]
        path = folder / "images" / f"{number}.jpg"
        path.write_bytes(data)
        total += len(data)
        rows.append({"filename": path.name, "split": "train", "sentences": [{"raw": text} for text in captions]})
        lines.append(f'file://{path},"{captions[0]}"')
    (folder / "captions.json").write_text(json.dumps({"images": rows}))
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return total


def timed(work: Callable[[Path], None], out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    work(out)
    return time.perf_counter() - started


def contestants(source: Path, images: int, python: str | None) -> dict[str, Callable[[Path], float]]:
    """Name -> one timed run."""
    captions, folder, per_shard = str(source / "captions.json"), str(source / "images"), images // 8

    def ours(workers: int, **options: object) -> Callable[[Path], float]:
        made = BuildOptions(shards=8, **options)  # type: ignore[arg-type]
        return lambda out: timed(
            lambda o: void(build(captions, str(o), images=folder, options=made, workers=workers)), out
        )

    def concatenate(out: Path) -> None:
        out.mkdir()
        names = [f"{folder}/{number}.jpg" for number in range(images)]
        for start in range(0, images, per_shard):
            with open(out / f"{start}.bin", "wb", buffering=1 << 20) as file:
                for name in names[start : start + per_shard]:
                    file.write(Path(name).read_bytes())

    def shard_writer(out: Path) -> None:
        out.mkdir()
        rows = json.loads(Path(captions).read_text())["images"]
        with webdataset.ShardWriter(f"{out}/train-%06d.tar", maxcount=per_shard, verbose=0) as writer:
            for row in rows:
                texts = [sentence["raw"] for sentence in row["sentences"]]
                data = (Path(folder) / row["filename"]).read_bytes()
                key = row["filename"].removesuffix(".jpg")
                writer.write({"__key__": key, "jpg": data, "txt": "\n".join(texts), "json": {"captions": texts}})

    def img2dataset(processes: int) -> Callable[[Path], float]:
        def run(out: Path) -> float:
            shutil.rmtree(out, ignore_errors=True)
            script = source / "img2dataset_run.py"
            script.write_text(IMG2DATASET)
            command = [str(python), str(script), str(source / "list.csv"), str(out), str(processes), str(per_shard)]
            environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            stored = sum(json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json"))
            assert stored == images, f"img2dataset stored {stored} of {images}: {done.stderr[-500:]}"
            return float(done.stdout.split("SECONDS")[1])

        return run

    found = {
        "copy of the files (shutil.copytree)": lambda out: timed(lambda o: void(shutil.copytree(folder, o)), out),
        "the bytes into 8 files, nothing else": lambda out: timed(concatenate, out),
        "ShardWriter loop": lambda out: timed(shard_writer, out),
        "ours, 1 worker": ours(1),
        "ours, 2 workers": ours(2),
    }
    if python:
        found |= {"img2dataset, 1 process": img2dataset(1), "img2dataset, 2 processes": img2dataset(2)}
    return found


def void(_: object) -> None:
    """Drop a result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--img2dataset-python", help="Python of an environment that has img2dataset")
    parser.add_argument("--only", default="", help="only the copy and contestants whose name holds this")
    parser.add_argument("--out", type=Path, help="JSON result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        total = make_source(source, options.images)
        runs = contestants(source, options.images, options.img2dataset_python)
        runs = {name: run for name, run in runs.items() if options.only in name or name.startswith("copy")}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.rounds + 1):  # the first round warms the page cache and is not counted
            for name, run in runs.items():
                taken = run(Path(scratch) / "out")
                if turn:
                    seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    copy = medians["copy of the files (shutil.copytree)"]
    rows = {
        name: {
            "seconds": [round(value, 3) for value in seconds[name]],
            "images_per_s": round(options.images / median),
            "mb_per_s": round(total / 1e6 / median, 1),
            "speed_over_copy": round(copy / median, 3),
        }
        for name, median in medians.items()
    }
    for name, row in rows.items():
        print(
            f"{name:38} {row['images_per_s']:>7,} images/s {row['mb_per_s']:>7} MB/s {row['speed_over_copy']:>6} x copy"
        )
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("webdataset", "pillow", "numpy")},
        "images": options.images,
        "mb": round(total / 1e6, 1),
        "results": rows,
    }
    if options.img2dataset_python:
        code = "from importlib.metadata import version; print(version('img2dataset'))"
        done = subprocess.run([options.img2dataset_python, "-c", code], capture_output=True, text=True, check=True)
        result["versions"]["img2dataset"] = done.stdout.strip()
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
