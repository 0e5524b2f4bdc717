"""The demo page: plain and Bayesian scores side by side, in a Gradio app (a Hugging Face Space).

Needs `pip install 'hf_bayesvlm[demo]'`.  The page fetches nothing from elsewhere, and a visitor's input is never a
path, a URL or code: see `demo_hub.py` for models, `demo_images.py` for images.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .demo_handlers import Handlers
from .demo_models import EMBEDDED_NAME, OWN_POSTERIOR, ModelStore
from .demo_page import Page, first_example
from .demo_server import new_blocks
from .demo_service import DemoService, Request
from .embedded import EMBEDDED_MODEL

if TYPE_CHECKING:
    import gradio

DEFAULT_LABELS = (
    "dog face, cat face, pizza, rocket, automobile, red apple, soccer ball, airplane, bicycle, house, "
    "guitar, umbrella"
)
_QUEUE = 64
_CLEAN_UP_SECONDS = 3600


def build_app(
    model: str | Path | None = None,
    posterior: str | Path | None = None,
    *,
    labels: str = DEFAULT_LABELS,
    allow_hub: bool = True,
    device: str | None = None,
    concurrency: int | None = None,
) -> gradio.Blocks:
    """Build the demo.

    The model is loaded here, so that the first screen shows a result and mistakes show at once.

    Args:
        model: Folder or Hub id; None for the embedded model, which visitors can always choose.
        posterior: Folder or Hub id of a posterior for it; None for the model's own.
        labels: What the labels box starts with.
        allow_hub: Let visitors name any public Hub id (safetensors, no code, limited in size).
        device: As for `pipeline`.
        concurrency: Requests that are computed at once; by default one a processor core, 2 to 8.

    Returns:
        The app; `launch()` starts it.

    Raises:
        ImportError: Without Gradio.
        ValueError: If the model or the posterior cannot be used, or for labels that are refused.
        OSError: If they cannot be found.
    """
    try:
        import gradio as gr  # noqa: F401
    except ImportError as error:
        raise ImportError("the demo needs Gradio: pip install 'hf_bayesvlm[demo]'") from error
    models = {EMBEDDED_NAME: EMBEDDED_MODEL}
    if model is not None and str(model) != EMBEDDED_MODEL:
        models = {_public_name(model): str(model), **models}
    posteriors = {} if posterior is None else {_public_name(posterior): str(posterior)}
    store = ModelStore(models, posteriors, allow_hub=allow_hub, device=device)
    service = DemoService(store)
    first_posterior = next(iter(posteriors), OWN_POSTERIOR)
    first = service.answer(Request(image=first_example(), labels=labels, posterior=first_posterior))
    app = new_blocks(
        title="How sure is CLIP?",
        analytics_enabled=False,
        delete_cache=(_CLEAN_UP_SECONDS, _CLEAN_UP_SECONDS),
    )
    with app:
        Page(Handlers(service), first, labels, first_posterior).build()
    limit = concurrency or min(8, max(2, os.cpu_count() or 2))
    app.queue(default_concurrency_limit=limit, max_size=_QUEUE)
    return app


def _public_name(source: str | Path) -> str:
    """A Hub id as it is; a folder without where it lies."""
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)
