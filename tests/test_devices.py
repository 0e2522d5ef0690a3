"""Many devices: gloo processes on the CPU do together what one does with all rows and latents."""

import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from random_saes import VARIANTS, assert_equal, random_batch, random_sae
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.tensor.debug import CommDebugMode

from gated_sae import (
    GatedSAE,
    Trainer,
    evaluate,
    load,
    load_checkpoint,
    save_checkpoint,
    train,
    whole,
)

DATA, MODEL = (2, 1), (1, 2)
SPARSE = dict(sparse=True)
# Of a training, by name: options of the SAE, then of the Trainer. Seven latents are no even number.
TRAININGS = {
    "standard": ("standard", {}, {}),
    "standard, sparse, normalize": ("standard", dict(normalize=True), SPARSE),
    "gated": ("gated", {}, {}),
    "gated, sparse": ("gated", {}, SPARSE),
    "gated, unfrozen, live norms, sparse": ("gated norm", dict(stack=(2,)), SPARSE),
    "gated, stack, normalize": ("gated", dict(stack=(3,), normalize=True), {}),
    "gated, resampled": ("gated", {}, dict(resample_every=5)),
    "gated, resampled, sparse": ("gated", {}, dict(resample_every=5, sparse=True)),
}
ON_FOUR = ["gated, stack, normalize", "gated, resampled, sparse"]
TWO = [(mesh, name) for mesh in (DATA, MODEL) for name in TRAININGS]


def rows_of(x, mesh):
    """This process's: of nine, five or four."""
    return x if mesh is None else x.chunk(mesh.size(0))[mesh.get_local_rank("data")]


def start(mesh, variant, options, training, steps=20):
    sae = random_sae(variant, (5, 7), 0, **options)
    if "resample_every" in training:
        sae.b_gate.data[..., [0, 4]] = -100.0  # never fire
    training = training | dict(l1=0.3, steps=steps, lr=1e-2, device="cpu", mesh=mesh)
    return Trainer(sae, **training)


def steps_of(trainer, last):
    for step in range(trainer.done, last):
        yield step, trainer.step(rows_of(random_batch(9, 5, seed=step), trainer.mesh))


def all_of(trainer):
    """Whole, on every process."""
    found = dict(silent=trainer.silent)
    for name, p in trainer.sae.named_parameters():
        found[name] = whole(p.detach()).clone()
        for key, value in trainer.optimizer.state[p].items():
            found[f"{key} of {name}"] = whole(value)
    return found


def run(mesh, *args):
    """The losses of each step, the gradients of the first, all that there is in the end."""
    trainer, found = start(mesh, *args), {}
    for step, record in steps_of(trainer, 20):
        found[f"losses {step}"] = torch.stack(record.losses)
        for name, p in trainer.sae.named_parameters() if step == 0 else ():
            found[f"gradient of {name}"] = whole(p.grad).clone()
    batches = [random_batch(n, 5, seed=n) + 3 for n in (4, 9, 6)]
    if mesh is not None and mesh.size(0) == 2:  # not as many for each
        batches = batches[:2] if mesh.get_local_rank("data") == 0 else batches[2:]
    metrics = evaluate(trainer.sae, batches, args[-1].get("sparse"), mesh)
    found |= {name: torch.as_tensor(value) for name, value in vars(metrics).items()}
    return found | all_of(trainer)


def one_step(mesh, variant):
    """Losses and gradients; `normalize` makes each variant see all rows at once."""
    trainer = start(mesh, variant, dict(normalize=True), {})
    ((_, record),) = steps_of(trainer, 1)
    found = {f"gradient of {name}": whole(p.grad) for name, p in trainer.sae.named_parameters()}
    return found | dict(losses=torch.stack(record.losses))


def reported(mesh):
    """What `train` yields."""
    sae = random_sae("gated", (5, 7), 0)
    batches = (rows_of(random_batch(9, 5, seed=step), mesh) for step in range(6))
    options = dict(l1=0.3, steps=6, lr=1e-2, log_every=3, device="cpu", mesh=mesh)
    records = list(train(sae, batches, **options))
    return {
        f"{name}, step {record.step}": torch.as_tensor(value)
        for record in records
        for name, value in (record.losses._asdict() | vars(record.metrics)).items()
    }


def stopped(mesh):
    """The message, and whether the SAE has changed, when the last process has a NaN at step 3."""
    trainer = start(mesh, *TRAININGS["gated"])
    list(steps_of(trainer, 2))
    before = all_of(trainer)
    x = rows_of(random_batch(9, 5, seed=2), mesh)
    if dist.get_rank() == 1 or mesh.size(1) == 2:
        x[3, 1] = torch.nan
    try:
        trainer.step(x)
        message = "none"
    except ValueError as error:
        message = str(error)
    after = all_of(trainer)
    return message, all(torch.equal(after[name], v) for name, v in before.items())


def go_on(mesh, folder):
    """From a checkpoint after step 10 to 20."""
    trainer = start(mesh, *TRAININGS["gated"])
    load_checkpoint(trainer, folder, {})
    assert trainer.done == 10
    list(steps_of(trainer, 20))
    return all_of(trainer), trainer.density


def too_wide(mesh):
    """An SAE that starts on the meta device; what crosses in a step; what each process holds."""
    trainer = Trainer(GatedSAE(5, 8, device="meta"), l1=0.1, steps=2, mesh=mesh, device="cpu")
    begun = all_of(trainer)
    with warnings.catch_warnings(), CommDebugMode() as crossing:
        warnings.simplefilter("ignore", UserWarning)  # of hooks that CommDebugMode puts there
        trainer.step(random_batch(9, 5, seed=0).float())
    kinds = {str(kind) for kind, n in crossing.get_comm_counts().items() if n}
    parameters = dict(trainer.sae.named_parameters())
    for p in parameters.values():  # fused Adam looks at memory, not at strides
        assert p.grad.placements == p.placements
        assert p.grad.to_local().stride() == p.to_local().stride()
    return begun, kinds, {name: tuple(p.to_local().shape) for name, p in parameters.items()}


def refused(mesh):
    messages = []
    other = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    for wrong, d_sae in ((mesh, 1), (other, 7)):
        try:
            Trainer(GatedSAE(5, d_sae), l1=0.1, steps=1, mesh=wrong)
        except ValueError as error:
            messages.append(str(error))
    return messages


def process(rank, size, folder):
    torch.set_num_threads(1)
    method, patience = f"file://{folder}/meeting", timedelta(seconds=100)
    dist.init_process_group(
        "gloo", init_method=method, rank=rank, world_size=size, timeout=patience
    )
    found = {}
    for shape in (DATA, MODEL) if size == 2 else ():
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
        for name, training in TRAININGS.items():
            found[shape, name] = run(mesh, *training)
        trainer = start(mesh, *TRAININGS["gated"])
        list(steps_of(trainer, 10))
        save_checkpoint(trainer, Path(folder) / f"of {shape}", {})
        found[shape, "go on"] = go_on(mesh, Path(folder) / "of one")
        for variant in VARIANTS:
            found[shape, "one step", variant] = one_step(mesh, variant)
        found[shape, "reported"] = reported(mesh)
        found[shape, "stopped"] = stopped(mesh)
    if size == 2:
        found["too wide"], found["refused"] = too_wide(mesh), refused(mesh)
    else:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        found = {name: run(mesh, *TRAININGS[name]) for name in ON_FOUR}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def results_of(size, folder):
    trainer = start(None, *TRAININGS["gated"])
    list(steps_of(trainer, 10))
    save_checkpoint(trainer, folder / "of one", {})
    multiprocessing.spawn(process, (size, str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    return results_of(2, folder)


def assert_alike(results, key, one):
    for found in results:
        assert_equal(found[key], one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mesh", "name"), TWO)
def test_two_processes_train_as_one(two, mesh, name):
    """Losses, gradients, weights, Adam's moments, density and metrics of a whole training."""
    one = run(None, *TRAININGS[name])
    assert_alike(two, (mesh, name), one)
    if "resampled" in name:
        assert (one["b_gate"][[0, 4]] > -1).all()
    if "norms" not in name:
        assert_equal(
            two[0][mesh, name]["W_dec"].norm(dim=-1),
            torch.ones(()).double().expand(one["W_dec"].shape[:-1]),
        )


@pytest.mark.parametrize("mesh", [DATA, MODEL])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_losses_and_gradients_of_one_process(two, mesh, variant):
    assert_alike(two, (mesh, "one step", variant), one_step(None, variant))


@pytest.mark.parametrize("mesh", [DATA, MODEL])
def test_train_reports_what_one_process_does(two, mesh):
    assert_alike(two, (mesh, "reported"), reported(None))


@pytest.mark.parametrize("mesh", [DATA, MODEL])
def test_a_bad_row_on_one_process_stops_all_before_the_step(two, mesh):
    """All with one message, which names the process and its row."""
    where = (
        "data process 1: NaN or infinity in 1 of 4"
        if mesh == DATA
        else "data process 0: NaN or infinity in 1 of 9"
    )
    message = f"step 3: {where} rows, first in row 3"
    for found in two:
        said, unchanged = found[mesh, "stopped"]
        assert said == message + "; the SAE is as it was before this step"
        assert unchanged


@pytest.mark.parametrize("mesh", [DATA, MODEL])
def test_a_state_of_two_processes_goes_on_in_one_and_the_reverse(two, folder, mesh):
    trainer = start(None, *TRAININGS["gated"])
    list(steps_of(trainer, 20))
    one = all_of(trainer)
    for found, _ in [found[mesh, "go on"] for found in two] + [go_on(None, folder / f"of {mesh}")]:
        assert_equal(found, one, rtol=1e-9, atol=1e-9)
    trainer = start(None, *TRAININGS["gated"])
    list(steps_of(trainer, 10))
    own = dict(trainer.sae.state_dict())
    assert_equal(dict(load(folder / f"of {mesh}").state_dict()), own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mesh", [DATA, MODEL])
def test_processes_agree_on_how_many_latents_fire(two, mesh):
    """By it they choose their path, each from rows of its own."""
    densities = {found[mesh, "go on"][1] for found in two}
    assert len(densities) == 1
    assert 0 < densities.pop() < 1


def test_an_sae_too_wide_for_one_device_starts_in_shares(two):
    for found in two:
        begun, kinds, _ = found["too wide"]
        assert kinds == {"c10d_functional.all_reduce", "c10d.allreduce_"}
        assert_equal(begun, two[0]["too wide"][0])
        W_dec = begun["W_dec"]
        assert_equal(W_dec.norm(dim=-1), torch.ones(8))
        assert_equal(begun["W_enc"], W_dec.mT)
        assert (W_dec @ W_dec.mT - torch.eye(8)).max() < 0.99  # no two alike
    assert [found["too wide"][2]["W_dec"] for found in two] == [(4, 5)] * 2
    assert [found["too wide"][2]["W_enc"] for found in two] == [(5, 4)] * 2


def test_what_no_mesh_can_do_is_refused(two):
    for found in two:
        narrow, names = found["refused"]
        assert narrow == "d_sae is 1, expected a share for each of 2 processes"
        assert names == "mesh has dimensions ('dp', 'tp'), expected ('data', 'model')"
    with pytest.raises(ValueError, match="on the meta device, expected a mesh"):
        Trainer(GatedSAE(5, 7, device="meta"), l1=0.1, steps=1)


def test_four_processes_share_rows_and_latents(tmp_path):
    four = results_of(4, tmp_path)
    for name in ON_FOUR:
        assert_alike(four, name, run(None, *TRAININGS[name]))
