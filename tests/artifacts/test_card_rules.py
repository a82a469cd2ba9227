"""The Hub's rules for a card's metadata, and the papers that a card cites."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import LICENSES, card_errors
from paths import REPO

from dpo_peft.artifacts.card import RunSummary, model_card
from dpo_peft.artifacts.card_rules import HUB_LICENSES, problems, read_head
from dpo_peft.artifacts.citations import DORA, DPO, LORA, QLORA, RSLORA, RSO, TR_DPO, WPO, bibtex, cited, papers
from dpo_peft.losses import REGISTRY

CARDS = REPO / "model_cards"
RESULT = {
    "task": {"type": "text-generation"},
    "dataset": {"type": "a/b", "name": "pairs"},
    "metrics": [{"type": "accuracy", "value": 0.5}],
}
GOOD: dict[str, Any] = {
    "license": "apache-2.0",
    "language": ["en", "zh-Hans"],
    "library_name": "peft",
    "pipeline_tag": "text-generation",
    "tags": ["dpo"],
    "base_model": "a/b",
    "base_model_relation": "adapter",
    "datasets": ["a/b"],
    "model-index": [{"name": "x", "results": [RESULT]}],
}


def card(**changes: Any) -> str:
    head = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    return f"---\n{yaml.safe_dump(head)}---\n\n# x\n"


def test_a_good_card_has_no_problem() -> None:
    assert problems(card()) == [] == card_errors(card())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"license": "Apache 2"}, "license: 'Apache 2' is not one of the Hub's. Use 'other'"),
        ({"license": "other"}, "needs a license_name"),
        ({"base_model": "a/b/c"}, "base_model: 'a/b/c' is not a name of the Hub"),
        ({"base_model_relation": "lora"}, "base_model_relation: 'lora' must be one of"),
        ({"datasets": ["/x"]}, "datasets: '/x' is not a name"),
        ({"datasets": "a/b"}, "datasets must be a list"),
        ({"language": ["english"]}, "language: 'english' is not an ISO 639 code"),
        ({"language": [False]}, "language must be a list of texts"),  # YAML's reading of a bare `no`
        ({"tags": "dpo"}, "tags must be a list of texts"),
        ({"pipeline_tag": "chat"}, "pipeline_tag: 'chat' is not a task"),
        ({"library_name": 1}, "library_name must be text"),
        ({"licence": "mit"}, "'licence' is not a key of the Hub's metadata: did you mean 'license'?"),
        ({"model-index": {}}, "model-index must be a list"),
        ({"model-index": [{"results": [RESULT]}]}, "an entry needs a name"),
        ({"model-index": [{"name": "x"}]}, "needs a list of results"),
        ({"model-index": [{"name": "x", "results": [{**RESULT, "task": {}}]}]}, "result 1 needs task.type"),
        ({"model-index": [{"name": "x", "results": [{**RESULT, "dataset": {"type": "a"}}]}]}, "needs dataset.name"),
        ({"model-index": [{"name": "x", "results": [{**RESULT, "metrics": []}]}]}, "result 1 needs metrics"),
        (
            {"model-index": [{"name": "x", "results": [{**RESULT, "metrics": [{"value": 1}]}]}]},
            "has a metric without type",
        ),
        (
            {
                "model-index": [
                    {"name": "x", "results": [{**RESULT, "metrics": [{"type": "a", "value": float("nan")}]}]}
                ]
            },
            "has nan as the value of a",
        ),
    ],
)
def test_each_rule(changes: dict[str, Any], message: str) -> None:
    (found,) = problems(card(**changes))
    assert message in found


@pytest.mark.parametrize("text", ["# x\n", "", "---\n---\n# x", "---\na: 1\n# never closed"])
def test_a_card_without_metadata(text: str) -> None:
    assert "there is no metadata" in problems(text)[0]


def test_an_unknown_key_is_allowed() -> None:
    assert problems(card(my_own_note="x")) == []


def test_the_servers_licenses_are_among_ours() -> None:
    assert LICENSES <= HUB_LICENSES


@pytest.mark.parametrize("loss", REGISTRY)
def test_every_objective_is_cited_by_its_paper(loss: str) -> None:
    """The entry is the paper that the registry names: same id, first author's surname, year within the one that
    lies between preprint and venue."""
    paper = REGISTRY[loss].paper
    if "arXiv:" not in paper:
        assert loss == "sft" and cited([paper], {}, log_ratio=False) == [LORA]
        return
    surname, year, arxiv = re.fullmatch(r"(.+) et al\. (\d{4}), .*arXiv:(\d{4}\.\d{5})", paper).groups()  # type: ignore
    assert cited([paper], {})[0] == arxiv
    entry = papers()[arxiv]
    assert f"= {{{surname}, " in entry and 0 <= int(re.findall(r"year +=.*(\d{4})", entry)[0]) - int(year) <= 1
    assert f"https://arxiv.org/abs/{arxiv}" in bibtex([arxiv])


@pytest.mark.parametrize("arxiv", papers())
def test_an_entry_is_bibtex(arxiv: str) -> None:
    text = papers()[arxiv]
    kind, key, fields = re.fullmatch(r"@(\w+)\{(\w+),\n(.*)\n\}", text, flags=re.DOTALL).groups()  # type: ignore
    names = re.findall(r"^  (\w+) +=", fields, flags=re.MULTILINE)
    assert names == ["title", "author", "booktitle" if kind == "inproceedings" else "journal", "year", "url"]
    assert text.count("{") == text.count("}") and key == key.lower()
    authors = re.findall(r"author +=.*?\{(.*)\}", fields)[0].split(" and ")
    assert all(re.fullmatch(r"[^,]+, [^,]+", author) for author in authors), authors
    assert len({entry.split(",")[0] for entry in papers().values()}) == len(papers())  # keys are unique


def test_options_and_adapters_bring_their_papers() -> None:
    dpo, hinge, simpo = (REGISTRY[name].paper for name in ("sigmoid", "hinge", "simpo"))
    assert cited([dpo], {}) == [DPO, LORA]
    assert cited([dpo], {"use_weighting": True, "sync_ref_model": True}, quantized=True) == [
        DPO,
        WPO,
        TR_DPO,
        LORA,
        QLORA,
    ]
    assert cited([hinge], {}) == ["2305.10425", RSO, DPO, LORA]
    assert cited([simpo], {"f_divergence_type": "reverse_kl"}, log_ratio=False, rslora=True, dora=True) == [
        "2405.14734",
        LORA,
        RSLORA,
        DORA,
    ]


def test_a_paper_without_an_entry_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dpo_peft")
    assert bibtex(["2999.00001", DPO]) == papers()[DPO]
    assert "arXiv:2999.00001 is not cited in the model card" in caplog.text
    run = RunSummary("a/x", "a/b", 0.1, papers=["2999.00001", DPO])
    assert papers()[DPO] in str(model_card(run))


def test_the_generated_card_keeps_both_sets_of_rules() -> None:
    run = RunSummary("a/x", "a/b", 0.1, license="Own Terms", datasets=["a/c"], eval_last={"rewards/accuracies": 0.7})
    assert problems(str(model_card(run))) == [] == card_errors(str(model_card(run)))


# ---- The cards in this repository -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CARDS.glob("[!R]*.md")), ids=lambda path: path.stem)
def test_cards_of_adapters_trained_here(path: Path) -> None:
    """They keep the rules, state the accuracy that their own table shows, and their pictures are there."""
    text = path.read_text("utf-8")
    assert problems(text) == []
    accuracy = read_head(text)["model-index"][0]["results"][0]["metrics"][0]["value"]
    shown = re.search(r"\| `rewards/accuracies` \|.* (\S+) \|\n", text)
    assert shown is not None and float(shown[1]) == pytest.approx(accuracy, abs=5e-5)
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures and all((CARDS / picture).is_file() for picture in pictures)
    assert f"[{path.name}]({path.name})" in (CARDS / "README.md").read_text("utf-8")
