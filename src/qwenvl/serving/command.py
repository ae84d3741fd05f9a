"""`qwenvl serve`: flags to a server.

    add_arguments   the flags
    EPILOG          examples
    run             the command

What it needs is imported when it begins, for the sake of `--help`.
"""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .settings import Settings, keys_of

if TYPE_CHECKING:
    from ..pipeline import Pipeline

EPILOG = """examples:
  qwenvl serve --web                                       # the embedded model's page, at http://127.0.0.1:8000
  qwenvl serve --model Qwen/Qwen-VL-Chat --rows 32         # an OpenAI-compatible API
  qwenvl serve --host 0.0.0.0 --api-keys keys.txt --cors-origin https://example.com --allow-domain images.example.com

Ask it like any server of OpenAI's API; docs/serving.md has examples."""
SMALL = 20_000_000  # weights
FLAGS = (
    *("name", "rows", "max_length", "queue", "timeout", "grace"),
    *("max_images", "max_image_pixels", "max_body_bytes"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; defaults are those of Settings."""
    default = Settings()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    parser.add_argument("--web", action="store_true", help="a page to chat on, too")
    parser.add_argument("--share", action="store_true", help="give the page a public address, by Gradio's tunnel")
    parser.add_argument("--inbrowser", action="store_true", help="open the page in the browser")
    group = parser.add_argument_group("who may use it")
    group.add_argument("--api-keys", metavar="FILE", help="ask for one of the keys in this file, one a line")
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="let its pages call the API"
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer to this name (default: on 127.0.0.1 without keys, to localhost alone; else to any)",
    )
    group.add_argument(
        "--allow-domain", action="append", default=[], metavar="HOST", help="fetch pictures from this host's URLs"
    )
    group = parser.add_argument_group("limits")
    group.add_argument("--name", help="what the model is called (default: its own name)")
    group.add_argument(
        "--rows", type=int, help="answers that are computed at once (default: what memory allows, to 32)"
    )
    group.add_argument("--max-length", type=int, help="tokens of a prompt and its answer (default: the model's)")
    for flag, kind, what in (
        ("queue", int, "answers that may wait beside them"),
        ("timeout", float, "seconds for an answer"),
        ("grace", float, "seconds to end what runs, when told to stop"),
        ("max-images", int, "pictures of a request"),
        ("max-image-pixels", int, "width times height of a picture"),
        ("max-body-bytes", int, "size of a request"),
    ):
        value = getattr(default, flag.replace("-", "_"))
        group.add_argument(f"--{flag}", type=kind, default=value, help=f"{what} (default: %(default)s)")


def run(given: argparse.Namespace, load: Callable[[argparse.Namespace], Pipeline]) -> None:
    """Load the model and serve it. The address and the settings are looked at before that takes long."""
    settings = settings_of(given)
    try:
        import fastapi  # noqa: F401 - is it there?
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401

        if given.web or given.share or given.inbrowser:
            _import_gradio()
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'qwenvl[serve]'") from None
    from .server import listen, serve

    with listen(given.host, given.port) as listening:
        from .api import create_app
        from .service import Service

        service = Service(_in_one_thread(load(given)), settings)
        app = create_app(service)
        if web := given.web or given.share or given.inbrowser:
            from .web import mount_page

            app = mount_page(app, service)
        serve(app, service, listening, web=web, share=given.share, inbrowser=given.inbrowser)


def _in_one_thread(pipeline: Pipeline) -> Pipeline:
    """A small model on a CPU is computed in one thread, unless OMP_NUM_THREADS says otherwise.

    Its products are too small to be shared out, and the other cores have pictures and clients to see to.
    """
    import torch

    weights = sum(weight.numel() for weight in pipeline.model.parameters())
    if pipeline.device.type == "cpu" and weights < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return pipeline


def _import_gradio() -> None:
    """Gradio, without the two seconds that it takes to write stubs for editors into its own folder, at every start.

    For these it asks where each component's source is, and does without where there is none.
    """
    getfile = inspect.getfile

    def elsewhere(what: Any) -> str:  # noqa: ANN401 - as inspect's
        if isinstance(what, type) and what.__module__.startswith("gradio."):
            raise OSError
        return getfile(what)

    inspect.getfile = elsewhere  # type: ignore[assignment]
    try:
        import gradio  # noqa: F401
    finally:
        inspect.getfile = getfile


def settings_of(given: argparse.Namespace) -> Settings:
    """The flags as Settings. Raises ConfigError."""
    keys = () if given.api_keys is None else keys_of(given.api_keys)
    return Settings(
        **{name: getattr(given, name) for name in FLAGS},
        api_keys=keys,
        hosts=tuple(given.allow_host) or _hosts(given.host, known=bool(keys) or given.share),
        cors_origins=tuple(given.cors_origin),
        allowed_domains=tuple(given.allow_domain),
    )


def _hosts(address: str, known: bool) -> tuple[str, ...]:
    """What a server answers to if nobody says: on an address of this machine alone, to `localhost` (see `guard`)."""
    own = address in ("localhost", "::1") or address.startswith("127.")
    return ("localhost",) if own and not known else ()
