"""The experiments: what is compressed, how runs are done once, and what they say.

From bottom to top; each module uses only those above it in this list:

- ``paths``, ``progress``: where files are, how far a run has come
- ``data``, ``networks``, ``training``, ``bases``, ``profiles``: images, networks, how they are
  trained, how much of it
- ``digests``, ``records``, ``tables``: where a run is found again, and what tables say of many
- ``jobs``, ``verdicts``, ``bdrate``, ``readings``, ``claims``: runs side by side; from tables to
  what holds
- ``results``, ``sweep``: files that are written, ``Study``
- ``probes``, ``drift``, ``lessons``, ``peers``: what notebooks compute or read besides
- ``names``, ``palette``, ``figures``, ``pictures``, ``sketches``, ``sliders``, ``sentences``,
  ``answers``: what notebooks show, how it is called and how it looks
- ``publish``, ``report``, ``stamps``, ``verify``, ``__main__``: tables in Markdown, one HTML file,
  the command line
"""

from importlib import import_module

_FROM = {
    "data": ("DATASETS", "Dataset", "load", "sample", "split"),
    "jobs": ("float_bytes",),
    "networks": ("NETWORKS", "Network", "build"),
    "profiles": ("PROFILES", "Case", "Profile"),
    "records": ("cost",),
    "sweep": ("Study",),
    "tables": ("Table", "operating_points", "smallest_files", "summarise"),
    "verdicts": ("Claim", "overview"),
}
_MODULE = {name: module for module, names in _FROM.items() for name in names}
__all__ = list(_MODULE)


def __getattr__(name: str):
    """Import what is asked for, when it is: ``python -m study fresh`` needs no torch."""
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE[name]}", __name__), name)
    return value
