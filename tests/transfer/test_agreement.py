"""Who fits together, who reads, and what every rank is offered: in one process, without a group."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from packcast.checkpoint.checkpoint import Checkpoint, open_checkpoint
from packcast.checkpoint.outgoing import OutgoingFile, outgoing_files
from packcast.control.rank_info import Role
from packcast.errors import CheckpointError, RendezvousError
from packcast.packed.plan import BLOCK
from packcast.settings import Settings
from packcast.transfer.agreement import (
    NUM_SAMPLES,
    check_device,
    check_one_checkpoint,
    choose_readers,
    make_offers,
    same_files_as_offered,
    take_samples,
)
from packcast.transfer.offer import Offer, Sample
from tests.helpers.checkpoints import sharded, write_safetensors
from tests.helpers.processes import num_descriptors
from tests.transfer.offers import assigned, changed, member, offer_of, valid_offer

SENDER = member(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of about 1.6 MiB, their index and sidecars, one of them empty."""
    return sharded(tmp_path_factory.mktemp("agreement") / "model", 2, 2 * BLOCK)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def files(checkpoint: Checkpoint) -> tuple[OutgoingFile, ...]:
    return outgoing_files(checkpoint)


def with_samples(files: tuple[OutgoingFile, ...], checkpoint: Checkpoint) -> Offer:
    offer = offer_of([file.spec for file in files], (0, 1))
    return changed(offer, samples=take_samples(checkpoint, files), include=(), exclude=())


def test_ranks_that_see_one_checkpoint_fit_together_whatever_its_path() -> None:
    check_one_checkpoint([SENDER, member(1, checkpoint="/elsewhere"), member(2, "recv")], SENDER)


def test_a_rank_that_cannot_read_the_same_path_fits_too() -> None:
    check_one_checkpoint([SENDER, member(1, fingerprint=None)], SENDER)


@pytest.mark.parametrize(
    ("fingerprint", "why"),
    [("f2", "whose files have other sizes or headers"), (None, "which it cannot read")],
)
def test_two_checkpoints_are_named_with_both_ranks(fingerprint: str | None, why: str) -> None:
    other = member(3, host="host-b", checkpoint="/models/other", fingerprint=fingerprint)
    with pytest.raises(RendezvousError) as caught:
        check_one_checkpoint([SENDER, member(1, "recv"), other], SENDER)
    assert caught.value.message == (
        "different checkpoints: rank 0 (host-a, pid 1000) sends /models/m,"
        f" but rank 3 (host-b, pid 1003) names /models/other, {why}"
    )


def test_one_path_with_different_files_on_two_hosts_is_two_checkpoints() -> None:
    with pytest.raises(RendezvousError, match="different checkpoints"):
        check_one_checkpoint([SENDER, member(1, host="host-b", fingerprint="f2")], SENDER)


@pytest.mark.parametrize(
    ("wanted", "readers"), [(1, (2,)), (2, (2, 3)), (3, (2, 3, 5)), (None, (2, 3, 5))]
)
def test_readers_are_the_sender_then_the_lowest_ranks_that_ran_send(
    wanted: int | None, readers: tuple[int, ...]
) -> None:
    roles: tuple[Role, ...] = ("recv", "recv", "send", "send", "recv", "send")
    members = [member(rank, role) for rank, role in enumerate(roles)]
    assert choose_readers(members, members[2], wanted) == readers


def test_a_rank_that_cannot_read_is_passed_over_unless_all_shall_read() -> None:
    members = [SENDER, member(1, fingerprint=None, host="host-b"), member(2)]
    assert choose_readers(members, SENDER, 2) == (0, 2)
    with pytest.raises(RendezvousError, match=r"--readers all: rank 1 \(host-b, .* cannot read"):
        choose_readers(members, SENDER, None)


def test_too_few_readers_are_counted() -> None:
    members = [SENDER, member(1, fingerprint=None), member(2), member(3, "recv")]
    with pytest.raises(RendezvousError, match="--readers 3: only 2 ranks"):
        choose_readers(members, SENDER, 3)


def test_a_sender_alone_is_all_readers() -> None:
    assert choose_readers([SENDER, member(1, "recv")], SENDER, None) == (0,)


def offers_for(
    checkpoint: Checkpoint, files: tuple[OutgoingFile, ...], readers: int | None
) -> dict[int, Offer]:
    """For a sender and a reader on one host, and two workers on another."""
    settings = Settings(
        command="send",
        checkpoint=checkpoint.path,
        buffer_size=BLOCK,
        num_buffers=3,
        staging=5 * BLOCK,
        readers=readers,
    )
    members = [member(0), member(1), member(2, "recv", host="b"), member(3, "recv", host="b")]
    return make_offers(settings, checkpoint, files, members, members[0])[0]


def test_every_rank_gets_the_same_offer_but_for_its_assignment(
    checkpoint: Checkpoint, files: tuple[OutgoingFile, ...]
) -> None:
    offers = offers_for(checkpoint, files, readers=2)
    assert [offer.rank for offer in offers.values()] == list(offers) == [0, 1, 2, 3]
    assert (
        len({repr(changed(offer, assignment=offers[0].assignment)) for offer in offers.values()})
        == 1
    )
    assert [offer.assignment.ranks_on_host for offer in offers.values()] == [2, 2, 2, 2]
    assert [offer.assignment.readers_on_host for offer in offers.values()] == [2, 2, 1, 1]
    one = offers[0]
    assert (one.backend, one.device, one.world_size) == ("gloo", "cpu", 4)
    assert (one.buffer_size, one.num_buffers, one.staging) == (BLOCK, 3, 5 * BLOCK)
    assert one.files == tuple(file.spec for file in files)


@pytest.mark.parametrize("readers", [1, 2, None])
def test_what_is_offered_passes_the_receivers_own_checks(
    checkpoint: Checkpoint, files: tuple[OutgoingFile, ...], readers: int | None
) -> None:
    for offer in offers_for(checkpoint, files, readers).values():
        received = Offer.from_bytes(offer.to_bytes(), offer.assignment)
        assert received == offer
        assert {chunk.root for chunk in received.chunks()} == set(offer.readers)


def test_samples_are_taken_for_other_readers_only(
    checkpoint: Checkpoint, files: tuple[OutgoingFile, ...]
) -> None:
    assert offers_for(checkpoint, files, readers=1)[0].samples == ()
    assert len(offers_for(checkpoint, files, readers=2)[0].samples) == NUM_SAMPLES


def test_samples_are_blocks_of_the_files_with_their_digests(
    checkpoint: Checkpoint, files: tuple[OutgoingFile, ...]
) -> None:
    for sample in take_samples(checkpoint, files):
        content = (checkpoint.path / files[sample.file].spec.name).read_bytes()
        block = content[sample.offset : sample.offset + BLOCK]
        assert sample.offset % BLOCK == 0
        assert 0 < len(block) == sample.nbytes
        assert sample.digest == xxhash.xxh3_128_hexdigest(block)


def test_a_copy_elsewhere_is_the_same_files(
    tmp_path: Path, checkpoint: Checkpoint, files: tuple[OutgoingFile, ...]
) -> None:
    copy = open_checkpoint(shutil.copytree(checkpoint.path, tmp_path / "copy", copy_function=copy1))
    before = num_descriptors()
    mine = same_files_as_offered(copy, with_samples(files, checkpoint))
    assert [file.spec.name for file in mine] == [file.spec.name for file in files]
    assert num_descriptors() == before


def copy1(source: str, target: str) -> None:
    """Without times."""
    shutil.copyfile(source, target)


def test_a_selection_is_made_again_on_the_reader(checkpoint: Checkpoint) -> None:
    files = outgoing_files(checkpoint, include=("layer.*.1",))
    offer = with_samples(files, checkpoint)
    chosen = changed(offer, include=("layer.*.1",))
    assert same_files_as_offered(checkpoint, chosen) == files
    with pytest.raises(RendezvousError, match="is not the sender's"):
        same_files_as_offered(checkpoint, offer)


@pytest.mark.parametrize("at", [0, BLOCK])
def test_a_reader_whose_block_differs_is_told_file_and_place(
    tmp_path: Path, checkpoint: Checkpoint, files: tuple[OutgoingFile, ...], at: int
) -> None:
    folder = shutil.copytree(checkpoint.path, tmp_path / "copy")
    number = next(i for i, file in enumerate(files) if file.spec.name.endswith(".safetensors"))
    name = files[number].spec.name
    content = bytearray((folder / name).read_bytes())
    block = bytes(content[at : at + BLOCK])
    content[at + len(block) - 1] ^= 1  # in a tensor: names, sizes and headers stay equal
    (folder / name).write_bytes(content)
    offer = offer_of([file.spec for file in files], (0, 1))
    sample = Sample(number, at, len(block), xxhash.xxh3_128_hexdigest(block))
    copy = open_checkpoint(folder)
    assert copy.fingerprint() == checkpoint.fingerprint()
    before = num_descriptors()
    offer = changed(offer, samples=(sample,), include=(), exclude=())
    with pytest.raises(RendezvousError, match=rf"{name} differs from the sender's at byte {at} "):
        same_files_as_offered(copy, offer)
    assert num_descriptors() == before


def longer(folder: Path) -> None:
    (folder / "config.json").write_text("{}   ")


def renamed(folder: Path) -> None:
    (folder / "config.json").rename(folder / "other.json")


def more(folder: Path) -> None:
    (folder / "zzz.json").write_text("{}")


def fewer(folder: Path) -> None:
    shards = sorted(folder.glob("*.json"))
    shards[-1].unlink()


def other_header(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes().replace(b"layer.1.0", b"LAYER.1.0", 1))


@pytest.mark.parametrize("change", [longer, renamed, more, fewer, other_header])
def test_a_reader_with_other_files_is_refused(
    tmp_path: Path, checkpoint: Checkpoint, change: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(checkpoint.path, tmp_path / "copy")
    (folder / "model.safetensors.index.json").unlink()
    files = outgoing_files(open_checkpoint(folder))
    offer = with_samples(files, open_checkpoint(folder))
    change(folder)
    with pytest.raises(RendezvousError, match="this reader"):
        same_files_as_offered(open_checkpoint(folder), offer)


def test_a_reader_whose_file_changes_meanwhile_says_so(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"t": ("U8", (BLOCK,))})
    checkpoint = open_checkpoint(tmp_path)
    offer = with_samples(outgoing_files(checkpoint), checkpoint)
    with (tmp_path / "m.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="changed while"):
        same_files_as_offered(checkpoint, offer)


def test_nccl_where_torch_has_none_is_a_matter_of_who_takes_part() -> None:
    check_device(valid_offer())
    offer = changed(valid_offer(), backend="nccl", assignment=assigned(3, "cuda:99"))
    with pytest.raises(RendezvousError, match="offers nccl on cuda:99") as caught:
        check_device(offer)
    assert caught.value.exit_code == 4


def test_the_chain_goes_from_host_to_host_and_is_not_told_where_it_is_by_rank(
    checkpoint: Checkpoint, files: tuple[OutgoingFile, ...]
) -> None:
    settings = Settings(command="send", checkpoint=checkpoint.path)

    def offer(hosts: str) -> Offer:
        members = [member(rank, host=host) for rank, host in enumerate(hosts)]
        return make_offers(settings, checkpoint, files, members, members[0])[0][0]

    assert offer("ababa").chain == (0, 2, 4, 1, 3)
    assert offer("aabbc").chain == ()
    assert list(offer("aabbc").order) == [0, 1, 2, 3, 4]
