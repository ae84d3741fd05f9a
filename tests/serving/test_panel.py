"""What the page shows of anybody's text: all of it, and none of its markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import gradio as gr
from hypothesis import given
from hypothesis import strategies as st

from qwenvl.draw import COLOURS, colours
from qwenvl.serving.panel import bubble, escaped, overlay, text_of
from qwenvl.serving.rounds import Round, messages_of, rounds_of
from qwenvl.serving.wording import CHINESE, ENGLISH
from qwenvl.text.boxes import parse_spans, strip_tags

# Replies as a model could write them: tags in any order, cut off, with markup and templates between them.
PIECES = (
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "(1,2)", "(3,4),(500,600)", "(7", "，", "（９，９）"),
    *("dog", "the 猫", " ", "\n", "&", "&lt;", "&amp;amp;", "<", ">", "'", '"', "<b>", "<script>alert(1)</script>"),
    *("<img src=x onerror=alert(1)>", "${1+1}", "{{2}}", "</div>", "<!--", "]]>", "javascript:", "style='x'", "\u202e"),
)
soups = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=30).map("".join)


class Elements(HTMLParser):
    """What a piece of HTML consists of."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.others: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element with its attributes."""
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        """Text."""
        self.text += data

    def handle_comment(self, data: str) -> None:
        """Nothing of ours."""
        self.others.append(data)

    def handle_decl(self, decl: str) -> None:
        """Nothing of ours."""
        self.others.append(decl)

    def unknown_decl(self, data: str) -> None:
        """Nothing of ours."""
        self.others.append(data)

    def handle_pi(self, data: str) -> None:
        """Nothing of ours."""
        self.others.append(data)


@given(soups)
def test_a_bubble_is_the_reply_and_no_markup_of_it(reply: str) -> None:
    """Its characters are the reply's, exactly; its elements are ours."""
    shown = bubble(reply)
    assert text_of(shown) == reply
    found = Elements(shown)
    assert set(found.tags) <= {"span", "mark"}
    assert {(name, bool(re.fullmatch(r"tag|(unnamed )?c\d+", value or ""))) for _, name, value in found.attributes} <= {
        ("class", True)
    }
    assert not found.others


@given(soups)
def test_an_overlay_has_no_markup_of_a_reply(reply: str) -> None:
    """Whatever the phrases say, elements, addresses and styles are ours, and no placeholder of a template is left."""
    shown = overlay("gradio_api/file=/a%20b.png", (640, 448), reply, ENGLISH)
    found = Elements(shown)
    assert set(found.tags) <= {"div", "img", "input", "label", "span", "svg", "polygon", "p"}
    assert {name for _, name, _ in found.attributes} <= {
        *("class", "style", "src", "alt", "type", "id", "checked", "for", "dir"),
        *("viewbox", "preserveaspectratio", "aria-hidden", "points"),
    }
    assert [value for _, name, value in found.attributes if name == "src"] == ["gradio_api/file=/a%20b.png"]
    styles = (value or "" for _, name, value in found.attributes if name == "style")
    assert all(re.fullmatch(r"[-a-z: ;,()#0-9.%]+", style) for style in styles)
    assert not found.others
    assert not re.search(r"[${}]", shown)
    assert found.tags.count("input") == len({region.label for region in parse_spans(reply)})


def test_phrases_have_the_colours_of_their_boxes() -> None:
    """In the bubble, in the legend and on the picture to download alike; each phrase once."""
    reply = "<ref>a dog</ref><box>(0,0),(500,500)</box><box>(1,1),(2,2)</box> and <ref>a <cat></ref>"
    reply += "<quad>(0,0),(900,0),(900,900),(0,900)</quad><box>(5,5),(6,6)</box> <ref>nothing</ref>"
    shown = bubble(reply)
    assert "<mark class='c0'>a dog</mark>" in shown
    assert "<mark class='c1'>a &lt;cat&gt;</mark>" in shown
    assert "<mark>nothing</mark>" in shown
    legend = overlay("x", (200, 100), reply, ENGLISH)
    assert re.findall(r"--phrase: rgb\(([^)]*)\)", legend) == [", ".join(map(str, COLOURS[i])) for i in (0, 1)]
    assert list(colours(region.label for region in parse_spans(reply))) == ["a dog", "a <cat>"]
    assert "points='0.0,0.0 100.0,0.0 100.0,50.0 0.0,50.0'" in legend
    assert "points='0.0,0.0 180.0,0.0 180.0,90.0 0.0,90.0'" in legend
    assert "a dog<span class='times'>× 2</span>" in legend


def test_boxes_without_a_phrase_can_be_seen_and_switched() -> None:
    """A box that nothing names has a mark in the bubble and a name in the legend, in the page's language."""
    reply = "<box>(1,2),(3,4)</box>"
    assert "<mark class='unnamed c0'></mark>" in bubble(reply)
    assert text_of(bubble(reply)) == reply
    assert CHINESE.unnamed in overlay("x", (10, 10), reply, CHINESE)


def test_a_cut_off_reply_shows_no_coordinates() -> None:
    """While a box is being written, its beginning stays hidden, and the words are what `strip_tags` leaves."""
    whole = "<ref>dog</ref><box>(10,20),(30,40)</box> runs, <ref>cat</ref><box>(1,2),(3,4)</box>"
    for end in range(len(whole)):
        if re.search(r"<[^>]*$", whole[:end]):  # tags come whole
            continue
        visible = re.sub(r"<span class='tag'>[^<]*</span>", "", bubble(whole[:end]))
        assert text_of(visible).strip() == strip_tags(whole[:end])


def test_escaping_leaves_what_people_edit_readable() -> None:
    """Quotes are not touched, as an edited message shows its own source."""
    assert escaped('it\'s "<b>" & so') == 'it\'s "&lt;b&gt;" &amp; so'


def test_rounds_come_back_as_they_went() -> None:
    """Through Gradio's own forms: texts as they were written, pictures with their question, replies with their tags."""
    rounds = [
        Round(("/a.png", "/b.png"), "  <b>&lt; $ & ![](x)\n  two ", "<ref>the <dog></ref><box>(1,2),(3,4)</box>"),
        Round((), "again", ""),
        Round(("/c.png",), "", "a"),
        Round((), "no reply"),
        Round((), "the last"),
    ]
    chat = gr.Chatbot(render=False)
    sent = chat.preprocess(chat.postprocess(messages_of(rounds)))
    assert rounds_of(sent) == rounds
    assert all(len(message["content"]) == 1 for message in sent)  # others cannot be edited


@given(soups)
def test_a_message_comes_back_as_it_went(text: str) -> None:
    """Text of any kind; an empty one is none."""
    assert rounds_of(messages_of([Round((), text, text)]) or [])[:1] == ([Round((), text, text)] if text else [])
