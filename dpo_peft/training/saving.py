"""What a run leaves behind: the adapter, and beside it the figures, curves, recipe and model card; and its way to the
Hub."""

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from ..artifacts.card import is_hub_id
from ..artifacts.recipe import public
from ..artifacts.run_files import SavedRun, save_results
from ..data import DataReport
from ..errors import OptionError, PublishError
from ..hub.client import Hub
from ..hub.publishing import PublishResult, check_base, own_repository, publish
from ..model.adapter_source import read_training
from ..model.loading import is_adapter
from .referenced import ReferencedTrainer

logger = logging.getLogger(__name__)

# Written into output_dir as the run goes on; they go with the adapter wherever it is saved.
_BESIDE = ("samples.jsonl", "eval_examples.jsonl")
# Arguments of `transformers.Trainer.push_to_hub` for the card, and what they are called here.
_CARD_ARGUMENTS = {
    "license": "licence",
    "dataset": "datasets",
    "language": "languages",
    "finetuned_from": "base_model",
}


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
        """The policy's adapter, without a frozen copy that the model holds as its reference."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder, selected_adapters=[self.policy_adapter])
        self.processing_class.save_pretrained(folder)
        args = copy.copy(self.args)
        args.hub_token = None  # a pickle is no place for it
        torch.save(args, folder / "training_args.bin")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter and the tokenizer. Called by a user also metrics.json, recipe.yaml, curves.png and the
        model card; and with `push_to_hub` all of it is published.

        Raises:
            PublishError: publishing failed. What is saved stays.
        """
        super().save_model(output_dir, _internal_call=True)
        if _internal_call:
            return
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            self._save_results(folder)
        if self.args.push_to_hub:
            self._publish(folder, commit_message="Model save")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card with the run's figures into the output folder."""
        self._save_results(self.args.output_dir)

    def _save_results(self, folder: str | Path, **card: Any) -> None:
        if Path(folder).resolve() != Path(self.args.output_dir).resolve():
            for name in _BESIDE:
                if (path := Path(self.args.output_dir, name)).is_file():
                    shutil.copyfile(path, Path(folder, name))
        trained = read_training(self.model.peft_config[self.policy_adapter])
        assert trained is not None  # the constructor records it
        run = SavedRun(
            model=self.model,
            args=self.args,
            trained=trained,
            reference=self._public_reference(),
            log_history=self.state.log_history,
            data_reports=self.data_reports,
            data_sources=self.data_sources,
            command_options=self.command_options or {},
            model_name=self.model_name,
            continued=bool(self.model_name) and is_adapter(self.model_name),
            has_chat_template=self.processing_class.chat_template is not None,
            warnings=getattr(self, "warnings_raised", ()),
            card=card,
        )
        save_results(folder, run)

    def _public_reference(self) -> str:
        """What the policy was compared with; a folder by the last part of its path."""
        source = self.reference.source
        described = self.described_reference()
        return described.replace(source, public(source, is_path=True)) if source else described

    # ---- The Hub ---------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """With `push_to_hub`, before anything is trained: is there a token, may it write, can others load the base?
        The repository itself is made when the first adapter is published.

        Raises:
            OptionError: no.
            PublishError: the Hub can't be reached.
        """
        args = self.args
        strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
        if strategy not in ("end", "every_save"):
            raise OptionError(
                f"hub_strategy={strategy!r} would publish optimizer states, which are pickles: set 'end' or "
                "'every_save'."
            )
        if args.hub_always_push:
            raise OptionError("hub_always_push=True has no effect: each push is waited for. Leave it out.")
        base = self.model.peft_config[self.model.active_adapters[0]].base_model_name_or_path or ""
        if not is_hub_id(base):
            raise OptionError(
                f"push_to_hub=True: the base is a local model ({public(base, is_path=True) or 'made in code'}), which "
                "nobody else can load. Train without it, then `dpo-peft push FOLDER --base_model HUB_ID`."
            )
        self.push_in_progress = None
        if not self.is_world_process_zero():
            return
        hub = Hub(HfApi(token=token or args.hub_token), self._repository(), repeat="start the run again.")
        self.hub_model_id = hub.repo_id = own_repository(hub)
        check_base(hub, base)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> PublishResult | None:
        """Save the adapter with its results into `output_dir` and publish them, see `publish.publish`.

        Args:
            commit_message: one line.
            blocking: must be True.
            token, revision, private: replace `hub_token`, `hub_revision`, `hub_private_repo`.
            **kwargs: `license`, `language`, `dataset` of the card; `finetuned_from` (or `base_model`), the base's Hub
                id; further arguments of `publish.publish`.

        Returns:
            What became of it; None on all processes but the first.

        Raises:
            OptionError: an argument, the adapter, the card or the token is wrong; nothing was published.
            PublishError: the Hub refused or could not be reached. What is saved stays.
        """
        if not blocking:
            raise OptionError("blocking=False is not available: publishing is waited for. Leave it out.")
        given = {_CARD_ARGUMENTS.get(name, name): value for name, value in kwargs.items() if value is not None}
        for name in ("datasets", "languages"):
            if isinstance(given.get(name), str):
                given[name] = [given[name]]
        allowed = set(publish.__kwdefaults__ or ()) - {"repeat"}
        if unknown := sorted(set(given) - allowed):
            raise OptionError(f"{', '.join(unknown)}: not available here. Use {', '.join(sorted(allowed))}.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if self.args.should_save:
            self._save_results(self.args.output_dir)
        given |= {"token": token, "revision": revision, "private": private}
        return self._publish(self.args.output_dir, commit_message=commit_message, **given)

    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name

    def _publish(self, folder: str | Path, **given: Any) -> PublishResult | None:
        if not self.is_world_process_zero():
            return None
        args = self.args
        defaults = {"token": args.hub_token, "revision": args.hub_revision, "private": args.hub_private_repo}
        options = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        again = f"the adapter is in {folder}: dpo-peft push {folder} --repo_id {self._repository()}"
        result = publish(folder, self._repository(), repeat=again, **options)
        self.hub_model_id = result.repo_id
        logger.warning(
            "Published: %s (%d files, %d unchanged).", result.url, len(result.uploaded), len(result.unchanged)
        )
        return result

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """With `hub_strategy` "every_save", publish the adapter as it is now. A failure doesn't stop the training."""
        if str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy)) == "end":
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if self.args.should_save:
            self._save_results(self.args.output_dir)
        try:
            self._publish(self.args.output_dir, commit_message=f"Training in progress, step {self.state.global_step}")
        except (PublishError, OptionError) as error:
            logger.warning("The adapter of step %d was not published: %s", self.state.global_step, error)

    def _finish_current_push(self) -> None:
        """Each push has been waited for."""
