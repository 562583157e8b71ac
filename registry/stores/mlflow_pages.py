"""What people read in MLflow about a version: its description, its lineage page, its MLmodel file, names that MLflow
accepts.

Pure text. Addresses that begin with `adapters/` are those of our own pages: they lead somewhere where adapterctl serves
MLflow, and say so where it does not. Adapter names are safe by their grammar; everything else that a caller wrote
(datasets, reasons, base names, metric names, evaluation outputs) is escaped, because MLflow renders markdown.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from ..domain.version import AdapterVersion, Base, NewVersion
from ..ports import Parent

#: The module that `mlflow.pyfunc.load_model` imports by this name: of it we know the name only, for it knows torch.
LOADER = "adapterctl.mlflow_flavor"
#: The heat map of a merge, beside its receipt.
LAYERS_FILE = "layers.svg"
MAX_NEW_TOKENS = 64
#: What `predict` takes beside prompts: MLflow keeps everything from a model that its signature does not name. Without a
#: default of its own, so that the config of the model holds where a caller says nothing.
_PARAMS = '[{"name": "max_new_tokens", "default": null, "shape": null, "type": "long"}]'
#: On PostgreSQL; on SQLite MLflow does not enforce it.
MLFLOW_LIMIT = 5000
#: Leaves room for the children, a recall, and what people add.
DESCRIPTION_LIMIT = 3800
#: Characters of the line that lists children, and how many of them it names at most.
CHILDREN_LIMIT, CHILDREN_SHOWN = 800, 12
#: Numbers of a receipt that are shown beside the metrics of the caller.
HEADLINE = ("loss", "predicted_loss")

_RECALLED = "⛔ **Recalled.**"
_CHILDREN = "**Children** "
_CHILDREN_LINE = re.compile(rf"^{re.escape(_CHILDREN)}.*$", re.MULTILINE)
_ALT = "Lineage: the picture is drawn where `adapterctl serve` runs"
_PICTURE = re.compile(rf"\[!\[{re.escape(_ALT)}\]\(adapters/([^()/]*)[^()]*/lineage\.svg\)\]\(adapters/[^()]*\)")
_NOT_IN_A_KEY = re.compile(r"[^A-Za-z0-9_\-. /]+")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~])")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def describe(spec: NewVersion, parents: Sequence[Parent], number: int | None = None) -> str:
    """The description of a version: what it is in one phrase, its picture, its parents as links, its figures.

    The picture is drawn at every visit; it stands there once MLflow has given the version its number. Children follow
    later (`with_children`). The list of versions shows the first 30 characters as raw text, so the phrase stands first.
    """
    facts = [
        f"Base {escape(spec.base.name)}",
        f"rank {spec.facts.max_rank}",
        "/".join(spec.facts.dtypes),
        f"content `{spec.content_digest[:12]}`",
        *([f"dataset {escape(spec.dataset)}"] if spec.dataset else []),
        *([f"license {escape(spec.license)}"] if spec.license else []),
    ]
    lines = [
        _phrase(spec, parents),
        "",
        " · ".join(facts),
        *(["", picture(spec.adapter, number)] if number is not None else []),
        *_listed(
            "Parents", (_version_link(p) + ("" if p.weight is None else f" × {_number(p.weight)}") for p in parents)
        ),
        *_listed("Metrics", (f"{escape(key)}: {_number(value)}" for key, value in figures(spec).items())),
    ]
    return cut_to(lines, DESCRIPTION_LIMIT)


def with_recall(description: str, recalled: tuple[str, str] | None) -> str:
    """The description with a first line that says what was recalled and why; without such a line for None."""
    if description.startswith(_RECALLED):
        description = description.partition("\n\n")[2]
    if recalled is None:
        return description
    ref, reason = recalled
    line = f"{_RECALLED} Do not use it. {escape(ref)}: {escape(reason)}"
    room = MLFLOW_LIMIT - len(description) - 2
    # what people wrote themselves may leave no room: then the tag alone says it
    return f"{line[:room]}\n\n{description}" if room >= len(_RECALLED) else description


def describe_adapter(name: str, base: Base) -> str:
    """The description of a registered model."""
    return f"LoRA adapters on {escape(base.name)}, kept by adapterctl.\n\n{picture(name)}"


def with_children(description: str, version: AdapterVersion, children: Sequence[AdapterVersion], count: int) -> str:
    """The description with links to children, newest first: one line of its own, nothing else is touched.

    `count` is how many there are in all. Where what people wrote leaves no room, there is no line.
    """
    bare = _CHILDREN_LINE.sub("", description).rstrip()
    room = min(CHILDREN_LIMIT, MLFLOW_LIMIT - len(bare) - 2)
    below = f"[all {count}](adapters/{version.name}/v{version.number}?direction=down)"
    line = ""
    for shown in range(min(len(children), CHILDREN_SHOWN) + 1):
        links = [_link(each.label, f"models/{each.name}/versions/{each.number}") for each in children[:shown]]
        longer = _CHILDREN + " · ".join([*links, *([below] if count > shown else [])])
        if len(longer) > room:
            break
        line = longer
    if not children or not line:
        return bare
    old = _CHILDREN_LINE.search(description)
    return description[: old.start()] + line + description[old.end() :] if old else f"{bare}\n\n{line}"


def is_described(description: str, name: str, number: int | None = None) -> bool:
    """Whether a description still has our picture, that of a version or, without a number, of an adapter."""
    return picture(name, number) in description


def pictured_as(description: str) -> str:
    """The name of the adapter in our picture, which is a former one until a rename has come here; empty without one."""
    found = _PICTURE.search(description)
    return found[1] if found else ""


def with_ours(theirs: str, ours: str, link: str) -> str | None:
    """What a person wrote with `ours` below it, or `link` alone, our picture; None where there is room for neither.

    A picture that stands there under a former name is all that is replaced.
    """
    if _PICTURE.search(theirs):
        return _PICTURE.sub(lambda _: link, theirs)
    for text in (ours, link):
        both = f"{theirs.rstrip()}\n\n{text}".lstrip()
        if len(both) <= MLFLOW_LIMIT:
            return both
    return None


def with_name(text: str, former: str, name: str) -> str:
    """The text with the versions of an adapter, and our links to them, under its new name; too long, it stays."""
    if former in ("", name):
        return text
    word = re.escape(former)
    renamed = re.sub(rf"(?<![\w.-]){word}(?=:v\d)", name, text)
    renamed = re.sub(rf"(?<=\(#/models/){word}(?=/versions/)", name, renamed)
    renamed = re.sub(rf"(?<=\(adapters/){word}(?=[/)])", name, renamed)
    return renamed if len(renamed) <= MLFLOW_LIMIT else text


def lineage_page(
    spec: NewVersion, parents: Sequence[Parent], *, experiment_id: str, model_id: str, run_id: str, layers: bool
) -> str:
    """`lineage/lineage.md` of a source run; MLflow renders it, and its links stay in the same tab."""
    rows = (
        (
            _version_link(p),
            _number(p.weight),
            _link("files", f"experiments/{experiment_id}/models/{p.version.placement.model_id}"),
            _link(p.version.spec.kind, f"experiments/{experiment_id}/runs/{p.version.placement.run_id}"),
        )
        for p in parents
    )
    lines = [
        f"# {_phrase(spec, parents)}",
        "",
        f"Result: {_link(spec.adapter, f'experiments/{experiment_id}/models/{model_id}')},"
        f" content `{spec.content_digest}`",
        "",
        # no pictures: MLflow shows none in a file. By its content, for this page is older than the version's number.
        f"[Lineage as it is now](adapters/{spec.adapter}/@sha256:{spec.content_digest}), where `adapterctl serve` runs",
        *_section("Parents", ("parent", "weight", "model", "made by"), rows),
    ]
    if layers:
        where = f"experiments/{experiment_id}/runs/{run_id}/artifacts/{LAYERS_FILE}"
        lines += ["", _link("What was lost in each layer", where)]
    if spec.recipe_digest:
        lines += ["", f"Recipe `{spec.recipe_digest}`"]
    return "\n".join(lines) + "\n"


def lineage_record(spec: NewVersion, parents: Sequence[Parent], *, version_id: str) -> dict[str, Any]:
    """`lineage/lineage.json`: the same for programs, enough to rebuild the edges of this version from MLflow alone."""
    return {
        "version_id": version_id,
        "adapter": spec.adapter,
        "kind": spec.kind,
        "content_digest": spec.content_digest,
        "recipe_digest": spec.recipe_digest,
        "recipe": spec.recipe,
        "parents": [
            {
                "position": position,
                "version_id": p.version.id,
                "ref": p.version.label,
                "content_digest": p.version.spec.content_digest,
                "weight": p.weight,
                "model_id": p.version.placement.model_id,
            }
            for position, p in enumerate(parents)
        ],
    }


def mlmodel(spec: NewVersion, *, version_id: str, run_id: str, model_id: str, created_at: float) -> str:
    """The MLmodel file: lets `mlflow.pyfunc.load_model` and `mlflow.models.get_model_info` know an adapter."""
    return str(
        yaml.safe_dump(
            {
                "artifact_path": f"models:/{model_id}",
                "flavors": {
                    "peft": {
                        "data": ".",
                        "peft_type": "LORA",
                        "rank": spec.facts.max_rank,
                        "base_model_name_or_path": spec.base.name,
                        "base_model_revision": spec.base.revision,
                    },
                    "python_function": {
                        # a caller of load_model may change these, and no others
                        "config": {
                            "base_model": spec.base.name,
                            "base_revision": spec.base.revision,
                            "max_new_tokens": MAX_NEW_TOKENS,
                        },
                        "data": ".",
                        "loader_module": LOADER,
                        "python_version": platform.python_version(),
                    },
                },
                "metadata": {
                    "adapterctl": {
                        "version_id": version_id,
                        "content_digest": spec.content_digest,
                        "recipe_digest": spec.recipe_digest,
                    }
                },
                "model_id": model_id,
                "run_id": run_id,
                "signature": {"inputs": None, "outputs": None, "params": _PARAMS},
                "utc_time_created": datetime.fromtimestamp(created_at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
            },
            sort_keys=True,
        )
    )


def figures(spec: NewVersion) -> dict[str, float]:
    """The headline metrics of a version: the caller's own, and the loss that a receipt promises and measures."""
    receipt = {
        f"receipt/{key}": spec.receipt[key] for key in HEADLINE if spec.receipt and spec.receipt.get(key) is not None
    }
    return {mlflow_key(key): float(value) for key, value in {**spec.metrics, **receipt}.items()}


def outputs_page(title: str, outputs: Sequence[Mapping[str, Any]], *, limit: int = 200) -> str:
    """Side-by-side outputs of an evaluation as a markdown table, at most `limit` rows."""
    columns = list(dict.fromkeys(str(key) for row in outputs for key in row))
    rows = (tuple(escape(str(row.get(column, "")), limit=400) for column in columns) for row in outputs[:limit])
    lines = [f"# {escape(title)}", *_section("Outputs", tuple(escape(column) for column in columns), rows)]
    if len(outputs) > limit:
        lines += ["", f"{len(outputs) - limit} more are in outputs.json."]
    return "\n".join(lines) + "\n"


def mlflow_key(text: str) -> str:
    """`text` as a name that MLflow takes for a metric, parameter or tag: `chrf,none` becomes `chrf_none`."""
    parts = [part for part in _NOT_IN_A_KEY.sub("_", text).split("/") if part.strip(". ")]
    return "/".join(parts)[:250] or "_"


def escape(text: str, *, limit: int = 200) -> str:
    """`text` on one line, as text: no markdown, no HTML, no control characters, at most `limit` characters of it."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return _MARKDOWN.sub(r"\\\1", line.translate(_HTML))


def cut_to(lines: Sequence[str], limit: int) -> str:
    """The lines from the top that fit, and a last one that says where the others are."""
    text = "\n".join(lines)
    if len(text) <= limit:
        return text
    note = "\n\nMore on the page of the source run."
    kept, size = [], len(note)
    for line in lines:
        size += len(line) + 1
        if size > limit:
            break
        kept.append(line)
    return "\n".join(kept) + note


def _phrase(spec: NewVersion, parents: Sequence[Parent]) -> str:
    names = [p.version.label for p in parents[:8]] + ([f"{len(parents) - 8} more"] if len(parents) > 8 else [])
    if spec.kind == "merge":
        return f"{(spec.recipe or {}).get('method', 'unknown')} merge of {' + '.join(names)}."
    if names and all(p.kind == "imported" for p in parents):
        return f"Imported, made of {' + '.join(names)}."
    if names:
        return f"Trained from {' + '.join(names)}."
    origin = f" from {escape(spec.source)}" if spec.source else ""
    return f"{'Trained' if spec.kind == 'train' else 'Imported'}{origin}."


def picture(name: str, number: int | None = None) -> str:
    """The lineage as it is when somebody looks, drawn by our server; it leads to the page to look around in."""
    page = f"adapters/{name}" if number is None else f"adapters/{name}/v{number}"
    return f"[![{_ALT}]({page}/lineage.svg)]({page})"


def _listed(title: str, items: Iterator[str]) -> list[str]:
    """Items under their title. The page of a version draws a table without any room between its columns."""
    lines = [f"- {item}" for item in items]
    return ["", f"**{title}**", "", *lines] if lines else []


def _section(title: str, columns: Sequence[str], rows: Iterator[tuple[str, ...]]) -> list[str]:
    """A table under its title; nothing at all where there are no rows."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return ["", f"**{title}**", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *body] if body else []


def _version_link(parent: Parent) -> str:
    return _link(parent.version.label, f"models/{parent.version.name}/versions/{parent.version.number}")


def _link(text: str, page: str) -> str:
    return f"[{text}](#/{page})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
