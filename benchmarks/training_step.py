"""A training step of an MSA model against the plain CLIP model it is built on, and where the time goes.

    python benchmarks/training_step.py --batch 8 --out docs/results/training_step.json
    python benchmarks/training_step.py --batch 1024 --device cuda --amp --out docs/results/training_step_gpu.json

Forwards, loss, backwards and an AdamW step on random pixels and captions, random weights, both models in turns.
"""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from pair_common import medians, record
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

FLAGS = {
    "local_loss": True,
    "gather_with_grad": True,
    "accum_freq": 1,
    "distill": False,
    "siglip": False,
    "horovod": False,
}


def training_step(name: str, options: argparse.Namespace, *, rank: int = 0, world_size: int = 1) -> Callable[[], None]:
    """One step of a model by open_clip's own factory and loss, on one rank or one of several."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, device=options.device)
    model.train()
    if hasattr(model, "output_dict"):
        model.output_dict = True
    args = Namespace(model=name, rank=rank, world_size=world_size, **FLAGS)
    # On open_clip 4.x a task holds the loss.
    tasks = hasattr(open_clip, "create_task")
    loss = open_clip.create_task(args, model).loss if tasks else open_clip.create_loss(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    size = model.visual.image_size
    if world_size > 1:
        model = DistributedDataParallel(model)
        model.register_comm_hook(None, allreduce_hook)  # what it does without one, but called from Python: counted
    pixels = torch.randn(options.batch, 3, *(size if isinstance(size, tuple) else (size, size)), device=options.device)
    captions = [f"aerial image number {number} of a {'long ' * (number % 12)}river" for number in range(options.batch)]
    ids = open_clip.get_tokenizer(name)(captions).to(options.device)
    device_type = torch.device(options.device).type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=options.amp):
            terms: dict[str, Any] = loss(**model(pixels, ids), output_dict=True)
        sum(terms.values()).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs=2, default=["ViT-B-32", "MSA-ViT-B"], help="the plain one, ours")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="file to write")
    options = parser.parse_args()
    about = record()
    steps = {name: training_step(name, options) for name in options.models}
    on_gpu = options.device.startswith("cuda")
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    times = medians(dict(steps), options.repeats, synchronize=synchronize)
    plain, ours = (times[name] for name in options.models)
    with profile(activities=activities) as profiler:
        steps[options.models[1]]()
    table = profiler.key_averages().table(
        sort_by=f"self_{'device' if on_gpu else 'cpu'}_time_total", row_limit=15, max_name_column_width=48
    )
    print(table)
    result = {"about": about, "batch": options.batch, "seconds": times, "slower_percent": 100 * (ours / plain - 1)}
    print(json.dumps(result))
    if options.out:
        Path(options.out).write_text(
            json.dumps({**result, "profile": table.splitlines()}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
