"""Coders that are installed packages, in an environment of their own: one process for each.

    python bench/peers/installed.py nncodec|quanto|torchao FOLDER

Reads ``FOLDER/state.safetensors`` (float32) and ``FOLDER/network.json`` (which BatchNorm follows
which layer). For each line of JSON on the standard input, settings, it writes ``FOLDER/coded``,
reads that file back into ``FOLDER/decoded.safetensors``, and answers with a line of JSON. The first
line that it writes is its version. Imports nothing of the study, whose packages do not go together
with these.
"""

import io
import json
import lzma
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]
Coder = Callable[[State, dict, dict], bytes]
EPSILON = 1e-5
"""Of BatchNorm, torch's default and what NNCodec folds with."""
Decoder = Callable[[bytes, State, dict, dict], State]


def nncodec_blocks(state: State, network: dict) -> dict:
    """Which tensors belong to one layer, as folding of BatchNorm inside NNCodec asks for it."""
    kinds, owners = {}, {}
    layers = {name.removesuffix(".weight") for name, value in state.items() if value.ndim > 1}
    for norm, layer in network["batchnorms"].items():
        parts = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "var"}
        for part, kind in parts.items():
            kinds[f"{norm}.{part}"], owners[f"{norm}.{part}"] = f"bn.{kind}", layer
    for layer in layers:
        for part, kind in {"weight": "weight", "bias": "bias"}.items():
            if (name := f"{layer}.{part}") in state:
                kinds[name], owners[name] = kind, layer
    for name in state.keys() - kinds.keys():
        kinds[name], owners[name] = "unspecified", None
    return {"parameter_type": kinds, "block_identifier": owners}


def nncodec_encode(state: State, network: dict, settings: dict) -> bytes:
    """NNCodec's bitstream; see ``grid.NNCODEC`` for the settings."""
    from nncodec import nnc

    parameters = {name: value.numpy() for name, value in state.items()}
    chosen = dict(settings)
    if chosen.get("bnf"):
        chosen["block_id_and_param_type"] = nncodec_blocks(state, network)
    return bytes(
        nnc.compress(
            parameters, bitstream_path=None, return_bitstream=True, row_skipping=True, **chosen
        )  # fmt: skip
    )


def nncodec_decode(data: bytes, like: State, network: dict, settings: dict) -> State:
    """Tensors of a bitstream; its folded BatchNorms are in the weights and only shift."""
    from nncodec import nnc

    folded = bool(settings.get("bnf"))
    arrays = nnc.decompress(bytearray(data), reconstruct_lsa=folded)
    found = {name: torch.from_numpy(value) for name, value in arrays.items()}
    for norm, layer in network["batchnorms"].items() if folded else ():
        # the shift has the name of the layer's bias, or one made up where it has none
        shift = found.pop(f"{layer}.weight.bias", torch.zeros_like(like[f"{norm}.bias"]))
        found[f"{norm}.bias"], one = shift, torch.ones_like(shift)
        found[f"{norm}.weight"], found[f"{norm}.running_mean"] = one, torch.zeros_like(shift)
        found[f"{norm}.running_var"] = one - EPSILON
    return found


def modules(state: State, matrices: bool) -> nn.ModuleDict:
    """Linear and convolutional layers that hold a state's weights; ``matrices``: linear only."""
    layers = nn.ModuleDict()
    for name, weight in state.items():
        if weight.ndim < 2:
            continue
        bias = state.get(f"{name.removesuffix('.weight')}.bias")
        flat = weight.flatten(1) if matrices else weight
        layer = (
            nn.Linear(*reversed(flat.shape), bias=bias is not None)
            if flat.ndim == 2
            else nn.Conv2d(flat.shape[1], flat.shape[0], flat.shape[2:], bias=bias is not None)
        )
        layer.weight.data = flat.clone()
        if bias is not None:
            layer.bias.data = bias.clone()
        layers[name.removesuffix(".weight").replace(".", "/")] = layer
    return layers


def state_of(layers: nn.ModuleDict, like: State) -> State:
    """The float32 state that quantized layers compute with."""
    found = {}
    for name, layer in layers.items():
        for part in ("weight", "bias"):
            if (value := getattr(layer, part)) is not None:
                key = f"{name.replace('/', '.')}.{part}"
                value = value.dequantize() if hasattr(value, "dequantize") else value
                found[key] = value.detach().float().reshape(like[key].shape).contiguous()
    return found


def packed(content: object) -> bytes:
    """What ``torch.save`` writes, by xz: neither package packs its codes densely at all widths."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def unpacked(data: bytes) -> object:
    """What ``packed`` was given; the file was written in this process."""
    return torch.load(io.BytesIO(lzma.decompress(data)), weights_only=False)


def quanto_encode(state: State, network: dict, settings: dict) -> bytes:
    """Weights by optimum-quanto, saved as its documentation does: state_dict and its map."""
    from optimum import quanto

    layers = modules(state, matrices=False)
    quanto.quantize(layers, weights=getattr(quanto, settings["weights"]))
    quanto.freeze(layers)
    return packed((layers.state_dict(), quanto.quantization_map(layers)))


def quanto_decode(data: bytes, like: State, network: dict, settings: dict) -> State:
    """Weights that the saved state stands for."""
    from optimum import quanto

    saved, kinds = unpacked(data)
    empty = modules({name: torch.zeros_like(value) for name, value in like.items()}, matrices=False)
    quanto.requantize(empty, saved, kinds)
    return state_of(empty, like)


def torchao_encode(state: State, network: dict, settings: dict) -> bytes:
    """Weights by torchao, which quantizes linear layers: convolutions are handed over as those."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    layers = modules(state, matrices=True)
    kind, group = getattr(torch, f"int{settings['bits']}"), settings.get("group")

    def divides(layer: nn.Module) -> bool:
        return bool(group) and layer.in_features % group == 0

    for grouped, granularity in ((True, PerGroup(group or 1)), (False, PerAxis(0))):
        quantize_(
            layers,
            IntxWeightOnlyConfig(weight_dtype=kind, granularity=granularity),
            filter_fn=lambda layer, name, grouped=grouped: (
                isinstance(layer, nn.Linear) and divides(layer) == grouped
            ),
        )
    return packed(layers.state_dict())


def torchao_decode(data: bytes, like: State, network: dict, settings: dict) -> State:
    """Weights that the saved state stands for."""
    empty = modules({name: torch.zeros_like(value) for name, value in like.items()}, matrices=True)
    empty.load_state_dict(unpacked(data), assign=True)
    return state_of(empty, like)


CODERS: dict[str, tuple[str, Coder, Decoder]] = {
    "nncodec": ("nncodec", nncodec_encode, nncodec_decode),
    "quanto": ("optimum-quanto", quanto_encode, quanto_decode),
    "torchao": ("torchao", torchao_encode, torchao_decode),
}


def main() -> None:
    """Serve until the standard input ends."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # packages print
    torch.set_num_threads(1)
    package, encode, decode = CODERS[name]
    state = load_file(folder / "state.safetensors")
    network = json.loads((folder / "network.json").read_text())
    print(json.dumps({"version": version(package)}), file=answers, flush=True)
    for line in sys.stdin:
        settings = json.loads(line)
        (folder / "coded").write_bytes(encode(state, network, settings))
        decoded = decode((folder / "coded").read_bytes(), state, network, settings)
        save_file({k: v.contiguous() for k, v in decoded.items()}, folder / "decoded.safetensors")
        print(json.dumps({"done": settings}), file=answers, flush=True)


if __name__ == "__main__":
    main()
