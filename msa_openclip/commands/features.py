"""`msa-openclip features`: outputs of the locked towers, from which open_clip_train.main trains heads in minutes."""

from __future__ import annotations

import argparse
import ast
import time
from typing import Any

from ..evaluation.run_parameters import MODEL_OPTIONS
from ..shards.arguments import Commands, add_choice, add_command, add_number, add_progress, whole_number
from ..training.feature_options import AUG_CFG, DTYPES
from .options import add_batches, add_loading

DESCRIPTION = """Write what a model's towers put out of shards, once; heads then train on it, the towers locked:

  python -m open_clip_train.main ... --train-data 'OUT/train-{000000..000003}.tar' \\
      --lock-image --lock-text --lock-text-freeze-layer-norm

from the same weights and with the same options of the model."""


def add(commands: Commands) -> None:
    """Arguments and help."""
    given = "--shards 'shards/train-{000000..000003}.tar' --views 6"
    examples = [
        f"msa-openclip features MSA-ViT-B=RemoteCLIP-ViT-B-32.pt features --force-quick-gelu {given}",
        f"msa-openclip features MSA-Swin-T-BERT features --pretrained-image {given}",
    ]
    text = "outputs of locked towers, on which heads train in minutes"
    command = add_command(commands, "features", run, text, description=DESCRIPTION, examples=examples, resumes=True)
    text = "NAME=CHECKPOINT or NAME=TAG of plain CLIP or MSA; NAME alone with --pretrained-image"
    command.add_argument("model", metavar="MODEL", help=text)
    command.add_argument("out", metavar="OUT", help="folder or URL for the shards of features")
    text = "shards of images, e.g. 'shards/train-{000000..000003}.tar'"
    command.add_argument("--shards", required=True, metavar="PATTERN", help=text)
    add_number(command, "--views", "augmented views of each image; 0: one, not augmented", default=0, least=0)
    text = f"augmentation of the views, as for open_clip_train.main (default: {AUG_CFG})"
    command.add_argument("--aug-cfg", nargs="*", type=key_and_value, metavar="KEY=VALUE", help=text)
    add_choice(command, "--dtype", "of what is written", DTYPES)
    group = command.add_argument_group("running")
    add_loading(group)
    add_batches(group)
    add_progress(group)
    group = command.add_argument_group("model, as for open_clip_train.main; a checkpoint of a run brings its own")
    group.add_argument("--pretrained-image", action="store_true", help="timm's weights for the image tower")
    group.add_argument("--force-quick-gelu", action="store_true", help="for weights made with QuickGELU")
    size = whole_number(1)
    group.add_argument("--force-image-size", type=size, metavar="PX", help="of the images (default: the model's)")
    group.add_argument("--force-context-length", type=size, metavar="N", help="of the texts (default: the model's)")
    group.add_argument("--image-mean", type=float, nargs=3, metavar="X", help="by channel (default: the model's)")
    group.add_argument("--image-std", type=float, nargs=3, metavar="X", help="by channel (default: the model's)")
    choices = ("bicubic", "bilinear", "random")
    group.add_argument("--image-interpolation", choices=choices, help="of resized images (default: the model's)")
    choices = ("shortest", "longest", "squash")
    group.add_argument("--image-resize-mode", choices=choices, help="without augmentation (default: the model's)")


def key_and_value(text: str) -> tuple[str, Any]:
    """Type of --aug-cfg: KEY=VALUE, the value as Python writes it, else as text."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE; write e.g. dihedral=True")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def run(parsed: argparse.Namespace) -> None:
    """Write features."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from ..data.readers import expand
    from ..model.cached import FeatureError
    from ..model.msaclip import MSACLIP
    from ..training.feature_options import FeatureOptions
    from ..training.feature_writer import write_features
    from .inputs import load_model

    given = {name: getattr(parsed, name) for name in (*MODEL_OPTIONS, "pretrained_image")}
    options = {name: value for name, value in given.items() if value not in (None, False)}
    model = load_model(parsed.model, parsed, towers_only=True, options=options)
    msa = model.scorer.model
    if not isinstance(msa, MSACLIP):
        raise FeatureError(f"{parsed.model}: features are of MSA models; name the MSA model of the same towers.")
    aug_cfg = AUG_CFG if parsed.aug_cfg is None else dict(parsed.aug_cfg)
    preprocess = PreprocessCfg(**msa.visual.preprocess_cfg)
    wanted = FeatureOptions(
        views=parsed.views,
        augment=image_transform_v2(preprocess, is_train=True, aug_cfg=aug_cfg) if parsed.views else None,
        aug_cfg=aug_cfg,
        dtype=parsed.dtype,
        batch_size=parsed.batch_size,
        workers=parsed.workers,
        progress=parsed.progress,
    )
    start = time.perf_counter()
    new = write_features(model, expand(parsed.shards), parsed.out, wanted)
    print(f"{parsed.out}: {new} new shards of features in {time.perf_counter() - start:.1f} s")
