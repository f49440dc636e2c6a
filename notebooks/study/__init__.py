"""The experiments: what is compressed, how runs are done once, and what they say.

From bottom to top; each module uses only those above it in this list:

- ``data``, ``networks``, ``training``, ``bases``, ``profiles``: images, networks, how they are
  trained, how much of it
- ``digests``, ``records``, ``tables``: where a run is found again, and what tables say of many
- ``jobs``, ``verdicts``, ``bdrate``, ``readings``, ``claims``: runs side by side; from tables to
  what holds
- ``results``, ``sweep``: files that are written, ``Study``
- ``probes``, ``drift``, ``lessons``: what notebooks compute besides
- ``names``, ``palette``, ``figures``, ``pictures``, ``sketches``, ``sliders``, ``answers``: what
  notebooks show, how it is called and how it looks
- ``publish``, ``stamps``, ``verify``, ``__main__``: tables in Markdown, the command line
"""

from .data import DATASETS, Dataset, load, sample, split
from .jobs import float_bytes
from .networks import NETWORKS, Network, build
from .profiles import PROFILES, Case, Profile
from .records import cost
from .sweep import Study
from .tables import Table, operating_points, smallest_files, summarise
from .verdicts import Claim, overview

__all__ = [
    "DATASETS", "NETWORKS", "PROFILES", "Case", "Claim", "Dataset", "Network", "Profile", "Study",
    "Table", "build", "cost", "float_bytes", "load", "operating_points", "overview", "sample",
    "smallest_files", "split", "summarise",
]  # fmt: skip
