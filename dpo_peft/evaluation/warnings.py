"""Warns while a run is under way, of what `diagnostics.py` finds in its figures."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import DPOConfig
from ..data import DataReport
from ..distributed import rank
from ..objective import TrainingObjective
from .diagnostics import RunFacts, diagnose

logger = logging.getLogger(__name__)


class Warnings(TrainerCallback):
    """Looks at what has been logged, and warns of each trouble once a run (docs/diagnostics.md).

    Args:
        args: the options.
        objective: what is minimized.
        summaries: dataset name to what became of its rows.
        evaluated: metric prefixes of the evaluation datasets ("eval", "eval_<name>").

    Attributes:
        raised: `step`, `name` and `message` of this run's warnings, each name once.
    """

    def __init__(
        self,
        args: DPOConfig,
        objective: TrainingObjective,
        summaries: Mapping[str, DataReport],
        evaluated: Iterable[str],
    ):
        self._args, self._objective, self._summaries = args, objective, summaries
        self._evaluated = list(evaluated) if args.eval_strategy != "no" else []
        self.raised: list[dict[str, Any]] = []

    def facts(self, state: TrainerState) -> RunFacts:
        """Returns what is known of the run beside its log; of a stream more as it is read."""
        train = self._summaries["train"]
        return RunFacts(
            reward=self._objective.parts[0].reward,
            beta=1.0 if self._args.beta is None else self._args.beta,
            tokens=train.completion_tokens / train.completions if train.completions else None,
            held_out={name: self._summaries[name].kept_rows for name in self._evaluated},
            max_steps=state.max_steps,
        )

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Forgets an earlier run."""
        if state.global_step == 0:
            self.raised = []

    def on_log(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Warns of what is new."""
        raised = {warning["name"] for warning in self.raised}
        for finding in diagnose(state.log_history, self.facts(state)):
            if finding.name not in raised:
                self.raised.append(finding._asdict())
                if rank() == 0:
                    logger.warning("%s at step %d: %s", finding.name, finding.step, finding.message)

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Returns the warnings so far."""
        return {"warnings": self.raised}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Takes up a run's warnings."""
        self.raised = list(state.get("warnings", []))
