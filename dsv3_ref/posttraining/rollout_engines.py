"""Rollouts by separate OpenAI-compatible engines: vLLM, SGLang or `dsv3 serve`, over HTTP.

After each update the trainer writes its weights into a directory that the engines can read, and
each engine loads them into its running model. Prompts and completions travel as token ids.
"""

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from http.client import HTTPException, HTTPResponse
from itertools import cycle
from pathlib import Path
from typing import Any

from dsv3_ref.config import UserError

REQUESTS_PER_ENGINE = 64  # at a time; an engine batches them
MIN_LOGP, MAX_LOGP = -1e6, 1e-3  # of a token; NaN and the infinities are none
TIMEOUT = 3600.0  # seconds that an engine may take to sample a group or to load weights
MAX_ANSWER_BYTES = 1 << 20  # without completions
MAX_SAMPLED_TOKEN_BYTES = 1 << 10  # of JSON for a token, its log-probability and one alternative


class SameAddress(urllib.request.HTTPRedirectHandler):
    """Refusal of redirects, which could take the key and the weights' place to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request: the answer remains an error."""


open_directly = urllib.request.build_opener(SameAddress).open


def read_answer(response: HTTPResponse, max_bytes: int) -> bytes:
    """Return the body of an answer; raise an `OSError` if it is too long or takes too long."""
    body, end = bytearray(), time.monotonic() + TIMEOUT
    while part := response.read1(1 << 20):
        body += part
        if len(body) > max_bytes or time.monotonic() > end:
            raise OSError(f"an answer of more than {max_bytes:,} bytes or {TIMEOUT:.0f} s")
    return bytes(body)


class RolloutEngine:
    """One engine, by the URL before /v1; its calls raise a `UserError` that names it."""

    def __init__(self, url: str, api_key: str = ""):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        with self.expect_protocol("/v1/models"):
            model = self.call("/v1/models")["data"][0]
            self.model, self.kind = model["id"], model.get("owned_by", "")

    @contextmanager
    def expect_protocol(self, path: str) -> Iterator[None]:
        """Raise a `UserError` in the place of what the code inside raises for other JSON."""
        try:
            yield
        except (LookupError, TypeError, AttributeError) as e:
            raise UserError(
                f"--rollout {self.url}{path} did not answer as OpenAI's API does ({e!r}): is it an "
                "engine?"
            ) from None

    def call(
        self, path: str, body: dict[str, Any] | None = None, max_bytes: int = MAX_ANSWER_BYTES
    ) -> dict[str, Any]:
        """Return the JSON that the engine answers to a POST of `body`, or to a GET without one.

        Raises a `UserError` for a longer answer, and for a redirect.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            with open_directly(request, timeout=TIMEOUT) as response:
                return json.loads(read_answer(response, max_bytes) or b"{}")
        except urllib.error.HTTPError as e:
            with e:
                text = e.read(300).decode(errors="replace")
            raise UserError(
                f"--rollout {self.url}{path} answered {e.code} ({text}): see the engine's log"
            ) from None
        except (OSError, ValueError, RecursionError, HTTPException) as e:
            raise UserError(f"--rollout {self.url}{path} failed ({e}): is it running?") from None

    def load_weights(self, folder: Path) -> None:
        """Load the weights of a directory into the running model, and drop its prefix cache."""
        if self.kind == "vllm":  # with VLLM_SERVER_DEV_MODE=1, from the directory that it serves
            self.call("/collective_rpc", {"method": "reload_weights"})
            self.call("/reset_prefix_cache", {})
        else:  # of SGLang, and of `dsv3 serve --reload-root`
            self.call("/update_weights_from_disk", {"model_path": str(folder)})

    def sample(self, prompt: list[int], params: dict[str, Any]) -> list[tuple[list[int], list]]:
        """Return (tokens, log π) of the n completions of a prompt.

        Raises a `UserError` for what an engine cannot have sampled.
        """
        path, n = "/v1/completions", params["n"]
        body = {"model": self.model, "prompt": prompt, **params}
        num_tokens = len(prompt) + n * params["max_tokens"]
        max_bytes = MAX_ANSWER_BYTES + num_tokens * MAX_SAMPLED_TOKEN_BYTES
        with self.expect_protocol(path):
            choices = self.call(path, body, max_bytes)["choices"]
            completions = {choice["index"]: self.read_choice(choice, params) for choice in choices}
        if len(choices) != n or set(completions) != {*range(n)}:
            raise UserError(f"--rollout {self.url} did not return {n} completions of a prompt")
        return [completions[i] for i in range(n)]

    def read_choice(self, choice: dict[str, Any], params: dict[str, Any]) -> tuple[list[int], list]:
        """Return (tokens, log π) of a completion; raise a `UserError` if it is not valid."""
        tokens = choice.get("token_ids")
        logps = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if not tokens or len(tokens) != len(logps) or None in logps:
            raise UserError(
                f"--rollout {self.url} did not return a token id and a log-probability for "
                "each token: it must support return_token_ids and logprobs"
            )
        are_ids = all(type(token) is int and token >= 0 for token in tokens)
        are_logps = all(type(x) in (int, float) and MIN_LOGP <= x <= MAX_LOGP for x in logps)
        if not are_ids or not are_logps or len(tokens) > params["max_tokens"]:
            raise UserError(
                f"--rollout {self.url} returned a completion that is none: at most "
                f"{params['max_tokens']} token ids, each with a log-probability"
            )
        return tokens, logps


class RolloutEngines:
    """Engines with equal weights, called like `generate_rollouts` of chapter 16.

    seed: of all completions; they also depend on the step and on the number of the prompt.
    """

    def __init__(self, urls: Collection[str], seed: int = 0):
        self.urls, self.seed = urls, seed
        self.step = self.num_prompts = 0

    @cached_property
    def engines(self) -> list[RolloutEngine]:
        """The engines, connected at their first use: not all ranks sample."""
        api_key = os.environ.get("DSV3_API_KEY", "").split(",")[0].strip()  # as of `dsv3 serve`
        return [RolloutEngine(url, api_key) for url in self.urls]

    def refresh(self, folder: Path, step: int) -> int:
        """Load the weights that a step begins with into all engines; return their number."""
        self.step, self.num_prompts = step, 0
        with ThreadPoolExecutor(len(self.engines)) as pool:
            return len(list(pool.map(lambda engine: engine.load_weights(folder), self.engines)))

    def __call__(
        self, prompts: list[list[int]], num_generations: int, max_new_tokens: int,
        stop_token_ids: Collection[int], temperature: float,
    ) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
        """Sample `num_generations` consecutive completions of each prompt, and the engines' log π.

        Prompts are dealt out to the engines in turn.
        """
        params = {
            "n": num_generations, "max_tokens": max_new_tokens, "temperature": temperature,
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
            "stop_token_ids": sorted(stop_token_ids), "ignore_eos": True, "logprobs": 1,
            "return_token_ids": True,
        }  # fmt: skip
        seeds = [self.next_seed() for _ in prompts]

        def sample(engine: RolloutEngine, prompt: list[int], seed: int) -> list:
            return engine.sample(prompt, params | {"seed": seed})

        tokens: list[list[int]] = []
        logprobs: list[list[float]] = []
        with ThreadPoolExecutor(REQUESTS_PER_ENGINE * len(self.engines)) as pool:
            for group in pool.map(sample, cycle(self.engines), prompts, seeds):
                tokens += [completion for completion, _ in group]
                logprobs += [logps for _, logps in group]
        return tokens, logprobs

    def next_seed(self) -> int:
        """Return the seed of the next prompt's completions."""
        self.num_prompts += 1
        return random.Random(f"{self.seed} {self.step} {self.num_prompts}").getrandbits(31)
