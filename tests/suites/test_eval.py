"""`dpo-peft eval`: figures that plain transformers and PEFT give row by row, controls, the judge, files and errors."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from reward_helpers import plain_adapter, plain_logps
from transformers import AutoModelForCausalLM

from dpo_peft import answer_only, quickstart
from dpo_peft.cli import main
from dpo_peft.report.page import save_report
from dpo_peft.suites import instructions, run
from dpo_peft.suites.checkers import TASKS, follows
from dpo_peft.suites.checkers import words as spoken
from dpo_peft.suites.neutral import TEXTS, repeated
from dpo_peft.training.tally import wilson

PLAIN = ["--quantize", "false", "--dtype", "float32"]
WORDS = "sea man cat mat sun rain boat stone".split()


@pytest.fixture(scope="module")
def adapter(base_folder: str, make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return plain_adapter(base_folder, make_tokenizer(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def plain(adapter: str, base_folder: str) -> PeftModel:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder, dtype="float32"), adapter
    ).eval()


@pytest.fixture
def evaluate(adapter: str, tmp_path: Path, capsys: Any) -> Callable[..., dict[str, Any]]:
    """The command's JSON, which is what it writes, too."""

    def call(*words: Any) -> dict[str, Any]:
        output = tmp_path / "eval.json"
        capsys.readouterr()
        assert main(["eval", adapter, *PLAIN, "--output", str(output), "--overwrite", "--json", *map(str, words)]) == 0
        said, written = json.loads(capsys.readouterr().out), json.loads(output.read_text("utf-8"))
        assert said == {**written, "output": str(output)}
        return written

    return call


def figures(result: dict[str, Any], at: int = 0) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in result["suites"][at]["figures"]}


def sides(plain: PeftModel, value: Callable[[], Any]) -> dict[str, Any]:
    """A value under both sides, the base by PEFT's own `disable_adapter`."""
    found = {"adapter": value()}
    with plain.disable_adapter():
        return {**found, "base": value()}


def bootstrapped(values: Any, weights: Any = None, seed: int = 0) -> tuple[float, float]:
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    draw, found = np.random.default_rng(seed), []
    for _ in range(20):
        for counts in draw.multinomial(len(values), np.full(len(values), 1 / len(values)), 100):
            at = np.repeat(np.arange(len(values)), counts)
            found.append(values[at].sum() / weights[at].sum())
    return tuple(np.percentile(found, [2.5, 97.5]))  # type: ignore[return-value]


def same(figure: Any, value: float, interval: Any, abs: float = 1e-5) -> None:
    assert figure["value"] == pytest.approx(value, abs=abs)
    assert (figure["low"], figure["high"]) == pytest.approx(tuple(interval), abs=abs)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def bench_rows(number: int = 40) -> list[dict[str, Any]]:
    """RewardBench's columns; every completion has another length, but for a few."""
    draw = np.random.default_rng(3)
    texts = [" ".join(draw.choice(WORDS, draw.integers(1, 9))) for _ in range(3 * number)]
    turns = ("user", "assistant", "assistant")
    return [
        {
            **{
                name: [{"role": role, "content": text}]
                for name, role, text in zip(("prompt", "chosen", "rejected"), turns, texts[3 * i :], strict=False)
            },
            "subset": "chat" if i % 3 else "code",
            "chosen_model": "m1",
            "id": i,
        }
        for i in range(number)
    ]


def test_pairs_are_those_of_plain_peft(
    evaluate: Callable[..., dict[str, Any]], plain: PeftModel, make_tokenizer: Any, tmp_path: Path
) -> None:
    rows, tokenizer = bench_rows(), make_tokenizer()
    result = evaluate("--suites", f"pairs:{write(tmp_path / 'bench.jsonl', rows)}")

    def render(turns: list[Any], open: bool = False) -> list[int]:
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=open, return_dict=True)["input_ids"])

    found: list[dict[str, Any]] = []
    for row in rows:
        prompt = render(row["prompt"], True)
        whole = [render([*row["prompt"], *row[name]])[len(prompt) :] for name in ("chosen", "rejected")]
        logps = sides(plain, lambda prompt=prompt, whole=whole: [plain_logps(plain, prompt, ids) for ids in whole])
        lengths = [len(ids) for ids in whole]
        means = {side: [a / n for a, n in zip(both, lengths, strict=True)] for side, both in logps.items()}
        reward = [on - off for on, off in zip(logps["adapter"], logps["base"], strict=True)]
        found.append({**means, "reward": reward, "longer": np.sign(lengths[0] - lengths[1])})

    def won(of: str, part: list[dict[str, Any]]) -> np.ndarray:
        return np.array([float(one[of][0] > one[of][1]) for one in part])

    by_name = figures(result)
    for prefix, part in (
        ("", found),
        ("chat, ", [one for i, one in enumerate(found) if i % 3]),
        ("code, ", [one for i, one in enumerate(found) if not i % 3]),
    ):
        number, longer = len(part), np.array([one["longer"] for one in part])
        assert by_name[f"{prefix}mean log-prob"]["rows"] == number
        for of in ("base", "adapter"):
            share = won(of, part).mean()
            same(by_name[f"{prefix}mean log-prob"][of], share, wilson(share, number)[1:])
            halves = [won(of, part)[longer == sign].mean() for sign in (1, -1)]
            balanced = by_name[f"{prefix}mean log-prob, length-balanced"][of]
            assert balanced["value"] == pytest.approx(sum(halves) / 2) and balanced["low"] < sum(halves) / 2
        apart = won("adapter", part) - won("base", part)
        same(by_name[f"{prefix}mean log-prob"]["difference"], apart.mean(), bootstrapped(apart))
        share = won("reward", part).mean()
        same(by_name[f"{prefix}implicit reward"]["adapter"], share, wilson(share, number)[1:])
        assert by_name[f"{prefix}implicit reward"]["base"] is None
        alone = by_name[f"{prefix}length alone"]["base"]["value"]
        assert alone == pytest.approx(((longer > 0) + (longer == 0) / 2).mean())


def test_swapped_labels_turn_the_accuracy_around(evaluate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """LLMBar's rows; negative control."""
    draw = np.random.default_rng(4)
    texts = [[" ".join(draw.choice(WORDS, 5)) for _ in range(3)] for _ in range(20)]
    rows = [dict(zip(("input", "output_1", "output_2"), row, strict=True)) for row in texts]
    files = [
        write(tmp_path / f"{name}.jsonl", [{**row, "label": label[i % 2]} for i, row in enumerate(rows)])
        for name, label in (("right", (1, 2)), ("swapped", (2, 1)))
    ]
    result = evaluate("--suites", *(f"pairs:{file}" for file in files))
    right, swapped = (figures(result, at) for at in (0, 1))
    for name in ("mean log-prob", "implicit reward"):
        assert right[name]["adapter"]["value"] == pytest.approx(1 - swapped[name]["adapter"]["value"])
    assert right["implicit reward"]["adapter"]["value"] not in (0.5, 1)
    assert [suite["name"] for suite in result["suites"]] == ["pairs right.jsonl", "pairs swapped.jsonl"]


def test_instructions_and_neutral_are_those_of_plain_peft(
    evaluate: Callable[..., dict[str, Any]], plain: PeftModel, make_tokenizer: Any
) -> None:
    tokenizer, how = make_tokenizer(), ["--limit", 25, "--max_new_tokens", 24, "--seed", 3]
    result = evaluate("--suites", "instructions", "neutral", *how)
    rows = instructions.make_prompts(3, 25)

    def complete(text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = plain.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        return out[0, ids["input_ids"].shape[1] :].tolist()

    checks = [json.loads(row["instruction"]) for row in rows]
    texts = sides(plain, lambda: [tokenizer.decode(complete(r["prompt"]), skip_special_tokens=True) for r in rows])
    by_name = figures(result)
    for loose in (False, True):
        figure = by_name["loose" if loose else "strict"]
        passed = {
            side: [follows(text, loose=loose, **check) for text, check in zip(texts[side], checks, strict=True)]
            for side in texts
        }
        for side in texts:
            share = sum(passed[side]) / 25
            same(figure[side], share, wilson(share, 25)[1:])
        apart = np.array(passed["adapter"], float) - np.array(passed["base"], float)
        same(figure["difference"], apart.mean(), bootstrapped(apart, seed=3))
    lines = result["suites"][0]["rows"]
    assert [line["adapter"]["completion"] for line in lines] == texts["adapter"] != texts["base"]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows]
    assert sum(figure["detail"] for figure in by_name.values()) == 25

    ids = [tokenizer(line)["input_ids"] for line in TEXTS.read_text("utf-8").splitlines()[:25]]
    loss = sides(plain, lambda: np.array([-plain_logps(plain, one[:1], one[1:]) for one in ids]))
    tokens = [len(one) - 1 for one in ids]
    by_name = figures(result, 1)
    figure = by_name["loss per token, nats"]
    for side in loss:
        value = loss[side].sum() / sum(tokens)
        same(figure[side], value, bootstrapped(loss[side], tokens, 3), abs=1e-4)
    apart = loss["adapter"] - loss["base"]
    same(figure["difference"], apart.sum() / sum(tokens), bootstrapped(apart, tokens, 3), abs=1e-4)
    written = sides(plain, lambda: [complete(task) for task in TASKS[:25]])
    for side, each in written.items():
        assert by_name["tokens of a completion"][side]["value"] == pytest.approx(np.mean([len(one) for one in each]))
        assert by_name["finished completions"][side]["value"] == np.mean([one[-1] in (2, 4) for one in each])
        shares = [repeated(spoken(tokenizer.decode(one, skip_special_tokens=True))) for one in each]
        assert by_name["repeated 4-grams"][side]["value"] == pytest.approx(np.mean(shares))


# ---- The judge ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """An OpenAI-compatible server whose replies are `said["reply"]`'s of what it is asked; and what it was asked."""
    said: dict[str, Any] = {"asked": [], "reply": lambda a, b: "Verdict: A", "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said["asked"].append({"path": self.path, "key": self.headers["Authorization"], **body})
            text = body["messages"][0]["content"]
            a = text.partition("[Reply A]\n")[2].partition("\n\n[Reply B]")[0]
            b = text.partition("[Reply B]\n")[2].partition("\n\nGive your reasons")[0]
            answer = json.dumps({"choices": [{"message": {"content": said["reply"](a, b)}}]}).encode()
            self.send_response(said["status"])
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1", said
        listening.shutdown()


def test_a_judge_that_always_says_the_first(
    evaluate: Callable[..., dict[str, Any]], server: Any, monkeypatch: Any
) -> None:
    """Half of the wins, and never the same verdict twice; one that sees the adapter's mark gives it all."""
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    url, said = server
    how = ["--suites", "judge", "--judge_url", url, "--judge_model", "m", "--limit", 12, "--max_new_tokens", 12]
    first = figures(evaluate(*how))
    same(first["win rate"]["adapter"], 0.5, (0.5, 0.5))
    assert first["win rate at equal length"]["adapter"]["value"] == pytest.approx(0.5)
    assert first["same verdict with places swapped"]["adapter"]["value"] == 0
    assert len(said["asked"]) == 1 + 2 * 12
    asked = said["asked"][-1]
    assert asked["path"] == "/v1/chat/completions" and asked["key"] == "Bearer abc" and asked["model"] == "m"

    said["reply"] = lambda a, b: f"Well.\n**Verdict: {'A' if a > b else 'B'}**"
    result = evaluate(*how)
    rows, found = result["suites"][0]["rows"], figures(result)
    wins = [float(row["adapter_completion"] > row["base_completion"]) for row in rows]
    assert [row["win"] for row in rows] == wins and 0 < sum(wins) < 12
    same(found["win rate"]["adapter"], np.mean(wins), bootstrapped(wins))
    assert found["same verdict with places swapped"]["adapter"]["value"] == 1

    said["reply"] = lambda a, b: "I can't say."  # no verdict is no win for anyone
    assert figures(evaluate(*how))["win rate"]["adapter"]["value"] == 0.5


def test_a_server_that_does_not_answer_is_said_before_the_model_is_loaded(
    adapter: str, server: Any, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("dpo_peft.serving.asking.time.sleep", lambda seconds: None)
    monkeypatch.setattr(run, "Subject", None)
    url, said = server
    for status, where, tries in ((404, url, 1), (503, url, 6), (200, "http://127.0.0.1:9/v1", 0)):
        said.update(status=status, asked=[])
        assert main(["eval", adapter, "--suites", "judge", "--judge_url", where, "--judge_model", "m"]) == 2
        assert (
            f"judge_url: {where}/chat/completions gave no answer" in capsys.readouterr().err
            and len(said["asked"]) == tries
        )


# ---- Files and errors -----------------------------------------------------------------------------------------------


def test_the_bundled_model_and_a_suite_of_ones_own(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """A model alone has one side; a suite is a function of a file."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from dpo_peft.suites.figures import Estimate, Figure\n"
        "def lengths(file, options, source):\n"
        "    def evaluate(subject):\n"
        "        figure = Figure('of ' + file, Estimate(len(file), 0, 9), None, None, 1)\n"
        "        return {'figures': [figure], 'sides': list(subject.sides)}\n"
        "    return evaluate\n"
    )
    suites = ["instructions", "neutral", f"pairs:{quickstart.test_file()}", "mine.py:lengths:abc"]
    how = ["--limit", "6", "--max_new_tokens", "16"]
    assert main(["eval", quickstart.model_path(), *PLAIN, "--suites", *suites, *how]) == 0
    shown, result = capsys.readouterr().out, json.loads(Path("eval.json").read_text("utf-8"))
    assert "lengths abc: of abc" in shown and "3.000 (0.000 to 9.000)" in shown
    assert result["suites"][3]["sides"] == ["base"] and len(result["lm_eval"]) == 1
    assert all(figure["adapter"] is None for suite in result["suites"] for figure in suite["figures"])
    assert figures(result)["strict"]["base"] and 0 < figures(result, 2)["mean log-prob"]["base"]["value"] < 1


def test_plain_text_is_left_out_of_an_answer_only_adapter(
    base_folder: str, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = {"alora_invocation_tokens": answer_only(make_tokenizer())}
    folder = plain_adapter(base_folder, make_tokenizer(), tmp_path / "run", **tokens)
    Path("texts.txt").write_text("One line of text.\n")
    how = [folder, *PLAIN, "--limit", "2", "--max_new_tokens", "4"]
    assert main(["eval", *how]) == 0  # the suites that run if none is named
    told = figures(json.loads((tmp_path / "run" / "eval.json").read_text("utf-8")), 1)
    assert "repeated 4-grams" in told and "loss per token, nats" not in told
    assert "acts on completions alone" in caplog.text
    assert main(["eval", *how, "--suites", "neutral:texts.txt", "--overwrite"]) == 2
    assert "Leave the file out." in capsys.readouterr().err


def test_the_card_and_the_report_have_the_table(base_folder: str, make_tokenizer: Any, tmp_path: Path) -> None:
    folder = Path(plain_adapter(base_folder, make_tokenizer(), tmp_path / "run"))
    (folder / "README.md").write_text("# Card\n\n## Training\n\nIt was trained.\n", "utf-8")
    (folder / "metrics.json").write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
    words = ["eval", str(folder), *PLAIN, "--suites", "neutral", "--limit", "3", "--max_new_tokens", "4"]
    assert main(words) == 0
    once = (folder / "README.md").read_text("utf-8")
    assert main(words) == 2 and main([*words, "--overwrite"]) == 0
    assert (folder / "README.md").read_text("utf-8") == once
    assert once.index("## Evaluation") < once.index("neutral: loss per token") < once.index("## Training")
    save_report([folder], folder / "report.html")
    page = (folder / "report.html").read_text("utf-8")
    assert "neutral: loss per token" in page and "of other weights" not in page
    (folder / "adapter_model.safetensors").write_bytes(b"others")  # trained again since
    save_report([folder], folder / "report.html")
    page = (folder / "report.html").read_text("utf-8")
    assert "neutral: loss per token" not in page and "of other weights" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suites", "neutrall"], "mean 'neutral'"),
        (["--suites", "pairs"], "pairs:FILE"),
        (["--suites", "pairs:none.jsonl"], "no such file"),
        (["--suites", "pairs:single.jsonl"], "no pairs and no ranked lists"),
        (["--suites", "instructions:single.jsonl"], "no column 'instruction'"),
        (["--suites", "neutral:none.txt"], "no such file"),
        (["--suites", "mine.py:lengths"], "no such file"),
        (["--suites", "judge"], "judge_url and judge_model"),
        (["--suites", "judge", "--judge_url", "localhost", "--judge_model", "m"], "must begin with http"),
        (["--limit", "0"], "limit=0"),
        (["--output", "out.txt"], "must end in .json"),
        (["--output", "there.json"], "there already"),
    ],
)
def test_errors_come_before_the_model_is_loaded(
    words: list[str], message: str, adapter: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "Subject", None)
    write(Path("single.jsonl"), [{"prompt": "a", "completion": "b", "label": True}])
    Path("there.json").write_text("{}")
    assert main(["eval", adapter, *words]) == 2
    assert message in capsys.readouterr().err
