"""What the experiments share: worlds, recipes, trained SAEs, and ways to compare their numbers."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import altair as alt
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import gated_sae
from gated_sae import SAE, GatedSAE, StandardSAE, rescale_and_shift
from toy_data import SuperpositionData, recovery, zipf

RESULTS = Path(__file__).parent


def read(name: str, folder: Path = RESULTS) -> list[dict]:
    """The rows measured, in a folder or else here: "claims", "runs", "language", ..."""
    file = next(f for f in (folder / f"{name}.jsonl", RESULTS / f"{name}.jsonl") if f.exists())
    return [*map(json.loads, file.read_text().splitlines())]


def remembered(file: Path, made: dict, measure: Callable[[], dict]) -> dict:
    """The row of a file of JSON lines that holds all of `made`, or a new one, which is appended.
    What a kill left of a line is dropped."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):
        file.write_text("".join(lines[:-1]))
    for row in (json.loads(line) for line in lines if line.endswith("\n")):
        if made.items() <= row.items():
            return row
    row = made | measure()
    with file.open("a") as lines:
        print(json.dumps(row), file=lines)  # in ASCII: a cut, or a line, ends between characters
    return row


def activations(rows: Path | Tensor, aside: int = 8000) -> tuple[Tensor, Tensor]:
    """Rows, or those of an .npy file, so that E‖x‖² = d_in and E x = 0: all but the first, and
    these."""
    x = rows if isinstance(rows, Tensor) else torch.from_numpy(np.load(rows)).float()
    x = x - x[aside:].mean(0)
    x *= (x.shape[1] / x[aside:].square().sum(-1).mean()) ** 0.5
    return x[aside:], x[:aside]


def epochs(x: Tensor, batch: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """Batches, each row once in an epoch, each epoch in another order."""
    order = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(x), generator=order).split(batch) for _ in itertools.count())
    whole = (x[rows] for rows in itertools.chain.from_iterable(orders) if len(rows) == batch)
    return itertools.islice(whole, steps)


def side_by_side(streams, copies: tuple) -> Iterator[Tensor]:
    """Of each seed its own rows: (seeds, *copies, batch, d_in)."""
    for rows in zip(*streams, strict=True):
        yield torch.stack([x.expand(*copies, *x.shape) for x in rows])


WORLDS = ("plain", "Zipf, correlated", "hierarchical")


class Toy:
    """For each of several seeds, 128 features in 32 dimensions, 4 active on average."""

    d_in, size, lr = 32, 1, None

    def __init__(self, name: str, seeds: int):
        # 32 parents with three children each, which fire on a quarter of their parent's occasions
        p, tree = 4 / (32 * 1.75), [-1] * 32 + [i // 3 for i in range(96)]
        options = {
            "plain": {"firing": 4 / 128},
            "Zipf, correlated": {"firing": zipf(128, 4), "correlation": 0.3},
            "hierarchical": {"firing": [p] * 32 + [p / 4] * 96, "parents": tree},
        }[name]
        self.worlds = [SuperpositionData(32, 128, seed=seed, **options) for seed in range(seeds)]

    def stream(self, offset: int, batch=256, copies=()) -> Iterator[Tensor]:
        streams = (world.batches(batch, i + offset) for i, world in enumerate(self.worlds))
        return side_by_side(streams, copies)

    def held_out(self, copies: tuple) -> Iterator[Tensor]:
        return itertools.islice(self.stream(20_000, 1000, copies), 10)

    def scores(self, sae: SAE, seed: int) -> dict[str, float]:
        found = recovery(sae, self.worlds[seed], 2000, seed + 30_000)  # rows of its own
        return {"mcc": found.mcc, "f1": found.f1}


class Recipe(NamedTuple):
    """How a variant is made: a kind of SAE, and what is done to it before and after training."""

    kind: Callable[..., SAE]
    span: tuple[float, float]  # least and most λ on toy data: the ranges of L0 overlap
    options: dict = {}
    power: int = 1  # of the coefficients' size, with which λ grows
    lengths: Callable[[float], dict] = lambda size: {}  # options that grow with it, or fall
    width: float = 1.0  # d_sae beside that of the others
    prepare: Callable = lambda sae, generator: None
    finish: Callable = lambda sae: sae
    refit: bool = False  # what `finish` made of it, without penalty, rows in another order
    schedule: dict = {}

    def at(self, size: float) -> "Recipe":
        """The same, for coefficients `size` times as large as on toy data."""
        span = tuple(l1 * size**self.power for l1 in self.span)
        return self._replace(span=span, options=self.options | self.lengths(size))

    def strengths(self, n: int) -> Tensor:
        return torch.logspace(*map(math.log10, self.span), n)


def log_penalty(a: float, size: float = 1) -> dict:
    """log(1 + a f), for f of one size, as an option."""
    gated_sae.PENALTIES[f"log {a}/{size}"] = lambda f, norm: (a / size * f).log1p()
    return {"penalty": f"log {a}/{size}"}


LOW, HIGH = (0.15, 1.2), (0.3, 2.4)  # Gated needs larger λ for the same L0
corrected = partial(Recipe, StandardSAE, (0.2, 2.4), refit=True)
EVIDENCE = {
    "Standard": Recipe(StandardSAE, LOW),
    # A Gated step has three products with a weight matrix where a Standard one has two.
    "Standard 1.5x": Recipe(StandardSAE, LOW, width=1.5),
    "Gated": Recipe(GatedSAE, HIGH),
    "rescale & shift": corrected(finish=rescale_and_shift),
    "rescale & shift, decoder too": corrected(finish=lambda sae: rescale_and_shift(sae, True)),
    "natural b_mag": Recipe(gated_sae.NaturalGatedSAE, (0.6, 4.8)),
    "log penalty": Recipe(StandardSAE, (0.3, 2.0), log_penalty(1), 2, partial(log_penalty, 1)),
    "soft cutoff": Recipe(
        gated_sae.SoftCutoffSAE,
        LOW,
        lengths=lambda size: {"s": 0.1 * size},
        finish=gated_sae.to_jumprelu,
    ),
    "JumpReLU": Recipe(
        gated_sae.JumpReLUSAE,
        (0.05, 0.6),
        power=2,
        lengths=lambda size: {"bandwidth": 0.1 * size},
        prepare=lambda sae, _: sae.threshold.data.fill_(sae.bandwidth),
    ),
}


def trained(
    recipe, stream, l1, steps, *, d_in=32, d_sae=None, seed=0, what=None, watch=None, **options
):
    """A stack made by the recipe, of the shape of l1; `options` are those of `train`. stream(0)
    trains it, and stream(10 000), of another seed, refits it. `what` names a bar of progress.
    `watch` gets it at the first step, and at each quarter."""
    generator = torch.Generator().manual_seed(seed)
    own = {"stack": l1.shape, "generator": generator} | recipe.options
    sae = recipe.kind(d_in, int(recipe.width * (d_sae or 4 * d_in)), **own)
    recipe.prepare(sae, generator)
    options |= {"steps": steps, "log_every": max(1, steps // 4), "device": "cpu"} | recipe.schedule

    def fit(sae, l1, offset):
        bar = tqdm(stream(offset), what, steps, leave=False, disable=None if what else True)
        for _ in gated_sae.train(sae, bar, l1=l1, **options):
            watch(sae) if watch else None
        return sae

    sae = recipe.finish(fit(sae, l1, 0))
    return fit(sae, 0.0, 10_000) if recipe.refit else sae


def radial(sae: GatedSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the gradient of L_aux on W_dec, were W_dec not frozen: the share along the d_i, as lengths
    over all of W_dec; and what is across them, over what is across in the reconstruction's."""
    (pi_gate, pi_mag), W_dec, lengths = sae.paths(x), sae.W_dec.detach().requires_grad_(), []
    d, b_dec = F.normalize(W_dec.detach(), dim=-1), gated_sae.as_row(sae.b_dec.detach())
    for f in (pi_gate.relu(), sae.gate(pi_gate, pi_mag)):
        error = gated_sae.squared_error(x, f.detach() @ W_dec + b_dec)
        (grad,) = torch.autograd.grad(error.sum(), W_dec)
        along = (grad * d).sum(-1, keepdim=True)
        lengths += (part.flatten(-2).norm(dim=-1) for part in (along, grad - along * d))
    along, across, _, in_reconstruction = lengths
    return along / torch.hypot(along, across), across / in_reconstruction


METRICS = "l0", "fvu", "gamma", "norm_ratio", "cosine_squared", "dead_fraction"


def swept(recipe, stream, l1, steps, held_out, **options) -> Iterator[tuple]:
    """Train as `trained`, and measure: (its place in the stack, an SAE, its metrics) for each."""
    sae = trained(recipe, stream, l1, steps, **options)
    found = gated_sae.evaluate(sae, held_out)
    for at, member in zip(itertools.product(*map(range, l1.shape)), members(sae), strict=True):
        yield at, member, {key: round(getattr(found, key)[at].item(), 5) for key in METRICS}


def members(sae: SAE) -> Iterator[SAE]:
    """The single SAEs of a stack, in order."""
    for at in itertools.product(*map(range, sae.W_dec.shape[:-2])):
        own = {name: value[at] for name, value in sae.state_dict().items()}
        yield sae_with(own, type(sae), **sae.config)


def sae_with(state: dict[str, Tensor], kind: type[SAE] = GatedSAE, **options) -> SAE:
    """An SAE of any kind and options, with those parameters that it has of a state."""
    *stack, d_sae, d_in = state["W_dec"].shape
    options |= {"d_in": d_in, "d_sae": d_sae, "stack": stack, "dtype": state["W_dec"].dtype}
    sae = kind(**options)
    sae.load_state_dict({name: state[name] for name in sae.state_dict()})
    return sae


def gradient(sae: SAE, value: Tensor, name: str) -> Tensor:
    """d value / d parameter, zeros where it does not reach."""
    parameter = getattr(sae, name)
    return torch.autograd.grad(value, parameter, retain_graph=True, materialize_grads=True)[0]


def spread(values) -> dict[str, float]:
    """Mean and standard error of one number per seed."""
    values = torch.tensor([float(value) for value in values], dtype=torch.float64)
    se = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.zeros(())
    return {"mean": float(f"{values.mean().item():.4g}"), "se": float(f"{se.item():.2g}")}


def frontier(table: list[dict], variant: str, by="fvu") -> list[dict]:
    """Rows that no other of the variant beats in L0 and FVU, or what it is `by`, which rises."""
    best = []
    for row in sorted((r for r in table if r["variant"] == variant), key=lambda r: r[by]):
        if not best or row["l0"] < best[-1]["l0"]:
            best.append(row)
    return best


def at_fvu(table: list[dict], variant: str, fvu: float, keys=("gamma",), by="fvu") -> tuple | None:
    """(L0, γ) where a variant's frontier reaches an FVU, or None: log L0, and γ or any other keys,
    are interpolated in log FVU."""
    for left, right in itertools.pairwise(frontier(table, variant, by)):
        if 0 < left[by] <= fvu <= right[by] and right["l0"] > 0:
            t = math.log(fvu / left[by]) / math.log(right[by] / left[by])
            log_l0 = (1 - t) * math.log(left["l0"]) + t * math.log(right["l0"])
            return math.exp(log_l0), *((1 - t) * left[key] + t * right[key] for key in keys)
    return None


def by_seed(rows: list[dict], data: str) -> list[list[dict]]:
    own = [row for row in rows if row["world"] == data]
    return [[r for r in own if r["seed"] == seed] for seed in sorted({r["seed"] for r in own})]


# On the way from x̂ = E x to x: of the variance what is unexplained, of the loss what is lost.
LEVELS = {"fvu": (0.1, 0.15, 0.2), "lost": (0.05, 0.1, 0.2)}


def l0_ratios(rows, variant, other, data="plain", by="fvu") -> list[float]:
    """Per seed: L0 of a variant over that of another, geometric mean over the levels of FVU, or of
    the loss, that all seeds of both reach."""
    found = []
    for level in LEVELS[by]:
        at = [
            [at_fvu(own, v, level, (), by) for own in by_seed(rows, data)] for v in (variant, other)
        ]
        if all(itertools.chain(*at)):
            found.append([math.log(a / b) for (a,), (b,) in zip(*at, strict=True)])
    return [math.exp(sum(logs) / len(logs)) for logs in zip(*found, strict=True)]


def at_l0(rows, variant, l0, data="language model", key="ce") -> list[float]:
    """Per seed: a number where a variant has an L0, interpolated in log L0."""
    found = []
    for own in by_seed([row for row in rows if row["variant"] == variant], data):
        pairs = sorted((math.log(row["l0"]), row[key]) for row in own)
        found.append(float(np.interp(math.log(l0), *zip(*pairs, strict=True), math.nan, math.nan)))
    return found


def means(rows, variant, data, key="gamma") -> list[float]:
    """Per seed: the mean of a number over those λ whose SAE explains 60% to 95% of the variance."""
    rows = [row for row in rows if row["variant"] == variant]
    own = [[r[key] for r in rows if 0.05 < r["fvu"] < 0.4] for rows in by_seed(rows, data)]
    return [sum(values) / len(values) if values else math.nan for values in own]


def mean_at_fvu(rows, variant, data="plain", fvu=0.2, keys=("gamma",), by="fvu") -> list | None:
    """[L0, γ] as `at_fvu`, means over the seeds, or None where one does not reach it."""
    found = [at_fvu(own, variant, fvu, keys, by) for own in by_seed(rows, data)]
    return torch.tensor(found).mean(0).tolist() if found and all(found) else None


def means_over_seeds(rows: list[dict], keys=("l0", "fvu", "gamma")) -> list[dict]:
    """A row for each data set, variant of `EVIDENCE` and λ."""
    groups = {}
    for row in (row for row in rows if row["variant"] in EVIDENCE):
        groups.setdefault((row["world"], row["variant"], row["l1"]), []).append(row)
    return [
        {"data": data, "variant": variant, "l1": l1}
        | {key: sum(row[key] for row in own) / len(own) for key in keys}
        for (data, variant, l1), own in groups.items()
    ]


def as_markdown(rows: list[dict]) -> str:
    """Rows as a table that reads as well in a terminal as in a README."""
    columns = list(rows[0]) if rows else ["nothing to compare"]
    lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)


GREY = "#888888"
STAR = "M0,-1L.25,-.3L1,-.3L.4,.15L.6,.9L0,.45L-.6,.9L-.4,.15L-1,-.3L-.25,-.3Z"
# Colour and shape of each variant: Okabe and Ito's, two changed to be seen on black and on white.
PALETTE = {
    "Standard": ("#d55e00", "square"),
    "Standard 1.5x": ("#e69f00", "triangle-up"),
    "Gated": ("#0072b2", "circle"),
    "rescale & shift": ("#009e73", "diamond"),
    "rescale & shift, decoder too": ("#56b4e9", "cross"),
    "natural b_mag": ("#cc79a7", "triangle-down"),
    "log penalty": ("#999999", "triangle-left"),
    "soft cutoff": ("#a39a00", "triangle-right"),
    "JumpReLU": ("#785ef0", STAR),
}


def colours(*names: str) -> alt.Scale:
    return alt.Scale(domain=names, range=[PALETTE.get(name, (GREY,))[0] for name in names])


def shapes(*names: str) -> alt.Scale:
    return alt.Scale(domain=names, range=[PALETTE.get(name, (GREY, "circle"))[1] for name in names])


def curves(rows: list[dict], y: str, title: str, per="row", log=True, legend="top") -> alt.Chart:
    """A column of the rows against L0, a line for each variant."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    axis = alt.Scale(type="log", nice=False, padding=12)
    key = alt.Legend(title=None, orient=legend, labelLimit=220)
    return (
        alt.Chart(alt.Data(values=[row for row in rows if row["l0"] > 0.1]))
        .mark_line(point=alt.OverlayMarkDef(size=50, filled=True), strokeWidth=2)
        .encode(
            x=alt.X("l0:Q", scale=axis, title=f"L0: latents active per {per}"),
            y=alt.Y(f"{y}:Q", scale=axis if log else alt.Scale(zero=False), title=title),
            color=alt.Color("variant:N", scale=colours(*names), legend=key),
            shape=alt.Shape("variant:N", scale=shapes(*names), legend=key),
            order="l1:Q",
        )
        .properties(width=330, height=280)
    )
