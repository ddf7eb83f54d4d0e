"""THE table of names: what each store keeps exactly, and what is refused before the first byte. The tests and the page
``docs/names.md`` are made from it; run this file to write the page anew."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint_operator.api.uris import Scheme

PAGE = Path(__file__).resolve().parents[2] / "docs" / "names.md"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"


@dataclass(frozen=True)
class Name:
    """A file of a source. ``refused`` says by which store, and why; whoever is not there keeps it exactly.

    ``key_bytes`` makes a name whose key, prefix included, has that many bytes; ``path`` is only an example then.
    """

    what: str
    path: str
    refused: Mapping[Scheme, str] = field(default_factory=dict)
    key_bytes: int | None = None

    def below(self, prefix: str) -> str:
        """The path of the file below a prefix."""
        return self.path if self.key_bytes is None else _fill(self.key_bytes - len(prefix.encode()))


def _fill(size: int) -> str:
    """A path of exactly that many bytes, of segments that every file system takes."""
    segments = ["d" * 200] * ((size - 1) // 201)
    return "/".join([*segments, "f" * (size - 201 * len(segments))])


def everywhere(why: str) -> dict[Scheme, str]:
    return dict.fromkeys(Scheme, why)


CONTROL = everywhere("a control character")
BUCKETS = (Scheme.S3, Scheme.GS, Scheme.AZURE)
DOT = {Scheme.AZURE: "Azure drops dots at the end of a segment"}
UNKNOWN = {Scheme.AZURE: "a character that Azure does not take"}

TABLE: list[Name] = [
    Name("letters", "plain.bin"),
    Name("hidden", ".hidden"),
    Name("a space within", "with space"),
    Name("a space at the front", " leading"),
    Name("a space at the end", "trailing "),
    Name("a folder with spaces at both ends", " both /inside"),
    Name("a plus, which some decoders make a space", "a+b"),
    Name("a percent-encoded space", "100%20percent"),
    Name("a percent-encoded slash", "a%2Fb"),
    Name("a percent sign alone", "50%"),
    Name("a hash", "hash#tag"),
    Name("a question mark", "what?"),
    Name("what looks like a query", "a?versionId=1&x=y"),
    Name("quotes and brackets", "quote'\"&<>[]{}^`|"),
    Name("punctuation of URIs", "a:b;c,d$e!f(g)*h~i@j=k"),
    Name("what looks like an option", "-rf"),
    Name("what a shell would run", "$(touch x)`y`"),
    Name("a device of Windows", "CON.txt"),
    Name("upper case", "Case"),
    Name("lower case, beside it", "case"),
    Name("composed (NFC)", unicodedata.normalize("NFC", "é")),
    Name("decomposed (NFD), beside it", unicodedata.normalize("NFD", "é")),
    Name("Japanese", "日本語.json"),
    Name("beyond the basic plane", "🔥.bin"),
    Name("right to left", "שלום.bin"),
    Name("an invisible character", "a\u200bb"),
    Name("a line separator of Unicode", "a\u2028b"),
    Name("folders", "deep/er/and/deeper/file"),
    Name("nearly a marker", "deep/.metadata.jsonl"),
    Name("255 bytes of letters", "n" * 255),
    Name("255 bytes in 85 characters", "語" * 85),
    Name("three dots at the front", "...three"),
    Name("a dot at the end", "trailing.", DOT),
    Name("a folder with a dot at the end", "folder./inside", DOT),
    Name("dots alone", "...", DOT),
    Name("a control character above ASCII", "a\x85b", UNKNOWN),
    Name("a character of private use", "a\ue000b", UNKNOWN),
    Name("a noncharacter of Unicode", "a\uffffb", {**UNKNOWN, Scheme.S3: "a character that no list in XML can name"}),
    Name("a key of 1,024 bytes", "1,024 bytes", key_bytes=1024),
    Name(
        "a key of 1,025 bytes",
        "1,025 bytes",
        {Scheme.S3: "more than 1,024 bytes", Scheme.GS: "more than 1,024 bytes", Scheme.AZURE: "more than 1,024 characters"},
        key_bytes=1025,
    ),
    Name("a backslash", "back\\slash", everywhere("a backslash: some stores make it a slash")),
    Name("a newline", "new\nline", CONTROL),
    Name("a carriage return", "carriage\rreturn", CONTROL),
    Name("a tab", "tab\there", CONTROL),
    Name("a delete character", "delete\x7f", CONTROL),
    Name("bytes that are not UTF-8", "latin-\udce9", everywhere("no UTF-8")),
    Name("the marker of another checkpoint", "sub/.metadata.json", everywhere("a reserved name")),
    Name("a folder with the marker's name", ".metadata.json/inside", everywhere("a reserved name")),
    Name("the marker of a deletion", ".metadata.deleting.json", everywhere("a reserved name")),
    Name("a probe", ".probe-x", everywhere("a reserved name")),
]

PLACES: dict[str, str] = {
    "spaces": "with space/ and another ",
    "a plus": "a+b",
    "a percent-encoded slash": "a%2Fb",
    "composed": unicodedata.normalize("NFC", "é/run"),
    "decomposed, beside it": unicodedata.normalize("NFD", "é/run"),
    "fire": "🔥/run",
    "punctuation": "tags=a&b;c,d$e!f'g(h)*i~j",
    "a port and a host": "user@host/10:30",
    "hidden": ".hidden/..two/...three",
    "a segment of 255 bytes": "n" * 255,
}
"""Places (what stands behind ``base/``) that every store keeps exactly. What no URI may be is in tests/unit/uri_cases.py."""


def shown(text: str) -> str:
    """A name in a cell of a table: what cannot be seen is escaped."""
    if len(text) > 60:
        text = f"{text[:3]}…"
    seen = "".join(
        char if char.isprintable() and not unicodedata.combining(char) else ascii(char)[1:-1] for char in text
    ).replace("|", "\\|")
    return f"`` {seen} ``" if "`" in seen else f"`{seen}`"


def rows() -> Iterator[str]:
    yield "| a name with | for example | " + " | ".join(f"`{scheme}://`" for scheme in Scheme) + " |\n"
    yield "|---|---" + "|---" * len(Scheme) + "|\n"
    for name in TABLE:
        verdicts = [f"refused: {name.refused[scheme]}" if scheme in name.refused else "kept" for scheme in Scheme]
        example = name.path if name.key_bytes else shown(name.path)
        yield f"| {name.what} | {example} | " + " | ".join(verdicts) + " |\n"


def page(before: str) -> str:
    """The page with its table as it should be."""
    head, _, rest = before.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + "".join(rows()) + END + tail


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
