"""The one training loop of the diffusers bases: denoiser, feature extractor and autoencoder differ in their loss only.

Everything random is a function of ``(seed, step, sample)``. So a training that was stopped goes on bit for bit as if it had not been, and
several processes, which divide the samples of every step among them, draw what one process would have drawn.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from pydantic import Field, InstanceOf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gladad.core.errors import ConfigError, Interrupted, TrainingError
from gladad.core.processes import end_group_at_exit, process_count
from gladad.core.records import Progress, Watch, no_progress
from gladad.core.settings import to_json, validated
from gladad.core.threads import CancelToken, cancelled_by_signals
from gladad.training.checkpoints import Checkpoint, Checkpoints
from gladad.training.optimizers import OptimizerName, make_optimizer
from gladad.training.trackers import Tracker, tracker_name

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")
Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FREE_OF_RESULT = ("steps", "minutes", "micro_batch")
"""Settings that may differ between a training and its continuation: more steps, or as many images at a time as another card holds."""


@validated
class LoopConfig:
    """The budget and arithmetic of a training."""

    steps: Annotated[int, Field(ge=0)]  # optimiser steps
    minutes: Annotated[float, Field(gt=0)] | None = None  # after which it ends before, earlier runs included; then a second run may differ
    batch_size: Annotated[int, Field(ge=1)]  # samples per optimiser step, of all processes together
    micro_batch: Annotated[int, Field(ge=1)] | None = None  # samples at a time; gradients are accumulated; None = all of a process's share
    learning_rate: Annotated[float, Field(gt=0)]  # constant, after the warm-up
    warmup: Annotated[int, Field(ge=0)] = 0  # steps over which the rate rises linearly
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2  # decoupled
    optimizer: OptimizerName = "adamw"  # 8 bit moments need a package of their own
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0  # largest gradient norm
    precision: Precision = "float32"  # of the networks' arithmetic; trained weights and moments are float32
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay of the averaged weights, which are then the ones kept; 0 = none
    seed: Annotated[int, Field(ge=0)] = 0  # of everything random


@validated
class TrainingRun:
    """What a training writes on its way. None of it changes the result."""

    # for checkpoints, logs and examples; None = nothing is written, and an interrupted training is lost
    folder: Annotated[Path | None, Field(strict=False)] = None
    checkpoint_every: Annotated[int, Field(ge=1)] = 500  # steps between checkpoints
    keep: Annotated[int, Field(ge=1)] = 2  # newest checkpoints kept
    tracker: str = "auto"  # "auto" = TensorBoard where it is installed; "none"; or one of accelerate's, such as "wandb"
    sample_every: Annotated[int, Field(ge=1)] = 500  # steps between example pictures
    memory_limit: int | None = None  # bytes; a training of the denoiser that needs more is refused; None = what is available
    tell: Callable[[str], None] = lambda line: None  # for sentences worth reading
    watch: InstanceOf[Watch] | None = None  # is told of every loss, and shown the example pictures
    cancel: InstanceOf[CancelToken] | None = None  # stops the training after its present step, saved; off the main thread the only way

    def part(self, name: str, watched: bool = True) -> TrainingRun:
        """The run of one of several trainings, in a folder below; the watch looks at one of them."""
        return replace(self, folder=None if self.folder is None else self.folder / name, watch=self.watch if watched else None)


class Task(Protocol):
    """What is trained, and towards what."""

    @property
    def module(self) -> nn.Module:
        """Its parameters that require a gradient are trained, in place."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-ready: what the result depends on besides the loop's settings, such as images and base."""

    def loss(self, module: nn.Module, step: int, samples: Sequence[int]) -> Tensor:
        """Mean loss of some samples of a step, which depend on their numbers alone; ``module`` is `module`, perhaps wrapped."""

    def examples(self) -> dict[str, NDArray[np.uint8]]:
        """Pictures ``[H, W, 3]`` of what has been learnt so far, by name; may be empty."""


def seed_of(*numbers: int) -> int:
    """A 63-bit seed from several numbers, such as seed, step and sample; shorter ones are not the same with zeros at their end."""
    return int(np.random.SeedSequence(numbers, spawn_key=(len(numbers), 1)).generate_state(1, np.uint64)[0]) & (2**63 - 1)


def draw_generator(*numbers: int) -> torch.Generator:
    """A CPU generator of its own for `seed_of` these numbers, so that every device draws the same."""
    return torch.Generator().manual_seed(seed_of(*numbers))


def make_accelerator() -> Accelerator:
    """The processes and the device of this training: those of ``torchrun`` or ``accelerate launch``, or this process alone."""
    from accelerate import Accelerator  # late: what only inspects imports this module too
    from accelerate.utils import InitProcessGroupKwargs

    # Precision is the loop's own affair: the accelerator's would be fixed for the whole process.
    # The main process writes gigabytes while the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[patience])
    end_group_at_exit()
    return accelerator


def divided(work: Callable[[int], Result], count: int, told: Callable[[int, int], None] = lambda done, total: None) -> list[Result]:
    """The results of some work for the numbers below ``count``, which the processes of a training divide among them; all get all.

    A result depends on its number alone and can be pickled. ``told`` is called with how many are done and ``count``.
    """
    processes = process_count()
    rank = make_accelerator().process_index if processes > 1 else 0
    own = []
    for number in range(rank, count, processes):
        own.append((number, work(number)))
        told(min(count, len(own) * processes), count)
    if processes > 1:
        from accelerate.utils import gather_object

        own = gather_object(own)
    return [result for _, result in sorted(own, key=lambda item: item[0])]


def train(task: Task, config: LoopConfig, run: TrainingRun | None = None, *, progress: Progress = no_progress, stage: str) -> list[float]:
    """Train a module in place, or go on where its checkpoints stopped.

    Without a run nothing is written. ``stage`` names the training in the logs and for the progress, which the main process alone tells.

    Returns:
        The loss of every step, of earlier runs too.

    Raises:
        ConfigError: The settings do not fit together, or the folder holds another training.
        Interrupted: SIGTERM, Ctrl-C or `TrainingRun.cancel` asked to stop; a checkpoint was written. Without a folder for it signals do
            what they always do. Or the training is finished over sharded weights, which one process has to put together.
        TrainingError: The loss is not finite.
    """
    run = TrainingRun() if run is None else run
    tracked = tracker_name(run.tracker)
    checkpoints, found = _stored(task, config, run, stage)
    loop = _Loop(task, config)
    main = loop.accelerator.is_main_process
    if checkpoints is not None:
        if main:
            checkpoints.start()
        loop.accelerator.wait_for_everyone()
    losses: list[float] = []
    if found is not None:
        losses = loop.restore(found)
        run.tell(f"going on after step {found.step} of {config.steps}")
        del found  # as large as the training itself
    token = run.cancel or CancelToken()
    with contextlib.ExitStack() as at_end:
        at_end.callback(task.module.train().eval)
        tracker = Tracker(tracked, run.folder if main else None, stage, first_step=len(losses))
        at_end.callback(tracker.close)
        if checkpoints is not None:
            at_end.enter_context(cancelled_by_signals(token))
        for done in range(len(losses) + 1, config.steps + 1):
            if loop.over:
                break
            losses.append(loop.step(done - 1))
            if main:
                progress(stage, done, done if loop.over else config.steps)
                if run.watch is not None:
                    run.watch.loss(stage, done, losses[-1])
            asked = loop.agree(token)
            last = loop.over or done == config.steps
            if checkpoints is not None and (asked is not None or last or done % run.checkpoint_every == 0):
                loop.checkpoint(checkpoints, losses)
            if main and run.folder is not None:
                _report(tracker, loop, run, losses, last)
            if asked is not None:
                kept = "nothing is saved" if run.folder is None else f"saved in {run.folder}, the same command goes on"
                raise Interrupted(f"stopped after step {done} of {config.steps}; {kept}", asked)
        if loop.sharded and checkpoints is not None:
            raise Interrupted(f"trained, and saved in {run.folder}; the same command in one process finishes the model", 0)
        loop.finish()
    return losses


def _stored(task: Task, config: LoopConfig, run: TrainingRun, stage: str) -> tuple[Checkpoints | None, Checkpoint | None]:
    """Where this training is kept, and how far it has come; None if it is not kept, or not begun."""
    if run.folder is None:
        return None, None
    settings = {name: value for name, value in to_json(config).items() if name not in FREE_OF_RESULT}
    checkpoints = Checkpoints(run.folder, {"stage": stage, **settings, **task.identity}, run.keep, run.tell)
    found = checkpoints.newest()
    if found is not None and found.step > config.steps:
        raise ConfigError(f"{run.folder}: has {found.step} steps already, more than the {config.steps} asked for; remove the folder")
    return checkpoints, found


def _report(tracker: Tracker, loop: _Loop, run: TrainingRun, losses: Sequence[float], last: bool) -> None:
    """What people follow a training by; it goes on without it."""
    done = len(losses)
    on_gpu = loop.device.type == "cuda"  # there the largest amount so far, elsewhere what the process holds now
    memory = torch.cuda.max_memory_allocated(loop.device) if on_gpu else psutil.Process().memory_info().rss
    rates = {"learning_rate": loop.rate(done - 1), "images_per_second": loop.config.batch_size / max(loop.seconds, 1e-9)}
    try:
        tracker.log({"loss": losses[-1], **rates, "memory_gib": memory / 2**30}, done)
        # The parts of a sharded network are needed by all processes, and only this one shows anything.
        if not loop.sharded and (last or done % run.sample_every == 0):
            examples = loop.task.examples()
            tracker.show(examples, done)
            if run.watch is not None:
                run.watch.show(tracker.run, done, examples)
    except Exception as error:
        run.tell(f"step {done} is not shown: {type(error).__name__}: {error}")


class _Loop:
    """Module, optimiser and averages of one training, and one step of it."""

    def __init__(self, task: Task, config: LoopConfig):
        self.task, self.config = task, config
        self.accelerator = make_accelerator()
        self.device, count = self.accelerator.device, self.accelerator.num_processes
        if config.precision == "float16" and self.device.type == "cpu":
            raise ConfigError("precision float16 trains on a GPU only; use bfloat16 or float32")
        if config.batch_size < count:
            raise ConfigError(f"batch_size {config.batch_size} is smaller than the number of processes, {count}")
        trained = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
        if not trained or any(parameter.dtype != torch.float32 for parameter in trained):
            raise ConfigError("training needs weights to train, and them in float32: in half precision updates this small vanish")
        short = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        optimizer = make_optimizer(config.optimizer, trained, config.learning_rate, config.weight_decay, short)
        self.module, self.optimizer = self.accelerator.prepare(task.module, optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.sharded = any(isinstance(parameter, DTensor) for _, parameter in self._trained())
        if self.sharded and config.optimizer == "muon":
            raise ConfigError("optimizer: muon needs whole matrices, and these weights are sharded; set it to adamw")
        if self.sharded and config.batch_size % count:
            raise ConfigError(f"over sharded weights batch_size must be a multiple of the number of processes, {count}")
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._trained()} if config.ema else {}
        self.seconds = self.spent = 0.0  # of the last step, and of all

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.config.learning_rate * min(1.0, (step + 1) / (self.config.warmup + 1))

    def step(self, step: int) -> float:
        """One step of the optimiser; returns the mean loss of its batch, of all processes."""
        config, accelerator, started = self.config, self.accelerator, time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        mine = range(config.batch_size)[accelerator.process_index :: accelerator.num_processes]
        size = config.micro_batch or len(mine)
        pieces = [mine[start : start + size] for start in range(0, len(mine), size)]
        total = torch.zeros((), device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed_of(config.seed, step, accelerator.process_index))  # for layers that draw, such as dropout
            for piece in pieces:
                # Gradients travel once per step, with the last piece. Processes average them: a share counts as its part of the batch.
                with contextlib.nullcontext() if piece is pieces[-1] else accelerator.no_sync(self.module):
                    with torch.autocast(self.device.type, DTYPES[config.precision], enabled=config.precision != "float32"):
                        loss = self.task.loss(self.module, step, piece) * (len(piece) / config.batch_size)
                    self.scaler.scale(loss * accelerator.num_processes).backward()
                total += loss.detach().float()
        mean = float(accelerator.reduce(total, "sum"))
        if not np.isfinite(mean):
            raise TrainingError(f"the loss is {mean} at step {step + 1}; lower the learning rate, or train in float32")
        self.scaler.unscale_(self.optimizer)
        norm = accelerator.clip_grad_norm_(self.module.parameters(), config.gradient_clip)
        if not self.scaler.is_enabled() and norm is not None and not torch.isfinite(norm):  # a scaler skips such a step by itself
            raise TrainingError(f"the gradient is not finite at step {step + 1}; lower the learning rate, or train in float32")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for name, parameter in self._trained() if self.averages else ():
            self.averages[name].lerp_(parameter.detach(), 1 - config.ema)
        self.seconds = time.monotonic() - started
        self.spent += self.seconds
        return mean

    @property
    def over(self) -> bool:
        """Whether the time that the training may take has been spent."""
        return self.config.minutes is not None and self.spent >= 60 * self.config.minutes

    def agree(self, token: CancelToken) -> int | None:
        """Whether all processes stop, because the token of one is cancelled: its signal, or None. All have spent as long then."""
        number = token.signal if token.cancelled else -1
        if self.accelerator.num_processes > 1:
            told = self.accelerator.gather(torch.tensor([[number, self.spent]], device=self.device))
            asked, self.spent = torch.as_tensor(told).amax(dim=0).tolist()
            number = int(asked)
        return None if number < 0 else number

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters by their name in the module as it was given."""
        module = self.accelerator.unwrap_model(self.module)
        return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)

    def checkpoint(self, checkpoints: Checkpoints, losses: Sequence[float]) -> None:
        """Write where the training is; every process has to call it, the main one writes."""
        tensors, scalars = {}, {}
        for name, parameter in self._trained():
            tensors[f"weights.{name}"] = _whole(parameter)
            for key, value in self.optimizer.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = _whole(value)
                else:
                    scalars[f"{name}.{key}"] = value
        tensors |= {f"averages.{name}": _whole(value) for name, value in self.averages.items()}
        if self.accelerator.is_main_process:
            state = {"losses": list(losses), "optimizer": scalars, "scaler": self.scaler.state_dict(), "seconds": self.spent}
            checkpoints.save(Checkpoint(len(losses), tensors, state))
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Checkpoint) -> list[float]:
        """Go back to where a checkpoint was written; returns the losses until then."""
        stored, states = checkpoint.tensors, {}
        for index, (name, parameter) in enumerate(self._trained()):
            parameter.data.copy_(_spread(stored[f"weights.{name}"], parameter))
            prefix = f"optimizer.{name}."
            state: dict[str, Any] = {k[len(name) + 1 :]: v for k, v in checkpoint.state["optimizer"].items() if k.startswith(f"{name}.")}
            for key, value in stored.items():
                if key.startswith(prefix):
                    state[key[len(prefix) :]] = _spread(value, parameter) if value.shape == parameter.shape else value.clone()
            if state:
                states[index] = state
            if self.averages:
                self.averages[name] = _spread(stored[f"averages.{name}"], parameter)
        # Not set one by one: the optimiser knows which parts of its state belong onto the GPU.
        inner = self.optimizer.optimizer
        inner.load_state_dict({"state": states, "param_groups": inner.state_dict()["param_groups"]})
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.spent = float(checkpoint.state.get("seconds", 0))
        return [float(loss) for loss in checkpoint.state["losses"]]

    def finish(self) -> None:
        """Keep the averaged weights, if there are any."""
        for name, parameter in self._trained() if self.averages else ():
            parameter.data.copy_(self.averages[name])


def _whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, not copied if it is there; one that is spread over processes is put together, for which all are needed."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _spread(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor at the place of another, spread over processes as that one is."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device, copy=True)
