"""What the property tests draw: SAEs with every parameter random, and batches to feed them."""

import copy
from contextlib import contextmanager
from functools import partial

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gated_sae
from gated_sae import GatedSAE, JumpReLUSAE, NaturalGatedSAE, SigmoidGatedSAE, StandardSAE

gated_sae.PENALTIES["normalized log"] = lambda f, norm: (2 * f).log1p()

# Every variant and objective, as constructors of (d_in, d_sae, **options).
VARIANTS = {
    "standard": StandardSAE,
    "standard log": partial(StandardSAE, penalty="normalized log"),
    "standard norm": partial(StandardSAE, penalty="norm_live"),
    "gated": GatedSAE,
    "gated unfrozen": partial(GatedSAE, aux="unfrozen"),
    "gated without aux": partial(GatedSAE, aux=None),
    "gated untied": partial(GatedSAE, tied=False),
    "gated norm": partial(GatedSAE, aux="unfrozen", penalty="norm_live"),
    "gated norm frozen": partial(GatedSAE, penalty="norm_frozen"),
    "gated sigmoid": partial(SigmoidGatedSAE, aux=None),
    "gated natural": NaturalGatedSAE,
    "soft cutoff": partial(gated_sae.SoftCutoffSAE, s=0.2),
    "jumprelu": partial(JumpReLUSAE, bandwidth=1.0),  # wide: or no random π is near its θ
}
GATED = ["gated", "gated unfrozen", "gated without aux", "gated untied"]
SCALING = [name for name in VARIANTS if name not in ("gated sigmoid", "soft cutoff")]


def unit_norm(sae):
    """Whether training keeps rows of W_dec at norm 1."""
    return sae.W_dec.requires_grad and not sae.penalty.startswith("norm_")


assert_equal = torch.testing.assert_close  # tensors, dicts or tuples of them, to their rounding
seeds = st.integers(0, 2**32 - 1)
variants = st.sampled_from(list(VARIANTS))
scaling_variants = st.sampled_from(SCALING)
stacks = st.sampled_from([(), (2, 3)])
weights = st.floats(0.1, 3)  # of the terms of a loss
sizes = st.tuples(st.integers(1, 6), st.integers(1, 9))  # d_in, d_sae


def random_sae(variant, size, seed, **options):
    """A float64 SAE with no parameter at its initial value: nothing multiplies by 1 or adds 0."""
    make = VARIANTS[variant] if isinstance(variant, str) else variant
    sae = make(*size, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    if unit_norm(sae):
        sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
    return sae


def member(sae, i):
    """SAE i of a stack, by itself."""
    single = type(sae)(**sae.config | {"stack": ()}, dtype=sae.W_dec.dtype)
    single.load_state_dict({name: value[i] for name, value in sae.state_dict().items()})
    return single


def random_batch(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradients(sae, value, **options):
    """d value / d parameter by name; zeros where a parameter is not in the graph."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    options |= dict(allow_unused=True, materialize_grads=True)
    grads = torch.autograd.grad(value, parameters, **options)
    return dict(zip(names, grads, strict=True))


def assert_oracle(reference, sae, x, *weights):
    """Losses, and gradients of their sum with a weight for each, are those of `oracle`: as the SAE
    has them, and, where it has a fast path, by hand, over all entries and over the support."""
    parameters = {name: p.detach().numpy() for name, p in sae.named_parameters()}
    expected, grads = reference(x.numpy(), parameters, *weights)
    expected = gated_sae.Losses(*(torch.tensor(v, dtype=torch.float64) for v in expected))
    by_hand = [False, True] if gated_sae.encoded(sae, x, None) else []
    for losses in (sae.losses(x), *(gated_sae.fast_losses(sae, x, sparse) for sparse in by_hand)):
        assert_equal(losses, expected)
        total = sum(w * term for w, term in zip((*weights, 1.0), losses, strict=False))
        assert_equal(gradients(sae, total), {k: torch.from_numpy(v) for k, v in grads.items()})


@contextmanager
def unchanged(sae):
    """Within, no bit of an SAE's parameters changes."""
    before = copy.deepcopy(sae.state_dict())
    yield
    assert_equal(sae.state_dict(), before, rtol=0, atol=0)


class Seen(TorchDispatchMode):
    """Counts dense matrix products, and the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm")
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self.largest = max(self.largest, value.numel())
        return out
