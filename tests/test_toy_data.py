"""The toy data has the statistics it promises, and the scores know the truth when they see it."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_saes import assert_equal

import toy_data
from gated_sae import GatedSAE, StandardSAE, train
from toy_data import (
    SuperpositionData,
    mean_correlation_coefficient,
    mean_max_cosine,
    recovery,
    zipf,
)

ROWS = 100_000


def sample(data, rows=ROWS, seed=0):
    return data.sample(rows, torch.Generator().manual_seed(seed))


def firings(p, **world):
    """Who fires on many rows of a world where feature i does so with probability p[i]."""
    return sample(SuperpositionData(4, len(p), firing=p, **world))[1] > 0


def assert_frequencies(fires, p, sigmas=5):
    """Observed shares within so many standard errors of p."""
    p = torch.as_tensor(p).double()
    error = (p * (1 - p) / len(fires)).sqrt() + 1e-6
    assert ((fires.double().mean(0) - p).abs() < sigmas * error).all()


def assert_uncorrelated(a):
    correlations = torch.corrcoef(a.double().T)
    assert (correlations - torch.eye(len(correlations))).abs().max() < 5 / ROWS**0.5


# -- The dictionary --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", toy_data.DICTIONARIES)
@settings(max_examples=10)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99))
def test_directions_have_norm_one(kind, d, half, seed):
    D = SuperpositionData(d, 2 * half, dictionary=kind, seed=seed).dictionary
    assert D.shape == (2 * half, d)
    assert_equal(D.norm(dim=-1), torch.ones(2 * half))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_an_sae_of_the_same_seed_does_not_start_at_the_truth(seed):
    data = SuperpositionData(16, 64, firing=0.1, seed=seed)
    own, other = (GatedSAE(16, 64, generator=torch.Generator().manual_seed(s)) for s in (seed, 99))
    D = data.dictionary
    near, far = (mean_correlation_coefficient(D, sae.W_dec.detach()) for sae in (own, other))
    assert near == pytest.approx(far, abs=0.05)
    assert near < 0.7


@pytest.mark.parametrize("n", [3, 8])
def test_few_directions_are_orthonormal(n):
    D = SuperpositionData(8, n, dictionary="orthogonal").dictionary
    assert_equal(D @ D.T, torch.eye(n), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n", "d"), [(9, 8), (32, 8), (256, 64)])
def test_many_directions_are_as_orthogonal_as_they_can_be(n, d):
    """The sum of squared cosines reaches its lower bound n²/d; random directions stay above it."""
    tight = SuperpositionData(d, n, dictionary="orthogonal").dictionary
    loose = SuperpositionData(d, n, dictionary="random").dictionary
    assert (tight @ tight.T).square().sum().item() == pytest.approx(n**2 / d, rel=1e-3)
    assert (loose @ loose.T).square().sum().item() > 1.05 * n**2 / d


def test_antipodal_pairs_are_opposites():
    D = SuperpositionData(8, 32, dictionary="antipodal").dictionary
    assert torch.equal(D[0::2], -D[1::2])


# -- Firing and magnitudes -------------------------------------------------------------------------


@given(st.integers(1, 60), st.floats(0.05, 1), st.floats(0, 3))
def test_zipf_sums_to_the_active_number_and_falls_with_rank(n, share, exponent):
    p = zipf(n, share * n, exponent)
    assert p.sum().item() == pytest.approx(share * n, rel=1e-4)
    assert (p <= 1).all()
    assert (p > 0).all()
    assert (p.diff() <= 0).all()
    level = (p.double() * torch.arange(1, n + 1).double() ** exponent)[p < 1]
    assert_equal(level, level[:1].expand(len(level)), rtol=1e-3, atol=0)


RARE = [0.0, 0.01, 0.2, 0.05, 0.3, 0.0, 0.02, 0.03] * 2
OFTEN = [0.0, 0.01, 0.2, 0.5, 0.9, 1.0, 0.02, 0.03] * 2
CERTAIN = [1.0] + [0.02] * 15
WAYS = [(0.0, False), (0.03, True), (0.15, False), (1.0, False)]
WAYS += [(RARE, True), (OFTEN, False), (CERTAIN, False)]


@pytest.mark.parametrize(("p", "sparse"), WAYS)
def test_each_feature_fires_with_its_probability(p, sparse):
    """Both ways of drawing who fires: cell by cell, and by the gaps between those who do."""
    data = SuperpositionData(4, 16, firing=p)
    _, f = sample(data)
    assert (data._stretch is not None) == sparse
    assert_frequencies(f > 0, torch.as_tensor(p).expand(16))


HALF_NORMAL, LOG_NORMAL = torch.pi / 2 - 1, torch.e**0.25 - 1
VARIANCES = dict(
    constant=0, uniform=1 / 3, half_normal=HALF_NORMAL, exponential=1, log_normal=LOG_NORMAL
)


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("kind", toy_data.MAGNITUDES)
def test_magnitudes_have_mean_one_and_their_variance(kind, p):
    _, f = sample(SuperpositionData(4, 8, firing=p, magnitude=kind))
    active = f[f > 0].double()
    assert active.mean().item() == pytest.approx(1, abs=0.02)
    assert active.var().item() == pytest.approx(VARIANCES[kind], rel=0.06, abs=1e-9)
    assert (f >= 0).all()
    assert set(toy_data.MAGNITUDES) == set(VARIANCES)


SIX, FEW = [0.05, 0.1, 0.2, 0.3, 0.5, 0.8], [0.02, 0.05, 0.05, 0.1, 0.1, 0.2]


@pytest.mark.parametrize(("p", "correlation"), [(SIX, 0), (FEW, 0), (0.2, 1e-6)])
def test_features_are_independent_unless_told_otherwise(p, correlation):
    _, f = sample(SuperpositionData(4, 6, firing=p, correlation=correlation))
    assert_uncorrelated(f > 0)
    assert_uncorrelated(f)


# -- Structure -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [[0.02, 0.05, 0.1, 0.3, 0.5, 0.9], [0.05] * 6])
def test_the_copula_correlates_and_keeps_every_probability(p):
    data = SuperpositionData(4, 6, firing=p, correlation=0.8, rank=2)
    _, f = sample(data)
    assert_frequencies(f > 0, p)
    observed = torch.corrcoef((f > 0).double().T)
    latent = data._loadings @ data._loadings.T  # of the Gaussians: the signs must agree
    strong = latent.fill_diagonal_(0).abs() > 0.3
    assert strong.any()
    assert ((observed * latent)[strong] > 0).all()
    assert observed.fill_diagonal_(0).abs().max() > 0.2


# Rarely firing features would be drawn by the gaps, were they independent.
TIED = pytest.mark.parametrize(("correlation", "scale"), [(0.0, 1.0), (0.6, 1.0), (0.0, 0.1)])


@TIED
def test_children_fire_only_with_their_parents_and_keep_their_probability(correlation, scale):
    parents = [-1, 0, 0, 1, 3, -1, 5]
    p = [scale * p for p in (0.5, 0.3, 0.2, 0.2, 0.1, 0.4, 0.4)]
    fires = firings(p, parents=parents, correlation=correlation)
    alone = fires & ~fires[:, parents]
    assert not alone[:, torch.tensor(parents) >= 0].any()
    assert_frequencies(fires, p)


@TIED
def test_at_most_one_of_a_group_fires_and_each_keeps_its_probability(correlation, scale):
    groups = [0, 0, 0, -1, 7, 7, -1]
    p = [scale * p for p in (0.3, 0.3, 0.4, 0.2, 0.1, 0.05, 0.5)]
    fires = firings(p, groups=groups, correlation=correlation)
    assert (fires[:, :3].sum(1) <= 1).all()
    assert (fires[:, 4:6].sum(1) <= 1).all()
    assert_frequencies(fires, p)


def test_exclusive_siblings_share_their_parents_occasions():
    fires = firings([0.4, 0.3, 0.1], parents=[-1, 0, 0], groups=[-1, 1, 1])
    assert_frequencies(fires, [0.4, 0.3, 0.1])
    assert torch.equal(fires[:, 0], fires[:, 1] | fires[:, 2])  # 0.3 + 0.1 fill the parent's 0.4


@settings(max_examples=30)
@given(st.integers(1, 50), st.floats(0, 0.5), st.integers(0, 99))
def test_x_is_the_sum_of_its_parts(rows, p, seed):
    data = SuperpositionData(4, 8, firing=p, mean=2.0, seed=seed)
    x, f = sample(data, rows, seed)
    assert_equal(x, f @ data.dictionary + data.mean)


def test_mean_and_noise_have_their_size():
    data = SuperpositionData(4, 8, mean=2.0)
    assert data.mean.norm().item() == pytest.approx(2)
    noisy, f = sample(SuperpositionData(4, 8, firing=0.3, noise=0.5, mean=torch.ones(4)))
    rest = noisy - f @ data.dictionary - 1
    assert rest.std().item() == pytest.approx(0.5, rel=0.01)
    assert rest.mean(0).abs().max() < 5 * 0.5 / ROWS**0.5


# -- Reproducibility -------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_data_whatever_the_global_seed():
    def make(global_seed, seed=5, stream=7):
        before = torch.manual_seed(global_seed).get_state()
        data = SuperpositionData(4, 8, correlation=0.3, noise=0.1, mean=1.0, seed=seed)
        batches = torch.stack(list(itertools.islice(data.batches(16, seed=stream), 3)))
        assert torch.equal(before, torch.get_rng_state())
        return data.dictionary, batches

    (D, x), (D2, x2) = make(0), make(1)
    assert torch.equal(D, D2)
    assert torch.equal(x, x2)
    assert not torch.equal(D, make(0, seed=6)[0])
    assert not torch.equal(x, make(0, stream=8)[1])
    assert not torch.equal(x[0], x[1])


@pytest.mark.cuda
def test_sampling_on_the_gpu_has_the_same_marginals():
    data = SuperpositionData(4, 8, firing=0.2, correlation=0.3, device="cuda")
    x, f = data.sample(ROWS, torch.Generator("cuda").manual_seed(0))
    assert x.is_cuda
    assert_frequencies((f > 0).cpu(), torch.full((8,), 0.2))


def test_sampling_costs_at_most_a_quarter_of_a_training_step():
    """Batch 512, d_in 64, 256 features; medians of interleaved turns in one process."""
    data = SuperpositionData(64, 256, firing=5 / 256)
    generator = torch.Generator().manual_seed(0)
    clock = []

    def batches():
        for _ in range(200):
            clock.append(time.perf_counter())
            x, _ = data.sample(512, generator)
            clock.append(time.perf_counter())
            yield x

    records = train(GatedSAE(64, 256), batches(), l1=0.1, steps=200, log_every=1000, device="cpu")
    assert [record.step for record in records] == [1, 200]
    turns = torch.tensor(clock).double().diff()[40:]
    assert turns[0::2].median() <= turns[1::2].median() / 4


# -- Scores ----------------------------------------------------------------------------------------


def perfect_sae(data, bias=-1e-4):
    """Orthogonal features make the transposed dictionary a perfect encoder, with the right bias."""
    sae = StandardSAE(data.d_in, data.n_features)
    with torch.no_grad():
        sae.W_dec.copy_(data.dictionary)
        sae.W_enc.copy_(data.dictionary.T)
        sae.b_enc.fill_(bias)
    return sae


def test_the_truth_scores_one():
    data = SuperpositionData(8, 8, dictionary="orthogonal", firing=0.2)
    assert recovery(perfect_sae(data), data) == pytest.approx((1, 1, 1, 1, 1, 1), abs=1e-3)


def test_scores_ignore_the_order_and_length_of_latents():
    data = SuperpositionData(8, 16, firing=0.2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    W = data.dictionary[order] * torch.linspace(0.5, 2, 16)[:, None]
    assert mean_max_cosine(data.dictionary, W) == pytest.approx(1, abs=1e-5)
    assert mean_correlation_coefficient(data.dictionary, W) == pytest.approx(1, abs=1e-5)


def test_mean_max_cosine_forgives_doubles_and_matching_does_not():
    D, doubled = torch.eye(4), torch.eye(4)[[0, 0, 1, 1]]
    assert mean_max_cosine(D, doubled) == pytest.approx(0.5)
    assert mean_max_cosine(doubled, D) == pytest.approx(1)
    assert mean_correlation_coefficient(doubled, D) == pytest.approx(0.5)


def test_matching_is_the_best_one_to_one_assignment():
    """Greedily 1.0 + 0.0; the best pairing takes 0.8 + 0.6."""
    D, W = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    assert mean_correlation_coefficient(D, W) == pytest.approx((0.8 + 0.6) / 2)


def test_the_opposite_of_a_feature_is_not_the_feature():
    assert mean_max_cosine(torch.eye(3), -torch.eye(3)) == pytest.approx(0)


def test_precision_and_recall_are_those_of_a_detector_with_known_errors():
    """A latent that needs a magnitude above 1 of a uniform (0, 2) misses half; one at noise fires
    where its feature does not."""
    data = SuperpositionData(4, 4, dictionary="orthogonal", firing=0.25)
    strict = recovery(perfect_sae(data, bias=-1.0), data)
    assert strict.precision == pytest.approx(1)
    assert strict.recall == pytest.approx(0.5, abs=0.03)
    assert strict.f1 == pytest.approx(2 / 3, abs=0.03)
    loose = recovery(perfect_sae(data, bias=1.0), data)  # always on
    assert loose.precision == pytest.approx(0.25, abs=0.02)
    assert loose.recall == pytest.approx(1)


def test_uniqueness_counts_features_with_a_latent_of_their_own():
    data = SuperpositionData(4, 4, dictionary="orthogonal", firing=0.25)
    sae = perfect_sae(data)
    with torch.no_grad():
        sae.W_dec[1] = sae.W_dec[0]
    assert recovery(sae, data, rows=1000).uniqueness == pytest.approx(0.75)
    wide = SimpleNamespace(W_dec=data.dictionary.repeat(2, 1), encode=lambda x: x.repeat(1, 2))
    assert recovery(wide, data, rows=1000).uniqueness == 1  # no more than there are features


def test_a_dead_sae_scores_zero_as_detector():
    data = SuperpositionData(4, 4, firing=0.25)
    assert recovery(perfect_sae(data, bias=-1e9), data, rows=1000)[3:] == (0, 0, 0)


# -- Bad input -------------------------------------------------------------------------------------

CHILD, PAIR = [-1, 0] + [-1] * 6, [-1, 0, 0] + [-1] * 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"d_in": 0}, "d_in is 0"),
        ({"n_features": -4}, "n_features is -4"),
        ({"rank": 0}, "rank is 0"),
        ({"firing": -0.1}, "firing is -0.1"),
        ({"firing": 1.1}, "firing is 1.1"),
        ({"firing": float("nan")}, "firing is nan"),
        ({"firing": [0.1, 0.2]}, "expected 1 or 8 numbers"),
        ({"magnitude": "gamma"}, "magnitude is 'gamma', expected one of"),
        ({"dictionary": "tight"}, "dictionary is 'tight', expected one of"),
        ({"dictionary": torch.ones(8, 4)}, "of unit rows"),
        ({"dictionary": torch.eye(4)}, r"\(4, 4\), expected \(8, 4\)"),
        ({"n_features": 7, "dictionary": "antipodal"}, "n_features is 7, expected an even"),
        ({"correlation": 1.0}, "correlation is 1.0"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"mean": torch.zeros(3)}, "mean is"),
        ({"mean": float("inf")}, "mean is"),
        ({"parents": [-1] * 7}, "parents is"),
        ({"parents": [8] + [-1] * 7}, "parents is"),
        ({"parents": [1, 0] + [-1] * 6}, "no cycle"),
        ({"parents": [0] + [-1] * 7}, "no cycle"),
        ({"parents": CHILD, "firing": [0.1, 0.2] + [0.1] * 6}, r"P\(feature 1 .* is 2\.0"),
        ({"groups": [0.5] * 8}, "groups is"),
        ({"groups": [0] * 7}, "groups is"),
        ({"groups": [-2] + [0] * 7}, "groups is"),
        ({"groups": [0] * 8, "firing": 0.2}, "sum of group 0 is 1.6"),
        ({"groups": PAIR, "parents": CHILD, "firing": 0.01}, "sum of group 0 is 1.01"),
        ({"groups": PAIR, "parents": CHILD, "firing": [0.1] + [0.01] * 7}, "parents of group 0 is"),
    ],
)
def test_bad_arguments_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        SuperpositionData(**(dict(d_in=4, n_features=8) | options))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda data: data.sample(0, torch.Generator()), "batch is 0"),
        (lambda data: data.sample(-1, torch.Generator()), "batch is -1"),
        (lambda data: data.sample(2.0, torch.Generator()), r"batch is 2\.0"),
        (lambda data: zipf(8, 9), "active is 9"),
        (lambda data: recovery(GatedSAE(4, 8, stack=2), data), r"\(2, 8, 4\).*one SAE, no stack"),
    ],
)
def test_bad_calls_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(SuperpositionData(4, 8))


# -- The command line ------------------------------------------------------------------------------


def test_the_command_line_writes_rows_of_its_own(tmp_path):
    toy_data.main([str(tmp_path / "a.npy"), "--rows", "12345", "--d-in", "8", "--features", "16"])
    x = np.load(tmp_path / "a.npy")
    assert (x.shape, x.dtype) == ((12345, 8), np.float32)
    batches = SuperpositionData(8, 16, firing=5 / 16, seed=0).batches(10_000, 0)
    assert torch.equal(torch.from_numpy(x), torch.cat([next(batches), next(batches)])[:12345])


def test_the_command_line_wants_a_npy_file():
    with pytest.raises(SystemExit, match="2"):
        toy_data.main(["a.txt"])
