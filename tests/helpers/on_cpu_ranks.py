"""open_clip_train.main for ranks on the CPU: `torchrun --nproc-per-node 2 -- tests/on_cpu_ranks.py ARGUMENTS`.

open_clip 3.3 names the device to DistributedDataParallel, which refuses that for modules on the CPU.
"""

import sys
from typing import Any

import torch


class OnCPU(torch.nn.parallel.DistributedDataParallel):
    """DistributedDataParallel that is not told the device."""

    def __init__(self, module: torch.nn.Module, device_ids: Any, **settings: Any) -> None:
        super().__init__(module, **settings)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = OnCPU  # type: ignore[misc]
    from open_clip_train.main import main

    main(sys.argv[1:])
