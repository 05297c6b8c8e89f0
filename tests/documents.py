"""Models of all JSON results except the bench's.

`python -m tests.documents` prints `packcast/result.schema.json` from them, which is installed.

Sizes are bytes, times are seconds, rates bytes per second. Tests compare the results of the
commands with the models.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel


class Model(BaseModel):
    """A model that forbids undeclared fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Document(Model):
    """The fields that every result begins with; `schema` is 1."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    schema_: Literal[1] = Field(alias="schema")
    version: str = Field(description="of packcast")
    ok: bool
    exit_code: int
    error: str | None
    hint: str | None = None


class DtypeTally(Model):
    """Tensors of one dtype."""

    tensors: int
    bytes: int


class LargestTensor(Model):
    """The tensor with the most bytes."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str


class ListedCheckpoint(Model):
    """Totals of the files that are sent."""

    path: str
    files: int
    tensors: int
    bytes: int
    dtypes: dict[str, DtypeTally]
    largest_tensor: LargestTensor | None


class ListedFile(Model):
    """A file that is sent; dtypes and metadata from `inspect` only."""

    name: str
    kind: Literal["shard", "sidecar"]
    bytes: int
    tensors: int
    dtypes: dict[str, int] | None = None
    metadata: dict[str, str] | None = None


class ListedTensor(Model):
    """A tensor, from `inspect --tensors`; `offset` is in the file."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str
    offset: int


class FileLeftOut(Model):
    """A file or folder that is not sent."""

    name: str
    reason: str


class Inspected(Document):
    """`packcast inspect`."""

    command: Literal["inspect"]
    checkpoint: ListedCheckpoint
    files: list[ListedFile]
    left_out: list[FileLeftOut]
    tensors: list[ListedTensor] | None = None
    warnings: list[str]


class RingSizes(Model):
    """Size and number of the buffers on each device, and the bound on staging."""

    size: int
    count: int
    staging: int


class MemoryLeft(Model):
    """A limit on host memory, and what it leaves."""

    limit: str
    free_bytes: int


class DiskSpace(Model):
    """One file system that copies would go to."""

    path: str
    copies: int
    bytes: int
    free_bytes: int | None


class WouldSend(Document):
    """`packcast send --dry-run`; the bytes are the peak on each rank, sender and workers alike."""

    command: Literal["send"]
    dry_run: Literal[True]
    checkpoint: ListedCheckpoint
    files: list[ListedFile]
    left_out: list[FileLeftOut]
    chunks: int
    buffers: RingSizes
    device: Literal["cpu", "cuda"]
    device_bytes: int
    pinned_bytes: int
    memory: list[MemoryLeft] = Field(description="this host's limits, the tightest first")
    space: list[DiskSpace]
    warnings: list[str]


class DifferingFile(Model):
    """A file that differs, with the tensors that differ."""

    file: str
    offset: int | None
    reason: str | None
    tensors: list[str]


class ComparedCopy(Model):
    """A copy compared with what it should be; the lists of names are complete."""

    path: str
    against: str
    equal: bool
    files: int
    missing: list[str]
    extra: list[str]
    differing: list[DifferingFile]
    unreadable: dict[str, str | None]


class Verified(Document):
    """`packcast verify`."""

    command: Literal["verify"]
    copies: list[ComparedCopy]
    manifest: str | None
    bytes: int
    seconds: float


class PartialCopy(Model):
    """The partial copy of a killed transfer, or of one that is running."""

    path: str
    state: Literal["used", "unused", "unknown"]
    owner: str | None
    nbytes: int
    removed: bool


class Cleaned(Document):
    """`packcast clean`."""

    command: Literal["clean"]
    partials: list[PartialCopy]


class Finding(Model):
    """The result of one check; `fix` says what to do about it."""

    topic: str
    state: Literal["ok", "note", "problem"]
    text: str
    fix: str | None


class Examined(Document):
    """`packcast doctor`."""

    command: Literal["doctor"]
    findings: list[Finding]


class StageResult(Model):
    """A stage from its first byte to its last, and how long the loop waited for it."""

    nbytes: int
    seconds: float
    bytes_per_second: float | None = None
    waiting_seconds: float


class FirstDifference(Model):
    """Where the first difference is."""

    file: str
    offset: int
    tensor: str | None


class WorkerResult(Model):
    """What a worker reported; in the worker's own result only the fields of its sink. The fields
    depend on `sink`. Lists of names are cut off at 8 KiB; `comparison` in the worker's own result
    is complete."""

    device: str | None = None
    pool: str | None = None
    seconds: float | None = Field(
        default=None, description="until its copy was durable, without waiting for other workers"
    )
    stages: dict[str, StageResult] | None = None
    peak_device_bytes: int | None = None
    pinned_bytes: int | None = None
    sink: Literal["write", "verify", "discard", "tensors"] | None = None
    target: str | None = Field(None, description="write: the directory")
    wrote: bool | None = Field(None, description="write: false where another rank has written it")
    published: bool | None = None
    sharing: int | None = Field(None, description="write: how many ranks have written that copy")
    manifest: str | None = None
    checkpoint: str | None = Field(None, description="verify: what was compared with")
    equal: bool | None = None
    difference: FirstDifference | None = None
    sentence: str | None = None
    differing_tensors: int | None = None
    differing_files: int | None = None
    missing: list[str] | None = None
    differing: list[str] | None = None
    extra: list[str] | None = None
    tensors: int | None = Field(None, description="tensors: how many came")
    notes: list[str] | None = None


class SentCheckpoint(Model):
    """The checkpoint that was sent; only the sender knows the path."""

    path: str | None
    files: int
    tensors: int
    bytes: int


class RankResult(Model):
    """One rank; `ok` is null if it is not known how it ended."""

    rank: int
    role: Literal["sender", "worker"]
    host: str
    device: str
    ok: bool | None
    error: str | None


class GroupResult(Model):
    """The ranks, the backend, and why that backend."""

    backend: str | None
    reason: str | None
    world_size: int | None
    ranks: list[RankResult]


class Transferred(Document):
    """`packcast send` on the sender, for the whole group; `recv`, and other ranks, for themselves.

    `seconds` are from the first byte to the last worker's proof, `total_seconds` of the whole
    command. `digest` is over `digests`, which are of each file, over its blocks' digests.
    """

    command: Literal["send", "recv"]
    started: str | None = Field(description="when, as ISO 8601 in UTC")
    rank: int | None
    checkpoint: SentCheckpoint
    group: GroupResult
    buffers: RingSizes
    pool: Literal["native", "python"] | None
    digest: str | None
    seconds: float
    total_seconds: float
    bytes_per_second: float
    stages: dict[str, StageResult]
    peak_device_bytes: int
    peak_pinned_bytes: int
    digests: dict[str, str]
    comparison: ComparedCopy | None = Field(description="of a worker that verified")
    workers: dict[str, WorkerResult] = Field(description="by rank")
    warnings: list[str]


class Failed(Document):
    """A command that failed early, for example on a usage error."""

    command: str


Result = Annotated[
    Transferred | WouldSend | Inspected | Verified | Cleaned | Examined | Failed,
    Field(union_mode="left_to_right"),
]


class AnyResult(RootModel[Result]):
    """One JSON result of a packcast command."""


def schema() -> dict[str, object]:
    """The JSON schema of every result."""
    found: dict[str, object] = AnyResult.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
