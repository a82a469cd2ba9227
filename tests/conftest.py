"""What the tests share: an offline, isolated environment, real data where there is any, tiny models and tokenizers."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before torch, transformers and datasets are imported anywhere. The cache is this process's own: a tokenized
# dataset left over from an earlier run must not stand in for the code under test.
CACHE = tempfile.mkdtemp(prefix="dpo-peft-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.update(
    HF_HOME=CACHE,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
    WANDB_DISABLED="true",
)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

if TYPE_CHECKING:  # what is heavy is imported where it is used: the process that hands out the tests runs none of them
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"  # optional: real data and tokenizers beside the checkout

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 4
VOCAB_SIZE = 320  # of tiny_llama: room for every token of make_tokenizer (specials, 256 bytes, MERGES)
# Merges that span words and borders, so that a prompt's text and its tokens can disagree at the end.
MERGES = "t h,th e,Ġ the,Ġ t,i n,e r,Ġ a,o n,in g,a n,an d,Ġ and,o o,Ċ Ċ,! !".split(",")

CHATML_TEMPLATE = (
    "{%- if tools %}<|im_start|>system\ntools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}"
    "<|im_start|>{{ message['role'] }}{{ '\n' }}"
    "{%- if message.get('tool_calls') %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{- message['content'] or '' }}<|im_end|>\n"
    "{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Every test starts from the same random state and computes on one thread."""
    import torch
    from transformers import set_seed

    torch.set_num_threads(1)
    set_seed(0)


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> None:
    """Spares each full collection, one per training run, a look at all objects of what is imported (0.6 s)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no curves of runs (half a second each) but in the tests of the files of a run; the file is there."""
    from dpo_peft.artifacts import curves
    from dpo_peft.files import write_atomically

    if request.path.parent.name != "artifacts":
        monkeypatch.setattr(curves, "save", lambda figure, path: write_atomically(path, b"\x89PNG\r\n\x1a\n"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real datasets (`DPO_PEFT_DATA`, else `../shared/data`); skips the test where there is none."""
    folder = Path(os.environ.get("DPO_PEFT_DATA", SHARED / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set DPO_PEFT_DATA to the folder")
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir() -> Callable[[str], Path]:
    """`tokenizer_dir(name)`: folder of a real tokenizer (`DPO_PEFT_TOKENIZERS`, else `../shared/tokenizers`)."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("DPO_PEFT_TOKENIZERS", SHARED / "tokenizers")) / name
        if not (folder / "tokenizer.json").is_file():
            pytest.skip(f"no tokenizer {name}: set DPO_PEFT_TOKENIZERS to the folder that holds it")
        return folder

    return find


@pytest.fixture(scope="session")
def tiny_llama() -> "Callable[..., LlamaForCausalLM]":
    """`tiny_llama(seed=0, **config)`: a random fp32 Llama of 2 layers, eval mode, same arguments same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        options: dict[str, Any] = dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.2,  # the default gives nearly uniform log-probs, on which wrong code looks right
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**options, **overrides}))
        return model.float().eval()

    return build


@pytest.fixture
def template_tokenizer(make_tokenizer: "Callable[..., PreTrainedTokenizerFast]") -> Callable[[str], Any]:
    """The real chat templates that TRL's package brings, by name, on the tests' tokenizer."""

    def build(name: str) -> Any:
        trl = find_spec("trl")
        path = Path(trl.origin if trl and trl.origin else __file__).parent / "chat_templates" / f"{name}.jinja"
        if not path.is_file():
            pytest.skip(f"no {path.name} in the installed trl")
        return make_tokenizer(chat_template=path.read_text("utf-8"))

    return build


@pytest.fixture(scope="session")
def make_tokenizer() -> "Callable[..., PreTrainedTokenizerFast]":
    """`make_tokenizer(add_bos=False, chat_template=CHATML, eos_token="</s>")`: byte-level BPE, made in code.

    It takes any text, has a few merges (`MERGES`) and pad, bos and eos tokens with the ids 0, 1 and 2. With `add_bos`
    it puts bos before each text, as Llama's does. `chat_template=None` gives one without a template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def build(
        add_bos: bool = False, chat_template: str | None = CHATML_TEMPLATE, eos_token: str = "</s>"
    ) -> PreTrainedTokenizerFast:
        merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
        tokens = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
        if add_bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
            )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token=eos_token,
            clean_up_tokenization_spaces=False,
        )
        fast.chat_template = chat_template
        return fast

    return build


@pytest.fixture(scope="session")
def base_folder(tiny_llama, make_tokenizer, tmp_path_factory) -> str:
    """Folder of `tiny_llama()` and its tokenizer, as a model to be loaded by name. Tests only read it."""
    folder = str(tmp_path_factory.mktemp("base"))
    tiny_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-case", action="store_true", help="also what `sampled` and `rare` leave out")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases of a `sampled(n, slow=m)` test every nth stays, the first among them; of the others every mth moves
    into the slow tier, and the rest, as what is `rare`, runs with --every-case alone."""
    cases: dict[str, int] = {}
    left_out = []
    for item in items:
        if item.get_closest_marker("rare") and not config.getoption("--every-case"):
            left_out.append(item)
        elif mark := item.get_closest_marker("sampled"):
            test = item.nodeid.partition("[")[0]
            cases[test] = cases.get(test, -1) + 1
            if cases[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
                if cases[test] % mark.kwargs.get("slow", 1) and not config.getoption("--every-case"):
                    left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
