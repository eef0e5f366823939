"""Chat templates in Jinja, rendered in a sandbox with the functions that transformers offers."""

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_ref.config import UserError
from dsv3_ref.data.messages import CallArguments

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
        environment = template_environment()
        try:
            tree = environment.parse(text)
            self.template = environment.from_string(text)
        except jinja2.TemplateError as e:
            raise UserError(f"the chat template of {source} is not valid Jinja: {e}") from None
        self.names, self.literals = names_in(tree), literals_in(tree)
        self.has_generation_blocks = "{%" in text and any(
            node.identifier.endswith("GenerationBlock")
            for node in tree.find_all(nodes.ExtensionAttribute)
        )

    def mentions(self, name: str) -> bool:
        """Return whether the template reads a field or a variable of this name."""
        return name in self.names or name in self.literals

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """Return the text of a conversation; raise a `UserError` if the template refuses it."""
        try:
            return self.template.render(messages=messages, documents=None, **variables)
        except jinja2.UndefinedError:
            raise
        except jinja2.TemplateError as e:
            raise UserError(
                f"the chat template of {self.source} refuses this conversation: {e}"
            ) from None
        except Exception as e:  # the template's own code may raise anything
            raise UserError(
                f"the chat template of {self.source} fails on this conversation: {e}"
            ) from None


def names_in(tree: nodes.Template) -> frozenset[str]:
    """Return the names of the variables and attributes of a template."""
    attributes = (node.attr for node in tree.find_all(nodes.Getattr))
    return frozenset({node.name for node in tree.find_all(nodes.Name)} | set(attributes))


def literals_in(tree: nodes.Template) -> frozenset[str]:
    """Return the string constants of a template."""
    constants = (node.value for node in tree.find_all(nodes.Const))
    return frozenset(value for value in constants if isinstance(value, str))
