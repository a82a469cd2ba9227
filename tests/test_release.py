"""What a release is made of: the archives, the version, the floors of the dependencies, and what CI names."""

import re
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from paths import REPO

from dpo_peft import __version__

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))
LOCAL = shutil.ignore_patterns(".git", ".venv*", ".whl", "outputs", "dist", "site", "__pycache__", ".*_cache")
NAME = f"dpo_peft-{__version__}"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wheel and sdist, built from two copies that lie elsewhere, with other times and rights of their files."""
    from hatchling import build

    built = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        for name, mode in (("one", 0o644), ("another", 0o600)):
            root = tmp_path_factory.mktemp(name)
            shutil.copytree(REPO, root / name, ignore=LOCAL, copy_function=shutil.copyfile)
            for path in (root / name).rglob("*.*"):
                path.chmod(path.stat().st_mode if path.is_dir() else mode)
            patch.chdir(root / name)
            built += [root / build.build_wheel(str(root)), root / build.build_sdist(str(root))]
    return built


def test_two_builds_give_the_same_bytes(archives: list[Path]) -> None:
    wheel, sdist, other_wheel, other_sdist = (path.read_bytes() for path in archives)
    assert wheel == other_wheel and sdist == other_sdist
    assert archives[0].name == f"{NAME}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_nothing_else(archives: list[Path]) -> None:
    with zipfile.ZipFile(archives[0]) as wheel:
        held = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
        about = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    sources = {path for path in (REPO / "dpo_peft").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    targets = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    added = [name for source, target in targets["force-include"].items() for name in beneath(source, target)]
    assert held == {str(path.relative_to(REPO)) for path in sources} | {*added}
    assert "dpo_peft/quickstart/quickstart.yaml" in held
    assert "Requires-Dist: trl>=1.16; extra == 'trl'" in about
    links = re.findall(r"\]\(([^)#][^)]*)\)", about)
    assert links and all(link.startswith("https://") for link in links), (
        "an index doesn't show the README's relative links"
    )


def beneath(source: str, target: str) -> list[str]:
    """The names in the wheel of a file or a folder that is added to it."""
    if (REPO / source).is_file():
        return [target]
    files = (path for path in (REPO / source).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [f"{target}/{path.relative_to(REPO / source)}" for path in files]


def test_the_sdist_holds_what_its_tests_read(archives: list[Path]) -> None:
    with tarfile.open(archives[1]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ("tests", "recipes", "benchmarks", "docs", "dev", "model_cards", "dpo_peft", ".ci", ".github")
    files = [path for folder in folders for path in (REPO / folder).rglob("*") if path.is_file()]
    files += [path for path in REPO.iterdir() if path.is_file() and path.name != ".git"]
    wanted = {str(path.relative_to(REPO)) for path in files if "__pycache__" not in path.parts}
    assert not wanted - held


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert yaml.safe_load((REPO / "CITATION.cff").read_text("utf-8"))["version"] == __version__


def test_the_floors_are_what_the_lowest_job_installs() -> None:
    lines = (REPO / "constraints-lowest.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)  # >=2.10 is tested by 2.10.0
    extras = PROJECT["project"]["optional-dependencies"]
    floors = {}
    for wanted in [*PROJECT["project"]["dependencies"], *extras["trl"], *extras["test"]]:
        name, _, floor = wanted.partition(">=")
        if floor:
            floors[name] = floor
    assert {name: (pinned[name] + ".").startswith(floor + ".") for name, floor in floors.items()} == dict.fromkeys(
        floors, True
    )


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((REPO / ".github" / "workflows" / name).read_text("utf-8"))


@pytest.mark.parametrize("name", sorted(path.name for path in (REPO / ".github" / "workflows").iterdir()))
def test_workflows_take_no_right_that_they_need_not(name: str) -> None:
    """Actions are pinned by commit, rights are given by job, and what is run exists."""
    found, text = workflow(name), (REPO / ".github" / "workflows" / name).read_text("utf-8")
    assert found["permissions"] == {}
    for job in found["jobs"].values():
        writes = {right for right, level in job["permissions"].items() if level == "write"}
        assert writes <= ({"id-token", "attestations"} if name == "release.yml" else set())
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", used) for used in re.findall(r"uses: (\S+)", text))
    makefile = (REPO / "Makefile").read_text("utf-8")
    assert all(f"\n{target}:" in makefile for target in re.findall(r"run: make (\w+)", text))
    assert all((REPO / script).is_file() for script in re.findall(r"run: bash (\S+)", text))


def test_the_image_copies_files_that_there_are() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (REPO / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    allowed = {line[1:] for line in (REPO / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert names and names <= allowed
    assert all((REPO / name).exists() for name in names)
    for source in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]:
        assert source.split("/")[0] in names, "the wheel is built in the image"
