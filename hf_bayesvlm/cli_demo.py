"""`bayesvlm demo`: the demo page on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .cli_common import check_device, check_model_source, fail


def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder. \\[default: the embedded model]")
    ] = None,
    posterior: Annotated[
        str | None, typer.Option(help="Hub id or folder of a posterior to put on the model.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines too.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port. \\[default: the first free one from 7860 on]"),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link through Gradio's servers.")
    ] = False,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Do not open the page in a browser.")
    ] = False,
    only_these: Annotated[
        bool,
        typer.Option("--only-these", help="Visitors cannot load other models from the Hub."),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu, cuda or cuda:1. \\[default: the best there is]")
    ] = None,
) -> None:
    """Open a page that shows plain and Bayesian predictions side by side.

    Upload an image, type labels, and see how sure the model is, with sliders that make the image worse.
    Needs `pip install 'hf_bayesvlm[demo]'`.
    """
    stderr = Console(stderr=True)
    try:
        if model is not None:
            check_model_source(model)
        check_device(device)
        from transformers.utils.logging import disable_progress_bar

        from .demo import build_app

        disable_progress_bar()
        app = build_app(model, posterior, allow_hub=not only_these, device=device)
        app.launch(server_name=host, server_port=port, share=share, inbrowser=not no_browser)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(stderr, error)
