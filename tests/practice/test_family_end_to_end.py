"""Every model of the family with its kind of tokenizer: generate, chat, sft, export and serve.

Weights are random and small, all other fields of config.json as released. A user downloads a model
of the family and runs each command on it (huggingface/transformers#44261 is such a report).
"""

import json
import threading
import urllib.request

import miniruns
import pytest
import torch
from chat_forms import FORMS, form_tokenizer, write_form
from family import FAMILY, shrink
from support import randomize

from dsv3_ref.checkpoints.hf_config import config_from_hf
from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import load
from dsv3_ref.cli.main import main
from dsv3_ref.data.tokenizer import vocab_size
from dsv3_ref.model import Transformer

FORM_OF = {
    "V3": "V3", "V3-0324": "V3", "V3.1": "V3.1", "R1": "R1", "R1-0528": "R1",
    "Moonlight": "Moonlight", "Kimi-K2": "Kimi-K2", "Kimi-K2-0905": "Kimi-K2",
    "GigaChat3": "GigaChat3", "V2": "V2-Lite", "V2.5": "V2.5", "V2-Lite": "V2-Lite",
    "V2-Lite-Chat": "V2-Lite",
}  # fmt: skip
SHORT = ["Moonlight", "Kimi-K2", "V2-Lite-Chat"]  # kinds that differ most from V3


def write_model(folder, name: str) -> dict:
    """Write a small directory of this model; return the fields of its config.json."""
    form = FORMS[FORM_OF[name]]
    tokenizer = form_tokenizer(form)
    values = shrink(FAMILY[name], vocab_size=vocab_size(tokenizer))
    values["bos_token_id"] = tokenizer.token_to_id(form.bos)
    values["eos_token_id"] = tokenizer.token_to_id(form.eos)
    save_hf(randomize(Transformer(config_from_hf(values))).to(torch.bfloat16), folder)
    (folder / "config.json").write_text(json.dumps(values))
    write_form(folder, form)
    return values


@pytest.mark.parametrize(
    "name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.full) for n in FAMILY]
)
def test_every_command_on_a_directory(name, tmp_path, monkeypatch, capsys):
    miniruns.own_caches(tmp_path, monkeypatch)
    monkeypatch.setattr("dsv3_ref.training.report.write_report", miniruns.no_report)
    model, run = tmp_path / "model", tmp_path / "run"
    out = tmp_path / "out"
    values = write_model(model, name)
    greedy = ["--temperature", "0", "--max-new-tokens", "4"]

    def said(*argv: object) -> str:
        capsys.readouterr()
        assert main([*map(str, argv)]) == 0
        return capsys.readouterr().out

    assert said("generate", model, "--prompt", "a fine day", *greedy).startswith("a fine day")
    lines = iter(["hello"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, ""))
    said("chat", model, *greedy)

    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a fine day"}]
    data = tmp_path / "talks.jsonl"
    data.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(12)))
    options = "--seq-len 200 --global-batch-size 1 --start-batch-size 1 --warmup-steps 1 --epochs 1"
    said("sft", "--init", model, "--data", data, "--out", run, "--lr", "1e-3", *options.split())
    said("export", run, out, "--like", model)

    written = json.loads((out / "config.json").read_text())
    assert written == values and list(written) == list(values)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (model / file).read_bytes()
    before, after = load(model), load(out)
    assert after.config == before.config
    assert not torch.equal(after.head.weight, before.head.weight)
    own = said("generate", out, "--prompt", "hello", *greedy)
    plain = tmp_path / "plain"  # without --like: the run has kept the tokenizer's files
    said("export", run, plain)
    assert said("generate", plain, "--prompt", "hello", *greedy) == own
    answer = ask_server(plain, turns[:1])
    assert answer["usage"]["completion_tokens"] >= 1
    assert answer["choices"][0]["message"]["role"] == "assistant"


def ask_server(folder, messages: list[dict]) -> dict:
    """Return the answer of `dsv3 serve` to a conversation."""
    pytest.importorskip("fastapi", reason="pip install 'dsv3-ref[serve]'")
    from dsv3_ref.serving import api_server
    from dsv3_ref.serving.config import ServeConfig
    from dsv3_ref.serving.network import bind_socket
    from dsv3_ref.serving.service import Service

    listener = bind_socket("127.0.0.1", 0)
    with Service(ServeConfig(folder, grace=1, max_new_tokens=4)) as service:
        server = api_server.make_api_server(service, listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        body = {"model": folder.name, "messages": messages, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        finally:
            server.should_exit = True
            thread.join()
