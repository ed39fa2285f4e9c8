"""Where a model's chat template runs: Jinja as Hugging Face sets it up, without a way out and within bounds.

A template is a program that comes with a checkpoint, so nothing is believed of it. It reaches nothing but its values
(Jinja's own sandbox), and it ends soon and in little memory: its loops and calls are counted, every value that it makes
is weighed as it would be written out, and what it reads and makes adds up to WORK_LIMIT at most.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from typing import Any

LOOP_LIMIT = 100_000  # turns of all loops of one rendering, and its calls: it loops over messages and their parts
SIZE_LIMIT = 10_000_000  # characters of a prompt, or of a value written out, far beyond any context
WORK_LIMIT = 1_000_000_000  # what it reads and makes: a second or two, where a character that is read counts as 1
MADE, ITEM, WEIGHED = 3, 8, 64  # a character that is made, an item that is read, an item that is weighed
MOST_BITS = 4096  # of a number
MOST_INDENT, MOST_INDENTED = 16, 100_000  # of `tojson`: spaces a level, and what may be written so

# Nothing that a prompt needs, and each a way to much time or memory.
_WITHOUT = {"batch", "filesizeformat", "pprint", "random", "slice", "striptags", "urlencode", "urlize", "wordwrap"}
_WITHOUT |= {"forceescape", "xmlattr"}
_WRITERS = {"capitalize", "center", "e", "escape", "format", "indent", "join", "lower", "replace", "string", "title"}
_WRITERS |= {"tojson", "trim", "truncate", "upper", "wordcount"}  # which make a text of whatever they are given
_GLANCES = {"count", "d", "default", "first", "last", "length"}  # which look at nothing inside of it
_COMPARISONS = {
    "eq",
    "==",
    "equalto",
    "ne",
    "!=",
    "lt",
    "<",
    "lessthan",
    "le",
    "<=",
    "gt",
    ">",
    "greaterthan",
    "ge",
    ">=",
}
_COMPARISONS |= {"in", "lower", "upper"}  # the tests that look at all of a value


class Refused(Exception):
    """What a template's `raise_exception` raises."""


def render_bounded(source: str, values: Mapping[str, Any]) -> str:
    """A template's text.

    Raises Refused where it refuses the values, jinja2's SecurityError where it does what it may not, or too much.
    """
    from jinja2.exceptions import SecurityError

    sandbox = make_sandbox()
    pieces, total = [], 0
    for piece in sandbox.compile_bounded(source).generate(values):
        total += len(piece)
        if total > SIZE_LIMIT:
            raise SecurityError(f"it writes more than {SIZE_LIMIT} characters")
        pieces.append(piece)
    return "".join(pieces)


class _Scales:
    """What one rendering has done so far."""

    def __init__(self) -> None:
        from jinja2.exceptions import SecurityError
        from jinja2.utils import Namespace

        self._too_much, self._namespace = SecurityError, Namespace
        self._turns = self._work = 0
        # Weights and counts of items by id; the values are kept, so that ids stay theirs.
        self._known: dict[int, tuple[object, int, int]] = {}

    def turn(self) -> None:
        """One turn of a loop, or one call."""
        self._turns += 1
        if self._turns > LOOP_LIMIT:
            raise self._too_much(f"it loops or calls more than {LOOP_LIMIT} times")

    def read(self, value: Any) -> Any:
        """A value that is looked at whole: compared or searched."""
        weight, items = self._measure(value)
        self._add(weight if isinstance(value, str) else ITEM * items + weight // 16)
        return value

    def written(self, value: Any) -> Any:
        """A value that is made a text of."""
        weight, items = self._measure(value)
        self._add(weight + ITEM * items)
        return value

    def made(self, value: Any) -> Any:
        """A value that the template has made."""
        weight = self.weigh(value)
        if isinstance(value, str):
            self._add(MADE * weight)
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise self._too_much("a number of more than a thousand digits")
        return value

    def joined(self, value: Any, first: object, second: object) -> Any:
        """The sum of two lists: its weight is known without a look at all of its items."""
        (weight, items), (more, more_items) = self._measure(first), self._measure(second)
        self._check(weight + more)
        self._add(ITEM * len(value))
        self._known[id(value)] = value, weight + more, items + more_items
        return value

    def turns(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items, counted."""
        for item in items:
            self.turn()
            yield item

    def weigh(self, value: object) -> int:
        """Characters and items that it has when it is written out: what stands there twice counts twice."""
        return self._measure(value)[0]

    def _measure(self, value: object) -> tuple[int, int]:
        """Its weight, and how many items it has, and they have."""
        if isinstance(value, str | bytes):
            if len(value) > SIZE_LIMIT:
                raise self._too_much(f"a text of more than {SIZE_LIMIT} characters")
            return len(value), 0
        known = self._known.get(id(value))
        if known is not None and known[0] is value:
            return known[1:]
        parts = _parts(value)
        if parts is None:
            return 1, 0
        self._add(WEIGHED * len(parts))
        weight, items = 0, len(parts)
        for part in parts:
            if type(part) is str:  # most are
                weight += 1 + len(part)
            else:
                its_weight, its_items = self._measure(part)
                weight, items = weight + 1 + its_weight, items + its_items
                if isinstance(part, self._namespace):  # which may grow after it was weighed
                    raise self._too_much("a namespace inside of another value")
            if weight > SIZE_LIMIT:
                self._check(weight)
        if isinstance(value, list | tuple | dict):  # which nothing here can change
            self._known[id(value)] = value, weight, items
        return weight, items

    def _check(self, weight: int) -> None:
        if weight > SIZE_LIMIT:
            raise self._too_much(f"a value that would be written with more than {SIZE_LIMIT} characters")

    def _add(self, work: int) -> None:
        self._work += work
        if self._work > WORK_LIMIT:
            raise self._too_much("it reads and makes too much")


def _parts(value: object) -> list[Any] | None:
    """What a value is made of; None for what has no parts."""
    from jinja2.utils import Namespace

    if isinstance(value, Namespace):
        attributes: dict[str, Any] = object.__getattribute__(value, "_Namespace__attrs")
        value = attributes
        if any(isinstance(part, Namespace) for part in attributes.values()):
            raise _unsafe("a namespace inside of another")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, ItemsView):
        return [part for pair in value for part in pair]
    return list(value) if isinstance(value, list | tuple | set | frozenset | range | KeysView | ValuesView) else None


def make_sandbox() -> Any:
    """A fresh environment for one rendering. `compile_bounded` makes a template of it."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    scales = _Scales()

    class Generation(Extension):
        """{% generation %} marks the model's own words, for training; here its body is all there is to it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    def bounded_filter(name: str, function: Any) -> Any:
        passed = int(hasattr(function, "jinja_pass_arg"))  # Jinja's own argument in front

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = args[passed:]
            _check_numbers(*given[1:], **kwargs)
            look = scales.written if name in _WRITERS else scales.weigh if name in _GLANCES else scales.read
            for value in (*given, *kwargs.values()):
                look(value)
            if name in _FILTER_CHECKS:
                _FILTER_CHECKS[name](scales, *given, **kwargs)
            return scales.made(function(*args, **kwargs))

        return bounded

    def bounded_test(function: Any) -> Any:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                scales.read(value)
            return function(*args, **kwargs)

        return bounded

    def checked(node: Any, check: str) -> nodes.Expr:
        return nodes.Filter(node, check, [], [], None, None, lineno=node.lineno)

    class Bounds(NodeTransformer):
        """Puts what counts around what is to be counted."""

        def _made(self, node: Any) -> Any:
            self.generic_visit(node)
            return node if getattr(node, "ctx", "load") != "load" else checked(node, "made")

        visit_List = visit_Tuple = visit_Dict = visit_Concat = _made

        def visit_Getitem(self, node: Any) -> Any:
            self.generic_visit(node)
            return checked(node, "made") if isinstance(node.arg, nodes.Slice) else node

        def visit_Compare(self, node: Any) -> Any:
            self.generic_visit(node)
            for side in (node, *node.ops):
                side.expr = checked(side.expr, "read")
            return node

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = checked(node.iter, "turns")
            return node

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            scales.turn()
            _check_numbers(*args, **kwargs)
            method, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
            for value in (*args, *kwargs.values(), *([owner] if isinstance(owner, str) else [])):
                scales.read(value)
            if isinstance(owner, str) and method == "translate":
                raise SecurityError("a text that is translated letter by letter")
            if isinstance(owner, str) and method in _GROWN:
                _check_growth(method, owner, *args)
            if isinstance(function, LoopContext):  # goes on in a loop of its own
                args = (scales.turns(args[0]), *args[1:]) if args else args
            return scales.made(super().call(context, function, *args, **kwargs))

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                _check_form(value.__self__)
            return wrapped

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%":
                _check_form(left)
                scales.written(right)
            else:
                sizes = [len(side) if hasattr(side, "__len__") else int(abs(side)) for side in (left, right)]
                size = sum(sizes) if operator == "+" else sizes[0] * sizes[1]
                if operator == "**" or (size > SIZE_LIMIT and any(hasattr(side, "__len__") for side in (left, right))):
                    raise SecurityError(f"the result of {operator} would be too large")
            result = super().call_binop(context, operator, left, right)
            is_sum = operator == "+" and isinstance(result, list)
            return scales.joined(result, left, right) if is_sum else scales.made(result)

        def compile_bounded(self, source: str) -> Any:
            return self.from_string(Bounds().visit(self.parse(source)))

    def raise_exception(message: object) -> None:
        raise Refused(str(message))

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=scales.written
    )
    filters = {name: function for name, function in sandbox.filters.items() if name not in _WITHOUT}
    sandbox.filters = {
        name: bounded_filter(name, function) for name, function in (filters | {"tojson": tojson}).items()
    }
    sandbox.filters |= {"read": scales.read, "made": scales.made, "turns": scales.turns}
    sandbox.tests |= {name: bounded_test(sandbox.tests[name]) for name in _COMPARISONS & sandbox.tests.keys()}
    del sandbox.globals["lipsum"]
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return sandbox


def _unsafe(reason: str) -> Exception:
    from jinja2.exceptions import SecurityError

    return SecurityError(reason)


def _check_numbers(*values: Any, **named: Any) -> None:
    """A number may be a width, to which a text is filled up before anyone can see its size."""
    for value in (*values, *named.values()):
        if isinstance(value, int) and abs(value) > SIZE_LIMIT:
            raise _unsafe(f"the number {value} is too large")


def _check_form(form: Any) -> None:
    """The same for the widths inside what `%` and `format` fill in."""
    if isinstance(form, str) and re.search(r"\d{8}|%[^a-zA-Z%]*\*|\{[^{}]*\{[^{]", form.replace("{{", "")):
        raise _unsafe("a format with a width that is too large or not fixed")


# Length of what a text grows to: `text.replace(old, new)`, `text.join(parts)`, `text.expandtabs(width)`.
_GROWN: dict[str, Callable[..., int]] = {
    "replace": lambda text, old, new, *_: text.count(old) * len(new),
    "join": lambda text, parts: len(text) * (len(parts) if hasattr(parts, "__len__") else LOOP_LIMIT),
    "expandtabs": lambda text, width=8: text.count("\t") * width,
}


def _check_growth(method: str, text: str, *args: Any) -> None:
    if _GROWN[method](text, *args) > SIZE_LIMIT:
        raise _unsafe(f"the result of {method} would be too large")


def _check_replace(_: _Scales, text: Any, old: Any = "", new: Any = "", *more: Any, **named: Any) -> None:
    _check_growth("replace", str(text), str(old), str(named.get("new", new)))


def _check_join(_: _Scales, parts: Any, d: Any = "", *more: Any, **named: Any) -> None:
    _check_growth("join", str(named.get("d", d)), parts)


def _check_indent(_: _Scales, text: Any, width: Any = 4, *more: Any, **named: Any) -> None:
    width = named.get("width", width)
    each = width if isinstance(width, int) else len(str(width))
    if (str(text).count("\n") + 1) * each > SIZE_LIMIT:
        raise _unsafe("the result of indent would be too large")


def _check_tojson(scales: _Scales, value: Any, indent: Any = None, separators: Any = None, **named: Any) -> None:
    indent = named.get("indent", indent)
    is_small = scales.weigh(named.get("separators", separators)) < 10
    if indent is not None:
        is_small = (
            is_small and isinstance(indent, int) and indent <= MOST_INDENT and scales.weigh(value) < MOST_INDENTED
        )
    if not is_small:
        raise _unsafe("the result of tojson would be too large")


def _check_sum(_: _Scales, parts: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise _unsafe("a sum of what are no numbers")


_FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "format": lambda scales, form, *_, **__: _check_form(form),
    "replace": _check_replace,
    "join": _check_join,
    "indent": _check_indent,
    "tojson": _check_tojson,
    "sum": _check_sum,
}
