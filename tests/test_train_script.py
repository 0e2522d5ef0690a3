"""examples/train.py: activations from files, checkpoints, many devices, and the command line."""

import itertools
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_FSIZE, setrlimit

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import gated_sae
from examples import train
from examples.train import Activations
from gated_sae import KINDS, Trainer, evaluate, load

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=4)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # last_checkpoint


def numbered(n, d=3):
    """Rows that say where they are."""
    return np.arange(n, dtype=np.float32)[:, None] + np.linspace(0, 0.5, d, dtype=np.float32)


def where(x):
    return x[:, 0].long().tolist()


def write_shards(folder, lengths, layout="=C", dtype="float32"):
    for i, x in enumerate(np.split(numbered(sum(lengths)), np.cumsum(lengths)[:-1])):
        if layout == "safetensors":
            x = torch.from_numpy(x).to(getattr(torch, dtype))
            save_file({"activations": x}, folder / f"{i:03}.safetensors")
        else:
            x = x.astype(np.dtype(dtype).newbyteorder(layout[0]), layout[1])
            np.save(folder / f"{i:03}.npy", x)
    return folder


def all_rows(data):
    return data.rows(np.concatenate([data.blocks, data.kept]))


# -- Activations from files ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["=C", "=F", ">C", ">F", "safetensors"])
def test_shards_are_one_array_in_the_order_of_their_names(tmp_path, layout):
    """Of any floats, in either order of bytes, and of axes. Hidden files are none of them."""
    (tmp_path / "._a.npy").write_bytes(b"resource fork")
    for dtype in ["float16", "float32", "float64"] + ["bfloat16"] * (layout == "safetensors"):
        data = Activations(write_shards(tmp_path, [5, 1, 300, 7], layout, dtype))
        x, expected = all_rows(data), torch.from_numpy(numbered(313)).to(getattr(torch, dtype))
        assert (data.d_in, len(data.files)) == (3, 4)
        assert data.dtype == x.dtype == expected.dtype
        assert torch.equal(x, expected)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=4), st.integers(1, 3000))
def test_the_last_rows_are_kept_aside(tmp_path_factory, lengths, held_out):
    folder, n = write_shards(tmp_path_factory.mktemp("shards"), lengths), sum(lengths)
    for given_or_not, least in ((held_out, held_out), (None, 1 + n // 20)):
        data = Activations(folder, given_or_not)
        assert where(data.rows(data.kept)) == list(range(data.n, n))
        assert min(n, least) <= n - data.n < least + max(1, n // 256)  # whole blocks


@given(LENGTHS, st.integers(1, 50), st.integers(0, 3), st.sampled_from([1, 2**10, 2**28]))
def test_an_epoch_holds_each_row_once(tmp_path_factory, lengths, batch, seed, held):
    data = Activations(write_shards(tmp_path_factory.mktemp("shards"), lengths))
    n = data.n
    if n < batch:
        with pytest.raises(ValueError, match=f"{n} rows to train on, expected a batch of {batch}"):
            next(data.batches(batch, seed))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "WINDOW", held)
        epochs = list(itertools.islice(data.batches(batch, seed), 2 * (n // batch)))
        for start in (1, n // batch, n // batch + 1):
            if start < len(epochs):
                assert torch.equal(next(data.batches(batch, seed, start)), epochs[start])
    for epoch in (epochs[: n // batch], epochs[n // batch :]):
        assert {len(x) for x in epoch} == {batch}
        seen = where(torch.cat(epoch))
        assert len(set(seen)) == len(seen) == n // batch * batch
        assert set(seen) <= set(range(n))  # and so none of those kept aside


def test_each_seed_each_epoch_and_each_window_has_an_order_of_its_own(tmp_path, monkeypatch):
    """Windows of one batch, which is one block of 64 rows."""
    np.save(tmp_path / "a.npy", numbered(256 * 64))
    monkeypatch.setattr(train, "WINDOW", 1)
    data = Activations(tmp_path / "a.npy", held_out=240 * 64)
    windows = [where(x) for s in (0, 1) for x in itertools.islice(data.batches(64, s), 48)]
    blocks = [x[0] // 64 for x in windows]
    for x, block in zip(windows, blocks, strict=True):
        assert {row // 64 for row in x} == {block}
    assert len({tuple(blocks[i : i + 16]) for i in range(0, 96, 16)}) == 6
    assert len({tuple(row % 64 for row in x) for x in windows}) == 96


def test_little_more_is_in_memory_than_is_shuffled_at_once(tmp_path, monkeypatch):
    """Windows of 1024 rows out of 65 536."""
    np.save(tmp_path / "a.npy", numbered(2**16, 4))
    monkeypatch.setattr(train, "WINDOW", 2**10 * 4 * 4)
    data, lengths, read = Activations(tmp_path / "a.npy", 64), [], train.read

    def watched(file, first, last, *npy):
        lengths.append(last - first)
        return read(file, first, last, *npy)

    monkeypatch.setattr(train, "read", watched)
    x = where(torch.cat(list(itertools.islice(data.batches(256, seed=0), 12))))
    assert max(lengths) == 64
    assert data.npy.cache_info().misses == 1  # no header is parsed in the thread
    assert sum(lengths) <= 4 * 1024  # three windows, and the next
    assert max(x) - min(x) > 60_000
    assert np.abs(np.diff(x)).mean() > 10_000  # neighbours come from far apart


# -- The command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    """Sums of a few of sixteen directions, far from the origin."""
    file, random = tmp_path_factory.mktemp("data") / "a.npy", np.random.default_rng(0)
    f = random.random((12345, 16)) * (random.random((12345, 16)) < 5 / 16)
    np.save(file, (f @ random.standard_normal((16, 8)) + 3).astype(np.float32))
    return file


def options(file, out, more=""):
    words = "--device cpu --checkpoint-every 7 --d-sae 16 --l1 0.3 --batch 64 --lr 1e-2"
    return [str(file), "--out", str(out), *words.split(), *more.split()]


def status(arguments, events=(), **replaced):
    """What the script ends with: None or 0, a line of error, which means 1, or 2.

    `events` come to batches, before the step after so many. Handlers that a run leaves go at once:
    with them pytest would outlive a SIGTERM to its process group, and its children would not.
    """
    step, handlers = Trainer.step, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def eventful(self, x):
        if self.done in events:
            events[self.done](x)
        return step(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments])
        patch.setattr(Trainer, "step", eventful)
        for name, function in replaced.items():
            patch.setattr(gated_sae, name, function)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return None


def run(file, out, more="", **changes):
    """A run that ends well, and its folder."""
    assert status(options(file, out, more), **changes) is None
    return out


def refused(file, out, more="", **changes):
    line = status(options(file, out, more), **changes)
    assert str(line).startswith("error: ")
    assert len(line.splitlines()) == 1
    return line


def processes(*command, changes=({},), code=0, cwd=None):
    """Processes of Python at once, which end with `code`, each with changes of the environment."""
    command = [sys.executable, *map(str, command)]
    how = dict(cwd=cwd, timeout=400, capture_output=True, text=True)
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(subprocess.run, command, env=ENVIRONMENT | c, **how) for c in changes]
    done = [run.result() for run in runs]
    assert {process.returncode for process in done} == {code}, [process.stderr for process in done]
    return done


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def last_checkpoint(out):
    """The one that there is: its step, and all that it holds."""
    (folder,) = out.glob("checkpoint-*")
    dcp_to_torch_save(folder, out / "state.pt")
    return int(folder.name.removeprefix("checkpoint-")), torch.load(out / "state.pt")


def assert_same_end(a, b, rtol=0, atol=0):
    """Two runs ended in the same bits, or nearly, in all that the next step would depend on."""
    (done, one), (other_done, other) = map(last_checkpoint, (a, b))
    assert done == other_done
    assert one["weights"].keys() == one["adam"].keys()
    assert {"step", "exp_avg", "exp_avg_sq"} == set(one["adam"]["sae.W_dec"])
    if atol:  # between one process and many, which restart no latents
        one["silent"] = other["silent"]
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
    one, other = (load(folder / "sae").state_dict() for folder in (a, b))
    torch.testing.assert_close(one, other, rtol=0, atol=atol)
    for file in ("sae/cfg.json", "log.jsonl" if atol else "sae/sae_weights.safetensors"):
        assert (a / file).read_bytes() == (b / file).read_bytes()


@pytest.mark.parametrize("variant", sorted(KINDS))
def test_what_is_trained_is_what_the_module_trains(activations, tmp_path, variant):
    saved = load(run(activations, tmp_path / "a", f"--variant {variant} --steps 9") / "sae")
    data = Activations(activations)
    kept = map(data.rows, np.array_split(data.kept, -(-len(data.kept) // 64)))
    c = (8 / gated_sae.variance(kept, 8).item()) ** 0.5
    sae = KINDS[variant](8, 16)
    trainer = Trainer(sae, l1=0.3, steps=9, lr=1e-2, device="cpu")
    for x in itertools.islice(data.batches(64, seed=0), 9):
        trainer.step(c * x)
    sae = gated_sae.rescaled(sae, 1 / c)
    assert saved.config == sae.config
    torch.testing.assert_close(saved.state_dict(), sae.state_dict(), rtol=0, atol=0)


def test_a_run_reads_each_row_once_and_measures_on_rows_kept_aside(activations, tmp_path, capsys):
    out = run(activations, tmp_path / "a")
    line, shown = capsys.readouterr()
    assert re.search("loss=.*L0=.*FVU=.*gamma=", shown)
    x = np.load(activations)
    last = (n := Activations(activations).n) // 64
    assert last_checkpoint(out)[0] == last
    m = evaluate(load(out / "sae"), [torch.from_numpy(x[n:])])
    says = rf"L0 (\S+), FVU (\S+), gamma (\S+) on {len(x) - n} rows kept aside\n"
    values = [float(word) for word in re.fullmatch(says, line).groups()]
    assert values == pytest.approx([m.l0.item(), m.fvu.item(), m.gamma.item()], rel=1e-3)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 100, last]
    assert set(records[0]) == {"step", "loss", "L0", "FVU", "gamma"}


def test_bfloat16_keeps_float32_weights(activations, tmp_path):
    dtypes = "float32", "bfloat16", "float64"
    outs = [run(activations, tmp_path / d, f"--steps 5 --dtype {d}") for d in dtypes]
    a, b, c = (load(out / "sae").W_enc for out in outs)
    assert (b.dtype, c.dtype) == (torch.float32, torch.float64)
    assert 0 < (a - b).abs().max() < 0.1


def test_help_and_what_makes_no_sense(activations, tmp_path, capsys):
    assert status(["--help"]) == 0
    assert train.__doc__ in capsys.readouterr().out
    wrong = ["--d-sae 0", "--l1 -1", "--l1 nan", "--lr 0", "--lr inf", "--seed -1", "--held-out 0"]
    wrong += ["--variant gate", "--batch 1.5", "--dtype int8", "--no-such-option"]
    for more in wrong:
        assert status(options(activations, tmp_path / "a", more)) == 2
        assert "error: " in capsys.readouterr().err
        assert not (tmp_path / "a").exists()


def test_data_that_will_not_do_is_named(tmp_path, tmp_path_factory):
    """And not unpickled."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    np.save(tmp_path / "objects.npy", np.array([[Bomb()]], dtype=object))
    np.save(tmp_path / "integers.npy", np.ones((4, 3), dtype=np.int64))
    np.save(tmp_path / "flat.npy", np.ones(4, dtype=np.float32))
    np.save(tmp_path / "empty.npy", np.ones((0, 3), dtype=np.float32))
    np.save(tmp_path / "short.npy", numbered(1000))
    os.truncate(tmp_path / "short.npy", 5000)
    np.savez(tmp_path / "zip", a=numbered(3))
    os.replace(tmp_path / "zip.npz", tmp_path / "zip.npy")
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "two.safetensors")
    for name, text in ("text.npy", "no array"), ("nothing.npy", ""), ("a.safetensors", "none"):
        (tmp_path / name).write_text(text)
    files = [*tmp_path.iterdir(), tmp_path / "missing.npy"]
    cases = [(file, f"{file.name}: .*expected one array") for file in files]
    cases += [(tmp_path_factory.mktemp("none"), r"holds no \.npy or \.safetensors file")]
    alike = r"000\.npy.*001\.npy.*expected all alike"
    shards = [(numbered(200, d=5), alike), (numbered(200).astype(np.float64), alike)]
    for bad in (np.nan, np.inf, -np.inf):
        shards.append((x := numbered(200), r"001\.npy: NaN or infinity in row (17|20)$"))
        x[17, 1] = x[20] = bad
    for x, expected in shards:
        folder = write_shards(tmp_path_factory.mktemp("shards"), [100, 200])
        np.save(folder / "001.npy", x)
        cases.append((folder, expected))
    for path, expected in cases:
        for read in (all_rows, lambda data: next(data.batches(299, seed=0))):
            with pytest.raises(ValueError, match=expected):
                read(Activations(path, held_out=1))
        assert re.search(expected, refused(path, tmp_path / "a"))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "boom").exists()


def test_failed_work_is_one_line_and_nothing_is_written_over(activations, tmp_path, monkeypatch):
    """Neither is a step taken: another run, with or without --resume; other things; a file."""
    fewer, new, out, other = (tmp_path / name for name in ("fewer.npy", "new", "out", "other"))
    rows, others = np.load(activations), tmp_path / "others.npy"
    np.save(fewer, rows[:9000]), np.save(others, np.where(np.arange(len(rows)) % 2, rows.T, 0).T)
    out.mkdir()  # an empty folder will do
    run(activations, out, "--steps 9")
    other.mkdir()
    (thesis := other / "thesis.txt").write_text("mine")
    n, before, steps = Activations(activations).n, contents(tmp_path), []
    differ = r"{'l1': \(0.3, 2.0\), 'steps': \(9, 10\)}$"
    world = "WORLD_SIZE is {!r}, expected a positive number".format
    for world, file, folder, more, expected in [
        ("1", activations, new, "--batch 20000", f"error: {n} rows .*, expected a batch of 20000"),
        ("1", activations, new, "--held-out 12345", "error: 0 rows to train on"),
        ("1", activations, new, "--device nowhere", "nowhere"),
        *((w, activations, new, "", world(w)) for w in ("two", "0", "-1", "")),
        ("3", activations, new, "", "--batch is 64, expected a multiple of 3"),
        ("3", activations, new, "--batch 66 --resample-every 5", "--resample-every"),
        ("1", activations, out, "", "expected a new folder, or --resume"),
        ("1", activations, out, "--steps 10 --l1 2 --resume", differ),
        ("1", fewer, out, "--steps 9 --resume", r"'rows': \("),
        ("1", others, out, "--steps 9 --resume", "differ in {'crc32 of some rows': "),
        ("1", activations, other, "", "other exists"),
        ("1", activations, thesis, "", "thesis.txt"),
        ("1", activations, thesis, "--resume", "thesis.txt"),
        ("1", activations, thesis / "a", "", "thesis.txt"),
    ]:
        monkeypatch.setenv("WORLD_SIZE", world)
        line = refused(file, folder, more, events=dict.fromkeys(range(20), steps.append))
        assert re.search(expected, line)
        assert contents(tmp_path) == before
    assert not steps
    (out / "checkpoint-000000009").rename(out / "checkpoint-000000009-mine")
    assert "expected a new folder" in refused(activations, out, "--resume")


def test_a_broken_checkpoint_is_named(activations, tmp_path):
    out, more = run(activations, tmp_path / "a", "--steps 9"), "--steps 9 --resume"
    whole = contents(out / "checkpoint-000000009")
    assert len(whole) == 2
    for file, bits in whole.items():
        for broken in (b"", b"no checkpoint", bits[: len(bits) // 2]):
            file.write_bytes(broken)
            assert "checkpoint-000000009" in refused(activations, out, more)
        file.write_bytes(bits)
    run(activations, out, more)


# -- Stopped, and gone on with ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(activations, tmp_path, number):
    """Stopped in steps 3, 13, 23 and so on. Some latents fire on a row, then on none for long."""
    more = "--steps 40 --resample-every 6 --checkpoint-every 1000 --batch 2 --d-sae 40"
    whole, out = run(activations, tmp_path / "whole", more), tmp_path / "parts"

    def interrupt(x):
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_DFL  # the second is not caught

    events = dict.fromkeys((2, 12, 22, 32), interrupt)
    for done in (3, 13, 23, 33):
        line = refused(activations, out, f"{more} --resume", events=events)
        assert f"stopped after step {done} of 40" in line
        assert last_checkpoint(out)[0] == done
        assert not (out / "sae").exists()
    assert_same_end(whole, run(activations, out, f"{more} --resume", events=events))


def killed(out, *arguments):
    """30 forks go on with a run and are killed, most of them soon after a checkpoint."""
    import torch._dynamo  # noqa: F401 - or each fork would take a second to import it

    out, chance, steps, in_writing = Path(out), np.random.default_rng(0), set(), 0
    for kill in range(30):
        before, child = [*out.glob("checkpoint-*")], os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.exit(train.main(arguments))
        end = time.time() + (chance.uniform(0, 0.2) if kill % 5 == 0 else 10)
        while [*out.glob("checkpoint-*")] == before and time.time() < end:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL  # it had not ended of itself
        steps.update(sorted(out.glob("checkpoint-*"))[-1:])
        in_writing += (out / "checkpoint.new").exists()
    assert len(steps) >= 20, steps
    assert in_writing >= 5, in_writing


def test_a_run_killed_at_any_moment_ends_in_the_same_bits(activations, tmp_path):
    """By SIGKILL, after 20 different steps at least, and in the middle of writing."""
    more, out = "--steps 400 --resample-every 50 --checkpoint-every 2 --resume", tmp_path / "killed"
    processes(__file__, "killed", out, *options(activations, out, more))
    whole = run(activations, tmp_path / "whole", more.removesuffix(" --resume"))
    assert_same_end(whole, run(activations, out, more))


def filled(disks, *arguments):
    """Runs on disks that are full when step 11 comes. A limit on the size of files stands in."""
    lines = []
    for disk in disks.split():
        limit = int(disk), RLIM_INFINITY
        events = {10: lambda x, limit=limit: setrlimit(RLIMIT_FSIZE, limit)}
        lines.append(status([*arguments, "--out", disk], events))
        setrlimit(RLIMIT_FSIZE, (RLIM_INFINITY, RLIM_INFINITY))
    return "\n".join(lines)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(activations, tmp_path):
    """Checkpoints come after steps 7, 14 and 20. Then the disk may be full, too."""
    whole, late = run(activations, tmp_path / "whole", "--steps 20"), tmp_path / "late"
    args, disks = options(activations, "", "--steps 20"), ["0", "3000", "12000"]  # bytes of a file
    (done,) = processes(__file__, "filled", " ".join(disks), *args, code=1, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    for disk, line in zip(disks, done.stderr.splitlines()[-3:], strict=True):
        assert line.startswith(f"error: {disk}/checkpoint.new: ")
    full = dict(save=lambda *_: Path("/dev/full").write_text("sae"))
    assert "No space left" in refused(activations, late, "--steps 20", **full)
    for out, done in [*((tmp_path / disk, 7) for disk in disks), (late, 20)]:
        assert not (out / "sae").exists()
        assert last_checkpoint(out)[0] == done
        assert_same_end(whole, run(activations, out, "--steps 20 --resume"))


# -- Two processes ---------------------------------------------------------------------------------

NEARLY = dict(rtol=1e-12, atol=1e-13)
# With a number of latents that two do not divide.
LONG = "--steps 20 --dtype float64 --d-sae 15 --batch 34 --log-every 5"
SHORT = "--steps 4 --dtype float64 --d-sae 7 --batch 34 --variant"
DENSE = dict(more=LONG, fast_losses=lambda sae, x: sae.losses(x))
ALIKE = {"dense": DENSE, "from one": DENSE}
ALIKE |= {"sparse": DENSE | dict(fast_losses=partial(gated_sae.fast_losses, sparse=True))}
ALIKE |= {variant: DENSE | dict(more=f"{SHORT} {variant}") for variant in KINDS}
STOP = {8: lambda x: os.kill(os.getpid(), signal.SIGTERM)}
# The events come to the second process only.
RUNS = ALIKE | {"to one": DENSE | dict(events=STOP)}
RUNS |= {"overflow": DENSE | dict(events={8: lambda x: x.mul_(1e200)})}


def one_of_two(file, folder, *ports):
    """One of two processes, which meet at a port in each run: prints what comes of the runs."""
    results = {}
    for (name, changes), port in zip(RUNS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        arguments = options(file, Path(folder, name), changes["more"] + " --resume")
        events = changes.get("events", ()) if os.environ["RANK"] == "1" else ()
        results[name] = status(arguments, events, fast_losses=changes["fast_losses"])
        if results[name]:
            torch.distributed.destroy_process_group()
    print(json.dumps(results))


@pytest.fixture(scope="module")
def two(activations, tmp_path_factory):
    """The folder of what two processes did, and what came of each run in each of them."""
    folder = tmp_path_factory.mktemp("two")
    assert "stopped after step 9 of" in refused(activations, folder / "from one", **RUNS["to one"])
    meetings = [socket.create_server(("localhost", 0)) for _ in RUNS]  # at free ports
    ports = [meeting.getsockname()[1] for meeting in meetings]
    for meeting in meetings:
        meeting.close()
    ranks = [{"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"} for rank in "01"]
    done = processes(__file__, "one_of_two", activations, folder, *ports, changes=ranks)
    found = [json.loads(process.stdout.splitlines()[-1]) for process in done]
    return folder, {name: [results[name] for results in found] for name in RUNS}


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_as_one_and_go_on_with_what_one_left(activations, two, tmp_path, name):
    folder, found = two
    assert found[name] == [None, None]
    assert_same_end(folder / name, run(activations, tmp_path / "one", **RUNS[name]), **NEARLY)


def test_what_stops_one_of_two_processes_stops_both_and_one_goes_on(activations, two, tmp_path):
    """A signal; a loss that is no number."""
    folder, found = two
    assert found["to one"] == ["error: stopped after step 9 of 20; --resume goes on"] * 2
    assert last_checkpoint(folder / "to one")[0] == 9
    out = run(activations, folder / "to one", **DENSE | dict(more=f"{LONG} --resume"))
    assert_same_end(out, run(activations, tmp_path / "one", **DENSE), **NEARLY)
    for line in found["overflow"]:
        assert re.match("error: step 9: the loss is (inf|nan)", line)
    assert last_checkpoint(folder / "overflow")[0] == 7


def test_torchrun_starts_it_in_a_fresh_clone(activations, tmp_path):
    (tmp_path / "examples").mkdir()
    for file in (ROOT / "gated_sae.py", SCRIPT):
        (tmp_path / file.relative_to(ROOT)).write_text(file.read_text())
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["examples/train.py", *options(activations, "two", LONG)]
    (done,) = processes(*command, changes=[{"PYTHONPATH": ""}], cwd=tmp_path)
    assert done.stdout.count("rows kept aside") == 1
    assert_same_end(tmp_path / "two", run(activations, tmp_path / "one", **DENSE), **NEARLY)


if __name__ == "__main__":  # in a process that a test starts: the name of a function, its arguments
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
