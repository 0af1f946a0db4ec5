"""Tensors that may leave memory between two uses: optimizer states paged to a file on a CPU, to host memory on a GPU.

``Pager`` is the interface, one object an optimizer; behind it stand engines: ``mapped`` (a file mapped into memory) and
``unified`` (CUDA's managed memory). ``window`` decides what is resident, ``empty`` is the allocator by itself.
"""

from peftk.paging.engine import Stats
from peftk.paging.pager import Pager, empty, resident, stats

__all__ = ["Pager", "Stats", "empty", "resident", "stats"]
