"""Open this first: how preference training over LoRA on a frozen base comes together.

`DPOTrainer` is a `transformers.Trainer`. It prepares the data, builds the PEFT model, lets the model show how its
batches can be laid out, and then `compute_loss` is the whole method:

    score the batch with the adapter off (reference), score it with the adapter on (policy), take the loss.

The loss is any of the registry in `losses/`, or a mix. Constructor, option names, metric names and dataset formats are
those of `trl.DPOTrainer`.

Shape suffixes: I items of the loss (pairs, lists or single completions), B pairs, C completions (of a pair: chosen at
even, rejected at odd indices), N predicted tokens.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback

from .config import DPOConfig
from .data.collator import PREPARED_COLUMNS, PreferenceCollator
from .distributed import check_same, copy_from_first, unshard, wait_for_all, world_size
from .errors import OptionError
from .forward import PackedBatch, Scores, completion_logps, plan_forward, recheck
from .model.loading import storage_report
from .model.placement import placement_of
from .model.training_record import record_training
from .objective import LossOutput, Totals
from .reference.policy import ReferencePolicy
from .training.accumulation import OptimizerStep
from .training.ahead import rows_ahead
from .training.arguments import AnyDataset, autocast_dtype, check_callbacks, check_constructor, check_optimizer
from .training.building import NoEvaluation, Preparation, build_model, collators, router_coef, trained_with
from .training.callbacks import CountStream, EarlyStop, StopOnNonFinite, StopOnSignal, SyncReference, check_reported
from .training.memory_budget import MemoryBudget, plan_memory
from .training.metrics import MetricStore
from .training.results import checkpoints_kept, load_best, save_result
from .training.resume import RunState, place_in_data, save_adapter, trajectory
from .training.throughput import Throughput
from .wings import required, wing

logger = logging.getLogger(__name__)


class DPOTrainer(Trainer):
    """Trains a LoRA adapter on preferences, by DPO or another objective, against the same model without it.

    Args:
        model: a Hub id or folder (loaded in NF4 by default), a causal LM, a PeftModel, or an adapter's folder. A
            trained adapter is trained on, against itself as it came in unless `args.reference` says otherwise.
        ref_model: not accepted: the reference lives in `model`.
        args: the options; defaults to `DPOConfig(output_dir="<model>-DPO")`.
        data_collator: prepared rows (see `prepare_dataset`) to the fields of `PackedBatch`.
        train_dataset: preference rows in any of TRL's formats.
        eval_dataset: the same, or a dict of several by name.
        processing_class: the tokenizer, or the processor of images and text; loaded from the model's name if None.
        compute_metrics: gets, for pairs, `predictions` (pairs, 2), the implicit rewards of chosen and rejected, and
            `label_ids` (pairs,), all zeros: the index of the better one. For lists and single completions,
            `predictions` (completions,) and `label_ids` (completions, 2): grade (higher is better) and dataset row.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: replaces the default NF4 configuration of a model given by name.
        peft_config: a LoraConfig; defaults to rank 16 on all linear layers.

    Raises:
        OptionError: an option that can't be honored.
        DataError: rows that can't be used, with dataset, row, field and remedy.
        ReferenceMismatchError: the adapter was trained against another reference than this run would take.
    """

    _tag_names = ["dpo", "lora", "dpo-peft", "trl"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        given = model, ref_model, args, train_dataset, eval_dataset, processing_class, quantization_config
        name, args, self.tokenizer, self.images, self.objective = check_constructor(
            *given, own_metrics=compute_metrics is not None
        )
        self.model_name = "" if isinstance(model, PeftModel) else name
        self.command_options: dict[str, Any] | None = None
        # Data comes before the model: a bad row is found in seconds, not after minutes of loading.
        self.prepare = Preparation(args, self.objective, self.tokenizer, self.images, (model, peft_config))
        self.data_reports, self.data_sources = self.prepare.reports, self.prepare.sources
        train_dataset, eval_dataset = self.prepare.training(train_dataset), self.prepare.evaluation(eval_dataset)
        compared = self.objective.needs_reference
        model, held, as_given = build_model(model, args, quantization_config, peft_config, compared, self.images)
        self.prepare.fit(model, data_collator)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PreferenceCollator(images=self.images),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.images.processor if self.images else self.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Accelerate would wrap it, send all of it to the other processes, and move layers that are elsewhere just now.
        self.model._is_accelerate_prepared = world_size() > 1 or placement_of(self.model) is not None
        self.model_accepts_loss_kwargs = True  # the loss is divided by the samples of the whole optimizer batch
        self._signature_columns = PREPARED_COLUMNS
        self.throughput = Throughput(self.model, self.objective, args)
        check_optimizer(self.optimizer, self.model)
        self.model.add_model_tags([*self._tag_names, *{"kto", "orpo", "cpo"}.intersection(args.loss_type)])
        self.policy_adapter = self.model.active_adapters[0]
        copy_from_first(self.model.parameters())
        check_same("train_dataset", self.prepare.told_by)
        # The model is on its device now, and shows by a probe how its batches can be laid out.
        dtype, tiny = autocast_dtype(args), self.images.probe_samples() if self.images else []
        plan = plan_forward(self.model, args.share_prompts, dtype, args.fused_layers, tiny).fp8(args.fp8_products)
        self.forward_plan, objective = plan, self.objective
        self.reference = ReferencePolicy(self.model, held, self.policy_adapter, args, plan, objective)
        self.reference.lockstep = placement_of(self.model) is not None or plan.shares_work
        self._build_parts(data_collator)
        trained = partial(trained_with, self.model, args, self.objective, as_given, self.prepare.as_chat)
        self._record = lambda: record_training(self.model, self.policy_adapter, trained())
        self._record()
        logger.info("%s\n%s", storage_report(self.model, reference=self.reference.adapter), self.forward_plan)

    def _build_parts(self, data_collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None) -> None:
        args, model, tokenizer, images = self.args, self.model, self.tokenizer, self.images
        self.beta, self.loss_types, self.loss_weights = args.beta, args.loss_type, self.objective.weights
        self.router_aux_loss_coef = self.objective.router_coef = router_coef(model, args)
        self.ref_model, self.aux_loss_enabled = None, self.router_aux_loss_coef > 0  # TRL's scripts read these
        collate = data_collator or PreferenceCollator(self.forward_plan.shared, tokenizer.pad_token_id or 0, images)
        self.collate, self.data_collator = collators(args, self.objective, collate, images)
        self.metric_store, autocast = MetricStore(), self.compute_loss_context_manager
        parts = self.objective, self._plan_memory(), self.metric_store, self.collate
        policy, reference = (lambda batch: self.policy_logps(batch)), self.reference.logps
        self.step = OptimizerStep(model, args, *parts, policy, reference, autocast)
        found = required("evaluation", "sample_prompts") if args.sample_prompts else wing("evaluation")
        evaluation, callbacks = NoEvaluation if found is None else found.Evaluation, self.callback_handler.callbacks
        shown = self.objective, self.prepare, self.throughput
        self.evaluation = evaluation(model, tokenizer, args, *shown, autocast, callbacks)
        self.signal, watching = StopOnSignal(), [*EarlyStop.from_options(args), *self.evaluation.parts]
        self.run_state = RunState(args, self.metric_store, [self.step, self.reference, *watching], self.trajectory)
        counting = [CountStream(self.prepare.count)] * isinstance(self.train_dataset, IterableDataset)
        for callback in (self.signal, *watching, StopOnNonFinite(self.step), self.run_state.best, *counting):
            self.add_callback(callback)
        if args.sync_ref_model:
            self.add_callback(SyncReference(self.reference, args.ref_model_mixup_alpha, args.ref_model_sync_steps))

    def _plan_memory(self) -> MemoryBudget:
        of_reference = self.reference.adapter, self.objective.needs_reference
        return plan_memory(self.model, self.args, self.forward_plan, *of_reference)

    # ---- The method ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Totals | None = None,
    ) -> Any:
        """Returns the loss of one micro-batch; with `return_outputs` also a `LossOutput`.

        Args:
            model: the PEFT model.
            inputs: the fields of a `PackedBatch`, on the model's device, from `get_batch_samples`.
            num_items_in_batch: the totals of the whole optimizer batch; those of this micro-batch if None.
        """
        coupled = inputs.get("coupled")
        batch = PackedBatch(**{name: value for name, value in inputs.items() if name != "coupled"})
        totals = num_items_in_batch or self.objective.kind.totals([inputs])
        ref, policy = self.reference.beside_policy(batch, coupled, self.policy_logps, **self.objective.reads)
        loss, output = self.objective.loss(policy, ref, batch, totals, coupled)
        self.record(batch, output, policy, ref)
        return (loss, output) if return_outputs else loss

    def policy_logps(self, batch: PackedBatch) -> Scores:
        """Returns the log-probs of a batch under the policy."""
        return completion_logps(self.model, batch, self.forward_plan.scorer, **self.objective.reads)

    def record(self, batch: PackedBatch, output: LossOutput, policy: Scores, ref: Scores | None) -> None:
        """Adds a micro-batch's metrics to those of the log or of the evaluation under way."""
        held_out = not self.model.training
        self.metric_store.record(self.objective.kind, output, policy, ref, batch, held_out)
        if not held_out:
            self.step.finite.append((batch, torch.isfinite(output.losses_I)))
        elif self.objective.kind.paired:
            self.evaluation.add(batch, output)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, or resumes an interrupted run (see `transformers.Trainer.train`).

        On SIGTERM or Ctrl-C the step is finished and saved; a second signal ends the process at once.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True for the newest whole one in `output_dir`; "latest" for
                the same, or a start from scratch if there is none yet. `args.resume_from_checkpoint` if None.

        Raises:
            CheckpointError: the checkpoint is not whole, or one could not be written.
            OptionError: an option differs from that in the optimizer's state; or `output_dir` is another run's.
            ReferenceMismatchError: policy and reference differ at the start, or the checkpoint has another reference.
            NonFiniteError: a loss or gradient became NaN or infinite; the optimizer has not stepped on it.
            TrainingInterrupted: after a signal; a `SystemExit` with the signal's exit status.
        """
        with self.run_state.writing():
            folder = self.run_state.find(resume_from_checkpoint)
            self._prepare_run()
            if folder is not None:
                if self.reference.restore(Path(folder)):
                    self._record()
                self.reference.check_resumable(Path(folder))
                self.run_state.compare(Path(folder), self.aux_loss_enabled)
            with self.step.running(), self.signal.listening():
                output = super().train(folder, *args, **kwargs)
            if self.signal.agree():
                if self.run_state.saved_step != self.state.global_step:  # it came after the last step
                    self._save_checkpoint(self.model, None)
                self.signal.leave(self.state.global_step, resumable=not self.args.save_only_model)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _prepare_run(self) -> None:
        check_callbacks(self.callback_handler.callbacks)
        # What was added to the model since it was probed is heeded.
        plan = recheck(self.forward_plan, self.model, autocast_dtype(self.args))
        if plan is not self.forward_plan:
            if self.args.fused_layers:
                raise OptionError(f"fused_layers=True, but by now {plan.unfused}: leave it out.")
            self.forward_plan = self.reference.plan = plan
            self.step.budget = self._plan_memory()
            logger.warning("%s", plan)
        with self.compute_loss_context_manager():
            self.reference.check_start(list(itertools.islice(self.train_dataset, 4)), self.collate)
            if self.args.precompute_ref_log_probs:
                self.reference.precompute(rows_ahead(self, self.prepare.evaluated, self.step), self.collate)
        self.throughput.begin()
        wait_for_all()

    def hyperparameter_search(self, *args: object, **kwargs: object) -> Any:
        """Is refused: transformers would train each trial on from the adapter of the one before."""
        raise OptionError("hyperparameter_search is not available: make a DPOTrainer for each trial.")

    def trajectory(self) -> dict[str, Any]:
        """Returns options, the adapter's shape and the rows: what a resumed run should share with the interrupted."""
        adapter = self.model.peft_config[self.policy_adapter]
        return trajectory(self.args, adapter, self.prepare.told_by, self.reference.base_fingerprint)

    @property
    def warnings_raised(self) -> list[dict[str, Any]]:
        """Returns `step`, `name` and `message` of this run's warnings (docs/diagnostics.md), each name once."""
        return self.evaluation.warnings_raised

    # ---- Hooks of transformers.Trainer ---------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Returns the micro-batches of one optimizer step, and its `Totals`."""
        entries, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self.step.begin(entries, num_batches) if entries else (entries, None)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Runs forward and backward of one micro-batch. Returns this process's part of the loss, detached."""
        self.throughput.count(inputs)
        backward = super().training_step
        return self.step.run(inputs, lambda part, totals: backward(model, part, totals))

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision around both passes: they call the backbone itself."""
        return self.accelerator.autocast()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self.step.clip_grad_norm(self.accelerator)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Counts two forward passes, and the backward pass that skips the frozen weights: 6 per weight and token."""
        return 6 * inputs["input_ids"].numel() * self.throughput.parameters

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        return place_in_data(self, super()._init_training_state(*args), args[3])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers looks whether the run is over after a step: one that was killed at its very end, or stopped
        # early before it was killed, would take one more.
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self.throughput.apart():
            super()._maybe_log_save_evaluate(*args, **kwargs)
        # With save_strategy="best" an evaluation decides, and may have decided against what the signal asked for.
        if self.signal.agreed and self.run_state.saved_step != self.state.global_step:
            self._save_checkpoint(self.model, None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; a training log gets the metrics since the last one, counts of the cache and of cuts, and the speed."""
        if "loss" in logs:
            logs |= {**self.reference.counts(), **self.step.counts(), **self.throughput.figures()}
        logs |= self.metric_store.of_log(logs)  # in place: at the end, transformers returns them
        super().log(logs, start_time)

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if not any(dataset is one for one in (self.train_dataset, *self.prepare.evaluated.values())):
            dataset = self.prepare(dataset, "test" if description == "test" else "eval")
        loader = super()._get_dataloader(dataset, description, batch_size * world_size(), *args, **kwargs)
        unshard(loader, dataset)
        return loader

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, **_: Any) -> Any:
        """Returns an evaluation batch's loss, implicit rewards and labels (see `compute_metrics`)."""
        loss, rewards, labels = self.step.predict(inputs, partial(self.compute_loss, model, return_outputs=True))
        return (loss, None, None) if prediction_loss_only else (loss, rewards, labels)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `transformers.Trainer`; the own datasets also give the pairs of `eval_examples.jsonl` and samples."""
        own, step = eval_dataset is None or isinstance(eval_dataset, str), self.state.global_step
        with self.evaluation.under_way(own, step if eval_dataset is None else None):
            return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`, with the loss and the metrics as means over the whole dataset."""
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        self.metric_store.clear("eval")
        self.evaluation.begin(prefix)
        self.step.evaluated = []
        self.gather_function = lambda tensor: tensor  # what `prediction_step` gives is gathered already
        output = super().evaluation_loop(*args, **kwargs)
        self.evaluation.finish(prefix, self.state.global_step)
        metrics = self.objective.of_evaluation(self.metric_store.pop("eval"))
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _save_checkpoint(self, *_: Any) -> None:
        self.run_state.save_checkpoint(self)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        with checkpoints_kept(self.args):
            return super()._finalize_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.run_state.load(Path(resume_from_checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        check_reported(self.args.metric_for_best_model, metrics, self.state.global_step)
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        load_best(self.model, self.policy_adapter, self.state, self.reference)
        if not str(self.state.best_model_checkpoint).endswith(f"checkpoint-{self.state.global_step}"):
            self.evaluation.renew(self.state.global_step)  # the newest are to be of the adapter that is saved

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the policy's adapter, without a frozen copy that the model holds as its reference."""
        if self.args.should_save:
            save_adapter(self, self.policy_adapter, Path(output_dir or self.args.output_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves adapter, tokenizer and, called by a user, the run's files, whole or not at all; then publishes."""
        folder = output_dir or self.args.output_dir
        if _internal_call:
            self._save(folder)
            return
        save_result(self, folder)
        if self.args.push_to_hub:
            self._publisher().publish(folder, "Model save")

    def create_model_card(self, model_name: str | None = None, dataset_name: Any = None, tags: Any = None) -> None:
        """Writes the card and what belongs to it. `model_name` is its title, `dataset_name` one or several ids."""
        save_result(self, self.args.output_dir, False, model_name=model_name, dataset_name=dataset_name, tags=tags)

    def _publisher(self) -> Any:
        return required("hub", "push_to_hub").HubPublisher(self)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Checks with `push_to_hub`, before anything is trained, whether the adapter can be published."""
        self._publisher().check_before_training(token)

    def push_to_hub(self, commit_message: str = "End of training", blocking: bool = True, **given: Any) -> Any:
        """Saves the adapter with its results into `output_dir` and publishes them, see `hub.HubPublisher.push`."""
        return self._publisher().push(commit_message, blocking, **given)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._publisher().push_from_checkpoint()
