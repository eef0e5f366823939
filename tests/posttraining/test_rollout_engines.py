"""Rollouts by engines over HTTP: `dsv3 serve` as a real server, and what vLLM is asked for."""

import io
import json
import threading
import time
from contextlib import contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import httpx
import miniruns
import pytest
import torch
from served import served

from dsv3_ref.checkpoints.huggingface import save_hf
from dsv3_ref.checkpoints.native import load, save
from dsv3_ref.config import UserError, from_dict
from dsv3_ref.data.tokenizer import save_tokenizer, train_tokenizer
from dsv3_ref.grpo import generate_rollouts
from dsv3_ref.model import Transformer
from dsv3_ref.posttraining import rollout_engines
from dsv3_ref.posttraining.rollout_engines import RolloutEngine, RolloutEngines
from dsv3_ref.serving.config import ServeConfig, validate_serve_config

KEY = "secret"
PROMPTS = [[1, 5, 9, 11], [1, 7], [1, 30, 31, 32, 33, 34, 35, 36, 37, 38]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save(Transformer(from_dict(miniruns.MINI)), out)
    texts = ["we talk and talk again, over and over.\n"] * 50
    save_tokenizer(train_tokenizer(texts, miniruns.MINI["vocab_size"]), out / "tokenizer.json")
    return out


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """Serve the model; weights may be loaded from tmp_path."""
    monkeypatch.setenv("DSV3_API_KEY", KEY)
    with served(folder, reload_root=tmp_path) as (address, service):
        yield address, service


def check_greedy(engines: RolloutEngines, model: Transformer) -> None:
    """Check that engines write the model's most likely tokens, with their log-probabilities."""
    want = generate_rollouts(model, PROMPTS, 2, 8, {2, 40, 41}, 0.0)
    tokens, logps = engines(PROMPTS, 2, 8, {2, 40, 41}, 0.0)
    assert tokens == want[0]
    for got, right in zip(logps, want[1], strict=True):
        assert got == pytest.approx(right, abs=1e-4)


def perturbed(folder: Path) -> Transformer:
    model = load(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def test_engines_write_what_the_model_writes_before_and_after_new_weights(server, folder, tmp_path):
    address, _ = server
    engines = RolloutEngines([address, f"{address}/v1/"])
    check_greedy(engines, load(folder))
    model = perturbed(folder)
    with pytest.raises(AssertionError):
        check_greedy(engines, model)
    save_hf(model, tmp_path / "step")
    assert engines.refresh(tmp_path / "step", 1) == 2
    check_greedy(engines, model)


def test_end_tokens_count_and_a_step_repeats_its_samples(server, folder):
    engines = RolloutEngines([server[0]], seed=3)
    stops = set(range(0, 380, 3))  # about a third of all tokens end a completion
    samples = []
    for step in (1, 1, 2):
        engines.step, engines.num_prompts = step, 0
        samples.append(engines(PROMPTS, 3, 8, stops, 1.0))
    assert samples[0][0] == samples[1][0] != samples[2][0]
    for got, want in zip(samples[1][1], samples[0][1], strict=True):
        assert got == pytest.approx(want, abs=1e-5)  # batches differ, and so do their roundings
    for tokens, logps in zip(*samples[0], strict=True):
        assert len(tokens) == len(logps) and max(logps) <= 0
        assert tokens[-1] in stops or len(tokens) == 8
        assert not stops & set(tokens[:-1])


def reload(address: str, path: Path | str, key: str = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model_path": str(path)}
    return httpx.post(f"{address}/update_weights_from_disk", json=body, headers=headers, timeout=60)


def test_weights_change_only_with_a_key_and_from_the_directory_that_is_open(
    server, folder, tmp_path
):
    address, service = server
    before = {k: x.clone() for k, x in service.engine.runner.model.state_dict().items()}
    save_hf(perturbed(folder), tmp_path / "new")
    (tmp_path / "link").symlink_to(folder)
    assert reload(address, tmp_path / "new", "wrong").status_code == 401
    assert reload(address, folder).status_code == 403
    assert reload(address, tmp_path / "link").status_code == 403
    assert reload(address, tmp_path / "new" / ".." / ".." / "x").status_code == 403
    assert reload(address, tmp_path / "missing").status_code == 400
    (tmp_path / "new" / "model.safetensors").write_bytes(b"cut off")
    assert reload(address, tmp_path / "new").status_code == 400
    after = service.engine.runner.model.state_dict()
    assert all(torch.equal(x, after[k]) for k, x in before.items())


def test_by_default_weights_cannot_be_changed(folder):
    with served(folder, api_key=(KEY,)) as (address, _):
        assert reload(address, folder).status_code == 404


@pytest.mark.parametrize(
    "options, why",
    [
        ({}, "lets clients change the model: set an API key"),
        ({"api_key": (KEY,), "prefill_workers": 1}, "set --prefill-workers 0"),
    ],
)
def test_refusals(options, why, folder, tmp_path):
    with pytest.raises(UserError, match=why):
        validate_serve_config(ServeConfig(folder, reload_root=tmp_path, **options))


# ── Other engines ──


@contextmanager
def recorded(models: dict, completion: dict):
    """Yield the address of an engine that answers with these bodies, and a list of its requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(models)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, body, self.headers.get("Authorization")))
            self.answer(completion if self.path == "/v1/completions" else {})

        def answer(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()


def test_vllm_is_asked_for_its_own_calls(monkeypatch, tmp_path):
    """`collective_rpc` with `reload_weights`, then a new prefix cache; choices in any order."""
    monkeypatch.setenv("DSV3_API_KEY", "k1,k2")
    choice = {"token_ids": [4, 2], "logprobs": {"token_logprobs": [-0.5, -0.25]}}
    choices = [choice | {"index": 1, "token_ids": [5, 2]}, choice | {"index": 0}]
    models = {"data": [{"id": "m", "owned_by": "vllm"}]}
    with recorded(models, {"choices": choices}) as (address, requests):
        engines = RolloutEngines([address])
        engines.refresh(tmp_path, 1)
        got = engines([[1, 3]], 2, 2, {2}, 1.0)
    assert got == ([[4, 2], [5, 2]], [[-0.5, -0.25], [-0.5, -0.25]])
    paths = [path for path, *_ in requests]
    assert paths == ["/collective_rpc", "/reset_prefix_cache", "/v1/completions"]
    assert requests[0][1] == {"method": "reload_weights"}
    asked = requests[2][1]
    assert asked["prompt"] == [1, 3] and asked["n"] == 2 and asked["stop_token_ids"] == [2]
    assert asked["return_token_ids"] and asked["ignore_eos"] and asked["top_p"] == 1
    assert {key for *_, key in requests} == {"Bearer k1"}


def test_an_engine_that_returns_text_only_is_refused():
    choice = {"index": 0, "text": "hello", "logprobs": {"token_logprobs": [-1.0]}}
    models = {"data": [{"id": "m"}]}
    with (
        recorded(models, {"choices": [choice]}) as (address, _),
        pytest.raises(UserError, match="did not return a token id"),
    ):
        RolloutEngines([address])([[1]], 1, 1, {2}, 1.0)


def said(tokens, logps, index=0) -> dict:
    return {"index": index, "token_ids": tokens, "logprobs": {"token_logprobs": logps}}


@pytest.mark.parametrize(
    "choices, sentence",
    [
        ([said([4], [-1.0])], "did not return 2 completions"),
        ([said([4], [-1.0], i) for i in range(3)], "did not return 2 completions"),
        ([said([4], [-1.0])] * 2, "did not return 2 completions"),
        ([said([-4], [-1.0])], "a completion that is none"),
        ([said([4.5], [-1.0])], "a completion that is none"),
        ([said(["4"], [-1.0])], "a completion that is none"),
        ([said([4], [float("nan")])], "a completion that is none"),
        ([said([4], [float("-inf")])], "a completion that is none"),
        ([said([4], [0.5])], "a completion that is none"),
        ([said([4], ["-1"])], "a completion that is none"),
        ([said([4] * 4, [-1.0] * 4)], "a completion that is none: at most 3 token ids"),
        ([{"token_ids": [4]}], "did not answer as OpenAI's API does"),
        (None, "did not answer as OpenAI's API does"),
    ],
)  # fmt: skip
def test_what_no_engine_can_have_sampled_is_refused(choices, sentence):
    """If a completion was missing, all later ones were attributed to the wrong prompts."""
    with (
        recorded({"data": [{"id": "m"}]}, {"choices": choices}) as (address, _),
        pytest.raises(UserError, match=f"--rollout {address}.*{sentence}"),
    ):
        RolloutEngines([address])([[1]], 2, 3, {2}, 1.0)


def test_a_server_without_models_is_refused():
    with (
        recorded({"data": []}, {}) as (address, _),
        pytest.raises(UserError, match="/v1/models did not answer as OpenAI's API does"),
    ):
        RolloutEngines([address]).refresh(Path("."), 1)


def test_an_engine_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"--rollout http://127.0.0.1:9/v1/models failed"):
        RolloutEngines(["http://127.0.0.1:9"]).refresh(Path("."), 1)


def test_a_long_page_of_an_error_is_cut(monkeypatch):
    """A proxy answers with a whole page of HTML."""

    def refuse(request, **_):
        raise HTTPError(request.full_url, 502, "Bad Gateway", Message(), io.BytesIO(b"p" * 1000))

    monkeypatch.setattr(rollout_engines, "open_directly", refuse)
    with pytest.raises(UserError, match=r"/v1/models answered 502 \(p{300}\): see"):
        RolloutEngine("http://engine")


class Hostile(BaseHTTPRequestHandler):
    """A server that redirects, answers without an end, slowly, or too deeply nested."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Authorization"]))
        place = self.path.split("/")[1]
        self.send_response(302 if place == "moved" else 200)
        self.send_header("Location", "/deep/v1/models")
        self.end_headers()
        with suppress(OSError):
            if place == "deep":
                self.wfile.write(b"[" * 200_000)
            while place in ("endless", "slow"):
                self.wfile.write(b" " * (1 if place == "slow" else 1 << 16))
                time.sleep(0.02 if place == "slow" else 0)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    "place, sentence",
    [("moved", "answered 302"), ("deep", "failed"), ("endless", "an answer of more than 1,048,576"),
     ("slow", "bytes or 0 s")],
)  # fmt: skip
def test_a_hostile_engine_takes_neither_memory_nor_time_nor_the_key(place, sentence, monkeypatch):
    monkeypatch.setattr(rollout_engines, "TIMEOUT", 0.4 if place == "slow" else 20)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/{place}"
    with pytest.raises(UserError, match=f"--rollout {url}/v1/models .*{sentence}"):
        RolloutEngine(url, "key")
    server.shutdown()
    server.server_close()
    assert server.asked == [(f"/{place}/v1/models", "Bearer key")]


# ── Without a server ──


class FakeEngine(RolloutEngine):
    """An engine that records its calls; it answers with the bodies that it is given."""

    def __init__(self, name: str, kind: str = "", answer=None):
        self.url, self.kind = name, kind
        self.model = "m"
        self.answer, self.calls = answer, []

    def call(self, path, body=None, max_bytes=0):
        self.calls.append((path, body))
        if self.answer:
            return self.answer(body)
        choices = [self.choice(i, [i, body["prompt"][0]]) for i in range(body["n"])]
        return {"choices": choices[::-1]}

    @staticmethod
    def choice(index: int, tokens: list[int]) -> dict:
        logps = [-float(token) for token in tokens]
        return {"index": index, "token_ids": tokens, "logprobs": {"token_logprobs": logps}}


def fake_engines(n: int, seed: int = 0) -> RolloutEngines:
    engines = RolloutEngines([], seed)
    engines.engines = [FakeEngine(f"engine {i}") for i in range(n)]
    return engines


def test_prompts_are_dealt_out_in_turn_and_come_back_in_order():
    engines = fake_engines(2)
    tokens, logps = engines([[7], [8], [9]], 2, 5, {4, 3}, 0.5)
    assert tokens == [[0, 7], [1, 7], [0, 8], [1, 8], [0, 9], [1, 9]]
    assert logps == [[-float(t) for t in completion] for completion in tokens]
    bodies = [[body for _, body in engine.calls] for engine in engines.engines]
    assert [sorted(b["prompt"][0] for b in own) for own in bodies] == [[7, 9], [8]]
    for body in [*bodies[0], *bodies[1]]:
        limits = body["n"], body["max_tokens"], body["temperature"], body["stop_token_ids"]
        assert limits == (2, 5, 0.5, [3, 4])
        assert body["top_p"] == body["repetition_penalty"] == 1
        assert (body["top_k"], body["min_p"], body["logprobs"]) == (-1, 0, 1)
        assert body["ignore_eos"] is True and body["return_token_ids"] is True


def seeds_of(seed: int, step: int, num_prompts: int) -> list[int]:
    engines = fake_engines(1, seed)
    engines.step = step
    engines([[i] for i in range(num_prompts)], 1, 5, {2}, 1.0)
    found = {body["prompt"][0]: body["seed"] for _, body in engines.engines[0].calls}
    return [found[i] for i in range(num_prompts)]


def test_a_prompt_has_a_seed_of_its_own_in_every_step():
    assert seeds_of(0, 1, 4) == seeds_of(0, 1, 4)
    seeds = {*seeds_of(0, 1, 4), *seeds_of(0, 2, 4), *seeds_of(1, 1, 4)}
    assert len(seeds) == 12 and all(0 <= seed < 1 << 31 for seed in seeds)


def test_new_weights_begin_the_seeds_of_a_step(tmp_path):
    engines = fake_engines(2)
    for engine in engines.engines:
        engine.answer = lambda body: {}
    engines.num_prompts = 5
    assert engines.refresh(tmp_path, 3) == 2 and (engines.step, engines.num_prompts) == (3, 0)
    asked = [("/update_weights_from_disk", {"model_path": str(tmp_path)})]  # as of SGLang
    assert [engine.calls for engine in engines.engines] == [asked, asked]
    engine = FakeEngine("x", "vllm", lambda body: {})
    engine.load_weights(tmp_path)
    assert [path for path, _ in engine.calls] == ["/collective_rpc", "/reset_prefix_cache"]


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": None}, {"token_ids": []}, {"logprobs": None}, {"token_ids": [1]},
        {"logprobs": {"token_logprobs": None}}, {"logprobs": {"token_logprobs": [-1.0, None]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_completion_needs_a_log_probability_for_each_token(changes):
    good, bad = FakeEngine.choice(0, [5, 6]), FakeEngine.choice(1, [5, 6]) | changes
    engine = FakeEngine("here", answer=lambda body: {"choices": [good]})
    assert engine.sample([1], {"n": 1, "max_tokens": 2}) == [([5, 6], [-5.0, -6.0])]
    engine.answer = lambda body: {"choices": [good, bad]}
    with pytest.raises(UserError, match="--rollout here did not return a token id and a log-prob"):
        engine.sample([1], {"n": 2, "max_tokens": 2})
