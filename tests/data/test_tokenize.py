"""Text rows: golden ids for each family of tokenizers, special tokens exactly once, the border (traps T13, T14)."""

import pytest
from data_helpers import assert_same_as_trl, pair, trl_prepare, word_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_peft.data import prepare_dataset, preprocess_dpo_sample
from dpo_peft.data.tokenize import leading_ids, plain_ids, split_at_border
from dpo_peft.errors import DataError, OptionError


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2-like: BOS in front, ▁ for a blank and before the first word; ▁hi 10 and "hi" 9 are different tokens."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "h", "i", "o", "▁h", "▁o", "hi", "▁hi", "h2", "2", "io"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "h"), ("▁", "o"), ("h", "i"), ("▁h", "i"), ("i", "o")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def prepare_one(tokenizer, row, **options):
    prepared, report = prepare_dataset(Dataset.from_list([row]), tokenizer, **options)
    return prepared[0]["prompt_ids"], *prepared[0]["completion_ids"], report


@pytest.mark.parametrize(
    ("bos", "eos_appended", "prompt_ids"),
    [(False, False, [3, 4]), (True, False, [1, 3, 4]), (True, True, [1, 3, 4]), (False, True, [3, 4])],
)
def test_golden_ids_with_every_habit_of_special_tokens(bos, eos_appended, prompt_ids):
    tokenizer = word_tokenizer(bos, eos_appended)
    row = {"prompt": "a b", "chosen": " c", "rejected": " d d"}
    assert prepare_one(tokenizer, row)[:3] == (prompt_ids, [5, 2], [6, 6, 2])


@pytest.mark.parametrize("text", ["<s> a b", "<s>a b"])
def test_bos_in_the_text_is_not_doubled(text):  # T13
    # The word tokenizer maps "<s>" in a text to BOS, as every tokenizer with a special token does.
    assert prepare_one(word_tokenizer(bos=True), {"prompt": text, "chosen": " c", "rejected": " d"})[0] == [1, 3, 4]


def test_bos_in_the_text_doubles_in_trl(make_tokenizer):
    """The trap is real: TRL's ids hold BOS twice for the same row."""
    tokenizer, row = make_tokenizer(add_bos=True), pair(prompt="<s>Hi:")
    theirs = trl_prepare(Dataset.from_list([row]), tokenizer)[0]["prompt_ids"]
    ours = prepare_one(tokenizer, row)[0]
    assert theirs[:2] == [1, 1] and ours == theirs[1:]


@pytest.mark.parametrize("ending", ["", "</s>", "</s> ", " </s>", "</s></s>", "</s>\n</s> \n"])
def test_eos_stands_once(ending):  # T13
    row = {"prompt": "a b", "chosen": " c" + ending, "rejected": " d"}
    assert prepare_one(word_tokenizer(), row)[1] == [5, 2]


def test_eos_with_a_blank_doubles_in_trl(make_tokenizer):
    tokenizer, row = make_tokenizer(), pair(chosen=" blue</s> ")
    assert trl_prepare(Dataset.from_list([row]), tokenizer)[0]["chosen_ids"].count(2) == 2
    assert prepare_one(tokenizer, row)[1].count(2) == 1


def test_metaspace_family_by_hand():
    # "hi" -> ▁hi; then "o" joins nothing; " hi" -> ▁hi
    row = {"prompt": "hi", "chosen": " hi", "rejected": " o"}
    assert prepare_one(metaspace_tokenizer(), row)[:3] == ([1, 10], [10, 2], [8, 2])


def test_merge_across_the_border_is_tokenized_apart_and_counted():  # T14
    # "i" + "o" would merge to "io" (13) and take the prompt's last token with it. On its own "o" is "▁o" (8), a blank
    # too many, which the anchor avoids: 6 is "o".
    tokenizer = metaspace_tokenizer()
    assert tokenizer("ooio")["input_ids"][-1] == 13
    row = {"prompt": "ooi", "chosen": "o", "rejected": " h"}
    prompt_ids, chosen, rejected, report = prepare_one(tokenizer, row)
    assert prompt_ids == tokenizer("ooi")["input_ids"]
    assert (chosen, rejected) == ([6, 2], [7, 2])
    assert tokenizer.decode(prompt_ids + chosen[:-1]) == tokenizer.decode(tokenizer("ooio")["input_ids"])
    assert report.boundary_resplits == 1


def test_prompt_ids_are_what_generation_feeds(make_tokenizer):  # T14
    tokenizer = make_tokenizer()
    row = pair(prompt="What!", chosen="! the end", rejected=" and on")  # "!!" is a merge
    prompt_ids, chosen, _, report = prepare_one(tokenizer, row)
    assert prompt_ids == tokenizer("What!")["input_ids"]
    assert tokenizer.decode(prompt_ids + chosen) == "What!! the end</s>"
    assert tokenizer("What!!")["input_ids"][-1] != prompt_ids[-1]
    assert report.boundary_resplits == 1
    theirs = trl_prepare(Dataset.from_list([row]), tokenizer)[0]["prompt_ids"]
    assert len(theirs) == len(prompt_ids) - 1  # the peer loses the end of the prompt


def test_a_border_without_equal_text_is_refused():
    # Whole words only: "a" + "b" is the unknown word "ab", whatever the ids.
    tokenizer = word_tokenizer()
    assert split_at_border(tokenizer, [3], [0], "b") is None
    with pytest.raises(DataError, match="row 0, field 'chosen': the prompt's tokens.*alone reads 'a'.*'<unk>'.*blank"):
        prepare_one(tokenizer, {"prompt": "a", "chosen": "b", "rejected": " c"})


def test_same_ids_as_trl_on_ordinary_text(make_tokenizer):
    rows = [
        pair(),
        pair("Zwei Wörter: ", "é ü", "日本"),
        pair("a\n\n", "b</s>", "c the in"),
        pair("x", " \n y ", " z  "),
    ]
    for add_bos in (False, True):
        tokenizer = make_tokenizer(add_bos=add_bos)
        dataset = Dataset.from_list(rows)
        assert_same_as_trl(prepare_dataset(dataset, tokenizer)[0], trl_prepare(dataset, tokenizer))


def test_implicit_text_as_trl_but_never_inside_a_word(make_tokenizer):
    tokenizer = make_tokenizer()
    dataset = Dataset.from_list([{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    ours = prepare_dataset(dataset, tokenizer)[0]
    assert_same_as_trl(ours, trl_prepare(dataset, tokenizer))
    decoded = prepare_one(tokenizer, {"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert [tokenizer.decode(ids) for ids in decoded[:3]] == ["The sky is", " blue.</s>", " black.</s>"]
    decoded = prepare_one(tokenizer, {"chosen": "天空是蓝色", "rejected": "天空是绿色"})
    assert [tokenizer.decode(ids) for ids in decoded[:3]] == ["天空是", "蓝色</s>", "绿色</s>"]


def test_no_eos_token_is_an_error_with_a_remedy(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token.*tokenizer.eos_token ="):
        prepare_dataset(Dataset.from_list([pair()]), tokenizer)


def test_empty_prompt_needs_a_bos(make_tokenizer):
    assert prepare_one(make_tokenizer(add_bos=True), pair(prompt=""))[0] == [1]
    with pytest.raises(DataError, match="train row 1, field 'prompt': is empty"):
        prepare_dataset(Dataset.from_list([pair(), pair(prompt="")]), make_tokenizer())


def test_leading_ids():
    assert leading_ids(word_tokenizer(bos=True, eos_appended=True)) == [1]
    assert leading_ids(word_tokenizer(eos_appended=True)) == []


class TestSample:
    """One BOS, an EOS that truncation never eats, and a prompt that is masked."""

    def test_by_hand(self):
        sample = preprocess_dpo_sample(word_tokenizer(bos=True), "a b", " c", " d c")
        assert sample == {
            "chosen_input_ids": [1, 3, 4, 5, 2],
            "chosen_attention_mask": [1] * 5,
            "chosen_labels": [-100, -100, -100, 5, 2],
            "rejected_input_ids": [1, 3, 4, 6, 5, 2],
            "rejected_attention_mask": [1] * 6,
            "rejected_labels": [-100, -100, -100, 6, 5, 2],
        }

    def test_tokenizer_without_bos(self):
        tokenizer = word_tokenizer()
        tokenizer.bos_token = None
        sample = preprocess_dpo_sample(tokenizer, "a ", "b", "c")
        assert sample["chosen_input_ids"] == [3, 4, 2] and None not in sample["rejected_input_ids"]

    def test_bos_in_the_prompt_and_eos_in_the_response_stay_single(self):
        sample = preprocess_dpo_sample(word_tokenizer(bos=True), "<s> a", " b</s> ", " c")
        assert sample["chosen_input_ids"] == [1, 3, 4, 2]

    def test_truncation_spares_response_and_eos(self):
        sample = preprocess_dpo_sample(word_tokenizer(bos=True), "a " * 50, "b b", "c", max_length=6)
        assert sample["chosen_input_ids"] == [3, 3, 3, 4, 4, 2]
        assert sample["rejected_input_ids"] == [3, 3, 3, 5, 2]  # the same prompt for both
        assert sample["chosen_labels"] == [-100] * 3 + [4, 4, 2]

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            (dict(chosen=True), DataError, "field 'chosen': expected text, found a boolean"),
            (dict(chosen=" </s>"), DataError, "empty_completion"),
            (dict(chosen="b " * 9, max_length=8), DataError, "completion_too_long.*raise max_length"),
            (dict(max_length=1), OptionError, "max_length=1"),
        ],
    )
    def test_refusals(self, arguments, error, words):
        with pytest.raises(error, match=words):
            preprocess_dpo_sample(word_tokenizer(), **{"prompt": "a ", "chosen": "b", "rejected": "c", **arguments})


def test_ids_are_those_of_a_call_whatever_was_called_before():
    """The tokenizers library is asked directly, and keeps the truncation, padding and splitting of the last call."""
    tokenizer, text = metaspace_tokenizer(), "hi io</s> hi"
    tokenizer.pad_token = "</s>"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert plain_ids(tokenizer, text) == whole
    tokenizer(text, truncation=True, max_length=2)
    assert plain_ids(tokenizer, text) == whole
    tokenizer(text, padding="max_length", max_length=40)
    assert plain_ids(tokenizer, text) == whole
    tokenizer.split_special_tokens = True
    split = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert split != whole
    tokenizer.split_special_tokens = False
    assert plain_ids(tokenizer, text) == whole
    tokenizer.split_special_tokens = True
    assert plain_ids(tokenizer, text) == split


def test_a_tokenizer_with_a_call_of_its_own_is_called():
    class Own(PreTrainedTokenizerFast):
        def __call__(self, *args, **kwargs):
            return {"input_ids": [7]}

    assert plain_ids(Own(tokenizer_object=metaspace_tokenizer().backend_tokenizer), "hi") == [7]
