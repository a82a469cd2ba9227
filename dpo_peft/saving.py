"""What a run leaves behind: the adapter, and beside it the figures, curves and model card."""

from pathlib import Path
from typing import Any

import torch

from .data import DataReport
from .referenced import ReferencedTrainer
from .results import save_results


class SavingTrainer(ReferencedTrainer):
    """Saves the policy's adapter with what people need to judge it."""

    data_reports: dict[str, DataReport]  # dataset name to what became of its rows

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The policy's adapter, without a frozen copy that the model holds as its reference."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder, selected_adapters=[self.policy_adapter])
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter and the tokenizer; called by a user also metrics.json, curves.png and the model card."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            self._save_results(output_dir or self.args.output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card with the run's figures into the output folder."""
        self._save_results(self.args.output_dir)

    def _save_results(self, folder: str) -> None:
        has_chat_template = self.processing_class.chat_template is not None
        history = self.state.log_history
        reference = self.described_reference()
        options = self.args.to_dict()
        save_results(folder, self.model, options, history, self.data_reports, has_chat_template, reference)
