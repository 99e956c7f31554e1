"""Mutants of a module's source: where each is, what it is called, and the source that it comes to.

The operators are cosmic-ray's, and three of our own: text other than messages, arguments that are left out, and class
attributes. A mutant is named by module, function, operator and how often the operator has been applicable in that
function before: the name outlives edits to other functions.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import parso
from parso.python.tree import FStringString, Name, Number, String

MODULE = "<module>"
"""Stands for a function where the mutant is in none."""

OFF = (
    "RShift",
    "LShift",
    "BitOr",
    "BitAnd",
    "BitXor",
    "Invert",
    "UAdd",
    "Is_Eq",
    "IsNot_NotEq",
    "Eq_Is",
    "NotEq_IsNot",
)
"""StrategyInputs of the names of operators that are not applied: of bits, which the code does not calculate with, and those that take
identity for equality, which of None, of flags and of small numbers is the same."""

_MESSAGES = re.compile(r"(logger\.\w+|warnings\.warn|\w*Error|print|\w+\.note|add_argument|add_parser)$")
"""Calls that are given text for people."""
_SHOWN = {"label", "help", "description", "title", "metavar", "diagnosis", "epilog", "match"}
"""Arguments that are text for people."""
_TEXTS = re.compile(r"problem|show|_facts$|spelled|_where|_kept|hint")
"""Functions that make text for people."""
_STYLE = {
    "alpha", "ax", "bbox_to_anchor", "borderaxespad", "capsize", "color", "constrained_layout", "dpi", "edgecolor", "facecolor",
    "figsize", "fontsize", "fmt", "frameon", "ha", "labelpad", "layout", "linestyle", "linewidth", "linewidths", "loc", "lw",
    "marker", "markersize", "ncols", "ncol", "pad", "rotation", "s", "va", "xytext", "zorder", "width_ratios", "height_ratios",
}  # fmt: skip
"""Arguments that say how a picture looks."""
_PUNCTUATION = frozenset("()[]{},:.=") | {"->"}
_ASSURANCES = {("zip", "strict"), ("map", "strict")}
"""Arguments that are assertions."""


@dataclass(frozen=True)
class Mutant:
    """One change."""

    module: str
    """`llmeff.tasks.causal_lm`."""
    function: str
    """`CausalLMTask.summary`; a class for its attributes."""
    operator: str
    """`core/NumberReplacer`."""
    occurrence: int
    """In the function, from 0."""
    line: int = 0
    """Where it is now."""

    @property
    def name(self) -> str:
        """What results call it."""
        return f"{self.module}:{self.function}:{self.operator}:{self.occurrence}"


class TextReplacer:
    """Other text where text decides: keys, names, formats."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        """Of a string, or the text between an f-string's braces."""
        if isinstance(node, String | FStringString):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Puts XX before the text."""
        if isinstance(node, FStringString):
            return FStringString("XX" + node.value, node.start_pos, prefix=node.prefix)
        start = re.match(r"[A-Za-z]*(\"\"\"|'''|\"|')", node.value)
        assert start is not None
        return String(f"{start[0]}XX{node.value[start.end() :]}", node.start_pos, prefix=node.prefix)


class KeywordDropper:
    """A call without one of its named arguments."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        """Of a call's list of arguments, or of its one argument."""
        for argument in _named_arguments(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Leaves the argument and a comma beside it out."""
        argument = _named_arguments(node)[index]
        place = node.children.index(argument)
        if node.type == "arglist":
            first = place - 1 if place else place
            del node.children[first : first + 2]
        else:
            del node.children[place]
        return node


def _named_arguments(node: Any) -> list[Any]:
    if node.type not in ("arglist", "trailer"):
        return []
    named = [child for child in node.children if child.type == "argument" and child.children[1] == "="]
    return [child for child in named if not _is_assurance(child) and child.children[0].value not in _SHOWN | _STYLE]


class AttributeChanger:
    """A class attribute that is inherited in its stead (ClassVar), is None (no annotation), or twice the number."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        """Of an assignment in the body of a class."""
        if _attribute(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """See the class."""
        kind = _attribute(node)
        if kind == "plain":
            node.children[-1] = Name("None", node.children[-1].start_pos, prefix=" ")
        elif kind == "inherited":
            del node.children[1].children[2:]
        else:
            value = node.children[1].children[3]
            node.children[1].children[3] = Number(f"(2 * {value.value})", value.start_pos, prefix=" ")
        return node


def _attribute(node: Any) -> str | None:
    if node.type != "expr_stmt" or node.parent.type != "simple_stmt":
        return None
    suite = node.parent.parent
    if suite.type != "suite" or suite.parent.type != "classdef":
        return None
    first = node.children[1]
    if first.type != "annassign":
        return "plain" if first == "=" and len(node.children) == 3 else None
    if len(first.children) < 4:
        return None
    if "ClassVar" in first.children[1].get_code():
        return "inherited"
    value = first.children[3]
    return "number" if value.type == "number" and "." in value.value + "." * ("e" in value.value) else None


def operators() -> dict[str, Any]:
    """All that are applied, by name."""
    from cosmic_ray.plugins import get_operator, operator_names

    found = {
        name: get_operator(name)()
        for name in operator_names()
        if not any(part in name for part in OFF) and "Variable" not in name
    }
    return found | {f"own/{own.__name__}": own() for own in (TextReplacer, KeywordDropper, AttributeChanger)}


def mutants_of(source: str, module: str, applied: dict[str, Any]) -> list[Mutant]:
    """Those of a module's source that are no message and leave it a module."""
    return [mutant for mutant, _, _ in _sites(parso.parse(source), module, applied)]


def mutated(source: str, mutant: Mutant, applied: dict[str, Any]) -> str | None:
    """The source with the change; None where there is no such site, or what comes is no Python or the same."""
    tree = parso.parse(source)
    operator = applied[mutant.operator]
    for found, node, index in _sites(tree, mutant.module, {mutant.operator: operator}):
        if found.name == mutant.name:
            parent = node.parent
            changed = operator.mutate(node, index)
            if changed is not node:
                place = parent.children.index(node)
                parent.children[place : place + 1] = [] if changed is None else [changed]
            code: str = tree.get_code()
            return code if code != source and _is_python(code) else None
    return None


def _is_python(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def _sites(tree: Any, module: str, applied: dict[str, Any]) -> list[tuple[Mutant, Any, int]]:
    seen: Counter[tuple[str, str]] = Counter()
    found = []

    def walk(node: Any, function: str) -> None:
        if _is_left_out(node):
            return
        if node.type in ("funcdef", "classdef"):
            function = f"{function}.{node.name.value}".removeprefix(f"{MODULE}.")
        for name, operator in () if _is_trivial(node) else applied.items():
            for index, position in enumerate(operator.mutation_positions(node)):
                if not (isinstance(operator, TextReplacer) and _is_message(node, function)):
                    found.append((Mutant(module, function, name, seen[function, name], position[0][0]), node, index))
                    seen[function, name] += 1
        for child in getattr(node, "children", ()):
            walk(child, function)

    walk(tree, MODULE)
    return found


def _is_trivial(node: Any) -> bool:
    """No operator applies: to tell by this takes a tenth of the time that asking them all does."""
    return node.type in ("name", "newline", "endmarker") or (node.type == "operator" and node.value in _PUNCTUATION)


def _is_left_out(node: Any) -> bool:
    """Types, assertions, what is raised, what is logged, text for people and how pictures look."""
    if node.type in ("assert_stmt", "raise_stmt", "import_from", "import_name", "tfpdef"):
        return True
    parent = node.parent
    if parent is None:
        return False
    if parent.type == "funcdef" and node is parent.annotation:
        return True
    if parent.type == "annassign" and node is parent.children[1]:
        return True
    if parent.type == "param" and node is parent.annotation:
        return True
    if parent.type == "simple_stmt" and node.type in ("string", "strings"):
        return True  # a docstring, or one of an attribute
    if node.type == "trailer" and node.children[0] == "[" and _callee(node) == "Literal":
        return True
    if node.type == "argument" and node.children[1] == "=":
        return _is_assurance(node) or node.children[0].value in _SHOWN | _STYLE | {"encoding"}
    if node.type == "trailer" and node.children[0] == "(":
        return _MESSAGES.search(_callee(node)) is not None
    return False


def _is_assurance(argument: Any) -> bool:
    trailer = argument.parent if argument.parent.type == "trailer" else argument.parent.parent
    if trailer is None or trailer.type != "trailer":
        return False
    name = argument.children[0].value
    return name == "encoding" or (_callee(trailer).rpartition(".")[2], name) in _ASSURANCES


def _callee(trailer: Any) -> str:
    place = trailer.parent.children.index(trailer)
    return "".join(child.get_code() for child in trailer.parent.children[:place]).strip()


def _is_message(node: Any, function: str) -> bool:
    """Text that is yielded as a problem, made by a function that makes text for people, or a sentence."""
    own = node.parent
    while own is not None and own.type not in ("funcdef", "classdef", "file_input"):
        if own.type == "yield_expr" and " " in node.value:
            return True
        own = own.parent
    return _TEXTS.search(function.rpartition(".")[2]) is not None or node.value.count(" ") >= 3
