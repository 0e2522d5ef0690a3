"""How fast, and how large? `python tests/bench.py [--quick] [--cuda] [--store FILE]`: see `speed`.
How good? `python tests/bench.py quality ACTIVATIONS.npy`, `quality synthetic`, `synth`: see below.

Ratios only: each row's competitors take turns within one process. A time is a full training step
without sampling: loss, backward, and the trainer's own optimiser step (ours: radial projection,
fused Adam, renormalisation; SAELens: firing statistics, clipping, Adam; dictionary-learning: as
ours, unfused). Biases give all the same L0, and learning rates near zero keep it. Memory is a fresh
process's peak after three steps, over what it held before it had a model.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import resource
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gated_sae
from gated_sae import GatedSAE, Trainer, evaluate, fast_losses, rescaled, train
from results.measure import activations, as_markdown, at_fvu, epochs, members, remembered, spread
from toy_data import SuperpositionData

SIZES = ((512, 64, 256, 6), (1024, 128, 1024, 16), (2048, 512, 4096, 32), (2048, 512, 16384, 64))
CUDA_SIZES = ((4096, 768, 16384, 32), (4096, 2048, 131072, 64))
DEVICE = "cuda" if "--cuda" in sys.argv else "cpu"
LR, L1, ROOT = 1e-9, 0.1, Path(__file__).resolve().parent.parent


def problem(batch, d_in, d_sae, l0):
    """Rows, a dictionary, and the bias at which l0 latents fire on a row."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_in, generator=generator)
    W_dec = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
    z = (x[:256] @ W_dec.T).flatten()
    bias = -z.kthvalue(int(len(z) * (1 - l0 / d_sae))).values.item()
    return x.to(DEVICE), W_dec.to(DEVICE), bias


def filled(sae, W_dec, bias):
    sae.W_dec.data[:], sae.W_enc.data[:], sae.b_gate.data[:] = W_dec, W_dec.T, bias
    return sae


def ours(losses, x, W_dec, bias, stack=()):
    """Our training step, with `losses` a function of an SAE and x."""
    sae = filled(GatedSAE(x.shape[1], len(W_dec), stack=stack, device=DEVICE), W_dec, bias)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, betas=Trainer.betas, fused=True)

    def step(x):
        optimizer.zero_grad()
        losses(sae, x).total(L1).sum().backward()
        gated_sae.step_on_unit_norm(optimizer, sae.W_dec)

    return step


def saelens_model(d_in, d_sae):
    from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig

    config = GatedTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=L1, device=DEVICE)
    return GatedTrainingSAE(config)


def saelens(x, W_dec, bias):
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = filled(saelens_model(x.shape[1], len(W_dec)), W_dec, bias)
    rows = dict(total_training_samples=10**9, train_batch_size_samples=len(x))
    rows |= dict(device=DEVICE, autocast=DEVICE == "cuda")
    return SAETrainer(SAETrainerConfig(lr=LR, lr_end=LR, **rows), sae, iter(())).step


def dictionary_learning(x, W_dec, bias):
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    d_sae, d_in = W_dec.shape
    peer = GatedSAETrainer(10**6, d_in, d_sae, layer=0, lm_name="", lr=LR, device=DEVICE)
    peer.ae.decoder.weight.data[:], peer.ae.encoder.weight.data[:] = W_dec.T, W_dec
    peer.ae.gate_bias.data[:] = bias
    return in_bfloat16(lambda x: peer.update(0, x))


def in_bfloat16(function):
    """A function under autocast, on CUDA."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")(function)


def dense(sae, x):
    """By hand, or, on CUDA, as one trains there."""
    return fast_losses(sae, x, False) if DEVICE == "cpu" else in_bfloat16(sae.losses)(x)


def evaluated(x, W_dec, bias):
    sae = filled(GatedSAE(x.shape[1], len(W_dec), device=DEVICE), W_dec, bias)
    return lambda x: evaluate(sae, [x])


def whole_run(x, W_dec, bias):
    """From its first step, as it starts by itself."""
    return Trainer(GatedSAE(x.shape[1], len(W_dec)), l1=L1, steps=1000).step


RUNS = {
    "ours": partial(ours, fast_losses),
    "sparse": partial(ours, partial(fast_losses, sparse=True)),
    "dense": partial(ours, dense),
    "encoder's product": lambda x, W_dec, bias: partial(torch.matmul, other=W_dec.T.contiguous()),
    "evaluate": evaluated,
    "whole run": whole_run,
    "SAELens": saelens,
    "dictionary-learning": dictionary_learning,
}
PEERS = "SAELens", "dictionary-learning"


def runs_here(name):
    """Whether a competitor is installed and works: torch.compile, say, needs a C++ compiler."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            RUNS[name](*problem(8, 4, 8, 2))(torch.randn(8, 4, device=DEVICE))
    except Exception as error:  # whatever it is, the others can be compared
        print(f"without {name}: {type(error).__name__}")
        return False
    return True


def interleaved(runs, x, seconds):
    """Times of each of several steps on x, which take turns: {name: [seconds, ...]}."""
    for run in runs.values():
        run(x), run(x)
    times, end = {name: [] for name in runs}, time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(t) < 7 for t in times.values()):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            torch.cuda.synchronize() if x.is_cuda else None
            times[name].append(time.perf_counter() - start)
    return times


def in_ours(size, found):
    """A row of the table: what each needs, in what ours does. found: {name: (seconds, bytes)}."""
    seconds, held = found["ours"]
    row = {"batch, d_in, d_sae, L0": ", ".join(map(str, size))}
    row |= {name: f"{s / seconds:.2f}" for name, (s, _) in found.items() if name != "ours"}
    peers = {name: peak for name, (_, peak) in found.items() if name in PEERS}
    return row | {f"memory, {name}": f"{peak / held:.1f}" for name, peak in peers.items()}


def apart(call, before="import sys; sys.path.append('tests'); from bench import *"):
    """What a call of a function in this file, say, prints in a fresh process."""
    command = [sys.executable, "-c", f"{before}; {call}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.splitlines()[-1] if done.returncode == 0 else f"failed: {done.stderr[-300:]}"


def peak(name, size):
    said = apart(f"print_memory({name!r}, {size})")
    return int(said) if said.isdigit() else math.nan  # the rest is worth having


def print_memory(name, size):
    x, W_dec, bias = problem(*size)
    runs_here(name)  # imports it
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run = RUNS[name](x, W_dec, bias)
    run(x), run(x), run(x)
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024 - before)


def stacked(x, W_dec, bias):
    """How many times as long twelve steps alone take as one of twelve in a stack, on one thread."""
    alone = [ours(fast_losses, x, W_dec, bias) for _ in range(12)]
    runs = {"stack": ours(fast_losses, x, W_dec, bias, 12)}
    runs["alone"] = lambda x: [step(x) for step in alone]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleaved(runs, x, 5)
    torch.set_num_threads(threads)
    return median(times["alone"]) / median(times["stack"])


def sweep(steps):
    """Twelve λ from initialisation, with sampling: ours as one stack, SAELens's in turn."""
    from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, train_toy_sae

    made_of = FeatureDictionary(256, 64, initializer=None), ActivationGenerator(256, 5 / 256)
    start = time.perf_counter()
    data, sae = SuperpositionData(64, 256, firing=5 / 256), GatedSAE(64, 256, stack=12)
    l1, options = torch.logspace(-0.4, 0.45, 12), dict(lr=1e-2, log_every=steps, device="cpu")
    list(train(sae, data.batches(512, seed=0), l1=l1, steps=steps, **options))
    middle = time.perf_counter()
    for _ in range(12):
        with contextlib.redirect_stderr(io.StringIO()):
            peer = saelens_model(64, 256)
            train_toy_sae(peer, *made_of, training_samples=512 * steps, batch_size=512)
    return (time.perf_counter() - middle) / (middle - start)


def on_cuda(names, quick):
    """Steps and peaks one after the other, for memory's sake; "dense" and the peers in bfloat16."""
    for size in CUDA_SIZES[: 1 if quick else 2]:
        (x, W_dec, bias), found = problem(*size), {}
        for name in names:
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            times = interleaved({name: RUNS[name](x, W_dec, bias)}, x, 2)[name]
            found[name] = median(times), torch.cuda.max_memory_allocated() - held
        yield in_ours(size, found)


def on_cpu(names, quick):
    for size in SIZES[: 3 if quick else 4]:
        x, W_dec, bias = problem(*size)
        times = interleaved({n: RUNS[n](x, W_dec, bias) for n in names}, x, 2 if quick else 20)
        peaks = {name: peak(name, size) for name in names if name in ("ours", *PEERS)}
        yield in_ours(size, {name: (median(times[name]), peaks.get(name)) for name in names})
    yield from besides(names, 100 if quick else 400)


def besides(names, steps):
    """What no table of sizes shows."""
    found = {"twelve steps alone, in one of twelve in a stack": stacked(*problem(*SIZES[0]))}
    if "SAELens" in names:
        wide = (2048, 512, 65536, 64)
        ratio = peak("SAELens", wide) / peak("whole run", wide)
        found["SAELens's memory, d_sae 65536, in that of a whole run"] = ratio
        found[f"SAELens's {steps} steps at twelve λ, in ours"] = sweep(steps)
    return [{"besides": what, "times": f"{ratio:.2f}"} for what, ratio in found.items()]


def speed(quick, store):
    """Tables; the rows go to `store`, in place of those that are `on` the same."""
    kept = [*map(json.loads, store.read_text().splitlines())] if store and store.exists() else []
    names = [name for name in RUNS if name != "whole run" and runs_here(name)]
    on = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    rows = [{"on": on} | row for row in (on_cuda if DEVICE == "cuda" else on_cpu)(names, quick)]
    print(f"torch {torch.__version__}, {on}", *speed_tables(rows), sep="\n\n")
    if store:
        rows = [*(row for row in kept if row["on"] != on), *rows]
        new = store.with_name(f"{store.name}.new")
        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        new.replace(store)


def speed_tables(rows):
    """For each machine one of sizes, and one of what is besides."""
    for of in dict.fromkeys((row["on"], "besides" in row) for row in rows):
        same = [row for row in rows if (row["on"], "besides" in row) == of]
        yield as_markdown([{k: v for k, v in row.items() if k != "on"} for row in same])


# -- How good, beside peers ------------------------------------------------------------------------
# pip install sae-lens==6.54.12; pip install --no-deps dictionary-learning and its imports. Each
# makes (step(i, x), encode, decode, W_dec), the last a function without arguments. All warm up in a
# tenth of the steps, λ too, and let lr fall over the last fifth; else they are as they come. Batch
# top k keeps its k, at rest as well.


def synthetic_model(features=768, d_in=128, roots=6):
    """SAELens's synthetic data: correlated features, in trees of exclusive children, with the law
    of SynthSAEBench-16k v2 (arXiv 2602.14687), which has 16384, 768, 128."""
    import sae_lens.synthetic as s

    tree = dict(total_root_nodes=roots, branching_factor=4, max_depth=3)
    tree |= dict(mutually_exclusive_portion=1.0, mutually_exclusive_min_depth=0)
    tree |= dict(compensate_probabilities=True, scale_children_by_parent=True)
    config = s.SyntheticModelConfig(
        num_features=features,
        hidden_dim=d_in,
        firing_probability=s.ZipfianFiringProbabilityConfig(0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=s.HierarchyConfig(**tree),
        mean_firing_magnitudes=s.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=s.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        correlation=s.LowRankCorrelationConfig(correlation_scale=0.1, rank=25),
        orthogonalization=s.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        bias=0.5,
        seed=42,
    )
    with contextlib.redirect_stderr(io.StringIO()):  # a bar
        return s.SyntheticModel(config, device=DEVICE)


def rows_of(data):
    """x, held_out, and of synthetic data the true directions and what they do in held_out."""
    if data != "synthetic":
        return *activations(data), None
    model = synthetic_model()
    torch.manual_seed(0)
    f = torch.cat([model.activation_generator.sample(4000) for _ in range(67)])
    x, held_out = activations(model.feature_dict(f).detach())
    return x, held_out, (model.feature_dict.feature_vectors.detach(), f[: len(held_out)].clone())


def quality_ours(kind, d_in, d_sae, steps, batch, lr, strength, seed):
    sae = gated_sae.KINDS[kind](d_in, d_sae, generator=torch.Generator().manual_seed(seed))
    trainer = Trainer(sae, l1=strength, steps=steps, lr=lr, device="cpu")
    return lambda i, x: trainer.step(x), sae.encode, sae.decode, lambda: sae.W_dec


def quality_saelens(kind, d_in, d_sae, steps, batch, lr, strength, seed):
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    own = dict(l1_coefficient=strength, l1_warm_up_steps=steps // 10)
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(
        config(d_in=d_in, d_sae=d_sae, **({"k": strength} if kind == "BatchTopK" else own))
    )
    rows = dict(total_training_samples=steps * batch, train_batch_size_samples=batch)
    rows |= dict(lr_end=0.0, lr_warm_up_steps=steps // 10, lr_decay_steps=steps // 5)
    trainer = SAETrainer(SAETrainerConfig(lr=lr, **rows), sae, iter(()))

    def step(i, x):
        trainer.step(x)
        trainer.n_training_steps += 1

    return step, sae.encode, sae.decode, lambda: sae.W_dec


def quality_dl(kind, d_in, d_sae, steps, batch, lr, strength, seed):
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    at = dict(layer=0, lm_name="", lr=lr, device="cpu", seed=seed, warmup_steps=steps // 10)
    at |= dict(decay_start=steps - steps // 5)
    if kind == "BatchTopK":
        peer = BatchTopKTrainer(steps, d_in, d_sae, strength, **at)
        encode = partial(peer.ae.encode, use_threshold=False)
        return peer.update, encode, peer.ae.decode, lambda: peer.ae.decoder.weight.T
    at |= dict(l1_penalty=strength, sparsity_warmup_steps=steps // 10)
    peer = GatedSAETrainer(steps, d_in, d_sae, **at)
    return peer.update, peer.ae.encode, peer.ae.decode, lambda: peer.ae.decoder.weight.T


# What is made, and three strengths of it: λ, or k.
QUALITY = {
    "Gated": (partial(quality_ours, "gated"), (3, 6, 10)),
    "Standard": (partial(quality_ours, "standard"), (1.5, 3, 5)),
    "JumpReLU": (partial(quality_ours, "jumprelu"), (3, 10, 20)),
    "SAELens gated": (partial(quality_saelens, "Gated"), (3, 6, 10)),
    "SAELens standard": (partial(quality_saelens, "Standard"), (3, 6, 10)),
    "SAELens batch top k": (partial(quality_saelens, "BatchTopK"), (4, 8, 16)),
    "dictionary-learning gated": (partial(quality_dl, "Gated"), (3, 6, 10)),
    "dictionary-learning batch top k": (partial(quality_dl, "BatchTopK"), (4, 8, 16)),
}
SIZE = dict(d_sae=1024, batch=512, steps=1000)
LRS, POINT = (1e-3, 2e-3, 4e-3, 8e-3), "SAELens gated"
LEVELS = {"synthetic": (0.05, 0.07, 0.1)}  # of FVU; the middle one chooses lr
levels = lambda rows: LEVELS.get(rows[0]["data"], (0.15, 0.2, 0.25))  # noqa: E731


@torch.no_grad()
def measured(encode, decode, held_out, W_dec=None, truth=None):
    """L0, FVU, gamma and the share of dead latents of anything that encodes and decodes; and MCC
    and F1 by SAELens's own measure."""
    fired, error, dot, x_hat_sq = 0, 0, 0, 0
    if truth:
        from sae_lens.synthetic import evals

        directions, true_f = truth
        right = evals.ClassificationMetricsCalculator(W_dec, directions)
    for i, x in enumerate(held_out.split(1000)):
        f = encode(x)
        x_hat = decode(f).double()
        fired = fired + (f != 0).sum(0)
        error, dot = error + (x - x_hat).square().sum(), dot + (x * x_hat).sum()
        x_hat_sq = x_hat_sq + x_hat.square().sum()
        right.add_batch(f, true_f.split(1000)[i]) if truth else None
    total = (held_out.double() - held_out.double().mean(0)).square().sum()
    found = dict(l0=fired.sum() / len(held_out), fvu=error / total, gamma=x_hat_sq / dot)
    found["dead"] = (fired == 0).double().mean()
    found = {name: round(value.item(), 5) for name, value in found.items()}
    if truth:
        found["mcc"] = round(float(evals.mean_correlation_coefficient(W_dec, directions)), 4)
        found["f1"] = round(right.compute().f1_score, 4)
    return found


def quality_run(x, held_out, truth, data, variant, strength, **size):
    with contextlib.redirect_stdout(io.StringIO()):
        make = QUALITY[variant][0]
        step, encode, decode, W_dec = make(d_in=x.shape[1], strength=strength, **size)
    began, steps = time.process_time(), size["steps"]
    stream, what = epochs(x, size["batch"], steps, size["seed"]), f"{variant}, lr {size['lr']}"
    for i, rows in enumerate(tqdm(stream, f"{what}, {strength}, seed {size['seed']}", steps)):
        step(i, rows)
    seconds = round(time.process_time() - began, 1)
    return measured(encode, decode, held_out, W_dec(), truth) | {"seconds": seconds}


def best_lr(rows):
    """Where L0 at equal FVU is lowest, on a line through two runs, of log L0 against log FVU."""
    fvu = levels(rows)[1]

    def l0(lr):
        own = [row for row in rows if row["lr"] == lr and row["seed"] == 0]
        a, b = sorted(own, key=lambda row: row["fvu"])[:2]
        if b["l0"] == 0 or a["fvu"] == b["fvu"]:  # nothing learnt
            return math.inf
        bend = math.log(a["l0"] / b["l0"]) / math.log(b["fvu"] / a["fvu"])
        return a["l0"] * (a["fvu"] / fvu) ** min(4, max(1, bend))  # as fronts are

    return min({row["lr"] for row in rows}, key=l0)


def quality(data, only, size, seeds, store):
    """L0 at equal FVU on rows (n, d_in) of an .npy file, or synthetic ones, each competitor at its
    best of four lr, which the first seed chooses.

    Same rows in the same order for all, scaled and kept aside as `activations` does. One thread;
    seconds are of CPU: those of the shortest run, of 1, 1/2, 1/4 and 1/8 of the steps, that has no
    greater L0 at the FVU of the middle run of SAELens gated than that has. What was measured is
    in `store`: start the command again and it goes on, or with other names in another process.
    """
    torch.set_num_threads(1)
    (x, held_out, truth), rows = rows_of(data), []

    def run(variant, lr, strength, steps=size["steps"], seed=0):
        made = dict(data=Path(data).stem, variant=variant, lr=lr, strength=strength, seed=seed)
        made |= size | {"steps": steps}
        rows.append(remembered(store, made, partial(quality_run, x, held_out, truth, **made)))

    for name in [POINT, *(name for name in only or QUALITY if name != POINT)]:
        try:
            low, middle, high = QUALITY[name][1]
            for lr, strength in itertools.product(LRS, (low, middle)):
                run(name, lr, strength)
        except ImportError as error:
            print(f"without {name}: {error}")
            continue
        lr, steps = best_lr([row for row in rows if row["variant"] == name]), size["steps"]
        run(name, lr, high)
        for seed, strength in itertools.product(range(1, seeds), (low, middle, high)):
            run(name, lr, strength, seed=seed)
        while steps > size["steps"] // 8 and reaches(rows, name, lr, steps):
            steps //= 2
            for strength in (low, middle, high):
                run(name, lr, strength, steps)
    print(quality_table(rows))


def reaches(rows, name, lr, steps):
    """The middle one of a competitor's runs of so many steps, if they reach POINT; or None."""
    point = middle_run(rows, POINT)
    own = [r for r in rows if (r["steps"], r["lr"], r["seed"]) == (steps, lr, 0)]
    at = point and at_fvu(own, name, point["fvu"])
    return middle_run(own, name) if at and at[0] <= point["l0"] + 1e-9 else None


def middle_run(rows, name):
    """Of the longest, at the best lr, with the first seed."""
    own = [row for row in rows if row["variant"] == name and row["seed"] == 0]
    if not own:
        return None
    own = [row for row in own if row["steps"] == max(row["steps"] for row in own)]
    own = [row for row in own if row["lr"] == best_lr(own)]
    return sorted(own, key=lambda row: row["strength"])[1]


def quality_table(rows):
    """Means over the seeds ± their standard error; ≤ where all FVU are below the one asked for."""
    table = []
    for name in [name for name in QUALITY if name in {row["variant"] for row in rows}]:
        middle = middle_run(rows, name)
        lr, most = middle["lr"], middle["steps"]
        own = [r for r in rows if r["variant"] == name and r["steps"] == most and r["lr"] == lr]
        seeds = [[r for r in own if r["seed"] == seed] for seed in sorted({r["seed"] for r in own})]
        middles = [row for row in own if row["strength"] == middle["strength"]]
        line = {"": name, "lr": lr}
        for level in levels(rows):
            line[f"L0 at FVU {level:g}"] = shown([reached(own, name, level) for own in seeds], 3)
        line |= {"gamma": shown([row["gamma"] for row in middles], 3)}
        line |= {"dead": shown([100 * row["dead"] for row in middles], 2) + " %"}
        for key in ("mcc", "f1"):
            if key in middle:
                found = [reached(own, name, levels(rows)[1], key) for own in seeds]
                line[f"{key.upper()} at {levels(rows)[1]:g}"] = shown(found, 2).strip("≤ ")
        shares = (reaches(rows, name, lr, most // n) for n in (8, 4, 2, 1))
        first = next(filter(None, shares), None)
        line |= {"CPU s": f"{middle['seconds']:.0f}"}
        line |= {f"to {POINT}'s": f"{first['seconds']:.0f}" if first else "-"}
        table.append(line)
    return as_markdown(table)


def reached(own, name, level, key="l0"):
    """A number at an FVU, or of the sparsest run, as text, where all have a lower FVU; or None."""
    at = at_fvu(own, name, level, (key,))
    if at or max(row["fvu"] for row in own) >= level:
        return at and (at[0] if key == "l0" else at[1])
    return str(min(own, key=lambda row: row["l0"])[key])


def shown(values, digits):
    if None in values:
        return "-"
    mean, se = spread(values).values()
    most = "≤ " * any(isinstance(value, str) for value in values)
    return f"{most}{mean:.{digits}g}" + (f" ± {se:.1g}" if se else "")


def synth(samples, targets, shape=(16384, 768, 128), d_sae=4096, batch=1024, steer=200):
    """The Gated row that SynthSAEBench-16k (arXiv 2602.14687, v2) lacks: one SAE for each L0 to
    reach, on SAELens's own samples, by its own scores. λ follows L0 from a fifth of the run on.
    An hour or two of one large GPU for 200e6 samples; SAELens's sampler is most of it."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    model, d_in, steps = synthetic_model(*shape), shape[1], int(samples) // batch
    torch.manual_seed(1000)
    with torch.no_grad():
        c = (d_in / model.sample(16 * batch).var(0).sum()).item() ** 0.5
    sae = GatedSAE(d_in, d_sae, stack=len(targets), device=DEVICE)
    trainer = Trainer(sae, l1=[2.0] * len(targets), steps=steps, device=DEVICE)
    goal = torch.tensor(targets, device=DEVICE)
    for step in tqdm(range(steps), "SynthSAEBench", mininterval=10):
        with torch.no_grad():
            x = c * model.sample(batch)
        trainer.step(x)
        if step % steer == 0 and step > steps // 5:
            with torch.no_grad():
                l0 = (sae.encode(x) > 0).sum(-1).float().mean(-1)
            trainer.l1 *= (l0.clamp_min(1) / goal).pow(0.1)
    for member, target in zip(members(sae), targets, strict=True):
        found = rescaled(member.to(DEVICE), 1 / c).requires_grad_(False)
        of = model.feature_dict, model.activation_generator
        scores = eval_sae_on_synthetic_data(found, *of, num_samples=300_000, batch_size=4096)
        f1, line = scores.classification.f1_score, f"L0 {scores.sae_l0:.2f} (to be {target:g})"
        print(f"{line}: F1 {f1:.3f}, MCC {scores.mcc:.3f}, dead {scores.dead_latents}")


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # which peers are full of
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("what", nargs="*", help="quality FILE.npy|synthetic [NAME ...], synth")
    for name, value in (SIZE | {"seeds": 1}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="quality")
    parser.add_argument("--samples", type=float, default=200e6, help="synth")
    parser.add_argument(
        "--store", type=Path, help="of rows; quality: default FILE.npy.quality.jsonl"
    )
    args = parser.parse_args()
    if args.what[:1] == ["quality"] and len(args.what) > 1:
        size, data = {name: getattr(args, name) for name in SIZE}, args.what[1]
        store = args.store or Path(f"{data}.quality.jsonl")
        quality(data, args.what[2:], size, args.seeds, store)
    elif args.what == ["synth"]:
        synth(args.samples, [20.0, 25.0])
    elif args.quick and args.store:
        parser.error("--quick is not for keeping: got --store as well")
    elif args.what:
        parser.error(f"got {args.what}, expected quality FILE.npy|synthetic [NAME ...], or synth")
    else:
        speed(args.quick, args.store)
