"""A patch model as one file for other runtimes: ONNX, torch.export or TorchScript.

The file takes ``image`` (B, C, H, W), any B, fixed H and W (TorchScript does not enforce them) or, with dynamic_size,
any that the model takes. It gives by name ``logits`` (B, K), ``patch_logits`` (B, M, K), ``alpha`` (B, M) and
``evidence`` (B, M): what each patch adds to the lead of the top class, as ``Explanation.evidence`` against the rest.
Preprocessing, class labels and patch boxes (of the size that the file was written at) travel in it, each a JSON text:
in ONNX under ``metadata_props``, in the other two as the extra file ``metadata.json``.

    session = onnxruntime.InferenceSession('model.onnx')
    logits, patch_logits, alpha, evidence = session.run(None, {'image': x})  # float32 NumPy array
    labels = json.loads(session.get_modelmeta().custom_metadata_map['labels'])

    out = torch.export.load('model.pt2').module()(x)                        # a dictionary; also torch.jit.load
"""
import copy
import io
import json
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .explanation import class_labels, held_of, input_config
from .explanation.evidence import direction_over_rivals, evidence_along
from .files import replacing
from .loading import full_name
from .models.any_timm import LossAttentionMixin
from .models.copies import without_graph
from .text import one_line

__all__ = ['FORMATS', 'OUTPUTS', 'ExportReport', 'export_model']

OUTPUTS = ('logits', 'patch_logits', 'alpha', 'evidence')
FORMATS = {'onnx': ('.onnx',), 'torch.export': ('.pt2',), 'torchscript': ('.pt', '.ts')}  # and their file extensions
METADATA_FILE = 'metadata.json'
BATCHES = (1, 7)  # that the written file is compared on
ODD = (13, 7)  # pixels more, that no patch size divides
LOWEST_OPSET = 18  # that PyTorch writes; asked for an older one it logs a traceback and gives this one
TOLERANCE = 1e-3  # relative to the largest output, but for α at least 1; the runtimes differ by 1e-5 or less


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        file: its path.
        format: a key of FORMATS.
        opset: ONNX operator set; None for the other formats.
        size: of the file, in bytes.
        input_size: (C, H, W).
        differences: batch size -> output -> max |Δ| between the loaded file and the model, all sizes together; empty
            for ONNX without onnxruntime.
        dynamic_size: it takes other heights and widths.
    """
    file: Path
    format: str
    opset: int | None
    size: int
    input_size: tuple[int, int, int]
    differences: dict[int, dict[str, float]]
    dynamic_size: bool = False


class NamedOutputs(nn.Module):
    """What the file computes: (B, C, H, W) images to a dictionary with the keys OUTPUTS.

    Args:
        model: patch model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.model.forward_patches(image)
        v = direction_over_rivals(out.logits, out.logits.argmax(dim=1))
        evidence = evidence_along(out.contributions, v)
        return {'logits': out.logits, 'patch_logits': out.patch_logits, 'alpha': out.alpha, 'evidence': evidence}


def export_model(
        model: Any, file: str | Path, format: str, img_size: int | None = None, opset: int | None = None,
        dynamic_size: bool = False) -> ExportReport:
    """Write a float32 copy of a patch model in eval mode to a file, after comparing the file with the model.

    Args:
        model: patch model with a classifier; it is not changed.
        file: its extension must fit the format; a file that exists is replaced, once the new one is complete.
        format: a key of FORMATS.
        img_size: height and width in pixels; None for those of the weights.
        opset: ONNX operator set; None for the exporter's default.
        dynamic_size: the file takes every height and width that the model does. It is compared at three sizes.

    Raises:
        ValueError: unknown format, extension or folder that does not fit, no patch model, or a size or an opset that
            is not possible, TorchScript of a model that it cannot read, or dynamic_size of one that takes one size or
            pads by the size as TensorFlow does.
        ImportError: packages of the extra ``export`` are missing.
        RuntimeError: the exporter failed, or the file does not compute what the model does.
    """
    file = Path(file)
    check_target(file, format, opset)
    if not hasattr(model, 'forward_patches'):
        raise ValueError('model: it has no forward_patches, so it is no patch model.')
    if format == 'torchscript' and isinstance(model, LossAttentionMixin):
        raise ValueError(f'format: torchscript cannot read {type(model).__name__}, whose patch outputs run as Python; '
                         'take onnx or torch.export.')
    if img_size is not None and img_size < 1:
        raise ValueError(f'img_size must be positive, got {img_size}.')
    config = input_config(model)
    channels, height, width = config['input_size']
    if img_size is not None:
        height = width = img_size
    input_size = (channels, height, width)
    module = NamedOutputs(copy.deepcopy(model, without_graph(model))).cpu().float().eval()
    if hasattr(module.model, 'set_grad_checkpointing'):
        module.model.set_grad_checkpointing(False)

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(b, *input_size, generator=generator) for b in BATCHES]
    try:
        with torch.no_grad():
            expected = [module(x) for x in batches]  # before the export, whose errors about the input are long
    except ValueError:
        raise
    except Exception as error:  # whatever a model's code raises for a size that it does not take
        raise ValueError(f'img_size: {type(model).__name__} does not take images of {height}×{width} pixels '
                         f'({one_line(error, 120)}).') from error
    if dynamic_size:
        check_padding(module)
        other, wanted_other = other_sizes(module, batches[0])
        batches, expected = [*batches, *other], [*expected, *wanted_other]
    metadata = {
        'architecture': full_name(model), 'held': held_of(model) or None,
        'xi': model.patch_weights.xi if model.patch_weights.informative else None,
        'labels': class_labels(model, model.num_classes), **config, 'input_size': input_size,
        'dynamic_size': dynamic_size, 'patch_grid': model.patch_grid(height, width),
        'patch_boxes': model.patch_boxes(height, width).tolist(),
    }

    with replacing(file) as temporary:
        try:
            temporary.touch()  # before the export, which takes a while
        except OSError as error:
            raise ValueError(f'file: cannot write into {file.parent}: {error.strerror}.') from None
        temporary.write_bytes(serialize(module, batches[1], format, opset, metadata, dynamic_size))
        size, written_opset = temporary.stat().st_size, read_opset(temporary) if format == 'onnx' else None
        if opset not in (None, written_opset):  # the exporter may fall back to another without an error
            raise ValueError(f'opset: the exporter cannot write this model in {opset}, it gave {written_opset}.')
        differences: dict[int, dict[str, float]] = {}
        if format != 'onnx' or find_spec('onnxruntime'):
            for x, computed, wanted in zip(batches, run_file(temporary, format, batches), expected):
                before = differences.get(len(x), {})
                differences[len(x)] = {
                    name: max(delta, before.get(name, 0.)) for name, delta in compare(computed, wanted).items()}
    return ExportReport(file, format, written_opset, size, input_size, differences, dynamic_size)


def check_padding(module: nn.Module) -> None:
    """ValueError for TensorFlow's padding, by the size, whose formulas grow with each layer that has a stride.

    torch.export had not ended after minutes, nor with whole-number arithmetic and multiples of 32 as sizes.
    """
    for name, part in module.named_modules():
        if type(part).__name__.endswith('Same'):  # timm's Conv2dSame, MaxPool2dSame and their like
            raise ValueError(f'dynamic_size: {name.removeprefix("model.")} pads by the size of the image, as in '
                             'TensorFlow, which PyTorch does not export in reasonable time; give one img_size instead.')


def other_sizes(module: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images of another height and width than x, those that the model takes, and what it makes of them.

    Raises:
        ValueError: it does not take images of twice the height.
    """
    height, width = x.shape[2:]
    images, outputs = [], []
    for size in ((2 * height, width), (height + ODD[0], width + ODD[1])):
        image = x.repeat(1, 1, 3, 2)[:, :, :size[0], :size[1]].contiguous()
        try:
            with torch.no_grad():
                outputs.append(module(image))
            images.append(image)
        except Exception as error:  # whatever a model's code raises for a size that it does not take
            if not images and size[0] == 2 * height:
                raise ValueError(f'dynamic_size: {type(module.model).__name__} does not take images of '
                                 f'{size[0]}×{size[1]} pixels ({one_line(error, 120)}).') from error
    return images, outputs


def check_target(file: Path, format: str, opset: int | None) -> None:
    """What can be said before the model runs. Raises ValueError and ImportError as export_model does."""
    if format not in FORMATS:
        raise ValueError(f'format must be one of {list(FORMATS)}, got {format!r}.')
    if file.suffix not in FORMATS[format]:
        raise ValueError(f'file: {file.name} must end in {" or ".join(FORMATS[format])} for the format {format}.')
    if file.is_dir():
        raise ValueError(f'file: {file} is a folder.')
    if format != 'onnx':
        if opset is not None:
            raise ValueError(f'opset: {format} has none; it is for the format onnx.')
        return
    missing = [name for name in ('onnx', 'onnxscript') if find_spec(name) is None]
    if missing:
        raise ImportError(f'the format onnx needs {" and ".join(missing)}: pip install "timm-lossattn[export]"')
    import onnx
    highest = onnx.defs.onnx_opset_version()
    if opset is not None and not LOWEST_OPSET <= opset <= highest:
        raise ValueError(f'opset must lie in [{LOWEST_OPSET}, {highest}], got {opset}.')


def serialize(
        module: nn.Module, example: torch.Tensor, format: str, opset: int | None, metadata: dict[str, Any],
        dynamic_size: bool = False) -> bytes:
    """The file's content.

    Args:
        module: NamedOutputs on the CPU, in eval mode.
        example: (B, C, H, W) with B > 1, because tracing takes a one for a constant.
        format: a key of FORMATS.
        opset: for ONNX.
        metadata: what goes along, values that JSON knows.
        dynamic_size: height and width are free.

    Raises:
        RuntimeError: the exporter failed, whatever it raised.
    """
    write = {'onnx': onnx_bytes, 'torch.export': program_bytes, 'torchscript': script_bytes}[format]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about what PyTorch will change or drop; nothing to do for the user
            return write(module, example, opset, metadata, dynamic_size)
    except Exception as error:
        raise RuntimeError(f'{format}: export failed: {one_line(error)}') from error


def onnx_bytes(
        module: nn.Module, example: torch.Tensor, opset: int | None, metadata: dict[str, Any],
        dynamic_size: bool) -> bytes:
    """ONNX with the weights inside (up to protobuf's 2 GiB)."""
    import onnx
    free: dict[int, Any] = {0: 'batch', 2: 'height', 3: 'width'} if dynamic_size else {0: 'batch'}
    program = torch.onnx.export(
        module, (example,), input_names=['image'], output_names=list(OUTPUTS), dynamic_shapes={'image': free},
        opset_version=opset, dynamo=True, verbose=False)
    assert program is not None
    proto = program.model_proto
    graph = proto.graph
    for part in (graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        part.ClearField('metadata_props')  # the exporter's notes: stack traces with the paths of this machine
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def program_bytes(
        module: nn.Module, example: torch.Tensor, opset: int | None, metadata: dict[str, Any],
        dynamic_size: bool) -> bytes:
    """torch.export's archive."""
    auto = torch.export.Dim.AUTO  # such sizes as the model takes: multiples of its patches, say
    free: dict[int, Any] = {0: torch.export.Dim('batch'), **({2: auto, 3: auto} if dynamic_size else {})}
    program = torch.export.export(module, (example,), dynamic_shapes={'image': free}, strict=False)
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # has the paths of this machine
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA_FILE: json.dumps(metadata)})
    return content.getvalue()


def script_bytes(
        module: nn.Module, example: torch.Tensor, opset: int | None, metadata: dict[str, Any],
        dynamic_size: bool) -> bytes:
    """TorchScript's archive. Scripted, not traced: a trace would take sizes of the example for constants."""
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(module), content, _extra_files={METADATA_FILE: json.dumps(metadata)})
    return content.getvalue()


def read_opset(file: Path) -> int:
    """The operator set of an ONNX file."""
    import onnx
    return next(o.version for o in onnx.load(str(file)).opset_import if o.domain in ('', 'ai.onnx'))


def run_file(file: Path, format: str, batches: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Load an exported file and run it on the CPU.

    Args:
        file: its path, with any extension.
        format: a key of FORMATS.
        batches: (B, C, H, W) images each.

    Raises:
        RuntimeError: the file does not load or run, whatever the runtime raised.
    """
    try:
        if format == 'onnx':
            import onnxruntime
            session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
            return [dict(zip(OUTPUTS, map(torch.from_numpy, session.run(list(OUTPUTS), {'image': x.numpy()}))))
                    for x in batches]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            content = io.BytesIO(file.read_bytes())  # torch.export.load wants a path to end in .pt2
            model: Any = torch.export.load(content).module() if format == 'torch.export' else torch.jit.load(content)
            return [model(x) for x in batches]
    except Exception as error:
        raise RuntimeError(f'{format}: the exported file does not run: {one_line(error)}') from error


def compare(outputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Output -> max |Δ|.

    Raises:
        RuntimeError: a difference that is more than rounding, or not a number.
    """
    differences = {name: float((outputs[name] - expected[name]).abs().max()) for name in OUTPUTS}
    for name, difference in differences.items():
        largest = float(expected[name].abs().max())  # of α about 1 / M
        if not difference <= TOLERANCE * (largest if name == 'alpha' else max(1., largest)):
            raise RuntimeError(f'the exported file does not compute what the model does: {name}, |Δ| = {difference}.')
    return differences
