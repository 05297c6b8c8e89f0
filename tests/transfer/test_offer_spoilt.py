"""An offer changed anywhere at random: refused, or still an offer in every respect."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from packcast.checkpoint.names import clash_of, name_fault
from packcast.errors import TransferError
from packcast.packed.plan import BLOCK, plan_digest
from packcast.transfer.offer import Offer
from tests.transfer.offers import JUNK, OFFER, outline_of, packed, valid_offer

# Sizes between these bounds are plans of up to millions of chunks: right, but slow to make here.
NUMBERS = (-1, 0, 1, 2, 3, 7, BLOCK, 2 * BLOCK, 1 << 31, 1 << 53, 1 << 63, 1 << 64, 10**30)
SPOILS = ("replace", "delete", "double", "swap")


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in it, with every key or index."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places_in(value[key])


def spoil(tree: Any, data: st.DataObject) -> None:
    """Change one thing anywhere in it."""
    places = [*places_in(tree)]
    holder, key = places[data.draw(st.integers(0, len(places) - 1), "place")]
    how = data.draw(st.sampled_from(SPOILS), "how")
    if how == "delete":
        del holder[key]
    elif how == "double" and isinstance(holder, list):
        holder.append(holder[key])
    elif how == "swap":
        other, at = places[data.draw(st.integers(0, len(places) - 1), "with")]
        holder[key] = deepcopy(other[at])
    else:
        junk = data.draw(st.sampled_from(sorted(JUNK)) | st.sampled_from(NUMBERS), "value")
        holder[key] = deepcopy(JUNK[junk]) if isinstance(junk, str) else junk


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_spoilt_offer_is_refused_or_is_an_offer_and_nothing_else(data: st.DataObject) -> None:
    outline = outline_of(valid_offer())
    for _ in range(data.draw(st.integers(1, 3), "count")):
        spoil(outline, data)
    check(packed(outline))


def check(data: bytes) -> None:
    """Refused with the one error, or an offer that nothing is wrong with."""
    try:
        offer = Offer.from_bytes(data, OFFER.assignment)
        chunks = offer.chunks()
    except TransferError:
        return
    names = [spec.name for spec in offer.files]
    assert not any(map(name_fault, names))
    assert clash_of(names) is None
    for spec in offer.files:
        num_tensors = len(spec.header.tensors) if spec.header else 0
        assert all(0 <= at < num_tensors for at in (*spec.elsewhere, *spec.unlisted))
        if spec.header:
            assert spec.header.file_nbytes == spec.nbytes
            ends = [spec.header.data_begin, *(tensor.end for tensor in spec.header.tensors)]
            assert ends == [*(tensor.begin for tensor in spec.header.tensors), spec.nbytes]
    for sample in offer.samples:
        assert sample.offset + sample.nbytes <= offer.files[sample.file].nbytes
    assert offer.rank < offer.world_size
    assert offer.device == "cpu" or offer.backend == "nccl"
    assert 0 < len(set(offer.readers)) == len(offer.readers)
    sizes = [spec.nbytes for spec in offer.files]
    assert plan_digest(sizes, offer.buffer_size, chunks) == offer.plan
    covered = [0] * len(sizes)
    for chunk in chunks:
        assert 0 <= chunk.root < offer.world_size
        assert 0 < chunk.nbytes <= offer.buffer_size
        for extent in chunk.extents:
            covered[extent.file] += extent.nbytes
    assert covered == sizes


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_spoilt_bytes_are_refused_or_an_offer_and_nothing_else(data: st.DataObject) -> None:
    offer = valid_offer()
    spoilt = bytearray(offer.to_bytes())
    for _ in range(data.draw(st.integers(1, 4), "count")):
        at = data.draw(st.integers(0, len(spoilt)), "at")
        cut = data.draw(st.integers(0, 8), "cut")
        spoilt[at : at + cut] = data.draw(st.binary(max_size=8) | st.just(spoilt[:at]), "put")
    check(bytes(spoilt))
