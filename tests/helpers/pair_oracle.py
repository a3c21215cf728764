"""Oracles of the pair stage: docs/method.md, section 1 pair by pair with its maps; the folded formula in loops.

Shapes: I images, T texts, S scales, N tokens, H heads, d width of a head, D = H d, C width of a pooled scale vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msa_openclip.pair_scores.formula import ImageSide, TextSide


def naive_logits(images: ImageSide, texts: TextSide) -> Tensor:
    """The folded formula, one pair, scale, head and token at a time, in float64: (S, I, T)."""
    query, readout, gate, bias = (field.double() for field in images)
    key, value, feature = (field.double() for field in texts[:3])
    logits = torch.zeros(query.shape[1], query.shape[0], key.shape[0], dtype=torch.float64)
    for s, i, t in torch.cartesian_prod(*(torch.arange(size) for size in logits.shape)).tolist():
        tokens = texts.mask[t].nonzero().flatten().tolist()
        logits[s, i, t] = gate[i, s].dot(feature[t]) + bias[i, s]
        for head in range(query.shape[2]) if tokens else ():
            logit = torch.stack([query[i, s, head].dot(key[t, s, n, head]) for n in tokens])
            read = torch.stack([readout[i, s, head].dot(value[t, s, n, head]) for n in tokens])
            logits[s, i, t] = logits[s, i, t] + logit.softmax(0).dot(read)
    return logits


@dataclass(frozen=True, kw_only=True)
class Mscmat:
    """MSCMAT with random learned maps: `pairwise` computes it as the method is written, `fold` prepares both sides."""

    project: list[nn.Linear]
    norm_image: nn.LayerNorm
    norm_text: nn.LayerNorm
    attention: list[nn.MultiheadAttention]
    score: list[nn.Linear]

    @classmethod
    def random(cls, *, widths: list[int], heads: int, width: int, dtype: torch.dtype = torch.float64) -> Mscmat:
        """One scale per entry of `widths`, every parameter (LayerNorm included) drawn at random."""
        maps = cls(
            project=[nn.Linear(channels, width, dtype=dtype) for channels in widths],
            norm_image=nn.LayerNorm(width, dtype=dtype),
            norm_text=nn.LayerNorm(width, dtype=dtype),
            attention=[nn.MultiheadAttention(width, heads, batch_first=True, dtype=dtype) for _ in widths],
            score=[nn.Linear(width, 1, dtype=dtype) for _ in widths],
        )
        for parameter in maps.parameters():
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
        return maps

    def parameters(self) -> list[nn.Parameter]:
        """All learned maps, in a fixed order."""
        modules = [*self.project, self.norm_image, self.norm_text, *self.attention, *self.score]
        return [parameter for module in modules for parameter in module.parameters()]

    def pairwise(self, pooled: list[Tensor], tokens: Tensor, feature: Tensor, mask: Tensor) -> Tensor:
        """Section 1, every pair by itself; texts with no token to attend to add nothing. (S, I, T)."""
        pairs = [
            [[self._pair(s, z[i], tokens[t], feature[t], mask[t]) for t in range(len(tokens))] for i in range(len(z))]
            for s, z in enumerate(pooled)
        ]
        return torch.stack([torch.stack([torch.stack(row) for row in scale]) for scale in pairs])

    def _pair(self, s: int, z: Tensor, tokens: Tensor, feature: Tensor, mask: Tensor) -> Tensor:
        mapped = self.project[s](z)
        # Nothing to attend to means nothing attended, of which the out-projection's bias remains.
        attended = self.attention[s].out_proj.bias
        if mask.any():
            keys = self.norm_text(tokens[mask])[None]
            attended = self.attention[s](self.norm_image(mapped)[None, None], keys, keys, need_weights=False)[0][0, 0]
        return self.score[s]((attended + feature) * mapped)[0]

    def released(self, pooled: list[Tensor], tokens: Tensor, feature: Tensor) -> Tensor:
        """As the released code runs it: each image attends over all texts, projected anew; no mask. (S, I, T)."""
        scales = []
        for s, z in enumerate(pooled):
            rows = []
            for mapped in self.project[s](z):
                query = self.norm_image(mapped).expand(len(tokens), 1, -1)
                keys = self.norm_text(tokens)
                attended = self.attention[s](query, keys, keys)[0][:, 0]
                rows.append(self.score[s]((attended + feature) * mapped)[:, 0])
            scales.append(torch.stack(rows))
        return torch.stack(scales)

    def fold(self, pooled: list[Tensor], tokens: Tensor, feature: Tensor, mask: Tensor) -> tuple[ImageSide, TextSide]:
        """Section 2: everything learned, applied once per image and once per text."""
        keyed = self.norm_text(tokens)
        image_rows, keys, values = [], [], []
        for project, attention, score, z in zip(self.project, self.attention, self.score, pooled, strict=True):
            mapped = project(z)
            heads = attention.num_heads
            weights = attention.in_proj_weight.chunk(3)
            biases = attention.in_proj_bias.chunk(3)
            query = self.norm_image(mapped) @ weights[0].T + biases[0]
            gate = score.weight[0] * mapped
            image_rows.append((
                query.unflatten(-1, (heads, -1)) / math.sqrt(attention.head_dim),
                (gate @ attention.out_proj.weight).unflatten(-1, (heads, -1)),
                gate,
                gate @ attention.out_proj.bias + score.bias,
            ))  # fmt: skip
            keys.append((keyed @ weights[1].T + biases[1]).unflatten(-1, (heads, -1)))
            values.append((keyed @ weights[2].T + biases[2]).unflatten(-1, (heads, -1)))
        images = ImageSide(*(torch.stack(rows, dim=1) for rows in zip(*image_rows, strict=True)))
        return images, TextSide(torch.stack(keys, dim=1), torch.stack(values, dim=1), feature, mask)


def random_sides(
    *,
    images: int = 3,
    texts: int = 5,
    scales: int = 2,
    tokens: int = 7,
    heads: int = 2,
    width: int = 11,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    logit_size: float = 1.0,
) -> tuple[ImageSide, TextSide]:
    """Both sides at random with ragged masks that have holes; `width` is that of a head, D = heads x width."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(texts, tokens, generator=generator) < 0.6
    mask[:, 0] |= ~mask.any(dim=1)
    image_side = ImageSide(
        draw(images, scales, heads, width) * logit_size / math.sqrt(width),
        draw(images, scales, heads, width) / math.sqrt(width),
        draw(images, scales, heads * width),
        draw(images, scales),
    )
    feature = nn.functional.normalize(draw(texts, heads * width), dim=-1)
    key, value = draw(texts, scales, tokens, heads, width), draw(texts, scales, tokens, heads, width)
    text_side = TextSide(key.to(dtype), value.to(dtype), feature.to(dtype), mask)
    return ImageSide(*(field.to(dtype) for field in image_side)), text_side
