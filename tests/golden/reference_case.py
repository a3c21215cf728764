"""Deterministic weights and inputs for the golden files beside this module.

The golden ``.npz`` files hold what the paper authors' released implementation computes on the
weights and inputs built here, so an implementation can be compared with it, number by number,
without having its code.  Everything is drawn from ``numpy.random.RandomState``, whose stream is
frozen across NumPy versions.

Parameter names are those of a state dict of the released modules:

    fc{1..4}.weight (768, C_s)  fc{1..4}.bias (768,)          C = 256, 512, 1024, 2048
    cross_attn{1..4}.in_proj_weight (2304, 768)  .in_proj_bias (2304,)
    cross_attn{1..4}.out_proj.weight (768, 768)  .out_proj.bias (768,)      12 heads of 64
    ln_pre_i.weight/.bias  ln_pre_t.weight/.bias  ln_post.weight/.bias  (768,)
    match_fc{1..4}.weight (1, 768)  match_fc{1..4}.bias (1,)

Mind two names that say the opposite of what they do: ``ln_pre_t`` normalises the projected *image*
vector (the query) and ``ln_pre_i`` the *text* tokens (keys and values).  ``ln_post`` is never used.

Inputs of a case of batch size B:

    scales       4 arrays (B, C_s): pooled image features, shallow stage first
    tokens       (B, 30, 768): last hidden states of the text tower without its first token
    text_global  (B, 768): L2-normalised global text feature
    image_global (B, 768): L2-normalised global image feature

Golden outputs:

    scores       (4, B, B): sigmoid match scores, [scale, image, text]
    loss_triplet, loss_match, loss_consistency, loss_total: floats; total = triplet + 15 match + 10 consistency
    grad_norms   L2 norms of d loss_total / d parameter, in the order of ``grad_names``
                 (the loss with the inputs above as leaves; no gradient through towers)
    grad_scales, grad_tokens: L2 norms of the gradients of the inputs ``scales[s]`` and ``tokens``
"""

import numpy as np

CHANNELS = (256, 512, 1024, 2048)
WIDTH, HEADS, TOKENS = 768, 12, 30


def weights(seed: int) -> dict[str, np.ndarray]:
    """State dict, float32, of the multi-scale cross-attention module for ``seed``."""
    rng = np.random.RandomState(seed)

    def draw(*shape: int, std: float) -> np.ndarray:
        return (rng.standard_normal(shape) * std).astype(np.float32)

    state: dict[str, np.ndarray] = {}
    for s, channels in enumerate(CHANNELS, start=1):
        state[f"fc{s}.weight"] = draw(WIDTH, channels, std=channels**-0.5)
        state[f"fc{s}.bias"] = draw(WIDTH, std=0.02)
        state[f"cross_attn{s}.in_proj_weight"] = draw(3 * WIDTH, WIDTH, std=WIDTH**-0.5)
        state[f"cross_attn{s}.in_proj_bias"] = draw(3 * WIDTH, std=0.05)
        state[f"cross_attn{s}.out_proj.weight"] = draw(WIDTH, WIDTH, std=WIDTH**-0.5)
        state[f"cross_attn{s}.out_proj.bias"] = draw(WIDTH, std=0.05)
        state[f"match_fc{s}.weight"] = draw(1, WIDTH, std=0.1)
        state[f"match_fc{s}.bias"] = draw(1, std=0.1)
    for name in ("ln_pre_t", "ln_pre_i", "ln_post"):
        state[f"{name}.weight"] = 1 + draw(WIDTH, std=0.05)
        state[f"{name}.bias"] = draw(WIDTH, std=0.05)
    return state


def inputs(seed: int, batch: int) -> dict[str, object]:
    """Inputs of a case, float32 arrays."""
    rng = np.random.RandomState(seed + 1_000_003)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    return {
        "scales": [np.abs(rng.standard_normal((batch, c))).astype(np.float32) for c in CHANNELS],
        "tokens": rng.standard_normal((batch, TOKENS, WIDTH)).astype(np.float32),
        "text_global": unit(rng.standard_normal((batch, WIDTH))).astype(np.float32),
        "image_global": unit(rng.standard_normal((batch, WIDTH))).astype(np.float32),
    }
