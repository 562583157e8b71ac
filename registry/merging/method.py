"""How a merge method is written, found and asked for: one file, one function, its options are its keyword arguments.

    @merge_method("svd", form="grams", rev=1, exact=False, ...)
    def svd(grams: Grams, *, rank: int) -> Maps: ...

Five forms. `factors` keeps the parents' factors and gives one scale a row; `grams` turns the small Gram matrices
into two maps; `elements` makes both factors from those of parents of equal rank; `deltas` makes them from bands of the
parents' deltas, or from their factors; `choice` picks another method and rank before the recipe is made, so that the
recipe never names it. `rank` and `seed` are not options: they are fields of the recipe. Methods of others come in by
the entry-point group `adapterctl.merge_methods`. The laws in tests/laws run over every method that is registered.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..domain.adapter import AdapterFacts
from ..domain.errors import InvalidInput, Misconfigured, NotFound, Problem, Refused, raise_all
from ..domain.recipe import (
    LARGEST_WEIGHT,
    LEAST_WEIGHT,
    MergeRequest,
    OptionValue,
    Recipe,
    RecipeParent,
    is_weight,
)

ENTRY_POINTS = "adapterctl.merge_methods"
#: What a method keeps unless it declares in `breaks` that it does not; tests/laws has one test for each.
LAWS = (
    "identity",  # one parent at weight 1 comes back
    "parent_order",  # the order of parents does not matter
    "gauge",  # (A, B) -> (G A, B G⁻¹) does not matter
    "homogeneity",  # weights times t give the delta times t
    "absent",  # a parent at weight 0 is as if it were not there
    "cancellation",  # A - A = 0
    "padding",  # rows of zeros in a parent do not matter
    "monotone",  # a larger rank never loses more
    "full_rank",  # at the sum of the ranks nothing is lost
)

Form = Literal["factors", "grams", "elements", "deltas", "choice"]
#: Options, each of which fits by itself, to what is wrong with them together, or to None.
Check = Callable[[Mapping[str, OptionValue]], Problem | None]
#: An option from 0 to 1.
Share = Annotated[float, (0.0, 1.0)]
Method = TypeVar("Method", bound=Callable[..., Any])

_FIELDS_OF_THE_RECIPE = frozenset({"rank", "seed"})
_OPTION_TYPES: Mapping[type, str] = {float: "float", int: "int", str: "str", bool: "bool"}
#: Safetensors name of every spelling that people use for an output type.
_DTYPES: Mapping[str, str] = {
    **dict.fromkeys(("f64", "fp64", "float64"), "F64"),
    **dict.fromkeys(("f32", "fp32", "float32"), "F32"),
    **dict.fromkeys(("f16", "fp16", "float16"), "F16"),
    **dict.fromkeys(("bf16", "bfloat16"), "BF16"),
}


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One option of a method, as its signature and docstring describe it.

    `choices` come from a `Literal` of strings, `bounds` from `Annotated[float, (low, high)]`, such as `Share`.
    """

    name: str
    type: str
    default: OptionValue
    help: str
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None

    @property
    def expected(self) -> str:
        if self.choices:
            return " or ".join(self.choices)
        return f"{self.type} from {self.bounds[0]:g} to {self.bounds[1]:g}" if self.bounds else self.type

    def accepts(self, value: OptionValue) -> bool:
        if self.type == "float":
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            return number and (self.bounds is None or self.bounds[0] <= float(value) <= self.bounds[1])
        return type(value).__name__ == self.type and (not self.choices or value in self.choices)


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A registered method. `rev` is part of every recipe and is raised only when the method's output changes."""

    name: str
    form: Form
    rev: int
    exact: bool
    summary: str
    when: str
    cost: str
    paper: str
    function: Callable[..., Any]
    options: tuple[OptionSpec, ...]
    seeded: bool
    breaks: frozenset[str]
    min_parents: int
    max_parents: int | None
    equal_ranks: bool
    coarse_grams: bool
    work: float
    check: Check | None


_registered: dict[str, MethodSpec] = {}


def merge_method(
    name: str,
    *,
    form: Form,
    rev: int,
    exact: bool,
    when: str,
    cost: str,
    paper: str = "",
    breaks: Sequence[str] = (),
    min_parents: int = 2,
    max_parents: int | None = None,
    equal_ranks: bool = False,
    coarse_grams: bool = False,
    work: float = 1.0,
    check: Check | None = None,
) -> Callable[[Method], Method]:
    """Register the decorated function as merge method `name`; its docstring's first line becomes the summary.

    Args:
        exact: True when the result is the weighted sum itself, at every rank that the method accepts; of a choice
            (`sum`) up to its limit, as its summary says.
        when: one sentence that says when to choose it.
        cost: work a module, in d (width) and R (sum of the ranks).
        paper: source of the formula.
        breaks: laws of `LAWS` that the method does not keep, seen with its default options.
        min_parents, max_parents: how many parents it takes at least and at most.
        equal_ranks: True when it works on the factors themselves: parents need one rank, which the output has too.
        coarse_grams: True when a small error of the Grams reaches the output's error squared: for an output narrower
            than float32 they are then computed in float32, in half the time.
        work: how many times the work of most methods of its form it takes, by which a server bounds its forecasts.
        check: of options that depend on each other.
    """
    unknown = sorted(set(breaks) - set(LAWS))
    if unknown:
        raise ValueError(f"method {name} declares unknown laws: {', '.join(unknown)}")

    def register(function: Method) -> Method:
        if name in _registered and _registered[name].function is not function:
            raise Misconfigured(f"two merge methods are named {name}", hint="uninstall one of the two packages")
        text = inspect.getdoc(function) or ""
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        _registered[name] = MethodSpec(
            name=name,
            form=form,
            rev=rev,
            exact=exact,
            summary=text.partition("\n")[0],
            when=when,
            cost=cost,
            paper=paper,
            function=function,
            options=_options(function, keywords, text),
            seeded=any(p.name == "seed" for p in keywords),
            breaks=frozenset(breaks),
            min_parents=min_parents,
            max_parents=max_parents,
            equal_ranks=equal_ranks,
            coarse_grams=coarse_grams,
            work=work,
            check=check,
        )
        return function

    return register


@cache
def methods() -> Mapping[str, MethodSpec]:
    """Every registered method by name: ours (one file each in `methods/`) and those of installed packages."""
    # deferred: looking through all installed packages costs a merge more than the merge itself
    from importlib.metadata import entry_points

    for name in _ours():
        import_module(f"{__package__}.methods.{name}")
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            raise Misconfigured(
                f"merge method {entry.name} of {entry.value} cannot be loaded: {error}",
                hint="update or uninstall the package that provides it",
            ) from error
    return MappingProxyType(dict(sorted(_registered.items())))


def find_method(name: str) -> MethodSpec:
    """The method called `name`. Raises `Refused` for `linear`, `NotFound` with a suggestion for a name unknown."""
    if name in _ours():  # the one file, not all of them: they cost a cold `cat` a twentieth of its CPU time
        import_module(f"{__package__}.methods.{name}")
    if name in _registered:
        return _registered[name]
    known = methods()
    if name in known:
        return known[name]
    if name == "linear":
        rule = " or peft_linear (PEFT's rule)" if "peft_linear" in known else ""
        raise Refused(
            "linear means two things: the weighted sum of deltas, and PEFT's sum of factors, which adds cross terms",
            hint=f"use sum (exact){rule}",
        )
    close = difflib.get_close_matches(name, known, n=1)
    raise NotFound(
        f"there is no merge method {name!r}" + (f"; did you mean {close[0]}?" if close else ""),
        hint=f"known methods: {', '.join(known)}; see `adapterctl methods`",
    )


def resolve(request: MergeRequest, facts: Sequence[AdapterFacts], digests: Sequence[str]) -> Recipe:
    """Pin a request: every default filled in, every choice made, so that the recipe alone decides the output.

    Args:
        facts, digests: of the request's parents, in their order.

    Raises `InvalidInput` with every problem of weights, rank, dtype, seed and options at once; `NotFound` or `Refused`
    for the method.
    """
    spec = find_method(request.method)
    problems = [*_weight_problems(request), *_rank_problems(request), *_option_problems(spec, request)]
    problems += [*_parent_problems(spec, request, facts), *_layer_problems(request, facts)]
    dtype = _dtype(request.dtype, facts, problems)
    raise_all(InvalidInput, "this merge cannot be planned:", problems)

    full_rank = sum_of_ranks(facts)
    rank = request.rank
    if spec.form == "choice":
        name, rank = spec.function(full_rank, request.rank)
        spec = find_method(name)
    if rank is None:
        rank = full_rank if spec.form == "factors" else max(f.max_rank for f in facts)
    if spec.form == "factors" and rank < full_rank:
        raise InvalidInput(
            f"{spec.name} keeps all {full_rank} ranks of the parents, --rank {rank} is less",
            hint=f"use --method svd --rank {rank}, or leave --rank out",
        )
    return Recipe(
        method=spec.name,
        method_rev=spec.rev,
        parents=tuple(
            RecipeParent(digest, float(parent.weight)) for digest, parent in zip(digests, request.parents, strict=True)
        ),
        rank=min(rank, full_rank),
        dtype=dtype,
        seed=(request.seed or 0) if spec.seeded else None,
        options=_resolved(spec, request),
        layers=request.layers,
    )


def sum_of_ranks(facts: Sequence[AdapterFacts]) -> int:
    """R: the rank that holds the sum of these adapters exactly, the largest over all modules."""
    ranks: dict[str, int] = defaultdict(int)
    for adapter in facts:
        for module in adapter.modules:
            ranks[module.name] += module.rank
    return max(ranks.values())


def output_dtype(dtypes: Sequence[str]) -> str:
    """The narrowest type that holds all of `dtypes`: bfloat16 and float16 together need float32."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return "F64" if "F64" in dtypes else "F32"


@cache
def _ours() -> tuple[str, ...]:
    """Names of our methods, which are those of their files."""
    return tuple(sorted(file.stem for file in (Path(__file__).parent / "methods").glob("[a-z]*.py")))


def _weight_problems(request: MergeRequest) -> list[Problem]:
    return [
        Problem(
            "bad_weight",
            f"weight {parent.weight} of {parent.ref} is not of a size from {LEAST_WEIGHT:g} to {LARGEST_WEIGHT:g}",
            f"leave {parent.ref} out, or write {parent.ref}=0.6",
        )
        for parent in request.parents
        if not is_weight(parent.weight)
    ]


def _layer_problems(request: MergeRequest, facts: Sequence[AdapterFacts]) -> list[Problem]:
    if not request.layers:
        return []
    problems = []
    modules = {module.name for adapter in facts for module in adapter.modules}
    count = len(request.parents)
    for layer in request.layers:
        if len(layer.weights) != count or not any(layer.weights):
            text = f"{layer} needs {count} weights, one for each parent and not all of them 0"
            problems.append(Problem("bad_layer_weights", text, "a parent that has no say there gets 0"))
        if not any(layer.selects(name) for name in modules):
            text = f"{layer.pattern} selects no module of these parents"
            problems.append(Problem("no_such_layer", text, f"a module is called {min(modules)}"))
    return problems


def _parent_problems(spec: MethodSpec, request: MergeRequest, facts: Sequence[AdapterFacts]) -> list[Problem]:
    problems = []
    if len(request.parents) < spec.min_parents:
        hint = "name two or more versions; `adapterctl resize` makes one of them smaller"
        problems.append(Problem("too_few_parents", "a merge needs at least two parents", hint))
    if spec.max_parents is not None and len(request.parents) > spec.max_parents:
        most = "one parent" if spec.max_parents == 1 else f"{spec.max_parents} parents"
        hint = "use svd for several" if spec.max_parents == 1 else "use sum, or merge two at a time"
        problems.append(Problem("too_many_parents", f"{spec.name} takes {most}, not {len(request.parents)}", hint))
    if not spec.equal_ranks:
        return problems
    ranks: dict[str, set[int]] = defaultdict(set)
    for module in (module for adapter in facts for module in adapter.modules):
        ranks[module.name].add(module.rank)
    differ = {name: sorted(found) for name, found in sorted(ranks.items()) if len(found) > 1}
    if differ:
        name, found = next(iter(differ.items()))
        text = f"{spec.name} adds factors row by row: the ranks of {name} are {' and '.join(map(str, found))}"
        problems.append(Problem("ranks_differ", text, "use sum or svd, which take parents of any ranks"))
    largest = max(adapter.max_rank for adapter in facts)
    if request.rank is not None and request.rank != largest:
        text = f"{spec.name} has the rank of its parents, {largest}, not {request.rank}"
        problems.append(Problem("fixed_rank", text, "leave --rank out"))
    return problems


def _rank_problems(request: MergeRequest) -> list[Problem]:
    problems = []
    if request.rank is not None and request.rank < 1:
        problems.append(Problem("bad_rank", f"rank {request.rank} is not a positive number", "try --rank 16"))
    if request.max_loss is not None and not 0 <= request.max_loss <= 1:
        problems.append(Problem("bad_max_loss", f"max-loss {request.max_loss} is not in 0..1", "try --max-loss 0.1"))
    return problems


def _option_problems(spec: MethodSpec, request: MergeRequest) -> list[Problem]:
    problems = []
    known = {option.name: option for option in spec.options}
    takes = f"{spec.name} takes {', '.join(known) or 'no options'}"
    for name, value in request.options.items():
        if name not in known:
            problems.append(Problem("unknown_option", f"{spec.name} has no option {name!r}", takes))
        elif not known[name].accepts(value):
            problems.append(
                Problem("bad_option", f"option {name} is {value!r}, expected {known[name].expected}", takes)
            )
    together = None if problems or spec.check is None else spec.check(_resolved(spec, request))
    problems += [together] if together else []
    if request.seed is not None and not spec.seeded:
        problems.append(Problem("no_seed", f"{spec.name} is not random and takes no seed", "leave --seed out"))
    return problems


def _dtype(asked: str | None, facts: Sequence[AdapterFacts], problems: list[Problem]) -> str:
    if asked is None:
        return output_dtype([dtype for adapter in facts for dtype in adapter.dtypes])
    dtype = _DTYPES.get(asked.lower())
    if dtype is None:
        problems.append(Problem("bad_dtype", f"dtype {asked!r} is unknown", "use bf16, f16, f32 or f64"))
        return ""
    return dtype


def _resolved(spec: MethodSpec, request: MergeRequest) -> dict[str, OptionValue]:
    return {option.name: _typed(option, request.options) for option in spec.options}


def _typed(option: OptionSpec, given: Mapping[str, OptionValue]) -> OptionValue:
    value = given.get(option.name, option.default)
    return float(value) if option.type == "float" else value


def _options(
    function: Callable[..., Any], keywords: Sequence[inspect.Parameter], docstring: str
) -> tuple[OptionSpec, ...]:
    hints = get_type_hints(function, include_extras=True)
    options = []
    for parameter in keywords:
        if parameter.name in _FIELDS_OF_THE_RECIPE:
            continue
        hint, choices, bounds = hints[parameter.name], (), None
        if get_origin(hint) is Literal:
            hint, choices = str, get_args(hint)
        elif get_origin(hint) is Annotated:
            hint, bounds = get_args(hint)
        kind = _OPTION_TYPES.get(hint)
        if kind is None or parameter.default is parameter.empty:
            raise TypeError(f"option {parameter.name} needs a default and one of the types float, int, str, bool")
        text = _argument_text(docstring, parameter.name)
        options.append(OptionSpec(parameter.name, kind, parameter.default, text, choices, bounds))
    return tuple(options)


def _argument_text(docstring: str, name: str) -> str:
    """What the `Args:` section says about `name`, joined to one line."""
    match = re.search(rf"^ +{name}: (.*(?:\n {{8,}}.*)*)", docstring, re.MULTILINE)
    return " ".join(match.group(1).split()) if match else ""
