"""The toy data has the statistics it promises, and the scores know the truth when they see it."""

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_saes import assert_equal

import toy_data
from gated_sae import GatedSAE, StandardSAE, train
from toy_data import (
    DICTIONARIES,
    MAGNITUDES,
    SuperpositionData,
    mean_correlation_coefficient,
    recovery,
    zipf,
)

ROWS = 100_000


def sample(data, rows=ROWS, seed=0):
    return data.sample(rows, torch.Generator().manual_seed(seed))


def assert_frequencies(fires, p, sigmas=5):
    """Observed shares within so many standard errors of p."""
    p = torch.as_tensor(p).double()
    error = (p * (1 - p) / len(fires)).sqrt() + 1e-6
    assert ((fires.double().mean(0) - p).abs() < sigmas * error).all()


# -- The dictionary --------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    st.sampled_from(list(DICTIONARIES)), st.integers(2, 12), st.integers(1, 12), st.integers(0, 99)
)
def test_directions_have_norm_one(kind, d, half, seed):
    D = SuperpositionData(d, 2 * half, dictionary=kind, seed=seed).dictionary
    assert D.shape == (2 * half, d)
    assert_equal(D.norm(dim=-1), torch.ones(2 * half))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_an_sae_of_the_same_seed_does_not_start_at_the_truth(seed):
    data = SuperpositionData(16, 64, firing=0.1, seed=seed)
    own, other = (GatedSAE(16, 64, generator=torch.Generator().manual_seed(s)) for s in (seed, 99))
    near, far = (
        mean_correlation_coefficient(data.dictionary, sae.W_dec.detach()) for sae in (own, other)
    )
    assert near == pytest.approx(far, abs=0.05)
    assert near < 0.7


@pytest.mark.parametrize(("n", "d"), [(3, 8), (8, 8)])
def test_few_directions_are_orthonormal(n, d):
    D = SuperpositionData(d, n, dictionary="orthogonal").dictionary
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
    free = p[p < 1].double()
    rank = torch.arange(1, n + 1)[p < 1].double()
    if len(free) > 1:
        assert_equal(
            free * rank**exponent, (free * rank**exponent)[:1].expand(len(free)), rtol=1e-3, atol=0
        )


RARE = [0.0, 0.01, 0.2, 0.05, 0.3, 0.0, 0.02, 0.03]
OFTEN = [0.0, 0.01, 0.2, 0.5, 0.9, 1.0, 0.02, 0.03]


@pytest.mark.parametrize(
    ("p", "sparse"), [(0.0, False), (0.03, True), (1.0, False), (RARE, True), (OFTEN, False)]
)
def test_each_feature_fires_with_its_probability(p, sparse):
    """Both ways of drawing who fires: cell by cell, and by the gaps between those who do."""
    data = SuperpositionData(4, 8, firing=p)
    _, f = sample(data)
    assert data._sparse == sparse
    assert_frequencies(f > 0, torch.as_tensor(p).expand(8))


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize(
    ("kind", "variance"),
    [
        ("constant", 0.0),
        ("uniform", 1 / 3),
        ("half_normal", torch.pi / 2 - 1),
        ("exponential", 1.0),
        ("log_normal", torch.e**0.25 - 1),
    ],
)
def test_magnitudes_have_mean_one_and_their_variance(kind, variance, p):
    _, f = sample(SuperpositionData(4, 8, firing=p, magnitude=kind))
    active = f[f > 0].double()
    assert active.mean().item() == pytest.approx(1, abs=0.02)
    assert active.var().item() == pytest.approx(variance, rel=0.06, abs=1e-9)
    assert (f >= 0).all()
    assert set(MAGNITUDES) == {"constant", "uniform", "half_normal", "exponential", "log_normal"}


@pytest.mark.parametrize("p", [[0.05, 0.1, 0.2, 0.3, 0.5, 0.8], [0.02, 0.05, 0.05, 0.1, 0.1, 0.2]])
def test_features_are_independent_unless_told_otherwise(p):
    _, f = sample(SuperpositionData(4, 6, firing=p))
    correlations = torch.corrcoef((f > 0).double().T)
    assert (correlations - torch.eye(6)).abs().max() < 5 / ROWS**0.5
    assert torch.corrcoef(f.double().T).fill_diagonal_(0).abs().max() < 5 / ROWS**0.5


# -- Structure -------------------------------------------------------------------------------------


def test_the_copula_correlates_and_keeps_every_probability():
    p = torch.tensor([0.02, 0.05, 0.1, 0.3, 0.5, 0.9])
    data = SuperpositionData(4, 6, firing=p, correlation=0.8, rank=2)
    _, f = sample(data)
    assert_frequencies(f > 0, p)
    observed = torch.corrcoef((f > 0).double().T)
    latent = data._loadings @ data._loadings.T  # of the Gaussians: the signs must agree
    pairs = torch.triu_indices(6, 6, 1)
    strong = latent[*pairs].abs() > 0.3
    assert strong.any()
    assert ((observed[*pairs] * latent[*pairs])[strong] > 0).all()
    assert observed[*pairs].abs().max() > 0.2


def test_correlation_zero_is_independence_in_law():
    _, f = sample(SuperpositionData(4, 6, firing=0.2, correlation=1e-6))
    assert (torch.corrcoef((f > 0).double().T) - torch.eye(6)).abs().max() < 5 / ROWS**0.5


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_children_fire_only_with_their_parents_and_keep_their_probability(correlation):
    parents = [-1, 0, 0, 1, 3, -1, 5]
    p = [0.5, 0.3, 0.2, 0.2, 0.1, 0.4, 0.4]
    _, f = sample(SuperpositionData(4, 7, firing=p, parents=parents, correlation=correlation))
    fires = f > 0
    for child, parent in enumerate(parents):
        if parent >= 0:
            assert not (fires[:, child] & ~fires[:, parent]).any()
    assert_frequencies(fires, p)


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_at_most_one_of_a_group_fires_and_each_keeps_its_probability(correlation):
    groups = [0, 0, 0, -1, 7, 7, -1]
    p = [0.3, 0.3, 0.4, 0.2, 0.1, 0.05, 0.5]
    _, f = sample(SuperpositionData(4, 7, firing=p, groups=groups, correlation=correlation))
    fires = f > 0
    assert (fires[:, :3].sum(1) <= 1).all()
    assert (fires[:, 4:6].sum(1) <= 1).all()
    assert_frequencies(fires, p)


def test_exclusive_siblings_share_their_parents_occasions():
    _, f = sample(
        SuperpositionData(4, 3, firing=[0.4, 0.3, 0.1], parents=[-1, 0, 0], groups=[-1, 1, 1])
    )
    fires = f > 0
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
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
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
    x, _ = data.sample(512, generator)
    options = dict(l1=0.1, steps=10**6, log_every=10**6, device="cpu")
    pulled = [0.0]

    def one_batch_over_and_over():
        while True:
            pulled.append(time.perf_counter())
            yield x

    run = train(GatedSAE(64, 256), itertools.islice(one_batch_over_and_over(), 200), **options)
    samplings = []
    with pytest.raises(ValueError, match="ended after 200"):
        list(run)
    steps = torch.tensor(pulled[20:]).double().diff()
    for _ in range(200):
        start = time.perf_counter()
        data.sample(512, generator)
        samplings.append(time.perf_counter() - start)
    assert torch.tensor(samplings).median() <= steps.median() / 4


# -- Scores ----------------------------------------------------------------------------------------


def perfect_sae(data):
    """Orthogonal features make the transposed dictionary a perfect encoder."""
    sae = StandardSAE(data.d_in, data.n_features)
    with torch.no_grad():
        sae.W_dec.copy_(data.dictionary)
        sae.W_enc.copy_(data.dictionary.T)
        sae.b_enc.fill_(-1e-4)
    return sae


def test_the_truth_scores_one():
    data = SuperpositionData(8, 8, dictionary="orthogonal", firing=0.2)
    assert recovery(perfect_sae(data), data) == pytest.approx((1, 1, 1, 1, 1, 1), abs=1e-3)


def test_scores_ignore_the_order_and_length_of_latents():
    data = SuperpositionData(8, 16, firing=0.2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    W = data.dictionary[order] * torch.linspace(0.5, 2, 16)[:, None]
    assert toy_data.mean_max_cosine(data.dictionary, W) == pytest.approx(1, abs=1e-5)
    assert toy_data.mean_correlation_coefficient(data.dictionary, W) == pytest.approx(1, abs=1e-5)


def test_mean_max_cosine_forgives_doubles_and_matching_does_not():
    D = torch.eye(4)
    doubled = torch.eye(4)[[0, 0, 1, 1]]
    assert toy_data.mean_max_cosine(D, doubled) == pytest.approx(0.5)
    assert toy_data.mean_max_cosine(doubled, D) == pytest.approx(1)
    assert toy_data.mean_correlation_coefficient(doubled, D) == pytest.approx(0.5)


def test_matching_is_the_best_one_to_one_assignment():
    """Greedily 1.0 + 0.0; the best pairing takes 0.8 + 0.6."""
    D = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    W = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    best = max((D[0] @ W[0] + D[1] @ W[1]) / 2, (D[0] @ W[1] + D[1] @ W[0]) / 2)
    assert toy_data.mean_correlation_coefficient(D, W) == pytest.approx(best.item())


def test_the_opposite_of_a_feature_is_not_the_feature():
    assert toy_data.mean_max_cosine(torch.eye(3), -torch.eye(3)) == pytest.approx(0)


def test_precision_and_recall_are_those_of_a_detector_with_known_errors():
    """A latent that needs a magnitude above 1 of a uniform (0, 2) misses half; one at noise fires
    where its feature does not."""
    data = SuperpositionData(4, 4, dictionary="orthogonal", firing=0.25)
    sae = perfect_sae(data)
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)
    strict = recovery(sae, data)
    assert strict.precision == pytest.approx(1)
    assert strict.recall == pytest.approx(0.5, abs=0.03)
    assert strict.f1 == pytest.approx(2 / 3, abs=0.03)
    with torch.no_grad():
        sae.b_enc.fill_(1.0)  # always on
    loose = recovery(sae, data)
    assert loose.precision == pytest.approx(0.25, abs=0.02)
    assert loose.recall == pytest.approx(1)


def test_uniqueness_counts_features_with_a_latent_of_their_own():
    data = SuperpositionData(4, 4, dictionary="orthogonal", firing=0.25)
    sae = perfect_sae(data)
    with torch.no_grad():
        sae.W_dec[1] = sae.W_dec[0]
    assert recovery(sae, data, rows=1000).uniqueness == pytest.approx(0.75)


def test_a_dead_sae_scores_zero_as_detector():
    data = SuperpositionData(4, 4, firing=0.25)
    sae = perfect_sae(data)
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
    assert recovery(sae, data, rows=1000)[3:] == (0, 0, 0)


# -- Bad input -------------------------------------------------------------------------------------


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
        ({"dictionary": torch.ones(4, 8)}, r"\(4, 8\), expected \(8, 4\)"),
        ({"n_features": 7, "dictionary": "antipodal"}, "n_features is 7, expected an even"),
        ({"correlation": 1.0}, "correlation is 1.0"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"mean": torch.zeros(3)}, "mean is"),
        ({"mean": float("inf")}, "mean is"),
        ({"parents": [-1] * 7}, "parents is"),
        ({"parents": [8] + [-1] * 7}, "parents is"),
        ({"parents": [1, 0] + [-1] * 6}, "no cycle"),
        ({"parents": [0] + [-1] * 7}, "no cycle"),
        ({"parents": [-1, 0] + [-1] * 6, "firing": [0.1, 0.2] + [0.1] * 6}, "feature 1 fires more"),
        ({"groups": [0.5] * 8}, "groups is"),
        ({"groups": [0] * 8, "firing": 0.2}, "group 0 has 1.6 in sum"),
        (
            {"groups": [-1, 0, 0] + [-1] * 5, "parents": [-1, 0] + [-1] * 6, "firing": 0.01},
            "group 0 has 1.01 in sum",
        ),
        (
            {
                "groups": [-1, 0, 0] + [-1] * 5,
                "parents": [-1, 0] + [-1] * 6,
                "firing": [0.1] + [0.01] * 7,
            },
            "group 0 has parents",
        ),
    ],
)
def test_bad_arguments_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        SuperpositionData(**(dict(d_in=4, n_features=8) | options))


@pytest.mark.parametrize("batch", [0, -1, 2.0])
def test_bad_batch_sizes_are_named(batch):
    with pytest.raises(ValueError, match=f"batch is {batch}"):
        SuperpositionData(4, 8).sample(batch, torch.Generator())


def test_zipf_refuses_the_impossible():
    with pytest.raises(ValueError, match="active is 9"):
        zipf(8, 9)


def test_a_stack_is_scored_one_by_one():
    with pytest.raises(ValueError, match="one SAE, no stack"):
        recovery(GatedSAE(4, 8, stack=2), SuperpositionData(4, 8))
