"""How fast, and how large? `python tests/bench.py [--quick]`; peers are included where installed.

Ratios only: each row's competitors take turns within one process. A time is a full training step
without sampling: loss, backward, and the trainer's own optimiser step (ours: radial projection,
fused Adam, renormalisation; SAELens: firing statistics, clipping, Adam; dictionary-learning: as
ours, unfused). Biases give all the same L0, and learning rates near zero keep it. Memory is a fresh
process's peak after three steps, over what it held before it had a model.
"""

import argparse
import contextlib
import io
import logging
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gated_sae import GatedSAE, sparse_losses, step_on_unit_norm, train
from toy_data import SuperpositionData

SIZES = ((512, 64, 256, 6), (1024, 128, 1024, 16), (2048, 512, 4096, 32), (2048, 512, 16384, 64))
LR, L1, ROOT = 1e-9, 0.1, Path(__file__).resolve().parent.parent
logging.disable(logging.ERROR)  # which peers are full of
warnings.simplefilter("ignore")


def problem(batch, d_in, d_sae, l0):
    """Rows, a dictionary, and the bias at which l0 latents fire on a row."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_in, generator=generator)
    W_dec = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
    z = (x[:256] @ W_dec.T).flatten()
    return x, W_dec, -z.kthvalue(int(len(z) * (1 - l0 / d_sae))).values.item()


def filled(sae, W_dec, bias):
    sae.W_dec.data[:], sae.W_enc.data[:], sae.b_gate.data[:] = W_dec, W_dec.T, bias
    return sae


def ours(losses, x, W_dec, bias):
    """Our training step, with `losses` a function of an SAE and x."""
    sae = filled(GatedSAE(x.shape[1], len(W_dec)), W_dec, bias)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, betas=(0.0, 0.999), fused=True)

    def step(x):
        optimizer.zero_grad()
        losses(sae, x).total(L1).backward()
        step_on_unit_norm(optimizer, sae.W_dec)

    return step


def saelens_model(d_in, d_sae):
    from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig

    return GatedTrainingSAE(GatedTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=L1))


def saelens(x, W_dec, bias):
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = filled(saelens_model(x.shape[1], len(W_dec)), W_dec, bias)
    rows = dict(total_training_samples=10**9, train_batch_size_samples=len(x))
    return SAETrainer(SAETrainerConfig(lr=LR, lr_end=LR, **rows), sae, iter(())).step


def dictionary_learning(x, W_dec, bias):
    from dictionary_learning.trainers.gdm import GatedSAETrainer

    d_sae, d_in = W_dec.shape
    peer = GatedSAETrainer(10**6, d_in, d_sae, layer=0, lm_name="", lr=LR, device="cpu")
    peer.ae.decoder.weight.data[:], peer.ae.encoder.weight.data[:] = W_dec.T, W_dec
    peer.ae.gate_bias.data[:] = bias
    return lambda x: peer.update(0, x)


RUNS = {
    "sparse": partial(ours, sparse_losses),
    "dense": partial(ours, GatedSAE.losses),
    "product": lambda x, W_dec, bias: partial(torch.matmul, other=W_dec.T.contiguous()),
    "SAELens": saelens,
    "dictionary-learning": dictionary_learning,
}


def runs_here(name):
    """Whether a competitor is installed and works: torch.compile, say, needs a C++ compiler."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            RUNS[name](*problem(8, 4, 8, 2))(torch.randn(8, 4))
    except Exception as error:  # whatever it is, the others can be compared
        print(f"without {name}: {type(error).__name__}")
        return False
    return True


def interleaved(runs, x, seconds):
    """Times of each of several steps on x, which take turns: {name: [seconds, ...]}."""
    for run in runs.values():
        run(x), run(x)
    times, end = {name: [] for name in runs}, time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(t) < 3 for t in times.values()):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times, name, base):
    """As "median (of minima)": how many times as long `name` takes as `base`."""
    a, b = times[name], times[base]
    return f"{median(a) / median(b):8.2f} ({min(a) / min(b):.2f})"


def apart(call, before="import sys; sys.path.append('tests'); from bench import *"):
    """What a call of a function in this file, say, prints in a fresh process."""
    command = [sys.executable, "-c", f"{before}; {call}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.splitlines()[-1] if done.returncode == 0 else f"failed: {done.stderr[-300:]}"


def print_memory(name, size):
    x, W_dec, bias = problem(*size)
    runs_here(name)  # imports it
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run = RUNS[name](x, W_dec, bias)
    run(x), run(x), run(x)
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024 - before)


def print_compiled(size):
    """In a process of its own: peers may import what torch.compile cannot bear."""
    x, W_dec, bias = problem(*size)
    losses = {"compiled": torch.compile(lambda sae, x: sae.losses(x)), "dense": GatedSAE.losses}
    runs = {name: ours(each, x, W_dec, bias) for name, each in losses.items()}
    print(ratio(interleaved(runs, x, 3), "compiled", "dense"))


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


def main(quick):
    seconds, steps = (2, 100) if quick else (8, 400)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    names = [name for name in RUNS if runs_here(name)]
    print("\ntime of a step; in parentheses, of the shortest steps")
    for size in SIZES[: 3 if quick else 4]:
        x, W_dec, bias = problem(*size)
        times = interleaved({name: RUNS[name](x, W_dec, bias) for name in names}, x, seconds)
        memory = {n: int(apart(f"print_memory({n!r}, {size})")) for n in names if n != "product"}
        print("\nbatch {}, d_in {}, d_sae {}, L0 {}".format(*size))
        for name, base in [(n, b) for b in ("sparse", "dense") for n in names if n != b]:
            print(f"    {name + ' / ' + base:32}{ratio(times, name, base)}")
        print(f"    {'dense, torch.compile / dense':32}{apart(f'print_compiled({size})')}")
        for name, peak in memory.items():
            print(f"    {'peak memory, sparse / ' + name:32}{memory['sparse'] / peak:8.2f}")
    print("\nd_sae at batch 1024, d_in 256, L0 32: time of a sparse step, in that of the first")
    widths, x = [1024 * 2**k for k in range(3 if quick else 5)], problem(1024, 256, 1024, 32)[0]
    runs = {width: RUNS["sparse"](*problem(1024, 256, width, 32)) for width in widths}
    times = interleaved(runs, x, seconds)
    for width in widths:
        print(f"    {width:6}{ratio(times, width, 1024)}")
    clock = "t = time.time(); import gated_sae; print(time.time() - t)"
    imports = [float(apart(clock, before="import time, torch")) for _ in range(5)]
    print(f"\nimport of gated_sae beyond torch's: {median(imports):.3f} s")
    if "SAELens" in names:
        print(f"12 λ, 64 x 256, batch 512, {steps} steps: SAELens / ours {sweep(steps):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
