"""Results of a WKV operator held against the recurrence in float64: what test_wkv6.py and test_wkv7.py share."""

import torch


def run(operator, recurrence, names, form, inputs, dy):
    """{name: y, then the gradients of inputs}. `form` is a kernel of the operator, or "reference" for the recurrence in
    float64."""
    dtype = torch.float64 if form == "reference" else inputs[0].dtype
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    y = recurrence(*leaves)[0] if form == "reference" else operator(*leaves, kernel=form)
    y.backward(dy.to(y.dtype))
    return dict(zip(names, (y.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves))))


def errors(results, reference):
    """Relative L2 error of each tensor: over all of it, and the largest of any head of any sequence. A head whose
    gradient is zero (the first token has no state) is held against the size of its dr instead, or must be zero."""
    found = {}
    for name in reference:
        x, ref = results[name].double(), reference[name].double()
        assert x.shape == ref.shape
        assert torch.isfinite(ref).all() and torch.isfinite(x).all(), f"{name} is not finite"
        heads = lambda x: x.transpose(1, 2).flatten(2) if x.dim() == 4 else x  # (B, H, T N), or (H, N) for du
        wrong, size, other = (heads(x).norm(dim=-1) for x in (x - ref, ref, reference["dr"]))
        size = torch.where(size == 0, other if x.dim() == 4 else other.norm(dim=0), size)
        assert (wrong[size == 0] == 0).all(), f"{name} is not zero where it must be"
        found[name] = (wrong.norm() / size.norm()).item()
        found[f"{name} per head"] = (wrong / size)[size > 0].max().item()
    return found


def check(results, reference, gate, what="", **gates):
    """Every error within `gate`, or the tensor's own, and of any single head within 1.5 times that."""
    found = errors(results, reference)
    print(what, {name: f"{error:.1e}" for name, error in found.items()})
    assert set(results) == set(reference) and len(found) == 2 * len(reference) > 2
    over = {name: error for name, error in found.items()
            if not error <= gates.get(name.split()[0], gate) * (1.5 if "per head" in name else 1)}
    assert not over, f"{what}: relative errors above {gate:.1e}: " + ", ".join(f"{n} {e:.1e}" for n, e in over.items())
