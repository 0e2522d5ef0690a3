"""The claims of the discussion: what is measured of each, and what must hold of it."""

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import altair as alt
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import gated_sae
from gated_sae import SAE, GatedSAE, Moments, SigmoidGatedSAE, StandardSAE, moments
from results import language, measure
from results.measure import EVIDENCE, HIGH, LOW, WORLDS, Recipe, as_markdown, sae_with, spread


@torch.enable_grad()
def _gradient(fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    # The empty sum ties a bare step, which has no graph, to z: gradient 0 and no error.
    return torch.autograd.grad(fn(z).sum() + z[..., :0].sum(), z)[0]


def integrated_gradients(fn: Callable, z: Tensor, baseline: Tensor, steps: int) -> Tensor:
    """(z - z₀) ⊙ ∫₀¹ ∇fn(z₀ + t (z - z₀)) dt by the midpoint rule, (..., d), for z₀ = baseline.
    fn: (..., d) -> (...), row by row. Complete where fn is continuous: the sum over d tends to
    fn(z) - fn(z₀) with more steps. At a jump it falls short: JumpReLU_θ(z) and ReLU(z - θ) have one
    gradient, 1[z > θ], and so every attribution made of gradients is equal for both."""
    path = (baseline + (k + 0.5) / steps * (z - baseline) for k in range(steps))
    return (z - baseline).detach() * sum(_gradient(fn, point) for point in path) / steps


def attribution_patching(fn: Callable, z: Tensor, z_patch: Tensor) -> Tensor:
    """∇fn(z) ⊙ (z_patch - z), (..., d): every patch's effect to first order, in one backward."""
    return _gradient(fn, z) * (z_patch - z).detach()


def compute_multiple(compute, loss, ce_sae: float, ce_clean: float) -> float:
    """C(CE_sae) / C(CE_clean), where log L = a - b log C(L): the share of the compute that trains a
    model as good as the spliced one, 1 without a hit. a, b: least squares over smaller models, (n,)
    twice; a floor of the loss makes the share too large. ValueError unless the curve falls."""
    slope = np.polyfit(np.log(compute), np.log(loss), 1)[0]
    gated_sae.expect(slope < -1e-12, f"loss rises as compute^{slope:.3g}, expected it to fall")
    return (ce_sae / ce_clean) ** (1 / slope)  # C(L) = (L / eᵃ)^(1/slope), and a cancels


def between_sizes(compute, loss, ce_sae: float, ce_clean: float) -> float:
    """As `compute_multiple`, off straight lines between neighbours in log L and log C."""
    loss, compute = zip(*sorted(zip(np.log(loss), np.log(compute), strict=True)), strict=True)
    worse, clean = np.interp(np.log([ce_sae, ce_clean]), loss, compute)
    return float(np.exp(worse - clean))


unfrozen, without = {"aux": "unfrozen"}, {"aux": None}
as_it_dies = {"resample_every": None}  # or what a loss without aux kills would be revived
WIDE = (0.2, 2.4)
ABLATIONS = {
    "log penalty, a = 4": Recipe(StandardSAE, (0.06, 0.5), measure.log_penalty(4)),
    "aux unfrozen": Recipe(GatedSAE, WIDE, unfrozen),
    "without aux": Recipe(GatedSAE, HIGH, without, schedule=as_it_dies),
    "untied, without aux": Recipe(GatedSAE, HIGH, without | {"tied": False}, schedule=as_it_dies),
    "without r_mag": Recipe(GatedSAE, HIGH, prepare=lambda sae, _: sae.r_mag.requires_grad_(False)),
    "untied": Recipe(GatedSAE, HIGH, {"tied": False}),
    "sigmoid gate, without aux": Recipe(SigmoidGatedSAE, LOW, without, schedule=as_it_dies),
    "norms frozen, aux frozen": Recipe(GatedSAE, HIGH, {"penalty": "norm_frozen"}),
    "norms live, aux unfrozen": Recipe(GatedSAE, WIDE, unfrozen | {"penalty": "norm_live"}),
    "norms live, aux frozen": Recipe(GatedSAE, HIGH, {"penalty": "norm_live"}),
    "norms frozen, aux unfrozen": Recipe(GatedSAE, WIDE, unfrozen | {"penalty": "norm_frozen"}),
    "encoder drawn apart": Recipe(
        GatedSAE, HIGH, prepare=lambda sae, g: sae.W_enc.data.normal_(0, 0.1 / 32**0.5, generator=g)
    ),
    "no λ warm-up": Recipe(GatedSAE, HIGH, schedule={"l1_warmup": 0.0}),
}
TOY, LANGUAGE = "toy data", "language model"
RUNS = [*itertools.product(WORLDS[:1], EVIDENCE | ABLATIONS)]
RUNS += itertools.product(WORLDS[1:], EVIDENCE)
IN_LANGUAGE = [*EVIDENCE, "aux unfrozen", "without r_mag", "untied", "without aux"]
IN_LANGUAGE += ["untied, without aux", "sigmoid gate, without aux"]
IN_LANGUAGE += ["norms live, aux unfrozen", "norms frozen, aux frozen"]
PAIR = "one Standard (λ 0.4) and one Gated (λ 0.9) SAE a seed, plain world, float64"
SWEEP = "sweep over λ; L0 at equal FVU, and in the language model at equal CE, beside Gated's"
per_seed = partial(torch.as_tensor, dtype=torch.float64)


def largest(t: Tensor) -> Tensor:
    return t.abs().flatten(1).amax(1)


def above(bound: float, by=2) -> Callable:
    """The mean is, by two standard errors; by -2, it is not shown to be below."""
    return lambda values: (v := spread(values))["mean"] - by * v["se"] > bound


def below(bound: float) -> Callable:
    return lambda values: (v := spread(values))["mean"] + 2 * v["se"] < bound


def about(bound: float) -> Callable:
    """Within a factor of 1.5."""
    return lambda values: above(bound / 1.5)(values) and below(1.5 * bound)(values)


def near(bound: float, within: float) -> Callable:
    """Every seed's number is: exact claims hold to rounding."""
    return lambda values: len(values) > 0 and bool(((values - bound).abs() <= within).all())


def run(source, data: str, variant: str, steps: int, seeds: int, n_l1: int) -> Iterator[dict]:
    """A row for each seed and λ of one variant on one kind of data, trained as one stack."""
    recipe, shares = (EVIDENCE | ABLATIONS)[variant].at(source.size), []
    l1s = [round(l1, 4) for l1 in recipe.strengths(n_l1).tolist()]
    l1, copies = torch.tensor(l1s).expand(seeds, n_l1), (n_l1,)
    stream = partial(source.stream, copies=copies)
    held_out = list(source.held_out(copies))
    options = {"d_in": source.d_in, "lr": source.lr, "what": f"{variant}, {data}"}
    if "norms" in variant or variant in ("Gated", "aux unfrozen"):
        options["watch"] = lambda sae: shares.append(measure.radial(sae, held_out[0]))
    for at, sae, row in measure.swept(recipe, stream, l1, steps, held_out, **options):
        start = {"world": data, "variant": variant, "seed": at[0], "l1": l1s[at[1]]}
        scores = source.scores(sae, at[0]) | {"norm": sae.W_dec.norm(dim=-1).mean().item()}
        for name, values in zip(("along", "across"), zip(*shares[1:], strict=True), strict=False):
            scores[name] = sum(value[at].item() for value in values) / len(values)
        yield start | row | {name: round(score, 4) for name, score in scores.items()}


class Claims:
    """Each method with a number is a claim, its docstring, measured `on` something: S of shrinkage,
    G of the gate and its three terms, A of alternatives, D of what it means downstream. Those that
    take `data` are judged on the language model too.

    It yields names, numbers, one per seed, and what must hold of them, if anything. What stands in
    (parentheses) is judged and not shown."""

    def __init__(self, read: Callable, steps=1500, seeds=5):
        self.runs, self.models = [*read("runs"), *read("language")], read("models")
        self.smaller, self.steps, self.seeds = read("smaller"), steps, seeds
        self.toy = measure.Toy("plain", seeds)

    def stack(self, recipe: Recipe, l1: float, what: str, **options) -> SAE:
        """One for each seed, trained on the plain world."""
        l1, options = torch.full((self.seeds,), l1), options | {"what": what}
        return measure.trained(recipe, self.toy.stream, l1, self.steps, **options)

    seeded = property(lambda self: [torch.Generator().manual_seed(i) for i in range(self.seeds)])
    # Two stacks, fresh rows for them, (seeds, 5000, 32), and the moments of these with x̂.
    standard = cached_property(lambda self: self.stack(EVIDENCE["Standard"], 0.4, "S").double())
    gated = cached_property(lambda self: self.stack(EVIDENCE["Gated"], 0.9, "G").double())
    x = cached_property(lambda self: next(self.toy.stream(20_000, 5000)).double())
    m = cached_property(lambda self: moments(self.x, self.standard(self.x).detach()))
    n = cached_property(lambda self: moments(self.x, self.gated(self.x).detach()))

    def ratios(self, data: str, variant: str, *criteria, other="Gated", judge="") -> Iterator:
        """L0 at equal FVU, per seed, and of the language model at equal CE as well."""
        for by, what in {"fvu": "", "lost": ", equal CE"}.items():
            if by == "fvu" or data == LANGUAGE:
                found = measure.l0_ratios(self.runs, variant, other, data, by)
                yield f"L0 {variant} / {other}{what}", found, *(criteria if judge in what else ())

    def at_fvu(self, variant: str, key="gamma", data="plain") -> Tensor:
        """At FVU 0.2, per seed."""
        own = measure.by_seed(self.runs, data)
        found = [measure.at_fvu(rows, variant, 0.2, (key,)) for rows in own]
        return per_seed([at[1] for at in found] if all(found) else [])

    def mean(self, variant: str, key="gamma", data="plain") -> Tensor:
        return per_seed(measure.means(self.runs, variant, data, key))

    def at_end(self, variant: str, key: str, end: Callable = max, data="plain") -> Tensor:
        """A metric at the largest (or smallest) λ."""
        own = [row for row in self.runs if (row["world"], row["variant"]) == (data, variant)]
        return per_seed([row[key] for row in own if row["l1"] == end(row["l1"] for row in own)])

    def judged(self, number: str, kinds=(TOY, LANGUAGE)) -> dict:
        """A row of the table. The verdict on each kind of data is computed, never written."""
        claim = getattr(self, number)
        row = {"id": number, "claim": claim.__doc__, "setting": claim.__defaults__[0]}
        row |= {"seeds": {}, "measured": {}, "verdict": {}}
        able = (number != "D2") * [TOY] + ("data" in claim.__code__.co_varnames[:3]) * [LANGUAGE]
        for kind in (kind for kind in able if kind in kinds):
            shown, holds = {}, []
            for name, values, *criteria in claim(data=LANGUAGE) if kind == LANGUAGE else claim():
                values = per_seed(values).detach()
                holds += [bool(holds_of(values)) for holds_of in criteria]
                shown |= {name: values} if len(values) and name[0] != "(" else {}
            row["seeds"][kind] = min(map(len, shown.values()), default=0)
            row["measured"][kind] = {name: spread(values) for name, values in shown.items()}
            row["verdict"][kind] = "agrees" if all(holds) else "disagrees"
        return row

    def S1(self, on="50 random a, λ a seed"):
        """L1 shrinks: gradient descent finds max(0, a - λ/2)"""
        a, l1 = torch.stack([torch.rand(2, 50, generator=g) for g in self.seeded], 1).double()
        a, f = 4 * a - 1, torch.ones_like(a)
        for _ in range(300):  # on (a - f)² + λ f, f ≥ 0
            f = (f - 0.1 * (2 * (f - a) + l1)).clamp_min(0)
        yield "largest distance to closed form", largest(f - gated_sae.shrink(a, l1)), near(0, 1e-9)

    def S2(self, on=PAIR):
        """γ = E‖x̂‖²/E[x̂·x] is the best rescaling of x̂"""
        m, g = self.m, torch.linspace(0.5, 1.5, 100_001).double()[:, None]
        best = g[(m.x_hat_sq / g**2 - 2 * m.dot / g + m.x_sq).argmin(0), 0]
        yield "γ of Standard", m.gamma
        yield "its distance to the best of a grid", (best - m.gamma).abs(), near(0, 1e-5)

    def S3(self, on=PAIR):
        """γ follows from three logged numbers"""
        error_sq = gated_sae.squared_error(self.x, self.standard(self.x))
        logged = Moments.from_norms(self.m.x_sq, self.m.x_hat_sq, error_sq)
        yield "distance between the two γ", (logged.gamma - self.m.gamma).abs(), near(0, 1e-9)

    def S4(self, on=PAIR):
        """E[x̂·x]/E‖x‖² projects x̂ on x"""
        rest = self.standard(self.x) - self.m.factor_on_x[:, None, None] * self.x
        along = (rest * self.x).sum(-1).mean(-1) / self.m.dot
        yield "factor on x", self.m.factor_on_x
        yield "what is left along x, relative", along.abs(), near(0, 1e-9)

    def S5(self, on=PAIR):
        """the two best factors are not reciprocal; the one on x̂ is 1/γ"""
        yield "factor on x times factor on x̂", self.m.cosine_squared, below(1)
        yield "factor on x̂ times γ", self.m.factor_on_x_hat * self.m.gamma, near(1, 1e-9)

    def S6(self, on=PAIR):
        """the first preprint's formula is right at γ = 1 only; it gave 1/√3 for 1/2"""
        one, name = torch.ones(self.seeds, 1, 1).double(), "first preprint's value"
        yield f"{name} over γ, Standard", self.m.gamma_v1 / self.m.gamma, above(1)
        yield f"{name} at x = 1, x̂ = 1/2", moments(one, one / 2).gamma_v1, near(3**-0.5, 1e-9)
        yield f"{name} over γ, Gated", self.n.gamma_v1 / self.n.gamma, near(1, 1e-2)

    def S7(self, on=PAIR):
        """an unbiased SAE has a norm ratio below 1"""
        yield "γ of Gated", self.n.gamma, near(1, 0.02)
        yield "norm ratio of Gated", self.n.norm_ratio, below(0.98)

    def G1(self, on=PAIR):
        """reconstruction gives the gate no gradient: exactly 0"""
        g, x = self.gated, self.x
        untied = gated_sae.to_gated(g, tied=False)
        to_b_gate = measure.gradient(g, g.losses(x).reconstruct.sum(), "b_gate")
        to_W_gate = measure.gradient(untied, untied.losses(x).reconstruct.sum(), "W_enc")
        yield "largest absolute gradient of reconstruct on b_gate", largest(to_b_gate), near(0, 0)
        yield "the same on an untied W_gate", largest(to_W_gate), near(0, 0)

    def G2(self, on="smallest λ of the sweep; gradients: " + PAIR, data="plain"):
        """without L_aux the gradient on b_gate is never negative, and the gates close"""
        end = partial(self.at_end, end=min, data=data)
        for variant in ("without aux", "untied, without aux"):
            yield f"L0 {variant}", end(variant, "l0"), below(0.1)
            yield f"FVU {variant}", end(variant, "fvu"), above(0.9)
        yield "L0 with aux, same λ", end("Gated", "l0"), above(1)
        if data == "plain":
            wrong = sae_with(self.gated.state_dict(), aux=None)
            grad = measure.gradient(wrong, wrong.losses(self.x).total(0.9).sum(), "b_gate").amin(-1)
            yield "smallest gradient of L_incorrect on b_gate", grad, lambda v: (v >= 0).all()

    def G3(self, on=PAIR):
        """L_aux with the frozen decoder: W_dec gets exactly 0, b_dec does not"""
        aux, name = self.gated.losses(self.x).aux.sum(), "largest absolute gradient of L_aux on"
        yield f"{name} W_dec", largest(measure.gradient(self.gated, aux, "W_dec")), near(0, 0)
        b_dec = largest(measure.gradient(self.gated, aux, "b_dec"))
        yield f"{name} b_dec", b_dec, lambda values: (values > 0).all()

    def G4(self, on=PAIR):
        """two usual losses have the gradient of three terms, aux unfrozen"""
        x, sae = self.x, sae_with(self.gated.state_dict(), aux="unfrozen")
        pi_gate, pi_mag = sae.paths(x)
        f, f_gate, is_open = sae.gate(pi_gate, pi_mag), pi_gate.relu(), (pi_gate > 0).double()
        charged = (f, is_open), (f_gate, f_gate)  # a binary gate has no gradient
        usual = [gated_sae.penalised_losses(x, *pair, sae.W_dec, sae.b_dec) for pair in charged]
        two = sum(losses.total(0.9).sum() for losses in usual)
        three, names = sae.losses(x).total(0.9).sum(), sae.state_dict()
        off = [
            largest(measure.gradient(sae, two, name) - measure.gradient(sae, three, name))
            for name in names
        ]
        yield "largest distance of gradients", torch.stack(off).amax(0), near(0, 1e-9)

    def G5(self, on="largest λ of the sweep", data="plain"):
        """a sigmoid gate trained with L_incorrect alone stays alive (sparse or not: see L0)"""
        end = partial(self.at_end, "sigmoid gate, without aux", data=data)
        yield "dead latents", end("dead_fraction"), below(0.1)
        yield "L0", end("l0")
        yield "FVU", end("fvu"), below(0.5)

    def G6(self, on=SWEEP, data="plain"):
        """freezing helps, r_mag helps, untying does not"""
        yield from self.ratios(data, "aux unfrozen", above(1))
        yield from self.ratios(data, "without r_mag", above(1))
        yield from self.ratios(data, "untied", above(1, by=-2))
        for variant in ("aux unfrozen", "norms live, aux unfrozen"):
            along, across = (self.mean(variant, key, data) for key in ("along", "across"))
            yield f"of L_aux's gradient on W_dec, along the d_i, {variant}", along
            yield f"across them, in the reconstruction's, {variant}", across
        yield from self.ratios(data, "norms live, aux unfrozen", other="norms frozen, aux frozen")

    def G7(self, on=PAIR):
        """a tied Gated SAE is a JumpReLU"""
        off = gated_sae.to_jumprelu(self.gated).encode(self.x) - self.gated.encode(self.x)
        yield "largest distance of outputs", largest(off), near(0, 1e-9)

    def G8(self, on=PAIR):
        """b_mag = exp(r_mag) b_gate removes the jump"""
        sae = sae_with(self.gated.state_dict(), gated_sae.NaturalGatedSAE)
        smooth = gated_sae.as_row(sae.r_mag.exp()) * sae.paths(self.x)[0].relu()
        off = largest(sae.encode(self.x) - smooth)
        yield "largest distance to exp(r_mag) ReLU(π_gate)", off, near(0, 1e-9)

    def A1(self, on=SWEEP, data="plain"):
        """rescale & shift cures shrinkage but stays behind Gated"""
        for variant in ("rescale & shift", "rescale & shift, decoder too"):
            yield f"γ, {variant}", self.mean(variant, data=data), near(1, 0.03)
            yield from self.ratios(data, variant, above(1))

    def A2(self, on=SWEEP + ", and to rescale & shift", data="plain"):
        """without the Heaviside, y = x̂(t ⊙ f): less expressive than rescale & shift"""
        yield from self.ratios(data, "natural b_mag")
        yield from self.ratios(data, "natural b_mag", above(1), other="rescale & shift")
        yield "γ", self.mean("natural b_mag", data=data)

    def A3(self, on="sweep over λ, a = 1 / size of coefficients; γ at FVU 0.2", data="plain"):
        """log(1 + a f) in place of L1 lessens shrinkage of the Standard SAE"""
        log, standard = (self.at_fvu(v, data=data) for v in ("log penalty", "Standard"))
        yield "γ, log penalty", log
        yield "γ, Standard", standard
        yield "(their difference)", log - standard, above(0)
        yield from self.ratios(data, "log penalty", other="Standard")
        if data == "plain":
            yield "γ, log penalty, a = 4", self.at_fvu("log penalty, a = 4")
            yield from self.ratios(data, "log penalty, a = 4", other="Standard")

    def A4(self, on="trained at s = 0.1 x size, measured at s → 0; " + PAIR, data="plain"):
        """the soft cutoff trains, and becomes a JumpReLU as s falls"""
        yield from self.ratios(data, "soft cutoff", len, other="Standard")
        yield from self.ratios(data, "soft cutoff")
        yield "γ", self.mean("soft cutoff", data=data)
        yield "(FVU at the smallest λ)", self.at_end("soft cutoff", "fvu", min, data), below(0.2)
        if data == "plain":
            sae = gated_sae.to_jumprelu(self.gated)
            pi, t = sae.project(self.x) + gated_sae.as_row(sae.b_enc), -sae.threshold
            for s in (1e-1, 1e-3, 1e-5):
                off = gated_sae.soft_cutoff(pi, gated_sae.as_row(t), s) - sae.encode(self.x)
                yield f"mean distance to the JumpReLU at s = {s:g}", off.abs().mean((1, 2))
            yield "(of the last)", off.abs().mean((1, 2)), below(1e-4)

    def A5(self, on=SWEEP + "; norms at the smallest λ"):
        """decoder-norm penalty: freeze in both or neither; in one only is worse"""
        both, neither = "norms frozen, aux frozen", "norms live, aux unfrozen"
        only_aux, only_norms = "norms live, aux frozen", "norms frozen, aux unfrozen"
        for variant, *criteria in (both,), (neither,), (only_aux, below(0.5)), (only_norms,):
            yield from self.ratios("plain", variant)
            yield f"mean norm, {variant}", self.at_end(variant, "norm", min), *criteria
        for variant, other in itertools.product((only_aux, only_norms), (both, neither)):
            yield from self.ratios("plain", variant, above(1), other=other)

    def A6(self, on=SWEEP):
        """W_enc starting as W_dec transposed, and warming λ up, help"""
        for variant in ("encoder drawn apart", "no λ warm-up"):
            yield from self.ratios("plain", variant, above(1))

    def A7(self, on="x and biases times 3: " + PAIR):
        """dividing the L2 loss by E‖x‖² carries hyper-parameters over"""
        x, state = self.x, self.gated.state_dict()
        big = sae_with(state | {name: 3 * b for name, b in state.items() if name[:2] == "b_"})
        plain = self.gated.losses(x), big.losses(3 * x)
        divided = gated_sae.normalized(plain[0], x), gated_sae.normalized(plain[1], 3 * x)
        for name, (one, three), *so in ("normalised", divided, near(1, 1e-9)), ("plain", plain):
            error, sparsity = three.reconstruct / one.reconstruct, three.sparsity / one.sparsity
            yield f"error at 3 x over error at x, {name}", error, *so
            yield f"sparsity at 3 x over sparsity at x, {name}", sparsity, *so

    def A8(self, on="Gated, λ 0.6, half the gates started at -1000"):
        """resampling revives dead latents: fewer than half as many are left"""
        silenced = lambda sae, _: sae.b_gate.data[..., ::2].fill_(-1e3)  # noqa: E731
        recipe, dead = EVIDENCE["Gated"]._replace(prepare=silenced), {}
        ways = ("without resampling", None), ("resampled every tenth of the run", self.steps // 10)
        for what, every in ways:
            sae = self.stack(recipe, 0.6, what, resample_every=every and max(1, every))
            held_out = itertools.islice(self.toy.stream(20_000), 40)
            dead[what] = gated_sae.evaluate(sae, held_out).dead_fraction
            yield f"dead latents {what}", dead[what]
        left, resampled = dead.values()
        yield "(more than half of them)", resampled - left / 2, below(0)

    def A9(self, on=SWEEP, data="plain"):
        """at equal training compute (Standard 1.5 times as wide) Gated is ahead"""
        for name in WORLDS if data == "plain" else (data,):
            for what, *found in self.ratios(name, "Standard 1.5x", above(1)):
                yield f"{what}, {name}", *found

    def D1(self, on="50 classes to tell; the model, at L0 8; " + PAIR, data="plain"):
        """zero ablation inflates loss recovered, and never changes which SAE is ahead"""
        x, generators, scores = self.x, self.seeded, {}
        W = torch.stack([torch.randn(32, 50, generator=g) for g in generators]).double()
        heads = zip((x @ W).softmax(-1), generators, strict=True)  # each is labelled by its samples
        labels = torch.stack([p.multinomial(1, generator=g)[:, 0] for p, g in heads])
        ce = lambda x: cross_entropy((x @ W).mT, labels, reduction="none").mean(-1)  # noqa: E731
        of = {"clean": ce(x), "zero": ce(0 * x), "mean": ce(x.mean(1, True).expand_as(x))}
        now = {"Standard": ce(self.standard(x)), "Gated": ce(self.gated(x))}
        if data == LANGUAGE:
            of = {key: per_seed([row[key] for row in self.models]) for key in of}
            now = {kind: per_seed(measure.at_l0(self.runs, kind, 8)) for kind in now}
        for kind, a in itertools.product(now, ("zero", "mean")):
            scores[kind, a] = gated_sae.loss_recovered(now[kind], of["clean"], of[a])
            yield f"{kind}, {a} ablation", scores[kind, a]
        zero, mean = (scores["Gated", a] - scores["Standard", a] for a in ("zero", "mean"))
        yield "(changed)", (zero > 0).double() - (mean > 0).double(), near(0, 0)
        yield "(inflated)", scores["Gated", "zero"] - scores["Gated", "mean"], above(0)

    def D2(self, on="CE of the language model and six smaller ones against compute", data=LANGUAGE):
        """compute-efficiency hit, off a scaling curve: none without an SAE, smaller for Gated"""
        clean = [row["clean"] for row in self.models]
        curves = [[r for r in self.smaller if r["seed"] == row["seed"]] for row in self.models]
        embeddings = lambda r: 3 * 128 * r["d_model"]  # noqa: E731  of 256 bytes, and 128 positions
        without = lambda r: r["compute"] * (1 - embeddings(r) / r["parameters"])  # noqa: E731

        def share(ce, read_off=compute_multiple, floor=0.0, leave_out=None, spent=None):
            """Of the compute, one number a seed; off power laws of L - floor."""
            shares = []
            for rows, now, best in zip(curves, ce, clean, strict=True):
                rows = [r for r in rows if r["d_model"] != leave_out]
                compute = [spent(r) if spent else r["compute"] for r in rows]
                losses = [r["ce"] - floor for r in rows]
                shares.append(read_off(compute, losses, now - floor, best - floor))
            return per_seed(shares)

        yield "(without an SAE)", share(clean), near(1, 0)
        at = {kind: partial(measure.at_l0, self.runs, kind) for kind in ("Standard", "Gated")}
        for l0 in (5, 8, 12):
            found = {kind: share(of(l0)) for kind, of in at.items()}
            for kind, values in found.items():
                yield f"share of the compute, {kind}, L0 {l0}", values
            yield "(Gated's lead)", found["Gated"] - found["Standard"], above(0)
        for kind, of in at.items():
            ce, at_8 = of(8), f"{kind}, L0 8"
            yield f"{at_8}, read off between neighbouring sizes", share(ce, between_sizes)
            yield f"{at_8}, embeddings not counted", share(ce, spent=without)
            for floor in (0.5, 1.0):
                yield f"{at_8}, if no model gets below {floor}", share(ce, floor=floor)
            moved = [share(ce, leave_out=d) - share(ce) for d in language.SIZES]
            yield f"{at_8}, one size left out, moved at most", torch.stack(moved).abs().amax(0)

    def D3(self, on="Gated as JumpReLU, sum of f̃, 200 rows, 2000 steps"):
        """integrated gradients miss exactly the jumps"""
        sae = gated_sae.to_jumprelu(self.gated)
        pi = (sae.project(self.x[:, :200]) + gated_sae.as_row(sae.b_enc)).detach()
        theta = gated_sae.as_row(sae.threshold)
        out = lambda pi: gated_sae.jump_relu(pi, sae.threshold).sum(-1)  # noqa: E731
        attributed = integrated_gradients(out, pi, 0 * pi, steps=2000).sum(-1)
        gap = (out(pi) - out(0 * pi) - attributed).mean(-1)
        jumps = ((pi > theta) * theta).sum(-1).mean(-1)
        yield "completeness gap of IG", gap
        yield "sum of the jumps crossed", jumps
        yield "(one over the other)", gap / jumps, near(1, 0.01)

    def D4(self, on=SWEEP, data="plain"):
        """about half as many latents at equal reconstruction, and γ near 1"""
        judge = "CE" if data == LANGUAGE else ""  # of a language model the paper means its loss
        for name in WORLDS if data == "plain" else (data,):
            for what, *found in self.ratios(name, "Standard", about(2), judge=judge):
                yield f"{what}, {name}", *found
        yield "γ, Gated", self.mean("Gated", data=data), near(1, 0.02)
        yield "γ, Standard", self.mean("Standard", data=data)


CLAIMS = [name for name in vars(Claims) if name[1:].isdigit()]


# The parts of rebuild.py measure {name of a file: its rows}.
def measured_toy(steps: int, out: Path, remember, seeds=5, n_l1=5) -> dict[str, list[dict]]:
    rows = []
    for name, variant in tqdm(RUNS, TOY, disable=None):
        of = partial(run, measure.Toy(name, seeds), name, variant, min(steps, 1500), seeds, n_l1)
        rows += remember({"world": name, "variant": variant}, of)
    return {"runs": rows}


def measured_language(steps: int, out: Path, remember, seeds=3, n_l1=4) -> dict[str, list[dict]]:
    source, rows, saes = language.Model(seeds, min(steps, 1200)), [], {}
    found = {"models": remember({"of": "models"}, lambda: source.ce)}
    found |= {"smaller": remember({"of": "smaller"}, source.smaller)}
    for variant in tqdm(IN_LANGUAGE, LANGUAGE, disable=None):
        of = partial(run, source, LANGUAGE, variant, min(steps, 1000), seeds, n_l1)
        rows += remember({"variant": variant}, of)
    options = {"d_in": source.d_in, "lr": source.lr, "what": "to keep"}
    for kind, l1 in language.KEPT.items():  # for the lesson
        l1, recipe = torch.full((seeds,), l1), EVIDENCE[kind]
        stack = measure.trained(recipe, source.stream, l1, min(steps, 1000), **options)
        saes[kind] = next(measure.members(stack))
    source.keep(saes, out)
    return found | {"language": rows}


def measured_claims(steps: int, out: Path, remember) -> dict[str, list[dict]]:
    seen = Claims(partial(measure.read, folder=out), min(steps, 1500))
    return {"claims": [seen.judged(number) for number in tqdm(CLAIMS, "claims", disable=None)]}


# What is shown of them: a picture, and {place in README.md: text}.
def condensed(claimed: list[dict], most=3) -> Iterator[dict]:
    """The table of claims: verdicts, and their first numbers."""
    for row in claimed:
        line = {"": row["id"], "claim": row["claim"], TOY: "", LANGUAGE: ""}
        for kind, verdict in row["verdict"].items():
            found = [*row["measured"][kind].items()][:most]
            line[kind] = f"**{verdict}**: " + "; ".join(f"{k} {shortly(v)}" for k, v in found)
        yield line


def shortly(value: dict) -> str:
    return f"{value['mean']:.3g}" + (f" ± {value['se']:.1g}" if value["se"] else "")


def detailed(claimed: list[dict], number: str) -> Iterator[dict]:
    """All numbers of one claim."""
    (measured,) = (row["measured"] for row in claimed if row["id"] == number)
    for name in dict.fromkeys(itertools.chain(*measured.values())):
        row = {kind: shortly(found[name]) for kind, found in measured.items() if name in found}
        yield {number: name} | {kind: row.get(kind, "") for kind in measured}


def at_levels(rows: list[dict], data: str, variants, levels, keys) -> Iterator[dict]:
    """Means over seeds: L0 of each variant at levels of FVU, or of the loss; others at the last."""
    for variant in variants:
        line = {"data": data, "variant": variant}
        for by, level in levels:
            found = measure.mean_at_fvu(rows, variant, data, level, keys.values(), by)
            cells = [f"{v:.2f}" for v in found] if found else ["-"] * (1 + len(keys))
            at = f"FVU {level}" if by == "fvu" else f"{1 - level:.0%} recovered"
            line[f"L0, {at}" if len(levels) > 1 else "L0"] = cells[0]
        yield line | dict(zip(keys, cells[1:], strict=True))


def recovered(rows: list[dict]) -> list[dict]:
    """What each variant costs at one FVU, and how much of the truth it found."""
    keys = {"γ": "gamma", "MCC": "mcc", "F1": "f1"}
    of = (at_levels(rows, name, EVIDENCE, [("fvu", 0.2)], keys) for name in WORLDS)
    return [*itertools.chain(*of)]


def verdict(runs: list[dict]) -> str:
    """The sentence that the figures add up to."""

    def over(variant, by, *data):
        found = [spread(measure.l0_ratios(runs, variant, "Gated", d, by))["mean"] for d in data]
        return f"{min(found):.1f}" + (f" to {max(found):.1f}" if len(found) > 1 else "")

    def gamma(kind):
        found = [spread(measure.means(runs, kind, d))["mean"] for d in (*WORLDS, LANGUAGE)]
        return f"{min(found):.2f} to {max(found):.2f}"

    wide = "Standard 1.5x"
    return (
        f"At equal FVU, a Standard SAE has {over('Standard', 'fvu', *WORLDS)} times as many active "
        f"latents as a Gated one on three kinds of toy data ({over(wide, 'fvu', *WORLDS)} if 1.5 "
        f"times as wide, and so as costly to train); in a small language model, at equal "
        f"cross-entropy, {over('Standard', 'lost', LANGUAGE)} times "
        f"({over(wide, 'lost', LANGUAGE)}). γ is {gamma('Gated')} for Gated and "
        f"{gamma('Standard')} for Standard."
    )


def shown_toy(read) -> tuple[alt.FacetChart, dict[str, str]]:
    points = measure.means_over_seeds(read("runs"))
    lines = measure.curves(points, "fvu", FVU, legend="right").properties(width=230, height=240)
    column = alt.Column("data:N", sort=WORLDS, title=None)
    return lines.facet(column=column), {"recovered": as_markdown(recovered(read("runs")))}


def shown_language(read) -> tuple[None, dict[str, str]]:
    levels = ("fvu", 0.1), ("fvu", 0.2), ("lost", 0.2), ("lost", 0.1), ("lost", 0.05)
    of = IN_LANGUAGE, levels, {"γ": "gamma", "FVU": "fvu"}
    table = [dict([*row.items()][1:]) for row in at_levels(read("language"), LANGUAGE, *of)]
    return None, {"language": as_markdown(table), "models": as_markdown(read("models"))}


def shown_claims(read) -> tuple[alt.HConcatChart, dict[str, str]]:
    runs, claimed = [*read("runs"), *read("language")], read("claims")
    three = [row for row in runs if row["variant"] in [*EVIDENCE][:3]]
    toy = measure.means_over_seeds([row for row in three if row["world"] == "plain"])
    model = [row for row in three if row["world"] == LANGUAGE]
    ce = measure.curves(measure.means_over_seeds(model, ("l0", "ce")), "ce", CE, "byte", log=False)
    one = alt.Chart(alt.Data(values=[{"one": 1}])).mark_rule(strokeDash=[4, 4]).encode(y="one:Q")
    gamma = one + measure.curves(toy, "gamma", "γ: at 1, no bias", log=False)
    texts = {"claims": as_markdown([*condensed(claimed)]), "verdict": verdict(runs)}
    texts |= {number: as_markdown([*detailed(claimed, number)]) for number in ("G6", "D2")}
    return measure.curves(toy, "fvu", FVU) | gamma | ce, texts


FVU, CE = "FVU: variance unexplained", "CE with x̂ in it, nats per byte"
PARTS = {
    "toy": (measured_toy, shown_toy),
    "language": (measured_language, shown_language),
    "claims": (measured_claims, shown_claims),
}
