"""What a run leaves behind: the adapter, and beside it what the wings `artifacts` and `hub` make of the run."""

import copy
from pathlib import Path
from typing import Any

import torch

from ..data import DataReport
from ..errors import OptionError
from ..wings import wing
from .referenced import ReferencedTrainer


class SavingTrainer(ReferencedTrainer):
    """Saves the policy's adapter with what people need to judge it, and publishes it.

    Attributes:
        data_reports: dataset name to what became of its rows.
        data_sources: dataset name to where its rows came from.
        model_name: Hub id or folder that the trainer was given; empty for a model made in code.
        command_options: the options of `dpo-peft train` that are no part of `args`; None for a run from Python.
    """

    data_reports: dict[str, DataReport]
    data_sources: dict[str, tuple[list[str], str | None]]
    model_name: str
    command_options: dict[str, Any] | None = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the policy's adapter, without a frozen copy that the model holds as its reference."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder, selected_adapters=[self.policy_adapter])
        self.processing_class.save_pretrained(folder)
        args = copy.copy(self.args)
        args.hub_token = None  # a pickle is no place for it
        torch.save(args, folder / "training_args.bin")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter and the tokenizer. Called by a user also metrics.json, recipe.yaml, curves.png and the
        model card; and with `push_to_hub` all of it is published.

        Raises:
            PublishError: publishing failed. What is saved stays.
        """
        super().save_model(output_dir, _internal_call=True)
        if not _internal_call:
            self._save_results(output_dir or self.args.output_dir)
            if self.args.push_to_hub:
                self._publisher().publish(output_dir or self.args.output_dir, "Model save")

    def _save_results(self, folder: str) -> None:
        if self.args.should_save and (artifacts := wing("artifacts")) is not None:
            artifacts.SaveResults(self).save(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card with the run's figures into the output folder."""
        self._save_results(self.args.output_dir)

    # ---- The Hub ---------------------------------------------------------------------------------------------------

    def _publisher(self) -> Any:
        if (hub := wing("hub")) is None:
            raise OptionError("push_to_hub: this copy of the package has no dpo_peft/hub. Leave it out.")
        return hub.HubPublisher(self)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """See `HubPublisher.check_before_training`."""
        self._publisher().check_before_training(token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **given: Any,
    ) -> Any:
        """Saves the adapter with its results and publishes them, see `HubPublisher.push`."""
        return self._publisher().push(commit_message, blocking, token=token, revision=revision, **given)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._publisher().push_from_checkpoint()

    def _finish_current_push(self) -> None:
        """Each push has been waited for."""
