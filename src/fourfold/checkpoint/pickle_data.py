"""A pickle as data: what its program would build, with every import and call that it asks for written down, not done.

A pickle is a program for a small stack machine, and a few of its instructions import and call. The machine here has
those too, but they push a `Name` and a `Call`: two records. Nothing in here imports, calls, sets an attribute of or
hashes anything that the file chooses, so there is no way from a file to an action, whatever its bytes are.

Python's own `pickletools` says what each instruction is and how to read its argument. Known are the instructions that
pickle protocols 2 to 5 write; a file is refused at the first other one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Container
from dataclasses import dataclass
from pickletools import opcodes
from typing import Any

from fourfold.errors import CheckpointError, UnsupportedError

MAX_BYTES = 64 << 20
MAX_INSTRUCTIONS = 4_000_000  # 30 times what the whole of a 100-billion-parameter model with its optimizer takes
_INSTRUCTIONS = {opcode.code.encode("latin-1"): opcode for opcode in opcodes}
MAX_NAME = 200  # characters of what would be imported
DICTIONARIES = ("collections.OrderedDict",)  # made empty and then filled: a dictionary, like any other


@dataclass(frozen=True)
class Name:
    """Something that the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call:
    """Something that the pickle would make: `function` of `arguments`, with `state`; what it is filled with goes."""

    def __init__(self, function: object, arguments: object) -> None:
        self.function, self.arguments = function, arguments
        self.state: object = None

    def __repr__(self) -> str:
        return f"<{self.function}>" if isinstance(self.function, Name) else "<an object>"


@dataclass(frozen=True, repr=False)
class Persistent:
    """Something that lies outside of the pickle, by the name that it has there."""

    id: object


def read_pickle(data: bytes, where: str, names: Container[str] | None) -> object:
    """What a pickle holds: None, bool, int, float, str, bytes, list, tuple, dict, and the records above.

    Sets come as lists. Keys of a dict are its texts; a key that is none becomes a fresh `object()`. `names` lists all
    that the pickle may name; with None any name may stand there, as a record. The result may hold itself, and the same
    part many times over: walk it with a bound.

    Raises CheckpointError for a damaged pickle, for one that names what is not in `names`, and for one too large to be
    a model's; UnsupportedError for an instruction that `torch.save` does not write.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{where} has a pickle of {len(data)} bytes, and no model needs more than {MAX_BYTES}")
    machine = _Machine(data, where, names)
    try:
        return machine.run()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(f"{where} is damaged: its pickle breaks off or contradicts itself") from None


class _Machine:
    """The stack, its marks and the memo of one pickle."""

    def __init__(self, data: bytes, where: str, names: Container[str] | None) -> None:
        self.where, self.names = where, names
        self.file = io.BytesIO(data)
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # what lay on the stack at each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        for _ in range(MAX_INSTRUCTIONS):
            instruction = _INSTRUCTIONS[self.file.read(1)]
            if instruction.name == "STOP":
                return self.stack.pop()
            if instruction.name not in _ACTIONS:
                raise UnsupportedError(
                    f"{self.where} uses the pickle instruction {instruction.name}, which torch.save does not write"
                )
            argument = None
            if instruction.arg and instruction.name != "GLOBAL":  # whose lines pickletools would unescape
                argument = instruction.arg.reader(self.file)
            _ACTIONS[instruction.name](self, argument)
        raise CheckpointError(
            f"{self.where} has a pickle of more than {MAX_INSTRUCTIONS} instructions; no model needs it"
        )

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def pop(self, n: int) -> list[Any]:
        if n > len(self.stack):
            raise IndexError
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    def fill(self, items: list[Any]) -> None:
        """Append to the list on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, Call):
            target.extend(items) if isinstance(target, list) else _damaged()

    def set_items(self, items: list[Any]) -> None:
        """Add keys and values, one after another, to the dictionary on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, Call):
            return
        if not isinstance(target, dict) or len(items) % 2:
            _damaged()
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else object()] = value  # no hash of the file's choosing

    def global_name(self) -> None:
        module, name = (self.file.readline()[:-1].decode() for _ in range(2))
        self.name(module, name)

    def name(self, module: str, name: str) -> None:
        if not (isinstance(module, str) and isinstance(name, str) and module and name):
            _damaged()
        found = Name(module, name)
        if len(module) + len(name) > MAX_NAME or not str(found).isprintable():
            _damaged()
        if self.names is not None and str(found) not in self.names:
            raise CheckpointError(
                f"{self.where} asks to import {found}, which weights do not need; nothing of it was run:"
                " get the file from a source that you trust"
            )
        self.push(found)

    def call(self, function: object, arguments: object) -> None:
        empty = isinstance(arguments, tuple) and not arguments
        is_dictionary = isinstance(function, Name) and str(function) in DICTIONARIES
        self.push({} if empty and is_dictionary else Call(function, arguments))

    def build(self, state: object) -> None:
        target = self.stack[-1]
        if isinstance(target, Call):
            target.state = state
        elif not isinstance(target, dict):  # what an OrderedDict has beside its items says nothing about weights
            _damaged()

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


def _damaged() -> None:
    raise ValueError


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, version: None if version <= 5 else _damaged(),
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.mark(),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop(3))),
    "FROZENSET": lambda m, _: m.push(m.pop_to_mark()),
    "APPEND": lambda m, _: m.fill(m.pop(1)),
    "APPENDS": lambda m, _: m.fill(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.fill(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "BINPUT": lambda m, index: m.memoize(index),
    "LONG_BINPUT": lambda m, index: m.memoize(index),
    "MEMOIZE": lambda m, _: m.memoize(len(m.memo)),
    "BINGET": lambda m, index: m.push(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.push(m.memo[index]),
    "GLOBAL": lambda m, _: m.global_name(),
    "STACK_GLOBAL": lambda m, _: m.name(*m.pop(2)),
    "REDUCE": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ": lambda m, _: m.call(*m.pop(2)),
    "NEWOBJ_EX": lambda m, _: m.call(*m.pop(3)[:2]),
    "BUILD": lambda m, _: m.build(m.pop(1)[0]),
    "BINPERSID": lambda m, _: m.push(Persistent(m.pop(1)[0])),
}
for _kind in ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"):
    _ACTIONS[_kind] = _Machine.push
for _kind in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"):
    _ACTIONS[_kind] = _Machine.push
