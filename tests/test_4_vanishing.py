"""Section 4: why the gradient of the gate vanishes."""

import random_saes
from hypothesis import given
from hypothesis import strategies as st
from random_saes import assert_equal, gradients, random_batch, random_sae, seeds, sizes

from gated_sae import GatedSAE


@given(st.sampled_from(random_saes.GATED), sizes, seeds)
def test_reconstruction_never_reaches_the_gate(variant, size, seed):
    """G1. Exactly zero, not small: on b_gate always, on all of W_gate where it is untied."""
    sae = random_sae(variant, size, seed)
    grads = gradients(sae, sae.losses(random_batch(6, size[0], seed=seed)).reconstruct)
    assert (grads["b_gate"] == 0).all()
    if not sae.tied:
        assert (grads["W_enc"] == 0).all()


@given(sizes, seeds, st.floats(0.01, 10), st.booleans())
def test_without_aux_descent_only_ever_closes_gates(size, seed, l1, tied):
    """G2. The gradient on b_gate is λ times the share of rows where the gate is open."""
    sae = random_sae(GatedSAE, size, seed, aux=None, tied=tied)
    x = random_batch(6, size[0], seed=seed)
    share_open = (sae.paths(x)[0] > 0).double().mean(0)
    assert_equal(gradients(sae, sae.losses(x).total(l1))["b_gate"], l1 * share_open)
