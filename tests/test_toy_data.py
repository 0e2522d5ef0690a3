"""The toy data has the statistics it promises, and the scores know the truth when they see it."""

import io
import itertools
import re
import time
from contextlib import redirect_stderr
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_saes import assert_equal

import toy_data
from gated_sae import GatedSAE, StandardSAE, Trainer, start
from toy_data import SuperpositionData, recovery

ROWS = 100_000


def sample(data, rows=ROWS, seed=0):
    return data.sample(rows, torch.Generator(data.dictionary.device).manual_seed(seed))


def firings(p, n=None, sigmas=5, **options):
    """Who fires on many rows of a world where feature i does so with probability p[i], and that
    world. Sees to it that the shares lie within so many standard errors of p."""
    data = SuperpositionData(4, n or len(p), firing=p, **options)
    x, f = sample(data)
    assert x.device == f.device == data.dictionary.device
    p = torch.as_tensor(p).double()
    error = (p * (1 - p) / ROWS).sqrt() + 1e-6
    assert (((f > 0).double().mean(0).cpu() - p).abs() < sigmas * error).all()
    return f > 0, data


# -- The dictionary --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", toy_data.DICTIONARIES)
@settings(max_examples=10)
@given(st.integers(2, 12), st.integers(1, 16), st.integers(0, 99))
def test_directions_have_norm_one_and_antipodal_pairs_are_opposites(kind, d, half, seed):
    D = SuperpositionData(d, 2 * half, dictionary=kind, seed=seed).dictionary
    assert D.shape == (2 * half, d)
    assert_equal(D.norm(dim=-1), torch.ones(2 * half))
    assert kind != "antipodal" or torch.equal(D[0::2], -D[1::2])


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_an_sae_of_the_same_seed_does_not_start_at_the_truth(seed):
    data = SuperpositionData(16, 64, firing=0.1, seed=seed)
    own, other = (GatedSAE(16, 64, generator=torch.Generator().manual_seed(s)) for s in (seed, 99))
    near, far = (recovery(sae, data, rows=1).mcc for sae in (own, other))
    assert near == pytest.approx(far, abs=0.05)
    assert near < 0.7


@pytest.mark.parametrize(("n", "d"), [(3, 8), (8, 8), (9, 8), (32, 8), (256, 64)])
def test_directions_are_as_orthogonal_as_they_can_be(n, d):
    """Few are orthonormal. For many the sum of squared cosines reaches its lower bound n²/d; that
    of random directions stays above it."""
    worlds = (SuperpositionData(d, n, dictionary=kind) for kind in ("orthogonal", "random"))
    tight, loose = (data.dictionary @ data.dictionary.T for data in worlds)
    if n <= d:
        assert_equal(tight, torch.eye(n), atol=1e-5, rtol=0)
    least = max(n, n**2 / d)
    assert tight.square().sum().item() == pytest.approx(least, rel=1e-3)
    assert loose.square().sum().item() > 1.05 * least


# -- Firing and magnitudes -------------------------------------------------------------------------


@given(st.integers(1, 60), st.floats(0.05, 1), st.floats(0, 3))
def test_zipf_sums_to_the_active_number_and_falls_with_rank(n, share, exponent):
    p = toy_data.zipf(n, share * n, exponent)
    assert p.sum().item() == pytest.approx(share * n, rel=1e-4)
    assert ((p > 0) & (p <= 1)).all()
    assert (p.diff() <= 0).all()
    level = (p.double() * torch.arange(1, n + 1).double() ** exponent)[p < 1]
    assert_equal(level, level[:1].expand(len(level)), rtol=1e-3, atol=0)


RARE = [0.0, 0.01, 0.2, 0.05, 0.3, 0.0, 0.02, 0.03] * 2
OFTEN = [0.0, 0.01, 0.2, 0.5, 0.9, 1.0, 0.02, 0.03] * 2
WAYS = [(0.0, False), (0.03, True), (0.15, False), (1.0, False)]
WAYS += [(RARE, True), (OFTEN, False), ([1.0] + [0.02] * 15, False)]


@pytest.mark.parametrize(("p", "sparse"), WAYS)
def test_each_feature_fires_with_its_probability(p, sparse):
    """Both ways of drawing who fires: cell by cell, and by the gaps between those who do."""
    _, data = firings(p, n=16)
    assert (data._stretch is not None) == sparse
    assert torch.equal(SuperpositionData(4, 8).firing, torch.full((8,), 0.02))  # unless told


VARIANCES = dict(constant=0, uniform=1 / 3, exponential=1)
VARIANCES |= dict(half_normal=torch.pi / 2 - 1, log_normal=torch.e**0.25 - 1)


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("kind", toy_data.MAGNITUDES)
def test_magnitudes_have_mean_one_and_their_variance(kind, p):
    _, f = sample(SuperpositionData(4, 8, firing=p, magnitude=kind))
    active = f[f > 0].double()
    assert active.mean().item() == pytest.approx(1, abs=0.02)
    assert active.var().item() == pytest.approx(VARIANCES[kind], rel=0.06, abs=1e-9)
    assert (f >= 0).all()


SIX, FEW = [0.05, 0.1, 0.2, 0.3, 0.5, 0.8], [0.02, 0.05, 0.05, 0.1, 0.1, 0.2]


@pytest.mark.parametrize(("p", "correlation"), [(SIX, 0), (FEW, 0), (0.2, 1e-6)])
def test_features_are_independent_unless_told_otherwise(p, correlation):
    _, f = sample(SuperpositionData(4, 6, firing=p, correlation=correlation))
    for drawn in (f > 0, f):
        correlations = torch.corrcoef(drawn.double().T)
        assert (correlations - torch.eye(6)).abs().max() < 5 / ROWS**0.5


# -- Structure -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [[0.02, 0.05, 0.1, 0.3, 0.5, 0.9], [0.05] * 6])
def test_the_copula_correlates_and_keeps_every_probability(p):
    fires, data = firings(p, correlation=0.8, rank=2)
    observed = torch.corrcoef(fires.double().T)
    latent = data._loadings @ data._loadings.T  # of the Gaussians: the signs must agree
    strong = latent.fill_diagonal_(0).abs() > 0.3
    assert strong.any()
    assert ((observed * latent)[strong] > 0).all()
    assert observed.fill_diagonal_(0).abs().max() > 0.2


# Rarely firing features would be drawn by the gaps, were they independent.
@pytest.mark.parametrize(("correlation", "scale"), [(0.0, 1.0), (0.6, 1.0), (0.0, 0.1)])
def test_children_fire_with_their_parents_only_and_one_at_most_of_a_group(correlation, scale):
    """And each keeps its probability."""
    parents, groups = [-1, 0, 0, 1, 3, -1, 5], [0, 0, 0, -1, 7, 7, -1]
    p = [scale * p for p in (0.5, 0.3, 0.2, 0.2, 0.1, 0.4, 0.4)]
    fires, _ = firings(p, parents=parents, correlation=correlation)
    alone = fires & ~fires[:, parents]
    assert not alone[:, torch.tensor(parents) >= 0].any()
    p = [scale * p for p in (0.3, 0.3, 0.4, 0.2, 0.1, 0.05, 0.5)]
    fires, _ = firings(p, groups=groups, correlation=correlation)
    assert (fires[:, :3].sum(1) <= 1).all()
    assert (fires[:, 4:6].sum(1) <= 1).all()
    tied = dict(parents=[-1, 0, 0], groups=[-1, 1, 1], correlation=correlation)
    fires, _ = firings([scale * p for p in (0.4, 0.3, 0.1)], **tied)
    assert torch.equal(fires[:, 0], fires[:, 1] | fires[:, 2])  # 0.3 + 0.1 fill the parent's 0.4
    assert not (fires[:, 1] & fires[:, 2]).any()


@settings(max_examples=30)
@given(st.integers(1, 50), st.floats(0, 0.5), st.integers(0, 99))
def test_x_is_the_sum_of_its_parts(rows, p, seed):
    data = SuperpositionData(4, 8, firing=p, mean=2.0, seed=seed)
    x, f = sample(data, rows, seed)
    assert_equal(x, f @ data.dictionary + data.mean)
    assert data.mean.norm().item() == pytest.approx(2)


def test_noise_has_its_size():
    data = SuperpositionData(4, 8, firing=0.3, noise=0.5, mean=torch.ones(4))
    noisy, f = sample(data)
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

    D, x = make(0)
    assert_equal(make(1), (D, x), rtol=0, atol=0)
    assert not torch.equal(D, make(0, seed=6)[0])
    assert not torch.equal(x, make(0, stream=8)[1])
    assert not torch.equal(x[0], x[1])


@pytest.mark.cuda
def test_sampling_on_the_gpu_has_the_same_marginals():
    fires, _ = firings(0.2, n=8, correlation=0.3, device="cuda")
    assert fires.is_cuda


def test_sampling_costs_at_most_a_quarter_of_a_training_step():
    """Batch 512, d_in 64, 256 features; medians of interleaved turns in one process."""
    data = SuperpositionData(64, 256, firing=5 / 256)
    generator = torch.Generator().manual_seed(0)
    trainer, clock = Trainer(GatedSAE(64, 256), l1=0.1, steps=200, device="cpu"), []
    for _ in range(200):
        clock.append(time.perf_counter())
        x, _ = data.sample(512, generator)
        clock.append(time.perf_counter())
        trainer.step(x)
    turns = torch.tensor(clock, dtype=torch.float64).diff()[40:]
    assert turns[0::2].median() <= turns[1::2].median() / 4


# -- Scores ----------------------------------------------------------------------------------------


D = SuperpositionData(8, 16).dictionary
ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(0))
EYE, DOUBLED = torch.eye(4), torch.eye(4)[[0, 0, 1, 1]]
PAIRS = torch.tensor([[[1.0, 0.0], [0.8, 0.6]], [[0.8, 0.6], [0.0, 1.0]]])


@pytest.mark.parametrize(
    ("D", "W", "best", "matched"),
    [
        (D, D[ORDER] * torch.linspace(0.5, 2, 16)[:, None], 1, 1),  # order and length are ignored
        (EYE, DOUBLED, 0.5, 0.5),
        (DOUBLED, EYE, 1, 0.5),  # the best cosine forgives doubles, the matching does not
        (*PAIRS, (0.8 + 1.0) / 2, (0.8 + 0.6) / 2),  # greedily 1.0 + 0.0
        (EYE, -EYE, 0, 0),  # the opposite of a feature is not the feature
    ],
)
def test_matching_is_the_best_one_to_one_assignment(D, W, best, matched):
    data = SuperpositionData(*D.shape[::-1])
    data.dictionary = D
    sae, opposite = (SimpleNamespace(W_dec=V, encode=lambda x: x @ W.T) for V in (W, -W))
    assert recovery(sae, data, rows=1)[:2] == pytest.approx((best, matched))
    both = [recovery(each, data, rows=1, signed=False)[:3] for each in (sae, opposite)]
    assert both[0] == both[1] >= (best - 1e-6, matched - 1e-6)  # as SAELens has it


def test_scores_of_detection_are_those_of_saelens():
    """Of each latent, against the feature it points at, 0 where it never fires; then the mean."""
    sae, data = GatedSAE(8, 24), SuperpositionData(8, 16, firing=0.2)
    start(sae, data.sample(500, torch.Generator().manual_seed(0))[0])
    sae.b_gate.data[::2] -= 100  # never fires
    generator = torch.Generator().manual_seed(1)
    x, f = map(torch.cat, zip(*(data.sample(n, generator) for n in (1000, 500)), strict=True))
    for signed in (True, False):
        cosines = sae.W_dec.detach() @ data.dictionary.T
        best = (cosines if signed else cosines.abs()).argmax(1)
        scores = []
        for i, k in enumerate(best):
            fires, occurs = sae.encode(x)[:, i] > 0, f[:, k] > 0
            hits = int((fires & occurs).sum())
            precision, recall = hits / max(1, int(fires.sum())), hits / max(1, int(occurs.sum()))
            scores.append((precision, recall, 2 * precision * recall / (precision + recall or 1)))
        known = [sum(column) / 24 for column in zip(*scores, strict=True)]
        assert recovery(sae, data, rows=1500, signed=signed)[3:] == pytest.approx(known, rel=1e-5)
        assert 0 < known[2] < 0.5


def test_the_truth_scores_one_and_uniqueness_counts_features_with_a_latent_of_their_own():
    data = SuperpositionData(8, 8, dictionary="orthogonal", firing=0.25)
    sae, D = StandardSAE(8, 8), data.dictionary  # Dᵀ is a perfect encoder, with the right bias
    sae.W_dec.data[:], sae.W_enc.data[:], sae.b_enc.data[:] = D, D.T, -1e-4
    assert recovery(sae, data) == pytest.approx([1] * 6, rel=0, abs=1e-3)
    sae.W_dec.data[1] = sae.W_dec.data[0]
    assert recovery(sae, data, rows=1000).uniqueness == pytest.approx(7 / 8)
    wide = SimpleNamespace(W_dec=D.repeat(2, 1), encode=lambda x: x.repeat(1, 2))
    assert recovery(wide, data, rows=1000).uniqueness == 1  # no more than features


# -- Bad input -------------------------------------------------------------------------------------

WRONG = [("d_in", 0), ("n_features", -4), ("rank", 0), ("correlation", 1.0), ("noise", -1.0)]
WRONG += [("firing", -0.1), ("firing", 1.1), ("firing", float("nan"))]
WRONG += [("magnitude", "gamma"), ("dictionary", "tight"), ("magnitude", ["uniform"])]
ODD = float("nan"), float("inf")
WRONG += [(name, odd) for name in ("d_in", "seed", "rank") for odd in (2.0, True, "2", None, 2**70)]
WRONG += [(name, odd) for name in ("correlation", "noise") for odd in (*ODD, "2", None, True)]
WRONG += [("firing", odd) for odd in ("a", None, ["a"])]
CHILD, PAIR = [-1, 0] + [-1] * 6, [-1, 0, 0] + [-1] * 5
BAD = {  # what is said: of which arguments, each by itself
    "expected 1 or 8 numbers": [dict(firing=[0.1, 0.2])],
    "of unit rows": [dict(dictionary=torch.ones(8, 4))],
    r"\(4, 4\), expected \(8, 4\)": [dict(dictionary=torch.eye(4))],
    "n_features is 7, expected an even": [dict(n_features=7, dictionary="antipodal")],
    "mean is": [dict(mean=m) for m in (torch.zeros(3), float("inf"), [1.0], ["a"], None, {})],
    "parents is": [dict(parents=[-1] * 7), dict(parents=[8] + [-1] * 7)],
    "no cycle": [dict(parents=[1, 0] + [-1] * 6), dict(parents=[0] + [-1] * 7)],
    r"P\(feature 1 .* is 2\.0": [dict(parents=CHILD, firing=[0.1, 0.2] + [0.1] * 6)],
    "groups is": [dict(groups=g) for g in ([0.5] * 8, [0] * 7, [-2] + [0] * 7, [], "a", 3)],
    "sum of group 0 is 1.6": [dict(groups=[0] * 8, firing=0.2)],
    "sum of group 0 is 1.01": [dict(groups=PAIR, parents=CHILD, firing=0.01)],
    "parents of group 0 is": [dict(groups=PAIR, parents=CHILD, firing=[0.1] + [0.01] * 7)],
    "active is 9": [lambda data: toy_data.zipf(8, 9)],
    "exponent is": [lambda data, e=e: toy_data.zipf(5, 2, e) for e in (*ODD, 1100.0, -1.0, "a")],
    "rows is": [lambda data: recovery(GatedSAE(4, 8), data, rows=0)],
    r"\(2, 8, 4\).*one SAE, no stack": [lambda data: recovery(GatedSAE(4, 8, stack=2), data)],
}
BAD |= {f"^batch is {rows!r}, expected": [partial(sample, rows=rows)] for rows in (0, -1, 2.0)}
BAD |= {f"^{name} is {re.escape(repr(v))}, expected": [{name: v}] for name, v in WRONG}


@pytest.mark.parametrize("says", BAD)
def test_bad_arguments_and_calls_are_named(says):
    for bad in BAD[says]:
        options = dict(d_in=4, n_features=8) | (bad if isinstance(bad, dict) else {})
        with pytest.raises(ValueError, match=says):
            bad(SuperpositionData(**options))


# -- The command line ------------------------------------------------------------------------------


def test_the_command_line_writes_rows_of_its_own(tmp_path):
    toy_data.main([str(tmp_path / "a.npy"), "--rows", "12345", "--d-in", "8", "--features", "16"])
    x = np.load(tmp_path / "a.npy")
    assert (x.shape, x.dtype) == ((12345, 8), np.float32)
    batches = SuperpositionData(8, 16, firing=5 / 16, seed=0).batches(10_000, 0)
    assert torch.equal(torch.from_numpy(x), torch.cat([next(batches), next(batches)])[:12345])


REFUSED = [("a.txt", "file is 'a.txt'"), ("a.npy --d-in 0", "d_in is 0, expected")]
REFUSED += [("missing/a.npy", "No such file or directory: 'missing/a.npy.new'")]
REFUSED += [(f"a.npy --seed {2**70}", f"seed is {2**70}, expected")]
for name, n in ("--features", 4), ("--features", 0), ("--rows", 0), ("--rows", -1):
    REFUSED += [(f"a.npy {name} {n}", f"{name} is {n}, expected")]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_a_bad_command_line_is_named_and_writes_nothing(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"), redirect_stderr(io.StringIO()) as error:
        toy_data.main(arguments.split())
    assert says in error.getvalue().splitlines()[-1]
    assert not [*tmp_path.iterdir()]


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Stopped after the first of two blocks, it leaves what was there before."""
    file, real = tmp_path / "a.npy", SuperpositionData.batches
    file.write_bytes(b"mine")

    def stopped(*args):
        yield next(real(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(SuperpositionData, "batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        toy_data.main([str(file), "--rows", "20000"])
    assert file.read_bytes() == b"mine"
