"""Who learns the batches: this process, processes of this machine, or Ray's actors on many.

Every one has the whole model and is given one batch at a time. What it makes of a batch depends on
nothing else, so who got which batch shows nowhere; results are given out as they come.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from knnmoe.runtime.errors import BackendError, KnnMoeError, SettingError

from .corpus import Piece
from .optimize import GateRows, Learned, learn
from .partial import GateTensors
from .settings import BuildSettings, Compute, Workers
from .teacher import Teacher

_WAITING = 2  # batches handed out beyond those that are being learned


@dataclass(frozen=True)
class Recipe:
    """What a learner needs to know before its first batch; travels between processes.

    Attributes:
        checkpoint: Directory, the same on every machine.
        settings: Of the build, with a device and dtype that are no `auto`.
        threads: Of torch; None leaves them.
    """

    checkpoint: Path
    settings: BuildSettings
    threads: int | None


@dataclass(frozen=True)
class Shape:
    """Of the model: gates, D, E."""

    num_gates: int
    hidden_size: int
    num_experts: int


@dataclass(frozen=True)
class Task:
    """A batch to learn.

    Attributes:
        number: To know the result by.
        pieces: Its sequences.
        rates: Learning rate of each gate.
        steps: Gradient steps.
        pilot: Only sums of squares are wanted, to find rates by.
    """

    number: int
    pieces: list[Piece]
    rates: Mapping[int, float]
    steps: int
    pilot: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a batch.

    Attributes:
        number: Of the task.
        tensors: Rows as they are stored; empty for a pilot.
        nll: Summed, before and after.
        squares: By gate, summed squares of router logits and of residuals; of a pilot only.
    """

    number: int
    tensors: GateTensors
    nll: tuple[float, float]
    squares: Mapping[int, tuple[float, float]]


class Learner:
    """A model that learns batches; lives where it computes."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        settings = recipe.settings
        self._settings = settings
        self._teacher = Teacher.load(
            recipe.checkpoint,
            device=settings.device,
            dtype=_compute(settings),
            objective=settings.objective,
            gradient=settings.gradient,
        )

    def shape(self) -> Shape:
        """Of the model."""
        teacher = self._teacher
        return Shape(teacher.num_gates, teacher.hidden_size, teacher.num_experts)

    def run(self, task: Task) -> Result:
        """Learn one batch."""
        learned = learn(
            self._teacher,
            [piece.tokens for piece in task.pieces],
            task.rates,
            steps=task.steps,
            credited=[piece.credited for piece in task.pieces],
            measure=not task.pilot,
        )
        nll = (learned.nll_before, learned.nll_after)
        if task.pilot:
            return Result(task.number, {}, nll, _squares(learned.gates))
        return Result(task.number, stored(learned, self._settings), nll, {})


class Learners:
    """Several learners, or one; used as a context.

    Args:
        shape: Of their model.
        run: Gives out the results of tasks in whichever order they are done.
    """

    def __init__(self, shape: Shape, run: Callable[[Iterable[Task]], Iterator[Result]]) -> None:
        self.shape = shape
        self.run = run


def open_learners(recipe: Recipe, workers: Workers) -> AbstractContextManager[Learners]:
    """Learners as asked for.

    Raises:
        BackendError: If a worker dies, or Ray is not there.
        CheckpointError: If the checkpoint cannot be used.
    """
    if workers.ray:
        return _ray(recipe, workers.count)
    return _here(recipe) if workers.count is None else _processes(recipe, workers.count)


def resolved(settings: BuildSettings) -> tuple[str, Compute]:
    """Device and dtype, `auto` replaced.

    Raises:
        SettingError: If torch does not know the device.
        BackendError: If the device is not there.
    """
    cuda = torch.cuda.is_available()
    name = ("cuda" if cuda else "cpu") if settings.device == "auto" else settings.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(
            "device", "unknown", expected="auto, cpu, cuda or cuda:0", found=name
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device {name}",
            "is not there",
            found=f"{torch.cuda.device_count()} CUDA devices, torch {torch.__version__}",
            fix="Install a torch for CUDA, or build with --device cpu.",
        )
    usual: Compute = "fp32" if device.type == "cpu" else "bf16"
    return name, usual if settings.dtype == "auto" else _compute(settings)


def stored(result: Learned, settings: BuildSettings) -> GateTensors:
    """Rows in the dtype of the pack.

    Raises:
        SettingError: If they do not fit into it.
    """
    dtype = np.float16 if settings.precision == "fp16" else np.float32

    def narrowed(gate: int, name: str, tensor: NDArray[np.float32]) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            rows = tensor.astype(dtype, copy=False)
        if np.isfinite(rows).all():
            return rows
        learned = name == "residuals"
        raise SettingError(
            "learning rate" if learned else "precision",
            f"the {name} of gate {gate} do not fit into {rows.dtype}",
            found=f"a magnitude of {np.abs(tensor).max():g}",
            fix="Build with a smaller --learning-rate."
            if learned
            else "Build with --precision fp32.",
        )

    return {
        gate: {
            "keys": narrowed(gate, "router inputs", rows.router_inputs),
            "router_logits": narrowed(gate, "router logits", rows.router_logits),
            "residuals": narrowed(gate, "residuals", rows.residuals),
        }
        for gate, rows in result.gates.items()
    }


def _compute(settings: BuildSettings) -> Compute:
    choices: dict[str, Compute] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
    return choices[settings.dtype]


def _squares(gates: Mapping[int, GateRows]) -> dict[int, tuple[float, float]]:
    def total(rows: NDArray[np.float32]) -> float:
        return float(np.square(rows, dtype=np.float64).sum())

    return {
        gate: (total(rows.router_logits), total(rows.residuals)) for gate, rows in gates.items()
    }


# --- this process ---------------------------------------------------------------------------


@contextmanager
def _here(recipe: Recipe) -> Iterator[Learners]:
    learner = Learner(recipe)
    yield Learners(learner.shape(), lambda tasks: map(learner.run, tasks))


# --- processes of this machine --------------------------------------------------------------

_learner: Learner | None = None


def _start(recipe: Recipe) -> None:
    global _learner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends them in order
    try:
        _learner = Learner(recipe)
    except KnnMoeError as error:
        _failed.append(error)


_failed: list[KnnMoeError] = []


def _learner_here() -> Learner:
    if _learner is None:
        raise _failed[0]
    return _learner


def _shape_in_process() -> Shape:
    return _learner_here().shape()


def _run_in_process(task: Task) -> Result:
    return _learner_here().run(task)


@contextmanager
def _processes(recipe: Recipe, count: int) -> Iterator[Learners]:
    # A forked process cannot use torch's threads.
    pool = ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=_start, initargs=(recipe,)
    )

    def run(tasks: Iterable[Task]) -> Iterator[Result]:
        waiting = iter(tasks)
        first = islice(waiting, count + _WAITING)
        running = {pool.submit(_run_in_process, task) for task in first}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                running |= {pool.submit(_run_in_process, task) for task in islice(waiting, 1)}
                yield result

    try:
        yield Learners(pool.submit(_shape_in_process).result(), run)
    except BrokenProcessPool as error:
        raise BackendError(
            "a worker",
            "died",
            fix="If memory is short, build with fewer --workers; the same command goes on.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# --- Ray ------------------------------------------------------------------------------------


@contextmanager
def _ray(recipe: Recipe, count: int | None) -> Iterator[Learners]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise BackendError(
            "knnmoe memory build --ray",
            f"needs the package {error.name}, which is not installed",
            fix="Run `pip install 'knnmoe[ray]'`.",
        ) from error
    started = not ray.is_initialized()
    if started:
        # Ray's own RAY_ADDRESS names a cluster; without it, this machine is one.
        ray.init(log_to_driver=False, include_dashboard=False)
    cores = recipe.threads or 1
    gpus = 1 if recipe.settings.device.startswith("cuda") else 0
    count = count or max(1, int(ray.cluster_resources().get("CPU", 1)) // cores)
    make = ray.remote(num_cpus=cores, num_gpus=gpus)(Learner)
    actors = [make.remote(recipe) for _ in range(count)]

    def run(tasks: Iterable[Task]) -> Iterator[Result]:
        waiting = iter(tasks)
        # Two a learner, so that none waits for its next batch to arrive.
        first = zip(actors * 2, islice(waiting, 2 * count), strict=False)
        running = {actor.run.remote(task): actor for actor, task in first}
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            actor = running.pop(done)
            result = ray.get(done)
            running |= {actor.run.remote(task): actor for task in islice(waiting, 1)}
            yield result

    try:
        yield Learners(ray.get(actors[0].shape.remote()), run)
    except ray.exceptions.RayTaskError as error:
        # Ray wraps what a worker raised.
        if isinstance(error.cause, KnnMoeError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise BackendError(
            "a Ray worker",
            f"died ({str(error).splitlines()[0]})",
            fix="Give Ray machines with more memory, or fewer --workers; the same command goes on.",
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)
        if started:
            ray.shutdown()
