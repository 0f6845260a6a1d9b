"""The demo: drop an image, see what a model takes it for, and which patches decided for one class and against another.

Runs as it is on a machine without a network (``make space``) and as a Hugging Face Space, which has only this folder.
"""
from __future__ import annotations

import functools
import html
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
import timm
import torch
from huggingface_hub import HfApi
from PIL import Image
from timm.models import load_model_config_from_hf

from timm_lossattn import Explanation, explain
from timm_lossattn.explanation import class_labels, open_image
from timm_lossattn.explanation.labels import DATA, data_of, known_classes
from timm_lossattn.explanation.preprocessing import input_config
from timm_lossattn.hub_access import create_model, hub_or_cache
from timm_lossattn.loading import check_name, load_patch_model
from timm_lossattn.models.lite_weights import LITE_MODELS, lite_file
from timm_lossattn.models.pretrained import list_bundled

HERE = Path(__file__).resolve().parent
MAX_PIXELS = 60_000_000  # 50 megapixels take 0.6 GB of memory, 0.8 with transparency, 1.3 from 16-bit grey
MAX_ASPECT = 100  # the shorter side is resized to the model's input, so a line of pixels would grow to gigabytes
MAX_FILE_SIZE = '100mb'
MAX_PARAMETERS = 350_000_000  # any visitor may name a model, and four are kept
MAX_BYTES = 4 * MAX_PARAMETERS  # of a file: any visitor may have uploaded it, whatever its config says
MAX_SIDE = 2048  # of an image resized for a model: any visitor may have written its config
FEW_CLASSES = 12
HUB = 'hf-hub:'
QUICK = {'compress_level': 1}  # by default the encoder takes as long as the drawing
DEFAULT = ''  # in a menu of classes: the predicted class, or its rivals, all others by their softmax
CSS = """
#examples img[src*="cifar"] { image-rendering: pixelated; }
#examples .container.gallery { width: 3.5rem; height: 3.5rem; }
#model input, #other input { text-overflow: ellipsis; margin-right: 1.5rem; }
.message:not(:has(p)) { display: none; }
.message p { padding: 0.75em 1em; border: 1px solid var(--error-border-color); border-radius: var(--radius-md);
             background: var(--error-background-fill); color: var(--error-text-color); font-size: var(--text-lg); }
.picture .image-container > button { background: white; }
.picture.in-row { display: none; }
@media (min-width: 900px) {  /* wide enough to read panels in a row, but not those of two models */
  .answer:only-child .picture.in-row { display: block; }
  .answer:only-child .picture.stacked { display: none; }
}
"""
INTRODUCTION = """
# Which part of the image decided?
The image's logits *are* the sum of what its patches contribute, so the pictures show the computation itself.
"""
READING = """
**How to read it.** Evidence is what each patch adds to the class's lead over what it is compared with: orange for it,
purple against it. It sums to that lead exactly, but a patch of a deep network has seen more than its box, often most of
the image. A timm model named without `lossattn.` is explained as it is, all its patches alike.
"""


@functools.cache
def list_models() -> list[str]:
    """Tagged names of the patch models whose weights are on this machine, those for photographs first."""
    names = [f'lossattn.{name}.in1k' for name in LITE_MODELS if lite_file(name)] + [
        name for name in list_bundled()
        if name.startswith('lossattn.') or hasattr(timm.create_model(name, device='meta'), 'forward_patches')]
    order = list(DATA)
    return sorted(names, key=lambda name: (
        [order.index(data) for data in data_of(name)] or [len(order)], '_lossattn_conv' not in name, name))


def model_choices() -> list[tuple[str, str]]:
    """Their names for a menu, each with what it was trained on."""
    return [(f'{DATA[data[-1]].kind} · {name}' if (data := data_of(name)) else name, name) for name in list_models()]


def list_examples() -> list[Path]:
    """Images to try, in the order of ``DATA``; those of the tests where there is a checkout around this folder."""
    found = {path.name: path for pattern in ('tests/data/photo_*', 'tests/data/pbc_*')
             for path in sorted(HERE.parent.parent.glob(pattern))}
    found |= {path.name: path for path in sorted(HERE.glob('examples/*'))}
    order = list(DATA)
    return sorted(found.values(), key=lambda path: order.index(data) if (data := example_data(path)) in DATA else 99)


def example_data(path: Path) -> str:
    """Key of DATA for an example, which its name begins with: what models are good for it."""
    kind = path.stem.split('_')[0]
    return {'photo': 'in1k'}.get(kind, kind)


@functools.lru_cache(maxsize=4)
def load_model(name: str) -> Any:
    """Patch model in eval mode, of any name that timm knows or ``hf-hub:ORG/NAME``.

    Raises:
        ValueError: it cannot be had, its logits are no sum over patches, or it is too large; the message is one
            sentence for the page.
    """
    try:
        if ':' in name and not name.startswith(HUB):  # local-dir: a visitor has no business with our files
            raise ValueError(f'{name} is no name of a model.')
        check_name(name)
        if name.startswith(HUB):
            check_repository(name)
        size = count_parameters(name)
        if size > MAX_PARAMETERS:
            raise ValueError(
                f'{name} has {size / 1e6:,.0f} million parameters: at most {MAX_PARAMETERS / 1e6:.0f}, please.')
        model = load_patch_model(name)
        config = input_config(model)
        side = max(config['input_size'][1:]) / (config['crop_pct'] or 1)
        if side > MAX_SIDE:
            raise ValueError(f'{name} wants images of {side:,.0f} pixels: at most {MAX_SIDE:,}, please.')
        return model
    except ValueError as error:  # what follows the first sentence is for programmers
        sentence = str(error).removeprefix('model: ').split('. ')[0].rstrip('.')
        raise ValueError(f'{sentence}.') from error


def check_repository(name: str) -> None:
    """Refuse a repository of the Hub before its weights are downloaded.

    Where the Hub is out of reach its cache is all there is. Whatever else is wrong shows when the model is loaded.

    Raises:
        ValueError: a file is too large, or the config sets what the count of parameters needs to set.
    """
    source = name.removeprefix(HUB)
    repository, _, revision = source.partition('@')
    sizes, arguments = [0], dict[str, Any]()
    with hub_or_cache():
        with suppress(Exception):
            files = HfApi().model_info(repository, revision=revision or None, files_metadata=True).siblings or []
            sizes += [file.size or 0 for file in files]
        if max(sizes) > MAX_BYTES:  # the config too may be of any size
            raise ValueError(
                f'{name} has a file of {max(sizes) / 1e6:,.0f} MB: at most {MAX_BYTES / 1e6:,.0f}, please.')
        with suppress(Exception):
            arguments.update(load_model_config_from_hf(source)[2] or {})
    placed = arguments.keys() & {'device', 'dtype'}
    if placed:
        raise ValueError(f'{name} sets {" and ".join(sorted(placed))} in its model_args: neither, please.')


def count_parameters(name: str) -> int:
    """Of a model that is made without numbers; 0 if that does not work: whatever is wrong shows when it is loaded."""
    try:
        with torch.device('meta'):
            return sum(parameter.numel() for parameter in create_model(name).parameters())
    except Exception:
        return 0


def uploaded_file(payload: Any) -> str | None:
    """Path of the file that a gr.Image got."""
    return None if payload is None else payload.path


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


def explain_file(name: str, path: str, target: str = DEFAULT, against: str = DEFAULT) -> Explanation:
    """Explanation of one image file.

    Args:
        name: of a model.
        path: of the file.
        target: name of the class to explain; by default, or if the model does not know it, the predicted one.
        against: class to compare it with; by default, or if the model does not know it, all others, by their softmax.

    Raises:
        ValueError: see ``load_model`` and ``read_image``, or a class would be compared with itself; the message is for
            the page.
    """
    model = load_model(name)
    labels = class_labels(model, model.num_classes)
    explanation = explain(model, read_image(path), target=labels.index(target) if target in labels else None)
    if against not in labels:
        return explanation
    if labels[int(explanation.target)] == against:
        raise ValueError(f'The evidence is for "{against}": compare it with another class.')
    return explanation.versus(labels.index(against))


def describe(name: str, *asked: str) -> str:
    """What a model is, was trained on, and can answer at all; and which of the classes asked for it does not know."""
    model = load_model(name)
    labels = class_labels(model, model.num_classes)
    tag = '' if ':' in name else (model.pretrained_cfg or {}).get('tag') or ''  # a repository may keep an older one
    trained_on = [DATA[key] for key in data_of(tag)]
    data = ', then '.join(one.name for one in trained_on) + ''.join(f', {one.images}' for one in trained_on[-1:])
    known = known_classes(labels)
    if len(labels) <= FEW_CLASSES:
        known = f'{known.split(":")[0]}: {", ".join(labels)}'
    text = f'Trained on {data or "data that its name does not tell"}; {known}. '
    text += 'Whatever is in the image, it calls it one of these.'
    for label in asked:
        if label != DEFAULT and label not in labels:
            text += f' It does not know "{label}".'
    return text


def answer(name: str, path: str | None, target: str, against: str) -> Iterator[list[Any]]:
    """What the page shows of one model, once.

    Yields:
        Visibility of its column, HTML of the message, visibility of the rest; what the model says, with the evidence in
        a line, the picture, its panels in a row and one below another, probabilities of the best five classes, the
        model's description, and picture and numbers as files. The rest is empty where there is no image or something is
        wrong.
    """
    column = gr.update(visible=bool(name))
    nothing = [gr.update(visible=False), '', None, None, None, '', None, None]
    if not name or path is None:
        yield [column, '', *nothing]
        return
    try:
        explanation = explain_file(name, path, target, against)
        about = describe(name, target, against)
        top = {entry['label']: entry['probability'] for entry in explanation.to_dict()['top5']}
    except ValueError as error:
        yield [column, f'<p role="alert">{html.escape(str(error), quote=False)}</p>', *nothing]
        return
    file = Path(path)
    says = f'`{name}`: {explanation.answer()}'
    with tempfile.TemporaryDirectory() as folder:  # while we wait in the yield, gradio copies them to its cache
        row, stacked, numbers = (str(Path(folder, f'{file.stem}{end}')) for end in ('.png', '_stacked.png', '.json'))
        explanation.figure(0, f'{file.name} · {name}').savefig(row, pil_kwargs=QUICK)
        explanation.figure(0, file.name, stacked=True).savefig(stacked, pil_kwargs=QUICK)
        Path(numbers).write_text(explanation.to_json(image=file.name, model=name))
        yield [column, '', gr.update(visible=True), says, row, stacked, top, about, row, numbers]


def class_menus(name: str, target: str = DEFAULT, against: str = DEFAULT) -> list[gr.Dropdown]:
    """The two menus of classes for a model; what was chosen stays chosen if it knows it."""
    try:
        model = load_model(name)
        labels = class_labels(model, model.num_classes)
    except ValueError:  # the answer says it
        labels = []
    return [
        gr.Dropdown(choices=[(default, DEFAULT), *((label, label) for label in labels)], label=label,
                    info=f'{len(labels):,} classes, type to search' if labels else None,
                    allow_custom_value=True,  # or a class of the model before would be an error, not an answer
                    value=chosen if chosen in labels else DEFAULT, min_width=200)
        for default, label, chosen in (
            ('the predicted class', 'Evidence for', target), ('its rivals', 'Why not this one?', against))]


def build_column(number: int) -> list[Any]:
    """What is shown of one model, see ``answer``."""
    with gr.Column(visible=number == 0, min_width=340, elem_classes='answer') as column:
        message = gr.HTML(elem_classes='message')
        with gr.Column(visible=False) as rest:
            says = gr.Markdown(elem_classes='says')
            pictures = [gr.Image(show_label=False, type='filepath', interactive=False, buttons=['fullscreen'],
                                 alt_text='The image, evidence for the class, why not another class',
                                 elem_classes=['picture', form]) for form in ('in-row', 'stacked')]
            with gr.Row():
                with gr.Column(min_width=300):
                    top = gr.Label(show_label=False, show_heading=False, elem_classes='top')
                with gr.Column(min_width=300):
                    about = gr.Markdown(elem_classes='about')
                    with gr.Row():
                        downloads = [gr.DownloadButton(text, size='sm', min_width=140, elem_classes=name)
                                     for text, name in (('Picture (PNG)', 'png'), ('Numbers (JSON)', 'json'))]
    return [column, message, rest, says, *pictures, top, about, *downloads]


def build() -> gr.Blocks:
    """The page. Whatever changes in its inputs, the answer follows by itself."""
    names, choices, samples = list_models(), model_choices(), list_examples()
    first = next((path for path in samples if example_data(path) in data_of(names[0])), None)
    with gr.Blocks(
            title='Which part of the image decided?', analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(min_width=300):
                image = gr.Image(
                    str(first) if first else None, type='filepath', label='Image', height=260, buttons=[],
                    sources=['upload', 'clipboard'], elem_id='image')
                # the file as it was uploaded: gr.Image decodes and encodes it, or fails on it, before we see it
                image.preprocess = uploaded_file  # type: ignore[method-assign]
                examples = gr.Dataset(
                    components=[gr.Image(render=False)], samples=[[str(path)] for path in samples], type='index',
                    label='or one of these', elem_id='examples', visible=bool(samples), samples_per_page=24)
            with gr.Column(min_width=300):
                model = gr.Dropdown(choices, value=names[0], label='Model', elem_id='model')
                with gr.Row():
                    target, against = class_menus(names[0])
                with gr.Row():
                    other = gr.Dropdown(
                        [('none', ''), *choices], value='', label='Second model, side by side', min_width=200,
                        elem_id='other')
                    # a box of its own: in a menu, what is typed would choose an entry that only contains it
                    own, named = gr.Textbox(
                        label='Another model', info='a timm name and Enter puts it into both menus', max_lines=1,
                        placeholder='lossattn.resnet50', min_width=200, elem_id='own'), gr.State([])
        with gr.Row():
            columns = [build_column(number) for number in range(2)]
        gr.Markdown(READING)

        def example(index: int, name: str) -> tuple[str, str]:
            """An example, and a model for its kind of image, unless the chosen one is of that kind."""
            data = example_data(samples[index])
            fitting = [known for known in list_models() if data in data_of(known)]
            return str(samples[index]), name if data in data_of(name) or not fitting else fitting[0]

        def name_model(name: str, known: list[str]) -> list[Any]:
            """The two menus with a name that was typed, chosen in the first; an empty box; the names typed so far."""
            name = name.strip()
            if not name or name in names:
                return [name or gr.skip(), gr.skip(), '', known]
            known = [*dict.fromkeys([*known, name])]
            both = [*choices, *((one, one) for one in known)]
            return [gr.Dropdown(both, value=name), gr.Dropdown([('none', ''), *both]), '', known]

        own.submit(name_model, [own, named], [model, other, own, named], show_progress='hidden')
        for shown, outputs in zip((model, other), columns):
            gr.on([page.load, image.change, target.input, against.input, shown.change], answer,
                  [shown, image, target, against], outputs, trigger_mode='always_last', concurrency_id='answer')
        model.change(class_menus, [model, target, against], [target, against], show_progress='hidden',
                     concurrency_id='answer')  # or a new model would be loaded twice at once
        examples.click(example, [examples, model], [image, model], show_progress='hidden')
    return page


demo = build()

if __name__ == '__main__':
    # ssr_mode: the page as it was tested, on a Space too; run_history would keep the images in the visitor's browser
    demo.launch(css=CSS, footer_links=[], run_history=False, ssr_mode=False, max_file_size=MAX_FILE_SIZE)
