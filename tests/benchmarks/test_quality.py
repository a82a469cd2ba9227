"""The quality benchmark: TRL's trainer beside ours starts from the same model and takes the same steps."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def quality() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("quality", BENCHMARKS / "quality.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_trl_is_measured_from_the_same_start(quality, monkeypatch):
    short = quality.Task((1, 2), 4, 2e-3, 0.5, 4, (0.1,))
    monkeypatch.setitem(quality.TASKS, "quickstart", short)
    prompts = quality.quickstart.eval_prompts()[:8]
    monkeypatch.setattr(quality.quickstart, "eval_prompts", lambda: prompts)
    monkeypatch.setitem(quality.TOKENS, "quickstart", 24)
    asked = argparse.Namespace(task="quickstart", model="", data="", times=1, device="cpu")
    ours, theirs, kto = (quality.measure(asked, variant, 0)["points"] for variant in ("full", "trl", "kto"))
    for own, other, unlike in zip(ours, theirs, kto, strict=True):
        assert own["kl"] == pytest.approx(other["kl"], abs=1e-3) and own["kl"] > 0.01
        assert own["rewards"] == other["rewards"]
        assert abs(unlike["kl"] - own["kl"]) > 0.01  # the control: another objective moves it elsewhere
    summary = quality.summarize({f"quickstart/{name}/0": {"points": p} for name, p in (("full", ours), ("kto", kto))})
    assert "accuracy" in summary["quickstart/full"] and "accuracy" not in summary["quickstart/kto"]
    assert summary["quickstart/kto"]["kl"]["mean"] == pytest.approx(kto[-1]["kl"], abs=1e-4)


def test_pairs_of_sentiment_are_ranked_by_the_lexicon(quality, monkeypatch, tmp_path):
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr(quality, "OPENINGS", quality.OPENINGS[:2])
    monkeypatch.setattr(quality, "PLACES", quality.PLACES[:4])
    monkeypatch.setitem(quality.TASKS, "sentiment", quality.TASKS["sentiment"]._replace(held_out=1))
    quality.draw_pairs(tmp_path / "pairs.json", quality.quickstart.model_path(), "cpu")
    train, test = quality.read_pairs("sentiment", str(tmp_path / "pairs.json"), 1)
    score = quality.vader()
    texts = [[row[side][0]["content"] for side in ("chosen", "rejected")] for row in train]
    assert all(score(chosen) > score(rejected) for chosen, rejected in texts) and texts
    assert test[0]["prompt"] not in [row["prompt"] for row in train]
