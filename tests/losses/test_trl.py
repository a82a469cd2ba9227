"""Every objective that TRL 1.16 has, against TRL's own code, in value and gradient.

TRL's methods run as they are, on a trainer object that was never constructed and a model that hands out given
log-probs: leaf tensors, one per token, so that the gradients of both sides can be compared token by token.

Where the objectives differ on purpose:

| option or loss                | TRL 1.16                         | here                              |
|-------------------------------|----------------------------------|-----------------------------------|
| ipo                           | log-ratios per token             | their sums, as printed; an option |
| label_smoothing of sigmoid    | ignored                          | conservative DPO                  |
| label_smoothing 0 of exo_pair | the trainer refuses it           | the loss refuses it               |
| sft, use_weighting            | weighted by the pair             | sft has no such option            |
| aot*, use_weighting           | sorted losses * unsorted weights | no such option                    |
| discopop far below 0          | 0 * inf = nan                    | finite                            |
| forward_kl far below 0        | inf - inf = nan                  | exponent at most 80, as in alpha  |
| alpha divergence in float64   | KeyError                         | works                             |
| hinge, use_weighting          | backward fails                   | works                             |
| orpo at probability 1         | nan gradient                     | finite                            |
| orpo's cross-entropy          | over prompt and completion       | over the completion               |
| simpo                         | plus cpo_alpha * cross-entropy   | without; a mix with sft has it    |
| rewards of alphapo            | of the transformed means         | of the means                      |
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_peft.losses import REGISTRY, length_desensitized_weights, shape_scores, wpo_weights
from dpo_peft.losses.unpaired import kto_loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
DPOTrainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
KTOTrainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
CPOTrainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
ORPOTrainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer

LENGTHS = (3, 7, 5, 1, 6, 4, 4, 2)  # of 4 chosen, then 4 rejected completions; prompts of 2 tokens, right-padded
BETA = 0.3


class Case:
    """Eight completions: token log-probs of policy (a leaf) and reference, and the token extras, all random."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = LENGTHS) -> None:
        draw = torch.Generator().manual_seed(seed)
        width = max(lengths) + 1  # predicted positions: the prompt's second token and the completion
        shape = (len(lengths), width)
        position = torch.arange(width) - 1
        self.mask = (position >= 0) & (position < torch.tensor(lengths)[:, None])
        self.lengths = torch.tensor(lengths)
        self.tokens = (-2 * torch.rand(shape, generator=draw, dtype=torch.float64) - 0.1).to(dtype)
        self.reference = (self.tokens + 0.8 * torch.randn(shape, generator=draw).to(dtype)) * self.mask
        self.log_sum_sq = (-1.5 * torch.rand(shape, generator=draw)).to(dtype)
        self.tokens.requires_grad_()

    def ids(self, marker: int) -> dict[str, Tensor]:
        """What TRL's collator would give; the first token tells the model below which log-probs are asked for."""
        pad = torch.zeros(len(self.lengths), 1, dtype=torch.long)
        mask = torch.cat([pad, self.mask.long()], dim=1)
        ids = torch.zeros_like(mask)
        ids[:, 0] = marker
        return {"input_ids": ids, "attention_mask": torch.ones_like(mask), "completion_mask": mask}


class Model(torch.nn.Module):
    """Hands out prepared log-probs in the shape of TRL's fused head."""

    is_gradient_checkpointing = False

    def __init__(self, token_logps: dict[int, Tensor], log_sum_sq: Tensor | None = None) -> None:
        super().__init__()
        self.token_logps, self.log_sum_sq = token_logps, log_sum_sq

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        logps = self.token_logps[int(input_ids[0, 0])]
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps, log_sum_sq_probs=self.log_sum_sq, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def bare(trainer_class: type, **attributes: Any) -> Any:
    """A trainer without its constructor: only what the method under test reads."""
    trainer = object.__new__(trainer_class)
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    common = dict(accelerator=accelerator, aux_loss_enabled=False, precompute_ref_logps=False, _tp_size=1)
    common |= dict(_metrics={"train": defaultdict(list)}, _total_train_tokens=0, beta=BETA)
    for name, value in (common | attributes).items():
        object.__setattr__(trainer, name, value)
    return trainer


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """TRL makes constants in the default dtype: in float32 they'd cost digits of a float64 comparison."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trl_dpo(case: Case, loss_types: list[str], weights: list[float] | None = None, **options: Any) -> Tensor:
    """The batch's loss by `DPOTrainer.compute_loss`."""
    settings = dict(
        ld_alpha=None, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, label_smoothing=0.0,
        use_weighting=False, loss_types=loss_types, loss_weights=weights or [1.0] * len(loss_types),
    )  # fmt: skip
    tau = options.pop("discopop_tau", 0.05)
    policy = Model({0: case.tokens * case.mask}, case.log_sum_sq)
    trainer = bare(
        DPOTrainer,
        model=policy,
        ref_model=Model({0: case.reference}),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=tau),
        **(settings | options),
    )
    with default_dtype(case.tokens.dtype):
        return trainer.compute_loss(policy, case.ids(0))


def our_inputs(case: Case, ld_alpha: float | None = None, **shape: Any) -> dict[str, Any]:
    """All that a loss of pairs can ask for, from the same token log-probs."""
    pairs = len(case.lengths) // 2
    position = (torch.arange(case.mask.shape[1]) - 1).expand_as(case.mask)
    weights = case.mask.to(case.tokens.dtype)
    if ld_alpha is not None:
        shared = torch.minimum(case.lengths[:pairs], case.lengths[pairs:]).repeat(2)[:, None].expand_as(position)
        weights = weights * length_desensitized_weights(position, shared, ld_alpha).to(weights.dtype)
    logps, ref_logps = (case.tokens * weights).sum(1), (case.reference * weights).sum(1)
    scores = shape_scores(logps - ref_logps, BETA, **shape)
    lengths = case.lengths.to(logps.dtype)
    names = {"scores": scores, "logps": logps, "lengths": lengths}
    inputs = {f"chosen_{name}_B": value[:pairs] for name, value in names.items()}
    inputs |= {f"rejected_{name}_B": value[pairs:] for name, value in names.items()}
    inputs |= {"ref_chosen_logps_B": ref_logps[:pairs], "ref_rejected_logps_B": ref_logps[pairs:]}
    inputs["chosen_nll_B"] = -(case.tokens * case.mask).sum(1)[:pairs]
    inputs["mean_chosen_length"] = lengths[:pairs].mean()
    return inputs


def ours(case: Case, name: str, use_weighting: bool = False, **options: Any) -> Tensor:
    """The batch's loss by the registry's function: the plain mean over pairs."""
    entry = REGISTRY[name]
    shaping = ("ld_alpha", "f_divergence_type", "f_alpha_divergence_coef")
    shape = {key: options.pop(key) for key in shaping if key in options}
    found = our_inputs(case, **shape)
    if entry.default_beta is not None:
        options = {"beta": BETA, **options}
    losses = entry.loss(**{key: found[key] for key in entry.inputs if key in found}, **options)
    if use_weighting:
        index = torch.arange(len(case.lengths))[:, None].expand_as(case.mask)[case.mask]
        weights = wpo_weights(case.tokens[case.mask], case.log_sum_sq[case.mask], index, len(case.lengths))
        losses = losses * weights[: len(losses)] * weights[len(losses) :]
    return losses.mean()


def gap(case: Case, mine: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> tuple[float, float]:
    """Largest relative difference of value and of gradient with respect to the token log-probs."""
    results = []
    for call in (mine, theirs):
        value = call()
        (gradient,) = torch.autograd.grad(value, case.tokens)
        assert value.isfinite() and gradient.isfinite().all()
        results.append((value.detach(), gradient))
    (a, grad_a), (b, grad_b) = results
    assert grad_b.abs().max() > 1e-4  # there is something to compare
    return float((a - b).abs() / b.abs()), float((grad_a - grad_b).abs().max() / grad_b.abs().max())


PAIR_LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down".split()
)
PAIR_LOSSES += ["discopop", "sft", "sigmoid_norm"]
SMOOTH = {"exo_pair": 0.1, "robust": 0.2, "aot": 0.2, "aot_unpaired": 0.2}


def options_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for ours and for TRL that mean the same."""
    smoothing = {"label_smoothing": SMOOTH[name]} if name in SMOOTH else {}
    return smoothing | ({"ipo_length_normalize": True} if name == "ipo" else {}), smoothing


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_dpo_trainers_losses(name: str, seed: int) -> None:
    case = Case(seed)
    mine, theirs = options_of(name)
    assert max(gap(case, lambda: ours(case, name, **mine), lambda: trl_dpo(case, [name], **theirs))) < 1e-12


@pytest.mark.parametrize("name", ["robust", "aot", "aot_unpaired"])
def test_dpo_trainers_losses_without_smoothing(name: str) -> None:
    case = Case(2)
    assert max(gap(case, lambda: ours(case, name), lambda: trl_dpo(case, [name]))) < 1e-12


@pytest.mark.parametrize("tau", [0.05, 0.7])
def test_discopop_tau(tau: float) -> None:
    case = Case(3)
    options = {"discopop_tau": tau}
    assert (
        max(gap(case, lambda: ours(case, "discopop", **options), lambda: trl_dpo(case, ["discopop"], **options)))
        < 1e-12
    )


SHAPED = [name for name in PAIR_LOSSES if "f_divergence_type" in REGISTRY[name].options]


DIVERGENCES = [("forward_kl", 0.5), ("js_divergence", 0.5)]
DIVERGENCES += [("alpha_divergence", coef) for coef in (0.5, 2.0, 1.0 + 1e-8)]


@pytest.mark.parametrize(("divergence", "coef"), DIVERGENCES)
@pytest.mark.parametrize("name", SHAPED)
def test_f_divergences(name: str, divergence: str, coef: float) -> None:
    """In float32 for the alpha divergence: TRL's clamp knows no float64."""
    exact = divergence != "alpha_divergence"
    case = Case(4, torch.float64 if exact else torch.float32)
    mine, theirs = options_of(name)
    shape = {"f_divergence_type": divergence, "f_alpha_divergence_coef": coef}
    difference = gap(case, lambda: ours(case, name, **mine, **shape), lambda: trl_dpo(case, [name], **theirs, **shape))
    assert max(difference) < (1e-12 if exact else 2e-5)


def test_divergences_reach_the_same_losses_as_in_trl() -> None:
    """TRL's other losses ignore the divergence; ours don't have the option."""
    for name in set(PAIR_LOSSES) - set(SHAPED):
        case = Case(5)
        _, options = options_of(name)
        shape = {"f_divergence_type": "forward_kl"}
        assert trl_dpo(case, [name], **options, **shape) == trl_dpo(case, [name], **options)
    for name in SHAPED:
        case = Case(5)
        _, options = options_of(name)
        shaped = trl_dpo(case, [name], **options, f_divergence_type="forward_kl")
        assert (trl_dpo(case, [name], **options) - shaped).abs() > 1e-4


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if "ld_alpha" in REGISTRY[name].options])
def test_ld_alpha(name: str, ld_alpha: float) -> None:
    case = Case(6)
    mine, theirs = options_of(name)
    mine, theirs = mine | {"ld_alpha": ld_alpha}, theirs | {"ld_alpha": ld_alpha}
    assert max(gap(case, lambda: ours(case, name, **mine), lambda: trl_dpo(case, [name], **theirs))) < 1e-12


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if "use_weighting" in REGISTRY[name].options])
def test_use_weighting(name: str) -> None:
    case = Case(7)
    mine, theirs = options_of(name)
    plain, mine, theirs = mine, mine | {"use_weighting": True}, theirs | {"use_weighting": True}
    expected = trl_dpo(case, [name], **theirs)
    torch.testing.assert_close(ours(case, name, **mine), expected, rtol=1e-12, atol=0)
    assert (ours(case, name, **plain) / expected - 1).abs() > 1e-2
    if name != "hinge":
        assert max(gap(case, lambda: ours(case, name, **mine), lambda: trl_dpo(case, [name], **theirs))) < 1e-12
        return
    with pytest.raises(RuntimeError, match="inplace"):  # TRL weights relu's output in place
        expected.backward()
    ours(case, name, **mine).backward()
    assert case.tokens.grad is not None and case.tokens.grad.isfinite().all()


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        (["sigmoid", "sft"], [1.0, 0.3]),
        (["aot", "apo_zero"], [2.0, 0.5]),
    ],
)
def test_mixes(names: list[str], weights: list[float]) -> None:
    case = Case(8)

    def mine() -> Tensor:
        return torch.stack([w * ours(case, n) for w, n in zip(weights, names, strict=True)]).sum()

    assert max(gap(case, mine, lambda: trl_dpo(case, names, weights))) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# KTO and APO-zero of single completions.


def trl_kto(case: Case, other: Case, labels: Tensor, loss_type: str, weights: tuple[float, float]) -> Tensor:
    """The batch's loss by `KTOTrainer.compute_loss`; `other` holds the mismatched completions."""
    policy = Model({0: case.tokens * case.mask, 1: other.tokens.detach() * other.mask})
    trainer = bare(
        KTOTrainer, model=policy, ref_model=Model({0: case.reference, 1: other.reference}), loss_type=loss_type,
        calculate_KL=loss_type == "kto", desirable_weight=weights[0], undesirable_weight=weights[1],
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    batch = case.ids(0) | {f"KL_{key}": value for key, value in other.ids(1).items()} | {"label": labels}
    with default_dtype(case.tokens.dtype):
        return trainer.compute_loss(policy, batch)


def singles(case: Case, other: Case, labels: Tensor) -> dict[str, Tensor]:
    scores = ((case.tokens - case.reference) * case.mask).sum(1)
    mismatched = ((other.tokens - other.reference) * other.mask).sum(1)
    return {"scores_C": scores, "grades_C": labels.to(scores.dtype), "mismatched_scores_M": mismatched}


def mismatched_case(positive: bool) -> Case:
    """Answers whose mean log-ratio is above 0, so that z_ref counts, or below, so that it is clamped."""
    other = Case(21)
    shift = 1.0 if positive else -1.0
    other.reference = (other.tokens.detach() - shift) * other.mask
    return other


@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0, 0, 1, 0], [1] * 8, [0] * 8], ids=["mixed", "good", "bad"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
@pytest.mark.parametrize("positive", [True, False], ids=["kl", "clamped"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto_trainers_losses(name: str, positive: bool, weights: tuple[float, float], labels: list[int]) -> None:
    case, other, label = Case(9), mismatched_case(positive), torch.tensor(labels, dtype=torch.bool)
    entry = REGISTRY[name]

    def mine() -> Tensor:
        inputs = singles(case, other, label)
        options = {"beta": BETA, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
        return entry.loss(*[inputs[key] for key in entry.inputs], **options).mean()

    assert max(gap(case, mine, lambda: trl_kto(case, other, label, name, weights))) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# CPO, SimPO, ORPO.


def trl_reference_free(trainer_class: type, case: Case, **options: Any) -> Tensor:
    """The batch's loss by `get_batch_loss_metrics`, on the log-probs that the trainer's own forward would return."""
    pairs = len(case.lengths) // 2
    logps = (case.tokens * case.mask).sum(1)
    if trainer_class is ORPOTrainer or options["loss_type"] in ("simpo", "ipo"):
        logps = logps / case.lengths
    nll = -case.tokens[:pairs][case.mask[:pairs]].mean()  # the mean over all chosen tokens of the batch
    zeros = torch.zeros(pairs, 2)
    trainer = bare(
        trainer_class, concatenated_forward=lambda *_: (logps[:pairs], logps[pairs:], zeros, zeros, nll), **options
    )
    loss, _ = trainer.get_batch_loss_metrics(None, {})
    return loss


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_cpo(alpha: float, label_smoothing: float) -> None:
    case = Case(10)
    theirs = dict(loss_type="sigmoid", alpha=0.0, cpo_alpha=alpha, label_smoothing=label_smoothing)
    difference = gap(
        case,
        lambda: ours(case, "cpo", cpo_alpha=alpha, label_smoothing=label_smoothing),
        lambda: trl_reference_free(CPOTrainer, case, **theirs),
    )
    assert max(difference) < 1e-12


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.4])
def test_simpo(gamma: float, label_smoothing: float) -> None:
    """TRL's SimPO is CPOTrainer's loss_type "simpo" with cpo_alpha 0; with 1, a mix of simpo and sft is the same."""
    case = Case(11)
    options = {"simpo_gamma": gamma, "label_smoothing": label_smoothing}
    theirs = dict(loss_type="simpo", alpha=0.0, **options)
    simpo = gap(
        case,
        lambda: ours(case, "simpo", **options),
        lambda: trl_reference_free(CPOTrainer, case, cpo_alpha=0.0, **theirs),
    )
    mix = gap(
        case,
        lambda: ours(case, "simpo", **options) + ours(case, "sft"),
        lambda: trl_reference_free(CPOTrainer, case, cpo_alpha=1.0, **theirs),
    )
    assert max(*simpo, *mix) < 1e-12


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["hinge", "ipo"])
def test_cpos_other_losses(name: str, alpha: float) -> None:
    case = Case(12)
    theirs = dict(loss_type=name, alpha=0.0, cpo_alpha=alpha, label_smoothing=0.0)
    mine = f"cpo_{name}"
    difference = gap(
        case, lambda: ours(case, mine, cpo_alpha=alpha), lambda: trl_reference_free(CPOTrainer, case, **theirs)
    )
    assert max(difference) < 1e-12
    # Negative control: sums in the place of means, or the other way round.
    other = {**theirs, "loss_type": {"hinge": "ipo", "ipo": "hinge"}[name]}
    assert (ours(case, mine, cpo_alpha=alpha) - trl_reference_free(CPOTrainer, case, **other)).abs() > 1e-2


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [-0.4, 0.5, 2.0])
def test_alphapo(alpha: float, label_smoothing: float) -> None:
    case = Case(12)
    options = {"simpo_gamma": 0.5, "label_smoothing": label_smoothing}
    theirs = dict(loss_type="simpo", alpha=alpha, cpo_alpha=0.0, **options)
    difference = gap(
        case,
        lambda: ours(case, "simpo", alphapo_alpha=alpha, **options),
        lambda: trl_reference_free(CPOTrainer, case, **theirs),
    )
    assert max(difference) < 1e-12
    assert (ours(case, "simpo", **options) - trl_reference_free(CPOTrainer, case, **theirs)).abs() > 1e-3


def test_orpo() -> None:
    """TRL casts to float32 for the odds; so the tolerance is float32's."""
    case = Case(12)
    difference = gap(case, lambda: ours(case, "orpo"), lambda: trl_reference_free(ORPOTrainer, case))
    assert max(difference) < 2e-6


# ---------------------------------------------------------------------------------------------------------------------
# Negative controls: the same comparison tells wrong losses apart. And the differences of the table above are real.


def test_flipped_signs_are_told_apart() -> None:
    case = Case(13)
    swapped = dict(chosen_scores_B="rejected_scores_B", rejected_scores_B="chosen_scores_B")
    found = our_inputs(case)

    def flipped() -> Tensor:
        found = our_inputs(case)
        return REGISTRY["sigmoid"].loss(**{key: found[other] for key, other in swapped.items()}, beta=BETA).mean()

    assert (found["chosen_scores_B"] - found["rejected_scores_B"]).abs().min() > 0.01
    assert min(gap(case, flipped, lambda: trl_dpo(case, ["sigmoid"]))) > 1e-2


def test_beta_twice_in_kto_is_told_apart() -> None:
    """The letter of (51): beta * r - z_ref with r = beta * log-ratio."""
    case, other, label = Case(14), mismatched_case(True), torch.tensor([1, 0] * 4, dtype=torch.bool)

    def twice() -> Tensor:
        inputs = singles(case, other, label)
        inputs["scores_C"] = BETA * inputs["scores_C"]
        return kto_loss(**inputs, beta=BETA).mean()

    value, gradient = gap(case, twice, lambda: trl_kto(case, other, label, "kto", (1.0, 1.0)))
    assert value > 1e-3 and gradient > 0.1


def test_ipo_of_sums_is_told_apart_from_trls() -> None:
    """The deliberate difference: on completions of one token the two forms are one; otherwise they are far apart."""
    case = Case(15)
    assert min(gap(case, lambda: ours(case, "ipo"), lambda: trl_dpo(case, ["ipo"]))) > 1e-2
    single = Case(15, lengths=(1,) * 8)
    assert max(gap(single, lambda: ours(single, "ipo"), lambda: trl_dpo(single, ["ipo"]))) < 1e-12


def test_length_weights_left_out_of_the_reference_are_told_apart() -> None:
    """T16: ld_alpha on the policy alone."""
    case = Case(16)

    def half() -> Tensor:
        weighted, plain = our_inputs(case, ld_alpha=0.4), our_inputs(case)
        scores = [weighted[f"{side}_logps_B"] - plain[f"ref_{side}_logps_B"] for side in ("chosen", "rejected")]
        return REGISTRY["sigmoid"].loss(*scores, beta=BETA).mean()

    assert min(gap(case, half, lambda: trl_dpo(case, ["sigmoid"], ld_alpha=0.4))) > 1e-2


def test_label_smoothing_of_sigmoid_is_ignored_by_trl_only() -> None:
    case = Case(17)
    assert trl_dpo(case, ["sigmoid"], label_smoothing=0.2) == trl_dpo(case, ["sigmoid"])
    assert (ours(case, "sigmoid", label_smoothing=0.2) - ours(case, "sigmoid")).abs() > 1e-2


def test_where_trl_is_not_finite() -> None:
    """discopop, forward_kl and orpo on extreme completions: nan or inf there, finite here."""
    for name, options, rows in (("discopop", {}, [0]), ("sigmoid", {"f_divergence_type": "forward_kl"}, [0, 4])):
        far = Case(18, torch.float32)
        unlikely = torch.isin(torch.arange(8), torch.tensor(rows))[:, None] & far.mask
        far.tokens = (far.tokens.detach() - 200 * unlikely).requires_grad_()
        assert trl_dpo(far, [name], **options).isnan()
        assert ours(far, name, **options).isfinite()
        assert torch.autograd.grad(ours(far, name, **options), far.tokens)[0].isfinite().all()
    with pytest.raises(KeyError):
        trl_dpo(Case(18), ["sigmoid"], f_divergence_type="alpha_divergence")
    certain = Case(19)
    certain.tokens = (certain.tokens.detach() * (torch.arange(8)[:, None] != 0)).requires_grad_()
    theirs, mine = trl_reference_free(ORPOTrainer, certain), ours(certain, "orpo")
    assert not torch.autograd.grad(theirs, certain.tokens)[0].isfinite().all()
    assert torch.autograd.grad(mine, certain.tokens)[0].isfinite().all()
