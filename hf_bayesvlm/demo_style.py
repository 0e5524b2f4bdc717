"""Looks of the demo: system fonts, one style sheet for light and dark, texts of the page."""

from __future__ import annotations

from typing import Any

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONOSPACE = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container {
  --bv-ink: #1b2733; --bv-soft: #4f5d6b; --bv-line: var(--border-color-primary); --bv-card: var(--block-background-fill); --bv-track: #edf1f5;
  --bv-plain: #8593a3; --bv-bayes: #1f6f9f; --bv-second: #6a51a3; --bv-whisker: #101820;
  --bv-aleatoric: #7fb2d0; --bv-epistemic: #d9731a;
  --bv-sure-bg: #dff3e6; --bv-sure: #11592f; --bv-unsure-bg: #fdf0d0; --bv-unsure: #6f4700;
  --bv-none-bg: #fbe3e1; --bv-none: #8c1d18;
  max-width: 1240px !important; margin: 0 auto !important;
}
.dark .gradio-container, .gradio-container.dark, body.dark .gradio-container {
  --bv-ink: #eef2f6; --bv-soft: #b3c0cc; --bv-track: #334155;
  --bv-plain: #93a2b1; --bv-bayes: #58b0e3; --bv-second: #b09ae6; --bv-whisker: #ffffff;
  --bv-aleatoric: #3f7ea3; --bv-epistemic: #f39a4a;
  --bv-sure-bg: #143d26; --bv-sure: #a5ecc0; --bv-unsure-bg: #463408; --bv-unsure: #ffdf94;
  --bv-none-bg: #4f1d1a; --bv-none: #ffc4be;
}
.bv-hero { padding: 6px 2px 2px; }
.bv-hero h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; font-weight: 700;
  letter-spacing: -0.01em; color: var(--bv-ink); }
.bv-hero p { margin: 0; color: var(--bv-soft); font-size: 1rem; line-height: 1.5; max-width: 92ch; }
.bv-hero a, .bv-notes a { color: var(--bv-bayes); text-decoration: underline; }
.bv-results { color: var(--bv-ink); font-size: 0.94rem; }
.bv-results p, .bv-results h3, .bv-results ul { margin: 0; padding: 0; color: inherit; }
.bv-summary { display: flex; gap: 14px; align-items: center; padding: 12px 14px; margin-bottom: 12px;
  border: 1px solid var(--bv-line); border-radius: 12px; background: var(--bv-card); }
.bv-preview { width: 88px; height: 88px; object-fit: contain; border-radius: 8px; background: #ffffff;
  border: 1px solid var(--bv-line); flex: none; }
.bv-summary-text { min-width: 0; }
.bv-results .bv-headline { font-size: 1.12rem; line-height: 1.4; overflow-wrap: anywhere; }
.bv-results .bv-caption { color: var(--bv-soft); margin-top: 4px; font-size: 0.88rem; }
.gradio-container main { min-width: 0; max-width: 100%; }
.gradio-container .column, .gradio-container .row, .gradio-container .block { max-width: 100%; }
.gradio-container .column > * { min-width: 0; }
#bv-json { overflow-wrap: anywhere; }
#bv-results .html-container, #bv-hero .html-container, #bv-notes .html-container { padding: 0; }
.bv-hero a { padding: 0; margin: 0; }
.bv-panels { display: grid; gap: 12px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.bv-panel { border: 1px solid var(--bv-line); border-radius: 12px; background: var(--bv-card);
  padding: 14px; min-width: 0; display: grid; grid-row: span 4; grid-template-rows: subgrid; row-gap: 0; }
.bv-panels-3 .bv-second { grid-column: 1 / -1; }
.bv-panel header { margin-bottom: 12px; }
.bv-title { display: flex; flex-wrap: wrap; gap: 4px 10px; justify-content: space-between;
  align-items: center; }
.bv-results h3 { font-size: 1.05rem; font-weight: 650; line-height: 1.3; }
.bv-results .bv-detail { color: var(--bv-soft); font-size: 0.8rem; line-height: 1.4; margin-top: 5px; }
.bv-verdict { border-radius: 999px; padding: 3px 11px; font-weight: 650; font-size: 0.85rem;
  line-height: 1.45; }
.bv-verdict-sure { background: var(--bv-sure-bg); color: var(--bv-sure); }
.bv-verdict-unsure { background: var(--bv-unsure-bg); color: var(--bv-unsure); }
.bv-verdict-none { background: var(--bv-none-bg); color: var(--bv-none); }
.bv-results .bv-bars { list-style: none; display: grid; gap: 7px; }
.bv-row { display: grid; grid-template-columns: minmax(0, 6.8em) minmax(0, 1fr) 4em; gap: 9px;
  align-items: center; margin: 0; padding: 0; }
.bv-label { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bv-best .bv-label, .bv-best .bv-score { font-weight: 700; }
.bv-score { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bv-track { position: relative; height: 16px; border-radius: 4px; background: var(--bv-track); }
.bv-fill { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--bv-plain);
  min-width: 2px; transition: width 0.18s; }
.bv-bayes .bv-fill { background: var(--bv-bayes); }
.bv-second .bv-fill { background: var(--bv-second); }
.bv-whisker { position: absolute; top: 50%; height: 10px; transform: translateY(-50%);
  border: solid var(--bv-whisker); border-width: 0 1.5px; box-sizing: border-box; }
.bv-whisker::after { content: ""; position: absolute; left: 0; right: 0; top: calc(50% - 0.75px);
  border-top: 1.5px solid var(--bv-whisker); }
.bv-results .bv-more { color: var(--bv-soft); font-size: 0.85rem; margin-top: 7px; }
.bv-entropy { padding-top: 14px; align-self: end; font-size: 0.88rem; }
.bv-entropy-head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 8px; }
.bv-stack { display: flex; height: 10px; border-radius: 5px; overflow: hidden; margin: 6px 0;
  background: var(--bv-track); }
.bv-stack .bv-aleatoric, .bv-legend i.bv-aleatoric { background: var(--bv-aleatoric); }
.bv-stack .bv-epistemic, .bv-legend i.bv-epistemic { background: var(--bv-epistemic); }
.bv-legend { display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--bv-soft); }
.bv-legend b { color: var(--bv-ink); }
.bv-legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.bv-results .bv-none { margin-top: 8px; font-size: 0.88rem; }
.bv-results .bv-rule { color: var(--bv-soft); font-size: 0.85rem; line-height: 1.5; margin: 10px 2px 0; }
.bv-rule b { color: var(--bv-ink); }
.bv-message { display: flex; gap: 12px; align-items: center; border-radius: 12px; padding: 14px 16px;
  background: var(--bv-none-bg); color: var(--bv-none); font-size: 1rem; overflow-wrap: anywhere; }
.bv-message-icon { flex: none; width: 26px; height: 26px; border-radius: 50%; display: grid;
  place-items: center; font-weight: 800; border: 2px solid currentColor; }
.bv-notes { color: var(--bv-ink); font-size: 0.94rem; line-height: 1.55; }
.bv-notes h4 { margin: 10px 0 2px; font-size: 0.98rem; }
.bv-notes h4:first-child { margin-top: 0; }
.bv-notes p { margin: 0; max-width: 90ch; }
.gradio-container .min_value, .gradio-container .max_value { color: var(--bv-soft); }
#bv-examples .gallery:not(.container) { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); }
#bv-examples .gallery-item { width: 100%; aspect-ratio: 1; padding: 0; }
#bv-examples .gallery-item > *, #bv-examples .gallery-item .container, #bv-examples .gallery-item img {
  display: block; width: 100%; height: 100%; max-width: none; object-fit: contain; }
.dark .gradio-container input[type="range"] { --neutral-200: #475569; }
#bv-examples .gallery-item img, #bv-examples .thumbnail { background: #ffffff; }
button:focus-visible, textarea:focus-visible, input:focus-visible, a:focus-visible, summary:focus-visible {
  outline: 3px solid var(--bv-epistemic) !important; outline-offset: 2px; }
@media (max-width: 640px) {
  .bv-panels { grid-template-columns: minmax(0, 1fr); }
  .bv-hero h1 { font-size: 1.4rem; }
  .bv-preview { width: 68px; height: 68px; }
  .gradio-container { padding-left: 10px !important; padding-right: 10px !important; }
}
@media (prefers-reduced-motion: reduce) { .bv-fill { transition: none; } }
"""

HERO = """
<div class="bv-hero"><h1>How sure is CLIP?</h1>
<p>CLIP says <em>what</em> an image shows, not how sure it is. Here a plain model stands beside the same model with
a posterior over its last layers (<a href="https://arxiv.org/abs/2412.06014" target="_blank"
rel="noopener">BayesVLM</a>). Pick an image, then make it worse with the sliders and watch both.</p></div>
"""

NOTES = """
<div class="bv-notes">
<h4>Plain and Bayesian</h4>
<p>Plain: softmax (CLIP) or sigmoid (SigLIP) of the usual logits. Bayesian: the same after dividing each logit by
√(1 + π/8 · variance), which approximates the average over the posterior of the two final linear maps.</p>
<h4>Entropy in two parts</h4>
<p>The entropy of the prediction that is averaged over sampled weights. <em>Aleatoric</em> is the mean entropy of one draw
of the weights: doubt that would stay if they were known. <em>Epistemic</em> is the rest, the mutual information
between label and weights: draws of the weights disagree. In nats; a plain model has only the first.</p>
<h4>“Probably none of these”</h4>
<p>A softmax over your labels adds up to 1 even if none fits. So CLIP-like models get one more class, “none of these”: its
odds are the mean of those of five prompts that fit anything (something, something else, an object, a thing, a picture),
in your templates. It is the verdict when this class would get the threshold or more. The scores shown leave it out.
SigLIP-like models judge every label on its own, so “none” is 1 minus the best label’s score. It is a rule of
thumb. With the embedded model and 12 random labels the Bayesian verdict was “none” for 49 % of 400 validation emoji when
their label was missing and for 12 % when it was there; in two drawing styles that it never saw, 26 % and 4 %. The rule
was chosen among several with both sets in view, and other models may behave differently.</p>
<h4>Sure or unsure</h4>
<p>Sure if the best label reaches the threshold, else unsure.</p>
<h4>Degrading</h4>
<p>Rotation, blur, noise, in this order, on the image scaled to at most 768 pixels. Noise comes from a fixed seed, so that
the same sliders give the same result.</p>
<h4>Your data</h4>
<p>Images are processed on this server and removed within two hours; nothing is sent elsewhere.</p>
</div>
"""


def demo_theme() -> Any:
    """A theme with fonts of the visitor's own system: nothing is fetched from elsewhere.

    Returns:
        A `gradio.themes.Base`.
    """
    import gradio as gr

    return gr.themes.Base(
        primary_hue=gr.themes.colors.sky,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=[gr.themes.Font(name) for name in FONTS],
        font_mono=[gr.themes.Font(name) for name in MONOSPACE],
    ).set(
        button_primary_background_fill="#1f6f9f",
        button_primary_background_fill_hover="#185a82",
        button_primary_background_fill_dark="#1f6f9f",
        button_primary_background_fill_hover_dark="#2a83ba",
        button_primary_text_color="white",
        slider_color="#1f6f9f",
        slider_color_dark="#58b0e3",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_800",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
