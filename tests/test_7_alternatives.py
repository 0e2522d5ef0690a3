"""Section 7: other penalties, gates and encoders, and the conversions between them."""

import copy
import itertools
import math
import warnings
from functools import cache, partial

import numpy as np
import oracle
import pytest
import random_saes
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from random_saes import VARIANTS, assert_equal, gradients, random_batch, random_sae, seeds, sizes
from torch.nn import functional as F

import gated_sae
from gated_sae import GatedSAE, JumpReLUSAE, NaturalGatedSAE, SigmoidGatedSAE, StandardSAE
from toy_data import SuperpositionData

DATA = SuperpositionData(8, 16, firing=0.1, seed=3)
AUX = ["frozen", "unfrozen", None]


def trained(sae, *, l1=0.1, steps=1000, **options):
    options |= dict(l1=l1, steps=steps, lr=1e-2, log_every=steps, device="cpu")
    list(gated_sae.train(sae, DATA.batches(64, seed=0), **options))
    return sae


@cache
def standard(penalty):
    return trained(StandardSAE(8, 16, penalty=penalty), l1=0.4)


def measured(sae):
    return gated_sae.evaluate(sae, itertools.islice(DATA.batches(1000, seed=99), 10))


def pre_activations(sae, x):
    """All that a ReLU or a step is taken of, stacked in front."""
    if isinstance(sae, GatedSAE):
        return torch.stack(sae.paths(x))
    theta = sae.threshold.clamp_min(0) if isinstance(sae, JumpReLUSAE) else 0
    return (sae.project(x) + gated_sae.as_row(sae.b_enc - theta))[None]


def clear(sae, x):
    """Rows on which rounding does not decide who fires: (..., batch)."""
    return (pre_activations(sae, x).abs() > 1e-9).all(-1).all(0)


# -- A3, A5: penalties -----------------------------------------------------------------------------

CHARGED = ["standard", "gated without aux", "gated sigmoid", partial(NaturalGatedSAE, aux=None)]
penalties = st.sampled_from(list(gated_sae.PENALTIES))


@given(sizes, seeds)
def test_penalties_and_their_slopes_are_the_formulas(size, seed):
    """A3: log spares the large, by a slope that falls. A5: norms are charged with the length."""
    f, norm = random_batch(2, 5, size[1], seed=seed).abs()
    f = (20 * f).index_fill(0, torch.tensor(0), 0).requires_grad_()
    formulas = {
        "l1": (f, torch.ones_like(f)),
        "log": ((1 + f).log(), 1 / (1 + f)),
        "normalized log": ((1 + 2 * f).log(), 2 / (1 + 2 * f)),  # of the tests
        "norm_live": (f * norm, norm),
        "norm_frozen": (f * norm, norm),
    }
    for name, (charge, slope) in formulas.items():
        found = gated_sae.PENALTIES[name](f, norm)
        assert_equal(found, charge)
        assert_equal(torch.autograd.grad(found.sum(), f)[0], slope)


@given(st.sampled_from([*CHARGED, "soft cutoff"]), sizes, seeds, penalties)
def test_the_penalty_is_paid_for_f_or_for_the_open_gate(variant, size, seed, penalty):
    """f itself in a Standard SAE; ReLU(π_gate), and nothing of π_mag, in a gated one."""
    sae, x = random_sae(variant, size, seed, penalty=penalty), random_batch(6, size[0], seed=seed)
    charged = F.relu(sae.paths(x)[0]) if isinstance(sae, GatedSAE) else sae.encode(x)
    charge = gated_sae.PENALTIES[penalty](charged, sae.W_dec.norm(dim=-1))
    assert_equal(sae.losses(x).sparsity, charge.sum(-1).mean())


def test_the_log_penalty_shrinks_less_than_l1():
    """A3, Standard at λ = 0.4, with fewer latents (L0 2.6, 2.9): γ is 0.93 with the log, 0.87."""
    log, l1 = (measured(standard(penalty)) for penalty in ("log", "l1"))
    assert log.gamma > l1.gamma + 0.03
    assert log.fvu < l1.fvu
    assert log.l0 < l1.l0


NORMED = [
    *(make for variant, make in VARIANTS.items() if "norm" in variant),
    partial(StandardSAE, penalty="norm_frozen"),
    partial(GatedSAE, penalty="norm_live", aux="unfrozen", tied=False),
    partial(NaturalGatedSAE, penalty="norm_live", aux="unfrozen"),
]


@given(st.sampled_from(NORMED), sizes, seeds)
def test_the_loss_with_norms_does_not_see_the_scale_of_a_latent(make, size, seed):
    """A5: with d_i c_i times as long, and both encoders and their biases c_i times as small."""
    sae, scaled = random_sae(make, size, seed), random_sae(make, size, seed)
    c = random_batch(1, size[1], seed=seed + 1).exp()[0]
    for name, value in scaled.named_parameters():
        if name not in ("b_dec", "r_mag"):
            value.data /= 1 / c[:, None] if name == "W_dec" else c
    x = random_batch(5, size[0], seed=seed)
    assume(clear(sae, x).all())
    assert_equal(scaled.losses(x), sae.losses(x))
    assert_equal(scaled.encode(x), sae.encode(x) / c)


@given(st.sampled_from(CHARGED), sizes, seeds)
def test_frozen_norms_leave_the_decoder_alone(kind, size, seed):
    """Exactly zero through the penalty; all other gradients are those of live norms."""
    x = random_batch(6, size[0], seed=seed)
    saes = [random_sae(kind, size, seed, penalty=name) for name in ("norm_frozen", "norm_live")]
    frozen, live = (gradients(sae, sae.losses(x).sparsity) for sae in saes)
    paid = (pre_activations(saes[0], x)[0] > 0).any(0)
    assert (frozen.pop("W_dec") == 0).all()
    assert ((live.pop("W_dec") != 0).any(-1) == paid).all()
    assert_equal(frozen, live)


@pytest.mark.parametrize("kind", [GatedSAE, SigmoidGatedSAE, NaturalGatedSAE])
@pytest.mark.parametrize("penalty", gated_sae.PENALTIES)
@pytest.mark.parametrize("aux", AUX)
def test_a_decoder_frozen_in_one_place_only_is_warned_of_by_name(kind, penalty, aux):
    """A5. And the warning points here, at the caller."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        kind(4, 8, aux=aux, penalty=penalty)
    mixed = (aux, penalty) in (("frozen", "norm_live"), ("unfrozen", "norm_frozen"))
    assert len(caught) == mixed
    for warning in caught:
        assert f"aux='{aux}', penalty='{penalty}': see norms" in str(warning.message)
        assert warning.filename == __file__


def test_a_frozen_task_with_live_norms_collapses_and_the_matching_pairs_do_not():
    """A5, λ = 0.3, L1's L0 4. Norms: at most 0.02, and L0 16; of the pairs 1.0 to 1.6, L0 4."""
    with pytest.warns(UserWarning, match="see norms"):
        sae = GatedSAE(8, 16, penalty="norm_live")
    collapsed = trained(sae, l1=0.3)
    assert collapsed.W_dec.norm(dim=-1).max() < 0.25
    assert measured(collapsed).l0 > 7
    for aux, penalty in (("unfrozen", "norm_live"), ("frozen", "norm_frozen")):
        pair = trained(GatedSAE(8, 16, aux=aux, penalty=penalty), l1=0.3)
        norms = pair.W_dec.norm(dim=-1)
        assert 0.5 < norms.min() <= norms.max() < 2
        assert 3 < measured(pair).l0 < 5
        assert measured(pair).fvu < measured(collapsed).fvu / 2


@given(sizes, seeds, st.floats(0.01, 10), st.booleans(), random_saes.stacks)
def test_two_standard_losses_have_the_gradient_of_three_terms_unfrozen(size, seed, l1, tied, stack):
    """G4. The values differ, by λ times the number of open gates."""
    sae = random_sae(GatedSAE, size, seed, tied=tied, aux="unfrozen", stack=stack)
    x = random_batch(6, size[0], seed=seed)
    pi_gate, pi_mag = sae.paths(x)
    f, f_gate, is_open = sae.gate(pi_gate, pi_mag), pi_gate.relu(), (pi_gate > 0).double()
    charged = (f, is_open), (f_gate, f_gate)
    both = (gated_sae.penalised_losses(x, *pair, sae.W_dec, sae.b_dec) for pair in charged)
    gated, usual = (losses.total(l1) for losses in both)
    three_terms = sae.losses(x).total(l1)
    assert_equal(*(gradients(sae, value.sum()) for value in (gated + usual, three_terms)))
    assert_equal(gated + usual - three_terms, l1 * is_open.sum(-1).mean(-1), rtol=0, atol=1e-9)
    second = StandardSAE(*size, stack=stack, dtype=torch.float64)
    values = {n: v for n, v in sae.state_dict().items() if n in ("W_enc", "W_dec", "b_dec")}
    second.load_state_dict(values | {"b_enc": sae.b_gate})
    assert_equal(usual, second.losses(x).total(l1))  # the second is one of section 2


SMOOTH = [
    *(make for make in VARIANTS.values() if getattr(make(1, 1), "aux", None) != "frozen"),
    partial(NaturalGatedSAE, aux="unfrozen"),
    partial(SigmoidGatedSAE, aux="unfrozen", tied=False),
]
SMOOTH.remove(VARIANTS["jumprelu"])  # its gradients are no slopes, by design


@given(st.sampled_from(SMOOTH), sizes, seeds, random_saes.stacks)
def test_gradients_are_finite_differences(make, size, seed, stack):
    """Along a random direction in all parameters; no part of the loss frozen, no ReLU at a kink."""
    sae, x = random_sae(make, size, seed, stack=stack), random_batch(5, size[0], seed=seed)
    assume((pre_activations(sae, x).abs() > 1e-3).all())
    direction = [random_batch(*p.shape, seed=seed + k) for k, p in enumerate(sae.parameters())]

    def loss(step):
        moved = random_sae(make, size, seed, stack=stack)
        for p, d in zip(moved.parameters(), direction, strict=True):
            p.data += step * d
        return moved.losses(x).total(0.7).sum()

    h = 1e-6
    grads = gradients(sae, sae.losses(x).total(0.7).sum()).values()
    expected = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    assert_equal((loss(h) - loss(-h)) / (2 * h), expected, rtol=1e-4, atol=1e-4)


# -- G5, G8, A2: gates -----------------------------------------------------------------------------


@given(sizes, seeds, st.booleans())
def test_the_sigmoid_gate_is_the_formula_and_hears_of_the_reconstruction(size, seed, tied):
    """G5: b_gate does where the latent fires, without aux; a step leaves exactly nothing (G1)."""
    sae = random_sae("gated sigmoid", size, seed, tied=tied)
    x = random_batch(6, size[0], seed=seed)
    pi_gate, pi_mag = sae.paths(x)
    assert_equal(sae.encode(x), pi_mag.clamp_min(0) / (1 + (-pi_gate).exp()))
    reached = gradients(sae, sae.losses(x).reconstruct)["b_gate"] != 0
    assert (reached == (sae.encode(x) > 0).any(0)).all()


def test_a_sigmoid_gate_lives_on_the_loss_that_kills_a_step_by_dodging_the_penalty():
    """G5, λ = 0.1, 1500 steps of L_incorrect, of a step in section 9: FVU 0.002, none dead. Half
    open at π_gate = 0, it pays nothing: at 100 λ 1% of the charge, and L0 stays 14 of 16."""
    options = dict(l1=torch.tensor([0.1, 10.0]), steps=1500, resample_every=None)
    sae = trained(SigmoidGatedSAE(8, 16, aux=None, stack=2), **options)
    cheap, dear = sae.losses(next(DATA.batches(1000, seed=99))).sparsity
    found = measured(sae)
    assert dear < cheap / 10
    assert (found.l0 > 14).all()
    assert (found.dead_fraction == 0).all()
    assert (found.fvu < 0.01).all()


@given(sizes, seeds, st.sampled_from(AUX), *[random_saes.weights] * 3)
def test_a_natural_gate_is_a_tied_one_with_the_oracles_gradients(size, seed, aux, a, l1, c):
    """G8: at b_mag = exp(r_mag) b_gate, by the chain rule."""
    sae, x = random_sae(NaturalGatedSAE, size, seed, aux=aux), random_batch(6, size[0], seed=seed)
    assume(clear(sae, x).all())

    def reference(x, p, *weights):
        scale = np.exp(p["r_mag"])
        losses, g = oracle.gated(x, p | {"b_mag": scale * p["b_gate"]}, *weights, aux=aux)
        through = g.pop("b_mag") * scale  # ∂b_mag/∂b_gate = exp(r_mag), and
        g["b_gate"] += through
        g["r_mag"] += through * p["b_gate"]  # ∂b_mag/∂r_mag = b_mag
        return losses, g

    random_saes.assert_oracle(reference, sae, x, a, l1, c)


@given(sizes, seeds, random_saes.weights)
def test_a_natural_gate_is_no_heaviside_but_a_learned_factor(size, seed, l1):
    """A2: y = x̂(t ⊙ f), with ‖x - x̂_copy(f)‖² + λ‖f‖₁ + ‖y - x‖², x̂_copy frozen. G8: θ = 0."""
    sae, x = random_sae(NaturalGatedSAE, size, seed), random_batch(6, size[0], seed=seed)
    assume(clear(sae, x).all())
    t, f = sae.r_mag.exp(), F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_gate)
    y = (t * f) @ sae.W_dec + sae.b_dec
    copy = f @ sae.W_dec.detach() + sae.b_dec.detach()
    loss = (x - copy).square().sum(-1) + l1 * f.sum(-1) + (y - x).square().sum(-1)
    assert "b_mag" not in sae.state_dict()
    assert (sae.threshold == 0).all()
    assert_equal(sae.encode(x), t * f)
    assert_equal(sae(x), y)
    assert_equal(sae.losses(x).total(l1), loss.mean())
    assert_equal(gradients(sae, sae.losses(x).total(l1)), gradients(sae, loss.mean()))


# -- A4: a soft cutoff, and JumpReLU ---------------------------------------------------------------


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(1e-4, 2))
def test_the_soft_cutoff_tends_to_the_hard_one(y, t, s):
    """A4. With z = y + t, off by at most s²/4 (1/|y| + |y|/z²); nowhere negative."""
    soft = gated_sae.soft_cutoff(*torch.tensor([y, t], dtype=torch.float64), s).item()
    z = y + t
    direct = (y + math.sqrt(y**2 + s**2)) * (1 + z / math.sqrt(z**2 + s**2)) / 4
    assert soft == pytest.approx(direct, rel=1e-6, abs=1e-12)
    assert soft >= 0
    assume(abs(y) > 1e-3 and abs(z) > 1e-3)
    hard = y if y > max(0, -t) else 0
    assert abs(soft - hard) <= s**2 / 4 * (1 / abs(y) + abs(y) / z**2) + 1e-9


@given(st.floats(-10, 10), st.floats(0.05, 2))
def test_the_soft_cutoff_is_smooth_at_the_kinks(a, s):
    """Two derivatives in y and t, also where the hard one bends (y = 0) and jumps (y = -t)."""
    cut = partial(gated_sae.soft_cutoff, s=s)
    for y, t in ((0.0, a), (a, -a), (0.0, 0.0), (a, 1.0)):
        at = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (y, t)]
        assert torch.autograd.gradcheck(cut, at)
        assert torch.autograd.gradgradcheck(cut, at, atol=1e-4)


@given(sizes, seeds, random_saes.stacks)
def test_a_soft_cutoff_sae_uses_its_t_and_its_s(size, seed, stack):
    """Penalised as a Standard SAE; as s → 0 it is the JumpReLU SAE that `to_jumprelu` makes."""
    x, row = random_batch(6, size[0], seed=seed), gated_sae.as_row
    for s in (0.3, 1e-7):
        sae = random_sae(gated_sae.SoftCutoffSAE, size, seed, s=s, stack=stack)
        pi = (x - row(sae.b_dec)) @ sae.W_enc + row(sae.b_enc)
        f = sae.encode(x)
        assert_equal(f, gated_sae.soft_cutoff(pi, row(sae.t), s))
        assert_equal(sae.losses(x).sparsity, f.sum(-1).mean(-1))
        assert (f > 0).all() or s < 0.3  # rounding can make it zero
    away = (pi.abs() > 1e-3) & ((pi + row(sae.t)).abs() > 1e-3)
    assert_equal(gated_sae.to_jumprelu(sae).encode(x)[away], f[away], rtol=0, atol=1e-6)


def test_a_soft_cutoff_trains():
    """A4: from FVU above 0.3 to 0.02, and t moves."""
    sae = gated_sae.SoftCutoffSAE(8, 16)
    before, after = measured(sae).fvu, measured(trained(sae)).fvu
    assert before > 0.3
    assert after < 0.05
    assert sae.t.abs().max() > 0.05


@given(sizes, st.integers(1, 7), seeds, st.floats(0.01, 10), *[random_saes.weights] * 2)
def test_jumprelu_losses_and_pseudo_gradients_match_the_oracle(size, batch, seed, eps, a, l0):
    sae = random_sae(JumpReLUSAE, size, seed, bandwidth=eps)
    x = random_batch(batch, size[0], seed=seed + 1)
    random_saes.assert_oracle(lambda x, p, *w: oracle.jumprelu(x, p, eps, *w), sae, x, a, l0)


@given(sizes, seeds, random_saes.stacks)
def test_the_f_that_is_trained_is_the_f_that_is_encoded(size, seed, stack):
    """Straight-through terms change gradients and no value; a negative θ counts as 0."""
    sae, x = random_sae(JumpReLUSAE, size, seed, stack=stack), random_batch(6, size[0], seed=seed)
    losses, f, theta = sae.losses(x), sae.encode(x), gated_sae.as_row(sae.threshold)
    pi = (x - gated_sae.as_row(sae.b_dec)) @ sae.W_enc + gated_sae.as_row(sae.b_enc)
    assert_equal(losses.reconstruct, gated_sae.squared_error(x, sae.decode(f)), rtol=0, atol=0)
    assert_equal(f, gated_sae.jump_relu(pi, sae.threshold))
    assert_equal(f, torch.where(pi > theta, pi.clamp_min(0), 0))
    assert_equal(losses.sparsity, (f > 0).double().sum(-1).mean(-1))


# -- A7: another length ----------------------------------------------------------------------------


@given(random_saes.variants, sizes, seeds, random_saes.stacks, st.integers(-8, 8))
def test_rescaled_is_the_same_sae_for_longer_activations(variant, size, seed, stack, power):
    """c x has c times the x̂ and f, by the same directions; and back again. A power of
    two rounds nothing, so no gate is near its edge."""
    sae, x = random_sae(variant, size, seed, stack=stack), random_batch(6, size[0], seed=seed)
    c = 2.0**power
    longer = gated_sae.rescaled(sae, c)
    assert_equal(longer(c * x), c * sae(x), rtol=1e-9, atol=1e-9 * c)
    assert_equal(longer.encode(c * x), c * sae.encode(x), rtol=1e-9, atol=1e-9 * c)
    assert torch.equal(longer.W_dec, sae.W_dec)
    assert type(longer) is type(sae)
    back = gated_sae.rescaled(longer, 1 / c)
    assert_equal(back.state_dict(), sae.state_dict())
    theirs = {p.data_ptr() for p in sae.parameters()}
    assert not theirs & {p.data_ptr() for p in longer.parameters()}


# -- G7, A1: conversions ---------------------------------------------------------------------------

JUMPING = ["standard", "standard norm", "gated", "gated unfrozen", "gated natural", "jumprelu"]


@given(st.sampled_from(JUMPING), sizes, seeds, random_saes.stacks, st.booleans())
def test_conversions_there_and_back_keep_the_outputs(variant, size, seed, stack, tied):
    """G7, with dtype and stack, and none of the memory; who fires is whose gate is open."""
    sae, x = random_sae(variant, size, seed, stack=stack), random_batch(10, size[0], seed=seed)
    at, theirs = clear(sae, x), {p.data_ptr() for p in sae.parameters()}
    jump, gated = gated_sae.to_jumprelu(sae), gated_sae.to_gated(sae, tied=tied, aux="unfrozen")
    again, back = gated_sae.to_gated(jump), gated_sae.to_jumprelu(gated_sae.to_gated(jump))
    assert [type(new) for new in (jump, gated, back, again)] == [JumpReLUSAE, GatedSAE] * 2
    for new in (jump, gated, back, again):
        assert (new.stack, new.W_enc.dtype) == (stack, torch.float64)
        assert_equal(new.encode(x)[at], sae.encode(x)[at])
        assert_equal(new(x)[at], sae(x)[at])
        assert not theirs & {p.data_ptr() for p in new.parameters()}
        assert all(p.requires_grad for p in new.parameters())
    assert (gated.tied, gated.aux) == (tied, "unfrozen")
    assert torch.equal((again.paths(x)[0] > 0)[at], (jump.encode(x) > 0)[at])
    assert_equal(jump.threshold, getattr(sae, "threshold", 0 * jump.threshold).clamp_min(0))
    assert_equal(back.threshold, jump.threshold, rtol=0, atol=1e-12)
    if isinstance(sae, StandardSAE | JumpReLUSAE):
        assert_equal(jump(x), sae(x), rtol=0, atol=0)
    with pytest.raises(TypeError, match="stack"):
        gated_sae.to_gated(sae, stack=3)


@given(sizes, seeds, random_saes.stacks, st.booleans())
def test_before_training_a_rescaled_sae_is_the_standard_one(size, seed, stack, refit):
    sae, x = random_sae("standard", size, seed, stack=stack), random_batch(6, size[0], seed=seed)
    rescaled = gated_sae.rescale_and_shift(sae, refit)
    assert_equal(rescaled.encode(x), sae.encode(x), rtol=0, atol=0)
    assert_equal(rescaled(x), sae(x), rtol=0, atol=0)
    assert_equal(rescaled.losses(x).reconstruct, sae.losses(x).reconstruct, rtol=0, atol=0)
    assert (rescaled.losses(x).aux == 0).all()
    free = {name for name, parameter in rescaled.named_parameters() if parameter.requires_grad}
    assert free == {"r_mag", "b_mag"} | ({"W_dec"} if refit else set())


@pytest.mark.parametrize("refit", [False, True])
def test_rescaling_undoes_the_shrinkage_and_keeps_who_fires(refit):
    """A1, a Standard SAE at λ = 0.4: γ 0.86 → 1.00, FVU 0.076 → 0.042, refitted 0.036."""
    sae = standard("l1")
    rescaled = gated_sae.rescale_and_shift(sae, refit)
    kept, before = (copy.deepcopy(dict(s.state_dict())) for s in (sae, rescaled))
    trained(rescaled, l1=0.0, steps=500)
    assert_equal(kept, dict(sae.state_dict()), rtol=0, atol=0)
    moved = {n for n, value in rescaled.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == {"r_mag", "b_mag"} | ({"W_dec"} if refit else set())
    if refit:
        assert_equal(rescaled.W_dec.norm(dim=-1), torch.ones(16))
    x = next(DATA.batches(1000, seed=99))
    fired, fires = sae.encode(x) > 0, rescaled.encode(x) > 0
    cut = rescaled.paths(x)[1] <= 0
    assert (fires == (fired & ~cut)).all()
    assert fires.sum() > 0.9 * fired.sum()
    was, now = measured(sae), measured(rescaled)
    assert was.gamma < 0.9
    assert abs(now.gamma - 1) < 0.02
    assert now.fvu < (0.55 if refit else 0.65) * was.fvu


WIDTHS = {"s": gated_sae.SoftCutoffSAE, "bandwidth": JumpReLUSAE}
BAD = [(WIDTHS[k], k, ValueError, v) for k in WIDTHS for v in (0.0, -1.0, math.inf, math.nan)]
BAD += [(kind, "penalty", ValueError, "l2") for kind in (StandardSAE, GatedSAE)]
OTHERS = StandardSAE, gated_sae.SoftCutoffSAE, SigmoidGatedSAE  # which have no such option
BAD += [(kind, "bandwidth", TypeError, 0.1) for kind in OTHERS]
BAD += [(NaturalGatedSAE, "tied", TypeError, True)]  # b_mag is made of r_mag
BAD += [(JumpReLUSAE, "penalty", TypeError, "l1")]  # it pays for L0 alone


@pytest.mark.parametrize(("kind", "name", "error", "bad"), BAD)
def test_bad_options_are_named(kind, name, error, bad):
    expected = "one of .'l1', 'log', 'nor" if name == "penalty" else "a positive float"
    says = f"{name} is {bad!r}, expected {expected}" if error is ValueError else f"'{name}'"
    with pytest.raises(error, match=says):
        kind(4, 8, **{name: bad})


UNTIED, SIGMOID = partial(GatedSAE, tied=False), partial(SigmoidGatedSAE, tied=False)
RESCALED = (partial(gated_sae.rescaled, c=c) for c in (0, -1.0, math.nan, math.inf, "1"))


@pytest.mark.parametrize(
    ("convert", "make", "error", "says"),
    [
        (gated_sae.to_jumprelu, UNTIED, ValueError, "this GatedSAE has tied=False and so no thr"),
        (gated_sae.to_jumprelu, SIGMOID, ValueError, "a SigmoidGatedSAE has no threshold"),
        (gated_sae.to_jumprelu, SigmoidGatedSAE, ValueError, "a SigmoidGatedSAE has no threshold"),
        (gated_sae.rescale_and_shift, VARIANTS["soft cutoff"], TypeError, "SoftCutoffSAE"),
        *((way, StandardSAE, ValueError, "c is .*, expected a positive float") for way in RESCALED),
    ],
)
def test_what_cannot_be_converted_is_refused(convert, make, error, says):
    with pytest.raises(error, match=says):
        convert(make(4, 8))
