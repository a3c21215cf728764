"""The pair stage's Triton kernels on an NVIDIA GPU: first their correctness, then their speed.

    python benchmarks/pair_gpu.py --out docs/results/pair_gpu.json
    python benchmarks/pair_gpu.py --tune          # compare program sizes, B = 2048, bfloat16

Correctness: values and gradients against the eager form in float64, in every precision, under CUDA graphs and
torch.compile, twice for determinism.  Speed: bfloat16, B images x B texts up to 16,384, against the eager form (up to
--eager-up-to), its torch.compile, and the rate of a large bfloat16 matrix product in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pair_common import FLOPS_PER_PAIR, SCALES, medians, random_sides, record, step
from torch import Tensor

from msa_openclip.pair_scores import triton_kernels as pair_scores_triton
from msa_openclip.pair_scores.formula import ImageSide, TextSide, eager_attention, logits_with, match_logits

GIBIBYTE = 1 << 30
# Error allowed against float64, as a share of the largest value: a few roundings of the operands' precision.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def eager(images: ImageSide, texts: TextSide) -> Tensor:
    return logits_with(eager_attention, images, texts)


def correctness() -> list[dict[str, Any]]:
    """Largest error of the scores and of any gradient, as a share of the largest value."""
    rows = []
    for dtype, (images, texts) in itertools.product(TOLERANCES, ((1, 1), (3, 5), (131, 257))):
        sides = random_sides(images, texts, dtype=dtype, device="cuda", ragged=True, requires_grad=True)
        wide = [type(side)(*(f.detach().double().requires_grad_() if f.is_floating_point() else f for f in side))
                for side in sides]  # fmt: skip
        upstream = torch.randn(SCALES, images, texts, device="cuda")
        found = [match_logits(*sides), *step(match_logits, *sides, upstream)]
        again = [match_logits(*sides), *step(match_logits, *sides, upstream)]
        wanted = [eager(*wide), *step(eager, *wide, upstream.double())]
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "two runs differ"
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]
        assert max(errors) < TOLERANCES[dtype], f"{dtype}, {images} x {texts}: errors {errors}"
        rows.append({"dtype": str(dtype), "images": images, "texts": texts, "largest_error": max(errors)})
    return rows


def capture_and_compile() -> None:
    """The same scores from a CUDA graph and from a compiled function."""
    images, texts = random_sides(131, 257, dtype=torch.bfloat16, device="cuda", ragged=True)
    expected = match_logits(images, texts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        match_logits(images, texts)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = match_logits(images, texts)
    graph.replay()
    assert torch.equal(captured, expected), "the CUDA graph gives other scores"
    compiled = torch.compile(match_logits, fullgraph=True)(images, texts)
    torch.testing.assert_close(compiled, expected)


def matrix_rate() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))  # type: ignore[return-value]


def speed(size: int, options: argparse.Namespace) -> dict[str, Any]:
    images, texts = random_sides(
        size, size, dtype=torch.bfloat16, device="cuda", ragged=options.ragged, requires_grad=True
    )
    upstream = torch.randn(SCALES, size, size, device="cuda")
    computes = {"ours": match_logits}
    if size <= options.eager_up_to:
        computes |= {"eager": eager, "compiled eager": torch.compile(eager)}
    works: dict[str, Any] = {"product": partial(torch.mm, *matrix_rate())}
    for name, compute in computes.items():
        works[f"{name} forward"] = torch.no_grad()(partial(compute, images, texts))
        works[f"{name} step"] = partial(step, compute, images, texts, upstream)
    times = medians(works, options.repeats, synchronize=torch.cuda.synchronize)
    rate = 2 * 8192**3 / times.pop("product")
    flops = FLOPS_PER_PAIR * size**2 * texts.mask.double().mean().item()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = step(match_logits, images, texts, upstream)
    extra = torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)
    return {
        "size": size,
        "seconds": times,
        "product_tflops": rate / 1e12,
        "fraction_of_product_forward": flops / rate / times["ours forward"],
        "fraction_of_product_step": 3 * flops / rate / times["ours step"],
        "extra_gib": extra / GIBIBYTE,
    }


def tune(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every program size that compiles and fits, fastest step first."""
    rows = []
    for launch in itertools.product((64, 128), (64, 128, 256), (4, 8), (1, 2, 3)):
        pair_scores_triton.LAUNCHES[2] = pair_scores_triton.Launch(*launch)
        try:
            row = speed(2048, options)
        except Exception as error:  # too many registers or too much shared memory, by whatever name Triton has for it
            print(launch, type(error).__name__, flush=True)
            continue
        rows.append({"launch": launch, **row})
        print(json.dumps(rows[-1]), flush=True)
    return sorted(rows, key=lambda row: row["seconds"]["ours step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--eager-up-to", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--ragged", action="store_true", help="texts of 5 to 30 tokens")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", help="file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU; the kernels' logic is tested without one by tests/test_pair_scores.py")
    result: dict[str, Any] = {"about": record()}
    if options.tune:
        options.eager_up_to = 0
        result["tune"] = tune(options)
        save(result, options)
        return
    result["correctness"] = correctness()
    save(result, options)
    capture_and_compile()
    result["speed"] = []
    for size in options.sizes:
        result["speed"].append(speed(size, options))
        print(json.dumps(result["speed"][-1]), flush=True)
        save(result, options)


def save(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what is known so far: the largest size may not fit, and the rest is worth keeping."""
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
