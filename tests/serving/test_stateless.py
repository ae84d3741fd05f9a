"""No server remembers anything of anybody: whichever copy a balancer sends a request to, the answer is the same."""

from pathlib import Path
from typing import Any

from servers import data_url, picture, running

import qwenvl
from qwenvl.serving.settings import Settings

PICTURE = {"type": "image_url", "image_url": {"url": data_url(picture("green"))}}


def test_a_conversation_goes_on_at_another_server(chat_folder: Path) -> None:
    """What a second server answers in the second round is what the first would have, and so do both draw by a seed."""

    def pipeline() -> qwenvl.Pipeline:
        return qwenvl.load(chat_folder, device="cpu", dtype="float32", quiet=True)

    settings = Settings(rows=2, name="model")
    with running(pipeline(), settings) as first, running(pipeline(), settings) as second:

        def ask(server: Any, messages: list[Any], **more: Any) -> str:
            answer = server.post("/v1/chat/completions", model="model", messages=messages, max_tokens=12, **more)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        asked = {"role": "user", "content": [PICTURE, {"type": "text", "text": "what is it"}]}
        reply = ask(first, [asked])
        again = [asked, {"role": "assistant", "content": reply}, {"role": "user", "content": "and where"}]
        assert ask(second, again) == ask(first, again) != ""
        assert ask(second, again, temperature=1, seed=5) == ask(first, again, temperature=1, seed=5)
