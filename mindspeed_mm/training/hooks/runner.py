"""Calls the hooks of a run in order, and collects their errors for all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.errors import MindSpeedMMError, TrainingError
from mindspeed_mm.files import plain_problem
from mindspeed_mm.log import get_logger
from mindspeed_mm.training.hooks.base import EvalEvent, Hook, Log, SaveEvent, StartEvent, StepEvent
from mindspeed_mm.training.rank_status import RankStatus
from mindspeed_mm.training.state import PACKED_BYTES, pack, unpack

logger = get_logger(__name__)


class HookRunner:
    """Runs the hooks of one rank. A hook that failed on this rank is not called again."""

    def __init__(self, hooks: Sequence[Hook], status: RankStatus) -> None:
        self._hooks, self._status = tuple(hooks), status
        self._active = list(hooks)

    def start(self, event: StartEvent) -> None:
        """Load the hooks' states from the checkpoint, then call `on_start`."""
        left = dict(event.state.hooks)
        for name, hook in by_name(self._hooks).items():
            if (state := left.pop(name, None)) is not None:
                self._guard(hook, partial(_load, state=state))
        if left:
            logger.info(
                f"the checkpoint contains the state of hooks that this run does not use: {', '.join(left)}"
            )
        self._call(lambda hook: hook.on_start(event))

    def step(self, event: StepEvent) -> None:
        """Call `on_step` after an iteration."""
        self._call(lambda hook: hook.on_step(event))

    def evaluate(self, event: EvalEvent) -> None:
        """Call `on_eval` when an evaluation is due."""
        self._call(lambda hook: hook.on_eval(event))

    def saved(self, event: SaveEvent) -> None:
        """Call `on_save` when a checkpoint is complete."""
        self._call(lambda hook: hook.on_save(event))

    def log(self, iteration: int) -> Log:
        """Return the function that hooks call to log numbers of `iteration`."""
        return partial(self._log, iteration)

    def close(self) -> None:
        """Call `close` at the end of the run."""
        for hook in self._hooks:
            hook.close()

    def states(self) -> dict[str, Any]:
        """Return the state of each hook that overrides `state_dict`. Raises a rank's error on all ranks."""
        keep = {n: h for n, h in by_name(self._hooks).items() if type(h).state_dict is not Hook.state_dict}
        if not keep:
            return {}
        return raise_on_all_ranks(lambda: _plain({name: hook.state_dict() for name, hook in keep.items()}))

    def _log(self, iteration: int, values: Mapping[str, float]) -> None:
        self._call(lambda hook: hook.on_metrics(iteration, values))

    def _call(self, call: Callable[[Hook], None]) -> None:
        for hook in tuple(self._active):
            self._guard(hook, call)

    def _guard(self, hook: Hook, call: Callable[[Hook], None]) -> None:
        try:
            call(hook)
        except MindSpeedMMError as error:
            if hook.alike:
                raise
            self._active.remove(hook)
            self._status.fail(error)


def _load(hook: Hook, state: dict[str, Any]) -> None:
    hook.load_state_dict(state)


def _plain(states: dict[str, Any]) -> dict[str, Any]:
    """Return `states`. Raises TrainingError for values that a checkpoint cannot store and restore."""
    for name, state in states.items():
        problem = plain_problem(state)
        if problem is None and unpack(pack(state), name) != state:
            problem = "a key is not a string"
        if problem is None and len(pack(state)) > PACKED_BYTES // len(states):
            problem = f"takes {len(pack(state))} bytes"
        if problem is not None:
            raise TrainingError(
                problem,
                where=f"state_dict of the hook {name}",
                expected=f"JSON values, in at most {PACKED_BYTES} bytes for all hooks together",
            )
    return states


def by_name(hooks: Sequence[Hook]) -> dict[str, Hook]:
    """Map the names of the hooks' states to the hooks. A second hook named `probe` becomes `probe#2`."""
    found: dict[str, Hook] = {}
    for hook in hooks:
        name = hook.name or type(hook).__name__
        same = sum(other.partition("#")[0] == name for other in found)
        found[f"{name}#{same + 1}" if same else name] = hook
    return found
