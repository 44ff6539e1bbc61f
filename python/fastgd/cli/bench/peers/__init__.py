"""Who else can take the step: one module a library, imported when it competes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from fastgd.cli.bench.case import Case
from fastgd.cli.bench.measure import Contender


@dataclass(frozen=True)
class Peer:
    """A library, and one way of taking the step with it."""

    name: str
    package: str
    module: str
    function: str = "contend"
    most_arrays: int | None = None  # beyond so many it needs minutes to compile

    @property
    def installed(self) -> bool:
        """Whether the library is there."""
        return find_spec(self.package) is not None

    def contend(self, case: Case) -> Contender | None:
        """Get ready to step the case; None where the library has no such rule."""
        contender: Contender | None = getattr(import_module(f"{__name__}.{self.module}"), self.function)(case)
        return contender


# What takes the place of the one pass: torch's separate calls, in the two orders that are worth comparing.
CHAINS = [
    Peer("torch, check apart", "torch", "torch_chain", "check_apart"),
    Peer("torch, check by norm", "torch", "torch_chain", "check_by_norm"),
]

PEERS = {
    peer.name: peer
    for peer in (
        Peer("numpy", "numpy", "numpy_lines"),
        Peer("torch fused", "torch", "torch_steps", "fused"),
        Peer("torch foreach", "torch", "torch_steps", "foreach"),
        Peer("torch.compile", "torch", "torch_steps", "compiled", most_arrays=32),
        Peer("optax", "optax", "optax_jit"),
        Peer("numba", "numba", "numba_loops"),
        Peer("deepspeed", "deepspeed", "deepspeed_adam"),
    )
}
