"""The reference's log-probs from the disk: the same training, each completion computed once, never a wrong value.

Traps T6 (a cache that outlives its tokens) and T6b (one that is thrown away without need).
"""

import logging
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from objective_rows import rows_for
from peft import PeftModel, get_peft_model
from trainer_helpers import adapter_weights, id_pairs, lora, ours, step_logs

from dpo_peft import OptionError, ReferenceMismatchError
from dpo_peft.model.base import nf4_config
from dpo_peft.reference.cache import Entry, summary
from dpo_peft.reference.policy import ReferencePolicy
from dpo_peft.training import ahead

ROWS = 10


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Completions of every forward pass that is made to fill the cache."""
    sizes: list[int] = []
    fill = ReferencePolicy.fill

    def counted(self: Any, batch: Any) -> Any:
        sizes.append(batch.num_completions)
        return fill(self, batch)

    monkeypatch.setattr(ReferencePolicy, "fill", counted)
    return sizes


def run(model: Any, make_tokenizer: Any, folder: Path, cache: Path | None, **changed: Any) -> Any:
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "max_steps": -1, **changed}
    if cache is not None:
        options |= {"ref_cache_dir": str(cache)}
        if not options.get("precompute_ref_log_probs"):
            options["cache_ref_log_probs"] = True
    rows = options.pop("data", None)
    trainer = ours(model, id_pairs(ROWS) if rows is None else rows, make_tokenizer(), folder, **options)
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [log["loss"] for log in step_logs(trainer)]


# ---- The same training ----------------------------------------------------------------------------------------------

TURNS = Dataset.from_list(
    [
        {
            "chosen": [{"role": r, "content": c} for r, c in zip("uaua", texts, strict=True)],
            "rejected": [
                {"role": r, "content": c} for r, c in zip("uaua", [*texts[:3], f"no {texts[3]}"], strict=True)
            ],
        }
        for texts in (["the cat", "a mat", "and", f"old tree {i}"] for i in range(8))
    ]
).map(lambda row: {k: [{**m, "role": {"u": "user", "a": "assistant"}[m["role"]]} for m in row[k]] for k in row})

OBJECTIVES = {
    "sigmoid": {},
    "ld_alpha": {"ld_alpha": 0.5},
    "aot": {"loss_type": "aot"},
    "padded": {"share_prompts": False},
    "trajectory": {"loss_type": "trajectory", "discount_gamma": 0.5, "data": TURNS},
}


@pytest.mark.sampled(5, slow=2)
@pytest.mark.parametrize("mode", ["lazy", "precomputed"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cached_equals_computed(tiny_llama, make_tokenizer, tmp_path, computed, objective, mode):
    options = OBJECTIVES[objective]
    cached_options = {**options, "precompute_ref_log_probs": mode == "precomputed"}
    expected = run(tiny_llama(), make_tokenizer, tmp_path / "plain", None, **options)
    trainer = run(tiny_llama(), make_tokenizer, tmp_path / "cached", tmp_path / "store", **cached_options)
    assert losses(trainer) == pytest.approx(losses(expected), abs=2e-6)
    weights = adapter_weights(expected)
    difference = max(float((w - weights[n]).abs().max()) for n, w in adapter_weights(trainer).items())
    assert difference < 2e-5
    rows = len(trainer.train_dataset)
    assert sum(computed) == 2 * rows  # each completion once, in two epochs
    hits, misses = (step_logs(trainer)[-1][f"ref_cache/{name}"] for name in ("hits", "misses"))
    assert (hits, misses) == ((4 * rows, 0) if mode == "precomputed" else (2 * rows, 2 * rows))
    # kl reads the reference token by token: it is there where the store has them.
    tokens = objective in ("ld_alpha", "trajectory")
    assert all(("kl" in log) == tokens for log in step_logs(trainer))


def test_tokens_on_request(tiny_llama, make_tokenizer, tmp_path, computed):
    expected = run(tiny_llama(), make_tokenizer, tmp_path / "plain", None)
    run(tiny_llama(), make_tokenizer, tmp_path / "sums", tmp_path / "store")
    trainer = run(tiny_llama(), make_tokenizer, tmp_path / "tokens", tmp_path / "store", ref_cache_tokens=True)
    assert [log["kl"] for log in step_logs(trainer)] == pytest.approx(
        [log["kl"] for log in step_logs(expected)], abs=1e-6
    )
    assert sum(computed) == 4 * ROWS  # sums do not do for tokens
    computed.clear()
    run(tiny_llama(), make_tokenizer, tmp_path / "again", tmp_path / "store")
    assert not computed  # tokens do for sums


# ---- T6b: computed once ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_computes_the_reference_once(tiny_llama, make_tokenizer, tmp_path, computed):
    evaluation = {"eval_dataset": id_pairs(3, seed=8), "eval_strategy": "epoch", "num_train_epochs": 1}
    for beta, rate, rank, seed in product([0.1, 0.5], [1e-3, 1e-4], [2, 4], [0, 1]):
        options = {"beta": beta, "learning_rate": rate, "peft_config": lora(r=rank), "seed": seed, **evaluation}
        folder = tmp_path / f"{beta}-{rate}-{rank}-{seed}"
        trainer = run(tiny_llama(), make_tokenizer, folder, tmp_path / "store", **options)
    assert sum(computed) == 2 * (ROWS + 3)
    assert trainer.reference.store.misses == 0
    (line,) = summary(tmp_path / "store")
    assert line.entries == 2 * (ROWS + 3)


# ---- T6: never a stale value ----------------------------------------------------------------------------------------


def trained_adapter(tiny_llama: Any, seed: int) -> PeftModel:
    model = get_peft_model(tiny_llama(), lora())
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.attack("stale caches")
@pytest.mark.slow
def test_what_changes_the_reference_misses(tiny_llama, make_tokenizer, tmp_path, base_folder):
    def count(model: Any, **changed: Any) -> int:
        trainer = run(model, make_tokenizer, tmp_path / "run", tmp_path / "store", num_train_epochs=1, **changed)
        return trainer.reference.store.misses

    everything = 2 * ROWS
    assert count(tiny_llama()) == everything and count(tiny_llama()) == 0
    changed = id_pairs(ROWS).to_list()
    changed[3]["prompt_ids"][0] += 1
    assert count(tiny_llama(), data=Dataset.from_list(changed)) == 2  # the prompt of two completions
    answers = [(len(r["prompt_ids"]), len(r[k])) for r in id_pairs(ROWS) for k in ("chosen_ids", "rejected_ids")]
    longest = max(prompt + own for prompt, own in answers)
    assert count(tiny_llama(), max_length=longest) == 0
    assert count(tiny_llama(), max_length=longest - 1) == sum(prompt + own == longest for prompt, own in answers)
    assert count(tiny_llama(seed=1)) == everything
    assert count(trained_adapter(tiny_llama, 1)) == everything and count(trained_adapter(tiny_llama, 1)) == 0
    assert count(trained_adapter(tiny_llama, 2)) == everything
    assert count(trained_adapter(tiny_llama, 2), reference="base") == 0  # the bare base again
    assert count(tiny_llama(), bf16=True) == everything
    assert count(base_folder) == everything  # bfloat16, NF4
    double = {"model_init_kwargs": {"dtype": "float32"}}
    assert count(base_folder, **double) == everything
    other = nf4_config(torch.bfloat16)  # the same 4-bit weights, computed in another dtype
    assert count(base_folder, **double, quantization_config=other) == everything
    assert count(base_folder, **double, quantize_base=False) == 0  # loaded from disk, it is the model of the beginning
    assert count(tiny_llama(), share_prompts=False) == everything  # another layout has other last bits


def test_a_wrong_store_is_found_out(tiny_llama, make_tokenizer, tmp_path):
    """Not by the store, whose entries are whole: by comparing a few of them with the model before training."""
    trainer = ours(
        tiny_llama(),
        id_pairs(4),
        make_tokenizer(),
        tmp_path / "a",
        cache_ref_log_probs=True,
        ref_cache_dir=str(tmp_path),
    )
    batch = trainer.collate([trainer.train_dataset[i] for i in range(4)])
    trainer.reference.store.put(batch["keys"], [Entry(-3.0, None)] * 8)
    with pytest.raises(ReferenceMismatchError, match="cached reference is not this one.*dpo-peft cache --clear"):
        trainer.train()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("objective", ["kto", "sigmoid"])
def test_a_second_run_in_bfloat16_keeps_its_store(tiny_llama, make_tokenizer, tmp_path, objective):
    """The first rows are short: in any batches of them alone their values are the same to the last bit. The stored
    values were computed beside longer rows."""
    draw = random.Random(1)
    sizes = [(2, 2), (3, 2), (2, 3), (3, 3), *[(20 + 5 * i, 30) for i in range(6)]]
    ids = [[[draw.randrange(5, 270) for _ in range(n)] for n in (own, *2 * [answer])] for own, answer in sizes]
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in ids]
    options = {"loss_type": objective, "bf16": True, "precompute_ref_log_probs": True, "max_steps": 1}
    for name in "ab":
        model = tiny_llama().to(torch.bfloat16)
        trainer = run(model, make_tokenizer, tmp_path / name, tmp_path, data=Dataset.from_list(rows), **options)
    assert trainer.reference.store.misses == 0


@pytest.mark.attack("damaged or mixed files")
def test_flipped_bytes_are_computed_again(tiny_llama, make_tokenizer, tmp_path, computed, caplog):
    store = tmp_path / "store"
    expected = run(tiny_llama(), make_tokenizer, tmp_path / "a", store).train_dataset
    computed.clear()
    files = [path for path in store.iterdir() if path.is_file()]
    path = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content), 97):
        content[place] ^= 0x20
    path.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        again = run(tiny_llama(), make_tokenizer, tmp_path / "b", store)
    plain = run(tiny_llama(), make_tokenizer, tmp_path / "c", None)
    assert losses(again) == pytest.approx(losses(plain), abs=2e-6)
    assert 0 < sum(computed) <= 2 * len(expected)
    assert any("cache" in r.getMessage() and r.levelno >= logging.WARNING for r in caplog.records)


# ---- Precomputing ---------------------------------------------------------------------------------------------------


@pytest.mark.attack("killed while writing")
def test_precomputing_goes_on_after_a_kill(tiny_llama, make_tokenizer, tmp_path, computed, monkeypatch):
    """With the same values, to the bit, as without the kill."""
    options = {"precompute_ref_log_probs": True, "precompute_ref_tokens": 40, "data": id_pairs(20)}
    straight = run(tiny_llama(), make_tokenizer, tmp_path / "a", tmp_path / "straight", **options)
    passes = list(computed)
    assert len(passes) > 6
    computed.clear()
    fill = ReferencePolicy.fill
    with monkeypatch.context() as killed:
        killed.setattr(ReferencePolicy, "fill", lambda self, batch: 1 / 0 if len(computed) == 4 else fill(self, batch))
        with pytest.raises(ZeroDivisionError):
            run(tiny_llama(), make_tokenizer, tmp_path / "b", tmp_path / "store", **options)
    again = run(tiny_llama(), make_tokenizer, tmp_path / "b", tmp_path / "store", **options)
    assert computed == passes  # four before the kill, the rest after it
    assert losses(again) == losses(straight)
    assert all(torch.equal(w, adapter_weights(straight)[n]) for n, w in adapter_weights(again).items())


@pytest.mark.parametrize("streamed", ["train", "eval"])
def test_a_stream_can_not_be_precomputed(tiny_llama, make_tokenizer, tmp_path, streamed):
    rows = {"train": id_pairs(4), "eval": id_pairs(4)}
    rows[streamed] = rows[streamed].to_iterable_dataset()
    options = {"precompute_ref_log_probs": True, "max_steps": 2, "eval_dataset": {"far": rows["eval"]}}
    with pytest.raises(OptionError, match="a stream can't be read ahead: set cache_ref_log_probs"):
        ours(tiny_llama(), rows["train"], make_tokenizer(), tmp_path, **options)


def test_evaluation_rows_are_precomputed_too(tiny_llama, make_tokenizer, tmp_path, computed):
    options = {"precompute_ref_log_probs": True, "eval_strategy": "epoch", "num_train_epochs": 1}
    both = {"near": id_pairs(3, seed=4), "far": id_pairs(2, seed=5)}
    trainer = run(tiny_llama(), make_tokenizer, tmp_path / "a", tmp_path / "store", eval_dataset=both, **options)
    assert sum(computed) == 2 * (ROWS + 5) and trainer.reference.store.misses == 0


# ---- KTO: completions that meet other prompts -----------------------------------------------------------------------

KTO: dict[str, Any] = {"loss_type": "kto", "per_device_train_batch_size": 2, "learning_rate": 1e-2}
KTO |= {"eval_strategy": "epoch", "per_device_eval_batch_size": 3, "gradient_accumulation_steps": 2}


def kto(model: Any, make_tokenizer: Any, folder: Path, cache: Path | None, **changed: Any) -> Any:
    """13 rows by 4, so that the last optimizer batch is a single row; 7 held-out ones by 3."""
    rows = {"data": rows_for("kto", 13), "eval_dataset": rows_for("kto", 7, seed=1)}
    return run(model, make_tokenizer, folder, cache, **{**KTO, **rows, **changed})


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("changed", "scored"),
    [
        # Own completions once; mismatched ones in each epoch, where all but the last row have one.
        ({}, 13 + 7 + 3 * 12 + 7),
        ({"train_sampling_strategy": "sequential"}, 13 + 7 + 12 + 7),
        ({"max_steps": 5, "num_train_epochs": 9}, 13 + 7 + 12 + 4 + 7),
        ({"max_tokens_per_microbatch": 60, "data_seed": 5}, 13 + 7 + 3 * 12 + 7),
    ],
)
def test_mismatched_completions_are_precomputed(tiny_llama, make_tokenizer, tmp_path, computed, changed, scored):
    """Which completion meets which prompt is told ahead: training computes none, and takes the same steps."""
    changed = {"num_train_epochs": 3, **changed}
    expected = kto(tiny_llama(), make_tokenizer, tmp_path / "plain", None, **changed)
    options = {"precompute_ref_log_probs": True, **changed}
    trainer = kto(tiny_llama(), make_tokenizer, tmp_path / "cached", tmp_path / "store", **options)
    assert (sum(computed), trainer.reference.store.misses) == (scored, 0)
    for mine, plain in zip(trainer.state.log_history, expected.state.log_history, strict=True):
        names = [name for name in plain if name.endswith(("loss", "z_ref", "rewards/chosen"))]
        assert [mine[name] for name in names] == pytest.approx([plain[name] for name in names], abs=2e-6)
    assert max(abs(log.get("z_ref", 0.0)) for log in step_logs(trainer)) > 0.01


def test_another_order_is_computed_as_it_comes(tiny_llama, make_tokenizer, tmp_path, computed, monkeypatch):
    """Negative control: what was told wrong is missed, and no wrong value takes its place."""
    expected = kto(tiny_llama(), make_tokenizer, tmp_path / "plain", None)
    told = ahead.mismatch
    with monkeypatch.context() as wrong:
        wrong.setattr(ahead, "mismatch", lambda rows, *rest: told(rows[::-1], *rest))
        options = {"precompute_ref_log_probs": True}
        trainer = kto(tiny_llama(), make_tokenizer, tmp_path / "a", tmp_path / "store", **options)
    assert trainer.reference.store.misses > 10
    assert losses(trainer) == pytest.approx(losses(expected), abs=2e-6)


def test_a_resumed_run_meets_the_same_completions(tiny_llama, make_tokenizer, tmp_path, computed):
    options = {"precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    straight = kto(tiny_llama(), make_tokenizer, tmp_path / "a", tmp_path / "store", **options)
    computed.clear()
    options["resume_from_checkpoint"] = str(tmp_path / "a" / "checkpoint-6")
    again = kto(tiny_llama(), make_tokenizer, tmp_path / "a", tmp_path / "store", **options)
    assert not computed and again.reference.store.misses == 0 and again.reference.store.hits > 0
    assert losses(again) == losses(straight)
    assert all(torch.equal(w, adapter_weights(straight)[n]) for n, w in adapter_weights(again).items())


def test_a_stream_of_single_completions_is_cached_as_it_is_read(tiny_llama, make_tokenizer, tmp_path, computed):
    """The remedy that a refused stream is told; a second run with the same order computes nothing."""
    rows = {"data": rows_for("kto", 12).to_iterable_dataset(), "max_steps": 6, "eval_strategy": "no"}
    for folder in ("a", "b"):
        trainer = kto(tiny_llama(), make_tokenizer, tmp_path / folder, tmp_path / "store", **rows)
    assert trainer.reference.store.misses == 0 and sum(computed) == 24


def test_an_order_that_can_not_be_told_is_refused(tiny_llama, make_tokenizer, tmp_path):
    options = {**KTO, "precompute_ref_log_probs": True, "accelerator_config": {"use_seedable_sampler": False}}
    options |= {"eval_strategy": "no"}
    with pytest.raises(OptionError, match="use_seedable_sampler=False.*loss_type kto: leave it out, or set train_sa"):
        ours(tiny_llama(), rows_for("kto", 4), make_tokenizer(), tmp_path, **options)
    options["train_sampling_strategy"] = "sequential"  # the remedy
    ours(tiny_llama(), rows_for("kto", 4), make_tokenizer(), tmp_path, **options)
