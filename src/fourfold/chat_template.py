"""Messages to one prompt, by the model's own Jinja template as Hugging Face renders it, in a sandbox."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fourfold.checkpoint.source import optional_json
from fourfold.errors import CheckpointError, UserError
from fourfold.tokenizer import Tokenizer, token_text

Message = Mapping[str, Any]  # "role" and "content"; of an assistant also "tool_calls", of a tool "tool_call_id"
FIELDS = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}  # beside role and content

# Yuan 2.0: turns joined, <sep> behind the last; the published chat models and the training data differ in the joiner.
_YUAN = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ raise_exception('Yuan 2.0 has no system role') }}{% endif %}
    {{- message['content'] + ('' if loop.last else JOINER) }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<sep>' }}{% endif %}"""
SEPARATOR = "<sep>"
BUILT_IN = {"yuan-n": _YUAN.replace("JOINER", "'<n>'"), "yuan-newline": _YUAN.replace("JOINER", r"'\n'")}

LOOP_LIMIT = 100_000  # turns of all loops of one rendering together; a template loops over messages and their parts
SIZE_LIMIT = 10_000_000  # characters of a prompt, or items of a product, far beyond any context


class ChatTemplate:
    """A template and the tokens that it may name. Frozen; a rendering leaves nothing behind."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None, name: str = "the model's chat template"):
        """Raises CheckpointError where the template is not valid Jinja."""
        self._source, self._tokens, self._name = source, dict(tokens or {}), name
        try:
            _sandbox().compile_bounded(source)
        except Exception as error:
            raise CheckpointError(f"{name} is not valid ({_line(error)})") from None

    @classmethod
    def built_in(cls, name: str) -> ChatTemplate:
        """One of `BUILT_IN`. Raises UserError for another name."""
        if name not in BUILT_IN:
            raise UserError(f"there is no chat template {name!r}; fourfold has {', '.join(BUILT_IN)}")
        return cls(BUILT_IN[name], name=f"the chat template {name}")

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a model's directory; for Yuan without one `yuan-n`, else None: it is not guessed."""
        root = Path(path)
        facts = optional_json(root / "tokenizer_config.json")
        file = root / "chat_template.jinja"
        try:
            source = file.read_text(encoding="utf-8") if file.is_file() else _default(facts.get("chat_template"), root)
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(f"{file} cannot be read as UTF-8 text") from None
        if source is not None:
            tokens = {
                name: token_text(facts.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            }
            return cls(source, {name: text for name, text in tokens.items() if text is not None})
        config = optional_json(root / "config.json")
        config = config["model"] if isinstance(config.get("model"), dict) else config
        return cls.built_in("yuan-n") if config.get("model_type") == "yuan" else None

    def check_fits(self, tokenizer: Tokenizer) -> None:
        """Raises UserError where a built-in template separates with a token that the tokenizer does not have."""
        if self._source in BUILT_IN.values() and tokenizer.id_of(SEPARATOR) is None:
            raise UserError(
                f"{self._name} writes {SEPARATOR}, which the model's tokenizer does not know; it is for Yuan alone"
            )

    @property
    def source(self) -> str:
        """The template itself."""
        return self._source

    def names(self, variable: str) -> bool:
        """Whether the template reads a variable, such as `tools`."""
        from jinja2.meta import find_undeclared_variables

        return variable in find_undeclared_variables(_sandbox().parse(self._source))

    def mentions(self, text: str) -> bool:
        """Whether the template has this text in it."""
        return text in self._source

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt, special tokens included: encode it with `add_special_tokens=False`.

        `tools`: descriptions as OpenAI writes them, for a template that names them.

        Raises UserError where the template refuses the messages, or where the sandbox refuses the template.
        """
        from jinja2.exceptions import SecurityError

        check_messages(messages)
        try:
            template = _sandbox().compile_bounded(self._source)
            values = {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
            values |= {"tools": [dict(tool) for tool in tools]} if tools else {}
            pieces = template.generate(self._tokens | values)
            return "".join(_bounded(pieces))
        except _Refused as error:
            raise UserError(f"{self._name} refuses these messages: {_line(error)}") from None
        except SecurityError as error:
            raise UserError(f"{self._name} was stopped because it is not safe to run ({_line(error)})") from None
        except Exception as error:
            raise UserError(
                f"{self._name} does not fit these messages ({_line(error) or type(error).__name__})"
            ) from None


def check_messages(messages: Sequence[Message]) -> None:
    """Raises UserError unless every message is a role and a content, both text."""
    if not messages:
        raise UserError("there are no messages to answer; pass at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"message {i} must have a 'role' and a 'content', both text")
        known = {"role", "content", *FIELDS.get(message["role"], ())}
        if extra := sorted(set(message) - known):
            raise UserError(
                f"message {i} has a field {extra[0]!r}, which is not supported; "
                f"{message['role']!r} has {', '.join(map(repr, sorted(known, reverse=True)))}"
            )


class _Refused(Exception):
    """What a template's `raise_exception` raises."""


def _default(templates: object, root: Path) -> str | None:
    """The template to chat with, among those of `chat_template`: text, or a list of names and texts."""
    if templates is None or isinstance(templates, str):
        return templates
    try:
        named = {str(entry["name"]): str(entry["template"]) for entry in templates}  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        raise CheckpointError(f"{root / 'tokenizer_config.json'} has a chat_template that is not text") from None
    if "default" not in named:
        raise CheckpointError(
            f"the model has no default chat template, only {', '.join(sorted(named)) or 'an empty list'}"
        )
    return named["default"]


def _bounded(pieces: Iterable[str]) -> Iterator[str]:
    """The same pieces, until they are too many."""
    from jinja2.exceptions import SecurityError

    total = 0
    for piece in pieces:
        total += len(piece)
        if total > SIZE_LIMIT:
            raise SecurityError(f"it writes more than {SIZE_LIMIT} characters")
        yield piece


def _sandbox() -> Any:
    """A fresh environment for one rendering: Hugging Face's settings, and bounds on what a template can do."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the model's own words, for training; here its body is all there is to it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def check_numbers(*values: Any, **named: Any) -> None:
        """A number may be a width, to which a text is filled up before anyone can see its size."""
        for value in (*values, *named.values()):
            if isinstance(value, int) and abs(value) > SIZE_LIMIT:
                raise SecurityError(f"the number {value} is too large")

    def check_form(form: Any) -> None:
        """The same for the widths inside what `%` and `format` fill in."""
        if isinstance(form, str) and re.search(r"\d{8}|%[^a-zA-Z%]*\*|\{[^{}]*\{[^{]", form.replace("{{", "")):
            raise SecurityError("a format with a width that is too large or not fixed")

    # Length of what a text grows to: `text.replace(old, new)`, `text.join(parts)`, `text.expandtabs(width)`.
    grown: dict[str, Callable[..., int]] = {
        "replace": lambda text, old, new, *_: text.count(old) * len(new),
        "join": lambda text, parts: len(text) * (len(parts) if hasattr(parts, "__len__") else LOOP_LIMIT),
        "expandtabs": lambda text, width=8: text.count("\t") * width,
    }

    def check_growth(method: str, text: Any, args: tuple[Any, ...]) -> None:
        if isinstance(text, str) and grown[method](text, *args) > SIZE_LIMIT:
            raise SecurityError(f"the result of {method} would be too large")

    def bounded_filter(name: str, function: Any) -> Any:
        @functools.wraps(function)  # with the mark of what Jinja is to pass as the first argument
        def bounded(*args: Any, **kwargs: Any) -> Any:
            check_numbers(*args[1:], **kwargs)
            if name == "format":
                check_form(args[0])
            if name == "replace":  # behind Jinja's own argument
                check_growth(name, args[1], args[2:])
            if name == "join":
                check_growth(name, args[2] if len(args) > 2 else kwargs.get("d"), args[1:2])
            return function(*args, **kwargs)

        return bounded

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        turns = 0

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            check_numbers(*args, **kwargs)
            if (method := getattr(function, "__name__", "")) in grown:
                check_growth(method, getattr(function, "__self__", None), args)
            return super().call(context, function, *args, **kwargs)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                check_form(value.__self__)
            return wrapped

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%":
                check_form(left)
                return super().call_binop(context, operator, left, right)
            sizes = [len(side) if hasattr(side, "__len__") else int(abs(side)) for side in (left, right)]
            size = sum(sizes) if operator == "+" else sizes[0] * sizes[1]
            if operator == "**" or (size > SIZE_LIMIT and any(hasattr(side, "__len__") for side in (left, right))):
                raise SecurityError(f"the result of {operator} would be too large")
            return super().call_binop(context, operator, left, right)

        def check_size(self, value: Any) -> Any:
            if hasattr(value, "__len__") and len(value) > SIZE_LIMIT:
                raise SecurityError(f"a value of more than {SIZE_LIMIT} items")
            return value

        def count_turns(self, items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                self.turns += 1
                if self.turns > LOOP_LIMIT:
                    raise SecurityError(f"it loops more than {LOOP_LIMIT} times")
                yield item

        def compile_bounded(self, source: str) -> Any:
            def bounded(node: Any, check: str) -> nodes.Expr:
                return nodes.Filter(node, check, [], [], None, None, lineno=node.lineno)

            tree = self.parse(source)
            for loop in tree.find_all(nodes.For):
                loop.iter = bounded(loop.iter, "count_turns")
            for assignment in tree.find_all(nodes.Assign):
                assignment.node = bounded(assignment.node, "check_size")
            for join in tree.find_all(nodes.Concat):
                join.nodes = [bounded(node, "check_size") for node in join.nodes]
            return self.from_string(tree)

    def raise_exception(message: object) -> None:
        raise _Refused(str(message))

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters = {
        name: bounded_filter(name, function) for name, function in (sandbox.filters | {"tojson": tojson}).items()
    }
    sandbox.filters |= {"count_turns": sandbox.count_turns, "check_size": sandbox.check_size}
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return sandbox


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
