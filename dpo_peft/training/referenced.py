"""What the policy is compared with, over the life of a run: found, checked, remembered, cached, restored.

`reference.py` scores under a reference and `identity.py` says which one it is. Here a run makes sure that it is the
one that was meant: before the first step, when an adapter that was trained before goes on, and when a run is resumed.
"""

import itertools
import logging
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file

from ..config import DPOConfig
from ..data import rows_digest
from ..errors import ReferenceMismatchError
from ..forward import PackedBatch, Scores
from ..reference.adapter_off import ADAPTER_OFF, Reference, check_start, is_identity, reference_logps
from ..reference.cache import ReferenceCache, default_folder
from ..reference.cached_logps import CachedReference
from ..reference.fingerprint import Identity, base_fingerprint, check_same, identify, read_record, write_record
from ..reference.frozen_adapter import adapter_tensors, mix_into
from .accumulation import SteppingTrainer
from .callbacks import SyncReference

logger = logging.getLogger(__name__)

MOVING_REFERENCE = "reference_adapter.safetensors"  # of TR-DPO, in its checkpoints

_SHAPE = "r lora_alpha target_modules use_rslora use_dora modules_to_save rank_pattern alpha_pattern".split()


class ReferencedTrainer(SteppingTrainer):
    """A trainer whose policy has a reference inside the same model."""

    args: DPOConfig
    model: PeftModel
    reference: Reference
    policy_adapter: str
    forward_plan: Any
    identity: Identity
    cached_reference: CachedReference | None = None
    _start_checked = False
    _rows: str | None = None  # digest of the training rows
    _base: str | None = None  # fingerprint of the base

    def set_up_reference(self) -> None:
        """Know what the reference is, refuse one that nobody asked for, and find its cache."""
        args, reference, plan = self.args, self.reference, self.forward_plan
        sync = None
        if args.sync_ref_model:
            sync = f"alpha {args.ref_model_mixup_alpha} every {args.ref_model_sync_steps} steps"
            frozen, alpha, steps = str(reference.adapter), args.ref_model_mixup_alpha, args.ref_model_sync_steps
            mix_into(self.model, self.policy_adapter, frozen, 0.0)  # changes nothing, refuses what can't be mixed
            self.add_callback(SyncReference(self.model, self.policy_adapter, frozen, alpha, steps))
        self.identity = identify(self.model, reference.adapter, reference.source, sync)
        _check_continued(read_record(self.model.peft_config[self.policy_adapter]), self.identity, reference.chosen)
        write_record(self.model, self.policy_adapter, self.identity)
        logger.warning("Reference: %s.", self.identity)
        if args.caches_reference:
            precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "no"
            how = f"{precision} autocast on {args.device.type}, {plan.scorer}, {'shared' if plan.shared else 'padded'}"
            computed = f"{self.identity.key()} {self.identity.quantization} {self.identity.dtype} {how}"
            tokens = self.objective.reads_reference_tokens if args.ref_cache_tokens is None else args.ref_cache_tokens
            store = ReferenceCache(
                args.ref_cache_dir or default_folder(),
                blake2b(computed.encode(), digest_size=16).hexdigest(),
                f"{self.identity}; {how}",
                int(args.ref_cache_gb * 1e9),
                tokens,
            )
            self.cached_reference = CachedReference(store, self._compute_reference)

    def described_reference(self) -> str:
        """One sentence for the model card."""
        if not self.objective.needs_reference:
            return "none is needed"
        if self.reference.adapter is None:
            return ADAPTER_OFF
        of = (
            f"the adapter {self.reference.source}" if self.reference.source else "the adapter that training began with"
        )
        follows = f", which follows the policy ({self.identity.sync})" if self.identity.sync else ""
        return f"the same weights with a frozen copy of {of}{follows}; no second model was held."

    def _reference(self, batch: PackedBatch) -> Scores | None:
        if not self.objective.needs_reference:
            return None
        return self._compute_reference(batch) if self.cached_reference is None else self.cached_reference(batch)

    def _compute_reference(self, batch: PackedBatch) -> Scores:
        return reference_logps(self.model, batch, self.forward_plan.scorer, self.reference.adapter)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Check that policy and reference start equal, fill the reference's cache if asked for, then train.

        Args and what is raised: see `ResumableTrainer.train`, and

        Raises:
            ReferenceMismatchError: they don't, so the reference would not be the model that training starts from; or
                the checkpoint was trained against another reference.
            NonFiniteError: a loss or gradient became NaN or infinite; the optimizer has not stepped on it.
        """
        if self.objective.needs_reference and not self._start_checked:
            self._check_start()
            self._start_checked = True
        if self.args.precompute_ref_log_probs:
            self._precompute()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_start(self, samples: int = 4) -> None:
        rows = list(itertools.islice(self.train_dataset, samples))
        parts = [rows, *([row] for row in rows)]
        batches = [PackedBatch(**self.collate(part)).to(self.args.device) for part in parts]
        self.model.train(self.args.disable_dropout)
        with self.compute_loss_context_manager():
            starts_at_base = self.reference.choice == "base" and is_identity(self.model, self.policy_adapter)
            if self.reference.choice == "initial" or starts_at_base:
                check_start(self.model, batches, self.forward_plan.scorer, self.reference.adapter)
            if self.cached_reference is not None:
                self.cached_reference.check(batches)

    def _precompute(self) -> None:
        assert self.cached_reference is not None
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        datasets = {"train": self.train_dataset, **{n: d for n, d in evaluated.items() if d is not None}}
        with self.compute_loss_context_manager():
            for name, dataset in datasets.items():
                self.cached_reference.precompute(
                    dataset,
                    self.collate,
                    self.args.precompute_ref_tokens,
                    self.args.device,
                    name,
                    progress=not self.args.disable_tqdm,
                )
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the pair metrics since the last log to a training log, and the cache's hits."""
        if "loss" in logs and self.cached_reference is not None:
            logs |= self.cached_reference.counts()
        super().log(logs, start_time)

    # ---- Saving and going on ---------------------------------------------------------------------------------------

    def trajectory(self) -> dict[str, Any]:
        """Options, the adapter's shape and the rows: what a resumed run should share with the interrupted one."""
        config = self.model.peft_config[self.policy_adapter].to_dict()
        shape = {name: sorted(v) if isinstance(v := config[name], (set, list)) else v for name in _SHAPE}
        adapter = {f"peft_config.{name}": value for name, value in shape.items()}
        if self._rows is None:
            self._rows = rows_digest(self.train_dataset)
        if self._base is None:
            self._base = (
                self.identity.base_fingerprint if self.objective.needs_reference else base_fingerprint(self.model)
            )
        return {**super().trajectory(), **adapter, "train_dataset": self._rows, "base model": self._base}

    def fixed(self, name: str) -> bool:
        """The base and the adapter's shape too."""
        return super().fixed(name) or name == "base model" or name.startswith("peft_config.")

    def check_resumable(self, folder: Path) -> None:
        """The checkpoint must have been trained against this run's reference."""
        if self.objective.needs_reference:
            recorded = read_record(_adapter_folder(folder, self.policy_adapter))
            _check_resumed(recorded, self.identity, folder, self.reference.chosen)

    def save_extra(self, folder: Path) -> dict[str, Any]:
        """How far micro-batches are cut; a reference that moves."""
        if self.args.sync_ref_model:
            tensors = adapter_tensors(self.model, str(self.reference.adapter))
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / MOVING_REFERENCE)
        return {"halvings": self.halvings}

    def load_extra(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """The reverse of `save_extra`."""
        self.halvings = extra["halvings"]
        if self.args.sync_ref_model:
            saved = load_file(folder / MOVING_REFERENCE)
            for name, tensor in adapter_tensors(self.model, str(self.reference.adapter)).items():
                tensor.data.copy_(saved[name])


def _check_continued(recorded: Identity | None, actual: Identity, chosen: bool) -> None:
    """An adapter that was trained against one reference goes on against the same one, unless another is asked for.

    Otherwise preference training of a preference-trained adapter would quietly take the trained policy as its
    reference, and let it drift twice as far.
    """
    if recorded is None or not recorded.differences(actual):
        return
    if chosen:
        logger.warning("The adapter was trained against %s; it goes on against %s, as asked for.", recorded, actual)
        return
    check_same(
        recorded,
        actual,
        "The adapter to go on with has been trained on preferences before, and",
        "Say which one is meant: reference='base' for the model without adapter, reference='initial' for the adapter "
        "as it comes in, or the folder of an adapter.",
    )


def _check_resumed(recorded: Identity | None, actual: Identity, folder: Path, chosen: bool) -> None:
    """A run goes on against the reference that it began with. Another one over the same base can be asked for."""
    if recorded is None:
        raise ReferenceMismatchError(
            f"{folder} does not say what its reference was, so the run can't be resumed. Start a new run from its "
            "adapter (model=<checkpoint folder>) and choose its reference."
        )
    if chosen and recorded.base_fingerprint == actual.base_fingerprint and recorded.differences(actual):
        logger.warning("%s was trained against %s; it goes on against %s, as asked for.", folder, recorded, actual)
        return
    check_same(
        recorded,
        actual,
        f"{folder}",
        "Pass the model and adapter that the run was started with; or, to go on against another reference on purpose, "
        "start a new run from the checkpoint's adapter (model=<checkpoint folder>, reference=...).",
    )


def _adapter_folder(checkpoint: Path, adapter: str) -> Path:
    """PEFT puts adapters of another name into folders of their own."""
    return checkpoint if adapter == "default" else checkpoint / adapter
