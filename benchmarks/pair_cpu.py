"""The pair stage on a CPU against its eager form, the method as released and the machine's own matrix product.

    python benchmarks/pair_cpu.py speed --sizes 16 32 64 128 256 512 --bfloat16 --out docs/results/pair_cpu_speed.json
    python benchmarks/pair_cpu.py speed --sizes 256 512 1024 --eager-up-to 0 --out docs/results/pair_cpu_growth.json
    python benchmarks/pair_cpu.py naive --sizes 16 32 64 --out docs/results/pair_cpu_naive.json
    python benchmarks/pair_cpu.py memory --out docs/results/pair_cpu_memory.json
    python benchmarks/pair_cpu.py rsicd --out docs/results/pair_cpu_rsicd.json
    python benchmarks/pair_cpu.py plot --out docs/images/pair_cpu.svg

`speed`: forwards and forwards + backwards, B images x B texts, and how time grows.  `naive`: a training step as the
released code computes it, every text projected again for every image.  `memory`: peak resident memory of a step beyond
its operands, each in its own process.  `rsicd`: all pairs of a test set of RSICD's size.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.pair_oracle import Mscmat
from pair_common import FLOPS_PER_PAIR, HEADS, SCALES, TOKENS, WIDTH, medians, random_sides, record, seconds, step

from msa_openclip.pair_scores.formula import TextSide, eager_attention, logits_with, match_logits

MEBIBYTE = 1 << 20
RSICD_TEST_IMAGES, RSICD_TEST_CAPTIONS = 1093, 5465
COMPUTE = {"ours": match_logits, "eager": lambda images, texts: logits_with(eager_attention, images, texts)}
Work = Callable[[], object]


def matrix_product() -> Work:
    """A product of 2048 x 2048 matrices: what this machine can do at most."""
    left, right, out = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.empty(2048, 2048)
    return lambda: torch.mm(left, right, out=out)


def rate(seconds_of_product: float) -> float:
    return float(2 * 2048**3 / seconds_of_product)


def speed(size: int, options: argparse.Namespace) -> dict[str, Any]:
    images, texts = random_sides(size, size, requires_grad=True, ragged=options.ragged)
    upstream = torch.randn(SCALES, size, size)
    works: dict[str, Work] = {"product": matrix_product()}
    for name, compute in COMPUTE.items():
        if name == "ours" or size <= options.eager_up_to:
            works[f"{name} forward"] = torch.no_grad()(partial(compute, images, texts))
            works[f"{name} step"] = partial(step, compute, images, texts, upstream)
    if options.bfloat16:
        half = random_sides(size, size, requires_grad=True, ragged=options.ragged, dtype=torch.bfloat16)
        works["bfloat16 forward"] = torch.no_grad()(partial(match_logits, *half))
        works["bfloat16 step"] = partial(step, match_logits, *half, upstream)
    times = medians(works, options.repeats)
    limit = FLOPS_PER_PAIR * size**2 * texts.mask.double().mean().item() / rate(times.pop("product"))

    def ratios(left: str, right: str) -> dict[str, float]:
        parts = [part for part in ("forward", "step") if f"{left} {part}" in times and f"{right} {part}" in times]
        return {part: times[f"{left} {part}"] / times[f"{right} {part}"] for part in parts}

    return {
        "size": size,
        "seconds": times,
        "limit_seconds_forward": limit,
        "fraction_of_limit_forward": limit / times["ours forward"],
        "fraction_of_limit_step": 3 * limit / times["ours step"],
        "times_eager": ratios("eager", "ours"),
        "bfloat16_times_float32": ratios("ours", "bfloat16"),
    }


def naive(size: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    channels, width = (256, 512, 1024, 2048), HEADS * WIDTH
    maps = Mscmat.random(widths=list(channels), heads=HEADS, width=width, dtype=torch.float32)
    pooled = [torch.randn(size, each) for each in channels]
    tokens = torch.randn(size, TOKENS, width, requires_grad=True)
    feature, mask = torch.randn(size, width), torch.ones(size, TOKENS, dtype=torch.bool)
    inputs = [tokens, *maps.parameters()]
    upstream = torch.randn(SCALES, size, size)
    images, texts = random_sides(size, size, requires_grad=True)
    ours: dict[str, Work] = {
        "fold and pair stage": lambda: torch.autograd.grad(
            match_logits(*maps.fold(pooled, tokens, feature, mask)), inputs, upstream
        ),
        "pair stage": partial(step, match_logits, images, texts, upstream),
    }
    times = medians(ours, options.repeats)
    times["released"] = seconds(
        lambda: torch.autograd.grad(maps.released(pooled, tokens, feature), inputs, upstream, allow_unused=True)
    )
    return {"size": size, "seconds": times, "times_released": {name: times["released"] / times[name] for name in ours}}


def memory(size: int, options: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"size": size}
    for name in COMPUTE:
        if name == "ours" or size <= options.eager_up_to:
            command = [sys.executable, __file__, "one-step", "--compute", name, "--sizes", str(size)]
            row[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return row


def one_step(options: argparse.Namespace) -> None:
    """Child of `memory`: warm up on a little, then one step; prints what it took beyond operands and gradients."""
    (size,) = options.sizes
    compute = COMPUTE[options.compute]
    small = random_sides(32, 32, requires_grad=True)
    step(compute, *small, torch.randn(SCALES, 32, 32))
    images, texts = random_sides(size, size, requires_grad=True)
    upstream = torch.randn(SCALES, size, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _status("VmRSS")
    gradients = step(compute, images, texts, upstream)
    taken = _status("VmHWM") - before
    given = sum(gradient.nbytes for gradient in gradients) / MEBIBYTE
    print(json.dumps({"peak_mib": taken, "gradients_mib": given, "extra_mib": taken - given}))


def _status(field: str) -> float:
    """Mebibytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def rsicd(size: int, options: argparse.Namespace) -> dict[str, Any]:
    images, texts = random_sides(RSICD_TEST_IMAGES, RSICD_TEST_CAPTIONS, ragged=options.ragged)
    part = TextSide(*(field[:64] for field in texts))
    works: dict[str, Work] = {
        "product": matrix_product(),
        "ours": torch.no_grad()(lambda: match_logits(images, texts)),
        "eager on 64 texts": torch.no_grad()(lambda: COMPUTE["eager"](images, part)),
    }
    times = medians(works, options.repeats)
    tokens = texts.mask.double().mean().item()
    eager = times["eager on 64 texts"] * RSICD_TEST_CAPTIONS / 64
    limit = FLOPS_PER_PAIR * RSICD_TEST_IMAGES * RSICD_TEST_CAPTIONS * tokens / rate(times["product"])
    return {"seconds": times, "fraction_of_limit": limit / times["ours"], "times_eager": eager / times["ours"]}


def growth(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """Exponent of the least-squares power law of a value in the number of pairs."""
    x = torch.tensor([[math.log(row["size"] ** 2), 1.0] for row in rows], dtype=torch.float64)
    y = torch.tensor([[math.log(value(row))] for row in rows], dtype=torch.float64)
    return float(torch.linalg.lstsq(x, y).solution[0])


def plot(options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def rows(name: str) -> list[dict[str, Any]]:
        return list(json.loads(Path(options.results, f"pair_cpu_{name}.json").read_text())["rows"])

    runs, peaks = rows("speed"), rows("memory")
    runs += [row for row in rows("growth") if row["size"] > runs[-1]["size"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for part, factor, style in (("forward", 1, "--"), ("step", 3, "-")):
        for name, colour in (("ours", "tab:blue"), ("eager", "tab:orange")):
            points = [(row["size"], row["seconds"].get(f"{name} {part}")) for row in runs]
            points = [(size, time) for size, time in points if time]
            left.loglog(*zip(*points, strict=True), style, marker="o", ms=3, color=colour, label=f"{name}, {part}")
        limits = [factor * row["limit_seconds_forward"] for row in runs]
        left.loglog([row["size"] for row in runs], limits, style, color="grey", label=f"matrix product, {part}")
    left.set(xlabel="images = texts", ylabel="seconds", title="Time, float32, two cores")
    left.legend(fontsize=7)
    for name, colour in (("ours", "tab:blue"), ("eager", "tab:orange")):
        points = [(row["size"], row[name]["extra_mib"]) for row in peaks if name in row]
        right.loglog(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=name)
    right.set(xlabel="images = texts", ylabel="MiB", title="Peak memory of a step, beyond\noperands and gradients")
    right.legend(fontsize=7)
    figure.savefig(options.out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "naive", "memory", "rsicd", "plot", "one-step"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--eager-up-to", type=int, default=256, help="largest B the eager form is given memory for")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ragged", action="store_true", help="texts of 5 to 30 tokens")
    parser.add_argument("--bfloat16", action="store_true", help="speed: operands of bfloat16, too")
    parser.add_argument("--compute", choices=COMPUTE, default="ours")
    parser.add_argument("--results", default="docs/results", help="where plot finds the results")
    parser.add_argument("--out", help="file to write")
    options = parser.parse_args()
    if options.what in ("plot", "one-step"):
        return {"plot": plot, "one-step": one_step}[options.what](options)
    about = record()
    rows = []
    for size in options.sizes if options.what != "rsicd" else [RSICD_TEST_CAPTIONS]:
        rows.append({"speed": speed, "naive": naive, "memory": memory, "rsicd": rsicd}[options.what](size, options))
        print(json.dumps(rows[-1]), flush=True)
    result: dict[str, Any] = {"about": about, "rows": rows}
    large = [row for row in rows if row.get("size", 0) >= 128]
    if options.what == "speed" and len(large) > 1:
        result["growth_of_time_with_pairs"] = growth(large, lambda row: row["seconds"]["ours step"])
    if options.what == "memory" and len(large) > 1:
        result["growth_of_memory_with_pairs"] = growth(large, lambda row: row["ours"]["extra_mib"])
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
