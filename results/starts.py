"""How an SAE should start: python results/starts.py ACTIVATIONS.npy; goes on where it stopped.

Gated SAEs, batch 512. W_enc is so many times W_decᵀ; gates open at so many root mean squares of z.
"""

import itertools
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from gated_sae import GatedSAE, Trainer, evaluate, start
from results.measure import RESULTS, activations, as_markdown, epochs, remembered
from results.rebuild import filled

NEVER = dict(resample_every=None)
OLD = NEVER | dict(betas=(0.0, 0.999))
TRIED = {  # factor on W_enc, where gates open, options of the Trainer
    "as it was: 1, 0; β₁ 0, no resampling": (1, 0, OLD),
    "0.1, 0; β₁ 0, no resampling": (0.1, 0, OLD),
    "0.1, 2; β₁ 0, no resampling": (0.1, 2, OLD),
    "0.1, 2; no resampling": (0.1, 2, NEVER),
    "0.1, 2: the default": (0.1, 2, {}),
    "0.1, 0": (0.1, 0, {}),
    "0.1, 3": (0.1, 3, {}),
    "0.01, 2": (0.01, 2, {}),
    "1, 2": (1, 2, {}),
    "0.1, 2; λ warms up in 0.3": (0.1, 2, dict(l1_warmup=0.3)),
    "0.1, 2; lr 0.02 / √d_in": (0.1, 2, dict(lr=0.02)),
    "0.1, 2; lr 0.1 / √d_in": (0.1, 2, dict(lr=0.1)),
    "0.1, 2; lr 0.2 / √d_in": (0.1, 2, dict(lr=0.2)),
}
# d_sae, steps, λ, lr: the search, and what it came to at other sizes and lengths.
SEARCH = (1024, 1000, 5, None), (1024, 1000, 10, None)
OTHERS = (768, 500, 6, None), (2048, 500, 6, None), (6144, 1000, 8, None), (4096, 4000, 6, None)
OTHERS += (3072, 4000, 6, None), (1024, 8000, 6, 3e-4), (768, 20000, 6, None)
OLD_AND_NEW = [[*TRIED][i] for i in (0, 3, 4)]
KEYS = "tried", "d_sae", "steps", "l1", "lr"
PLAN = [(t, *size) for t, size in itertools.product(TRIED, SEARCH)]
PLAN += [(t, *size) for t, size in itertools.product(OLD_AND_NEW, OTHERS)]


def run(x, held_out, tried, d_sae, steps, l1, lr=None) -> dict:
    factor, opens_at, options = TRIED[tried]
    lr = options["lr"] / x.shape[1] ** 0.5 if "lr" in options else lr
    sae, first = GatedSAE(x.shape[1], d_sae), next(epochs(x, 512, 1))
    with torch.no_grad():
        sae.W_enc *= 10 * factor
        start(sae, first)  # again at step 1, where it leaves alone what is not 0
        sae.b_gate *= max(opens_at, 1e-9) / 2
    options = options | dict(lr=lr, steps=steps, l1=l1, device="cpu")
    trainer, began = Trainer(sae, **options), time.process_time()
    for batch in tqdm(epochs(x, 512, steps), f"{tried} | {d_sae}, λ {l1}", steps):
        trainer.step(batch)
    seconds, m = time.process_time() - began, evaluate(sae, held_out.split(1000))
    found = dict(l0=m.l0, fvu=m.fvu, gamma=m.gamma, dead=m.dead_fraction, seconds=seconds)
    found["silent"] = evaluate(sae, x.split(4000)).dead_fraction  # on all that it was trained on
    return {name: round(float(value), 4) for name, value in found.items()}


def tables(rows: list[dict]) -> dict[str, str]:
    """The search, starts by sizes, and the others, sizes by starts."""
    cells, names = {}, {}
    for row in rows:
        size = tuple(row[key] for key in KEYS[1:])
        names[size] = "d_sae {}, {} steps, λ {}".format(*size) + f", lr {size[3]}" * bool(size[3])
        dead = f"{100 * row['dead']:.1f} ({100 * row['silent']:.1f}) %"
        cell = f"{row['l0']:.2f} / {row['fvu']:.3f} / {dead} / {row['seconds']:.0f} s"
        cells[row["tried"], size] = cell
    search = [{"": t} | {names[size]: cells[t, size] for size in SEARCH} for t in TRIED]
    others = [{"": names[size]} | {t: cells[t, size] for t in OLD_AND_NEW} for size in OTHERS]
    return {"starts": as_markdown(search), "sizes": as_markdown(others)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    (file,), rows = sys.argv[1:], []
    x, held_out = activations(file)
    for made in (dict(zip(KEYS, place, strict=True)) for place in PLAN):
        own = partial(run, x, held_out, **made)
        rows.append(remembered(RESULTS / "starts.jsonl", made, own))
    readme = RESULTS / "README.md"
    readme.write_text(filled(readme.read_text(), tables(rows)))
    print(*tables(rows).values(), sep="\n\n")
