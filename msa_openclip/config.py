"""The `msa_cfg` of a model configuration: frozen, validated dataclasses; every default of MSA stands here, once."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Pool = Literal["max", "avg", "max_avg", "token", "learned"]
Fusion = Literal["tower", "scales", "both", "decoupled", "dynamic"]

LARGEST_WIDTH = 65_536
"""Of MSCMAT: a hundred times those of the largest towers; beyond it a slip of the pen asks for all memory there is."""
LARGEST, SMALLEST = 1e6, 1e-6
"""Bounds of weights and temperatures: what lies beyond overflows in half precision, and no training needs it."""
MOST_DATES = 64
"""Images of a sample: each goes through the image tower."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ImageScale:
    """One scale: a map of the image tower and how it is pooled to one vector z_s (docs/method.md, section 1.1)."""

    stage: int
    """Stage of a hierarchical backbone (1 is the map of stride 4) or block of a plain ViT, counted from 1."""
    pool: Pool = "avg"
    """`max`, `avg`: over all positions; `max_avg`: both side by side; `token`: the class token; `learned`: attention
    with one learned query."""


@dataclass(frozen=True, kw_only=True)
class ScaleInputs:
    """What is done to the pooled vectors before any learned map reads them, those of the fusion and of MSCMAT."""

    norm: Literal["none", "batch", "layer"] = "none"
    """By the statistics of each channel over the batch, or of each vector; ranges of stages differ tenfold."""
    dropout: float = 0.0
    """Share of their values left out in training."""


@dataclass(frozen=True, kw_only=True)
class TextTokens:
    """Which last hidden states of the text tower MSCMAT attends to (docs/method.md, section 1.3)."""

    first: bool = False
    """Attend to the first position too ([CLS] or start of text)."""
    padding: bool = False
    """Attend to padding too, as the released code does."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The form of the match score (docs/method.md, section 1.4)."""

    form: Literal["logit", "sigmoid", "gram", "gated"] = "logit"
    """What losses and rankings see: MSCMAT's logit, or its sigmoid as in the released code; or a score in MSCMAT's
    place, of all scales at once: `gram` compares all words with all scales, `gated` gates the text by the image
    (docs/explanation/methods.md). Those two have neither gate, heads nor temperature."""
    gate: Literal["normalised", "plain"] = "normalised"
    """The image vector that gates the attended text: LN_img(m), or m itself as in the released code."""
    temperature: float | None = 0.07
    """Start of a learned temperature per scale; null leaves the scale of the logits to w_s, as in the released code."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Terms of `MSALoss` with their weights (docs/method.md, section 1.5).

    Without fused, match and consistency terms there is no MSCMAT.

    What the defaults were chosen by is in docs/results/findings.md.
    """

    global_term: Literal["infonce", "triplet"] = "infonce"
    global_weight: float = 0.3
    """Keeps the global features useful alone, as a search needs them that ranks its first candidates by them."""
    margin: float = 0.5
    """Of the triplet terms, in cosine."""
    margin_relief: float = 0.0
    """Share of the margin that a negative loses whose caption has the same words; in proportion for those that share
    some."""
    same_class_weight: float = 1.0
    """Factor of a triplet whose hardest negative is of the row's own scene class; other than 1 it needs shards with
    classes."""
    fused_term: Literal["infonce", "triplet"] = "infonce"
    fused_weight: float = 1.0
    """Of the term on the fused scores of `ranking`, by which retrieval ranks."""
    fused_scaled: bool = False
    """Multiply the fused scores by the model's logit scale in that term: for rankings whose parts are similarities."""
    fused_match_weight: float | None = None
    """Weight of the match scores within that term; null: `ranking.match_weight`."""
    match_weight: float = 0.0
    """Of the cross-entropy of every scale's scores alone, summed over scales."""
    match_directions: Literal["both", "image_to_text"] = "both"
    consistency: Literal["rows", "released"] = "rows"
    """`rows`: KL(teacher || student) a query; `released`: KL(student || teacher), averaged over all pairs."""
    consistency_weight: float = 0.0
    consistency_temperature: float = 1.0
    identical_captions: bool = True
    """Captions of a batch with the same token ids are positives of each other's images, not negatives."""
    pair_weights: Literal["equal", "self_paced", "eliminate"] = "equal"
    """How the InfoNCE terms weigh pairs that may not belong together (docs/explanation/methods.md)."""
    clean_below: float = 0.15
    """Of `self_paced`: the loss under which a pair is clean, in units of the logit scale ..."""
    noisy_from: float = 0.4
    """... and from which it is taken for a wrong pair."""
    eliminated_share: float = 0.1
    """Of `eliminate`: pairs less similar than this share of the `eliminate_queue` pairs before them are left out ..."""
    eliminate_queue: int = 4096
    eliminate_after: int = 200
    """... after so many steps."""

    @property
    def needs_text_ids(self) -> bool:
        """Whether a term compares captions by their token ids."""
        return self.identical_captions or self.margin_relief > 0

    @property
    def needs_classes(self) -> bool:
        """Whether a term compares scene classes."""
        return self.same_class_weight != 1

    @property
    def has_triplets(self) -> bool:
        """Whether a term with a weight is a hinge on the hardest negative."""
        return (self.global_term == "triplet" and self.global_weight > 0) or (
            self.fused_term == "triplet" and self.fused_weight > 0
        )


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How the fused ranking combines cosine and match scores: global_weight cos + match_weight mean over scales."""

    global_weight: float | None = None
    """Null: the model's logit scale, so that both parts are logits."""
    match_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MSACfg:
    """All of MSA's settings, the `msa_cfg` of a model configuration."""

    image_scales: tuple[ImageScale, ...]
    """Shallow to deep; the last one is the teacher of the consistency term."""
    base: str | None = None
    """open_clip model of the same towers, whose pretrained tags this model accepts."""
    width: int | None = None
    """Width D of MSCMAT; null: embed_dim."""
    heads: int = 8
    dates: int = 1
    """Images of a sample, of one place in order of date: 2 for change pairs, more for time series.  The towers are
    shared; each scale and the tower's feature are fused over the dates (docs/method.md, section 1.7)."""
    fusion: Fusion = "both"
    """Global image feature: of the tower, of the scales (docs/method.md, section 1.2), tower plus scales; of scales
    that suppress what the others say (`decoupled`), or a weighing of tower and scales for each image (`dynamic`)."""
    fusion_hidden: int | None = None
    """Of fusion `both`: width of a residual MLP over the tower's feature and all scales; null: linear maps alone."""
    scale_inputs: ScaleInputs = field(default_factory=ScaleInputs)
    text_tokens: TextTokens = field(default_factory=TextTokens)
    score: Score = field(default_factory=Score)
    loss: Loss = field(default_factory=Loss)
    ranking: Ranking = field(default_factory=Ranking)

    def __post_init__(self) -> None:
        _require(len(self.image_scales) > 0, "image_scales", "[]", "at least one scale")
        for position, scale in enumerate(self.image_scales):
            _require(scale.stage >= 1, f"image_scales[{position}].stage", scale.stage, "1 or more")
        stages = [scale.stage for scale in self.image_scales]
        _require(stages == sorted(stages), "image_scales", stages, "stages ordered from shallow to deep")
        _require(self.width is None or self.width > 0, "width", self.width, "a positive number or null")
        _require(self.heads > 0, "heads", self.heads, "a positive number")
        _require(1 <= self.dates <= MOST_DATES, "dates", self.dates, f"1 to {MOST_DATES}")
        for name in ("width", "heads", "fusion_hidden"):
            _require((getattr(self, name) or 1) <= LARGEST_WIDTH, name, getattr(self, name), f"at most {LARGEST_WIDTH}")
        if self.width is not None:
            check_heads(self.width, self.heads)
        dropout, hidden = self.scale_inputs.dropout, self.fusion_hidden
        _require(0 <= dropout < 1, "scale_inputs.dropout", dropout, "at least 0 and less than 1")
        _require(hidden is None or hidden > 0, "fusion_hidden", hidden, "a positive number or null")
        temperature = self.score.temperature
        _require(temperature is None or temperature > 0, "score.temperature", temperature, "a positive number or null")
        for name in ("global_weight", "fused_weight", "match_weight", "consistency_weight", "margin"):
            _require(getattr(self.loss, name) >= 0, f"loss.{name}", getattr(self.loss, name), "0 or more")
        consistency_temperature = self.loss.consistency_temperature
        _require(consistency_temperature > 0, "loss.consistency_temperature", consistency_temperature, "more than 0")
        for key in ("ranking.global_weight", "ranking.match_weight", "loss.fused_match_weight"):
            part, name = key.split(".")
            weight = getattr(getattr(self, part), name)
            _require(weight is None or weight >= 0, key, weight, "0 or more")
        self._check_pairs()
        self._require_representable()
        trains = self.loss.global_weight > 0 or self.uses_mscmat
        _require(trains, "loss", "all weights 0", "at least one term with a weight")

    def _check_pairs(self) -> None:
        """What the loss does with single pairs and negatives."""
        loss = self.loss
        _require(loss.same_class_weight >= 0, "loss.same_class_weight", loss.same_class_weight, "0 or more")
        for name in ("margin_relief", "eliminated_share"):
            _require(0 <= getattr(loss, name) <= 1, f"loss.{name}", getattr(loss, name), "0 to 1")
        _require(loss.clean_below > 0, "loss.clean_below", loss.clean_below, "more than 0")
        _require(loss.noisy_from >= loss.clean_below, "loss.noisy_from", loss.noisy_from, "loss.clean_below or more")
        _require(loss.eliminate_queue > 0, "loss.eliminate_queue", loss.eliminate_queue, "a positive number")
        _require(loss.eliminate_after >= 0, "loss.eliminate_after", loss.eliminate_after, "0 or more")
        if loss.pair_weights != "equal":
            weighed = loss.fused_weight + loss.global_weight * (loss.global_term == "infonce")
            fits = weighed > 0 and not loss.has_triplets
            _require(fits, "loss.pair_weights", loss.pair_weights, "'equal' where triplet or match terms train alone")

    def _require_representable(self) -> None:
        """All numbers lie where half precision can work with them, and with what is computed from them."""
        for room in ("score", "loss", "ranking"):
            for name, value in dataclasses.asdict(getattr(self, room)).items():
                least = SMALLEST if "temperature" in name else 0.0
                if isinstance(value, float):
                    _require(least <= value <= LARGEST, f"{room}.{name}", value, f"{least:g} to {LARGEST:g}")

    @property
    def uses_mscmat(self) -> bool:
        """Whether any loss term trains MSCMAT; if not, the model is built without it."""
        return self.loss.fused_weight + self.loss.match_weight + self.loss.consistency_weight > 0

    @property
    def trains_logit_scale(self) -> bool:
        """Whether a loss term reads the model's logit scale; if not, it stays frozen."""
        fused = self.ranking.global_weight is None or self.loss.fused_scaled
        return self.loss.global_term == "infonce" or (self.loss.fused_weight > 0 and fused)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MSACfg:
        """Parse and validate an `msa_cfg`; its optional key `preset` chooses the defaults.

        Raises:
            ValueError: an unknown key, a wrong type or a value out of range, by name, with what is allowed.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"msa_cfg: expected an object, got {_shown(config)}.")
        settings = dict(config)
        preset = settings.pop("preset", "default")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(
                f"msa_cfg.preset: {_shown(preset)} is unknown; choose one of {', '.join(sorted(PRESETS))}."
            )
        return _parse(cls, _merge(PRESETS[preset], settings), "msa_cfg")


_GLOBAL_ALONE = {"global_weight": 1.0, "fused_weight": 0.0}  # no MSCMAT

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # What the paper's released implementation computes, number by number.
    "paper": {
        "heads": 12,
        "fusion": "scales",
        "fusion_hidden": None,
        "scale_inputs": {"norm": "none", "dropout": 0.0},
        "text_tokens": {"first": False, "padding": True},
        "score": {"form": "sigmoid", "gate": "plain", "temperature": None},
        "loss": {
            "global_term": "triplet",
            "global_weight": 1.0,
            "margin": 0.5,
            "fused_weight": 0.0,
            "match_weight": 15.0,
            "match_directions": "image_to_text",
            "consistency": "released",
            "consistency_weight": 10.0,
            "consistency_temperature": 2.0,
            "identical_captions": False,
        },
        "ranking": {"global_weight": 1.0, "match_weight": 1.0},
    },
    # The ideas of other methods, with what their papers leave open chosen by us: docs/explanation/methods.md.
    "rrsitr": {"loss": {"pair_weights": "self_paced", "global_weight": 1.0}},
    "ebaker": {
        "fusion": "tower",
        "width": 64,
        "score": {"form": "gram"},
        "loss": {"global_weight": 0.0, "fused_scaled": True, "pair_weights": "eliminate"},
        "ranking": {"global_weight": 0.6, "match_weight": 0.4},
    },
    "galr": {"fusion": "dynamic", "loss": {"global_term": "triplet", **_GLOBAL_ALONE, "margin": 0.2}},
    "amfmn": {
        "fusion": "scales",
        "score": {"form": "gated"},
        "loss": {
            "global_term": "triplet",
            "global_weight": 0.0,
            "fused_term": "triplet",
            "margin": 0.2,
            "margin_relief": 1.0,
        },
        "ranking": {"global_weight": 0.0, "match_weight": 1.0},
    },
    "ssjdn": {
        "fusion": "decoupled",
        "loss": {"global_term": "triplet", **_GLOBAL_ALONE, "margin": 0.2, "same_class_weight": 0.5},
    },
}


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless MSCMAT's width is divisible by its heads."""
    if width % heads:
        divisors = [str(n) for n in range(1, 65) if width % n == 0]
        raise ValueError(
            f"msa_cfg.heads: width {width} is not divisible by {heads} heads; allowed are {', '.join(divisors)}."
        )


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"msa_cfg.{key}: got {_shown(value)}, expected {allowed}.")


def _shown(value: object, longest: int = 80) -> str:
    """A value as a message shows it: a configuration may hold numbers and lists of any length."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]} ..."


def _merge(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` over `defaults`, object by object."""
    merged = dict(defaults)
    for key, value in settings.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _parse(kind: type[_T], value: Any, key: str) -> _T:
    """Build the dataclass `kind` from a JSON object, naming `key` in every complaint."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}: expected an object, got {_shown(value)}.")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ValueError(f"{key}.{unknown[0]}: unknown key; known are {', '.join(hints)}.")
    required = {f.name for f in dataclasses.fields(kind) if _is_required(f)}  # type: ignore[arg-type]
    missing = sorted(required - set(value))
    if missing:
        raise ValueError(f"{key}.{missing[0]}: missing; it has no default.")
    return kind(**{name: _convert(hints[name], item, f"{key}.{name}") for name, item in value.items()})


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Check a JSON value against a type hint and convert lists to tuples and objects to dataclasses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key}: got {_shown(value)}, expected one of {', '.join(map(repr, arguments))}.")
        return value
    if origin is types.UnionType:
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _convert(inner, value, key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: expected a list, got {_shown(value)}.")
        return tuple(_convert(arguments[0], item, f"{key}[{position}]") for position, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _parse(typing.cast("type[Any]", hint), value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{key}: got {_shown(value)}, expected a finite number.") from error
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{key}: got {_shown(value)}, expected {hint.__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: got {_shown(value)}, expected a finite number.")
    return value
