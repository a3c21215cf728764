"""Scoring: texts without their padding score as texts with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from helpers import tiny
from helpers.retrieval_data import randomise

from msa_openclip.evaluation.scorer import Scorer, without_padding

TEXTS = ["many white planes", "two green trees are near some planes"]


@pytest.mark.parametrize(
    ("kind", "text", "msa", "positions"),
    [
        ("ViT", {}, {}, 9),
        ("ViT", {"pool_type": "last"}, {}, 13),
        ("ViT", {"no_causal_mask": True}, {}, 13),
        ("ViT", {}, {"text_tokens": {"padding": True}}, 13),
        ("timm-RN", "BERT", {"fusion": "scales"}, 9),
        ("timm-RN", "BERT", {"preset": "paper"}, 13),
    ],
)
def test_padding_is_not_encoded_where_nothing_depends_on_it(
    kind: str, text: Any, msa: dict[str, Any], positions: int, tmp_path: Path, tiny_bert: Path
) -> None:
    text_cfg = tiny.bert_text(tiny_bert) if text == "BERT" else tiny.TEXT | text
    tiny.write_config(tmp_path, "MSA-some", tiny.config(kind, text=text_cfg, msa=msa))
    open_clip.add_model_config(tmp_path)
    model, tokenizer = randomise(open_clip.create_model("MSA-some")), open_clip.get_tokenizer("MSA-some")
    ids = tokenizer(TEXTS)
    assert ids.shape == (2, 13)
    view, cut = without_padding(model, ids)
    assert cut.shape == (2, positions)
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}
    feature, side = model.text_side(ids)
    found = Scorer(model).texts(ids)
    kept = found.side.mask.shape[1]
    assert kept == side.mask.any(dim=0).sum()
    torch.testing.assert_close(found.feature, feature.detach(), rtol=1e-5, atol=1e-5)
    for mine, whole in ((found.side.key, side.key), (found.side.value, side.value)):
        mask = side.mask[:, :kept]
        expected = whole.detach()[:, :, :kept].transpose(1, 2)[mask]
        torch.testing.assert_close(mine.transpose(1, 2)[mask], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.side.mask, side.mask[:, :kept])
    torch.testing.assert_close(model.text_side(ids)[0], feature)  # and the model itself is as it was
