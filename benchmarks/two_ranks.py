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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, multiprocessing

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from pair_common import medians, random_sides, record
from traffic import counted, nbytes
from training_step import training_step

from msa_openclip import MSALoss
from msa_openclip.config import MSACfg
from msa_openclip.mscmat import IMAGE_SIDE_KEYS, TEXT_SIDE_KEYS

FEATURES = 512
MSA = MSACfg.from_dict({"image_scales": [{"stage": stage} for stage in (1, 2, 3, 4)], "heads": 12})
Work = Callable[[], object]


def loss_steps(batch: int, ranks: dict[str, Any]) -> dict[str, Work]:
    """Both losses, forwards and backwards, on this rank's part of the batch."""
    images, texts = random_sides(batch, batch, ragged=True, requires_grad=True)
    sides = dict(zip(IMAGE_SIDE_KEYS + TEXT_SIDE_KEYS, [*images, *texts], strict=True))
    image_features, text_features = (torch.randn(batch, FEATURES, requires_grad=True) for _ in range(2))

    def step(loss: torch.nn.Module, inputs: dict[str, Tensor]) -> None:
        features = [F.normalize(side, dim=-1) for side in (image_features, text_features)]
        total = loss(*features, torch.tensor(100.0), **inputs)
        torch.autograd.grad(total, [image_features, text_features, *(x for x in inputs.values() if x.requires_grad)])

    return {
        "ClipLoss": lambda: step(ClipLoss(local_loss=True, gather_with_grad=True, **ranks), {}),
        "MSALoss": lambda: step(MSALoss(MSA, local_loss=True, gather_with_grad=True, **ranks), sides),
    }


def run_rank(rank: int, world_size: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(max(1, options.threads // world_size))
    dist.init_process_group("gloo", f"file://{folder}/rendezvous-{world_size}", rank=rank, world_size=world_size)
    ranks = {"rank": rank, "world_size": world_size}
    batch = options.batch // world_size
    if options.what == "loss":
        steps = loss_steps(batch, ranks)
    else:
        part = argparse.Namespace(batch=batch, device="cpu", amp=False)
        steps = {name: training_step(name, part, **ranks) for name in ("ViT-B-32", "MSA-ViT-B")}
    times = medians(dict(steps), options.repeats, synchronize=dist.barrier)
    sent = {}
    for name, step in steps.items():
        with counted() as sent[name]:
            step()
    if rank == 0:
        rows = {name: {"pairs_per_second": options.batch / times[name], "seconds": times[name], "sent": sent[name]}
                for name in steps}  # fmt: skip
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
