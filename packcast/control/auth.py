"""The token's handshake: both sides prove that they have it, neither sends it.

Frames of fixed size, the same in every protocol from 4 on: nothing else is read before the proof.

    sender  CHALLENGE  magic, protocol, whether a token is wanted, nonce, transfer id
    worker  PROOF      protocol, nonce, HMAC-SHA256(token, "worker", challenge, protocol, nonce)
    sender  ACCEPTED   HMAC-SHA256(token, "sender", challenge, protocol, nonce), or REJECTED

A proof covers both nonces, the transfer's id and its side, so that it cannot be replayed or
reflected. Without a token the key is empty, and anybody can make a proof.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from dataclasses import dataclass

from packcast.control.frames import ACCEPTED, CHALLENGE, PROOF, PROTOCOL, REJECTED, ProtocolError
from packcast.errors import RendezvousError

MAX_TRANSFER_ID_NBYTES = 64

_MAGIC = b"packcast"
_CHALLENGE = struct.Struct("!8sH?32s")
_PROOF = struct.Struct("!H32s32s")
_DIGEST_NBYTES = 32
_VERSION_HINT = "install the same packcast on every host"

FROM_STRANGER = {PROOF: _PROOF.size}
BEFORE_PROOF = {
    CHALLENGE: _CHALLENGE.size + MAX_TRANSFER_ID_NBYTES,
    ACCEPTED: _DIGEST_NBYTES,
    REJECTED: 0,
}


@dataclass(frozen=True, slots=True)
class Challenge:
    """The sender's first frame on a connection; `body` is what travels and what proofs cover."""

    protocol: int
    wants_token: bool
    transfer_id: str
    body: bytes

    @staticmethod
    def new(transfer_id: str, *, wants_token: bool) -> Challenge:
        """With a fresh nonce."""
        encoded_id = transfer_id.encode()
        assert 0 < len(encoded_id) <= MAX_TRANSFER_ID_NBYTES
        nonce = secrets.token_bytes(32)
        body = _CHALLENGE.pack(_MAGIC, PROTOCOL, wants_token, nonce) + encoded_id
        return Challenge(PROTOCOL, wants_token, transfer_id, body)

    @staticmethod
    def parse(body: bytes) -> Challenge:
        """Raises ProtocolError."""
        if len(body) <= _CHALLENGE.size or not body.startswith(_MAGIC):
            raise ProtocolError("it does not say who it is")
        _, protocol, wants_token, _ = _CHALLENGE.unpack_from(body)
        transfer_id = body[_CHALLENGE.size :].decode("ascii", "replace")
        if not transfer_id.isprintable() or not transfer_id.isascii():
            raise ProtocolError("no transfer id")
        return Challenge(protocol, wants_token, transfer_id, body)


@dataclass(frozen=True, slots=True)
class Proof:
    """A worker's answer to a challenge."""

    protocol: int
    nonce: bytes
    digest: bytes

    @staticmethod
    def new(token: bytes | None, challenge: Challenge, protocol: int = PROTOCOL) -> Proof:
        """With a fresh nonce."""
        nonce = secrets.token_bytes(32)
        return Proof(protocol, nonce, _digest(b"worker", token, challenge, protocol, nonce))

    @staticmethod
    def parse(body: bytes) -> Proof:
        """Raises ProtocolError."""
        if len(body) != _PROOF.size:
            raise ProtocolError("a proof of another size")
        return Proof(*_PROOF.unpack(body))

    @property
    def body(self) -> bytes:
        """The bytes of the frame."""
        return _PROOF.pack(self.protocol, self.nonce, self.digest)

    def is_right(self, token: bytes | None, challenge: Challenge) -> bool:
        """Whether the worker has the token."""
        right = _digest(b"worker", token, challenge, self.protocol, self.nonce)
        return hmac.compare_digest(self.digest, right)

    def answer(self, token: bytes | None, challenge: Challenge) -> bytes:
        """The body of ACCEPTED, which only a sender with the token can make."""
        return _digest(b"sender", token, challenge, self.protocol, self.nonce)

    def is_answered(self, answer: bytes, token: bytes | None, challenge: Challenge) -> bool:
        """Whether the sender has the token."""
        return hmac.compare_digest(answer, self.answer(token, challenge))


def _digest(
    side: bytes, token: bytes | None, challenge: Challenge, protocol: int, nonce: bytes
) -> bytes:
    # Unambiguous: only the challenge, at the end, has no fixed size.
    text = side + struct.pack("!H", protocol) + nonce + challenge.body
    return hmac.digest(token or b"", text, hashlib.sha256)


def protocols_differ(worker: str, spoken: int, sender_spoken: int) -> RendezvousError:
    """The same error on every rank if a worker and the sender have different versions."""
    return RendezvousError(
        f"{worker} speaks protocol {spoken}, the sender protocol {sender_spoken}",
        hint=_VERSION_HINT,
    )
