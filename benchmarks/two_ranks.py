"""Two ranks against one on this machine's CPU: throughput, and the bytes that a rank sends a step.

    python benchmarks/two_ranks.py loss --batch 512 --out docs/results/two_ranks_loss.json
    python benchmarks/two_ranks.py training --batch 8 --out docs/results/two_ranks_training.json

One process has all the threads and the whole batch; two have half of each and are joined by gloo.  `loss`: open_clip's
ClipLoss on features of width 512, and MSALoss on these and folded sides of full size, forwards and backwards.
`training`: whole steps of ViT-B-32 and of MSA-ViT-B under DistributedDataParallel.  Bytes are counted at the
collectives; DistributedDataParallel's own traffic is counted too, as `all_reduce`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, multiprocessing

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.traffic import counted, nbytes
from pair_common import medians, random_sides, record
from training_step import training_step

from msa_openclip import MSALoss
from msa_openclip.config import MSACfg
from msa_openclip.model.mscmat import IMAGE_SIDE_KEYS, TEXT_SIDE_KEYS

FEATURES = 512
MSA = MSACfg.from_dict({"image_scales": [{"stage": stage} for stage in (1, 2, 3, 4)], "heads": 12})
Work = Callable[[], object]


def loss_step(loss_of: Callable[..., torch.nn.Module], batch: int, *, with_sides: bool, **ranks: int) -> Work:
    """A loss, forwards and backwards, on this rank's part of the batch."""
    loss = loss_of(local_loss=True, gather_with_grad=True, **ranks)
    leaves = [torch.randn(batch, FEATURES, requires_grad=True) for _ in range(2)]
    sides: dict[str, Tensor] = {}
    if with_sides:
        images, texts = random_sides(batch, batch, ragged=True, requires_grad=True)
        sides = dict(zip(IMAGE_SIDE_KEYS + TEXT_SIDE_KEYS, [*images, *texts], strict=True))
    inputs = [*leaves, *(side for side in sides.values() if side.requires_grad)]

    def step() -> None:
        features = [F.normalize(side, dim=-1) for side in leaves]
        torch.autograd.grad(loss(*features, torch.tensor(100.0), **sides), inputs)

    return step


def model_step(name: str, batch: int, **ranks: int) -> Work:
    """A whole step of a model on this rank's part of the batch."""
    return training_step(name, argparse.Namespace(batch=batch, device="cpu", amp=False), **ranks)


LOSSES = {
    "ClipLoss": partial(loss_step, ClipLoss, with_sides=False),
    "MSALoss": partial(loss_step, partial(MSALoss, MSA), with_sides=True),
}
MODELS = {name: partial(model_step, name) for name in ("ViT-B-32", "MSA-ViT-B")}


def run_rank(rank: int, world_size: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(max(1, options.threads // world_size))
    dist.init_process_group("gloo", f"file://{folder}/rendezvous-{world_size}", rank=rank, world_size=world_size)
    ranks = {"rank": rank, "world_size": world_size}
    batch = options.batch // world_size
    rows: dict[str, Any] = {}
    for name, build in (LOSSES if options.what == "loss" else MODELS).items():
        step = build(batch, **ranks)
        seconds = medians({name: step}, options.repeats, synchronize=dist.barrier)[name]
        with counted() as sent:
            step()
        rows[name] = {"pairs_per_second": options.batch / seconds, "seconds": seconds, "sent": sent}
        del step  # one model at a time: they are large
    if rank == 0:
        Path(folder, f"{world_size}.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loss", "training"))
    parser.add_argument("--batch", type=int, default=512, help="of all ranks together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all ranks together")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="file to write")
    options = parser.parse_args()
    result: dict[str, Any] = {"about": record(), "batch": options.batch}
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, 2):
            multiprocessing.spawn(run_rank, (world_size, options, folder), nprocs=world_size)
            rows = result[f"{world_size} rank(s)"] = json.loads(Path(folder, f"{world_size}.json").read_text())
            print(world_size, json.dumps(rows), flush=True)
    result["throughput_of_two"] = {
        name: row["pairs_per_second"] / result["1 rank(s)"][name]["pairs_per_second"]
        for name, row in result["2 rank(s)"].items()
    }
    if options.what == "loss":
        _, texts = random_sides(options.batch // 2, options.batch // 2)
        result["bytes_of_a_ranks_text_side"] = nbytes(*texts)
    print(json.dumps(result["throughput_of_two"]))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
