"""The integer form of an ONNX file: QuantizeLinear/DequantizeLinear pairs (QDQ)."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .codec import Compressed
from .codec.container import Entry
from .codes import Codes

DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
INTEGER = ["Conv", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "MaxPool", "AveragePool"]
INTEGER += ["GlobalAveragePool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"]
INTEGER += ["Slice", "Pad", "Concat", "Split"]  # all else stays float, such as normalisation
PASSED = {"Add", "Sub", "Mul", "Div", "Where", "Clip", "Max", "Min", "Cast", "Expand", "Reshape"}
PASSED |= {"Transpose", "Squeeze", "Unsqueeze", "Slice", "Concat", "Split", "Pad"}


def quantize(data: bytes, model: nn.Module, compressed: Compressed, images: Tensor) -> bytes:
    """An ONNX file of integers from one of floats, see :func:`.onnx.to_onnx`.

    The float file computes what ``model`` does and has its weights under the same names;
    ``compressed`` has the Codes of some. The ranges of activations are those met on the images
    [N, ...].
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        """Calibration images, 32 at a time."""

        def __init__(self) -> None:
            self._parts = iter(images.split(32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            part = next(self._parts, None)
            return None if part is None else {"images": part.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(onnx.load_from_string(data), source, skip_symbolic_shape=True)
        graph = onnx.load(source).graph
        found = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        quantize_static(
            source,
            target,
            Batches(),
            op_types_to_quantize=INTEGER,
            nodes_to_exclude=_before_softmax(graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "MatMulConstBOnly": True,
                "TensorQuantOverrides": {
                    name: [{"quant_type": QuantType.QInt8} | channel for channel in channels]
                    for name, channels in _overrides(model, compressed, found).items()
                },
            },
        )
        data = target.read_bytes()
    onnx.checker.check_model(data, full_check=True)
    return data


def _before_softmax(graph: Any) -> list[str]:
    """Names of the nodes between matrix products and a softmax, where a mask may be added."""
    makers = {output: node for node in graph.node for output in node.output}
    found: dict[str, None] = {}
    reading = [node for node in graph.node if node.op_type == "Softmax"]
    while reading:
        for name in reading.pop().input:
            node = makers.get(name)
            if node is not None and node.op_type in PASSED and node.name not in found:
                found[node.name] = None
                reading.append(node)
    return list(found)


def _overrides(
    model: nn.Module, compressed: Compressed, found: dict[str, list[int]]
) -> dict[str, list[dict[str, Any]]]:
    """Scales of the weights that the graph has under their own names, as onnxruntime wants them."""
    overrides = {}
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        if isinstance(module, DENSE) and found.get(name) == list(module.weight.shape):
            scales = _scales(module.weight.detach(), compressed.get(name))
            axis = {"axis": 0} if len(scales) > 1 else {}
            overrides[name] = [
                {"scale": scale, "zero_point": np.int8(0)} | axis for scale in scales.numpy()
            ]
    return overrides


def _scales(weight: Tensor, entry: Entry | None) -> Tensor:
    """Scales, float32 [1] or [output channels], that give the integers of a folded weight."""
    rows = weight.double().reshape(len(weight), -1)
    scales = rows.abs().amax(1) / 127
    if isinstance(entry, Codes) and entry.kind in ("uniform", "channel"):
        symbols = entry.symbols.double().reshape(len(weight), -1)
        # Least squares is exact here: each row is its symbols times a step and a folded gain.
        steps = ((rows * symbols).sum(1) / symbols.square().sum(1)).nan_to_num()
        residual = (rows - steps[:, None] * symbols).abs().amax(1)
        if symbols.abs().max() <= 127 and bool((residual <= 1e-3 * steps.abs()).all()):
            scales = steps.abs()
    used = scales > 0
    if not used.any():
        return torch.ones(1)
    # A bias is rounded to steps of its channel's scale, also where all weights are zero.
    scales = torch.where(used, scales, scales[used].min())
    alike = bool((scales.max() - scales.min()) <= 1e-6 * scales.max())
    return (scales[:1] if alike else scales).float()
