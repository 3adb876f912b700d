"""WKV-6 token by token: the judge of every kernel and form, in float64. To be imported."""

import torch


def wkv6(r, k, v, w, u, S=None):
    """r k v w: (B, T, H, N), u: (H, N); w is the decay before its activation. S: the state before the first token,
    (B, H, N, N), row = value, column = key; None is 0. Returns y (B, T, H, N) and the state after the last token, in
    their dtype.
        d_t = exp(-exp(w_t))    y_t = S_{t-1} r_t + (sum_n r_n u_n k_n) v_t    S_t = S_{t-1} diag(d_t) + v_t k_t^T"""
    B, T, H, N = r.shape
    S = r.new_zeros(B, H, N, N) if S is None else S
    d = torch.exp(-torch.exp(w))
    bonus = (r * u * k).sum(-1, keepdim=True)
    y = []
    for t in range(T):
        y.append((S @ r[:, t, :, :, None])[..., 0] + bonus[:, t] * v[:, t])
        S = S * d[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
    return torch.stack(y, dim=1), S
