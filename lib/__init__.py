"""Relevance for every weight of a neural network, and compression by it.

The rooms, from bottom to top: ``data``, ``models``, ``train``; ``relevance`` and ``criteria``
(images to scores); ``prune`` and ``reconstruct`` (scores to masks and refitted weights);
``quantize`` (scores to codes); ``codec`` (codes to a file and back); ``recipes`` (the one
pipeline); ``export`` (ONNX). ``runs`` and ``plots`` serve the notebooks only.
"""
