"""How the demo is served: a Gradio app that reads nothing but what a visitor has uploaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_images import MAX_FILE_BYTES
from .demo_style import CSS, demo_theme
from .images import ImageInputError

if TYPE_CHECKING:
    import gradio


def new_blocks(**options: Any) -> gradio.Blocks:
    """An empty Gradio app with the demo's looks and limits.

    Gradio would download an image that a client names by URL.  This app refuses it.

    Args:
        **options: As for `gradio.Blocks`.

    Returns:
        The app.  Its `launch` takes Gradio's arguments; looks and limits are set unless they are given.
    """
    import gradio as gr

    class _DemoBlocks(gr.Blocks):
        async def preprocess_data(
            self, block_fn: Any, inputs: list[Any], *args: Any, **kw: Any
        ) -> Any:
            if any("://" in path for path in _file_paths(inputs)):
                raise gr.Error(
                    "Images by URL are not fetched: upload the file.", print_exception=False
                )
            return await super().preprocess_data(block_fn, inputs, *args, **kw)

        def launch(self, *args: Any, **kw: Any) -> Any:
            return super().launch(*args, **(launch_options() | kw))

    return _DemoBlocks(**options)


def launch_options() -> dict[str, Any]:
    """Arguments of Gradio's `launch` that make the app the demo's."""
    return {
        "theme": demo_theme(),
        "css": CSS,
        "max_file_size": MAX_FILE_BYTES,
        "share": False,
        "ssr_mode": False,
        "show_error": False,
        "enable_monitoring": False,
        "run_history": False,
        "footer_links": ["api", "settings"],
    }


def uploaded_path(payload: Any) -> str | None:
    """Where the server has stored an uploaded image.

    Args:
        payload: What Gradio received for an image.

    Returns:
        The path, or None without an image.

    Raises:
        ImageInputError: If it was not uploaded, be it a path of the server or a URL.
    """
    from gradio.utils import get_upload_folder

    if payload is None:
        return None
    if hasattr(payload, "model_dump"):
        payload = payload.model_dump()
    path = payload.get("path") if isinstance(payload, dict) else None
    if not isinstance(path, str) or not path:
        raise ImageInputError("The image was not uploaded: send a file.")
    folder = Path(get_upload_folder()).resolve()
    if not Path(path).resolve().is_relative_to(folder):
        raise ImageInputError("The image was not uploaded: send a file.")
    return path


def _file_paths(value: Any) -> Iterator[str]:
    """Every `path` in what a client sent."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str):
            yield path
        for item in value.values():
            yield from _file_paths(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _file_paths(item)
