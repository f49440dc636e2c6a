"""Relevance for every weight of a neural network, and compression by it.

The rooms, from bottom to top; each uses only those above it in this list:

- ``files``, ``data``, ``models``, ``train``, ``bases``: images, networks, how they are trained
- ``relevance``, ``criteria``: images to scores
- ``prune``, ``reconstruct``: scores to masks and refitted weights
- ``quantize``, ``allocate``: scores to codes
- ``codec``, ``export``: codes to a file and back; ONNX
- ``recipes``: the one pipeline

The experiments stand on top: ``runs``, ``claims``, ``checks``, ``plots``, ``notebooks``,
``verify`` and ``readme``.
"""
