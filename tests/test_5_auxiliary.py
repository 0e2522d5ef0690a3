"""Section 5: the auxiliary task, and its frozen decoder."""

from functools import partial

import oracle
import pytest
import random_saes
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_saes import assert_equal, gradients, random_batch, random_sae, seeds, sizes, weights
from torch.nn import functional as F

from gated_sae import GatedSAE, gate, gated_losses


@given(random_saes.gated_variants, sizes, st.integers(1, 7), seeds, weights, weights, weights)
def test_gated_losses_and_gradients_match_the_oracle(variant, size, batch, seed, a, l1, c):
    """Each term has a weight of its own, so no error in one can hide behind another."""
    sae = random_sae(variant, size, seed)
    x = random_batch(batch, size[0], seed=seed + 1)
    random_saes.assert_oracle(partial(oracle.gated, aux=sae.aux), sae, x, a, l1, c)


def test_the_auxiliary_task_can_open_a_gate():
    """What G2 lacks: a direction in which x̂ falls short gets a negative gradient on b_gate."""
    sae = GatedSAE(1, 1)
    sae.W_dec.data.fill_(1), sae.W_enc.data.fill_(1), sae.b_gate.data.fill_(-1)
    x = torch.tensor([[2.0]])  # ReLU(π_gate) = 1 reconstructs it as 1
    assert gradients(sae, sae.losses(x).total(0.1))["b_gate"].item() == pytest.approx(0.1 - 2)


@given(sizes, seeds, st.booleans())
def test_the_frozen_auxiliary_task_does_not_touch_the_decoder(size, seed, tied):
    """G3. Exact zero on W_dec; b_dec hears of it as the encoder's x - b_dec, and no other way."""
    sae = random_sae(GatedSAE, size, seed, tied=tied)
    x = random_batch(6, size[0], seed=seed)
    grads = gradients(sae, sae.losses(x).aux)
    assert (grads["W_dec"] == 0).all()
    pi_gate = sae.paths(x)[0]
    error = F.relu(pi_gate) @ sae.W_dec + sae.b_dec - x
    d_pi = 2 / 6 * (error @ sae.W_dec.mT) * (pi_gate > 0)
    assert_equal(grads["b_dec"], -(d_pi @ sae.W_enc.mT).sum(0).detach())


def test_the_decoder_is_frozen_unless_told_otherwise_and_b_dec_hears_of_the_task():
    sae = random_sae("gated", (4, 8), 0)
    x = random_batch(6, 4, seed=0)
    pi_gate, pi_mag = sae.paths(x)
    losses = gated_losses(x, gate(pi_gate, pi_mag), pi_gate, sae.W_dec, sae.b_dec)
    for aux in (losses.aux, sae.losses(x).aux):
        grads = gradients(sae, aux)
        assert (grads["W_dec"] == 0).all()
        assert (grads["b_dec"] != 0).all()


@given(sizes, seeds, st.booleans())
def test_freezing_changes_gradients_of_the_decoder_only(size, seed, tied):
    x = random_batch(6, size[0], seed=seed)
    both = [random_sae(GatedSAE, size, seed, tied=tied, aux=aux) for aux in ("frozen", "unfrozen")]
    assert_equal(both[0].losses(x), both[1].losses(x), rtol=0, atol=0)
    frozen, unfrozen = (gradients(sae, sae.losses(x).total(0.5)) for sae in both)
    f_aux = F.relu(both[0].paths(x)[0])
    error = f_aux @ both[0].W_dec + both[0].b_dec - x
    assert_equal(unfrozen.pop("W_dec") - frozen.pop("W_dec"), 2 / 6 * (f_aux.mT @ error).detach())
    assert_equal(unfrozen.pop("b_dec") - frozen.pop("b_dec"), 2 / 6 * error.sum(0).detach())
    assert_equal(frozen, unfrozen)


@pytest.mark.parametrize(("option", "bad"), [("aux", "thawed"), ("aux", False), ("tied", 1)])
def test_aux_is_one_of_three_and_tied_a_bool(option, bad):
    says = f"{option}={bad!r}, .*expected a bool and 'frozen', 'unfrozen' or None"
    with pytest.raises(ValueError, match=says):
        GatedSAE(4, 8, **{option: bad})
