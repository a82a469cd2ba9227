"""What the policy is compared with, over the life of a run: found, checked, remembered, cached, restored.

`adapter_off.py` scores under a reference and `fingerprint.py` says which one it is. Here a run makes sure that it is
the one that was meant: before the first step, when a trained adapter is trained again, and when a run is resumed.

Shape suffixes: C completions, E samples, N predicted tokens.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..config import DPOConfig
from ..data.collator import chunks
from ..distributed import rank, world_size
from ..errors import ReferenceMismatchError
from ..forward import (
    Decoder,
    ForwardPlan,
    PackedBatch,
    Sample,
    Scores,
    logps_with_reference,
    pad_rows,
)
from ..forward.rotary import fixed_rope_length
from ..objective import Coupled, TrainingObjective
from . import adapter_off
from .adapter_off import Reference, reference_logps
from .cache import Entry, ReferenceCache, default_folder
from .fingerprint import RECORD, Identity, base_fingerprint, check_same, identify, read_record, write_entry
from .frozen_adapter import adapter_tensors, mix_into

logger = logging.getLogger(__name__)

MOVING_REFERENCE = "reference_adapter.safetensors"  # of TR-DPO, in its checkpoints
CHUNK_ROWS = 1024  # rows that `precompute` sorts by length at a time

_TRAINED_BEFORE = (
    "It has been trained on preferences before. Say which one is meant: reference='base' for the model without "
    "adapter, reference='initial' for the adapter as it comes in, or the folder of an adapter."
)
_RESUMED = (
    "Pass the model and adapter that the run was started with; or, to go on against another reference on purpose, "
    "start a new run from the checkpoint's adapter (model=<checkpoint folder>, reference=...)."
)

Row = dict[str, Any]  # prepared
Rows = Sequence[Row]
Collate = Callable[[Rows], dict[str, Any]]


class ReferencePolicy:
    """The reference of a run, inside the model that is trained.

    `identity` has its fingerprints, if it is needed.

    Args:
        model: the PEFT model, on its device.
        held: what the reference is.
        plan: how batches are laid out and scored. It may be replaced when the model has changed.
        objective: says whether it has a reference, and whether it reads the log-prob of every token.

    Raises:
        ReferenceMismatchError: the adapter was trained against another reference than this one.
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
        self.store: ReferenceCache | None = None  # its log-probs on disk, if they are kept
        self.start_checked = not self.needed
        self.reads_tokens = objective.reads_reference_tokens
        self.lockstep = False  # whether its passes go with the policy's, layer by layer
        if self.needed:
            self.identity = self._identify()
            if args.caches_reference:
                self.store = self._open_store()

    def _identify(self) -> Identity:
        """Says what the reference is, and refuses one that nobody asked for."""
        sync = None
        if self.args.sync_ref_model:
            sync = f"alpha {self.args.ref_model_mixup_alpha} every {self.args.ref_model_sync_steps} steps"
            self.mix(0.0)  # changes nothing, refuses what can't be mixed
        identity = identify(self.model, self.adapter, self.source, sync)
        recorded = read_record(self.model.peft_config[self.policy_adapter])
        if recorded is not None:
            # Otherwise preference training of a preference-trained adapter would quietly take the trained policy as
            # its reference, and let it drift twice as far.
            check_same(recorded, identity, "The adapter to go on with", _TRAINED_BEFORE, asked_for=self.chosen)
        write_entry(self.model, self.policy_adapter, RECORD, asdict(identity))
        logger.info("Reference: %s.", identity)
        return identity

    def _open_store(self) -> ReferenceCache:
        args, plan, identity = self.args, self.plan, self.identity
        precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "no"
        layout = "shared" if plan.shared else "padded"
        how = f"{precision} autocast on {args.device.type}, {plan.scorer}, {layout}"
        if (length := fixed_rope_length(self.model)) is not None:
            how += f", rotary frequencies of rows of {length} tokens"
        if args.full_determinism:  # a value's last bits depend on the rows beside it
            how += ", one row at a time"
        computed = f"{identity.key()} {identity.quantization} {identity.dtype} {how}"
        return ReferenceCache(
            args.ref_cache_dir or default_folder(),
            blake2b(computed.encode(), digest_size=16).hexdigest(),
            f"{identity}; {how}",
            int(args.ref_cache_gb * 1e9),
            self.reads_tokens if args.ref_cache_tokens is None else args.ref_cache_tokens,
        )

    def describe(self) -> str:
        """Returns a sentence for the model card."""
        if not self.needed:
            return "none is needed"
        if self.adapter is None:
            return adapter_off.ADAPTER_OFF
        of = f"the adapter {self.source}" if self.source else "the adapter that training began with"
        follows = f", which follows the policy ({self.identity.sync})" if self.identity.sync else ""
        return f"the same weights with a frozen copy of {of}{follows}; no second model was held."

    # ---- Log-probs -------------------------------------------------------------------------------------------------

    def logps(self, batch: PackedBatch) -> Scores | None:
        """Returns the reference's log-probs of a batch, from the disk where they are kept there; None if not needed.

        `token_logps_N` is empty where the disk has sums only. Values are those that were stored first, also for the
        part of a batch that had to be computed again: a run that was interrupted reads what the straight one did.
        Raises `NonFiniteError`, with the dataset rows, for a log-prob to be stored that is NaN or infinite.
        """
        if not self.needed:
            return None
        if self.store is None:
            return self.compute(batch)
        found = self.store.get(batch.keys)
        computed = self.fill(batch) if None in found else {}
        entries = [entry or computed[key] for key, entry in zip(batch.keys, found, strict=True)]
        logps_C = torch.tensor([entry.logp for entry in entries], dtype=torch.float64)
        own = [entry.token_logps for entry in entries if entry.token_logps is not None] if self.store.tokens else []
        token_logps_N = torch.from_numpy(np.concatenate(own)) if own else torch.empty(0)
        return Scores(token_logps_N.to(batch.input_ids.device), logps_C.to(batch.input_ids.device))

    def beside_policy(
        self, batch: PackedBatch, coupled: Coupled | None, policy: Callable[[PackedBatch], Scores], **reads: bool
    ) -> tuple[Scores | None, Scores]:
        """Returns `logps`, if they are not known from a `coupled` batch, and what `policy` gives. Where layers come
        and go, both passes go through them side by side, and `reads` says what losses read (`completion_logps`)."""
        scorer = self.plan.scorer
        if coupled is not None:
            return coupled.ref, policy(batch)
        if self.needed and self.store is None and self.lockstep and isinstance(scorer, Decoder) and batch.shared:
            own, reference = logps_with_reference(self.model, batch, scorer, self.adapter, **reads)
            return reference, own
        return self.logps(batch), policy(batch)

    def compute(self, batch: PackedBatch) -> Scores:
        """Returns the log-probs of a forward pass under the reference."""
        return reference_logps(self.model, batch, self.plan.scorer, self.adapter)

    def fill(self, batch: PackedBatch) -> dict[bytes, Entry]:
        """Computes a batch and stores what the store lacks of it. Returns what was computed, by key."""
        assert self.store is not None
        scores = self.compute(batch)
        adapter_off.check_finite(scores.logps_C, batch, "The reference's log-probs of rows")
        tokens: Sequence[np.ndarray | None] = [None] * batch.num_completions
        if self.store.tokens:
            tokens = np.split(scores.token_logps_N.float().cpu().numpy(), np.cumsum(batch.lengths.tolist())[:-1])
        entries = list(map(Entry, scores.logps_C.tolist(), tokens))
        self.store.put(batch.keys, entries)
        return dict(zip(batch.keys[::-1], entries[::-1], strict=True))  # of the same key twice the first counts

    def precompute(self, datasets: Mapping[str, Iterable[Row]], collate: Collate) -> None:
        """Fills the store for prepared rows, by dataset. What is there already is kept: after a kill it continues."""
        assert self.store is not None  # the option that asks for it also turns the cache on
        tokens = 1 if self.args.full_determinism else self.args.precompute_ref_tokens  # 1: each row by itself
        for name, dataset in datasets.items():
            # Batches are cut from all rows, not from the missing ones: their shapes, and so the last bits of the
            # values, do not depend on when a run was interrupted.
            computed = total = number = 0
            known = len(dataset) if isinstance(dataset, Sized) else None
            with tqdm(total=known, desc=f"reference of {name}", disable=self.args.disable_tqdm) as bar:
                for rows in _by_length(dataset, tokens):
                    if total % world_size() == rank():
                        batch = PackedBatch(**collate(rows))
                        if None in self.store.peek(batch.keys):
                            self.fill(batch.to(self.args.device))
                            computed += 1
                    total, number = total + 1, number + len(rows)
                    bar.update(len(rows))
            message = "Reference of %s (%d rows): %d of %d batches computed, the rest was in %s."
            logger.info(message, name, number, computed, total, self.store.file.path)

    def check_start(self, rows: Rows, collate: Collate) -> None:
        """Checks once, on a few rows before the first step, that policy and reference start equal, and that the store
        is right. Raises `ReferenceMismatchError` if not: the reference would not be the model that training starts
        from."""
        if self.args.fsdp:
            _ = self.base_fingerprint  # one process alone reads it, to save; now all gather the layers for it
        if self.start_checked:
            return
        self.start_checked = True
        batches = [PackedBatch(**collate(part)).to(self.args.device) for part in (rows, *([row] for row in rows))]
        self.model.train(self.args.disable_dropout)
        starts_at_base = self.choice == "base" and adapter_off.is_identity(self.model, self.policy_adapter)
        if self.choice == "initial" or starts_at_base:
            adapter_off.check_start(self.model, batches, self.plan.scorer, self.adapter)
        if self.store is None:
            return
        whole, *parts = batches
        computed_C = self.compute(whole).logps_C
        apart_C = torch.cat([self.compute(part).logps_C for part in parts])
        rounding = adapter_off.rounding_limit(self.model, whole)
        if cause := adapter_off.neighbors_act(computed_C, apart_C, rounding):
            raise ReferenceMismatchError(
                f"{cause} A cached reference would not be that of the policy's batches. Leave cache_ref_log_probs and "
                "precompute_ref_log_probs out: then it is computed beside the same rows as the policy."
            )
        # The stored values come from batches of a third shape. In 16 bits a few short rows may agree to the last bit
        # in two shapes, and yet not beside a longer row: how far the plain layout moves them counts as well.
        assert whole.samples is not None  # the store's keys are made of them
        samples = whole.samples.kept
        firsts = [
            Sample(s.prompt, s.completions[:1], steps=s.steps and s.steps[:1], adapter_start=s.adapter_start)
            for s in samples
        ]
        first_E = torch.searchsorted(whole.sample_of, torch.arange(len(firsts), device=whole.sample_of.device))
        plain_E = self.compute(pad_rows(firsts).to(self.args.device)).logps_C
        shapes = (computed_C, apart_C), (computed_C[first_E], plain_E)
        floor = 4 * max(adapter_off.noise_floor(*two, rounding) for two in shapes)
        stored = zip(self.store.peek(whole.keys), computed_C.tolist(), strict=True)
        difference = max((abs(entry.logp - logp) for entry, logp in stored if entry is not None), default=0.0)
        if difference > floor:
            raise ReferenceMismatchError(
                "The cached reference is not this one: stored and computed log-probs differ by up to "
                f"{difference:.3g} nats per completion (noise floor {floor:.2g}). Clear it by `dpo-peft cache "
                "--clear`, and please report how it came about."
            )

    def counts(self) -> dict[str, float]:
        """Returns how many completions were read from the store and computed so far, for the log."""
        return {} if self.store is None else {"ref_cache/hits": self.store.hits, "ref_cache/misses": self.store.misses}

    def mix(self, alpha: float) -> None:
        """Moves the frozen adapter toward the policy: TR-DPO (Gorbatovski et al. 2024)."""
        mix_into(self.model, self.policy_adapter, str(self.adapter), alpha)

    # ---- Saving and resuming ---------------------------------------------------------------------------------------

    @cached_property
    def base_fingerprint(self) -> str:
        """Returns the fingerprint of the base."""
        return self.identity.base_fingerprint if self.needed else base_fingerprint(self.model)

    def restore(self, checkpoint: Path) -> bool:
        """Puts resized embeddings of the base, which a checkpoint holds, into the model: those of another process may
        have been drawn anew. Returns whether that changed the base."""
        folder = checkpoint if self.policy_adapter == "default" else checkpoint / self.policy_adapter
        if not _restore_base(self.model, folder / SAFETENSORS_WEIGHTS_NAME):
            return False
        self.__dict__.pop("base_fingerprint", None)
        if self.needed:
            self.identity = identify(self.model, self.adapter, self.source, self.identity.sync)
            write_entry(self.model, self.policy_adapter, RECORD, asdict(self.identity))
            self.store = self._open_store() if self.store is not None else None
        return True

    def check_resumable(self, checkpoint: Path) -> None:
        """Raises a ReferenceMismatchError, which names both, if a checkpoint was trained against another reference."""
        if not self.needed:
            return
        # PEFT puts adapters of another name into folders of their own.
        recorded = read_record(checkpoint if self.policy_adapter == "default" else checkpoint / self.policy_adapter)
        if recorded is None:
            raise ReferenceMismatchError(
                f"{checkpoint} does not say what its reference was, so the run can't be resumed. Start a new run from "
                "its adapter (model=<checkpoint folder>) and choose its reference."
            )
        asked_for = self.chosen and recorded.base_fingerprint == self.base_fingerprint
        check_same(recorded, self.identity, str(checkpoint), _RESUMED, asked_for)

    def state_dict(self, folder: Path) -> dict[str, object]:
        """Writes a reference that moves into a checkpoint."""
        if self.args.sync_ref_model:
            tensors = adapter_tensors(self.model, str(self.adapter))
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / MOVING_REFERENCE)
        return {}

    def load_state_dict(self, state: Mapping[str, object], folder: Path) -> None:
        """Takes up a reference that moves."""
        if self.args.sync_ref_model:
            saved = load_file(folder / MOVING_REFERENCE)
            for name, tensor in adapter_tensors(self.model, str(self.adapter)).items():
                tensor.data.copy_(saved[name])


def _restore_base(model: PeftModel, file: Path) -> bool:
    """Copies the base's weights that an adapter's file holds into the model. Returns whether any was another."""
    found = False
    if file.is_file():
        own = {name: p for name, p in model.named_parameters() if not p.requires_grad and "lora_" not in name}
        with safe_open(file, "pt") as saved, torch.no_grad():
            for name in own.keys() & set(saved.keys()):
                tensor = saved.get_tensor(name).to(own[name])
                if tensor.shape == own[name].shape and not torch.equal(tensor, own[name]):
                    own[name].copy_(tensor)
                    found = True
    return found


def _by_length(dataset: Iterable[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Yields rows of about equal length, as many as fit into a forward pass; a longer row gets one of its own."""

    def tokens(row: Row) -> int:
        return len(row["prompt_ids"]) + sum(map(len, row["completion_ids"]))

    for rows in chunks(dataset, CHUNK_ROWS):
        batch: list[Row] = []
        held = 0
        for row in sorted(rows, key=tokens, reverse=True):
            if batch and held + tokens(row) > max_tokens:
                yield batch
                batch, held = [], 0
            batch.append(row)
            held += tokens(row)
        yield batch
