# SPDX-License-Identifier: Apache-2.0
"""Pieces of HTML that the sections of the page are made of."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

import numpy as np
from PIL import Image


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, style: str = "") -> str:
    """A table of cells that are HTML already: numbers, or with ``style="text"`` words.

    Headings ``"group: heading"`` of one group in a row stand under it.
    """
    head = "".join(f"<th>{escape(name.rpartition(': ')[2])}</th>" for name in header)
    groups = [(name, len(list(same))) for name, same in groupby(header, _group)]
    above = "".join(f'<th colspan="{span}">{escape(name)}</th>' for name, span in groups)
    above = f'<tr class="groups">{above}</tr>' if any(name for name, _ in groups) else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{style}"><thead>{above}<tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _group(heading: str) -> str:
    return heading.rpartition(": ")[0]


def mean(parts: Sequence[str]) -> str:
    """A mean, and its deviation under it."""
    return "<br>".join([parts[0], *(f"<small>± {part}</small>" for part in parts[1:])])


def figure(title: str, content: str, note: str = "", *, style: str = "") -> str:
    """A picture under its title."""
    note = f" {escape(note)}" if note else ""
    return (
        f'<figure class="{style}"><figcaption><b>{escape(title)}</b>{note}</figcaption>'
        f"{content}</figure>"
    )


def figures(content: Iterable[str], *, style: str = "") -> str:
    """Figures side by side."""
    return f'<div class="charts {style}">{"".join(content)}</div>'


def legend(names: Iterable[tuple[str, str]]) -> str:
    """Names beside their colours, from (class, name)."""
    keys = "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in names)
    return f'<div class="legend">{keys}</div>'


def folded(title: str, content: str) -> str:
    """What opens on demand, and is open on paper."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def settings(values: dict[str, object]) -> str:
    """Names and values, those without a value left out."""
    items = "".join(
        f"<li><code>{escape(key)}</code> {escape(shown(value))}</li>"
        for key, value in values.items()
        if value is not None
    )
    return f'<ul class="settings">{items}</ul>'


def shown(value: object) -> str:
    """A setting as a person writes it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def short(value: object) -> str:
    """The same, of long ones the end."""
    text = shown(value)
    return text if len(text) <= 24 else f"…{text[-23:]}"


def image(pixels: np.ndarray, alt: str) -> str:
    """An image (H, W, C) uint8, inline."""
    channels = pixels.shape[-1]
    picture = Image.fromarray(pixels[..., :3] if channels > 2 else pixels[..., 0])
    content = io.BytesIO()
    picture.save(content, format="png")
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
