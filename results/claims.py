"""The claims of the discussion: what is measured of each, and what must hold of it."""

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import altair as alt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import gated_sae
from gated_sae import SAE, GatedSAE, Moments, StandardSAE, moments
from results import attribution, measure
from results.measure import EVIDENCE, HIGH, LOW, WORLDS, Recipe, gradient, sae_with, spread, world
from toy_data import recovery


def drawn_apart(sae: SAE, generator: torch.Generator) -> None:
    sae.W_enc.data = type(sae)(**sae.config, generator=generator).W_enc.data


unfrozen = {"aux": "unfrozen"}
as_it_dies = {"resample_every": None}  # or what a loss without aux kills would be revived
gated_sae.PENALTIES["log 4"] = lambda f, norm: (4 * f).log1p()
ABLATIONS = {
    "log penalty, a = 4": Recipe(StandardSAE, (0.06, 0.5), {"penalty": "log 4"}),
    "aux unfrozen": Recipe(GatedSAE, LOW, unfrozen),
    "without aux": Recipe(GatedSAE, HIGH, {"aux": None}, schedule=as_it_dies),
    "without r_mag": Recipe(GatedSAE, HIGH, prepare=lambda sae, _: sae.r_mag.requires_grad_(False)),
    "untied": Recipe(GatedSAE, HIGH, {"tied": False}),
    "sigmoid gate, without aux": Recipe(
        gated_sae.SigmoidGatedSAE, LOW, {"aux": None}, schedule=as_it_dies
    ),
    "norms frozen, aux frozen": Recipe(GatedSAE, HIGH, {"penalty": "norm_frozen"}),
    "norms live, aux unfrozen": Recipe(GatedSAE, LOW, unfrozen | {"penalty": "norm_live"}),
    "norms live, aux frozen": Recipe(GatedSAE, HIGH, {"penalty": "norm_live"}),
    "norms frozen, aux unfrozen": Recipe(GatedSAE, LOW, unfrozen | {"penalty": "norm_frozen"}),
    "encoder drawn apart": Recipe(GatedSAE, HIGH, prepare=drawn_apart),
    "no λ warm-up": Recipe(GatedSAE, HIGH, schedule={"l1_warmup": 0.0}),
}
RUNS = [*itertools.product(WORLDS[:1], EVIDENCE | ABLATIONS)]
RUNS += itertools.product(WORLDS[1:], EVIDENCE)
PAIR = "one Standard (λ 0.4) and one Gated (λ 0.9) SAE a seed, plain world, float64"
SWEEP = "sweep over λ; L0 at equal FVU (0.1 to 0.3), as a ratio to Gated"
VERDICTS = {True: "agrees", False: "disagrees", None: "not decidable on toy data"}
per_seed = partial(torch.as_tensor, dtype=torch.float64)


def largest(t: Tensor) -> Tensor:
    return t.abs().flatten(1).amax(1)


def above(bound: float) -> Callable:
    """The mean is, by two standard errors."""
    return lambda values: (v := spread(values))["mean"] - 2 * v["se"] > bound


def below(bound: float) -> Callable:
    return lambda values: (v := spread(values))["mean"] + 2 * v["se"] < bound


def near(bound: float, within: float) -> Callable:
    """Every seed's number is: exact claims hold to rounding."""
    return lambda values: len(values) > 0 and bool(((values - bound).abs() <= within).all())


class Claims:
    """Each method with a number is a claim, its docstring, measured `on` something: S of shrinkage,
    G of the gate and its three terms, A of alternatives, D of what it means downstream.

    It yields names, numbers, one per seed, and what must hold of them, if anything. What stands in
    (parentheses) is judged and not shown. The SAEs that many claims look at are trained when first
    asked for; `runs`, where given, are those of an earlier measurement.
    """

    def __init__(self, steps=1500, seeds=5, n_l1=5, runs: list[dict] | None = None):
        self.steps, self.seeds, self.n_l1 = steps, seeds, n_l1
        if runs is not None:
            self.runs = runs

    @cached_property
    def runs(self) -> list[dict]:
        """A row for every variant on every world, each seed and λ."""
        return [row for run in tqdm(RUNS, "claims", disable=None) for row in self.run(*run)]

    def run(self, world_name: str, variant: str) -> Iterator[dict]:
        """All seeds and λ are trained as one stack."""
        recipe = (EVIDENCE | ABLATIONS)[variant]
        l1s = [round(l1, 4) for l1 in recipe.strengths(self.n_l1).tolist()]
        l1 = torch.tensor(l1s).expand(self.seeds, self.n_l1)
        stream = partial(self.stream, name=world_name, copies=(self.n_l1,))
        held_out = itertools.islice(stream(20_000, 1000), 10)
        keys = (*measure.METRICS[:3], "norm_ratio", "cosine_squared", "dead_fraction")
        options = {"keys": keys, "what": f"{variant}, {world_name}", "device": "cpu"}
        for at, sae, row in measure.swept(recipe, stream, l1, self.steps, held_out, **options):
            found = recovery(sae, world(world_name, at[0]), rows=2000)
            norm = sae.W_dec.norm(dim=-1).mean().item()
            scores = {"mcc": found.mcc, "f1": found.f1, "norm": norm}
            start = {"world": world_name, "variant": variant, "seed": at[0], "l1": l1s[at[1]]}
            yield start | row | {name: round(score, 4) for name, score in scores.items()}

    def stream(self, seed: int, batch=256, name="plain", copies=()) -> Iterator[Tensor]:
        """Each seed has data of its own: (seeds, *copies, batch, 32)."""
        streams = [world(name, i).batches(batch, seed + i) for i in range(self.seeds)]
        for rows in zip(*streams, strict=True):
            yield torch.stack([x.expand(*copies, *x.shape) for x in rows])

    def stack(self, recipe: Recipe, l1: float, what: str, **options) -> SAE:
        """One for each seed, trained on the plain world."""
        l1, options = torch.full((self.seeds,), l1), options | {"what": what, "device": "cpu"}
        return measure.trained(recipe, self.stream, l1, self.steps, **options)

    seeded = property(lambda self: [torch.Generator().manual_seed(i) for i in range(self.seeds)])
    # Two stacks, fresh rows for them, (seeds, 5000, 32), and the moments of these with x̂.
    standard = cached_property(lambda self: self.stack(EVIDENCE["Standard"], 0.4, "S").double())
    gated = cached_property(lambda self: self.stack(EVIDENCE["Gated"], 0.9, "G").double())
    x = cached_property(lambda self: next(self.stream(20_000, 5000)).double())
    m = cached_property(lambda self: moments(self.x, self.standard(self.x).detach()))
    n = cached_property(lambda self: moments(self.x, self.gated(self.x).detach()))

    def ratio(self, variant: str, other="Gated", world_name="plain") -> Tensor:
        return per_seed(measure.l0_ratios(self.runs, variant, other, world_name))

    def gamma(self, variant: str) -> Tensor:
        return per_seed(measure.gammas(self.runs, variant))

    def at_end(self, variant: str, key: str, end: Callable = max) -> Tensor:
        """A metric at the largest (or smallest) λ of the plain world."""
        own = [row for row in self.runs if (row["world"], row["variant"]) == ("plain", variant)]
        return per_seed([row[key] for row in own if row["l1"] == end(row["l1"] for row in own)])

    def judged(self, number: str) -> dict:
        """A row of the table. The verdict is computed, never written."""
        claim, shown, holds = getattr(self, number), {}, []
        (setting,) = claim.__defaults__
        for name, values, *criteria in claim():
            values = per_seed(values).detach()
            holds += [bool(holds_of(values)) for holds_of in criteria]
            shown |= {name: values} if len(values) and name[0] != "(" else {}
        row = {"id": number, "claim": claim.__doc__, "setting": setting}
        row["seeds"] = max(map(len, shown.values()), default=0)
        row["measured"] = {name: spread(values) for name, values in shown.items()}
        return row | {"verdict": VERDICTS[all(holds) if holds else None]}

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
        to_b_gate = gradient(g, g.losses(x).reconstruct.sum(), "b_gate")
        to_W_gate = gradient(untied, untied.losses(x).reconstruct.sum(), "W_enc")
        yield "largest absolute gradient of reconstruct on b_gate", largest(to_b_gate), near(0, 0)
        yield "the same on an untied W_gate", largest(to_W_gate), near(0, 0)

    def G2(self, on="smallest λ of the sweep; gradients: " + PAIR):
        """without L_aux the gradient on b_gate is never negative, and the gates close"""
        without, aux = (self.at_end(variant, "l0", min) for variant in ("without aux", "Gated"))
        wrong = sae_with(self.gated.state_dict(), aux=None)
        grad = gradient(wrong, wrong.losses(self.x).total(0.9).sum(), "b_gate")
        yield "L0 without aux", without
        yield "L0 with aux, same λ", aux
        yield "(one over the other)", aux / without.clamp_min(1e-9), above(10)
        yield "smallest gradient of L_incorrect on b_gate", grad.amin(-1), lambda v: (v >= 0).all()

    def G3(self, on=PAIR):
        """L_aux with the frozen decoder: W_dec gets exactly 0, b_dec does not"""
        aux, name = self.gated.losses(self.x).aux.sum(), "largest absolute gradient of L_aux on"
        yield f"{name} W_dec", largest(gradient(self.gated, aux, "W_dec")), near(0, 0)
        b_dec = largest(gradient(self.gated, aux, "b_dec"))
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
        off = [largest(gradient(sae, two, name) - gradient(sae, three, name)) for name in names]
        yield "largest distance of gradients", torch.stack(off).amax(0), near(0, 1e-9)

    def G5(self, on="largest λ of the sweep"):
        """a sigmoid gate trained with L_incorrect alone stays alive (sparse or not: see L0)"""
        variant = "sigmoid gate, without aux"
        yield "dead latents", self.at_end(variant, "dead_fraction"), below(0.1)
        yield "L0", self.at_end(variant, "l0")
        yield "FVU", self.at_end(variant, "fvu"), below(0.5)

    def G6(self, on=SWEEP):
        """freezing helps, r_mag helps, untying does not"""
        yield "L0 aux unfrozen / Gated", self.ratio("aux unfrozen"), above(1)
        yield "L0 without r_mag / Gated", self.ratio("without r_mag"), above(1)
        yield "L0 untied / Gated", self.ratio("untied"), lambda values: not below(1)(values)

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

    def A1(self, on=SWEEP):
        """rescale & shift cures shrinkage but stays behind Gated"""
        for variant in ("rescale & shift", "rescale & shift, decoder too"):
            yield f"γ, {variant}", self.gamma(variant), near(1, 0.03)
            yield f"L0 {variant} / Gated", self.ratio(variant), above(1)

    def A2(self, on=SWEEP + ", and to rescale & shift"):
        """without the Heaviside, y = x̂(t ⊙ f): less expressive than rescale & shift"""
        variant, other = "natural b_mag", "rescale & shift"
        yield f"L0 {variant} / Gated", self.ratio(variant)
        yield f"L0 {variant} / {other}", self.ratio(variant, other), above(1)
        yield "γ", self.gamma(variant)

    def A3(self, on="sweep over λ, a = 1; γ where 60% to 95% of the variance is explained"):
        """log(1 + a f) in place of L1 lessens shrinkage of the Standard SAE"""
        log, standard = self.gamma("log penalty"), self.gamma("Standard")
        yield "γ, log penalty", log
        yield "γ, Standard", standard
        yield "(their difference)", log - standard, above(0)
        yield "L0 log penalty / Standard", self.ratio("log penalty", "Standard")
        yield "γ, a = 4", self.gamma("log penalty, a = 4")
        yield "L0, a = 4 / Standard", self.ratio("log penalty, a = 4", "Standard")

    def A4(self, on="trained at s = 0.1, measured at its limit s → 0"):
        """the soft cutoff trains, and becomes a JumpReLU as s falls"""
        yield "L0 soft cutoff / Standard", self.ratio("soft cutoff", "Standard"), len
        yield "L0 soft cutoff / Gated", self.ratio("soft cutoff")
        yield "γ", self.gamma("soft cutoff")
        yield "(FVU at the smallest λ)", self.at_end("soft cutoff", "fvu", min), below(0.2)

    def A5(self, on=SWEEP + "; norms at the smallest λ"):
        """decoder-norm penalty: freeze in both or neither; in one only is worse"""
        both, neither = "norms frozen, aux frozen", "norms live, aux unfrozen"
        only_aux, only_norms = "norms live, aux frozen", "norms frozen, aux unfrozen"
        for variant, *criteria in (both,), (neither,), (only_aux, below(0.5)), (only_norms,):
            yield f"L0 {variant} / Gated", self.ratio(variant)
            yield f"mean norm, {variant}", self.at_end(variant, "norm", min), *criteria
        for variant in (only_aux, only_norms):
            yield f"(L0 {variant} / {neither})", self.ratio(variant, neither), above(1)

    def A6(self, on=SWEEP):
        """W_enc starting as W_dec transposed, and warming λ up, help"""
        for variant in ("encoder drawn apart", "no λ warm-up"):
            yield f"L0 {variant} / Gated", self.ratio(variant), above(1)

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
        runs = {"without resampling": None, "resampled every tenth of the run": self.steps // 10}
        for what, every in runs.items():
            sae = self.stack(recipe, 0.6, what, resample_every=every)
            held_out = itertools.islice(self.stream(20_000), 40)
            dead[what] = gated_sae.evaluate(sae, held_out).dead_fraction
            yield f"dead latents {what}", dead[what]
        left, resampled = dead.values()
        yield "(more than half of them)", resampled - left / 2, below(0)

    def A9(self, on=SWEEP):
        """at equal training compute (Standard 1.5 times as wide) Gated is ahead"""
        for name in WORLDS:
            ratio = self.ratio("Standard 1.5x", "Gated", name)
            yield f"L0 Standard 1.5x / Gated, {name}", ratio, above(1)

    def D1(self, on="a random softmax head of 50 classes reads x; " + PAIR):
        """zero ablation inflates loss recovered, and never changes which SAE is ahead"""
        x, generators, scores = self.x, self.seeded, {}
        W = torch.stack([torch.randn(32, 50, generator=g) for g in generators]).double()
        heads = zip((x @ W).softmax(-1), generators, strict=True)  # each is labelled by its samples
        labels = torch.stack([p.multinomial(1, generator=g)[:, 0] for p, g in heads])
        ce = lambda x: cross_entropy((x @ W).mT, labels, reduction="none").mean(-1)  # noqa: E731
        for kind, sae in (("Standard", self.standard), ("Gated", self.gated)):
            for name, ablated in (("zero", 0 * x), ("mean", x.mean(1, True).expand_as(x))):
                scores[kind, name] = gated_sae.loss_recovered(ce(sae(x)), ce(x), ce(ablated))
                yield f"{kind}, {name} ablation", scores[kind, name]
        zero, mean = (scores["Gated", a] - scores["Standard", a] for a in ("zero", "mean"))
        yield "(changed)", (zero > 0).double() - (mean > 0).double(), near(0, 0)
        yield "(inflated)", scores["Gated", "zero"] - scores["Gated", "mean"], above(0)

    def D2(self, on="needs language models of several sizes"):
        """compute-efficiency hit, off a scaling curve"""
        return ()

    def D3(self, on="Gated as JumpReLU, sum of f̃, 200 rows, 2000 steps"):
        """integrated gradients miss exactly the jumps"""
        sae = gated_sae.to_jumprelu(self.gated)
        pi = (sae.project(self.x[:, :200]) + gated_sae.as_row(sae.b_enc)).detach()
        theta = gated_sae.as_row(sae.threshold)
        out = lambda pi: gated_sae.jump_relu(pi, sae.threshold).sum(-1)  # noqa: E731
        attributed = attribution.integrated_gradients(out, pi, 0 * pi, steps=2000).sum(-1)
        gap = (out(pi) - out(0 * pi) - attributed).mean(-1)
        jumps = ((pi > theta) * theta).sum(-1).mean(-1)
        yield "completeness gap of IG", gap
        yield "sum of the jumps crossed", jumps
        yield "(one over the other)", gap / jumps, near(1, 0.01)

    def D4(self, on=SWEEP):
        """about half as many latents at equal reconstruction, and γ near 1"""
        for name in WORLDS:
            yield f"L0 Standard / Gated, {name}", self.ratio("Standard", "Gated", name), above(1.5)
        yield "γ, Gated", self.gamma("Gated"), near(1, 0.02)
        yield "γ, Standard", self.gamma("Standard")


CLAIMS = [name for name in vars(Claims) if name[1:].isdigit()]


def measured(steps: int, seed: int) -> dict:
    """{name of a JSON file: what it holds}. The seeds are 0 to 4, whatever `seed` is."""
    seen = Claims(min(steps, 1500))
    return {"claims": [seen.judged(number) for number in CLAIMS], "runs": seen.runs}


def condensed(claimed: list[dict]) -> Iterator[dict]:
    """The table of claims for README.md: at most three numbers a row."""
    for row in claimed:
        numbers = [
            f"{name} {value['mean']:.3g}" + (f" ± {value['se']:.1g}" if value["se"] else "")
            for name, value in list(row["measured"].items())[:3]
        ]
        start = {"": row["id"], "claim": row["claim"]}
        yield start | {"measured": "; ".join(numbers), "verdict": row["verdict"]}


def recovered(rows: list[dict], fvu=0.2) -> Iterator[dict]:
    """At one FVU, means over seeds: what each variant costs, and how much of the truth it found."""
    for name, variant in itertools.product(WORLDS, EVIDENCE):
        found = measure.mean_at_fvu(rows, variant, name, fvu, ("gamma", "mcc", "f1"))
        cells = [f"{value:.2f}" for value in found] if found else ["-"] * 4
        row = {"data": name, "variant": variant}
        yield row | dict(zip(("L0", "γ", "MCC", "F1"), cells, strict=True))


def shown(read) -> tuple[alt.FacetChart, dict[str, str]]:
    """FVU against L0 for every variant; {place in README.md: text}."""
    points = measure.means_over_seeds(read("runs"))
    lines = measure.curves(points, "fvu", "FVU: variance unexplained", legend="right")
    column = alt.Column("data:N", sort=WORLDS, title=None)
    tables = {"claims": condensed(read("claims")), "recovered": recovered(read("runs"))}
    texts = {place: measure.as_markdown(list(table)) for place, table in tables.items()}
    return lines.properties(width=230, height=240).facet(column=column), texts
