"""examples/train.py: activations from files, checkpoints, many devices, and the command line."""

import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import gated_sae
from examples import train
from examples.train import Activations, main
from gated_sae import KINDS, Trainer, evaluate, load

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # last_checkpoint


@pytest.fixture(autouse=True)
def signals():
    """A run keeps the handlers that it sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def numbered(n, d=3):
    """Rows that say where they are."""
    return np.arange(n, dtype=np.float32)[:, None] + np.linspace(0, 0.5, d, dtype=np.float32)


def write_shards(folder, lengths, kind="npy"):
    folder.mkdir(exist_ok=True)
    rows = np.split(numbered(sum(lengths)), np.cumsum(lengths)[:-1])
    for i, x in enumerate(rows):
        if kind == "npy":
            np.save(folder / f"{i:03}.npy", x)
        else:
            save_file({"activations": torch.from_numpy(x.copy())}, folder / f"{i:03}.safetensors")
    return folder


def where(x):
    return x[:, 0].long().tolist()


def all_rows(data):
    return data.rows(np.concatenate([data.blocks, data.kept]))


# -- Activations from files ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_shards_are_one_array_in_the_order_of_their_names(tmp_path, kind):
    data = Activations(write_shards(tmp_path / "shards", [5, 1, 300, 7], kind))
    assert (data.d_in, data.dtype, len(data.files)) == (3, torch.float32, 4)
    assert torch.equal(all_rows(data), torch.from_numpy(numbered(313)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_floats_in_any_layout(tmp_path, dtype, order):
    np.save(tmp_path / "a.npy", np.asarray(numbered(100).astype(dtype), order=order))
    x = all_rows(Activations(tmp_path / "a.npy"))
    assert x.dtype == torch.from_numpy(np.empty(0, np.dtype(dtype).newbyteorder("="))).dtype
    assert np.array_equal(x.double().numpy(), numbered(100).astype(dtype).astype(float))


def test_bfloat16_shards_and_hidden_files_which_are_none(tmp_path):
    x = torch.randn(10, 3).bfloat16()
    save_file({"x": x}, tmp_path / "a.safetensors")
    (tmp_path / "._a.npy").write_bytes(b"resource fork")
    assert torch.equal(all_rows(Activations(tmp_path)), x)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=4), st.integers(1, 3000))
def test_the_last_rows_are_kept_aside(tmp_path_factory, lengths, held_out):
    folder, n = write_shards(tmp_path_factory.mktemp("shards"), lengths), sum(lengths)
    for given_or_not, least in ((held_out, held_out), (None, 1 + n // 20)):
        data = Activations(folder, given_or_not)
        kept = where(data.rows(data.kept)) if len(data.kept) else []
        assert kept == list(range(data.n, n))
        assert min(n, least) <= len(kept) < least + max(1, n // 256)  # whole blocks


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=4),
    st.integers(1, 50),
    st.integers(0, 3),
    st.sampled_from([1, 2**10, 2**28]),
)
def test_an_epoch_holds_every_row_once_but_for_what_fills_no_batch(
    tmp_path_factory, lengths, batch, seed, held
):
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


def test_rows_are_shuffled_by_the_seed_anew_in_each_epoch(tmp_path):
    data = Activations(write_shards(tmp_path / "shards", [500, 600]), held_out=76)
    first, second = ([where(x) for x in itertools.islice(data.batches(256, s), 8)] for s in (0, 1))
    assert first[:4] != second[:4]
    assert first[:4] != first[4:]
    assert np.abs(np.diff(np.concatenate(first[:4]))).mean() > 200  # neighbours come from far apart


def test_each_epoch_and_each_window_has_an_order_of_its_own(tmp_path, monkeypatch):
    """Windows of one batch, which is one block of 64 rows."""
    np.save(tmp_path / "a.npy", numbered(256 * 64))
    monkeypatch.setattr(train, "WINDOW", 1)
    data = Activations(tmp_path / "a.npy", held_out=240 * 64)
    windows = [where(x) for x in itertools.islice(data.batches(64, seed=0), 48)]
    blocks = [x[0] // 64 for x in windows]
    orders = {tuple(row % 64 for row in x) for x in windows}
    for x, block in zip(windows, blocks, strict=True):
        assert {row // 64 for row in x} == {block}
    assert len({tuple(blocks[i : i + 16]) for i in (0, 16, 32)}) == 3
    assert len(orders) == 48


def test_little_more_is_in_memory_than_is_shuffled_at_once(tmp_path, monkeypatch):
    """Windows of 1024 rows out of 65 536."""
    np.save(tmp_path / "a.npy", numbered(2**16, 4))
    monkeypatch.setattr(train, "WINDOW", 2**10 * 4 * 4)
    data, most, total, read = Activations(tmp_path / "a.npy", 64), 0, 0, train.read

    def watched(file, first, last):
        nonlocal most, total
        most, total = max(most, last - first), total + last - first
        return read(file, first, last)

    monkeypatch.setattr(train, "read", watched)
    x = torch.cat(list(itertools.islice(data.batches(256, seed=0), 12)))
    assert most == 64
    assert total <= 4 * 1024  # three windows, and the next
    assert len(set(where(x))) == 3 * 1024
    assert max(where(x)) - min(where(x)) > 60_000


# -- What is refused -------------------------------------------------------------------------------


def broken_files(folder):
    """Files that hold no activations."""
    folder.mkdir()
    np.save(folder / "objects.npy", np.array([[1, "a"]], dtype=object))
    np.save(folder / "integers.npy", np.ones((4, 3), dtype=np.int64))
    np.save(folder / "flat.npy", np.ones(4, dtype=np.float32))
    np.save(folder / "empty.npy", np.ones((0, 3), dtype=np.float32))
    np.save(folder / "short.npy", numbered(1000))
    os.truncate(folder / "short.npy", 5000)
    (folder / "text.npy").write_text("no array")
    (folder / "nothing.npy").write_bytes(b"")
    np.savez(folder / "zip", a=numbered(3))
    os.replace(folder / "zip.npz", folder / "zip.npy")
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, folder / "two.safetensors")
    (folder / "text.safetensors").write_text("no tensors")
    return sorted(folder.iterdir())


def test_a_file_or_folder_without_activations_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.npy or \.safetensors file"):
        Activations(tmp_path)
    for file in [*broken_files(tmp_path / "broken"), tmp_path / "missing.npy"]:
        with pytest.raises(ValueError, match=f"{file.name}: .*expected one array"):
            Activations(file)


def test_an_object_array_is_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy"):
        Activations(tmp_path / "a.npy")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("other", [numbered(4, d=5), numbered(4).astype(np.float64)])
def test_shards_that_differ_are_named(tmp_path, other):
    np.save(tmp_path / "a.npy", numbered(4))
    np.save(tmp_path / "b.npy", other)
    with pytest.raises(ValueError, match=r"a\.npy.*b\.npy.*expected all alike"):
        Activations(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_named_by_file_and_number(tmp_path, bad):
    folder = write_shards(tmp_path / "shards", [100, 200])
    x = np.load(folder / "001.npy")
    x[17, 1], x[20] = bad, bad
    np.save(folder / "001.npy", x)
    data = Activations(folder, held_out=1)
    for read in (all_rows, lambda data: next(data.batches(299, seed=0))):
        with pytest.raises(ValueError, match=r"001\.npy: NaN or infinity in row (17|20)$"):
            read(data)


# -- The command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    """Sums of a few of sixteen directions, far from the origin."""
    file, random = tmp_path_factory.mktemp("data") / "a.npy", np.random.default_rng(0)
    f = random.random((12345, 16)) * (random.random((12345, 16)) < 5 / 16)
    np.save(file, (f @ random.standard_normal((16, 8)) + 3).astype(np.float32))
    return file


def options(activations, out, *more):
    files = [str(activations), "--out", str(out), "--device", "cpu", "--checkpoint-every", "7"]
    return [*files, "--d-sae", "16", "--l1", "0.3", "--batch", "64", "--lr", "1e-2", *more]


def status(*arguments):
    """What the script ends with: None or 0, a line of error, which means 1, or 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return None


def refused(*arguments):
    line = status(*arguments)
    assert str(line).startswith("error: ")
    assert len(line.splitlines()) == 1
    return line


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def last_checkpoint(out):
    """The one that there is: its step, and all that it holds."""
    (folder,) = out.glob("checkpoint-*")
    dcp_to_torch_save(folder, out / "state.pt")
    state = torch.load(out / "state.pt")
    (out / "state.pt").unlink()
    return int(folder.name.removeprefix("checkpoint-")), state


def assert_same_end(a, b):
    """Two runs ended in the same bits, in all that the next step would depend on."""
    (done, one), (other_done, other) = map(last_checkpoint, (a, b))
    assert done == other_done
    assert one["weights"].keys() == one["adam"].keys()
    assert {"step", "exp_avg", "exp_avg_sq"} == set(one["adam"]["sae.W_dec"])
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (a / "sae" / file).read_bytes() == (b / "sae" / file).read_bytes()


@pytest.mark.parametrize("variant", sorted(KINDS))
def test_what_is_trained_is_what_the_module_trains(activations, tmp_path, variant):
    main(options(activations, tmp_path / "a", "--variant", variant, "--steps", "9"))
    batches = list(itertools.islice(Activations(activations).batches(64, seed=0), 9))
    sae = KINDS[variant](8, 16)
    sae.b_dec.data.copy_(batches[0].double().mean(0))
    trainer = Trainer(sae, l1=0.3, steps=9, lr=1e-2, device="cpu")
    for x in batches:
        trainer.step(x)
    saved = load(tmp_path / "a" / "sae")
    assert saved.config == sae.config
    torch.testing.assert_close(saved.state_dict(), sae.state_dict(), rtol=0, atol=0)


def test_a_run_reads_each_row_once_and_measures_on_rows_kept_aside(activations, tmp_path, capsys):
    out = tmp_path / "a"
    main(options(activations, out))
    found, shown = capsys.readouterr()
    for name in ("loss=", "L0=", "FVU=", "gamma="):
        assert name in shown
    x = np.load(activations)
    last = (n := Activations(activations).n) // 64
    assert last_checkpoint(out)[0] == last
    m = evaluate(load(out / "sae"), [torch.from_numpy(x[n:])])
    words = found.split()
    assert [words[0], words[2], words[4]] == ["L0", "FVU", "gamma"]
    values = [float(word.strip(",")) for word in words[1:6:2]]
    assert values == pytest.approx([m.l0.item(), m.fvu.item(), m.gamma.item()], rel=1e-3)
    assert words[6:] == ["on", str(len(x) - n), "rows", "kept", "aside"]
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 100, last]
    assert set(records[0]) == {"step", "loss", "L0", "FVU", "gamma"}


def test_bfloat16_keeps_float32_weights(activations, tmp_path):
    for dtype in ("float32", "bfloat16", "float64"):
        main(options(activations, tmp_path / dtype, "--steps", "5", "--dtype", dtype))
    a, b, c = (load(tmp_path / d / "sae").W_enc for d in ("float32", "bfloat16", "float64"))
    assert (b.dtype, c.dtype) == (torch.float32, torch.float64)
    assert 0 < (a - b).abs().max() < 0.1


WRONG = ["--d-sae 0", "--l1 -1", "--l1 nan", "--lr 0", "--lr inf", "--seed -1", "--held-out 0"]
WRONG += ["--variant gate", "--batch 1.5", "--dtype int8", "--no-such-option"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_command_that_makes_no_sense_exits_with_2(activations, tmp_path, wrong, capsys):
    assert status(*options(activations, tmp_path / "a", *wrong.split())) == 2
    assert not (tmp_path / "a").exists()
    assert "error: " in capsys.readouterr().err


def test_help_is_the_docstring_and_the_options(capsys):
    assert status("--help") == 0
    assert train.__doc__ in capsys.readouterr().out


def test_failed_work_is_one_line_and_exits_with_1(activations, tmp_path, monkeypatch):
    out, bad = tmp_path / "a", numbered(500, 8)
    bad[3] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    broken = broken_files(tmp_path / "broken")
    for file in [*broken, tmp_path / "missing.npy", tmp_path / "nan.npy"]:
        assert file.name in refused(*options(file, out))
    n = Activations(activations).n
    line = refused(*options(activations, out, "--batch", "20000"))
    assert f"{n} rows to train on, expected a batch of 20000" in line
    line = refused(*options(activations, out, "--held-out", "12345"))
    assert "0 rows to train on" in line
    assert "nowhere" in refused(*options(activations, out, "--device", "nowhere"))
    for world in ("two", "0", "-1", ""):
        monkeypatch.setenv("WORLD_SIZE", world)
        line = refused(*options(activations, out))
        assert f"WORLD_SIZE is {world!r}, expected a positive number" in line
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--batch is 64, expected a multiple of 3" in refused(*options(activations, out))
    more = "--batch", "66", "--resample-every", "5"
    assert "--resample-every" in refused(*options(activations, out, *more))
    assert not out.exists()


def test_nothing_is_written_over(activations, tmp_path):
    """Another run, with or without --resume; other things; a file. An empty folder will do."""
    out, other = tmp_path / "a", tmp_path / "b"
    out.mkdir()
    main(options(activations, out, "--steps", "9"))
    before = contents(out)
    assert "expected a new folder, or --resume" in refused(*options(activations, out))
    line = refused(*options(activations, out, "--steps", "10", "--l1", "2", "--resume"))
    assert "'l1': (0.3, 2.0)" in line
    assert "'steps': (9, 10)" in line
    assert "'lr'" not in line
    np.save(tmp_path / "fewer.npy", np.load(activations)[:9000])
    line = refused(*options(tmp_path / "fewer.npy", out, "--steps", "9", "--resume"))
    assert "'rows': (" in line
    assert contents(out) == before
    (out / "checkpoint-000000009").rename(out / "checkpoint-000000009-mine")
    assert "expected a new folder" in refused(*options(activations, out, "--resume"))
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "b exists" in refused(*options(activations, other))
    for more in ([], ["--resume"]):
        assert "thesis.txt" in refused(*options(activations, other / "thesis.txt", *more))
    assert contents(other) == {other / "thesis.txt": b"mine"}


def test_a_folder_that_cannot_be_made_stops_the_run_at_once(activations, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    steps, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *args: steps.append(1) or step(*args))
    assert "file" in refused(*options(activations, tmp_path / "file" / "a"))
    assert not steps


def test_a_broken_checkpoint_is_named(activations, tmp_path):
    args = options(activations, out := tmp_path / "a", "--steps", "9")
    main(args)
    whole = contents(out / "checkpoint-000000009")
    assert len(whole) == 2
    for file, bits in whole.items():
        for broken in (b"", b"no checkpoint", bits[: len(bits) // 2]):
            file.write_bytes(broken)
            assert "checkpoint-000000009" in refused(*args, "--resume")
        file.write_bytes(bits)
    assert status(*args, "--resume") is None


# -- Stopped, and gone on with ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(activations, tmp_path, number):
    """Stopped in steps 3, 13, 23 and so on. Some latents fire on a row, then on none for long."""
    more = ["--steps", "40", "--resample-every", "6", "--checkpoint-every", "1000"]
    more += ["--batch", "2", "--d-sae", "40"]
    main(options(activations, tmp_path / "whole", *more))
    step, out = Trainer.step, tmp_path / "parts"

    def interrupted(self, x):
        if self.done % 10 == 2:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_DFL  # the second is not caught
        return step(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        for done in (3, 13, 23, 33):
            line = refused(*options(activations, out, *more, "--resume"))
            assert f"stopped after step {done} of 40" in line
            assert last_checkpoint(out)[0] == done
            assert not (out / "sae").exists()
        main(options(activations, out, *more, "--resume"))
    assert_same_end(tmp_path / "whole", out)


KILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch._dynamo  # or each child would take a second to import it
from examples import train
out, chance, steps, in_writing = Path(sys.argv[1]), random.Random(0), set(), 0
names = lambda: sorted(path.name for path in out.glob("checkpoint-*"))
for kill in range(1000):
    before, child = names(), os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train.main(sys.argv[2:])
        os._exit(0)
    end = time.time() + (chance.uniform(0, 0.2) if kill % 5 == 0 else 10)
    while kill < 30 and names() == before and time.time() < end:
        time.sleep(0.001)
    if kill < 30:
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    steps.update(names()[-1:])
    in_writing += (out / "checkpoint.new").exists()
print(len(steps), in_writing, file=sys.stderr)
sys.exit(os.WEXITSTATUS(status))
"""


def test_a_run_killed_at_any_moment_ends_in_the_same_bits(activations, tmp_path):
    """By SIGKILL, after 20 different steps at least, and in the middle of writing."""
    more = ["--steps", "400", "--resample-every", "50", "--checkpoint-every", "2"]
    main(options(activations, tmp_path / "whole", *more))
    args = options(activations, tmp_path / "killed", *more, "--resume")
    command = [sys.executable, "-c", KILL, str(tmp_path / "killed"), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    n_steps, n_writing = map(int, done.stderr.split())
    assert n_steps >= 20
    assert n_writing >= 5
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


FULL = """
import runpy, signal, sys, gated_sae
from resource import RLIM_INFINITY, RLIMIT_FSIZE, setrlimit
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
step, (_, script, *args) = gated_sae.Trainer.step, sys.argv
def limited(self, x):
    if self.done == 10:
        setrlimit(RLIMIT_FSIZE, (most, RLIM_INFINITY))
    return step(self, x)
gated_sae.Trainer.step = limited
for most in (0, 3000, 12000):
    sys.argv = [script, *args, "--out", str(most)]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        error = stop
    setrlimit(RLIMIT_FSIZE, (RLIM_INFINITY, RLIM_INFINITY))
raise error
"""


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(activations, tmp_path):
    """A limit on the size of files stands in for it. Checkpoints come after steps 7 and 14."""
    args = options(activations, tmp_path / "whole", "--steps", "20")
    main(args)
    command = [sys.executable, "-c", FULL, str(SCRIPT), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 12000/checkpoint.new: ")
    assert "Traceback" not in done.stderr
    for out in (tmp_path / "0", tmp_path / "3000", tmp_path / "12000"):
        assert not (out / "sae").exists()
        assert last_checkpoint(out)[0] == 7
        main([*args, "--out", str(out), "--resume"])
        assert_same_end(tmp_path / "whole", out)


def test_a_failure_after_the_last_checkpoint_is_mended_by_going_on(activations, tmp_path):
    def full(sae, folder):
        raise OSError("No space left on device")

    out, more = tmp_path / "a", ["--steps", "14"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save", full)
        with pytest.raises(OSError, match="No space left"):
            main(options(activations, out, *more))
    assert last_checkpoint(out)[0] == 14
    main(options(activations, out, *more, "--resume"))
    main(options(activations, tmp_path / "whole", *more))
    assert_same_end(tmp_path / "whole", out)


# -- Two processes ---------------------------------------------------------------------------------

# One of the two. Of each run: where they meet, its losses, what happens in step 9, its arguments.
PROCESS = """
import json, os, signal, sys
import torch.distributed as dist
import gated_sae
from examples import train
first, step, results = os.environ["RANK"] == "0", gated_sae.Trainer.step, []
for port, (way, event, _), arguments in json.load(open(sys.argv[1])):
    def eventful(self, x):
        if not first and self.done == 8 and event == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if not first and self.done == 8 and event == "overflow":
            x = x * 1e200
        return step(self, x)
    gated_sae.Trainer.step = eventful
    train.fast_losses = getattr(gated_sae, way + "_losses", lambda sae, x: sae.losses(x))
    os.environ["MASTER_PORT"] = str(port)
    try:
        results.append(train.main(arguments))
    except Exception as error:
        results.append(str(error))
        dist.destroy_process_group()
json.dump(results, open(sys.argv[1] + os.environ["RANK"], "w"))
"""
WAYS = dict(dense=lambda sae, x: sae.losses(x), sparse=gated_sae.sparse_losses)
# With a number of latents that two do not divide.
LONG = ["--steps", "20", "--dtype", "float64", "--d-sae", "15", "--batch", "34", "--log-every", "5"]
SHORT = ["--steps", "4", "--dtype", "float64", "--d-sae", "7", "--batch", "34", "--variant"]
RUNS = {way: (way, None, LONG) for way in WAYS}
RUNS |= {variant: ("dense", None, [*SHORT, variant]) for variant in KINDS}
ALIKE = list(RUNS)
RUNS |= {"from one": ("dense", None, LONG), "to one": ("dense", "signal", LONG)}
RUNS |= {"overflow": ("dense", "overflow", LONG)}


def alone(activations, out, way="dense", more=LONG, stop=None):
    """The run of one process, or as much as is left of it; a signal comes in step `stop`."""
    step = Trainer.step

    def eventful(self, x):
        if stop and self.done == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", eventful)
        patch.setattr(train, "fast_losses", WAYS[way])
        stops = pytest.raises(ValueError, match=f"stopped after step {stop} of")
        with stops if stop else nullcontext():
            main(options(activations, out, *more, "--resume"))
    return out


@pytest.fixture(scope="module")
def two(activations, tmp_path_factory):
    """The folder of what two processes did, and what came of each run in each of them."""
    folder = tmp_path_factory.mktemp("two")
    alone(activations, folder / "from one", stop=9)
    meetings = [socket.create_server(("localhost", 0)) for _ in RUNS]  # at free ports
    ports = [meeting.getsockname()[1] for meeting in meetings]
    files = [options(activations, folder / name, *RUNS[name][2], "--resume") for name in RUNS]
    todo = list(zip(ports, RUNS.values(), files, strict=True))
    for meeting in meetings:
        meeting.close()
    (folder / "runs.json").write_text(json.dumps(todo))
    command = [sys.executable, "-c", PROCESS, str(folder / "runs.json")]
    env = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    processes = [subprocess.Popen(command, env=env | {"RANK": rank}) for rank in "01"]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found = [json.loads((folder / f"runs.json{rank}").read_text()) for rank in "01"]
    return folder, dict(zip(RUNS, zip(*found, strict=True), strict=True))


def assert_alike(out, one):
    """All that two processes trained, and reported, is what one did."""
    (done, a), (other_done, b) = map(last_checkpoint, (out, one))
    assert done == other_done
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    a, b = (load(folder / "sae").state_dict() for folder in (out, one))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert (out / "log.jsonl").read_text() == (one / "log.jsonl").read_text()


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_as_one(activations, two, tmp_path, name):
    (folder, found), (way, _, more) = two, RUNS[name]
    assert found[name] == (None, None)
    assert_alike(folder / name, alone(activations, tmp_path, way, more))


def test_a_checkpoint_of_two_goes_on_in_one_and_the_reverse(activations, two, tmp_path):
    """A signal to one process stops both."""
    (folder, found), one = two, alone(activations, tmp_path / "one")
    assert found["from one"] == (None, None)
    assert_alike(folder / "from one", one)
    assert found["to one"] == ("stopped after step 9 of 20; --resume goes on",) * 2
    assert last_checkpoint(folder / "to one")[0] == 9
    assert_alike(alone(activations, folder / "to one"), one)


def test_a_loss_that_is_no_number_in_one_process_stops_both(two):
    folder, found = two
    for line in found["overflow"]:
        assert line.startswith(("step 9: the loss is inf", "step 9: the loss is nan"))
    assert last_checkpoint(folder / "overflow")[0] == 7


def test_torchrun_starts_it_in_a_fresh_clone(activations, tmp_path):
    (tmp_path / "examples").mkdir()
    for file in (ROOT / "gated_sae.py", SCRIPT):
        (tmp_path / file.relative_to(ROOT)).write_text(file.read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "examples/train.py"]
    command += options(activations, "two", *LONG)
    env = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows kept aside") == 1
    assert_alike(tmp_path / "two", alone(activations, tmp_path / "one"))
