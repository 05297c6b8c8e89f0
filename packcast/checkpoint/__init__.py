"""What is on disk: safetensors headers, checkpoints, and what will be sent of them.

Imports neither torch nor numpy.
"""

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.header import Header, parse_header, read_header
from packcast.checkpoint.names import clash_of, name_fault
from packcast.checkpoint.outgoing import (
    FileSpec,
    Literal,
    OutgoingFile,
    Segment,
    SourceRun,
    outgoing_files,
)
from packcast.checkpoint.sourcefile import SourceFile
from packcast.checkpoint.tensor_table import DTYPE_BITS, Tensor

__all__ = [
    "DTYPE_BITS",
    "Checkpoint",
    "FileSpec",
    "Header",
    "Literal",
    "OutgoingFile",
    "Segment",
    "SourceFile",
    "SourceRun",
    "Tensor",
    "clash_of",
    "name_fault",
    "open_checkpoint",
    "outgoing_files",
    "parse_header",
    "read_header",
]
