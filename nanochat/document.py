"""A report as data: sections of text, facts, tables, code and plots; written as Markdown and HTML.

The HTML is one self-contained file: style and plots are in it, nothing is loaded from anywhere.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined

from nanochat.plots import Plot


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values; `is_headline` shows them large."""

    items: Sequence[tuple[str, str]]
    is_headline: bool = False


@dataclass(frozen=True)
class Table:
    """Cells are text already; columns named in `left` are aligned to the left, others right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)


@dataclass(frozen=True)
class Code:
    """Text to be shown as it is."""

    text: str
    caption: str = ""


Block = Paragraph | Facts | Table | Code | Plot


@dataclass
class Section:
    """A titled part; `is_detail` is folded in the HTML."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    is_detail: bool = False

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass
class Document:
    """A whole report. `notice` is a sentence that must not be overlooked."""

    title: str
    subtitle: str
    sections: list[Section]
    notice: str = ""


def to_html(document: Document) -> str:
    """One self-contained page."""
    environment = Environment(
        loader=PackageLoader("nanochat", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(document=document, kind=lambda block: type(block).__name__)


def to_markdown(document: Document, plot_folder: str) -> str:
    """GitHub's Markdown; the plots are the PNG files in `plot_folder`, relative to the text."""
    parts = [f"# {_escape(document.title)}", _escape(document.subtitle)]
    if document.notice:
        parts.append(f"> **{_escape(document.notice)}**")
    for section in document.sections:
        parts.append(f"## {section.title}")
        parts += [_block_to_markdown(block, plot_folder) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block_to_markdown(block: Block, plot_folder: str) -> str:
    if isinstance(block, Paragraph):
        return _escape(block.text)
    if isinstance(block, Facts):
        return table_to_markdown(Table(("", ""), block.items, left=(0, 1)))
    if isinstance(block, Table):
        return table_to_markdown(block)
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max((len(m) for m in re.findall("`+", block.text)), default=0))
        caption = f"{_escape(block.caption)}\n\n" if block.caption else ""
        return f"{caption}{fence}\n{block.text}\n{fence}"
    return (
        f"### {block.title}\n\n![{block.title}]({plot_folder}/{block.name}.png)\n\n{block.caption}"
    )


def table_to_markdown(table: Table) -> str:
    """A pipe table."""
    rules = [":--" if i in table.left else "--:" for i in range(len(table.headers))]
    rows = [table.headers, rules, *([_escape(c) for c in row] for row in table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _escape(text: str) -> str:
    """Plain text as Markdown shows it: no tag, no column, no emphasis by accident."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text).replace("\n", " ")
