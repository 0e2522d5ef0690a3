"""Section 14: activations from files, checkpoints, and the command line."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_saes import assert_equal
from safetensors.torch import load_file, save_file

import gated_sae
import toy_data
from gated_sae import (
    Activations,
    GatedSAE,
    Trainer,
    load,
    load_checkpoint,
    main,
    save,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent


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


# -- Activations from files ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_shards_are_one_array_in_the_order_of_their_names(tmp_path, kind):
    data = Activations(write_shards(tmp_path / "shards", [5, 1, 300, 7], kind))
    assert (len(data), data.d_in, data.dtype) == (313, 3, torch.float32)
    batches = list(data.in_order(64))
    assert_equal(torch.cat(batches).numpy(), numbered(313), rtol=0, atol=0)
    assert max(map(len, batches)) == 64


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_floats_in_any_layout(tmp_path, dtype, order):
    np.save(tmp_path / "a.npy", np.asarray(numbered(100).astype(dtype), order=order))
    (x,) = Activations(tmp_path / "a.npy").in_order(100)
    assert_equal(x.double().numpy(), numbered(100).astype(dtype).astype(float), rtol=0, atol=0)


def test_bfloat16_shards(tmp_path):
    x = torch.randn(10, 3).bfloat16()
    save_file({"x": x}, tmp_path / "a.safetensors")
    assert_equal(next(Activations(tmp_path).in_order(10)), x, rtol=0, atol=0)


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=4),
    st.integers(1, 50),
    st.integers(0, 3),
    st.sampled_from([1, 2**10, 2**28]),
)
def test_an_epoch_holds_every_row_once_but_for_what_fills_no_batch(
    tmp_path_factory, lengths, batch, seed, held
):
    data = Activations(write_shards(tmp_path_factory.mktemp("shards"), lengths))
    n = sum(lengths)
    if n < batch:
        with pytest.raises(ValueError, match=f"has {n} rows, expected a batch of {batch}"):
            next(data.batches(batch, seed))
        return
    before, gated_sae.HELD = gated_sae.HELD, held
    try:
        epochs = list(itertools.islice(data.batches(batch, seed), 2 * (n // batch)))
        for start in (1, n // batch, n // batch + 1):
            if start < len(epochs):
                later = next(data.batches(batch, seed, start))
                assert where(later) == where(epochs[start])
    finally:
        gated_sae.HELD = before
    for epoch in (epochs[: n // batch], epochs[n // batch :]):
        assert {len(x) for x in epoch} == {batch}
        seen = where(torch.cat(epoch))
        assert len(set(seen)) == len(seen) == n // batch * batch
        assert set(seen) <= set(range(n))


def test_rows_are_shuffled_by_the_seed_anew_in_each_epoch(tmp_path):
    data = Activations(write_shards(tmp_path / "shards", [500, 524]))
    first, second = ([where(x) for x in itertools.islice(data.batches(256, s), 8)] for s in (0, 1))
    assert first[:4] != second[:4]
    assert first[:4] != first[4:]
    assert np.abs(np.diff(np.concatenate(first[:4]))).mean() > 200  # neighbours come from far apart


def test_each_epoch_and_each_window_has_an_order_of_its_own(tmp_path, monkeypatch):
    """Windows of one batch, which is one block of 64 rows."""
    np.save(tmp_path / "a.npy", numbered(16 * 64))
    monkeypatch.setattr(gated_sae, "HELD", 1)
    batches = itertools.islice(Activations(tmp_path / "a.npy").batches(64), 48)
    windows = [where(x) for x in batches]
    blocks = [x[0] // 64 for x in windows]
    orders = {tuple(row % 64 for row in x) for x in windows}
    assert all(
        {row // 64 for row in x} == {block} for x, block in zip(windows, blocks, strict=True)
    )
    assert len({tuple(blocks[i : i + 16]) for i in (0, 16, 32)}) == 3
    assert len(orders) == 48


def test_little_more_is_in_memory_than_is_shuffled_at_once(tmp_path, monkeypatch):
    """Windows of 1024 rows out of 65 536."""
    np.save(tmp_path / "a.npy", numbered(2**16, 4))
    monkeypatch.setattr(gated_sae, "HELD", 2**10 * 4 * 4)
    data, most, total = Activations(tmp_path / "a.npy"), 0, 0
    read = data.read

    def watched(file, first, last):
        nonlocal most, total
        most, total = max(most, last - first), total + last - first
        return read(file, first, last)

    data.read = watched
    x = torch.cat(list(itertools.islice(data.batches(256), 4)))
    assert most == 64
    assert total <= 2 * 1024  # one window, and the next
    assert len(set(where(x))) == 1024
    assert max(where(x)) - min(where(x)) > 60_000


# -- What is refused -------------------------------------------------------------------------------


def broken_files(folder):
    """Files that hold no activations, by what the error says of each."""
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


def test_a_file_without_activations_is_named(tmp_path):
    for file in [*broken_files(tmp_path), tmp_path / "missing.npy"]:
        with pytest.raises(ValueError, match=f"{file.name}: .*expected one array"):
            Activations(file)


def test_an_object_array_is_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="a.npy"):
        Activations(tmp_path / "a.npy")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("other", [numbered(4, d=5), numbered(4).astype(np.float64)])
def test_shards_that_differ_are_named(tmp_path, other):
    np.save(tmp_path / "a.npy", numbered(4))
    np.save(tmp_path / "b.npy", other)
    with pytest.raises(ValueError, match=r"a\.npy.*b\.npy.*expected all alike"):
        Activations(tmp_path)


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(ValueError, match="no .npy or .safetensors file"):
        Activations(tmp_path)


def test_bad_rows_are_counted_and_named_by_file_and_row(tmp_path):
    folder = write_shards(tmp_path / "shards", [100, 200])
    x = np.load(folder / "001.npy")
    x[17, 1], x[20] = np.nan, np.inf
    np.save(folder / "001.npy", x)
    for read in (lambda data: list(data.in_order(64)), lambda data: next(data.batches(300))):
        with pytest.raises(
            ValueError, match=r"001.npy.* infinity in 2 of 64 rows, first in row 17$"
        ):
            read(Activations(folder))


# -- The command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "toy.npy"
    toy_data.main([str(file), "--rows", "12345", "--d-in", "8", "--features", "16"])
    return file


def train_args(activations, out, *more):
    files = ["train", str(activations), "--out", str(out), "--device", "cpu"]
    options = ["--d-sae", "16", "--l1", "0.3", "--batch", "64", "--lr", "1e-2"]
    return [*files, *options, "--checkpoint-every", "7", *more]


def test_toy_data_writes_rows_of_its_own(activations):
    x = np.load(activations)
    assert (x.shape, x.dtype) == ((12345, 8), np.float32)
    data = toy_data.SuperpositionData(8, 16, firing=5 / 16, seed=0)
    assert_equal(torch.from_numpy(x[:10_000]), next(data.batches(10_000, 0)), rtol=0, atol=0)


def test_toy_data_wants_a_npy_file(tmp_path):
    with pytest.raises(SystemExit) as stop:
        toy_data.main([str(tmp_path / "a.txt")])
    assert stop.value.code == 2


@pytest.mark.parametrize("variant", sorted(gated_sae.ARCHITECTURES))
def test_what_is_trained_is_what_the_module_trains(activations, tmp_path, variant):
    assert main(train_args(activations, tmp_path / "a", "--variant", variant, "--steps", "9")) == 0
    tied = {"tied": False} if variant == "gated_untied" else {}
    sae = gated_sae.ARCHITECTURES[variant](8, 16, **tied)
    batches = Activations(activations).batches(64)
    with torch.no_grad():
        sae.b_dec.copy_(next(Activations(activations).batches(64)).double().mean(0))
    list(gated_sae.train(sae, batches, l1=0.3, steps=9, lr=1e-2, device="cpu"))
    saved = load(tmp_path / "a")
    assert saved.config == sae.config
    assert_equal(dict(saved.state_dict()), dict(sae.state_dict()), rtol=0, atol=0)


def test_every_row_is_read_once_unless_told_otherwise(activations, tmp_path, capsys):
    assert main(train_args(activations, tmp_path / "a")) == 0
    assert torch.load(tmp_path / "a" / "checkpoint.pt")["done"] == 12345 // 64
    shown = capsys.readouterr().err
    for name in ("loss=", "L0=", "FVU=", "gamma="):
        assert name in shown


def test_bfloat16_keeps_float32_weights(activations, tmp_path):
    assert main(train_args(activations, tmp_path / "a", "--steps", "5")) == 0
    more = "--steps", "5", "--dtype", "bfloat16"
    assert main(train_args(activations, tmp_path / "b", *more)) == 0
    a, b = (load(tmp_path / name) for name in "ab")
    assert b.W_enc.dtype == torch.float32
    assert 0 < (a.W_enc - b.W_enc).abs().max() < 0.1
    assert main(train_args(activations, tmp_path / "c", "--steps", "5", "--dtype", "float64")) == 0
    assert load(tmp_path / "c").W_enc.dtype == torch.float64


def test_eval_prints_what_evaluate_finds(activations, tmp_path, capsys):
    main(train_args(activations, tmp_path / "a", "--steps", "20"))
    capsys.readouterr()
    args = ["eval", str(tmp_path / "a"), str(activations), "--batch", "1000", "--device", "cpu"]
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = gated_sae.evaluate(load(tmp_path / "a"), Activations(activations).in_order(5000))
    assert found.pop("rows") == 12345
    for name, value in found.items():
        assert value == pytest.approx(getattr(expected, name).item(), rel=1e-5), name
    assert main(args) == 0
    table = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(table["fvu"]) == pytest.approx(found["fvu"], rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--d-sae", "0"],
        ["--l1", "-1"],
        ["--l1", "nan"],
        ["--lr", "0"],
        ["--variant", "gate"],
        ["--batch", "1.5"],
        ["--dtype", "int8"],
        ["--no-such-option"],
    ],
)
def test_a_command_that_makes_no_sense_exits_with_2(activations, tmp_path, wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*train_args(activations, tmp_path / "a"), *wrong])
    assert stop.value.code == 2
    assert not (tmp_path / "a").exists()
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 12


def test_failed_work_is_one_line_and_exits_with_1(activations, tmp_path, capsys):
    out = tmp_path / "a"
    broken = tmp_path / "broken"
    broken.mkdir()
    bad = numbered(500, 8)
    bad[3] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    for file in [*broken_files(broken), tmp_path / "missing.npy", tmp_path / "nan.npy"]:
        assert main(train_args(file, out)) == 1
        (line,) = (s for s in capsys.readouterr().err.splitlines() if s.startswith("error: "))
        assert file.name in line
        assert not out.exists()
    assert main(train_args(activations, out, "--batch", "20000")) == 1
    assert "has 12345 rows, expected a batch of 20000" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), str(activations)]) == 1
    assert "holds no cfg.json" in capsys.readouterr().err


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_nothing_is_written_over(activations, tmp_path, capsys):
    """Another run, with or without --resume; a folder of other things; a file."""
    out, other = tmp_path / "a", tmp_path / "b"
    main(train_args(activations, out, "--steps", "9"))
    before = contents(out)
    assert main(train_args(activations, out, "--steps", "9")) == 1
    assert "expected a new folder, or --resume" in capsys.readouterr().err
    assert main(train_args(activations, out, "--steps", "10", "--l1", "2", "--resume")) == 1
    assert "'l1': (0.3, 2.0)" in (shown := capsys.readouterr().err)
    assert "'steps': (9, 10)" in shown
    assert "'lr'" not in shown
    os.remove(out / "checkpoint.pt")
    assert main(train_args(activations, out, "--steps", "9", "--resume")) == 1
    assert contents(out) == {k: v for k, v in before.items() if k != "checkpoint.pt"}
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert main(train_args(activations, other, "--steps", "9")) == 1
    assert main(train_args(activations, other / "thesis.txt", "--steps", "9")) == 1
    assert contents(other) == {"thesis.txt": b"mine"}
    assert main(train_args(activations, other / "thesis.txt" / "c", "--steps", "9")) == 1


def test_a_broken_checkpoint_is_named(activations, tmp_path, capsys):
    out = tmp_path / "a"
    main(train_args(activations, out, "--steps", "9"))
    whole = (out / "checkpoint.pt").read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        (out / "checkpoint.pt").write_bytes(content)
        capsys.readouterr()
        assert main(train_args(activations, out, "--steps", "9", "--resume")) == 1
        assert "checkpoint.pt: " in capsys.readouterr().err


# -- Stopped, and gone on with ---------------------------------------------------------------------


def assert_same_end(a, b):
    """Two runs ended in the same bits, in all that the next step would depend on."""
    name = "sae_weights.safetensors"
    assert (a / name).read_bytes() == (b / name).read_bytes()
    first, second = (torch.load(folder / "checkpoint.pt") for folder in (a, b))
    moments = [state["optimizer"].pop("state") for state in (first, second)]
    for name in ("sae", "silent", "generator"):
        torch.testing.assert_close(first.pop(name), second.pop(name), rtol=0, atol=0)
    torch.testing.assert_close(*moments, rtol=0, atol=0)
    assert first == second


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(activations, tmp_path, number, capsys):
    """Stopped in steps 3, 13, 23 and so on."""
    options = ["--steps", "40", "--resample-every", "6", "--checkpoint-every", "1000"]
    assert main(train_args(activations, tmp_path / "whole", *options)) == 0
    step, out = Trainer.step, tmp_path / "parts"

    def interrupted(self, x, wait=False):
        if self.done % 10 == 2:
            os.kill(os.getpid(), number)
        return step(self, x, wait)

    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        for done in (3, 13, 23, 33):
            assert main(train_args(activations, out, *options, "--resume")) == 1
            assert f"stopped after step {done} of 40" in capsys.readouterr().err
            assert torch.load(out / "checkpoint.pt")["done"] == done
        assert main(train_args(activations, out, *options, "--resume")) == 0
    assert signal.getsignal(number) is before
    assert_same_end(tmp_path / "whole", out)


@pytest.mark.parametrize("shards", ["1", "2"])
def test_under_torchrun_two_processes_go_on_where_one_was_and_end_where_one_would(
    activations, tmp_path, shards, monkeypatch
):
    """In float64, with a number of latents and of rows that two do not divide."""
    more = ["--steps", "20", "--dtype", "float64", "--d-sae", "15", "--batch", "33"]
    more += ["--resample-every", "6", "--log-every", "5"]
    assert main(train_args(activations, tmp_path / "one", *more)) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    torchrun.append(str(ROOT / "gated_sae.py"))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("two", "one, then two"):
        args = train_args(activations, tmp_path / name, *more)
        if name != "two":
            step = Trainer.step

            def stopped(self, x, wait=False, step=step):
                if self.done == 8:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(self, x, wait)

            monkeypatch.setattr(Trainer, "step", stopped)
            assert main(args) == 1
            monkeypatch.undo()
        command = [*torchrun, *args, "--shards", shards, "--resume"]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        one, two = (dict(load(tmp_path / folder).state_dict()) for folder in ("one", name))
        assert_equal(two, one, rtol=1e-9, atol=1e-10)
        log = (tmp_path / name / "log.jsonl").read_text()
        assert log == (tmp_path / "one" / "log.jsonl").read_text()


def test_shards_divide_the_processes(activations, tmp_path, capsys):
    assert main(train_args(activations, tmp_path / "a", "--shards", "2")) == 1
    assert "--shards is 2 for 1 processes" in capsys.readouterr().err


KILL = """
import os, random, signal, sys, time
import numpy, safetensors.torch, tqdm
import gated_sae
kills, chance = 0, random.Random(0)
while True:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(gated_sae.main(sys.argv[1:]))
    if kills < 60:
        time.sleep(chance.uniform(0, 0.25))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        kills += 1
    else:
        sys.exit(print(kills) or os.WEXITSTATUS(status))
"""


def test_a_run_killed_at_any_moment_ends_in_the_same_bits(activations, tmp_path):
    """By SIGKILL, at 20 random moments at least, in the middle of writing too."""
    options = ["--steps", "400", "--resample-every", "50", "--checkpoint-every", "2"]
    assert main(train_args(activations, tmp_path / "whole", *options)) == 0
    args = [sys.executable, "-c", KILL, *train_args(activations, tmp_path / "killed", *options)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*args, "--resume"], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


FULL = """
import resource, signal, sys, gated_sae
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
most, later = map(int, sys.argv[1:3])
step = gated_sae.Trainer.step
def limited(self, x, wait=False):
    if self.done == later:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    return step(self, x, wait)
gated_sae.Trainer.step = limited
sys.exit(gated_sae.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("most", [0, 3000, 12000])
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(activations, tmp_path, most):
    """A limit on the size of files stands in for it. Checkpoints come after steps 7 and 14."""
    out, options = tmp_path / "a", ["--steps", "20"]
    command = [sys.executable, "-c", FULL, str(most), "10", *train_args(activations, out, *options)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert {p.name for p in out.iterdir()} == {
        "cfg.json",
        "checkpoint.pt",
        "log.jsonl",
        "sae_weights.safetensors",
    }
    assert torch.load(out / "checkpoint.pt")["done"] == 7
    assert main(train_args(activations, out, *options, "--resume")) == 0
    assert main(train_args(activations, tmp_path / "whole", *options)) == 0
    assert_same_end(tmp_path / "whole", out)


def test_a_failure_between_the_two_files_is_mended_by_going_on(activations, tmp_path):
    """The last checkpoint is there, and the weights beside it are those of the one before."""
    out, options, calls = tmp_path / "a", ["--steps", "14"], []

    def full(sae, folder):
        calls.append(folder)
        if len(calls) == 3:  # steps 1, 7, 14
            raise OSError("No space left on device")
        save(sae, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_sae, "save", full)
        assert main(train_args(activations, out, *options)) == 1
    assert torch.load(out / "checkpoint.pt")["done"] == 14
    assert main(train_args(activations, out, *options, "--resume")) == 0
    assert main(train_args(activations, tmp_path / "whole", *options)) == 0
    assert_same_end(tmp_path / "whole", out)


def test_metrics_are_kept_in_a_log(activations, tmp_path):
    main(train_args(activations, tmp_path / "a", "--steps", "25", "--log-every", "10"))
    lines = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 10, 20, 25]
    assert set(records[0]) == {"step", "loss", "L0", "FVU", "gamma"}


def test_an_empty_folder_will_do_and_hidden_files_are_no_shards(activations, tmp_path):
    (tmp_path / "a").mkdir()
    assert main(train_args(activations, tmp_path / "a", "--steps", "2")) == 0
    write_shards(tmp_path / "shards", [100, 100])
    (tmp_path / "shards" / "._000.npy").write_bytes(b"resource fork")
    assert len(Activations(tmp_path / "shards")) == 200


def test_eval_of_a_dead_sae_and_of_a_stack(activations, tmp_path, capsys):
    sae = GatedSAE(8, 16)
    with torch.no_grad():
        sae.b_gate.fill_(-1e3)
    save(sae, tmp_path / "dead")
    save(GatedSAE(8, 16, stack=2), tmp_path / "stack")
    args = [str(activations), "--json", "--device", "cpu"]
    assert main(["eval", str(tmp_path / "dead"), *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gamma"], found["l0"], found["dead_fraction"]) == (None, 0, 1)
    assert main(["eval", str(tmp_path / "stack"), *args]) == 1
    assert "holds a stack of shape (2,), expected a single SAE" in capsys.readouterr().err


def test_a_second_signal_is_not_caught(activations, tmp_path, monkeypatch):
    def twice(self, x, wait=False):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", twice)
    with pytest.raises(KeyboardInterrupt):
        main(train_args(activations, tmp_path / "a"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_after_a_bad_batch_a_trainer_goes_on(tmp_path):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    trainer, other = (Trainer(GatedSAE(8, 16), l1=0.3, steps=5, device="cpu") for _ in range(2))
    with pytest.raises(ValueError, match="step 1: NaN or infinity in 32 of 32 rows"):
        trainer.step(x * torch.nan)
    assert trainer.step(x).step == 1
    other.step(x)
    assert_equal(dict(trainer.sae.state_dict()), dict(other.sae.state_dict()), rtol=0, atol=0)
    trainer.broken.fill_(True)
    with pytest.raises(ValueError, match="a loss was not finite since the last record"):
        save_checkpoint(trainer, tmp_path / "a", {})
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written_to_stops_the_run_at_once(activations, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    args = train_args(activations, tmp_path / "file" / "a", "--checkpoint-every", "1000")
    with pytest.MonkeyPatch.context() as patch:
        steps, step = [], Trainer.step
        patch.setattr(Trainer, "step", lambda *args, **kw: steps.append(1) or step(*args, **kw))
        assert main(args) == 1
    assert len(steps) == 1
    assert "file" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_another_run_changes_nothing_and_its_own_restores_all(tmp_path):
    make = lambda: Trainer(GatedSAE(8, 16), l1=0.3, steps=10, device="cpu")  # noqa: E731
    trainer = make()
    with torch.no_grad():
        trainer.sae.b_gate[3] = -1e3
    trainer.resample_every = 5
    trainer.step(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))
    torch.rand(7, generator=trainer.generator)
    trainer.density = 0.25
    save_checkpoint(trainer, tmp_path, {"a": 1})
    fresh = make()
    before = {k: v.clone() for k, v in fresh.sae.state_dict().items()}
    with pytest.raises(ValueError, match=r"differ in \{'a': \(1, 2\), 'b': \(None, 3\)\}"):
        load_checkpoint(fresh, tmp_path, {"a": 2, "b": 3})
    assert_equal(dict(fresh.sae.state_dict()), before, rtol=0, atol=0)
    load_checkpoint(fresh, tmp_path, {"a": 1})
    other = Trainer(GatedSAE(8, 32), l1=0.3, steps=10, device="cpu")
    held, weights = contents(tmp_path), other.sae.W_dec.detach().clone()
    with pytest.raises(ValueError, match="of another SAE"):
        load_checkpoint(other, tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="holds another SAE"):
        save_checkpoint(other, tmp_path, {"a": 1})
    assert contents(tmp_path) == held
    assert torch.equal(other.sae.W_dec, weights)
    assert (fresh.done, fresh.density) == (1, 0.25)
    assert fresh.silent.nonzero().tolist() == [[3]]
    assert torch.equal(fresh.generator.get_state(), trainer.generator.get_state())
    assert_equal(dict(fresh.sae.state_dict()), dict(trainer.sae.state_dict()), rtol=0, atol=0)


def test_it_runs_as_a_script(activations, tmp_path):
    """The file alone, in a folder of its own."""
    (tmp_path / "gated_sae.py").write_text((ROOT / "gated_sae.py").read_text())
    args = [sys.executable, "gated_sae.py", *train_args(activations, "a", "--steps", "3")]
    assert subprocess.run(args, cwd=tmp_path, capture_output=True).returncode == 0
    assert set(load_file(tmp_path / "a" / "sae_weights.safetensors")) == set(
        GatedSAE(1, 1).state_dict()
    )
