"""Publishing over HTTP: the real client against a local server that speaks the Hub's API (`hub_server.py`)."""

import json
import re
import urllib.error
import urllib.request
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_helpers import BASE
from hub_server import Blob, HubServer
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from dpo_peft.artifacts.card import RunSummary, save_model_card
from dpo_peft.errors import OptionError, PublishError
from dpo_peft.hub.publishing import publish
from dpo_peft.manifests import weights_digest
from dpo_peft.model.adapter_source import load_trained, read_training

pytest_plugins = ["hub_helpers"]

REPO = "me/reviews-dpo"
PUBLISHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "curves.png",
    "metrics.json",
    "recipe.yaml",
    "samples.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
}
WRITES = r"^(PUT|POST) /(?!api/validate-yaml)"  # all that would leave something behind


def names(hub: HubServer, repo_id: str = REPO) -> set[str]:
    return set(hub.repos[repo_id].files) - {".gitattributes"}


def titles(hub: HubServer, repo_id: str = REPO) -> list[str]:
    return [commit.title for commit in hub.repos[repo_id].branches["main"]]


def text(hub: HubServer, name: str, repo_id: str = REPO) -> str:
    return hub.repos[repo_id].files[name].content.decode()


# Create


def test_a_new_repository_holds_what_belongs_to_the_adapter(hub: HubServer, folder: Path) -> None:
    result = publish(folder, REPO)
    assert names(hub) == PUBLISHED == set(result.uploaded) and result.created and result.unchanged == []
    assert titles(hub) == ["initial commit", "Publish the adapter"]  # one commit, not one per file
    assert result.commit == hub.repos[REPO].branches["main"][-1].sha and result.url == f"{hub.url}/{REPO}"
    large = {name for name, blob in hub.repos[REPO].files.items() if blob.lfs}
    assert large == {"adapter_model.safetensors", "curves.png"} and hub.count("^PUT /storage") == 2
    assert set(result.left_out) == {"training_args.json", "eval_examples.jsonl", "manifest.json"}
    weights = "adapter_model.safetensors"
    assert hub.repos[REPO].files[weights].content == (folder / weights).read_bytes()


def test_a_name_without_owner_is_the_tokens_account(hub: HubServer, folder: Path) -> None:
    assert publish(folder, "reviews").repo_id == "me/reviews"
    assert 'adapter = "me/reviews"' in text(hub, "README.md", "me/reviews")


def test_what_was_published_is_the_trained_model(
    hub: HubServer, saved_run: Any, folder: Path, tiny_llama: Any, tmp_path: Path
) -> None:
    publish(folder, REPO)
    back = snapshot_download(REPO, local_dir=tmp_path / "back", token=False)
    tiny_llama().save_pretrained(tmp_path / "base")  # the base comes from elsewhere
    loaded = load_trained(back, base=str(tmp_path / "base"), device="cpu")
    ids = torch.tensor([[1, 40, 50, 60, 70, 80]])
    with torch.no_grad():
        saved_run.model.eval()
        assert torch.equal(loaded.model(input_ids=ids).logits, saved_run.model(input_ids=ids).logits)
        with loaded.model.disable_adapter():
            assert not torch.equal(loaded.model(input_ids=ids).logits, saved_run.model(input_ids=ids).logits)
    assert read_training(back) == read_training(folder)


def test_the_published_card_passes_the_hubs_own_check(hub: HubServer, folder: Path) -> None:
    publish(folder, REPO, licence="apache-2.0", datasets=["someone/pairs"], languages=["en"])
    card = text(hub, "README.md")
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["datasets"], head["language"]) == ("apache-2.0", ["someone/pairs"], ["en"])
    assert head["base_model"] == BASE and head["base_model_relation"] == "adapter"
    assert head["model-index"][0]["name"] == "reviews-dpo"
    assert f'adapter = "{REPO}"' in card
    assert hub.count("^POST /api/validate-yaml") >= 1


def test_a_card_that_only_the_hub_refuses_stops_before_anything_is_made(hub: HubServer, folder: Path) -> None:
    with pytest.raises(OptionError, match='the Hub refuses its metadata.*"license" must be one of'):
        publish(folder, REPO, license="wtfpl")  # in our list, not in this server's
    assert REPO not in hub.repos and hub.count(WRITES) == 0


def test_several_parts_of_a_large_file(hub: HubServer, folder: Path) -> None:
    hub.multipart = 10_000
    publish(folder, REPO)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert hub.count(r"^PUT /storage/.*/\d+/\d+$") >= -(-size // 10_000) > 1
    assert names(hub) == PUBLISHED


def test_what_was_measured_of_these_weights_is_published(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """Without texts of rows and this machine's paths; and what was measured of others stays here."""
    here, digest = (
        str(folder),
        blake2b((folder / "adapter_model.safetensors").read_bytes(), digest_size=16).hexdigest(),
    )
    assert digest == weights_digest(folder)
    figure = {"name": "win rate", "base": None, "adapter": None, "difference": None, "rows": 4, "detail": False}
    suite = {
        "suite": f"judge:{here}/a.jsonl",
        "name": "judge a.jsonl",
        "figures": [figure],
        "rows": [{"prompt": "my"}],
    }
    result = {"adapter": here, "weights": digest, "suites": [suite], "lm_eval": [f"lm_eval peft={here}"]}
    served: dict[str, Any] = {
        "llama.cpp with q.gguf": {"problems": [], "weights": digest},
        "vllm": {"weights": "f" * 32},
    }
    for name, told in (("eval.json", result), ("serving.json", served)):
        (folder / name).write_text(json.dumps(told))
    published = publish(folder, REPO)
    assert names(hub) == PUBLISHED | {"eval.json", "serving.json"}
    kept = {"name": "judge a.jsonl", "figures": [figure]}
    assert json.loads(text(hub, "eval.json")) == {"adapter": folder.name, "weights": digest, "suites": [kept]}
    assert json.loads(text(hub, "serving.json")) == {"llama.cpp with q.gguf": served["llama.cpp with q.gguf"]}
    assert "eval.json goes without the texts of its rows and lm-eval's commands" in published.notes
    for name, told in (("eval.json", {**result, "weights": "f" * 32}), ("serving.json", {"vllm": served["vllm"]})):
        (folder / name).write_text(json.dumps(told))
    left_out = publish(folder, "me/other").left_out
    assert names(hub, "me/other") == PUBLISHED and left_out["eval.json"].startswith("of other weights")
    assert left_out["serving.json"].startswith("of other weights")


# Another base, other places


def test_the_local_base_is_replaced_in_all_that_is_published(hub: HubServer, folder: Path) -> None:
    local = str(folder.parent / "secret" / "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = config["auto_mapping"]["dpo_peft_reference"]["base"] = local
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()  # the config was changed on purpose
    card = (folder / "README.md").read_text()
    here = card.replace(f"[{BASE}](https://huggingface.co/{BASE})", "`base`, a model in a local folder")
    (folder / "README.md").write_text(here)
    with pytest.raises(OptionError, match=r"a model in a local folder \(base\).*--base_model"):
        publish(folder, REPO)
    assert hub.requests == []
    publish(folder, REPO, base_model=BASE)
    published = json.loads(text(hub, "adapter_config.json"))
    assert published["base_model_name_or_path"] == BASE == published["auto_mapping"]["dpo_peft_reference"]["base"]
    assert f"[{BASE}](https://huggingface.co/{BASE})" in text(hub, "README.md")
    assert "local folder" not in text(hub, "README.md")
    assert not [name for name in names(hub) if b"secret" in hub.repos[REPO].files[name].content]
    assert json.loads((folder / "adapter_config.json").read_text()) == config  # the folder stays as it is


def test_a_gguf_base_is_published_as_the_file_on_the_hub(hub: HubServer, folder: Path) -> None:
    """Its repository alone, or another model, would be other weights; the file's place here is not told."""
    local, there = str(folder.parent / "secret" / "q.gguf"), f"{BASE}/q.gguf"
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = config["auto_mapping"]["dpo_peft_reference"]["base"] = local
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    save_model_card(RunSummary("reviews-dpo", local, None, has_chat_template=False), folder)
    assert 'from_pretrained("FOLDER", gguf_file="q.gguf")' in (folder / "README.md").read_text()
    for base, message in (
        (None, r"in a local file \(q.gguf\)"),
        (BASE, "not the file that it was trained on, q.gguf"),
    ):
        with pytest.raises(OptionError, match=f"{message}.*--base_model NAME/MODEL/FILE.gguf"):
            publish(folder, REPO, base_model=base)
    with pytest.raises(OptionError, match=f"base {there} is not on the Hub"):
        publish(folder, REPO, base_model=there)
    hub.add_repo(BASE, {"q.gguf": b"GGUF"})
    publish(folder, REPO, base_model=there)
    assert json.loads(text(hub, "adapter_config.json"))["base_model_name_or_path"] == there
    card = text(hub, "README.md")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == BASE
    assert (
        f'from_pretrained("{BASE}", gguf_file="q.gguf")' in card
        and f"[{there}](https://huggingface.co/{BASE})" in card
    )
    assert not [name for name in names(hub) if b"secret" in hub.repos[REPO].files[name].content]


def test_a_base_that_is_not_on_the_hub_is_refused(hub: HubServer, folder: Path) -> None:
    with pytest.raises(OptionError, match="base someone/other is not on the Hub"):
        publish(folder, REPO, base_model="someone/other")
    assert REPO not in hub.repos


def test_a_frozen_reference_is_named_and_not_published(hub: HubServer, folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"]["dpo_peft_reference"]["adapter"] = str(folder.parent / "sft")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()  # the config was changed on purpose
    result = publish(folder, REPO)
    assert json.loads(text(hub, "adapter_config.json"))["auto_mapping"]["dpo_peft_reference"]["adapter"] == "sft"
    assert any("a frozen adapter (sft)" in note for note in result.notes)


def test_an_adapter_with_a_name_lies_in_a_folder_of_its_own(hub: HubServer, folder: Path) -> None:
    (folder / "mine").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(folder / "mine" / name)
    (folder / "manifest.json").unlink()
    publish(folder, REPO)
    assert names(hub) == PUBLISHED


def test_a_branch_is_made_and_main_left_alone(hub: HubServer, folder: Path) -> None:
    publish(folder, REPO, revision="v2")
    assert names(hub) == set() and PUBLISHED < set(hub.repos[REPO].branches["v2"][-1].files)
    publish(folder, REPO, revision="v2", commit_message="again")
    assert len(hub.repos[REPO].branches["v2"]) == 2  # nothing had changed
    assert hub.count("^POST .*/branch/") == 1  # it was there the second time


def test_a_pull_request_writes_to_nobodys_branch(hub: HubServer, folder: Path) -> None:
    repo = hub.add_repo("you/theirs")
    result = publish(folder, "you/theirs", create_pr=True)
    assert result.pr_url == f"{hub.url}/you/theirs/discussions/1" and len(repo.branches["main"]) == 1
    assert PUBLISHED < set(repo.branches["refs/pr/1"][-1].files)


# Update


def test_an_update_sends_what_has_changed(hub: HubServer, folder: Path) -> None:
    publish(folder, REPO)
    sent = hub.count("^PUT /storage")
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "seconds": 7}))
    result = publish(folder, REPO, commit_message="second")
    assert set(result.uploaded) == {"metrics.json"} and set(result.unchanged) == PUBLISHED - {"metrics.json"}
    assert hub.count("^PUT /storage") == sent and not result.created
    assert titles(hub)[-1] == "second" and json.loads(text(hub, "metrics.json"))["seconds"] == 7


def test_nothing_new_makes_no_commit(hub: HubServer, folder: Path) -> None:
    first = publish(folder, REPO)
    again = publish(folder, REPO)
    assert again.uploaded == {} and again.commit == first.commit and len(titles(hub)) == 2


def test_new_weights_are_sent_alone(hub: HubServer, folder: Path) -> None:
    publish(folder, REPO)
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(OptionError, match="may be of two runs.*delete its manifest.json"):
        publish(folder, REPO)
    (folder / "manifest.json").unlink()
    assert set(publish(folder, REPO).uploaded) == {"adapter_model.safetensors"}
    assert hub.count("^PUT /storage") == 3 and hub.repos[REPO].files[path.name].content == path.read_bytes()


# What goes wrong on the way


@pytest.mark.parametrize("times", [1, 7], ids=["the client tries again", "we try again"])
def test_a_connection_dropped_in_a_large_file(hub: HubServer, folder: Path, times: int) -> None:
    hub.fail("^PUT /storage", times=times)
    assert set(publish(folder, REPO).uploaded) == PUBLISHED and names(hub) == PUBLISHED
    assert hub.count("^PUT /storage") == 2 + times


def test_giving_up_leaves_nothing_visible_and_resuming_sends_the_rest(hub: HubServer, folder: Path) -> None:
    broken = (folder / "adapter_model.safetensors").stat().st_size
    hub.fail(rf"^PUT /storage/.*/{broken}$", times=10**6)
    with pytest.raises(PublishError) as caught:
        publish(folder, REPO, attempts=2, repeat="push once more.")
    message = str(caught.value)
    assert message.startswith("sending the files failed, 2 times: ")
    assert "was made and is empty: nothing was published" in message and "not sent again" in message
    assert message.endswith("Check the connection. To go on, push once more.")
    assert names(hub) == set() and titles(hub) == ["initial commit"]
    hub.faults.clear()
    arrived = set(hub.repos[REPO].storage)
    assert len(arrived) == 1  # the picture
    before = len(hub.requests)
    publish(folder, REPO)
    assert names(hub) == PUBLISHED
    later = [request for request in hub.requests[before:] if request.startswith("PUT /storage")]
    assert len(later) == 1 and not any(oid in later[0] for oid in arrived)


def test_a_drop_between_the_files_and_the_commit(hub: HubServer, folder: Path) -> None:
    hub.fail("^POST .*/commit/", times=10**6)
    with pytest.raises(PublishError, match="^committing failed, 4 times.*unless only the answer was lost"):
        publish(folder, REPO)
    assert names(hub) == set() and len(hub.repos[REPO].storage) == 2
    hub.faults.clear()
    sent = hub.count("^PUT /storage")
    publish(folder, REPO)
    assert names(hub) == PUBLISHED and hub.count("^PUT /storage") == sent


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: HubServer, folder: Path) -> None:
    hub.fail("^POST .*/commit/", how="lose")
    result = publish(folder, REPO)
    assert titles(hub) == ["initial commit", "Publish the adapter"]
    assert result.commit == hub.repos[REPO].branches["main"][-1].sha


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub: HubServer, folder: Path) -> None:
    repo = hub.add_repo("you/theirs")
    hub.fail("^POST .*/commit/", how="lose")
    with pytest.raises(PublishError, match="unless only the answer was lost"):
        publish(folder, "you/theirs", create_pr=True)
    assert [name for name in repo.branches if name.startswith("refs/pr")] == ["refs/pr/1"]


@pytest.mark.parametrize(
    "request_", ["^GET /api/whoami", "^GET /api/models", "^POST /api/repos/create", "^POST .*/preupload", "/batch$"]
)
@pytest.mark.parametrize("how", ["drop", 503], ids=["dropped", "503"])
def test_any_step_may_fail_once(hub: HubServer, folder: Path, request_: str, how: Any) -> None:
    hub.fail(request_, how=how)
    publish(folder, REPO)
    assert names(hub) == PUBLISHED and titles(hub) == ["initial commit", "Publish the adapter"]


def test_waits_grow_and_end(hub: HubServer, folder: Path) -> None:
    hub.fail("^GET /api/whoami", times=10**6, how=502)
    with pytest.raises(PublishError, match="asking whose token it is failed, 3 times: .*502"):
        publish(folder, REPO, attempts=3, wait=5)
    assert hub.slept == [5, 20]  # type: ignore[attr-defined]
    assert hub.count(WRITES) == 0


def test_the_hub_may_ask_for_a_pause(hub: HubServer, folder: Path) -> None:
    hub.fail("^POST .*/preupload", how=429, **{"Retry-After": "33"})
    publish(folder, REPO)
    assert 34.0 in hub.slept and names(hub) == PUBLISHED  # type: ignore[attr-defined]


def test_what_fails_for_good_is_not_tried_again(hub: HubServer, folder: Path) -> None:
    hub.fail("^POST .*/commit/", times=10**6, how=413)
    with pytest.raises(PublishError, match=r"^committing failed: .*413.*larger than the Hub takes"):
        publish(folder, REPO)
    assert hub.count("^POST .*/commit/") == 1 and names(hub) == set()


@pytest.mark.attack("input as output")
def test_someone_elses_commit_in_between_is_not_overwritten(hub: HubServer, folder: Path) -> None:
    publish(folder, REPO)
    (folder / "samples.jsonl").unlink()
    (folder / "recipe.yaml").write_text("beta: 0.2\n")
    repo = hub.repos[REPO]
    hub.fail("/preupload/", how=lambda: repo.commit("main", "theirs", {**repo.files, "x": Blob(b"x", False)}))
    with pytest.raises(PublishError, match="committing failed: .*412.*Someone else changed it meanwhile"):
        publish(folder, REPO)
    assert titles(hub)[-1] == "theirs"


def test_no_network(hub: HubServer, folder: Path) -> None:
    hub.__exit__()
    with pytest.raises(PublishError, match="asking whose token it is failed, 4 times: .*Check the connection"):
        publish(folder, REPO)


def test_an_offline_client_is_told_so(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OptionError, match="HF_HUB_OFFLINE is set"):
        publish(folder, REPO)
    assert hub.requests == []


def test_the_server_lets_nothing_wrong_pass(hub: HubServer, folder: Path) -> None:
    """What the tests above rely on: a wrong file, a commit of what did not arrive, or over another parent."""
    publish(folder, REPO)
    put = urllib.request.Request(f"{hub.url}/storage/{REPO}/{'0' * 64}/3", b"abc", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(put)
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": {"path": "a.bin"}}]
    lines[1]["value"] |= {"algo": "sha256", "oid": "0" * 64, "size": 3}
    post = urllib.request.Request(
        f"{hub.url}/api/models/{REPO}/commit/main",
        "\n".join(map(json.dumps, lines)).encode(),
        {"Authorization": "Bearer hf_write"},
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(post)
    operation = CommitOperationAdd("x.txt", b"x")
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().create_commit(REPO, [operation], commit_message="x", parent_commit="0" * 40)
    assert len(titles(hub)) == 2


# Rights


def test_without_a_token(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OptionError, match="There is no token of the Hub. Make one with write access"):
        publish(folder, REPO)
    assert hub.count(WRITES) == 0


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_gone", REPO, "not valid, or was revoked"),
        ("hf_read", REPO, '"me\'s token" is read-only.*write access'),
        ("hf_write", "you/x", r"you is neither your account nor an organization of yours \(me, lab, library\)"),
        ("hf_write", "library/x", "you may only read in library"),
        ("hf_narrow", REPO, "may not write to me/reviews-dpo"),
    ],
    ids=["invalid", "read-only", "someone else's", "read-only member", "fine-grained elsewhere"],
)
def test_a_token_without_the_right(hub: HubServer, folder: Path, token: str, repo_id: str, message: str) -> None:
    scope = {"entity": {"name": "lab", "type": "org"}, "permissions": ["repo.content.read", "repo.write"]}
    hub.add_account("me", "hf_narrow", "fineGrained", orgs={"lab": "write"}, scoped=[scope])
    with pytest.raises(OptionError, match=message):
        publish(folder, repo_id, token=token)
    assert repo_id not in hub.repos and hub.count(WRITES) == 0


def test_a_fine_grained_token_may_write_where_it_is_meant_to(hub: HubServer, folder: Path) -> None:
    scope = {"entity": {"name": "lab", "type": "org"}, "permissions": ["repo.content.read", "repo.write"]}
    hub.add_account("me", "hf_narrow", "fineGrained", orgs={"lab": "write"}, scoped=[scope])
    publish(folder, "lab/reviews", token="hf_narrow")
    assert names(hub, "lab/reviews") == PUBLISHED


def test_a_right_that_only_the_hub_denies(hub: HubServer, folder: Path) -> None:
    hub.fail("^POST /api/repos/create", times=10**6, how=403)
    with pytest.raises(PublishError, match="creating the repository failed: .*403.*open a pull request"):
        publish(folder, REPO)
    assert REPO not in hub.repos


# Private, gated


def test_a_private_repository_is_private_from_the_start(hub: HubServer, folder: Path) -> None:
    publish(folder, REPO, private=True)
    assert hub.repos[REPO].private and hub.count("/settings$") == 0
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(REPO, token=False)
    assert hf_hub_download(REPO, "README.md", token="hf_write")
    assert publish(folder, REPO).uploaded == {} and hub.repos[REPO].private  # None leaves it as it is


def test_visibility_of_an_existing_repository_changes_before_anything_is_sent(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO)
    publish(folder, REPO, private=True)
    order = [request for request in hub.requests if re.search("/settings$|/storage/|/commit/", request)]
    assert hub.repos[REPO].private and order[0].endswith("/settings")
    publish(folder, REPO, private=False)
    assert not hub.repos[REPO].private


@pytest.mark.parametrize("gated", ["auto", "manual"])
def test_a_gated_repository_asks_before_it_gives(hub: HubServer, folder: Path, gated: str) -> None:
    publish(folder, REPO, gated=gated)
    order = [request for request in hub.requests if re.search("/settings$|/storage/|/commit/", request)]
    assert hub.repos[REPO].gated == gated and order[0].endswith("/settings")
    with pytest.raises(GatedRepoError):
        hf_hub_download(REPO, "adapter_config.json", token=False)
    publish(folder, REPO, gated="off")
    assert hub.repos[REPO].gated is False


# What is there already


@pytest.mark.attack("input as output")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": b"x" * 99}, r"holds other files \(model.safetensors\) and no adapter"),
        ({"README.md": b"# mine"}, r"holds other files \(README.md\) and no adapter"),
        ({"adapter_config.json": b'{"base_model_name_or_path": "a/b"}'}, r"an adapter of another base \(a/b, not"),
        (
            {"adapter_config.json": json.dumps({"base_model_name_or_path": BASE}).encode(), "README.md": b"# mine"},
            "a card that is not from here",
        ),
    ],
    ids=["a model", "a card", "another base", "another card"],
)
def test_other_work_is_not_overwritten(hub: HubServer, folder: Path, files: Any, message: str) -> None:
    hub.add_repo(REPO, files)
    with pytest.raises(OptionError, match=message):
        publish(folder, REPO)
    assert len(titles(hub)) == 1 and hub.count(WRITES) == 0
    publish(folder, REPO, overwrite=True)
    assert PUBLISHED <= names(hub) and text(hub, "README.md").startswith("---")


def test_a_licence_file_is_nobodys_work(hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, {"LICENSE": b"MIT"})
    publish(folder, REPO)
    assert names(hub) == PUBLISHED | {"LICENSE"}


# What is looked at here, before the Hub is


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.attack("damaged or mixed files")
def test_an_adapter_that_is_not_whole(hub: HubServer, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(OptionError, match="can't be read"):
        publish(folder, REPO)
    path.write_bytes(content)
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(OptionError, match=f"{re.escape(name)} holds NaN"):
        publish(folder, REPO)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(OptionError, match="adapter_model.bin, a pickle"):
        publish(folder, REPO)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(OptionError, match="has no adapter_model.safetensors"):
        publish(folder, REPO)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(OptionError, match="holds no adapter"):
        publish(folder, REPO)
    assert hub.requests == []


@pytest.mark.attack("planted secrets")
@pytest.mark.parametrize(
    ("where", "what", "message"),
    [
        ("metrics.json", "/" + "home/me/model", "metrics.json names a path of a machine"),
        ("metrics.json", "{folder}", "metrics.json names a path of a machine"),
        ("metrics.json", "C:\\Users\\me", "metrics.json names a path of a machine"),
        ("metrics.json", "hf_" + "a" * 34, "metrics.json holds what looks like a token"),
    ],
    ids=["home", "this folder", "Windows", "token"],
)
def test_what_must_not_get_out(hub: HubServer, folder: Path, where: str, what: str, message: str) -> None:
    edit(folder / where, note=what.format(folder=folder))
    with pytest.raises(OptionError, match=message):
        publish(folder, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("license: nonsense", "'nonsense' is not one of the Hub's"),
        ("licence: mit", "did you mean 'license'"),
        ("datasets: pairs.jsonl", "datasets must be a list"),
        ("base_model: [/x/y]", "'/x/y' is not a name of the Hub"),
        ("tags: [1]", "tags must be a list of texts"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_card_with_wrong_metadata(hub: HubServer, folder: Path, line: str, message: str) -> None:
    card = (folder / "README.md").read_text()
    card = re.sub(rf"^{line.split(':')[0]}:.*\n(- .*\n)*", "", card, count=1, flags=re.M)
    (folder / "README.md").write_text(card.replace("---\n", f"---\n{line}\n", 1))
    with pytest.raises(OptionError, match=message):
        publish(folder, REPO)
    assert hub.requests == []


def test_an_edited_card_keeps_its_edits(hub: HubServer, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("## Use it", "My own words.\n\n## Use it"))
    publish(folder, REPO)
    assert "My own words." in text(hub, "README.md")


@pytest.mark.parametrize("card", [None, "---\nbase_model: /x/y\n---\n# Model\n[More Information Needed]"])
def test_without_a_card_a_short_one_is_made(hub: HubServer, folder: Path, card: str | None) -> None:
    """Without any, and with the empty one that PEFT leaves in a checkpoint."""
    (folder / "README.md").unlink() if card is None else (folder / "README.md").write_text(card)
    result = publish(folder, REPO)
    assert "a short card was made" in " ".join(result.notes)
    assert yaml.safe_load(text(hub, "README.md").split("---")[1])["base_model"] == BASE


@pytest.mark.attack("pickles")
def test_more_files_by_name_and_never_a_pickle(hub: HubServer, folder: Path) -> None:
    (folder / "report.html").write_text("<html></html>")
    (folder / "training_args.bin").write_bytes(b"an earlier version's")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"x")
    result = publish(folder, REPO, include=["*.html", "eval_examples.jsonl"])
    assert names(hub) == PUBLISHED | {"report.html", "eval_examples.jsonl"}
    assert set(result.left_out) == {"training_args.json", "training_args.bin", "checkpoint-2", "manifest.json"}
    for include, message in (
        ("training_args.bin", "a pickle"),
        ("checkpoint-2/*", "a pickle"),
        ("*.txt", "fits no file"),
        ("../*", "inside the adapter's folder"),
    ):
        with pytest.raises(OptionError, match=message):
            publish(folder, REPO, include=[include])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "a/b/c"}, "not a name of the Hub"),
        ({"gated": "yes"}, "gated='yes' must be one of auto, manual, off"),
        ({"create_pr": True, "private": True}, "private: no effect on a pull request"),
        ({"attempts": 0}, "attempts=0"),
        ({"datasets": ["./pairs.jsonl"]}, "'./pairs.jsonl' is not a Hub id"),
        ({"base_model": "./base"}, "is not a Hub id"),
    ],
)
def test_options_that_make_no_sense(hub: HubServer, folder: Path, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        publish(folder, **{"repo_id": REPO, **options})
    assert hub.requests == []


def test_a_dry_run_asks_nobody(hub: HubServer, folder: Path) -> None:
    result = publish(folder, REPO, dry_run=True)
    assert set(result.uploaded) == PUBLISHED and result.commit is None and hub.requests == []
    assert len(result.checks) == 4
