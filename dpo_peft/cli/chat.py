"""`dpo-peft chat`: talk to a trained adapter, in a terminal or from a script."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, OptionError
from ..model.options import AdapterOptions
from .options import made, option, parse_options, printable, show

if TYPE_CHECKING:
    from ..chat import Reply, Session, Settings

EXAMPLES = (
    "dpo-peft chat outputs/quickstart",
    'dpo-peft chat outputs/run --prompt "Write a haiku about rain." --temperature 0',
    "cat question.txt | dpo-peft chat outputs/run --prompt - --json",
)
COMMANDS = """  /base             switch the adapter off, and on again
  /both             let adapter and base complete each message; the adapter's completion is kept
  /image FILE       show this image with the next message
  /reset            begin a new conversation
  /system TEXT      begin a new one with this system message; without TEXT, with none
  /set NAME VALUE   temperature, top_p, max_new_tokens or seed; without a value, show them
  /help             this list
  /quit             leave, as Ctrl-D does; Ctrl-C stops a completion"""
SIDES = {True: "adapter", False: "base"}


@dataclass(frozen=True)
class ChatOptions(AdapterOptions):
    """Options of `dpo-peft chat`."""

    prompt: list[str] | None = option(None, "Complete this alone and leave; - is stdin. May be given several times.")
    image: list[str] | None = option(None, "Image files that go with each prompt, or with the first message.")
    adapter_off: bool = option(False, "Begin with the adapter switched off.")
    system: str | None = option(None, "System message.")
    max_new_tokens: int | None = option(None, "Longest completion; by the model's generation_config, or 512.")
    temperature: float | None = option(None, "0 takes the likeliest token. Default: by the model's generation_config.")
    top_p: float | None = option(None, "Sample from the likeliest tokens of this total probability.")
    seed: int = option(0, "Of the sampling, for each completion.")
    json: bool = option(False, "Print the completions of prompt as JSON.")
    reference: str | None = field(default=None, init=False)  # nothing is compared with it here


def repeated(argv: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Returns the words without an option that may be given several times, and its values."""
    words, values = list(argv), []
    while (at := next((i for i, word in enumerate(words) if word.split("=")[0] == f"--{name}"), None)) is not None:
        _, equals, value = words.pop(at).partition("=")
        if not equals and at >= len(words):
            raise OptionError(f"--{name} needs a value.")
        values.append(value if equals else words.pop(at))
    return words, values


def chat(argv: Sequence[str]) -> None:
    """Talk to a trained adapter on its base, loaded as for the training, in the model's chat template."""
    words, prompts = repeated(argv, "prompt")
    options = parse_options(words, ChatOptions, "chat", chat.__doc__, EXAMPLES, "adapter")
    prompts = prompts or options.prompt or []
    if options.json and not prompts:
        raise OptionError("json has no effect without prompt: give one, or leave it out.")
    from ..chat import Session, Settings
    from ..model.adapter_source import AdapterSource

    settings = made(Settings, options)
    prompts = [sys.stdin.read().rstrip("\n") if text == "-" else text for text in prompts]
    if not all(text.strip() for text in prompts):
        raise OptionError("prompt is empty: give a text, or - and the text on stdin.")
    source = AdapterSource.of(options)
    images = source.images(needed=bool(options.image))
    trained = source.load(with_reference=False)
    if images is not None:
        trained = replace(trained, images=images, tokenizer=images.tokenizer)
    session = Session(trained, settings, options.system)
    if prompts:
        complete(session, prompts, options)
    else:
        Terminal(session, options).run()


def complete(session: "Session", prompts: Sequence[str], options: ChatOptions) -> None:
    """Prints the completion of each prompt, a conversation of its own, and nothing else on stdout."""
    done = []
    for text in prompts:
        session.reset(options.system)
        shown = (lambda on, piece: None) if options.json else _print
        (reply,) = session.say(text, shown, [not options.adapter_off], options.image or ())
        if not options.json:
            print()
        if reply.stopped:
            raise KeyboardInterrupt
        done.append({"prompt": text, "completion": reply.text, "tokens": len(reply.ids), "finished": reply.finished})
    if options.json:
        how = session.settings.describe(session.trained)
        made = {"adapter": options.adapter, "adapter_on": not options.adapter_off, "decoding": how}
        show({**made, "completions": done}, "", True)


def _print(on: bool, piece: str) -> None:
    print(printable(piece), end="", flush=True)


class Terminal:
    """Reads lines, obeys those that begin with a slash, and shows completions of the others."""

    def __init__(self, session: "Session", options: ChatOptions):
        self.session, self.options, self.system = session, options, options.system
        self.sides = [not options.adapter_off]
        self.typed, self.images = sys.stdin.isatty(), list(options.image or ())

    def run(self) -> None:
        """Talks until /quit or the end of the input."""
        if self.typed:
            with suppress(ImportError):  # Windows has none
                import readline  # noqa: F401 - the line can be edited, and earlier ones come back
        session = self.session
        print(printable(f"{self.options.adapter}: {session.settings.describe(session.trained)}."))
        if not session.has_template:
            print("The model has no chat template: each message is continued as it is, without those before it.")
        print("/help lists the commands, /quit leaves.")
        while True:
            try:
                line = input({1: f"{SIDES[self.sides[0]]}> ", 2: "both> "}[len(self.sides)] if self.typed else "")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D leaves.")
                continue
            if line.strip() == "/quit":
                return
            try:
                self.obey(line.strip()) if line.startswith("/") else self.complete(line)
            except (OptionError, DataError) as error:
                print(printable(str(error)))

    def complete(self, line: str) -> None:
        """Shows what the model writes, by each side that is asked for."""
        if not line.strip():
            return
        shown: list[bool] = []

        def show_piece(on: bool, piece: str) -> None:
            if len(self.sides) > 1 and on not in shown:
                print(f"{chr(10) if shown else ''}[{SIDES[on]}]")
            shown.append(on)
            _print(on, piece)

        replies = self.session.say(line, show_piece, self.sides, self.images)
        self.images = []
        print()
        self.tell(replies)

    def tell(self, replies: "Sequence[Reply]") -> None:
        """Says what is not to be seen in the text."""
        if dropped := replies[0].dropped:
            print(
                f"(The {dropped} oldest messages were dropped: the conversation is longer than the model's context of "
                f"{self.session.context} tokens.)"
            )
        if replies[-1].stopped:
            print("(Stopped.)")
        elif not all(reply.finished for reply in replies):
            print(f"(Cut after {max(len(reply.ids) for reply in replies)} tokens: /set max_new_tokens allows more.)")

    def obey(self, line: str) -> None:
        """Does what a command says; an OptionError where there is none, or its value is wrong."""
        command, _, rest = line[1:].partition(" ")
        if (obeyed := getattr(self, f"do_{command}", None)) is None:
            raise OptionError(f"/{command} is not a command. They are:\n{COMMANDS}")
        obeyed(rest.strip())

    def do_help(self, rest: str) -> None:
        """Lists the commands."""
        print(COMMANDS)

    def do_base(self, rest: str) -> None:
        """Switches the adapter off, and on again."""
        self.sides = [self.sides == [False]]
        print(f"The adapter is {'on' if self.sides[0] else 'off'}.")

    def do_both(self, rest: str) -> None:
        """Has both complete each message, and again one."""
        self.sides = [True, False] if len(self.sides) == 1 else [True]
        print("Adapter and base complete each message." if len(self.sides) > 1 else "The adapter is on.")

    def do_image(self, rest: str) -> None:
        """Adds an image to the next message."""
        if self.session.trained.images is None:
            raise OptionError("/image: the adapter was trained on text. Begin with --image FILE to show it images.")
        if not Path(rest).is_file():
            raise OptionError(f"/image {rest}: there is no such file.")
        self.images.append(rest)
        print(f"The next message has {len(self.images)} image{'s' * (len(self.images) > 1)}.")

    def do_reset(self, rest: str) -> None:
        """Begins a new conversation."""
        self.session.reset(self.system)
        print("A new conversation.")

    def do_system(self, rest: str) -> None:
        """Begins one with another system message."""
        self.session.reset(rest or None)
        self.system = rest or None
        print(f"A new conversation {'with' if rest else 'without'} a system message.")

    def do_set(self, rest: str) -> None:
        """Changes how is sampled, and says it."""
        name, _, value = rest.partition(" ")
        if value:
            self.session.settings = _changed(self.session, name, value.strip())
        print(self.session.settings.describe(self.session.trained).capitalize() + ".")


def _changed(session: "Session", name: str, value: str) -> "Settings":
    kinds: dict[str, Any] = {"temperature": float, "top_p": float, "max_new_tokens": int, "seed": int}
    if name not in kinds:
        raise OptionError(f"{name!r} can't be set: {', '.join(kinds)} can.")
    try:
        settings = replace(session.settings, **{name: kinds[name](value)})
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{name}={value!r} is not a number.") from error
    settings.config(session.trained)
    return settings
