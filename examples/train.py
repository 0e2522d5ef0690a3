"""Train an SAE on activations in files, on one device or many; stop at any moment, and go on.

    python examples/train.py activations.npy --d-sae 16384 --l1 1 --out runs/a
    torchrun --nproc-per-node 8 examples/train.py activations.npy --d-sae 16384 --l1 1 --out runs/a

The bar shows, on the latest batch: loss; L0, how many latents fire on a row; FVU, the fraction of
variance that is not explained; gamma, the length of reconstructions beside the best one (1 is
unbiased). Raise --l1 until L0 is as low as you like, for FVU rises. λ and lr are for rows of
E‖x - E x‖² = d_in: rows are scaled to that, and the SAE back at the end.

--out is a new folder. It gets log.jsonl; checkpoint-N, all that the step after N depends on; and at
the end sae, in SAELens's format, measured on rows kept aside. After Ctrl-C, SIGTERM, a crash, a
full disk, the same command with --resume goes on from the last checkpoint (unpickled: trust its
source), on any number of devices; on one CPU it ends in the bits of a run that never stopped. Exit
status: 1 if the work failed or was stopped, 2 if the command makes no sense.

Under torchrun each process has a share of each batch, and of weights, gradients and Adam's moments,
32 d_in d_sae bytes in all. In a step it also holds W_enc and W_dec whole, 8 d_in d_sae bytes, and
as much again in their gradients: 34 GB of each at d_in 4096 and 2^20 latents, where it ends.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # of a clone

import gated_sae
from gated_sae import KINDS, SAE, Losses, Trainer, evaluate, expect, fast_losses, save

WINDOW = 2**28  # bytes of activations that are shuffled in memory at once
CHECKPOINTS = "checkpoint-" + 9 * "[0-9]"


def read(file: Path, first: int, last: int, npy=np.load) -> tuple[int, Tensor]:
    """How many rows the array in a file has, and those from first to last. Nothing is unpickled."""
    try:
        if file.suffix == ".npy":
            array = npy(file, mmap_mode="r", allow_pickle=False)
            native = array.dtype.newbyteorder("=")
            shape, x = array.shape, torch.from_numpy(np.array(array[first:last], native))
        else:
            with safe_open(file, "pt") as tensors:
                (array,) = map(tensors.get_slice, tensors.keys())
                shape, x = tuple(array.get_shape()), array[first:last]
        expect(len(shape) == 2 and all(shape) and x.is_floating_point(), f"{x.dtype} {shape}")
    except Exception as error:  # a broken file may raise anything
        raise ValueError(f"{file}: {error}, expected one array (rows, d_in) of floats") from None
    bad = ~torch.stack(x.aminmax(dim=-1)).isfinite().all(0)
    expect(not bad.any(), f"{file}: NaN or infinity in row {first + int(bad.int().argmax())}")
    return shape[0], x


class Activations:
    """Rows of a file, or a folder of shards, in blocks (file, first, last); some are kept aside."""

    def __init__(self, path: Path, held_out: int | None = None):
        found = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
        self.npy = cache(np.load)  # opens once: CPython 3.11.7 errs if two threads parse headers
        self.files = [file for file in found if file.suffix in (".npy", ".safetensors")]
        expect(self.files, f"{path} is or holds no .npy or .safetensors file")
        lengths, firsts = zip(*(read(file, 0, 1, self.npy) for file in self.files), strict=True)
        alike = {(x.shape[1], x.dtype): str(f) for f, x in zip(self.files, firsts, strict=True)}
        expect(len(alike) == 1, f"shards differ in width or dtype: {alike}, expected all alike")
        ((self.d_in, self.dtype),), n = alike, sum(lengths)
        size = max(1, min(64, n // 256), n // 2**20)  # rows of a block
        cuts = ((i, a, end) for i, end in enumerate(lengths) for a in range(0, end, size))
        blocks = np.array([(i, a, min(a + size, end)) for i, a, end in cuts])
        ends = (blocks[:, 2] - blocks[:, 1]).cumsum()
        kept = np.searchsorted(ends, n - (held_out or min(2**16, 1 + n // 20)), "right")
        self.blocks, self.kept = blocks[:kept], blocks[kept:]
        self.n = int(ends[:kept].max(initial=0))  # rows to train on

    def rows(self, blocks: np.ndarray) -> Tensor:
        return torch.cat([read(self.files[i], a, b, self.npy)[1] for i, a, b in blocks.tolist()])

    def batches(self, batch: int, seed: int, start: int = 0) -> Iterator[Tensor]:
        """Batches (batch, d_in) without end, from number `start` on. In each epoch the blocks are
        shuffled, then the rows within as many as WINDOW bytes take. While one window is given out,
        a thread reads the next. What fills no batch is left out."""
        expect(self.n >= batch, f"{self.n} rows to train on, expected a batch of {batch}")
        n = self.n // batch * batch  # in an epoch
        n_window = batch * max(1, WINDOW // (batch * self.d_in * self.dtype.itemsize))

        def window(epoch: int, first: int) -> Tensor:
            order = np.random.default_rng([seed, epoch]).permutation(self.blocks)
            ends = (order[:, 2] - order[:, 1]).cumsum()
            last = min(first + n_window, n)
            i, j = np.searchsorted(ends, first, "right"), np.searchsorted(ends, last)
            x = self.rows(order[i : j + 1])[first - ends[j] :][: last - first]
            shuffled = np.random.default_rng([seed, epoch, 1 + first]).permutation(last - first)
            return x[torch.from_numpy(shuffled)]

        epoch, first = divmod(start * batch, n)
        first, skip = first - first % n_window, first % n_window  # a window begins before it
        reader = ThreadPoolExecutor(1)
        coming = reader.submit(window, epoch, first)
        while True:
            x, first = coming.result(), first + n_window
            epoch, first = (epoch, first) if first < n else (epoch + 1, 0)
            coming = reader.submit(window, epoch, first)
            yield from x[skip:].split(batch)
            skip = 0


class Loss(nn.Module):
    """An SAE's losses as a forward: for it, `fully_shard` gathers the parameters."""

    def __init__(self, sae: SAE, bfloat16: bool):
        super().__init__()
        self.sae, self.bfloat16 = sae, bfloat16

    def forward(self, x: Tensor) -> Losses:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            losses = self.sae.losses(x) if self.bfloat16 else fast_losses(self.sae, x)
        if not dist.is_initialized():
            return losses
        # The values are those of all rows, the gradients of these: fully_shard takes their mean.
        # So a loss that is no number ends all processes, where the others would wait for one.
        means = torch.stack(losses).detach() / dist.get_world_size()
        dist.all_reduce(means)
        return Losses(*(t + (mean - t).detach() for t, mean in zip(losses, means, strict=True)))


def whole(sae: SAE) -> SAE:
    """The SAE with all of each parameter, where they are shared out. All processes call it."""
    full = {k: getattr(t, "full_tensor", t.detach)() for k, t in sae.state_dict().items()}
    sae = type(sae)(**sae.config, dtype=sae.b_dec.dtype, device="meta")
    sae.load_state_dict(full, assign=True)
    return sae


def checkpoint(act: Callable, folder: Path, model: Loss, trainer: Trainer) -> None:
    """`dcp.save` or `dcp.load`, in place, all that the next step depends on."""
    weights, adam = get_state_dict(model, trainer.optimizer)
    random = trainer.generator.get_state()
    state = dict(weights=weights, adam=adam["state"], silent=trainer.silent, random=random)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is the only process
            act(state, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        (cause, _), *_ = error.failures.values()
        raise OSError(f"{folder}: {cause!r}") from None
    trainer.generator.set_state(random)


def main(arguments: list[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("activations", type=Path, help=".npy or .safetensors file (rows, d_in), or folder of them")
    add("--out", required=True, type=Path, help="folder of the run, a new one")
    add("--d-sae", required=True, type=int, help="number of latents, say 8 d_in")
    add("--l1", required=True, type=float, help="λ: larger means fewer latents (L0)")
    add("--variant", default="gated", choices=sorted(KINDS), help="default: gated")
    add("--steps", type=int, help="default: as many as read each row once")
    add("--batch", default=4096, type=int, help="rows of a step; default: 4096")
    add("--lr", type=float, help="default: 0.05 / √d_in")
    add("--resample-every", type=int, help="default: 100 on one process")
    add("--held-out", type=int, help="rows kept aside, the last; default: 5 %%, at most 65536")
    add("--seed", default=0, type=int, help="of first weights and order; default: 0")
    dtypes = "float32", "float64", "bfloat16"
    add("--dtype", default="float32", choices=dtypes, help="bfloat16: of products, not of weights")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the accelerator if there is one")
    add("--log-every", default=100, type=int, help="steps; default: 100")
    add("--checkpoint-every", default=1000, type=int, help="steps; default: 1000")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    args = parser.parse_args(arguments)
    for name, value in vars(args).items():
        least = 0 if name in ("l1", "seed") else 1e-12
        if type(value) in (int, float) and not least <= value < float("inf"):
            parser.error(f"{name} is {value}, expected a finite number ≥ {least}")

    world = os.environ.get("WORLD_SIZE", "1")  # set by torchrun
    expect(world.isdecimal() and int(world), f"WORLD_SIZE is {world!r}, expected a positive number")
    size, rank = int(world), int(os.environ.get("RANK", "0"))
    expect(args.batch % size == 0, f"--batch is {args.batch}, expected a multiple of {size}")
    expect(size == 1 or not args.resample_every, "--resample-every is for one process")

    data, out = Activations(args.activations, args.held_out), args.out
    steps = args.steps or max(1, data.n // args.batch)
    names = "variant", "d_sae", "l1", "batch", "lr", "resample_every", "held_out", "seed", "dtype"
    run = {name: getattr(args, name) for name in names} | dict(steps=steps, rows=data.n)
    some = data.rows(np.concatenate([data.blocks, data.kept])[:: 1 + len(data.blocks) // 256])
    run["crc32 of some rows"] = zlib.crc32(some.view(torch.uint8).numpy())
    olds = sorted(out.glob(CHECKPOINTS)) if args.resume else []
    taken = (out / "sae").exists() if args.resume else out.exists() and any(out.iterdir())
    expect(olds or not taken, f"{out} exists, expected a new folder, or --resume of the run in it")
    if olds:
        held = json.loads((out / "run.json").read_text())
        differ = {k: (held.get(k), run[k]) for k in run if held.get(k) != run[k]}
        expect(not differ, f"{out} is of another run; (held, given) differ in {differ}")
    done = int(olds[-1].name[-9:]) if olds else 0

    device = args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    mesh = dist.init_device_mesh(torch.device(device).type, (size,)) if size > 1 else None
    kept = np.array_split(data.kept, -(-len(data.kept) // 64))
    spread = gated_sae.variance(map(data.rows, kept), data.d_in).item()
    expect(0 < spread < np.inf, f"E‖x - E x‖² of the rows kept aside is {spread}")
    c = (data.d_in / spread) ** 0.5
    generator = torch.Generator().manual_seed(args.seed)
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    batches = (c * x.to(dtype) for x in data.batches(args.batch, args.seed, done))
    x = next(batches)
    sae = KINDS[args.variant](data.d_in, args.d_sae, generator=generator, dtype=dtype)
    gated_sae.start(sae, x)  # on all rows of the batch, here where the SAE is whole
    model = Loss(sae.to(device), args.dtype == "bfloat16")
    model = fully_shard(model, mesh=mesh) if mesh else model
    every = args.resample_every or (100 if size == 1 else None)
    options = dict(resample_every=every, losses=model, device=device)
    trainer = Trainer(sae, l1=args.l1, steps=steps, lr=args.lr, **options)
    out.mkdir(parents=True, exist_ok=True)
    if olds:
        checkpoint(dcp.load, olds[-1], model, trainer)
        trainer.done = done
    elif rank == 0:
        (out / "run.json").write_text(json.dumps(run))
    stops = []
    for number in (signal.SIGINT, signal.SIGTERM):  # once, they wait for the end of a step
        signal.signal(number, lambda n, _: (stops.append(n), signal.signal(n, signal.SIG_DFL)))
    with tqdm(total=steps, initial=done, desc=args.variant, unit="step", disable=rank > 0) as bar:
        while trainer.done < steps:
            record = trainer.step(x.chunk(size)[rank].to(device))
            bar.update()
            step, stopped = trainer.done, torch.tensor(len(stops), device=device)
            if mesh:  # a signal may come to one process before it comes to others
                dist.all_reduce(stopped)
            if step in (1, steps) or step % args.log_every == 0:
                m = evaluate(whole(sae), [x])
                shown = dict(loss=record.losses.total(record.l1), L0=m.l0, FVU=m.fvu, gamma=m.gamma)
                shown = {name: float(f"{value:.4g}") for name, value in shown.items()}
                bar.set_postfix(shown)
                with open(out / "log.jsonl" if rank == 0 else os.devnull, "a") as log:
                    print(json.dumps({"step": step} | shown), file=log)  # steps taken twice too
            if stopped or step in (1, steps) or step % args.checkpoint_every == 0:
                olds, new = sorted(out.glob(CHECKPOINTS)), out / "checkpoint.new"
                checkpoint(dcp.save, new, model, trainer)
                if rank == 0:  # in one move: a kill or a full disk leaves the last checkpoint
                    new.rename(out / f"checkpoint-{step:09}")
                    for old in olds:
                        shutil.rmtree(old)
            if stopped and step < steps:
                raise ValueError(f"stopped after step {step} of {steps}; --resume goes on")
            x = next(batches)

    sae = gated_sae.rescaled(whole(sae), 1 / c)
    if rank == 0:
        if not (out / "sae").exists():
            save(sae, out / "sae")
        m = evaluate(sae, map(data.rows, tqdm(kept, desc="rows kept aside")))
        print(f"L0 {m.l0:.4g}, FVU {m.fvu:.4g}, gamma {m.gamma:.4g} on {m.n_rows} rows kept aside")
    if mesh:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, TypeError, OSError, RuntimeError, AssertionError) as error:
        sys.exit(f"error: {error}")
