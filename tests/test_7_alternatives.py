"""Section 7: other penalties, gates and encoders, and the conversions between them."""

import itertools
import math
import warnings
from functools import cache, partial

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from random_saes import (
    VARIANTS,
    assert_equal,
    gradients,
    random_batch,
    random_sae,
    seeds,
    sizes,
)
from torch.nn import functional as F

import gated_sae
from gated_sae import (
    GatedSAE,
    JumpReLUSAE,
    Losses,
    NaturalGatedSAE,
    SigmoidGatedSAE,
    SoftCutoffSAE,
    StandardSAE,
    evaluate,
    jump_relu,
    rescale_and_shift,
    soft_cutoff,
    to_gated,
    to_jumprelu,
    train,
    unit_norm,
)
from toy_data import SuperpositionData

DATA = SuperpositionData(8, 16, firing=0.1, seed=3)
stacks = st.sampled_from([(), (2,)])
weights = st.floats(0.1, 3)


def trained(sae, *, l1=0.1, steps=1000):
    batches = DATA.batches(64, seed=0)
    list(train(sae, batches, l1=l1, steps=steps, lr=1e-2, log_every=steps, device="cpu"))
    return sae


@cache
def standard(penalty):
    return trained(StandardSAE(8, 16, penalty=penalty), l1=0.4)


def measured(sae):
    return evaluate(sae, itertools.islice(DATA.batches(1000, seed=99), 10))


def numpy(sae):
    return {name: value.detach().numpy() for name, value in sae.named_parameters()}


def from_numpy(grads):
    return {name: torch.from_numpy(grad) for name, grad in grads.items()}


def pre_activations(sae, x):
    """All that a ReLU or a step is taken of, stacked in front."""
    if isinstance(sae, GatedSAE):
        return torch.stack(sae.paths(x))
    pi = sae.project(x) + sae.b_enc.unsqueeze(-2)
    if isinstance(sae, JumpReLUSAE):
        pi = pi - sae.threshold.clamp_min(0).unsqueeze(-2)
    return pi[None]


def clear(sae, x):
    """Rows on which rounding does not decide who fires: (..., batch)."""
    return (pre_activations(sae, x).abs() > 1e-9).all(-1).all(0)


# -- A3, A5: penalties -----------------------------------------------------------------------------


def pay(penalty, f, W_dec):
    """The mean over rows of what they are charged."""
    return gated_sae.PENALTIES[penalty](f, W_dec.norm(dim=-1)).sum(-1).mean()


@given(sizes, seeds)
def test_penalties_are_the_formulas(size, seed):
    f, W_dec = random_batch(5, size[1], seed=seed).abs(), random_batch(*size[::-1], seed=seed + 1)
    norms = [math.hypot(*d) for d in W_dec.tolist()]
    formulas = {
        "l1": lambda f_i, n_i: f_i,
        "log": lambda f_i, n_i: math.log(1 + f_i),
        "log2": lambda f_i, n_i: math.log(1 + 2 * f_i),  # which the tests have added
        "norm_live": lambda f_i, n_i: f_i * n_i,
        "norm_frozen": lambda f_i, n_i: f_i * n_i,
    }
    assert gated_sae.PENALTIES.keys() >= formulas.keys()
    for name, formula in formulas.items():
        charged = [list(map(formula, row, norms)) for row in f.tolist()]
        expected = torch.tensor(charged, dtype=torch.float64)
        assert_equal(gated_sae.PENALTIES[name](f, W_dec.norm(dim=-1)), expected)


@given(sizes, seeds, st.sampled_from(list(gated_sae.PENALTIES)))
def test_the_penalty_is_paid_for_f_or_for_the_open_gate(size, seed, penalty):
    """f itself in a Standard SAE; ReLU(π_gate), and nothing of π_mag, in a gated one."""
    x = random_batch(6, size[0], seed=seed)
    for kind in (StandardSAE, SoftCutoffSAE):
        sae = random_sae(partial(kind, penalty=penalty), size, seed)
        assert_equal(sae.losses(x).sparsity, pay(penalty, sae.encode(x), sae.W_dec))
    for kind in (GatedSAE, SigmoidGatedSAE, NaturalGatedSAE):
        sae = random_sae(partial(kind, penalty=penalty, aux=None), size, seed)
        assert_equal(sae.losses(x).sparsity, pay(penalty, F.relu(sae.paths(x)[0]), sae.W_dec))


def test_penalty_is_one_of_those_there_are():
    for kind in (StandardSAE, GatedSAE):
        with pytest.raises(ValueError, match="penalty is 'l2', expected one of .'l1', 'log', 'nor"):
            kind(4, 8, penalty="l2")


@given(st.floats(0, 100))
def test_the_log_penalty_spares_the_large(size):
    """A3: the slope is a at 0, and falls as 1 / (1 + a f)."""
    for name, a in (("log", 1), ("log2", 2)):
        f = torch.tensor(size, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(gated_sae.PENALTIES[name](f, torch.ones(())), f)
        assert slope.item() == pytest.approx(a / (1 + a * size))


def test_the_log_penalty_shrinks_less_than_l1():
    """A3, Standard at λ = 0.4 (the same L0, 2.6): γ = 0.92 with the log, 0.86 with L1."""
    log, l1 = (measured(standard(penalty)) for penalty in ("log", "l1"))
    assert log.gamma > l1.gamma + 0.03
    assert log.fvu < l1.fvu
    assert abs(log.l0 - l1.l0) < 0.2


@given(sizes, seeds)
def test_the_norm_penalty_cannot_be_dodged(size, seed):
    """A5: the same for c_i d_i and f_i / c_i. L1 is not, which is why it needs unit rows."""
    f, W_dec = random_batch(5, size[1], seed=seed).abs(), random_batch(*size[::-1], seed=seed + 1)
    c = random_batch(1, size[1], seed=seed + 2).exp()
    for name in ("norm_live", "norm_frozen"):
        assert_equal(pay(name, f / c, c.mT * W_dec), pay(name, f, W_dec))
    assert not torch.allclose(pay("l1", f / c, W_dec), pay("l1", f, W_dec))


NORMED = [
    partial(kind, penalty=penalty, **options)
    for kind, penalty, options in (
        (StandardSAE, "norm_live", {}),
        (StandardSAE, "norm_frozen", {}),
        (GatedSAE, "norm_live", dict(aux="unfrozen")),
        (GatedSAE, "norm_frozen", dict(aux="frozen")),
        (GatedSAE, "norm_live", dict(aux="unfrozen", tied=False)),
        (NaturalGatedSAE, "norm_live", dict(aux="unfrozen")),
    )
]


@given(st.sampled_from(NORMED), sizes, seeds)
def test_the_loss_with_norms_does_not_see_the_scale_of_a_latent(make, size, seed):
    """A5: with d_i c_i times as long, and both encoders and their biases c_i times as small."""
    sae, scaled = random_sae(make, size, seed), random_sae(make, size, seed)
    c = random_batch(1, size[1], seed=seed + 1).exp()[0]
    with torch.no_grad():
        for name, value in scaled.named_parameters():
            if name == "W_dec":
                value.mul_(c[:, None])
            elif name not in ("b_dec", "r_mag"):
                value.div_(c)
    x = random_batch(5, size[0], seed=seed)
    assume(clear(sae, x).all())
    assert_equal(scaled.losses(x), sae.losses(x))
    assert_equal(scaled.encode(x), sae.encode(x) / c)


PAYING = StandardSAE, partial(GatedSAE, aux=None), partial(SigmoidGatedSAE, aux=None)


@given(st.sampled_from(PAYING), sizes, seeds)
def test_frozen_norms_leave_the_decoder_alone(kind, size, seed):
    """Exactly zero through the penalty; all other gradients are those of live norms."""
    x = random_batch(6, size[0], seed=seed)
    saes = [
        random_sae(partial(kind, penalty=penalty), size, seed)
        for penalty in ("norm_frozen", "norm_live")
    ]
    frozen, live = (gradients(sae, sae.losses(x).sparsity) for sae in saes)
    paid = (pre_activations(saes[0], x)[0] > 0).any(0)
    assert (frozen.pop("W_dec") == 0).all()
    assert ((live.pop("W_dec") != 0).any(-1) == paid).all()
    assert_equal(frozen, live)


def mixed(aux, penalty):
    return pytest.warns(UserWarning, match=f"aux='{aux}', penalty='{penalty}': see norms")


@pytest.mark.parametrize("kind", [GatedSAE, SigmoidGatedSAE, NaturalGatedSAE])
def test_a_decoder_frozen_in_one_place_only_is_warned_of_by_name(kind):
    """A5. And the warning points here, at the caller."""
    for aux, penalty in (("frozen", "norm_live"), ("unfrozen", "norm_frozen")):
        with mixed(aux, penalty) as caught:
            kind(4, 8, aux=aux, penalty=penalty)
        if kind is GatedSAE:
            assert [w.filename for w in caught] == [__file__]
    for aux, penalty in itertools.product(("frozen", "unfrozen", None), gated_sae.PENALTIES):
        if (aux, penalty) not in (("frozen", "norm_live"), ("unfrozen", "norm_frozen")):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                kind(4, 8, aux=aux, penalty=penalty)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_penalties_of_norms_let_the_rows_go(variant):
    sae = VARIANTS[variant](4, 8)
    assert unit_norm(sae) == ("norm" not in variant)
    sae.W_dec.requires_grad_(False)
    assert not unit_norm(sae)


def test_a_frozen_task_with_live_norms_collapses_and_the_matching_pairs_do_not():
    """A5, λ = 0.3, L1's L0 4. Norms: at most 0.11, and L0 8.6; of the pairs at least 0.66, L0 4."""
    with mixed("frozen", "norm_live"):
        sae = GatedSAE(8, 16, penalty="norm_live")
    collapsed = trained(sae, l1=0.3)
    assert collapsed.W_dec.norm(dim=-1).max() < 0.25
    assert measured(collapsed).l0 > 7
    for aux, penalty in (("unfrozen", "norm_live"), ("frozen", "norm_frozen")):
        pair = trained(GatedSAE(8, 16, aux=aux, penalty=penalty), l1=0.3)
        norms = pair.W_dec.norm(dim=-1)
        assert norms.min() > 0.5
        assert norms.max() < 1.5
        assert 3 < measured(pair).l0 < 5
        assert measured(pair).fvu < measured(collapsed).fvu / 2


# -- G4: two usual losses --------------------------------------------------------------------------


@given(sizes, seeds, st.floats(0.01, 10), st.booleans(), stacks)
def test_two_standard_losses_have_the_gradient_of_three_terms_unfrozen(size, seed, l1, tied, stack):
    """G4. The values differ, by λ times the number of open gates."""
    sae = random_sae(GatedSAE, size, seed, tied=tied, aux="unfrozen", stack=stack)
    x = random_batch(6, size[0], seed=seed)
    pi_gate, pi_mag = sae.paths(x)
    args = x, gated_sae.gate(pi_gate, pi_mag), pi_gate, sae.W_dec, sae.b_dec
    gated, usual = (losses.total(l1) for losses in gated_sae.two_standard_losses(*args))
    three_terms = sae.losses(x).total(l1)
    grads = (gradients(sae, value.sum()) for value in (gated + usual, three_terms))
    assert_equal(*grads)
    n_open = (pi_gate > 0).double().sum(-1).mean(-1)
    assert_equal(gated + usual - three_terms, l1 * n_open, rtol=0, atol=1e-9)
    second = StandardSAE(*size, stack=stack, dtype=torch.float64)
    values = {n: v for n, v in sae.state_dict().items() if n in ("W_enc", "W_dec", "b_dec")}
    second.load_state_dict(values | {"b_enc": sae.b_gate})
    assert_equal(usual, second.losses(x).total(l1))  # the second is one of section 2


# -- Gradients are slopes --------------------------------------------------------------------------

SMOOTH = [
    *(make for make in VARIANTS.values() if getattr(make(1, 1), "aux", None) != "frozen"),
    partial(NaturalGatedSAE, aux="unfrozen"),
    partial(SigmoidGatedSAE, aux="unfrozen", tied=False),
]
SMOOTH.remove(VARIANTS["jumprelu"])  # its gradients are no slopes, by design


@given(st.sampled_from(SMOOTH), sizes, seeds, stacks)
def test_gradients_are_finite_differences(make, size, seed, stack):
    """Along a random direction in all parameters; no part of the loss frozen, no ReLU at a kink."""
    sae = random_sae(make, size, seed, stack=stack)
    x = random_batch(5, size[0], seed=seed)
    assume((pre_activations(sae, x).abs() > 1e-3).all())
    params = dict(sae.named_parameters())
    direction = {
        name: random_batch(*value.shape, seed=seed + k)
        for k, (name, value) in enumerate(params.items())
    }

    def loss(step):
        moved = {name: value + step * direction[name] for name, value in params.items()}
        return torch.func.functional_call(Total(sae), {f"sae.{n}": v for n, v in moved.items()}, x)

    h = 1e-6
    slope = (loss(h) - loss(-h)) / (2 * h)
    grads = gradients(sae, loss(0))
    expected = sum((grads[name] * direction[name]).sum() for name in grads)
    assert_equal(slope, expected, rtol=1e-4, atol=1e-4)


class Total(torch.nn.Module):
    """functional_call calls forward, and the loss is not that."""

    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x):
        return self.sae.losses(x).total(0.7).sum()


# -- G5: a sigmoid gate ----------------------------------------------------------------------------


@given(sizes, seeds, st.booleans())
def test_the_sigmoid_gate_is_the_formula(size, seed, tied):
    sae = random_sae(SigmoidGatedSAE, size, seed, tied=tied)
    x = random_batch(5, size[0], seed=seed)
    pi_gate, pi_mag = sae.paths(x)
    assert_equal(sae.encode(x), pi_mag.clamp_min(0) / (1 + (-pi_gate).exp()))


@given(sizes, seeds)
def test_reconstruction_reaches_a_sigmoid_gate_without_aux(size, seed):
    """G5: b_gate hears of it wherever the latent fires, where a step leaves exactly nothing."""
    x = random_batch(6, size[0], seed=seed)
    sigmoid, step = (
        random_sae(partial(kind, aux=None), size, seed) for kind in (SigmoidGatedSAE, GatedSAE)
    )
    fires = (sigmoid.encode(x) > 0).any(0)
    reached = gradients(sigmoid, sigmoid.losses(x).reconstruct)["b_gate"] != 0
    assert (reached == fires).all()
    assert (gradients(step, step.losses(x).reconstruct)["b_gate"] == 0).all()


def test_a_sigmoid_gate_lives_on_the_loss_that_kills_a_step():
    """G5, λ = 0.1, 1500 steps of L_incorrect. Sigmoid: FVU 0.001, none dead; step: L0 0.01."""
    step, sigmoid = (
        measured(trained(kind(8, 16, aux=None), steps=1500)) for kind in (GatedSAE, SigmoidGatedSAE)
    )
    assert step.l0 < 0.05
    assert step.fvu > 0.9
    assert sigmoid.dead_fraction == 0
    assert sigmoid.fvu < 0.01


def test_a_sigmoid_gate_lives_by_dodging_the_penalty():
    """Half open at π_gate = 0, it pays nothing. At 100 λ, 1% of the charge; L0 stays 15 of 16."""
    sae = trained(SigmoidGatedSAE(8, 16, aux=None, stack=2), l1=torch.tensor([0.1, 10.0]))
    cheap, dear = sae.losses(next(DATA.batches(1000, seed=99))).sparsity
    assert dear < cheap / 10
    assert (measured(sae).l0 > 14).all()


# -- G8, A2: no jump -------------------------------------------------------------------------------


def natural_pair(size, seed, **options):
    """A natural SAE, and a GatedSAE with the same parameters and the b_mag it implies."""
    natural = random_sae(NaturalGatedSAE, size, seed, **options)
    gated = GatedSAE(*size, dtype=torch.float64, **options)
    b_mag = natural.r_mag.exp() * natural.b_gate
    gated.load_state_dict(natural.state_dict() | {"b_mag": b_mag})
    return natural, gated


auxes = st.sampled_from(["frozen", "unfrozen", None])


@given(sizes, seeds, auxes, stacks)
def test_a_natural_gate_is_a_tied_one_without_a_b_mag_of_its_own(size, seed, aux, stack):
    """G8: the same outputs and losses at b_mag = exp(r_mag) b_gate, and θ = 0."""
    natural, gated = natural_pair(size, seed, aux=aux, stack=stack)
    assert "b_mag" not in natural.state_dict()
    x = random_batch(6, size[0], seed=seed)
    assert_equal(natural.encode(x), gated.encode(x))
    assert_equal(natural(x), gated(x))
    assert_equal(natural.losses(x), gated.losses(x))
    assert (natural.threshold == 0).all()


@given(sizes, seeds, auxes, weights, weights, weights)
def test_natural_gradients_are_the_oracles_by_the_chain_rule(size, seed, aux, a, l1, c):
    natural, gated = natural_pair(size, seed, aux=aux)
    x = random_batch(6, size[0], seed=seed)
    assume(clear(natural, x).all())
    c = c if aux else 0.0
    _, g = oracle.gated(x.numpy(), numpy(gated), a, l1, c, frozen=aux == "frozen")
    g = from_numpy(g)
    through = g.pop("b_mag") * natural.r_mag.exp().detach()  # ∂b_mag/∂b_gate = exp(r_mag), and
    g["b_gate"] += through
    g["r_mag"] += through * natural.b_gate.detach()  # ∂b_mag/∂r_mag = b_mag
    losses = natural.losses(x)
    total = a * losses.reconstruct + l1 * losses.sparsity + c * losses.aux
    assert_equal(gradients(natural, total), g)


@given(sizes, seeds, weights)
def test_a_natural_gate_is_no_heaviside_but_a_learned_factor(size, seed, l1):
    """A2: y = x̂(t ⊙ f), with ‖x - x̂_copy(f)‖² + λ‖f‖₁ + ‖y - x‖², x̂_copy frozen."""
    sae = random_sae(NaturalGatedSAE, size, seed)
    x = random_batch(6, size[0], seed=seed)
    assume(clear(sae, x).all())
    t, f = sae.r_mag.exp(), F.relu((x - sae.b_dec) @ sae.W_enc + sae.b_gate)
    y = (t * f) @ sae.W_dec + sae.b_dec
    copy = f @ sae.W_dec.detach() + sae.b_dec.detach()
    loss = (x - copy).square().sum(-1) + l1 * f.sum(-1) + (y - x).square().sum(-1)
    assert_equal(sae(x), y)
    assert_equal(sae.losses(x).total(l1), loss.mean())
    assert_equal(gradients(sae, sae.losses(x).total(l1)), gradients(sae, loss.mean()))


# -- A4: a soft cutoff -----------------------------------------------------------------------------

reals = st.floats(-10, 10)


@given(reals, reals, st.floats(1e-4, 2))
def test_the_soft_cutoff_tends_to_the_hard_one(y, t, s):
    """A4. With z = y + t, off by at most s²/4 (1/|y| + |y|/z²); nowhere negative."""
    soft = soft_cutoff(*torch.tensor([y, t], dtype=torch.float64), s).item()
    z = y + t
    direct = (y + math.sqrt(y**2 + s**2)) * (1 + z / math.sqrt(z**2 + s**2)) / 4
    assert soft == pytest.approx(direct, rel=1e-6, abs=1e-12)
    assert soft >= 0
    assume(abs(y) > 1e-3 and abs(z) > 1e-3)
    hard = y if y > max(0, -t) else 0
    assert abs(soft - hard) <= s**2 / 4 * (1 / abs(y) + abs(y) / z**2) + 1e-9


@given(reals, st.floats(0.05, 2))
def test_the_soft_cutoff_is_smooth_at_the_kinks(a, s):
    """Two derivatives in y and t, also where the hard one bends (y = 0) and jumps (y = -t)."""
    for y, t in ((0.0, a), (a, -a), (0.0, 0.0), (a, 1.0)):
        at = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (y, t)]
        assert torch.autograd.gradcheck(lambda y, t: soft_cutoff(y, t, s), at)
        assert torch.autograd.gradgradcheck(lambda y, t: soft_cutoff(y, t, s), at, atol=1e-4)


@given(sizes, seeds)
def test_a_soft_cutoff_sae_uses_its_t_and_its_s(size, seed):
    """Penalised as a Standard SAE; as s → 0 it is the JumpReLU SAE that `to_jumprelu` makes."""
    x = random_batch(6, size[0], seed=seed)
    for s in (0.3, 1e-7):
        sae = random_sae(partial(SoftCutoffSAE, s=s), size, seed)
        pi = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        f = sae.encode(x)
        assert_equal(f, soft_cutoff(pi, sae.t, s))
        assert_equal(sae.losses(x).sparsity, f.sum(-1).mean())
        assert (f > 0).all() or s < 0.3  # rounding can make it zero
    away = (pi.abs() > 1e-3) & ((pi + sae.t).abs() > 1e-3)
    assert_equal(to_jumprelu(sae).encode(x)[away], f[away], rtol=0, atol=1e-6)


def test_a_soft_cutoff_trains():
    """A4: from FVU above 0.3 to 0.02, and t moves."""
    sae = SoftCutoffSAE(8, 16)
    before = measured(sae).fvu
    after = measured(trained(sae)).fvu
    assert before > 0.3
    assert after < 0.05
    assert sae.t.abs().max() > 0.05


# -- JumpReLU --------------------------------------------------------------------------------------


@given(sizes, st.integers(1, 7), seeds, st.floats(0.01, 10), weights, weights)
def test_jumprelu_losses_and_pseudo_gradients_match_the_oracle(size, batch, seed, eps, a, l0):
    sae = random_sae(partial(JumpReLUSAE, bandwidth=eps), size, seed)
    with torch.no_grad():
        sae.threshold.abs_()
    x = random_batch(batch, size[0], seed=seed + 1)
    losses = sae.losses(x)
    expected, grads = oracle.jumprelu(x.numpy(), numpy(sae), eps, a, l0)
    assert_equal(losses, Losses(*(torch.tensor(v, dtype=torch.float64) for v in expected)))
    total = a * losses.reconstruct + l0 * losses.sparsity
    assert_equal(gradients(sae, total), from_numpy(grads))


@given(seeds, st.floats(0.01, 10))
def test_each_pseudo_gradient_by_itself(seed, eps):
    """∂1[π > θ]/∂θ = -K/ε and ∂1[π > θ]/∂π = 0, weighted by any gradient from above."""
    pi, theta, above = random_batch(3, 7, 5, seed=seed)
    theta = theta[:1]
    pi.requires_grad_(), theta.requires_grad_()
    step = gated_sae.heaviside(pi, theta, eps)
    assert_equal(step, (pi > theta).double())
    to_pi, to_theta = torch.autograd.grad(
        (step * above).sum(), (pi, theta), allow_unused=True, materialize_grads=True
    )
    kernel = ((pi - theta).abs() < eps / 2).double()
    assert (to_pi == 0).all()
    assert_equal(to_theta, -(above * kernel / eps).sum(0, keepdim=True).detach())


@given(sizes, seeds, stacks)
def test_the_f_that_is_trained_is_the_f_that_is_encoded(size, seed, stack):
    """Straight-through terms change gradients and no value; a negative θ counts as 0."""
    sae = random_sae(JumpReLUSAE, size, seed, stack=stack)
    x = random_batch(6, size[0], seed=seed)
    losses, f = sae.losses(x), sae.encode(x)
    pi = (x - sae.b_dec.unsqueeze(-2)) @ sae.W_enc + sae.b_enc.unsqueeze(-2)
    assert_equal(losses.reconstruct, gated_sae.squared_error(x, sae.decode(f)), rtol=0, atol=0)
    assert_equal(f, jump_relu(pi, sae.threshold))
    assert_equal(f, torch.where(pi > sae.threshold.unsqueeze(-2), pi.clamp_min(0), 0))
    assert_equal(losses.sparsity, (f > 0).double().sum(-1).mean(-1))


# -- G7: conversions -------------------------------------------------------------------------------

JUMPING = ["standard", "standard norm", "gated", "gated unfrozen", "gated natural"]


@given(st.sampled_from(JUMPING), sizes, seeds, stacks)
def test_a_jumprelu_has_the_outputs_of_what_it_was(variant, size, seed, stack):
    """G7, with its dtype and stack, and none of its memory."""
    sae = random_sae(variant, size, seed, stack=stack)
    x = random_batch(10, size[0], seed=seed)
    jump = to_jumprelu(sae)
    assert type(jump) is JumpReLUSAE
    assert (jump.stack, jump.W_enc.dtype) == (stack, torch.float64)
    assert (jump.threshold >= 0).all()
    at = clear(sae, x)
    assert_equal(jump.encode(x)[at], sae.encode(x)[at])
    assert_equal(jump(x)[at], sae(x)[at])
    if isinstance(sae, StandardSAE):
        assert_equal(jump(x), sae(x), rtol=0, atol=0)
    theirs = {p.data_ptr() for p in sae.parameters()}
    assert not theirs & {p.data_ptr() for p in jump.parameters()}
    assert all(p.requires_grad for p in jump.parameters())


@given(sizes, seeds, stacks)
def test_there_and_back_again(size, seed, stack):
    """G7, both ways: gated → JumpReLU → gated, and JumpReLU → gated → JumpReLU."""
    x = random_batch(10, size[0], seed=seed)
    gated = random_sae("gated", size, seed, stack=stack)
    again = to_gated(to_jumprelu(gated))
    assert type(again) is GatedSAE
    at = clear(gated, x)
    assert_equal(again.encode(x)[at], gated.encode(x)[at])
    assert_equal(again(x)[at], gated(x)[at])

    jump = random_sae("jumprelu", size, seed, stack=stack)
    at = clear(jump, x)
    gate = to_gated(jump)
    assert_equal(gate.encode(x)[at], jump.encode(x)[at])
    assert torch.equal((gate.paths(x)[0] > 0)[at], (jump.encode(x) > 0)[at])
    back = to_jumprelu(gate)
    assert_equal(back(x)[at], jump(x)[at])
    assert_equal(back.threshold, jump.threshold.clamp_min(0), rtol=0, atol=1e-12)


@given(st.sampled_from(JUMPING), sizes, seeds, stacks, st.booleans())
def test_to_gated_takes_options_and_keeps_the_outputs(variant, size, seed, stack, tied):
    sae = random_sae(variant, size, seed, stack=stack)
    gated = to_gated(sae, tied=tied, aux="unfrozen")
    assert (gated.tied, gated.aux) == (tied, "unfrozen")
    x = random_batch(10, size[0], seed=seed)
    at = clear(sae, x)
    assert_equal(gated.encode(x)[at], sae.encode(x)[at])
    with pytest.raises(TypeError, match="stack"):
        to_gated(sae, stack=3)


def test_a_converted_stack_is_its_converted_members():
    for variant, convert in (
        *((variant, to_jumprelu) for variant in [*JUMPING, "soft cutoff"]),
        ("jumprelu", to_gated),
        ("standard", rescale_and_shift),
    ):
        stack = random_sae(variant, (4, 6), 0, stack=(2, 3))
        whole = convert(stack).state_dict()
        for i in itertools.product(range(2), range(3)):
            single = random_sae(variant, (4, 6), 1)
            single.load_state_dict({name: value[i] for name, value in stack.state_dict().items()})
            part = {name: value[i] for name, value in whole.items()}
            assert_equal(part, dict(convert(single).state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (partial(GatedSAE, tied=False), "this GatedSAE has tied=False and so no threshold"),
        (SigmoidGatedSAE, "a SigmoidGatedSAE has no threshold"),
        (partial(SigmoidGatedSAE, tied=False), "a SigmoidGatedSAE has no threshold"),
    ],
)
def test_a_gate_without_a_threshold_becomes_no_jumprelu(make, says):
    with pytest.raises(ValueError, match=says):
        to_jumprelu(make(4, 8))


# -- A1: rescale and shift -------------------------------------------------------------------------


@given(sizes, seeds, stacks, st.booleans())
def test_before_training_a_rescaled_sae_is_the_standard_one(size, seed, stack, refit):
    sae = random_sae("standard", size, seed, stack=stack)
    x = random_batch(6, size[0], seed=seed)
    rescaled = rescale_and_shift(sae, refit)
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
    kept = {name: value.clone() for name, value in sae.state_dict().items()}
    rescaled = rescale_and_shift(sae, refit)
    before = {name: value.clone() for name, value in rescaled.state_dict().items()}
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


# -- Bad options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_widths_are_positive_and_finite(bad):
    with pytest.raises(ValueError, match=f"s is {bad}, expected a positive float"):
        SoftCutoffSAE(4, 8, s=bad)
    with pytest.raises(ValueError, match=f"bandwidth is {bad}, expected a positive float"):
        JumpReLUSAE(4, 8, bandwidth=bad)


def test_widths_are_part_of_the_config():
    assert SoftCutoffSAE(4, 8, s=0.5).config["s"] == 0.5
    assert JumpReLUSAE(4, 8, bandwidth=0.5).config["bandwidth"] == 0.5


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *((kind, "bandwidth") for kind in (StandardSAE, SoftCutoffSAE, SigmoidGatedSAE)),
        (NaturalGatedSAE, "tied"),  # b_mag is made of r_mag
        (JumpReLUSAE, "penalty"),  # it pays for L0 alone
    ],
)
def test_an_option_of_another_variant_is_named(kind, option):
    with pytest.raises(TypeError, match=option):
        kind(4, 8, **{option: VARIANTS["standard log"](4, 8).penalty})


def test_a_jumprelu_becomes_itself():
    sae = random_sae("jumprelu", (4, 6), 0)
    x = random_batch(9, 4, seed=0)
    assert_equal(to_jumprelu(sae)(x), sae(x))


def test_a_soft_cutoff_is_not_rescaled():
    with pytest.raises((TypeError, ValueError), match="SoftCutoffSAE"):
        rescale_and_shift(SoftCutoffSAE(4, 6))


def test_a_width_from_numpy_is_saved(tmp_path):
    gated_sae.save(SoftCutoffSAE(4, 6, s=np.float32(0.5)), tmp_path / "a")
    assert gated_sae.load(tmp_path / "a").s == 0.5
