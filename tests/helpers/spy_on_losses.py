"""`python -m open_clip_train.main` that also writes down the sum of the loss terms of each call, in full precision.

Arguments: file for the losses (rank 0 writes), then those of open_clip_train.main.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from host import MAKES_LOSS
from on_cpu_ranks import OnCPU


def main(file: str, arguments: list[str]) -> Any:
    """Run open_clip's own main and listen to its loss."""
    torch.nn.parallel.DistributedDataParallel = OnCPU  # type: ignore[misc]
    import open_clip_train.main as training

    make = getattr(training, MAKES_LOSS)

    def make_and_listen(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        loss = getattr(made, "loss", made)  # of a task

        def listen(_module: Any, _inputs: Any, terms: Any) -> None:
            if os.environ.get("RANK", "0") == "0":
                with open(file, "a") as out:
                    out.write(f"{float(sum(value.double() for value in terms.values()))!r}\n")

        loss.register_forward_hook(listen)
        return made

    setattr(training, MAKES_LOSS, make_and_listen)
    return training.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
