"""`halves` and `content_keys` over random samples of every kind: what a batch keeps, and what a key depends on."""

import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device

from dpo_peft.forward import (
    PackedBatch,
    Sample,
    completion_logps,
    content_keys,
    halves,
    pack,
    pad_rows,
    plan_forward,
)

Layout = Callable[[Sequence[Sample]], PackedBatch]
LAYOUTS: list[Layout] = [pack, lambda samples: pad_rows(samples, 0)]
both_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "padded"])
LABELS = "sample_of rows lengths step grade preference margin mismatched"  # what objectives read, besides num_own


class Draw:
    """Random samples of every kind. A small vocabulary, and lengths of 1 and 2, make contents meet by chance."""

    def __init__(self, seed: int, vocab: int = 300, longest: int = 9):
        self.rng, self.vocab, self.longest = random.Random(seed), vocab, longest

    def ids(self, shortest: int = 1) -> list[int]:
        return [self.rng.randrange(3, self.vocab) for _ in range(self.rng.randint(shortest, self.longest))]

    def steps(self, length: int, first_given: bool) -> list[int]:
        steps = [self.rng.choice([-1, 0, 1, 2]) for _ in range(length)]
        steps[-1] = 3  # something is scored
        return [-1, *steps[1:]] if first_given else steps

    def sample(self, kind: str, row: int) -> Sample:
        prompt, ids = self.ids(), self.ids
        if kind == "pairs":
            return Sample(prompt, [ids(), ids()], row)
        if kind == "soft pairs":
            return Sample(prompt, [ids(), ids()], row, preference=self.rng.random(), margin=self.rng.gauss(0, 1))
        if kind == "lists":
            completions = [ids() for _ in range(self.rng.randint(1, 7))]
            return Sample(prompt, completions, row, grades=[self.rng.gauss(0, 1) for _ in completions])
        if kind == "singles":
            completions = [ids() for _ in range(self.rng.randint(1, 2))]
            grades = [float(self.rng.randint(0, 1)) for _ in completions]
            return Sample(prompt, completions, row, grades=grades, mismatched=[ids() for _ in completions])
        mixed = kind == "trajectories beside answers"
        prompt = prompt if mixed or self.rng.random() < 0.6 else []
        completions = [ids(2), ids(2)]
        steps = [self.steps(len(c), not prompt) for c in completions]
        return Sample(prompt, completions, row, steps=steps, mismatched=[ids()] if mixed else [])

    def batch(self, kind: str, fewest: int = 1) -> list[Sample]:
        return [self.sample(kind, self.rng.randint(0, 10**6)) for _ in range(self.rng.randint(fewest, 6))]


KINDS = ["pairs", "soft pairs", "lists", "singles", "trajectories", "trajectories beside answers"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def batches(kind: str, fewest: int = 1) -> list[list[Sample]]:
    return [Draw(seed).batch(kind, fewest) for seed in range(30)]


def different_fields(a: PackedBatch, b: PackedBatch) -> set[str]:
    """Names of the fields of two batches that are not exactly equal, dtype and shape included. Samples are compared
    as they are."""
    a_fields, b_fields = ({**batch.as_dict(), "samples": batch.samples.kept} for batch in (a, b))
    different = set(a_fields) ^ set(b_fields)
    for name in set(a_fields) & set(b_fields):
        x, y = a_fields[name], b_fields[name]
        tensors = isinstance(x, torch.Tensor)
        if not (x.dtype == y.dtype and torch.equal(x, y) if tensors else x == y):
            different.add(name)
    return different


# ---- What a batch keeps --------------------------------------------------------------------------------------------


@both_layouts
@every_kind
def test_samples_travel_with_the_batch(kind: str, layout: Layout) -> None:
    """As fields, out of a worker process, and through what moves batches to a device, which must not look inside."""
    for samples in batches(kind)[:20]:
        batch = layout(samples)
        fields = pickle.loads(pickle.dumps(batch.as_dict()))
        moved = send_to_device(fields, torch.device("cpu"))
        assert moved["samples"] is fields["samples"]
        again = PackedBatch(**moved).to("cpu")
        assert list(again.samples.kept) == samples and different_fields(again, batch) == set()
        assert content_keys(again) == content_keys(batch)


@both_layouts
@pytest.mark.parametrize("action", [halves, content_keys])
def test_a_batch_without_samples_says_what_to_do(action: Any, layout: Layout) -> None:
    """A user's own collator may give some of the fields only."""
    fields = layout([BASE, BASE]).as_dict()
    del fields["samples"]
    with pytest.raises(ValueError, match="collator of your own should return all fields"):
        action(PackedBatch(**fields))


@both_layouts
def test_a_lost_token_or_a_moved_border_is_seen(layout: Layout) -> None:
    """Negative control: the comparison of batches sees small faults of the samples."""
    (sample,) = samples = [Sample([5, 6], [[7, 8], [9]], 3, grades=[1.0, 0.0])]
    moved = [sample._replace(prompt=[5], completions=[[6, 7, 8], [6, 9]])]
    assert "pred_pos" in different_fields(layout(moved), layout(samples))
    assert "input_ids" in different_fields(layout([sample._replace(completions=[[7], [9]])]), layout(samples))
    assert different_fields(layout([sample._replace(grades=[1.0, 0.5])]), layout(samples)) == {"grade", "samples"}
    assert different_fields(layout([sample._replace(row=4)]), layout(samples)) == {"rows", "samples"}


@both_layouts
@pytest.mark.parametrize("first", [0, 1])
def test_samples_with_and_without_steps_in_one_batch_are_refused(layout: Layout, first: int) -> None:
    """A batch holds the steps of all samples or of none."""
    samples = [Sample([5], [[6, 7, 8]], 1), Sample([5], [[6, 7, 8]], 2, steps=[[0, -1, 1]])]
    with pytest.raises(ValueError, match="Lay them out apart"):
        layout(samples[first:] + samples[:first])


# ---- halves --------------------------------------------------------------------------------------------------------


@both_layouts
@every_kind
def test_halves_hold_the_samples_in_order(kind: str, layout: Layout) -> None:
    for samples in batches(kind, fewest=2):
        batch = layout(samples)
        batch = replace(batch, keys=content_keys(batch))
        first, second = halves(batch)
        middle = len(samples) // 2
        for half, part in ((first, samples[:middle]), (second, samples[middle:])):
            assert different_fields(half, layout(part)) <= {"keys", "mismatched"}
        assert first.shared == second.shared == batch.shared
        assert abs(first.num_samples - second.num_samples) <= 1
        assert first.num_own + second.num_own == batch.num_own
        for name in LABELS.split():
            parts = [getattr(part, name) for part in (first, second)]
            if name == "sample_of":
                parts[1] = parts[1] + first.num_samples
            assert [x is None for x in parts] == [getattr(batch, name) is None] * 2, name
            assert parts[0] is None or torch.equal(torch.cat(parts), getattr(batch, name)), name
        assert first.keys + second.keys == batch.keys
        assert [content_keys(part) for part in (first, second)] == [first.keys, second.keys]


@both_layouts
@every_kind
def test_halves_have_the_log_probs_of_the_whole(kind: str, layout: Layout, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    assert plan_forward(model).shared
    for samples in batches(kind, fewest=2)[:6]:
        batch = layout(samples)
        with torch.no_grad():
            whole, *parts = (completion_logps(model, b) for b in (batch, *halves(batch)))
        assert (torch.cat([p.token_logps_N for p in parts]) - whole.token_logps_N).abs().max() < 1e-5
        logps_C = torch.cat([p.logps_C for p in parts])
        assert (logps_C - whole.logps_C).abs().max() < 3e-5  # up to 9 tokens
        # Negative control: the completions differ by far more than that.
        assert (logps_C.roll(1) - whole.logps_C).abs().max() > 0.1


def test_a_half_without_mismatched_answers_keeps_the_field() -> None:
    """Micro-batches of one step are joined again, so they must hold the same fields."""
    samples = [Sample([5], [[6]], 1, mismatched=[[7, 8]]), Sample([5], [[6]], 2)]
    batch = pack(samples)
    first, second = halves(batch)
    assert first.mismatched.tolist() == [False, True] and second.mismatched.tolist() == [False]


@both_layouts
def test_padding_that_is_a_token_of_the_rows(layout: Layout) -> None:
    """Where a row ends is known by the sample, not by the id of the padding."""
    samples = [Sample([7, 0], [[0, 5, 0], [0]], 1), Sample([0], [[0]], 2)]
    for half, part in zip(halves(layout(samples)), samples, strict=True):
        assert different_fields(half, layout([part])) == set()


@both_layouts
def test_one_sample_cannot_be_halved(layout: Layout) -> None:
    with pytest.raises(ValueError, match=r"one sample \(row 12, .* can't be halved"):
        halves(layout([Sample([5], [[6], [7]], 12)]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both_layouts
@every_kind
def test_a_batch_on_the_gpu(kind: str, layout: Layout) -> None:
    samples = Draw(0).batch(kind, fewest=2)
    batch = layout(samples)
    there = batch.to("cuda")
    assert different_fields(there.to("cpu"), batch) == set() and content_keys(there) == content_keys(batch)
    for part, expected in zip(halves(there), halves(batch), strict=True):
        assert part.input_ids.is_cuda and different_fields(part.to("cpu"), expected) == set()


# ---- content_keys --------------------------------------------------------------------------------------------------


def contents(samples: Sequence[Sample]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The definition, from the samples: for each completion, ids of prompt + completion and which are predicted."""
    found = []
    for s in samples:
        steps = [*(s.steps or [[0] * len(c) for c in s.completions]), *([0] * len(c) for c in s.mismatched)]
        for completion, its_steps in zip([*s.completions, *s.mismatched], steps, strict=True):
            predicted = tuple(len(s.prompt) + i for i, step in enumerate(its_steps) if step >= 0)
            found.append(((*s.prompt, *completion), predicted))
    return found


def tiny_batches() -> list[list[Sample]]:
    """Batches of every kind over two tokens, lengths up to 3: most contents occur several times."""
    return [Draw(seed, vocab=5, longest=3).batch(kind) for kind in KINDS for seed in range(80)]


def test_keys_are_equal_exactly_where_contents_are() -> None:
    keys: dict[Any, set[bytes]] = {}
    number = 0
    for samples in tiny_batches():
        for layout in LAYOUTS:
            found = content_keys(layout(samples))
            for key, content in zip(found, contents(samples), strict=True):
                keys.setdefault(content, set()).add(key)
                number += 1
    assert all(len(found) == 1 for found in keys.values())  # equal contents, equal keys
    assert len(set().union(*keys.values())) == len(keys)  # other contents, other keys
    assert 100 < len(keys) < number / 5  # both claims were tried many times
    # Among them: the same ids, predicted from another place on.
    assert len({ids for ids, _ in keys}) < len(keys) / 2


def completion_keys(batch: PackedBatch) -> list[bytes]:
    """A wrong key, of the completion's ids only."""
    return [blake2b(target.numpy().tobytes()).digest() for target in batch.target.split(batch.lengths.tolist())]


CHANGES = {  # of the first completion; then those of which it must also be seen in the second
    "a token of the prompt": (lambda s: s._replace(prompt=[5, 9, 7]), [0, 1]),
    "the last token of the prompt": (lambda s: s._replace(prompt=[5, 6, 9]), [0, 1]),
    "the first token of the completion": (lambda s: s._replace(completions=[[9, 21], [30]]), [0]),
    "the last token of the completion": (lambda s: s._replace(completions=[[20, 9], [30]]), [0]),
    "a token more": (lambda s: s._replace(completions=[[20, 21, 2], [30]]), [0]),
    "a token less": (lambda s: s._replace(completions=[[20], [30]]), [0]),
    "the order of the tokens": (lambda s: s._replace(completions=[[21, 20], [30]]), [0]),
    "the border": (lambda s: s._replace(prompt=[5, 6], completions=[[7, 20, 21], [7, 30]]), [0, 1]),
    "what is scored": (lambda s: s._replace(steps=[[-1, 0], [0]]), [0]),
    "no change of what is scored": (lambda s: s._replace(steps=[[0, 4], [2]]), []),
    "labels": (lambda s: s._replace(row=77, grades=[3.0, 1.0], preference=0.2, margin=4.0), []),
    "the partner": (lambda s: s._replace(completions=[[20, 21], [31, 32]]), [1]),
    "the partner's part": (lambda s: s._replace(completions=[[20, 21]], mismatched=[[30]]), []),
}
BASE = Sample([5, 6, 7], [[20, 21], [30]], 3)


@both_layouts
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_key(name: str, layout: Layout) -> None:
    change, changed = CHANGES[name]
    before, after = (content_keys(layout([s])) for s in (BASE, change(BASE)))
    assert [i for i in range(2) if before[i] != after[i]] == changed


def test_a_key_of_the_completion_alone_misses_the_prompt() -> None:
    """Negative control: such a key would give out the log-probs under another prompt."""
    other = CHANGES["a token of the prompt"][0](BASE)
    assert completion_keys(pack([BASE])) == completion_keys(pack([other]))
    assert not set(content_keys(pack([BASE]))) & set(content_keys(pack([other])))


@every_kind
def test_keys_do_not_depend_on_the_batch(kind: str) -> None:
    """Layout, padding, order, partners and the other samples of a batch leave a key as it is."""
    for samples in batches(kind, fewest=2)[:30]:
        expected = content_keys(pack(samples))
        assert all(len(key) == 16 for key in expected) and len(expected) == pack(samples).num_completions
        assert content_keys(pad_rows(samples)) == content_keys(pad_rows(samples, 99)) == expected
        assert sum((content_keys(pack([s])) for s in samples), ()) == expected
        order = list(range(len(samples)))
        random.Random(0).shuffle(order)
        alone = [content_keys(pack([s])) for s in samples]
        assert content_keys(pack([samples[i] for i in order])) == sum((alone[i] for i in order), ())
        reversed_ = [s._replace(completions=s.completions[::-1], steps=s.steps and s.steps[::-1]) for s in samples]
        assert set(content_keys(pad_rows(reversed_))) == set(expected)


def test_the_version_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later way to hash never finds what this one stored. The digest is fixed, since keys live on disks."""
    (before, _) = content_keys(pack([BASE]))
    assert (
        before.hex()
        == blake2b(
            b"".join(x.to_bytes(8, "little") for x in [1, 5, 2, 5, 6, 7, 20, 21, 3, 4]), digest_size=16
        ).hexdigest()
    )
    monkeypatch.setattr("dpo_peft.forward.content.KEY_VERSION", 2)
    assert content_keys(pack([BASE]))[0] != before


def test_keys_travel_with_the_batch() -> None:
    batch = pack([BASE])
    batch = replace(batch, keys=content_keys(batch))
    assert PackedBatch(**batch.as_dict()).to("cpu").keys == batch.keys and len(batch.keys) == 2
    assert "keys" not in pack([BASE]).as_dict()  # empty unless someone asks for them
