"""What differs between the lines of open_clip, and what the plugin builds on in them.

The two lines stand side by side in `host_3` and `host_4`; nothing else of this package knows which one it has.  A host
that lacks what its adapter extends is refused by name before anything is trained.  How to mend that: docs/hosts.md.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple, Protocol

SUPPORTED_OPEN_CLIP = ">=3.3,<5"

Batches = Callable[[Any, Any], Any]
"""Images (B, 3, h, w) and token ids (B, L) of our loader, or what is cached of both -> a batch as the host's trainer
takes it."""
Reorder = Callable[[Iterable[Any]], Iterator[Any]]
"""Samples with their token ids under `text` -> the same samples in another order."""


class Need(NamedTuple):
    """Something of a module of open_clip that the plugin builds on."""

    what: str
    """As error messages name it."""
    is_met: Callable[[ModuleType], bool]


class Host(Protocol):
    """What differs between the lines of open_clip."""

    needs: Mapping[str, tuple[Need, ...]]
    """By module; on top of what both lines need."""
    zero_shot_eval: str
    """The function whose metrics the trainer's `evaluate` puts into its record first."""

    def extend_loss(self, factory: ModuleType) -> None:
        """Let MSA models train with MSALoss."""

    def model_of(self, trained: Any) -> Any:
        """The model in what the trainer gives to `evaluate`, as far as its class and settings go."""

    def whole_model(self, trained: Any, args: Any) -> Any:
        """The model to evaluate, with all its weights on this rank; every rank has to call it."""

    def batches(self, args: Any, tokenizer: Any) -> Batches:
        """How our loader's batches are handed to the trainer."""

    def reorder(self, args: Any, tokenizer: Any, epoch: Any) -> Reorder | None:
        """In which order training reads samples, where the host has an option for that."""

    def reads_itself(self, args: Any, naflex_data_config: Any) -> str | None:
        """The option for which the host's own pipeline is used in place of our loader; None where ours is."""


def has(name: str) -> Need:
    return Need(name, lambda module: hasattr(module, name))


def takes(function: str, *parameters: str) -> Need:
    """`function` with these parameters, among others."""

    def is_met(module: ModuleType) -> bool:
        found = inspect.signature(getattr(module, function)).parameters if hasattr(module, function) else {}
        return all(parameter in found for parameter in parameters)

    return Need(f"{function}({', '.join(parameters)})", is_met)


def uses(function: str, *names: str) -> Need:
    """`function` whose code reads these globals or attributes."""

    def is_met(module: ModuleType) -> bool:
        found: Any = module
        for name in function.split("."):
            found = getattr(found, name, None)
        code = getattr(found, "__code__", None)
        return code is not None and all(name in code.co_names for name in names)

    return Need(f"{function} that uses {' and '.join(names)}", is_met)


NEEDS: dict[str, tuple[Need, ...]] = {
    "open_clip.factory": (
        has("CustomTextCLIP"),
        has("_MODEL_CONFIGS"),
        has("_MODEL_CONFIG_PATHS"),
        has("_rescan_model_configs"),
        has("get_model_config"),
        has("parse_model_name"),
        uses("create_model", "CustomTextCLIP"),
    ),
    "open_clip_train.data": (
        takes("get_wds_dataset", "args", "preprocess_img", "is_train", "epoch", "tokenizer"),
        *map(has, ("DataInfo", "ResampledShards2", "SharedEpoch", "detshuffle2", "expand_urls", "get_dataset_size")),
        has("group_by_keys_nothrow"),
    ),
    "open_clip_train.train": (takes("evaluate", "data", "epoch", "args", "tokenizer"),),
}
"""What both lines have, by module."""

_lacking: dict[str, list[str]] = {}
"""Of the modules that have been looked at."""


def note_lacking(module: ModuleType, needs: Iterable[Need]) -> list[str]:
    """Look at a module: what of it the plugin would build on and does not find."""
    found = [need.what for need in needs if not need.is_met(module)]
    _lacking[module.__name__] = found
    return found


def require_known_host() -> None:
    """Refuse to go on with a host of which something is missing.

    Raises:
        RuntimeError: names what is missing.
    """
    missing = [what for found in _lacking.values() for what in found]
    if missing:
        raise RuntimeError(unsupported(missing))


def unsupported(missing: list[str]) -> str:
    version = getattr(sys.modules.get("open_clip.version"), "__version__", "unknown")
    return (
        f"open_clip {version} lacks {', '.join(missing)}, which msa_openclip extends; "
        f"MSA models need open_clip_torch{SUPPORTED_OPEN_CLIP}."
    )
