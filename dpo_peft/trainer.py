"""Open this first: how preference training over LoRA on a frozen base comes together.

`DPOTrainer` is a `transformers.Trainer`. It prepares the data, builds the PEFT model, lets the model show how its
batches can be laid out, and then `compute_loss` is the whole method:

    score the batch with the adapter off (reference), score it with the adapter on (policy), take the loss.

The loss is any of the registry in `losses/`, or a mix. Constructor, option names, metric names and dataset formats are
those of `trl.DPOTrainer`.

Shape suffixes: I items of the loss (pairs, lists or single answers), B pairs, C completions (of a pair: chosen at
even, rejected at odd indices), N predicted tokens.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from datasets import DatasetDict, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from .artifacts.recipe import data_source
from .config import DPOConfig, objective_options
from .data import DataReport, prepare_dataset, rows_digest
from .data.collator import PREPARED_COLUMNS, KeepRows, KeyedCollator, PreferenceCollator
from .distributed import ShareCollator, check_launch, check_same, copy_from_first, world_size
from .errors import OptionError
from .forward import PackedBatch, Scores, completion_logps, plan_forward, recheck
from .model.adapter_source import TrainedWith, plain_fingerprint, quantization_options, record_training
from .model.loading import attach_adapter, disable_dropout, load_model, storage_report
from .objective import Scored, Totals, TrainingObjective
from .reference.adapter_off import Reference
from .reference.frozen_adapter import freeze_copy
from .training.accumulation import fields_of
from .training.arguments import (
    AnyDataset,
    check_arguments,
    check_best_metric,
    check_datasets,
    check_optimizer,
    check_tokenizer,
    check_vocabulary,
    load_tokenizer,
    name_of,
)
from .training.callbacks import StopWhenNonFinite
from .training.evaluation import EvaluatingTrainer
from .training.memory_budget import MemoryBudget, memory_limit, memory_model
from .training.metrics import length_metrics, mean_of, metric_names, preference_metrics

logger = logging.getLogger(__name__)


class LossOutput(NamedTuple):
    """What `compute_loss` gives beside the loss; detached."""

    losses_I: Tensor  # loss of every item of the micro-batch
    rewards_C: Tensor  # implicit rewards: beta * log(policy / reference), or what the objective has in its place
    scored: Scored  # what the losses read


class DPOTrainer(EvaluatingTrainer):
    """Trains a LoRA adapter on preferences, by DPO or another objective, against the same model without it.

    Args:
        model: a Hub id or folder (loaded in NF4 by default), a causal LM, a PeftModel, or an adapter's folder. A
            trained adapter goes on training, against itself as it came in unless `args.reference` says otherwise.
        ref_model: not accepted: the reference lives in `model`.
        args: the options; defaults to `DPOConfig(output_dir="<model>-DPO")`.
        data_collator: prepared rows (see `prepare_dataset`) to the fields of `PackedBatch`.
        train_dataset: preference rows in any of TRL's formats.
        eval_dataset: the same, or a dict of several by name.
        processing_class: the tokenizer; loaded from the model's name if None.
        compute_metrics: gets, for pairs, `predictions` (pairs, 2), the implicit rewards of chosen and rejected, and
            `label_ids` (pairs,), all zeros: the index of the better one. For lists and single answers, `predictions`
            (completions,) and `label_ids` (completions, 2): grade (higher is better) and dataset row.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: replaces the default NF4 configuration of a model given by name.
        peft_config: a LoraConfig; defaults to rank 16 on all linear layers.

    Raises:
        OptionError: an option that can't be honoured.
        DataError: rows that can't be used, with dataset, row, field and remedy.
        ReferenceMismatchError: the adapter was trained against another reference than this run would take.
    """

    _tag_names = ["dpo", "lora", "dpo-peft"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None,
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
        check_launch(args)
        check_datasets(args, train_dataset, eval_dataset)
        tokenizer = load_tokenizer(name, args) if processing_class is None else processing_class
        check_tokenizer(tokenizer)
        self.objective = TrainingObjective(args.loss_type, args.loss_weights, **objective_options(args))
        self._check_best_metric(args, eval_dataset, compute_metrics)

        self.model_name = "" if isinstance(model, PeftModel) else name
        self.data_sources = {"train": data_source(train_dataset), "eval": data_source(eval_dataset)}

        # Data comes before the model: a bad row is found in seconds, not after minutes of loading.
        self.data_reports: dict[str, DataReport] = {}
        train_dataset = self._prepare(train_dataset, tokenizer, args, "train")
        eval_dataset = self._prepare_eval(eval_dataset, tokenizer, args)

        set_seed(args.seed)  # the adapter's start is drawn at random
        model, self.reference = _build_model(
            model, args, tokenizer, quantization_config, peft_config, self.objective.needs_reference
        )
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
        self.add_callback(StopWhenNonFinite(self))
        self.policy_adapter = self.model.active_adapters[0]
        self._plan_batches(data_collator)
        if self.objective.needs_reference:
            self.set_up_reference()
        record_training(self.model, self.policy_adapter, self._trained_with())
        logger.warning("%s", storage_report(self.model, reference=self.reference.adapter))
        logger.warning("%s", self.forward_plan)

    def _check_best_metric(self, args: DPOConfig, eval_dataset: Any, compute_metrics: Any) -> None:
        if compute_metrics is None:  # which adds metrics of its own
            objective = self.objective
            tokens = args.ref_cache_tokens or objective.reads_reference_tokens or not args.caches_reference
            with_kl = objective.needs_reference and tokens
            check_best_metric(args, eval_dataset, metric_names(objective.kind, with_kl, objective.needs_mismatched))

    def _plan_batches(self, data_collator: Any) -> None:
        """The model is on its device now and can show how its batches are laid out."""
        args, tokenizer = self.args, self.processing_class
        copy_from_first(p for p in self.model.parameters() if p.requires_grad)
        if world_size() > 1:
            check_same("train_dataset", rows_digest(self.train_dataset))
        self.forward_plan = plan_forward(self.model, args.share_prompts, self._autocast_dtype, args.fused_layers)
        self.budget = self._plan_memory()
        pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.collate = data_collator or PreferenceCollator(self.forward_plan.shared, pad_token_id)
        if args.caches_reference:
            self.collate = KeyedCollator(self.collate)
        # Mismatched answers come from the whole optimizer batch, and a token budget packs all of it: its rows are laid
        # out when all are there.
        whole = self.objective.needs_mismatched or args.max_tokens_per_microbatch is not None
        self.data_collator = KeepRows() if whole else ShareCollator(self.collate)

    def _trained_with(self) -> TrainedWith:
        args, base = self.args, self.model.get_base_model()
        return TrainedWith(
            loss_type=self.objective.names,
            beta=args.beta,
            reward=self.objective.parts[0].reward,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            precision=str(self._autocast_dtype or "no").removeprefix("torch."),
            dtype=str(base.get_input_embeddings().weight.dtype).removeprefix("torch."),
            quantization=quantization_options(getattr(base.config, "quantization_config", None)),
            discount_gamma=args.discount_gamma,
            ld_alpha=args.ld_alpha,
            plain_fingerprint=plain_fingerprint(self.model),
        )

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

    def _plan_memory(self) -> MemoryBudget:
        args, fused = self.args, self.forward_plan.fused
        layers = args.checkpoint_layers if args.gradient_checkpointing else 0
        assert layers is not None
        for_fused = {
            "checkpoint_layers": args.gradient_checkpointing and layers != "auto",
            "activation_offloading": args.activation_offloading,
            "max_memory_gib": args.max_memory_gib is not None and args.max_tokens_per_microbatch != "auto",
        }
        if fused is None and (given := [name for name, on in for_fused.items() if on]):
            raise OptionError(
                f"{', '.join(given)}: for fused layers, and here the model's own run "
                f"({self.forward_plan.unfused or self.forward_plan.reason}). Leave it out."
            )
        if args.activation_offloading and args.device.type == "cpu":
            raise OptionError("activation_offloading has no effect on a CPU: leave it out.")
        stored = storage_report(self.model, reference=self.reference.adapter)
        element = (self._autocast_dtype or self.model.get_input_embeddings().weight.dtype).itemsize
        how = {
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "element": element,
            "fused": fused is not None,
            "packed": fused is not None and fused.attention == "packed",
            "offload": args.activation_offloading,
        }
        limit = memory_limit(
            args.device, args.max_memory_gib, stored.quantized + stored.unquantized + stored.trainable
        )
        passes = int(self.objective.needs_reference and not args.caches_reference)
        memory = memory_model(self.model, stored, **how)
        budget = MemoryBudget(memory, limit, layers, args.max_tokens_per_microbatch, passes)
        if fused is not None:
            fused.checkpointed, fused.offload = budget.checkpointed, args.activation_offloading
        return budget

    # ---- The method ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Totals | None = None,
    ) -> Any:
        """The loss of one micro-batch; with `return_outputs` also a `LossOutput`.

        Args:
            model: the PEFT model.
            inputs: the fields of a `PackedBatch`, on the model's device, from `get_batch_samples`.
            return_outputs: whether to return the loss per item too.
            num_items_in_batch: the `Totals` of the whole optimizer batch; those of this micro-batch if None.
        """
        coupled = inputs.get("coupled")
        batch = PackedBatch(**fields_of(inputs))
        totals = num_items_in_batch or self.objective.totals([inputs])
        ref = coupled.ref if coupled else self._reference(batch)
        policy = self._policy(batch)
        scored = self.objective.score(policy, ref, batch)
        if coupled:
            losses_I, loss = coupled.losses_I, coupled.loss(policy.token_logps_N, totals.items)
        else:
            losses_I = self.objective.losses(scored, totals)
            loss = losses_I.sum() / totals.items
        output = LossOutput(losses_I.detach(), self.objective.rewards(scored), scored)
        self._record(batch, output, policy, ref)
        return (loss, output) if return_outputs else loss

    def _policy(self, batch: PackedBatch) -> Scores:
        return completion_logps(self.model, batch, self.forward_plan.scorer, log_sum_sq=self.objective.log_sum_sq)

    def _record(self, batch: PackedBatch, output: LossOutput, policy: Scores, ref: Scores | None) -> None:
        metrics = preference_metrics(self.objective.kind, output.scored, output.rewards_C, policy, ref, batch)
        if self.model.training:
            self.step_finite.append((self.objective.rows(batch), torch.isfinite(output.losses_I)))
            self.metric_store.add("train", metrics)
        else:
            by_length = length_metrics(self.objective.kind, output.scored, output.rewards_C)
            self.metric_store.add("eval", {"loss": mean_of(output.losses_I), **metrics, **by_length})
            self.record_pairs(batch, output.scored, output.rewards_C)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `ReferencedTrainer.train`. What was added to the model since it was probed is heeded."""
        plan = recheck(self.forward_plan, self.model, self._autocast_dtype)
        if plan is not self.forward_plan:
            if self.args.fused_layers:
                raise OptionError(f"fused_layers=True, but by now {plan.unfused}: leave it out.")
            self.forward_plan = plan
            self.budget = self._plan_memory()
            logger.warning("%s", plan)
        return super().train(*args, **kwargs)

    # ---- Hooks of transformers.Trainer --------------------------------------------------------------------------

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision around both passes: they call the backbone, past the `forward` that accelerate wraps."""
        return self.accelerator.autocast()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Two forward passes and the backward pass that skips the frozen weights: 6 per weight and distinct token."""
        if "empty" in inputs:
            return 0
        return 6 * inputs["input_ids"].numel() * self._weights

    @cached_property
    def _weights(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

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
        self._signature_columns = PREPARED_COLUMNS

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
                data=self.objective.data,
                label_columns=self.objective.label_columns,
                discount_unit=args.discount_unit,
                single_best=self.objective.single_best,
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


def _build_model(
    model: Any,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    quantization_config: Any,
    peft_config: Any,
    needs_reference: bool,
) -> tuple[PeftModel, Reference]:
    name = model if isinstance(model, str) else None
    if isinstance(model, str):
        quantize = args.quantize_base is not False
        init_kwargs = args.model_init_kwargs
        assert not isinstance(init_kwargs, str)
        model = load_model(model, quantization_config, quantize, init_kwargs, args.trust_remote_code, args.device)
    check_vocabulary(model, tokenizer)
    continued = isinstance(model, PeftModel)
    model, reference = attach_adapter(model, peft_config, args.reference, needs_reference)
    if continued and reference.choice == "initial" and reference.adapter is not None:
        reference = replace(reference, source=name)  # where the adapter came from, so that it is found again
    if args.sync_ref_model and reference.adapter is None:
        reference = replace(reference, adapter=freeze_copy(model))
    if args.disable_dropout and (found := disable_dropout(model)):
        logger.warning("disable_dropout=True: turned off %s.", ", ".join(found))
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model, reference
