"""A checkpoint is whole or it is not there; what fits is loaded and what does not changes nothing."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from forks import Outcomes
from training_worker import SmallModel, job, small_losses, small_model

from vrthinker.errors import InputError, VRThinkerError
from vrthinker.train.loop.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    latest_checkpoint,
    load_checkpoint,
    open_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from vrthinker.train.loop.optimizer import AdamWSettings, MuonSettings, make_optimizer

SEED = 20261121


OPTIMIZERS = {"adamw": AdamWSettings(), "muon": MuonSettings()}


def trained(steps: int = 3, kind: Literal["adamw", "muon"] = "adamw") -> tuple[SmallModel, torch.optim.AdamW]:
    """A model a few steps on; `seldom` has had no gradient."""
    model = small_model().train()
    optimizer = make_optimizer(model, OPTIMIZERS[kind])
    torch.manual_seed(SEED)
    for step in range(steps):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        for micro in small_losses(model)(step):
            micro.loss.backward()
        optimizer.step()
    return model, optimizer


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter, moments in optimizer.state.items():
        for moment, value in moments.items():
            found[f"{moment}/{names[id(parameter)]}"] = value.clone()
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


def save(run: Path, step: int, *, keep: int = 2, **state: Any) -> Path:
    model, optimizer = trained(1)
    return save_checkpoint(run, step=step, model=model, optimizer=optimizer, state=state, keep=keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_all_of_it_comes_back(run: Path, kind: Literal["adamw", "muon"]) -> None:
    model, optimizer = trained(kind=kind)
    wanted = state_of(model, optimizer)
    assert "exp_avg/embed.weight" in wanted
    assert "exp_avg/seldom.weight" not in wanted
    path = save_checkpoint(run, step=12, model=model, optimizer=optimizer, state={"seen": [1, 2]})
    assert path == run / "checkpoints" / "step-00000012"
    found = latest_checkpoint(run)
    assert found is not None
    assert (found.path, found.step, found.state) == (path, 12, {"seen": [1, 2]})
    other = small_model()
    fresh = make_optimizer(other, OPTIMIZERS[kind])
    load_checkpoint(found, other, fresh)
    assert_same(state_of(other, fresh), wanted)
    assert ("exp_avg_sq/layer.linear1.weight" in wanted) == (kind == "adamw")
    assert other.head.weight is other.embed.weight


def test_only_what_is_trained_is_saved_and_tied_weights_once(run: Path) -> None:
    model, optimizer = trained()
    path = save_checkpoint(run, step=1, model=model, optimizer=optimizer, state={})
    header = (path / MODEL_FILE).read_bytes()
    saved = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert "embed.weight" in saved
    assert "count" in saved
    assert not {"head.weight", "frozen.weight"} & saved.keys()
    assert (path / MODEL_FILE).stat().st_mode == (path / STATE_FILE).stat().st_mode


def test_weights_in_one_storage_and_in_odd_orders_come_back(run: Path) -> None:
    def make() -> torch.nn.Module:
        both = torch.arange(24.0).reshape(2, 3, 4)
        model = torch.nn.Module()
        model.first, model.second = torch.nn.Parameter(both[0]), torch.nn.Parameter(both[1])
        model.turned = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
        return model

    model = make()
    save_checkpoint(run, step=1, model=model, optimizer=make_optimizer(model, AdamWSettings()), state={})
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    found = latest_checkpoint(run)
    assert found is not None
    load_checkpoint(found, other, make_optimizer(other, AdamWSettings()))
    assert_same(other.state_dict(), model.state_dict())
    assert other.turned.stride() == model.turned.stride() == (1, 3)


@pytest.mark.parametrize("how", ["adamw", "adamw-fused", "muon"])
def test_training_goes_on_in_the_same_bits(run: Path, how: str) -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.AdamW, number: int) -> None:
        optimizer.zero_grad()
        torch.manual_seed(number)
        micro = next(iter(small_losses(model)(number)))
        micro.loss.backward()
        optimizer.step()

    def make() -> tuple[torch.nn.Module, torch.optim.AdamW]:
        model = small_model().train()
        if how == "muon":
            muon = make_optimizer(model, MuonSettings())
            for group in muon.param_groups:
                group["lr"] = 0.01
            return model, muon
        trainable = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trainable, 0.01, fused=how == "adamw-fused")

    model, optimizer = make()
    for number in range(4):
        step(model, optimizer, number)
    save_checkpoint(run, step=4, model=model, optimizer=optimizer, state={})
    other, fresh = make()
    found = latest_checkpoint(run)
    assert found is not None
    load_checkpoint(found, other, fresh)
    for number in range(4, 9):
        step(model, optimizer, number)
        step(other, fresh, number)
    assert_same(state_of(other, fresh), state_of(model, optimizer))


def test_older_ones_go(run: Path) -> None:
    for step in (1, 2, 3, 4):
        save(run, step, keep=2)
    assert names(run) == ["step-00000003", "step-00000004"]
    save(run, 5, keep=1)
    assert names(run) == ["step-00000005"]


def test_a_damaged_one_does_not_count_as_kept(run: Path) -> None:
    for step in (1, 2):
        save(run, step)
    (run / "checkpoints" / "step-00000002" / MODEL_FILE).unlink()
    save(run, 3)
    assert names(run) == ["step-00000001", "step-00000002", "step-00000003"]
    save(run, 4)
    assert names(run) == ["step-00000003", "step-00000004"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(key: str, value: object) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return act


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (MODEL_FILE, Path.unlink, "model.safetensors cannot be read"),
        (MODEL_FILE, cut, r"model.safetensors has \d+ bytes, wanted: \d+"),
        (MODEL_FILE, flip, "model.safetensors is damaged"),
        (OPTIMIZER_FILE, flip, "optimizer.safetensors is damaged"),
        (STATE_FILE, Path.unlink, "unfinished, it has no state.json"),
        (STATE_FILE, lambda path: path.write_text("{"), "state.json is damaged"),
        (STATE_FILE, lambda path: path.write_bytes(b"\xff" * 9), "state.json is damaged"),
        (
            STATE_FILE,
            lambda path: path.write_text("[" * 100_000),
            "is damaged .*more than 64 levels",
        ),
        (STATE_FILE, lambda path: path.write_text('{"step": ' + "9" * 5000 + "}"), "a number of 5000 char"),
        (STATE_FILE, edit("step", 2**80), "state.json is damaged .*beyond 64 bits"),
        (STATE_FILE, edit("step", -1), "state.json is damaged .step"),
        (STATE_FILE, edit("state", {"loss": float("nan")}), "state.json is damaged .*NaN is no JSON"),
        (STATE_FILE, edit("schema_version", 2), "state.json is damaged .schema_version"),
        (STATE_FILE, edit("step", 3), "state.json is that of step 3"),
        (STATE_FILE, edit("step", None), "state.json is damaged .step"),
        (STATE_FILE, edit("files", {}), "state.json is that of step 2 with"),
    ],
)
def test_damaged_ones_are_passed_over_and_named(
    run: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], None], said: str
) -> None:
    save(run, 1, n=1)
    damage(save(run, 2, n=2) / file)
    with pytest.raises(InputError, match=said):
        open_checkpoint(run / "checkpoints" / "step-00000002")
    with caplog.at_level(logging.WARNING):
        found = latest_checkpoint(run)
    assert found is not None
    assert (found.step, found.state) == (1, {"n": 1})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step-00000002" in caplog.text
    assert save(run, 2, n=3)
    found = latest_checkpoint(run)
    assert found is not None
    assert found.state == {"n": 3}


def test_a_run_without_checkpoints_has_no_latest(run: Path) -> None:
    assert latest_checkpoint(run) is None
    (run / "checkpoints" / "notes").mkdir(parents=True)
    assert latest_checkpoint(run) is None


def test_a_whole_one_is_not_written_over(run: Path) -> None:
    save(run, 1, n=1)
    with pytest.raises(VRThinkerError, match="is there already and whole"):
        save(run, 1, n=2)
    assert open_checkpoint(run / "checkpoints" / "step-00000001").state == {"n": 1}


def test_leftovers_of_killed_writers_go(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(run, 1)
    shutil.copytree(path, path.with_name(".writing-step-00000002"))
    shutil.copytree(path, path.with_name(".removing-step-00000000"))
    remove_leftovers(run)
    assert names(run) == ["step-00000001"]
    assert ".writing-step-00000002: unfinished" in caplog.text
    remove_leftovers(run / "none")


class Wider(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.seldom = torch.nn.Linear(16, 17)


class Renamed(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.often = self.seldom
        del self.seldom


class Thawed(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.frozen.requires_grad_(True)


class Finer(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.seldom.double()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Wider, r"got seldom.bias as float32 \[16\], wanted: float32 \[17\]"),
        (Renamed, "lacks often.weight and 1 more, and has seldom.bias and 1 more that is not trained here"),
        (Thawed, "lacks frozen.weight and 1 more, and has nothing"),
        (Finer, r"got seldom.bias as float32 \[16\], wanted: float64 \[16\]"),
    ],
)
def test_what_does_not_fit_changes_nothing(run: Path, model: type[SmallModel], said: str) -> None:
    checkpoint = open_checkpoint(save(run, 1))
    other = model()
    fresh = make_optimizer(other, AdamWSettings())
    before = state_of(other, fresh)
    with pytest.raises(InputError, match=said):
        load_checkpoint(checkpoint, other, fresh)
    assert_same(state_of(other, fresh), before)


def test_an_optimizer_file_that_does_not_fit_changes_nothing(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = open_checkpoint(save(run, 1))
    other = small_model()
    fresh = make_optimizer(other, AdamWSettings())
    before = state_of(other, fresh)
    path = checkpoint.path / OPTIMIZER_FILE
    whole = load_file(path)
    for bad, said in [
        ({n: t for n, t in whole.items() if n != "step/embed.weight"}, "lacks step/embed.weight"),
        ({**whole, "exp_avg/embed.weight": torch.zeros(3)}, r"got exp_avg/embed.weight as float32 \[3\]"),
        ({**whole, "exp_avg/strange": torch.zeros(3)}, "has exp_avg/strange that is not trained"),
    ]:
        save_file(bad, path)
        with pytest.raises(InputError, match=said):
            load_checkpoint(checkpoint, other, fresh)
        assert_same(state_of(other, fresh), before)


def test_a_run_goes_on_with_its_own_kind_of_optimizer(run: Path) -> None:
    model, optimizer = trained(1)
    checkpoint = open_checkpoint(save_checkpoint(run, step=1, model=model, optimizer=optimizer, state={}))
    other = small_model()
    muon = make_optimizer(other, MuonSettings())
    before = state_of(other, muon)
    with pytest.raises(InputError, match="does not fit this model: lacks nothing, and has exp_avg_sq/layer"):
        load_checkpoint(checkpoint, other, muon)
    assert_same(state_of(other, muon), before)


def test_another_optimizer_is_refused(run: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    next(small_losses(model)(0)).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"got the state \['momentum_buffer'\]"):
        save_checkpoint(run, step=1, model=model, optimizer=optimizer, state={})
    assert latest_checkpoint(run) is None


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [({"keep": 0}, ValueError), ({"a": float("nan")}, ValueError), ({"a": {1}}, TypeError)],
)
def test_wrong_arguments_write_nothing(run: Path, arguments: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        save(run, 1, **arguments)
    assert not run.exists()


# Processes that are killed


def assert_loadable(run: Path) -> int:
    """The step of the latest checkpoint, which must load."""
    model = small_model()
    optimizer = make_optimizer(model, AdamWSettings())
    found = latest_checkpoint(run)
    assert found is not None
    load_checkpoint(found, model, optimizer)
    assert found.state == {"n": found.step}
    return found.step


@pytest.mark.multi_process
def test_killed_before_any_change_of_the_disk_a_whole_one_stays(
    run: Path, outcomes_of: Outcomes, caplog: pytest.LogCaptureFixture
) -> None:
    (whole,) = outcomes_of([job("die_in_save", run, call=0)])
    calls = whole["result"]["calls"]
    assert calls > 12
    assert assert_loadable(run) == 3
    jobs = [job("die_in_save", run / str(call), call=call) for call in range(1, calls + 1)]
    steps = []
    for given, outcome in zip(jobs, outcomes_of(jobs), strict=True):
        assert outcome["code"] == -9
        folder = Path(given["arguments"]["run"])
        steps.append(assert_loadable(folder))
        assert "passed over" not in caplog.text
        for path in (folder / "checkpoints").glob("step-*"):
            open_checkpoint(path)
        remove_leftovers(folder)
        assert all(name.startswith("step-") for name in names(folder))
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}


@pytest.mark.multi_process
def test_killed_at_any_time_a_whole_one_stays(
    run: Path, outcomes_of: Outcomes, caplog: pytest.LogCaptureFixture
) -> None:
    """At changes of the file system, and in the middle of writing a file."""
    chance = random.Random(SEED)
    whole = (save(run.with_name("size"), 1) / MODEL_FILE).stat().st_size
    jobs: list[dict[str, Any]] = []
    for _ in range(24):
        at = {"calls": 0, "size": 0}
        if jobs and chance.random() < 0.3:
            at["size"] = chance.randrange(1, whole)
        else:
            at["calls"] = chance.randrange(1, 70) if jobs else 30
        jobs += [
            job("save_until_killed", run, **at),
            job("look", run),
        ]
    outcomes = outcomes_of(jobs)
    assert {outcome["code"] for outcome in outcomes[::2]} == {-9, -25}
    looks = [outcome["result"] for outcome in outcomes[1::2]]
    steps = [look["step"] for look in looks]
    assert steps == sorted(steps)
    assert len(set(steps)) > 10
    assert all(look["state"] == {"n": look["step"]} for look in looks)
    assert all(look["weight"] == look["step"] for look in looks)
    assert assert_loadable(run) >= steps[-1]
    assert "passed over" not in caplog.text


@pytest.mark.multi_process
def test_a_disk_without_room_leaves_the_checkpoints(run: Path, outcomes_of: Outcomes) -> None:
    sizes = {path.name: path.stat().st_size for path in save(run / "size", 1).iterdir()}
    jobs = [
        job("train", run, steps=5),
        job("full_disk", run, limit=sizes[MODEL_FILE] - 100),
    ]
    first, second = outcomes_of(jobs)
    assert first["result"]["step"] == 5
    assert second["exit_code"] == 1
    assert "step-00000010: cannot be written" in second["error"]
    assert "earlier checkpoints stay" in second["error"]
    assert names(run) == ["step-00000005"]
    assert open_checkpoint(run / "checkpoints" / "step-00000005").step == 5
