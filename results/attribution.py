"""Which latents matter to what a model puts out, and what an SAE in it costs: claims D2 and D3.

Gradients answer the first cheaply, but cannot see a jump. For θ ≥ 0, JumpReLU_θ(z) = z 1[z > θ] and
ReLU(z - θ) have one gradient, 1[z > θ], and so every attribution made of gradients is equal for
both. Yet patching z from 0 gives z in the one and z - θ in the other, for z > θ. Integrated
gradients say z - θ for both: complete for the ReLU, and short by exactly the jump θ for the other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gated_sae import expect


@torch.enable_grad()
def _gradient(fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    # The empty sum ties a bare step, which has no graph, to z: gradient 0 and no error.
    return torch.autograd.grad(fn(z).sum() + z[..., :0].sum(), z)[0]


def integrated_gradients(fn: Callable, z: Tensor, baseline: Tensor, steps: int) -> Tensor:
    """(z - z₀) ⊙ ∫₀¹ ∇fn(z₀ + t (z - z₀)) dt by the midpoint rule, (..., d), for z₀ = baseline.
    fn: (..., d) -> (...), row by row. Complete where fn is continuous: the sum over d tends to
    fn(z) - fn(z₀) with more steps. A ReLU's kink may cost its coordinate |z - z₀| / (2 steps)."""
    path = (baseline + (k + 0.5) / steps * (z - baseline) for k in range(steps))
    return (z - baseline).detach() * sum(_gradient(fn, point) for point in path) / steps


def attribution_patching(fn: Callable, z: Tensor, z_patch: Tensor) -> Tensor:
    """∇fn(z) ⊙ (z_patch - z), (..., d): every patch's effect to first order, in one backward."""
    return _gradient(fn, z) * (z_patch - z).detach()


@torch.no_grad()
def activation_patching(fn: Callable, z: Tensor, z_patch: Tensor) -> Tensor:
    """fn(z with z_patch in coordinate i) - fn(z) for each i, (..., d): the effect; d + 1 calls."""
    at = torch.eye(z.shape[-1], dtype=torch.bool, device=z.device)
    values = torch.stack([fn(z), *(fn(torch.where(i, z_patch, z)) for i in at)], -1)
    return values[..., 1:] - values[..., :1]


def compute_multiple(compute: Tensor, loss: Tensor, ce_sae: Tensor, ce_clean: Tensor) -> Tensor:
    """C(CE_sae) / C(CE_clean), where log L = a - b log C(L): the share of the compute that trains a
    model as good as the spliced one, 1 without a hit. Of floats or tensors; float64.
    a, b: least squares over smaller models, (n,) twice; a floor of the loss makes the share too
    large. ValueError unless all is positive, two computes differ, and the curve falls."""
    given = compute, loss, ce_sae, ce_clean
    C, L, sae, clean = (torch.as_tensor(v, dtype=torch.float64) for v in given)
    valid = C.ndim == 1 and C.shape == L.shape and len(C.log().unique()) > 1
    valid = valid and all(bool(((v > 0) & v.isfinite()).all()) for v in (C, L, sae, clean))
    expect(valid, f"got {given}, expected n > 1 distinct computes, n losses, all positive")
    dc, dl = (v.log() - v.log().mean() for v in (C, L))
    b = -(dc @ dl) / (dc @ dc)
    expect(bool(b >= 1e-12), f"loss falls as compute^-b with b = {b:.3g}, expected b > 0")
    return (clean / sae) ** (1 / b)  # C(L) = (eᵃ / L)^(1/b), and a cancels
