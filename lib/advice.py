"""What a result should be told with: sizes it is compared with, and warnings."""

from torch import Tensor, nn

from .codec import Compressed, identity
from .codes import Codes
from .finetune import evaluate
from .inputs import tensors_of
from .prune import Removed
from .warning import warn

UNSCORED = 0.01  # share of the file from which weights left as they are deserve a warning
SMALLEST, LARGEST = 1e-5, 1e6  # of a layer's largest weight, in 16 to 127 steps of float16
LOST = 10.0  # points of accuracy on the reference images whose loss is worth a warning


def float_bytes(model: nn.Module) -> int:
    """Bytes of a state_dict in float32; integer buffers as they are, tied weights once."""
    single = {identity(tensor): tensor for tensor in tensors_of(model).values()}
    return sum((4 if t.is_floating_point() else t.element_size()) * t.numel()
               for t in single.values())  # fmt: skip


def warn_of_unscored(removed: Removed, result: Compressed) -> None:
    """Name the layers whose matrices are stored as floats, since no rule scores them."""
    scored = {id(removed.network.get_parameter(name)) for name in removed.masks}
    sizes: dict[str, int] = {}
    for name, p in removed.network.named_parameters():
        if p.ndim > 1 and id(p) not in scored and name in result:
            path = name.rpartition(".")[0]
            module = removed.network.get_submodule(path)
            owner = f"{path or '(the model itself)'!r} ({type(module).__name__})"
            entry = result[name]
            size = entry.nbytes if isinstance(entry, Tensor) else 0
            sizes[owner] = sizes.get(owner, 0) + size
    total = result.nbytes
    if sum(sizes.values()) >= UNSCORED * total:
        parts = [f"{owner}: {size / total:.0%} of the file" for owner, size in sizes.items()]
        warn(
            "weights that no rule scores are stored as they are, neither pruned nor quantized: "
            + ", ".join(parts),
        )


def warn_of_sizes(removed: Removed) -> None:
    """Name the layers whose weights are too small or too large for steps in float16."""
    weights = {repr(name): removed.network.get_parameter(name).detach() for name in removed.masks}
    largest = {name: float(weight.abs().max()) for name, weight in weights.items()}
    outside = {
        f"smaller than {SMALLEST:g}": [name for name, w in largest.items() if 0 < w < SMALLEST],
        f"larger than {LARGEST:g}": [name for name, w in largest.items() if w > LARGEST],
    }
    for how, names in outside.items():
        if names:
            warn(
                f"weights of {', '.join(names)} are {how}, which steps in float16 cannot hold: "
                "multiply them by a constant, and divide their layer's outputs by it",
            )


def warn_of_emptied(removed: Removed, result: Compressed) -> None:
    """Name the layers that lost every weight."""
    emptied = []
    for name in removed.masks:
        before = removed.folded.network.get_parameter(name)
        entry = result.get(name)
        if isinstance(entry, Codes) and before.any() and not entry.decode().any():
            emptied.append(repr(name))
    if emptied:
        warn(
            f"no weight of {', '.join(emptied)} is left: little or no relevance reaches them. It "
            "never does where a layer's outputs act only as a divisor or through a comparison or "
            "an index; if these do, take a recipe without relevance (recipe='uniform')",
        )


def warn_if_ruined(
    model: nn.Module, result: Compressed, images: Tensor, labels: Tensor, before: float
) -> None:
    """Warn where much accuracy on the reference images is lost, or was never there."""
    after = evaluate(result.to_model(model), images, labels)
    chance = 100 * float(labels.bincount().max()) / len(labels)
    if before <= chance + LOST / 2 < 100:
        warn(
            f"the model itself is near chance on the reference images ({before:.1f} %): are they "
            "normalised as in training, and the labels in its order?",
        )
    elif before - after > LOST:
        warn(
            f"compression took the accuracy on the reference images from {before:.1f} to "
            f"{after:.1f} %: take a gentler recipe or a larger budget",
        )
