"""The same training on both lines of open_clip, step by step: how far the losses of the same seed are apart.

    python benchmarks/host_lines.py --python VENV3/bin/python VENV4/bin/python --out docs/results/host_lines.json

Each interpreter has msa_openclip and one line of open_clip.  MSA-ViT-Ti, and beside it the same towers without MSA,
which only the hosts' own code trains, see the same batches (MSA_OPENCLIP_LOADER=all) in float32, on one CPU thread,
through `open_clip_train.main` as it is; the loss is noted where it is propagated back.  The lines differ in one setting
that acts here: 3.x decays positional and class embeddings as it does weights, 4.x does not.  So the curves are taken
with open_clip's weight decay and without.  How far rounding alone carries is shown beside: one line against itself, its
first gradients changed by a millionth of themselves, which is how far apart the lines' own attention layers are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import cpu_name

from msa_openclip.shards.command_line import main as shards

ROOT = Path(__file__).parent.parent
STEPS = 50
BATCH = 16
TOLERANCE = 1e-4
NUDGE = 1e-6


def nudge_first_gradients() -> None:
    """Let the optimizer's first step see gradients that are off by a millionth of themselves, at random."""
    step, done = torch.optim.AdamW.step, []

    def nudging(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(True)
            generator = torch.Generator().manual_seed(1)
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                parameter.grad.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))
        return step(optimizer, *args, **kwargs)

    torch.optim.AdamW.step = nudging  # type: ignore[method-assign]


def note_losses(path: str, arguments: list[str]) -> None:
    """Run the trainer; write the losses it propagates back, and the version of its open_clip, to `path`."""
    if "HOST_LINES_NUDGE" in os.environ:
        nudge_first_gradients()
    losses: list[float] = []
    backward = torch.Tensor.backward

    def noting(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(loss, *args, **kwargs)

    torch.Tensor.backward = noting  # type: ignore[method-assign]
    import open_clip
    from open_clip_train.main import main

    main(arguments)
    Path(path).write_text(json.dumps({"open_clip": open_clip.__version__, "losses": losses[:STEPS]}))


def train(python: str, model: str, weight_decay: float, folder: Path, **env: str) -> dict[str, Any]:
    """One run in a process of its own."""
    out = folder / "losses.json"
    command = [
        python, __file__, "--note", str(out), "--model", model, "--dataset-type", "webdataset",
        "--train-data", f"{folder}/train-{{000000..000003}}.tar", "--batch-size", str(BATCH), "--workers", "0",
        "--epochs", "4", "--lr", "5e-4", "--warmup", "10", "--wd", str(weight_decay), "--seed", "0",
        "--device", "cpu", "--precision", "fp32", "--logs", tempfile.mkdtemp(dir=folder), "--name", "run",
        "--save-frequency", "0",
    ]  # fmt: skip
    settings = {"MSA_OPENCLIP_LOADER": "all", "MSA_OPENCLIP_CONFIGS": str(folder), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env={**os.environ, **settings, **env}, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def compare(pythons: list[str], model: str, weight_decay: float, folder: Path) -> dict[str, Any]:
    """The curves of both lines and how far apart they are."""
    runs = [train(python, model, weight_decay, folder) for python in pythons]
    gap = largest_gap(*runs)
    result = {
        "model": model,
        "weight_decay": weight_decay,
        "open_clip": [run["open_clip"] for run in runs],
        "steps": len(runs[0]["losses"]),
        "first_and_last_loss": [runs[0]["losses"][0], runs[0]["losses"][-1]],
        "largest_difference": gap,
        "within_1e-4": gap <= TOLERANCE,
        "losses": [run["losses"] for run in runs],
    }
    if not weight_decay:
        nudged = train(pythons[0], model, weight_decay, folder, HOST_LINES_NUDGE="1")
        result["first_line_against_itself_nudged"] = largest_gap(runs[0], nudged)
    return result


def largest_gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How far two runs are apart where they are farthest."""
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--python", nargs=2, required=True, help="of 3.x, of 4.x")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards(
            ["synthesize", name, "--train", "208", "--val", "8", "--test", "0", "--size-px", "96", "--shards", "image"]
        )
        config = json.loads((ROOT / "model_configs" / "MSA-ViT-Ti.json").read_text())
        del config["msa_cfg"]
        (folder / "same-towers.json").write_text(json.dumps(config))
        results = [
            compare(args.python, model, wd, folder) for wd in (0.0, 0.2) for model in ("MSA-ViT-Ti", "same-towers")
        ]
    for result in results:
        print({key: value for key, value in result.items() if key != "losses"})
    record = {"command": " ".join(sys.argv), "cpu": cpu_name(), "torch": torch.__version__, "results": results}
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--note"]:
        note_losses(sys.argv[2], sys.argv[3:])
    else:
        main()
