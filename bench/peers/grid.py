"""Settings that each coder is run with: chosen among by validation accuracy and bytes.

They stand in ladders, from large files to small ones; a ladder ends at the first file that loses
too much.
"""

_STEPS = {"resnet20": range(-26, -7), "vgg16": range(-36, -15)}
"""By model, quantization parameters of NNCodec; four more double the step."""
_OTHERS = range(-28, -7)


def _nncodec(model: str) -> list[list[dict]]:
    """Dependent quantization throughout; its default for what is not a weight is -75.

    BatchNorm is folded into scales where there is some, which saves bytes at no loss. LeNets, of
    which a file takes seconds, are tried at several prices of a bit in its trellis, too.
    """
    norms, steps = not model.startswith("lenet"), _STEPS.get(model, _OTHERS)
    pairs = [(-32, 0.0), (-28, 0.0)]
    pairs += [] if norms else [(-75, 0.0), (-28, 0.2), (-28, 0.5), (-28, 1.0), (-28, 2.0)]
    ladders = [
        [{"qp": qp, "nonweight_qp": other, "lambda_scale": price} for qp in steps]
        for other, price in pairs
    ]
    between = {"nonweight_qp": -56, "lambda_scale": 0.0, "qp_density": 3}  # eight steps an octave
    ladders.append([{"qp": 2 * qp + 1} | between for qp in steps])
    return [[each | {"use_dq": True, "bnf": norms} for each in ladder] for ladder in ladders]


def _deep_compression(model: str) -> list[list[dict]]:
    thresholds = (0, 0.3, 0.6, 0.8, 1.0, 1.25, 1.5)
    return [
        [{"threshold": threshold, "clusters": clusters} for threshold in thresholds]
        for clusters in (32, 16, 8, 4)
    ]


def _gptq(model: str) -> list[list[dict]]:
    return [[{"bits": bits, "group": group} for bits in (4, 3, 2)] for group in (0, 64)]


def _quanto(model: str) -> list[list[dict]]:
    return [[{"weights": kind} for kind in ("qint8", "qint4", "qint2")]]


def _torchao(model: str) -> list[list[dict]]:
    return [[{"bits": bits, "group": group} for bits in (8, 4, 3, 2)] for group in (0, 32)]


GRIDS = {
    "nncodec": _nncodec,
    "deep compression": _deep_compression,
    "gptq": _gptq,
    "quanto": _quanto,
    "torchao": _torchao,
}


def ladders(coder: str, model: str) -> list[list[dict]]:
    """All settings of a coder for a network, JSON-serialisable.

    Parameters
    ----------
    coder : str
        A key of ``GRIDS``.
    model : str
        Its name in ``study.networks.NETWORKS``.
    """
    return GRIDS[coder](model)
