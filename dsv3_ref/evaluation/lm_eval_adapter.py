"""An adapter to EleutherAI's lm-eval, and tasks that need no network.

pip install 'dsv3-ref[eval]'
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from tqdm import tqdm

from dsv3_ref.config import UserError
from dsv3_ref.data.sources import open_sources
from dsv3_ref.decode import SamplingParams, stream
from dsv3_ref.posttraining.policy import Policy, truncate_prompts
from dsv3_ref.posttraining.prompts import TASKS
from dsv3_ref.serving.detokenizer import StreamDetokenizer
from dsv3_ref.serving.thoughts import ThoughtParser

MAX_GEN_TOKS = 256  # new tokens where a task sets no limit, as in lm-eval

# (texts, context, continuation), as lm-eval passes them to `_loglikelihood_tokens`
TokenRequest = tuple[object, list[int], list[int]]


class DSV3LM(TemplateLM):
    """A model behind lm-eval's interface; texts start with the begin-of-sentence token."""

    def __init__(
        self, policy: Policy, batch_size: int = 16, max_new_tokens: int | None = None,
        truncate: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.policy = policy
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens  # in place of the limit of the tasks
        self.truncate = truncate
        self.num_truncated = 0  # contexts
        self.max_length = policy.model.config.max_seq_len
        self._device = policy.model.head.weight.device

    @property
    def eot_token_id(self) -> int:
        """The id of the end token."""
        return self.policy.special_tokens.eos

    @property
    def prefix_token_id(self) -> int:
        """The id of the begin token."""
        return self.policy.special_tokens.bos

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches results."""
        return "dsv3_ref"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Encode a text; the begin token comes first if the tokenizer adds it, or as asked for."""
        ids = self.policy.chat.encode(string)
        adds_bos = self.policy.chat.adds_bos if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *ids] if adds_bos else ids

    def encode_context(self, context: str) -> list[int]:
        """Encode a context; a conversation keeps its special tokens."""
        if isinstance(context, ChatContext):
            return self.policy.chat.render_prompt(context.messages)
        return self.policy.chat.encode_prompt(context)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a context and its continuation."""
        if isinstance(context, ChatContext):
            return self.encode_context(context), self.tok_encode(continuation, False)
        return super()._encode_pair(context, continuation)

    @torch.no_grad()
    def score_rows(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether every token of it is the most likely."""
        tokens = [(context + new)[-(self.max_length + 1) :] for context, new in rows]
        x_bs = torch.zeros(len(rows), max(map(len, tokens)) - 1, dtype=torch.int64)
        for x_s, row in zip(x_bs, tokens):
            x_s[: len(row) - 1] = torch.tensor(row[:-1])
        h_bsd, _ = self.policy.model.hidden_states(x_bs.to(self._device))
        scores = []
        for h_sd, row, (_, new) in zip(h_bsd, tokens, rows):
            end = len(row) - 1
            start = end - min(len(new), end)
            y_n = torch.tensor(row[1:], device=self._device)[start:]
            logp_nw = self.policy.model.head(h_sd[start:end]).log_softmax(-1)
            is_greedy = bool((logp_nw.argmax(-1) == y_n).all())
            scores.append((logp_nw.gather(1, y_n[:, None]).sum().item(), is_greedy))
        return scores

    def fit_rows(
        self, rows: list[tuple[list[int], list[int]]]
    ) -> list[tuple[list[int], list[int]]]:
        """Return rows whose contexts are cut to what fits before their continuations.

        Raises a `UserError` if any is too long and `truncate` is False, or a continuation is.
        """
        limit = self.max_length + 1  # the last token is only predicted
        long = [len(context) + len(new) for context, new in rows if len(context + new) > limit]
        if long and (not self.truncate or any(len(new) >= limit for _, new in rows)):
            raise UserError(
                f"{len(long)} of {len(rows)} texts have up to {max(long)} tokens, more than the "
                f"{self.max_length} of the model's context: lower --num-fewshot, or pass "
                "--truncate to cut the beginnings of contexts"
            )
        self.num_truncated += len(long)
        return [(context[max(0, len(context + new) - limit) :], new) for context, new in rows]

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """Score requests, those of similar length together; return scores in their order."""
        rows = self.fit_rows([(context, new) for _, context, new in requests])
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0] + rows[i][1]))
        scores = [(0.0, False)] * len(rows)
        n = self.batch_size
        for start in tqdm(range(0, len(order), n), "log-likelihoods", disable=disable_tqdm):
            batch = order[start : start + n]
            for i, score in zip(batch, self.score_rows([rows[i] for i in batch])):
                scores[i] = score
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of whole texts, read in windows of the model's context length."""
        sums = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], False)
            rows: list[TokenRequest] = []
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                context, new = make_disjoint_window(window)
                rows.append((None, context, new))
            sums.append(sum(logp for logp, _ in self._loglikelihood_tokens(rows, disable_tqdm)))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy or sampled continuations up to a stop text or the end token."""
        by_options: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_options[json.dumps(request.args[1], sort_keys=True)].append(i)
        answers = [""] * len(requests)
        progress = tqdm(total=len(requests), desc="answers", disable=disable_tqdm)
        for indices in by_options.values():
            options = requests[indices[0]].args[1]
            max_new_tokens = self.max_new_tokens or options.get("max_gen_toks", MAX_GEN_TOKS)
            is_conversation = isinstance(requests[indices[0]].args[0], ChatContext)
            contexts = [self.encode_context(requests[i].args[0]) for i in indices]
            name = getattr(requests[indices[0]], "task_name", None) or "lm-eval"
            prompts, num_truncated = truncate_prompts(
                self.policy.model, contexts, max_new_tokens, name, self.truncate
            )
            self.num_truncated += num_truncated
            pairs = sorted(zip(indices, prompts), key=lambda pair: -len(pair[1]))
            for start in range(0, len(pairs), self.batch_size):
                batch = pairs[start : start + self.batch_size]
                texts = self.generate_batch(
                    [x for _, x in batch], options, max_new_tokens, is_conversation
                )
                for (i, _), text in zip(batch, texts):
                    answers[i] = text
                progress.update(len(batch))
        progress.close()
        return answers

    def generate_batch(
        self, prompts: list[list[int]], options: dict, max_new_tokens: int,
        is_conversation: bool = False,
    ) -> list[str]:  # fmt: skip
        """Continue prompts with lm-eval's generation arguments, all in one batch."""
        chat = self.policy.chat
        until, ends = options.get("until") or [], chat.stop_token_ids
        stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        openings = [chat.opened_thought(x) if is_conversation else None for x in prompts]
        texts = [AnswerReader(self.policy.tokenizer, stops, opening) for opening in openings]
        is_sampled = options.get("do_sample", False) or options.get("temperature", 0) > 0
        temperature = options.get("temperature", 1.0) if is_sampled else 0.0
        params = SamplingParams(temperature, options.get("top_p", 1.0))
        answers = [""] * len(prompts)
        steps = stream(self.policy.model, prompts, max_new_tokens, params, ends)
        new_tokens = next(steps, None)
        while new_tokens is not None:
            for i, new in enumerate(new_tokens):
                answers[i] += texts[i].push([token for token in new if token not in ends])
            try:
                new_tokens = steps.send([not text.ended for text in texts])
            except StopIteration:
                break
        return [answer + text.flush() for answer, text in zip(answers, texts)]

    def apply_chat_template(
        self, chat_history: list[dict], add_generation_prompt: bool = True
    ) -> "ChatContext":
        """Return a conversation; its special tokens are added when it is encoded."""
        return ChatContext(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the name of the conversation format."""
        return "DeepSeek-V3"


class AnswerReader:
    """The text of an answer up to a stop text.

    opening: the <think> with which the prompt of a conversation ends, if it does. The thoughts of
    such an answer are not returned, and no stop text ends them. None: the prompt is a text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], opening: str | None):
        self.decoder = StreamDetokenizer(tokenizer)
        self.thoughts = None if opening is None else ThoughtParser(opening)
        self.answer = StreamDetokenizer(tokenizer, stops)

    @property
    def ended(self) -> bool:
        """True if a stop text was found."""
        return self.answer.ended

    def push(self, tokens: list[int]) -> str:
        """Append tokens and return the text that is now certain."""
        return self.read(self.decoder.push(tokens))

    def flush(self) -> str:
        """Return the withheld text; call it when no more tokens will come."""
        return self.read(self.decoder.flush(), is_last=True) + self.answer.flush()

    def read(self, text: str, is_last: bool = False) -> str:
        """Return what follows the thoughts and is certain, with more text."""
        if self.thoughts is not None:
            _, text = self.thoughts.push(text, is_last)
        return self.answer.emit(text)


class ChatContext(str):
    """Messages that lm-eval passes on as a text."""

    messages: list[dict]

    def __new__(cls, messages: list[dict]) -> "ChatContext":
        context = super().__new__(cls, "\n".join(turn["content"] for turn in messages))
        context.messages = messages
        return context


# ── Tasks that need no network ──


def speeches_dataset(**_: object) -> dict[str, Dataset]:
    """Return the State of the Union addresses that training holds out."""
    (source,) = open_sources(["sotu"], 0, False)
    return {"test": Dataset.from_list([{"text": text} for text in source.val_texts])}


def problems_dataset(name: str) -> dict[str, Dataset]:
    """Return held-out problems of a built-in task."""
    rows = [
        {"question": problem.question, "answer": problem.answer, "i": i}
        for i, problem in enumerate(TASKS[name].problems[1])
    ]
    return {"test": Dataset.from_list(rows)}


def grader(name: str) -> Callable[[dict, list[str]], dict[str, float]]:
    """Return the function that lm-eval calls with a problem and its answers."""

    def grade(doc: dict, results: list[str]) -> dict[str, float]:
        problem = TASKS[name].problems[1][doc["i"]]
        return {"right": TASKS[name].score(results[0], problem)}

    return grade


def task_config(name: str) -> dict | str:
    """Return the config of a task defined here (`speeches`, `lm-sums`); other names unchanged."""
    prompt_task = name.removeprefix("lm-")
    if name == "speeches":
        return {
            "task": name, "custom_dataset": speeches_dataset, "test_split": "test",
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        }  # fmt: skip
    is_builtin = prompt_task in TASKS and not TASKS[prompt_task].is_open_ended
    if prompt_task == name or not is_builtin:
        return name
    return {
        "task": name, "test_split": "test",
        "custom_dataset": lambda **_: problems_dataset(prompt_task),
        "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "process_results": grader(prompt_task),
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 48, "do_sample": False},
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
