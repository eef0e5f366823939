"""Chat templates in Jinja, rendered in a sandbox with the functions that transformers offers.

A template comes with a model and may loop without end or ask for any memory, even while it is
compiled. So it is compiled and rendered as `python -m dsv3_ref.data.jinja_template`, in a process
with limits: a line of JSON in, a line out. It also tells this process what the template reads.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_ref.config import UserError
from dsv3_ref.data.messages import CallArguments
from dsv3_ref.data.worker_process import WorkerProcess, answer_lines

RENDER_SECONDS = 10.0  # of a rendering, which takes milliseconds
RENDER_MEMORY = 1 << 30  # of address space
SMALL_QUESTION = 1 << 18  # characters of JSON that never wait for more of them
MAX_CHARACTERS = 1 << 26  # of a rendered conversation
MAX_MESSAGE = 1000  # characters of an error
GENERATION_MARKS = "dsv3_generation_marks"  # the variable with the marks of {% generation %}


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`, the text that a model writes.

    The block is rendered between the two characters of the variable GENERATION_MARKS, if it is set.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block as a call of `mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, context: Context, caller: Callable[[], str]) -> str:
        """Return the text of a block between its marks."""
        start, end = context.get(GENERATION_MARKS) or ("", "")
        return f"{start}{caller()}{end}"


def raise_exception(message: str) -> NoReturn:
    """Refuse a conversation; templates call it."""
    raise jinja2.TemplateError(message)


def to_json(
    value: object, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """Return a value as JSON; unlike Jinja's own filter, without HTML escapes."""
    if isinstance(value, CallArguments) and not (ensure_ascii or indent or separators or sort_keys):
        return value.text
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(form: str) -> str:
    """Return today's date in a form of `strftime`."""
    return datetime.now().strftime(form)


@cache
def template_environment() -> ImmutableSandboxedEnvironment:
    """Return the environment in which templates are compiled, as transformers sets it up."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class JinjaTemplate:
    """A compiled chat template."""

    def __init__(self, text: str, source: str):
        self.text = text
        self.source = source
        answer = self.ask({"text": text})
        if "names" not in answer:
            reason = next(iter(answer.values()))
            raise UserError(f"the chat template of {source} is not valid Jinja: {reason}")
        self.names, self.literals = frozenset(answer["names"]), frozenset(answer["literals"])
        self.has_generation_blocks: bool = answer["has_generation_blocks"]

    def mentions(self, name: str) -> bool:
        """Return whether the template reads a field or a variable of this name."""
        return name in self.names or name in self.literals

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """Return the text of a conversation; raise a `UserError` if the template refuses it.

        Raises jinja2's `UndefinedError` if it reads what the conversation does not have.
        """
        arguments = [[call_text(call) for call in find_calls(turn)] for turn in messages]
        question = {"messages": messages, "arguments": arguments, "variables": variables}
        answer = self.ask({"text": self.text, **question})
        if "undefined" in answer:
            raise jinja2.UndefinedError(answer["undefined"])
        for verb in ("refuses", "fails on"):
            if verb in answer:
                raise UserError(
                    f"the chat template of {self.source} {verb} this conversation: {answer[verb]}"
                )
        return answer["text"]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer of the process that renders; raise a `UserError` if it has none."""
        line = json.dumps(question, default=str)
        renderer = shared_renderer(len(line) > SMALL_QUESTION)
        with renderer.lock:
            renderer.ensure_started()
            try:
                return json.loads(renderer.ask(line, RENDER_SECONDS))
            except TimeoutError:
                raise UserError(
                    f"the chat template of {self.source} takes more than {RENDER_SECONDS:.0f} s or "
                    f"{RENDER_MEMORY >> 20} MiB: use another template"
                ) from None


def find_calls(turn: dict[str, Any]) -> list[Any]:
    """Return the calls of tools of a message."""
    calls = turn.get("tool_calls")
    return calls if isinstance(calls, list) else []


def call_text(call: Any) -> str | None:
    """Return the text of the `CallArguments` of a call, which JSON cannot express; or None."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    return arguments.text if isinstance(arguments, CallArguments) else None


@cache
def shared_renderer(for_large: bool) -> WorkerProcess:
    """Return the process that renders the templates of this one, another for large questions.

    A template may take a time quadratic in the conversation: V3's does, in the system texts.
    """
    name = "dsv3_ref.data.jinja_template"
    return WorkerProcess(
        name, f"python -m {name}, which renders chat templates, does not start: reinstall jinja2"
    )


# ── In the process ──


def describe_template(text: str) -> dict[str, Any]:
    """Return a template's names of variables and attributes, its string constants, and more.

    has_generation_blocks: whether it marks the text that a model writes.
    """
    tree = template_environment().parse(text)
    names = {node.name for node in tree.find_all(nodes.Name)}
    names |= {node.attr for node in tree.find_all(nodes.Getattr)}
    constants = (node.value for node in tree.find_all(nodes.Const))
    literals = {value for value in constants if isinstance(value, str)}
    identifiers = (node.identifier for node in tree.find_all(nodes.ExtensionAttribute))
    has_generation_blocks = any(name.endswith("GenerationBlock") for name in identifiers)
    return {
        "names": sorted(names), "literals": sorted(literals),
        "has_generation_blocks": has_generation_blocks,
    }  # fmt: skip


@lru_cache(64)
def compile_template(text: str) -> jinja2.Template:
    """Return a compiled template."""
    return template_environment().from_string(text)


def render_line(line: str) -> str:
    """Return the rendered text, or an error and its kind, for a line with a template.

    Without messages, the template is compiled, and the answer is what `describe_template` returns.
    """
    question = json.loads(line)
    try:
        template = compile_template(question["text"])
        if "messages" not in question:
            return json.dumps(describe_template(question["text"]))
        messages, variables = question["messages"], question["variables"]
        restore_arguments(messages, question["arguments"])
        text = template.render(messages=messages, documents=None, **variables)
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"it writes more than {MAX_CHARACTERS:,} characters")
        answer = {"text": text}
    except jinja2.UndefinedError as e:
        answer = {"undefined": error_text(e)}
    except jinja2.TemplateError as e:
        answer = {"refuses": error_text(e)}
    except Exception as e:  # the template's own code may raise anything
        answer = {"fails on": error_text(e)}
    return json.dumps(answer)


def restore_arguments(messages: list[dict[str, Any]], texts: list[list[str | None]]) -> None:
    """Replace the arguments of calls that have a text by `CallArguments`."""
    for turn, turn_texts in zip(messages, texts):
        for call, text in zip(find_calls(turn), turn_texts):
            if text is not None:
                function = call["function"]
                function["arguments"] = CallArguments(function["arguments"], text)


def error_text(error: Exception) -> str:
    """Return the message of an error, or the name of its class if it has none."""
    return str(error)[:MAX_MESSAGE] or type(error).__name__


if __name__ == "__main__":
    answer_lines(render_line, RENDER_MEMORY)
