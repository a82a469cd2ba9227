"""The reward that a preference-trained adapter holds: score completions by it, compare two, rank several.

A policy trained by DPO is a reward model (docs/derivations.md, eq. 10; Rafailov et al. 2023, eq. 5):

    r(x, y) = beta * log(policy(y | x) / reference(y | x))  +  beta * log Z(x)

The second term is unknown, and the same for all completions of a prompt: rewards compare those of one prompt, not
prompts. Objectives without a reference have beta times the policy's log-prob, or its mean over tokens, in the place of
the first term, as in training.

Everything is read from the adapter: its base, its reference, its beta, how long its rows were and in which precision
they were computed. So its margins are those that the trainer's evaluation reports.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data import REASONS
from ..data.collator import PreferenceCollator
from ..data.fields import RowProblem
from ..data.formats import CHAT_COLUMNS, IMAGE_COLUMNS, Encoded
from ..data.images import Images
from ..data.invocation import check_invoked
from ..data.prompts import PROMPT_COLUMNS, encode_completions
from ..data.summary import IMAGE_CUT
from ..data.tokenize import check_tokenizer
from ..data.truncate import check_truncation, fit
from ..errors import DataError, NonFiniteError, OptionError
from ..forward import ForwardPlan, PackedBatch, plan_forward, recheck
from ..forward.attention import IMPLEMENTATION
from ..forward.modules import unwrap
from ..forward.rotary import fixed_rope, rope_length
from ..forward.scope import invocation_start, invocation_tokens
from ..forward.states import read_layouts, read_rows
from ..model.adapter_source import AdapterSource, TrainedAdapter, TrainedWith, rope_length_of, trained_in
from ..model.loading import disable_dropout
from ..reference.adapter_off import reference_logps
from ..training.packing import pack_rows
from .rows import units_of

logger = logging.getLogger(__name__)

WINDOW = 2048  # rows that are packed together
Row = Mapping[str, Any]
Content: TypeAlias = str | Sequence[Mapping[str, object]] | Sequence[int]  # a text, messages, or token ids


class CompletionScore(NamedTuple):
    """What a completion got. Log-probs are sums over its tokens, in nats."""

    reward: float  # beta times what the objective compares
    logp: float  # under the policy
    ref_logp: float | None  # under the reference; None for an objective without one
    tokens: int  # that were scored


class ImplicitReward:
    """A trained adapter as a reward function.

        reward = ImplicitReward("outputs/quickstart")
        reward(prompts, completions)                # a reward for each completion
        reward.compare(prompt, answer_a, answer_b)  # the probability that a is better
        GRPOTrainer(..., reward_funcs=reward)       # of TRL

    A prompt is a text, a list of messages or a list of token ids; a completion the same. They are tokenized as the
    trainer does, with an end token; a completion without text is its end token alone. Prompts with several completions
    are computed once, if these stand next to each other.

    Args:
        adapter: its folder or Hub id, an `AdapterSource`, a `TrainedAdapter`, or a PeftModel, which is left as it was:
            adapters, modes and flags. A model that is being trained is scored as it is at each call.
        beta: replaces the recorded one.
        reference: for a folder or Hub id, see `AdapterSource`; for a PeftModel, the name of a frozen adapter in it, or
            "base" for the model with all adapters off. None: the recorded one.
        tokenizer: replaces the adapter's. A PeftModel needs one; a processor, to read images.
        policy: for a PeftModel, the adapter's name in it; the active one if None.
        max_length: most tokens of prompt + completion, cut as in training; None for no limit, "recorded" for the
            adapter's. What is given as `completion_ids` is never cut.
        max_tokens: of one forward pass. Lower it if memory runs out.
        device: of a folder or Hub id: where the model goes; a GPU if there is one.
        made: of a folder or Hub id: options of `AdapterSource`: base, quantize, dtype, check_base, trust_remote_code,
            revision.

    Raises:
        OptionError: no beta is known, an option has no effect, or as `AdapterSource.load`.
        ReferenceMismatchError: the base or the reference is another one than in training.
    """

    __name__ = "implicit_reward"  # what TRL calls it in its logs

    def __init__(
        self,
        adapter: str | AdapterSource | PeftModel | TrainedAdapter,
        *,
        beta: float | None = None,
        reference: str | None = None,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | Images | None = None,
        policy: str | None = None,
        max_length: int | str | None = "recorded",
        max_tokens: int = 16384,
        device: torch.device | str | None = None,
        **made: Any,
    ):
        if type(max_tokens) is not int or max_tokens < 1:
            raise OptionError(f"max_tokens={max_tokens!r} must be a positive integer.")
        images = Images(tokenizer) if isinstance(tokenizer, ProcessorMixin) else tokenizer
        if isinstance(images, Images):
            tokenizer = images.tokenizer
        if isinstance(adapter, str):
            adapter, reference, made = AdapterSource(adapter, reference=reference, **made), None, {}
        if isinstance(adapter, AdapterSource):
            _without_effect("a folder, Hub id or AdapterSource", policy=policy, reference=reference, **made)
            _beta(adapter.read(), beta, adapter.adapter)  # before minutes of loading
            adapter = adapter.load(device)
            disable_dropout(adapter.model)  # a layer that can drop out is not computed by fused code
        elif isinstance(adapter, TrainedAdapter):
            _without_effect("a TrainedAdapter", policy=policy, reference=reference, device=device, **made)
        else:
            _without_effect("a PeftModel", device=device, **made)
            adapter = trained_in(adapter, tokenizer, policy, reference)
        self.adapter = adapter
        self.model, self.reference, self.trained = adapter.model, adapter.reference, adapter.trained
        self.tokenizer: PreTrainedTokenizerBase = adapter.tokenizer if tokenizer is None else tokenizer
        self.images = adapter.images if tokenizer is None else images if isinstance(images, Images) else None
        check_tokenizer(self.tokenizer, need_eos=False)
        setup = adapter.setup
        self.kind = setup.reward
        if setup.discount_gamma != 1.0 or setup.ld_alpha is not None:
            logger.warning(
                "The adapter was trained with discount_gamma=%s and ld_alpha=%s, which weigh single tokens. A reward "
                "here is that of the whole completion, every token alike, unlike those in the training's log.",
                setup.discount_gamma,
                setup.ld_alpha,
            )
        if self.kind == "log_ratio" and self.reference is None:
            raise OptionError("The TrainedAdapter was loaded without its reference: load it with_reference=True.")
        self.beta = _beta(self.trained, beta, adapter.source)
        self.max_length = cast("int | None", setup.max_length if max_length == "recorded" else max_length)
        self.truncation_mode = setup.truncation_mode
        check_truncation(self.max_length, self.truncation_mode)
        self.max_tokens = max_tokens
        self._invocation = invocation_tokens(self.model.peft_config, adapter.policy)
        self.cut = 0  # completions or their prompts that were cut to max_length so far
        self._vocab_size = len(unwrap(self.model).get_input_embeddings().weight)
        self._dtype = None if setup.precision == "no" else getattr(torch, setup.precision)
        self.rope_length = rope_length_of(self.model, setup, self.max_length)
        self._too_long = False  # it was said of a row
        with _attention(self.model), fixed_rope(self.model, self.rope_length):
            tiny = self.images.probe_samples(anyhow=True) if self.images else []
            self.plan = plan_forward(self.model, dtype=self._dtype, images=tiny)

    def __str__(self) -> str:
        """Returns what the reward is, in one sentence."""
        beta = f"{self.beta:g} * " if self.beta != 1 else ""
        if self.reference is None:
            return beta + {"logp": "log policy", "mean_logp": "mean log-prob of a token"}[self.kind]
        frozen = self.reference.source or self.reference.adapter
        which = f"the adapter {frozen}" if frozen else "the adapter switched off"
        return f"{beta}log(policy / reference); the reference is {which}"

    # ---- What users call ------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompts: Sequence[Content],
        completions: Sequence[Content],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Returns the reward of each completion, in the order given: the signature of TRL's reward functions.

        Args:
            prompts: one for each completion.
            completions: texts, lists of messages (or texts, after a prompt of messages), or token ids.
            completion_ids: their tokens, if a model sampled them. Scored exactly, so a completion that was stopped
                early has no end token.
            kwargs: `images` (a list) or `image`, `tools` and `chat_template_kwargs` are read, one for each completion,
                as in training rows; the rest, such as TRL's trainer_state, is not.

        Raises:
            DataError: a prompt or completion can't be scored; the message names it.
            NonFiniteError: a log-prob is NaN or infinite.
        """
        return [score.reward for score in self.scores(prompts, completions, completion_ids, **kwargs)]

    def scores(
        self,
        prompts: Sequence[Content],
        completions: Sequence[Content],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[CompletionScore]:
        """Returns what a call does, with the log-probs."""
        columns = {"prompt": prompts, "completion": completions, "completion_ids": completion_ids}
        columns |= {name: kwargs.get(name) for name in (*CHAT_COLUMNS, *IMAGE_COLUMNS)}
        rows = []
        for _, run in groupby(
            enumerate(_entries(columns)),
            key=lambda entry: [entry[1].get(n) for n in (*PROMPT_COLUMNS, *IMAGE_COLUMNS)],
        ):
            numbers, entries = zip(*run, strict=True)
            whole = self._encode(entries, numbers[0])
            for number, ids in zip(numbers, whole["completion_ids"], strict=True):
                one = {**whole, "completion_ids": [ids], "row": number}
                rows.append(self._fitted(one, cut=completion_ids is None))
        return [score for (score,) in self.score_rows(rows)]

    def compare(self, prompt: Content, completion_a: Content, completion_b: Content, images: Any = None) -> float:
        """Returns the probability that a is better than b: sigmoid(r_a - r_b) (docs/derivations.md, eqs. 5 and 10)."""
        a, b = self._answers(prompt, [completion_a, completion_b], images)
        return 0.5 * (1 + math.tanh((a.reward - b.reward) / 2))  # exp would overflow

    def rank(self, prompt: Content, completions: Sequence[Content], images: Any = None) -> list[int]:
        """Returns the indices of the completions of one prompt, the best first; equal ones as they stand."""
        scores = self._answers(prompt, completions, images)
        return sorted(range(len(scores)), key=lambda i: -scores[i].reward)

    def score_rows(self, rows: Iterable[Row], progress: bool = False) -> list[list[CompletionScore]]:
        """Scores prepared rows (`prepare_dataset`): `prompt_ids`, `completion_ids`, and `steps` if they have some.

        Args:
            rows: a list or a `datasets.Dataset`; `row` names them in messages.
            progress: whether to show a progress bar.

        Returns:
            For each row a score for each of its completions.

        Raises:
            NonFiniteError: a log-prob is NaN or infinite; the message names the rows.
        """
        plan = recheck(self.plan, self.model, self._dtype)
        collate = PreferenceCollator(plan.shared, self.tokenizer.pad_token_id or 0, self.images)
        source, scored = iter(rows), []
        total = len(rows) if isinstance(rows, Sized) else None
        with (
            _attention(self.model, plan.shared),
            fixed_rope(self.model, self.rope_length),
            tqdm(total=total, desc="Scoring", unit="row", disable=not progress) as bar,
        ):
            while window := [self._begun(row) for row in islice(source, WINDOW)]:
                self._check_lengths(window)
                units = list(units_of(window, self.max_tokens, plan.shared))
                flat: list[list[CompletionScore]] = [[] for _ in units]
                for one in pack_rows(units, self.max_tokens, plan.shared):
                    batch = PackedBatch(**collate([units[i] for i in one])).to(self.model.device)
                    found = iter(self._score(batch, plan))
                    for i in one:
                        flat[i] = [next(found) for _ in units[i]["completion_ids"]]
                    bar.update(sum(units[i]["ends"] for i in one))
                in_order = (score for scores in flat for score in scores)
                scored += [[next(in_order) for _ in row["completion_ids"]] for row in window]
                _check_finite(window, scored[-len(window) :])
        return scored

    def _check_lengths(self, rows: Sequence[Row]) -> None:
        """Warns once of rows beyond what the rotary frequencies are for."""
        if self.rope_length is None or self._too_long:
            return
        longest = max(len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in rows)
        self._too_long = (rope_length(self.model.config, longest) or 0) > self.rope_length
        if self._too_long:
            logger.warning(
                "Row %d or one after it has %d tokens, and the rotary frequencies are those of rows of up to %d: its "
                "score means little. Give max_length=%d to cut such rows.",
                *(rows[0]["row"], longest, self.rope_length, self.rope_length),
            )

    def _begun(self, row: Row) -> Row:
        """Returns a row that says from where an answer-only adapter acts, as prepared ones do."""
        start = invocation_start(row["prompt_ids"], self._invocation) if self._invocation else None
        return row if start is None else {**row, "adapter_start": start}

    # ---- How ------------------------------------------------------------------------------------------------------

    def _score(self, batch: PackedBatch, plan: ForwardPlan) -> list[CompletionScore]:
        device = batch.input_ids.device.type
        with torch.autocast(device, dtype=self._dtype or torch.bfloat16, enabled=self._dtype is not None):
            # The policy is scored as a reference is: one adapter on by its name, and all that was set put back.
            logps = reference_logps(self.model, batch, plan.scorer, self.adapter.policy).logps_C.tolist()
            refs = [None] * len(logps)
            if self.reference is not None:
                refs = reference_logps(self.model, batch, plan.scorer, self.reference.adapter).logps_C.tolist()
        lengths = batch.lengths.tolist()
        return [CompletionScore(self._reward(*one), *one) for one in zip(logps, refs, lengths, strict=True)]

    def _reward(self, logp: float, ref_logp: float | None, tokens: int) -> float:
        """Returns the reward, as `Objective.rewards` does."""
        if ref_logp is not None:
            return self.beta * (logp - ref_logp)
        return self.beta * (logp / tokens if self.kind == "mean_logp" else logp)

    def _answers(self, prompt: Content, completions: Sequence[Content], images: Any) -> list[CompletionScore]:
        """Scores the completions of one prompt. A prompt that is too long is cut for all alike."""
        if isinstance(completions, str) or not completions:
            raise OptionError("completions must be a list of at least one completion.")
        entries = [{"prompt": prompt, "completion": one, "images": images} for one in completions]
        whole = self._encode(entries, 0)
        encoded = whole["completion_ids"]
        distinct = {tuple(ids): ids for ids in encoded}  # the same completion has the same reward, to the last bit
        row = self._fitted({**whole, "completion_ids": list(distinct.values()), "row": 0})
        scores = dict(zip(distinct, self.score_rows([row])[0], strict=True))
        return [scores[tuple(ids)] for ids in encoded]

    def _fitted(self, row: Row, cut: bool = True) -> Row:
        """Returns a row to score, cut to `max_length` unless told otherwise."""
        whole, number = Encoded(row["prompt_ids"], row["completion_ids"]), row["row"]
        fitted = fit(whole, self.max_length if cut else None, self.truncation_mode)
        if self.images and not isinstance(fitted, str) and self.images.token in whole.prompt_ids[: fitted.prompt_cut]:
            fitted = IMAGE_CUT
        if isinstance(fitted, str):
            meaning, remedy = REASONS[fitted]
            raise DataError(f"completion {number}: {fitted}: {meaning}. Remedy: {remedy}, or set max_length=None.")
        if fitted.prompt_cut or fitted.completions_cut:
            if not self.cut:
                logger.warning(
                    "Completion %d is cut to max_length=%d, as rows were in training (%s); `cut` counts them.",
                    number,
                    self.max_length,
                    self.truncation_mode,
                )
            self.cut += len(whole.completion_ids)
        return {**row, "prompt_ids": fitted.prompt_ids, "completion_ids": fitted.completion_ids}

    def _encode(self, entries: Sequence[Row], first: int) -> Row:
        """Returns token ids of one prompt and its completions, which begin at number `first` of the call."""
        try:
            as_chat = bool(self.adapter.setup.as_chat)
            row = encode_completions(self.tokenizer, entries, first, self._vocab_size, as_chat, self.images)
            named = {f"completion {number}": ids for number, ids in enumerate(row["completion_ids"], first)}
            check_invoked(self.tokenizer, self._invocation, row["prompt_ids"], named)
            return row
        except RowProblem as problem:
            raise DataError(
                f"implicit reward of {problem.field}: {problem.problem}. Remedy: {problem.remedy}."
            ) from problem


def _entries(columns: Mapping[str, Sequence[Any] | None]) -> list[dict[str, Any]]:
    """Turns columns of equal length into rows; a column that is None has no entries."""
    given = {name: values for name, values in columns.items() if values is not None}
    lengths = {name: len(values) for name, values in given.items() if not isinstance(values, str)}
    if len(lengths) < len(given) or len(set(lengths.values())) > 1:
        raise OptionError(
            f"{', '.join(given)} must be lists of one length, an entry for each completion; their lengths: {lengths}."
        )
    return [dict(zip(given, entry, strict=True)) for entry in zip(*given.values(), strict=True)]


def _check_finite(rows: Sequence[Row], scored: Sequence[Sequence[CompletionScore]]) -> None:
    pairs = zip(rows, scored, strict=True)
    if bad := [row["row"] for row, scores in pairs if not all(math.isfinite(score.reward) for score in scores)]:
        raise NonFiniteError(
            f"The log-probs of {len(bad)} rows are not finite: {', '.join(map(str, bad[:5]))}. Look at these rows and "
            "at the model's weights; a model made for bfloat16 may overflow in float16. Rows that are computed "
            "together share what is not finite: max_tokens=1 computes each alone."
        )


# ---- What an adapter is scored with ---------------------------------------------------------------------------------


def _without_effect(what: str, **given: object) -> None:
    if names := [name for name, value in given.items() if value is not None]:
        raise OptionError(f"{', '.join(names)}: no effect for {what}. Leave it out.")


def _beta(trained: TrainedWith | None, given: float | None, source: str) -> float:
    """Returns what rewards are scaled by."""
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
            raise OptionError(f"beta={given!r} must be a positive number.")
        return float(given)
    if trained is None:
        raise OptionError(f"{source!r} does not say which beta it was trained with: give beta.")
    return 1.0 if trained.beta is None else trained.beta


@contextmanager
def _attention(model: nn.Module, shared: bool = False) -> Iterator[None]:
    """Inside, prompts can be shared if asked for; afterwards the model's attention is what it was before."""
    causal_lm = unwrap(model)
    before = causal_lm.config._attn_implementation
    try:
        if shared and before != IMPLEMENTATION:
            read_layouts(causal_lm)
        yield
    finally:
        if causal_lm.config._attn_implementation != before:
            read_rows(causal_lm, before)
