"""Sections 3 to 5: the gate, its vanishing gradient, and the auxiliary task."""

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_saes import assert_equal, gradients, random_batch, random_sae, seeds, sizes
from torch.nn import functional as F

import gated_sae
from gated_sae import GatedSAE, Losses

gated_variants = st.sampled_from(["gated", "gated unfrozen", "gated without aux", "gated untied"])
weights = st.floats(0.1, 3)


@given(seeds)
def test_the_gate_decides_and_the_magnitude_path_says_how_strongly(seed):
    pi_gate, pi_mag = random_batch(2, 4, 5, seed=seed)
    f = gated_sae.gate(pi_gate, pi_mag)
    fires = (pi_gate > 0) & (pi_mag > 0)
    assert_equal(f[fires], pi_mag[fires], rtol=0, atol=0)
    assert (f[~fires] == 0).all()


@given(sizes, seeds, st.booleans())
def test_the_paths_are_the_formulas(size, seed, tied):
    sae = random_sae(GatedSAE, size, seed, tied=tied)
    x = random_batch(5, size[0], seed=seed)
    xc = x - sae.b_dec
    W_mag = sae.W_enc * sae.r_mag.exp() if tied else sae.W_mag
    pi_gate, pi_mag = sae.paths(x)
    assert_equal(pi_gate, xc @ sae.W_enc + sae.b_gate)
    assert_equal(pi_mag, xc @ W_mag + sae.b_mag)
    assert_equal(sae.encode(x), torch.where(pi_gate > 0, pi_mag.clamp_min(0), 0))


# -- The oracle ------------------------------------------------------------------------------------


@given(gated_variants, sizes, st.integers(1, 7), seeds, weights, weights, weights)
def test_gated_losses_and_gradients_match_the_oracle(variant, size, batch, seed, a, l1, c):
    """Each term has a weight of its own, so no error in one can hide behind another."""
    sae = random_sae(variant, size, seed)
    x = random_batch(batch, size[0], seed=seed + 1)
    losses = sae.losses(x)
    p = {name: value.detach().numpy() for name, value in sae.named_parameters()}
    if sae.aux is None:
        expected, grads = oracle.gated(x.numpy(), p, a, l1, 0.0)
        expected = (*expected[:2], 0.0)
    else:
        expected, grads = oracle.gated(x.numpy(), p, a, l1, c, frozen=sae.aux == "frozen")
    total = a * losses.reconstruct + l1 * losses.sparsity + c * losses.aux
    assert_equal(losses, Losses(*(torch.tensor(v, dtype=torch.float64) for v in expected)))
    assert_equal(gradients(sae, total), {k: torch.from_numpy(grads[k]) for k in p})


# -- G1, G2: the vanishing gradient ----------------------------------------------------------------


@given(gated_variants, sizes, seeds)
def test_reconstruction_never_reaches_the_gate(variant, size, seed):
    """G1. Exactly zero, not small: on b_gate always, on all of W_gate where it is untied."""
    sae = random_sae(variant, size, seed)
    grads = gradients(sae, sae.losses(random_batch(6, size[0], seed=seed)).reconstruct)
    assert (grads["b_gate"] == 0).all()
    if not sae.tied:
        assert (grads["W_enc"] == 0).all()


@given(sizes, seeds)
def test_reconstruction_reaches_a_tied_encoder_through_the_magnitude_path_only(size, seed):
    """G1. With π_mag held constant nothing is left; with π_gate held constant nothing is lost."""
    sae = random_sae("gated", size, seed)
    x = random_batch(6, size[0], seed=seed)
    pi_gate, pi_mag = sae.paths(x)

    def grad(pi_gate, pi_mag):
        f = gated_sae.gate(pi_gate, pi_mag)
        return gradients(sae, gated_sae.squared_error(x, sae.decode(f)))["W_enc"]

    full = gradients(sae, sae.losses(x).reconstruct)["W_enc"]
    assert (grad(pi_gate, pi_mag.detach()) == 0).all()
    assert_equal(grad(pi_gate.detach(), pi_mag), full, rtol=0, atol=0)


@given(sizes, seeds, st.floats(0.01, 10), st.booleans())
def test_without_aux_descent_only_ever_closes_gates(size, seed, l1, tied):
    """G2. The gradient on b_gate is λ times the share of rows where the gate is open."""
    sae = random_sae(GatedSAE, size, seed, aux=None, tied=tied)
    x = random_batch(6, size[0], seed=seed)
    share_open = (sae.paths(x)[0] > 0).double().mean(0)
    assert_equal(gradients(sae, sae.losses(x).total(l1))["b_gate"], l1 * share_open)


def test_the_auxiliary_task_can_open_a_gate():
    """What G2 lacks: a direction in which x̂ falls short gets a negative gradient on b_gate."""
    sae = GatedSAE(1, 1)
    with torch.no_grad():
        sae.W_dec.fill_(1)
        sae.W_enc.fill_(1)
    x = torch.tensor([[2.0]])
    with torch.no_grad():
        sae.b_gate.fill_(-1)  # ReLU(π_gate) = 1 reconstructs x = 2 as 1
    assert gradients(sae, sae.losses(x).total(0.1))["b_gate"].item() == pytest.approx(0.1 - 2)


# -- G3: the frozen decoder ------------------------------------------------------------------------


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


def test_b_dec_still_hears_of_the_frozen_auxiliary_task():
    sae = random_sae("gated", (4, 8), 0)
    grads = gradients(sae, sae.losses(random_batch(6, 4, seed=0)).aux)
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


# -- G4: two usual losses --------------------------------------------------------------------------


@given(sizes, seeds, st.floats(0.01, 10), st.booleans())
def test_two_usual_losses_have_the_gradient_of_three_terms_unfrozen(size, seed, l1, tied):
    """G4, "perspective 2": charge ReLU(π_gate) in one SAE, the binarised gate in the other."""
    sae = random_sae(GatedSAE, size, seed, tied=tied, aux="unfrozen")
    x = random_batch(6, size[0], seed=seed)
    pi_gate, pi_mag = sae.paths(x)
    f, is_open, f_gate = gated_sae.gate(pi_gate, pi_mag), (pi_gate > 0).double(), F.relu(pi_gate)
    gated = gated_sae.penalised_losses(x, f, is_open, sae.W_dec, sae.b_dec).total(l1)
    usual = gated_sae.penalised_losses(x, f_gate, f_gate, sae.W_dec, sae.b_dec).total(l1)
    three_terms = sae.losses(x).total(l1)
    assert_equal(gradients(sae, gated + usual), gradients(sae, three_terms))
    assert (gated + usual - three_terms - l1 * is_open.sum(-1).mean()).abs() < 1e-9


def test_aux_is_one_of_three():
    with pytest.raises(
        ValueError, match="aux is 'thawed', expected one of .'frozen', 'unfrozen', None"
    ):
        GatedSAE(4, 8, aux="thawed")


def test_a_gate_at_zero_is_shut():
    assert gated_sae.gate(torch.zeros(1, 1), torch.ones(1, 1)).item() == 0


def test_the_decoder_is_frozen_unless_told_otherwise():
    sae = random_sae("gated", (4, 8), 0)
    x = random_batch(6, 4, seed=0)
    pi_gate, pi_mag = sae.paths(x)
    f = gated_sae.gate(pi_gate, pi_mag)
    losses = gated_sae.gated_losses(x, f, pi_gate, sae.W_dec, sae.b_dec)
    assert (gradients(sae, losses.aux)["W_dec"] == 0).all()
