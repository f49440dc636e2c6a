"""ONNX files of compressed models: float with zeros, and 8 bit integers (QDQ).

Unstructured zeros make the compressed file small, but an ONNX file stores them and a runtime
multiplies by them. What saves time is the integer file.
"""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .codec import Compressed
from .files import write_bytes
from .fold import fold_batchnorm
from .inputs import evaluated, split
from .onnx_int8 import quantize
from .warning import warn

OPSET = 17  # the newest that torch's exporter writes without further packages
TOLERANCE = 1e-4  # between float file and model, relative where outputs exceed one
FEWEST, BATCH = 5, 50  # images on which a file is compared with the model; of these at a time
FAR = 0.25  # of the outputs' size; a change by 8 bits that deserves a warning


def to_onnx(
    compressed: Compressed, model: nn.Module, images: Tensor, path: str | Path, *,
    int8: bool = False,
) -> int:  # fmt: skip
    """Write the decoded model as an ONNX file, whole or not at all.

    Parameters
    ----------
    compressed : Compressed
        The weights. Zeros in them are zeros in the file, float or int8.
    model : nn.Module
        Its architecture, with one input and one output; stays as it is.
    images : Tensor
        [N, ...], N >= 1, as the model takes them, from the training data. The file is compared
        with the model on all of them. The ranges of the int8 file's activations are those met on
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
    ImportError
        Without the packages onnx and onnxruntime.

    Notes
    -----
    The graph maps ``images`` to ``logits``, its first axis is free, and BatchNorm is folded into
    the layers before it. Before the float file is written, its outputs are compared with the
    decoded model's: they differ by less than 1e-4 (relative, where logits exceed one).

    A UserWarning tells where the int8 file's outputs differ by a quarter of their size or more.
    The int8 file has QuantizeLinear/DequantizeLinear pairs around convolutions, linear layers,
    additions and pooling: uint8 activations with one scale and zero point a tensor, int8 weights
    with zero point 0, int32 biases. How weights get their integers depends on their Codes:

    - "uniform" and "channel" with symbols in [−127, 127]: the symbols themselves, with the
      Codes' steps as scales, times the gain of a folded BatchNorm where the file has one. No
      second rounding takes place.
    - "tier", "codebook", wider symbols, and layers stored without Codes: the decoded weights are
      rounded to 255 levels with one scale for each output channel, max |w| / 127.

    Transposed convolutions, normalisation that cannot be folded, products of two activations,
    softmax and what is added to its input (a mask may be of any size) stay float. x86 processors
    without VNNI add pairs of products in 16 bits, which can overflow; :func:`run_onnx` asks
    onnxruntime for its slower, exact way there, by ``session.x64quantprecision``, and so should
    programs of your own.

    References
    ----------
    Jacob et al.: Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, CVPR 2018, section 2.
    """
    _packages()
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; create it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    if not images.ndim or not len(images) or not bool(images.isfinite().all()):
        raise ValueError(f"images must be [N, ...], N >= 1, and finite, not {list(images.shape)}")
    decoded = evaluated(compressed.to_model(model).cpu().float())
    images = images.detach().cpu()
    images = images.float() if images.is_floating_point() else images
    shown = images if len(images) >= FEWEST else _some(images, FEWEST)
    expected = _outputs(decoded, shown, list(images.shape))
    folded = fold_batchnorm(decoded, images)
    data = _trace(folded, shown, expected)
    if int8:
        with _saying("the network cannot be written in 8 bits", "Write it in float32 (int8=False)"):
            data = quantize(data, folded, compressed, images)
            _warn_if_far(_found(data, shown), expected)
    write_bytes(path, data)
    return len(data)


def run_onnx(path: str | Path, images: Tensor, batch_size: int = 500) -> Tensor:
    """Outputs, float32 [N, classes], of an ONNX file from onnxruntime on the CPU.

    Parameters
    ----------
    path : str or Path
        A file with one input and one output, such as those of :func:`to_onnx`.
    images : Tensor
        [N, ...], N >= 1.
    batch_size : int
        Images computed at once, by as many threads as torch has.

    Raises
    ------
    ValueError
        For a file that is missing or is not ONNX, and for images of another shape.
    ImportError
        Without the packages onnx and onnxruntime.
    """
    _packages()
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); write it first") from None
    with _saying(f"{path} is not a usable ONNX file"):
        session = _session(data)
    return torch.cat([_logits(session, part) for part in images.detach().cpu().split(batch_size)])


def _packages() -> tuple[ModuleType, ModuleType]:
    """onnx and onnxruntime, which all else here works without."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            'ONNX files need the packages onnx and onnxruntime: pip install "xai-compression[onnx]"'
        ) from error
    return onnx, onnxruntime


def _some(images: Tensor, count: int) -> Tensor:
    """So many images, over and over where there are fewer."""
    return images[torch.arange(count) % len(images)]


def _outputs(model: nn.Module, images: Tensor, shape: list[int]) -> Tensor:
    """What the file is to give for these images [N, ...]; ``shape`` is that of those given."""
    expected = []
    given = f"images {shape}, give it images as in training"
    for part in split(images, BATCH):
        with _composed_attention(), torch.no_grad(), _saying(f"the model cannot be run on {given}"):
            expected.append(model(part.clone()))
        if not isinstance(expected[-1], Tensor) or expected[-1].shape[:1] != part.shape[:1]:
            raise ValueError(
                "only a network with one output, a tensor [N, ...], can be exported; wrap yours in "
                "a module that returns one"
            )
    return torch.cat(expected)


def _found(data: bytes, images: Tensor) -> Tensor:
    """What a file gives for these images, [N, ...]."""
    session = _session(data)
    return torch.cat([_logits(session, part) for part in split(images, BATCH)])


def _warn_if_far(found: Tensor, expected: Tensor) -> None:
    """Warn where eight bits change the outputs by much of their size."""
    difference = float((found - expected).norm() / expected.norm())
    if not difference < FAR:
        warn(
            f"the 8 bit file's outputs differ by {difference:.0%} of their size from the "
            "network's: some activation has too wide a range for 8 bits (a mask of large negative "
            "numbers?); measure its accuracy with run_onnx, or write float32 (int8=False)",
        )


def _trace(model: nn.Module, images: Tensor, expected: Tensor) -> bytes:
    """Bytes of the float file, checked on another number of images than it was traced with."""
    onnx, _ = _packages()
    unwritable = _saying(
        "the network cannot be written as ONNX",
        "Replace that operation, or keep the compressed file (Compressed.save) and run it with "
        "to_model",
    )
    with _composed_attention(), torch.no_grad(), unwritable:
        data = _export(model, _some(images, 2))
        onnx.checker.check_model(data, full_check=True)
        found = _found(data, images)
    difference = float((found - expected).abs().max()) if found.shape == expected.shape else np.inf
    if not difference < TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"the ONNX form differs by {difference:.2g} from the network, whose forward seems to "
            "depend on values or on the number of images; make it a fixed sequence of tensor "
            "operations"
        )
    return data


def _export(model: nn.Module, images: Tensor) -> bytes:
    """Bytes of the traced graph."""
    free = {0: "batch"}
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),  # it prints the whole graph where it fails
    ):
        path = Path(folder) / "float.onnx"
        # The successor of this exporter needs a further package and gives the same graph.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding")
        torch.onnx.export(
            model, (images,), path, dynamo=False, opset_version=OPSET, input_names=["images"],
            output_names=["logits"], dynamic_axes={"images": free, "logits": free},
        )  # fmt: skip
        return path.read_bytes()


@contextlib.contextmanager
def _composed_attention() -> Iterator[None]:
    """Attention as a sequence of operations: its fused form has no ONNX counterpart."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _session(data: bytes) -> Any:
    """An onnxruntime session on the CPU with as many threads as torch has."""
    _, onnxruntime = _packages()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, they need not be printed as well
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _logits(session: Any, images: Tensor) -> Tensor:
    """Outputs of a session with one input and one output for one batch."""
    images = images.float() if images.is_floating_point() else images
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    with _saying(f"the ONNX file takes {source.shape} and cannot be run on {list(images.shape)}"):
        return torch.from_numpy(session.run([target.name], {source.name: images.numpy()})[0])


@contextlib.contextmanager
def _saying(what: str, remedy: str = "") -> Iterator[None]:
    """Raise ValueErrors: users' forwards, exporter, checker and onnxruntime raise anything."""
    try:
        yield
    except Exception as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{what}: {why}" + (f". {remedy}" if remedy else "")) from error
