"""Why an image and a text match: per scale each word's weight and exact share of the score, and where the scale looked.

The fold (docs/method.md, section 2) makes this exact: for one scale, with p the attention weights,

    logit = sum over words sum_h p_hn (u_h . v_hn)  +  g . t  +  r

Shapes: S scales, N tokens, H heads, L positions of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import ImageScale
from ..data.pixels import dates_of, preprocessed
from ..evaluation.loading import LoadedModel
from ..pair_scores.formula import ImageSide, TextSide


class ExplainError(ValueError):
    """There is nothing to explain, or no way to show it."""


@dataclass(frozen=True)
class Word:
    """A word of the text, in one scale."""

    text: str
    weight: float
    """Share of the scale's attention, mean over heads; the words of a scale sum to 1."""
    contribution: float
    """Signed part of the logit."""


@dataclass(frozen=True)
class ScaleExplanation:
    """One scale: words' contributions + sentence + image = logit."""

    scale: ImageScale
    logit: float
    words: tuple[Word, ...]
    sentence: float
    """g . t: what the text as a whole adds."""
    image: float
    """r: what this image adds to every text."""
    positions: Tensor
    """(h, w): where the scale looked, summing to 1; for max pooling the share of channels each position won.

    Of several dates (h, dates * w), side by side.
    """

    def parts(self) -> list[tuple[str, float]]:
        """What the logit is the sum of: words, the sentence as a whole, the image."""
        words = [(word.text, word.contribution) for word in self.words]
        return [*words, ("(sentence)", self.sentence), ("(image)", self.image)]


@dataclass(frozen=True)
class Explanation:
    """An image and a text."""

    text: str
    cosine: float
    fused: float
    scales: tuple[ScaleExplanation, ...]


def explain(model: LoadedModel, picture: Image.Image | Sequence[Image.Image], text: str) -> Explanation:
    """Explain the score of a picture, or of the pictures of a place in order of date, and a text.

    Raises:
        ExplainError: the model has no MSCMAT, or a score in its place, or the text is blank.
    """
    if not model.scorer.has_match:
        raise ExplainError(f"{model.spec} has no MSCMAT, its one cosine has no parts; explain an MSA model.")
    form = model.scorer.model.msa_cfg.score.form
    if form not in ("logit", "sigmoid"):
        raise ExplainError(f"{model.spec} scores pairs by msa_cfg.score.form {form!r}, which attends to no words.")
    if not text.strip():
        raise ExplainError("the text is blank; write what to explain.")
    msa = model.scorer.model
    device = model.scorer.device
    pixels = preprocessed(dates_of(picture), model.preprocess)[None].to(device, model.scorer.input_dtype)
    ids = model.tokenizer([text]).to(device)
    with torch.inference_mode():
        image_feature, image_side = msa.image_side(pixels)
        text_feature, text_side = msa.text_side(ids)
        positions = _positions(msa, pixels)
        images = ImageSide(*(part.float() for part in image_side))
        texts = TextSide(text_side.key.float(), text_side.value.float(), text_side.feature.float(), text_side.mask)
        cosine = image_feature.float() @ text_feature.float().T
        fused = msa.rank_scores(cosine, msa.match_scores(images, texts))
    attendable = ids[0].tolist()[ids.shape[1] - texts.key.shape[2] :]  # the first token may be left out
    names = _words(model.tokenizer, attendable, texts.mask[0].tolist())
    scales = tuple(
        _explain_scale(images, texts, number, scale, names, positions[number])
        for number, scale in enumerate(msa.msa_cfg.image_scales)
    )
    return Explanation(text, float(cosine), float(fused), scales)


def _explain_scale(
    images: ImageSide,
    texts: TextSide,
    number: int,
    scale: ImageScale,
    names: Sequence[tuple[str, list[int]]],
    positions: Tensor,
) -> ScaleExplanation:
    query, readout = images.query[0, number], images.readout[0, number]  # (H, d)
    key, value = texts.key[0, number], texts.value[0, number]  # (N, H, d)
    mask = texts.mask[0]
    attention = torch.einsum("hd,nhd->hn", query, key)[:, mask].softmax(dim=-1)
    weight = attention.new_zeros(len(query), len(mask))
    weight[:, mask] = attention
    shares = (weight * torch.einsum("hd,nhd->hn", readout, value)).sum(dim=0)  # (N,)
    sentence = float(images.gate[0, number] @ texts.feature[0])
    image = float(images.bias[0, number])
    words = tuple(
        Word(text, float(weight.mean(dim=0)[tokens].sum()), float(shares[tokens].sum())) for text, tokens in names
    )
    return ScaleExplanation(scale, float(shares.sum()) + sentence + image, words, sentence, image, positions)


def _positions(msa: Any, pixels: Tensor) -> list[Tensor]:
    """(h, dates * w) of each scale: how much of its pooled vectors comes from each position."""
    images = pixels.flatten(0, -4)  # of all dates
    maps = msa.image_scales.maps(msa.visual, images).maps
    found = []
    for number, (scale, slot) in enumerate(zip(msa.image_scales.scales, msa.image_scales.slots, strict=True)):
        length = maps[slot].shape[1]
        height = round(math.sqrt(length * images.shape[2] / images.shape[3]))
        if length % height:
            raise ExplainError(f"scale {number + 1}: {length} positions make no grid; is patch dropout on?")
        shares = [_shares(msa, number, scale, of_date).reshape(height, -1) for of_date in maps[slot]]
        found.append(torch.cat(shares, dim=1).cpu() / len(shares))
    return found


def _shares(msa: Any, number: int, scale: ImageScale, positions: Tensor) -> Tensor:
    """Shares (L,) of the positions (L, C) of a map in its pooled vector."""
    length, channels = positions.shape
    if scale.pool in ("max", "max_avg"):
        share = torch.bincount(positions.float().argmax(dim=0), minlength=length).float() / channels
        return share if scale.pool == "max" else (share + 1 / length) / 2
    if scale.pool == "learned":
        query = msa.image_scales.pools[str(number)].query
        learned: Tensor = (query(positions)[:, 0].float() / math.sqrt(channels)).softmax(dim=0)
        return learned
    return torch.full((length,), 1 / length)  # the average looks everywhere; what the class token saw is not in the map


def _words(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[str, list[int]]]:
    """Attended tokens put together to words: text and token positions."""
    words: list[tuple[str, list[int]]] = []
    is_open = False
    for position, (token, attended) in enumerate(zip(ids, mask, strict=True)):
        if not attended:
            continue
        piece, starts, ends = _piece(tokenizer, token)
        if words and (is_open or not starts):
            text, tokens = words[-1]
            words[-1] = (text + piece, [*tokens, position])
        else:
            words.append((piece, [position]))
        is_open = not ends
    return words


def _piece(tokenizer: Any, token: int) -> tuple[str, bool, bool]:
    """Text of a token, and whether it starts and ends a word as far as it tells itself."""
    if hasattr(tokenizer, "decoder"):  # open_clip's BPE: </w> ends a word
        piece = tokenizer.decoder[token]
        if piece.startswith("<"):
            return f"[{piece.strip('<>').replace('_of_text', '')}]", True, True
        letters = bytearray(tokenizer.byte_decoder[c] for c in piece.removesuffix("</w>"))
        return letters.decode("utf-8", errors="replace"), True, piece.endswith("</w>")
    piece = str(tokenizer.tokenizer.convert_ids_to_tokens(token))  # word piece: ## continues; sentence piece: ▁ starts
    return piece.removeprefix("##").removeprefix("▁"), not piece.startswith("##"), True
