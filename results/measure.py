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
from tqdm import tqdm

import gated_sae
from gated_sae import SAE, GatedSAE, StandardSAE, rescale_and_shift
from toy_data import SuperpositionData, zipf

RESULTS = Path(__file__).parent


def read(name: str, folder: Path = RESULTS):
    """What was measured: "pareto", "claims", "runs" or "language"."""
    return json.loads((folder / f"{name}.json").read_text())


def remembered(file: Path, made: dict, measure: Callable[[], dict]) -> dict:
    """The row of a file of JSON lines that holds all of `made`, or a new one, which is appended."""
    for row in map(json.loads, file.read_text().splitlines() if file.exists() else []):
        if made.items() <= row.items():
            return row
    row = made | measure()
    with file.open("a") as lines:
        print(json.dumps(row, ensure_ascii=False), file=lines)
    return row


def activations(file: Path, aside: int = 8000) -> tuple[Tensor, Tensor]:
    """Rows of an .npy file, so that E‖x‖² = d_in and E x = 0: all but the first, and these."""
    x = torch.from_numpy(np.load(file)).float()
    x -= x[aside:].mean(0)
    x *= (x.shape[1] / x[aside:].square().sum(-1).mean()) ** 0.5
    return x[aside:], x[:aside]


def epochs(x: Tensor, batch: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """Batches, each row once in an epoch, each epoch in another order."""
    order = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(x), generator=order).split(batch) for _ in itertools.count())
    whole = (x[rows] for rows in itertools.chain.from_iterable(orders) if len(rows) == batch)
    return itertools.islice(whole, steps)


WORLDS = ("plain", "Zipf, correlated", "hierarchical")


def world(name: str, seed: int) -> SuperpositionData:
    """One of three data sets of 128 features in 32 dimensions, 4 active on average."""
    if name == "plain":
        return SuperpositionData(32, 128, firing=4 / 128, seed=seed)
    if name == "Zipf, correlated":
        return SuperpositionData(32, 128, firing=zipf(128, 4), correlation=0.3, seed=seed)
    # 32 parents with three children each, which fire on a quarter of their parent's occasions
    p = 4 / (32 * 1.75)
    parents = [-1] * 32 + [i // 3 for i in range(96)]
    return SuperpositionData(32, 128, firing=[p] * 32 + [p / 4] * 96, parents=parents, seed=seed)


class Recipe(NamedTuple):
    """How a variant is made: a kind of SAE, and what is done to it before and after training."""

    kind: Callable[..., SAE]
    span: tuple[float, float]  # least and most λ: the ranges of L0 overlap
    options: dict = {}
    d_sae: int = 128
    prepare: Callable = lambda sae, generator: None
    finish: Callable = lambda sae: sae
    refit: bool = False  # what `finish` made of it, on other rows and without penalty
    schedule: dict = {}

    def strengths(self, n: int) -> Tensor:
        return torch.logspace(*map(math.log10, self.span), n)


def at_equal_compute(standard, gated, d_sae: int) -> dict[str, Recipe]:
    """Standard and Gated over a span of λ each, and Standard 1.5 times as wide: a Gated step has
    three products with a weight matrix where a Standard one has two."""
    return {
        "Standard": Recipe(StandardSAE, standard, d_sae=d_sae),
        "Standard 1.5x": Recipe(StandardSAE, standard, d_sae=3 * d_sae // 2),
        "Gated": Recipe(GatedSAE, gated, d_sae=d_sae),
    }


LOW, HIGH = (0.15, 1.2), (0.3, 2.4)  # Gated needs larger λ for the same L0
corrected = partial(Recipe, StandardSAE, (0.2, 2.4), refit=True)
EVIDENCE = at_equal_compute(LOW, HIGH, 128) | {
    "rescale & shift": corrected(finish=rescale_and_shift),
    "rescale & shift, decoder too": corrected(finish=lambda sae: rescale_and_shift(sae, True)),
    "natural b_mag": Recipe(gated_sae.NaturalGatedSAE, (0.6, 4.8)),
    "log penalty": Recipe(StandardSAE, (0.3, 2.0), {"penalty": "log"}),
    "soft cutoff": Recipe(gated_sae.SoftCutoffSAE, LOW, finish=gated_sae.to_jumprelu),
    "JumpReLU": Recipe(gated_sae.JumpReLUSAE, (0.05, 0.6)),
}


def trained(recipe, stream, l1, steps, *, d_in=32, seed=0, lr=1e-2, what=None, **options) -> SAE:
    """A stack made by the recipe, of the shape of l1; `options` are those of `train`.

    stream(0) trains it, and stream(10 000), other rows of the same data, refits it.
    `what` names a bar of progress. At a rate of 1e-2, data this small is learnt in thousands of
    steps; at the paper's 3e-4, made for language models, not in tens of thousands.
    """
    generator = torch.Generator().manual_seed(seed)
    sae = recipe.kind(d_in, recipe.d_sae, stack=l1.shape, generator=generator, **recipe.options)
    recipe.prepare(sae, generator)
    options |= {"steps": steps, "lr": lr, "log_every": steps} | recipe.schedule

    def fit(sae, l1, offset):
        bar = tqdm(stream(offset), what, steps, leave=False, disable=None if what else True)
        list(gated_sae.train(sae, bar, l1=l1, **options))
        return sae

    sae = recipe.finish(fit(sae, l1, 0))
    return fit(sae, 0.0, 10_000) if recipe.refit else sae


METRICS = "l0", "fvu", "gamma", "dead_fraction"


def swept(recipe, stream, l1, steps, held_out, *, keys=METRICS, **options) -> Iterator[tuple]:
    """Train as `trained`, and measure: (its place in the stack, an SAE, its metrics) for each."""
    sae = trained(recipe, stream, l1, steps, **options)
    found = gated_sae.evaluate(sae, held_out)
    for at, member in zip(itertools.product(*map(range, l1.shape)), members(sae), strict=True):
        yield at, member, {key: round(getattr(found, key)[at].item(), 5) for key in keys}


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


def frontier(table: list[dict], variant: str) -> list[dict]:
    """Rows that no other of the variant beats in both FVU and L0, by rising FVU."""
    best = []
    for row in sorted((r for r in table if r["variant"] == variant), key=lambda r: r["fvu"]):
        if not best or row["l0"] < best[-1]["l0"]:
            best.append(row)
    return best


def at_fvu(table: list[dict], variant: str, fvu: float, keys=("gamma",)) -> tuple | None:
    """(L0, γ) where a variant's frontier reaches an FVU, or None: log L0, and γ or any other keys,
    are interpolated in log FVU."""
    for left, right in itertools.pairwise(frontier(table, variant)):
        if left["fvu"] <= fvu <= right["fvu"] and right["l0"] > 0:
            t = math.log(fvu / left["fvu"]) / math.log(right["fvu"] / left["fvu"])
            log_l0 = (1 - t) * math.log(left["l0"]) + t * math.log(right["l0"])
            return math.exp(log_l0), *((1 - t) * left[key] + t * right[key] for key in keys)
    return None


def at_levels(table: list[dict], kinds, levels, columns: dict, of=None) -> Iterator[tuple]:
    """(FVU, row) where all kinds reach it: L0 of each, what `columns` name of each (or only `of`
    these), and L0 as a multiple of Gated's."""
    others = [kind for kind in kinds if kind != "Gated"]
    for level in levels:
        found = {kind: at_fvu(table, kind, level, columns.values()) for kind in kinds}
        if all(found.values()):
            row = {f"L0 {kind}": round(at[0], 2) for kind, at in found.items()}
            for kind in of or kinds:
                named = zip(columns, found[kind][1:], strict=True)
                row |= {f"{name} {kind}": round(value, 3) for name, value in named}
            gated = found["Gated"][0]
            yield level, row | {f"{v} / Gated": round(found[v][0] / gated, 2) for v in others}


def by_seed(rows: list[dict], world_name: str) -> list[list[dict]]:
    own = [row for row in rows if row["world"] == world_name]
    return [[r for r in own if r["seed"] == seed] for seed in sorted({r["seed"] for r in own})]


def l0_ratios(rows, variant, other, world_name="plain", levels=(0.1, 0.15, 0.2, 0.3)) -> list:
    """Per seed: L0 of a variant over that of another, geometric mean over the FVU both reach."""
    ratios = []
    for own in by_seed(rows, world_name):
        found = [(at_fvu(own, variant, fvu), at_fvu(own, other, fvu)) for fvu in levels]
        logs = [math.log(a[0] / b[0]) for a, b in found if a and b]
        ratios += [math.exp(sum(logs) / len(logs))] if logs else []
    return ratios


def gammas(rows, variant, world_name="plain") -> list[float]:
    """Per seed: mean γ over the λ whose SAE explains between 60% and 95% of the variance."""
    own = [row for row in rows if row["variant"] == variant and 0.05 < row["fvu"] < 0.4]
    return [sum(r["gamma"] for r in rows) / len(rows) for rows in by_seed(own, world_name) if rows]


def mean_at_fvu(rows, variant, world_name="plain", fvu=0.2, keys=("gamma",)) -> list[float] | None:
    """[L0, γ] as `at_fvu`, means over the seeds that reach it, or None."""
    found = [at_fvu(own, variant, fvu, keys) for own in by_seed(rows, world_name)]
    found = [values for values in found if values]
    return torch.tensor(found).mean(0).tolist() if found else None


def means_over_seeds(rows: list[dict], variants=EVIDENCE) -> list[dict]:
    """A row for each data set, variant and λ."""
    groups = {}
    for row in (row for row in rows if row["variant"] in variants):
        groups.setdefault((row["world"], row["variant"], row["l1"]), []).append(row)
    return [
        {"data": data, "variant": variant, "l1": l1}
        | {key: sum(row[key] for row in own) / len(own) for key in ("l0", "fvu", "gamma")}
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
# Colour and shape of each variant, the same in every picture: Okabe and Ito's colours, two of
# them changed to be seen on black as well as on white.
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
    axis, key = alt.Scale(type="log", nice=False, padding=12), alt.Legend(title=None, orient=legend)
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
