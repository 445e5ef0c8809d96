"""The iterations of a training, and nothing else."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from handlers.detection.batch_norm import freeze_batch_norm
from handlers.detection.batches import Batch
from handlers.detection.devices import autocast
from handlers.detection.errors import LossError, SnapshotError
from handlers.detection.networks.base import Network
from handlers.detection.ranks import Ranks
from handlers.detection.snapshot import TrainingState

_MOMENTUM = 0.9
_WEIGHT_DECAY = 5e-4
#: Longest gradient; the first steps of freshly drawn heads are longer, and would throw the ImageNet weights away.
_MAX_GRADIENT = 10.0
#: Averaged weights: w' = d w' + (1 - d) w after each step, with d growing from 0.18 to this.
_MAX_DECAY = 0.999
#: Images a rank has in an iteration, below which their own statistics would be noise for batch normalisation.
MIN_IMAGES_FOR_STATISTICS = 4


def one_cycle(optimizer: SGD, rate: float, peak: float, iterations: int) -> OneCycleLR:
    """From `rate` up to `peak` times that in 30 % of `iterations`, and down to nearly nothing (Smith & Topin 2018)."""
    return OneCycleLR(optimizer, rate * peak, iterations, div_factor=peak, cycle_momentum=False)


class Learner:
    """The network with what changes it: optimiser, schedule, average."""

    def __init__(
        self, network: Network, rate: float, peak: float, *, iterations: int, images: int, ranks: Ranks
    ) -> None:
        """`rate`: the initial learning rate; `peak`: the highest, as a multiple of it. `iterations`: of the whole
        training. `images`: of this rank in each forward pass.
        """
        self.network = network
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self._device = network.device
        self._ranks = ranks
        self._parallel = ranks.parallel(network)
        self._frozen_statistics = images < MIN_IMAGES_FOR_STATISTICS
        # A bias or a normalisation's scale has no reason to be small.
        decayed = [p for p in network.parameters() if p.ndim > 1]
        free = [p for p in network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = SGD(groups, lr=rate, momentum=_MOMENTUM)
        #: The recipe in words, for the card of the model.
        self.recipe = (
            f"SGD, momentum {_MOMENTUM}, weight decay {_WEIGHT_DECAY}, gradients clipped at length {_MAX_GRADIENT:g}. "
            f"The learning rate begins at {rate:g}, rises to {rate * peak:g} over the first 30 % of {iterations} "
            "iterations and falls to nearly nothing (one cycle). What is kept is a running average of the weights"
            + (", and statistics of batch normalisation stayed as they were." if self._frozen_statistics else ".")
        )
        self.schedule = one_cycle(self.optimizer, rate, peak, iterations)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def begin(self, seed: int, initial_weights: str) -> TrainingState:
        """The state before the first iteration."""
        state = TrainingState(0, seed, initial_weights, {}, {}, {}, {})
        self.save(state)
        return state

    def save(self, state: TrainingState) -> None:
        """Put into `state` what this object holds; not copies, so `state` is to be written before the next step."""
        state.network = self.network.state_dict()
        state.average = self.average.state_dict()
        state.optimizer = self.optimizer.state_dict()
        state.schedule = self.schedule.state_dict()

    def resume(self, state: TrainingState) -> None:
        """Go on from `state`. Raises SnapshotError if it does not fit the network."""
        try:
            self.network.load_state_dict(state.network)
            self.average.load_state_dict(state.average)
            self.optimizer.load_state_dict(state.optimizer)
            self.schedule.load_state_dict(state.schedule)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise SnapshotError(f"the snapshot does not fit the network: {str(error)[:200]}") from error

    def step(self, parts: Sequence[Batch], iteration: int) -> Tensor:
        """One step of the optimiser; `iteration` counts from 1. Returns this rank's part of the loss, on the device.

        The loss of a step is its mean over the predictions that answer for an object, in the images of all ranks: one
        with few objects has no more say for that.
        """
        self._parallel.train()
        if self._frozen_statistics:
            freeze_batch_norm(self._parallel)
        self.optimizer.zero_grad()
        whole = torch.zeros((), device=self._device)
        answers, images = self._ranks.total(
            sum(len(part.targets.rows) for part in parts), sum(len(part.mongodb_ids) for part in parts)
        )
        # Images without objects must not be divided by nothing. Times the ranks, over which gradients are averaged.
        share = self._ranks.size / max(answers, images)
        for part in parts:
            batch = part.to(self._device)
            with autocast(self._device):
                outputs = self._parallel(batch.images)
            loss = self.network.loss(outputs, batch.targets) * share
            torch.autograd.backward(loss)
            whole += loss.detach()
        clip_grad_norm_(self.network.parameters(), _MAX_GRADIENT)
        self.optimizer.step()
        self.schedule.step()
        # Early weights are far off: while there are few steps, the average forgets faster.
        update_average(self.average, self.network, min(_MAX_DECAY, (1 + iteration) / (10 + iteration)))
        return whole


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * network, statistics of batch normalisation included."""
    ours, theirs = list(average.state_dict().values()), list(network.state_dict().values())
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
    for a, b in zip(ours, theirs, strict=True):
        if not a.is_floating_point():
            a.copy_(b)


def iterate(
    learner: Learner,
    batches: Iterator[list[Batch]],
    first: int,
    ranks: Ranks,
    stopping: Callable[[], bool],
    observe: Callable[[int, float, float], None],
) -> Iterator[tuple[int, bool]]:
    """Run the iterations from `first` on, one for each batch; after each, (its number, whether to stop after it).

    `observe` is told the number of each, the mean of its losses over the ranks, and its learning rate.
    All ranks see the same pair at the same iteration. Raises LossError.
    """
    for iteration, parts in enumerate(batches, first):
        rate = learner.rate
        loss = float(learner.step(parts, iteration))
        stop, mean_loss = ranks.agree(stopping(), loss)
        if not math.isfinite(mean_loss):
            # The mean is what all ranks know; which of them it was, only itself.
            mine = [name for part in parts for name in part.mongodb_ids] if not math.isfinite(loss) else []
            names = ", ".join(name for rank in ranks.gather(mine) for name in rank)
            raise LossError(f"the loss of iteration {iteration} is {mean_loss}; its images are {names}")
        observe(iteration, mean_loss, rate)
        yield iteration, stop
