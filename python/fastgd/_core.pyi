from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

# True, or with stats or skip_nonfinite: skipped, nonfinite, clip_factor, and by parameter the sums of squares of
# gradients, updates and parameters. False: nothing has changed, Python is to look closer.
_Result: TypeAlias = bool | tuple[bool, int, float, list[float], list[float], list[float]]

RULES: dict[str, dict[str, Any]]

def step(
    rule: str,
    rows: Sequence[tuple[Any, ...]],
    row_of: Sequence[int] | None,
    params: Any,
    grads: Any,
    states: tuple[Any, ...],
    checked: bool,
    one_pass: tuple[Any, ...] | None = None,
) -> _Result: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def stream(read: Any, writes: Sequence[Any]) -> None: ...

class Prepared:
    def __init__(self, rule: str) -> None: ...
    def add(self, group: int, params: Sequence[Any]) -> None: ...
    def step(
        self,
        grads: Any,
        coefficients: Callable[[int, int], tuple[Any, ...]],
        initialise: Callable[[int, int], tuple[Any, ...]],
        checked: bool,
        one_pass: tuple[Any, ...] | None = None,
    ) -> _Result: ...
    @property
    def steps(self) -> list[int]: ...
    def load(self, steps: Sequence[int]) -> None: ...
