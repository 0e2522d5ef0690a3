"""Sparse superposition data with known ground truth, and the scores that need that truth.

There are more features than dimensions; on each row a few fire, each along its own direction:

    x = f D + mean + noise      f (batch, n_features), nowhere negative and mostly zero
                                D (n_features, d_in), the dictionary, with rows of norm 1

An SAE sees x alone. Here D and f are known too, so one can ask whether it found them.
"""

import os
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# -- The data: directions, magnitudes, and a world of both -----------------------------------------


def _expect(ok: bool | Tensor, name: str, came: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {came!r}, expected {expected}")


def _number(name: str, value: float, low: float, high: float = 2**31, kind=Integral) -> float:
    fits = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    _expect(fits, name, value, f"{'an int' if kind is Integral else 'a number'} in [{low}, {high}]")
    return int(value) if kind is Integral else float(value)


def _tensor(name: str, value: object, dtype: torch.dtype | None = None) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {value!r}, expected numbers") from None


def random_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """n independent uniform directions in d dimensions: (n, d)."""
    return F.normalize(torch.randn(n, d, generator=generator), dim=-1)


def orthogonal_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Directions as orthogonal as n and d allow: (n, d). For n ≤ d they are orthonormal; for n > d
    nearly a tight frame, where Σ_ij (d_i · d_j)² is least, n²/d (Benedetto & Fickus 2003). Found by
    turns: the nearest matrix of equal singular values, then unit rows again."""
    D = random_directions(n, d, generator)
    for _ in range(200):
        U, _, Vt = torch.linalg.svd(D, full_matrices=False)
        D = F.normalize(U @ Vt, dim=-1)
    return D


def antipodal_directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Features 2k and 2k + 1 are opposites: (n, d), n even. Toy models find this by themselves, for
    two that seldom fire together can share a line (Elhage et al. 2022, arXiv 2209.10652)."""
    _expect(n % 2 == 0, "n_features", n, "an even number for antipodal pairs")
    D = orthogonal_directions(n // 2, d, generator)
    return torch.stack([D, -D], dim=1).flatten(0, 1)


DICTIONARIES = dict(
    random=random_directions, orthogonal=orthogonal_directions, antipodal=antipodal_directions
)

MAGNITUDES = dict(  # each draws positive ones, of mean 1; σ of the log-normal is 1/2
    constant=lambda shape, generator, device: torch.ones(shape, device=device),
    uniform=lambda shape, **at: torch.rand(shape, **at).mul_(2),
    half_normal=lambda shape, **at: torch.randn(shape, **at).abs_().mul_((torch.pi / 2) ** 0.5),
    exponential=lambda shape, **at: torch.rand(shape, **at).neg_().log1p_().neg_(),
    log_normal=lambda shape, **at: torch.randn(shape, **at).mul_(0.5).sub_(0.125).exp_(),
)


def zipf(n_features: int, active: float, exponent: float = 1.0) -> Tensor:
    """Probabilities ∝ rank^-exponent, none above 1 and `active` in sum: (n_features,)."""
    n_features = _number("n_features", n_features, 1)
    active = _number("active", active, 1e-300, n_features, Real)
    exponent = _number("exponent", exponent, 0, 32, Real)
    weight = torch.arange(1, n_features + 1, dtype=torch.float64) ** -exponent
    p = torch.ones_like(weight)
    for i in range(n_features):  # those before i are capped at 1, the others share what is left
        p[i:] = weight[i:] * (active - i) / weight[i:].sum()
        if p[i] <= 1:
            break
        p[i] = 1
    return p.float()


class SuperpositionData:
    """A ground truth drawn from `seed`, and endless samples from it.

    dictionary   "random", "orthogonal" or "antipodal" directions, or a tensor (n_features, d_in)
    firing       P(feature fires): one number, or one per feature, say from `zipf`
    magnitude    how strongly, if it fires: a name in MAGNITUDES
    correlation  ρ in [0, 1): features without a parent fire together more, or less, often than
                 chance, through `rank` Gaussian factors that they share
    parents      per feature the index of its parent, or -1; it fires only where its parent does
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
        d_in, n_features = _number("d_in", d_in, 1), _number("n_features", n_features, 1)
        rank, seed = _number("rank", rank, 1), _number("seed", seed, 0, 2**62)
        correlation = _number("correlation", correlation, 0, 1 - 1e-9, Real)
        self.noise = _number("noise", noise, 0, 1e38, Real)
        _expect(magnitude in [*MAGNITUDES], "magnitude", magnitude, f"one of {list(MAGNITUDES)}")
        self.d_in, self.n_features, self.magnitude = d_in, n_features, magnitude
        # Not `seed` itself: an SAE drawn from it would start at the truth. (torch uses 32 bits.)
        generator = torch.Generator().manual_seed(seed + 2**31)
        D, shape = dictionary, (n_features, d_in)
        if isinstance(D, str):
            _expect(D in DICTIONARIES, "dictionary", D, f"one of {list(DICTIONARIES)}")
            D = DICTIONARIES[D](*shape, generator)
        D, mean = _tensor("dictionary", D).float(), _tensor("mean", mean, torch.float32)
        valid = D.shape == shape and ((D.norm(dim=-1) - 1).abs() < 1e-4).all()
        _expect(valid, "dictionary", tuple(D.shape), f"{shape} of unit rows")
        mean = mean if mean.ndim else mean * random_directions(1, d_in, generator)[0]
        valid = mean.shape == (d_in,) and mean.isfinite().all()
        _expect(valid, "mean", mean, f"finite and of shape ({d_in},)")
        p = _tensor("firing", firing, torch.float64)
        valid = p.shape in ((), (n_features,)) and ((p >= 0) & (p <= 1)).all()
        _expect(valid, "firing", firing, f"1 or {n_features} numbers in [0, 1]")
        p = p.expand(n_features)
        self.dictionary, self.mean = D.to(device), mean.to(device)
        self.firing = p.float().to(device)
        self._set_draws(p, parents, groups, correlation, rank, generator)
        few = p.mean() < 0.1 and p.max() < 0.99 and p.sum() > 0 and self.firing.is_cpu
        self._stretch = (-torch.log1p(-p)).cumsum(0) if few and self._independent else None

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x (batch, d_in) and the true f (batch, n_features). `generator` on the data's device."""
        batch = _number("batch", batch, 1)
        at = dict(generator=generator, device=self.dictionary.device)
        if self._stretch is None:
            f = MAGNITUDES[self.magnitude]((batch, self.n_features), **at)
            f *= self._fires(batch, at)
            x = torch.addmm(self.mean, f, self.dictionary)
        else:
            x, f = self._sparse_sample(batch, at)  # the same law, on a CPU faster where few fire
        if self.noise:
            x += self.noise * torch.randn(x.shape, **at)
        return x, f

    def batches(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Endless batches x (batch_size, d_in). The same seed gives the same ones."""
        generator = torch.Generator(self.dictionary.device).manual_seed(seed)
        while True:
            yield self.sample(batch_size, generator)[0]

    # Each feature looks at a draw u, uniform in [0, 1), and fires where it falls into an interval.
    # Independent ones have each a draw of their own, and the interval [0, p).

    def _indices(self, name: str, given: Sequence[int] | None, end: float) -> Tensor:
        index = _tensor(name, [-1] * self.n_features if given is None else given)
        valid = index.shape == (self.n_features,) and not index.is_floating_point()
        valid = valid and index.min() >= -1 and index.max() < end
        _expect(valid, name, given, f"{self.n_features} indices, or -1 for none")
        return index.long()

    def _hierarchy(self, p: Tensor, parent: Tensor) -> tuple[Tensor, int]:
        """A child fires only where its parent does, so q = P(child | parent) = P(child) / P(parent)
        takes the place of p. The depth is 1 with parents, 2 with grandparents, and so on."""
        q = torch.where(parent < 0, p, p / p[parent].clamp_min(1e-300))
        i = int(q.argmax())
        _expect(q[i] <= 1 + 1e-9, f"P(feature {i} | its parent)", q[i].item(), "at most 1")
        depth, ancestor = 0, parent
        while (ancestor >= 0).any():
            _expect(depth < len(p), "parents", parent.tolist(), "no cycle")
            depth, ancestor = depth + 1, torch.where(ancestor < 0, -1, parent[ancestor])
        return q, depth

    def _groups(self, q: Tensor, parent: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A group looks at the draw of its first member, where their intervals [low, low + q) lie
        side by side, low_i = q_1 + ... + q_(i-1): one of them fires at most."""
        draw, low = torch.arange(len(q)), torch.zeros_like(q)
        for g in group[group >= 0].unique().tolist():
            members = (group == g).nonzero().flatten()
            total, of = q[members].sum().item(), parent[members].unique().tolist()
            _expect(total <= 1 + 1e-9, f"the sum of group {g}", round(total, 9), "at most 1")
            _expect(len(of) == 1, f"the parents of group {g}", of, "one, common to all members")
            draw[members], low[members] = members[0], q[members].cumsum(0) - q[members]
        return draw, low, low + q

    def _set_draws(self, p, parents, groups, correlation, rank, generator) -> None:
        """Correlated draws are u = Φ(z) of standard normal z = √ρ l · c + √(1 - ρ) e. All share the
        `rank` factors c; each has its own l, of norm 1, and e. u < high where z < Φ⁻¹(high)."""
        n, device = self.n_features, self.firing.device
        parent = self._indices("parents", parents, n)
        q, self._depth = self._hierarchy(p, parent)
        draw, low, high = self._groups(q, parent, self._indices("groups", groups, float("inf")))
        used, draw = draw.unique(return_inverse=True)
        rho = torch.where(parent[used] < 0, correlation, 0.0)  # children are tied by their parents
        loadings = rho.sqrt()[:, None] * random_directions(len(used), rank, generator)
        if correlation:
            low, high = torch.special.ndtri(low), torch.special.ndtri(high.clamp_max(1))
        self._low, self._high = low.float().to(device), high.float().to(device)
        self._loadings = loadings.to(device) if correlation else None
        self._own = (1 - rho).sqrt().to(device)
        self._draw = draw.to(device) if len(used) < n else slice(None)
        self._parent = torch.where(parent < 0, torch.arange(n), parent).to(device)
        self._independent = not correlation and len(used) == n and self._depth == 0

    def _fires(self, batch: int, at: dict) -> Tensor:
        """Who fires: (batch, n_features), bool."""
        if self._loadings is None:
            u = torch.rand(batch, len(self._own), **at)
        else:
            common = torch.randn(batch, self._loadings.shape[1], **at) @ self._loadings.T
            u = torch.randn(batch, len(self._own), **at).mul_(self._own).add_(common)  # z
        u = u[:, self._draw]
        fires = (self._low <= u) & (u < self._high)
        for _ in range(self._depth):
            fires &= fires[:, self._parent]
        return fires

    def _sparse_sample(self, batch: int, at: dict) -> tuple[Tensor, Tensor]:
        """f D + mean, and f, at a cost per firing, not per cell. Give cell (row, i) a stretch of
        length -log(1 - p_i) on a line, and let events fall on it at rate 1: some event hits a
        stretch with probability p_i, whatever happens elsewhere."""
        end, n = self._stretch, self.n_features
        length = batch * float(end[-1])
        gaps = torch.empty(int(length + 10 * length**0.5 + 10), dtype=torch.float64)
        event = gaps.exponential_(generator=at["generator"]).cumsum_(0)
        event = event[: torch.searchsorted(event, length)]
        row = event.div(end[-1], rounding_mode="floor")
        feature = torch.searchsorted(end, event - row * end[-1], right=True).clamp_max_(n - 1)
        cells = (row.long().clamp_max_(batch - 1) * n + feature).unique_consecutive()
        m = MAGNITUDES[self.magnitude](cells.shape, **at)
        f = torch.zeros(batch * n).scatter_(0, cells, m).view(batch, n)
        starts = torch.searchsorted(cells, torch.arange(batch) * n)  # of the rows, in cells
        x = F.embedding_bag(cells % n, self.dictionary, starts, mode="sum", per_sample_weights=m)
        return x.add_(self.mean), f


# -- Scores against the truth ----------------------------------------------------------------------


class Recovery(NamedTuple):
    """How much of the truth an SAE found; 1 is all."""

    mmcs: float  # mean max cosine similarity: over features, of the best cosine with a latent
    mcc: float  # mean correlation coefficient, in the best one-to-one matching (arXiv 2505.20254)
    uniqueness: float  # share of latents (of features, if these are fewer) with a feature to itself
    precision: float  # of each latent as detector of its best-matching feature, mean over latents
    recall: float
    f1: float


@torch.no_grad()
def recovery(sae, data: SuperpositionData, rows=20_000, seed=1, signed=True) -> Recovery:
    """All scores of one SAE: of anything with W_dec and encode. Detection is measured on fresh
    rows, over all latents: one that never fires has found nothing. Cosines are signed: nothing goes
    negative, so opposites are two directions. SAELens takes absolute ones: signed=False."""
    from scipy.optimize import linear_sum_assignment

    D, W_dec = data.dictionary, sae.W_dec.detach().to(data.dictionary)
    _expect(W_dec.ndim == 2, "W_dec", tuple(W_dec.shape), "(d_sae, d_in): one SAE, no stack")
    rows, generator = _number("rows", rows, 1), torch.Generator(D.device).manual_seed(seed)
    cosines = F.normalize(D, dim=-1) @ F.normalize(W_dec, dim=-1).T
    cosines = (cosines if signed else cosines.abs()).cpu()
    pairs = linear_sum_assignment(cosines.numpy(), maximize=True)
    best = cosines.argmax(0).to(D.device)  # (d_sae,): the feature that each latent points at
    counts = torch.zeros(3, len(W_dec), device=D.device)
    for start in range(0, rows, 1000):
        x, f = data.sample(min(1000, rows - start), generator)
        detected, true = sae.encode(x.to(sae.W_dec)).to(D.device) > 0, f[:, best] > 0
        counts += torch.stack([detected & true, detected, true]).sum(1)
    hits, fires, occurs = counts
    ratios = hits / fires, hits / occurs, 2 * hits / (fires + occurs)
    detection = (float(r.nan_to_num(0).mean()) for r in ratios)
    mmcs, mcc = float(cosines.amax(1).mean()), float(cosines[pairs].mean())
    return Recovery(mmcs, mcc, len(best.unique()) / min(cosines.shape), *detection)


# -- A file of it: python toy_data.py activations.npy ----------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Write rows to a .npy file, for examples/train.py."""
    import numpy as np

    parser = ArgumentParser(description=main.__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("file", help="the .npy file to write")
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many")
    parser.add_argument("--d-in", type=int, default=64, help="dimensions of a row")
    parser.add_argument("--features", type=int, default=256, help="true ones; 5 fire on a row")
    parser.add_argument("--seed", type=int, default=0, help="of the features and of the rows")
    args = parser.parse_args(arguments)
    new = f"{args.file}.new"  # a kill leaves this one, and no file of which half is zeros
    try:
        _expect(args.file.endswith(".npy"), "file", args.file, "one that ends in .npy")
        rows, p = _number("--rows", args.rows, 1), 5 / _number("--features", args.features, 5)
        data = SuperpositionData(args.d_in, args.features, firing=p, seed=args.seed)
        out = np.lib.format.open_memmap(new, "w+", np.float32, (rows, args.d_in))
        for first, x in zip(range(0, rows, 10_000), data.batches(10_000, args.seed), strict=False):
            out[first : first + 10_000] = x[: rows - first].numpy()
        out.flush()
        os.replace(new, args.file)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
