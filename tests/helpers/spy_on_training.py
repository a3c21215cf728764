"""`python -m open_clip_train.main` that also writes down, per rank and epoch, which captions training was given.

Arguments: folder for notes and logs, start method of worker processes, then those of open_clip_train.main.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from host import images_and_texts
from on_cpu_ranks import OnCPU


def main(folder: str, start_method: str, arguments: list[str]) -> Any:
    """Run open_clip's own main with a listener at the end of the training loader."""
    multiprocessing.set_start_method(start_method)
    torch.nn.parallel.DistributedDataParallel = OnCPU  # type: ignore[misc]
    import open_clip_train.main as training

    get_data = training.get_data

    def get_data_and_listen(*args: Any, tokenizer: Any, **kwargs: Any) -> Any:
        data = get_data(*args, tokenizer=tokenizer, **kwargs)

        def listen(batches: Iterator[Any]) -> Iterator[Any]:
            captions = []
            for batch in batches:
                images, texts = images_and_texts(batch)
                assert len(images) == len(texts)
                captions += [tokenizer.decode(row[1 : int(row.argmax())].tolist()).strip() for row in texts]
                yield batch
            with (Path(folder) / f"rank{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
                file.write(json.dumps(captions) + "\n")

        if "train" in data:
            data["train"].dataloader.append(listen)
        return data

    training.get_data = get_data_and_listen
    return training.main([*arguments, "--logs", folder])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
