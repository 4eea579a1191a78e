"""Chat templates in a sandbox with limits: size, nesting, time and memory.

The template comes from a file that somebody else made. Jinja's own sandbox keeps it away from Python's internals, but
lets it use all time and memory. Here no single operation can be large, because every value that a template makes is
measured (before it is made, where it could be huge), and between two operations there is a look at the clock. For that

- ``_Instrument`` puts a measured call around each construct of the language that Jinja compiles to plain Python:
  loops, literals, ``~``, and text (which ``finalize`` sees);
- operators, calls, attributes and filters pass through ``_Environment``, which knows those that chat templates use,
  each with a bound, and no others.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Joiner, Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import escape

_MAX_NESTING = 64  # of brackets and of blocks in a template
_MAX_TAG_TOKENS = 2_000  # in one {{ }} or {% %}
_MAX_TOKENS = 50_000  # in all of them
_MAX_DIGITS = 100  # converting digits to a number takes quadratic time
_MAX_CALL_DEPTH = 100  # of macros that call themselves
_MAX_VALUE_DEPTH = 128  # of lists in lists
_MAX_BITS = 4_096  # of an integer
_MAX_INDENT = 16
_ELEMENT = 16  # what an element of a list weighs, in bytes


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What a template may use. ``output_bytes`` also bounds each value on the way, and 32 times that all of them."""

    source_bytes: int = 1 << 20
    output_bytes: int = 16 << 20
    seconds: float = 1.0


class TemplateError(Exception):
    """A template that does not compile, fails, or exceeds a limit. The text continues "the chat template ..."."""


class RaisedByTemplateError(Exception):
    """``raise_exception(message)`` in a template."""


class SandboxedTemplate:
    """A compiled template. Safe to share between threads; they wait for each other.

    Example: ``SandboxedTemplate("{{ x }}!", TemplateLimits()).render({"x": 1})`` is ``"1!"``.
    """

    def __init__(self, source: str, limits: TemplateLimits) -> None:
        """Raises TemplateError."""
        self._limits = limits
        self._lock = threading.Lock()  # the environment holds the budget of one rendering
        self._environment = _Environment(limits)
        if not isinstance(source, str):
            raise TemplateError(f"must be a text, not {type(source).__name__}")
        n_bytes = len(source.encode("utf-8", "surrogatepass"))
        if n_bytes > limits.source_bytes:
            raise TemplateError(f"has {n_bytes} bytes; the limit is {limits.source_bytes}")
        try:
            self._template = self._compile(source)
        except Exception as error:  # also what Python's own compiler raises: SyntaxError, MemoryError, RecursionError
            raise TemplateError(f"does not compile: {_reason(error)}") from None

    def render(self, variables: dict[str, Any]) -> str:
        """``variables`` hold the types of JSON and no others. Raises TemplateError or RaisedByTemplateError."""
        parts: list[str] = []
        n_chars = 0
        with self._lock:
            budget = self._environment.budget = _Budget(self._limits)
            try:
                for part in self._template.root_render_func(self._template.new_context(variables)):
                    n_chars += len(part)
                    budget.require_size(n_chars)
                    parts.append(part)
            except RaisedByTemplateError:
                raise
            except Exception as error:  # a template can fail in as many ways as a program
                raise TemplateError(f"fails: {_reason(error)}") from None
            finally:
                self._environment.budget = _Budget(self._limits)  # lets go of the values that were measured
        return "".join(parts)

    def _compile(self, source: str) -> jinja2.Template:
        environment = self._environment
        _check_nesting(environment.lex(source))
        tree = environment.parse(source)
        for node in tree.find_all(_UNSUPPORTED_NODES):
            raise _LimitError(f"line {node.lineno} uses a tag that chat templates cannot use")
        code = environment.compile(_Instrument().visit(tree))
        return jinja2.Template.from_code(environment, code, environment.make_globals(None))


class _LimitError(Exception):
    """A limit was exceeded. Not a TypeError or LookupError: Jinja swallows those in places."""


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError | MemoryError):
        return "it is nested too deeply" if isinstance(error, RecursionError) else "it needs too much memory"
    text = " ".join(str(error).split())[:300]
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return (text or type(error).__name__) + line


class _Budget:
    """The time, and the weight of the values, of one rendering. Weights are about bytes."""

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._deadline = time.monotonic() + limits.seconds
        self._spent = 0
        self._weights: dict[int, tuple[object, int]] = {}  # by id; the object is kept so that the id is not used again
        self.call_depth = 0

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise _LimitError(f"it takes longer than {self._limits.seconds:g} s")

    def require_size(self, n_bytes: int) -> None:
        """To be asked before something of this size is made."""
        if n_bytes > self._limits.output_bytes:
            raise _LimitError(f"it makes a value of more than {self._limits.output_bytes} bytes")

    def checked(self, value: Any) -> Any:
        """A value that was just made."""
        self.tick()
        self.require_size(self.weigh(value))
        if isinstance(value, str):
            self._spent += self.weigh(value)
        elif isinstance(value, list | tuple | dict):
            self._spent += _ELEMENT * (1 + len(value))  # its elements were counted when they were made
        if self._spent > 32 * self._limits.output_bytes:
            raise _LimitError(f"its values have more than {32 * self._limits.output_bytes} bytes")
        return value

    def text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        self.require_size(self.weigh(value))
        return str(value)

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Lists that share elements count them each time: that is what printing or comparing them costs."""
        if isinstance(value, str):
            return len(value) if value.isascii() else 4 * len(value)
        if isinstance(value, int):
            if value.bit_length() > _MAX_BITS:
                raise _LimitError(f"it makes a number of more than {_MAX_BITS} bits")
            return _ELEMENT
        if not isinstance(value, list | tuple | dict):
            return _ELEMENT
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        if depth > _MAX_VALUE_DEPTH:
            raise _LimitError("it makes a value that is nested too deeply")
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        weight = _ELEMENT * (1 + len(items)) + sum(self.weigh(item, depth + 1) for item in items)
        self._weights[id(value)] = (value, weight)
        return weight


def _check_nesting(tokens: Iterable[tuple[int, str, str]]) -> None:
    """Before Jinja's parser, which is recursive, and Python's: both run out of stack in their own ways."""
    brackets = blocks = n_tag_tokens = n_tokens = 0
    first = False  # whether the next word names the tag
    for line, kind, text in tokens:
        if kind in ("block_begin", "variable_begin"):
            brackets = n_tag_tokens = 0
            first = kind == "block_begin"
        if kind in ("whitespace", "data", "comment"):
            continue
        n_tag_tokens += 1
        n_tokens += 1
        if kind == "operator":
            brackets += (text in "([{") - (text in ")]}")
        elif kind in ("integer", "float") and len(text) > _MAX_DIGITS:
            raise _LimitError(f"line {line} has a number of {len(text)} digits")
        elif kind == "name" and first:
            first = False
            blocks += (text in ("for", "if", "macro", "call", "filter", "with", "block")) - text.startswith("end")
        if max(brackets, blocks) > _MAX_NESTING:
            raise _LimitError(f"line {line} is nested deeper than {_MAX_NESTING}")
        if n_tag_tokens > _MAX_TAG_TOKENS or n_tokens > _MAX_TOKENS:
            raise _LimitError(f"line {line} has more than {_MAX_TAG_TOKENS} words in a tag, or {_MAX_TOKENS} in all")


# Other files, and escaping for HTML.
_UNSUPPORTED_NODES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.EvalContextModifier)
_LOOP, _CONCAT, _LITERAL = "bounded loop", "bounded concat", "bounded literal"  # the space: no template can name them


class _Instrument(NodeTransformer):
    """Filters around what Jinja would compile to plain Python."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filter(_LOOP, node.iter)  # type: ignore[arg-type]  # Jinja says Node
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(_LITERAL, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(_LITERAL, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(_LITERAL, node) if node.ctx == "load" else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return nodes.Const(node.data, lineno=node.lineno)  # passes through `finalize`, other than TemplateData


def _filter(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``: marks the answers in templates that are also used for training; here only a scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _TemplateNamespace(Namespace):
    """Without names that begin with an underscore, and without printing what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` is allowed
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            _TemplateNamespace.__setitem__(args[0], name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise _LimitError(f"a namespace cannot have the name {str(name)[:40]!r}")
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


# Methods of texts whose results are no longer than the text, or one number.
_TEXT_METHODS = frozenset(
    [
        *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "partition", "rpartition"),
        *("upper", "lower", "title", "capitalize", "swapcase"),
        *("startswith", "endswith", "find", "rfind", "index", "rindex", "count"),
        *("isalnum", "isalpha", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper"),
    ]
)
# Jinja's own, whose work is in proportion to their input.
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "items", "last", "length", "list", "lower"),
    *("map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "title", "trim"),
    *("unique", "upper"),
)
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, every operation within the budget."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, limits: TemplateLimits) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # otherwise constants are computed while compiling, outside of any budget
            cache_size=0,
            finalize=self._finalized,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        self._limits = limits
        self.budget = _Budget(limits)
        own = {
            "tojson": self._tojson, "join": self._filter_join, "replace": self._replace, "indent": self._indent,
            "string": lambda value: self.budget.text(value), "safe": lambda value: self.budget.text(value),
            "escape": self._escape, "e": self._escape, "int": _integer, "float": _float, "round": _rounded,
            _CONCAT: lambda values: self._join("", values), _LITERAL: lambda value: value,
        }  # fmt: skip
        known = {**{name: FILTERS[name] for name in _FILTERS}, **own}
        self.filters = {name: self._bounded(function) for name, function in known.items()}
        self.filters[_LOOP] = self._loop
        self.globals = {
            "range": safe_range,
            "dict": _make_dict,
            "namespace": _TemplateNamespace,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # with the attribute that makes Jinja pass its context
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            return self.budget.checked(function(*args, **kwargs))

        return bounded

    def _loop(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.tick()
            yield value

    @jinja2.pass_context  # which also keeps Jinja from calling it while compiling
    def _finalized(self, context: Context, value: Any) -> str:
        text = self.budget.text(value)
        self.budget.checked(text)
        return text

    # Operators and calls.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        sized = (str, list, tuple)
        if operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            budget.require_size(budget.weigh(left) + budget.weigh(right))
        elif operator == "*" and isinstance(left, sized) and isinstance(right, int):
            budget.require_size(budget.weigh(left) * max(right, 0))
        elif operator == "*" and isinstance(right, sized) and isinstance(left, int):
            budget.require_size(budget.weigh(right) * max(left, 0))
        elif operator == "%" and isinstance(left, str):
            raise _LimitError("it formats a text with '%', which chat templates cannot use; join with '~'")
        elif operator == "**" and isinstance(left, int) and left.bit_length() * abs(right) > _MAX_BITS:
            raise _LimitError(f"it makes a number of more than {_MAX_BITS} bits")
        return budget.checked(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = self.budget
        budget.require_size(budget.weigh(args) + budget.weigh(kwargs))
        if budget.call_depth >= _MAX_CALL_DEPTH:
            raise _LimitError(f"its macros call each other more than {_MAX_CALL_DEPTH} deep")
        budget.call_depth += 1
        result = super().call(context, obj, *args, **kwargs)
        budget.call_depth -= 1
        return budget.checked(result)

    # Attributes: what is not listed here is not there.

    def getattr(self, obj: Any, attribute: str) -> Any:
        method = self._method(obj, attribute)
        if method is not None:
            return method
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        if attribute.startswith("_"):
            raise _LimitError(f"it asks for {attribute[:40]!r} of a value of type {type(obj).__name__}")
        if isinstance(obj, Undefined | LoopContext | Macro | Namespace):
            return super().getattr(obj, attribute)
        return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str | list | tuple | dict | range):
            try:
                return obj[argument]
            except (TypeError, LookupError):
                pass
        if isinstance(argument, str):
            return self.getattr(obj, argument)
        return self.undefined(obj=obj, name=argument)

    def _method(self, obj: Any, name: str) -> Callable[..., Any] | None:
        if isinstance(obj, str):
            if name in _TEXT_METHODS:
                method: Callable[..., Any] = getattr(obj, name)
                return method
            own: dict[str, Callable[..., Any]] = {
                "replace": self._replace, "join": self._join, "split": self._split, "rsplit": self._rsplit,
                "splitlines": self._splitlines,
            }  # fmt: skip
            return functools.partial(own[name], obj) if name in own else None
        if isinstance(obj, dict):
            if name in ("items", "keys", "values"):
                return lambda: list(getattr(obj, name)())
            return obj.get if name == "get" else None
        if isinstance(obj, list | tuple) and name in ("index", "count"):
            return obj.index if name == "index" else obj.count
        return None

    # Methods and filters whose results can be much larger than what they are given.

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        whole, old, new = (self.budget.text(each) for each in (text, old, new))
        limit = -1 if count is None else count
        n_found = whole.count(old) if limit < 0 else min(whole.count(old), limit)
        self.budget.require_size(len(whole) + n_found * len(new))
        return whole.replace(old, new, limit)

    def _join(self, separator: str, values: Iterable[Any]) -> str:
        texts = [self.budget.text(value) for value in values]
        self.budget.require_size(sum(map(len, texts)) + len(separator) * len(texts))
        return separator.join(texts)

    def _filter_join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = [self.getitem(value, attribute) for value in values]
        return self._join(self.budget.text(d), values)

    def _split(self, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        return text.split(sep, self._max_split(maxsplit))

    def _rsplit(self, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        return text.rsplit(sep, self._max_split(maxsplit))

    def _max_split(self, maxsplit: int) -> int:
        """One more than the elements that a list may have: splitting stops there, and the list is refused."""
        most = self._limits.output_bytes // _ELEMENT + 1
        return most if maxsplit < 0 else min(maxsplit, most)

    def _splitlines(self, text: str, keepends: bool = False) -> list[str]:
        self.budget.require_size(_ELEMENT * sum(text.count(end) for end in _LINE_ENDS))
        return text.splitlines(keepends)

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = self.budget.text(text)
        n_added = len(_indentation(width))
        self.budget.require_size(len(text) + n_added * (1 + sum(text.count(end) for end in _LINE_ENDS)))
        indented: str = FILTERS["indent"](text, _indentation(width), first, blank)
        return indented

    def _escape(self, text: Any) -> str:
        text = self.budget.text(text)
        self.budget.require_size(6 * len(text))
        return str(escape(text))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Sequence[str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As in transformers: not escaped for HTML, which is what Jinja's own filter does."""
        self.budget.require_size(self.budget.weigh(value))
        if separators is not None and max(map(len, separators)) > _MAX_INDENT:
            raise _LimitError(f"it uses separators of more than {_MAX_INDENT} characters")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii,
            indent=None if indent is None else _indentation(indent),
            separators=None if separators is None else (separators[0], separators[1]),
            sort_keys=sort_keys,
        )
        parts: list[str] = []
        n_chars = 0
        for part in encoder.iterencode(value):
            n_chars += len(part)
            self.budget.require_size(n_chars)
            self.budget.tick()
            parts.append(part)
        return "".join(parts)


def _indentation(width: int | str) -> str:
    if (len(width) if isinstance(width, str) else width) > _MAX_INDENT:
        raise _LimitError(f"it indents by more than {_MAX_INDENT}")
    return width if isinstance(width, str) else " " * width


def _integer(value: Any, default: int = 0, base: int = 10) -> Any:
    too_long = isinstance(value, str) and len(value) > _MAX_DIGITS
    return default if too_long else FILTERS["int"](value, default, base)


def _float(value: Any, default: float = 0.0) -> Any:
    return FILTERS["float"](value, default)


def _rounded(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 20:
        raise _LimitError("it rounds to more than 20 digits")
    rounded: float = FILTERS["round"](value, precision, method)
    return rounded


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object = "") -> None:
    raise RaisedByTemplateError(" ".join(str(message).split())[:500])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or not re.fullmatch(r"(?:[^%]|%-?[A-Za-z%])*", pattern):  # %999999999d is a gigabyte
        raise _LimitError(f"it formats the date with {pattern[:40]!r}")
    return datetime.now().strftime(pattern)
