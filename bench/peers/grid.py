"""Settings that each coder is run with: chosen among by validation accuracy and bytes."""

from itertools import product

_STEPS = {"": range(-34, -7), "resnet20": range(-40, -13), "vgg16": range(-40, -17)}
"""By model, quantization parameters of NNCodec; four more double the step."""
_NONWEIGHT = (-75, -36, -32)
"""The same for what is not a weight: its default, and coarser."""
_LAMBDAS = (0.0, 0.3, 1.0)
"""What a bit costs its trellis; zero: nothing."""


def _nncodec(model: str) -> list[dict]:
    return [
        {"qp": qp, "nonweight_qp": other, "lambda_scale": price, "use_dq": True, "bnf": bnf}
        for bnf, price, other, qp in product(
            (False,) if model.startswith("lenet") else (False, True), _LAMBDAS, _NONWEIGHT,
            _STEPS.get(model, _STEPS[""]),
        )
    ]  # fmt: skip


def _deep_compression(model: str) -> list[dict]:
    thresholds = (0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5)
    return [
        {"threshold": threshold, "clusters": clusters}
        for threshold, clusters in product(thresholds, (4, 6, 8, 12, 16, 24, 32, 64))
    ]


def _gptq(model: str) -> list[dict]:
    return [{"bits": bits, "group": group} for bits, group in product((2, 3, 4), (0, 64))]


def _quanto(model: str) -> list[dict]:
    return [{"weights": kind} for kind in ("qint2", "qint4", "qint8")]


def _torchao(model: str) -> list[dict]:
    return [{"bits": bits, "group": group} for bits, group in product((2, 3, 4, 8), (0, 32))]


GRIDS = {
    "nncodec": _nncodec,
    "deep compression": _deep_compression,
    "gptq": _gptq,
    "quanto": _quanto,
    "torchao": _torchao,
}


def settings(coder: str, model: str) -> list[dict]:
    """All settings of a coder for a network, JSON-serialisable.

    Parameters
    ----------
    coder : str
        A key of ``GRIDS``.
    model : str
        Its name in ``study.networks.NETWORKS``.
    """
    return GRIDS[coder](model)
