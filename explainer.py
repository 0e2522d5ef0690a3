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
    import warnings
    from pydoc_data.topics import topics

    import altair as alt
    import marimo as mo
    import torch

    from gated_sae import (
        GatedSAE,
        JumpReLUSAE,
        Moments,
        NaturalGatedSAE,
        SigmoidGatedSAE,
        SoftCutoffSAE,
        StandardSAE,
        evaluate,
        harvest,
        integrated_gradients,
        jump_relu,
        loss_recovered,
        moments,
        rescale_and_shift,
        shuffle,
        splice,
        to_jumprelu,
        train,
        two_standard_losses,
    )
    from toy_data import SuperpositionData, recovery, zipf

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
    # The evidence for the claims: (kind, options, (least λ, most λ)), then what becomes of some of
    # them once trained; `refit` trains without penalty.
    LOW, HIGH = (0.15, 1.2), (0.3, 2.4)
    EVIDENCE = {
        "Standard": (StandardSAE, {}, LOW),
        "Standard 1.5x": (StandardSAE, {"d_sae": 192}, LOW),
        "Gated": (GatedSAE, {}, HIGH),
        "rescale & shift": (StandardSAE, {}, (0.2, 2.4)),
        "rescale & shift, decoder too": (StandardSAE, {}, (0.2, 2.4)),
        "natural b_mag": (NaturalGatedSAE, {}, (0.6, 4.8)),
        "log penalty": (StandardSAE, {"penalty": "log"}, (0.3, 2.0)),
        "soft cutoff": (SoftCutoffSAE, {}, LOW),
        "JumpReLU": (JumpReLUSAE, {}, (0.05, 0.6)),
    }
    FINISH = {
        "rescale & shift": lambda sae, refit: refit(rescale_and_shift(sae)),
        "rescale & shift, decoder too": lambda sae, refit: refit(rescale_and_shift(sae, True)),
        "soft cutoff": lambda sae, refit: to_jumprelu(sae),
    }
    ABLATIONS = {
        "log penalty, a = 4": (StandardSAE, {"penalty": "log", "a": 4.0}, (0.06, 0.5)),
        "aux unfrozen": (GatedSAE, {"aux": "unfrozen"}, LOW),
        "without aux": (GatedSAE, {"aux": None}, HIGH),
        "without r_mag": (GatedSAE, {"freeze": "r_mag"}, HIGH),
        "untied": (GatedSAE, {"tied": False}, HIGH),
        "sigmoid gate, without aux": (SigmoidGatedSAE, {"aux": None}, LOW),
        "norms frozen, aux frozen": (GatedSAE, {"penalty": "norm_frozen"}, HIGH),
        "norms live, aux unfrozen": (GatedSAE, {"penalty": "norm_live", "aux": "unfrozen"}, LOW),
        "norms live, aux frozen": (GatedSAE, {"penalty": "norm_live"}, HIGH),
        "norms frozen, aux unfrozen": (
            GatedSAE,
            {"penalty": "norm_frozen", "aux": "unfrozen"},
            LOW,
        ),
        "encoder drawn apart": (GatedSAE, {"encoder": "apart"}, HIGH),
        "no λ warm-up": (GatedSAE, {"l1_warmup": 0.0}, HIGH),
    }
    # What is spliced into the language model, its MLP's 128 numbers: as COMPARED, 4 times as wide.
    SPLICED = {
        "Standard": (StandardSAE, 512, (0.5, 8.0)),
        "Standard 1.5x": (StandardSAE, 768, (0.5, 8.0)),
        "Gated": (GatedSAE, 512, (1.0, 16.0)),
    }
    SHAPES = alt.Scale(domain=list(COMPARED), range=["square", "triangle-up", "circle"])


@app.function
def sweep(steps, seed=0, n_l1=10, batch=512, progress=lambda variant, steps: None):
    """Train each kind over a range of λ, as one stack; the rows of the results table.

    All see the same data in the same order, and are measured on the same 20 000 fresh rows.
    `progress` is told, now and then, how many steps of which kind were done since it was last told.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    data = SuperpositionData(D_IN, N_FEATURES, firing=ACTIVE / N_FEATURES, seed=seed, device=device)
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
def at_fvu(table, variant, fvu, keys=("gamma",)):
    """(L0, γ) where a variant's frontier reaches an FVU, between two of its points, or None.

    Log L0 and γ, or any other keys, are interpolated in log FVU.
    """
    for left, right in itertools.pairwise(frontier(table, variant)):
        if left["fvu"] <= fvu <= right["fvu"] and right["l0"] > 0:
            t = math.log(fvu / left["fvu"]) / math.log(right["fvu"] / left["fvu"])
            log_l0 = (1 - t) * math.log(left["l0"]) + t * math.log(right["l0"])
            return math.exp(log_l0), *((1 - t) * left[key] + t * right[key] for key in keys)
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
def world(name, seed):
    """One of three data sets of 128 features in 32 dimensions, 4 active on average."""
    if name == "plain":
        return SuperpositionData(32, 128, firing=4 / 128, seed=seed)
    if name == "Zipf, correlated":
        return SuperpositionData(32, 128, firing=zipf(128, 4), correlation=0.3, seed=seed)
    # 32 parents with three children each, which fire on a quarter of their parent's occasions
    p = 4 / (32 * 1.75)
    parents = [-1] * 32 + [i // 3 for i in range(96)]
    return SuperpositionData(32, 128, firing=[p] * 32 + [p / 4] * 96, parents=parents, seed=seed)


@app.function
def measured_runs(name, make, options, span, seeds=5, steps=1500, n_l1=5, world_name="plain"):
    """Rows of metrics for each seed and λ, trained as one stack; each seed has data of its own."""
    options = dict(options)
    l1s = [round(v.item(), 4) for v in torch.logspace(*(math.log10(v) for v in span), n_l1)]
    data = [world(world_name, seed) for seed in range(seeds)]

    def stream(offset, batch=256):
        streams = [d.batches(batch, seed + offset) for seed, d in enumerate(data)]
        while True:
            x = torch.stack([next(one) for one in streams]).unsqueeze(1)
            yield x.expand(seeds, n_l1, batch, 32)

    frozen, encoder = options.pop("freeze", None), options.pop("encoder", None)
    schedule = {"steps": steps, "lr": 1e-2, "log_every": steps, "device": "cpu"}
    schedule |= {"l1_warmup": options.pop("l1_warmup", 0.1)}
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the combinations that fail are here to be seen failing
        sae = make(
            32, options.pop("d_sae", 128), stack=(seeds, n_l1), generator=generator, **options
        )
        if frozen:
            getattr(sae, frozen).requires_grad_(False)
        if encoder:
            sae.W_enc.data = make(32, 128, stack=(seeds, n_l1), generator=generator).W_enc.data
        list(train(sae, stream(0), l1=torch.tensor(l1s).expand(seeds, n_l1), **schedule))

        def refit(corrected):
            list(train(corrected, stream(10_000), l1=0.0, **schedule))
            return corrected

        sae = FINISH.get(name, lambda sae, refit: sae)(sae, refit)
        found = evaluate(sae, itertools.islice(stream(20_000, 1000), 10))
        rows = []
        for seed, j in itertools.product(range(seeds), range(n_l1)):
            member = type(sae)(**(sae.config | {"stack": ()}))
            member.load_state_dict({key: value[seed, j] for key, value in sae.state_dict().items()})
            scores = recovery(member, data[seed], rows=2000)
            row = {"world": world_name, "variant": name, "seed": seed, "l1": l1s[j]}
            for key in ("l0", "fvu", "gamma", "norm_ratio", "cosine_squared", "dead_fraction"):
                row[key] = round(getattr(found, key)[seed, j].item(), 5)
            row |= {"mcc": round(scores.mcc, 4), "f1": round(scores.f1, 4)}
            row["norm"] = round(member.W_dec.norm(dim=-1).mean().item(), 4)
            rows.append(row)
    return rows


@app.function
def spread(values):
    """Mean and standard error of one number per seed."""
    values = torch.tensor([float(value) for value in values], dtype=torch.float64)
    se = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.zeros(())
    return {"mean": float(f"{values.mean().item():.4g}"), "se": float(f"{se.item():.2g}")}


@app.function
def l0_ratios(rows, variant, other, world_name="plain", levels=(0.1, 0.15, 0.2, 0.3)):
    """Per seed: L0 of a variant over that of another, geometric mean over the FVU both reach."""
    ratios = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed and row["world"] == world_name]
        found = [(at_fvu(own, variant, fvu), at_fvu(own, other, fvu)) for fvu in levels]
        logs = [math.log(a[0] / b[0]) for a, b in found if a and b]
        if logs:
            ratios.append(math.exp(sum(logs) / len(logs)))
    return ratios


@app.function
def gammas(rows, variant, world_name="plain"):
    """Per seed: mean γ over the λ whose SAE explains between 60% and 95% of the variance."""
    kept = {}
    for row in rows:
        if (row["variant"], row["world"]) == (variant, world_name) and 0.05 < row["fvu"] < 0.4:
            kept.setdefault(row["seed"], []).append(row["gamma"])
    return [sum(values) / len(values) for values in kept.values()]


@app.function
def trained_pair(seeds=5, steps=1500):
    """(Standard, Gated, x): a stack over seeds of each, trained on the plain world; fresh rows."""
    data = [world("plain", seed) for seed in range(seeds)]

    def stream(offset, batch):
        streams = [d.batches(batch, seed + offset) for seed, d in enumerate(data)]
        while True:
            yield torch.stack([next(one) for one in streams])

    saes = []
    for kind, l1 in ((StandardSAE, 0.4), (GatedSAE, 0.9)):
        sae = kind(32, 128, stack=seeds, generator=torch.Generator().manual_seed(0))
        options = {"steps": steps, "lr": 1e-2, "log_every": steps, "device": "cpu"}
        list(train(sae, stream(0, 256), l1=l1, **options))
        saes.append(sae.double())
    return *saes, next(stream(20_000, 5000)).double()


@app.function
def members(sae):
    """The single SAEs of a stack with one leading dimension."""
    for i in range(sae.stack[0]):
        member = type(sae)(**(sae.config | {"stack": ()}), dtype=sae.W_enc.dtype)
        member.load_state_dict({name: value[i] for name, value in sae.state_dict().items()})
        yield member


@app.function
def gradient(sae, value, name):
    """d value / d parameter, zeros where it does not reach."""
    (grad,) = torch.autograd.grad(
        value, [getattr(sae, name)], allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return grad


@app.function
def exact_numbers(seeds=5, steps=1500):
    """What needs no sweep: {claim id: {quantity: one number per seed}}, on one trained pair."""
    standard, gated, x_all = trained_pair(seeds, steps)
    numbers = {}

    def note(claim, quantity, value):
        value = value.item() if isinstance(value, torch.Tensor) else value
        numbers.setdefault(claim, {}).setdefault(quantity, []).append(value)

    for seed, (s, g, x) in enumerate(zip(members(standard), members(gated), x_all, strict=True)):
        # S1: gradient descent on (a - f)² + λ f, f ≥ 0
        draw = torch.rand(2, 50, generator=torch.Generator().manual_seed(seed)).double()
        a, l1, f = 4 * draw[0] - 1, draw[1], torch.ones(50).double()
        for _ in range(300):
            f = (f - 0.1 * (2 * (f - a) + l1)).clamp_min(0)
        note("S1", "largest distance to closed form", (f - (a - l1 / 2).clamp_min(0)).abs().max())

        x_hat = s(x).detach()
        m = moments(x, x_hat)
        grid = torch.linspace(0.5, 1.5, 100_001).double()
        cost = m.x_hat_sq / grid**2 - 2 * m.dot / grid + m.x_sq
        note("S2", "γ of Standard", m.gamma)
        note("S2", "its distance to the best of a grid", (grid[cost.argmin()] - m.gamma).abs())
        error_sq = (x - x_hat).square().sum(-1).mean()
        logged = Moments.from_norms(m.x_sq, m.x_hat_sq, error_sq)
        note("S3", "distance between the two γ", (logged.gamma - m.gamma).abs())
        rest = ((x_hat - m.factor_on_x * x) * x).sum(-1).mean() / m.dot
        note("S4", "factor on x", m.factor_on_x)
        note("S4", "what is left along x, relative", rest.abs())
        note("S5", "factor on x times factor on x̂", m.cosine_squared)
        note("S5", "factor on x̂ times γ", m.factor_on_x_hat * m.gamma)
        note("S6", "first preprint's value over γ, Standard", m.gamma_v1 / m.gamma)
        half = moments(torch.ones(1, 1).double(), torch.full((1, 1), 0.5).double())
        note("S6", "first preprint's value at x = 1, x̂ = 1/2", half.gamma_v1)
        n = moments(x, g(x).detach())
        note("S6", "first preprint's value over γ, Gated", n.gamma_v1 / n.gamma)
        note("S7", "γ of Gated", n.gamma)
        note("S7", "norm ratio of Gated", n.norm_ratio)

        losses = g.losses(x)
        note(
            "G1",
            "largest absolute gradient of reconstruct on b_gate",
            gradient(g, losses.reconstruct, "b_gate").abs().max(),
        )
        untied = GatedSAE(32, 128, tied=False, dtype=torch.float64)
        untied.load_state_dict(
            {n: getattr(g, n) for n in ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag")}
            | {"W_mag": g.W_enc * g.r_mag.exp()}
        )
        note(
            "G1",
            "the same on an untied W_gate",
            gradient(untied, untied.losses(x).reconstruct, "W_enc").abs().max(),
        )
        wrong = GatedSAE(32, 128, aux=None, dtype=torch.float64)
        wrong.load_state_dict(g.state_dict())
        note(
            "G2",
            "smallest gradient of L_incorrect on b_gate",
            gradient(wrong, wrong.losses(x).total(0.9), "b_gate").min(),
        )
        note(
            "G3",
            "largest absolute gradient of L_aux on W_dec",
            gradient(g, losses.aux, "W_dec").abs().max(),
        )
        note(
            "G3",
            "largest absolute gradient of L_aux on b_dec",
            gradient(g, losses.aux, "b_dec").abs().max(),
        )
        loose = GatedSAE(32, 128, aux="unfrozen", dtype=torch.float64)
        loose.load_state_dict(g.state_dict())
        pi_gate, pi_mag = loose.paths(x)
        both = two_standard_losses(
            x, loose.gate(pi_gate, pi_mag), pi_gate, loose.W_dec, loose.b_dec
        )
        two, three = (sum(part.total(0.9) for part in both), loose.losses(x).total(0.9))
        note(
            "G4",
            "largest distance of gradients",
            max(
                (gradient(loose, two, p) - gradient(loose, three, p)).abs().max()
                for p, _ in loose.named_parameters()
            ),
        )
        note(
            "G7",
            "largest distance of outputs",
            (to_jumprelu(g).encode(x) - g.encode(x)).abs().max(),
        )
        natural = NaturalGatedSAE(32, 128, dtype=torch.float64)
        natural.load_state_dict({n: v for n, v in g.state_dict().items() if n != "b_mag"})
        smooth = natural.r_mag.exp() * natural.paths(x)[0].relu()
        note(
            "G8",
            "largest distance to exp(r_mag) ReLU(π_gate)",
            (natural.encode(x) - smooth).abs().max(),
        )

        # A7: x and all biases times 3
        for normalize in (True, False):
            big = GatedSAE(32, 128, normalize=normalize, dtype=torch.float64)
            small = GatedSAE(32, 128, normalize=normalize, dtype=torch.float64)
            small.load_state_dict(g.state_dict())
            big.load_state_dict(
                {n: 3 * v if n.startswith("b_") else v for n, v in g.state_dict().items()}
            )
            with torch.no_grad():
                ratio = [b / a for a, b in zip(small.losses(x), big.losses(3 * x), strict=True)]
            name = "normalised" if normalize else "plain"
            note("A7", f"error at 3 x over error at x, {name}", ratio[0])
            note("A7", f"sparsity at 3 x over sparsity at x, {name}", ratio[1])

        # D1: a random softmax head reads x; its own samples are the labels
        generator = torch.Generator().manual_seed(seed)
        head = torch.randn(32, 50, generator=generator).double()
        labels = torch.multinomial((x @ head).softmax(-1), 1, generator=generator)[:, 0]
        ce = lambda v: torch.nn.functional.cross_entropy(v @ head, labels)  # noqa: B023, E731
        clean, zero, mean = ce(x), ce(0 * x), ce(x.mean(0).expand_as(x))
        for kind, sae in (("Standard", s), ("Gated", g)):
            for ablation, ablated in (("zero", zero), ("mean", mean)):
                note(
                    "D1",
                    f"{kind}, {ablation} ablation",
                    loss_recovered(ce(sae(x)), clean, ablated).detach(),
                )

        # D3: attributions to π_mag of the sum of f̃, from a baseline of 0
        jump = to_jumprelu(g)
        pi = (jump.project(x[:200]) + jump.b_enc).detach()
        out = lambda z: jump_relu(z, jump.threshold).sum(-1)  # noqa: B023, E731
        total = integrated_gradients(out, pi, torch.zeros_like(pi), steps=2000).sum(-1)
        jumps = ((pi > jump.threshold) * jump.threshold).sum(-1)
        gap = out(pi) - out(torch.zeros_like(pi)) - total
        note("D3", "completeness gap of IG", gap.mean().detach())
        note("D3", "sum of the jumps crossed", jumps.mean().detach())
    return numbers


@app.function
def dead_latents(seeds=5, steps=1500):
    """Share of latents that do not fire after training with half of them started dead."""
    shares = {}
    for name, every in (
        ("without resampling", None),
        ("resampled every tenth of the run", steps // 10),
    ):
        data = [world("plain", seed) for seed in range(seeds)]

        def stream(offset, data=data):
            streams = [d.batches(256, seed + offset) for seed, d in enumerate(data)]
            while True:
                yield torch.stack([next(one) for one in streams])

        sae = GatedSAE(32, 128, stack=seeds, generator=torch.Generator().manual_seed(0))
        sae.b_gate.data[:, ::2] = -1e3
        options = {"steps": steps, "lr": 1e-2, "log_every": steps, "device": "cpu"}
        list(train(sae, stream(0), l1=0.6, resample_every=every, **options))
        found = evaluate(sae, itertools.islice(stream(20_000), 40))
        shares[f"dead latents {name}"] = found.dead_fraction.tolist()
    return shares


@app.function
def claims(rows, numbers):
    """The table: each claim of the discussion, what was measured of it here, and whether it agrees.

    `rows` are those of `measured_runs`, `numbers` those of `exact_numbers` and `dead_latents`. A
    verdict is computed, never written: `agrees` if the stated inequality holds for the mean by two
    standard errors (exact claims: to rounding), `disagrees` if not.
    """
    plain = [row for row in rows if row["world"] == "plain"]

    def ratio(variant, other="Gated", world_name="plain"):
        return l0_ratios(rows, variant, other, world_name)

    def final(variant, key, chosen=max):
        """Per seed, a metric at the largest (or smallest) λ."""
        own = [row for row in plain if row["variant"] == variant]
        l1 = chosen(row["l1"] for row in own)
        return [row[key] for row in own if row["l1"] == l1]

    def above(values, bound):
        found = spread(values)
        return found["mean"] - 2 * found["se"] > bound

    def below(values, bound):
        found = spread(values)
        return found["mean"] + 2 * found["se"] < bound

    def near(values, bound, within):
        return all(abs(value - bound) <= within for value in values)

    table = []

    def row(claim, text, setting, measured, holds):
        measured = {name: values for name, values in measured.items() if values}
        table.append(
            {
                "id": claim,
                "claim": text,
                "setting": setting,
                "seeds": max((len(v) for v in measured.values()), default=0),
                "measured": {name: spread(values) for name, values in measured.items()},
                "verdict": {True: "agrees", False: "disagrees"}.get(
                    holds, "not decidable on toy data"
                ),
            }
        )

    pair = "one Standard (λ 0.4) and one Gated (λ 0.9) SAE a seed, plain world, float64"
    sweep_of = "sweep over λ; L0 at equal FVU (0.1 to 0.3), as a ratio to"
    n = numbers
    s1, s2, s3, s4, s5, s6, s7 = (list(n[f"S{i}"].values()) for i in range(1, 8))
    row(
        "S1",
        "L1 shrinks: gradient descent finds max(0, a - λ/2)",
        "50 random a, λ a seed",
        n["S1"],
        near(s1[0], 0, 1e-9),
    )
    row("S2", "γ = E‖x̂‖²/E[x̂·x] is the best rescaling of x̂", pair, n["S2"], near(s2[1], 0, 1e-5))
    row("S3", "γ follows from three logged numbers", pair, n["S3"], near(s3[0], 0, 1e-9))
    row("S4", "E[x̂·x]/E‖x‖² projects x̂ on x", pair, n["S4"], near(s4[1], 0, 1e-9))
    row(
        "S5",
        "the two best factors are not reciprocal; the one on x̂ is 1/γ",
        pair,
        n["S5"],
        below(s5[0], 1) and near(s5[1], 1, 1e-9),
    )
    row(
        "S6",
        "the first preprint's formula is right at γ = 1 only; it gave 1/√3 for 1/2",
        pair,
        n["S6"],
        near(s6[1], 3**-0.5, 1e-9) and above(s6[0], 1) and near(s6[2], 1, 1e-2),
    )
    row(
        "S7",
        "an unbiased SAE has a norm ratio below 1",
        pair,
        n["S7"],
        near(s7[0], 1, 0.02) and below(s7[1], 0.98),
    )
    g1, g3 = list(n["G1"].values()), list(n["G3"].values())
    row(
        "G1",
        "reconstruction gives the gate no gradient: exactly 0",
        pair,
        n["G1"],
        near(g1[0] + g1[1], 0, 0),
    )
    dying = {
        "L0 without aux": final("without aux", "l0", min),
        "L0 with aux, same λ": final("Gated", "l0", min),
    } | n["G2"]
    row(
        "G2",
        "without L_aux the gradient on b_gate is never negative, and the gates close",
        "smallest λ of the sweep; gradients: " + pair,
        dying,
        min(n["G2"]["smallest gradient of L_incorrect on b_gate"]) >= 0
        and above(
            [
                a / max(b, 1e-9)
                for a, b in zip(dying["L0 with aux, same λ"], dying["L0 without aux"], strict=True)
            ],
            10,
        ),
    )
    row(
        "G3",
        "L_aux with the frozen decoder: W_dec gets exactly 0, b_dec does not",
        pair,
        n["G3"],
        near(g3[0], 0, 0) and min(g3[1]) > 0,
    )
    row(
        "G4",
        "two usual losses have the gradient of three terms, aux unfrozen",
        pair,
        n["G4"],
        near(next(iter(n["G4"].values())), 0, 1e-9),
    )
    alive = {
        "dead latents": final("sigmoid gate, without aux", "dead_fraction"),
        "L0": final("sigmoid gate, without aux", "l0"),
        "FVU": final("sigmoid gate, without aux", "fvu"),
    }
    row(
        "G5",
        "a sigmoid gate trained with L_incorrect alone stays alive (sparse or not: see L0)",
        "largest λ of the sweep",
        alive,
        below(alive["dead latents"], 0.1) and below(alive["FVU"], 0.5),
    )
    ablated = {f"L0 {v} / Gated": ratio(v) for v in ("aux unfrozen", "without r_mag", "untied")}
    row(
        "G6",
        "freezing helps, r_mag helps, untying does not",
        f"{sweep_of} Gated",
        ablated,
        above(ablated["L0 aux unfrozen / Gated"], 1)
        and above(ablated["L0 without r_mag / Gated"], 1)
        and not below(ablated["L0 untied / Gated"], 1),
    )
    row(
        "G7",
        "a tied Gated SAE is a JumpReLU",
        pair,
        n["G7"],
        near(next(iter(n["G7"].values())), 0, 1e-9),
    )
    row(
        "G8",
        "b_mag = exp(r_mag) b_gate removes the jump",
        pair,
        n["G8"],
        near(next(iter(n["G8"].values())), 0, 1e-9),
    )
    a1 = {}
    for variant in ("rescale & shift", "rescale & shift, decoder too"):
        a1 |= {f"γ, {variant}": gammas(rows, variant), f"L0 {variant} / Gated": ratio(variant)}
    row(
        "A1",
        "rescale & shift cures shrinkage but stays behind Gated",
        f"{sweep_of} Gated",
        a1,
        all(near(v, 1, 0.03) for k, v in a1.items() if k[0] == "γ")
        and all(above(v, 1) for k, v in a1.items() if k[0] == "L"),
    )
    a2 = {
        "L0 natural b_mag / Gated": ratio("natural b_mag"),
        "L0 natural b_mag / rescale & shift": ratio("natural b_mag", "rescale & shift"),
        "γ": gammas(rows, "natural b_mag"),
    }
    row(
        "A2",
        "without the Heaviside, y = x̂(t ⊙ f): less expressive than rescale & shift",
        f"{sweep_of} Gated, and to rescale & shift",
        a2,
        above(a2["L0 natural b_mag / rescale & shift"], 1),
    )
    a3 = {
        "γ, log penalty": gammas(rows, "log penalty"),
        "γ, Standard": gammas(rows, "Standard"),
        "L0 log penalty / Standard": ratio("log penalty", "Standard"),
        "γ, a = 4": gammas(rows, "log penalty, a = 4"),
        "L0, a = 4 / Standard": ratio("log penalty, a = 4", "Standard"),
    }
    row(
        "A3",
        "log(1 + a f) in place of L1 lessens shrinkage of the Standard SAE",
        "sweep over λ, a = 1; γ where 60% to 95% of the variance is explained",
        a3,
        above([a - b for a, b in zip(a3["γ, log penalty"], a3["γ, Standard"], strict=True)], 0),
    )
    a4 = {
        "L0 soft cutoff / Standard": ratio("soft cutoff", "Standard"),
        "L0 soft cutoff / Gated": ratio("soft cutoff"),
        "γ": gammas(rows, "soft cutoff"),
    }
    row(
        "A4",
        "the soft cutoff trains, and becomes a JumpReLU as s falls",
        "trained at s = 0.1, measured at its limit s → 0",
        a4,
        bool(a4["L0 soft cutoff / Standard"]) and below(final("soft cutoff", "fvu", min), 0.2),
    )
    fours = (
        "norms frozen, aux frozen",
        "norms live, aux unfrozen",
        "norms live, aux frozen",
        "norms frozen, aux unfrozen",
    )
    a5 = {}
    for variant in fours:
        a5 |= {
            f"L0 {variant} / Gated": ratio(variant),
            f"mean norm, {variant}": final(variant, "norm", min),
        }
    mixed = (
        ratio("norms live, aux frozen", "norms live, aux unfrozen"),
        ratio("norms frozen, aux unfrozen", "norms live, aux unfrozen"),
    )
    row(
        "A5",
        "decoder-norm penalty: freeze in both or neither; in one only is worse",
        f"{sweep_of} Gated; norms at the smallest λ",
        a5,
        all(above(m, 1) for m in mixed if m)
        and below(a5["mean norm, norms live, aux frozen"], 0.5),
    )
    a6 = {f"L0 {v} / Gated": ratio(v) for v in ("encoder drawn apart", "no λ warm-up")}
    row(
        "A6",
        "W_enc starting as W_dec transposed, and warming λ up, help",
        f"{sweep_of} Gated",
        a6,
        all(above(v, 1) for v in a6.values()),
    )
    row(
        "A7",
        "dividing the L2 loss by E‖x‖² carries hyper-parameters over",
        "x and biases times 3: " + pair,
        n["A7"],
        near(n["A7"]["error at 3 x over error at x, normalised"], 1, 1e-9)
        and near(n["A7"]["sparsity at 3 x over sparsity at x, normalised"], 1, 1e-9),
    )
    row(
        "A8",
        "resampling revives dead latents: fewer than half as many are left",
        "Gated, λ 0.6, half the gates started at -1000",
        n["A8"],
        below([b - a / 2 for a, b in zip(*n["A8"].values(), strict=True)], 0),
    )
    wide = {
        f"L0 Standard 1.5x / Gated, {w}": ratio("Standard 1.5x", "Gated", w)
        for w in ("plain", "Zipf, correlated", "hierarchical")
    }
    row(
        "A9",
        "at equal training compute (Standard 1.5 times as wide) Gated is ahead",
        f"{sweep_of} Gated",
        wide,
        all(above(v, 1) for v in wide.values()),
    )
    d1 = n["D1"]
    order = [
        (a > b) == (c > d)
        for a, b, c, d in zip(
            *(
                d1[k]
                for k in (
                    "Standard, zero ablation",
                    "Gated, zero ablation",
                    "Standard, mean ablation",
                    "Gated, mean ablation",
                )
            ),
            strict=True,
        )
    ]
    row(
        "D1",
        "zero ablation inflates loss recovered, and never changes which SAE is ahead",
        "a random softmax head of 50 classes reads x; " + pair,
        d1,
        all(order)
        and above(
            [
                a - b
                for a, b in zip(d1["Gated, zero ablation"], d1["Gated, mean ablation"], strict=True)
            ],
            0,
        ),
    )
    row(
        "D2",
        "compute-efficiency hit, off a scaling curve",
        "needs language models of several sizes",
        {},
        None,
    )
    d3 = n["D3"]
    row(
        "D3",
        "integrated gradients miss exactly the jumps",
        "Gated as JumpReLU, sum of f̃, 200 rows, 2000 steps",
        d3,
        near([a / b for a, b in zip(*d3.values(), strict=True)], 1, 0.01),
    )
    d4 = {
        f"L0 Standard / Gated, {w}": ratio("Standard", "Gated", w)
        for w in ("plain", "Zipf, correlated", "hierarchical")
    }
    d4["γ, Gated"], d4["γ, Standard"] = gammas(rows, "Gated"), gammas(rows, "Standard")
    row(
        "D4",
        "about half as many latents at equal reconstruction, and γ near 1",
        f"{sweep_of} Gated",
        d4,
        all(above(v, 1.5) for k, v in d4.items() if k[0] == "L") and near(d4["γ, Gated"], 1, 0.02),
    )
    return table


@app.function
def evidence(steps=1500, progress=lambda what: None):
    """(claims, rows of every run): all that the table of claims rests on."""
    rows = []
    for name in ("plain", "Zipf, correlated", "hierarchical"):
        for variant, run in (EVIDENCE | (ABLATIONS if name == "plain" else {})).items():
            rows += measured_runs(variant, *run, steps=steps, world_name=name)
            progress(f"{variant}, {name}")
    numbers = exact_numbers(steps=steps) | {"A8": dead_latents(steps=steps)}
    progress("single numbers")
    return claims(rows, numbers), rows


@app.function
def condensed(claimed):
    """The table of claims for the README: at most three numbers a row."""
    return [
        {
            "": row["id"],
            "claim": row["claim"],
            "measured": "; ".join(
                f"{name} {value['mean']:.3g}" + (f" ± {value['se']:.1g}" if value["se"] else "")
                for name, value in list(row["measured"].items())[:3]
            ),
            "verdict": row["verdict"],
        }
        for row in claimed
    ]


@app.function
def recovered(rows, fvu=0.2):
    """At one FVU, means over seeds: what each variant costs, and how much of the truth it found."""
    table = []
    for name, variant in itertools.product(("plain", "Zipf, correlated", "hierarchical"), EVIDENCE):
        found = [
            at_fvu(
                [row for row in rows if row["world"] == name and row["seed"] == seed],
                variant,
                fvu,
                ("gamma", "mcc", "f1"),
            )
            for seed in sorted({row["seed"] for row in rows})
        ]
        found = torch.tensor([values for values in found if values])
        cells = [f"{value:.2f}" for value in found.mean(0)] if len(found) else ["-"] * 4
        table.append(
            {"data": name, "variant": variant}
            | dict(zip(("L0", "γ", "MCC", "F1"), cells, strict=True))
        )
    return table


@app.function
def evidence_chart(rows):
    """FVU against L0 for every variant on the three data sets; means over seeds."""
    okabe_ito = [
        *("#d55e00", "#e69f00", "#0072b2", "#009e73", "#56b4e9"),
        *("#cc79a7", "#999999", "#f0e442", "#000000"),
    ]
    means = {}
    for row in rows:
        if row["variant"] in EVIDENCE:
            means.setdefault((row["world"], row["variant"], row["l1"]), []).append(row)
    values = [
        {"data": name, "variant": variant, "l1": l1}
        | {key: sum(row[key] for row in group) / len(group) for key in ("l0", "fvu", "gamma")}
        for (name, variant, l1), group in means.items()
    ]
    return (
        alt.Chart(alt.Data(values=[value for value in values if value["l0"] > 0.1]))
        .mark_line(point=alt.OverlayMarkDef(size=35, filled=True))
        .encode(
            x=alt.X("l0:Q", scale=alt.Scale(type="log", nice=False, padding=8), title="L0"),
            y=alt.Y("fvu:Q", scale=alt.Scale(type="log"), title="FVU"),
            color=alt.Color(
                "variant:N", scale=alt.Scale(domain=list(EVIDENCE), range=okabe_ito), title=None
            ),
            order="l1:Q",
            tooltip=["variant:N", "l1:Q", "l0:Q", "fvu:Q", "gamma:Q"],
        )
        .properties(width=230, height=240)
        .facet(
            column=alt.Column(
                "data:N", sort=["plain", "Zipf, correlated", "hierarchical"], title=None
            )
        )
    )


@app.function
def english():
    """(read, held_out): bytes of Python's own help texts; the last tenth is held out.

    Topics quote each other, so a paragraph is kept only where it first comes: or else one byte in
    seven of what is held out would stand in a stretch of 40 that has been read.
    """
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    text = torch.frombuffer(bytearray("\n\n".join(paragraphs).encode()), dtype=torch.uint8).long()
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


@app.class_definition
class LanguageModel(torch.nn.Module):
    """A transformer of one layer, GELU: bytes (batch, tokens) -> logits (batch, tokens, 256).

    The logits at a byte are for the next one. At most `context` bytes are read at once.
    """

    def __init__(self, d_model=128, n_heads=8, context=128):
        super().__init__()
        self.n_heads, self.context = n_heads, context
        self.byte = torch.nn.Embedding(256, d_model)
        self.position = torch.nn.Embedding(context, d_model)
        self.attention_norm, self.mlp_norm, self.last_norm = (
            torch.nn.LayerNorm(d_model) for _ in range(3)
        )
        self.qkv = torch.nn.Linear(d_model, 3 * d_model)
        self.project = torch.nn.Linear(d_model, d_model)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(d_model, 4 * d_model),
            torch.nn.GELU(),
            torch.nn.Linear(4 * d_model, d_model),
        )
        self.unembed = torch.nn.Linear(d_model, 256, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.02)

    def attend(self, x):
        """Each position reads from itself and those before it."""
        heads = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (batch, tokens, 3, heads, d)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, d)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(2))  # (batch, tokens, d_model)

    def forward(self, ids):
        x = self.byte(ids) + self.position.weight[: ids.shape[1]]  # (batch, tokens, d_model)
        x = x + self.attend(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return self.unembed(self.last_norm(x))  # (batch, tokens, 256)


@app.function
def cross_entropy(model, ids):
    """Of each byte given those before it in its row of (batch, tokens): nats per byte."""
    logits, following = model(ids)[:, :-1], ids[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())


@app.function
def stretches(text, length, batch, seed):
    """Stretches of the text that start anywhere, without end: (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(text) - length + 1, (batch, 1), generator=generator)
        yield text[start + torch.arange(length)]


@app.function
def trained_language_model(text, steps=1200, seed=0, progress=lambda: None):
    """A LanguageModel that has read 16 stretches of 128 bytes a step; its weights are frozen."""
    with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global generator
        torch.manual_seed(seed)
        model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for ids in itertools.islice(stretches(text, model.context, 16, seed), steps):
        loss = cross_entropy(model, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()
        progress()
    return model.requires_grad_(False)


@app.function
def guessing(text, held_out):
    """CE in nats per byte without a model: from counts of bytes, and of bytes after a byte.

    A byte after a byte counts once more in all, spread as single bytes are.
    """
    single = torch.bincount(text, minlength=256) + 1.0
    single /= single.sum()
    pairs = torch.bincount(256 * text[:-1] + text[1:], minlength=256**2).view(256, 256) + single
    pairs /= pairs.sum(1, keepdim=True)
    before, after = held_out[:-1], held_out[1:]
    return {
        "unigram": -single[after].log().mean().item(),
        "bigram": -pairs[before, after].log().mean().item(),
    }


@app.function
def language(model_steps=1200, steps=1500, seed=0, n_l1=7, progress=lambda what: None):
    """SAEs spliced into a language model: its own CE, and a row for each SAE on its MLP's output.

    CE is in nats per byte of held-out text: clean, with the MLP's output ablated (zeros, or its
    mean), and with x̂ in its place. `progress` is told after every step what was trained.
    """
    read, held_out = english()
    model = trained_language_model(read, model_steps, seed, lambda: progress("language model"))
    ids = held_out[: len(held_out) // model.context * model.context].view(-1, model.context)
    x = torch.cat(list(harvest(model, model.mlp, ids.split(64))))

    def spliced(put):
        with splice(model.mlp, put), torch.no_grad():
            return cross_entropy(model, ids).item()

    ce = guessing(read, held_out) | {"clean": cross_entropy(model, ids).item()}
    ce |= {"zero": spliced("zero"), "mean": spliced(x.mean(0))}
    table = []
    for name, (kind, d_sae, (least, most)) in SPLICED.items():
        l1 = torch.logspace(math.log10(least), math.log10(most), n_l1)
        sae = kind(x.shape[1], d_sae, stack=n_l1, generator=torch.Generator().manual_seed(seed))
        inputs = stretches(read, model.context, 64, seed)
        rows = shuffle(harvest(model, model.mlp, inputs), 512, held=2**16, seed=seed)
        options = {"steps": steps, "lr": 1e-2, "log_every": steps, "device": "cpu"}
        list(train(sae, map(lambda x: progress(name) or x, rows), l1=l1, **options))
        found = evaluate(sae, x.split(1024))
        for i, member in enumerate(members(sae)):
            row = {"variant": name, "d_sae": d_sae, "l1": l1[i].item()}
            row |= {
                key: getattr(found, key)[i].item()
                for key in ("l0", "fvu", "gamma", "dead_fraction")
            }
            row["ce"] = spliced(member)
            for ablated in ("zero", "mean"):
                row[f"recovered_{ablated}"] = loss_recovered(row["ce"], ce["clean"], ce[ablated])
            table.append(row)
    ce, *table = (
        {key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}
        for row in (ce, *table)
    )
    return {
        "python": sys.version.split()[0],  # whose help texts these are
        "steps": {"language model": model_steps, "SAEs": steps},
        "seed": seed,
        "ce": ce,
        "table": table,
    }


@app.function
def language_comparison(found, levels=(0.8, 0.9, 0.95, 0.98)):
    """At each share of the loss recovered (mean ablation) that all kinds reach: L0, γ and FVU.

    At equal CE, that is. The same CE recovers another share of the loss beside zero ablation.
    """
    ce, rows = found["ce"], []
    # `at_fvu` finds a level of what splicing adds to CE just as well.
    added = [row | {"fvu": row["ce"] - ce["clean"], "FVU": row["fvu"]} for row in found["table"]]
    for level in levels:
        allowed = (1 - level) * (ce["mean"] - ce["clean"])
        at = {variant: at_fvu(added, variant, allowed, ("gamma", "FVU")) for variant in COMPARED}
        if all(at.values()):
            zero = 1 - allowed / (ce["zero"] - ce["clean"])
            row = {"recovered, mean": level, "recovered, zero": round(zero, 3)}
            row["CE"] = round(ce["clean"] + allowed, 3)
            row |= {f"L0 {variant}": round(l0, 2) for variant, (l0, _, _) in at.items()}
            for variant in ("Standard", "Gated"):
                _, gamma, fvu = at[variant]
                row |= {f"γ {variant}": round(gamma, 3), f"FVU {variant}": round(fvu, 3)}
            for variant in list(COMPARED)[:-1]:
                row[f"{variant} / Gated"] = round(at[variant][0] / at["Gated"][0], 2)
            rows.append(row)
    return rows


@app.function
def language_losses(found):
    """How good the model is, and what ablating its MLP costs it, in words."""
    ce = {key: f"{value:.2f}" for key, value in found["ce"].items()}
    worse = "more" if found["ce"]["zero"] > found["ce"]["mean"] else "less"
    return (
        f"The model's CE is {ce['clean']}; counts of bytes give {ce['unigram']}, of pairs of "
        f"bytes {ce['bigram']}. With its MLP's output set to zero it is {ce['zero']}, to its "
        f"mean {ce['mean']}: here zeros cost {worse} than the mean."
    )


@app.function
def language_verdict(found):
    """Who is ahead at equal CE, with the numbers computed from the table."""
    rows = language_comparison(found)
    if not rows:
        return "The kinds share no level of CE, so they cannot be compared: train for longer."

    def against(variant):
        ratios = [row[f"{variant} / Gated"] for row in rows]
        if min(ratios) > 1:
            who = "Gated is ahead"
        elif max(ratios) < 1:
            who = "Gated is behind"
        else:
            who = "neither is ahead at every level"
        return f"{variant} has {min(ratios):.2f} to {max(ratios):.2f} times its L0 ({who})"

    least, most = rows[0]["recovered, mean"], rows[-1]["recovered, mean"]
    return (
        f"Beside Gated, at equal CE ({least:.0%} to {most:.0%} of the loss recovered, "
        "against mean ablation): "
        + "; ".join(against(variant) for variant in list(COMPARED)[:-1])
        + "."
    )


@app.function
def language_chart(found):
    """CE with x̂ spliced in, and FVU, against L0; rules at CE clean and ablated."""
    base = (
        alt.Chart(alt.Data(values=[row for row in found["table"] if row["l0"] > 0.1]))
        .mark_line(point=alt.OverlayMarkDef(size=60, filled=True), strokeWidth=2)
        .encode(
            x=alt.X(
                "l0:Q",
                scale=alt.Scale(type="log", nice=False, padding=12),
                title="L0: latents active per byte",
            ),
            color=alt.Color(
                "variant:N", scale=COLOURS, legend=alt.Legend(title=None, orient="top")
            ),
            shape=alt.Shape("variant:N", scale=SHAPES),
            order="l1:Q",
            tooltip=["variant:N", "l1:Q", "l0:Q", "ce:Q", "fvu:Q", "gamma:Q", "dead_fraction:Q"],
        )
        .properties(width=330, height=280)
    )
    names = {"clean": "clean", "mean": "mean-ablated", "zero": "zero-ablated"}
    levels = [{"ce": found["ce"][key], "name": name} for key, name in names.items()]
    rules = alt.Chart(alt.Data(values=levels)).encode(y="ce:Q")
    ce = (
        rules.mark_rule(strokeDash=[4, 4])
        + rules.mark_text(align="left", dx=4, dy=-6, x=0).encode(text="name:N")
        + base.encode(
            y=alt.Y("ce:Q", scale=alt.Scale(zero=False), title="CE once spliced in, nats per byte")
        )
    )
    fvu = base.encode(
        y=alt.Y(
            "fvu:Q",
            scale=alt.Scale(type="log", nice=False, padding=12),
            title="FVU: variance unexplained",
        )
    )
    return ce | fvu


@app.function
def main(arguments):
    """What `python explainer.py` does: train and print the table; `rebuild` remakes results/."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(
        prog="explainer.py",
        description="Train Standard and Gated SAEs on toy data over a range of λ; compare them.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=["print", "rebuild"],
        default="print",
        help="rebuild: measure every claim too, and write results/",
    )
    parser.add_argument(
        "only",
        nargs="?",
        choices=["language"],
        help="with rebuild: remake the language model's results, and nothing else",
    )
    parser.add_argument("--steps", type=int, default=4000, help="training steps (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="of data and initialisation")
    args = parser.parse_args(arguments)
    if args.only and args.what != "rebuild":
        parser.error(f"{args.only} goes with rebuild")
    if args.only:
        rebuild_language(args.steps, args.seed)
        return
    with tqdm(total=len(COMPARED) * args.steps, unit="step", disable=None) as bar:

        def progress(variant, steps):
            bar.set_description(variant, refresh=False)
            bar.update(steps)

        table = sweep(args.steps, args.seed, progress=progress)
    compared = comparison(table)
    print(as_markdown(table), *([as_markdown(compared)] if compared else []), sep="\n\n")
    print(f"\n{verdict(table)}")
    if args.what == "rebuild":
        with tqdm(total=3 * len(EVIDENCE) + len(ABLATIONS) + 1, unit="run", disable=None) as bar:

            def progress_of_runs(what):
                bar.set_description(what, refresh=False)
                bar.update()

            claimed, rows = evidence(min(args.steps, 1500), progress_of_runs)
        print(f"\n{as_markdown(condensed(claimed))}")
        write_results({"steps": args.steps, "seed": args.seed, "table": table}, claimed, rows)
        rebuild_language(args.steps, args.seed)


@app.function
def write_results(compared, claimed, rows):
    """All that results/ holds, but the language model's."""
    RESULTS.mkdir(exist_ok=True)
    for name, content in (("pareto", compared), ("claims", claimed), ("runs", rows)):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        if name == "runs":  # one line a run
            text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
        (RESULTS / f"{name}.json").write_text(text + "\n")
    pareto_chart(compared["table"]).save(RESULTS / "pareto.svg")
    evidence_chart(rows).save(RESULTS / "claims.svg")


@app.function
def rebuild_language(steps, seed):
    """Train, print and write what results/ holds of the language model."""
    from tqdm import tqdm

    model_steps, steps = min(steps, 1200), min(steps, 1500)
    with tqdm(total=model_steps + len(SPLICED) * steps, unit="step", disable=None) as bar:

        def progress(what):
            bar.set_description(what, refresh=False)
            bar.update()

        found = language(model_steps, steps, seed, progress=progress)
    compared = language_comparison(found)
    shown = [found["table"], compared] if compared else [found["table"]]
    print("", *map(as_markdown, shown), language_verdict(found), sep="\n\n")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "language.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    language_chart(found).save(RESULTS / "language.svg")


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


@app.cell(hide_code=True)
def claims_heading():
    mo.md(r"""
    ## What was claimed, and what is measured

    The paper's announcement was discussed at length. Each claim made there was measured on three
    toy data sets of 128 features in 32 dimensions, with 5 seeds: independent features, features of
    Zipf-distributed frequency that fire together, and a hierarchy of parents and children.
    """)
    return


@app.cell
def claims_pictured():
    runs = json.loads((RESULTS / "runs.json").read_text())
    evidence_chart(runs)
    return


@app.cell
def claims_table():
    claimed = json.loads((RESULTS / "claims.json").read_text())
    mo.ui.table(
        condensed(claimed), selection=None, page_size=28, wrapped_columns=["claim", "measured"]
    )
    return


@app.cell(hide_code=True)
def language_heading():
    mo.md(r"""
    ## In a language model

    Toy data is made to be found. So here is a transformer of one layer that predicts the next byte
    of Python's own help texts, and SAEs for what its MLP puts out. Their reconstruction goes back
    into the model, and what counts is how well it then predicts text that neither has read: its
    cross-entropy (**CE**, nats per byte). Before you look: in the toy world Gated needed about half
    the latents at equal FVU. Is it half at equal CE?
    """)
    return


@app.cell
def language_pictured():
    in_language = json.loads((RESULTS / "language.json").read_text())
    mo.vstack(
        [
            language_chart(in_language),
            mo.callout(mo.md(f"**{language_verdict(in_language)}**"), kind="info"),
            mo.md(language_losses(in_language)),
        ]
    )
    return


if __name__ == "__main__":
    app.run()
