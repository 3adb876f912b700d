"""WKV-7 token by token and the time mixing around it, in float64 the judge of every kernel and form. To be imported."""

import torch
import torch.nn.functional as F

DECAY_BOUND = 0.6065306597126334  # e^{-1/2}


def wkv7(r, w, k, v, a, b, S=None):
    """r w k v a b: (B, T, H, N); w is the decay before its activation. S: the state before the first token,
    (B, H, N, N), row = value, column = key; None is 0. Returns y (B, T, H, N) and the state after the last token.
        d_t = exp(-e^{-1/2} sigmoid(w_t))    u_t = S_{t-1} a_t
        S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T    y_t = S_t r_t"""
    B, T, H, N = r.shape
    S = r.new_zeros(B, H, N, N) if S is None else S
    d = torch.exp(-DECAY_BOUND * torch.sigmoid(w))
    y = []
    for t in range(T):
        u = S @ a[:, t, :, :, None]  # (B, H, N, 1)
        S = S * d[:, t, :, None, :] + u * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append((S @ r[:, t, :, :, None])[..., 0])
    return torch.stack(y, dim=1), S


def time_mix(r, w, k, v, a, g, parameters):
    """r w k v a g and the result (B, T, H, N), parameters (7, H, N): w0 a0 k_k k_a r_k ln_w ln_b. a is the logit of the
    in-context learning rate, g the gate.
        alpha = sigmoid(a + a0)    kappa = k k_k / |k k_k|    k' = k (1 + (alpha - 1) k_a)
        ((LN(wkv7(r, w + w0, k', v, -kappa, kappa alpha)) ln_w + ln_b) + (sum_n r k' r_k) v) g"""
    w0, a0, k_k, k_a, r_k, ln_w, ln_b = parameters
    alpha = torch.sigmoid(a + a0)
    kappa = F.normalize(k * k_k, dim=-1, eps=1e-12)
    k = k * (1 + (alpha - 1) * k_a)
    y = wkv7(r, w + w0, k, v, -kappa, kappa * alpha)[0]
    y = F.layer_norm(y, y.shape[-1:], eps=64e-5) * ln_w + ln_b
    return (y + (r * k * r_k).sum(-1, keepdim=True) * v) * g
