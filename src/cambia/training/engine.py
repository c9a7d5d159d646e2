"""The second layer of a run: how the model is decoded from learns between the steps of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cambia.decoding.exporting import PARAMS_JSON, write_beside
from cambia.decoding.learners import PolicyLearner
from cambia.errors import RewardError
from cambia.training.display import Display
from cambia.training.journal import Journal
from cambia.training.settings import Progress


class Engine:
    """Lets a decoding policy take a step every so many batches.

    Args:
        learner: the policy, and what it learns for.
        every: `engine_update_freq`, batches from one step of the policy to the next; 0: it takes none.
    """

    def __init__(self, learner: PolicyLearner, every: int):
        self.learner, self.every = learner, every

    def step(self, progress: Progress, journal: Journal, display: Display) -> int:
        """After a batch: learn, where it is time to; returns how many tokens' worth of training that was.

        Raises:
            RewardError: the reward is constant or not a number; the policy until then is kept in the run.
        """
        if not self.every or progress.step % self.every or self.learner.finished:
            return 0
        before = self.learner.processed
        try:
            update = self.learner.step()
        except RewardError as error:
            if not self.learner.updates:
                raise
            kept = self.learner.chosen.to_json(journal.run.folder / PARAMS_JSON)
            raise RewardError(f"{error}; what was learned until then is kept in {kept}") from None
        journal.decoded(progress, update)
        display.decoded(update)
        return (update.processed - before) // 3  # one way through the model is a third of a training step

    def write_beside(self, folder: Path) -> None:
        """The policy, beside the model in its folder."""
        write_beside(self.learner.chosen, folder)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.learner.load_state_dict(state)
