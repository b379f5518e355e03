"""The built-in text: a sample of a Wikipedia dump that rides in gensim's wheel, stripped of its markup."""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bellbit.fetch import WIKIPEDIA_DUMP, cache_dir, fetch
from bellbit.files import write_text


def articles() -> list[str]:
    """The articles of the Wikipedia dump sample in gensim's wheel, as plain text; stripped once, then cached."""
    dump = fetch(WIKIPEDIA_DUMP)
    rules = hashlib.sha256(f"{WIKIPEDIA_DUMP.sha256} {_STRIPPING_RULES}".encode()).hexdigest()[:16]
    cached = cache_dir() / f"wiki-sample-{rules}.json"
    if cached.exists():
        found: list[str] = json.loads(cached.read_text(encoding="utf-8"))
        return found
    found = [f"{title}\n\n{text}" for title, source in _dump_pages(dump) if (text := plain_text(source))]
    write_text(cached, json.dumps(found))
    return found


def _dump_pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and wiki markup of every article of a MediaWiki dump, redirects left out."""
    with bz2.open(dump) as stream:
        for _, page in ElementTree.iterparse(stream):
            namespace, _, tag = page.tag.rpartition("}")
            if tag != "page":
                continue

            def find(name: str, page: ElementTree.Element = page, prefix: str = namespace + "}") -> str:
                return page.findtext("/".join(prefix + part for part in name.split("/"))) or ""

            if find("ns") == "0" and page.find(f"{namespace}}}redirect") is None:
                yield find("title"), find("revision/text")
            page.clear()


_STRIPPING_RULES = "no files, categories, language links, tables and references; runs of blank lines to one"


def plain_text(markup: str) -> str:
    """Wiki markup without markup, as `_STRIPPING_RULES` says."""
    import mwparserfromhell

    code = mwparserfromhell.parse(markup)
    for link in code.filter_wikilinks():
        if re.match(r"\s*(:?(File|Image|Category)|[a-z]{2,3}(-[a-z-]+)?):", str(link.title)):
            _remove(code, link)
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in {"ref", "table", "gallery"}):
        _remove(code, tag)
    lines = (line.strip() for line in code.strip_code().splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _remove(code: Any, node: Any) -> None:
    with contextlib.suppress(ValueError):  # it stood inside a node that is gone already
        code.remove(node)
