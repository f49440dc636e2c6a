"""ONNX files of compressed models: float with zeros, and 8 bit integers (QDQ).

Unstructured zeros make the compressed file small, but an ONNX file stores them and a runtime
multiplies by them. What saves time is the integer file.
"""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from lib.codec import Compressed
from lib.files import write_bytes
from lib.models import fold_batchnorm
from lib.quantize import Codes

__all__ = ["run_onnx", "to_onnx"]

OPSET = 17
SCORED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
INTEGER = ["Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "MaxPool", "AveragePool"]
INTEGER += ["GlobalAveragePool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"]
INTEGER += ["Slice", "Pad", "Concat", "Split"]  # all else stays float, such as normalisation
TOLERANCE = 1e-4


def to_onnx(
    compressed: Compressed, model: nn.Module, images: Tensor, path: str | Path, *,
    int8: bool = False,
) -> int:
    """Write the decoded model as an ONNX file, whole or not at all.

    Parameters
    ----------
    compressed : Compressed
        The weights. Zeros in them are zeros in the file, float or int8.
    model : nn.Module
        Its architecture, with one input and one output; stays as it is.
    images : Tensor
        [N, ...], N >= 1, as the model takes them, from the training data. The float file is
        checked on the first of them. The ranges of the int8 file's activations are those met on
        all of them: a hundred are enough, and they should cover every class.
    path : str or Path
        Where to; an older file is replaced only by a complete one.
    int8 : bool
        Weights and activations in 8 bits instead of float32.

    Returns
    -------
    int
        The file's size in bytes.

    Raises
    ------
    ValueError
        For a missing folder, images that the model does not take, a network that cannot be
        traced or whose ONNX form computes something else, and (as `CompressedFileError`) for a
        model of another architecture. An older file stays as it was.

    Notes
    -----
    The graph maps ``images`` to ``logits``, its first axis is free, and BatchNorm is folded into
    the layers before it. Before the float file is written, its outputs are compared with the
    decoded model's: they differ by less than 1e-4 (relative, where logits exceed one).

    The int8 file has QuantizeLinear/DequantizeLinear pairs around convolutions, linear layers,
    additions and pooling: uint8 activations with one scale and zero point a tensor, int8 weights
    with zero point 0, int32 biases. How weights get their integers depends on their Codes:

    - "uniform" and "channel" with symbols in [−127, 127]: the symbols themselves, with the
      Codes' steps as scales, times the gain of a folded BatchNorm where the file has one. No
      second rounding takes place.
    - "tier", "codebook", wider symbols, and layers stored without Codes: the decoded weights are
      rounded to 255 levels with one scale for each output channel, max |w| / 127.

    Transposed convolutions, normalisation that cannot be folded, softmax and products of two
    activations stay float. x86 processors without VNNI add pairs of products in 16 bits, which
    can overflow; :func:`run_onnx` asks onnxruntime for its slower, exact way there, by
    ``session.x64quantprecision``, and so should programs of your own.

    References
    ----------
    Jacob et al.: Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, CVPR 2018, section 2.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    if not images.ndim or not len(images) or not bool(images.isfinite().all()):
        raise ValueError(f"images must be [N, ...], N >= 1, and finite, not {list(images.shape)}")
    decoded = fold_batchnorm(compressed.to_model(model)).cpu().float()
    images = images.detach().cpu()
    images = images.float() if images.is_floating_point() else images
    data = _trace(decoded, images)
    if int8:
        data = _quantize(data, decoded, compressed, images)
        _logits(_session(data), images[:2])
    write_bytes(path, data)
    return len(data)


def run_onnx(path: str | Path, images: Tensor, batch_size: int = 500) -> Tensor:
    """Outputs of an ONNX file from onnxruntime on the CPU.

    Parameters
    ----------
    path : str or Path
        A file with one input and one output, such as those of :func:`to_onnx`.
    images : Tensor
        [N, ...], N >= 1.
    batch_size : int
        Images computed at once, by as many threads as torch has.

    Returns
    -------
    Tensor
        float32 [N, classes], on the CPU.

    Raises
    ------
    ValueError
        For a file that is missing or is not ONNX, and for images of another shape.
    """
    try:
        session = _session(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); write it first") from None
    except Exception as error:  # onnxruntime has a dozen of its own, without a common base
        raise ValueError(f"{path} is not a usable ONNX file: {_first_line(error)}") from error
    return torch.cat([_logits(session, part) for part in images.detach().cpu().split(batch_size)])


class _Batches(CalibrationDataReader):
    """Calibration images, 32 at a time."""

    def __init__(self, images):
        self._parts = iter(images.split(32))

    def get_next(self):
        part = next(self._parts, None)
        return None if part is None else {"images": part.numpy()}


def _trace(model, images):
    """Bytes of the float file, checked against the model on another number of images."""
    few, more = (images[torch.arange(n) % len(images)] for n in (2, 5))
    with _composed_attention(), torch.no_grad():
        try:
            expected = model(more)
        except Exception as error:  # a user's forward raises anything
            raise ValueError(f"the model cannot be run on images {list(images.shape)}, give it "
                             f"images as in training: {_first_line(error)}") from error
        if not isinstance(expected, Tensor) or expected.shape[:1] != more.shape[:1]:
            raise ValueError("only a network with one output, a tensor [N, ...], can be exported; "
                             "wrap yours in a module that returns one")
        try:
            data = _export(model, few)
            onnx.checker.check_model(data, full_check=True)
            found = _logits(_session(data), more)
        except Exception as error:  # as do the exporter, the checker and onnxruntime
            raise ValueError(
                f"the network cannot be written as ONNX: {_first_line(error)}. Replace that "
                "operation, or keep the compressed file (Compressed.save) and run it with to_model"
            ) from error
    difference = float((found - expected).abs().max()) if found.shape == expected.shape else np.inf
    if not difference < TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"the ONNX form differs by {difference:.2g} from the network, whose forward seems to "
            "depend on values or on the number of images; make it a fixed sequence of tensor "
            "operations"
        )
    return data


def _export(model, images):
    buffer, free = io.BytesIO(), {0: "batch"}
    with warnings.catch_warnings():
        # The successor of this exporter needs a further package and gives the same graph.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding")
        torch.onnx.export(
            model, (images,), buffer, dynamo=False, opset_version=OPSET,
            input_names=["images"], output_names=["logits"],
            dynamic_axes={"images": free, "logits": free},
        )  # fmt: skip
    return buffer.getvalue()


@contextlib.contextmanager
def _composed_attention():
    """Attention as a sequence of operations: its fused form has no ONNX counterpart."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _quantize(data, model, compressed, images):
    """Bytes of the int8 file for those of the float file."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(onnx.load_from_string(data), source, skip_symbolic_shape=True)
        found = {tensor.name: list(tensor.dims) for tensor in onnx.load(source).graph.initializer}
        quantize_static(
            source, target, _Batches(images), op_types_to_quantize=INTEGER,
            per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={
                "MatMulConstBOnly": True,
                "TensorQuantOverrides": _overrides(model, compressed, found),
            },
        )  # fmt: skip
        data = target.read_bytes()
    onnx.checker.check_model(data, full_check=True)
    return data


def _overrides(model, compressed, found):
    """Scales of the weights that the graph has under their own names, as onnxruntime wants them."""
    overrides = {}
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if isinstance(module, SCORED) and found.get(name) == list(module.weight.shape):
            scales = _scales(module.weight.detach(), compressed.get(name))
            channels = [{"scale": scale, "zero_point": np.int8(0)} for scale in scales.numpy()]
            if len(channels) > 1:
                channels = [channel | {"axis": 0} for channel in channels]
            overrides[name] = [{"quant_type": QuantType.QInt8} | channel for channel in channels]
    return overrides


def _scales(weight, entry):
    """Scales, float32 [1] or [output channels], that give the integers of a folded weight."""
    rows = weight.double().reshape(len(weight), -1)
    scales = rows.abs().amax(1) / 127
    if isinstance(entry, Codes) and entry.kind in ("uniform", "channel"):
        symbols = entry.symbols.double().reshape(len(weight), -1)
        # Least squares is exact here: each row is its symbols times a step and a folded gain.
        steps = (rows * symbols).sum(1) / symbols.square().sum(1)
        residual = (rows - steps.nan_to_num()[:, None] * symbols).abs().amax(1)
        if symbols.abs().max() <= 127 and bool((residual <= 1e-3 * steps.nan_to_num().abs()).all()):
            scales = steps.nan_to_num().abs()
    used = scales > 0
    if not used.any():
        return torch.ones(1)
    # A bias is rounded to steps of its channel's scale, also where all weights are zero.
    scales = torch.where(used, scales, scales[used].min())
    alike = bool((scales.max() - scales.min()) <= 1e-6 * scales.max())
    return (scales[:1] if alike else scales).float()


def _session(data):
    """An onnxruntime session on the CPU with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, they need not be printed as well
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _logits(session, images):
    """Outputs of a session with one input and one output for one batch."""
    images = images.float() if images.is_floating_point() else images
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    try:
        return torch.from_numpy(session.run([target.name], {source.name: images.numpy()})[0])
    except Exception as error:  # as above
        raise ValueError(
            f"the ONNX file takes {source.shape} and cannot be run on {list(images.shape)}: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
