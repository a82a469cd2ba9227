"""Open this first: how DPO over LoRA on a frozen base comes together.

`DPOTrainer` is a `transformers.Trainer`. It prepares the data, builds the PEFT model, lets the model show how its
batches can be laid out, and then `compute_loss` is the whole method:

    score the batch with the adapter off (reference), score it with the adapter on (policy), take the loss.

Constructor, option names, metric names and dataset formats are those of `trl.DPOTrainer`.

Shape suffixes: B pairs, C completions (chosen at even, rejected at odd indices), N completion tokens.
"""

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from datasets import DatasetDict, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from .arguments import (
    AnyDataset,
    check_arguments,
    check_datasets,
    check_optimizer,
    check_tokenizer,
    check_vocabulary,
    load_tokenizer,
    name_of,
)
from .config import DPOConfig
from .data import DataReport, prepare_dataset
from .data.batch import PreferenceCollator
from .errors import NonFiniteError
from .forward import PackedBatch, Scores, completion_logps, plan_forward
from .losses import REGISTRY, PairLoss
from .metrics import MetricStore, mean_of, pair_metrics
from .modeling import attach_adapter, disable_dropout, load_base, storage_report
from .reference import check_start, reference_logps
from .results import save_results

logger = logging.getLogger(__name__)


class DPOTrainer(Trainer):
    """Trains a LoRA adapter by Direct Preference Optimization against the same model without it.

    Args:
        model: a Hub id or folder (loaded in NF4 by default), a causal LM, or a PeftModel with an untrained adapter.
        ref_model: not accepted: the reference is `model` with the adapter off.
        args: the options; defaults to `DPOConfig(output_dir="<model>-DPO")`.
        data_collator: prepared rows (`prompt_ids`, `completion_ids`, `row`) to the fields of `PackedBatch`.
        train_dataset: preference rows in any of TRL's formats.
        eval_dataset: the same, or a dict of several by name.
        processing_class: the tokenizer; loaded from the model's name if None.
        compute_metrics: gets `predictions` (pairs, 2), the implicit rewards of chosen and rejected, and `label_ids`
            (pairs,), all zeros: the index of the better one.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: replaces the default NF4 configuration of a model given by name.
        peft_config: a LoraConfig; defaults to rank 16 on all linear layers.

    Raises:
        OptionError: an option that can't be honoured.
        DataError: rows that can't be used, with dataset, row, field and remedy.
    """

    _tag_names = ["dpo", "lora", "dpo-peft"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        name = name_of(model)
        args = DPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-DPO") if args is None else args
        check_arguments(model, ref_model, args, quantization_config)
        check_datasets(args, train_dataset, eval_dataset)
        tokenizer = load_tokenizer(name, args) if processing_class is None else processing_class
        check_tokenizer(tokenizer)

        # Data comes before the model: a bad row is found in seconds, not after minutes of loading.
        self.data_reports: dict[str, DataReport] = {}
        train_dataset = self._prepare(train_dataset, tokenizer, args, "train")
        eval_dataset = self._prepare_eval(eval_dataset, tokenizer, args)

        set_seed(args.seed)  # the adapter's start is drawn at random
        model = _build_model(model, args, tokenizer, quantization_config, peft_config)

        self.objective = REGISTRY[args.loss_type[0]]
        self.loss_options = {name: getattr(args, name) for name in self.objective.options}
        self.metric_store = MetricStore()
        self._start_checked = False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PreferenceCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # compute_loss divides by the samples of the whole optimizer batch: micro-batches don't change the step.
        self.model_accepts_loss_kwargs = True
        check_optimizer(self.optimizer, self.model)
        self.model.add_model_tags(self._tag_names)
        self.add_callback(_StopWhenNonFinite(self))
        self._step_finite: list[tuple[Tensor, Tensor]] = []  # rows and whether their loss is finite, per micro-batch

        # The model is on its device now and can show how its batches are laid out.
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.forward_plan = plan_forward(self.model, args.share_prompts, dtype)
        if data_collator is None:
            pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
            self.data_collator = PreferenceCollator(self.forward_plan.shared, pad_token_id)
        logger.warning("%s", storage_report(self.model))
        logger.warning("%s", self.forward_plan)

    # ---- The method ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch; with `return_outputs` also the `PairLoss`.

        Args:
            model: the PEFT model.
            inputs: the fields of a `PackedBatch`, on the model's device.
            return_outputs: whether to return the loss per pair too.
            num_items_in_batch: pairs in the whole optimizer batch; those of this micro-batch if None.
        """
        batch = PackedBatch(**inputs)
        backend = self.forward_plan.backend
        ref = reference_logps(self.model, batch, backend)
        policy = completion_logps(self.model, batch, backend)
        pair_loss = self.objective.loss(*_pairs(policy.logps_C), *_pairs(ref.logps_C), **self.loss_options)
        loss = pair_loss.losses_B.sum() / (num_items_in_batch or batch.num_samples)
        self._record(batch, pair_loss, policy, ref)
        return (loss, pair_loss) if return_outputs else loss

    def _record(self, batch: PackedBatch, pair_loss: PairLoss, policy: Scores, ref: Scores) -> None:
        metrics = pair_metrics(pair_loss, policy.logps_C, policy.token_logps_N, ref.token_logps_N, batch.completion_of)
        if self.model.training:
            self._step_finite.append((batch.rows, torch.isfinite(pair_loss.losses_B.detach())))
            self.metric_store.add("train", metrics)
        else:
            self.metric_store.add("eval", {"loss": mean_of(pair_loss.losses_B), **metrics})

    # ---- Hooks of transformers.Trainer --------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Check that policy and reference start equal, then train (see `transformers.Trainer.train`).

        Raises:
            ReferenceMismatchError: they don't, so the reference would not be the model that training starts from.
            NonFiniteError: a loss or gradient became NaN or infinite; the optimizer has not stepped on it.
        """
        if not self._start_checked:
            self._check_start()
            self._start_checked = True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision around both passes: they call the backbone, past the `forward` that accelerate wraps."""
        return self.accelerator.autocast()

    def _check_start(self, samples: int = 4) -> None:
        rows = list(itertools.islice(self.train_dataset, samples))
        parts = [rows, *([row] for row in rows)]
        batches = [PackedBatch(**self.data_collator(part)).to(self.args.device) for part in parts]
        self.model.train(self.args.disable_dropout)
        with self.compute_loss_context_manager():
            check_start(self.model, batches, self.forward_plan.backend)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, and the number of their samples."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["rows"]) for batch in batches)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One evaluation batch: loss, implicit rewards (B, 2) and zeros (B,)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, pairs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        rewards_B2 = torch.stack([pairs.chosen_rewards_B, pairs.rejected_rewards_B], dim=1)
        return loss, rewards_B2, torch.zeros_like(rewards_B2[:, 0], dtype=torch.long)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`, with the pair metrics as means over all pairs of the dataset."""
        self.metric_store.pop("eval")
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        metrics = self.metric_store.pop("eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pair metrics since the last log to a training log."""
        if "loss" in logs:
            logs = {**logs, **self.metric_store.pop("train")}
        super().log(logs, start_time)

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
        save_results(folder, self.model, self.args.to_dict(), history, self.data_reports, has_chat_template)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Two forward passes and the backward pass that skips the frozen weights: 6 per weight and distinct token."""
        return 6 * inputs["input_ids"].numel() * self.model.num_parameters(exclude_embeddings=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `transformers.Trainer`; a dataset given to `evaluate` is prepared as those of the constructor are."""
        return super().get_eval_dataloader(self._prepare_given(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As in `transformers.Trainer`, preparing the dataset given to `predict`."""
        return super().get_test_dataloader(self._prepare_given(test_dataset, "test"))

    def _prepare_given(self, dataset: Any, name: str) -> Any:
        known = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if dataset is None or isinstance(dataset, str) or any(dataset is one for one in [self.train_dataset, *known]):
            return dataset
        return self._prepare(dataset, self.processing_class, self.args, name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "completion_ids", "row"]

    # ---- Data ---------------------------------------------------------------------------------------------------

    def _prepare(self, dataset: Any, tokenizer: Any, args: DPOConfig, name: str) -> Any:
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            prepared, report = prepare_dataset(
                dataset,
                tokenizer,
                name=name,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                num_proc=args.dataset_num_proc,
                on_unusable=args.on_unusable,
                max_unusable_share=args.max_unusable_share,
            )
        self.data_reports[name] = report
        logger.warning("%s", report)
        return prepared

    def _prepare_eval(self, dataset: Any, tokenizer: Any, args: DPOConfig) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self._prepare(part, tokenizer, args, f"eval_{name}") for name, part in dataset.items()}
        return self._prepare(dataset, tokenizer, args, "eval")


class _StopWhenNonFinite(TrainerCallback):
    """Before every optimizer step: one look at the losses and gradients of its micro-batches."""

    def __init__(self, trainer: DPOTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if not trainer._step_finite:
            return
        rows, finite = map(torch.cat, zip(*trainer._step_finite, strict=True))
        trainer._step_finite = []
        all_finite = finite.all()
        # Under fp16 the gradient scaler expects overflows and skips such steps by itself.
        if not args.fp16:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            all_finite &= torch.isfinite(torch.nn.utils.get_total_norm(grads))
        if not all_finite:
            bad = rows if finite.all() else rows[~finite]
            what = "gradient" if finite.all() else "loss"
            raise NonFiniteError(
                f"Step {state.global_step + 1}: the {what} is not finite, on training rows "
                f"{', '.join(map(str, bad.tolist()))}. The optimizer has not stepped; the last checkpoint is intact. "
                "Look at these rows, lower learning_rate, or use bf16 instead of fp16."
            )


def _build_model(
    model: Any, args: DPOConfig, tokenizer: PreTrainedTokenizerBase, quantization_config: Any, peft_config: Any
) -> PeftModel:
    if isinstance(model, str):
        quantize = args.quantize_base is not False
        init_kwargs = args.model_init_kwargs
        assert not isinstance(init_kwargs, str)
        model = load_base(model, quantization_config, quantize, init_kwargs, args.trust_remote_code, args.device)
    check_vocabulary(model, tokenizer)
    model = attach_adapter(model, peft_config)
    if args.disable_dropout and (found := disable_dropout(model)):
        logger.warning("disable_dropout=True: turned off %s.", ", ".join(found))
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _pairs(x_C: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) to the values of the chosen and of the rejected completions, (B,) each."""
    x_B2 = x_C.view(-1, 2)
    return x_B2[:, 0], x_B2[:, 1]
