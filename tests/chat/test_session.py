"""Talking to an adapter: token for token what PEFT's own `generate` writes, on and off, with the conversation kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TextStreamer

from dpo_peft.chat import Session, Settings
from dpo_peft.chat.session import Pieces
from dpo_peft.errors import DataError, OptionError
from dpo_peft.model.adapter_source import load_trained

GREEDY = Settings(max_new_tokens=24, temperature=0)
MESSAGES = ["Hello there.", "What of the sea?\n  And of this?"]


@pytest.fixture
def trained(adapter: str) -> Any:
    return load_trained(adapter, with_reference=False, quantize=False, dtype="float32")


@pytest.fixture(scope="module")
def plain(base_folder: str, adapter: str) -> dict[bool, Any]:
    """The same models by transformers and PEFT alone: with the adapter, and one that never had any."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32), adapter)
    return {True: tuned.eval(), False: base.eval()}


def written(model: Any, tokenizer: Any, messages: list[dict[str, str]], new: int = 24, **how: Any) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=new, pad_token_id=0, **{"do_sample": False, **how})
    return out[0, ids["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("on", [True, False])
def test_two_turns_are_those_of_plain_generate(trained: Any, plain: dict[bool, Any], on: bool) -> None:
    session, shown, messages = Session(trained, GREEDY), [], []
    for text in MESSAGES:
        shown.clear()
        (reply,) = session.say(text, lambda side, piece: shown.append(piece), [on])
        messages.append({"role": "user", "content": text})
        assert reply.ids == written(plain[on], trained.tokenizer, messages)
        assert reply.ids != written(plain[not on], trained.tokenizer, messages)  # control: the sides differ
        assert "".join(shown) == reply.text == trained.tokenizer.decode(reply.ids, skip_special_tokens=True)
        assert len(shown) > 3
        messages.append({"role": "assistant", "content": reply.text})
    assert session.messages == messages


def test_sampling_is_that_of_generate_with_the_seed(trained: Any, plain: dict[bool, Any]) -> None:
    session = Session(trained, Settings(24, 0.7, 0.9, seed=5))
    state = torch.get_rng_state()
    (reply,) = session.say("Hi.")
    assert torch.equal(torch.get_rng_state(), state)
    message = [{"role": "user", "content": "Hi."}]
    torch.manual_seed(5)
    assert reply.ids == written(plain[True], trained.tokenizer, message, do_sample=True, temperature=0.7, top_p=0.9)
    session.reset()
    session.settings = Settings(24, 0.7, 0.9, seed=6)
    assert session.say("Hi.")[0].ids != reply.ids


def test_the_models_own_generation_config_decides_what_is_not_set(trained: Any, plain: dict[bool, Any]) -> None:
    base = trained.model.get_base_model()
    base.generation_config.update(do_sample=True, temperature=0.5, top_k=3, max_new_tokens=9)
    assert "temperature 0.5" in Settings().describe(trained) and "at most 9 new" in Settings().describe(trained)
    torch.manual_seed(0)
    message = [{"role": "user", "content": "Hi."}]
    how = {"do_sample": True, "temperature": 0.5, "top_k": 3}
    expected = written(plain[True], trained.tokenizer, message, 9, **how)
    assert Session(trained).say("Hi.")[0].ids == expected
    base.generation_config.update(do_sample=False)
    with pytest.raises(OptionError, match="top_p has no effect"):
        Session(trained, Settings(top_p=0.5))


def test_both_sides_read_the_same_conversation(trained: Any, plain: dict[bool, Any]) -> None:
    session, sides = Session(trained, GREEDY, "Be brief."), []
    start = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    replies = session.say("Hello.", lambda on, piece: sides.append(on), [True, False])
    assert [reply.ids for reply in replies] == [written(plain[on], trained.tokenizer, start) for on in (True, False)]
    assert sides == sorted(sides, reverse=True) and {*sides} == {True, False}
    assert session.messages == [*start, {"role": "assistant", "content": replies[0].text}]
    session.reset()
    assert session.messages == []


def test_oldest_turns_are_dropped_and_counted(trained: Any, plain: dict[bool, Any]) -> None:
    session = Session(trained, GREEDY, "Be brief.")
    session.context = 160
    dropped = []
    for number in range(8):
        before = session.messages
        (reply,) = session.say(f"Message {number} is so long.")
        dropped.append(reply.dropped)
        if reply.dropped:  # no more than had to
            longer = [before[0], *before[reply.dropped - 1 :], session.messages[-2]]
            assert len(session.encode(longer)) + 24 > 160
        kept = session.messages[:-1]
        assert reply.ids == written(plain[True], trained.tokenizer, kept)
        assert kept[0]["role"] == "system" and kept[-1]["content"].startswith(f"Message {number}")
        assert len(session.encode(kept)) + len(reply.ids) <= 160
    assert dropped[0] == 0 and sum(dropped) == 16 + 1 - len(session.messages)
    assert not sum(dropped) % 2
    with pytest.raises(OptionError, match="context 160: shorten it"):
        session.say("long " * 100)
    session.settings = Settings(400, 0)
    session.reset()
    (reply,) = session.say("Fill it.")
    assert len(session.encode(session.messages[:-1])) + len(reply.ids) == 160 and not reply.finished


def test_without_a_template_a_message_is_continued(trained: Any, plain: dict[bool, Any], make_tokenizer: Any) -> None:
    trained.tokenizer = make_tokenizer(chat_template=None)
    session = Session(trained, GREEDY)
    for text in MESSAGES:
        ids = trained.tokenizer(text, return_tensors="pt")
        expected = plain[True].generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert session.say(text)[0].ids == expected[0, ids["input_ids"].shape[1] :].tolist()
    with pytest.raises(OptionError, match="no place for one"):
        session.reset("Be nice.")


def test_a_system_message_that_is_left_out_is_refused(trained: Any) -> None:
    template = trained.tokenizer.chat_template
    only_users = template.replace("messages %}", "messages if message['role'] != 'system' %}", 1)
    assert only_users != template
    trained.tokenizer.chat_template = only_users
    with pytest.raises(OptionError, match="leaves it out"):
        Session(trained, system="Be nice.")
    trained.tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(OptionError, match="no system"):
        Session(trained, system="Be nice.")
    session = Session(trained)
    with pytest.raises(DataError, match="no system"):
        session.say("Hello.")
    assert session.messages == []


def test_ctrl_c_keeps_what_was_written(trained: Any) -> None:
    session, shown = Session(trained, GREEDY), []

    def stop(on: bool, piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    (reply,) = session.say("Hello.", stop)
    assert reply.stopped and not reply.finished and 3 <= len(reply.ids) < 24
    assert session.messages[-1] == {"role": "assistant", "content": reply.text}
    assert session.say("More.")[0].stopped is False


@pytest.mark.parametrize(
    "text", ["naïve – 日本語 🙂\n    indented\n\n\tx  ", " leading, and 👩‍👩‍👧 joined", "a\n\n\n"]
)
def test_pieces_add_up(text: str, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    shown = pieces_of(Pieces, tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(shown) == text and len(shown) > 1
    assert not any("\ufffd" in piece for piece in shown)


def test_a_space_that_stands_behind_a_token_is_kept() -> None:
    """Llama 2's way: a word's token brings the space before it, which the decoder takes from the first token."""
    words = {"▁def": 0, "\n": 1, "▁▁▁": 2, "▁return": 3, "▁1": 4}
    inner = Tokenizer(models.WordLevel(words, unk_token="▁def"))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)
    right = "def\n    return 1"
    assert "".join(pieces_of(Pieces, tokenizer, [0, 1, 2, 3, 4])) == right
    assert "".join(pieces_of(Theirs, tokenizer, [0, 1, 2, 3, 4])) != right  # why `TextStreamer` is not used


class Theirs(TextStreamer):
    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)


def pieces_of(kind: Any, tokenizer: Any, ids: list[int]) -> list[str]:
    shown: list[str] = []
    streamer = kind(tokenizer, shown.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return shown


@pytest.mark.parametrize(("name", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0)])
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=name):
        Settings(**{name: value})
