"""What the policy is compared with, over the life of a run: found, checked, remembered, cached, restored.

`adapter_off.py` scores under a reference and `fingerprint.py` says which one it is. Here a run makes sure that it is
the one that was meant: before the first step, when a trained adapter is trained again, and when a run is resumed.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file

from ..config import DPOConfig
from ..errors import ReferenceMismatchError
from ..forward import ForwardPlan, PackedBatch, Scores
from ..objective import TrainingObjective
from .adapter_off import ADAPTER_OFF, Reference, check_start, is_identity, reference_logps
from .cache import ReferenceCache, default_folder
from .cached_logps import CachedReference
from .fingerprint import Identity, base_fingerprint, check_same, identify, read_record, write_record
from .frozen_adapter import adapter_tensors, mix_into

logger = logging.getLogger(__name__)

MOVING_REFERENCE = "reference_adapter.safetensors"  # of TR-DPO, in its checkpoints

Rows = Sequence[dict[str, Any]]
Collate = Callable[[Rows], dict[str, Any]]


class ReferencePolicy:
    """The reference of a run, inside the model that is trained.

    Args:
        model: the PEFT model, on its device.
        held: what the reference is.
        policy_adapter: the trained adapter's name.
        args: the options.
        plan: how batches are laid out and scored.
        objective: says whether it has a reference, and whether it reads the log-prob of every token.

    Raises:
        ReferenceMismatchError: the adapter was trained against another reference than this one.

    Attributes:
        identity: fingerprints of the reference, if it is needed.
        cached: its log-probs on disk, if they are kept.
        plan: may be replaced when the model has changed.
    """

    def __init__(
        self,
        model: PeftModel,
        held: Reference,
        policy_adapter: str,
        args: DPOConfig,
        plan: ForwardPlan,
        objective: TrainingObjective,
    ):
        self.model, self.policy_adapter, self.args, self.plan = model, policy_adapter, args, plan
        self.needed = objective.needs_reference
        self.choice, self.adapter, self.source, self.chosen = held.choice, held.adapter, held.source, held.chosen
        self.cached: CachedReference | None = None
        self.start_checked = not self.needed
        if self.needed:
            self.identity = self._identify()
            if args.caches_reference:
                self.cached = CachedReference(
                    self._open_cache(objective.reads_reference_tokens), lambda batch: self.compute(batch)
                )

    def _identify(self) -> Identity:
        """Says what the reference is, and refuses one that nobody asked for."""
        sync = None
        if self.args.sync_ref_model:
            sync = f"alpha {self.args.ref_model_mixup_alpha} every {self.args.ref_model_sync_steps} steps"
            self.mix(0.0)  # changes nothing, refuses what can't be mixed
        identity = identify(self.model, self.adapter, self.source, sync)
        recorded = read_record(self.model.peft_config[self.policy_adapter])
        _check_trained_again(recorded, identity, self.chosen)
        write_record(self.model, self.policy_adapter, identity)
        logger.info("Reference: %s.", identity)
        return identity

    def _open_cache(self, reads_tokens: bool) -> ReferenceCache:
        args, plan, identity = self.args, self.plan, self.identity
        precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "no"
        layout = "shared" if plan.shared else "padded"
        how = f"{precision} autocast on {args.device.type}, {plan.scorer}, {layout}"
        computed = f"{identity.key()} {identity.quantization} {identity.dtype} {how}"
        return ReferenceCache(
            args.ref_cache_dir or default_folder(),
            blake2b(computed.encode(), digest_size=16).hexdigest(),
            f"{identity}; {how}",
            int(args.ref_cache_gb * 1e9),
            reads_tokens if args.ref_cache_tokens is None else args.ref_cache_tokens,
        )

    def describe(self) -> str:
        """Returns a sentence for the model card."""
        if not self.needed:
            return "none is needed"
        if self.adapter is None:
            return ADAPTER_OFF
        of = f"the adapter {self.source}" if self.source else "the adapter that training began with"
        follows = f", which follows the policy ({self.identity.sync})" if self.identity.sync else ""
        return f"the same weights with a frozen copy of {of}{follows}; no second model was held."

    # ---- Log-probs -------------------------------------------------------------------------------------------------

    def logps(self, batch: PackedBatch) -> Scores | None:
        """Returns the reference's log-probs of a batch, from the disk if they are kept there; None if not needed."""
        if not self.needed:
            return None
        return self.compute(batch) if self.cached is None else self.cached(batch)

    def compute(self, batch: PackedBatch) -> Scores:
        """Returns the log-probs of a forward pass under the reference."""
        return reference_logps(self.model, batch, self.plan.scorer, self.adapter)

    def check_start(self, rows: Rows, collate: Collate) -> None:
        """Checks once, before the first step, that policy and reference start equal, and that the cache is right.

        Args:
            rows: a few prepared training rows.
            collate: lays rows out as training does.

        Raises:
            ReferenceMismatchError: they don't, so the reference would not be the model that training starts from.
        """
        if self.start_checked:
            return
        self.start_checked = True
        parts = [rows, *([row] for row in rows)]
        batches = [PackedBatch(**collate(part)).to(self.args.device) for part in parts]
        self.model.train(self.args.disable_dropout)
        starts_at_base = self.choice == "base" and is_identity(self.model, self.policy_adapter)
        if self.choice == "initial" or starts_at_base:
            check_start(self.model, batches, self.plan.scorer, self.adapter)
        if self.cached is not None:
            self.cached.check(batches)

    def precompute(self, datasets: Mapping[str, Rows], collate: Collate) -> None:
        """Fills the cache for prepared datasets, by name."""
        assert self.cached is not None  # the option that asks for it also turns the cache on
        args = self.args
        for name, rows in datasets.items():
            progress = not args.disable_tqdm
            self.cached.precompute(rows, collate, args.precompute_ref_tokens, args.device, name, progress)

    def counts(self) -> dict[str, float]:
        """Returns what the log says of the cache."""
        return {} if self.cached is None else self.cached.counts()

    def mix(self, alpha: float) -> None:
        """Moves the frozen adapter towards the policy: TR-DPO (Gorbatovski et al. 2024)."""
        mix_into(self.model, self.policy_adapter, str(self.adapter), alpha)

    # ---- Saving and resuming ---------------------------------------------------------------------------------------

    @cached_property
    def base_fingerprint(self) -> str:
        """Returns the fingerprint of the base."""
        return self.identity.base_fingerprint if self.needed else base_fingerprint(self.model)

    def check_resumable(self, checkpoint: Path) -> None:
        """Refuses a checkpoint that was trained against another reference.

        Raises:
            ReferenceMismatchError: naming both.
        """
        if self.needed:
            # PEFT puts adapters of another name into folders of their own.
            folder = checkpoint if self.policy_adapter == "default" else checkpoint / self.policy_adapter
            _check_resumed(read_record(folder), self.identity, checkpoint, self.chosen)

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Writes a reference that moves into a checkpoint."""
        if self.args.sync_ref_model:
            tensors = adapter_tensors(self.model, str(self.adapter))
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / MOVING_REFERENCE)
        return {}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Takes up a reference that moves."""
        if self.args.sync_ref_model:
            saved = load_file(folder / MOVING_REFERENCE)
            for name, tensor in adapter_tensors(self.model, str(self.adapter)).items():
                tensor.data.copy_(saved[name])


def _check_trained_again(recorded: Identity | None, actual: Identity, chosen: bool) -> None:
    """An adapter that was trained against one reference is trained on against it, unless another is asked for.

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
    """A run is resumed against the reference that it began with. Another one over the same base can be asked for."""
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
