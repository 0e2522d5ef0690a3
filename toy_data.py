"""Sparse superposition data with known ground truth, and the scores that need that truth.

There are more features than dimensions. On each row a few of them fire, each along a direction of
its own:

    x = f D + mean + noise      f (batch, n_features), nowhere negative and mostly zero
                                D (n_features, d_in), the dictionary, with rows of norm 1

An SAE sees x alone. Here D and f are known too, so one can ask whether it found them.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# -- The dictionary --------------------------------------------------------------------------------


def random_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """n independent uniform directions in d dimensions: (n, d)."""
    return F.normalize(torch.randn(n, d, generator=generator), dim=-1)


def orthogonal_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Directions as orthogonal as n and d allow: (n, d).

    For n ≤ d they are orthonormal. For n > d they approach a tight frame, where Σ_ij (d_i · d_j)²
    is as small as it can be, n²/d (Benedetto & Fickus 2003). Found by turns: the nearest matrix of
    equal singular values, then unit rows again.
    """
    D = random_directions(n, d, generator)
    for _ in range(200):
        U, _, Vt = torch.linalg.svd(D, full_matrices=False)
        D = F.normalize(U @ Vt, dim=-1)
    return D


def antipodal_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Features 2k and 2k + 1 are opposites: (n, d), n even.

    Toy models find this by themselves (Elhage et al. 2022, arXiv 2209.10652): two features that
    seldom fire together can share a line.
    """
    if n % 2:
        raise ValueError(f"n_features is {n}, expected an even number for antipodal pairs")
    D = orthogonal_directions(n // 2, d, generator)
    return torch.stack([D, -D], dim=1).flatten(0, 1)


DICTIONARIES = dict(
    random=random_directions, orthogonal=orthogonal_directions, antipodal=antipodal_directions
)

# -- Firing and magnitudes -------------------------------------------------------------------------


def zipf(n_features: int, active: float, exponent: float = 1.0) -> Tensor:
    """Probabilities ∝ rank^-exponent, none above 1 and `active` in sum: (n_features,)."""
    if not 0 < active <= n_features:
        raise ValueError(f"active is {active}, expected above 0 and at most {n_features}")
    weight = torch.arange(1, n_features + 1, dtype=torch.float64) ** -exponent
    p = torch.ones_like(weight)
    certain = 0  # so many of the first ranks are capped at 1; the others share what is left
    while certain < active:
        p[certain:] = weight[certain:] * (active - certain) / weight[certain:].sum()
        if p[certain] <= 1:
            break
        certain += int((p[certain:] > 1).sum())
        p[:certain] = 1
    return p.float()


# Each draws positive magnitudes of mean 1. σ of the log-normal is 1/2.
MAGNITUDES = dict(
    constant=lambda shape, generator, device: torch.ones(shape, device=device),
    uniform=lambda shape, **at: torch.rand(shape, **at).mul_(2),
    half_normal=lambda shape, **at: torch.randn(shape, **at).abs_().mul_((torch.pi / 2) ** 0.5),
    exponential=lambda shape, **at: torch.rand(shape, **at).neg_().log1p_().neg_(),
    log_normal=lambda shape, **at: torch.randn(shape, **at).mul_(0.5).sub_(0.125).exp_(),
)

# -- The generator ---------------------------------------------------------------------------------


class SuperpositionData:
    """A ground truth drawn from `seed`, and endless samples from it.

    dictionary   "random", "orthogonal" or "antipodal" directions, or a tensor (n_features, d_in)
    firing       P(feature fires): one number, or one per feature, say from `zipf`
    magnitude    how strongly, if it fires: "constant", "uniform", "half_normal", "exponential",
                 "log_normal", each of mean 1
    correlation  ρ in [0, 1): features fire together more, or less, often than chance, through
                 `rank` Gaussian factors that they share; each P(feature fires) stays as given
    parents      per feature the index of its parent, or -1; it fires only where its parent does.
                 Correlation then acts on the roots alone
    groups       per feature the number of its group, or -1; one at most of a group fires on a row
    noise        standard deviation of Gaussian noise in each dimension
    mean         a vector (d_in,), or the length of a random one

    `firing` is the overall probability, for a child and a member of a group too. What no data can
    satisfy (a child likelier than its parent, a group likelier than 1) raises ValueError.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        *,
        dictionary: str | Tensor = "random",
        firing: float | Sequence[float] | Tensor = 0.02,
        magnitude: str = "uniform",
        correlation: float = 0.0,
        rank: int = 8,
        parents: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        noise: float = 0.0,
        mean: float | Tensor = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        for name, size in dict(d_in=d_in, n_features=n_features, rank=rank).items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}, expected a positive integer")
        if magnitude not in MAGNITUDES:
            raise ValueError(f"magnitude is {magnitude!r}, expected one of {list(MAGNITUDES)}")
        if not 0 <= correlation < 1:
            raise ValueError(f"correlation is {correlation}, expected a number in [0, 1)")
        if not 0 <= noise < float("inf"):
            raise ValueError(f"noise is {noise}, expected a finite number ≥ 0")
        self.d_in, self.n_features, self.noise, self.magnitude = d_in, n_features, noise, magnitude
        # Not `seed` itself: from the same draws an SAE of that seed would start at the truth. (Of a
        # seed, torch uses 32 bits.)
        generator = torch.Generator().manual_seed(seed + 2**31)
        D = self._dictionary(dictionary, generator)
        if not isinstance(mean, Tensor):
            mean = mean * random_directions(1, d_in, generator)[0]
        if mean.shape != (d_in,) or not mean.isfinite().all():
            raise ValueError(f"mean is {mean}, expected finite and of shape ({d_in},)")

        p = torch.as_tensor(firing, dtype=torch.float64)
        if p.shape not in ((), (n_features,)) or not ((p >= 0) & (p <= 1)).all():
            raise ValueError(f"firing is {firing}, expected 1 or {n_features} numbers in [0, 1]")
        p = p.expand(n_features)
        parent = self._indices("parents", parents, n_features - 1)
        group = self._indices("groups", groups)
        q = torch.where(parent < 0, p, p / p[parent].clamp_min(1e-300))  # P(feature | parent)
        if (q > 1 + 1e-9).any():
            i = int(q.argmax())
            raise ValueError(f"feature {i} fires more often than its parent: {p[i]}, expected less")

        # A feature fires where a uniform draw falls into its interval [low, low + q) and its parent
        # fires. The members of a group share one draw, in which their intervals lie side by side.
        draw, low = torch.arange(n_features), torch.zeros_like(q)
        for g in group[group >= 0].unique():
            members = (group == g).nonzero().flatten()
            if q[members].sum() > 1 + 1e-9:
                raise ValueError(f"group {g} has {q[members].sum():.3g} in sum, expected at most 1")
            if len(parent[members].unique()) > 1:
                raise ValueError(f"group {g} has parents {parent[members].unique()}, expected one")
            draw[members], low[members] = members[0], q[members].cumsum(0) - q[members]
        used, draw = draw.unique(return_inverse=True)
        high = low + q
        common = torch.where(parent[used] < 0, correlation, 0.0)
        loadings = random_directions(len(used), rank, generator) * common.sqrt()[:, None]
        if correlation:  # the draws are standard normal instead, so the intervals move to quantiles
            low, high = torch.special.ndtri(low), torch.special.ndtri(high.clamp_max(1))

        self.dictionary, self.mean, self.firing = (
            D.to(device),
            mean.to(device),
            p.float().to(device),
        )
        self._low, self._high = low.float().to(device), high.float().to(device)
        self._draw = None if len(used) == n_features else draw.to(device)
        self._loadings = loadings.to(device) if correlation else None
        self._own = (1 - common).sqrt().to(device)
        self._parent, self._levels = parent.to(device), self._by_depth(parent.to(device))
        independent = not correlation and self._draw is None and not self._levels
        on_cpu = self.dictionary.device.type == "cpu"  # elsewhere dense is quick, and never waits
        self._sparse = independent and on_cpu and p.mean() < 0.1 and p.max() < 0.99 and p.sum() > 0
        self._stretch = (-torch.log1p(-p)).cumsum(0) if self._sparse else None

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x (batch, d_in) and the true f (batch, n_features). `generator` on the data's device."""
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch is {batch!r}, expected a positive integer")
        at = dict(generator=generator, device=self.dictionary.device)
        magnitude = MAGNITUDES[self.magnitude]
        if self._sparse:
            cells, row_starts = self._firing_cells(batch, generator)
            m = magnitude(cells.shape, **at)
            f = torch.zeros(batch, self.n_features)
            f.view(-1)[cells] = m
            feature = cells % self.n_features
            x = F.embedding_bag(
                feature, self.dictionary, row_starts, mode="sum", per_sample_weights=m
            )
            x += self.mean
        else:
            f = magnitude((batch, self.n_features), **at).mul_(self._fires(batch, at))
            x = torch.addmm(self.mean, f, self.dictionary)
        if self.noise:
            x += self.noise * torch.randn(x.shape, **at)
        return x, f

    def _fires(self, batch: int, at: dict) -> Tensor:
        """Who fires: (batch, n_features), bool."""
        if self._loadings is None:
            draw = torch.rand(batch, len(self._own), **at)
        else:
            common = torch.randn(batch, self._loadings.shape[1], **at) @ self._loadings.T
            draw = torch.randn(batch, len(self._own), **at).mul_(self._own).add_(common)
        if self._draw is not None:
            draw = draw[:, self._draw]
        fires = (self._low <= draw) & (draw < self._high)
        for level in self._levels:
            fires[:, level] &= fires[:, self._parent[level]]
        return fires

    def _firing_cells(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same for independent features at a cost per firing, not per feature and row: the flat
        indices of the cells of (batch, n_features) that fire, and where each row's begin.

        Give cell (row, i) a stretch of length -log(1 - p_i) on a line, and let events fall on it at
        rate 1: some event hits a stretch with probability p_i, whatever happens elsewhere.
        """
        length = batch * float(self._stretch[-1])
        gaps = torch.empty(int(length + 10 * length**0.5 + 10), dtype=torch.float64)
        event = gaps.exponential_(generator=generator).cumsum_(0)
        event = event[: torch.searchsorted(event, length)]
        row = event.div(self._stretch[-1], rounding_mode="floor")
        feature = torch.searchsorted(self._stretch, event - row * self._stretch[-1], right=True)
        row, feature = row.long().clamp_max_(batch - 1), feature.clamp_max_(self.n_features - 1)
        cells = (row * self.n_features + feature).unique_consecutive()
        return cells, torch.searchsorted(cells, torch.arange(batch) * self.n_features)

    def batches(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Endless batches x (batch_size, d_in). The same seed gives the same ones."""
        generator = torch.Generator(self.dictionary.device).manual_seed(seed)
        while True:
            yield self.sample(batch_size, generator)[0]

    def _dictionary(self, given: str | Tensor, generator: torch.Generator) -> Tensor:
        if isinstance(given, str):
            if given not in DICTIONARIES:
                raise ValueError(f"dictionary is {given!r}, expected one of {list(DICTIONARIES)}")
            return DICTIONARIES[given](self.n_features, self.d_in, generator)
        shape = (self.n_features, self.d_in)
        if given.shape != shape or not ((given.norm(dim=-1) - 1).abs() < 1e-4).all():
            raise ValueError(f"dictionary is {tuple(given.shape)}, expected {shape} of unit rows")
        return given.float()

    def _indices(self, name: str, given: Sequence[int] | None, most: int | None = None) -> Tensor:
        index = torch.as_tensor([-1] * self.n_features if given is None else given)
        most = index.max() if most is None else most
        integers = index.shape == (self.n_features,) and not index.is_floating_point()
        if not integers or not ((index >= -1) & (index <= most)).all():
            raise ValueError(
                f"{name} is {given}, expected {self.n_features} indices, or -1 for none"
            )
        return index.long()

    def _by_depth(self, parent: Tensor) -> list[Tensor]:
        """The features with a parent, those with a grandparent, and so on: who fires is settled in
        this order."""
        levels, ancestor = [], parent
        while (ancestor >= 0).any():
            if len(levels) == self.n_features:
                raise ValueError(f"parents is {parent.tolist()}, expected no cycle")
            levels.append((ancestor >= 0).nonzero().flatten())
            ancestor = torch.where(ancestor >= 0, parent[ancestor], -1)
        return levels


# -- Scores against the truth ----------------------------------------------------------------------
# Cosines are signed. Neither features nor latents go negative, so the opposite of a direction is
# another feature, not the same one.


class Recovery(NamedTuple):
    """How much of the truth an SAE found; 1 is all."""

    mmcs: float  # mean max cosine similarity: over features, of the best cosine with a latent
    mcc: float  # mean correlation coefficient: mean cosine in the best one-to-one matching
    uniqueness: float  # share of latents (of features, if these are fewer) with a feature to itself
    precision: float  # of each latent as detector of its best-matching feature, mean over latents
    recall: float
    f1: float


def mean_max_cosine(D: Tensor, W_dec: Tensor) -> float:
    """Mean over rows of D (n_features, d_in) of the best cosine with a row of W_dec."""
    return float(_cosines(D, W_dec).amax(1).mean())


def mean_correlation_coefficient(D: Tensor, W_dec: Tensor) -> float:
    """Mean cosine of the min(n_features, d_sae) pairs of the best matching (arXiv 2505.20254)."""
    from scipy.optimize import linear_sum_assignment

    cosines = _cosines(D, W_dec).cpu().numpy()
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())


@torch.no_grad()
def recovery(sae, data: SuperpositionData, rows: int = 20_000, seed: int = 1) -> Recovery:
    """All scores of one SAE, that is of anything with W_dec and encode.

    Detection is measured on `rows` fresh rows, over the latents that fire and whose feature does.
    """
    D, W_dec = data.dictionary, sae.W_dec.detach()
    if W_dec.ndim != 2:
        raise ValueError(
            f"W_dec is {tuple(W_dec.shape)}, expected (d_sae, d_in): one SAE, no stack"
        )
    best = _cosines(D, W_dec).argmax(0)  # (d_sae,): the feature that each latent points at
    hits, fires, occurs = (torch.zeros(len(W_dec), device=D.device) for _ in range(3))
    generator = torch.Generator(D.device).manual_seed(seed)
    for start in range(0, rows, 1000):
        x, f = data.sample(min(1000, rows - start), generator)
        detected = sae.encode(x.to(W_dec)).to(D.device) > 0
        true = f[:, best] > 0
        hits += (detected & true).sum(0)
        fires += detected.sum(0)
        occurs += true.sum(0)
    seen = (fires > 0) & (occurs > 0)
    precision, recall, f1 = (
        float((a[seen] / b[seen]).mean()) if seen.any() else 0.0
        for a, b in ((hits, fires), (hits, occurs), (2 * hits, fires + occurs))
    )
    return Recovery(
        mmcs=mean_max_cosine(D, W_dec),
        mcc=mean_correlation_coefficient(D, W_dec),
        uniqueness=len(best.unique()) / min(len(W_dec), len(D)),
        precision=precision,
        recall=recall,
        f1=f1,
    )


def _cosines(D: Tensor, W_dec: Tensor) -> Tensor:
    return F.normalize(D.float(), dim=-1) @ F.normalize(W_dec.to(D.device).float(), dim=-1).T


# -- A file of it: python toy_data.py activations.npy ----------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Write rows to a .npy file, for the command line of gated_sae.py."""
    import numpy as np

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", help="the .npy file to write")
    for name, default, text in (
        ("--rows", 1_000_000, "how many"),
        ("--d-in", 64, "dimensions of a row"),
        ("--features", 256, "true features, of which 5 fire on a row"),
        ("--seed", 0, "of the features and of the rows"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text}; default: {default}")
    args = parser.parse_args(arguments)
    if not args.file.endswith(".npy"):
        parser.error(f"file is {args.file!r}, expected one that ends in .npy")
    firing = 5 / args.features
    data = SuperpositionData(args.d_in, args.features, firing=firing, seed=args.seed)
    shape = (args.rows, args.d_in)
    out = np.lib.format.open_memmap(args.file, "w+", dtype=np.float32, shape=shape)
    batches = data.batches(10_000, args.seed)
    for first, x in zip(range(0, args.rows, 10_000), batches, strict=False):
        out[first : first + 10_000] = x[: args.rows - first].numpy()
    out.flush()


if __name__ == "__main__":
    main()
