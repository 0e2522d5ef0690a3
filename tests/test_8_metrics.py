"""Section 8: γ and what it is not, and metrics over a stream."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from random_saes import VARIANTS, assert_equal, member, random_batch, random_sae, seeds, sizes
from torch.multiprocessing.reductions import StorageWeakRef

from gated_sae import GatedSAE, Moments, StandardSAE, evaluate, in_parts, moments, variance


def mean_square(v):
    return v.square().sum(-1).mean()


factors = st.floats(0.05, 20)
shapes = st.tuples(st.just(2), st.integers(1, 5), st.integers(1, 4))
numbers = st.floats(-10, 10, width=32)
# x and x̂, with E[x̂·x], and so E‖x‖² and E‖x̂‖², away from 0
pairs = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=numbers))
pairs = pairs.map(torch.from_numpy).filter(lambda pair: abs((pair[0] * pair[1]).sum()) > 1e-2)


# -- S2 to S5: γ and the two factors ---------------------------------------------------------------

ERRORS = {  # what is least where g is this
    "gamma": lambda x, x_hat, g: x_hat / g - x,
    "factor_on_x_hat": lambda x, x_hat, g: g * x_hat - x,
    "factor_on_x": lambda x, x_hat, g: x_hat - g * x,
}


@pytest.mark.parametrize("name", ERRORS)
@given(pairs, st.floats(-1, 1))
def test_gamma_and_the_factors_are_argmins(name, pair, nudge):
    """S2, S4 and the other side of S5: the closed form beats every perturbed g."""
    cost = lambda g: mean_square(ERRORS[name](*pair, g))  # noqa: E731
    best = getattr(moments(*pair), name)
    for other in (best + nudge, best * (1 + nudge)):
        assume(other != 0)
        assert cost(best) <= cost(other) * (1 + 1e-9) + 1e-12


@given(st.integers(2, 6), st.integers(1, 4), seeds, factors, factors)
def test_gamma_is_the_scale_where_the_error_is_orthogonal_to_x_hat(n, d, seed, size, c):
    """S2: however large the error, and on average only: single rows may be far from orthogonal.
    So γ is 1 at zero shrinkage, and c if x̂ is c x."""
    x_hat, error = random_batch(2, n, d, seed=seed)
    error -= (error * x_hat).sum() / x_hat.square().sum() * x_hat
    for x in (x_hat, x_hat + size * error):
        assert moments(x, x_hat).gamma.item() == pytest.approx(1)
        assert moments(x, c * x_hat).gamma.item() == pytest.approx(c)


@given(pairs)
def test_gamma_from_three_logged_numbers(pair):
    """S3. They may be floats."""
    x, x_hat = pair
    m = Moments.from_norms(mean_square(x), mean_square(x_hat), mean_square(x - x_hat))
    assert_equal(m.dot, moments(x, x_hat).dot, rtol=1e-6, atol=1e-9)
    assert m.gamma.item() == pytest.approx(moments(x, x_hat).gamma.item(), rel=1e-6)
    assert Moments.from_norms(1.0, 0.25, 0.25).gamma.item() == pytest.approx(0.5)
    for odd in ((-1.0, 1.0, 0.5), (1.0, torch.tensor(-1e-9), 0.5), (1.0, 1.0, math.nan)):
        with pytest.raises(ValueError, match="expected three numbers ≥ 0"):
            Moments.from_norms(*odd)


@given(pairs)
def test_the_factors_are_not_reciprocal(pair):
    """S5: their product is the squared cosine, 1 for collinear batches and below 1 for others, so
    neither "how much of x is left" nor "how to rescale x̂" is the inverse of the other."""
    x, x_hat = pair
    m, a, b = moments(x, x_hat), x.flatten(), x_hat.flatten()
    cosine = (a @ b / a.norm() / b.norm()).item()
    product = (m.factor_on_x * m.factor_on_x_hat).item()
    assert product == pytest.approx(cosine**2)
    assert m.cosine_squared.item() == pytest.approx(product)
    assert 0 < product <= 1 + 1e-12
    rest = b - m.factor_on_x * a  # S4: of the whole batch, what is left is orthogonal to x
    assert abs(rest @ a) < 1e-8 * (1 + (a * b).abs().sum())
    assert product < 1 or rest.norm() / b.norm() < 1e-7
    assert m.factor_on_x_hat.item() == pytest.approx(1 / m.gamma.item())


# -- S6, S7: what gamma is not ---------------------------------------------------------------------


@given(pairs, st.floats(0.1, 1.8))
def test_the_first_preprints_formula_and_the_norm_ratio_are_not_gamma(pair, gamma):
    """S6: γ_v1 = √(γ / (2 - γ)), as 1/√3 for γ = 1/2, its own example, and without a value for γ
    above 2. Both are 1 together; elsewhere they part.
    S7: rescaled so that γ = 1, x̂ is still shorter than x, by the squared cosine.
    """
    x, x_hat = pair
    unbiased = x_hat / moments(x, x_hat).gamma
    m = moments(x, unbiased)
    assert m.gamma.item() == pytest.approx(1)
    assert m.gamma_v1.item() == pytest.approx(1, rel=1e-6)
    assert m.norm_ratio.item() == pytest.approx(m.cosine_squared.item())
    assert m.norm_ratio <= 1 + 1e-9
    m = moments(x, gamma * unbiased)
    assert m.norm_ratio.item() == pytest.approx(mean_square(m.gamma * unbiased) / mean_square(x))
    assert m.gamma.item() == pytest.approx(gamma)
    assert m.gamma_v1.item() == pytest.approx(math.sqrt(gamma / (2 - gamma)), rel=1e-6)
    assert abs(m.gamma_v1 - m.gamma) >= 0.15 * (gamma - 1) ** 2 - 1e-6
    assert not moments(x, (2.1 + gamma) * unbiased).gamma_v1.isfinite()


def test_moments_are_ratios_of_means_that_half_precision_does_not_overflow():
    """The long row decides. The mean of ratios would be 1.25, and squares would be infinite."""
    x, x_hat = torch.tensor([[1000.0], [100.0]]).half(), torch.tensor([[500.0], [200.0]]).half()
    assert moments(x, x_hat).factor_on_x.item() == pytest.approx(52 / 101)


def test_gamma_is_not_finite_where_one_member_has_none_and_shapes_that_differ_are_refused():
    x = torch.eye(2)
    for x_hat in (0 * x, x.flip(0), torch.stack([x, 0 * x])):
        assert not moments(x, x_hat).gamma.isfinite().all()
    for shapes in (((3, 4), (3, 5)), ((3, 4), (2, 4)), ((2, 3, 4), (3, 4)), ((0, 4), (0, 4))):
        with pytest.raises(ValueError, match="expected one"):
            moments(*map(torch.zeros, shapes))


# -- evaluate --------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(sae, x):
    f, x_hat, m = sae.encode(x), sae(x), moments(x, sae(x))
    scale = "gamma", "norm_ratio", "cosine_squared", "factor_on_x", "factor_on_x_hat"
    fires = (f > 0).double()
    return {name: getattr(m, name) for name in scale} | dict(
        fvu=(x - x_hat).square().sum() / (x - x.mean(0)).square().sum(),
        l0=fires.sum(-1).mean(),
        l1_norm=f.abs().sum(-1).mean(),
        dead_fraction=(fires.sum(0) == 0).double().mean(),
        firing_frequency=fires.mean(0),
    )


cuts = st.lists(st.integers(1, 6), min_size=1, max_size=5)
streams = st.tuples(st.sampled_from([(), (3,)]), st.booleans(), cuts)


@given(st.sampled_from([*VARIANTS]), sizes, seeds, streams)
def test_a_stream_is_worth_its_rows_however_it_is_cut(variant, size, seed, stream):
    """And a stack its members, with one stream for all or one for each."""
    stack, own, lengths = stream
    sae = random_sae(variant, size, seed, stack=stack)
    shape = (*(stack if own else ()), sum(lengths) + 1, size[0])
    x = 100 + random_batch(*shape, seed=seed)  # a mean far from zero
    metrics = evaluate(sae, x.split([*lengths, 1], -2))
    assert metrics.n_rows == shape[-2]
    scalars = [value for name, value in vars(metrics).items() if name != "n_rows"]
    assert {value.shape for value in scalars} == {stack, (*stack, size[1])}
    assert not any(value.requires_grad for value in scalars)
    for i in np.ndindex(stack):
        expected = by_hand(member(sae, i), x[i] if own else x)
        assert_equal({name: getattr(metrics, name)[i] for name in expected}, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_data_without_length_or_variance_is_reported(variant):
    sae = VARIANTS[variant](3, 5)
    zero, constant = (evaluate(sae, [torch.full((7, 3), value)] * 3) for value in (0.0, 0.1))
    assert not zero.gamma.isfinite()
    assert zero.gamma.isnan() == (variant != "soft cutoff")  # which is never exactly zero
    assert zero.l0 == (5 if variant == "soft cutoff" else 0)
    assert not constant.fvu.isfinite()


def test_the_faintest_and_rarest_firing_counts():
    """One latent fires on one of 1000 rows, at 1e-12: it is not dead, and L0 is 1/1000."""
    sae = StandardSAE(1, 2, dtype=torch.float64)
    sae.W_enc.data, sae.b_enc.data = torch.eye(1, 2).double(), -torch.ones(2).double()
    x = torch.zeros(1000, 1, dtype=torch.float64)
    x[17] = 1 + 1e-12
    measured = evaluate(sae, x.split(100))
    assert measured.l0.item() == pytest.approx(1e-3)
    assert measured.dead_fraction.item() == 0.5


def test_evaluate_keeps_no_batch_and_leaves_the_sae_as_it_was():
    sae, seen = GatedSAE(3, 5, dtype=torch.float64), []

    def batches():
        for seed in range(5):
            x = random_batch(10, 3, seed=seed)
            seen.append(StorageWeakRef(x.untyped_storage()))
            yield x
            del x
            assert sum(not ref.expired() for ref in seen) <= 1

    evaluate(sae, batches())
    assert len(seen) == 5
    fresh = GatedSAE(3, 5, dtype=torch.float64)
    assert_equal(sae.state_dict(), fresh.state_dict(), rtol=0, atol=0)
    assert all(p.grad is None for p in sae.parameters())


def test_sums_are_float64_also_for_float32_saes():
    sae = GatedSAE(3, 5)
    x = random_batch(1000, 3, seed=0).float()
    measured = evaluate(sae, x.split(7))
    assert measured.l1_norm.dtype == measured.fvu.dtype == torch.float64
    l1_norm = sae.encode(x).double().sum(-1).mean().item()
    assert measured.l1_norm.item() == pytest.approx(l1_norm, rel=1e-12)


@pytest.mark.parametrize(("d_sae", "lengths"), [(2**20, [4, 4, 2]), (2**24, [1] * 10), (8, [10])])
def test_parts_of_a_batch_hold_64_mb_of_coefficients_or_one_row(d_sae, lengths):
    sae = StandardSAE(2, d_sae, stack=4, device="meta")
    for x in (torch.zeros(10, 2), torch.zeros(4, 10, 2)):
        assert [part.shape[-2] for part in in_parts(sae, x)] == lengths


ONES, ODD = torch.ones(5, 3), torch.zeros(4, 3)
ODD[2, 1], ODD[3] = math.inf, math.nan


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([], ValueError, "empty"),
        (ONES, ValueError, r"batch 0 is .*\(3,\), expected .*\(batch ≥ 1, 3\)"),
        ([torch.ones(2, 5, 3)], ValueError, r"0 is .*\(2, 5, 3\), expected .*\(batch ≥ 1, 3\)"),
        ([ONES, torch.ones(5, 4)], ValueError, r"batch 1 is .*\(5, 4\)"),
        ([ONES.long()], TypeError, "batch 0 is .*int64"),
        ([[1.0, 2.0, 3.0]], TypeError, "batch 0 is list"),
        ([ONES, ODD], ValueError, "batch 1 has NaN or infinity in 2 of 4 rows, first in row 2"),
    ],
)
def test_bad_streams_are_named(batches, error, says):
    with pytest.raises(error, match=says):
        evaluate(GatedSAE(3, 5), batches)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), seeds, st.floats(-1e6, 1e6))
def test_variance_is_that_of_all_rows_in_one_pass(cuts, seed, far):
    """However it is cut, and from half precision too; as exactly with a mean 10^6 standard
    deviations away, where sums of squares would hold few digits."""
    x = random_batch(sum(cuts), 3, seed=seed)
    for rows, atol in ((x + far, 0), (x.half(), 1e-9)):
        expected = rows.double().var(0, unbiased=False).sum()
        assert_equal(variance(iter(rows.split(cuts)), 3), expected, rtol=1e-6, atol=atol)
    with pytest.raises(ValueError, match="batches is empty"):
        variance([], 3)
