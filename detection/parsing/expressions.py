"""An interpreter that computes a config's values: of the syntax of data alone, and within limits.

Python's `eval` never sees the text of a third-party config. What is not in `NODES` is refused before anything is
computed, and every value's size is known before it is made: `[0] * 10**11` takes no memory.
"""

import ast
import operator
from collections.abc import Callable, Iterator
from typing import Any

from shvit.errors import InputError, first_line

MAX_STEPS = 200_000  # of one file: expressions that are evaluated
MAX_ITEMS = 50_000  # in a value, counted as often as it is written out
MAX_TEXT = 100_000  # characters
MAX_NUMBER = 1 << 64
MAX_DEPTH = 60  # of expressions in expressions
MAX_NODES = 150_000  # of syntax in one file; mmengine looks at each several times

NODES = (
    *(ast.Module, ast.Assign, ast.Name, ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Call, ast.keyword),
    *(ast.Attribute, ast.Subscript, ast.Slice, ast.Starred, ast.JoinedStr, ast.FormattedValue, ast.IfExp, ast.Compare),
    *(ast.ListComp, ast.DictComp, ast.comprehension, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.cmpop, ast.boolop),
    *(ast.unaryop, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.expr_context),
)
CALLS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (dict, list, tuple, len, range, int, float, str)
}
BASE = "_base_"

_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_NUMERIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Sub: operator.sub,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}


class TooMuch(ValueError):
    """An error about a value that is larger than any config needs."""


# --- syntax -----------------------------------------------------------------------------------------------------------


def parse(text: str) -> ast.Module:
    """Return the text's syntax tree; raise InputError, whose message begins with the line, for what is not Python."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InputError(f"{where}: not a config ({first_line(error)}); correct it") from error


def problem_of(tree: ast.Module) -> tuple[int | None, str] | None:
    """Return the first syntax that is neither a name nor a value, and so might run code, with its line."""
    bases = {id(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)}
    for number, node in enumerate(ast.walk(tree)):
        if number > MAX_NODES:
            return None, f"a text of more than {MAX_NODES:,} parts"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if problem := _problem(node, bases):
            return getattr(node, "lineno", None), problem
    return None


def _problem(node: ast.AST, assigned: set[int]) -> str | None:
    """Return the part of a node that is more than data, if any.

    Args:
        assigned: ids of the names that the file's own assignments begin with; of these alone, one may be `_base_`.
    """
    if not isinstance(node, NODES):
        return type(node).__name__
    if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in CALLS):
        return f"a call of {ast.unparse(node.func)[:60]}"
    if isinstance(node, ast.Attribute) and (node.attr.startswith("_") or not ast.unparse(node).startswith(BASE + ".")):
        return ast.unparse(node)[:60]
    if isinstance(node, ast.FormattedValue) and (node.format_spec is not None or node.conversion != -1):
        return "a format"
    if isinstance(node, ast.Name):
        stored = not isinstance(node.ctx, ast.Load)
        if node.id.startswith("__") or (stored and node.id in CALLS):
            return f"the name {node.id}"
        if stored and node.id == BASE and id(node) not in assigned:
            return "another _base_"
    return None


# --- values -----------------------------------------------------------------------------------------------------------


def base_files(tree: ast.Module) -> list[Any]:
    """Return the names of the file's bases; raise InputError where they cannot be computed."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and _is_base(statement.targets[0]):
            value = _Interpreter({}).run(statement.value)
            return value if isinstance(value, list) else [value]
    return []


def evaluate(tree: ast.Module, names: dict[str, Any]) -> None:
    """Execute the file's assignments into `names`, which also holds what they may refer to.

    Raises:
        InputError: a value cannot be computed, or is larger than any config needs; the message begins with the line.
    """
    interpreter = _Interpreter(names)
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and not _is_base(statement.targets[0]):
            value = interpreter.run(statement.value)
            for target in statement.targets:
                interpreter.assign(target, value, statement.lineno)


def _is_base(target: ast.AST) -> bool:
    return isinstance(target, ast.Name) and target.id == BASE


class _Interpreter:
    """An evaluator of the expressions that `problem_of` lets through."""

    def __init__(self, names: dict[str, Any]):
        self.names = names
        self.steps = 0
        self.depth = 0
        self.sizes: dict[int, tuple[int, Any]] = {}

    def run(self, node: ast.expr) -> Any:
        try:
            value = self.value(node)
            if self.size(value) > MAX_ITEMS:
                raise TooMuch(f"more than {MAX_ITEMS:,} values")
            return value
        except Exception as error:  # what Python's own operators raise for what cannot be added, indexed, …
            reason = repr(error.args[0]) + " is not there" if isinstance(error, KeyError) else first_line(error)
            raise InputError(f", line {node.lineno}: cannot be computed ({reason}); correct it") from error

    def size(self, value: Any) -> int:
        """Return the number of values that a value has when written out; a text counts as several."""
        if not isinstance(value, dict | list | tuple):
            return 1 + (len(value) // 50 if isinstance(value, str | bytes) else 0)
        known = self.sizes.get(id(value))
        if known is None or known[1] is not value:
            parts = value.values() if isinstance(value, dict) else value
            total = 1
            for each in parts:
                total += self.size(each)
                if total > MAX_ITEMS:
                    raise TooMuch(f"more than {MAX_ITEMS:,} values")
            known = self.sizes[id(value)] = total, value
        return known[0]

    def value(self, node: ast.expr) -> Any:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TooMuch(f"more than {MAX_STEPS:,} steps")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooMuch(f"more than {MAX_DEPTH} expressions in each other")
        try:
            return self.bounded(getattr(self, f"on_{type(node).__name__.lower()}")(node))
        finally:
            self.depth -= 1

    def bounded(self, value: Any) -> Any:
        if isinstance(value, str | bytes) and len(value) > MAX_TEXT:
            raise TooMuch(f"a text of {len(value):,} characters")
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TooMuch("a number of more than 64 bits")
        if isinstance(value, list | tuple | range | dict):
            if len(value) > MAX_ITEMS:
                raise TooMuch(f"more than {MAX_ITEMS:,} values")
            self.steps += len(value) // 64  # which were copied
        return value

    # one method for each kind of expression: on_ and the name of its node

    def on_constant(self, node: ast.Constant) -> Any:
        return node.value

    def on_name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise NameError(f"name {node.id!r} is not defined")
        return self.names[node.id]

    def on_attribute(self, node: ast.Attribute) -> Any:
        """Return a field of a base."""
        return self.value(node.value)[node.attr]

    def on_list(self, node: ast.List) -> Any:
        return list(self.elements(node.elts))

    def on_tuple(self, node: ast.Tuple) -> Any:
        return tuple(self.elements(node.elts))

    def elements(self, nodes: list[ast.expr]) -> Iterator[Any]:
        number = 0
        for node in nodes:
            for each in self.value(node.value) if isinstance(node, ast.Starred) else (self.value(node),):
                number += 1
                if number > MAX_ITEMS:
                    raise TooMuch(f"more than {MAX_ITEMS:,} values")
                yield each

    def on_dict(self, node: ast.Dict) -> Any:
        result: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                result.update(self.value(value))
            else:
                result[self.value(key)] = self.value(value)
        return result

    def on_call(self, node: ast.Call) -> Any:
        name = node.func.id  # type: ignore[attr-defined]
        arguments = list(self.elements(node.args))
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            more = self.value(keyword.value) if keyword.arg is None else {keyword.arg: self.value(keyword.value)}
            if twice := next((key for key in more if key in keywords), None):
                raise TypeError(f"dict has {twice} twice")
            keywords.update(more)
        if name in ("list", "tuple", "dict", "str"):  # which write their argument out
            for each in arguments:
                self.size(each)
        return CALLS[name](*arguments, **keywords)

    def on_subscript(self, node: ast.Subscript) -> Any:
        return self.value(node.value)[self.value(node.slice)]

    def on_slice(self, node: ast.Slice) -> Any:
        return slice(*(None if each is None else self.value(each) for each in (node.lower, node.upper, node.step)))

    def on_joinedstr(self, node: ast.JoinedStr) -> Any:
        text = ""
        for each in node.values:
            text = self.bounded(text + str(self.value(each)))
        return text

    def on_formattedvalue(self, node: ast.FormattedValue) -> Any:
        value = self.value(node.value)
        self.size(value)
        return str(value)

    def on_ifexp(self, node: ast.IfExp) -> Any:
        return self.value(node.body if self.value(node.test) else node.orelse)

    def on_compare(self, node: ast.Compare) -> Any:
        left = self.value(node.left)
        for kind, other in zip(node.ops, node.comparators, strict=True):
            right = self.value(other)
            self.steps += len(right) // 8 if isinstance(right, str | list | tuple | dict) else 0
            if not _COMPARISONS[type(kind)](left, right):
                return False
            left = right
        return True

    def on_boolop(self, node: ast.BoolOp) -> Any:
        stops_at = isinstance(node.op, ast.Or)
        for each in node.values:
            result = self.value(each)
            if bool(result) is stops_at:
                break
        return result

    def on_unaryop(self, node: ast.UnaryOp) -> Any:
        return _UNARY[type(node.op)](self.value(node.operand))

    def on_binop(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right  # no longer than what there is
        if isinstance(node.op, ast.Mult):
            for one, times in ((left, right), (right, left)):
                is_repeated = isinstance(one, list | tuple | str | bytes) and isinstance(times, int)
                if is_repeated and len(one) * times > MAX_ITEMS:
                    raise TooMuch(f"more than {MAX_ITEMS:,} values")
            return left * right
        if isinstance(left, str | bytes):
            raise TypeError("a text is not a number")  # `%` formats
        return _NUMERIC[type(node.op)](left, right)

    def on_listcomp(self, node: ast.ListComp) -> Any:
        return [self.value(node.elt) for _ in self.rounds(node.generators)]

    def on_dictcomp(self, node: ast.DictComp) -> Any:
        return {self.value(node.key): self.value(node.value) for _ in self.rounds(node.generators)}

    def rounds(self, generators: list[ast.comprehension]) -> Iterator[None]:
        """Yield with the names of each round of a comprehension set; they are gone at its end."""
        first, *rest = generators
        before = dict(self.names)
        for each in self.value(first.iter):
            self.assign(first.target, each, first.target.lineno)
            if all(self.value(test) for test in first.ifs):
                if rest:
                    yield from self.rounds(rest)
                else:
                    yield None
        self.names.clear()
        self.names.update(before)

    def assign(self, target: ast.expr, value: Any, line: int) -> None:
        """Set a name, or several from as many values."""
        if isinstance(target, ast.Name):
            self.names[target.id] = value
            return
        values = list(value) if isinstance(value, list | tuple | range) else None
        if not isinstance(target, ast.Tuple | ast.List) or values is None or len(values) != len(target.elts):
            raise InputError(f", line {line}: assigns to what is not a name; write NAME = VALUE")
        for part, each in zip(target.elts, values, strict=True):
            self.assign(part, each, line)
