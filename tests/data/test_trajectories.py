"""Trajectories: what is scored, which step it is, what two conversations share; transformers' mask as the oracle."""

import random

import pytest
from data_helpers import GENERATION, LLAMA3_LIKE, THINK_LIKE, answer, turns, word_tokenizer
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from dpo_peft.data import prepare_dataset
from dpo_peft.errors import DataError

# Words: a 3, b 4, c 5, d 6, user 7, assistant 8, end 9, system 10, tool 11: "user a end assistant b end".
SHARED = [7, 3, 9, 8, 4, 9, 7]  # both go on with "user", then differ
TOOL = [*turns("a", "b"), {"role": "tool", "content": "c"}]
BY_HAND = {
    # (chosen, rejected) -> prompt, completions, steps by turn, steps by token
    "first turn shared": (
        (turns("a", "b", "c", "d"), turns("a", "b", "d", "c d")),
        SHARED,
        [[5, 9, 8, 6, 9], [6, 9, 8, 5, 6, 9]],
        [[-1, -1, -1, 1, 1], [-1, -1, -1, 1, 1, 1]],
        [[-1, -1, -1, 2, 3], [-1, -1, -1, 2, 3, 4]],
    ),
    "prompt shared": (
        (turns("a", "b", "a", "b"), turns("a", "c")),
        [7, 3, 9, 8],
        [[4, 9, 7, 3, 9, 8, 4, 9], [5, 9]],
        [[0, 0, -1, -1, -1, -1, 1, 1], [0, 0]],
        [[0, 1, -1, -1, -1, -1, 2, 3], [0, 1]],
    ),
    "start of an answer shared": (
        (turns("a", "b b c"), turns("a", "b b d d")),
        [7, 3, 9, 8, 4, 4],
        [[5, 9], [6, 6, 9]],
        [[0, 0], [0, 0, 0]],
        [[2, 3], [2, 3, 4]],
    ),
    "nothing shared": (
        (turns("a", "b", system="c"), turns("a", "b")),
        [],
        [[10, 5, 9, 7, 3, 9, 8, 4, 9], [7, 3, 9, 8, 4, 9]],
        [[-1, -1, -1, -1, -1, -1, -1, 0, 0], [-1, -1, -1, -1, 0, 0]],
        [[-1, -1, -1, -1, -1, -1, -1, 0, 1], [-1, -1, -1, -1, 0, 1]],
    ),
    "one is the start of the other": (  # which keeps its last token
        (turns("a", "b"), turns("a", "b", "c", "d")),
        [7, 3, 9, 8, 4],
        [[9], [9, 7, 5, 9, 8, 6, 9]],
        [[0], [0, -1, -1, -1, -1, 1, 1]],
        [[1], [1, -1, -1, -1, -1, 2, 3]],
    ),
    "tool turns": (
        ([*TOOL, *answer("d")], [*TOOL, *answer("a")]),
        [7, 3, 9, 8, 4, 9, 11, 5, 9, 8],
        [[6, 9], [3, 9]],
        [[1, 1], [1, 1]],
        [[2, 3], [2, 3]],
    ),
    "a tool turn in one": (
        ([*TOOL, *answer("d")], turns("a", "c")),
        [7, 3, 9, 8],
        [[4, 9, 11, 5, 9, 8, 6, 9], [5, 9]],
        [[0, 0, -1, -1, -1, -1, 1, 1], [0, 0]],
        [[0, 1, -1, -1, -1, -1, 2, 3], [0, 1]],
    ),
    "two answers in a row": (
        ([*turns("a", "b"), *answer("c")], turns("a", "d")),
        [7, 3, 9, 8],
        [[4, 9, 8, 5, 9], [6, 9]],
        [[0, 0, -1, 1, 1], [0, 0]],
        [[0, 1, -1, 2, 3], [0, 1]],
    ),
    "the user has the last word": (
        (turns("a", "b", "c"), turns("a", "d")),
        [7, 3, 9, 8],
        [[4, 9, 7, 5, 9], [6, 9]],
        [[0, 0, -1, -1, -1], [0, 0]],
        [[0, 1, -1, -1, -1], [0, 1]],
    ),
}
OTHER_FORMATS = {
    "chat": (
        {"prompt": turns("a", "b", "c"), "chosen": answer("d"), "rejected": [*answer("a"), *turns("b", "b")]},
        [*SHARED, 5, 9, 8],
        [[6, 9], [3, 9, 7, 4, 9, 8, 4, 9]],
        [[1, 1], [1, 1, -1, -1, -1, -1, 2, 2]],
        [[2, 3], [2, 3, -1, -1, -1, -1, 4, 5]],
    ),
    "chat whose completions start with the user": (
        {"prompt": turns("a", "b"), "chosen": turns("c", "d"), "rejected": turns("d", "c d")},
        SHARED,
        [[5, 9, 8, 6, 9], [6, 9, 8, 5, 6, 9]],
        [[-1, -1, -1, 1, 1], [-1, -1, -1, 1, 1, 1]],
        [[-1, -1, -1, 2, 3], [-1, -1, -1, 2, 3, 4]],
    ),
    "chat that continues an answer": (
        {"prompt": turns("a", "b"), "chosen": answer(" c"), "rejected": answer(" d d")},
        [7, 3, 9, 8, 4],
        [[5, 9], [6, 6, 9]],
        [[0, 0], [0, 0, 0]],
        [[1, 2], [1, 2, 3]],
    ),
    "text": (
        {"prompt": "a", "chosen": " b c", "rejected": " b d d"},
        [3, 4],
        [[5, 2], [6, 6, 2]],
        [[0, 0], [0, 0, 0]],
        [[1, 2], [1, 2, 3]],
    ),
    "ids": (
        {"prompt_ids": [3], "chosen_ids": [4, 2], "rejected_ids": [5, 5, 2]},
        [3],
        [[4, 2], [5, 5, 2]],
        [[0, 0], [0, 0, 0]],
        [[0, 1], [0, 1, 2]],
    ),
    "ids without a prompt": (  # nothing predicts the first token
        {"prompt_ids": [], "chosen_ids": [4, 2], "rejected_ids": [5, 5, 2]},
        [],
        [[4, 2], [5, 5, 2]],
        [[-1, 0], [-1, 0, 0]],
        [[-1, 1], [-1, 1, 2]],
    ),
}


def prepare(rows, tokenizer, unit="turn", **options):
    return prepare_dataset(Dataset.from_list(rows), tokenizer, data="trajectories", discount_unit=unit, **options)


def conversations(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("case", [*BY_HAND, *OTHER_FORMATS])
@pytest.mark.parametrize("unit", ["turn", "token"])
def test_by_hand(case, unit):
    row, prompt_ids, completion_ids, *steps = {**BY_HAND, **OTHER_FORMATS}[case]
    row = row if isinstance(row, dict) else conversations(*row)
    wanted = {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "row": 0,
        "steps": steps[unit == "token"],
    }
    if prompt_ids or "prompt_ids" not in row:  # Arrow and streams alike; an empty id list only with its type
        prepared, report = prepare([row], word_tokenizer(), unit)
        assert list(prepared) == [wanted] and prepared.column_names == list(wanted) and report.foreign_turns == 0
    stream = IterableDataset.from_generator(lambda: iter([row]))
    prepared, _ = prepare_dataset(stream, word_tokenizer(), data="trajectories", discount_unit=unit)
    assert list(prepared) == [wanted]


@pytest.mark.parametrize("seed", range(3))
def test_same_mask_as_transformers(make_tokenizer, seed):
    """Templates with generation marks let transformers say which tokens are the assistant's."""
    rng = random.Random(seed)
    tokenizer = make_tokenizer(chat_template=GENERATION)

    def conversation():
        texts = ["".join(rng.choices(["the", " in", "é", "!", "日本", " and"], k=4)).strip() for _ in range(8)]
        return turns(*texts[: rng.choice([2, 3, 4, 6, 8])], system=rng.choice([None, "Be kind."]))

    shared = [turns(*["same"] * n) for n in (0, 0, 2, 3)]
    rows = []
    for _ in range(40):
        start = rng.choice(shared)
        tails = [conversation() for _ in range(2)]
        rows.append(conversations(*([*start, *tail] for tail in tails)))
    prepared, report = prepare(rows, tokenizer)
    assert len(prepared) > 30 and report.kept_rows + report.dropped_total == 40
    for row in prepared:
        for side, ids, steps in zip(("chosen", "rejected"), row["completion_ids"], row["steps"], strict=True):
            theirs = tokenizer.apply_chat_template(
                rows[row["row"]][side], return_assistant_tokens_mask=True, return_dict=True
            )
            start = len(row["prompt_ids"])
            assert row["prompt_ids"] + ids == theirs["input_ids"]
            assert [step >= 0 for step in steps] == [bool(mask) for mask in theirs["assistant_masks"][start:]]
            assert start or steps[0] == -1


def test_shared_start_is_the_longest_and_steps_count_it(make_tokenizer):
    """Against a plain definition: number the assistant's tokens of each whole conversation, then cut."""
    tokenizer = make_tokenizer(chat_template=GENERATION)
    rows = [
        conversations(turns("Hi", "Ho", "Hm?", "yes"), turns("Hi", "Ho", "Hm!", "no", "So?", "the end")),
        conversations(turns("Hi", "Ho"), turns("Ha", "Ho", "So?", "the end")),
    ]
    for unit in ("turn", "token"):
        for row, prepared in zip(rows, prepare(rows, tokenizer, unit)[0], strict=True):
            whole = {
                side: tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
                for side, messages in row.items()
            }
            chosen, rejected = (whole[side]["input_ids"] for side in ("chosen", "rejected"))
            cut = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
            assert prepared["prompt_ids"] == chosen[:cut] == rejected[:cut]
            for side, steps in zip(("chosen", "rejected"), prepared["steps"], strict=True):
                mask, numbers, tokens, turn = whole[side]["assistant_masks"], [], 0, -1
                for at, scored in enumerate(mask):
                    turn += scored and not (at and mask[at - 1])
                    numbers.append((turn if unit == "turn" else tokens) if scored else -1)
                    tokens += scored
                assert steps == numbers[cut:]


@pytest.mark.parametrize("name", ["smollm2", "minimind-6400", "quickstart"])
def test_scored_tokens_of_real_tokenizers_are_the_assistants_texts(tokenizer_dir, request, name):
    if name == "quickstart":
        folder = request.config.rootpath / "dpo_peft" / "quickstart" / "model"
    else:
        folder = tokenizer_dir(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = "Paris is nice.", "  Yes: 3.5 €!", "def f(x):\n    return x\n", "好的，没问题。", "the end"
    rows = [
        conversations(turns("Where?", texts[0], "Sure?", texts[1]), turns("Code?", texts[2], "ok", texts[3])),
        conversations(
            turns("Q", texts[0], "R", texts[3], system="S"),
            turns("Q", texts[0], "R", texts[4], "T", texts[2], system="S"),
        ),
    ]
    prepared, _ = prepare(rows, tokenizer)
    for row in prepared:
        for side, ids, steps in zip(("chosen", "rejected"), row["completion_ids"], row["steps"], strict=True):
            written = [m["content"] for m in rows[row["row"]][side] if m["role"] == "assistant"]
            shared = row["row"]  # the first answer of the second row is in the prompt
            assert set(steps) - {-1} == set(range(shared, len(written)))
            for step in range(shared, len(written)):
                scored = tokenizer.decode([t for t, s in zip(ids, steps, strict=True) if s == step])
                assert scored.removesuffix("\n") == written[step] + "<|im_end|>"
            given = tokenizer.decode([t for t, s in zip(ids, steps, strict=True) if s == -1])
            assert not any(text in given for text in written)


REWRITES = {
    "think block in the last turn only": (THINK_LIKE, "chosen[1]", "set what it offers"),
    "earlier answers shortened": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last or m['role'] == 'user' else '…' }};"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        "chosen[1]",
        "renders the prompt the same way",
    ),
}


@pytest.mark.parametrize("case", REWRITES)
def test_template_that_rewrites_earlier_turns_is_refused(make_tokenizer, case):
    template, field, remedy = REWRITES[case]
    rows = [conversations(turns("Hi", "Ho", "Hm?", "yes"), turns("Hi", "Ho", "Hm?", "no"))]
    with pytest.raises(DataError) as error:
        prepare(rows, make_tokenizer(chat_template=template))
    text = str(error.value)
    assert f"train row 0, field '{field}': the conversation up to here's tokens are not the start" in text
    assert remedy in text.split("Remedy: ")[1]
    # The same rows as one answer after a prompt are fine: nothing but the last turn is scored.
    assert len(prepare_dataset(Dataset.from_list(rows), make_tokenizer(chat_template=template))[0]) == 1


def test_merge_where_a_turn_begins_is_tokenized_apart_and_counted(make_tokenizer):
    """The template's line break and the answer's would be one token, which generation never feeds."""
    tokenizer = make_tokenizer(chat_template=GENERATION)
    texts = turns("Hi", "\nHo", "Hm?", "\nyes"), turns("Ha", "\n!", "Hm?", "no")
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    prepared, report = prepare([conversations(*texts)], tokenizer)
    row = prepared[0]
    assert report.boundary_resplits == 3
    for messages, ids, steps in zip(texts, row["completion_ids"], row["steps"], strict=True):
        assert tokenizer.decode(row["prompt_ids"] + ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        for step, answer_ in enumerate([m["content"] for m in messages if m["role"] == "assistant"]):
            scored = [t for t, s in zip(ids, steps, strict=True) if s == step]
            assert tokenizer.decode(scored) == answer_ + "<|im_end|>\n"
    # The first turn begins behind exactly what a user feeds to have it generated.
    fed = tokenizer.apply_chat_template(texts[0][:1], add_generation_prompt=True)["input_ids"]
    start = row["steps"][0].index(0)
    assert row["prompt_ids"] + row["completion_ids"][0][:start] == fed


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": turns("a", "b", "c"), "chosen": answer("b"), "rejected": answer("c")}, "prompt[1]"),
        (
            {"prompt": turns("a"), "chosen": turns("b", "c")[1:], "rejected": turns("x", "d", "c", "a")[1:]},
            "rejected[0]",
        ),
        ({"prompt": turns("a", "b"), "chosen": answer("c"), "rejected": turns("x", "d", "c", "a")[1:]}, "rejected[0]"),
    ],
)
def test_a_rewritten_turn_is_named_where_it_stands(make_tokenizer, row, field):
    with pytest.raises(DataError) as error:
        prepare([row], make_tokenizer(chat_template=THINK_LIKE))
    assert f"row 0, field '{field}'" in str(error.value)


def test_llama3_like_template_that_strips(make_tokenizer):
    tokenizer = make_tokenizer(add_bos=True, chat_template=LLAMA3_LIKE)
    rows = [conversations(turns(" Hi ", " Ho ", "Hm?", "\nyes"), turns("Hi", "Ho", "So?", "no "))]
    row = prepare(rows, tokenizer)[0][0]
    scored = [
        tokenizer.decode([t for t, s in zip(ids, steps, strict=True) if s >= 0])
        for ids, steps in zip(row["completion_ids"], row["steps"], strict=True)
    ]
    assert scored == ["yes<|im_end|>", "no<|im_end|>"]
    assert tokenizer.decode(row["prompt_ids"]).startswith("<s><|im_start|>user\n\nHi<|im_end|>")


UNUSABLE = {
    "identical_completions": (conversations(turns("a", "b"), turns("a", "b")), None, "keep_start"),
    "empty_completion": (conversations(turns("a", "b", "c", " "), turns("a", "b", "c", "d")), None, "keep_start"),
    "empty_completion beside another question": (
        conversations(turns("a", "b", "c", " "), turns("a", "b", "d", "d")),
        None,
        "keep_start",
    ),
    "nothing_scored": (conversations(turns("a", "b", "c"), turns("a", "b", "d")), None, "keep_start"),
    # Cut behind the user's second turn: chosen has not come to its answer yet.
    "nothing_scored after cutting the end": (
        conversations(turns("a", "b", "c c c c", "d"), turns("a", "b", "d", "d")),
        12,
        "keep_start",
    ),
    # Cut to the last tokens, which are the user's.
    "nothing_scored after cutting the start": (
        conversations(turns("a", "b", "c " * 9), turns("a", "d d d d d d d d d d d d d d")),
        8,
        "keep_end",
    ),
    "completion_too_long": (conversations(turns("a", "b b b b b"), turns("a", "c")), 6, "trim_prompt"),
    "prompt_too_long": (conversations(turns("a a a", "b"), turns("a a a", "c")), 6, "keep_start"),
    "identical_after_truncation": (
        conversations(turns("a", "c b b b"), turns("a", "d b b b")),
        4,
        "keep_end",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_trajectory_without_signal(case):
    row, max_length, mode = UNUSABLE[case]
    good = conversations(turns("a", "c"), turns("a", "d"))
    prepared, report = prepare([good, row], word_tokenizer(), max_length=max_length, truncation_mode=mode)
    assert report.dropped_rows == {case.split()[0]: [1]} and prepared["row"][:] == [0]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "trim_prompt"])
@pytest.mark.parametrize("seed", range(3))
def test_truncation_cuts_steps_beside_ids(mode, seed):
    rng = random.Random(seed)

    def conversation(start):
        texts = [" ".join(rng.choices("abcd", k=rng.randint(1, 4))) for _ in range(rng.choice([2, 4, 6]))]
        return [*start, *turns(*texts, system=rng.choice([None, "a"]))]

    starts = [[], turns("a b", "c")]
    rows = [conversations(*(conversation(start) for _ in range(2))) for start in rng.choices(starts, k=50)]
    options = dict(max_unusable_share=1.0, truncation_mode=mode)
    limit = rng.choice([18, 22, 26])
    whole = {row["row"]: row for row in prepare(rows, word_tokenizer(), "token", max_length=None, **options)[0]}
    prepared, report = prepare(rows, word_tokenizer(), "token", max_length=limit, **options)
    assert report.kept_rows > 10 and report.rows_truncated
    for row in prepared:
        full, kept = whole[row["row"]], len(row["prompt_ids"])
        for ids, steps, all_ids, all_steps in zip(
            row["completion_ids"], row["steps"], full["completion_ids"], full["steps"], strict=True
        ):
            assert len(ids) == len(steps) and kept + len(ids) <= limit and max(steps) >= 0
            part = slice(0, len(ids)) if mode == "keep_start" else slice(len(all_ids) - len(ids), None)
            assert ids == all_ids[part]
            wanted = all_steps[part]
            assert steps == (wanted if kept else [-1, *wanted[1:]])


def test_raw_transcripts_name_the_converter():
    row = conversations("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c")
    with pytest.raises(DataError, match=r"^train: raw HH transcripts .*--dataset_format hh.*from_hh\) in Python"):
        prepare([row], word_tokenizer())


def test_turns_that_the_template_leaves_out_are_an_error(make_tokenizer):
    template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}|{% endfor %}"
    rows = [conversations(turns("Hi", "Ho", system="S"), turns("Hi", "Ha", system="S"))]
    with pytest.raises(DataError, match=r"field 'chosen\[0\]': the chat template leaves the 'system' turn out"):
        prepare(rows, make_tokenizer(chat_template=template))


def agent(rounds, last):
    """A conversation of an agent: a question, then tool calls with their results, then an answer, `rounds` times."""
    messages = turns("You find things out.", system="S")[:1]
    for number in range(rounds):
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": f"file {number}"}}}
        messages += [
            {"role": "user", "content": f"And file {number}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"{number} lines"},
            *answer(f"It has {number} lines."),
        ]
    return [*messages[:-1], *answer(last)]


@pytest.mark.parametrize("data", ["trajectories", "pairs"])
def test_rendering_grows_with_the_turns_and_not_with_their_square(make_tokenizer, monkeypatch, data):
    tokenizer, rendered = make_tokenizer(), []
    original = type(tokenizer).apply_chat_template

    def counted(self, conversation, **options):
        rendered.append(len(conversation))
        return original(self, conversation, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)

    def messages_rendered(rounds):
        rendered.clear()
        row = conversations(agent(rounds, "Fine."), agent(rounds, "Bad."))
        prepare_dataset(Dataset.from_list([row]), tokenizer, data=data, max_length=None, load_from_cache_file=False)
        return sum(rendered)

    few, many = messages_rendered(10), messages_rendered(40)
    assert few < 100 * 10 * 4 and many < 4.5 * few


def test_long_conversations_have_the_ids_of_every_rendered_start(make_tokenizer):
    """Turns are found in short conversations; a generating model is fed the long one."""
    tokenizer = make_tokenizer()
    rows = [conversations(agent(12, "\nFine."), agent(12, "Bad."))]
    row = prepare(rows, tokenizer, max_length=None)[0][0]
    fed = tokenizer.apply_chat_template(rows[0]["chosen"][:-1], add_generation_prompt=True)["input_ids"]
    assert row["prompt_ids"] == fed
    texts = [tokenizer.decode(ids) for ids in row["completion_ids"]]
    assert texts == ["\nFine.<|im_end|>\n", "Bad.<|im_end|>\n"]
    assert [set(steps) for steps in row["steps"]] == [{23}, {23}]


NUMBERED = (
    "{% for m in messages %}{{ m['role'] }} {{ loop.index }}: {{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}assistant {{ messages | length + 1 }}: {% endif %}"
)


def test_template_that_numbers_its_turns(make_tokenizer):
    """No short conversation shows what stands there, so each start of the whole one is rendered."""
    tokenizer = make_tokenizer(chat_template=NUMBERED)
    texts = turns(*(text for number in range(6) for text in (f"q{number}", f"a{number}")))
    row = prepare([conversations(texts, [*texts[:-1], *answer("b")])], tokenizer)[0][0]
    start = tokenizer.decode(row["prompt_ids"])
    assert start == tokenizer.apply_chat_template(texts[:-1], add_generation_prompt=True, tokenize=False)
    assert [tokenizer.decode(ids) for ids in row["completion_ids"]] == ["a5;", "b;"]
