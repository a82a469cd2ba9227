"""What is served beside what was trained: by llama.cpp itself, by a stub in vLLM's place, and by transformers; and
servers that are wrong on purpose."""

import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import unpacked, write_gguf
from peft import get_peft_model
from trainer_helpers import lora, ours
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import answer_only, quickstart
from dpo_peft.cli import main
from dpo_peft.errors import OptionError
from dpo_peft.files import read_rows
from dpo_peft.manifests import weights_digest
from dpo_peft.model.adapter_source import AdapterSource
from dpo_peft.model.gguf import is_gguf
from dpo_peft.serving.asking import Endpoint
from dpo_peft.serving.exporting import INVOCATION, write_adapter
from dpo_peft.serving.servers import llama_cpp_server
from dpo_peft.serving.verify import Served, verify_serving

pytest.importorskip("xllamacpp")
MODEL = quickstart.model_path()
TRAIN, TEST = (str(Path(MODEL).parent / "data" / f"{name}.jsonl") for name in ("train", "test"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Callable[[str], str]:
    """`files("Q8_0")`: the bundled model as a GGUF file, made once."""
    model, folder = AutoModelForCausalLM.from_pretrained(MODEL), tmp_path_factory.mktemp("files")

    def made(kind: str) -> str:
        path = folder / f"{kind}.gguf"
        return str(path if path.exists() else write_gguf(path, model, AutoTokenizer.from_pretrained(MODEL), kind))

    return made


def trained_on(base: str, folder: Path, steps: int = 3, **options: Any) -> str:
    """An adapter that was trained hard enough to matter."""
    rows = read_rows(TRAIN, "train", None, False, None, None).select(range(8 * steps))
    how = {"max_steps": steps, "learning_rate": 2e-2, "per_device_train_batch_size": 8, **options}
    how["model_init_kwargs"] = {"dtype": "float32"}
    trainer = ours(base, rows, AutoTokenizer.from_pretrained(MODEL), folder, **how)
    trainer.train()
    trainer.save_model()
    return str(folder)


@pytest.fixture(scope="module")
def adapter(files: Any, tmp_path_factory: Any) -> str:
    """Trained on the file of Q8_0."""
    return trained_on(files("Q8_0"), tmp_path_factory.mktemp("adapter"), quantize_base=False)


def drawn(folder: Path, **options: Any) -> AdapterSource:
    """An adapter of the bundled model with random weights."""
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), lora(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return AdapterSource(str(folder), quantize=False, dtype="float32")


def converted(source: AdapterSource, folder: Path) -> Path:
    """The adapter as a GGUF file, by llama.cpp's converter."""
    write_adapter(source, folder / "adapter.gguf", None, folder)
    return folder / "adapter.gguf"


@pytest.fixture(scope="module")
def adapter_gguf(adapter: str, tmp_path_factory: Any) -> str:
    return str(converted(AdapterSource(adapter), tmp_path_factory.mktemp("converted")))


def weakened(adapter: bytes, by: float) -> bytes:
    """An adapter's file whose alpha is so many times what it is."""
    head = adapter.index(b"adapter.lora.alpha") + len(b"adapter.lora.alpha") + 4
    (alpha,) = struct.unpack("<f", adapter[head : head + 4])
    return adapter[:head] + struct.pack("<f", alpha * by) + adapter[head + 4 :]


def some(rows: int) -> Any:
    return read_rows(TEST, "test", None, False, None, None).select(range(rows))


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def test_log_probs_are_those_of_plain_transformers(files: Any, monkeypatch: Any) -> None:
    """End tokens inside a completion, repeated ones, parts of a character and a zero byte are tokens like others; a
    completion without them is asked for at once."""
    bytes = AutoTokenizer.from_pretrained(MODEL).convert_tokens_to_ids(["a", "Ã", "©", "Ā"])  # Ã©: the bytes of é
    prompt, completion = [1, 300, 40], [500, 2, 2, 700, 12, *bytes, *bytes, bytes[1], bytes[1], 40, 2]
    asked: list[Any] = []

    def counted(*given: Any, ask: Any = Endpoint.ask) -> Any:
        asked.append(given)
        return ask(*given)

    monkeypatch.setattr(Endpoint, "ask", counted)
    with llama_cpp_server(files("F32"), None, 64) as server:
        found = torch.tensor(server.logps(prompt, completion))
        written = server.greedy(prompt, 12)
        asked.clear()
        whole = [700, 12, 500, 12, 700, 2]
        one_by_one = [server._single([*prompt, *whole[:at]], token)["logprob"] for at, token in enumerate(whole)]
        assert server.logps(prompt, whole) == pytest.approx(one_by_one, abs=1e-5) and len(asked) == 6 + 1
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)  # the cache is in float16
    assert written == greedy


def test_the_base_that_was_trained_on_is_verified_and_another_is_caught(
    adapter: str, adapter_gguf: str, files: Any, capsys: Any
) -> None:
    words = ["verify-serving", adapter, "--adapter_gguf", adapter_gguf, "--dataset_name", TEST, "--max_rows", "5"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and report["served"] == "llama.cpp with Q8_0.gguf"
    drift = report["drift"]
    assert drift["mean_token"] < 0.02 < 0.1 < drift["adapter_token"] and drift["signs_equal"] == drift["pairs"] == 5
    assert drift["greedy_prompts"] == 5
    assert main([*words, "--base_gguf", files("Q4_0")]) == 3
    said = capsys.readouterr()
    assert "What is served is not what was trained. It is 0." in said.err and "Q4_0.gguf, beside" in said.out
    kept = json.loads((Path(adapter) / "serving.json").read_text())
    assert {one["weights"] for one in kept.values()} == {weights_digest(Path(adapter))}
    assert [*kept] == ["llama.cpp with Q8_0.gguf", "llama.cpp with Q4_0.gguf"]
    (line,) = (one for one in (Path(adapter) / "README.md").read_text().splitlines() if "**Served:**" in one)
    assert "Q8_0.gguf is the trained model: 0.0" in line and "Q4_0.gguf is **not** the trained model: 0." in line


def test_strength_and_scope_of_an_adapter_are_verified(tmp_path: Path, files: Any) -> None:
    """rsLoRA is weaker by the square root of its rank where a file is made of it by hand, and an answer-only adapter
    acts on the prompt too where its tokens are overlooked. llama-server has it act from the token before its own on:
    the file names one token less."""
    tokens = answer_only(AutoTokenizer.from_pretrained(MODEL))
    source = drawn(tmp_path, use_rslora=True, r=16, alora_invocation_tokens=tokens)
    path = converted(source, tmp_path)
    right = path.read_bytes()
    served = Served(base_gguf=files("F32"), adapter_gguf=str(path))
    verified = verify_serving(source, served, dataset=some(2))
    assert not verified.problems and verified.drift.mean_token < 0.01 * verified.drift.adapter_token, verified
    for wrong in (right.replace(INVOCATION, b"?" * 31), weakened(right, 1 / 4)):
        assert len(wrong) == len(right) and wrong != right
        path.write_bytes(wrong)
        report = verify_serving(source, served, dataset=some(2))
        assert report.problems and report.drift.mean_token > 0.2 * report.drift.adapter_token, report
    assert report.drift.strength < 0.5 and "The adapter acts with 0." in report.problems[1], report
    assert not verify_serving(source, served, dataset=some(1), max_token_difference=99, min_signs=0).problems


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_text("GGUF")
    with pytest.raises(OptionError, match="llama.cpp can't load .*none.gguf"):
        llama_cpp_server(str(tmp_path / "none.gguf"), None, 64).__enter__()


# ---- Others ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm(adapter: str) -> Iterator[str]:
    """A stand-in for vLLM with the adapter as "run" and its base as "base", computed by transformers and PEFT."""
    base = AdapterSource(adapter).load(with_reference=False).model  # the only way to the file's own weights
    assert is_gguf(base.base_model.model.name_or_path)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, told = 200, {}
            if self.path != "/v1/completions" or body["model"] not in ("run", "base"):
                status, told = 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            elif body["model"] == "base":
                with base.disable_adapter():
                    told = answer(body)
            else:
                told = answer(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, *_: Any) -> None:
            pass

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        ids, choice = torch.tensor([body["prompt"]]), {}
        with torch.no_grad():
            if body.get("prompt_logprobs") is not None:
                logps = base(input_ids=ids).logits[0].log_softmax(-1)
                told: list[Any] = [None]
                for at, token in enumerate(body["prompt"][1:]):
                    best = int(logps[at].argmax())
                    told.append({str(i): {"logprob": logps[at, i].item(), "rank": 1} for i in (best, token)})
                choice["prompt_logprobs"] = told
            if body.get("return_token_ids"):
                out = base.generate(input_ids=ids, max_new_tokens=body["max_tokens"], do_sample=False)
                choice["token_ids"] = out[0, ids.shape[1] :].tolist()
        return {"choices": [choice]}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_vllm_is_asked_as_its_protocol_has_it(adapter: str, vllm: str, capsys: Any) -> None:
    words = ["verify-serving", adapter, "--engine", "vllm", "--dataset_name", TEST, "--max_rows", "3"]
    assert main([*words, "--url", vllm, "--served_model", "run"]) == 0
    assert "3 of 3 of the same sign" in capsys.readouterr().out
    report = json.loads((Path(adapter) / "serving.json").read_text())["vllm with run"]
    assert report["drift"]["mean_token"] < 1e-4 and report["drift"]["greedy_equal"] == 3
    assert main([*words, "--url", f"{vllm}/v1/", "--served_model", "base"]) == 3  # the adapter was left out
    assert main([*words, "--url", vllm, "--served_model", "other"]) == 2
    assert "it refuses: HTTP Error 404: Not Found" in capsys.readouterr().err
    assert main([*words, "--url", "http://127.0.0.1:9", "--served_model", "run"]) == 2
    assert "Connection refused" in capsys.readouterr().err


def test_the_original_base_is_caught_where_4_bits_were_trained_on(tmp_path: Path) -> None:
    """The adapter was fitted to the base in NF4; the merged model is what was trained."""
    source = AdapterSource(trained_on(MODEL, tmp_path / "run"))
    served = verify_serving(source, Served("transformers"), dataset=some(4))
    assert served.problems and served.drift.mean_token > 0.02
    assert main(["merge", source.adapter, "--output_dir", str(tmp_path / "merged")]) == 0
    merged = Served("transformers", served_base=str(tmp_path / "merged"), merged=True)
    verified = verify_serving(source, merged, dataset=some(4))
    assert not verified.problems and verified.drift.mean_token < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "ollama"}, "use one of llama.cpp, vllm, transformers"),
        ({"engine": "vllm", "url": "http://a"}, "needs url and served_model"),
        ({"engine": "vllm", "base_gguf": "a"}, "base_gguf has no effect with engine='vllm'"),
        ({"base_gguf": "a", "api_key": "k"}, "api_key has no effect with no running server"),
        ({"url": "http://a", "base_gguf": "a"}, "base_gguf has no effect with a running server"),
        ({"base_gguf": "none.gguf"}, "base_gguf='none.gguf': there is no such file"),
        ({"merged": True}, "base_gguf is missing"),
        ({"engine": "transformers", "merged": True}, "merged needs served_base"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, message: str, adapter: str) -> None:
    with pytest.raises(OptionError, match=message):
        verify_serving(AdapterSource(adapter), Served(**options))


# ---- In full --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_200_pairs_on_the_base_that_was_trained_on(kind: str, files: Any, tmp_path: Path) -> None:
    source = AdapterSource(trained_on(files(kind), tmp_path, steps=20, quantize_base=False, learning_rate=1e-3))
    drift = verify_serving(source, Served(), dataset=some(200), max_rows=200).drift
    assert drift.mean_token <= 0.02 and drift.signs_equal >= 196 and drift.greedy_equal >= 120


@pytest.mark.slow
@pytest.mark.skipif("SMOLLM2_GGUF" not in os.environ, reason="SMOLLM2_GGUF names no file")
def test_smollm2_on_its_file(tmp_path: Path) -> None:
    """Served with the same weights in float32; on the file itself, where llama.cpp's rounding of activations moves it
    by as much as ours does, five times the usual limit; and an adapter of next to no strength, told in that noise."""
    file = os.environ["SMOLLM2_GGUF"]
    source = AdapterSource(trained_on(file, tmp_path, steps=6, quantize_base=False, learning_rate=1e-3))
    path = converted(source, tmp_path)
    served = Served(base_gguf=str(unpacked(file, tmp_path / "float32.gguf")), adapter_gguf=str(path))
    same = verify_serving(source, served, dataset=some(8))
    noisy = verify_serving(source, Served(adapter_gguf=str(path)), dataset=some(20))
    path.write_bytes(weakened(path.read_bytes(), 1e-6))  # of 0 llama.cpp makes 1
    absent = verify_serving(source, Served(adapter_gguf=str(path)), dataset=some(8))
    print(same, noisy, absent, sep="\n")
    assert not same.problems and same.drift.mean_token < 0.005 < 0.02 < same.drift.adapter_token
    assert same.drift.signs_equal == 8 and same.drift.greedy_equal >= 7
    assert not noisy.problems and noisy.rounding and noisy.drift.mean_token > 0.05
    assert noisy.drift.mean_token == pytest.approx(noisy.rounding.mean_token, rel=0.25)
    assert any("The adapter acts with" in problem for problem in absent.problems) and absent.drift.strength < 0.3
