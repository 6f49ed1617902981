"""The training loop: exact resume, several processes, interruption, precision, trackers; on a small regression and on the tiny base."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import Forks
from safetensors.torch import load_file
from torch import nn

from gladad.core.errors import ConfigError, Interrupted, MissingExtraError, TrainingError
from gladad.core.threads import CancelToken
from gladad.training import loop as training_loop
from gladad.training.checkpoints import Checkpoints
from gladad.training.loop import LoopConfig, TrainingRun, divided, draw_generator, seed_of, train
from gladad.training.optimizers import Muon, OptimizerName, make_optimizer, orthogonalized
from gladad.training.trackers import tracker_name

HERE = Path(__file__).parent
SOURCE = str(Path(training_loop.__file__).parents[2])


class Regression:
    """Fits a line with dropout, whose draws come from the global generator, to noisy points."""

    def __init__(self, scale: float = 1.0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))
        self.identity = {"scale": scale}
        self.scale = scale
        self.seen: list[tuple[int, int]] = []

    def loss(self, module: nn.Module, step: int, samples: Sequence[int]) -> torch.Tensor:
        self.seen += [(step, sample) for sample in samples]
        x = torch.stack([torch.randn(4, generator=draw_generator(7, step, sample)) for sample in samples])
        return (module(x)[:, 0] - x.sum(dim=1) * self.scale).square().mean()

    def examples(self) -> dict[str, np.ndarray]:
        return {"weights": np.zeros((8, 8, 3), np.uint8)}

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.module.parameters()]


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Python's Ctrl-C, whatever the shell that started the tests has set (it is ignored in the background of a script)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


CONFIG = LoopConfig(steps=20, batch_size=4, learning_rate=1e-2, warmup=3, ema=0.9)


def stop_at(step: int) -> training_loop.Progress:
    """A progress that is interrupted as if by Ctrl-C."""

    def progress(stage: str, done: int, total: int) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    return progress


def same(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(optimizer: OptimizerName) -> None:
    losses = train(Regression(), replace(CONFIG, steps=200, ema=0.0, optimizer=optimizer), stage="line")
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("every", [3, 1000])
def test_a_stopped_training_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path, every: int, optimizer: OptimizerName) -> None:
    config, whole = replace(CONFIG, optimizer=optimizer), Regression()
    losses = train(whole, config, stage="line")
    run = TrainingRun(folder=tmp_path / "run", checkpoint_every=every, tracker="none")
    for step in (4, 11):
        with pytest.raises(Interrupted, match=rf"stopped after step {step} of 20; saved in .*run") as stop:
            train(Regression(), config, run, stage="line", progress=stop_at(step))
        assert stop.value.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    told: list[str] = []
    last = Regression()
    assert train(last, config, replace(run, tell=told.append), stage="line") == losses
    assert told == ["going on after step 11 of 20"]
    assert {step for step, _ in last.seen} == set(range(11, 20))
    assert same(last.weights(), whole.weights())
    again = Regression()  # finished already: nothing is trained, and the weights are there
    assert train(again, config, run, stage="line") == losses and not again.seen
    assert same(again.weights(), whole.weights())


def test_more_steps_continue_a_finished_training(tmp_path: Path) -> None:
    whole = Regression()
    losses = train(whole, CONFIG, stage="line")
    run = TrainingRun(folder=tmp_path, tracker="none")
    train(Regression(), replace(CONFIG, steps=12), run, stage="line")
    longer = Regression()
    assert train(longer, CONFIG, run, stage="line") == losses
    assert same(longer.weights(), whole.weights())
    with pytest.raises(ConfigError, match="20 steps already, more than the 5 asked for"):
        train(Regression(), replace(CONFIG, steps=5), run, stage="line")


def test_a_training_ends_when_its_time_is_over_earlier_runs_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=6)  # a step takes six seconds
    monkeypatch.setattr(training_loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run, minute = TrainingRun(folder=tmp_path, tracker="none"), replace(CONFIG, minutes=1)
    with pytest.raises(Interrupted, match="stopped after step 4"):
        train(Regression(), minute, run, progress=stop_at(4), stage="line")
    stopped, told = Regression(), []
    assert len(train(stopped, minute, run, progress=lambda *step: told.append(step), stage="line")) == 10
    assert told[-2:] == [("line", 9, 20), ("line", 10, 10)]
    assert same(stopped.weights(), _trained(replace(CONFIG, steps=10)).weights())
    again = Regression()
    assert len(train(again, minute, run, stage="line")) == 10 and not again.seen and same(again.weights(), stopped.weights())
    longer = Regression()
    assert len(train(longer, replace(CONFIG, minutes=100), run, stage="line")) == 20
    assert same(longer.weights(), _trained(CONFIG).weights())


def _trained(config: LoopConfig) -> Regression:
    task = Regression()
    train(task, config, stage="line")
    return task


def test_another_training_does_not_go_on(tmp_path: Path) -> None:
    run = TrainingRun(folder=tmp_path, tracker="none")
    train(Regression(), CONFIG, run, stage="line")
    for task, config, stage, word in (
        (Regression(), replace(CONFIG, learning_rate=1.0), "line", "learning_rate"),
        (Regression(2.0), CONFIG, "line", "scale"),
        (Regression(), CONFIG, "curve", "stage"),
    ):
        with pytest.raises(ConfigError, match=f"another training \\({word} differ"):
            train(task, config, run, stage=stage)


def test_a_signal_at_the_last_step_stops_too(tmp_path: Path) -> None:
    run = TrainingRun(folder=tmp_path, tracker="none")
    with pytest.raises(Interrupted, match="step 20 of 20"):
        train(Regression(), CONFIG, run, stage="line", progress=stop_at(20))
    assert len(train(Regression(), CONFIG, run, stage="line")) == 20


def test_a_picture_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(task: Regression) -> dict[str, np.ndarray]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Regression, "examples", fail)
    told: list[str] = []
    run = TrainingRun(folder=tmp_path, tracker="none", sample_every=20, tell=told.append)
    assert len(train(Regression(), CONFIG, run, stage="line")) == 20
    assert told == ["step 20 is not shown: RuntimeError: out of memory"]
    assert (tmp_path / "step-0000020").is_dir()


def test_a_gradient_that_is_not_finite_reaches_no_weight() -> None:
    task = Regression()
    task.loss = lambda module, step, samples: (module(torch.zeros(1, 4)) * 0).sqrt().sum()  # type: ignore[method-assign]
    before = task.weights()
    with pytest.raises(TrainingError, match="the gradient is not finite at step 1"):
        train(task, CONFIG, stage="line")
    assert same(task.weights(), before)


def cancelling(token: CancelToken, step: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if done == step:
            token.cancel()

    return progress


def test_a_token_stops_a_training_on_another_thread_and_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, last = Regression(), Regression()
    losses = train(whole, CONFIG, stage="line")
    token = CancelToken()
    run = TrainingRun(folder=tmp_path, checkpoint_every=1000, tracker="none")
    with ThreadPoolExecutor(1) as executor:
        stopped = executor.submit(
            train, Regression(), CONFIG, replace(run, cancel=token), stage="line", progress=cancelling(token, 7)
        ).exception()
    assert isinstance(stopped, Interrupted) and stopped.signal == 0
    assert str(stopped) == f"stopped after step 7 of 20; saved in {tmp_path}, the same command goes on"
    assert train(last, CONFIG, run, stage="line") == losses and {step for step, _ in last.seen} == set(range(7, 20))
    assert same(last.weights(), whole.weights())


def test_a_token_stops_a_training_without_a_folder() -> None:
    token = CancelToken()
    with pytest.raises(Interrupted, match="stopped after step 2 of 20; nothing is saved"):
        train(Regression(), CONFIG, TrainingRun(cancel=token), stage="line", progress=cancelling(token, 2))


def test_an_ignored_interrupt_stays_ignored_and_a_termination_stops(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = TrainingRun(folder=tmp_path, tracker="none")

    def progress(stage: str, done: int, total: int) -> None:
        if done in (3, 6):
            signal.raise_signal(signal.SIGINT if done == 3 else signal.SIGTERM)

    with pytest.raises(Interrupted, match="step 6 of 20") as stop:
        train(Regression(), CONFIG, run, stage="line", progress=progress)
    assert stop.value.signal == signal.SIGTERM and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_without_a_folder_an_interrupt_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        train(Regression(), CONFIG, stage="line", progress=stop_at(4))


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    def twice(stage: str, done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(Regression(), CONFIG, TrainingRun(folder=tmp_path, tracker="none"), stage="line", progress=twice)


def test_accumulation_is_the_whole_batch() -> None:
    def no_dropout() -> Regression:
        task = Regression()
        task.module[1].p = 0.0
        return task

    config = replace(CONFIG, batch_size=7, ema=0.0)
    whole, pieces = no_dropout(), no_dropout()
    one = train(whole, config, stage="line")
    two = train(pieces, replace(config, micro_batch=3), stage="line")
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert whole.seen == pieces.seen == [(step, sample) for step in range(20) for sample in range(7)]


def test_averaged_weights_are_kept() -> None:
    task = Regression()
    averages = [w.clone() for w in task.weights()]

    def follow(stage: str, done: int, total: int) -> None:
        for average, weight in zip(averages, task.weights(), strict=True):
            average.lerp_(weight, 0.1)

    train(task, CONFIG, stage="line", progress=follow)
    for average, weight in zip(averages, task.weights(), strict=True):
        torch.testing.assert_close(average, weight)


def test_the_rate_rises_in_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1])
    train(Regression(), replace(CONFIG, steps=5), stage="line")
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_what_cannot_be_trained() -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1; lower the learning rate"):
        train(Regression(float("nan")), CONFIG, stage="line")
    half = Regression()
    half.module.bfloat16()
    with pytest.raises(ConfigError, match="in float32"):
        train(half, CONFIG, stage="line")
    with pytest.raises(ConfigError, match="float16 trains on a GPU only"):
        train(Regression(), replace(CONFIG, precision="float16"), stage="line")
    frozen = Regression()
    frozen.module.requires_grad_(False)
    with pytest.raises(ConfigError, match="weights to train"):
        train(frozen, CONFIG, stage="line")


@pytest.mark.parametrize(
    ("settings", "bad"),
    [
        *((CONFIG, bad) for bad in ({"steps": -1}, {"batch_size": 0}, {"micro_batch": 0}, {"ema": 1.0}, {"learning_rate": 0.0})),
        *((CONFIG, bad) for bad in ({"warmup": -1}, {"weight_decay": -1.0}, {"gradient_clip": 0.0}, {"seed": -1})),
        *((TrainingRun(), bad) for bad in ({"checkpoint_every": 0}, {"keep": 0}, {"sample_every": 0}, {"cancel": "now"})),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_settings(settings: LoopConfig | TrainingRun, bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(bad))}: "):
        replace(settings, **bad)


def test_seeds_are_of_their_numbers_alone() -> None:
    assert len({seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(4)}) == 64
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3) < 2**63


def test_divided_alone_does_everything_in_order() -> None:
    told: list[tuple[int, int]] = []
    assert divided(lambda n: n * n, 4, lambda *call: told.append(call)) == [0, 1, 4, 9]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_global_generator_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(Regression(), replace(CONFIG, steps=2), stage="line")
    assert torch.equal(torch.rand(2), expected)


# ------------------------------------------------------------------------------------------------------------ trackers


def test_numbers_and_pictures_go_to_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = TrainingRun(folder=tmp_path, sample_every=10, checkpoint_every=4)
    with pytest.raises(Interrupted):
        train(Regression(), CONFIG, run, stage="line", progress=stop_at(12))
    losses = train(Regression(), CONFIG, run, stage="line")
    events = accumulator.EventAccumulator(str(tmp_path / "logs" / "line"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert set(scalars) == {"loss", "learning_rate", "images_per_second", "memory_gib"}
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert [logged[step] for step in range(1, 21)] == pytest.approx(losses)
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == ["weights-0000010.png", "weights-0000020.png"]
    assert {event.step for event in events.Images("weights")} == {10, 20}


def test_trackers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'abacus'; use auto, none, or one of"):
        tracker_name("abacus")
    with pytest.raises(MissingExtraError, match="clearml"):
        train(Regression(), CONFIG, TrainingRun(folder=tmp_path, tracker="clearml"), stage="line")
    assert not list(tmp_path.iterdir())


def test_the_optimizer_of_eight_bits_says_what_it_needs() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"gladad\[adamw8bit\]"):
            make_optimizer("adamw8bit", [nn.Parameter(torch.zeros(2))], 1e-3, 0.0)
    with pytest.raises(ConfigError, match=r"optimizer: .*'sgd'"):
        replace(CONFIG, optimizer="sgd")


# ----------------------------------------------------------------------------------------- processes of their own


def start(arguments: Sequence[object], processes: int) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([SOURCE, str(HERE)])}
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_steps(path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file() or path.read_text().count("step ") < count:
        assert time.monotonic() < deadline, path.is_file() and path.read_text()
        time.sleep(0.01)


def result(output: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    return json.loads((output / "losses.json").read_text()), load_file(output / "weights.safetensors")


def finish(worker: subprocess.Popen[str]) -> None:
    _, complaint = worker.communicate(timeout=300)
    assert worker.returncode == 0, complaint


CANCELLED_BY_ONE = """
import os, sys
from pathlib import Path
from test_training_loop import CONFIG, CancelToken, Interrupted, Regression, TrainingRun, train

class Cancelling(Regression):
    def loss(self, module, step, samples):
        if step == 3 and os.environ["RANK"] == "1":
            token.cancel()
        return super().loss(module, step, samples)

token = CancelToken()
try:
    train(Cancelling(), CONFIG, TrainingRun(folder=Path(sys.argv[1]), tracker="none", cancel=token), stage="line")
except Interrupted as stop:
    assert (str(stop).split(";")[0], stop.signal) == ("stopped after step 4 of 20", 0)
    resumed = train(Regression(), CONFIG, TrainingRun(folder=Path(sys.argv[1]), tracker="none"), stage="line")
    assert resumed == train(Regression(), CONFIG, stage="line")
    Path(f"{sys.argv[1]}-{os.environ['RANK']}").write_text("agreed")
"""


def test_all_processes_stop_when_the_token_of_one_is_cancelled(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(CANCELLED_BY_ONE)
    finish(start([tmp_path / "worker.py", tmp_path / "run"], 2))
    assert (tmp_path / "run-0").read_text() == (tmp_path / "run-1").read_text() == "agreed"


def test_kills_terminations_and_two_processes(tiny_base: Path, tmp_path: Path) -> None:
    import train_worker  # here, as the processes of the test above import this module, and need no pipeline

    steps = ("--steps", "14", "--every", "3", "--batch", "4")
    # In this process: importing what a training needs takes longer than the training.
    assert train_worker.main([*map(str, (tiny_base, tmp_path / "run", tmp_path / "whole")), *steps]) == 0
    losses, weights = result(tmp_path / "whole")

    with Forks("train_worker", PYTHONPATH=os.pathsep.join([SOURCE, str(HERE)])) as forks:
        arguments = [*map(str, (tiny_base, tmp_path / "killed-run", tmp_path / "killed")), *steps]
        for number, seen in ((signal.SIGKILL, 4), (signal.SIGTERM, 2)):
            said = tmp_path / f"said-{number}"
            pid = forks.start(arguments, said)
            wait_for_steps(said, seen)
            os.kill(pid, number)
            status = forks.wait(pid)
            assert status == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[number], said.read_text()
        assert "stopped after step" in said.read_text()
        assert not (tmp_path / "killed").exists()
        assert train_worker.main(arguments) == 0
        after, resumed = result(tmp_path / "killed")
        assert after == losses
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)

        # The same batch of four, two by two: sums in another order, so equal but for rounding.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        arguments = [*map(str, (tiny_base, tmp_path / "two-run", tmp_path / "two")), *steps]
        pids = [forks.start(arguments, tmp_path / f"rank-{rank}", **world, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        assert [forks.wait(pid) for pid in pids] == [0, 0], [(tmp_path / f"rank-{rank}").read_text() for rank in "01"]
    both, divided_weights = result(tmp_path / "two")
    np.testing.assert_allclose(both, losses, rtol=1e-4)
    for name in weights:
        torch.testing.assert_close(divided_weights[name], weights[name], rtol=0, atol=2e-4)
    newest = Checkpoints(tmp_path / "two-run", json.loads((tmp_path / "two-run" / "training.json").read_text())).newest()
    assert newest is not None and newest.step == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 90), (90, 8), (30, 30)])
def test_singular_values_are_brought_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=torch.Generator().manual_seed(0)))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=torch.Generator().manual_seed(1)))
    before = torch.logspace(0, -1.3, min(shape))
    after = orthogonalized(left * before @ right.T, dtype)
    found = torch.diag(left.T @ after @ right)
    assert found.min() > 0.6 and found.max() < 1.25
    other = (left * found @ right.T - after).norm() / after.norm()  # its singular vectors stay, up to the rounding
    assert other < (1e-5 if dtype == torch.float32 else 0.05)
    assert not orthogonalized(torch.zeros(shape), dtype).any()


def test_a_state_of_muon_goes_where_its_parameters_are() -> None:
    layer, elsewhere = nn.Linear(3, 2), nn.Linear(3, 2, device="meta")
    muon = Muon(list(layer.parameters()), lr=1e-3, weight_decay=0.0)
    layer(torch.ones(1, 3)).sum().backward()
    muon.step()
    other = Muon(list(elsewhere.parameters()), lr=1e-3, weight_decay=0.0)
    other.load_state_dict({"state": muon.state_dict()["state"], "param_groups": other.state_dict()["param_groups"]})
    found = {name: value.device.type for state in other.state.values() for name, value in state.items()}
    assert found == dict.fromkeys(("momentum_buffer", "step", "exp_avg", "exp_avg_sq"), "meta")


def test_muon_changes_every_entry_by_about_the_learning_rate() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = Muon(list(layer.parameters()), lr=1e-3, weight_decay=0.0)
    layer(torch.randn(2, 6, 5, 5)).square().mean().backward()
    optimizer.step()
    weight, bias = (parameter.detach() - old for parameter, old in zip(layer.parameters(), before, strict=True))
    assert 0.6e-3 < weight.square().mean().sqrt() < 1.25e-3
    torch.testing.assert_close(bias.abs(), torch.full_like(bias, 1e-3), rtol=1e-3, atol=0)  # as the first step of AdamW


def test_muon_learns_all_directions_of_a_badly_scaled_problem_at_one_pace() -> None:
    scales = torch.logspace(0, -2, 12)  # of the inputs, so that gradients differ by their squares
    target = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))

    def left_over(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
        layer = nn.Linear(12, 12)
        nn.init.zeros_(layer.weight)
        optimizer = make(list(layer.parameters()))
        for number in range(100):
            optimizer.zero_grad()
            (((layer.weight - target) * scales).square().sum() + layer.bias.square().sum()).backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.2 * (1 - number / 100)
            optimizer.step()
        return float((layer.weight - target).detach().square().mean())

    momentum = left_over(lambda parameters: torch.optim.SGD(parameters, lr=0.2, momentum=0.9, nesterov=True))
    assert left_over(lambda parameters: Muon(parameters, lr=0.2, weight_decay=0.0)) < 0.1 * momentum
