"""The demo: drop an image, see the classes, and which patches decided for one and against another.

Runs as it is on a machine without a network (``make space``) and as a Hugging Face Space, which has only this folder.
"""
from __future__ import annotations

import functools
import html
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import timm
from PIL import Image

import timm_lossattn
from timm_lossattn import Explanation, explain, list_patch_models
from timm_lossattn.cli import DEFAULT_MODEL
from timm_lossattn.explanation import class_labels, open_image

EXAMPLES = sorted((Path(__file__).resolve().parent / 'examples').glob('*.png'))
MAX_PIXELS = 60_000_000  # 50 megapixels take 0.6 GB of memory, 0.8 with transparency, 1.3 from 16-bit grey
MAX_ASPECT = 100  # the shorter side is resized to the model's input, so a line of pixels would grow to gigabytes
MAX_FILE_SIZE = '100mb'
DEFAULT = -1  # in a menu of classes: the predicted class, or its rivals, all others by their softmax
CSS = """
#examples img { image-rendering: pixelated; }
#message:not(:has(p)) { display: none; }
#message p { padding: 0.75em 1em; border: 1px solid var(--error-border-color); border-radius: var(--radius-md);
             background: var(--error-background-fill); color: var(--error-text-color); font-size: var(--text-lg); }
#picture .image-container { overflow-x: auto; }
#picture .image-container > button { width: max(100%, 52rem); background: white; }  /* on a phone: scroll to read it */
"""
INTRODUCTION = """
# Which part of the image decided?
The image's logits *are* the sum of what its patches contribute, so the pictures show the computation itself.
The models here see 32×32 or 64×64 pixels and know a few classes: whatever is shown to them, they call it one of those.
"""
READING = """
From left to right: the image; the weight α of each patch; what each patch adds to the class's lead over what it is
compared with (orange for it, purple against it; the sum is in brackets); the patches with a weight at all and the
smallest square around them.
"""


def list_models() -> list[str]:
    """Tagged names of the patch models whose weights are on this machine, the default model first."""
    tagged = [tag for name in list_patch_models() for tag in timm.list_pretrained(name)]
    names = [
        tag for tag in tagged
        if Path(timm.get_pretrained_cfg_value(tag, 'file') or '').is_file()
        and hasattr(timm.create_model(tag, device='meta'), 'forward_patches')]  # not so VGG with fully connected layers
    return sorted(names, key=lambda name: (name.split('.')[0] != DEFAULT_MODEL, name))


@functools.cache
def load_model(name: str) -> Any:
    """Model in eval mode; each is loaded once."""
    return timm_lossattn.load_model(name)


def read_image(path: str) -> Image.Image:
    """Image of an uploaded file, upright RGB.

    Raises:
        ValueError: no image, or one whose size would exhaust the memory; the message is for the page.
    """
    name = Path(path).name
    try:
        with Image.open(path) as file:  # only the header
            width, height = file.size
    except Image.DecompressionBombError:
        width = height = MAX_PIXELS
    except Exception:  # broken files raise all sorts; open_image says what is wrong
        width = height = 1
    if width * height > MAX_PIXELS:
        raise ValueError(f'{name} is too large: at most {MAX_PIXELS // 1_000_000} megapixels, please.')
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f'{name} is {width}×{height}: at most {MAX_ASPECT} times as long as wide, please.')
    try:
        return open_image(path)
    except ValueError as error:
        raise ValueError(f'{name} is no image that can be read.') from error


def explain_file(name: str, path: str, target: int = DEFAULT, against: int = DEFAULT) -> Explanation:
    """Explanation of one image file.

    Args:
        name: one of ``list_models()``.
        path: of the file.
        target: class to explain; by default the predicted one.
        against: class to compare it with; by default all others, by their softmax.

    Raises:
        ValueError: see ``read_image``, or a class would be compared with itself; the message is for the page.
    """
    explanation = explain(load_model(name), read_image(path), target=None if target == DEFAULT else target)
    if against == DEFAULT:
        return explanation
    if int(explanation.target) == against:
        raise ValueError(f'The evidence is for "{explanation.labels[against]}": compare it with another class.')
    return explanation.versus(against)


def answer(name: str, path: str | None, target: int, against: int) -> Iterator[tuple[Any, ...]]:
    """What the page shows for its inputs, once.

    Yields:
        HTML of the message, probabilities of the best five classes, file of the picture, and the button's update with
        the file of the numbers. All are empty where there is no image, all but the message where there is one.
    """
    nothing = None, None, gr.update(value=None, interactive=False)
    if path is None:
        yield '', *nothing
        return
    try:
        explanation = explain_file(name, path, target, against)
    except ValueError as error:
        yield f'<p role="alert">{html.escape(str(error), quote=False)}</p>', *nothing
        return
    file, model = Path(path), name.split('.')[0]
    with tempfile.TemporaryDirectory() as folder:  # while we wait in the yield, gradio copies them to its cache
        [picture] = explanation.save(folder, [file.stem], [f'{file.name} · {model}'], image=file.name, model=name)
        top = {entry['label']: entry['probability'] for entry in explanation.to_dict()['top5']}
        yield '', top, str(picture), gr.update(value=str(picture.with_suffix('.json')), interactive=True)


def class_menus(name: str) -> list[gr.Dropdown]:
    """The two menus of classes for a model, each with its default chosen."""
    model = load_model(name)
    labels = [(label, k) for k, label in enumerate(class_labels(model, model.num_classes))]
    return [
        gr.Dropdown(choices=[(default, DEFAULT), *labels], value=DEFAULT, label=label, min_width=220)
        for default, label in (('the predicted class', 'Evidence for'),
                               ('all others', 'compared with (why not this one?)'))]


def build() -> gr.Blocks:
    """The page. Whatever changes in its inputs, the answer follows by itself."""
    names = list_models()
    with gr.Blocks(title='Loss attention', analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                # A file, not gr.Image: that one decodes and encodes the image, or fails on it, before we see it.
                file = gr.File(label='Image', height=140, elem_id='file')
                examples = gr.Dataset(
                    components=[gr.Image(render=False)], samples=[[str(path)] for path in EXAMPLES], type='index',
                    label='or one of these', elem_id='examples', visible=bool(EXAMPLES))
                model = gr.Dropdown(names, value=names[0], label='Model', elem_id='model')
            with gr.Column():
                message = gr.HTML(elem_id='message')
                top = gr.Label(label='Top 5', elem_id='top')
                with gr.Row():
                    target, against = class_menus(names[0])
        picture = gr.Image(
            show_label=False, type='filepath', interactive=False, buttons=['download', 'fullscreen'],
            elem_id='picture', alt_text='Image, patch weights, evidence, selected patches')
        gr.Markdown(READING)
        numbers = gr.DownloadButton('Download the numbers (JSON)', size='md', interactive=False, elem_id='numbers')

        examples.click(lambda index: str(EXAMPLES[index]), examples, file, show_progress='hidden')
        reply: dict[str, Any] = dict(
            fn=answer, inputs=[model, file, target, against], outputs=[message, top, picture, numbers])
        gr.on([file.change, target.input, against.input], trigger_mode='always_last', **reply)
        model.input(class_menus, model, [target, against], show_progress='hidden').then(**reply)
    return page


demo = build()

if __name__ == '__main__':
    # ssr_mode: the page as it was tested, on a Space too; run_history would keep the images in the visitor's browser
    demo.launch(css=CSS, footer_links=[], run_history=False, ssr_mode=False, max_file_size=MAX_FILE_SIZE)
