"""C++ kernels, and what compiles them."""

from pathlib import Path

#: Where their sources lie.
FOLDER = Path(__file__).parent
