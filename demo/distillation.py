"""A short distillation: the pruned student learns what its dense teacher computes, and can stop at any step."""

import copy
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

import sparse24

CACHE = Path(__file__).parent.parent / ".cache"
WARM_UP = 5  # steps


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to learn. Adam; the learning rate warms up, then falls linearly to zero."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Distilled:
    """What was done: all planned steps, or those before Ctrl-C or the time limit."""

    steps: int
    planned: int
    seconds: float  # of this run, which may have gone on where an earlier one stopped

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps == self.planned else f"{self.steps} of {self.planned} steps"


def distil(
    name: str,
    student: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    recipe: Recipe,
    limit_s: float,
    progress: Progress,
) -> Distilled:
    """Train `student` in place until the recipe, the time limit or Ctrl-C ends it; what was learnt is kept.

    loss_of_step: the loss at step i. All its randomness must come from i, so that the steps give the same student
    whether they are done at once or in several runs: a run that stops early leaves a checkpoint in .cache, from which
    the next run of the same recipe on the same student goes on.
    """
    checkpoint = CACHE / f"demo-{name}-{_fingerprint(student, recipe)}.pt"
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.95), fused=True)
    step = _resume(checkpoint, student, optimizer)
    task = progress.add_task(f"{name}: distillation", total=recipe.steps, completed=step)
    start = time.monotonic()
    with _interrupts() as interrupted:
        while step < recipe.steps and time.monotonic() - start < limit_s and not interrupted():
            warm = min(1.0, (step + 1) / WARM_UP)
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * warm * (1 - step / recipe.steps)
            optimizer.zero_grad()
            loss = loss_of_step(step)
            loss.backward()
            optimizer.step()
            step += 1
            progress.update(task, completed=step, description=f"{name}: distillation, loss {loss.item():.4f}")
    optimizer.zero_grad()

    if step == recipe.steps:
        checkpoint.unlink(missing_ok=True)
    else:
        progress.console.print(f"{name}: {step} of {recipe.steps} distillation steps done, going on with these")
        _save({"step": step, "student": student.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    return Distilled(step, recipe.steps, time.monotonic() - start)


def converted(student: nn.Module, *, int8: bool = False) -> nn.Module:
    """A copy of the pruned student that runs on the sparse kernels; the student stays trainable."""
    model = copy.deepcopy(student)
    if int8:
        sparse24.quantize(model)
    sparse24.convert(model)
    return model.requires_grad_(False)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C came: the first is only noted, so that no step is left half done; a second one acts as usual."""
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _fingerprint(student: nn.Module, recipe: Recipe) -> str:
    """Of the recipe and the student it starts from."""
    digest = hashlib.sha256(repr(recipe).encode())
    for name, tensor in student.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _resume(checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Steps done already, with student and optimiser as they were after them."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _save(state: dict[str, object], checkpoint: Path) -> None:
    checkpoint.parent.mkdir(exist_ok=True)
    temporary = checkpoint.with_suffix(".new")
    torch.save(state, temporary)
    os.replace(temporary, checkpoint)
