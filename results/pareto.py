"""Standard and Gated SAEs over a range of λ: how many latents fire at equal FVU."""

import itertools

import altair as alt
import torch

from results.measure import METRICS, as_markdown, at_equal_compute, at_levels, curves, swept
from toy_data import SuperpositionData

D_IN, N_FEATURES, ACTIVE = 64, 256, 5
COMPARED = at_equal_compute((0.2, 1.6), (0.4, 2.8), N_FEATURES)


def sweep(steps, seed=0, n_l1=10, batch=512) -> list[dict]:
    """Train each kind over a range of λ, as one stack; the rows of the results table.

    All see the same data in the same order, and are measured on the same 20 000 fresh rows.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    data = SuperpositionData(D_IN, N_FEATURES, firing=ACTIVE / N_FEATURES, seed=seed, device=device)
    held_out = list(itertools.islice(data.batches(1000, seed=seed + 10_000), 20))
    keys, table = (*METRICS[:3], "norm_ratio", "dead_fraction"), []
    rows = lambda _: data.batches(batch, seed)  # noqa: E731
    for name, recipe in COMPARED.items():
        l1, options = recipe.strengths(n_l1), {"d_in": D_IN, "seed": seed, "keys": keys}
        for at, _, row in swept(recipe, rows, l1, steps, held_out, what=name, **options):
            start = {"variant": name, "d_sae": recipe.d_sae, "l1": round(l1[at].item(), 4)}
            table.append(start | row)
    return table


def comparison(table: list[dict], levels=(0.125, 0.15, 0.2, 0.25, 0.3, 0.4)) -> list[dict]:
    """At each FVU that all kinds reach: L0 and γ of each, and L0 as a multiple of Gated's."""
    found = at_levels(table, COMPARED, levels, {"γ": "gamma"})
    return [{"FVU": fvu} | row for fvu, row in found]


def verdict(table: list[dict]) -> str:
    """The sentence that the figures add up to, with its numbers computed from the table."""
    rows = comparison(table)
    if not rows:
        return "The kinds share no level of FVU, so they cannot be compared: train for longer."

    def span(column, digits):
        values = [row[column] for row in rows]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    return (
        f"At equal FVU, Gated needs {span('Standard / Gated', 1)} times fewer active latents than "
        f"Standard, and {span('Standard 1.5x / Gated', 1)} times fewer than a Standard SAE "
        f"1.5 times as wide; γ is {span('γ Gated', 2)} for Gated and {span('γ Standard', 2)} for "
        f"Standard."
    )


def measured(steps: int, seed: int) -> dict:
    """{name of a JSON file: what it holds}."""
    return {"pareto": {"steps": steps, "seed": seed, "table": sweep(steps, seed)}}


def shown(read) -> tuple[alt.HConcatChart, dict[str, str]]:
    """FVU and γ against L0; {place in README.md: text}. `read` gives what was measured."""
    table = read("pareto")["table"]
    one = alt.Chart(alt.Data(values=[{"one": 1}])).mark_rule(strokeDash=[4, 4]).encode(y="one:Q")
    gamma = one + curves(table, "gamma", "γ: at 1, no bias", log=False)
    texts = {"comparison": as_markdown(comparison(table)), "verdict": verdict(table)}
    return curves(table, "fvu", "FVU: variance unexplained") | gamma, texts
