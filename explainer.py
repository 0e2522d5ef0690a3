"""The lesson: `marimo run explainer.py`. Its experiment, as a table: `python explainer.py`."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Gated Sparse Autoencoders")

with app.setup:
    import argparse
    import itertools
    import json
    import math
    import sys

    import altair as alt
    import marimo as mo
    import torch

    from gated_sae import GatedSAE, StandardSAE, evaluate, train
    from toy_data import SuperpositionData

    RESULTS = mo.notebook_dir() / "results"
    D_IN, N_FEATURES, ACTIVE = 64, 256, 5
    # What is compared: (kind, d_sae, (least λ, most λ)). The ranges of L0 overlap; Gated needs
    # larger λ for the same L0. Its step has three products with a weight matrix where Standard has
    # two, so at equal training compute the Standard SAE may be 1.5 times as wide.
    COMPARED = {
        "Standard": (StandardSAE, N_FEATURES, (0.2, 1.6)),
        "Standard 1.5x": (StandardSAE, 3 * N_FEATURES // 2, (0.2, 1.6)),
        "Gated": (GatedSAE, N_FEATURES, (0.4, 2.8)),
    }
    COLOURS = alt.Scale(domain=list(COMPARED), range=["#d55e00", "#e69f00", "#0072b2"])
    SHAPES = alt.Scale(domain=list(COMPARED), range=["square", "triangle-up", "circle"])


@app.function
def sweep(steps, seed=0, n_l1=10, batch=512, progress=lambda variant, steps: None):
    """Train each kind over a range of λ, as one stack; the rows of the results table.

    All see the same data in the same order, and are measured on the same 20 000 fresh rows.
    `progress` is told, now and then, how many steps of which kind were done since it was last told.
    """
    data = SuperpositionData(D_IN, N_FEATURES, firing=ACTIVE / N_FEATURES, seed=seed)
    held_out = list(itertools.islice(data.batches(1000, seed=seed + 10_000), 20))
    table = []
    for name, (kind, d_sae, (least, most)) in COMPARED.items():
        l1 = torch.logspace(math.log10(least), math.log10(most), n_l1)
        sae = kind(D_IN, d_sae, stack=n_l1, generator=torch.Generator().manual_seed(seed))
        # On data this small a rate of 1e-2 learns in thousands of steps what the paper's 3e-4, made
        # for language models, does not reach in tens of thousands.
        done = 0
        for record in train(
            sae, data.batches(batch, seed), l1=l1, steps=steps, lr=1e-2, log_every=50
        ):
            progress(name, record.step - done)
            done = record.step
        measured = evaluate(sae, held_out)
        for i in range(n_l1):
            scalars = {
                key: round(getattr(measured, key)[i].item(), 5)
                for key in ("l0", "fvu", "gamma", "norm_ratio", "dead_fraction")
            }
            table.append({"variant": name, "d_sae": d_sae, "l1": round(l1[i].item(), 4)} | scalars)
    return table


@app.function
def frontier(table, variant):
    """Rows that no other of the variant beats in both FVU and L0, by rising FVU."""
    best = []
    for row in sorted((r for r in table if r["variant"] == variant), key=lambda r: r["fvu"]):
        if not best or row["l0"] < best[-1]["l0"]:
            best.append(row)
    return best


@app.function
def at_fvu(table, variant, fvu):
    """(L0, γ) where a variant's frontier reaches an FVU, between two of its points, or None.

    Log L0 and γ are interpolated in log FVU.
    """
    for left, right in itertools.pairwise(frontier(table, variant)):
        if left["fvu"] <= fvu <= right["fvu"] and right["l0"] > 0:
            t = math.log(fvu / left["fvu"]) / math.log(right["fvu"] / left["fvu"])
            log_l0 = (1 - t) * math.log(left["l0"]) + t * math.log(right["l0"])
            return math.exp(log_l0), (1 - t) * left["gamma"] + t * right["gamma"]
    return None


@app.function
def comparison(table, levels=(0.125, 0.15, 0.2, 0.25, 0.3, 0.4)):
    """At each FVU that all kinds reach: L0 and γ of each, and L0 as a multiple of Gated's."""
    rows = []
    for fvu in levels:
        found = {variant: at_fvu(table, variant, fvu) for variant in COMPARED}
        if all(found.values()):
            row = {"FVU": fvu}
            row |= {f"L0 {variant}": round(l0, 2) for variant, (l0, _) in found.items()}
            row |= {f"γ {variant}": round(gamma, 3) for variant, (_, gamma) in found.items()}
            for variant in list(COMPARED)[:-1]:
                row[f"{variant} / Gated"] = round(found[variant][0] / found["Gated"][0], 2)
            rows.append(row)
    return rows


@app.function
def verdict(table):
    """The sentence that the figures add up to, with its numbers computed from the table."""
    rows = comparison(table)
    if not rows:
        return "The kinds share no level of FVU, so they cannot be compared: train for longer."

    def span(column, digits):
        values = [row[column] for row in rows]
        return " to ".join(f"{value:.{digits}f}" for value in (min(values), max(values)))

    return (
        f"At equal FVU, Gated needs {span('Standard / Gated', 1)} times fewer active latents than "
        f"Standard, and {span('Standard 1.5x / Gated', 1)} times fewer than a Standard SAE "
        f"1.5 times as wide; γ is {span('γ Gated', 2)} for Gated and {span('γ Standard', 2)} for "
        f"Standard."
    )


@app.function
def pareto_chart(table):
    """FVU and γ against L0, a line for each variant."""
    base = (
        alt.Chart(alt.Data(values=[row for row in table if row["l0"] > 0.1]))
        .mark_line(point=alt.OverlayMarkDef(size=60, filled=True), strokeWidth=2)
        .encode(
            x=alt.X(
                "l0:Q",
                scale=alt.Scale(type="log", nice=False, padding=12),
                title="L0: latents active per row",
            ),
            color=alt.Color(
                "variant:N", scale=COLOURS, legend=alt.Legend(title=None, orient="top")
            ),
            shape=alt.Shape("variant:N", scale=SHAPES),
            order="l1:Q",
            tooltip=["variant:N", "l1:Q", "l0:Q", "fvu:Q", "gamma:Q", "dead_fraction:Q"],
        )
        .properties(width=330, height=280)
    )
    fvu = base.encode(
        y=alt.Y("fvu:Q", scale=alt.Scale(type="log"), title="FVU: variance unexplained")
    )
    one = alt.Chart(alt.Data(values=[{"one": 1}])).mark_rule(strokeDash=[4, 4]).encode(y="one:Q")
    gamma = base.encode(y=alt.Y("gamma:Q", scale=alt.Scale(zero=False), title="γ: at 1, no bias"))
    return fvu | (one + gamma)


@app.function
def as_markdown(rows):
    """Rows as a table that reads as well in a terminal as in a README."""
    columns = list(rows[0])
    lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)


@app.function
def main(arguments):
    """What `python explainer.py` does: train, print the table, and, for `rebuild`, keep it."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(
        prog="explainer.py",
        description="Train Standard and Gated SAEs on toy data over a range of λ; compare them.",
    )
    parser.add_argument("what", nargs="?", choices=["print", "rebuild"], default="print")
    parser.add_argument("--steps", type=int, default=4000, help="training steps (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="of data and initialisation")
    args = parser.parse_args(arguments)
    with tqdm(total=len(COMPARED) * args.steps, unit="step", disable=None) as bar:

        def progress(variant, steps):
            bar.set_description(variant, refresh=False)
            bar.update(steps)

        table = sweep(args.steps, args.seed, progress=progress)
    compared = comparison(table)
    print(as_markdown(table), *([as_markdown(compared)] if compared else []), sep="\n\n")
    print(f"\n{verdict(table)}")
    if args.what == "rebuild":
        RESULTS.mkdir(exist_ok=True)
        content = {"steps": args.steps, "seed": args.seed, "table": table}
        (RESULTS / "pareto.json").write_text(json.dumps(content, indent=1) + "\n")
        pareto_chart(table).save(RESULTS / "pareto.svg")


@app.cell
def command_line():
    arguments = sys.argv[1:] if mo.app_meta().mode == "script" else None
    return (arguments,)


@app.cell
def script(arguments):
    if arguments is not None:
        main(arguments)
    return


@app.cell(hide_code=True)
def title():
    mo.md(r"""
    # Gated Sparse Autoencoders

    A language model packs more features into its activations than there are dimensions. A *sparse
    autoencoder* (SAE) tries to list them: it writes each activation $x$ as a sum of a few
    directions from a large learned dictionary, $\hat x = \sum_i f_i\, d_i$.

    The usual recipe charges for the size of the coefficients, $\lambda \sum_i f_i$, and so makes
    them all too small: it *shrinks*. A **Gated** SAE splits the question in two, *which* directions
    and *how strongly*, and charges for the first alone.
    """)
    return


@app.cell
def committed():
    saved = json.loads((RESULTS / "pareto.json").read_text())
    return (saved,)


@app.cell(hide_code=True)
def setting(saved):
    mo.md(rf"""
    ## What it buys

    The toy world has {N_FEATURES} features in {D_IN} dimensions, of which {ACTIVE} fire at a time.
    Each point below is one SAE, trained for {saved["steps"]} steps with a $\lambda$ of its own.
    Left and low is better: fewer latents active (**L0**), less of the variance unexplained
    (**FVU**). On the right is the *relative reconstruction bias* $\gamma$: below 1,
    reconstructions are too short.
    """)
    return


@app.cell
def live_form():
    live = (
        mo.md("Do not take it from a file: train all three kinds here. {steps} {seed}")
        .batch(
            steps=mo.ui.slider(100, 2000, value=200, step=100, label="steps", show_value=True),
            seed=mo.ui.number(0, 999, value=1, label="seed of data and initialisation"),
        )
        .form(submit_button_label="Train", bordered=True)
    )
    return (live,)


@app.cell
def live_table(live, saved):
    if live.value is None:
        table = saved["table"]
    else:
        _steps = live.value["steps"]
        with mo.status.progress_bar(total=len(COMPARED) * _steps, title="Training") as _bar:
            table = sweep(
                _steps,
                live.value["seed"],
                n_l1=6,
                batch=256,
                progress=lambda variant, steps: _bar.update(steps, subtitle=variant),
            )
    return (table,)


@app.cell
def pareto(table):
    pareto_chart(table)
    return


@app.cell(hide_code=True)
def sentence(table):
    mo.callout(mo.md(f"**{verdict(table)}**"), kind="success")
    return


@app.cell
def levels(table):
    mo.ui.table(comparison(table), selection=None, label="L0 at equal FVU")
    return


@app.cell
def live_controls(live):
    live
    return


if __name__ == "__main__":
    app.run()
