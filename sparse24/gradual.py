"""GradualPruning: sparsity that grows while a model trains."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from sparse24.masks import Columns
from sparse24.pruning import Mask, Skip, prune
from sparse24.reporting import parametrizations


class GradualPruning:
    """Sparsity that grows while a model trains (AGP: Zhu and Gupta 2017, arXiv 1710.01878).

    After t of `steps` steps the share s_t = 0.5 + (start - 0.5) (1 - t / steps)^3 of each weight is masked: the
    smallest of those entries that the pattern would drop, both by their magnitudes at that time. So nothing that the
    pattern keeps is ever masked, entries may come back, and the last mask is that of prune(). AGP is defined for
    unstructured sparsity; which entries go first on the way to 2:4 is our reading.

    model, pattern, skip: as for prune(), which is called; `report` is what it returned.
    every: steps between two choices of masks; the last step always chooses.
    Call step() after each optimizer.step(). Raises RuntimeError for arguments that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        pattern: str = "2:4",
        start: float = 0.05,
        every: int = 1,
        skip: Skip = (),
    ) -> None:
        if steps < 1 or every < 1:
            raise RuntimeError(f"steps and every must be at least 1; got {steps} and {every}")
        if not 0 <= start <= 0.5:
            raise RuntimeError(f"start must be from 0 to 0.5, the sparsity of every pattern; got {start}")
        before = {id(module) for module in model.modules()}
        self.report = prune(model, pattern, skip=skip)
        self.steps, self.start, self.every, self.taken = steps, start, every, 0
        self._layers: list[tuple[Columns, parametrize.ParametrizationList, Mask]] = []
        for module in model.modules():
            stack = parametrizations(module)
            new = [rule for rule in stack if isinstance(rule, Mask) and id(rule) not in before]
            if new and isinstance(stack, parametrize.ParametrizationList):
                assert isinstance(module, (nn.Linear, nn.Conv2d))
                self._layers.append((Columns(module), stack, new[0]))
        self._choose()

    def sparsity(self) -> float:
        """s_t, the share that is masked now."""
        left = 1 - min(self.taken, self.steps) / self.steps
        return 0.5 + (self.start - 0.5) * left**3

    def step(self) -> None:
        """Count a step of the optimiser, and choose the masks anew where it is time."""
        self.taken += 1
        if self.taken <= self.steps and (self.taken % self.every == 0 or self.taken == self.steps):
            self._choose()

    def state_dict(self) -> dict[str, int]:
        """How far it is. The masks are in the state of the model."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there; load the state of the model as well, which holds the masks."""
        self.taken = int(state["taken"])

    @torch.no_grad()
    def _choose(self) -> None:
        for columns, stack, rule in self._layers:
            scores = columns.of(stack.original.detach()).abs()
            dropped = ~columns.mask(scores, rule.pattern)
            if self.taken < self.steps:
                sizes = scores[dropped]
                most = torch.argsort(sizes, stable=True)[: round(self.sparsity() * scores.numel())]
                smallest = torch.zeros(sizes.shape, dtype=torch.bool, device=sizes.device)
                smallest[most] = True
                dropped[dropped.clone()] = smallest
            rule.mask.copy_(columns.back(~dropped))
