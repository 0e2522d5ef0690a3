"""Section 8: γ and what it is not, and metrics over a stream."""

import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from random_saes import VARIANTS, assert_equal, random_batch, random_sae, seeds, sizes, variants

from gated_sae import (
    GatedSAE,
    Moments,
    StandardSAE,
    evaluate,
    moments,
    relative_reconstruction_bias,
)

batches = st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-10, 10, width=32))
)
factors = st.floats(0.05, 20)


def pairs():
    """x and x̂ of one shape, with E[x̂·x], E‖x‖² and E‖x̂‖² away from 0."""
    both = st.tuples(st.integers(1, 5), st.integers(1, 4)).flatmap(
        lambda shape: st.tuples(
            *[arrays(np.float64, shape, elements=st.floats(-10, 10, width=32))] * 2
        )
    )
    tensors = both.map(lambda pair: tuple(map(torch.from_numpy, pair)))
    return tensors.filter(lambda pair: abs((pair[0] * pair[1]).sum()) > 1e-2)


def mean_square(v):
    return v.square().sum(-1).mean()


# -- S2, S3: gamma ---------------------------------------------------------------------------------


@given(pairs(), st.floats(-1, 1).filter(lambda d: abs(d) > 1e-3))
def test_gamma_is_the_argmin(pair, nudge):
    """S2: the closed form beats every perturbed g."""
    x, x_hat = pair
    cost = lambda g: mean_square(x_hat / g - x).item()  # noqa: E731
    g = relative_reconstruction_bias(x, x_hat).item()
    assert cost(g) <= cost(g * (1 + nudge) if nudge != -1 else 2 * g) * (1 + 1e-9) + 1e-12


@given(batches, factors)
def test_gamma_of_a_rescaled_input_is_the_scale(x, c):
    """S2: γ(x, c x) = c, and so γ = 1 at zero shrinkage."""
    x = torch.from_numpy(x)
    assume(mean_square(x) > 1e-3)
    assert relative_reconstruction_bias(x, c * x).item() == pytest.approx(c)
    assert relative_reconstruction_bias(x, x).item() == pytest.approx(1)


@given(st.integers(2, 6), st.integers(1, 4), seeds, factors)
def test_gamma_is_one_when_the_error_is_orthogonal_to_the_reconstruction(n, d, seed, size):
    """S2: however large the error, and on average only: single rows may be far from orthogonal."""
    x_hat, error = random_batch(2, n, d, seed=seed)
    error -= (error * x_hat).sum() / x_hat.square().sum() * x_hat
    assert relative_reconstruction_bias(x_hat + size * error, x_hat).item() == pytest.approx(1)


@given(pairs())
def test_gamma_from_three_logged_numbers(pair):
    """S3."""
    x, x_hat = pair
    m = Moments.from_norms(mean_square(x), mean_square(x_hat), mean_square(x - x_hat))
    assert_equal(m.dot, moments(x, x_hat).dot, rtol=1e-6, atol=1e-9)
    assert m.gamma.item() == pytest.approx(relative_reconstruction_bias(x, x_hat).item(), rel=1e-6)


@pytest.mark.parametrize("x_hat", [torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])])
def test_gamma_is_refused_where_it_is_undefined(x_hat):
    with pytest.raises(ValueError, match="undefined"):
        relative_reconstruction_bias(torch.eye(2), x_hat)
    assert not moments(torch.eye(2), x_hat).gamma.isfinite()


# -- S4, S5: the two factors -----------------------------------------------------------------------


@given(pairs(), st.floats(-1, 1))
def test_the_two_factors_are_argmins(pair, nudge):
    """S4 and the other side of S5."""
    x, x_hat = pair
    m = moments(x, x_hat)
    on_x, on_x_hat = m.factor_on_x, m.factor_on_x_hat
    assert mean_square(x_hat - on_x * x) <= mean_square(x_hat - (on_x + nudge) * x) + 1e-9
    assert mean_square(on_x_hat * x_hat - x) <= mean_square((on_x_hat + nudge) * x_hat - x) + 1e-9


@given(pairs())
def test_the_factor_on_x_is_the_projection_of_the_whole_batch(pair):
    """S4: a ratio of means; what is left of x̂ is orthogonal to x."""
    x, x_hat = pair
    rest = x_hat - moments(x, x_hat).factor_on_x * x
    assert abs((rest * x).sum()) < 1e-8 * (1 + (x_hat * x).abs().sum())


@given(pairs())
def test_the_factors_are_not_reciprocal(pair):
    """S5: their product is the squared cosine, 1 for collinear batches and below 1 for others."""
    x, x_hat = pair
    m = moments(x, x_hat)
    a, b = x.flatten(), x_hat.flatten()
    cosine = (a @ b / a.norm() / b.norm()).item()
    product = (m.factor_on_x * m.factor_on_x_hat).item()
    assert product == pytest.approx(cosine**2)
    assert m.cosine_squared.item() == pytest.approx(product)
    assert 0 < product <= 1 + 1e-12
    sine = ((b - (a @ b) / (a @ a) * a).norm() / b.norm()).item()
    assert (product < 1) or sine < 1e-7
    assert m.factor_on_x_hat.item() == pytest.approx(1 / m.gamma.item())


@given(batches, factors)
def test_collinear_factors_are_reciprocal(x, c):
    x = torch.from_numpy(x)
    assume(mean_square(x) > 1e-3)
    m = moments(x, c * x)
    assert m.factor_on_x.item() == pytest.approx(c)
    assert m.factor_on_x_hat.item() == pytest.approx(1 / c)


@given(st.floats(1e-6, 1e-2))
def test_nearly_perpendicular_vectors_send_both_factors_to_zero(angle):
    """S5: neither "how much of x is left" nor "how to rescale x̂" is the inverse of the other."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    x_hat = torch.tensor([[math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    m = moments(x, x_hat)
    assert 0 < m.factor_on_x <= 1.01 * angle
    assert 0 < m.factor_on_x_hat <= 1.01 * angle


# -- S6, S7: what gamma is not ---------------------------------------------------------------------


def test_the_first_preprints_formula_on_its_own_example():
    """S6: at x = 1, x̂ = 1/2 it gave 1/√3; γ is 1/2."""
    m = moments(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    assert m.gamma_v1.item() == pytest.approx(1 / math.sqrt(3))
    assert m.gamma.item() == pytest.approx(1 / 2)


@given(pairs(), st.floats(0.1, 1.8))
def test_the_first_preprints_formula_agrees_only_at_gamma_one(pair, gamma):
    """S6: γ_v1 = √(γ / (2 - γ)). Both are 1 together; elsewhere they part."""
    x, x_hat = pair
    unbiased = x_hat / relative_reconstruction_bias(x, x_hat)
    assert moments(x, unbiased).gamma_v1.item() == pytest.approx(1, rel=1e-6)
    m = moments(x, gamma * unbiased)
    assert m.gamma.item() == pytest.approx(gamma)
    assert m.gamma_v1.item() == pytest.approx(math.sqrt(gamma / (2 - gamma)), rel=1e-6)
    assert abs(m.gamma_v1 - m.gamma) >= 0.15 * (gamma - 1) ** 2 - 1e-6


def test_the_first_preprints_formula_is_undefined_where_the_error_is_larger_than_x():
    m = moments(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    assert not m.gamma_v1.isfinite()


def test_half_precision_moments_do_not_overflow():
    x = random_batch(64, 1000, seed=0).mul(100).half()
    assert relative_reconstruction_bias(x, 0.5 * x).item() == pytest.approx(0.5, rel=1e-3)


def test_moments_from_logged_floats():
    assert Moments.from_norms(1.0, 0.25, 0.25).gamma.item() == pytest.approx(0.5)


@given(pairs())
def test_the_norm_ratio_of_an_unbiased_reconstruction_is_below_one(pair):
    """S7: rescaled so that γ = 1, x̂ is still shorter than x, by the squared cosine."""
    x, x_hat = pair
    m = moments(x, x_hat / relative_reconstruction_bias(x, x_hat))
    assert m.gamma.item() == pytest.approx(1)
    assert m.norm_ratio.item() == pytest.approx(m.cosine_squared.item())
    assert m.norm_ratio <= 1 + 1e-9


@pytest.mark.parametrize(
    "shapes", [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((2, 3, 4), (3, 4)), ((0, 4), (0, 4))]
)
def test_moments_refuse_batches_that_do_not_match(shapes):
    with pytest.raises(ValueError, match="expected one"):
        moments(*map(torch.zeros, shapes))


# -- evaluate --------------------------------------------------------------------------------------


def by_hand(sae, x):
    f, x_hat = sae.encode(x), sae(x)
    m = moments(x, x_hat)
    fires = (f > 0).double()
    return dict(
        l0=fires.sum(-1).mean(-1),
        l1_norm=f.abs().sum(-1).mean(-1),
        fvu=(x - x_hat).square().sum((-1, -2))
        / (x - x.mean(-2, keepdim=True)).square().sum((-1, -2)),
        gamma=m.gamma,
        norm_ratio=m.norm_ratio,
        cosine_squared=m.cosine_squared,
        factor_on_x=m.factor_on_x,
        factor_on_x_hat=m.factor_on_x_hat,
        dead_fraction=(fires.sum(-2) == 0).double().mean(-1),
        firing_frequency=fires.mean(-2),
    )


@given(
    variants,
    sizes,
    seeds,
    st.sampled_from([(), (3,)]),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
)
def test_a_stream_is_worth_its_rows_however_it_is_cut(variant, size, seed, stack, lengths):
    sae = random_sae(variant, size, seed, stack=stack)
    x = 100 + random_batch(sum(lengths) + 1, size[0], seed=seed)  # a mean far from zero
    metrics = evaluate(sae, x.split([*lengths, 1]))
    assert metrics.n_rows == len(x)
    scalars = [value for name, value in vars(metrics).items() if name != "n_rows"]
    assert {value.shape for value in scalars} == {stack, (*stack, size[1])}
    expected = {name: value.detach() for name, value in by_hand(sae, x).items()}
    assert_equal({name: getattr(metrics, name) for name in expected}, expected)


def test_evaluate_takes_a_batch_for_each_member():
    sae = random_sae("gated", (4, 8), 0, stack=2)
    x = random_batch(2, 10, 4, seed=0)
    measured = evaluate(sae, x.split(5, dim=1))
    for i in range(2):
        single = random_sae("gated", (4, 8), 0)
        single.load_state_dict({name: value[i] for name, value in sae.state_dict().items()})
        own = evaluate(single, [x[i]])
        for name in ("l0", "fvu", "gamma", "firing_frequency"):
            assert_equal(getattr(measured, name)[i], getattr(own, name))


def test_the_metrics_of_a_stream_are_ratios_of_means():
    """One long row and one short one, reconstructed at different scales: the long one decides."""
    x, x_hat = torch.tensor([[10.0], [1.0]]), torch.tensor([[5.0], [2.0]])
    assert moments(x, x_hat).factor_on_x.item() == pytest.approx(52 / 101)
    assert (x_hat / x).mean().item() == pytest.approx(1.25)


def test_the_variance_of_data_far_from_zero_is_exact():
    """FVU with a mean 10^6 standard deviations away: sums of squares would hold few digits."""
    sae = StandardSAE(3, 2, dtype=torch.float64)
    noise = random_batch(1000, 3, seed=0)
    with torch.no_grad():
        sae.b_dec.fill_(1e6)
        sae.b_enc.fill_(-1e9)  # never fires: x̂ = b_dec
    fvu = evaluate(sae, (1e6 + noise).split(100)).fvu.item()
    expected = mean_square(noise) / mean_square(noise - noise.mean(0))
    assert fvu == pytest.approx(expected.item(), rel=1e-6)


def test_a_dead_sae_is_reported_not_hidden():
    sae = GatedSAE(3, 5, stack=2)
    with torch.no_grad():
        sae.b_gate[0] = -1e9
    x = random_batch(10, 3, seed=0).float()
    measured = evaluate(sae, [x])
    gamma = measured.gamma
    assert measured.dead_fraction[0] == 1
    assert measured.l0[0] == 0
    assert gamma[0].isnan()
    assert gamma[1].isfinite()


def test_constant_data_has_no_variance_to_explain():
    assert not evaluate(GatedSAE(3, 5), [torch.full((7, 3), 0.1)] * 3).fvu.isfinite()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zero_batch_is_reported(variant):
    measured = evaluate(VARIANTS[variant](3, 5), [torch.zeros(4, 3)])
    assert not measured.gamma.isfinite()
    assert measured.l0 == (5 if variant == "soft cutoff" else 0)  # it is never exactly zero


def test_evaluate_leaves_the_sae_as_it_was():
    sae = GatedSAE(3, 5)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    evaluate(sae, [random_batch(10, 3, seed=0).float()])
    assert_equal(before, dict(sae.state_dict()), rtol=0, atol=0)
    assert all(p.grad is None for p in sae.parameters())


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([], ValueError, "empty"),
        (torch.zeros(5, 3), ValueError, r"batch 0 is .*\(3,\), expected .*\(batch ≥ 1, 3\)"),
        (
            [torch.zeros(2, 5, 3)],
            ValueError,
            r"batch 0 is .*\(2, 5, 3\), expected .*\(batch ≥ 1, 3\)",
        ),
        ([torch.zeros(5, 3), torch.zeros(5, 4)], ValueError, r"batch 1 is .*\(5, 4\)"),
        ([torch.zeros(5, 3, dtype=torch.long)], TypeError, "batch 0 is .*int64"),
        ([[1.0, 2.0, 3.0]], TypeError, "batch 0 is list"),
        (
            itertools.chain(
                [torch.ones(5, 3)], [torch.tensor([[0.0] * 3, [0, math.inf, 0], [math.nan] * 3])]
            ),
            ValueError,
            "batch 1 has NaN or infinity in 2 of 3 rows, first in row 1",
        ),
    ],
)
def test_bad_streams_are_named(batches, error, says):
    with pytest.raises(error, match=says):
        evaluate(GatedSAE(3, 5), batches)


def test_gamma_of_a_stack_is_refused_if_one_member_has_none():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="undefined"):
        relative_reconstruction_bias(x, torch.stack([x, torch.zeros(2, 3)]))


def test_the_faintest_and_rarest_firing_counts():
    """One latent fires on one of 1000 rows, at 1e-12: it is not dead, and L0 is 1/1000."""
    sae = StandardSAE(1, 2, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0]]))
        sae.b_enc.copy_(torch.tensor([-1.0, -1.0]))
    x = torch.zeros(1000, 1, dtype=torch.float64)
    x[17] = 1 + 1e-12
    measured = evaluate(sae, x.split(100))
    assert measured.l0.item() == pytest.approx(1e-3)
    assert measured.dead_fraction.item() == 0.5


def test_evaluate_keeps_no_batch():
    seen = []

    def batches():
        for seed in range(5):
            x = random_batch(10, 3, seed=seed).float()
            seen.append(weakref.ref(x))
            yield x
            del x
            assert sum(ref() is not None for ref in seen) <= 1

    evaluate(GatedSAE(3, 5), batches())
    assert len(seen) == 5


def test_sums_are_float64_also_for_float32_saes():
    sae = GatedSAE(3, 5)
    x = random_batch(1000, 3, seed=0).float()
    measured = evaluate(sae, x.split(7))
    assert measured.l1_norm.dtype == measured.fvu.dtype == torch.float64
    f = sae.encode(x).double()
    assert measured.l1_norm.item() == pytest.approx(f.sum(-1).mean().item(), rel=1e-12)
