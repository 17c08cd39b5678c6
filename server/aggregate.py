"""What the server makes of the mean update: plain averaging, momentum, or Adam.

All of it is post-processing of a sum the sites already protected, so it costs no privacy.
"""

import dataclasses
from collections.abc import Mapping
from typing import Self

import numpy as np

from confide.common.adapter import Floats
from confide.common.plan import Federation
from confide.common.ring import Update

_ADAM_SECOND_MOMENT = 0.99
_ADAM_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServerState:
    """The global adapter and the server optimizer's memory.

    Attributes:
        adapter: (d,), float32.
        moments: Named vectors (d,), float32: none for fedavg, `first` for fedavgm, `first` and `second` for fedadam.
    """

    adapter: Floats
    moments: Mapping[str, Floats]

    @classmethod
    def begin(cls, adapter: Floats, federation: Federation) -> Self:
        """Return the state before the first round."""
        names = {"fedavg": (), "fedavgm": ("first",), "fedadam": ("first", "second")}[federation.server_optimizer]
        return cls(adapter=adapter, moments={name: np.zeros_like(adapter) for name in names})


def step(state: ServerState, update: Update, federation: Federation) -> ServerState:
    """Return the state after one round's mean update.

    Source: Reddi et al. 2021 (arXiv 2003.00295), Algorithm 2; FedAvgM as in Hsu et al. 2019 (arXiv 1909.06335).
    """
    rate = np.float32(federation.server_learning_rate)
    beta = np.float32(0.9 if federation.server_momentum is None else federation.server_momentum)
    one = np.float32(1)
    mean = update.mean
    match federation.server_optimizer:
        case "fedavgm":
            first = beta * state.moments["first"] + mean
            return ServerState(adapter=state.adapter + rate * first, moments={"first": first})
        case "fedadam":
            decay = np.float32(_ADAM_SECOND_MOMENT)
            first = beta * state.moments["first"] + (one - beta) * mean
            second = (decay * state.moments["second"] + (one - decay) * mean * mean).astype(np.float32)
            move = (rate * first / (np.sqrt(second) + _ADAM_FLOOR)).astype(np.float32)
            return ServerState(adapter=state.adapter + move, moments={"first": first, "second": second})
        case _:
            return ServerState(adapter=state.adapter + rate * mean, moments={})
