"""The web page's components: where they are, what they say in each language, what can be pressed when.

Desk      the components, made within a page
STYLE     rules for the classes that `panel.bubble` gives to phrases
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from ..config import SamplingOptions
from ..draw import COLOURS
from .examples import EXAMPLES
from .panel import nothing, quoted
from .service import Service
from .wording import WORDINGS, Wording

FIRST = "en"  # the language that a page opens in
STYLE = "\n".join(f"#chat mark.c{i} {{ --phrase: rgb({r}, {g}, {b}); }}" for i, (r, g, b) in enumerate(COLOURS))

Updates: TypeAlias = dict[Any, Any]  # component -> what becomes of it


class Desk:
    """The components. They keep nothing: their values are in the browser, and come with each click."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.words = WORDINGS[FIRST]
        with gr.Row(elem_id="head"):
            self.head = gr.HTML(self._head(self.words))
            languages = [(words.name, code) for code, words in WORDINGS.items()]
            self.language = gr.Radio(
                languages, value=FIRST, label=self.words.language, show_label=False, container=False, elem_id="language"
            )
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=3, min_width=320):
                self._lay_chat()
                self._lay_examples()
            with gr.Column(scale=2, min_width=320):
                self._lay_picture()
                self._lay_settings()

    # ---- where they are

    def _lay_chat(self) -> None:
        words = self.words
        self.chat = gr.Chatbot(
            label=words.chat,
            show_label=False,
            placeholder=words.empty_chat,
            height="50vh",
            editable="user",
            buttons=[],
            feedback_options=None,
            latex_delimiters=[],
            render_markdown=False,  # markdown would make links and pictures of what models and users write
            group_consecutive_messages=False,  # those of a group that holds a picture cannot be edited
            elem_id="chat",
        )
        self.box = gr.MultimodalTextbox(
            placeholder=words.type_here,
            show_label=False,
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            submit_btn=words.send,
            max_plain_text_length=1_000_000,  # longer texts are pasted as files
            elem_id="box",
        )
        with gr.Row(elem_id="turns"):
            self.again = gr.Button(words.regenerate, size="sm", min_width=60, elem_id="again")
            self.undo = gr.Button(words.undo, size="sm", min_width=60, elem_id="undo")
            self.clear = gr.Button(words.clear, size="sm", min_width=60, elem_id="clear")

    def _lay_examples(self) -> None:
        self.examples_title = gr.Markdown(f"## {self.words.examples}", elem_id="examples-title")
        self.examples: list[gr.Button] = []
        self.example_files: list[list[str]] = []
        folder = get_upload_folder()
        with gr.Row(elem_id="examples"):
            for number, example in enumerate(EXAMPLES):
                icon = save_pil_to_cache(example.icon, folder, "icon", "png")
                files = [save_pil_to_cache(picture, folder, "example", "png") for picture in example.pictures]
                button = gr.Button(example.questions[FIRST], icon=icon, size="sm", elem_id=f"example-{number}")
                button.keep_in_cache.update([icon, *files])
                self.examples.append(button)
                self.example_files.append(files)

    def _lay_picture(self) -> None:
        self.picture_title = gr.Markdown(f"## {self.words.picture}", elem_id="picture-title")
        self.picture = gr.HTML(nothing(self.words), elem_id="picture")
        self.download = gr.DownloadButton(self.words.download, visible=False, size="md", elem_id="download")

    def _lay_settings(self) -> None:
        words, config = self.words, self.service.pipeline.generation_config
        most = self.service.engine.max_length
        with gr.Accordion(words.settings, open=False, elem_id="settings") as self.settings:
            self.way = gr.Radio(_ways(words), value="sampled" if config.do_sample else "greedy", label=words.way)
            self.temperature = gr.Slider(0.05, 2, config.temperature, step=0.05, label=words.temperature)
            self.top_p = gr.Slider(0, 1, config.top_p, step=0.01, label=words.top_p)
            self.top_k = gr.Number(config.top_k, precision=0, label=words.top_k)
            self.penalty = gr.Slider(1, 2, config.repetition_penalty, step=0.01, label=words.penalty)
            self.longest = gr.Slider(1, most, min(config.max_new_tokens, most), step=1, label=words.longest)
            self.seed = gr.Textbox(label=words.seed, max_length=19)  # a Number would make 0 of nothing

    @property
    def chosen(self) -> list[Any]:
        """The components that hold the settings."""
        return [self.way, self.temperature, self.top_p, self.top_k, self.penalty, self.longest, self.seed]

    def options(self, values: Sequence[Any]) -> SamplingOptions:
        """Their values as options; what is left empty is the checkpoint's. Raises ConfigError."""
        way, temperature, top_p, top_k, penalty, longest, written = values
        seed = (written or "").strip()
        return SamplingOptions.from_config(
            self.service.pipeline.generation_config,
            do_sample=way == "sampled",
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=penalty,
            max_new_tokens=longest,
            seed=int(seed) if seed.isdecimal() and len(seed) < 20 else seed or None,
        )

    # ---- what can be pressed when

    @property
    def _resting(self) -> list[Any]:
        return [self.again, self.undo, self.clear, self.language, *self.examples]

    @property
    def changing(self) -> list[Any]:
        """What `busy`, `ready` and the answers change."""
        return [self.box, self.chat, self.picture, self.download, *self._resting]

    def busy(self, words: Wording) -> Updates:
        """While an answer comes, nothing but to stop it."""
        return {
            self.box: gr.update(submit_btn=False, stop_btn=words.stop),
            self.chat: gr.update(editable=None),
            self.download: gr.update(visible=False),
            **{component: gr.update(interactive=False) for component in self._resting},
        }

    def ready(self, words: Wording) -> Updates:
        """The next message can come."""
        return {
            self.box: gr.update(submit_btn=words.send, stop_btn=False),
            self.chat: gr.update(editable="user"),
            **{component: gr.update(interactive=True) for component in self._resting},
        }

    # ---- what they say

    def labels(self, language: str) -> Updates:
        """Everything, in this language."""
        words = WORDINGS[language]
        labelled: dict[Any, str] = {
            self.language: words.language,
            self.download: words.download,
            self.settings: words.settings,
            self.temperature: words.temperature,
            self.top_p: words.top_p,
            self.top_k: words.top_k,
            self.penalty: words.penalty,
            self.longest: words.longest,
            self.seed: words.seed,
        }
        saying: dict[Any, str] = {
            self.head: self._head(words),
            self.again: words.regenerate,
            self.undo: words.undo,
            self.clear: words.clear,
            self.examples_title: f"## {words.examples}",
            self.picture_title: f"## {words.picture}",
            **{button: example.questions[language] for button, example in zip(self.examples, EXAMPLES, strict=True)},
        }
        return {
            **{component: gr.update(label=text) for component, text in labelled.items()},
            **{component: gr.update(value=text) for component, text in saying.items()},
            self.way: gr.update(label=words.way, choices=_ways(words)),
            self.chat: gr.update(label=words.chat, placeholder=words.empty_chat),
            self.box: gr.update(placeholder=words.type_here, submit_btn=words.send),
        }

    def _head(self, words: Wording) -> str:
        """The model's name, and what has to be known of it."""
        note = self.service.pipeline.config.note
        raw = self.service.pipeline.generation_config.chat_format == "raw"
        lines = [*([words.note(note)] if note else []), *([words.base] if raw else [])]
        notes = "".join(f"<p class='note'>{quoted(line)}</p>" for line in lines)
        return f"<h1>{quoted(self.service.name)}</h1><p>{quoted(words.about)}</p>{notes}"


def _ways(words: Wording) -> list[tuple[str, str]]:
    return [(words.greedy, "greedy"), (words.sampled, "sampled")]
