"""Layout of the demo page, and which event calls what."""

from __future__ import annotations

import json
from typing import Any

from .demo_handlers import AS_IT_IS, Handlers
from .demo_images import MAX_BLUR, MAX_NOISE, MAX_ROTATION
from .demo_models import OWN_POSTERIOR
from .demo_scoring import MAX_LABELS, NONE_THRESHOLDS, SURE_THRESHOLD
from .demo_service import Answer
from .demo_style import HERO, NOTES
from .embedded import sample_images

_SNIPPET = """\
from gradio_client import Client, handle_file

client = Client("http://127.0.0.1:7860")  # or the id of the Space
result = client.predict(
    image=handle_file("photo.png"),
    labels="cat, dog",
    blur=2,
    api_name="/classify",
)
print(result["bayesian"]["verdict"], result["bayesian"]["predictions"][0])"""


_NAME_EXAMPLES = """() => document.querySelectorAll("#bv-examples .gallery-item").forEach(
  (button, i) => button.setAttribute("aria-label", NAMES[i]))"""


class Page:
    """The components and what happens between them.

    Args:
        handlers: What events call.
        first: What the first screen shows.
        labels: What the labels box starts with.
        posterior: The posterior that is chosen first.
    """

    def __init__(self, handlers: Handlers, first: Answer, labels: str, posterior: str) -> None:
        self.handlers = handlers
        self.first = first
        self.labels = labels
        self.posterior = posterior
        self.inputs: list[Any] = []

    def build(self) -> None:
        """Lay the page out; the order is also that of the Tab key."""
        import gradio as gr

        gr.HTML(HERO, padding=False, elem_id="bv-hero")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._build_question()
            with gr.Column(scale=8, min_width=320):
                self.results = gr.HTML(self.first.html, elem_id="bv-results", padding=False)
                self._build_settings()
                with gr.Accordion("How this is computed", open=False):
                    gr.HTML(NOTES, padding=False, elem_id="bv-notes")
                with gr.Accordion("Result as JSON", open=False):
                    self.json = gr.JSON(
                        self.first.result, show_label=False, elem_id="bv-json", max_height=420
                    )
                with gr.Accordion("Use it from Python", open=False):
                    gr.Code(
                        _SNIPPET,
                        language="python",
                        show_label=False,
                        interactive=False,
                        wrap_lines=True,
                    )
        self._connect()

    def _build_question(self) -> None:
        import gradio as gr

        samples = sample_images()
        self.image = gr.Image(
            first_example(),
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard", "webcam"],
            label="Image",
            height=230,
            elem_id="bv-image",
            buttons=[],
            alt_text="The image to classify",
        )
        gr.Examples(
            [[sample.path] for sample in samples],
            inputs=[self.image],
            label="Examples, in drawing styles the embedded model never saw",
            elem_id="bv-examples",
            api_visibility="private",
        )
        self.label_box = gr.Textbox(
            self.labels,
            label="Labels",
            info=f"With commas or one a line, up to {MAX_LABELS}.",
            lines=2,
            max_lines=8,
            elem_id="bv-labels",
        )
        self.button = gr.Button("Classify", variant="primary", elem_id="bv-classify")
        with gr.Accordion("Make the image worse", open=True, elem_id="bv-degrade"):
            self.blur = gr.Slider(
                0, MAX_BLUR, 0, step=0.1, label="Blur, % of the shorter side", elem_id="bv-blur"
            )
            self.noise = gr.Slider(
                0,
                MAX_NOISE,
                0,
                step=1,
                label="Noise, % of the brightness range",
                elem_id="bv-noise",
            )
            self.rotation = gr.Slider(
                -MAX_ROTATION,
                MAX_ROTATION,
                0,
                step=1,
                label="Rotation, degrees",
                elem_id="bv-rotation",
            )
            self.reset = gr.Button("Undo all", size="sm", elem_id="bv-reset")

    def _build_settings(self) -> None:
        import gradio as gr

        store = self.handlers.service.store
        with gr.Accordion("Verdicts and prompts", open=False):
            self.sure = gr.Slider(
                0,
                1,
                SURE_THRESHOLD,
                step=0.01,
                label="Sure from a best score of",
                elem_id="bv-sure",
            )
            self.none = gr.Slider(
                0,
                1,
                NONE_THRESHOLDS[self.first.likelihood],
                step=0.01,
                label="None of these from a probability of",
                elem_id="bv-none",
            )
            self.templates = gr.Textbox(
                "",
                label="Prompt templates",
                info="One a line, with {} for the label; several are averaged. Empty: the model’s own.",
                placeholder="This is a photo of {}.",
                lines=2,
                elem_id="bv-templates",
            )
        with gr.Accordion("Compare with a second posterior", open=False):
            self.compare = gr.Checkbox(False, label="Show a second posterior", elem_id="bv-compare")
            self.second = gr.Dropdown(
                [AS_IT_IS, *store.posteriors],
                value=AS_IT_IS,
                allow_custom_value=store.allow_hub,
                label="Posterior",
                info=_hub_hint(store.allow_hub, "The first one’s factors, or a posterior"),
                elem_id="bv-second",
            )
            choices = {
                "Pseudo-data count": ["0.1", "1", "3", "10", "30", "100"],
                "Covariance": ["diagonal", "full"],
                "Damping": ["factored", "exact"],
                "Whose uncertainty": ["both", "image", "text"],
                "Choose prior precisions again": ["reference", "evidence"],
            }
            starts = ["1", AS_IT_IS, AS_IT_IS, AS_IT_IS, "reference"]
            with gr.Row():
                self.hyperparameters = [
                    gr.Dropdown([AS_IT_IS, *values], value=start, label=label, min_width=220)
                    for (label, values), start in zip(choices.items(), starts, strict=True)
                ]
        with gr.Accordion("Model", open=False):
            self.model = gr.Dropdown(
                list(store.models),
                value=store.default_model,
                allow_custom_value=store.allow_hub,
                label="Model",
                info=_hub_hint(store.allow_hub, "A CLIP, SigLIP or bundle"),
                elem_id="bv-model",
            )
            self.model_posterior = gr.Dropdown(
                [OWN_POSTERIOR, *store.posteriors],
                value=self.posterior,
                allow_custom_value=store.allow_hub,
                label="Posterior",
                info=_hub_hint(store.allow_hub, "One that was estimated for this model"),
                elem_id="bv-posterior",
            )
            self.load = gr.Button("Load", elem_id="bv-load")

    def _connect(self) -> None:
        import gradio as gr

        self.inputs = [
            self.image,
            self.label_box,
            self.templates,
            self.blur,
            self.noise,
            self.rotation,
            self.sure,
            self.none,
            self.model,
            self.model_posterior,
            self.compare,
            self.second,
            *self.hyperparameters,
        ]
        outputs = [self.results, self.json]
        # Inputs come as they were sent: what is wrong with them is said on the page.
        quiet: dict[str, Any] = {
            "preprocess": False,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        gr.on(
            [self.button.click, self.label_box.submit, self.templates.submit],
            self.handlers.update,
            self.inputs,
            outputs,
            **quiet,
        )
        live: list[Any] = [self.image, self.blur, self.noise, self.rotation, self.sure, self.none]
        gr.on(
            [component.change for component in (*live, self.compare)],
            self.handlers.update,
            self.inputs,
            outputs,
            trigger_mode="always_last",
            **quiet,
        )
        gr.on(
            [component.input for component in (self.second, *self.hyperparameters)],
            self.handlers.update,
            self.inputs,
            outputs,
            trigger_mode="always_last",
            **quiet,
        )
        self.load.click(
            self.handlers.load,
            self.inputs,
            [*outputs, self.none],
            **(quiet | {"show_progress": "full"}),
        )
        self.reset.click(
            lambda: (0, 0, 0),
            None,
            [self.blur, self.noise, self.rotation],
            api_visibility="private",
        )
        # Gradio gives the pictures no names, and a screen reader needs them.
        names = json.dumps([f"Example: {sample.label}" for sample in sample_images()])
        gr.on(fn=None, js=_NAME_EXAMPLES.replace("NAMES", names), api_visibility="private")
        endpoint = gr.Button(visible=False)
        endpoint.click(
            self.handlers.classify,
            self.inputs,
            [gr.JSON(visible=False)],
            preprocess=False,
            api_name="classify",
            api_description="Score an image against labels, plain and Bayesian.",
        )


def first_example() -> str:
    """The image of the first screen: the model is right about it, until the sliders are moved."""
    return next(sample.path for sample in sample_images() if sample.label == "airplane")


def _hub_hint(allow_hub: bool, what: str) -> str:
    return f"{what}: choose, or type a Hub id such as owner/name." if allow_hub else f"{what}."
