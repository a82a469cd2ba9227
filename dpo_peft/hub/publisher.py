"""Publishes from the trainer, as `push_to_hub` and the `hub_...` options say; what can't be honored stops the run."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from ..artifacts.card import is_hub_id
from ..artifacts.recipe import public
from ..errors import OptionError, PublishError
from ..training.results import save_result
from .client import Hub
from .publishing import PublishResult, publish

if TYPE_CHECKING:
    from ..trainer import DPOTrainer

logger = logging.getLogger(__name__)

_OF_CARD = ("model_name", "dataset_name", "tags")  # arguments of `SaveResults`
# Arguments of `transformers.Trainer.push_to_hub` for the card, and what `publish` calls them.
_NAMES = {"licence": "license", "dataset": "datasets", "language": "languages", "finetuned_from": "base_model"}


class HubPublisher:
    """Publishes the run of a trainer, and notes the repository's full name as its `hub_model_id`.

    Reads of the trainer `args`, `model`, `state`, `control`, `callback_handler`, `hub_model_id`,
    `is_world_process_zero()`, `save_model()` and what `SaveResults` reads.
    """

    def __init__(self, trainer: "DPOTrainer"):
        self.trainer, self.args = trainer, trainer.args

    @property
    def repo_id(self) -> str:
        """The repository, without an owner until the token's is known."""
        return self.trainer.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name

    def check_before_training(self, token: str | None = None) -> None:
        """Asks, before anything is trained: is there a token, may it write, can others load the base? The repository
        itself is made when the first adapter is published.

        Raises:
            OptionError: no.
            PublishError: the Hub can't be reached.
        """
        if (strategy := self.args.hub_strategy.value) not in ("end", "every_save"):
            raise OptionError(
                f"hub_strategy={strategy!r} would publish optimizer states, which are pickles: set 'end' or "
                "'every_save'."
            )
        if self.args.hub_always_push:
            raise OptionError("hub_always_push=True has no effect: each push is waited for. Leave it out.")
        model = self.trainer.model
        base = model.peft_config[model.active_adapters[0]].base_model_name_or_path or ""
        if not is_hub_id(base):
            raise OptionError(
                f"push_to_hub=True: the base is a local model ({public(base, is_path=True) or 'made in code'}), which "
                "nobody else can load. Train without it, then `dpo-peft push FOLDER --base_model HUB_ID`."
            )
        if self.trainer.is_world_process_zero():
            hub = Hub(HfApi(token=token or self.args.hub_token), self.repo_id, repeat="start the run again.")
            self.trainer.hub_model_id = hub.repo_id = hub.own_repository()
            hub.check_base(base)

    def push(
        self, commit_message: str | None = "End of training", blocking: bool = True, **given: Any
    ) -> PublishResult | None:
        """Saves the adapter with its results into `output_dir` and publishes them. Returns None on all processes but
        the first.

        Args:
            commit_message: one line.
            blocking: must be True.
            **given: further arguments of `publish`, also under the names that transformers has for them; and as TRL
                has them `model_name`, `dataset_name` and `tags` of the card.

        Raises:
            OptionError: an argument, the adapter, the card or the token is wrong; nothing was published.
            PublishError: the Hub refused or could not be reached. What is saved stays.
        """
        if not blocking:
            raise OptionError("blocking=False is not available: publishing is waited for. Leave it out.")
        card = {name: given.pop(name, None) for name in _OF_CARD}
        options = {_NAMES.get(name, name): value for name, value in given.items() if value is not None}
        for name in ("datasets", "languages"):
            if isinstance(options.get(name), str):
                options[name] = [options[name]]
        allowed = set(publish.__kwdefaults__ or ()) - {"repeat", "licence"}
        if unknown := sorted(set(options) - allowed):
            known = ", ".join(sorted({*allowed, *_OF_CARD}))
            raise OptionError(f"{', '.join(unknown)}: not available here. Use {known}.")
        return self._save_and_publish(commit_message, card, **options)

    def push_from_checkpoint(self) -> None:
        """With `hub_strategy` "every_save", publishes the adapter as it is now. A failure doesn't stop the run."""
        if self.args.hub_strategy == "end":
            return
        step = self.trainer.state.global_step
        try:
            self._save_and_publish(f"Training in progress, step {step}", {})
        except (PublishError, OptionError) as error:
            logger.warning("The adapter of step %d was not published: %s", step, error)

    def _save_and_publish(
        self, commit_message: str | None, card: Mapping[str, Any], **given: Any
    ) -> PublishResult | None:
        trainer, folder = self.trainer, self.args.output_dir
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        save_result(trainer, folder, **card)
        return self.publish(folder, commit_message, **given)

    def publish(self, folder: str | Path, commit_message: str | None, **given: Any) -> PublishResult | None:
        """Publishes what is saved in `folder`, with the run's options where none are given. Raises as `push` does."""
        if not self.trainer.is_world_process_zero():
            return None
        args = self.args
        options = {"token": args.hub_token, "revision": args.hub_revision, "private": args.hub_private_repo, **given}
        if commit_message is not None:
            options["commit_message"] = commit_message
        again = f"the adapter is in {folder}: dpo-peft push {folder} --repo_id {self.repo_id}"
        result = publish(folder, self.repo_id, repeat=again, **options)
        self.trainer.hub_model_id = result.repo_id
        logger.info("Published: %s (%d files, %d unchanged).", result.url, len(result.uploaded), len(result.unchanged))
        return result
