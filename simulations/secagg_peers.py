"""The peers of the benchmark of secure aggregation: Flower's SecAgg+ and TenSEAL's CKKS, on the same vectors.

Both are called as functions of this process. Nothing travels, and only what computes is timed. Flower's clients are its
own four steps, which include reading the trained vector and writing the masked one; for its server its own functions are
called in the order of its workflow, which is one with the network and cannot be called without. Flower's does less than
ours: no signatures, no commitments, no agreement on the survivors and none on the model. Its masks come from a generator
with a 32-bit seed that is not made for cryptography.

CKKS stands for sums under homomorphic encryption with one key for all sites.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

from confide.common.errors import MissingPackage, RunError
from confide.common.messages import Floats
from confide.simulations.measurement import Cost, Stopwatch

# Flower's defaults. All sites weigh the same, so the weight that travels with each vector is 1.
CLIPPING, STEPS, MODULUS, WEIGHT = 8.0, 1 << 22, 1 << 32, 1
FLOWER_STEP = 2 * CLIPPING / STEPS
CKKS_ERROR = 1e-6  # what CKKS may be off by with the parameters below; 1e-8 was seen

Answer = Mapping[str, Any]


def flower_round(
    updates: Sequence[Floats], threshold: int, dropped: Collection[int] = ()
) -> tuple[npt.NDArray[np.float64], Cost]:
    """Return the mean that a round of Flower's SecAgg+ gives, over a complete graph, and what it cost.

    Args:
        updates: Each site's (n,), float32, of magnitudes below CLIPPING.
        threshold: How many shares open a secret.
        dropped: Places in `updates` of those who share keys and then send no vector.
    """
    everybody = range(len(updates))
    left = [node for node in everybody if node not in dropped]
    site, server = Stopwatch(), Stopwatch()
    states = [SecAggPlusState(nid=node) for node in everybody]
    terms = _terms(len(updates), threshold)
    with site:
        keys = [_setup(state, terms) for state in states]
    told = _record({str(node): [keys[node][Key.PUBLIC_KEY_1], keys[node][Key.PUBLIC_KEY_2]] for node in everybody})
    with site:
        shared = [_share_keys(state, told) for state in states]
    inboxes = _inboxes(shared)
    trained = {node: ndarrays_to_parameters([updates[node]]) for node in left}
    with site:
        masked = [_collect_masked_vectors(states[node], inboxes[node], WEIGHT, trained[node]) for node in left]
    public: dict[int, Any] = {node: keys[node][Key.PUBLIC_KEY_1] for node in everybody}
    asked = _record(
        {Key.ACTIVE_NODE_ID_LIST: left, Key.DEAD_NODE_ID_LIST: [node for node in everybody if node in dropped]}
    )
    with site:
        opened = [_unmask(states[node], asked) for node in left]
    with server:
        total = _sum(masked)
        mean = _mean(_opened(total, opened, left, public), len(left))
    return mean, Cost(site_s=site.seconds / len(updates), server_s=server.seconds)


class Ckks:
    """Sites that encrypt under one CKKS key: N = 8192, moduli of 60, 40 and 40 bits, a scale of 2^40.

    Raises:
        MissingPackage: TenSEAL is not installed.
    """

    def __init__(self) -> None:
        try:
            import tenseal
        except ImportError as error:
            raise MissingPackage("tenseal", "ckks") from error
        self._tenseal = tenseal
        # One thread, as everybody has; TenSEAL says on standard output what is not possible with long vectors.
        self._keys = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40], n_threads=1
        )
        self._keys.global_scale = 2**40

    def send(self, update: Floats) -> tuple[float, int]:
        """Return the processor seconds that encrypting and writing `update`, (n,), takes a site, and the bytes.

        Raises:
            RunError: What was sent does not decrypt to the update.
        """
        site = Stopwatch()
        with site:
            encrypted = self._tenseal.ckks_vector(self._keys, update)
            sent = encrypted.serialize()
        received = self._tenseal.ckks_vector_from(self._keys, sent).decrypt()
        error = float(np.abs(np.asarray(received) - update).max())
        if error > CKKS_ERROR:
            raise RunError(f"CKKS is off by {error:g}; at most {CKKS_ERROR:g} was due. Its figures would mean nothing.")
        return site.seconds, len(sent)


def _terms(sites: int, threshold: int) -> ConfigRecord:
    return _record(
        {
            Key.SAMPLE_NUMBER: sites,
            Key.SHARE_NUMBER: sites,
            Key.THRESHOLD: threshold,
            Key.CLIPPING_RANGE: CLIPPING,
            Key.TARGET_RANGE: STEPS,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: float(WEIGHT),
        }
    )


def _record(values: Mapping[str, Any]) -> ConfigRecord:
    return ConfigRecord(dict(values))


def _inboxes(shared: Sequence[Answer]) -> list[ConfigRecord]:
    """Return for each site who sealed shares for it, and the boxes."""
    senders: list[list[int]] = [[] for _ in shared]
    boxes: list[list[bytes]] = [[] for _ in shared]
    for sender, answer in enumerate(shared):
        for receiver, box in zip(answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST], strict=True):
            senders[receiver].append(sender)
            boxes[receiver].append(box)
    return [
        _record({Key.SOURCE_LIST: sources, Key.CIPHERTEXT_LIST: sealed})
        for sources, sealed in zip(senders, boxes, strict=True)
    ]


def _sum(masked: Sequence[Answer]) -> list[npt.NDArray[Any]]:
    """Return the masked sum, as `collect_masked_vectors_stage` of the workflow computes it."""
    total = None
    for answer in masked:
        vector = [bytes_to_ndarray(part) for part in answer[Key.MASKED_PARAMETERS]]
        total = vector if total is None else parameters_addition(total, vector)
    if total is None:
        raise RunError("Every site of Flower's round dropped out; at least one must be left.")
    return parameters_mod(total, MODULUS)


def _opened(
    total: list[npt.NDArray[Any]], opened: Sequence[Answer], left: Sequence[int], public: Mapping[int, bytes]
) -> list[npt.NDArray[Any]]:
    """Return the sum without masks, as `unmask_stage` of the workflow computes it."""
    shares: dict[int, list[bytes]] = {node: [] for node in public}
    for answer in opened:
        for owner, share in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True):
            shares[owner].append(share)
    for node, held in shares.items():
        secret = combine_shares(held)
        if node in left:
            total = parameters_subtraction(total, pseudo_rand_gen(secret, MODULUS, get_parameters_shape(total)))
            continue
        for peer in public.keys() - {node}:
            key = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(public[peer]))
            mask = pseudo_rand_gen(key, MODULUS, get_parameters_shape(total))
            total = parameters_addition(total, mask) if node > peer else parameters_subtraction(total, mask)
    return parameters_mod(total, MODULUS)


def _mean(total: list[npt.NDArray[Any]], count: int) -> npt.NDArray[np.float64]:
    """Return the weighted mean, as `unmask_stage` of the workflow computes it."""
    weight, vectors = factor_extract(total)
    (mean,) = dequantize(vectors, CLIPPING, STEPS)
    mean += -(count - 1) * CLIPPING
    mean *= STEPS / weight
    return mean
