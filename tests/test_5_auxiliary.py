"""Section 5: the auxiliary task, and its frozen decoder."""

from functools import partial

import oracle
import pytest
import random_saes
from hypothesis import given
from hypothesis import strategies as st
from random_saes import assert_equal, gradients, random_batch, random_sae, seeds, sizes, weights
from torch.nn import functional as F

from gated_sae import GatedSAE, gate, gated_losses


@pytest.mark.parametrize(
    "variant", [*random_saes.GATED, partial(GatedSAE, tied=False, aux="unfrozen")]
)
@given(sizes, st.integers(1, 7), seeds, weights, weights, weights)
def test_gated_losses_and_gradients_match_the_oracle(variant, size, batch, seed, a, l1, c):
    """Each term has a weight of its own, so no error in one can hide behind another."""
    sae = random_sae(variant, size, seed)
    x = random_batch(batch, size[0], seed=seed + 1)
    random_saes.assert_oracle(partial(oracle.gated, aux=sae.aux), sae, x, a, l1, c)


@given(sizes, seeds, st.booleans())
def test_the_frozen_auxiliary_task_does_not_touch_the_decoder(size, seed, tied):
    """G3. Exact zero on W_dec; b_dec hears of it as the encoder's x - b_dec, and no other way.
    So it is unless told otherwise, of an SAE or of its loss."""
    sae = random_sae(GatedSAE, size, seed, tied=tied)
    x = random_batch(6, size[0], seed=seed)
    pi_gate, pi_mag = sae.paths(x)
    error = F.relu(pi_gate) @ sae.W_dec + sae.b_dec - x
    d_pi = 2 / 6 * (error @ sae.W_dec.mT) * (pi_gate > 0)
    losses = gated_losses(x, gate(pi_gate, pi_mag), pi_gate, sae.W_dec, sae.b_dec)
    for aux in (losses.aux, sae.losses(x).aux):
        grads = gradients(sae, aux, retain_graph=True)
        assert (grads["W_dec"] == 0).all()
        assert_equal(grads["b_dec"], -(d_pi @ sae.W_enc.mT).sum(0).detach())


@pytest.mark.parametrize(("option", "bad"), [("aux", "thawed"), ("aux", False), ("tied", 1)])
def test_aux_is_one_of_three_and_tied_a_bool(option, bad):
    says = f"{option}={bad!r}, .*expected a bool and 'frozen', 'unfrozen' or None"
    with pytest.raises(ValueError, match=says):
        GatedSAE(4, 8, **{option: bad})
