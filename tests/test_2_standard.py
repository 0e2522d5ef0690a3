"""Section 2: the standard SAE, its shrinkage, and what every variant inherits."""

import re

import numpy as np
import oracle
import pytest
import random_saes
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_saes import VARIANTS, assert_equal, random_batch, random_sae, seeds, sizes, variants

import gated_sae
from gated_sae import GatedSAE, JumpReLUSAE, Losses, SoftCutoffSAE, normalized

# -- S1: shrinkage ---------------------------------------------------------------------------------


@given(st.floats(-10, 10), st.floats(0, 10))
def test_closed_form_beats_every_other_coefficient(x, l1):
    cost = lambda f: (x - f) ** 2 + l1 * f  # noqa: E731
    best = gated_sae.shrink(torch.tensor(x, dtype=torch.float64), l1).item()
    others = np.linspace(0, 20, 4001)
    assert best >= 0
    assert cost(best) <= cost(others).min() + 1e-9


# -- The loss --------------------------------------------------------------------------------------


@given(sizes, st.integers(1, 7), seeds)
def test_standard_loss_and_gradients_match_the_oracle(size, batch, seed):
    sae = random_sae("standard", size, seed)
    x = random_batch(batch, size[0], seed=seed + 1)
    random_saes.assert_oracle(oracle.standard, sae, x, 1.3, 0.7)


# -- What every variant inherits -------------------------------------------------------------------


@given(variants, sizes, seeds, st.sampled_from([(5,), (2, 3, 2)]))
def test_rows_do_not_see_each_other_and_losses_are_means_over_them(variant, size, seed, shape):
    """One mean for each leading index of a single SAE. And all is read only, the rows too."""
    sae, x = random_sae(variant, size, seed), random_batch(*shape, size[0], seed=seed)
    kept, rows = x.clone(), x.flatten(0, -2).split(1)
    with random_saes.unchanged(sae):
        assert_equal(torch.cat([sae(row) for row in rows]).view_as(x), sae(x))
        terms = zip(*(sae.losses(row) for row in rows), strict=True)
        assert_equal(sae.losses(x), Losses(*(torch.stack(t).view(shape).mean(-1) for t in terms)))
    assert_equal(x, kept, rtol=0, atol=0)


@given(variants, sizes, seeds)
def test_latents_have_no_order(variant, size, seed):
    sae, shuffled = random_sae(variant, size, seed), random_sae(variant, size, seed)
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))
    for name, value in shuffled.named_parameters():
        if name != "b_dec":
            value.data = value.data[:, order] if name in ("W_enc", "W_mag") else value.data[order]
    x = random_batch(5, size[0], seed=seed)
    assert_equal(shuffled.encode(x), sae.encode(x)[:, order])
    assert_equal(shuffled.losses(x), sae.losses(x))


@given(variants, sizes, seeds, st.booleans())
def test_a_stack_is_its_members(variant, size, seed, shared):
    """Values, losses and gradients, with one batch for all or one for each."""
    stack = random_sae(variant, size, seed, stack=(2, 3))
    x = random_batch(*(() if shared else (2, 3)), 5, size[0], seed=seed)
    losses, x_hat = stack.losses(x), stack(x)
    grads = random_saes.gradients(stack, losses.total(0.3).sum())
    for i in np.ndindex(2, 3):
        single = random_saes.member(stack, i)
        x_i = x if shared else x[i]
        assert_equal(x_hat[i], single(x_i))
        own = single.losses(x_i)
        assert_equal(Losses(*(term[i] for term in losses)), own)
        own_grads = random_saes.gradients(single, own.total(0.3))
        assert_equal({k: g[i] for k, g in grads.items()}, own_grads)


@given(random_saes.scaling_variants, sizes, seeds, st.floats(0.1, 10))
def test_normalized_errors_do_not_see_the_scale_of_x(variant, size, seed, c):
    """A7. Scaling x, biases and thresholds by c scales f, x̂ and Σf by c, the errors by c², as it
    does the mean square that they are divided by."""
    x = random_batch(5, size[0], seed=seed)
    sae, scaled = random_sae(variant, size, seed), random_sae(variant, size, seed)
    for name, value in scaled.named_parameters():
        if name.startswith("b_") or name == "threshold":
            value.data *= c
    own, other = sae.losses(x), scaled.losses(c * x)
    assert_equal(other[::2], (c**2 * own.reconstruct, c**2 * own.aux))
    assert_equal(normalized(other, c * x)[::2], normalized(own, x)[::2])
    x_sq = x.square().sum() / 5
    assert_equal(normalized(own, x), (own.reconstruct / x_sq, own.sparsity, own.aux / x_sq))
    assert_equal(scaled(c * x), c * sae(x))
    if "log" not in sae.penalty:  # which has no law of scale
        degree = 0 if isinstance(sae, JumpReLUSAE) else 1  # a count of latents has none either
        assert_equal(other.sparsity, c**degree * own.sparsity)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoder_starts_along_the_decoder_and_members_and_generators_apart(variant):
    """The generator alone decides the dictionary, whatever the variant; all else starts alike."""

    def start(seed, kind=VARIANTS[variant]):
        return kind(5, 7, stack=2, generator=torch.Generator().manual_seed(seed))

    sae, same, other, tied = start(3), start(3), start(4), start(3, GatedSAE)
    for W in (sae.W_enc, getattr(sae, "W_mag", sae.W_enc)):
        assert_equal(W, 0.1 * sae.W_dec.mT)
    assert_equal(sae.W_dec.norm(dim=-1), torch.ones(2, 7))
    assert not torch.equal(*sae.W_dec)
    assert not torch.equal(sae.W_dec, other.W_dec)
    assert_equal(sae.W_dec, tied.W_dec, rtol=0, atol=0)
    assert_equal(sae.state_dict(), same.state_dict(), rtol=0, atol=0)
    for name, value in sae.named_parameters():
        assert name.startswith("W_") or (value == sae.latent_vectors.get(name, 0)).all()
    storages = [p.untyped_storage().data_ptr() for p in sae.parameters()]
    assert len(set(storages)) == len(storages)


# -- Bad input -------------------------------------------------------------------------------------


SHAPES, DTYPES = ((3, 5), (4,), (0, 4)), (torch.int64, torch.complex64, torch.float64)
BAD = [(torch.zeros(s), ValueError, re.escape(f"{s}, expected ") + r".* 4\)$") for s in SHAPES]
BAD += [(torch.zeros(3, 4, dtype=d), TypeError, f"{d} .*expected torch.float32") for d in DTYPES]
BAD += [(np.zeros((3, 4)), TypeError, "ndarray, expected")]


@pytest.mark.parametrize(("x", "error", "says"), BAD)
@pytest.mark.parametrize("method", ["encode", "forward", "losses"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_batches_are_named(variant, method, x, error, says):
    with pytest.raises(error, match=says):
        getattr(VARIANTS[variant](4, 8), method)(x)


def test_a_stack_refuses_other_leading_dimensions():
    says = r"\(2, 5, 4\), expected .*\(batch ≥ 1, 4\) or \(\*\(3,\), batch, 4\)$"
    with pytest.raises(ValueError, match=says):
        GatedSAE(4, 8, stack=3).encode(torch.zeros(2, 5, 4))


SIZES = {f"d_sae is {odd}": dict(d_sae=odd) for odd in (-1, 2.5, True)}
SIZES |= {"d_in is 0": dict(d_in=0), "stack is 0": dict(stack=(3, 0))}
SIZES |= {"int32, expected a floating": dict(dtype=torch.int32)}


@pytest.mark.parametrize("says", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_sizes_are_named(variant, says):
    with pytest.raises(TypeError if "int32" in says else ValueError, match=says):
        VARIANTS[variant](**dict(d_in=4, d_sae=8) | SIZES[says])


@pytest.mark.parametrize(("kind", "width"), [(SoftCutoffSAE, "s"), (JumpReLUSAE, "bandwidth")])
def test_numbers_of_numpy_are_numbers_of_python_and_printed_as_such(kind, width):
    """So that they can be saved."""
    sae = kind(np.int64(4), np.int32(8), stack=np.int64(2), **{width: np.float32(0.5)})
    assert [type(n) for n in (sae.d_in, sae.d_sae, *sae.stack)] == [int] * 3
    assert type(sae.config[width]) is float
    assert all(part in repr(sae) for part in ("d_in=4, d_sae=8", f"{width}=0.5"))
