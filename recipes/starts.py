"""What a training starts from, with the settings that belong to the weights and the rates that others published.

Rates, batches and epochs are starting points: they come from papers that trained other heads on these towers, or from
our own small runs, and have not been tuned here.  An epoch shows each image with one of its five captions; in the
papers it shows all five.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET = ("--image-mean", "0.485", "0.456", "0.406", "--image-std", "0.229", "0.224", "0.225")
"""What timm's ImageNet weights were trained with; open_clip would normalise as CLIP does."""
HALVES = ("--image-mean", "0.5", "0.5", "0.5", "--image-std", "0.5", "0.5", "0.5")
"""The same of timm's tf_ models, which come from TensorFlow."""
WHOLE = ("--aug-cfg", "dihedral=True", "scale=(1.0,1.0)")
"""Flips and quarter turns; whole images, so that nothing is cut off that the caption names."""
CROPS = ("--aug-cfg", "dihedral=True", "scale=(0.5,1.0)")
"""Crops too: small sets teach heads by heart, and what helps against that gains more than whole captions."""
LOCKED_TEXT = ("--lock-text", "--lock-text-freeze-layer-norm")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Weights to start from."""

    what: str
    model: str
    weights: str | None = None
    """Pretrained tag of open_clip, or None."""
    file: str | None = None
    """Name of the published file that --weights must name, where there is no tag."""
    options: tuple[str, ...] = ()
    """For open_clip_train.main; kept in the run's params.txt, from which `msa-openclip` rebuilds the model."""
    locks: tuple[str, ...] = ()
    """What of the towers does not learn, likewise."""
    augmentation: tuple[str, ...] = WHOLE
    views: int = 0
    """Train on features of so many augmented views of each image, made once; 0: through the towers."""
    heads_first: bool = False
    """Train as `frozen` does first, then go on from there through the towers: those that learnt under random heads
    ended below frozen ones (docs/results/findings.md)."""
    lr: float
    wd: float
    batch_size: int
    epochs: int
    source: str
    """Of the rates."""


def _fine_tuned(
    what: str, *, weights: str | None = None, file: str | None = None, options: tuple[str, ...] = ()
) -> Start:
    """CLIP's ViT-B-32 with weights for it."""
    return Start(
        what=what,
        model="MSA-ViT-B",
        weights=weights,
        file=file,
        options=options,
        lr=1e-5,
        wd=0.04,
        batch_size=128,
        epochs=20,
        source="HarMA for GeoRSCLIP's towers: wd 0.04, lr 4e-6, here more for a new MSCMAT: "
        "https://github.com/seekerhuang/HarMA/blob/main/configs/Retrieval_rsitmd_geo.yaml",
    )


STARTS: dict[str, Start] = {
    "scratch": Start(
        what="random weights in small towers, 96 px",
        model="MSA-ViT-Ti",
        lr=1e-3,
        wd=0.2,
        batch_size=64,
        epochs=30,
        source="examples/quickstart.py",
    ),
    "imagenet": Start(
        what="ImageNet weights of timm and BERT-base (--model MSA-ResNet50-BERT: the paper's towers and losses)",
        model="MSA-Swin-T-BERT",
        options=("--pretrained-image", *IMAGENET),  # BERT's own weights are open_clip's default
        lr=6e-5,
        wd=0.01,
        batch_size=128,
        epochs=50,
        source="PIR, same towers: https://github.com/jaychempan/PIR/blob/main/configs/Retrieval_rsitmd.yaml",
    ),
    "imagenet-lite": Start(
        what="the heads of `frozen`, then EfficientNet-Lite0's last groups with them: for a laptop and an evening",
        model="MSA-EfficientNetLite0-MiniLM",
        options=("--pretrained-image", *HALVES),
        locks=("--lock-image", "--lock-image-unlocked-groups", "3", "--lock-image-freeze-bn-stats", *LOCKED_TEXT),
        augmentation=CROPS,
        heads_first=True,
        lr=1e-3,
        wd=0.1,
        batch_size=128,
        epochs=4,
        source="docs/results/findings.md, towers that learn",
    ),
    "frozen": Start(
        what="the same towers, both locked, or those of --weights: heads trained on features of them in minutes",
        model="MSA-EfficientNetLite0-MiniLM",
        options=("--pretrained-image", *HALVES),
        locks=("--lock-image", *LOCKED_TEXT),
        augmentation=CROPS,
        views=6,
        lr=1e-3,
        wd=0.1,
        batch_size=256,
        epochs=16,
        source="heads on features of these towers, RSICD and UCM",
    ),
    "clip": _fine_tuned(
        "CLIP ViT-B-32 of LAION-2B; --weights names another tag or a file", weights="laion2b_s34b_b79k"
    ),
    "remoteclip": _fine_tuned(
        "RemoteCLIP, which has seen the training images of RSITMD, RSICD and UCM",
        file="RemoteCLIP-ViT-B-32.pt, https://huggingface.co/chendelong/RemoteCLIP",
        options=("--force-quick-gelu",),  # its authors load it into OpenAI's model, whose activation that is
    ),
    "georsclip": _fine_tuned(
        "GeoRSCLIP, trained on RS5M",
        file="RS5M_ViT-B-32.pt, https://huggingface.co/Zilun/GeoRSCLIP",
        options=("--force-quick-gelu",),  # likewise
    ),
}
