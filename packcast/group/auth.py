"""The token's handshake: both sides prove that they hold it, neither ever sends it.

A proof covers both nonces and the transfer's id, and is tagged by side, so that none can be
replayed or reflected. Pure functions; the sentences for what does not fit are made here too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from packcast.errors import RendezvousError
from packcast.group.wire import PROTOCOL, Message

NONCE_NBYTES = 32
MAX_TRANSFER_ID_LENGTH = 128

_SENDER = b"packcast sender\0"
_WORKER = b"packcast worker\0"
_TOKEN_HINT = "set the same PACKCAST_TOKEN on both sides"


def new_nonce() -> str:
    """A fresh nonce, in hex."""
    return secrets.token_hex(NONCE_NBYTES)


def nonce_of(message: Message) -> str:
    """A peer's nonce; raises ValueError if it is none."""
    nonce = message.get("nonce")
    if not isinstance(nonce, str) or len(nonce) != 2 * NONCE_NBYTES or not nonce.isascii():
        raise ValueError("no nonce")
    return nonce


def transfer_of(message: Message) -> str:
    """The transfer's id in a CHALLENGE; raises ValueError if it is none."""
    transfer = message.get("transfer")
    if not isinstance(transfer, str) or not 0 < len(transfer) <= MAX_TRANSFER_ID_LENGTH:
        raise ValueError("no transfer id")
    if not transfer.isprintable():
        raise ValueError("no transfer id")
    return transfer


def worker_proof(token: bytes, nonce_sender: str, nonce_worker: str, transfer: str) -> str:
    """What only a worker with the token can say, in hex."""
    return _proof(_WORKER, token, nonce_sender, nonce_worker, transfer)


def sender_proof(token: bytes, nonce_sender: str, nonce_worker: str, transfer: str) -> str:
    """What only a sender with the token can say, in hex."""
    return _proof(_SENDER, token, nonce_sender, nonce_worker, transfer)


def _proof(side: bytes, token: bytes, nonce_sender: str, nonce_worker: str, transfer: str) -> str:
    # The nonces have one length each, so the concatenation can be read in one way only.
    text = side + nonce_sender.encode() + nonce_worker.encode() + transfer.encode()
    return hmac.new(token, text, hashlib.sha256).hexdigest()


def same_proof(message: Message, expected: str) -> bool:
    """Whether the message carries this proof, in constant time."""
    proof = message.get("proof")
    if not isinstance(proof, str) or not proof.isascii():
        return False
    return hmac.compare_digest(proof.encode(), expected.encode())


def protocols_apart(worker: str, worker_protocol: object) -> RendezvousError:
    """Both sides' sentence where their protocols differ, as the sender says it."""
    spoken = worker_protocol if isinstance(worker_protocol, int) else "unknown"
    return RendezvousError(
        f"{worker} speaks protocol {spoken}, the sender protocol {PROTOCOL}",
        hint="install the same packcast on every host",
    )


def worker_has_no_token(where: str) -> RendezvousError:
    """The worker's sentence where only the sender has a token."""
    return RendezvousError(
        f"the sender at {where} asks for a token and this worker has none", hint=_TOKEN_HINT
    )


def sender_has_no_token(where: str) -> RendezvousError:
    """The worker's sentence where only the worker has a token."""
    return RendezvousError(
        f"this worker has a token and the sender at {where} asks for none", hint=_TOKEN_HINT
    )


def sender_proof_is_wrong(where: str) -> RendezvousError:
    """The worker's sentence where the sender cannot prove that it has the worker's token."""
    return RendezvousError(
        f"the sender at {where} does not have this worker's token", hint=_TOKEN_HINT
    )


def worker_proof_is_wrong() -> RendezvousError:
    """The sender's sentence, told to the worker, where the worker's token is another."""
    return RendezvousError("this worker's token is not the sender's", hint=_TOKEN_HINT)
