"""Micro-batches by a token budget: how rows are packed, and that the steps are those of the plain run."""

import itertools
import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_rows import NEEDED, rows_for
from parallel_run import SCRIPT, launch, train
from peft import LoraConfig
from run_figures import TOLERANCE, largest_difference, run, without_comparisons
from trainer_helpers import adapter_weights, id_pairs, lora, ours, step_logs
from transformers import HfArgumentParser

from dpo_peft import DPOConfig, DPOTrainer, NonFiniteError, OptionError, trainer
from dpo_peft.data.collator import PreferenceCollator, mismatch, with_keys
from dpo_peft.training import accumulation as stepping
from dpo_peft.training.memory_budget import MemoryBudget
from dpo_peft.training.packing import Shape, hang, level_bins, pack_rows, padded_bins, padded_size, size_of, to_device

# ---- Packing --------------------------------------------------------------------------------------------------------


def drawn_sizes(seed: int, most: int = 7) -> tuple[list[int], int]:
    """Up to `most` sizes and a budget that some of them may exceed."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, draw.choice([6, 20, 60])) for _ in range(draw.randint(1, most))]
    return sizes, draw.randint(5, 70)


def partitions(items: Sequence[int]) -> Any:
    """Every way to put the items into bins."""
    if not items:
        yield []
        return
    first, *rest = items
    for bins in partitions(rest):
        yield [[first], *bins]
        for place in range(len(bins)):
            yield [*bins[:place], [first, *bins[place]], *bins[place + 1 :]]


def check_bins(bins: list[list[int]], number: int, size: Callable[[Sequence[int]], int], budget: int) -> None:
    assert sorted(i for one in bins for i in one) == list(range(number))
    assert all(one == sorted(one) and one for one in bins)
    assert all(size(one) <= budget or len(one) == 1 for one in bins)
    assert [size(one) for one in bins] == sorted((size(one) for one in bins), reverse=True)


def test_bins_against_every_partition() -> None:
    """Hundreds of small cases: the fewest bins but for a rare one within first-fit's bound, their largest within
    Graham's bound of the smallest possible."""
    more = 0
    for seed in range(400):
        sizes, budget = drawn_sizes(seed)

        def size(rows: Sequence[int], sizes: list[int] = sizes) -> int:
            return sum(sizes[i] for i in rows)

        bins = level_bins(sizes, budget)
        check_bins(bins, len(sizes), size, budget)
        fits = [i for i, each in enumerate(sizes) if each <= budget]
        allowed = [p for p in partitions(fits) if all(size(one) <= budget for one in p)]
        packed = [one for one in bins if size(one) <= budget]
        fewest = min(map(len, allowed))
        assert len(bins) - len(packed) == len(sizes) - len(fits)
        assert len(packed) <= (11 * fewest + 6) / 9
        more += len(packed) > fewest
        smallest = min((max(map(size, p), default=0) for p in partitions(fits) if len(p) <= len(packed)), default=0)
        assert max(map(size, packed), default=0) <= 4 / 3 * smallest
    assert more <= 4


def test_bins_by_hand() -> None:
    assert level_bins([5, 5, 4, 4, 3, 3], 12) == [[0, 2, 4], [1, 3, 5]]  # 12 and 12, not 10, 11 and 3
    assert level_bins([9, 1, 1, 1], 10) == [[0], [1, 2, 3]]  # level, not [9, 1] and [1, 1]
    assert level_bins([3, 30, 3], 10) == [[1], [0, 2]]  # a row beyond the budget is alone
    assert level_bins([4, 4, 4], 4) == [[0], [1], [2]]
    assert level_bins([4, 4, 4], 12) == level_bins([4, 4, 4], 10**9) == [[0, 1, 2]]
    # Longest-first into two bins gives 3 + 2 + 2 = 7; first-fit needs no more than 6 + 6.
    assert level_bins([3, 3, 2, 2, 2], 6) == [[0, 1], [2, 3, 4]]
    assert level_bins([], 5) == padded_bins([], 5) == []


def test_bins_of_a_large_step_are_few_and_level() -> None:
    draw = random.Random(0)
    sizes = [draw.randint(50, 2000) for _ in range(500)]
    bins = level_bins(sizes, 8192)
    loads = [sum(sizes[i] for i in one) for one in bins]
    check_bins(bins, 500, lambda rows: sum(sizes[i] for i in rows), 8192)
    assert len(bins) == -(-sum(sizes) // 8192)
    assert max(loads) - min(loads) < 0.03 * max(loads)
    assert bins == level_bins(sizes, 8192)


def test_padded_bins_against_every_partition() -> None:
    """With two answers in each row no partition has fewer bins, and no cut of the sorted rows a smaller largest."""
    for seed in range(300):
        lengths, budget = drawn_sizes(seed)
        shapes = [Shape(2, length) for length in lengths]

        def size(rows: Sequence[int], shapes: list[Shape] = shapes) -> int:
            return padded_size(rows, shapes)

        bins = padded_bins(shapes, budget)
        check_bins(bins, len(shapes), size, budget)
        packed = [one for one in bins if size(one) <= budget]
        fits = [i for i in range(len(shapes)) if size([i]) <= budget]
        assert len(packed) == min(len(p) for p in partitions(fits) if all(size(one) <= budget for one in p))
        in_order = sorted(fits, key=lambda i: -lengths[i])
        cuts = [
            [in_order[a:b] for a, b in itertools.pairwise((0, *places, len(fits)))]
            for places in itertools.combinations(range(1, len(fits)), max(len(packed) - 1, 0))
        ]
        if fits:
            assert max(map(size, packed)) == min(max(map(size, one)) for one in cuts)


def test_padded_bins_of_uneven_lists() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        shapes = [Shape(draw.randint(1, 8), draw.randint(2, 40)) for _ in range(draw.randint(1, 30))]
        check_bins(padded_bins(shapes, 200), len(shapes), lambda rows, s=shapes: padded_size(rows, s), 200)  # type: ignore[misc]


def prepared(loss: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows as `prepare_dataset` makes them, of unequal lengths, with what the loss adds."""
    draw = random.Random(seed)

    def ids(shortest: int = 1) -> list[int]:
        return [draw.randrange(5, 200) for _ in range(draw.randint(shortest, 30))]

    rows = []
    for index in range(number):
        answers = [ids() for _ in range({"kto": 1, "multi_negative": 2 + index % 4}.get(loss, 2))]
        rows.append({"prompt_ids": ids(), "completion_ids": answers, "row": 100 + index})
        if loss == "trajectory":
            rows[-1] |= {"prompt_ids": ids() if index % 2 else [], "completion_ids": [[1, *a] for a in answers]}
            rows[-1]["steps"] = [[-1, *[draw.choice([-1, 0]) for _ in a[1:]], 1] for a in answers]
    return mismatch(rows)[0] if loss == "kto" else rows


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("loss", ["sigmoid", "multi_negative", "kto", "trajectory"])
def test_sizes_are_those_of_the_layout(loss: str, shared: bool) -> None:
    """What is counted from lengths against what the collator lays out, of single rows and of whole bins."""
    rows, collate = prepared(loss, 12), PreferenceCollator(shared)
    for row in rows:
        batch = collate([row])
        keys = len(batch["kv_index"]) if shared else batch["input_ids"].numel()
        tokens = batch["input_ids"].numel()
        # A token sees its position's number of keys and itself, which counts half.
        scores = float(batch["position_ids"].sum()) + tokens / 2 if shared else 0
        assert size_of(row, shared) == (tokens, keys, len(batch["target"]), 0, scores)
    bins = pack_rows(rows, 260, shared)
    tokens = [collate([rows[i] for i in one])["input_ids"].numel() for one in bins]
    assert 1 < len(bins) < 12 and tokens == sorted(tokens, reverse=True)
    assert all(each <= 260 or len(one) == 1 for each, one in zip(tokens, bins, strict=True))


def test_entries_hold_all_micro_batches_in_order() -> None:
    rows = prepared("sigmoid", 5)
    bins = [[4], [0, 2], [1], [3]]
    packs = [PreferenceCollator()([rows[i] for i in one]) for one in bins]
    for number in range(1, 7):
        entries = hang(packs, bins, number)
        assert len(entries) == number
        assert [pack for entry in entries for pack in entry["packs"]] == packs
        assert [i for entry in entries for i in entry["order"]] == [4, 0, 2, 1, 3]
        tokens = sum(size_of(row, True).tokens for row in rows)
        assert sum(entry["input_ids"].numel() for entry in entries) == tokens
        assert all(len(entry["packs"]) <= -(-4 // number) and "attention_mask" not in entry for entry in entries)
    assert [entry["packs"] for entry in hang([], [], 2)] == [[], []]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_way_to_the_gpu_does_not_wait() -> None:
    """Under a mode in which any wait for the GPU is an error; a copy that blocks is one."""
    batch, device = PreferenceCollator()(prepared("sigmoid", 3)), torch.device("cuda")
    torch.zeros(1, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = to_device(batch, device)
        with pytest.raises(RuntimeError, match="synchroniz"):
            batch["input_ids"].to(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {name for name, value in moved.items() if isinstance(value, torch.Tensor) and not value.is_cuda} == set()
    assert torch.equal(moved["input_ids"].cpu(), batch["input_ids"]) and moved["max_q"] == batch["max_q"]


# ---- Training -------------------------------------------------------------------------------------------------------

ROWS = 21  # optimizer steps of 8, 8 and 5 rows, two epochs of them
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
TRAINING = {"max_steps": -1, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0}
IN_ORDER = {"train_sampling_strategy": "sequential"}
LOSSES: dict[str, dict[str, Any]] = {
    name: {"loss_type": name.split("+"), **NEEDED.get(name, {})}
    for name in ("sigmoid", "ipo", "kto", "aot", "multi_negative", "orpo", "trajectory", "sigmoid+sft")
}
LOSSES["ipo"] = {"loss_type": ["ipo"], "learning_rate": 2e-5}  # its gradients are of the order of 1000
BY_LENGTH = ("length_only", "chosen_longer", "chosen_shorter", "length_balanced")
# Of single answers: see metrics.py.
ACROSS_ROWS = ("rewards/margins", "rewards/accuracies", *(f"accuracies/{kind}" for kind in BY_LENGTH))
EXEMPT = ("epoch", "learning_rate", "step", "num_input_tokens_seen")


def tokens_of(row: dict[str, Any]) -> int:
    """Of a raw row, each prompt once; counted here for itself."""
    rejected = row.get("rejected_ids", [])
    lists = rejected if rejected and isinstance(rejected[0], list) else [rejected]
    answers = [row[name] for name in ("chosen_ids", "completion_ids") if name in row] + lists
    return len(row["prompt_ids"]) + sum(map(len, answers))


def built(model: Any, rows: Any, tokenizer: Any, folder: Path, **options: Any) -> DPOTrainer:
    """A trainer away from the reference, where KTO's z_ref is not zero and a sort has something to sort."""
    made = ours(model, rows, tokenizer, folder, **{**TRAINING, **options})
    made.reference.start_checked = True
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=draw))
    return made


def trained(*args: Any, **options: Any) -> DPOTrainer:
    made = built(*args, **options)
    made.train()
    return made


def spied(monkeypatch: pytest.MonkeyPatch, most_rows: int = 10**9) -> list[Any]:
    """The batches of the policy's passes from now on; one with more than `most_rows` rows runs out of memory."""
    passes: list[Any] = []
    forward = trainer.completion_logps

    def watched(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.num_samples > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        passes.append(batch)
        return forward(model, batch, *args, **kwargs)

    monkeypatch.setattr(trainer, "completion_logps", watched)
    return passes


def furthest(a: DPOTrainer, b: DPOTrainer, without: Sequence[str] = ()) -> tuple[float, str]:
    """Between the logs of all steps of two runs, relative to figures above 1; both must have the same ones."""
    found = [(0.0, "")]
    for left, right in zip(step_logs(a), step_logs(b), strict=True):
        names = left.keys() - set(EXEMPT) - set(without)
        assert names == right.keys() - set(EXEMPT) - set(without)
        for name in names:
            # It adds up exponentials of log-ratios, whose rounding is of float32.
            scale = 5 if name == "kl" else 1
            found.append((abs(left[name] - right[name]) / max(1.0, abs(left[name])) / scale, name))
    return max(found)


def weights_apart(a: DPOTrainer, b: DPOTrainer) -> float:
    expected = adapter_weights(b)
    return max(float((weight - expected[name]).abs().max()) for name, weight in adapter_weights(a).items())


def across_rows(loss: str) -> tuple[str, ...]:
    return ACROSS_ROWS if loss == "kto" else ()


@pytest.mark.slow
@pytest.mark.sampled(99, slow=3)
@pytest.mark.parametrize("loss", LOSSES)
def test_any_budget_gives_the_steps_of_the_plain_run(
    loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs with an uneven last step. 1 token: every row alone. Small: several packs. The tokens of the largest
    step: one pack each. Huge: the same."""
    rows, tokenizer, passes = rows_for(loss.split("+")[0], ROWS), make_tokenizer(), spied(monkeypatch)
    options = {**LOSSES[loss], **IN_ORDER}
    plain = trained(tiny_llama(), rows, tokenizer, tmp_path, **WHOLE, **options)
    assert [batch.num_samples for batch in passes] == [8, 8, 5] * 2
    largest = max(batch.input_ids.numel() for batch in passes)
    assert step_logs(plain)[-1]["grad_norm"] > 1e-2
    before = plain.objective.batch_coupled  # then a pass over all packs goes before those with gradients
    for budget in (1, 80, largest, 10**9):
        passes.clear()
        packed = trained(tiny_llama(), rows, tokenizer, tmp_path, max_tokens_per_microbatch=budget, **SPLIT, **options)
        difference, where = furthest(packed, plain, across_rows(loss))
        assert difference < 2e-6, where
        assert weights_apart(packed, plain) < 2e-6
        assert all(batch.input_ids.numel() <= budget or batch.num_samples == 1 for batch in passes)
        if budget == 1:
            assert len(passes) == 2 * ROWS * (1 + before)
        elif budget == 80:
            assert 6 < len(passes) < 2 * ROWS * (1 + before) and max(batch.num_samples for batch in passes) > 1
        else:
            assert [batch.num_samples for batch in passes] == [8, 8, 5] * 2


@pytest.mark.parametrize("split", [(8, 1), (2, 4), (1, 8)])
def test_the_budget_counts_for_the_whole_step_however_it_is_read(
    split: tuple[int, int], tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same packs from 8x1, 2x4 and 1x8, bit for bit; rows in random order."""
    rows, tokenizer, passes = id_pairs(ROWS), make_tokenizer(), spied(monkeypatch)
    one = trained(tiny_llama(), rows, tokenizer, tmp_path, max_tokens_per_microbatch=80, **SPLIT)
    expected = [batch.rows.tolist() for batch in passes]
    passes.clear()
    options = {"per_device_train_batch_size": split[0], "gradient_accumulation_steps": split[1]}
    other = trained(tiny_llama(), rows, tokenizer, tmp_path, max_tokens_per_microbatch=80, **options)
    assert [batch.rows.tolist() for batch in passes] == expected
    assert weights_apart(one, other) == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", ["sigmoid", "multi_negative", "kto"])
def test_padded_rows_keep_the_budget_too(
    loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tokenizer, passes = rows_for(loss, ROWS), make_tokenizer(), spied(monkeypatch)
    options = {"share_prompts": False, **LOSSES[loss]}
    plain = trained(tiny_llama(), rows, tokenizer, tmp_path, **WHOLE, **options)
    whole = max(batch.input_ids.numel() for batch in passes)
    passes.clear()
    packed = trained(tiny_llama(), rows, tokenizer, tmp_path, max_tokens_per_microbatch=150, **SPLIT, **options)
    assert furthest(packed, plain, across_rows(loss))[0] < 2e-6
    assert weights_apart(packed, plain) < 2e-6
    sizes = [batch.input_ids.numel() for batch in passes if batch.num_samples > 1]
    assert whole > 200 and 75 < max(sizes) <= 150 and not passes[0].shared


def test_a_collator_of_the_users_own_lays_out_each_pack(
    tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one that pads where the trainer would not: the budget counts what it lays out."""
    rows, tokenizer, passes = id_pairs(ROWS), make_tokenizer(), spied(monkeypatch)
    laid_out: list[list[int]] = []

    def collate(given: Sequence[dict[str, Any]]) -> dict[str, Any]:
        laid_out.append([row["row"] for row in given])
        return PreferenceCollator(shared=False)(given)

    packed = trained(
        tiny_llama(), rows, tokenizer, tmp_path, data_collator=collate, max_tokens_per_microbatch=150, **SPLIT
    )
    assert [batch.rows.tolist() for batch in passes] == laid_out[2:]  # the first are tried, and show how it lays out
    assert max(batch.input_ids.numel() for batch in passes if batch.num_samples > 1) <= 150
    plain = trained(tiny_llama(), rows, tokenizer, tmp_path, **WHOLE)
    assert furthest(packed, plain)[0] < 2e-6


def test_cached_reference(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """The second epoch reads what the first has computed; packs carry the keys of their own completions."""
    rows, tokenizer = id_pairs(ROWS), make_tokenizer()
    plain = trained(tiny_llama(), rows, tokenizer, tmp_path, **WHOLE)
    options = {"cache_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    packed = trained(tiny_llama(), rows, tokenizer, tmp_path, max_tokens_per_microbatch=80, **SPLIT, **options)
    assert packed.collate.func is with_keys
    assert packed.reference.counts() == {"ref_cache/hits": 2.0 * ROWS, "ref_cache/misses": 2.0 * ROWS}
    assert furthest(packed, plain, ("kl", "ref_cache/hits", "ref_cache/misses"))[0] < 2e-6


def test_a_stream(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Its last step is as uneven, and the budget packs it as the rows of a dataset."""
    rows, tokenizer = rows_for("kto", ROWS), make_tokenizer()
    options = {"max_tokens_per_microbatch": 60, "max_steps": 3, **LOSSES["kto"], **SPLIT, **IN_ORDER}
    whole = trained(tiny_llama(), rows, tokenizer, tmp_path, **options)
    options.pop("train_sampling_strategy")
    stream = trained(tiny_llama(), rows.to_iterable_dataset(), tokenizer, tmp_path, **options)
    assert furthest(whole, stream)[0] == 0
    assert weights_apart(whole, stream) == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("counted", ["all", "non_padding"])
def test_tokens_and_flops_are_counted(
    counted: str, shared: bool, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """Of two epochs: each row's tokens, in the padded layout without padding if so asked."""
    rows, tokenizer = id_pairs(ROWS), make_tokenizer()
    options = {"include_num_input_tokens_seen": counted, "share_prompts": shared, **SPLIT}
    made = trained(tiny_llama(), rows, tokenizer, tmp_path, max_tokens_per_microbatch=10**9, **options)
    plain = trained(tiny_llama(), rows, tokenizer, tmp_path, **{**options, **WHOLE})
    assert made.state.num_input_tokens_seen == plain.state.num_input_tokens_seen > 0
    assert made.state.total_flos == plain.state.total_flos > 0
    if shared:
        assert made.state.num_input_tokens_seen == 2 * sum(map(tokens_of, rows))


def test_the_first_step_is_described(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    rows = id_pairs(ROWS)
    sizes = [tokens_of(row) for row in rows][:8]
    budget = max(sizes)
    number = len(level_bins(sizes, budget))
    with caplog.at_level(logging.INFO):
        options = {"max_tokens_per_microbatch": budget, **SPLIT, **IN_ORDER}
        built(tiny_llama(), rows, make_tokenizer(), tmp_path, eval_dataset=rows, **options).evaluate()
        assert not [r for r in caplog.records if "is packed" in r.getMessage()]
        trained(tiny_llama(), rows, make_tokenizer(), tmp_path, **options)
    (said,) = [r.getMessage() for r in caplog.records if "is packed" in r.getMessage()]
    assert said.startswith(f"The first optimizer step is packed: 8 rows in {number} micro-batches, the largest of ")
    assert f"the budget is {budget}, and {sum(sizes) / number / budget:.0%} of it is used." in said


def test_auto_asks_the_trainer(
    tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is one method's answer to the sizes of the step's rows."""
    rows, passes, asked = id_pairs(ROWS), spied(monkeypatch), []
    monkeypatch.setattr(MemoryBudget, "microbatch_tokens", lambda self, samples: asked.append(samples) or 80)
    options = {"max_tokens_per_microbatch": "auto", **SPLIT, **IN_ORDER}
    trained(tiny_llama(), rows, make_tokenizer(), tmp_path, **options)
    assert len(asked) == 6 and [len(samples) for samples in asked[:3]] == [8, 8, 5]
    row = rows[9]
    lengths = [len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert asked[1][1][:4] == (sum(lengths), 3 * lengths[0] + lengths[1] + lengths[2], lengths[1] + lengths[2], 0)
    assert 40 < max(batch.input_ids.numel() for batch in passes) <= 80


# ---- That the comparison can fail -----------------------------------------------------------------------------------


def per_pack_totals(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
    return COMPUTE_LOSS(self, model, inputs, return_outputs, None)


COMPUTE_LOSS, PACK_ROWS = DPOTrainer.compute_loss, stepping.pack_rows
BREAKS: dict[str, tuple[str, Any, str, Any]] = {
    "totals per pack": ("sigmoid", DPOTrainer, "compute_loss", per_pack_totals),
    "a lost pack": ("sigmoid", stepping, "pack_rows", lambda *args, **kwargs: PACK_ROWS(*args, **kwargs)[:-1]),
    "aot per pack": ("aot", stepping.OptimizerStep, "couple", lambda *args: None),
    "kto per pack": ("kto", stepping.OptimizerStep, "couple", lambda *args: None),
}


@pytest.mark.parametrize("what", BREAKS)
def test_the_comparison_tells(
    what: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, owner, name, replacement = BREAKS[what]
    rows, tokenizer = rows_for(loss, ROWS), make_tokenizer()
    plain = trained(tiny_llama(), rows, tokenizer, tmp_path, **WHOLE, **LOSSES[loss])
    monkeypatch.setattr(owner, name, replacement)
    broken = trained(tiny_llama(), rows, tokenizer, tmp_path, max_tokens_per_microbatch=60, **SPLIT, **LOSSES[loss])
    assert furthest(broken, plain, across_rows(loss))[0] > 1e-3


# ---- Evaluation and resuming ----------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", ["sigmoid", "kto", "aot", "multi_negative"])
def test_evaluation(
    loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 8 rows within the budget: the same metrics, and predictions in the order of the rows."""
    rows, tokenizer = rows_for(loss, ROWS), make_tokenizer()
    options = {"per_device_eval_batch_size": 8, "eval_dataset": rows, **LOSSES[loss]}
    plain = built(tiny_llama(), rows, tokenizer, tmp_path, **options)
    packed = built(tiny_llama(), rows, tokenizer, tmp_path, max_tokens_per_microbatch=80, **options)
    expected, passes = plain.predict(rows), spied(monkeypatch)
    found = packed.predict(rows)
    assert [row for batch in passes for row in batch.rows.tolist()] != list(range(ROWS))  # they were reordered
    torch.testing.assert_close(*map(torch.tensor, (found.predictions, expected.predictions)), rtol=0, atol=2e-6)
    assert (found.label_ids == expected.label_ids).all()
    own = [batch for batch in passes if batch.num_samples > 1]
    assert 40 < max(batch.input_ids.numel() for batch in own) <= 80
    a, b = packed.evaluate(), plain.evaluate()
    names = [n for n in b if n.startswith("eval_") and not n.endswith(("time", "_per_second"))]
    for name in set(names) - {f"eval_{name}" for name in across_rows(loss)}:
        assert a[name] == pytest.approx(b[name], rel=1e-5 if name.endswith("kl") else 2e-6, abs=2e-6), name


@pytest.mark.parametrize("kind", ["kto", "dropout"])
def test_a_resumed_run_is_the_straight_one(kind: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Bit for bit. With dropout the masks depend on which rows share a pack."""
    loss = "kto" if kind == "kto" else "sigmoid"
    rows, tokenizer = rows_for(loss, ROWS), make_tokenizer()
    options = {"max_tokens_per_microbatch": 80, "save_strategy": "steps", "save_steps": 2, **SPLIT, **LOSSES[loss]}
    if kind == "dropout":
        config: LoraConfig = lora(lora_dropout=0.2)
        options |= {"peft_config": config, "disable_dropout": False}
    straight = trained(tiny_llama(), rows, tokenizer, tmp_path, **options)
    for step in (2, 4):  # in the middle of the first and of the second epoch
        again = built(tiny_llama(), rows, tokenizer, tmp_path, **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert weights_apart(straight, again) == 0
        assert step_logs(straight) == step_logs(again)
    if kind == "dropout":
        other = trained(tiny_llama(), rows, tokenizer, tmp_path, **{**options, "max_tokens_per_microbatch": 60})
        assert weights_apart(straight, other) > 1e-4


# ---- Memory and numbers ---------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", ["sigmoid", "kto", "aot", "multi_negative"])
def test_packs_that_do_not_fit_are_halved(
    loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """8 rows in a pack, 4, 2; remembered by the checkpoints."""
    rows, tokenizer = rows_for(loss, ROWS), make_tokenizer()
    plain = trained(tiny_llama(), rows, tokenizer, tmp_path / "plain", **WHOLE, **LOSSES[loss])
    options = {"max_tokens_per_microbatch": 10**9, "save_strategy": "steps", "save_steps": 3, **SPLIT, **LOSSES[loss]}
    with monkeypatch.context() as limited, caplog.at_level(logging.WARNING):
        passes = spied(limited, most_rows=2)
        halved = trained(tiny_llama(), rows, tokenizer, tmp_path / "halved", **options)
    assert halved.step.halvings == 2
    assert max(batch.num_samples for batch in passes) == 2
    warnings = [r.getMessage() for r in caplog.records if "Out of memory" in r.getMessage()]
    assert len(warnings) == 2 and "8 rows" in warnings[0] and "Lower max_tokens_per_microbatch" in warnings[0]
    assert furthest(halved, plain, across_rows(loss))[0] < 2e-6
    assert weights_apart(halved, plain) < 2e-6
    passes = spied(monkeypatch)
    resumed = built(tiny_llama(), rows, tokenizer, tmp_path / "halved", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "halved" / "checkpoint-3"))
    assert resumed.step.halvings == 2 and max(batch.num_samples for batch in passes) == 2
    assert weights_apart(resumed, halved) == 0


def test_memory_that_runs_out_in_a_later_pack(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """The gradients of the packs before it must not count twice, on whichever entry they hang."""
    rows, tokenizer = id_pairs(ROWS), make_tokenizer()
    plain = trained(tiny_llama(), rows, tokenizer, tmp_path, **WHOLE)
    interrupted = built(tiny_llama(), rows, tokenizer, tmp_path, max_tokens_per_microbatch=80, **SPLIT)
    calls = 0

    def fail_once(gradient: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainable = [p for p in interrupted.model.parameters() if p.requires_grad]
    trainable[len(trainable) // 2].register_hook(fail_once)
    interrupted.train()
    assert interrupted.step.halvings == 1
    assert furthest(interrupted, plain)[0] < 2e-6
    assert weights_apart(interrupted, plain) < 2e-6


def test_one_row_that_does_not_fit(
    tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spied(monkeypatch, most_rows=0)
    made = built(tiny_llama(), id_pairs(ROWS), make_tokenizer(), tmp_path, max_tokens_per_microbatch=1, **SPLIT)
    with pytest.raises(torch.OutOfMemoryError, match="single row.*Lower max_length"):
        made.train()


def test_a_row_that_gives_nan_is_named(
    tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = trainer.completion_logps

    def poisoned(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        scores = forward(model, batch, *args, **kwargs)
        bad_C = ((batch.rows == 3) | (batch.rows == 6))[batch.sample_of]
        return type(scores)(scores.token_logps_N, scores.logps_C.masked_fill(bad_C, float("nan")), None)

    monkeypatch.setattr(trainer, "completion_logps", poisoned)
    options = {"max_tokens_per_microbatch": 60, **SPLIT, **IN_ORDER}
    made = built(tiny_llama(), id_pairs(ROWS), make_tokenizer(), tmp_path, **options)
    with pytest.raises(NonFiniteError, match=r"the loss is not finite, on training rows [36], [36]\.") as raised:
        made.train()
    assert "3" in str(raised.value) and "6" in str(raised.value)


# ---- The option -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -5, 4096.0, True, "many", "-1", "4e3", [4096]])
def test_what_is_no_budget(value: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"max_tokens_per_microbatch=.* must be a whole number from 1, 'auto' or"):
        DPOConfig(str(tmp_path), use_cpu=True, max_tokens_per_microbatch=value)


def test_budgets(tmp_path: Path) -> None:
    for value, meant in ((None, None), ("auto", "auto"), (1, 1), ("4096", 4096)):
        config = DPOConfig(str(tmp_path), use_cpu=True, max_tokens_per_microbatch=value)
        assert config.max_tokens_per_microbatch == meant
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--max_tokens_per_microbatch"]
    for text, meant in (("auto", "auto"), ("8192", 8192)):
        (config,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses([*arguments, text])
        assert config.max_tokens_per_microbatch == meant


def test_a_coupled_loss_is_not_packed_under_dropout(tmp_path: Path) -> None:
    """Its pass over the whole step and those with gradients would draw different masks."""
    options = {"use_cpu": True, "loss_type": "kto", "disable_dropout": False}
    DPOConfig(str(tmp_path), **options)
    with pytest.raises(OptionError, match="disable_dropout=False with loss_type kto needs .*max_tokens_per_micro"):
        DPOConfig(str(tmp_path), max_tokens_per_microbatch=4096, **options)


# ---- Several processes ----------------------------------------------------------------------------------------------

# 13 rows in batches of 4: the last one leaves rank 1 without a row; of 9 rows rank 1 has nothing in the last step.
PACKED = {"max_tokens_per_microbatch": 40}
COUNTED = {"include_num_input_tokens_seen": "all"}
PARALLEL = [
    run("sigmoid", eval_rows=7, metrics=True, options=COUNTED),
    run("one_row_left", rows=9, options={"gradient_accumulation_steps": 2, **COUNTED}),
    run("lists", "multi_negative", rows=11, options={"gradient_accumulation_steps": 2}, eval_rows=5),
    run("kto", "kto", rows=9, options={"gradient_accumulation_steps": 2}, eval_rows=5),
    run("aot", "aot", eval_rows=5),
    run("stream", stream=3, options={"max_steps": 8}),
]


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, make_tokenizer: Any) -> Path:
    """All runs with a budget in two processes; the folder of their results."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    packed = [{**one, "options": {**one.get("options", {}), **PACKED}} for one in PARALLEL]
    (folder / "case.json").write_text(json.dumps(packed))
    launch(SCRIPT, [str(folder / "case.json")], folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [one["name"] for one in PARALLEL])
def test_two_processes_with_a_budget_train_as_one_without(name: str, in_two_processes: Path) -> None:
    alone = train(next(one for one in PARALLEL if one["name"] == name), str(in_two_processes), 1, 0)
    ranks = [json.loads((in_two_processes / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    assert largest_difference(ranks[0], ranks[1])[0] == 0.0
    if name == "kto":
        alone, *ranks = (without_comparisons(result) for result in (alone, *ranks))
    difference, where = largest_difference(alone, ranks[0])
    assert difference <= 2 * TOLERANCE, where
