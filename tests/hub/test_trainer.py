"""Publishing from the trainer: what of `push_to_hub` and `hub_...` is honored, and when a run is stopped."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_helpers import mentions, trained
from hub_server import HubServer
from trainer_helpers import ours, text_pairs

from dpo_peft import wings
from dpo_peft.errors import OptionError, PublishError
from dpo_peft.hub.publishing import publish

pytest_plugins = ["hub_helpers"]

TOKEN = "hf_" + "s3cr3t" * 6


@pytest.fixture
def titled(hub: HubServer) -> Any:
    """`titled("me/x")`: messages of its commits after the first."""
    hub.add_account("me", TOKEN, "write", orgs={"lab": "write"})
    return lambda repo_id, branch="main": [c.title for c in hub.repos[repo_id].branches[branch][1:]]


@pytest.fixture
def make(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> Any:
    return lambda **options: trained(tiny_llama, make_tokenizer, tmp_path / "reviews-dpo", **options)


def test_pushing_without_having_planned_to(hub: HubServer, titled: Any, make: Any) -> None:
    trainer = make()
    result = trainer.push_to_hub(token=TOKEN, private=True, license="mit", language="en", dataset="someone/pairs")
    assert result.repo_id == "me/reviews-dpo" and hub.repos[result.repo_id].private
    assert titled(result.repo_id) == ["End of training"]
    card = hub.repos[result.repo_id].files["README.md"].content.decode()
    assert "license: mit" in card and "- someone/pairs" in card and "- en" in card
    again = trainer.push_to_hub(token=TOKEN, commit_message="again")
    assert not {"adapter_model.safetensors", "curves.png"} & set(again.uploaded)


def head_and_title(card: str) -> tuple[dict[str, Any], str]:
    return yaml.safe_load(card.split("---")[1]), re.search(r"^# (.+)$", card, flags=re.M)[1]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("given", "datasets", "title", "tags"),
    [
        ({"dataset_name": "someone/pairs"}, ["someone/pairs"], "reviews-dpo", set()),  # TRL's scripts end like this
        ({"dataset_name": ["a/b", "c/d"], "tags": "reviews"}, ["a/b", "c/d"], "reviews-dpo", {"reviews"}),
        ({"model_name": "Reviews 1", "tags": ["x", "lora"]}, None, "Reviews 1", {"x"}),
        ({"dataset_name": "/data/secret/rows", "model_name": None, "tags": None}, None, "reviews-dpo", set()),
    ],
)
def test_the_card_as_trl_scripts_ask_for_it(
    hub: HubServer, titled: Any, make: Any, given: Any, datasets: Any, title: str, tags: set[str]
) -> None:
    trainer = make()
    trainer.create_model_card()
    plain, _ = head_and_title((Path(trainer.args.output_dir) / "README.md").read_text())
    trainer.create_model_card(**given)
    here = (Path(trainer.args.output_dir) / "README.md").read_text()
    published = hub.repos[trainer.push_to_hub(token=TOKEN, **given).repo_id].files["README.md"].content.decode()
    for card in (here, published):
        head, shown = head_and_title(card)
        assert (head.get("datasets"), shown) == (datasets, title)
        assert head["model-index"][0]["name"] == title
        assert head["tags"][: len(plain["tags"])] == plain["tags"] and len(set(head["tags"])) == len(head["tags"])
        assert set(head["tags"]) == {*plain["tags"], *tags}
        assert "/data/secret" not in card
    assert 'adapter = "me/reviews-dpo"' in published


def test_the_card_by_position_as_in_trl(hub: HubServer, make: Any) -> None:
    trainer = make(max_steps=1)
    trainer.create_model_card("A name", "a/b", ["t"])
    head, title = head_and_title((Path(trainer.args.output_dir) / "README.md").read_text())
    assert title == "A name" and head["datasets"] == ["a/b"] and head["tags"][-1] == "t"
    with pytest.raises(TypeError, match="tasks"):
        trainer.create_model_card(tasks="dpo")


def test_options_of_the_config_are_honored(hub: HubServer, titled: Any, make: Any, tmp_path: Path) -> None:
    plan = {"push_to_hub": True, "hub_model_id": "lab/x", "hub_token": TOKEN, "hub_private_repo": True}
    trainer = make(**plan, hub_revision="v1", hub_strategy="end", save_strategy="steps", save_steps=1)
    assert hub.count("^POST .*/commit/") == 0  # "end": nothing is pushed on the way
    trainer.save_model()
    assert hub.repos["lab/x"].private and titled("lab/x", "v1") == ["Model save"]
    assert mentions(tmp_path, TOKEN) == []  # not in metrics.json, not in the options, not in the checkpoints
    options = json.loads((tmp_path / "reviews-dpo" / "training_args.json").read_text())
    assert options["hub_model_id"] == "lab/x" and trainer.args.hub_token == TOKEN
    published = hub.repos["lab/x"].branches["v1"][-1].files
    assert not [name for name, blob in published.items() if TOKEN.encode() in blob.content]
    assert b"hub_" not in published["recipe.yaml"].content


def test_every_save_is_published_and_a_failure_does_not_stop_the_run(hub: HubServer, titled: Any, make: Any) -> None:
    hub.fail("^POST .*/commit/", how=413)
    trainer = make(push_to_hub=True, hub_token=TOKEN, save_strategy="steps", save_steps=1)
    assert trainer.state.global_step == 2
    assert titled("me/reviews-dpo") == ["Training in progress, step 2"]


def test_a_failure_at_the_end_leaves_what_is_saved(hub: HubServer, titled: Any, make: Any, tmp_path: Path) -> None:
    trainer = make(push_to_hub=True, hub_token=TOKEN, hub_strategy="end")
    hub.fail("^POST .*/preupload", times=10**6)
    with pytest.raises(PublishError, match="the adapter is in .*: dpo-peft push .* --repo_id me/reviews-dpo"):
        trainer.save_model()
    hub.faults.clear()
    assert publish(tmp_path / "reviews-dpo", "me/reviews-dpo", token=TOKEN).uploaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_strategy": "checkpoint"}, "hub_strategy='checkpoint' would publish optimizer states"),
        ({"hub_always_push": True}, "hub_always_push=True has no effect"),
        ({"hub_token": "hf_read"}, "is read-only"),
        ({"hub_model_id": "you/x"}, "you is neither your account"),
    ],
)
def test_what_can_not_be_honored_stops_before_training(hub: HubServer, make: Any, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(push_to_hub=True, **options)
    assert hub.count("^POST") == 0


def test_a_local_base_stops_before_training(
    hub: HubServer, base_folder: str, make_tokenizer: Any, tmp_path: Path
) -> None:
    named = re.escape(f"a local model ({Path(base_folder).name})")
    with pytest.raises(OptionError, match=rf"{named}.*dpo-peft push FOLDER --base_model HUB_ID"):
        ours(base_folder, text_pairs(4), make_tokenizer(), tmp_path / "run", push_to_hub=True, quantize_base=False)
    assert hub.requests == []


def test_arguments_that_push_to_hub_does_not_have(hub: HubServer, make: Any) -> None:
    trainer = make(max_steps=1)
    with pytest.raises(OptionError, match="blocking=False is not available"):
        trainer.push_to_hub(blocking=False)
    with pytest.raises(OptionError, match="tasks: not available here. Use .*license"):
        trainer.push_to_hub(tasks="dpo")
    assert hub.requests == []


def test_without_artifacts_and_hub_the_adapter_is_saved_alone(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a copy of the package without these folders; `make` trains."""
    monkeypatch.setattr(
        wings, "find_spec", lambda name: None if name.endswith((".artifacts", ".hub")) else find_spec(name)
    )
    trainer = make(max_steps=1)
    trainer.save_model()
    saved = {path.name for path in (tmp_path / "reviews-dpo").iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json"} <= saved
    assert not {"metrics.json", "recipe.yaml", "curves.png"} & saved
    with pytest.raises(OptionError, match="has no dpo_peft/hub"):
        trainer.push_to_hub()
    with pytest.raises(OptionError, match="has no dpo_peft/hub"):
        make(push_to_hub=True)
