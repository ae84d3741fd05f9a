"""Captions into words, as the Penn Treebank splits English; it gives the strings that caption metrics are computed on.

tokenize    captions to lower-case words, joined by single spaces, without punctuation

The reference is pycocoevalcap 1.2's PTBTokenizer: Stanford's Java tokenizer with -preserveLines -lowerCase, and a
filter over its output. The rules here are our own, found by watching it; as there, the longest match wins.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain

# Punctuation that the reference drops, where it is a word of its own. It lists brackets too, in capitals that the
# lower-cased text never has: "-lrb-" stays a word. Runs such as "!!!" or "?!" are not listed and stay.
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

# Single characters that come out as others. Euro to dollar and pound to "#" are the Treebank's 7-bit habits.
SPELLED = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "¢": "cents",
    "£": "#",
    "¤": "$",
    "₠": "$",
    "€": "$",
    "¼": "1/4",
    "½": "1/2",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    "…": "...",
    "–": "--",
    "—": "--",
    "―": "--",
    **dict.fromkeys('"“”«»', "''"),
    **dict.fromkeys("‘’‛‹›", "'"),
}
# Symbols that are kept, beyond ASCII; emoji and whatever else nothing below matches vanish.
SYMBOLS = (
    "\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7\u02c2-\u02c5\u02d2-\u02df\u037e\u0384"
    "\u0385\u0387\u060c\u061b\u061f\u066a\u066d\u06d4\u0964\u0965\u0e3f\u2013-\u2023\u2026\u2030-\u203b\u203e-\u2042\u2044"
    "\u2070\u2074-\u207e\u2080-\u208e\u20a0\u20a4\u20ac\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118"
    "\u211e-\u2123\u2125\u2127\u2129\u212e\u2140-\u2144\u2153-\u215e\u2190-\u2426\u2440-\u244a\u2460-\u2b73\u2b76-\u2b95"
    "\u2b97-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)

# Abbreviations whose period belongs to them, in any case; CAPITALISED ones only when they do not start in lower case.
ABBREVIATIONS = (
    "adm al ala alex apr ariz assn assoc asst atty aug ave bancorp bhd bldg blvd brig bros calif capt cf cmdr "
    "co col colo conn corp cos cpl ct dec dept det dr ens esq est etc ext feb fla fri ft ga gen gov govs hon "
    "inc ind insp intl invt jan jos jr jul jun kan kans ky lt ltd maj mar md messrs mfg mich minn mlle mme mo "
    "mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc pres prof profs pty pvt rd rep reps "
    "rev rt sen sens sep sept sgt spc sq sr st ste supt tel tenn thu thurs treas tue tues univ va vs vt wed "
    "wis wisc wm wyo"
)
CAPITALISED = "ark del ill la mass miss ore pa tex wash"
BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"

# Without one of these no rule reaches over a space: what stands between spaces can be read, and remembered, by itself.
SPANNING = re.compile(r"[\d<]|\.\s\.")
REMEMBERED = 1 << 16  # texts; captions use few words, time and again

Spelling = Callable[[str], str]


def tokenize(captions: Sequence[str]) -> list[str]:
    """Split each caption into lower-case words joined by single spaces; punctuation is dropped, in order, one for one.

    Quirk of the reference not kept: CR, VT, FF, U+2028 and U+2029 (LF alone is protected) end a line there, so a
    caption that holds one becomes two and every later caption is scored against another image. Here they are spaces.
    Words are the reference's on ordinary English; rare ones differ: "127.0.0.1" after numbers, "s'mores", new scripts.
    A word may hold a no-break space ("1 1/2", "555 555 5555" are one word each), as the reference's do.
    """
    words = [
        chain.from_iterable(map(_words, [caption] if SPANNING.search(caption) else caption.split()))
        for caption in captions
    ]
    return [" ".join(found) for found in words]


@lru_cache(maxsize=REMEMBERED)
def _words(text: str) -> tuple[str, ...]:
    """The words of a text, in which the longest match of a rule wins, time and again."""
    words: list[str] = []
    at = 0
    while at < len(text):
        best, end = 0, at
        spelling: Spelling = str
        for pattern, spell in _rules():
            found = pattern.match(text, at)
            if found and found.end() - at > best:
                best, spelling = found.end() - at, spell
                end = found.end(found.lastindex or 0)
        if not best:  # space, or a character that the reference drops
            at += 1
            continue
        word = spelling(text[at:end]).lower()
        words += [part for part in word.split(" ") if part and part not in PUNCTUATION]
        at = end
    return tuple(words)


@lru_cache(maxsize=1)
def _letter() -> str:
    """The inside of a character class: letters and the marks upon them in the basic plane, and the soft hyphen."""
    ranges: list[list[int]] = []
    for code in range(0xAA, 0x10000):
        # Variation selectors are marks to Unicode, but come with emoji and vanish with them.
        if unicodedata.category(chr(code))[0] in "LM" and not 0xFE00 <= code <= 0xFE0F and code != 0x20E3:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "A-Za-z\\u00ad" + "".join(f"\\u{low:04x}-\\u{high:04x}" for low, high in ranges)


@lru_cache(maxsize=1)
def _rules() -> list[tuple[re.Pattern[str], Spelling]]:
    """Patterns and how their matches are written. The longest match wins; of two as long, the earlier.

    Where a pattern has a group, the group alone is the word: what follows it counts for the length and is read again.
    """
    letter, alnum = f"[{_letter()}]", f"[{_letter()}\\d]"
    apostrophe = "['’]"
    word = f"{letter}{alnum}*(?:[.!?]{letter}{alnum}*)*"  # "hello.world" and "Hi!Bye" are one
    number = r"(?:\d*(?:[.:,]\d+)+|\d+)"
    initials = r"[A-Za-z](?:\.[A-Za-z])+\.?"
    joint = f"(?:[-_‐‑](?:{initials}|{alnum}+))"
    names = ABBREVIATIONS.replace(" ", "|")
    capitals = "|".join(f"{name.title()}|{name.upper()}" for name in CAPITALISED.split())
    closing = r"[^\s\"<>|(){}.!?,;:'’-]"  # what an address may end in
    rules: list[tuple[str, Spelling]] = [
        # cannot, more'n: the first half here, the second when it is read for itself.
        (f"(?i:(can)not|(gon)na|(got)ta|(wan)na|(lem)me|(gim)me|(more){apostrophe}n)(?!{alnum})", str),
        # Words, numbers, and both joined by hyphens, low lines and slashes.
        (f"{word}|{alnum}+", _bare),
        (f"[-+]?{number}", str),
        (f"(?:{initials}|\\d+(?:[.,]\\d+)*|{alnum}+){joint}+", _bare),
        (f"{alnum}+(?:/{alnum}+)+(?:-{alnum}+)*|{alnum}+(?:-{alnum}+)+/{alnum}+", _bare),
        # "1 1/2" and telephone numbers are one word, over their spaces.
        (r"\d{1,4}[- \u00a0]\d{1,4}/\d{1,4}", _hard_spaces),
        (
            r"(?:\+\d{1,3}[ \u00a0.-]?)?(?:\(\d{2,3}\)[ \u00a0]?|\d{2,4}[ \u00a0.-])\d{3,4}[ \u00a0.-]\d{3,5}",
            _hard_spaces,
        ),
        (r"\(\d{3}\)[ \u00a0]?\d{3}[- \u00a0.]\d{4}", _hard_spaces),
        # don't, 'twas, y'all: the same.
        (f"({letter}*(?![nN]){letter})[nN]['’‘`][tT](?!{alnum})", _bare),
        (f"[nN]['’‘`][tT](?!{alnum})|{apostrophe}(?i:ll|re|ve|[smd])(?!{alnum})", _straight),
        (f"('[tT])(?i:is|was)(?:[nN]'[tT])?(?!{letter})", str),
        (f"([yY]{apostrophe}){letter}+|([jJ]{apostrophe})ai", _straight),
        (f"{apostrophe}[nN](?!{letter})", _straight),
        # Apostrophes inside a word, or at an end of it.
        (
            f"(?:[A-HJ-XZnlLdD]|(?i:o(?=(?:neil|clock))|xi|ma|c|o|e|ne)){apostrophe}{letter}{{2,}}|(?i:hawai{apostrophe}i)",
            str,
        ),
        (
            f"(?i:(?:dunkin|somethin|ol){apostrophe}|{apostrophe}(?:em|til|cause))(?!{letter})|{apostrophe}[nN]{apostrophe}",
            _straight,
        ),
        (f"(?<!\\d){apostrophe}\\d\\d[sS]?(?!{alnum}|{apostrophe})", str),
        # Periods that belong to a word.
        (f"(?i:ph\\.d)\\.|{initials}|[A-Za-z]\\.|(?:(?i:{names})|{capitals})\\.", str),
        (f"((?i:{BEFORE_NUMBERS.replace(' ', '|')})\\.)[ \u00a0]?\\d", str),
        # Addresses, tags, entities, faces.
        (f'(?i:https?)://[^\\s"<>|(){{}}]*{closing}', str),
        (f'(?:[^\\s"`\'<>|./(),@]+\\.)+(?i:com|net|org|edu)(?:/[^\\s"<>|()]*{closing})?(?!{alnum})', str),
        (r"[A-Za-z0-9][A-Za-z0-9_.+-]*@(?:[A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]+", str),
        (f"@[A-Za-z_][A-Za-z_0-9]*|#{letter}+", str),
        (r"""</?[A-Za-z_][\w:.-]*(?:\s+[\w:.-]+(?:\s*=\s*(?:"[^"]*"|'[^']*'))?)*\s*/?>|<!--[^>]*-->""", _hard_spaces),
        ("&(?:amp|lt|gt|quot|apos|nbsp);", lambda text: {"&amp;": "&", "&lt;": "<", "&gt;": ">"}.get(text, "")),
        (r"&#\d+;|\^_\^|-_-|-(?i:[lr][rsc]b)-", str),
        (r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z0-9])", _hard_spaces),
        (r"[A-Z]+(?:&[A-Z]+)+|[Cc]\+\+|[CcFf]#|(?:US|HK|NZ|[ACRSM])\$", str),
        # Punctuation and symbols. Three or four hyphens are a dash; more stay as they are.
        (r"\.{3,5}|\.(?:[ \u00a0]\.){2,4}", lambda _: "..."),
        (r"[!?]+|\*+|_+|<<|>>|-{5,}|''|``", str),
        ("-{2,4}", lambda _: "--"),
        (f"[!-/:-@\\[-`{{-~{SYMBOLS}]", lambda text: SPELLED.get(text, text)),
    ]
    return [(re.compile(pattern), spell) for pattern, spell in rules]


def _bare(text: str) -> str:
    """Soft hyphens are a typesetter's, and no part of the word."""
    return text.replace("\u00ad", "")


def _straight(text: str) -> str:
    """The apostrophe of a split word is written in ASCII."""
    return text.replace("’", "'").replace("‘", "`")


def _hard_spaces(text: str) -> str:
    """A word over spaces keeps them as no-break spaces; its brackets are spelled."""
    return "".join(SPELLED[c] if c in "()" else c for c in re.sub(r"\s", "\u00a0", text))
